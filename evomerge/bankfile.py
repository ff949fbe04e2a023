"""Files of item banks: NAME.safetensors with the numbers and NAME.json with the names; to be passed on as they are."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.bank import Bank, Halves, Table
from evomerge.value import canonical, encoded, parse, plain, value

#: Version of the files' form; a bank of another version is refused.
FORM = 1

#: What stands for a missing response where all others are 0 or 1, and take a byte each.
_MISSING = 255

_NUMBERS = ("responses", "slope", "difficulty", "covariance")
Numbers = Mapping[str, NDArray[Any]]


@value
class _Names:
    """What NAME.json holds; `digest` is that of the whole bank, `counts` is for people."""

    form: int
    made_by: str
    source: str
    licence: str
    digest: str
    counts: Mapping[str, int]
    models: tuple[str, ...]
    items: tuple[str, ...]
    tasks: tuple[str, ...]
    strata: tuple[str, ...]


def files_of(path: Path) -> tuple[Path, Path]:
    """Return the two files of a bank, given either of them or their common name."""
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def write_bank(bank: Bank, path: Path) -> tuple[Path, Path]:
    """Write a bank as two files, whole or not at all.

    Args:
        bank: what to write.
        path: their name, with or without suffix.

    Returns:
        The files.

    Raises:
        ExperimentError: if one exists, or cannot be written.
    """
    numbers, names = files_of(path)
    for file in (numbers, names):
        if file.exists():
            raise ExperimentError(f"{file}: exists already; remove it, or give another name")
    table = bank.table
    arrays: dict[str, NDArray[Any]] = {
        "responses": _packed(table.values_MN),
        "slope": bank.slope_N,
        "difficulty": bank.difficulty_N,
        "covariance": bank.covariance_N3,
    }
    if table.margins_MN is not None:
        arrays["margins"] = table.margins_MN
    known = int(np.count_nonzero(~np.isnan(table.values_MN)))
    written = _Names(
        form=FORM,
        made_by=bank.made_by,
        source=bank.source,
        licence=bank.licence,
        digest=bank.digest,
        counts={"models": len(table.models), "items": len(table.items), "responses": known},
        models=table.models,
        items=table.items,
        tasks=table.tasks,
        strata=table.strata,
    )
    lines = ",\n".join(f"{json.dumps(key)}: {canonical(item)}" for key, item in plain(written).items())
    try:
        numbers.parent.mkdir(parents=True, exist_ok=True)
        _replace(numbers, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        _replace(names, encoded(f"{{\n{lines}\n}}\n"))
    except OSError as problem:
        what = f"cannot be written ({problem.strerror}); give another folder"
        raise ExperimentError(f"{numbers.parent}: {what}") from None
    return numbers, names


def read_bank(path: Path) -> Bank:
    """Read a bank, to the last bit the one that was written.

    Args:
        path: either of its files, or their common name.

    Raises:
        ExperimentError: one line that names the file and what is wrong with it.
    """
    numbers, names = files_of(path)
    found = _read_names(names)
    arrays = _read_numbers(numbers)
    shapes = {"slope": (len(found.items),), "difficulty": (len(found.items),), "covariance": (len(found.items), 3)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            got = f"{arrays[name].dtype} {arrays[name].shape}"
            raise ExperimentError(f"{numbers}: {name} must be float32 {shape} by {names.name}, got {got}; {_WAY}")
        if not np.isfinite(arrays[name].astype(np.float32)).all():
            raise ExperimentError(f"{numbers}: {name} holds a number that is not finite; {_WAY}")
    try:
        table = Table(
            values_MN=_unpacked(arrays["responses"], numbers),
            models=found.models,
            items=found.items,
            tasks=found.tasks,
            strata=found.strata,
            margins_MN=_margins(arrays, numbers),
        )
    except ValueError as problem:
        raise ExperimentError(f"{numbers} and {names.name}: {problem}; {_WAY}") from None
    bank = Bank(
        table=table,
        slope_N=arrays["slope"].astype(np.float32),
        difficulty_N=arrays["difficulty"].astype(np.float32),
        covariance_N3=arrays["covariance"].astype(np.float32),
        source=found.source,
        licence=found.licence,
        made_by=found.made_by,
    )
    if bank.digest != found.digest:
        raise ExperimentError(
            f"{names}: its digest is {found.digest}, that of what the two files hold is {bank.digest}: they are not of "
            f"one bank, or one was changed; {_WAY}"
        )
    return bank


_WAY = "copy both files anew, or fit the bank again"


def _read_names(path: Path) -> _Names:
    try:
        form = json.loads(path.read_bytes())
    except OSError as problem:
        raise ExperimentError(
            f"{path}: cannot be read ({problem.strerror}); give the name of a bank that `evomerge bank fit` wrote"
        ) from None
    except (ValueError, RecursionError) as problem:
        raise ExperimentError(f"{path}: not JSON ({problem}); {_WAY}") from None
    version = form.get("form") if isinstance(form, dict) else None
    if version != FORM:
        raise ExperimentError(f"{path}: a bank of form {version}, this evomerge reads form {FORM}; fit the bank again")
    return parse(_Names, form, str(path), ExperimentError)


def _read_numbers(path: Path) -> Numbers:
    try:
        arrays: Numbers = load(path.read_bytes())
    except OSError as problem:
        raise ExperimentError(f"{path}: cannot be read ({problem.strerror}); a bank is two files, {_WAY}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise ExperimentError(f"{path}: not safetensors ({' '.join(str(problem).split())}); {_WAY}") from None
    known = (*_NUMBERS, "margins")
    for name in arrays:
        if name not in known:
            raise ExperimentError(f"{path}: unknown tensor {name!r}; {nearest(name, known)}")
    for name in _NUMBERS:
        if name not in arrays:
            raise ExperimentError(f"{path}: no tensor {name!r}; {_WAY}")
    return arrays


def _packed(values_MN: Halves) -> NDArray[Any]:
    """Return responses as bytes if all are 0, 1 or missing; else as they are."""
    known_MN = ~np.isnan(values_MN)
    if np.isin(values_MN[known_MN], (0.0, 1.0)).all():
        return np.where(known_MN, values_MN, _MISSING).astype(np.uint8)
    return values_MN


def _unpacked(array: NDArray[Any], place: Path) -> Halves:
    if array.dtype == np.float16:
        return array.astype(np.float16)
    if array.dtype != np.uint8:
        raise ExperimentError(f"{place}: responses must be uint8 or float16, got {array.dtype}; {_WAY}")
    odd = array[(array > 1) & (array < _MISSING)]
    if len(odd):
        raise ExperimentError(f"{place}: responses in bytes must be 0, 1 or {_MISSING} (missing), got {odd[0]}; {_WAY}")
    return np.where(array == _MISSING, np.nan, array.astype(np.float16)).astype(np.float16)


def _margins(arrays: Numbers, place: Path) -> Halves | None:
    if "margins" not in arrays:
        return None
    if arrays["margins"].dtype != np.float16:
        raise ExperimentError(f"{place}: margins must be float16, got {arrays['margins'].dtype}; {_WAY}")
    return arrays["margins"].astype(np.float16)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)

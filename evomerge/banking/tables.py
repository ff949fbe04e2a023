"""Reads tables of responses: CSV and Parquet, one row a model or one row a response, and NumPy archives."""

import csv
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ExperimentError
from evomerge.fitness.bank import Table, item_name
from evomerge.fitness.responses import Floats

#: The columns of a table of one row a response, and those that it may have.
LONG = ("model", "item", "response")
_MORE = ("task", "stratum", "margin")

#: How a missing response may be written.
_MISSING = frozenset({"", "na", "nan", "none", "null"})


def read_csv(path: Path) -> Table:
    """Read a CSV file with a header: one row a model, its name first; or the columns model, item, response.

    A long table may have the columns task, stratum and margin too. Cells left empty are missing responses.

    Raises:
        ExperimentError: naming the file, and the row where there is one.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except OSError as problem:
        raise ExperimentError(f"{path}: cannot be read ({problem.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ExperimentError(f"{path}: not CSV ({problem}); give a text with commas between cells") from None
    if len(rows) < 2:
        raise ExperimentError(f"{path}: a header and at least one row are needed, got {len(rows)} rows")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ExperimentError(f"{path}, row {number}: {len(row)} cells, but the header has {len(rows[0])}")
    return _table([name.strip() for name in rows[0]], list(zip(*rows[1:], strict=True)), path)


def read_parquet(path: Path) -> Table:
    """Read a Parquet file; its columns are as those of `read_csv`.

    Raises:
        ExperimentError: naming the file, and the row where there is one.
    """
    # pyarrow is what `datasets` reads with, so it is always there; slow to start
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.ParquetFile(path).read()
    except (ArrowException, OSError, ValueError) as problem:
        raise ExperimentError(f"{path}: not Parquet ({' '.join(str(problem).split())[:120]})") from None
    if not found.num_rows or not found.num_columns:
        raise ExperimentError(f"{path}: at least one row and one column are needed, got {found.num_rows} rows")
    return _table(list(found.column_names), [column.to_pylist() for column in found.columns], path)


def read_npz(path: Path) -> tuple[Table, str, str]:
    """Read an archive with `models`, `items`, and `responses` (models x items) or `bits`, packed along the items.

    It may have `bench` (the task of each item), `margin`, `source` and `licence`. Rows or columns of one name are told
    apart as NAME, NAME#2 and so on. Nothing is unpickled.

    Returns:
        The table, its source and its licence.

    Raises:
        ExperimentError: naming the file and the array.
    """
    arrays = _arrays(path, ("models", "items", "responses", "bits", "bench", "margin", "source", "licence"))
    for name in ("models", "items"):
        if name not in arrays or arrays[name].ndim != 1:
            raise ExperimentError(f"{path}: needs an array {name!r}, one name each")
    models, items = ([str(name) for name in arrays[key].tolist()] for key in ("models", "items"))
    if "responses" not in arrays and "bits" not in arrays:
        raise ExperimentError(f"{path}: needs an array 'responses' (models x items), or 'bits' packed along the items")
    values_MN = _number_array(arrays["responses"], path, "responses") if "responses" in arrays else None
    if values_MN is None:
        bits = arrays["bits"]
        shape = (len(models), (len(items) + 7) // 8)
        if bits.dtype != np.uint8 or bits.shape != shape:
            raise ExperimentError(f"{path}: bits must be uint8 {shape}, got {bits.dtype} {bits.shape}")
        values_MN = np.unpackbits(bits, axis=1)[:, : len(items)].astype(np.float64)
    margins_MN = _number_array(arrays["margin"], path, "margin") if "margin" in arrays else None
    tasks = [str(name) for name in arrays["bench"].reshape(-1).tolist()] if "bench" in arrays else [""] * len(items)
    if len(tasks) != len(items):
        raise ExperimentError(f"{path}: bench names {len(tasks)} tasks for {len(items)} items")
    names = [item_name(task, item) for task, item in zip(tasks, items, strict=True)]
    table = table_of(_apart(models), _apart(names), values_MN, str(path), tasks=tasks, margins_MN=margins_MN)
    source, licence = (str(arrays[key]) if key in arrays else "" for key in ("source", "licence"))
    return table, source or path.name, licence


def table_of(
    models: Sequence[str],
    items: Sequence[str],
    values_MN: Floats,
    place: str,
    *,
    tasks: Sequence[str] = (),
    strata: Sequence[str] = (),
    margins_MN: Floats | None = None,
) -> Table:
    """Return a table, saying where it comes from if something is wrong with it.

    Raises:
        ExperimentError: naming the place.
    """
    odd = np.argwhere((values_MN < 0.0) | (values_MN > 1.0))
    if len(odd) and values_MN.shape == (len(models), len(items)):  # before half precision rounds, or overflows
        row, column = odd[0]
        raise ExperimentError(
            f"{place}: model {models[row]!r}, item {items[column]!r}: responses must lie in [0, 1], "
            f"got {values_MN[row, column]:g}; bring them to that range"
        )
    largest = float(np.finfo(np.float16).max)
    try:
        return Table(
            values_MN=values_MN.astype(np.float16),
            models=tuple(models),
            items=tuple(items),
            tasks=tuple(tasks) or ("",) * len(items),
            strata=tuple(strata) or ("",) * len(items),
            margins_MN=None if margins_MN is None else np.clip(margins_MN, -largest, largest).astype(np.float16),
        )
    except ValueError as problem:
        raise ExperimentError(f"{place}: {problem}") from None


def cells_of(
    models: Sequence[str], items: Sequence[str], values: Sequence[float], place: str
) -> tuple[list[str], list[str], Floats]:
    """Return models, items and the matrix [M, N] of responses given one by one.

    Raises:
        ExperimentError: if one is given twice.
    """
    rows, columns = list(dict.fromkeys(models)), list(dict.fromkeys(items))
    row, column = ({name: i for i, name in enumerate(names)} for names in (rows, columns))
    at = np.array([row[m] * len(columns) + column[i] for m, i in zip(models, items, strict=True)], dtype=np.intp)
    first, count = np.unique(at, return_counts=True)
    if len(first) < len(at):
        twice = int(first[np.argmax(count)])
        model, item = rows[twice // len(columns)], columns[twice % len(columns)]
        raise ExperimentError(f"{place}: model {model!r} answers item {item!r} twice; leave one out")
    values_MN = np.full((len(rows), len(columns)), np.nan)
    values_MN.reshape(-1)[at] = values
    return rows, columns, values_MN


def _table(header: Sequence[str], columns: Sequence[Sequence[Any]], path: Path) -> Table:
    if set(LONG) <= set(header):
        return _long(header, columns, path)
    models = [_name(cell) for cell in columns[0]]
    if len(header) < 2:
        raise ExperimentError(f"{path}: only one column; give the models' names, then a column an item, or {LONG}")
    values = [_numbers(column, name, path) for name, column in zip(header[1:], columns[1:], strict=True)]
    return table_of(models, header[1:], np.array(values).T, str(path))


def _long(header: Sequence[str], columns: Sequence[Sequence[Any]], path: Path) -> Table:
    odd = next((name for name in header if name not in (*LONG, *_MORE)), None)
    if odd is not None:
        raise ExperimentError(f"{path}: unknown column {odd!r} beside {', '.join(LONG)}; known: {', '.join(_MORE)}")
    found = dict(zip(header, columns, strict=True))
    models = [_name(cell) for cell in found["model"]]
    tasks = [_name(cell) for cell in found.get("task", [""] * len(models))]
    strata = [_name(cell) for cell in found.get("stratum", [""] * len(models))]
    called = [_name(item) for item in found["item"]]
    names = [item_name(task, item) if item else "" for task, item in zip(tasks, called, strict=True)]
    labels: dict[str, tuple[str, str]] = {}
    for name, label in zip(names, zip(tasks, strata, strict=True), strict=True):
        labels.setdefault(name, label)
    rows, items, values_MN = cells_of(models, names, _numbers(found["response"], "response", path).tolist(), str(path))
    margins_MN = None
    if "margin" in found:
        margins_MN = cells_of(models, names, _numbers(found["margin"], "margin", path).tolist(), str(path))[2]
    return table_of(
        rows,
        items,
        values_MN,
        str(path),
        tasks=[labels[name][0] for name in items],
        strata=[labels[name][1] for name in items],
        margins_MN=margins_MN,
    )


def _apart(names: Sequence[str]) -> list[str]:
    """Return names of which no two are alike.

    >>> _apart(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def _name(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _numbers(cells: Sequence[Any], column: str, path: Path) -> Floats:
    """Return a column of responses, NaN for missing ones."""
    try:
        return np.array(cells, dtype=np.float64)
    except (TypeError, ValueError):
        return np.array([_number(cell, column, row, path) for row, cell in enumerate(cells, start=1)])


def _number(cell: Any, column: str, row: int, path: Path) -> float:
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _MISSING):
        return float("nan")
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise ExperimentError(
            f"{path}, row {row} after the header, column {column!r}: {str(cell)[:40]!r} is no response; give a number "
            "in [0, 1], or nothing where there is none"
        ) from None


def _arrays(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return those of the wanted arrays that an archive has."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted if name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as problem:
        what = " ".join(str(problem).split())[:120]
        raise ExperimentError(f"{path}: not an archive of plain arrays ({what}); write one with np.savez") from None


def _number_array(array: NDArray[Any], path: Path, name: str) -> Floats:
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ExperimentError(f"{path}: {name} must be numbers, models x items, got {array.dtype} {array.shape}")
    return array.astype(np.float64)

"""Frozen values: dataclasses that refuse unknown keys, their plain (JSON) form and their digest."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml

from evomerge.errors import InvalidInput, nearest

T = TypeVar("T")

#: What JSON can hold.
Plain = Any  # a recursive alias would be exact, but mypy cannot narrow it usefully


@dataclass_transform(kw_only_default=True, frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are given by keyword only."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


#: What is its own JSON form, and most of what there is.
_SCALARS = frozenset((str, int, float, bool, type(None)))


@lru_cache(maxsize=256)
def _names(kind: Any) -> tuple[str, ...] | None:
    """Return the names of the fields of a class of values; None for any other class."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


@lru_cache(maxsize=256)
def _hints(kind: Any) -> Mapping[str, Any]:
    """Return the types of the fields of a class of values; they are looked up by name, which is slow."""
    return typing.get_type_hints(kind)


def plain(thing: object) -> Plain:
    """Return the JSON form of values, mappings, sequences and scalars.

    Fields that equal their default are kept, so that a written file says all that was decided.
    """
    kind = type(thing)
    if kind in _SCALARS:
        return thing
    names = _names(typing.cast(Hashable, kind))
    if names is not None:
        return {name: plain(getattr(thing, name)) for name in names}
    if isinstance(thing, Mapping):
        return {str(key): plain(item) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(item) for item in thing]
    return thing


def canonical(thing: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: if a number in it is not finite.
    """
    return json.dumps(plain(thing), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(thing: object) -> str:
    """Return the content address of a value: 16 hexadecimal digits of SHA-256 over `canonical`."""
    return hashlib.sha256(encoded(canonical(thing))).hexdigest()[:16]


def encoded(text: str) -> bytes:
    r"""Return JSON text as UTF-8.

    A lone surrogate, which UTF-8 cannot hold (Python puts it for a byte of a file name that is no text),
    is written as JSON escapes it, like ``\udc80``.
    """
    return text.encode(errors="backslashreplace")


def read_yaml(path: Path, kind: str, error: type[InvalidInput]) -> Plain:
    """Read what a YAML file holds.

    Args:
        path: the file.
        kind: what it should be, for the way out.
        error: the class of the error to raise.

    Raises:
        InvalidInput: (of the class `error`) if it cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); give the path of {kind}") from None
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: not UTF-8, or a date like 2020-13-01
        raise error(f"{path}: not YAML ({' '.join(str(problem).split())})") from None


def parse(
    cls: type[T], data: Plain, place: str, error: type[InvalidInput] = InvalidInput
) -> T:
    """Build a value from its plain form, refusing what does not fit.

    Args:
        cls: a class made by `value`.
        data: its plain form, as read from JSON or YAML.
        place: file and key path, named in errors.
        error: the class of the error to raise.

    Raises:
        InvalidInput: (of the class `error`) for an unknown or missing key, a wrong type, or what the class refuses.
    """
    if not isinstance(data, Mapping):
        raise error(f"{place}: expected a mapping for {cls.__name__}, got {_named(data)}")
    hints = _hints(typing.cast(Hashable, cls))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]  # cls is a dataclass by contract
    for key in data:
        if key not in fields:
            raise error(f"{place}.{key}: unknown key; {nearest(str(key), fields)}")
    given = {name: _convert(hints[name], data[name], f"{place}.{name}", error) for name in fields if name in data}
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in given and not optional:
            raise error(f"{place}.{name}: missing; {cls.__name__} needs it")
    try:
        return cls(**given)
    except InvalidInput as problem:
        raise (error(str(problem)) if str(problem).startswith(place) else error(f"{place}: {problem}")) from None


def _convert(hint: Any, data: Plain, place: str, error: type[InvalidInput]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        return _convert_union(arguments, data, place, error)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, data, place, error)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise error(f"{place}: expected a list, got {_named(data)}")
        if arguments[0] is float and all(type(item) is float for item in data) and all(map(math.isfinite, data)):
            return tuple(data)  # a ledger has millions of them
        return tuple(_convert(arguments[0], item, f"{place}[{i}]", error) for i, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise error(f"{place}: expected a mapping, got {_named(data)}")
        return {str(key): _convert(arguments[1], item, f"{place}.{key}", error) for key, item in data.items()}
    return _convert_scalar(hint, data, place, error)


def _convert_union(hints: Sequence[Any], data: Plain, place: str, error: type[InvalidInput]) -> Any:
    if type(data) in hints:
        return _convert(type(data), data, place, error) if data is not None else None
    problems = []
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return _convert(hint, data, place, error)
        except error as problem:
            problems.append(problem)
    raise problems[-1]


def _convert_scalar(hint: Any, data: Plain, place: str, error: type[InvalidInput]) -> Any:
    if hint is Any:
        return data
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        if isinstance(data, float) and not math.isfinite(data):
            raise error(f"{place}: expected a finite number, got {data}")
        try:
            return float(data)
        except OverflowError:
            raise error(f"{place}: expected a number below 1.8e308, got an integer beyond it") from None
    if isinstance(data, hint) and not (hint is int and isinstance(data, bool)):
        return data
    raise error(f"{place}: expected {hint.__name__}, got {_named(data)}")


def _named(data: Plain) -> str:
    return f"{type(data).__name__} {data!r}"[:80]

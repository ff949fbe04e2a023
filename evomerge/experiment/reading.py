"""Reads an experiment file and checks it to the last key; what is wrong is said in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evomerge.errors import ExperimentError, nearest
from evomerge.experiment.entries import SPACES, ExperimentFile
from evomerge.value import Plain


def read_file(path: Path) -> ExperimentFile:
    """Read and check the file alone.

    Raises:
        ExperimentError: one line with file, key path and the nearest valid name.
    """
    data = read_yaml(path)
    try:
        return ExperimentFile.model_validate(data)
    except ValidationError as problem:
        raise ExperimentError(one_line(problem, path, ExperimentFile)) from None


class _UniqueLoader(yaml.SafeLoader):
    """The safe loader, which refuses a key that is given twice."""


def _unique_mapping(loader: _UniqueLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    # Before merge keys (<<) are resolved: what they bring may well be given again.
    seen = set()
    for key, _ in node.value:
        if (key.tag, str(key.value)) in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
        seen.add((key.tag, str(key.value)))
    return loader.construct_mapping(node, deep=True)


_UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Plain]:
    """Read a YAML file that holds a mapping, refusing a key that is given twice.

    Raises:
        ExperimentError: one line with the file, and the line where there is one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise ExperimentError(
            f"{path}: cannot be read ({problem.strerror}); give the path of a YAML file, see `evomerge ls`"
        ) from None
    except UnicodeDecodeError:
        raise ExperimentError(f"{path}: not a text file; give the path of a YAML file") from None
    try:
        data = _UniqueLoader(text).get_single_data()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = f":{mark.line + 1}" if mark else ""
        raise ExperimentError(f"{path}{place}: not YAML: {problem.problem}") from None
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: a date that is none, 2020-13-45
        raise ExperimentError(f"{path}: not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(data, dict):
        raise ExperimentError(f"{path}: expected a mapping of keys, got {type(data).__name__}; see `evomerge schema`")
    return data


def one_line(problem: ValidationError, path: Path, model: type[BaseModel]) -> str:
    """Return the first problem as one line: file, key path, what, and the nearest valid name."""
    problems = problem.errors(include_url=False)
    # Of what may be one thing or another the deepest problem is that of the thing that was meant.
    here = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    first = next((p for p in problems if p["type"] == "extra_forbidden"), max(here, key=lambda p: len(p["loc"])))
    keys = [key for key in first["loc"] if key not in _UNION_BRANCHES]
    where = ".".join(str(key) for key in keys)
    if first["type"] == "extra_forbidden":
        what = f"unknown key; {nearest(str(keys[-1]), _keys_at(model, first['loc'][:-1]))}"
    elif first["type"] == "missing":
        what = "missing; see `evomerge schema`"
    elif first["type"] == "literal_error":
        options = [word.strip(" '") for word in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        what = f"unknown value {first['input']!r}; {nearest(str(first['input']), options)}"
    else:
        message = first["msg"][0].lower() + first["msg"][1:]
        what = f"{message}, got {first['input']!r}"[:160]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {where}: {what}{more}"


#: The kinds of spaces by the tag that stands in a location.
_KINDS = {f"{kind} space": entry for kind, entry in SPACES.items()}

#: Names that pydantic adds to a location for the branch of a union it tried.
_UNION_BRANCHES = frozenset(
    {"str", "ParameterEntry", "StepsEntry", "dict[str,any]", "list[str]", "float", "int", "a name", *_KINDS}
)


def _keys_at(model: type[BaseModel], keys: Sequence[int | str]) -> list[str]:
    """Return the valid keys at a location, for the nearest name."""
    here: type[BaseModel] = model
    for key in keys:
        if key in _KINDS:
            here = _KINDS[str(key)]
            continue
        info: FieldInfo | None = here.model_fields.get(str(key))
        if info is None:
            continue  # the index of a list, or the free key of a mapping
        found = _entry_in(info.annotation)
        if found is None:
            return []
        here = found
    return list(here.model_fields)


def _entry_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_entry_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((entry for entry in inner if entry is not None), None)

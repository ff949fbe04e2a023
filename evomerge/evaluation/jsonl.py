"""Task files: YAML that says where the rows of a task are and how a row becomes an item."""

import hashlib
import itertools
import json
import math
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path

import yaml

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.task import SPLITS, Item, Task
from evomerge.value import Plain, canonical, parse, value

#: How rows are dealt to the splits, by a hash of the question, when no field says so.
SHARES: Mapping[str, float] = {"search": 0.5, "validation": 0.25, "test": 0.25}


@value
class Hub:
    """A data set of the Hugging Face hub: its name, its subset, and which of its splits to take."""

    hub: str
    subset: str | None = None
    rows: str = "train"


@value
class Regex:
    """Grading that compares what a regular expression finds in the generated text."""

    regex: str


@value
class TaskFile:
    """What a task file says.

    Attributes:
        kind: `generate` or `multiple_choice`.
        data: a file of rows beside the task file (`.jsonl`, or what `datasets` reads: `.json`, `.csv`,
            `.parquet`), or a data set of the hub.
        prompt: a template over the fields of a row; braces that are text are doubled.
        answer: the field with the answer; for multiple choice it holds the text of the right choice.
        choices: the field with the list of choices.
        split: the field that names each row's split, or the share of each split.
        max_new_tokens: the longest generated answer, in tokens.
        stop: texts that end a generated answer; the end-of-sequence token always does.
        grade: `exact`, or a regular expression that finds the answer.
    """

    kind: str
    data: str | Hub
    prompt: str
    answer: str
    choices: str | None = None
    split: str | Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    grade: str | Regex = "exact"


def read_task(path: Path, name: str | None = None) -> Task:
    """Read a task file and its rows.

    Args:
        path: the YAML file.
        name: what to call the task; the file's stem by default.

    Raises:
        TaskError: one line with file, row and field, and the way out.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise TaskError(f"{path}: cannot be read ({problem.strerror}); give the path of a task file") from None
    except (yaml.YAMLError, ValueError) as problem:
        raise TaskError(f"{path}: not YAML ({' '.join(str(problem).split())})") from None
    return build_task(parse(TaskFile, data, str(path), TaskError), name or path.stem, path.parent, str(path))


def build_task(file: TaskFile, name: str, near: Path, place: str) -> Task:
    """Return the task that a task file describes; `near` is the folder that its data path starts from.

    Raises:
        TaskError: naming the place (the task file, or the data file and row).
    """
    _check_file(file, place)
    rows, source = _rows(file.data, near, place)
    if not rows:
        raise TaskError(f"{source}: has no rows; a task needs at least one item")
    home = _splitter(file.split, place)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        item = _item(file, row, number, where)
        splits[home(item, row, where)].append(item)
    try:
        return Task(
            name=name,
            kind=file.kind,
            splits={split: tuple(items) for split, items in splits.items() if items},
            max_new_tokens=file.max_new_tokens,
            stop=file.stop,
            pattern=file.grade.regex if isinstance(file.grade, Regex) else None,
        )
    except TaskError as problem:
        raise TaskError(f"{place}: {problem}") from None


def _check_file(file: TaskFile, place: str) -> None:
    if isinstance(file.grade, str) and file.grade != "exact":
        raise TaskError(f"{place}.grade: expected exact or a mapping with regex, got {file.grade!r}")
    if (file.kind == "multiple_choice") != (file.choices is not None):
        way = "missing; name the field with the list of choices" if file.choices is None else "only for multiple_choice"
        raise TaskError(f"{place}.choices: {way} (kind is {file.kind!r})")
    for used in _fields(file.prompt, place):
        if not used.isidentifier():
            raise TaskError(f"{place}.prompt: {{{used}}} is not the name of a field; double braces that are text")


def _fields(template: str, place: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as problem:
        raise TaskError(f"{place}.prompt: {problem}; double braces that are text") from None


def _item(file: TaskFile, row: Mapping[str, Plain], number: int, where: str) -> Item:
    names = _fields(file.prompt, where)
    choices = () if file.choices is None else _texts(row, file.choices, where)
    return Item(
        id=_text(row, "id", where) if "id" in row else f"row-{number}",
        prompt=file.prompt.format(**{name: _text(row, name, where) for name in names}),
        answer=_text(row, file.answer, where),
        choices=choices,
    )


def _get(row: Mapping[str, Plain], name: str, where: str) -> Plain:
    if row.get(name) is None:
        raise TaskError(f"{where}: no field {name!r}; {nearest(name, (key for key in row if row[key] is not None))}")
    return row[name]


def _text(row: Mapping[str, Plain], name: str, where: str) -> str:
    found = _get(row, name, where)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise TaskError(f"{where}: field {name!r} must be a text or a number, got {type(found).__name__} {found!r}")
    return str(found)


def _texts(row: Mapping[str, Plain], name: str, where: str) -> tuple[str, ...]:
    found = _get(row, name, where)
    if not isinstance(found, list):
        raise TaskError(f"{where}: field {name!r} must be a list of choices, got {type(found).__name__} {found!r}")
    return tuple(_text({name: choice}, name, where) for choice in found)


def _splitter(
    split: str | Mapping[str, float], place: str
) -> Callable[[Item, Mapping[str, Plain], str], str]:
    """Return the function that deals an item and its row to a split."""
    if isinstance(split, str):
        return lambda item, row, where: _known_split(_text(row, split, where), split, where)
    for name, share in split.items():
        if name not in SPLITS:
            raise TaskError(f"{place}.split.{name}: unknown split; {nearest(name, SPLITS)}")
        if share < 0:
            raise TaskError(f"{place}.split.{name}: a share must not be negative, got {share}")
    if not math.isclose(sum(split.values()), 1.0, abs_tol=1e-6):
        raise TaskError(f"{place}.split: shares must add up to 1, got {sum(split.values())}")
    names = [name for name in SPLITS if split.get(name, 0) > 0]
    edges = list(itertools.accumulate(split[name] for name in names))
    return lambda item, row, where: _dealt(item, names, edges)


def _known_split(name: str, key: str, where: str) -> str:
    if name not in SPLITS:
        raise TaskError(f"{where}: field {key!r} names the split {name!r}; {nearest(name, SPLITS)}")
    return name


def _dealt(item: Item, names: Sequence[str], edges: Sequence[float]) -> str:
    """Deal by a hash of the question alone, so that neither order nor other rows move an item."""
    key = hashlib.sha256(canonical([item.prompt, item.choices]).encode()).digest()
    u = int.from_bytes(key[:8], "big") / 2**64
    return next((name for name, edge in zip(names, edges, strict=True) if u < edge), names[-1])


def _rows(data: str | Hub, near: Path, place: str) -> tuple[list[Mapping[str, Plain]], str]:
    """Return the rows and what to call their source in errors."""
    if isinstance(data, Hub):
        return _through_datasets(data.hub, f"{place}: hub data set {data.hub!r}", name=data.subset, split=data.rows)
    path = near / data
    if not path.is_file():
        raise TaskError(f"{place}.data: no file {path}; a data set of the hub is written {{hub: NAME, rows: SPLIT}}")
    if path.suffix == ".jsonl":
        return _lines(path), str(path)
    builder = {".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if builder is None:
        raise TaskError(f"{place}.data: {path} must end in .jsonl, .json, .csv or .parquet")
    return _through_datasets(builder, str(path), data_files=str(path), split="train")


def _lines(path: Path) -> list[Mapping[str, Plain]]:
    """Read JSON lines as they are written.

    Not through `datasets`: its type inference turns texts that look like dates into dates and fills the
    fields that a row does not have, and an item must reach the model as its author wrote it.
    """
    rows: list[Mapping[str, Plain]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskError(f"{path}: cannot be read ({problem}); rows are UTF-8 JSON, one a line") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise TaskError(f"{path}, line {number}: not JSON ({problem}); each line is one JSON object") from None
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}")
        rows.append(row)
    return rows


def _through_datasets(
    builder: str, source: str, **arguments: str | None
) -> tuple[list[Mapping[str, Plain]], str]:
    """Read rows with `datasets`; local files are cached in a folder of their own that goes away."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="evomerge-rows-") as folder:
            cache = folder if "data_files" in arguments else None
            return datasets.load_dataset(builder, cache_dir=cache, **arguments).to_list(), source
    except Exception as problem:  # datasets raises from a dozen trees; all mean that the rows cannot be had
        cause = problem.__cause__ or problem
        reason = " ".join(str(cause).split())[:200] or "no rows"
        reason = f"{type(cause).__name__}: {reason}"
        raise TaskError(f"{source}: rows cannot be read ({reason}); check name and format") from None
    finally:
        datasets.utils.logging.set_verbosity(level)
        if bars:
            datasets.utils.logging.enable_progress_bar()

"""Items: how the rows of some data become questions in disjoint splits."""

import hashlib
import itertools
import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.rows import Hub, Row, read_rows
from evomerge.evaluation.task import SPLITS
from evomerge.value import Plain, canonical, value

#: How rows are dealt to the splits, by a hash of the question, when no field says so.
SHARES: Mapping[str, float] = {"search": 0.5, "validation": 0.25, "test": 0.25}


@value
class Item:
    """One question.

    Attributes:
        id: its name, unique in the task.
        prompt: what is asked; for a likelihood of texts, the text.
        answers: the acceptable answers; for multiple choice the text of the right choice; none without labels.
        choices: for multiple choice, the texts to choose from.
        stratum: the subtask or language that it belongs to.
        row: the fields of its row, kept where the grading wants them.
    """

    id: str
    prompt: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    stratum: str = ""
    row: Row = field(default_factory=dict)


@value
class Form:
    """How the rows of some data become items; see `TaskFile` for the keys that it takes from there.

    Attributes:
        data: a path, from the task file's folder, or a data set of the hub.
        prompt: a template over the fields of a row.
        answer: the field with the answer, or the list of acceptable ones.
        choices: the field with the list of choices.
        split: the field that names each row's split, or the share of each split.
        stratum: the field that names each row's stratum.
        window: cut each prompt in windows of about so many characters, each an item.
        keep: whether an item keeps its row.
    """

    data: str | Hub
    prompt: str
    answer: str | None = None
    choices: str | None = None
    split: str | Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    stratum: str | None = None
    window: int | None = None
    keep: bool = False


def read_items(form: Form, near: Path, place: str) -> dict[str, tuple[Item, ...]]:
    """Return the items of some data by split, in the order of the rows.

    Args:
        form: where the rows are and what they hold.
        near: the folder that a path in `form` starts from.
        place: what to call the form in errors.

    Raises:
        TaskError: one line with file, row and field, and the way out.
    """
    for used in _fields(form.prompt, place):
        if not used.isidentifier():
            raise TaskError(f"{place}.prompt: {{{used}}} is not the name of a field; double braces that are text")
    rows, source = read_rows(form.data, near, place, whole=form.window is not None)
    home = _splitter(form.split, place)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        for item in _items(form, row, number, where):
            splits[home(item, row, where)].append(item)
    if not any(splits.values()):
        raise TaskError(f"{source}: has no rows; a task needs at least one item")
    return {split: tuple(items) for split, items in splits.items() if items}


def check_splits(name: str, splits: Mapping[str, Sequence[Item]]) -> None:
    """Refuse items that cannot be told apart, and splits that share a question.

    Raises:
        TaskError: naming the task and the items.
    """
    ids: set[str] = set()
    homes: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    for split, items in splits.items():
        if split not in SPLITS:
            raise TaskError(f"task {name!r}: split {split!r} is not known; {nearest(split, SPLITS)}")
        for item in items:
            if item.id in ids:
                raise TaskError(f"task {name!r}: two items have the id {item.id!r}; make ids unique")
            ids.add(item.id)
            home, twin = homes.setdefault((item.prompt, item.choices), (split, item.id))
            if home != split:
                raise TaskError(
                    f"task {name!r}: items {twin!r} ({home}) and {item.id!r} ({split}) ask the same question; "
                    "splits must be disjoint, remove one of the two"
                )


def dealer(shares: Mapping[str, float]) -> Callable[[str], str]:
    """Return the function that deals a question to a split by a hash of its text, so that no other one moves it.

    Args:
        shares: the share of each split, adding up to 1.
    """
    names = [name for name in SPLITS if shares.get(name, 0) > 0]
    edges = list(itertools.accumulate(shares[name] for name in names))

    def home(question: str) -> str:
        u = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
        return next((name for name, edge in zip(names, edges, strict=True) if u < edge), names[-1])

    return home


def windows(text: str, size: int) -> list[str]:
    """Cut a text in windows of nearly equal length, the fewest that are about `size` characters long.

    A window ends at a line's end or a blank where one stands in the last quarter before its edge. Windows of blanks
    alone are dropped; put together, the others are the text.
    """
    count = max(1, math.ceil(len(text) / size))
    edges = [0]
    for k in range(1, count):
        edge = round(k * len(text) / count)
        start = max(edges[-1] + 1, edge - size // 4)
        breaks = (text.rfind(mark, start, edge) + 1 for mark in ("\n", " "))
        edges.append(next((found for found in breaks if found > 0), edge))
    parts = (text[left:right] for left, right in itertools.pairwise([*edges, len(text)]))
    return [part for part in parts if part.strip()]


def _fields(template: str, place: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as problem:
        raise TaskError(f"{place}.prompt: {problem}; double braces that are text") from None


def _items(form: Form, row: Row, number: int, where: str) -> list[Item]:
    """Return the item of a row, or one for each window of its text."""
    name = _text(row, "id", where) if "id" in row else f"row-{number}"
    prompt = form.prompt.format(**{used: _text(row, used, where) for used in _fields(form.prompt, where)})
    pieces = {name: prompt}
    if form.window is not None:
        pieces = {f"{name}-{k}": piece for k, piece in enumerate(windows(prompt, form.window), start=1)}
    return [
        Item(
            id=name,
            prompt=piece,
            answers=() if form.answer is None else _answers(row, form.answer, where),
            choices=() if form.choices is None else _texts(row, form.choices, where),
            stratum="" if form.stratum is None else _text(row, form.stratum, where),
            row=_kept(row, where) if form.keep else {},
        )
        for name, piece in pieces.items()
    ]


def _get(row: Row, name: str, where: str) -> Plain:
    if row.get(name) is None:
        raise TaskError(f"{where}: no field {name!r}; {nearest(name, (key for key in row if row[key] is not None))}")
    return row[name]


def _text(row: Row, name: str, where: str) -> str:
    found = _get(row, name, where)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise TaskError(f"{where}: field {name!r} must be a text or a number, got {type(found).__name__} {found!r}")
    return str(found)


def _texts(row: Row, name: str, where: str) -> tuple[str, ...]:
    found = _get(row, name, where)
    if not isinstance(found, list):
        raise TaskError(f"{where}: field {name!r} must be a list of choices, got {type(found).__name__} {found!r}")
    return tuple(_text({name: choice}, name, where) for choice in found)


def _answers(row: Row, name: str, where: str) -> tuple[str, ...]:
    found = _get(row, name, where)
    if found == []:
        raise TaskError(f"{where}: field {name!r} is an empty list; give at least one acceptable answer")
    return _texts(row, name, where) if isinstance(found, list) else (_text(row, name, where),)


def _kept(row: Row, where: str) -> Row:
    """Return a row as JSON holds it, since it is part of the fingerprint; dates and the like become texts."""
    try:
        kept: Row = json.loads(json.dumps(row, default=str, allow_nan=False))
    except ValueError:
        raise TaskError(f"{where}: holds a number that is not finite; remove it") from None
    return kept


def _splitter(split: str | Mapping[str, float], place: str) -> Callable[[Item, Row, str], str]:
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
    home = dealer(split)
    return lambda item, row, where: home(canonical([item.prompt, item.choices]))


def _known_split(name: str, key: str, where: str) -> str:
    if name not in SPLITS:
        raise TaskError(f"{where}: field {key!r} names the split {name!r}; {nearest(name, SPLITS)}")
    return name

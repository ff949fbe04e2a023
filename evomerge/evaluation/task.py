"""Tasks and items: what is asked of a model, and how an answer becomes a response."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from evomerge.errors import TaskError, nearest
from evomerge.value import digest, plain, value

#: How a task asks: free text by greedy decoding, or the likeliest of given choices.
KINDS = ("generate", "multiple_choice")

#: The three disjoint parts of a task: for the search, for its finalists, and for the report.
SPLITS = ("search", "validation", "test")


@value
class Item:
    """One question: its prompt, the right answer and, for multiple choice, all choices (texts)."""

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@value
class Response:
    """The graded outcome of one item: `value` in [0, 1].

    `margin` is, for multiple choice, the log-likelihood of the right choice minus that of the
    likeliest other one, in nats; the item is answered rightly when it is positive.
    """

    value: float
    margin: float | None = None


@value
class Task:
    """A set of items in three disjoint splits, and how their answers are graded.

    Attributes:
        name: what objectives and the ledger call it.
        kind: one of `KINDS`.
        splits: items by split, in the order of the data; what a job calls item `i` is place `i` here.
        max_new_tokens: for `generate`, the longest answer in tokens.
        stop: for `generate`, texts that end an answer; they do not belong to it.
        pattern: for `generate`, a regular expression that finds the answer in the text (its first
            group, or the whole match without groups); None compares the whole text.

    Raises:
        TaskError: if two items have one id, or one question stands in two splits.
    """

    name: str
    kind: str
    splits: Mapping[str, tuple[Item, ...]]
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"task {self.name!r}: kind {self.kind!r} is not known; {nearest(self.kind, KINDS)}")
        if self.max_new_tokens < 1:
            raise TaskError(f"task {self.name!r}: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if "" in self.stop:
            raise TaskError(f"task {self.name!r}: an empty stop text would end every answer at once; remove it")
        if self.pattern is not None:
            _check_pattern(self.name, self.pattern)
        _check_items(self.name, self.kind, self.splits)

    def items(self, split: str) -> tuple[Item, ...]:
        """Return the items of a split.

        Raises:
            TaskError: if the task has no such split.
        """
        if split not in self.splits:
            raise TaskError(f"task {self.name!r}: no split {split!r}; {nearest(split, self.splits)}")
        return self.splits[split]

    @cached_property
    def fingerprint(self) -> str:
        """The content address of items and grading (not of the name): 16 hexadecimal digits."""
        form = plain(self)
        del form["name"]
        return digest(form)


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop text in it, without blanks at its ends."""
    ends = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(ends)].strip() if ends else text.strip()


def grade(task: Task, item: Item, text: str) -> float:
    """Return 1 if the generated text is the item's answer under the task's grading, else 0."""
    text = cut(text, task.stop)
    if task.pattern is not None:
        match = re.search(task.pattern, text)
        if match is None:
            return 0.0
        found = match.group(1) if match.re.groups else match.group()
        text = (found or "").strip()
    return float(text == item.answer.strip())


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as problem:
        raise TaskError(f"task {name!r}: {pattern!r} is not a regular expression ({problem})") from None


def _check_items(name: str, kind: str, splits: Mapping[str, tuple[Item, ...]]) -> None:
    ids: set[str] = set()
    homes: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    for split, items in splits.items():
        if split not in SPLITS:
            raise TaskError(f"task {name!r}: split {split!r} is not known; {nearest(split, SPLITS)}")
        for item in items:
            if item.id in ids:
                raise TaskError(f"task {name!r}: two items have the id {item.id!r}; make ids unique")
            ids.add(item.id)
            if kind == "multiple_choice":
                _check_choices(name, item)
            home, twin = homes.setdefault((item.prompt, item.choices), (split, item.id))
            if home != split:
                raise TaskError(
                    f"task {name!r}: items {twin!r} ({home}) and {item.id!r} ({split}) ask the same question; "
                    "splits must be disjoint, remove one of the two"
                )


def _check_choices(name: str, item: Item) -> None:
    if len(item.choices) < 2 or len(set(item.choices)) != len(item.choices):
        raise TaskError(
            f"task {name!r}, item {item.id!r}: needs two or more distinct choices, got {list(item.choices)}"
        )
    if item.answer not in item.choices:
        raise TaskError(f"task {name!r}, item {item.id!r}: the answer {item.answer!r} is none of its choices")
    if "" in item.choices:
        raise TaskError(f"task {name!r}, item {item.id!r}: a choice is empty, so it has no likelihood; give it a text")

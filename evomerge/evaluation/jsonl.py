"""Tasks whose items are rows of a file, and the contract of what they measure."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.items import Item, check_splits
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import Response
from evomerge.value import Plain, digest, plain, value


class Measure(Protocol):
    """What is asked of an item, and what its outcomes are worth; a frozen value."""

    @property
    def bounded(self) -> bool:
        """Whether responses lie in [0, 1]."""
        ...

    @property
    def direction(self) -> str:
        """What is usually wanted: `maximize` or `minimize`."""
        ...

    @property
    def reference(self) -> str | None:
        """The source whose outcomes are needed, or None."""
        ...

    def check(self, item: Item) -> None:
        """Refuse an item that cannot be asked or graded with a `TaskError` that says why."""
        ...

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Return what to ask; without the reference's outcomes, what to ask of the reference."""
        ...

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return what the outcomes are worth."""
        ...


@value
class JsonlTask:
    """A task whose items were read from rows; keeps the contract of `Task`.

    Attributes:
        name: what objectives and the ledger call it.
        splits: items by split, in the order of the data.
        measure: what is asked and how it is graded.
        preamble: a text that stands before every prompt, like worked examples.

    Raises:
        TaskError: if two items have one id, one question stands in two splits, or the measure cannot grade an item.
    """

    name: str
    splits: Mapping[str, tuple[Item, ...]]
    measure: Measure
    preamble: str = ""

    def __post_init__(self) -> None:
        check_splits(self.name, self.splits)
        for items in self.splits.values():
            for item in items:
                try:
                    self.measure.check(item)
                except TaskError as problem:
                    raise TaskError(f"task {self.name!r}, item {item.id!r}: {problem}") from None

    @property
    def bounded(self) -> bool:
        """Whether responses lie in [0, 1]."""
        return self.measure.bounded

    @property
    def direction(self) -> str:
        """What is usually wanted of the score."""
        return self.measure.direction

    @property
    def reference(self) -> str | None:
        """The source whose outcomes the grading needs."""
        return self.measure.reference

    @cached_property
    def fingerprint(self) -> str:
        """The content address of items, prompts and grading: 16 hexadecimal digits."""
        return digest([_content(self.splits), self.preamble, _content(self.measure)])

    def count(self, split: str) -> int:
        """Return the number of items of a split."""
        return len(self.splits.get(split, ()))

    def ids(self, split: str) -> tuple[str, ...]:
        """Return the ids of a split's items."""
        return tuple(item.id for item in self._items(split))

    def contents(self, split: str) -> tuple[str, ...]:
        """Return the content address of each item of a split, with its prompt and its grading."""
        shared = [self.preamble, _content(self.measure)]
        return tuple(digest([_content(item), *shared]) for item in self.splits.get(split, ()))

    def strata(self, split: str) -> tuple[str, ...]:
        """Return the strata of a split's items."""
        return tuple(item.stratum for item in self._items(split))

    def requests(self, split: str, place: int, reference: tuple[Outcome, ...] = ()) -> tuple[Request, ...]:
        """Return what to ask for an item."""
        item = self._items(split)[place]
        if self.preamble:
            item = dataclasses.replace(item, prompt=self.preamble + item.prompt)
        return self.measure.requests(item, reference)

    def grade(
        self, split: str, place: int, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...] = ()
    ) -> Response:
        """Return what the outcomes of an item's requests are worth."""
        item = self._items(split)[place]
        try:
            return self.measure.grade(item, outcomes, reference)
        except TaskError as problem:
            raise TaskError(f"task {self.name!r}, item {item.id!r}: {problem}") from None

    def cut(self, sizes: Mapping[str, int]) -> "JsonlTask":
        """Return the task with only the first items of each split."""
        splits = {split: items[: sizes.get(split, len(items))] for split, items in self.splits.items()}
        return dataclasses.replace(self, splits={split: items for split, items in splits.items() if items})

    def _items(self, split: str) -> tuple[Item, ...]:
        if split not in self.splits:
            raise TaskError(f"task {self.name!r}: no split {split!r}; {nearest(split, self.splits)}")
        return self.splits[split]


def _content(thing: object) -> Plain:
    """Return the plain form of what has to do with content: classes by name, without fields that do not compare."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = (field.name for field in dataclasses.fields(thing) if field.compare)
        return [type(thing).__name__, {name: _content(getattr(thing, name)) for name in fields}]
    if isinstance(thing, Mapping):
        return {str(key): _content(item) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return [_content(item) for item in thing]
    return plain(thing)

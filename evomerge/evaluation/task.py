"""What search, worker and engine know of a task: its items, what to ask for each, and what came of the answers."""

from collections.abc import Mapping
from typing import Protocol

from evomerge.evaluation.request import Outcome, Request
from evomerge.value import value

#: The three disjoint parts of a task: for the search, for its finalists, and for the report.
SPLITS = ("search", "validation", "test")


@value
class Response:
    """The graded outcome of one item.

    Attributes:
        value: in [0, 1] if the task is bounded, else any finite number in the task's unit.
        margin: for multiple choice, the log-likelihood of the right choice minus that of the likeliest other one, in
            nats (by character where the grading goes by length); the item is answered rightly when it is positive.
    """

    value: float
    margin: float | None = None


class Task(Protocol):
    """A set of items in disjoint splits that knows what to ask for an item and how to grade the outcomes.

    Tasks are plain values that can be sent to other processes; what is heavy is loaded where it is needed first.
    An item is named by its split and its place there, from 0.
    """

    @property
    def name(self) -> str:
        """What objectives and the ledger call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """The content address of items, prompts and grading (not of the name): 16 hexadecimal digits."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether responses lie in [0, 1]; else they are any finite numbers, which only plain means estimate."""
        ...

    @property
    def direction(self) -> str:
        """What is usually wanted of the score: `maximize` or `minimize`."""
        ...

    @property
    def reference(self) -> str | None:
        """The name of the source whose outcomes the grading needs; None for most tasks."""
        ...

    def count(self, split: str) -> int:
        """Return the number of items of a split; 0 if the task has none."""
        ...

    def ids(self, split: str) -> tuple[str, ...]:
        """Return the stable names of a split's items."""
        ...

    def contents(self, split: str) -> tuple[str, ...]:
        """Return the content address of each item of a split: all that its response depends on beside the models.

        Other items, and the sizes of the splits, are no part of it.
        """
        ...

    def strata(self, split: str) -> tuple[str, ...]:
        """Return one label for each item of a split: its subtask, its language, or nothing."""
        ...

    def requests(self, split: str, place: int, reference: tuple[Outcome, ...] = ()) -> tuple[Request, ...]:
        """Return what to ask of a candidate for an item.

        Args:
            split: one of `SPLITS`.
            place: the item's place in it.
            reference: what the reference source said to the item, if the task has a reference. Without it, what to ask
                of the reference source is returned.
        """
        ...

    def grade(
        self, split: str, place: int, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...] = ()
    ) -> Response:
        """Return the response that the outcomes of an item's requests are worth.

        Raises:
            TaskError: if the item cannot be graded, whatever the model.
            CandidateError: if the outcomes cannot be graded.
        """
        ...

    def cut(self, sizes: Mapping[str, int]) -> "Task":
        """Return the task with only the first items of each split; a split that is not named stays whole."""
        ...

"""Asks a live model the items of a task: requests, outcomes, and what they are worth."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from evomerge.errors import CandidateError, TaskError, nearest
from evomerge.evaluation.encoding import Refused
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import SPLITS, Response, Task

if TYPE_CHECKING:
    from evomerge.evaluation.engine import Engine

#: How far log-likelihoods by token may be apart, relative to their size, and still count as one.
_ALIKE = 1e-6

#: The fewest items with choices by which a model is judged to have no preference.
_ITEMS = 4


def asked(
    engine: "Engine",
    task: Task,
    split: str,
    items: Sequence[int],
    references: Sequence[tuple[Outcome, ...]] = (),
) -> list[Response]:
    """Ask the live model items of a task and return the responses, in the order of the items.

    Args:
        engine: the live model.
        task: the task.
        split: one of `SPLITS`.
        items: places in it.
        references: what the task's reference said to each item, if it has one.

    Raises:
        TaskError: for an item that does not exist, that the model cannot be asked, or that cannot be graded.
        CandidateError: if log-likelihoods are not finite, or all choices of all items are equally likely.
    """
    found = outcomes(engine, task, split, items, references)
    own = references or [()] * len(items)
    return [task.grade(split, *one) for one in zip(items, found, own, strict=True)]


def outcomes(
    engine: "Engine",
    task: Task,
    split: str,
    items: Sequence[int],
    references: Sequence[tuple[Outcome, ...]] = (),
) -> list[tuple[Outcome, ...]]:
    """Return what the live model says to the requests of each item, before it is graded; see `asked`.

    The plan is kept, so that the next candidate is asked without a look at the texts. For a task with a reference, no
    references ask what is asked of the reference itself.
    """
    _check(task, split, items)
    # a hash of the references is enough to know them again: task and item settle what else goes into the requests
    key = (task.fingerprint, split, tuple(items), hash(tuple(references)))

    def make() -> list[tuple[Request, ...]]:
        own = references or [()] * len(items)
        return [task.requests(split, place, reference) for place, reference in zip(items, own, strict=True)]

    try:
        plan, sizes = engine.kept(key, make)
        said = iter(engine.answer(plan))
    except Refused as problem:
        raise TaskError(f"task {task.name!r}, item {_id(task, split, items, make(), problem)}") from None
    except CandidateError as problem:
        raise CandidateError(f"task {task.name!r}: {problem}") from None
    found = [tuple(itertools.islice(said, size)) for size in sizes]
    asked_of = iter(plan.requests)
    if undecided([tuple(itertools.islice(asked_of, size)) for size in sizes], found):
        raise CandidateError(f"task {task.name!r}: all choices of every item have one log-likelihood")
    return found


def undecided(requests: Iterable[Sequence[Request]], found: Iterable[Sequence[Outcome]]) -> bool:
    """Tell whether the model has no preference between the choices of any item: each token is as likely as another.

    Such a model would be taken for one that always makes the first choice. Of few items nothing is said: logits of low
    precision may be equal by chance.
    """
    choices = [
        [one.loglikelihood / one.tokens for one in said]
        for group, said in zip(requests, found, strict=True)
        if len(group) > 1 and all(request.kind == "loglikelihood" for request in group)
    ]
    return len(choices) >= _ITEMS and all(max(own) - min(own) <= _ALIKE * abs(min(own)) for own in choices)


def _check(task: Task, split: str, items: Sequence[int]) -> None:
    if split not in SPLITS:
        raise TaskError(f"task {task.name!r}: no split {split!r}; {nearest(split, SPLITS)}")
    count = task.count(split)
    for place in items:
        if not 0 <= place < count:
            raise TaskError(f"task {task.name!r}: split {split!r} has {count} items, none at place {place}")


def _id(task: Task, split: str, items: Sequence[int], requests: Sequence[Sequence[Request]], problem: Refused) -> str:
    """Return the id of the item whose request was refused, and why it was."""
    ends = itertools.accumulate(len(group) for group in requests)
    row = next(row for row, end in enumerate(ends) if problem.request < end)
    return f"{task.ids(split)[items[row]]!r}: {problem.reason}"

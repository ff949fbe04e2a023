"""Blocks: the items of several tasks side by side, as one matrix of responses for one estimator.

All bounded tasks of a run are one block, because what a model answers to one task tells of the others. A task without
bounds is a block of its own, which only plain means estimate.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.evaluation.task import Task
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.fitness.sampling import patterns
from evomerge.fitness.schedule import Items
from evomerge.search.asking import Answers
from evomerge.value import value


@value
class Block:
    """Where the items of some tasks stand, and which label each has.

    Attributes:
        sizes: the number of items of each task, in order.
        labels: for each item, in the order of the block, the number of its task and subtask.
        bounded: whether responses lie in [0, 1].
    """

    sizes: Mapping[str, int]
    labels: tuple[int, ...]
    bounded: bool

    @property
    def total(self) -> int:
        """The number of items N."""
        return len(self.labels)

    @property
    def begins(self) -> Mapping[str, int]:
        """The place of each task's first item in the block."""
        ends = np.cumsum(list(self.sizes.values())).tolist()
        return {task: end - size for (task, size), end in zip(self.sizes.items(), ends, strict=True)}

    def places(self, items: Items) -> tuple[int, ...]:
        """Return the places in the block of items of its tasks; other tasks are left out."""
        return tuple(begin + place for task, begin in self.begins.items() for place in items.get(task, ()))

    def items(self, places: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return which items stand at places of the block, by task; tasks without any are left out."""
        found = {
            task: tuple(sorted(place - begin for place in places if begin <= place < begin + self.sizes[task]))
            for task, begin in self.begins.items()
        }
        return {task: own for task, own in found.items() if own}

    def targets(self) -> Floats:
        """Return the share of each item in the score of each task. Shape [K, N]."""
        found_KN = np.zeros((len(self.sizes), self.total))
        for k, (task, begin) in enumerate(self.begins.items()):
            found_KN[k, begin : begin + self.sizes[task]] = 1.0 / self.sizes[task]
        return found_KN

    def row(self, given: Mapping[str, Mapping[int, float]]) -> Floats:
        """Return what was given for each item, NaN for nothing. Shape [N]."""
        found_N = np.full(self.total, np.nan)
        for task, begin in self.begins.items():
            for place, amount in given.get(task, {}).items():
                found_N[begin + place] = amount
        return found_N

    def responses(self, rows: Sequence[Answers], sources: Sequence[Answers] = ()) -> Responses:
        """Return the responses of candidates; their strata are task, subtask and which sources are right.

        Args:
            rows: the candidates.
            sources: those of them that are sources.
        """
        values_MN = np.array([self.row(own.values) for own in rows]).reshape(len(rows), self.total)
        margins_MN = np.array([self.row(own.margins) for own in rows]).reshape(len(rows), self.total)
        found = {id(own): i for i, own in enumerate(rows)}
        return Responses(
            values_MN=values_MN,
            targets_KN=self.targets(),
            strata_N=self.strata(sources),
            rows_M=np.ones(len(rows)),
            margins_MN=margins_MN if np.isfinite(margins_MN).any() else None,
            sources=tuple(found[id(own)] for own in sources if id(own) in found),
            bounded=self.bounded,
        )

    def strata(self, sources: Sequence[Answers]) -> Places:
        """Return the stratum of each item: task, subtask, and (if bounded) which sources answer it rightly."""
        labels_N = np.array(self.labels, dtype=np.intp)
        if not (sources and self.bounded):
            return labels_N
        return patterns(np.array([self.row(own.values) for own in sources]), labels_N)


def blocks_of(tasks: Mapping[str, Task], split: str) -> tuple[Block, ...]:
    """Return the blocks of a split: all bounded tasks in one, then each other task in one of its own."""
    joint = {name: task for name, task in tasks.items() if task.bounded}
    alone = [{name: task} for name, task in tasks.items() if not task.bounded]
    return tuple(_block(some, split) for some in [joint, *alone] if some)


def _block(tasks: Mapping[str, Task], split: str) -> Block:
    names = [(k, label) for k, task in enumerate(tasks.values()) for label in task.strata(split)]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return Block(
        sizes={name: task.count(split) for name, task in tasks.items()},
        labels=tuple(number[name] for name in names),
        bounded=next(iter(tasks.values())).bounded,
    )

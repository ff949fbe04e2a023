"""Asks candidates: submits what a schedule wants of each, takes answers as they come, and keeps them."""

import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from evomerge.errors import LedgerError
from evomerge.fitness.schedule import Items, Schedule
from evomerge.hops import alike, path_of
from evomerge.ledger import Answered
from evomerge.pool import Answer, Job, Pool
from evomerge.recipe import Recipe
from evomerge.search.tape import Tape


class Answers:
    """All that a candidate answered of one split: responses and margins by place, by task.

    `error` says why it failed; what it had answered before is kept but does not count.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.margins: dict[str, dict[int, float]] = {}
        self.error: str | None = None

    def add(self, event: Answered, everything: Items) -> None:
        """Take in an answer.

        Raises:
            LedgerError: if it holds what nobody can have been asked.
        """
        self.error = self.error or event.error
        for task, responses in event.responses.items():
            places = event.items.get(task, everything.get(task, ()))
            if len(places) != len(responses) or not set(places) <= set(everything.get(task, ())):
                raise LedgerError(f"the ledger has an answer of candidate {event.candidate} that fits no items; {_WAY}")
            self.values.setdefault(task, {}).update(zip(places, responses, strict=True))
            margins = event.margins.get(task, ())
            if len(margins) == len(places):
                self.margins.setdefault(task, {}).update(zip(places, margins, strict=True))

    def only(self, items: Items) -> "Answers":
        """Return what was answered of some items."""
        found = Answers()
        for own, kept in ((self.values, found.values), (self.margins, found.margins)):
            kept |= {task: {i: given[i] for i in items.get(task, ()) if i in given} for task, given in own.items()}
        return found

    def complete(self, everything: Items) -> bool:
        """Tell whether all items were answered."""
        return self.error is None and all(len(self.values.get(t, ())) == len(own) for t, own in everything.items())


#: Jobs ahead, for each worker beyond the first.
_AHEAD = 0.125

_WAY = "restore the file, or start the run anew"


class Asking:
    """Asks the candidates of a run, one phase after the other.

    Args:
        tape: the ledger.
        pool: who answers.
        everything: all items of each split.
        stacked: whether candidates are stacks, those of which that begin alike are best asked one after the other.
    """

    def __init__(self, tape: Tape, pool: Pool, everything: Mapping[str, Items], stacked: bool = False) -> None:
        self._tape = tape
        self._pool = pool
        self._everything = everything
        self._stacked = stacked
        self._flying: dict[int, Items] = {}
        #: Of each split, what every candidate answered.
        self.found: dict[str, dict[int, Answers]] = {split: {} for split in everything}

    def phase(self, split: str, plan: Callable[[], Schedule], recipes: Mapping[int, Recipe]) -> None:
        """Ask candidates until the schedule wants nothing more of any; what the ledger has is taken from it.

        Each follows its own answers, and none waits for another.

        Args:
            split: the split that is asked.
            plan: makes the schedule; not called for a phase that the ledger has as a whole.
            recipes: the candidates, in the order in which they are asked.

        Raises:
            LedgerError: if the ledger has an answer that was not asked for.
        """
        for number in recipes:
            self.found[split].setdefault(number, Answers())
        self.recorded(split, recipes)
        if self._tape.ended:
            self._ask(split, plan(), recipes)

    def _ask(self, split: str, schedule: Schedule, recipes: Mapping[int, Recipe]) -> None:
        paths = {number: path_of(recipe) if self._stacked else () for number, recipe in recipes.items()}
        # Stacks that begin alike follow each other, so that a worker still has what the beginning made.
        waiting = deque(sorted(recipes, key=lambda number: paths[number]))
        branches = _branches([paths[number] for number in waiting])
        ahead = dict(zip(waiting, branches, strict=True))
        while waiting or self.flying:
            while waiting and self.room:
                number = waiting.popleft()
                items = self.wanted(split, number, schedule)
                if items is not None:
                    self.submit(split, number, recipes[number], items, ahead[number])
            if self.flying:
                for number in self.receive():
                    waiting.appendleft(number)  # next in turn: its worker still holds the model

    # What both a phase and a steady state are made of.

    @property
    def room(self) -> int:
        """How many jobs may be submitted now: as workers are free, and where there are several some jobs ahead.

        A job ahead is there when a worker becomes free, before the next one was thought out.
        """
        room = self._pool.room
        if room:
            return room
        here = sum(worker.state in ("idle", "busy") for worker in self._pool.workers)
        return max(0, here + math.ceil(_AHEAD * (here - 1)) - len(self._flying))

    @property
    def flying(self) -> bool:
        """Whether a job is submitted and not yet answered."""
        return bool(self._flying)

    def wanted(self, split: str, number: int, schedule: Schedule) -> Items | None:
        """Return what a schedule wants next of a candidate; None if nothing, as of one that has failed."""
        own = self.found[split][number]
        return schedule.next(number, own.values) if own.error is None else None

    def submit(
        self, split: str, number: int, recipe: Recipe, items: Items, branches: tuple[int, ...] = ()
    ) -> None:
        """Have a candidate asked; one job of each at a time."""
        self._flying[number] = items
        self._pool.submit(Job(candidate=number, recipe=recipe, split=split, items=dict(items), branches=branches))

    def receive(self) -> Iterator[int]:
        """Wait for an answer; write it down, then all others that are there by then, and yield whose each is."""
        self._tape.sync()
        for answer in (self._pool.wait(), *self._pool.drain()):
            everything = self._everything[answer.split]
            event = self._tape.write(_answered(answer, self._flying.pop(answer.candidate), everything))
            self.found[answer.split][answer.candidate].add(event, everything)
            yield answer.candidate

    def recorded(self, split: str, candidates: Container[int], most: int | None = None) -> None:
        """Take the recorded answers that stand next.

        Args:
            split: the split that is asked.
            candidates: who is asked.
            most: take no more than so many.

        Raises:
            LedgerError: if one was not asked for.
        """
        for event in self._tape.answers(most):
            if event.candidate not in candidates or event.split != split:
                raise LedgerError(
                    f"the ledger has an answer of candidate {event.candidate} that was not asked for; {_WAY}"
                )
            self.found[split][event.candidate].add(event, self._everything[split])


def _branches(paths: Sequence[Sequence[object]]) -> list[tuple[int, ...]]:
    """Return for each of some sorted paths after how many hops later ones branch off from it."""
    found: list[tuple[int, ...]] = []
    own: list[int] = []  # of the path before, seen from the end: falling
    for one, two in zip(reversed(paths), [None, *reversed(paths)], strict=False):
        common = 0 if two is None else alike(one, two)
        own = sorted({min(depth, common) for depth in (*own, common)} - {0})
        found.append(tuple(own))
    return found[::-1]


def _answered(answer: Answer, asked: Items, everything: Items) -> Answered:
    return Answered(
        candidate=answer.candidate,
        split=answer.split,
        items={task: places for task, places in asked.items() if places != everything[task]},
        responses=answer.responses or {},
        margins={task: tuple(round(margin, 4) for margin in own) for task, own in answer.margins.items()},
        error=answer.error,
        seconds=round(answer.seconds, 4),
        layers=dict(answer.layers),
    )

"""Asks candidates: submits what a schedule wants of each, takes answers as they come, and keeps them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

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
        for event in self._tape.answers():
            if event.candidate not in recipes or event.split != split:
                raise LedgerError(
                    f"the ledger has an answer of candidate {event.candidate} that was not asked for; {_WAY}"
                )
            self.found[split][event.candidate].add(event, self._everything[split])
        if self._tape.ended:
            self._ask(split, plan(), recipes)

    def _ask(self, split: str, schedule: Schedule, recipes: Mapping[int, Recipe]) -> None:
        paths = {number: path_of(recipe) if self._stacked else () for number, recipe in recipes.items()}
        # Stacks that begin alike follow each other, so that a worker still has what the beginning made.
        waiting = deque(sorted(recipes, key=lambda number: paths[number]))
        branches = _branches([paths[number] for number in waiting])
        ahead = dict(zip(waiting, branches, strict=True))
        asked: dict[int, Items] = {}
        while waiting or asked:
            while waiting and self._pool.room:
                number = waiting.popleft()
                own = self.found[split][number]
                items = schedule.next(number, own.values) if own.error is None else None
                if items is not None:
                    asked[number] = items
                    self._pool.submit(
                        Job(
                            candidate=number,
                            recipe=recipes[number],
                            split=split,
                            items=dict(items),
                            branches=ahead[number],
                        )
                    )
            if asked:
                answer = self._pool.wait()
                event = self._tape.write(_answered(answer, asked.pop(answer.candidate), self._everything[split]))
                self.found[split][answer.candidate].add(event, self._everything[split])
                waiting.appendleft(answer.candidate)  # next in turn: its worker still holds the model


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

"""Schedules: which items a search asks of whom, as settings of an experiment and as pure state machines.

A schedule never sees a clock, a pool or another candidate of its generation: what is asked next of a candidate follows
from its own answers and from what was known when the generation began. So the order in which answers arrive, and how
many workers there are, change nothing.
"""

from collections.abc import Mapping
from typing import Protocol

from evomerge.errors import ExperimentError
from evomerge.value import value

#: Places in a split, by task.
Items = Mapping[str, tuple[int, ...]]

#: What a candidate has answered so far: its response by place, by task.
Given = Mapping[str, Mapping[int, float]]


class Schedule(Protocol):
    """What to ask of the candidates of one generation; pure.

    Example::

        schedule = Shared(items={"sums": (3, 8)})
        schedule.next(7, {})                              # {"sums": (3, 8)}
        schedule.next(7, {"sums": {3: 1.0, 8: 0.0}})      # None: nothing is left to ask
    """

    def next(self, candidate: int, given: Given) -> Items | None:
        """Return what to ask of a candidate that has answered so much; None when that is all."""
        ...


@value
class Shared:
    """Asks every candidate the same items, but none that it has answered already."""

    items: Items

    def next(self, candidate: int, given: Given) -> Items | None:
        """Return the items that are missing."""
        return missing(self.items, given)


def missing(items: Items, given: Given) -> Items | None:
    """Return the items that have no answer yet, sorted; None if there is none."""
    found = {task: tuple(sorted(set(places) - given.get(task, {}).keys())) for task, places in items.items()}
    return {task: places for task, places in found.items() if places} or None


@value
class Fixed:
    """Every candidate is asked the same items, from the baselines to the last.

    Attributes:
        items: how many of each task; all of the split if left out.
    """

    items: int | None = None

    def __post_init__(self) -> None:
        if self.items is not None:
            _check("items", self.items, 1)

    @property
    def headline(self) -> str:
        """What is asked, in a line."""
        return f"{self.items or 'all'} items a task for everybody"


@value
class Warmup:
    """Many candidates are asked everything first; from then on few items, by design, and some candidates the rest.

    Attributes:
        random: random genomes that are asked everything, beside sources and baselines; 20 to 30 are usual.
        items: of each task on average; the estimator shares them out among the tasks.
        promote: of every generation that promotes, the best so many by estimate are asked the rest.
        honest: and so many by chance, for an offset that no choice has flattered.
        every: one generation in so many promotes.
        recent: the last so many candidates of the search that were asked everything have `weight` in a fit together.
        weight: their share of a fit, at least that of their number.
        elites: in each generation, so many of the front are asked its items too and scored again.
        final: at the end, the best so many by estimate are asked the rest, before finalists are chosen.
        closing: and so many of the best are asked `closing_items` of each task, drawn at random by strata and not by
            what a fit thinks telling. Those answers alone are their scores then, and finalists are chosen among them,
            so that nobody is one for items that flattered him; 0 leaves it out.
        closing_items: see `closing`.
    """

    random: int = 24
    items: int = 40
    promote: int = 2
    honest: int = 1
    every: int = 1
    recent: int = 10
    weight: float = 0.5
    elites: int = 4
    final: int = 5
    closing: int = 0
    closing_items: int = 100

    def __post_init__(self) -> None:
        for name, least in {"items": 2, "every": 1, "closing_items": 1}.items():
            _check(name, getattr(self, name), least)
        for name in ("random", "promote", "honest", "recent", "elites", "final", "closing"):
            _check(name, getattr(self, name), 0)
        _check_share("weight", self.weight)

    @property
    def headline(self) -> str:
        """What is asked, in a line."""
        often = "each generation" if self.every == 1 else f"each {self.every} generations"
        parts = [f"{self.items} items a task after a warm-up of {self.random} random genomes"]
        if self.promote + self.honest:
            parts.append(f"{self.promote} + {self.honest} promoted {often}")
        if self.elites:
            parts.append(f"{self.elites} elites asked again")
        if self.final:
            parts.append(f"{self.final} asked everything at the end")
        if self.closing:
            parts.append(f"the best {self.closing} compared on {self.closing_items} more")
        return "; ".join(parts)

    def promotes(self, step: int) -> bool:
        """Tell whether the generation of this number, from 0, promotes."""
        return (step + 1) % self.every == 0 and self.promote + self.honest > 0


@value
class Race:
    """Candidates climb prefixes of one order of the items, as long as they may belong to the front.

    A prefix has `first` items of each task, then `eta` times as many, and so on up to all. After each, a candidate that
    is surely worse in all objectives than one member of the front stops; see `evomerge.fitness.race`.

    Attributes:
        first: items of each task in the first prefix.
        eta: by how much prefixes grow.
        alpha: the chance that a candidate that belongs to the front is stopped, over all prefixes and rivals.
        rivals: the most members of the front that a candidate is compared with.
        recent: as for `Warmup`.
        weight: as for `Warmup`.
    """

    first: int = 16
    eta: float = 2.0
    alpha: float = 0.1
    rivals: int = 8
    recent: int = 10
    weight: float = 0.5

    def __post_init__(self) -> None:
        for name, least in {"first": 2, "eta": 1.1, "rivals": 1, "recent": 0}.items():
            _check(name, getattr(self, name), least)
        _check_share("alpha", self.alpha)
        _check_share("weight", self.weight)

    @property
    def headline(self) -> str:
        """What is asked, in a line."""
        return f"{self.first} items a task, then {self.eta:g} times as many and so on, for whom the front does not beat"


#: The schedules by the name that experiments use.
SCHEDULES: Mapping[str, type[Fixed] | type[Warmup] | type[Race]] = {"fixed": Fixed, "warmup": Warmup, "race": Race}


def _check(name: str, amount: float, least: float) -> None:
    if not amount >= least:
        raise ExperimentError(f"schedule setting {name!r} must be at least {least}, got {amount}")


def _check_share(name: str, amount: float) -> None:
    if not 0.0 < amount < 1.0:
        raise ExperimentError(f"schedule setting {name!r} must lie between 0 and 1, got {amount}")

"""Several drivers over one space: all learn from each result, and evaluations go to those that gained lately."""

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from evomerge.drivers.contract import Driver, Problem, Settings, check_at_least
from evomerge.drivers.credit import Bandit, Volume
from evomerge.drivers.greedy import Greedy
from evomerge.drivers.m2n2 import M2n2
from evomerge.drivers.map_elites import MapElites
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, Strategy, known, serve, strategy_of
from evomerge.errors import ExperimentError
from evomerge.genome import Genome
from evomerge.value import value

#: How many genomes of one arm in a row may be known already before another arm is asked.
ATTEMPTS = 8


@value
class Portfolio:
    """Settings of a portfolio: drivers that search one space together.

    Each genome comes from one of the `drivers`, which work in steady state whatever they say; what came of it is told
    to that one and injected into all others. Who is asked is drawn: by the hypervolume that a driver's genomes gained
    per evaluation, with gains fading over `memory` evaluations, but for a share `floor` that all have alike
    (`credit.Bandit`). The first `startup` genomes, known ones included, are random and nobody's. `batch` genomes are
    proposed at a time; with `steady` at most so many are in flight.

    The drivers by default are those that, of the sets that were tried, got furthest together on the spaces of
    `experiments/benchmarks/search.py`: further than each of them alone.
    """

    drivers: tuple[Settings, ...] = (MapElites(), M2n2(), Greedy())
    batch: int = 16
    startup: int = 16
    floor: float = 0.2
    memory: float = 64.0
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("startup", self.startup, 0)
        check_at_least("floor", self.floor, 0)
        check_at_least("memory", self.memory, 1)
        if not self.drivers or self.floor > 1:
            raise ExperimentError(
                f"a portfolio needs drivers and a floor from 0 to 1, got {len(self.drivers)} drivers and {self.floor}"
            )

    @property
    def libraries(self) -> tuple[str, ...]:
        """The distributions whose version decides what any of the drivers proposes."""
        return tuple(sorted({library for driver in self.drivers for library in driver.libraries}))

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        return serve(_Team(self, problem), problem, self.batch if self.steady else None)


class _Arm:
    """One of the drivers, as a strategy in steady state."""

    def __init__(self, settings: Settings, problem: Problem, number: int) -> None:
        own: Any = settings
        steady = dataclasses.replace(own, steady=True)
        seed = int(generator(problem.seed, "portfolio", number, "arm").integers(2**31))
        self.number = number
        self._strategy: Strategy = strategy_of(steady.start(dataclasses.replace(problem, seed=seed)))
        self._queue: deque[Genome] = deque()
        self._asked = 0
        self._learned = 0

    def propose(self) -> tuple[int, Genome] | None:
        """Return which of its own comes next, and the genome; None if it has nothing more to propose."""
        if not self._queue:
            self._queue.extend(self._strategy.propose(self._asked))
        if not self._queue:
            return None
        self._asked += 1
        return self._asked - 1, self._queue.popleft()

    def drop(self, genome: Genome) -> None:
        """Take a genome back."""
        self._strategy.drop([genome])

    def learn(self, result: Result, index: int, proposed: Genome) -> None:
        """Learn what came of its own genome."""
        own = dataclasses.replace(result, index=index, proposed=proposed)
        self._strategy.learn(self._learned, [own])
        self._learned += 1

    def inject(self, result: Result, index: int) -> None:
        """Learn what came of a genome of somebody else."""
        self._strategy.inject(dataclasses.replace(result, index=index, proposed=()))

    def revise(self, result: Result, index: int) -> None:
        """Take what is better known now."""
        self._strategy.revise(dataclasses.replace(result, index=index))


class _Flight:
    """A genome that is being scored, and what will have come of it.

    Attributes:
        owner: the arm that gets the credit; None: it is nobody's.
        proposals: who proposed it, also while it was in flight: the arm, which of its own it is, what it proposed.
        result: what came of it.
    """

    def __init__(self, owner: int | None = None) -> None:
        self.owner = owner
        self.proposals: list[tuple[int, int, Genome]] = []
        self.result: Result | None = None

    def index(self, arm: int, number: int) -> int:
        """Return under which index an arm was told: that of its own, else one below -1 by the number of the flight."""
        return next((own for one, own, _ in self.proposals if one == arm), -2 - number)


class _Team:
    """The arms, what each was told, and what was scored."""

    def __init__(self, settings: Portfolio, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._arms = [_Arm(driver, problem, i) for i, driver in enumerate(settings.drivers)]
        self._bandit = Bandit(len(self._arms), settings.floor, settings.memory)
        self._volume = Volume(problem.reference)
        self._flying: dict[Hashable, _Flight] = {}
        self._landed: list[_Flight] = []
        self._places: dict[Hashable, int] = {}  # of what was scored, by the genome's key
        self._indices: dict[int, int] = {}  # the same, by the result's index
        self._drawn = 0
        for result in known(problem):
            self._land(result, _Flight())

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return genomes of arms that the bandit chose; random ones at first, and where no arm has a new one."""
        rng = generator(self._problem.seed, "portfolio", step, "ask")
        wanted = factor * (1 if self._settings.steady else self._settings.batch)
        fresh: list[Genome] = []
        missing = factor * max(0, self._settings.startup - len(self._problem.known)) - self._drawn
        if missing > 0:
            fresh = self._random(rng, missing if self._settings.steady else min(missing, wanted))
            self._drawn += len(fresh)
        while len(fresh) < wanted and (genome := self._ask(rng)) is not None:
            fresh.append(genome)
        return fresh + self._random(rng, max(0, wanted - len(fresh)))

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Give genomes back to who proposed them."""
        for genome in genomes:
            for arm, _, proposed in self._flying.pop(self._seen.key(genome), _Flight()).proposals:
                self._arms[arm].drop(proposed)
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Tell each result to who proposed it and to all others, and give credit for what it gained."""
        for result in results:
            flight = self._flying.pop(self._seen.key(result.proposed), _Flight())
            gain = self._land(result, flight)
            if flight.owner is not None:
                self._bandit.credit(flight.owner, gain)
            self._tell(result, flight)

    def revise(self, result: Result) -> None:
        """Tell all arms what is better known now."""
        number = self._indices.get(result.index)
        if number is None:
            return
        flight = self._landed[number]
        if flight.result is not None:
            flight.result = dataclasses.replace(flight.result, losses=result.losses, detail=result.detail)
        self._volume.revise(number, result.losses)
        for arm in self._arms:
            arm.revise(result, flight.index(arm.number, number))

    def inject(self, result: Result) -> None:
        """Tell all arms of a foreign genome."""
        flight = _Flight()
        self._land(result, flight)
        self._tell(result, flight)

    def _random(self, rng: np.random.Generator, count: int) -> list[Genome]:
        """Draw genomes that are nobody's."""
        drawn = self._seen.draw(rng, count)
        self._flying.update((self._seen.key(genome), _Flight()) for genome in drawn)
        return drawn

    def _ask(self, rng: np.random.Generator) -> Genome | None:
        """Return a new genome of the first arm that has one, in an order that the bandit draws."""
        for number in self._bandit.order(rng):
            for _ in range(ATTEMPTS):
                proposal = self._arms[number].propose()
                if proposal is None:
                    break
                own, genome = proposal
                if self._take(number, own, genome):
                    return genome
        return None

    def _take(self, arm: int, own: int, genome: Genome) -> bool:
        """Take an arm's genome; tell whether it is new. Of one that is not new, the arm learns what came of it."""
        key = self._seen.key(genome)
        past = self._landed[self._places[key]].result if key in self._places else None
        if past is not None:
            self._arms[arm].learn(past, own, genome)
            return False
        new = self._seen.add(genome)
        if new:
            self._flying[key] = _Flight(arm)
        if key in self._flying:
            self._flying[key].proposals.append((arm, own, genome))
        return new

    def _land(self, result: Result, flight: _Flight) -> float:
        """Remember what came of a genome, and return the volume that it gained."""
        number = len(self._landed)
        flight.result = result
        self._landed.append(flight)
        self._seen.add(result.genome)
        self._places[self._seen.key(result.genome)] = number
        if result.index != -1:
            self._indices[result.index] = number
        return 0.0 if result.losses is None else self._volume.add(number, result.losses)

    def _tell(self, result: Result, flight: _Flight) -> None:
        """Tell all arms what landed last."""
        number = len(self._landed) - 1
        for arm, own, proposed in flight.proposals:
            self._arms[arm].learn(result, own, proposed)
        for one in self._arms:
            if all(one.number != arm for arm, _, _ in flight.proposals):
                one.inject(result, -1 if result.index == -1 else -2 - number)

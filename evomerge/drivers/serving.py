"""Serves what a strategy proposes one candidate at a time: in generations, or in steady state."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Protocol

from evomerge.drivers.contract import NOTHING, Detail, Driver, Problem, check_losses
from evomerge.errors import ExperimentError
from evomerge.genome import Genome, check_genome
from evomerge.objective import Losses
from evomerge.value import value


@value
class Result:
    """What came of a genome.

    Attributes:
        genome: what was scored.
        losses: its losses; None if it failed.
        detail: what else is known of it.
        index: which genome of this driver it is, from 0; -1: somebody else proposed it.
        proposed: what the strategy proposed there: the genome itself, but for its last bits on another processor.
    """

    genome: Genome
    losses: Losses | None
    detail: Detail = field(default_factory=Detail)
    index: int = -1
    proposed: Genome = ()


class Strategy(Protocol):
    """The part of a driver that knows one algorithm, whichever way it is served.

    In generations, `propose` gives a generation and `learn` takes all of it, in the order in which it was proposed.
    In steady state, `propose` gives one genome at a time (a whole first population may come at once), and `learn` takes
    one result at a time, in any order. A step is a number that never comes again for the same call: random numbers are
    functions of it, so a strategy keeps no generator.
    """

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return genomes to ask, none when the search space is exhausted.

        Args:
            step: how many generations (in steady state: genomes) were proposed before.
            factor: so many times as many as would be asked; those that will not be asked are dropped.
        """
        ...

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Take back proposals that will not be asked after all."""
        ...

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Take results; they may have failed.

        Args:
            step: how many times it learned before.
            results: of its own proposals. What was scored may differ from what was proposed, and counts.
        """
        ...

    def revise(self, result: Result) -> None:
        """Take what is better known now of a genome that was learned."""
        ...

    def inject(self, result: Result) -> None:
        """Take what came of a genome that somebody else proposed; it counts as met."""
        ...


def serve(strategy: Strategy, problem: Problem, limit: int | None) -> Driver:
    """Return a driver that serves a strategy: in steady state with so many genomes in flight at most, else in batches.

    Args:
        strategy: what proposes.
        problem: what it is asked to solve.
        limit: the most genomes in flight; None: generations.
    """
    return Generational(strategy, problem) if limit is None else SteadyState(strategy, problem, limit)


def strategy_of(driver: Driver) -> Strategy:
    """Return the strategy that a fresh driver serves, for drivers that are made of others.

    Raises:
        ExperimentError: if it serves none.
    """
    if not isinstance(driver, Generational | SteadyState):
        raise ExperimentError(f"{type(driver).__name__} serves no strategy; it cannot be a part of another driver")
    return driver.strategy


class Generational:
    """A driver that collects a generation and hands it on in index order.

    A run is the same with one worker or sixteen, at the price of waiting for the slowest
    candidate of each generation.
    """

    def __init__(self, strategy: Strategy, problem: Problem) -> None:
        self.strategy = strategy
        self._problem = problem
        self._generation = 0
        self._first = 0  # index of the generation's first genome
        self._proposed: list[Genome] | None = None  # None: to be proposed at the next ask
        self._served = 0
        self._told: dict[int, Result] = {}

    def ask(self) -> Genome | None:
        """Return the next genome of the generation, or None while it is in flight."""
        if self._proposed is None:
            self._proposed = self.strategy.propose(self._generation)
        if self._served == len(self._proposed):
            return None
        self._served += 1
        return self._proposed[self._served - 1]

    def tell(self, index: int, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Keep one result; the last one of a generation lets the strategy learn."""
        known = self._proposed or []
        if not self._first <= index < self._first + self._served or index in self._told:
            raise ValueError(f"index {index} is not in flight: it was never asked, or is told already")
        proposed = known[index - self._first]
        self._told[index] = _result(self._problem, genome, losses, detail, index, proposed)
        if len(self._told) == len(known):
            self._finish()

    def revise(self, index: int, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Hand better known losses of an earlier generation's genome on to the strategy."""
        if not 0 <= index < self._first:
            raise ValueError(f"index {index} is of no earlier generation; tell it first")
        if losses is not None:
            check_losses(losses, self._problem.objectives, f"revised index {index}")
        self.strategy.revise(Result(genome=(), losses=losses, detail=detail, index=index))

    def inject(self, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Hand a foreign genome on to the strategy."""
        self.strategy.inject(_result(self._problem, genome, losses, detail))

    def _finish(self) -> None:
        results = [self._told[index] for index in sorted(self._told)]
        self.strategy.learn(self._generation, results)
        self._generation += 1
        self._first += len(results)
        self._proposed, self._served, self._told = None, 0, {}


class SteadyState:
    """A driver that proposes whenever fewer genomes are in flight than its limit, and learns from each at once.

    No worker waits for another. What is proposed depends on what was told by then, so the recorded order of asks and
    tells is what replays.

    Args:
        strategy: what proposes.
        problem: what it is asked to solve.
        limit: the most genomes in flight.
    """

    def __init__(self, strategy: Strategy, problem: Problem, limit: int) -> None:
        self.strategy = strategy
        self._problem = problem
        self._limit = limit
        self._queue: deque[Genome] = deque()
        self._flying: dict[int, Genome] = {}
        self._asked = 0
        self._told: set[int] = set()

    def ask(self) -> Genome | None:
        """Return the next genome, or None while as many are in flight as may be; None changes nothing."""
        if len(self._flying) >= self._limit:
            return None
        if not self._queue:
            self._queue.extend(self.strategy.propose(self._asked))
        if not self._queue:
            return None
        genome = self._queue.popleft()
        self._flying[self._asked] = genome
        self._asked += 1
        return genome

    def tell(self, index: int, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Let the strategy learn from one result."""
        if index not in self._flying:
            raise ValueError(f"index {index} is not in flight: it was never asked, or is told already")
        result = _result(self._problem, genome, losses, detail, index, self._flying[index])
        del self._flying[index]
        self.strategy.learn(len(self._told), [result])
        self._told.add(index)

    def revise(self, index: int, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Hand better known losses of a genome that was told on to the strategy."""
        if index not in self._told:
            raise ValueError(f"index {index} was not told yet; tell it first")
        if losses is not None:
            check_losses(losses, self._problem.objectives, f"revised index {index}")
        self.strategy.revise(Result(genome=(), losses=losses, detail=detail, index=index))

    def inject(self, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Hand a foreign genome on to the strategy."""
        self.strategy.inject(_result(self._problem, genome, losses, detail))


def known(problem: Problem) -> Iterable[Result]:
    """Yield what is known before the search, as results of somebody else."""
    details = problem.details or (NOTHING,) * len(problem.known)
    for (genome, losses), detail in zip(problem.known, details, strict=True):
        yield Result(genome=genome, losses=losses, detail=detail)


def _result(
    problem: Problem, genome: Genome, losses: Losses | None, detail: Detail, index: int = -1, proposed: Genome = ()
) -> Result:
    """Return a checked result."""
    place = f"told index {index}" if index >= 0 else "injected"
    check_genome(problem.axes, genome, place)
    if losses is not None:
        check_losses(losses, problem.objectives, place)
    return Result(genome=genome, losses=losses, detail=detail, index=index, proposed=proposed)

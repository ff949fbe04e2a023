"""Serves a population one candidate at a time, so that the order of results does not matter."""

import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

import numpy as np

from evomerge.drivers.contract import Problem, check_losses
from evomerge.genome import Axis, Gene, Genome, Real, active, check_genome, from_unit
from evomerge.objective import Losses

#: How often a new genome is looked for by chance before the space counts as exhausted.
DRAWS = 200


class Strategy(Protocol):
    """The part of a driver that knows one algorithm; it sees whole generations only."""

    def propose(self, generation: int) -> list[Genome]:
        """Return the genomes of a generation; none when the search space is exhausted."""
        ...

    def learn(self, generation: int, genomes: Sequence[Genome], losses: Sequence[Losses | None]) -> None:
        """Take the results of a whole generation, in the order it was proposed; None for failures.

        The genomes are those that were scored, which may differ from the proposed ones.
        """
        ...

    def revise(self, index: int, losses: Losses | None) -> None:
        """Take better known losses of a genome of an earlier generation, by its index in the order of proposals."""
        ...


class Generational:
    """A driver that collects a generation and hands it on in index order.

    A run is the same with one worker or sixteen, at the price of waiting for the slowest
    candidate of each generation.
    """

    def __init__(self, strategy: Strategy, problem: Problem) -> None:
        self._strategy = strategy
        self._problem = problem
        self._generation = 0
        self._first = 0  # index of the generation's first genome
        self._proposed: list[Genome] | None = None  # None: to be proposed at the next ask
        self._served = 0
        self._told: dict[int, tuple[Genome, Losses | None]] = {}

    def ask(self) -> Genome | None:
        """Return the next genome of the generation, or None while it is in flight."""
        if self._proposed is None:
            self._proposed = self._strategy.propose(self._generation)
        if self._served == len(self._proposed):
            return None
        self._served += 1
        return self._proposed[self._served - 1]

    def tell(self, index: int, genome: Genome, losses: Losses | None) -> None:
        """Keep one result; the last one of a generation lets the strategy learn."""
        if not self._first <= index < self._first + self._served or index in self._told:
            raise ValueError(f"index {index} is not in flight: it was never asked, or is told already")
        check_genome(self._problem.axes, genome, f"told index {index}")
        if losses is not None:
            check_losses(losses, self._problem.objectives, f"told index {index}")
        self._told[index] = genome, losses
        if len(self._told) == len(self._proposed or ()):
            self._finish()

    def revise(self, index: int, losses: Losses | None) -> None:
        """Hand better known losses of an earlier generation's genome on to the strategy."""
        if not 0 <= index < self._first:
            raise ValueError(f"index {index} is of no earlier generation; tell it first")
        if losses is not None:
            check_losses(losses, self._problem.objectives, f"revised index {index}")
        self._strategy.revise(index, losses)

    def _finish(self) -> None:
        results = [self._told[index] for index in sorted(self._told)]
        genomes, losses = [genome for genome, _ in results], [loss for _, loss in results]
        self._strategy.learn(self._generation, genomes, losses)
        self._generation += 1
        self._first += len(results)
        self._proposed, self._served, self._told = None, 0, {}


class Seen:
    """The genomes that a run has met; proposes new ones only.

    Genes of axes that are not active do not make a genome new, nor do differences of less than
    a billionth of an axis, which the way to the unit cube and back can leave. Where the problem knows of more genomes
    that are the same candidate, they are one.
    """

    def __init__(
        self,
        axes: tuple[Axis, ...],
        genomes: Iterable[Genome] = (),
        draw: Callable[[np.random.Generator], Genome] | None = None,
        same: Callable[[Genome], Hashable] | None = None,
    ) -> None:
        self._axes = axes
        self._drawn = draw
        self._same = same
        self._keys = {self._key(genome) for genome in genomes}

    def add(self, genome: Genome) -> bool:
        """Remember a genome; tell whether it was new."""
        key = self._key(genome)
        new = key not in self._keys
        self._keys.add(key)
        return new

    def draw(self, rng: np.random.Generator, count: int) -> list[Genome]:
        """Return up to `count` new random genomes, and remember them.

        They are drawn as the space hopes most of them; where it hopes nothing, spread as a Latin hypercube. Fewer only
        when `DRAWS` draws in a row give nothing new: the space is exhausted.
        """
        fresh: list[Genome] = []
        if self._drawn is None:
            spread = [from_unit(self._axes, point) for point in latin(rng, count, len(self._axes))]
            fresh = [genome for genome in spread if self.add(genome)]
        while len(fresh) < count:
            for _ in range(DRAWS):
                genome = self._drawn(rng) if self._drawn else from_unit(self._axes, rng.random(len(self._axes)))
                if self.add(genome):
                    fresh.append(genome)
                    break
            else:
                break
        return fresh

    def _key(self, genome: Genome) -> Hashable:
        if self._same is not None:
            return self._same(genome)
        counts = active(self._axes, genome)
        return tuple(
            (_coarse(axis, gene) if on else None) for axis, gene, on in zip(self._axes, genome, counts, strict=True)
        )


def _coarse(axis: Axis, gene: Gene) -> Gene:
    return round(axis.to_unit(gene), 9) if isinstance(axis, Real) else gene


def generator(seed: int, driver: str, generation: int, step: str) -> np.random.Generator:
    """Return the random generator of one step of one generation: a function of its name, with no state to save."""
    names = [zlib.crc32(name.encode()) for name in (driver, step)]
    return np.random.default_rng(np.random.SeedSequence([seed, *names, generation]))


def latin(rng: np.random.Generator, count: int, axes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return points of the unit cube with one in each of `count` slices of every axis. Shape (count, axes).

    McKay, Beckman, Conover 1979, "A comparison of three methods for selecting values of input variables".
    """
    slices = np.stack([rng.permutation(count) for _ in range(axes)], axis=1)
    return (slices + rng.random((count, axes))) / max(count, 1)

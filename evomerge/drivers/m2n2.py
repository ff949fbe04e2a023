"""M2N2: an archive whose members compete for items, and parents that complement each other."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.items import Answers, Items, attraction, fitness, worth
from evomerge.drivers.mixing import fresh_ones, mixed, moved
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known, serve
from evomerge.genome import Genome
from evomerge.objective import Losses
from evomerge.value import value


@value
class M2n2:
    """Settings of M2N2 (Abrantes, Lange, Tang 2025, "Competition and attraction improve model fusion").

    `population` candidates are in the archive. Each item is shared by all who solve it, the more sharply the greater
    `alpha` is (0: fitness is the plain sum of scores): a candidate lives on what few others can do. The first parent
    is drawn by that fitness, the second by what it can do that the first cannot. In a child one parent takes over from
    the other at a random place of the genome, and whoever is the least fit of archive and child leaves; of equals, the
    older.

    Items are those of `Detail.responses`, weighed where not all answered all (`items.worth`). Where an objective has
    none, the archive competes for points of the space of losses (`items.Items.scores`), which is ours.

    Published are `population` 20, `alpha` 1 and no mutation of pretrained models; there, genes are weights without
    number. A genome of few genes needs some: each mutates with the chance `mutation_rate`, 1 / axes if left out, by a
    normal step of `mutation_sigma` of its axis. `batch` genomes are proposed at a time, and enter the archive in their
    order; with `steady`, as published, each as soon as it is scored, and at most `population` are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ()

    population: int = 20
    alpha: float = 1.0
    mutation_rate: float | None = None
    mutation_sigma: float = 0.2
    batch: int = 4
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("population", self.population, 2)
        check_at_least("alpha", self.alpha, 0)
        check_at_least("mutation_rate", self.mutation_rate or 0.0, 0)
        check_at_least("mutation_sigma", self.mutation_sigma, 0)
        check_at_least("batch", self.batch, 1)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time; in steady state, the limit."""
        return self.population if self.steady else self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver; its archive are the known genomes, and random ones until it is full."""
        return serve(_Archive(self, problem), problem, self.population if self.steady else None)


@value
class _Member:
    """A candidate of the archive."""

    genome: Genome
    losses: Losses
    answers: Answers
    index: int


class _Archive:
    """Who is left, and who breeds with whom."""

    def __init__(self, settings: M2n2, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._items = Items()
        self._members: list[_Member] = []
        self._given = len(problem.known)
        for result in known(problem):
            self._enter(result)

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return children of the archive; random genomes until as many as fit into it were proposed or given."""
        settings, rng = self._settings, generator(self._problem.seed, "m2n2", step, "ask")
        size = 1 if settings.steady else settings.batch
        missing = settings.population - self._given - step * size
        if missing > 0 or len(self._members) < 2:
            wanted = max(missing, 1) if settings.steady else size
            return fresh_ones(self._problem, self._seen, None, factor * wanted, rng)
        worth_ND = self._worth()
        return fresh_ones(self._problem, self._seen, lambda: self._child(worth_ND, rng), factor * size, rng)

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget children that are not asked; they may be bred again."""
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Let each enter the archive in its turn; failures only count as met."""
        for result in results:
            self._enter(result)

    def revise(self, result: Result) -> None:
        """Change what a member scored, if it is in the archive still; whoever has left does not return."""
        for place, member in enumerate(self._members):
            if member.index == result.index:
                if result.losses is None:
                    del self._members[place]
                    return
                answers = self._items.read(result.detail.responses) if result.detail.responses else member.answers
                self._members[place] = dataclasses.replace(member, losses=result.losses, answers=answers)
                return

    def inject(self, result: Result) -> None:
        """Let a foreign genome enter the archive."""
        self._given += 1
        self._enter(result)

    def _enter(self, result: Result) -> None:
        """Let the least fit of the archive and one more leave."""
        self._seen.add(result.genome)
        if result.losses is None:
            return
        answers = self._items.read(result.detail.responses)
        self._members.append(_Member(genome=result.genome, losses=result.losses, answers=answers, index=result.index))
        if len(self._members) > self._settings.population:
            del self._members[int(np.argmin(fitness(self._worth())))]

    def _worth(self) -> NDArray[np.float64]:
        answers, losses = [one.answers for one in self._members], [one.losses for one in self._members]
        return worth(self._items.scores(answers, losses), self._settings.alpha)

    def _child(self, worth_ND: NDArray[np.float64], rng: np.random.Generator) -> Genome:
        """Return a child of two: the one's share is w before a random place of the genome, and 1 - w after it.

        The published slerp of weights is a straight line here: genomes have no length to keep.
        """
        axes, settings = self._problem.axes, self._settings
        first = _drawn(fitness(worth_ND), rng)
        second = _drawn(attraction(worth_ND, first), rng, first)
        before = np.arange(len(axes)) < rng.integers(1, max(len(axes), 2))
        w = rng.random()
        shares_A = np.where(before, w, 1.0 - w)
        one, two = self._members[first].genome, self._members[second].genome
        child = mixed(axes, one, two, shares_A, shares_A >= 0.5)
        return moved(axes, child, settings.mutation_rate, settings.mutation_sigma, rng)


def _drawn(chances_N: NDArray[np.float64], rng: np.random.Generator, other: int | None = None) -> int:
    """Return a place, in proportion to chances; where all are 0, any but the other."""
    if not chances_N.sum() > 0:
        chances_N = np.ones(len(chances_N))
        if other is not None:
            chances_N[other] = 0.0
    return int(rng.choice(len(chances_N), p=chances_N / chances_N.sum()))

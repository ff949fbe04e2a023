"""Children of a population over mixed axes, as points of the unit cube: what NSGA-II and NSGA-III share."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.contract import Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known
from evomerge.genome import Axis, Choice, Gene, Genome, Real, to_unit

#: How many rounds of mating may fail to give new genomes before random ones fill the generation.
ROUNDS = 20


class Variation(Protocol):
    """Settings of a population and of how its children vary; see `Nsga2`."""

    @property
    def population(self) -> int:
        """How many survive."""
        ...

    @property
    def crossover_rate(self) -> float:
        """The chance of a pair to be crossed."""
        ...

    @property
    def crossover_eta(self) -> float:
        """The distribution index of simulated binary crossover."""
        ...

    @property
    def mutation_rate(self) -> float | None:
        """The chance of each gene to mutate; None: 1 / axes."""
        ...

    @property
    def mutation_eta(self) -> float:
        """The distribution index of polynomial mutation."""
        ...

    @property
    def steady(self) -> bool:
        """Whether one child is bred at a time."""
        ...

    def generation(self, axes: int) -> int:
        """Return how many children are bred at a time."""
        ...


class Survival(Protocol):
    """Who survives, and who becomes a parent; populations are pymoo's, with X, F and `index` of each individual."""

    def survive(self, everyone: Any, count: int, rng: np.random.Generator) -> Any:
        """Return at most so many of a population."""
        ...

    def parents(self, population: Any, pairs: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return who breeds with whom: places in the population, shape (pairs, 2)."""
        ...

    def forget(self) -> None:
        """Forget what rests on losses of individuals that may have changed."""
        ...


class Evolution:
    """A strategy that breeds a population and lets a survival choose from it and its children.

    Genomes are points of the unit cube, an integer or option as the middle of its cell.

    Args:
        name: of the streams of random numbers.
        settings: how many, and how children vary.
        problem: what is solved.
        survival: who survives and breeds.
    """

    def __init__(self, name: str, settings: Variation, problem: Problem, survival: Survival) -> None:
        self._name = name
        self._settings = settings
        self._problem = problem
        self._survival = survival
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._population: Any = None
        self._injected = 0
        self._survive(list(known(problem)), self._rng(0, "known"))

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return children of the population, or random genomes while there is none."""
        rng = self._rng(step, "ask")
        missing = self._settings.population - (0 if self._population is None else len(self._population))
        if step == 0 and missing > 0:
            return self._seen.draw(rng, missing * factor)
        wanted = factor * (1 if self._settings.steady else self._settings.generation(len(self._problem.axes)))
        fresh: list[Genome] = []
        for _ in range(ROUNDS if self._population is not None else 0):
            children = self._breed(rng, wanted - len(fresh))
            fresh += [child for child in children if self._seen.add(child)]
            if len(fresh) == wanted:
                return fresh
        return fresh + self._seen.draw(rng, wanted - len(fresh))

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget children that are not asked; they may be bred again."""
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Let the best of population and generation survive; failures only count as seen."""
        for result in results:
            self._seen.add(result.genome)
        self._survive(results, self._rng(step, "tell"))

    def revise(self, result: Result) -> None:
        """Change what an individual loses, if it is in the population; the next survival counts it."""
        self._survival.forget()
        if self._population is None:
            return
        here = self._population.get("index") == result.index
        if result.losses is None:
            self._population = self._population[~here] if (~here).any() else None
        elif here.any():
            self._population[here].set("F", np.array([result.losses], dtype=np.float64))

    def inject(self, result: Result) -> None:
        """Let a foreign genome compete with the population."""
        self._seen.add(result.genome)
        self._injected += 1
        self._survive([result], self._rng(self._injected, "inject"))

    def _rng(self, step: int, purpose: str) -> np.random.Generator:
        return generator(self._problem.seed, self._name, step, purpose)

    def _survive(self, results: Sequence[Result], rng: np.random.Generator) -> None:
        from pymoo.core.population import Population

        scored = [result for result in results if result.losses is not None]
        if not scored:
            return
        points = np.array([to_unit(self._problem.axes, result.genome) for result in scored])
        amounts = np.array([result.losses for result in scored], dtype=np.float64)
        newcomers = Population.new("X", points, "F", amounts, "index", np.array([result.index for result in scored]))
        everyone = newcomers if self._population is None else Population.merge(self._population, newcomers)
        self._population = self._survival.survive(everyone, self._settings.population, rng)

    def _breed(self, rng: np.random.Generator, count: int) -> list[Genome]:
        chosen = self._survival.parents(self._population, -(-count // 2), rng)
        parents = self._population.get("X")[chosen].transpose(1, 0, 2)  # (2, pairs, axes)
        crossed = cross(parents, self._problem.axes, self._settings, rng).reshape(-1, len(self._problem.axes))
        children = mutate(crossed[:count], self._problem.axes, self._settings, rng)
        draw = self._problem.draw
        return children if draw is None else [hoped(child, draw(rng), self._problem.axes, rng) for child in children]


def check_variation(settings: Variation) -> None:
    """Refuse settings that no population can have.

    Raises:
        ExperimentError: naming the setting.
    """
    check_at_least("population", settings.population, 2)
    check_at_least("offspring", settings.generation(1), 1)
    check_at_least("crossover_rate", settings.crossover_rate, 0)
    check_at_least("crossover_eta", settings.crossover_eta, 1)
    check_at_least("mutation_eta", settings.mutation_eta, 1)
    if settings.mutation_rate is not None:
        check_at_least("mutation_rate", settings.mutation_rate, 0)


def cube(problem: Problem) -> Any:
    """Return what pymoo takes for the problem: the unit cube, without a function."""
    from pymoo.core.problem import Problem as Cube

    return Cube(n_var=len(problem.axes), n_obj=problem.objectives, xl=0.0, xu=1.0)


def cross(
    parents: NDArray[np.float64], axes: Sequence[Axis], settings: Variation, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return two children per pair: numbers by simulated binary crossover, options by exchange. Shape as parents."""
    from pymoo.operators.crossover.sbx import cross_sbx

    pairs, count = parents.shape[1:]
    low, high = np.zeros(count), np.ones(count)
    eta, half = np.full((pairs, 1), settings.crossover_eta), np.full((pairs, 1), 0.5)
    children: NDArray[np.float64] = cross_sbx(parents, low, high, eta, half, half.copy(), random_state=rng)
    options = np.array([isinstance(axis, Choice) for axis in axes], dtype=bool)
    exchanged = np.where(rng.random((pairs, count)) < 0.5, parents, parents[::-1])
    children[:, :, options] = exchanged[:, :, options]
    kept = rng.random(pairs) >= settings.crossover_rate
    children[:, kept] = parents[:, kept]
    return children


def mutate(
    points: NDArray[np.float64], axes: Sequence[Axis], settings: Variation, rng: np.random.Generator
) -> list[Genome]:
    """Return the genomes of mutated points: numbers by polynomial mutation, options by drawing another one."""
    from pymoo.operators.mutation.pm import mut_pm

    count, width = points.shape
    rate = 1.0 / width if settings.mutation_rate is None else settings.mutation_rate
    low, high, eta = np.zeros(width), np.ones(width), np.full(count, settings.mutation_eta)
    moved = mut_pm(points, low, high, eta, np.full(count, rate), False, random_state=rng)
    redrawn = rng.random(points.shape) < rate
    pick = rng.random(points.shape)
    rows = zip(points.tolist(), moved.tolist(), redrawn.tolist(), pick.tolist(), strict=True)
    return [tuple(gene_at(*gene) for gene in zip(axes, *row, strict=True)) for row in rows]


def gene_at(axis: Axis, before: float, after: float, redrawn: bool, pick: float) -> Gene:
    """Return the gene of one coordinate; a mutated integer moves by at least one, an option to another one.

    Args:
        axis: of the gene.
        before: its coordinate in the unit cube.
        after: where mutation moves a number to; the same: it stays.
        redrawn: whether an option changes.
        pick: which of the other options it becomes, from 0 to below 1.
    """
    if isinstance(axis, Choice):
        option = axis.from_unit(before)
        others = [other for other in axis.options if other != option]
        return others[int(pick * len(others))] if redrawn and others else option
    if isinstance(axis, Real) or before == after:
        return axis.from_unit(after)
    # Polynomial mutation mostly moves less than a cell, which would leave short integer axes as they are.
    old, new = axis.from_unit(before), axis.from_unit(after)
    step = new if new != old else old + (1 if after > before else -1)
    return min(max(step, axis.low), axis.high)


def hoped(child: Genome, drawn: Genome, axes: Sequence[Axis], rng: np.random.Generator) -> Genome:
    """Return a child of which a gene or two, options and integers, are those of a genome that the space has drawn."""
    steps = [i for i, axis in enumerate(axes) if not isinstance(axis, Real)]
    taken = {i for i, u in zip(steps, rng.random(len(steps)), strict=True) if u * len(steps) < 1}
    return tuple(drawn[i] if i in taken else gene for i, gene in enumerate(child))



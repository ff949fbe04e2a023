"""NSGA-II over mixed axes: pymoo's selection, variation and survival, with our own encoding and duplicate rule."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.generational import Generational, Seen, generator
from evomerge.genome import Axis, Choice, Gene, Genome, Real, to_unit
from evomerge.objective import Losses
from evomerge.value import value

#: How many rounds of mating may fail to give new genomes before random ones fill the generation.
ROUNDS = 20


@value
class Nsga2:
    """Settings of NSGA-II (Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II").

    `population` survive each generation and `offspring` are proposed (as many, if left out).
    `crossover_eta` and `mutation_eta` are the distribution indices of simulated binary crossover
    and polynomial mutation: greater stays nearer to the parents. `mutation_rate` is the chance of
    each gene to mutate, 1 / axes if left out.
    """

    population: int = 40
    offspring: int | None = None
    crossover_rate: float = 0.9
    crossover_eta: float = 15.0
    mutation_rate: float | None = None
    mutation_eta: float = 20.0

    def __post_init__(self) -> None:
        check_at_least("population", self.population, 2)
        check_at_least("offspring", self.generation(1), 1)
        check_at_least("crossover_rate", self.crossover_rate, 0)
        check_at_least("crossover_eta", self.crossover_eta, 1)
        check_at_least("mutation_eta", self.mutation_eta, 1)
        if self.mutation_rate is not None:
            check_at_least("mutation_rate", self.mutation_rate, 0)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.population if self.offspring is None else self.offspring

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver; its first population are the known genomes, filled up with random ones."""
        return Generational(_Evolution(self, problem), problem)


class _Evolution:
    """The population, with genomes as points of the unit cube (an integer or option as the middle of its cell)."""

    def __init__(self, settings: Nsga2, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._population: Any = None
        self._told = 0  # genomes learned so far; the index of the next
        known = [(genome, loss, -1) for genome, loss in problem.known]
        self._survive(known, generator(problem.seed, "nsga2", 0, "known"))

    def propose(self, generation: int) -> list[Genome]:
        """Return children of the population, or random genomes while there is none."""
        rng = generator(self._problem.seed, "nsga2", generation, "ask")
        missing = self._settings.population - len(self._problem.known)
        if generation == 0 and missing > 0:
            return self._seen.draw(rng, missing)
        wanted = self._settings.generation(len(self._problem.axes))
        fresh: list[Genome] = []
        for _ in range(ROUNDS if self._population is not None else 0):
            children = self._breed(rng, wanted - len(fresh))
            fresh += [child for child in children if self._seen.add(child)]
            if len(fresh) == wanted:
                return fresh
        return fresh + self._seen.draw(rng, wanted - len(fresh))

    def learn(self, generation: int, genomes: Sequence[Genome], losses: Sequence[Losses | None]) -> None:
        """Let the best of population and generation survive; failures only count as seen."""
        for genome in genomes:
            self._seen.add(genome)
        results = zip(range(self._told, self._told + len(genomes)), genomes, losses, strict=True)
        self._told += len(genomes)
        scored = [(genome, loss, index) for index, genome, loss in results if loss is not None]
        self._survive(scored, generator(self._problem.seed, "nsga2", generation, "tell"))

    def revise(self, index: int, losses: Losses | None) -> None:
        """Change what an individual loses, if it is in the population; the next survival counts it."""
        if self._population is None:
            return
        here = self._population.get("index") == index
        if losses is None:
            self._population = self._population[~here] if (~here).any() else None
        elif here.any():
            self._population[here].set("F", np.array([losses], dtype=np.float64))

    def _survive(self, scored: Sequence[tuple[Genome, Losses, int]], rng: np.random.Generator) -> None:
        from pymoo.core.population import Population
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        if not scored:
            return
        genomes, losses, indices = zip(*scored, strict=True)
        points = np.array([to_unit(self._problem.axes, genome) for genome in genomes])
        amounts = np.array(losses, dtype=np.float64)
        newcomers = Population.new("X", points, "F", amounts, "index", np.array(indices))
        everyone = newcomers if self._population is None else Population.merge(self._population, newcomers)
        self._population = RankAndCrowding().do(
            _cube(self._problem), everyone, n_survive=self._settings.population, random_state=rng
        )

    def _breed(self, rng: np.random.Generator, count: int) -> list[Genome]:
        from pymoo.algorithms.moo.nsga2 import binary_tournament
        from pymoo.operators.selection.tournament import TournamentSelection

        rules = SimpleNamespace(tournament_type="comp_by_dom_and_crowding", random_state=rng)
        chosen = TournamentSelection(func_comp=binary_tournament).do(
            _cube(self._problem),
            self._population,
            math.ceil(count / 2),
            n_parents=2,
            to_pop=False,
            algorithm=rules,
            random_state=rng,
        )
        parents = self._population.get("X")[chosen].transpose(1, 0, 2)  # (2, pairs, axes)
        crossed = _cross(parents, self._problem.axes, self._settings, rng).reshape(-1, len(self._problem.axes))
        children = _mutate(crossed[:count], self._problem.axes, self._settings, rng)
        draw = self._problem.draw
        return children if draw is None else [_hoped(child, draw(rng), self._problem.axes, rng) for child in children]


def _cross(
    parents: NDArray[np.float64], axes: Sequence[Axis], settings: Nsga2, rng: np.random.Generator
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


def _mutate(
    points: NDArray[np.float64], axes: Sequence[Axis], settings: Nsga2, rng: np.random.Generator
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
    return [tuple(_gene(*gene) for gene in zip(axes, *row, strict=True)) for row in rows]


def _gene(axis: Axis, before: float, after: float, redrawn: bool, pick: float) -> Gene:
    """Return the gene of one coordinate; a mutated integer moves by at least one, an option to another one."""
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


def _hoped(child: Genome, drawn: Genome, axes: Sequence[Axis], rng: np.random.Generator) -> Genome:
    """Return a child of which a gene or two, options and integers, are those of a genome that the space has drawn."""
    steps = [i for i, axis in enumerate(axes) if not isinstance(axis, Real)]
    taken = {i for i, u in zip(steps, rng.random(len(steps)), strict=True) if u * len(steps) < 1}
    return tuple(drawn[i] if i in taken else gene for i, gene in enumerate(child))


def _cube(problem: Problem) -> Any:
    from pymoo.core.problem import Problem as Cube

    return Cube(n_var=len(problem.axes), n_obj=problem.objectives, xl=0.0, xu=1.0)

"""NSGA-II over mixed axes: pymoo's selection, variation and survival, with our own encoding and duplicate rule."""

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.breeding import Evolution, check_variation, cube
from evomerge.drivers.contract import Driver, Problem
from evomerge.drivers.serving import serve
from evomerge.value import value


@value
class Nsga2:
    """Settings of NSGA-II (Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II").

    `population` survive each generation and `offspring` are proposed (as many, if left out).
    `crossover_eta` and `mutation_eta` are the distribution indices of simulated binary crossover
    and polynomial mutation: greater stays nearer to the parents. `mutation_rate` is the chance of
    each gene to mutate, 1 / axes if left out. With `steady` each child is bred when a worker is free and competes as
    soon as it is scored; at most `population` are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ("pymoo",)

    population: int = 40
    offspring: int | None = None
    crossover_rate: float = 0.9
    crossover_eta: float = 15.0
    mutation_rate: float | None = None
    mutation_eta: float = 20.0
    steady: bool = False

    def __post_init__(self) -> None:
        check_variation(self)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.population if self.offspring is None or self.steady else self.offspring

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver; its first population are the known genomes, filled up with random ones."""
        strategy = Evolution("nsga2", self, problem, Crowding(problem))
        return serve(strategy, problem, self.population if self.steady else None)


class Crowding:
    """The better fronts survive, and of the last one those with most room; parents win a tournament of two."""

    def __init__(self, problem: Problem) -> None:
        self._cube = cube(problem)

    def survive(self, everyone: Any, count: int, rng: np.random.Generator) -> Any:
        """Return at most so many of a population."""
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        return RankAndCrowding().do(self._cube, everyone, n_survive=count, random_state=rng)

    def parents(self, population: Any, pairs: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return who breeds with whom: places in the population, shape (pairs, 2)."""
        from pymoo.algorithms.moo.nsga2 import binary_tournament
        from pymoo.operators.selection.tournament import TournamentSelection

        rules = SimpleNamespace(tournament_type="comp_by_dom_and_crowding", random_state=rng)
        chosen: NDArray[np.int64] = TournamentSelection(func_comp=binary_tournament).do(
            self._cube, population, pairs, n_parents=2, to_pop=False, algorithm=rules, random_state=rng
        )
        return chosen

    def forget(self) -> None:
        """Nothing: all that counts is in the population."""

"""NSGA-III over mixed axes: pymoo's survival by reference directions, on the variation of NSGA-II."""

import warnings
from math import comb
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.breeding import Evolution, check_variation, cube
from evomerge.drivers.contract import Driver, Problem
from evomerge.drivers.nsga2 import Crowding
from evomerge.drivers.serving import serve
from evomerge.value import value


@value
class Nsga3:
    """Settings of NSGA-III, for many objectives.

    Deb, Jain 2014, "An evolutionary many-objective optimization algorithm using reference-point-based nondominated
    sorting approach, part I". The front is spread over reference directions, at most `population` of them
    (`directions`), which keeps its spread where there are so many objectives that nearly all candidates are
    non-dominated. The other settings are those of NSGA-II; the distribution index of crossover is the paper's
    (table II). With one objective it is NSGA-II.
    """

    libraries: ClassVar[tuple[str, ...]] = ("pymoo",)

    population: int = 40
    offspring: int | None = None
    crossover_rate: float = 1.0
    crossover_eta: float = 30.0
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
        survival = Crowding(problem) if problem.objectives == 1 else _Niches(problem, self.population)
        strategy = Evolution("nsga3", self, problem, survival)
        return serve(strategy, problem, self.population if self.steady else None)


class _Niches:
    """The better fronts survive, and of the last one those in the emptiest niches; any two are parents.

    What is kept from one survival to the next are the ideal point and the extreme points, by which losses are scaled.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        self._cube = cube(problem)
        self._directions = directions(problem.objectives, count)
        self.forget()

    def survive(self, everyone: Any, count: int, rng: np.random.Generator) -> Any:
        """Return at most so many of a population."""
        with warnings.catch_warnings():  # pymoo silences all warnings for good where it solves for the intercepts
            return self._survival.do(self._cube, everyone, n_survive=count, random_state=rng)

    def parents(self, population: Any, pairs: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return who breeds with whom: places in the population, shape (pairs, 2)."""
        from pymoo.algorithms.moo.nsga3 import comp_by_cv_then_random
        from pymoo.operators.selection.tournament import TournamentSelection

        chosen: NDArray[np.int64] = TournamentSelection(func_comp=comp_by_cv_then_random).do(
            self._cube, population, pairs, n_parents=2, to_pop=False, random_state=rng
        )
        return chosen

    def forget(self) -> None:
        """Begin the ideal and extreme points anew, with the next survival's: what set them may have been a mistake."""
        from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival

        self._survival = ReferenceDirectionSurvival(self._directions)


def directions(objectives: int, most: int) -> NDArray[np.float64]:
    """Return evenly spread directions of two objectives or more, at most so many where that is possible.

    They are the points of the unit simplex with coordinates in steps of 1/p (Das, Dennis 1998, "Normal-boundary
    intersection"), C(objectives + p - 1, p) of them for the greatest p that fits, and never less than one per
    objective. Where none lies inside the simplex (p < objectives), a second layer half as wide is put inside, if it
    fits (Deb, Jain 2014, section V).

    Returns:
        Coordinates from 0 up that add up to 1, of shape (directions, objectives).
    """
    from pymoo.util.ref_dirs import get_reference_directions

    outer = _steps(objectives, most)
    found: NDArray[np.float64] = get_reference_directions("das-dennis", objectives, n_partitions=max(outer, 1))
    inner = _steps(objectives, most - len(found)) if outer < objectives else 0
    if inner == 0:
        return found
    layer = get_reference_directions("das-dennis", objectives, n_partitions=inner, scaling=0.5)
    return np.concatenate([found, layer])


def _steps(objectives: int, most: int) -> int:
    """Return the greatest p for which there are at most so many directions; 0: none."""
    steps = 0
    while comb(objectives + steps, steps + 1) <= most:
        steps += 1
    return steps

"""CMA-ES on the weighted sum of losses: pycma with private randomness, on an unbounded copy of the unit cube."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.generational import Generational, generator
from evomerge.genome import Choice, Genome, Real, from_unit, to_unit
from evomerge.objective import Losses
from evomerge.value import value

Point = NDArray[np.float64]


@value
class Cma:
    """Settings of CMA-ES (Hansen 2016, "The CMA evolution strategy: a tutorial").

    `population` is 4 + floor(3 ln axes) if left out. `sigma` is the first standard deviation as a
    share of each axis. `diagonal` learns variances only; if left out, from 100 axes up.
    When the standard deviation of every real axis is below `restart_below` the search starts anew
    from a random point. Integers and options are cells of the unit interval, whose standard
    deviation never falls below a quarter cell; the order of options means nothing, so prefer
    another driver where options matter.
    """

    population: int | None = None
    sigma: float = 0.2
    diagonal: bool | None = None
    restart_below: float = 1e-4

    def __post_init__(self) -> None:
        check_at_least("population", self.generation(2), 4)
        check_at_least("sigma", self.sigma, 1e-6)
        check_at_least("restart_below", self.restart_below, 0)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time in a space of so many axes."""
        return 4 + int(3 * np.log(max(axes, 2))) if self.population is None else self.population

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver; its first mean is where the space begins, else the best known genome or the middle."""
        return Generational(_Adaptation(self, problem), problem)


class _Noise:
    """Standard normal numbers from a generator that is set before each step, in place of the global one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape)


class _Adaptation:
    """The distribution over unbounded points; a genome is the reflection of its point into the unit cube."""

    def __init__(self, settings: Cma, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._noise = _Noise(self._rng(0, "start"))
        self._points: list[Point] = []
        self._evolution = self._start(self._first_mean())

    def propose(self, generation: int) -> list[Genome]:
        """Return a sample of the distribution."""
        self._noise.rng = self._rng(generation, "ask")
        self._points = [np.array(point, dtype=np.float64) for point in self._evolution.ask()]
        return [self._genome(point) for point in self._points]

    def learn(self, generation: int, genomes: Sequence[Genome], losses: Sequence[Losses | None]) -> None:
        """Move the distribution; failures rank last, and a generation of failures moves nothing."""
        totals = [None if loss is None else self._problem.total(loss) for loss in losses]
        worst = max((total for total in totals if total is not None), default=None)
        if worst is None:
            return
        self._noise.rng = self._rng(generation, "tell")
        points = [self._point(point, genome) for point, genome in zip(self._points, genomes, strict=True)]
        # Only the order counts: any number above the worst makes a failure the last.
        self._evolution.tell(points, [worst + 1.0 + abs(worst) if total is None else total for total in totals])
        if self._collapsed():
            self._evolution = self._start(self._rng(generation, "restart").random(self._dimensions))

    def revise(self, index: int, losses: Losses | None) -> None:
        """Nothing: the distribution has moved on, and keeps no genomes."""

    @property
    def _dimensions(self) -> int:
        # pycma does not support one dimension; a second one that decodes to nothing costs little.
        return max(len(self._problem.axes), 2)

    def _rng(self, generation: int, step: str) -> np.random.Generator:
        return generator(self._problem.seed, "cma", generation, step)

    def _first_mean(self) -> Point:
        mean = np.full(self._dimensions, 0.5)
        if self._problem.start is not None:
            mean[: len(self._problem.start)] = to_unit(self._problem.axes, self._problem.start)
        elif self._problem.known:
            best, _ = min(self._problem.known, key=lambda pair: self._problem.total(pair[1]))
            mean[: len(best)] = to_unit(self._problem.axes, best)
        return mean

    def _start(self, mean: Point) -> Any:
        import cma

        axes, settings = self._problem.axes, self._settings
        options = {
            # pycma would draw from, and reseed, numpy's global generator.
            "randn": self._noise,
            "seed": np.nan,
            "popsize": settings.generation(len(axes)),
            "CMA_diagonal": len(axes) >= 100 if settings.diagonal is None else settings.diagonal,
            "minstd": self._least_deviations(),
            "verbose": -9,
        }
        # stop() is never asked: equal scores are common, the budget is the caller's, and it
        # would read options from a file of the working folder.
        return cma.CMAEvolutionStrategy(mean, settings.sigma, options)

    def _least_deviations(self) -> list[float]:
        least = [0.0] * self._dimensions
        for i, axis in enumerate(self._problem.axes):
            if not isinstance(axis, Real):
                cells = len(axis.options) if isinstance(axis, Choice) else axis.high - axis.low + 1
                least[i] = 0.25 / cells
        return least

    def _collapsed(self) -> bool:
        deviations = self._evolution.stds[: len(self._problem.axes)]
        real = [float(d) for d, axis in zip(deviations, self._problem.axes, strict=True) if isinstance(axis, Real)]
        return bool(real) and max(real) < self._settings.restart_below

    def _genome(self, point: Point) -> Genome:
        return from_unit(self._problem.axes, _reflect(point[: len(self._problem.axes)]))

    def _point(self, point: Point, genome: Genome) -> Point:
        """Return the sampled point, or the nearest one that decodes to a genome scored in its place."""
        if self._genome(point) == genome:
            return point
        found = point.copy()
        found[: len(genome)] = _unreflect(to_unit(self._problem.axes, genome), point[: len(genome)])
        return found


def _reflect(point: Point) -> Point:
    """Fold each coordinate into [0, 1] at the bounds, as a mirror does."""
    folded = np.mod(point, 2.0)
    return np.asarray(np.where(folded > 1.0, 2.0 - folded, folded), dtype=np.float64)


def _unreflect(unit: Point, near: Point) -> Point:
    """Return the preimages of `unit` under `_reflect` that lie nearest to `near`, coordinate by coordinate."""
    images = np.stack([sign * unit + 2.0 * np.round((near - sign * unit) / 2.0) for sign in (1.0, -1.0)])
    nearest = np.abs(images - near).argmin(axis=0)
    return np.asarray(np.where(nearest == 0, images[0], images[1]), dtype=np.float64)

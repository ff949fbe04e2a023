"""CMA-ES on a weighted sum of losses, or on what a genome adds to the front: pycma with private randomness."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.categories import Categories
from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known, serve
from evomerge.drivers.uncrowded import Archive, additions
from evomerge.errors import ExperimentError
from evomerge.genome import Axis, Choice, Genome, Real, from_unit, to_unit
from evomerge.value import value

Point = NDArray[np.float64]

#: How often the distribution is asked for a genome that is not met yet before a random one takes its place.
ATTEMPTS = 20

#: How wide, as a share of the first deviation, a search for a front begins anew on the front.
NARROW = 0.25

#: The greatest standard deviation: reflected into the unit interval, a wider one is hardly another distribution.
WIDEST = 0.5


@value
class Cma:
    """Settings of CMA-ES (Hansen 2016, "The CMA evolution strategy: a tutorial").

    `population` is 4 + floor(3 ln axes) if left out. `sigma` is the first standard deviation as a
    share of each axis. `damping` slows the changes of the step size: 1 is as published, less is quicker, which pays
    where the evaluations are few for the axes; left out, it is 1, and from 20 axes up a half. `diagonal` learns
    variances only; if left out, from 100 axes up.

    `scalarise` says what is minimised where there are several objectives. With "volume" genomes are ranked by what
    they add to the hypervolume of all that are met, so that one distribution climbs to the front and then goes along
    it. With "sum" they are ranked by their weighted sum, which leads to one point of the front.

    When the standard deviation of every real axis is below `restart_below` the search starts anew: from a random
    point, and with "volume" narrowly from one of the front. Left out, it is 1e-4, and with "volume" a tenth of `sigma`.

    Integers are cells of the unit interval, whose standard deviation never falls below a quarter cell (Marty et al.
    2024, "LB+IC-CMA-ES": a fifth). Options have probabilities of their own beside the normal distribution.

    With `steady` each genome is drawn when a worker is free, at most `population` are in flight, and the distribution
    moves whenever as many are scored.
    """

    libraries: ClassVar[tuple[str, ...]] = ("cma",)

    population: int | None = None
    sigma: float = 0.2
    damping: float | None = None
    diagonal: bool | None = None
    scalarise: str = "volume"
    restart_below: float | None = None
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("population", self.generation(2), 4)
        check_at_least("sigma", self.sigma, 1e-6)
        check_at_least("damping", 1.0 if self.damping is None else self.damping, 0.01)
        check_at_least("restart_below", self.restart_below or 0.0, 0)
        if self.scalarise not in ("volume", "sum"):
            raise ExperimentError(f"driver setting 'scalarise' must be volume or sum, got {self.scalarise!r}")

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time in a space of so many axes; in steady state, the limit."""
        return 4 + int(3 * np.log(max(axes, 2))) if self.population is None else self.population

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver; its first mean is where the space begins, else the best known genome or the middle."""
        return serve(_Adaptation(self, problem), problem, self.generation(len(problem.axes)) if self.steady else None)


class _Adaptation:
    """Moves a distribution by what comes of its genomes, and by what others found that is better than most of them."""

    def __init__(self, settings: Cma, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._population = settings.generation(len(problem.axes))
        self._several = settings.scalarise == "volume" and problem.objectives > 1
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._archive = Archive()  # of what was learned from
        self._own: list[Result] = []  # what will be at the next move
        self._others = list(known(problem))
        self._distribution: _Distribution | None = None
        self._points: dict[Genome, Point] = {}  # of the genomes in flight that the present distribution drew
        self._missed = 0  # for how many genomes the present distribution had nothing new

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return a sample of the distribution; in steady state, one genome."""
        distribution = self._present()
        rng = self._rng(step, "ask")
        fresh: list[Genome] = []
        for _ in range(factor * (1 if self._settings.steady else self._population)):
            genome = self._draw(distribution, rng)
            if genome is None:
                break
            fresh.append(genome)
        return fresh

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget genomes that are not asked; they may be drawn again."""
        self._seen.drop(genomes)
        for genome in genomes:
            self._points.pop(genome, None)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Move the distribution once a population is scored; failures rank last, and if all fail nothing moves."""
        for result in results:
            self._seen.add(result.genome)
        self._own += results
        if self._settings.steady and len(self._own) < self._population:
            return
        own, self._own = self._own, []
        if any(result.losses is not None for result in own):
            others, self._others = self._others, []
            self._move(own, others, self._rng(step, "tell"))
            self._archive.add([*own, *others])
        if self._collapsed():
            self._restart(self._rng(step, "restart"))

    def revise(self, result: Result) -> None:
        """Change what a genome adds to the front; where the distribution has moved by it already, that stays."""
        self._archive.revise(result.index, result.losses)
        for waiting in (self._own, self._others):
            waiting[:] = [replace(one, losses=result.losses) if one.index == result.index else one for one in waiting]

    def inject(self, result: Result) -> None:
        """Keep a foreign genome for the next move."""
        self._seen.add(result.genome)
        self._others.append(result)

    def _rng(self, step: int, name: str) -> np.random.Generator:
        return generator(self._problem.seed, "cma", step, name)

    def _present(self) -> "_Distribution":
        """Return the distribution; the first begins where the space does, else at the best genome that is known."""
        if self._distribution is None:
            start = self._problem.start
            met = Archive()
            met.add(self._others)
            genomes, losses = met.front()
            if start is None and genomes:
                start = genomes[int(self._sums(losses).argmin())]
            rng = self._rng(0, "start")
            self._distribution = _Distribution(self._problem.axes, self._settings, rng, start, self._settings.sigma)
        return self._distribution

    def _sums(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weighted sum of each row of losses; for a front, in units of its width."""
        if self._several:
            losses = losses / np.maximum(np.ptp(losses, axis=0), 1e-12)
        return np.array([self._problem.total(tuple(row)) for row in losses.tolist()])

    def _draw(self, distribution: "_Distribution", rng: np.random.Generator) -> Genome | None:
        """Return a genome that is not met yet; None if there is none."""
        for _ in range(ATTEMPTS):
            point, genome = distribution.sample(rng)
            if self._seen.add(genome):
                self._points[genome] = point
                return genome
        self._missed += 1
        found = self._seen.draw(rng, 1)
        return found[0] if found else None

    def _move(self, own: Sequence[Result], others: Sequence[Result], rng: np.random.Generator) -> None:
        """Tell the distribution its own genomes, and those of others that are better than half of them."""
        distribution = self._present()
        results = [*own, *others]
        scores = self._scores(results)
        middle = np.median(scores[: len(own)])
        better = [i for i in np.argsort(scores, kind="stable") if i >= len(own) and scores[i] < middle]
        chosen = [*range(len(own)), *better[: self._population // 2]]
        genomes = [results[i].genome for i in chosen]
        points = [distribution.point(results[i].genome, self._points.pop(results[i].proposed, None)) for i in chosen]
        distribution.move(points, genomes, scores[chosen], rng)

    def _scores(self, results: Sequence[Result]) -> NDArray[np.float64]:
        """Return numbers to minimise; only their order counts, and failures come last."""
        scored = [i for i, result in enumerate(results) if result.losses is not None]
        losses = np.array([results[i].losses for i in scored], dtype=np.float64)
        values = -additions(self._archive.front()[1], losses) if self._several else self._sums(losses)
        scores = np.full(len(results), values.max() + 1.0 + abs(values.max()))
        scores[scored] = values
        return scores

    def _collapsed(self) -> bool:
        """Tell whether the distribution has hardly anything new left to give."""
        below = self._settings.restart_below
        if below is None:
            below = self._settings.sigma / 10 if self._several else 1e-4
        return self._missed > self._population / 2 or self._present().widest() < below

    def _restart(self, rng: np.random.Generator) -> None:
        """Begin anew at a random point, or with several objectives narrowly around one of the front."""
        genomes, _ = self._archive.front()
        sigma = self._settings.sigma
        if self._several and genomes:
            start, sigma = genomes[int(rng.integers(len(genomes)))], NARROW * sigma
        else:
            start = from_unit(self._problem.axes, rng.random(len(self._problem.axes)))
        self._points, self._missed = {}, 0
        self._distribution = _Distribution(self._problem.axes, self._settings, rng, start, sigma)


class _Noise:
    """Standard normal numbers from a generator that is set before each step, in place of the global one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape)


class _Distribution:
    """A normal distribution of a genome's numbers, and one of its options.

    The numbers are unbounded; a genome is their reflection into the unit cube.

    Args:
        axes: of the genomes.
        settings: of the driver.
        rng: for what is random from the start.
        start: around which genome it begins; None: in the middle, with all options alike.
        sigma: how wide it begins.
    """

    def __init__(
        self, axes: tuple[Axis, ...], settings: Cma, rng: np.random.Generator, start: Genome | None, sigma: float
    ) -> None:
        import cma

        self._axes = axes
        self._numbers = [i for i, axis in enumerate(axes) if not isinstance(axis, Choice)]
        self._choices = [i for i, axis in enumerate(axes) if isinstance(axis, Choice)]
        self._noise = _Noise(rng)
        # pycma does not support one dimension; more that decode to nothing cost little.
        width = max(len(self._numbers), 2)
        mean, least = np.full(width, 0.5), np.zeros(width)
        for k, i in enumerate(self._numbers):
            axis = axes[i]
            if not isinstance(axis, Real | Choice):
                least[k] = 0.25 / (axis.high - axis.low + 1)
        if start is not None:
            mean[: len(self._numbers)] = to_unit(axes, start)[self._numbers]
        options = None if start is None else [str(start[i]) for i in self._choices]
        choices = [axis for axis in axes if isinstance(axis, Choice)]
        self._categories = Categories(choices, options, settings.sigma)
        damping = (1.0 if width < 20 else 0.5) if settings.damping is None else settings.damping
        # stop() is never asked: equal scores are common, the budget is the caller's, and it
        # would read options from a file of the working folder.
        self._evolution: Any = cma.CMAEvolutionStrategy(
            mean,
            sigma,
            {
                # pycma would draw from, and reseed, numpy's global generator.
                "randn": self._noise,
                "seed": np.nan,
                "popsize": settings.generation(len(axes)),
                "CMA_diagonal": width >= 100 if settings.diagonal is None else settings.diagonal,
                "CSA_dampfac": damping,
                "minstd": least.tolist(),
                "maxstd": WIDEST,
                "verbose": -9,
            },
        )

    def sample(self, rng: np.random.Generator) -> tuple[Point, Genome]:
        """Return the numbers of a genome, and the genome."""
        self._noise.rng = rng
        (drawn,) = self._evolution.ask(1)
        point = np.array(drawn, dtype=np.float64)
        return point, self._genome(point, self._categories.sample(rng))

    def point(self, genome: Genome, drawn: Point | None) -> Point:
        """Return the numbers that were drawn, or the nearest ones that decode to a genome scored in their place."""
        if drawn is not None and self._genome(drawn, [str(genome[i]) for i in self._choices]) == genome:
            return drawn
        found = np.array(self._evolution.mean if drawn is None else drawn, dtype=np.float64)
        unit = to_unit(self._axes, genome)[self._numbers]
        found[: len(unit)] = _unreflect(unit, found[: len(unit)])
        return found

    def move(
        self, points: Sequence[Point], genomes: Sequence[Genome], scores: NDArray[np.float64], rng: np.random.Generator
    ) -> None:
        """Move towards the genomes of the least scores."""
        parents = self._evolution.sp.weights.mu
        if len(points) < parents:
            return
        self._noise.rng = rng
        self._evolution.ask(1)  # pycma wants one before each tell
        self._evolution.tell(list(points), scores.tolist())
        weights = np.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
        best = [genomes[i] for i in np.argsort(scores, kind="stable")[:parents]]
        self._categories.learn([[str(genome[i]) for i in self._choices] for genome in best], weights / weights.sum())

    def widest(self) -> float:
        """Return the greatest standard deviation of a real axis; infinite if there is none."""
        deviations = self._evolution.stds
        reals = [deviations[k] for k, i in enumerate(self._numbers) if isinstance(self._axes[i], Real)]
        return float(max(reals, default=np.inf))

    def _genome(self, point: Point, options: Sequence[str]) -> Genome:
        given = iter(options)
        unit = dict(zip(self._numbers, _reflect(point[: len(self._numbers)]).tolist(), strict=True))
        return tuple(
            next(given) if isinstance(axis, Choice) else axis.from_unit(unit[i]) for i, axis in enumerate(self._axes)
        )


def _reflect(point: Point) -> Point:
    """Fold each coordinate into [0, 1] at the bounds, as a mirror does."""
    folded = np.mod(point, 2.0)
    return np.asarray(np.where(folded > 1.0, 2.0 - folded, folded), dtype=np.float64)


def _unreflect(unit: Point, near: Point) -> Point:
    """Return the preimages of `unit` under `_reflect` that lie nearest to `near`, coordinate by coordinate."""
    images = np.stack([sign * unit + 2.0 * np.round((near - sign * unit) / 2.0) for sign in (1.0, -1.0)])
    nearest = np.abs(images - near).argmin(axis=0)
    return np.asarray(np.where(nearest == 0, images[0], images[1]), dtype=np.float64)

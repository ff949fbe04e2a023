"""Surrogate screening: a driver proposes more than is needed, and what a model expects most of is asked."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge import pareto
from evomerge.drivers.contract import Driver, Problem, Settings, check_at_least
from evomerge.drivers.forecast import Forecast
from evomerge.drivers.nsga2 import Nsga2
from evomerge.drivers.serving import Result, Strategy, known, serve, strategy_of
from evomerge.errors import ExperimentError
from evomerge.genome import Genome
from evomerge.objective import Losses
from evomerge.value import value

#: In steady state the model is fitted anew after so many more results; in batches, for each generation.
EVERY = 8


@value
class Screened:
    """Settings of a driver whose proposals are screened.

    `driver` proposes `factor` times as many genomes as are asked, in the manner that `steady` says, whatever it says
    itself. A model (`forecast.Forecast`) of all that was scored, the latest and the front if these are more than
    `most`, foretells their losses. Those are asked that would add the greatest hypervolume to the front, one after the
    other; with one objective, those of the least loss. A share `open` is asked as it comes, so that the model is told
    also of what it expects nothing of. Nothing is screened until `startup` candidates are scored (20, or twice the
    axes if that is more, if left out).
    """

    driver: Settings = dataclasses.field(default_factory=Nsga2)
    factor: int = 16
    open: float = 0.25
    startup: int | None = None
    most: int = 400
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("factor", self.factor, 1)
        check_at_least("open", self.open, 0)
        check_at_least("startup", 2 if self.startup is None else self.startup, 2)
        check_at_least("most", self.most, 2)
        if self.open > 1:
            raise ExperimentError(f"driver setting 'open' must be at most 1, got {self.open}")

    @property
    def libraries(self) -> tuple[str, ...]:
        """The distributions whose version decides what the driver proposes."""
        return self.driver.libraries

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time; in steady state, the limit."""
        return self._inner.generation(axes)

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        strategy = _Screen(self, strategy_of(self._inner.start(problem)), problem)
        return serve(strategy, problem, self.generation(len(problem.axes)) if self.steady else None)

    @property
    def _inner(self) -> Settings:
        """The driver that proposes, in the manner of this one."""
        own: Any = self.driver
        inner: Settings = dataclasses.replace(own, steady=self.steady)
        return inner


class _Screen:
    """Stands before a strategy, and keeps what was scored."""

    def __init__(self, settings: Screened, strategy: Strategy, problem: Problem) -> None:
        self._settings = settings
        self._strategy = strategy
        self._problem = problem
        self._scored: dict[tuple[str, int], tuple[Genome, Losses | None]] = {}
        self._injected = 0
        self._fitted: tuple[int, Forecast] | None = None  # to how many results
        for result in known(problem):
            self._keep(result)

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return what the model expects most of, and some as they come."""
        settings, often = self._settings, factor * self._settings.factor
        losses = [own for _, own in self._scored.values() if own is not None]
        startup = max(20, 2 * len(self._problem.axes)) if settings.startup is None else settings.startup
        # In steady state genomes come one by one: every few of them as it comes.
        as_it_comes = settings.steady and int((step + 1) * settings.open) > int(step * settings.open)
        if settings.factor == 1 or len(losses) < startup or as_it_comes:
            return self._strategy.propose(step, factor)
        genomes = self._strategy.propose(step, often)
        size = 1 if settings.steady else settings.generation(len(self._problem.axes))
        wanted = max(min(factor * size, len(genomes)), -(-len(genomes) // settings.factor))
        free = 0 if settings.steady else int(wanted * settings.open)
        rest = genomes[free:]
        if wanted == len(genomes):
            return genomes
        foretold_GK = self._forecast().losses(rest)
        chosen = promising(foretold_GK, np.array(losses, dtype=np.float64), self._problem.reference, wanted - free)
        asked = {free + i for i in chosen} | set(range(free))
        self._strategy.drop([genome for i, genome in enumerate(genomes) if i not in asked])
        return [genome for i, genome in enumerate(genomes) if i in asked]

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Give genomes back."""
        self._strategy.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Keep what was scored, and hand it on."""
        for result in results:
            self._keep(result)
        self._strategy.learn(step, results)

    def revise(self, result: Result) -> None:
        """Keep what is better known, and hand it on."""
        if (kept := self._scored.get(("told", result.index))) is not None:
            self._scored["told", result.index] = kept[0], result.losses
        self._strategy.revise(result)

    def inject(self, result: Result) -> None:
        """Keep what a foreign genome scored, and hand it on."""
        self._keep(result)
        self._strategy.inject(result)

    def _keep(self, result: Result) -> None:
        if result.index == -1:
            self._injected += 1
        name = ("injected", self._injected) if result.index == -1 else ("told", result.index)
        self._scored[name] = result.genome, result.losses

    def _forecast(self) -> Forecast:
        """Return a model of what was scored so far; in steady state, of what had been some results ago."""
        count = len(self._scored)
        if self._fitted is None or not self._settings.steady or count >= self._fitted[0] + EVERY:
            rows = [(genome, own) for genome, own in self._scored.values() if own is not None]
            genomes, losses_NK = [genome for genome, _ in rows], np.array([own for _, own in rows], dtype=np.float64)
            kept = _recent(losses_NK, self._settings.most)
            self._fitted = count, Forecast(self._problem.axes, [genomes[i] for i in kept], losses_NK[kept])
        return self._fitted[1]


def promising(
    foretold_GK: NDArray[np.float64], losses_NK: NDArray[np.float64], reference: Losses | None, count: int
) -> list[int]:
    """Return the genomes of which most is expected, at most so many, the best first.

    With several objectives each next one adds the greatest hypervolume to the front and to those chosen before it. Of
    those that add none the nearest to the front come first: by how much would the worst have to be better in all
    objectives, each counted in widths of what is known, for no known candidate to dominate it.

    Args:
        foretold_GK: the losses that are expected of each genome.
        losses_NK: those of what was scored.
        reference: where hypervolume is measured from; None: the worst of each loss that was scored.
        count: how many are wanted.
    """
    if foretold_GK.shape[1] == 1:
        return [int(i) for i in np.argsort(foretold_GK[:, 0], kind="stable")[:count]]
    corner = losses_NK.max(axis=0) if reference is None else np.array(reference, dtype=np.float64)
    front = np.unique(losses_NK[pareto.front(losses_NK)], axis=0)
    width = np.ptp(losses_NK, axis=0)
    # How far each lies behind the known front; below 0: before it.
    behind = ((foretold_GK[:, None] - front) / np.where(width > 0, width, 1.0)).min(axis=2).max(axis=1)
    gains = {i: _gain(front, foretold_GK[i], corner) for i in range(len(foretold_GK))}
    chosen: list[int] = []
    while gains and len(chosen) < count:
        best = min(gains, key=lambda i: (-gains[i], behind[i], i))
        # A gain only shrinks as others are chosen, so old ones are upper bounds (Minoux 1978).
        now = _gain(front, foretold_GK[best], corner) if chosen and gains[best] > 0 else gains[best]
        if now < gains[best]:
            gains[best] = now
            continue
        chosen.append(best)
        del gains[best]
        if now > 0:
            front = np.concatenate([front, foretold_GK[best][None]])
    return chosen


def _gain(front: NDArray[np.float64], point: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Return the hypervolume that a point adds to a front."""
    if (point >= corner).any() or (front <= point).all(axis=1).any():
        return 0.0
    covered = pareto.hypervolume(np.maximum(front, point), corner.tolist()) if len(front) else 0.0
    return max(0.0, float(np.prod(corner - point)) - covered)


def _recent(losses_NK: NDArray[np.float64], most: int) -> list[int]:
    """Return which results the model is fitted to: the latest, a half of them at most the front's."""
    if len(losses_NK) <= most:
        return list(range(len(losses_NK)))
    best = np.flatnonzero(pareto.front(losses_NK))[-(most // 2) :]
    others = np.setdiff1d(np.arange(len(losses_NK)), best)
    return sorted([*best.tolist(), *others[-(most - len(best)) :].tolist()])

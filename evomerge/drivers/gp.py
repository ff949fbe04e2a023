"""Bayesian optimisation: proposes where a Gaussian process on each loss expects the greatest improvement."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.process import Features, Process
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known, serve
from evomerge.drivers.uncrowded import minima
from evomerge.genome import Choice, Genome, from_unit, to_unit
from evomerge.value import value

Matrix = NDArray[np.float64]

#: How many genomes are looked at for each that is proposed: at first, then around the best in so many rounds.
POOL, ROUNDS, BEST, AROUND = 400, 3, 8, 96

#: Powers of ten of the least and the greatest step from a known genome, and around the best that are looked at.
FAR, NEAR = (-2.0, -0.3), (-3.0, -1.0)

#: Of how many of the front improvements are measured at most.
FRONT = 100

#: The power of two of how many losses of a genome are drawn to see what improvement is to be expected.
DRAWS = 5


@value
class Gp:
    """Settings of the search with Gaussian processes, for small budgets.

    Genomes are random until `startup` candidates are scored, known ones included. Then each is where the expected
    maximin improvement of the front is greatest (Svenson, Santner 2016, "Multiobjective optimization of
    expensive-to-evaluate deterministic computer simulator models"); with one objective, the expected improvement. The
    front is that of what the processes make of the scored genomes, so that luck counts little; standard errors of
    losses count where an estimator gives them. A genome in flight counts as scored with what is expected of it.

    The time for a genome grows with the cube of the number of candidates, of which only the last `most` and the front
    are looked at. With `steady` each genome is drawn when a worker is free, and at most `batch` are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ()

    batch: int = 4
    startup: int = 12
    most: int = 300
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("startup", self.startup, 2)
        check_at_least("most", self.most, 10)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time; in steady state, the limit."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver that has learned from the known genomes."""
        return serve(_Improvement(self, problem), problem, self.batch if self.steady else None)


@value
class _Known:
    """Scored genomes as the processes see them.

    Attributes:
        genomes: one for each row.
        points: their features, shape (rows, columns).
        losses: shape (rows, objectives).
        errors: the standard errors of the losses, 0 where they are not known; shape as losses.
    """

    genomes: tuple[Genome, ...]
    points: Matrix
    losses: Matrix
    errors: Matrix


class _Improvement:
    """What was scored, and a process for each objective."""

    def __init__(self, settings: Gp, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._results = list(known(problem))
        self._flying: list[Genome] = []
        self._features = Features(problem.axes)
        self._processes = [Process(self._features.owner) for _ in range(problem.objectives)]
        self._fitted = 0  # how many results there were at the last fit

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return new genomes, each as if those before it were scored with what is expected of them."""
        rng = generator(self._problem.seed, "gp", step, "ask")
        wanted = factor * (1 if self._settings.steady else self._settings.batch)
        if sum(result.losses is not None for result in self._results) < self._settings.startup:
            return self._remembered(self._seen.draw(rng, wanted))
        scored = self._scored()
        self._fit(scored)
        for genome in self._flying:
            scored = self._believed(scored, genome)
        fresh: list[Genome] = []
        while len(fresh) < wanted:
            genomes = self._ranked(scored, rng)
            new = next((genome for genome in genomes if self._seen.add(genome)), None)
            drawn = self._seen.draw(rng, 1) if new is None else [new]
            if not drawn:
                break
            fresh += drawn
            scored = self._believed(scored, drawn[0])
        return self._remembered(fresh)

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget genomes that are not asked; they may be proposed again."""
        self._seen.drop(genomes)
        self._flying = [genome for genome in self._flying if genome not in genomes]

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Keep the results; a failure counts as bad as the worst in every objective."""
        for result in results:
            self._seen.add(result.genome)
            if result.proposed in self._flying:
                self._flying.remove(result.proposed)
        self._results += results

    def revise(self, result: Result) -> None:
        """Change what a genome loses, and how surely."""
        self._results = [
            replace(one, losses=result.losses, detail=result.detail) if one.index == result.index else one
            for one in self._results
        ]

    def inject(self, result: Result) -> None:
        """Keep a foreign result."""
        self._seen.add(result.genome)
        self._results.append(result)

    def _remembered(self, genomes: list[Genome]) -> list[Genome]:
        self._flying += genomes
        return genomes

    def _scored(self) -> _Known:
        """Return what the processes are to know: the last results, and the front."""
        losses = np.array([result.losses for result in self._results if result.losses is not None], dtype=np.float64)
        worst = losses.max(axis=0).tolist()
        rows = np.array([result.losses or worst for result in self._results], dtype=np.float64)
        last = range(max(0, len(rows) - self._settings.most), len(rows))
        places = sorted({*last, *minima(rows).tolist()})
        chosen = [self._results[place] for place in places]
        width = rows.shape[1]
        return _Known(
            genomes=tuple(result.genome for result in chosen),
            points=self._features([result.genome for result in chosen]),
            losses=rows[places],
            errors=np.array([result.detail.errors or (0.0,) * width for result in chosen], dtype=np.float64),
        )

    def _fit(self, scored: _Known) -> None:
        if self._fitted and len(self._results) < self._fitted + self._settings.batch:
            return
        self._fitted = len(self._results)
        for i, process in enumerate(self._processes):
            process.fit(scored.points, scored.losses[:, i], scored.errors[:, i])

    def _believed(self, scored: _Known, genome: Genome) -> _Known:
        """Return what is known if a genome is scored with what is expected of it."""
        self._condition(scored)
        point = self._features([genome])
        expected = np.array([[process.predict(point)[0][0] for process in self._processes]])
        return _Known(
            genomes=(*scored.genomes, genome),
            points=np.concatenate([scored.points, point]),
            losses=np.concatenate([scored.losses, expected]),
            errors=np.concatenate([scored.errors, np.zeros_like(expected)]),
        )

    def _condition(self, scored: _Known) -> None:
        for i, process in enumerate(self._processes):
            process.condition(scored.points, scored.losses[:, i], scored.errors[:, i])

    def _ranked(self, scored: _Known, rng: np.random.Generator) -> list[Genome]:
        """Return genomes, the most promising first."""
        self._condition(scored)
        believed, _ = self._predict(scored.points)
        places = minima(believed)
        front = believed[rng.permutation(places)[:FRONT]]
        draws = norm.ppf(qmc.Sobol(front.shape[1], rng=rng).random_base2(DRAWS))
        parents = np.array([to_unit(self._problem.axes, scored.genomes[place]) for place in places])
        genomes = self._anywhere(rng, POOL // 4) + self._near(rng, parents, POOL - POOL // 4, FAR)
        values = self._improvements(genomes, front, draws)
        for _ in range(ROUNDS):
            best = np.argsort(-values, kind="stable")[:BEST]
            parents = np.array([to_unit(self._problem.axes, genomes[place]) for place in best])
            nearer = self._near(rng, parents, AROUND, NEAR)
            genomes += nearer
            values = np.concatenate([values, self._improvements(nearer, front, draws)])
        return [genomes[place] for place in np.argsort(-values, kind="stable")]

    def _predict(self, points: Matrix) -> tuple[Matrix, Matrix]:
        """Return the expected losses of points, and their standard deviations. Shapes (points, objectives)."""
        found = [process.predict(points) for process in self._processes]
        return np.stack([mean for mean, _ in found], axis=1), np.stack([spread for _, spread in found], axis=1)

    def _improvements(self, genomes: Sequence[Genome], front: Matrix, draws: Matrix) -> NDArray[np.float64]:
        """Return by how much each genome is expected to get ahead of the front.

        A draw is ahead by the greatest x so that the front with x added to all its losses still does not dominate it.
        """
        mean, spread = self._predict(self._features(genomes))
        width = np.ptp(front, axis=0)
        width = np.where(width > 0, width, 1.0)
        ahead = np.full((len(genomes), len(draws), len(front)), -np.inf)
        for i, column in enumerate((front / width).T):
            drawn = (mean[:, i, None] + spread[:, i, None] * draws[:, i]) / width[i]
            np.maximum(ahead, column - drawn[:, :, None], out=ahead)
        least = ahead.min(axis=2)
        # Where nothing is ahead in any draw, the least far behind.
        return np.asarray(np.maximum(least, 0.0).mean(axis=1) + 1e-6 * least.mean(axis=1))

    def _anywhere(self, rng: np.random.Generator, count: int) -> list[Genome]:
        if self._problem.draw is not None:
            return [self._problem.draw(rng) for _ in range(count)]
        return [from_unit(self._problem.axes, point) for point in rng.random((count, len(self._problem.axes)))]

    def _near(
        self, rng: np.random.Generator, parents: Matrix, count: int, steps: tuple[float, float]
    ) -> list[Genome]:
        """Return children: two parents crossed, then some numbers moved and some options drawn anew.

        Args:
            rng: what chance there is.
            parents: points of the unit cube, one a row.
            count: of the children.
            steps: powers of ten of the least and the greatest step of a number.
        """
        width = parents.shape[1]
        first, second = (parents[rng.integers(len(parents), size=count)] for _ in range(2))
        crossed = np.where((rng.random((count, width)) < 0.5) & (rng.random((count, 1)) < 0.5), second, first)
        moved = rng.random((count, width)) < np.maximum(rng.random((count, 1)), 1.0 / width)
        step = 10.0 ** rng.uniform(*steps, size=(count, 1)) * rng.standard_normal((count, width))
        numbers = np.abs(np.mod(crossed + np.where(moved, step, 0.0) + 1.0, 2.0) - 1.0)  # reflected into the unit cube
        redrawn = np.where(rng.random((count, width)) < 1.0 / width, rng.random((count, width)), crossed)
        options = np.array([isinstance(axis, Choice) for axis in self._problem.axes])
        return [from_unit(self._problem.axes, point) for point in np.where(options, redrawn, numbers)]

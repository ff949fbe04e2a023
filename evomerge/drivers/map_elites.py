"""MAP-Elites: the best genome of each kind, the kinds being what else a model can do; pyribs keeps the archive."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.mixing import fresh_ones, mixed, moved
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known, serve
from evomerge.errors import ExperimentError
from evomerge.genome import Genome, Real, to_unit
from evomerge.value import value

#: An archive has no more cells than this, for pyribs sets memory aside for all of them.
CELLS = 50_000


@value
class MapElites:
    """Settings of MAP-Elites (Mouret, Clune 2015) with the cyclic quality of CycleQD.

    Kuroki, Nakamura, Akiba, Tang 2025, "Agent Skill Acquisition for Large Language Models via CycleQD" (ICLR).

    Each objective has an archive in which it is the quality and the other objectives are the axes of behaviour: of all
    candidates that are alike in these, up to a bin, the archive holds the best in that one. Each generation (in steady
    state, each genome) breeds from another objective's archive, in turn. With one objective the behaviour are the first
    two genes.

    `bins` cut each axis of behaviour; with so many objectives that there would be more than 50,000 cells, fewer do.
    `ranges` say from where to where, a pair per objective, as losses (minus the score where more is better); if left
    out, from the reference point of the hypervolume, or the worst seen, to the best seen. What lies outside is in the
    bin at the end. With `sampling` "elite" a parent's chance is the product over all objectives of a number between
    `least` and `most`, by where the elite lies between the archive's worst and best; with "random" all are alike.

    A child lies on the line through two parents' numbers on the unit cube, and has each option of either. With
    `crossover` "mixture" it is sum(w_i x_i) / sum(w_i), with "line" x_2 + w_1 (x_1 - x_2), w_i ~ N(1,
    `crossover_sigma`) drawn once per parent. Then each number is multiplied by 1 + u, u ~ U(0, `growth`): for axes that
    are weights of models the counterpart of CycleQD's mutation, which lets the singular components of a task vector
    grow by as much. Last, each gene moves with the chance `mutation_rate` (1 / axes, if left out) by a normal step of
    `mutation_sigma` of its axis.

    Published are 15 bins, elite sampling from 0.5 to 0.8, mixtures with a sigma of 0.01, a growth of 0.1 and steady
    state, over 1,200 candidates. The line (Vassiliades, Mouret 2018, "Discovering the elite hypervolume by leveraging
    interspecies correlation", their second term), the normal steps and fewer bins are ours, and better on genomes of
    few genes and some hundreds of candidates: mixtures of points of a cube draw together in its middle.
    `startup` genomes are random, known ones included; `batch` are proposed at a time; with `steady` at most `batch`
    are in flight. A generation costs some milliseconds for thousands of results.
    """

    libraries: ClassVar[tuple[str, ...]] = ("ribs",)

    bins: int = 6
    ranges: tuple[tuple[float, ...], ...] | None = None
    sampling: str = "elite"
    least: float = 0.5
    most: float = 0.8
    crossover: str = "line"
    crossover_sigma: float = 0.5
    growth: float = 0.0
    mutation_rate: float | None = None
    mutation_sigma: float = 0.2
    startup: int = 20
    batch: int = 8
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("bins", self.bins, 1)
        check_at_least("least", self.least, 1e-6)
        check_at_least("most", self.most, self.least)
        check_at_least("crossover_sigma", self.crossover_sigma, 0)
        check_at_least("growth", self.growth, 0)
        check_at_least("mutation_rate", self.mutation_rate or 0.0, 0)
        check_at_least("mutation_sigma", self.mutation_sigma, 0)
        check_at_least("startup", self.startup, 1)
        check_at_least("batch", self.batch, 1)
        _check_one_of("sampling", self.sampling, ("elite", "random"))
        _check_one_of("crossover", self.crossover, ("line", "mixture"))
        for pair in self.ranges or ():
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ExperimentError(f"driver setting 'ranges': each needs two different losses, got {list(pair)}")

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver.

        Raises:
            ExperimentError: if there are ranges, but not one per objective.
        """
        if self.ranges is not None and len(self.ranges) != problem.objectives:
            raise ExperimentError(
                f"driver setting 'ranges' needs one per objective, {problem.objectives} of them, got {len(self.ranges)}"
            )
        return serve(_Elites(self, problem), problem, self.batch if self.steady else None)


class _Elites:
    """All results; who is the elite of an archive follows from them."""

    def __init__(self, settings: MapElites, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._results: list[Result] = []
        self._places: dict[int, int] = {}  # in the results, by index
        self._given = 0
        for result in known(problem):
            self._keep(result)
            self._given += 1

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return children of one objective's elites; random genomes until `startup` were proposed or given."""
        settings, rng = self._settings, generator(self._problem.seed, "map_elites", step, "ask")
        size = 1 if settings.steady else settings.batch
        missing = settings.startup - self._given - step * size
        if missing > 0 or not any(result.losses for result in self._results):
            wanted = max(missing, 1) if settings.steady else size
            return fresh_ones(self._problem, self._seen, None, factor * wanted, rng)
        elites, chances = self._elites(step % self._problem.objectives)
        return fresh_ones(self._problem, self._seen, lambda: self._child(elites, chances, rng), factor * size, rng)

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget children that are not asked; they may be bred again."""
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Keep what was scored; failures only count as met."""
        for result in results:
            self._keep(result)

    def revise(self, result: Result) -> None:
        """Change what a genome scored; one that was an elite may give its cell back to an earlier one."""
        place = self._places.get(result.index)
        if place is not None:
            genome = self._results[place].genome
            self._results[place] = Result(genome=genome, losses=result.losses, index=result.index)

    def inject(self, result: Result) -> None:
        """Keep what a foreign genome scored."""
        self._given += 1
        self._keep(result)

    def _keep(self, result: Result) -> None:
        self._seen.add(result.genome)
        if result.index != -1:
            self._places[result.index] = len(self._results)
        self._results.append(Result(genome=result.genome, losses=result.losses, index=result.index))

    def _elites(self, quality: int) -> tuple[list[Genome], NDArray[np.float64]]:
        """Return the elites of an objective's archive, and the chance of each to be a parent."""
        scored = [result for result in self._results if result.losses is not None]
        losses_NK = np.array([result.losses for result in scored], dtype=np.float64)
        if self._problem.objectives == 1:
            behaviour_NB = np.array([to_unit(self._problem.axes, result.genome)[:2] for result in scored])
            ranges = [(0.0, 1.0)] * behaviour_NB.shape[1]
        else:
            others = [k for k in range(self._problem.objectives) if k != quality]
            behaviour_NB = losses_NK[:, others]
            ranges = [self._range(k, losses_NK[:, k]) for k in others]
        places = elites(losses_NK[:, quality], behaviour_NB, ranges, self._settings.bins)
        chances = self._chances(losses_NK[places])
        return [scored[place].genome for place in places], chances

    def _range(self, objective: int, losses_N: NDArray[np.float64]) -> tuple[float, float]:
        """Return from where to where an axis of behaviour goes."""
        if self._settings.ranges is not None:
            one, two = self._settings.ranges[objective]
            return min(one, two), max(one, two)
        reference = self._problem.reference
        worst = float(losses_N.max()) if reference is None else reference[objective]
        best = float(losses_N.min())
        return (best, worst) if best < worst else (worst - 1.0, worst)

    def _chances(self, losses_NK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each elite's chance: gamma_i = prod_k (least + (most - least) good_ik), over their sum."""
        settings = self._settings
        if settings.sampling == "random":
            return np.full(len(losses_NK), 1.0 / len(losses_NK))
        width = np.ptp(losses_NK, axis=0)
        good_NK = (losses_NK.max(axis=0) - losses_NK) / np.where(width > 0, width, 1.0)
        gamma_N = (settings.least + (settings.most - settings.least) * good_NK).prod(axis=1)
        return np.asarray(gamma_N / gamma_N.sum())

    def _child(self, genomes: Sequence[Genome], chances: NDArray[np.float64], rng: np.random.Generator) -> Genome:
        """Return a mixture of two elites, grown and moved."""
        axes, settings = self._problem.axes, self._settings
        pair = rng.choice(len(genomes), 2, replace=len(genomes) < 2, p=chances)
        one, two = (genomes[i] for i in pair)
        w = 1.0 + settings.crossover_sigma * rng.standard_normal(2)
        total = 1.0 if settings.crossover == "line" else float(w.sum())
        share = float(w[0]) / total if abs(total) > 1e-9 else 0.5
        child = mixed(axes, one, two, np.full(len(axes), share), rng.random(len(axes)) < 0.5)
        if settings.growth > 0:
            factors = 1.0 + settings.growth * rng.random(len(axes))
            child = tuple(
                min(max(float(gene) * factor, axis.low), axis.high) if isinstance(axis, Real) else gene
                for axis, gene, factor in zip(axes, child, factors.tolist(), strict=True)
            )
        return moved(axes, child, settings.mutation_rate, settings.mutation_sigma, rng)


def elites(
    losses_N: NDArray[np.float64],
    behaviour_NB: NDArray[np.float64],
    ranges: Sequence[tuple[float, float]],
    bins: int,
) -> list[int]:
    """Return who is the best of each cell, of equals the first; in the order of cells.

    Args:
        losses_N: the quality of each, to minimise.
        behaviour_NB: where each lies on each axis of behaviour.
        ranges: of each axis, from below to above; what lies outside is in the cell at the end.
        bins: how many cells an axis has, unless there would be more than `CELLS` in all.
    """
    from ribs.archives import GridArchive

    bins = min(bins, max(1, int(CELLS ** (1.0 / len(ranges)) + 1e-9)))
    archive = GridArchive(solution_dim=1, dims=[bins] * len(ranges), ranges=list(ranges))
    low, high = np.array(ranges).T
    places = np.arange(len(losses_N), dtype=np.float64)[:, None]
    archive.add(places, -losses_N, np.clip(behaviour_NB, low, high))
    found = archive.data(["index", "solution"], return_type="tuple")
    return [int(place) for place in found[1][np.argsort(found[0]), 0]]


def _check_one_of(name: str, given: str, words: tuple[str, str]) -> None:
    if given not in words:
        raise ExperimentError(f"driver setting {name!r} must be {' or '.join(words)}, got {given!r}")

"""Greedy merging of pairs, guided by kinship: the best with the best, and now and then with their least relative."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evomerge import pareto
from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known, serve
from evomerge.genome import Axis, Choice, Gene, Genome, active
from evomerge.objective import Losses
from evomerge.value import value

#: How many of the best are remembered; any two of them may be merged.
KEPT = 64

#: How many pairs may give no new genome before a random one is drawn.
ATTEMPTS = 30


@value
class Greedy:
    """Settings of top-k greedy merging with kinship.

    Hu et al. 2024, arXiv 2410.12613, "Exploring model kinship for merging large language models". The paper's: each
    generation merges every pair of the `top` best models that was not merged before, and the best model with the one
    least akin to it; kinship is the similarity of task vectors.

    Ours: it happens in the genome. The merge of two genomes that are no merges themselves lies in the middle between
    both (integers rounded, options of either). Where one is a merge, each axis has a share of its own, from -`reach` to
    1 + `reach`, since merges in the middle of merges in the middle soon are all the same. Kinship is the cosine of the
    genomes' differences from where the space begins, or from the middle of the unit cube. With several objectives the
    best are those of the first fronts, and of a front those with most room (`crowding`), as in NSGA-II; with one, those
    with the least loss. The first are the known genomes, filled up to `startup` with random ones. The paper stops when
    the best stay the best; here a generation is always full: where pairs are wanting, `top` grows by one and pairs are
    merged once more, by turns. With `steady` each merge is made when a worker is free, and at most a generation is in
    flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ()

    top: int = 8
    reach: float = 0.5
    startup: int = 16
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("top", self.top, 2)
        check_at_least("reach", self.reach, 0)
        check_at_least("startup", self.startup, 2)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time: the pairs of the best, and one to explore."""
        return math.comb(self.top, 2) + 1

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        return serve(_Family(self, problem), problem, self.generation(len(problem.axes)) if self.steady else None)


class _Member:
    """A scored genome of the family."""

    def __init__(self, number: int, result: Result, losses: Losses, traits: NDArray[np.float64]) -> None:
        self.number = number
        self.index = result.index
        self.proposed = result.proposed
        self.genome = result.genome
        self.losses = losses
        self.traits = traits


class _Family:
    """The best genomes, best first, and how often each two of them were merged."""

    def __init__(self, settings: Greedy, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._members: list[_Member] = []
        self._merged: Counter[frozenset[int]] = Counter()
        self._merges: set[Genome] = set()  # proposed as such
        self._scored = 0
        self._drawn = 0
        self._add(known(problem))

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return merges of the best; random genomes while too few are known, and where merges give nothing new."""
        rng = generator(self._problem.seed, "greedy", step, "ask")
        size = self._settings.generation(len(self._problem.axes))
        wanted = factor * (1 if self._settings.steady else size)
        missing = self._settings.startup - self._scored - self._drawn
        if len(self._members) < 2 or missing > 0:
            count = max(wanted, missing * factor) if self._settings.steady and step == 0 else wanted
            self._drawn += count
            return self._seen.draw(rng, count)
        fresh: list[Genome] = []
        attempts = 0
        while len(fresh) < wanted and attempts < ATTEMPTS:
            explores = (step * wanted + len(fresh)) % size == size - 1
            child = self._merge(*(self._strangers() if explores else self._pair(rng)), rng)
            attempts = 0 if self._seen.add(child) else attempts + 1
            if attempts == 0:
                fresh.append(child)
        return fresh + self._seen.draw(rng, wanted - len(fresh))

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget merges that are not asked; others of the same pairs may come."""
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Take the results into the family; failures only count as seen."""
        for result in results:
            self._seen.add(result.genome)
        self._add(results)

    def revise(self, result: Result) -> None:
        """Give a member its better known place; one that has failed since is none any more."""
        for member in [member for member in self._members if member.index == result.index]:
            if result.losses is None:
                self._members.remove(member)
            else:
                member.losses = result.losses
        self._sort()

    def inject(self, result: Result) -> None:
        """Take a foreign genome into the family."""
        self._seen.add(result.genome)
        self._add([result])

    def _add(self, results: Iterable[Result]) -> None:
        for result in results:
            if result.losses is not None:
                traits = _traits(self._problem, result.genome)
                self._members.append(_Member(self._scored, result, result.losses, traits))
                self._scored += 1
        self._sort()

    def _sort(self) -> None:
        """Put the best first, and part with all but `KEPT`."""
        losses = np.array([member.losses for member in self._members]).reshape(-1, self._problem.objectives)
        fronts, room = pareto.ranks(losses), np.zeros(len(losses))
        if self._problem.objectives > 1:
            for front in range(int(fronts.max(initial=-1)) + 1):
                room[fronts == front] = crowding(losses[fronts == front])
        totals = np.array([self._problem.total(member.losses) for member in self._members])
        order = np.lexsort((totals, -room, fronts))  # ties go to the elder
        self._members = [self._members[i] for i in order[:KEPT].tolist()]

    def _pair(self, rng: np.random.Generator) -> tuple[_Member, _Member]:
        """Return the two to merge next: any of those of least effort.

        To go beyond the `top` by one more is as much effort as to merge a pair once more.
        """
        members, top = self._members, self._settings.top
        found: list[tuple[_Member, _Member]] = []
        least = math.inf
        for j in range(1, len(members)):
            beyond = max(0, j - top + 1)
            if beyond > least:
                break
            for i in range(j):
                effort = self._times(members[i], members[j]) + beyond
                if effort < least:
                    found, least = [], effort
                if effort == least:
                    found.append((members[i], members[j]))
        return found[int(rng.integers(len(found)))]

    def _strangers(self) -> tuple[_Member, _Member]:
        """Return the best and, of those that it was merged with least, the one least akin to it."""
        best = self._members[0]
        rest = self._members[1:]
        return best, min(rest, key=lambda one: (self._times(best, one), kinship(best.traits, one.traits), one.number))

    def _times(self, one: _Member, two: _Member) -> int:
        return self._merged[frozenset((one.number, two.number))]

    def _merge(self, one: _Member, two: _Member, rng: np.random.Generator) -> Genome:
        """Return the middle of two founders, the first time; else a mixture in drawn shares."""
        pair = frozenset((one.number, two.number))
        low, high = -self._settings.reach, 1 + self._settings.reach
        shares = low + (high - low) * rng.random(len(self._problem.axes))
        if not self._merged[pair] and not {one.proposed, two.proposed} & self._merges:
            shares = np.full(len(self._problem.axes), 0.5)
        self._merged[pair] += 1
        child = mixture(self._problem.axes, one.genome, two.genome, shares, rng)
        self._merges.add(child)
        return child


def crowding(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much room each candidate of a front has: the sides of the box between its neighbours, added up.

    Deb et al. 2002, section III-B: in every loss the distance from the one before to the one after, as a part of the
    front's range; infinite for the first and last. Shape (candidates, objectives) to (candidates,).
    """
    room = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        steps = np.diff(column[order], prepend=-np.inf, append=np.inf)
        room[order] += (steps[1:] + steps[:-1]) / (np.ptp(column) or 1.0)
    return room


def kinship(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Return the cosine of two vectors, from -1 to 1; 0 if one of them is zero."""
    length = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / length if length > 0 else 0.0


def mixture(
    axes: Sequence[Axis], one: Genome, two: Genome, shares: NDArray[np.float64], rng: np.random.Generator
) -> Genome:
    """Return a mixture of two genomes; an axis that counts in one of them only has the gene of that one.

    Args:
        axes: of the space.
        one: a genome.
        two: another one.
        shares: of the second on each axis: its part of the way between numbers (below 0 and above 1 lies beyond both,
            up to the bounds), and the chance of its option. Shape (axes,).
        rng: draws the options.
    """
    chances = rng.random(len(axes)).tolist()
    pairs = zip(axes, one, two, active(axes, one), active(axes, two), shares.tolist(), chances, strict=True)
    found: list[Gene] = []
    for axis, first, second, in_one, in_two, share, chance in pairs:
        if in_one != in_two:
            found.append(first if in_one else second)
        elif isinstance(axis, Choice):
            found.append(second if chance < share else first)
        else:
            found.append(axis.from_unit((1 - share) * axis.to_unit(first) + share * axis.to_unit(second)))
    return tuple(found)


def _traits(problem: Problem, genome: Genome) -> NDArray[np.float64]:
    """Return how a genome differs from where the space begins, the counterpart of a task vector.

    A number differs by its part of the axis, an option by 1 from every other one; axes that do not count by nothing.
    Where the space does not say where it begins, it is the middle of every axis.
    """
    found: list[float] = []
    start = problem.start or (None,) * len(genome)
    for axis, gene, begin, on in zip(problem.axes, genome, start, active(problem.axes, genome), strict=True):
        if isinstance(axis, Choice):
            usual = [1 / len(axis.options) if begin is None else float(own == begin) for own in axis.options]
            own = [float(option == gene) for option in axis.options]
            found += [on * (a - b) / math.sqrt(2) for a, b in zip(own, usual, strict=True)]
        else:
            found.append(on * (axis.to_unit(gene) - (0.5 if begin is None else axis.to_unit(begin))))
    return np.array(found)

"""What the course of a search is worth: hypervolume as it grows, evaluations to a target, ranks."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: How often a run gained, and what it had from there on: pairs of evaluations and hypervolume, both rising.
Curve = Sequence[tuple[int, float]]


class Volume:
    """The hypervolume of three scores that are shares of so many items, as candidates come one by one.

    The unit cube is cut into items^3 cells, and each column of cells is filled to where some candidate reaches, so a
    candidate costs one look at a matrix, and the volume is exact.

    Args:
        items: of each task.
    """

    def __init__(self, items: int) -> None:
        self._items = items
        self._filled = np.zeros((items, items), dtype=np.int64)

    def add(self, losses: Sequence[float]) -> float:
        """Take the losses of a candidate, minus scores; return the hypervolume of all up to the reference point 0.

        Raises:
            ValueError: if a score is no share of the items.
        """
        exact = [-loss * self._items for loss in losses]
        a, b, c = (round(count) for count in exact)
        if max(abs(x - round(x)) for x in exact) > 1e-6 or not 0 <= min(a, b, c) <= max(a, b, c) <= self._items:
            raise ValueError(f"losses must be minus shares of {self._items} items, got {tuple(losses)}")
        np.maximum(self._filled[:a, :b], c, out=self._filled[:a, :b])
        return self.value

    @property
    def value(self) -> float:
        """The hypervolume, from 0 to 1."""
        return int(self._filled.sum()) / self._items**3


def to_target(curve: Curve, target: float) -> int | None:
    """Return after how many evaluations a run had reached a hypervolume, None if it never did."""
    return next((done for done, volume in curve if volume >= target), None)


def at(curve: Curve, evaluations: int) -> float:
    """Return the hypervolume of a run after so many evaluations, 0 before the first."""
    return max((volume for done, volume in curve if done <= evaluations), default=0.0)


def sampled(curve: Curve, grid: Sequence[int]) -> NDArray[np.float64]:
    """Return the hypervolume at each number of evaluations of a rising grid. Shape (len(grid),)."""
    done = np.array([each for each, _ in curve])
    volume = np.array([0.0, *(each for _, each in curve)])
    return volume[np.searchsorted(done, grid, side="right")]


def quartiles(counts: Sequence[int | None]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of numbers of evaluations; those never reached are infinite.

    A quartile is the smallest number that at least that share of the runs keep to, so that it is one that was measured.
    """
    found = sorted(math.inf if count is None else count for count in counts)
    low, middle, high = (found[math.ceil(share * len(found)) - 1] for share in (0.25, 0.5, 0.75))
    return low, middle, high


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean rank of each contender: 1 has the greatest value of a block; equal ones share theirs.

    Args:
        values: shape (blocks, contenders).
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(-values, axis=1).mean(axis=0))


def critical_difference(contenders: int, blocks: int, level: float = 0.05) -> float:
    """Return by how much mean ranks of two contenders must differ to be told apart (Nemenyi's test).

    Demsar 2006, "Statistical comparisons of classifiers over multiple data sets", section 3.2.2: q sqrt(k (k + 1) / 6N)
    with q the Studentized range statistic of k contenders and infinitely many degrees of freedom, over sqrt(2).
    """
    from scipy.stats import studentized_range

    q = studentized_range.ppf(1 - level, contenders, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(contenders * (contenders + 1) / (6 * blocks)))


def friedman(values: NDArray[np.float64]) -> float:
    """Return how likely ranks as different as these would be if no contender were better (Friedman's test).

    Args:
        values: shape (blocks, contenders).
    """
    from scipy.stats import friedmanchisquare

    return float(friedmanchisquare(*values.T).pvalue)


def cliques(means: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Return the longest groups of contenders that the critical difference does not tell apart.

    Args:
        means: mean ranks, rising.
        difference: the critical difference.

    Returns:
        First and last place of each group of at least two.
    """
    found: list[tuple[int, int]] = []
    for first, mean in enumerate(means):
        last = max(place for place, other in enumerate(means) if other <= mean + difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found

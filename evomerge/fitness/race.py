"""Racing: a candidate climbs prefixes of one order of the items until it is surely dominated, or has answered all."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from scipy.special import bdtr, stdtr

from evomerge.fitness.responses import Floats, Places
from evomerge.fitness.schedule import Given, Items, missing
from evomerge.value import value


@value
class Rival:
    """A member of the front: its responses to all items, by task, and what it loses by its properties."""

    responses: Mapping[str, tuple[float, ...]]
    properties: tuple[float, ...] = ()


@value
class Climb:
    """A race of one generation against the front known at its beginning.

    After each prefix but the last, a candidate is compared with every rival on the items of the prefix, which both have
    answered. It stops if, for one of the rivals, `doubt` is at most alpha / (comparisons) in all tasks and no property
    is better than the rival's. There are (prefixes - 1) x (rivals) comparisons (Bonferroni's way of spending alpha). A
    candidate that belongs to the front is in one objective at least as good as the rival, and to be stopped that one
    test has to err; so the chance that it is stopped is at most alpha.

    Attributes:
        order: all places of each task, such that every beginning is balanced, see `balanced`.
        prefixes: how many items of each task have been asked after each rung, rising to all of them.
        signs: for each task, 1 if its responses are losses, and -1 if they are gains.
        rivals: whom to compare with; if there are none, every candidate climbs to the end.
        alpha: the chance of error.
        properties: gives what a candidate loses by its properties, where these are objectives.
    """

    order: Items
    prefixes: tuple[Mapping[str, int], ...]
    signs: Mapping[str, float]
    rivals: tuple[Rival, ...]
    alpha: float
    properties: Callable[[int], tuple[float, ...]]

    def next(self, candidate: int, given: Given) -> Items | None:
        """Return the next rung; None at the top, or where the candidate stops."""
        for rung, prefix in enumerate(self.prefixes):
            wanted = {task: self.order[task][:count] for task, count in prefix.items()}
            left = missing(wanted, given)
            if left is not None:
                return None if rung and self._beaten(candidate, given, self.prefixes[rung - 1]) else left
        return None

    @cached_property
    def _level(self) -> float:
        return self.alpha / max(1, (len(self.prefixes) - 1) * len(self.rivals))

    def _beaten(self, candidate: int, given: Given, prefix: Mapping[str, int]) -> bool:
        own = self.properties(candidate)
        for rival in self.rivals:
            pairs = zip(own, rival.properties, strict=True)
            if all(mine >= theirs for mine, theirs in pairs) and self._worse(given, rival, prefix):
                return True
        return False

    def _worse(self, given: Given, rival: Rival, prefix: Mapping[str, int]) -> bool:
        """Tell whether a candidate is surely worse than a rival in every task."""
        for task, count in prefix.items():
            places = self.order[task][:count]
            mine = np.array([given[task][place] for place in places])
            theirs = np.array([rival.responses[task][place] for place in places])
            if doubt(self.signs[task] * (mine - theirs), len(self.order[task])) > self._level:
                return False
        return True


def doubt(excess_n: Floats, total: int) -> float:
    """Return the chance of an excess like this one, if the mean excess over all items were at most 0.

    Of differences -1, 0 and 1 this is the sign test on those that are not 0 (McNemar 1947, Psychometrika 12:153), exact
    and without assumptions; of others Student's t test, with half of the greatest difference added on either side, so
    that a few equal differences are not taken for certainty. Both take the items for a sample of endless many, which
    errs on the safe side. Where all items were asked, the answer is known: 0 or 1.

    Args:
        excess_n: by how much the candidate loses more than its rival, item by item.
        total: the number of all items.
    """
    count = len(excess_n)
    if count == total:
        return 0.0 if float(excess_n.mean()) >= 0.0 else 1.0
    better, worse = int((excess_n < 0.0).sum()), int((excess_n > 0.0).sum())
    if better + worse == 0:
        return 1.0
    if np.isin(excess_n, (-1.0, 0.0, 1.0)).all():
        return float(bdtr(better, better + worse, 0.5))
    half = 0.5 * float(np.abs(excess_n).max())
    padded = np.concatenate([excess_n, [half, -half]])
    deviation = float(padded.std(ddof=1))
    return float(stdtr(len(padded) - 1, -float(padded.mean()) * np.sqrt(len(padded)) / deviation))


def prefixes(sizes: Mapping[str, int], first: int, eta: float) -> tuple[Mapping[str, int], ...]:
    """Return how many items of each task have been asked after each rung: first, first eta, ... up to all.

    Args:
        sizes: the number of all items, by task.
        first: items of each task on the first rung.
        eta: by how much the number grows from rung to rung.
    """
    found: list[Mapping[str, int]] = []
    reach = float(first)
    while not found or dict(found[-1]) != dict(sizes):
        found.append({task: min(size, int(reach)) for task, size in sizes.items()})
        reach = max(reach * eta, reach + 1.0)
    return tuple(found)


def balanced(strata_N: Places | Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Return an order of all places such that every beginning has about its share of each stratum.

    The items of a stratum of size m, shuffled, stand at (i + u) / m for i = 0, 1, ... with one u in [0, 1) for each
    stratum: a systematic sample (Cochran 1977, "Sampling techniques", chapter 8) of the strata.
    """
    strata_N = np.asarray(strata_N, dtype=np.intp)
    position_N = np.empty(len(strata_N))
    for stratum in np.unique(strata_N):
        members = np.flatnonzero(strata_N == stratum)
        steps = (np.arange(len(members)) + rng.random()) / len(members)
        position_N[rng.permutation(members)] = steps
    return tuple(int(place) for place in np.argsort(position_N, kind="stable"))

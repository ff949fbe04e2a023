"""Estimators that only sample: a random subset and its mean, and a stratified subset and its weighted mean.

They need no model of the responses, so they are what there is before any row is known, and the reference for the rest.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evomerge.errors import ExperimentError
from evomerge.fitness.estimator import Choice, Estimate, Fit, checked, free, settled
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.value import value

#: Answers that are added, half right and half wrong, so that no candidate is certain (Agresti 1998).
_ADDED = 4.0
#: So many other rows than the sources tell more of an item's difficulty than which sources are right.
_ENOUGH_ROWS = 8


@value
class Mean:
    """The mean of the responses to one random subset that all candidates share.

    For a score whose items count alike, with the n responses y of mean p, m = (n p + 2) / (n + 4) and
    v = (sum (y - m)^2 + 2 m^2 + 2 (1 - m)^2) / (n + 4), which is m (1 - m) when all y are 0 or 1,

        value = p,    error^2 = (1 - n/N) v / n + (1 - n/N)^2 (p - m)^2:

    the sampling error of a part of a finite population, with two right and two wrong answers added (Agresti 1998, The
    American Statistician 52:119), so that neither 0 of n nor n of n has error 0. Responses without bounds have
    v = s^2, and nothing is added.
    """

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit, which takes from the responses only what the items' shares in the scores are."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, responses.values_MN.shape[1]]))
        share_N = responses.targets_KN.sum(axis=0)
        # drawing without replacement by share (Efraimidis 2006); a plain permutation where all shares are equal
        line_N = np.argsort(rng.exponential(size=len(share_N)) / np.maximum(share_N, 1e-300), kind="stable")
        return _Sample(responses, lambda count: line_N, share_N, seed, finest=False)


@value
class Stratified:
    """A random subset that every stratum and every difficulty has its share of, and its post-stratified mean.

    Items are put in a line: by difficulty (the mean of the known rows) in about sqrt(n) bands, in each by stratum, then
    by difficulty. The line is cut into as many pieces as there are items to ask, and one is drawn at random from each.
    While hardly any rows but the sources' are known (`patterns` makes the strata), there is one band, and items on
    which the sources are of one mind may be drawn less often. The estimate cuts the line into cells c of two or more
    answered items and takes

        value = sum_c T_c sum_{i in c} w_i y_i,    w_i ~ t_i / pi_i, adding up to 1 in each cell,
        error^2 = v sum_c T_c^2 sum_{i in c} w_i^2 (1 - pi_i) + (1 - n/N)^2 (p - m)^2

    with T_c the cell's share of the score, t_i the item's, pi_i the probability that the item is asked, p the value and
    m as for `Mean`; v is `Mean`'s with deviations from the cells' means (Cochran 1977, Sampling Techniques, 5A.9).

    Attributes:
        unanimous: how often an item is drawn that all sources answer alike, where others count 1. On merges of small
            models .35 had the same ranks as 1 and a quarter more error at 40 items of 2000.
    """

    unanimous: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.unanimous <= 1.0:
            raise ExperimentError(f"stratified: unanimous must be above 0 and at most 1, got {self.unanimous}")

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit; it works without any row."""
        total = responses.values_MN.shape[1]
        rng = np.random.default_rng(np.random.SeedSequence([seed, total]))
        # ranks, in which ties fall at random
        easy_N = np.argsort(np.lexsort(np.stack([rng.random(total), _easiness(responses)])))
        share_N = responses.targets_KN.sum(axis=0)
        known = list(responses.sources)
        few = len(responses.values_MN) - len(known) < _ENOUGH_ROWS
        if few and len(known) > 1:
            right_JN = responses.values_MN[known] > 0.5
            mixed_N = right_JN.any(axis=0) & ~right_JN.all(axis=0)
            share_N = np.where(mixed_N, 1.0, self.unanimous) * share_N

        def line(count: int) -> Places:
            bands = 1 if few else max(1, round(np.sqrt(count)))
            band_N = easy_N * bands // total
            turned_N = np.where(band_N % 2 == 0, responses.strata_N, -responses.strata_N)  # neighbours stay alike
            return np.lexsort((easy_N, turned_N, band_N))

        return _Sample(responses, line, share_N, seed, finest=True)


def patterns(source_rows_JN: Floats, task_N: Places) -> Places:
    """Return strata [N]: an item's task and which of the J sources answer it rightly (above .5).

    Numbered by task, then by how many sources are right, so that neighbours are alike.

    Args:
        source_rows_JN: the sources' responses; NaN counts as wrong.
        task_N: the task of each item.
    """
    right_JN = np.asarray(source_rows_JN) > 0.5
    keys = np.vstack([task_N, right_JN.sum(axis=0), right_JN])
    return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1).astype(np.intp)


def quotas(weight_G: Floats, most_G: Places, count: int) -> Places:
    """Return how many of `count` items each group gets: in proportion to weight, but first one for each.

    By the divisors of Sainte-Lague, which favour neither small nor large groups; none gets more than it has.

    >>> quotas(np.array([6.0, 3.0, 1.0]), np.array([100, 100, 100]), 10).tolist()
    [6, 3, 1]
    """
    quota_G = np.zeros(len(weight_G), dtype=np.intp)
    for _ in range(min(count, int(most_G.sum()))):
        claim_G = np.where(quota_G == 0, 1e9, 1.0) * (weight_G + 1e-300) / (quota_G + 0.5)
        quota_G[int(np.argmax(np.where(quota_G < most_G, claim_G, -1.0)))] += 1
    return quota_G


def inclusion(share_N: Floats, count: int) -> Floats:
    """Return the probability of each item to be among `count`: min(1, c share), adding up to count.

    >>> inclusion(np.array([3.0, 1.0, 1.0, 1.0]), 2).round(2).tolist()
    [1.0, 0.33, 0.33, 0.33]
    """
    if count >= len(share_N):
        return np.ones(len(share_N))
    positive_N = np.maximum(share_N, 1e-12 * max(float(share_N.max()), 1e-300))
    sure_N = np.zeros(len(share_N), dtype=bool)
    while True:
        left = count - int(sure_N.sum())
        chance_N = np.where(sure_N, 1.0, positive_N * left / positive_N[~sure_N].sum())
        above_N = (chance_N >= 1.0) & ~sure_N
        if not above_N.any():
            return np.asarray(chance_N)
        sure_N |= above_N


def _easiness(responses: Responses) -> Floats:
    """Return the weighted mean response [N] to each item, drawn a little towards the middle; .5 without rows."""
    known_MN = np.isfinite(responses.values_MN) * responses.rows_M[:, None]
    right_N = (np.where(known_MN > 0.0, responses.values_MN, 0.0) * known_MN).sum(axis=0)
    return np.asarray((right_N + 1.0) / (known_MN.sum(axis=0) + 2.0))


class _Part(NamedTuple):
    """How one score is made from the answered items of one pattern of answers."""

    own_s: Places  # columns of the answered items that count in the score, in the order of the line
    cell_s: Places  # the cell of each
    weight_s: Floats  # T_c w_i, adding up to 1
    noise: float  # sum of (T_c w_i)^2 (1 - pi_i)
    open: float  # 1 - n / N


class _Sample:
    """Items drawn along a line, and weighted means of the responses to them."""

    warnings: tuple[str, ...] = ()
    reason: str = ""

    def __init__(
        self, responses: Responses, line: Callable[[int], Places], share_N: Floats, seed: int, *, finest: bool
    ) -> None:
        """Take the order [N] for so many asked items, and how often each is drawn; cells are fine, or there is one."""
        self._targets_KN = responses.targets_KN
        self._line = line
        self._share_N = share_N
        self._seed = seed
        self._finest = finest
        self._bounded = responses.bounded
        self._group_N = np.unique(responses.targets_KN > 0.0, axis=1, return_inverse=True)[1].reshape(-1)
        self._fallback = [_unasked(responses, k) for k in range(len(responses.targets_KN))]
        self._variance = [_between(responses, k) for k in range(len(responses.targets_KN))]
        self._parts = lru_cache(maxsize=32)(self._make_parts)

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Draw from each score's items, in proportion to what they count in all scores together."""
        left = np.zeros(len(self._share_N), dtype=bool)
        left[free(len(self._share_N), taken)] = True
        line = self._line(count)
        line = line[left[line]]
        groups = [line[self._group_N[line] == group] for group in range(int(self._group_N.max()) + 1)]
        weight_G = np.array([self._share_N[own].sum() for own in groups])
        quota_G = quotas(weight_G, np.array([len(own) for own in groups], dtype=np.intp), count)
        chosen: list[int] = []
        for group, (own, quota) in enumerate(zip(groups, quota_G.tolist(), strict=True)):
            chosen.extend(self._draw(own, quota, group, len(taken)))
        items = np.sort(np.array(chosen, dtype=np.intp))
        weight_n = 1.0 / inclusion(self._share_N, len(items))[items] if len(items) else np.zeros(0)
        return Choice(tuple(items.tolist()), tuple((weight_n / weight_n.sum()).tolist()) if len(items) else ())

    def _draw(self, own: Places, quota: int, group: int, taken: int) -> list[int]:
        """Return `quota` of the items: the first of a random line, or one of each piece of an ordered one."""
        if not self._finest or quota >= len(own):
            return [int(item) for item in own[:quota]]
        if quota == 0:
            return []
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, 1, group, quota, taken]))
        edge_n = np.cumsum(inclusion(self._share_N[own], quota))
        place_q = np.searchsorted(edge_n, (np.arange(quota) + rng.random(quota)) * edge_n[-1] / quota, side="right")
        chosen: list[int] = []
        left = np.ones(len(own), dtype=bool)
        for place in np.minimum(place_q, len(own) - 1):
            spare = np.flatnonzero(left)
            nearest = int(spare[np.argmin(np.abs(spare - place))])  # itself, unless two pieces share an item
            left[nearest] = False
            chosen.append(int(own[nearest]))
        return chosen

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return weighted means of what was answered; see `evomerge.fitness.estimator.Fit.estimate`."""
        item_n, values_Cn = checked(items, values_Cn, len(self._share_N))
        shape = (len(values_Cn), len(self._targets_KN))
        found = Estimate(np.empty(shape), np.empty(shape))
        for rows, answered_n in _alike(np.isfinite(values_Cn)):
            parts = self._parts(tuple(item_n[answered_n].tolist()))
            for k, part in enumerate(parts):
                own_Cs = values_Cn[np.ix_(rows, np.flatnonzero(answered_n)[part.own_s])]
                found.value_CK[rows, k], found.error_CK[rows, k] = self._score(k, part, own_Cs)
        return settled(found, self._targets_KN, items, values_Cn)

    def _score(self, k: int, part: _Part, own_Cs: Floats) -> tuple[Floats, Floats]:
        """Return values [C] and errors [C] of one score."""
        n = own_Cs.shape[1]
        if n == 0:
            mean, deviation = self._fallback[k]
            return np.full(len(own_Cs), mean), np.full(len(own_Cs), deviation)
        value_C = np.einsum("cs,s->c", own_Cs, part.weight_s)
        cells = int(part.cell_s.max()) + 1
        member_sB = np.equal(part.cell_s[:, None], np.arange(cells)).astype(float)
        centre_CB = np.einsum("cs,sb->cb", own_Cs, member_sB) / member_sB.sum(axis=0)
        squares_C = ((own_Cs - centre_CB[:, part.cell_s]) ** 2).sum(axis=1)
        squares_C *= (n - 1) / max(n - cells, 1)  # as if around one mean
        if not self._bounded:
            v_C = squares_C / (n - 1) if n > 1 else _lone(own_Cs[:, 0], self._variance[k])
            return value_C, np.sqrt(v_C * part.noise)
        middle_C = (n * value_C + _ADDED / 2.0) / (n + _ADDED)
        doubt_C = (value_C - middle_C) ** 2
        added_C = _ADDED / 2.0 * (middle_C**2 + (1.0 - middle_C) ** 2)
        v_C = (squares_C + n * doubt_C + added_C) / (n + _ADDED)
        return value_C, np.sqrt(v_C * part.noise + part.open**2 * doubt_C)

    def _make_parts(self, answered: tuple[int, ...]) -> list[_Part]:
        """Return how each score is made from these items."""
        column_N = np.full(len(self._share_N), -1, dtype=np.intp)
        column_N[list(answered)] = np.arange(len(answered))
        parts = []
        line = self._line(len(answered))
        for target_N in self._targets_KN:
            own_o = line[target_N[line] > 0.0]
            asked_o = column_N[own_o] >= 0
            count = int(asked_o.sum())
            if count == 0:
                parts.append(_Part(np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp), np.zeros(0), 0.0, 1.0))
                continue
            chance_o = inclusion(self._share_N[own_o], count)
            cell_o = _cells(chance_o, asked_o, max(1, count // 2) if self._finest else 1)
            share_B = np.bincount(cell_o, target_N[own_o])
            raw_s = target_N[own_o[asked_o]] / chance_o[asked_o]
            cell_s = cell_o[asked_o]
            weight_s = raw_s / np.bincount(cell_s, raw_s)[cell_s] * share_B[cell_s]
            noise = float((weight_s**2 * (1.0 - chance_o[asked_o])).sum())
            parts.append(_Part(column_N[own_o[asked_o]], cell_s, weight_s, noise, 1.0 - count / len(own_o)))
        return parts


def _cells(chance_o: Floats, asked_o: Places, count: int) -> Places:
    """Return the cell [·] of each item along the line: `count` equal pieces, joined until each has two asked items."""
    edge_o = np.cumsum(chance_o) - 0.5 * chance_o
    piece_o = np.minimum((edge_o * count / chance_o.sum()).astype(np.intp), count - 1)
    asked_B = np.bincount(piece_o, asked_o, minlength=count)
    name_B = np.zeros(count, dtype=np.intp)
    name, inside = 0, 0
    for piece in range(count):
        if inside >= 2 and asked_B[piece:].sum() >= 2:
            name, inside = name + 1, 0
        name_B[piece] = name
        inside += int(asked_B[piece])
    return np.asarray(name_B[piece_o])


def _alike(answered_Cn: Places) -> Iterator[tuple[Places, Places]]:
    """Yield the rows [·] that answered the same items, and which those are [n]."""
    if len(answered_Cn):
        kinds, kind_C = np.unique(answered_Cn, axis=0, return_inverse=True)
        for kind, answered_n in enumerate(kinds):
            yield np.flatnonzero(kind_C.reshape(-1) == kind), answered_n


def _unasked(responses: Responses, k: int) -> tuple[float, float]:
    """Return what to say of a score none of whose items was answered: the rows' mean and deviation, or the middle."""
    known = responses.scores_MK[:, k]
    known = known[np.isfinite(known)]
    if len(known) > 2:
        return float(known.mean()), float(known.std(ddof=1)) + 1e-3
    return (0.5, 0.5) if responses.bounded else (0.0, float(np.abs(known).max(initial=1.0)))


def _between(responses: Responses, k: int) -> float:
    """Return the rows' mean variance between the items of a score; NaN if no row has two of them."""
    own = responses.values_MN[:, responses.targets_KN[k] > 0.0]
    known = [float(row[np.isfinite(row)].var(ddof=1)) for row in own if np.isfinite(row).sum() > 1]
    return float(np.mean(known)) if known else float("nan")


def _lone(value_C: Floats, variance: float) -> Floats:
    """Return the variance that one response without bounds is taken to have: the rows', or its own square."""
    return value_C**2 if np.isnan(variance) else np.full(len(value_C), variance)

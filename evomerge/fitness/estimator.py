"""What every estimator is: settings that fit, a fit that chooses items and estimates scores from the responses to them.

The value of an estimate is of the mean over all N items of a split; `scores` adds the doubt that the items themselves
leave about the population they stand for. Legend of shapes: see `evomerge.fitness.responses`.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.objective import Score


class Choice(NamedTuple):
    """Items to ask: sorted distinct places, and the share of all items that each stands for."""

    items: tuple[int, ...]
    weights: tuple[float, ...]


class Estimate(NamedTuple):
    """Scores of C candidates, and the standard deviation of truth minus value that the model claims (uncalibrated)."""

    value_CK: Floats
    error_CK: Floats


class Fit(Protocol):
    """An estimator that has seen responses; pure: the same questions get the same answers.

    Example::

        fit = Mean().fit(Responses.of(np.zeros((0, 200))), seed=0)
        asked = fit.choose(20).items
        fit.estimate(asked, answers_Cn).value_CK    # one row a candidate, one column a score
    """

    @property
    def reason(self) -> str:
        """What was used and why, in one line; empty where there is nothing to say."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        ...

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Return `count` items to ask, none of them among `taken`; all that are left if they are fewer."""
        ...

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return scores of candidates and their raw errors.

        Given all items that count in a score, its value is their weighted mean and its error 0.

        Args:
            items: distinct places of the items that were asked, in any order.
            values_Cn: the responses to them; NaN where one is missing.
            margins_Cn: log-likelihood margins in nats, for the estimators that use them.

        Raises:
            ValueError: if shapes do not fit, or an item is repeated or unknown.
        """
        ...


class Estimator(Protocol):
    """The settings of an estimator: a frozen value."""

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit to responses; the same seed gives the same fit.

        Raises:
            ExperimentError: if the estimator cannot be fitted to so few rows, or to such responses.
        """
        ...


def checked(items: Sequence[int], values_Cn: Floats, total: int) -> tuple[Places, Floats]:
    """Return items [n] and responses [C, n] as arrays.

    Raises:
        ValueError: if there is not one column per item, or an item is repeated or outside 0 to total - 1.
    """
    item_n = np.asarray(items, dtype=np.intp)
    values_Cn = np.asarray(values_Cn, dtype=np.float64)
    if item_n.ndim != 1 or values_Cn.ndim != 2 or values_Cn.shape[1] != len(item_n):
        raise ValueError(f"one column per item is needed, got {len(item_n)} items and responses {values_Cn.shape}")
    if len(np.unique(item_n)) != len(item_n):
        raise ValueError("an estimate needs distinct items, got one twice")
    if len(item_n) and (item_n.min() < 0 or item_n.max() >= total):
        raise ValueError(f"items must lie in the split of {total} items, got {item_n.min()} to {item_n.max()}")
    return item_n, values_Cn


def free(total: int, taken: Sequence[int]) -> Places:
    """Return the places [·] from 0 to total - 1 that are not taken, in order."""
    left_N = np.ones(total, dtype=bool)
    left_N[list(taken)] = False
    return np.flatnonzero(left_N)


def settled(estimate: Estimate, targets_KN: Floats, items: Sequence[int], values_Cn: Floats) -> Estimate:
    """Return the estimate with the exact score, and error 0, where every item that counts in a score was answered."""
    item_n, values_Cn = checked(items, values_Cn, targets_KN.shape[1])
    answered_Cn = np.isfinite(values_Cn)
    counted_KN = targets_KN > 0.0
    missing_CK = counted_KN.sum(axis=1) - np.einsum("cn,kn->ck", answered_Cn.astype(float), counted_KN[:, item_n])
    exact_CK = np.einsum("cn,kn->ck", np.where(answered_Cn, values_Cn, 0.0), targets_KN[:, item_n])
    whole_CK = missing_CK < 0.5
    return Estimate(np.where(whole_CK, exact_CK, estimate.value_CK), np.where(whole_CK, 0.0, estimate.error_CK))


def scores(
    fit: Fit,
    spread_K: Floats,
    items: Sequence[int],
    values_n: Floats,
    responses: Responses,
    margins_n: Floats | None = None,
) -> list[Score]:
    """Return the score of a candidate on each target, with its error over the population of items.

        error^2 = (spread raw)^2 + d m (1 - m) / N + (m - value)^2,    m = (N value + 2) / (N + 4)

    where `raw` is the fit's error of the mean over the N items and the rest is what those N leave open: they are a
    sample of what the task stands for. Two right and two wrong answers are added to them (Agresti 1998, The American
    Statistician 52:119), so that neither 0 nor 1 is certain. N is 1 / sum t^2 of the items' shares t, their number
    where they are equal; d, see `dispersion`, is 1 for responses of 0 and 1 and less for fractions. Responses without
    bounds have error^2 = (spread raw)^2 + s^2 / N with their variance s^2 instead.

    Args:
        fit: of the estimator.
        spread_K: by how much raw errors are multiplied (`evomerge.fitness.calibration.spread`).
        items: what the candidate was asked.
        values_n: its responses.
        responses: what was fitted; gives targets and dispersion.
        margins_n: its margins, if any.

    Raises:
        ValueError: if nothing was answered, or see `Fit.estimate`.
    """
    values_n = np.asarray(values_n, dtype=np.float64)
    answered_n = np.isfinite(values_n)
    if not answered_n.any():
        raise ValueError("a score needs at least one answered item")
    margins_1n = None if margins_n is None else np.asarray(margins_n, dtype=np.float64)[None]
    value_CK, error_CK = fit.estimate(tuple(items), values_n[None], margins_1n)
    counted_Kn = responses.targets_KN[:, list(items)] > 0.0
    asked_K = (counted_Kn & answered_n).sum(axis=1)
    found = []
    for k, (value, raw) in enumerate(zip(value_CK[0].tolist(), error_CK[0].tolist(), strict=True)):
        total = float(1.0 / (responses.targets_KN[k] ** 2).sum())
        own_n = values_n[counted_Kn[k] & answered_n]
        if responses.bounded:
            middle = (total * value + 2.0) / (total + 4.0)
            open_ = dispersion(responses, k) * middle * (1.0 - middle) / total + (middle - value) ** 2
        else:
            open_ = _variance(responses, k, own_n) / total
        error = float(np.sqrt((spread_K[k] * raw) ** 2 + open_))
        found.append(Score(value=value, error=error, items=int(asked_K[k]), bounded=responses.bounded))
    return found


def dispersion(responses: Responses, k: int) -> float:
    """Return by how much responses vary between items, as a share of the variance p (1 - p) of those that are 0 or 1.

    Taken over the rows' responses to the items of score k; 1 where there are none.
    """
    own = responses.values_MN[:, responses.targets_KN[k] > 0.0]
    own = own[np.isfinite(own).any(axis=1)]
    if not own.size:
        return 1.0
    mean_M = np.nanmean(own, axis=1)
    most = float((mean_M * (1.0 - mean_M)).sum())
    return min(1.0, float(np.nanvar(own, axis=1).sum()) / most) if most > 0.0 else 1.0


def _variance(responses: Responses, k: int, own_n: Floats) -> float:
    """Return the variance of unbounded responses between items: of this candidate's, or of the rows'.

    With one response and no row nothing is known; the response's own square then stands for its variance.
    """
    if len(own_n) > 1:
        return float(own_n.var(ddof=1))
    own = responses.values_MN[:, responses.targets_KN[k] > 0.0]
    known = [float(row[np.isfinite(row)].var(ddof=1)) for row in own if np.isfinite(row).sum() > 1]
    if known:
        return float(np.mean(known))
    return float((own_n**2).sum())

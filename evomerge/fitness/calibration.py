"""How true an estimator's errors are: measured on rows held out, and on candidates that were promoted.

A model's own errors are too small, because the items were picked on the rows that it was fitted on.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from evomerge.fitness.estimator import Estimator
from evomerge.fitness.responses import Floats, Responses

#: The spread where there are fewer than `LEAST_ROWS` complete rows; with 20 of them it was 1.2 to 2.0.
UNKNOWN_SPREAD, LEAST_ROWS = 1.5, 5
#: The unknown spread counts as so many rows more, and no spread is below the least: few rows may agree by chance.
PRIOR_ROWS, LEAST_SPREAD = 2.0, 0.7
#: Promoted candidates that the monitor needs, and the root mean square from which errors are not to be trusted.
ENOUGH_PROMOTED, WORST_RMS = 8, 1.5


@runtime_checkable
class Pinnable(Protocol):
    """Settings that decide something by the responses, and can say what: spares every fold the same work."""

    def pinned(self, responses: Responses, seed: int) -> Self:
        """Return settings that say what these would decide."""
        ...


class Monitor(NamedTuple):
    """What promoted candidates say of the errors: the root mean square of their z-scores, and what to do.

    Attributes:
        rms: root mean square; 1 where errors are true.
        inflate: the factor by which errors are to be multiplied from now on, at least 1.
        message: one line for the user; empty where nothing is wrong.
    """

    rms: float
    inflate: float
    message: str


def spread(settings: Estimator, responses: Responses, count: int, seed: int, folds: int = 5) -> Floats:
    """Return by how much raw errors are to be multiplied [K]: the root mean square of z-scores of held-out rows.

    Every fold is fitted again and chooses its items again, which is where raw errors come out too small. Only complete
    rows are held out; they count as in the fit.

    Args:
        settings: of the estimator.
        responses: what it is fitted on.
        count: how many items candidates will be asked.
        seed: of the folds and fits.
        folds: how many; as many as complete rows if they are fewer.
    """
    squares_MK, weights_M = z_scores(settings, responses, count, seed, folds)
    squares_MK = squares_MK**2
    if len(weights_M) < LEAST_ROWS or weights_M.sum() <= 0.0:
        return np.full(len(responses.targets_KN), UNKNOWN_SPREAD)
    weights_M = weights_M * (weights_M.sum() / (weights_M**2).sum())
    total_K = weights_M @ squares_MK + PRIOR_ROWS * UNKNOWN_SPREAD**2
    return np.asarray(np.maximum(np.sqrt(total_K / (weights_M.sum() + PRIOR_ROWS)), LEAST_SPREAD))


def z_scores(settings: Estimator, responses: Responses, count: int, seed: int, folds: int = 5) -> tuple[Floats, Floats]:
    """Return truth minus value over raw error of held-out complete rows [M', K], and the rows' weights [M'].

    0 where the raw error is 0 because every item was asked.
    """
    scores_MK = responses.scores_MK
    full = np.flatnonzero(np.asarray(np.isfinite(scores_MK).all(axis=1)) & (responses.rows_M > 0.0))
    if len(full) < LEAST_ROWS:
        return np.zeros((0, scores_MK.shape[1])), np.zeros(0)
    if isinstance(settings, Pinnable):
        settings = settings.pinned(responses, seed)
    order = np.random.default_rng(seed).permutation(full)
    found: list[Floats] = []
    for held in (order[f :: min(folds, len(full))] for f in range(min(folds, len(full)))):
        fit = settings.fit(responses.only(np.setdiff1d(np.arange(len(scores_MK)), held)), seed)
        items = np.array(fit.choose(count).items, dtype=np.intp)
        margins_Mn = None if responses.margins_MN is None else responses.margins_MN[np.ix_(held, items)]
        value_CK, error_CK = fit.estimate(tuple(items.tolist()), responses.values_MN[np.ix_(held, items)], margins_Mn)
        residual_CK = scores_MK[held] - value_CK
        found.append(np.where(error_CK > 0.0, residual_CK / np.where(error_CK > 0.0, error_CK, 1.0), 0.0))
    held_all = np.concatenate([order[f :: min(folds, len(full))] for f in range(min(folds, len(full)))])
    return np.concatenate(found), responses.rows_M[held_all]


def monitor(z_scores: Sequence[float]) -> Monitor:
    """Return what the z-scores of promoted candidates say: truth minus value, over the error that was given for it.

    Calibration on held-out rows does not hold where candidates differ from the rows; promoted candidates show it.
    """
    if not len(z_scores):
        return Monitor(0.0, 1.0, "")
    rms = float(np.sqrt(np.mean(np.square(z_scores))))
    if len(z_scores) < ENOUGH_PROMOTED or rms <= WORST_RMS:
        return Monitor(rms, 1.0, "")
    message = (
        f"scores of {len(z_scores)} promoted candidates are off by {rms:.1f} times their errors: errors are inflated; "
        "ask more items, and promote more candidates"
    )
    return Monitor(rms, rms, message)

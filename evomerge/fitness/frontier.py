"""What to fit on when a search has left its first rows behind: near rows, and promoted ones at half the weight.

Fitted on the rows that it started with, an item design may rank the frontier worse than random items do.
"""

from dataclasses import replace

import numpy as np

from evomerge.fitness.responses import Places, Responses

#: Share of the weight for the promoted rows: of rows that have nothing to do with each other, and of merges of the same
#: sources, where those left behind still tell of the new ones.
SHARE, MERGED_SHARE = 0.8, 0.5
#: Share of the other rows that is kept, and how many are kept at least.
NEAREST, LEAST_ROWS = 0.15, 30


def frontier(
    responses: Responses, promoted: Places, *, share: float | None = None, nearest: float | None = NEAREST
) -> Responses:
    """Return the responses to fit on for candidates that are like the promoted ones.

    The promoted rows get a `share` of the weight (never less than they have), and of the other rows only those stay
    whose scores are nearest to the promoted ones' mean, in standard deviations over all rows; rows whose scores are not
    known stay as well. Fitted on the weak 70 % of five matrices (two real, three simulated), ten promoted rows raise
    the rank correlation among the strong at 20 items from .01 to .50; with the nearest third instead of .15 to .46. On
    nine (seven simulated) a share of .85 instead of .5 takes a fifth off the error, at the same correlation.

    Args:
        responses: all rows.
        promoted: the recent rows that were asked everything.
        share: of the weight, in [0, 1). None: .5 where sources are known, else .8.
        nearest: the share of the other rows that stays, `LEAST_ROWS` at least; None: all.

    Raises:
        ValueError: if share is not in [0, 1).
    """
    if share is None:
        share = MERGED_SHARE if responses.sources else SHARE
    if not 0.0 <= share < 1.0:
        raise ValueError(f"the promoted rows' share of the weight must be in [0, 1), got {share}")
    rows = len(responses.rows_M)
    promoted = np.unique(np.asarray(promoted, dtype=np.intp))
    others = np.setdiff1d(np.arange(rows), promoted)
    if not len(promoted) or not len(others):
        return responses
    kept = others if nearest is None else others[_near(responses, promoted, others, nearest)]
    weights_M = responses.rows_M.copy()
    ours, theirs = float(weights_M[promoted].sum()), float(weights_M[kept].sum())
    if ours > 0.0:
        weights_M[promoted] *= max(1.0, share / (1.0 - share) * theirs / ours)
    return replace(responses, rows_M=weights_M).only(np.sort(np.concatenate([kept, promoted])))


def _near(responses: Responses, promoted: Places, others: Places, nearest: float) -> Places:
    """Return which of the other rows stay, as sorted places among them."""
    scores_MK = responses.scores_MK
    known_M = np.asarray(np.isfinite(scores_MK).all(axis=1))
    known = promoted[known_M[promoted]]
    if not len(known):
        return np.arange(len(others))
    spread_K = np.maximum(scores_MK[known_M].std(axis=0), 1e-9)
    apart_M = (((scores_MK[others] - scores_MK[known].mean(axis=0)) / spread_K) ** 2).sum(axis=1)
    apart_M = np.where(known_M[others], apart_M, -1.0)
    count = int((apart_M < 0.0).sum()) + max(int(np.ceil(nearest * len(others))), LEAST_ROWS)
    return np.sort(np.argsort(apart_M, kind="stable")[:count])

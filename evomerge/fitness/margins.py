"""Margins as features: how far right or wrong an answer was foretells the graded score better than right or wrong.

The goal stays the graded responses: a margin only enters by its covariance with them over the fitted rows. A search
that maximised margins themselves would raise those of items that are right already.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from evomerge.fitness.conditional import Joint
from evomerge.fitness.lowrank import LOOSE, PRIOR_ROWS, Lowrank, factorise
from evomerge.fitness.responses import Floats, Places
from evomerge.fitness.shrinkage import shrunk, target

#: The margin that makes a feature sigmoid(1), as a share of the median absolute margin.
SCALE = 0.7
#: Least shrinkage: features of so many values fit few rows too well.
LEAST_SHRINKAGE = 0.3
#: How much of a response's noise its own feature may explain.
MOST_CORRELATION = 0.97


class Soft(NamedTuple):
    """The joint law of soft features and graded scores.

    Attributes:
        law: of both.
        scale: the margin in nats that makes a feature sigmoid(1).
        soft_N: which items have margins; the features of the others are their graded responses.
    """

    law: Joint
    scale: float
    soft_N: NDArray[np.bool_]

    def features(self, items: Places, values_Cn: Floats, margins_Cn: Floats) -> Floats:
        """Return sigmoid(margin / scale) of items with margins and responses to others; NaN where one is missing."""
        return np.where(self.soft_N[items], expit(margins_Cn / self.scale), values_Cn)


def soft_law(
    values_MN: Floats,
    margins_MN: Floats,
    rows_M: Floats,
    strata_N: Places,
    targets_KN: Floats,
    *,
    rank: int,
    shrinkage: float,
) -> Soft:
    """Return the joint law of features x = sigmoid(margin / scale) and of scores made of graded responses y.

    A factor model is fitted to the features. The responses are regressed on its factors z, and what is left of y_i is
    correlated with what is left of its own x_i:

        x = p_x + L z + e,    y = p_y + H z + u,    H = Y'Z (S + T^-1)^-1,    cov(u_i, e_i) by moments

    Both are shrunk towards their targets, whose abilities they have in common.

    Args:
        values_MN: graded responses, none missing.
        margins_MN: log-likelihood margins in nats; items without any, whose margins are all NaN, have their responses
            as features.
        rows_M: weights of the rows.
        strata_N: the items' strata.
        targets_KN: shares of the items in the scores.
        rank: factors.
        shrinkage: of both covariances; `LEAST_SHRINKAGE` at least.
    """
    share = max(shrinkage, LEAST_SHRINKAGE)
    soft_N = np.asarray(np.isfinite(margins_MN).all(axis=0), dtype=bool)
    scale = max(SCALE * float(np.median(np.abs(margins_MN[:, soft_N]))), 1e-9)
    features_MN = np.where(soft_N, expit(margins_MN / scale), values_MN)
    toward, toward_hard = target(features_MN, rows_M, strata_N), target(values_MN, rows_M, strata_N)
    law = factorise(features_MN, rows_M, rank, toward.noise_N)
    hard, own_N = _regressed(law, features_MN, values_MN, rows_M, toward_hard.noise_N)
    both, both_hard = shrunk(law, toward, share), shrunk(hard, toward_hard, share)
    common = float(own_N.sum() / np.sqrt(law.noise_N * hard.noise_N).sum())
    own_N = (1.0 - share) * own_N + share * common * np.sqrt(toward.noise_N * toward_hard.noise_N)
    own_N = np.minimum(own_N, MOST_CORRELATION * np.sqrt(both.noise_N * both_hard.noise_N))
    joint = Joint(
        *both,
        center_K=targets_KN @ both_hard.mean_N,
        load_Kq=targets_KN @ both_hard.loading_Nq,
        own_KN=targets_KN * own_N,
        rest_K=targets_KN**2 @ both_hard.noise_N,
    )
    return Soft(joint, scale, soft_N)


def _regressed(
    law: Lowrank, features_MN: Floats, values_MN: Floats, rows_M: Floats, noise_N: Floats
) -> tuple[Lowrank, Floats]:
    """Return the law of the responses on the features' factors, and cov(u_i, e_i) [N], at least 0.

    Covariances count `PRIOR_ROWS` rows of the correlation that all items have together.
    """
    weight = float(rows_M.sum())
    root_M1 = np.sqrt(rows_M)[:, None]
    mean_N = rows_M @ values_MN / weight
    X_MN, Y_MN = (features_MN - law.mean_N) * root_M1, (values_MN - mean_N) * root_M1
    scaled_Nq = law.loading_Nq / law.noise_N[:, None]
    cov_qq = np.linalg.inv(np.eye(scaled_Nq.shape[1]) + law.loading_Nq.T @ scaled_Nq)
    Z_Mq = X_MN @ (scaled_Nq @ cov_qq)
    second_qq = weight * cov_qq + Z_Mq.T @ Z_Mq
    cross_x, cross_y = X_MN.T @ Z_Mq, Y_MN.T @ Z_Mq
    precision_q = 1.0 / (LOOSE * (law.loading_Nq * scaled_Nq).mean(axis=0) + 1e-3)
    hard_Nq = np.linalg.solve(second_qq + np.diag(precision_q), cross_y.T).T
    explained_Nq = hard_Nq @ second_qq
    left_N = (Y_MN**2).sum(axis=0) - 2.0 * (cross_y * hard_Nq).sum(axis=1) + (explained_Nq * hard_Nq).sum(axis=1)
    left_N = (left_N + PRIOR_ROWS * noise_N) / (weight + PRIOR_ROWS)
    own_N = (X_MN * Y_MN).sum(axis=0) - (cross_x * hard_Nq).sum(axis=1) - (cross_y * law.loading_Nq).sum(axis=1)
    own_N = np.maximum(own_N + (explained_Nq * law.loading_Nq).sum(axis=1), 0.0)
    spread_N = np.sqrt(law.noise_N * left_N)
    common = min(float(own_N.sum() / (weight * spread_N.sum())), MOST_CORRELATION)
    own_N = (own_N + PRIOR_ROWS * common * spread_N) / (weight + PRIOR_ROWS)
    return Lowrank(mean_N, np.asarray(hard_Nq, dtype=np.float64), left_N), own_N

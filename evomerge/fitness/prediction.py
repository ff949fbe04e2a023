"""What a candidate would answer to the items that it was not asked, under a fitted response model.

Legend of shapes: see `evomerge.fitness.responses`, `evomerge.fitness.irt` and `evomerge.fitness.ability`.
"""

# ruff: noqa: N802  what returns an array is named with its shape in capitals

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import expit

from evomerge.fitness.ability import Abilities
from evomerge.fitness.estimator import Estimate
from evomerge.fitness.irt import Items, Model, doubled, extended, outer, packed
from evomerge.fitness.responses import Floats, Places

#: Finds abilities of candidates from the items they were asked and the responses [C, n].
Ability = Callable[[Items, Floats], Abilities]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """A response model with a way to find abilities: foretells scores from any items.

        value_k = sum_seen t_ki y_i + sum_unseen t_ki p_i(theta)
        error_k^2 = g_k' C g_k + f sum_unseen t_ki^2 p_i (1 - p_i),    g_k = sum_unseen t_ki p_i (1 - p_i) a_i / r_i

    t_ki is the item's share of score k, C the covariance of the ability theta (delta method), f the dispersion of the
    responses. p_i = sigmoid(z_i / r_i) with r_i^2 = 1 + pi v_i / 8 and v_i the variance that ability and item
    parameters leave to the logit z_i (MacKay 1992, Neural Computation 4:720); taken as known, r_i = 1.

    Attributes:
        model: the fitted model.
        ability: finds abilities.
        plain: whether abilities and items are taken as known in the probabilities, as published.
    """

    model: Model
    ability: Ability
    plain: bool

    def __call__(self, targets_KN: Floats, items: Places, values_Cn: Floats) -> Estimate:
        """Return scores and errors, from responses without missing ones."""
        found = self.ability(self.model.items.only(items), values_Cn)
        p_CN, rate_CN = self._probabilities(found)
        unseen_KN = targets_KN.copy()
        unseen_KN[:, items] = 0.0
        noise_CN = p_CN * (1.0 - p_CN)
        count = (len(values_Cn), len(targets_KN))
        slope_CKN = (noise_CN / rate_CN)[:, None, :] * unseen_KN
        pull_CKD = (slope_CKN.reshape(-1, p_CN.shape[1]) @ self.model.items.slopes_ND).reshape(*count, -1)
        variance_CK = np.einsum("ckd,cde,cke->ck", pull_CKD, found.covariance_CDD, pull_CKD)
        variance_CK += self.model.dispersion * noise_CN @ (unseen_KN**2).T
        value_CK = values_Cn @ targets_KN[:, items].T + p_CN @ unseen_KN.T
        # a value in [0, 1] is never further off than 1/2 in the root mean square; maximum likelihood may claim more
        return Estimate(value_CK, np.sqrt(np.minimum(variance_CK, 0.25)))

    def _probabilities(self, found: Abilities) -> tuple[Floats, Floats]:
        """Return p [C, N] and by how much the logits were divided [C, N]."""
        items = self.model.items
        logit_CN = items.logits(found.mean_CD)
        if self.plain:
            return np.asarray(expit(logit_CN)), np.ones_like(logit_CN)
        known_CF = extended(found.mean_CD, np.zeros_like(found.covariance_CDD))
        variance_CN = known_CF @ items.spread_NF.T + packed(found.covariance_CDD) @ self._slopes_NF.T
        rate_CN = np.sqrt(1.0 + np.pi / 8.0 * variance_CN)
        return np.asarray(expit(logit_CN / rate_CN)), rate_CN

    @cached_property
    def _slopes_NF(self) -> Floats:
        """E[a a'], packed and doubled, so that its product with a covariance is a trace."""
        items = self.model.items
        return doubled(packed(items.covariance_NEE[:, :-1, :-1] + outer(items.slopes_ND)))


def odd_error(prediction: Prediction, targets_KN: Floats, values_CN: Floats) -> Floats:
    """Return the mean error [K] on the odd items of rows, from their even ones; NaN for a score without odd items."""
    odd_N = np.arange(values_CN.shape[1]) % 2 == 1
    sum_K, count_K = np.zeros(len(targets_KN)), np.zeros(len(targets_KN))
    for rows, answered in patterns(values_CN):
        own_KN = np.zeros_like(targets_KN)
        own_KN[:, answered] = (targets_KN * odd_N)[:, answered]
        some_K = own_KN.sum(axis=1) > 0.0
        if not some_K.any():
            continue
        own_KN = own_KN[some_K] / own_KN[some_K].sum(axis=1, keepdims=True)
        even = answered[~odd_N[answered]]
        truth_CK = values_CN[rows][:, answered] @ own_KN[:, answered].T
        found_CK = prediction(own_KN, even, values_CN[np.ix_(rows, even)]).value_CK
        sum_K[some_K] += np.abs(found_CK - truth_CK).sum(axis=0)
        count_K[some_K] += len(rows)
    return np.where(count_K > 0.0, sum_K / np.maximum(count_K, 1.0), np.nan)


def patterns(values_Cn: Floats) -> list[tuple[Places, Places]]:
    """Return, for each way to have answered some items, the rows that have and the columns of the items."""
    pattern_Pn, row_C = np.unique(np.isfinite(values_Cn), axis=0, return_inverse=True)
    return [(np.flatnonzero(row_C.ravel() == p), np.flatnonzero(known_n)) for p, known_n in enumerate(pattern_Pn)]

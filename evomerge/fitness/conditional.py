"""What asked items say of scores under a joint normal law, and which items say most.

Legend of shapes, besides `evomerge.fitness.responses`: q factors.
"""

# ruff: noqa: N802, N815  fields and properties carry their shapes in capitals, as variables do

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evomerge.fitness.lowrank import Lowrank
from evomerge.fitness.responses import Floats, Places


class Joint(NamedTuple):
    """Features x_i of N items and K scores s, jointly normal, with factors z ~ N(0, I).

        x_i = mean_i + loading_i . z + e_i,    s_k = center_k + load_k . z + u_k
        var e_i = noise_i,    cov(u_k, e_i) = own_ki,    var u_k = rest_k

    For features that are the responses themselves u is the shares' sum of e; for others (margins) it is not.
    """

    mean_N: Floats
    loading_Nq: Floats
    noise_N: Floats
    center_K: Floats
    load_Kq: Floats
    own_KN: Floats
    rest_K: Floats

    @property
    def prior_K(self) -> Floats:
        """The variances of the scores before anything is asked."""
        return np.asarray((self.load_Kq**2).sum(axis=1) + self.rest_K)


class Gain(NamedTuple):
    """The conditional law of the scores: mean = center + weights (x - mean of x), with these variances."""

    weights_Kn: Floats
    variance_K: Floats


def joint(law: Lowrank, targets_KN: Floats) -> Joint:
    """Return the joint law of responses and of scores that are their weighted sums."""
    return Joint(
        *law,
        center_K=targets_KN @ law.mean_N,
        load_Kq=targets_KN @ law.loading_Nq,
        own_KN=targets_KN * law.noise_N,
        rest_K=targets_KN**2 @ law.noise_N,
    )


def gain(law: Joint, items: Places) -> Gain:
    """Return what the features of some items say of the scores.

    With P and C the posterior means' weights and the covariance of the factors given the items, and o = own / noise:

        weights = (load - o L) P + o,    variance = (load - o L) C (load - o L)' + rest - o^2 noise

    which is cov(s, x) cov(x, x)^-1 and var(s) - cov(s, x) cov(x, x)^-1 cov(x, s) at the cost of q x q matrices.
    """
    L_nq, noise_n = law.loading_Nq[items], law.noise_N[items]
    scaled_nq = L_nq / noise_n[:, None]
    cov_qq = np.linalg.inv(np.eye(L_nq.shape[1]) + L_nq.T @ scaled_nq)
    own_Kn = law.own_KN[:, items] / noise_n
    open_Kq = law.load_Kq - own_Kn @ L_nq
    variance_K = np.einsum("kq,qr,kr->k", open_Kq, cov_qq, open_Kq) + law.rest_K - own_Kn**2 @ noise_n
    return Gain(open_Kq @ cov_qq @ scaled_nq.T + own_Kn, np.maximum(variance_K, 0.0))


def expected(law: Joint, items: Places, values_Cn: Floats) -> Floats:
    """Return features [C, n] with missing ones replaced by what the known ones of the candidate let expect."""
    filled_Cn = values_Cn.copy()
    for c in np.flatnonzero(~np.isfinite(values_Cn).all(axis=1)):
        known_n = np.isfinite(values_Cn[c])
        some, rest = items[known_n], items[~known_n]
        L_nq = law.loading_Nq[some]
        scaled_nq = L_nq / law.noise_N[some, None]
        cov_qq = np.linalg.inv(np.eye(L_nq.shape[1]) + L_nq.T @ scaled_nq)
        z_q = cov_qq @ (scaled_nq.T @ (values_Cn[c, known_n] - law.mean_N[some]))
        filled_Cn[c, ~known_n] = law.mean_N[rest] + law.loading_Nq[rest] @ z_q
    return filled_Cn


def most_telling(law: Joint, count: int, taken: Sequence[int] = ()) -> list[int]:
    """Return items, one after the other each the one that lowers the scores' variances most (greedy c-optimality).

    What is lowered is the sum over scores of posterior over prior variance, so that each counts alike whatever its
    spread: item j lowers it by sum_k cov(s_k, x_j)^2 / (prior_k var x_j), all given the items before. One choice costs
    a product of N x q; ties go to the first item.

    Args:
        law: the joint law.
        count: how many; all that are left if they are fewer.
        taken: items that are not to be chosen. They count as not asked, so that they are conditioned on neither.
    """
    free_N = np.ones(len(law.mean_N), dtype=bool)
    free_N[list(taken)] = False
    var_N = (law.loading_Nq**2).sum(axis=1) + law.noise_N
    cov_KN = law.load_Kq @ law.loading_Nq.T + law.own_KN
    use_K = 1.0 / np.maximum(law.prior_K, 1e-300)
    cov_qq = np.eye(law.loading_Nq.shape[1])
    chosen: list[int] = []
    for _ in range(min(count, int(free_N.sum()))):
        item = int(np.argmax(np.where(free_N, use_K @ cov_KN**2 / var_N, -1.0)))
        free_N[item] = False
        chosen.append(item)
        spread = np.sqrt(var_N[item])
        toward_q = cov_qq @ law.loading_Nq[item] / spread
        shared_N = law.loading_Nq @ toward_q
        cov_KN = cov_KN - np.outer(cov_KN[:, item] / spread, shared_N)
        var_N = np.maximum(var_N - shared_N**2, law.noise_N)
        cov_qq = cov_qq - np.outer(toward_q, toward_q)
    return chosen

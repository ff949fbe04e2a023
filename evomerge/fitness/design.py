"""Which items tell most of the scores under a fitted response model.

Legend of shapes, besides `evomerge.fitness.responses` and `evomerge.fitness.irt`: Q abilities drawn from the prior.
"""

import numpy as np
from scipy.special import expit

from evomerge.fitness.irt import Items, Singles, extended
from evomerge.fitness.responses import Floats

#: Abilities over which an item's use is averaged.
_POINTS = 32
#: Gains are compared to so many decimals of the largest: what hangs on rounding must not choose between equals.
_DECIMALS = 4


def design(items: Items, targets_KN: Floats, count: int, taken: tuple[int, ...] = (), seed: int = 0) -> tuple[int, ...]:
    """Return the sorted places of `count` items that together tell most of the scores (A-optimal, greedy).

    For an ability theta the posterior variance of score k is g_k' C g_k with g_k = sum_i t_ki p_i (1 - p_i) a_i and
    C = (I + sum_asked p_i (1 - p_i) a_i a_i')^-1. The next item is the one that reduces it most, in units of each
    score's variance under the prior, on average over scores and over abilities drawn from the prior N(0, I).

    Args:
        items: all N of them.
        targets_KN: the items' shares of the scores.
        count: how many; all that are not taken if they are fewer.
        taken: items that are not to be chosen; they count as not asked.
        seed: of the abilities.
    """
    state = _Design(items, targets_KN, seed)
    free_N = np.ones(len(items.slopes_ND), dtype=bool)
    free_N[list(taken)] = False
    chosen: list[int] = []
    for _ in range(min(count, int(free_N.sum()))):
        gain_N = np.where(free_N, state.gain(), -1.0)
        item = int(np.argmax((gain_N / max(float(gain_N.max()), 1e-30)).round(_DECIMALS)))
        state.ask(item)
        free_N[item] = False
        chosen.append(item)
    return tuple(sorted(chosen))


class _Design:
    """What asking one more item would tell, kept up with rank-one changes of C as items are asked."""

    def __init__(self, items: Items, targets_KN: Floats, seed: int) -> None:
        ability_QD = np.random.default_rng(seed).standard_normal((_POINTS, items.dimensions))
        known_QDD = np.zeros((_POINTS, items.dimensions, items.dimensions))
        variance_QN = extended(ability_QD, known_QDD) @ items.spread_NF.T
        p_QN = expit(items.logits(ability_QD) / np.sqrt(1.0 + np.pi / 8.0 * variance_QN))
        weight_QN = p_QN * (1.0 - p_QN)
        pull_KQD = np.stack([(weight_QN * target_N) @ items.slopes_ND for target_N in targets_KN])
        pull_KQD /= np.sqrt(np.maximum((pull_KQD**2).sum(axis=2).mean(axis=1), 1e-30))[:, None, None]
        self.weight_QN: Singles = weight_QN.astype(np.float32)
        self.slopes_ND: Singles = items.slopes_ND.astype(np.float32)
        self.covariance_QDD: Singles = np.tile(np.eye(items.dimensions, dtype=np.float32), (_POINTS, 1, 1))
        self.told_KQN: Singles = pull_KQD.astype(np.float32) @ self.slopes_ND.T  # g' C a
        self.own_QN: Singles = np.tile((self.slopes_ND**2).sum(axis=1), (_POINTS, 1))  # a' C a

    def gain(self) -> Floats:
        """Return by how much each item [N] would reduce the variance of the scores."""
        told_QN = np.einsum("kqn,kqn->qn", self.told_KQN, self.told_KQN)
        return np.asarray((told_QN * self.weight_QN / (1.0 + self.weight_QN * self.own_QN)).mean(axis=0), dtype=float)

    def ask(self, item: int) -> None:
        """Take an item as asked: C becomes C - w C a a' C / (1 + w a' C a)."""
        step_QD = self.covariance_QDD @ self.slopes_ND[item]
        weight_Q = self.weight_QN[:, item]
        part_Q = weight_Q / (1.0 + weight_Q * self.own_QN[:, item])
        reach_QN = step_QD @ self.slopes_ND.T
        self.told_KQN -= (self.told_KQN[:, :, item] * part_Q)[:, :, None] * reach_QN
        self.own_QN -= part_Q[:, None] * reach_QN**2
        self.covariance_QDD -= part_Q[:, None, None] * step_QD[:, :, None] * step_QD[:, None, :]

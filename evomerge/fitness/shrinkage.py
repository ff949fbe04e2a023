"""What a factor model is shrunk towards: one ability, one more for each stratum, and independent noise.

Few rows determine few covariances. The target has three numbers and the items' means, so that it is known from five
rows, and it keeps the choice of items balanced over the strata.
"""

# ruff: noqa: N802, N815  fields and properties carry their shapes in capitals, as variables do

from typing import NamedTuple

import numpy as np

from evomerge.fitness.lowrank import Lowrank
from evomerge.fitness.responses import Floats, Places

#: Added to p (1 - p): an item that all or none of the rows solve still moves with ability a little.
LEAST_SLOPE = 0.02
#: The least variance of ability, and of a stratum's ability as a share of it.
LEAST_ABILITY, LEAST_STRATUM = 1e-3, 0.1
#: Share of an item's variance that is noise at least.
LEAST_NOISE_SHARE = 0.3
#: More strata than this share the factors of the largest ones.
MOST_STRATA = 64


class Target(NamedTuple):
    """The law y_i = p_i + slope_i (a + b_h(i)) + e_i, with ability a and the abilities b_h of strata h independent."""

    slope_N: Floats
    ability: float
    stratum: float
    noise_N: Floats
    strata_N: Places

    @property
    def loading_Nq(self) -> Floats:
        """The loadings on ability and on the strata, of which there may be one: then it has none of its own."""
        common_N1: Floats = np.sqrt(self.ability) * self.slope_N[:, None]
        count = int(self.strata_N.max()) + 1
        if count < 2:
            return common_N1
        own_NH = np.zeros((len(self.strata_N), count))
        own_NH[np.arange(len(self.strata_N)), self.strata_N] = np.sqrt(self.stratum) * self.slope_N
        return np.asarray(np.concatenate([common_N1, own_NH], axis=1))


def target(values_MN: Floats, rows_M: Floats, strata_N: Places) -> Target:
    """Return the target for a table without missing entries, by moments.

    The ability of a row in a stratum is the sum of its y - p there over the sum of slopes; ability is the variance of
    the weighted mean over strata and stratum that around it, both less what noise explains. Noise is what is left of
    the items' variance, and found together with them in three passes.
    """
    weight = float(rows_M.sum())
    share_M = rows_M / weight
    p_N = (rows_M @ values_MN + 1.0) / (weight + 2.0)
    full_N = p_N * (1.0 - p_N)
    # fractions vary less than right and wrong answers of the same mean; the prior is worth two rows
    spread_N = np.minimum(((rows_M @ (values_MN - p_N) ** 2) + 2.0 * full_N) / (weight + 2.0), full_N)
    slope_N = spread_N + LEAST_SLOPE
    strata_N = _largest(strata_N)
    member_NH = np.asarray(np.equal.outer(strata_N, np.arange(int(strata_N.max()) + 1))).astype(float)
    slope_H = slope_N @ member_NH
    share_H = slope_H / slope_H.sum()
    ability_MH = (values_MN - share_M @ values_MN) @ member_NH / slope_H
    mean_M = ability_MH @ share_H
    bias = weight / max(weight - 1.0, 1.0)
    noise_N, ability, stratum = spread_N, 0.0, 0.0
    for _ in range(3):
        noise_H = noise_N @ member_NH / slope_H**2
        ability = max(bias * float(share_M @ mean_M**2) - float(share_H**2 @ noise_H), LEAST_ABILITY)
        apart_H = bias * (share_M @ (ability_MH - mean_M[:, None]) ** 2) - noise_H * (1.0 - share_H)
        stratum = max(float(apart_H @ share_H), LEAST_STRATUM * ability) if len(share_H) > 1 else 0.0
        noise_N = np.maximum(spread_N - (ability + stratum) * slope_N**2, LEAST_NOISE_SHARE * spread_N + 0.005)
    return Target(slope_N, ability, stratum, noise_N, strata_N)


def shrunk(law: Lowrank, toward: Target, share: float) -> Lowrank:
    """Return the law with the covariance (1 - share) of the law's + share of the target's."""
    loading_Nq = np.concatenate([np.sqrt(1.0 - share) * law.loading_Nq, np.sqrt(share) * toward.loading_Nq], axis=1)
    return Lowrank(law.mean_N, loading_Nq, (1.0 - share) * law.noise_N + share * toward.noise_N)


def _largest(strata_N: Places) -> Places:
    """Return strata numbered from 0 without gaps; the smallest of more than `MOST_STRATA` become one."""
    _, place_N, count_H = np.unique(strata_N, return_inverse=True, return_counts=True)
    if len(count_H) <= MOST_STRATA:
        return np.asarray(place_N.ravel())
    rank_H = np.argsort(np.argsort(-count_H, kind="stable"), kind="stable")
    return np.asarray(np.minimum(rank_H, MOST_STRATA - 1)[place_N.ravel()])

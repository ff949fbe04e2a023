"""An unbiased audit: what a model of the responses predicts, corrected by random items that it has not seen.

Not a fitness: it keeps the noise of sampling, and with it poor ranks. It tells whether another estimator is biased.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evomerge.errors import ExperimentError
from evomerge.fitness.estimator import Choice, Estimate, Fit, checked, settled
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.fitness.sampling import Mean
from evomerge.value import value


@value
class Aipw:
    """Augmented inverse probability weighting (Robins 1994, JASA 89:846): predictions, corrected by random items.

    The n asked items of a score, drawn at random, are split in folds f. With R_f the items asked in the other folds and
    q_f(i) the prediction of item i from them, the score is estimated by

        value_f = (1/N) { sum_{i in R_f} y_i + sum_{i not in R_f} q_f(i) + (N - |R_f|) mean_{i in f} (y_i - q_f(i)) }

    which has the truth as its expectation, whatever the predictions, as f is a random sample of what R_f left. The
    value is the mean over folds, its error^2 = (1 - n/N) s^2 / n with the variance s^2 of the residuals
    y_i - q_f(i) around 0; two more, as large as the rows vary, are added, so that it never vanishes.
    The prediction is the conditional mean given R_f under normal responses, their covariance that of the rows, shrunk
    to its diagonal. Unbiased only for items drawn at random, as `choose` does.

    Attributes:
        folds: at most so many.
        shrinkage: of covariances between items, in (0, 1]; it matters for the error, not for the bias.
    """

    folds: int = 5
    shrinkage: float = 0.3

    def __post_init__(self) -> None:
        if self.folds < 2 or not 0.0 < self.shrinkage <= 1.0:
            raise ExperimentError(
                f"aipw: folds must be at least 2 and shrinkage in (0, 1], got {self.folds} and {self.shrinkage}"
            )

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit to the rows; without any it is a mean with larger error."""
        return _AipwFit(self, responses, seed)


class _Plan(NamedTuple):
    """What to do with the responses to one set of items, for one score: value = constant + y . weight."""

    constant: float
    weight_n: Floats
    residual_nn: Floats  # residuals = y @ residual_nn + offset_n
    offset_n: Floats
    own_n: Places
    open: float


class _AipwFit:
    """Predictions from the rows, and their correction."""

    warnings: tuple[str, ...] = ()
    reason: str = ""

    def __init__(self, settings: Aipw, responses: Responses, seed: int) -> None:
        """Keep the rows' mean and centred responses, missing ones at the mean."""
        self._settings = settings
        self._sample = Mean().fit(responses, seed)
        self._seed = seed
        self._targets_KN = responses.targets_KN
        self._share_N = responses.targets_KN.sum(axis=0)
        known_MN = np.isfinite(responses.values_MN) * responses.rows_M[:, None]
        weight_N = known_MN.sum(axis=0)
        self._mean_N = (np.where(known_MN > 0.0, responses.values_MN, 0.0) * known_MN).sum(axis=0) + 0.5
        self._mean_N /= weight_N + 1.0
        centred_MN = np.where(np.isfinite(responses.values_MN), responses.values_MN - self._mean_N, 0.0)
        self._centred_MN = centred_MN * np.sqrt(responses.rows_M / max(float(responses.rows_M.sum()), 1.0))[:, None]
        self._spread_N = (self._centred_MN**2).sum(axis=0) + 0.25 / (weight_N + 1.0)
        self._plans = lru_cache(maxsize=32)(self._make_plans)

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Draw at random."""
        return self._sample.choose(count, taken)

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return corrected predictions; see `Aipw`."""
        item_n, values_Cn = checked(items, values_Cn, len(self._mean_N))
        shape = (len(values_Cn), len(self._targets_KN))
        found = Estimate(np.empty(shape), np.empty(shape))
        for row, values_n in enumerate(values_Cn):
            answered_n = np.isfinite(values_n)
            plans = self._plans(tuple(item_n[answered_n].tolist()))
            for k, plan in enumerate(plans):
                found.value_CK[row, k], found.error_CK[row, k] = self._score(plan, values_n[answered_n])
        return settled(found, self._targets_KN, items, values_Cn)

    def _score(self, plan: _Plan, values_n: Floats) -> tuple[float, float]:
        own_n = values_n[plan.own_n]
        value = plan.constant + float((own_n * plan.weight_n).sum())
        added = 2.0 * float(self._spread_N.mean())
        residual_n = np.einsum("i,in->n", own_n, plan.residual_nn) + plan.offset_n
        n = len(own_n)
        if n == 0:
            return value, float(np.sqrt(added / 2.0))
        variance = (float((residual_n**2).sum()) + added) / (n + 2.0) * (n + 1.0) / n
        return value, float(np.sqrt(plan.open * variance / n))

    def _make_plans(self, answered: tuple[int, ...]) -> list[_Plan]:
        """Return the plans for these items, which are linear in the responses."""
        plans = []
        for k, target_N in enumerate(self._targets_KN):
            own = np.array([place for place, item in enumerate(answered) if target_N[item] > 0.0], dtype=np.intp)
            plans.append(self._plan(k, np.array(answered, dtype=np.intp)[own], own))
        return plans

    def _plan(self, k: int, items: Places, own_n: Places) -> _Plan:
        target_N, n = self._targets_KN[k], len(items)
        if n == 0:
            return _Plan(float((target_N * self._mean_N).sum()), np.zeros(0), np.zeros((0, 0)), np.zeros(0), own_n, 1.0)
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, 2, k, n]))
        fold_n = rng.permutation(n) % min(self._settings.folds, n)
        residual_nn, offset_n = np.eye(n), -self._mean_N[items]
        weight_n, constant = np.zeros(n), 0.0
        folds = int(fold_n.max()) + 1
        for fold in range(folds):
            inside, rest = np.flatnonzero(fold_n == fold), np.flatnonzero(fold_n != fold)
            gain_rN = self._gain(items[rest])  # q(i) = mean_i + (y_rest - mean_rest) . gain_ri
            residual_nn[np.ix_(rest, inside)] = -gain_rN[:, items[inside]]
            offset_n[inside] += self._mean_N[items[rest]] @ gain_rN[:, items[inside]]
            left_N = target_N.copy()
            left_N[items[rest]] = 0.0
            share_r = gain_rN @ left_N
            weight_n[rest] += target_N[items[rest]] + share_r
            constant += float((left_N * self._mean_N).sum() - (self._mean_N[items[rest]] * share_r).sum())
            # of what is left, the fold is a random sample: each of its items by its share, over how often it is drawn
            part_i = target_N[items[inside]] / self._share_N[items[inside]]
            part_i *= left_N.sum() / part_i.sum()
            weight_n += residual_nn[:, inside] @ part_i
            constant += float((offset_n[inside] * part_i).sum())
        open_ = 1.0 - n / float((target_N > 0.0).sum())
        return _Plan(constant / folds, weight_n / folds, residual_nn, offset_n, own_n, open_)

    def _gain(self, items: Places) -> Floats:
        """Return the coefficients [r, N] of predicting every item from the deviations of these from their means."""
        own_Mr = self._centred_MN[:, items]
        keep = 1.0 - self._settings.shrinkage
        covariance_rr = keep * (own_Mr.T @ own_Mr)
        covariance_rr[np.diag_indices(len(items))] = self._spread_N[items] + 1e-9
        return np.asarray(np.linalg.solve(covariance_rr, keep * (own_Mr.T @ self._centred_MN)))

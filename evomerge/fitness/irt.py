"""The two-parameter logistic response model: how probable is it that a candidate of some ability answers an item.

    p_j(theta) = 1 / (1 + exp(-(a_j theta - b_j)))

theta is the ability of a candidate, a_j the slope (discrimination) and b_j the difficulty of item j; a larger b is
harder. This is the sign and scale convention of Polo 2024 (tinyBenchmarks, arXiv 2402.14992) in one dimension.
Shapes: M rows (candidates), N items, Q points of ability, n items seen.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]

#: Points of ability in the fit, where abilities are standard normal by definition.
_FIT_GRID_Q: Floats = np.linspace(-5.0, 5.0, 61)
#: Points of ability for a candidate, which may be far from the rows of the fit. Sums over them are exact to rounding as
#: long as the posterior deviation is above .1, half of what 40 items can tell.
_ABILITY_GRID_Q: Floats = np.linspace(-15.0, 15.0, 301)
#: Standard deviation of the prior of a candidate's ability. The rows of the fit have mean 0 and standard deviation 1,
#: but a search leaves them behind: a frontier three to six of their standard deviations away is ordinary. A prior three
#: times as wide pulls an ability that is known up to .4 by 2 % only, and still keeps all right and all wrong finite.
ABILITY_SPREAD = 3.0
#: Bounds of the empirical prior's standard deviations: below, items of few rows lose their differences;
#: above, an item that all rows answer alike runs away.
_SLOPE_SPREAD = (0.2, 1.0)
_DIFFICULTY_SPREAD = (0.5, 3.0)
#: A Newton step is cut to this length: far from its maximum the logistic curve is flat and a full step overshoots.
_LONGEST_STEP = 1.0


def product(formula: str, left: Floats, right: Floats) -> Floats:
    """Return a matrix product, as `numpy.einsum` writes it.

    Not `@`: its bits depend on the number of threads of the BLAS library, and with them which items are chosen; and on
    a machine that is busy with candidates its threads wait for each other, which took twenty times longer.
    """
    return np.asarray(np.einsum(formula, left, right, optimize=False))


class Items(NamedTuple):
    """What is known of each item: `slope` a[N] and `difficulty` b[N]."""

    slope: Floats
    difficulty: Floats


class _Prior(NamedTuple):
    """Normal priors of slopes and difficulties, estimated from the items themselves."""

    slope: float
    slope_spread: float
    difficulty: float
    difficulty_spread: float


def logits(items: Items, theta: Floats) -> Floats:
    """Return a_j theta_q - b_j as an array [Q, N]."""
    return np.outer(theta, items.slope) - items.difficulty


def probabilities(items: Items, theta: Floats) -> Floats:
    """Return p_j(theta_q) as an array [Q, N]."""
    return np.asarray(expit(logits(items, theta)))


def log_prior(theta: Floats, spread: float) -> Floats:
    """Return the log density, up to a constant, of abilities under a normal law around 0."""
    return -0.5 * (theta / spread) ** 2


def posterior(items: Items, responses: Floats, theta: Floats, spread: float) -> Floats:
    """Return the probability [M, Q] of each point of ability, given responses [M, N] in [0, 1] (NaN: not asked).

    A fractional response counts as that share of a right answer (quasi-likelihood). The prior is normal around 0 with
    standard deviation `spread`; `theta` must be evenly spaced.
    """
    asked_MN = np.isfinite(responses)
    logit_QN = logits(items, theta)
    right_MN = np.where(asked_MN, responses, 0.0)
    log_MQ = product("mn,qn->mq", right_MN, logit_QN) + log_prior(theta, spread)
    log_MQ -= product("mn,qn->mq", asked_MN.astype(float), np.logaddexp(0.0, logit_QN))
    weight_MQ = np.exp(log_MQ - log_MQ.max(axis=1, keepdims=True))
    return np.asarray(weight_MQ / weight_MQ.sum(axis=1, keepdims=True))


def ability(items: Items, responses: Floats, theta: Floats, spread: float) -> tuple[Floats, Floats]:
    """Return mean [M] and standard deviation [M] of the posterior ability."""
    weight_MQ = posterior(items, responses, theta, spread)
    mean_M = product("mq,q->m", weight_MQ, theta)
    return mean_M, np.sqrt(np.maximum(product("mq,q->m", weight_MQ, theta**2) - mean_M**2, 0.0))


def fit(responses: Floats, *, sweeps: int = 100, tolerance: float = 1e-2) -> Items:
    """Fit the items to responses [M, N] in [0, 1] (NaN: not asked) by marginal maximum a posteriori.

    Expectation-maximisation with quadrature over ability (Bock 1981, Psychometrika 46, section 2): abilities of the
    rows are standard normal, which fixes the scale of theta. So that 20 to 40 rows suffice, slopes and difficulties
    have normal priors whose means and spreads are estimated along (empirical Bayes); with them the maximisation is one
    concave logistic regression per item. Deterministic.

    Args:
        responses: rows of candidates, columns of items.
        sweeps: at most so many.
        tolerance: stop when no parameter moves further in a sweep.

    Raises:
        ValueError: if fewer than two rows, no item, or a response outside [0, 1] is given.
    """
    responses = _checked(responses)
    asked_MN = np.isfinite(responses).astype(float)
    right_MN = np.where(np.isfinite(responses), responses, 0.0)
    share_N = (right_MN.sum(axis=0) + 1.0) / (asked_MN.sum(axis=0) + 2.0)
    items = Items(np.ones(responses.shape[1]), -np.log(share_N / (1.0 - share_N)))
    prior = _Prior(1.0, 0.5, float(items.difficulty.mean()), 2.0)  # only where the sweeps begin
    for _ in range(sweeps):
        weight_MQ = posterior(items, responses, _FIT_GRID_Q, 1.0)
        asked_QN, right_QN = (product("mq,mn->qn", weight_MQ, known_MN) for known_MN in (asked_MN, right_MN))
        found, variance = _maximise(items, prior, asked_QN, right_QN)
        moved = max(np.abs(found.slope - items.slope).max(), np.abs(found.difficulty - items.difficulty).max())
        items, prior = found, _learn_prior(found, variance)
        if moved < tolerance:
            break
    return items


def _checked(responses: Floats) -> Floats:
    responses = np.asarray(responses, dtype=np.float64)
    if responses.ndim != 2 or responses.shape[0] < 2 or responses.shape[1] < 1:
        raise ValueError(f"an item fit needs at least 2 rows and 1 item, got an array of shape {responses.shape}")
    known = responses[~np.isnan(responses)]
    if known.size == 0 or known.min() < 0.0 or known.max() > 1.0:
        raise ValueError("responses must lie in [0, 1] (NaN where not asked), and some must be given")
    return responses


def _maximise(items: Items, prior: _Prior, asked_QN: Floats, right_QN: Floats) -> tuple[Items, Items]:
    """Take two Newton steps on each item's expected log posterior; return the items and their variances (Laplace)."""
    theta_Q = _FIT_GRID_Q
    slope_N, difficulty_N = items
    for _ in range(2):
        p_QN = probabilities(Items(slope_N, difficulty_N), theta_Q)
        residual_QN = right_QN - asked_QN * p_QN
        curvature_QN = asked_QN * p_QN * (1.0 - p_QN)
        gradient_a = product("q,qn->n", theta_Q, residual_QN) - (slope_N - prior.slope) / prior.slope_spread**2
        gradient_b = -residual_QN.sum(axis=0) - (difficulty_N - prior.difficulty) / prior.difficulty_spread**2
        h_aa = product("q,qn->n", theta_Q**2, curvature_QN) + prior.slope_spread**-2
        h_bb = curvature_QN.sum(axis=0) + prior.difficulty_spread**-2
        h_ab = -product("q,qn->n", theta_Q, curvature_QN)
        determinant = h_aa * h_bb - h_ab**2
        step_a = (h_bb * gradient_a - h_ab * gradient_b) / determinant
        step_b = (h_aa * gradient_b - h_ab * gradient_a) / determinant
        cut = np.minimum(1.0, _LONGEST_STEP / np.maximum(np.hypot(step_a, step_b), 1e-12))
        slope_N, difficulty_N = slope_N + cut * step_a, difficulty_N + cut * step_b
    return Items(slope_N, difficulty_N), Items(h_bb / determinant, h_aa / determinant)


def _learn_prior(items: Items, variance: Items) -> _Prior:
    """Return the prior that the items suggest: mean, and spread of estimates plus their own uncertainty."""

    def law(value_N: Floats, variance_N: Floats, bounds: tuple[float, float]) -> tuple[float, float]:
        mean = float(value_N.mean())
        return mean, float(np.clip(np.sqrt(np.mean((value_N - mean) ** 2 + variance_N)), *bounds))

    slope, slope_spread = law(items.slope, variance.slope, _SLOPE_SPREAD)
    return _Prior(max(slope, 0.1), slope_spread, *law(items.difficulty, variance.difficulty, _DIFFICULTY_SPREAD))


class Forecast:
    """Predicts a candidate's mean response on all N items from those on a few.

    value = { sum_seen y + E_theta[sum_unseen p(theta)] } / N     (p-IRT: Polo 2024, arXiv 2402.14992, equation 4)
    variance = { Var_theta[sum_unseen p] + E_theta[sum_unseen p (1 - p)] } / N^2     (law of total variance)

    theta has its posterior given the seen responses under the broad prior of `ABILITY_SPREAD`, where the paper has its
    maximum-likelihood point, which does not exist when all seen responses are right or all are wrong.
    """

    def __init__(self, items: Items) -> None:
        """Tabulate the items over ability."""
        p_QN = probabilities(items, _ABILITY_GRID_Q)
        self._items = items
        self._right_Q = p_QN.sum(axis=1)
        self._noise_Q = (p_QN * (1.0 - p_QN)).sum(axis=1)

    def __call__(self, seen_n: NDArray[np.intp], response_n: Floats) -> tuple[float, float]:
        """Return value and variance, given distinct indices of items and their responses in [0, 1]."""
        seen = Items(self._items.slope[seen_n], self._items.difficulty[seen_n])
        weight_Q = posterior(seen, response_n[None, :], _ABILITY_GRID_Q, ABILITY_SPREAD)[0]
        p_Qn = probabilities(seen, _ABILITY_GRID_Q)
        unseen_Q = self._right_Q - p_Qn.sum(axis=1)
        noise_Q = np.maximum(self._noise_Q - (p_Qn * (1.0 - p_Qn)).sum(axis=1), 0.0)
        mean = float((weight_Q * unseen_Q).sum())
        variance = float((weight_Q * ((unseen_Q - mean) ** 2 + noise_Q)).sum())
        total = len(self._items.slope)
        return float(np.clip((response_n.sum() + mean) / total, 0.0, 1.0)), variance / total**2

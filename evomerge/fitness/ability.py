"""The ability of a new model from its responses to a few items: posterior, maximum likelihood, a mix of the sources'.

Legend of shapes, besides `evomerge.fitness.responses` and `evomerge.fitness.irt`: P coefficients of a logistic
regression, J sources, Q points of ability.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from evomerge.fitness.irt import Items, applied, curvature, extended, halved, inverse, outer, slope, unpacked
from evomerge.fitness.responses import Floats

#: Logits are cut here in the published code, so that a response is never impossible.
_CLIP = 30.0
#: A Newton step is cut to this length: where the logistic curve is flat a full step overshoots.
_LONGEST_STEP = 1.0
#: The published search (BFGS of scipy) stops at this gradient; responses that are separable have no maximum, and where
#: the search stops is all that defines an answer for them.
_GRADIENT = 1e-5
#: Added to the information so that it can be inverted when there are fewer items than dimensions.
_RIDGE = 1e-6
#: The law of merged abilities where there are no rows to learn it from, see `Mixing`. In a simulation with 10 to 50
#: items and 2 to 4 sources such a strength about halved the error of maximum likelihood at 10 items.
STRENGTH, OUTSIDE = 2.0, 0.25
#: What is tried where there are.
_TOTALS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
_STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_OUTSIDES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
#: Newton's method needs at most so many steps, also to the edge of separable responses.
_STEPS = 40


class Abilities(NamedTuple):
    """Abilities of C models: means [C, D] and covariances [C, D, D]."""

    mean_CD: Floats
    covariance_CDD: Floats


class Prior(NamedTuple):
    """A normal law of an ability."""

    mean_D: Floats
    covariance_DD: Floats


class Coefficients(NamedTuple):
    """Coefficients of C logistic regressions: estimates [C, P] and covariances [C, P, P]."""

    mean_CP: Floats
    covariance_CPP: Floats


def posterior(
    items: Items, values_Cn: Floats, prior: Prior | None = None, *, sweeps: int = 60, tolerance: float = 1e-4
) -> Abilities:
    """Return normal posteriors of abilities, variational with the bound of `evomerge.fitness.irt.curvature`.

    What is not known of the items is averaged over. Under the prior N(m, V), with sums over the asked items,

        precision = V^-1 + 2 sum lambda_i E[a a'],
        mean = precision^-1 {V^-1 m + sum (y_i - 1/2) E[a] + 2 sum lambda_i E[a b]};

    the covariance returned has the expected p_i (1 - p_i) for 2 lambda_i, see `evomerge.fitness.irt.slope`.

    Args:
        items: those that were asked.
        values_Cn: the responses; NaN where one is missing.
        prior: of the abilities; None: that of the fitted rows, N(0, I) (empirical Bayes).
        sweeps: at most so many.
        tolerance: stop when no ability moved further.
    """
    rows, D = len(values_Cn), items.dimensions
    prior = Prior(np.zeros(D), np.eye(D)) if prior is None else prior
    precision_DD = inverse(prior.covariance_DD)
    asked_Cn = np.isfinite(values_Cn).astype(np.float64)
    pull_CD = np.where(asked_Cn > 0.0, values_Cn - 0.5, 0.0) @ items.slopes_ND + precision_DD @ prior.mean_D
    plain_nF = halved(items.second_NF)
    mean_CD, covariance_CDD = np.tile(prior.mean_D, (rows, 1)), np.tile(prior.covariance_DD, (rows, 1, 1))
    for _ in range(sweeps):
        curve_Cn = asked_Cn * curvature(extended(mean_CD, covariance_CDD) @ items.second_NF.T)
        data_CEE = unpacked(curve_Cn @ plain_nF)
        covariance_CDD = inverse(precision_DD + 2.0 * data_CEE[:, :D, :D])
        before_CD = mean_CD
        mean_CD = applied(covariance_CDD, pull_CD + 2.0 * data_CEE[:, :D, D])
        if np.abs(mean_CD - before_CD).max(initial=0.0) < tolerance:
            break
    logit_Cn = items.logits(mean_CD)
    square_Cn = extended(mean_CD, covariance_CDD) @ items.second_NF.T
    slope_Cn = asked_Cn * slope(logit_Cn, np.maximum(square_Cn - logit_Cn**2, 0.0))
    told_CEE = unpacked(slope_Cn @ plain_nF)
    return Abilities(mean_CD, inverse(precision_DD + told_CEE[:, :D, :D]))


def maximum_likelihood(items: Items, values_Cn: Floats) -> Abilities:
    """Return abilities as published: argmax of the likelihood, no prior, from 0 (Polo 2024, section 3.1).

    Where all responses are right, or otherwise separable, there is no maximum; the ability is then where the gradient
    falls below the published search's limit, and its covariance is very large. Items are taken as known.
    """
    return Abilities(*logistic(items.slopes_ND, items.parameters_NE[:, -1], values_Cn))


class _Regression(NamedTuple):
    """Logistic regressions with common features: logit_i = x_i . c - b_i."""

    features_nP: Floats
    offset_n: Floats
    asked_Cn: Floats
    right_Cn: Floats

    def logits(self, found_CP: Floats) -> Floats:
        """Return the logits, cut as published."""
        return np.asarray(np.clip(found_CP @ self.features_nP.T - self.offset_n, -_CLIP, _CLIP))

    def objective(self, found_CP: Floats) -> Floats:
        """Return the log-likelihoods [C]."""
        logit_Cn = self.logits(found_CP)
        return np.asarray((self.right_Cn * logit_Cn - self.asked_Cn * np.logaddexp(0.0, logit_Cn)).sum(axis=1))

    def derivatives(self, found_CP: Floats) -> tuple[Floats, Floats]:
        """Return the first derivatives [C, P] and the negative second ones [C, P, P], made invertible."""
        p_Cn = self.asked_Cn * expit(self.logits(found_CP))
        count, width = self.features_nP.shape
        data_CS = (p_Cn * (1.0 - p_Cn)) @ outer(self.features_nP).reshape(count, width * width)
        information_CPP = data_CS.reshape(len(found_CP), width, width) + _RIDGE * np.eye(width)
        return (self.right_Cn - p_Cn) @ self.features_nP, information_CPP

    def uphill(self, found_CP: Floats, step_CP: Floats) -> Floats:
        """Return the steps, halved while they lead down."""
        level_C = self.objective(found_CP) - 1e-9
        for _ in range(20):
            down_C = self.objective(found_CP + step_CP) < level_C
            if not down_C.any():
                break
            step_CP = np.where(down_C[:, None], 0.5 * step_CP, step_CP)
        return step_CP


def logistic(
    features_nP: Floats, offset_n: Floats, values_Cn: Floats, start_P: Floats | None = None
) -> Coefficients:
    """Return coefficients c that maximise sum_i log Bernoulli(y_i; sigmoid(x_i . c - b_i)).

    Newton's method for all regressions at once, its steps cut to length 1 and halved while they lead down; the
    covariance is the inverse of the negative second derivative.

    Args:
        features_nP: x, one row an item.
        offset_n: b.
        values_Cn: y in [0, 1], NaN where missing.
        start_P: where the search begins; 0 where None.
    """
    asked_Cn = np.isfinite(values_Cn)
    regression = _Regression(features_nP, offset_n, asked_Cn.astype(np.float64), np.where(asked_Cn, values_Cn, 0.0))
    found_CP = np.tile(np.zeros(features_nP.shape[1]) if start_P is None else start_P, (len(values_Cn), 1))
    for _ in range(_STEPS):
        gradient_CP, information_CPP = regression.derivatives(found_CP)
        moving_C = np.abs(gradient_CP).max(axis=1) > _GRADIENT
        if not moving_C.any():
            break
        step_CP = applied(inverse(information_CPP), gradient_CP)
        length_C = np.where(moving_C, np.linalg.norm(step_CP, axis=1), np.inf)
        cut_C = np.minimum(1.0, _LONGEST_STEP / np.maximum(length_C, 1e-12))
        found_CP = found_CP + regression.uphill(found_CP, step_CP * cut_C[:, None])
    return Coefficients(found_CP, inverse(regression.derivatives(found_CP)[1]))


def combination(items: Items, sources_JD: Floats, values_Cn: Floats) -> Coefficients:
    """Return the coefficients lambda of theta = sum_j lambda_j theta_j as published (Minut 2025, MERGE3, section 3.2).

    Maximum likelihood from 1 / J each: a logistic regression on the features a_i . theta_j with the offset -b_i. With
    10 items most such responses are separable, and the result is no better than their plain mean.

    Args:
        items: those that were asked.
        sources_JD: abilities of the sources.
        values_Cn: the responses, NaN where missing.
    """
    even_J = np.full(len(sources_JD), 1.0 / len(sources_JD))
    return logistic(items.slopes_ND @ sources_JD.T, items.parameters_NE[:, -1], values_Cn, even_J)


def combined(coefficients: Coefficients, sources_JD: Floats) -> Abilities:
    """Return the abilities that coefficients of the sources stand for."""
    mean_CD = coefficients.mean_CP @ sources_JD
    return Abilities(mean_CD, sources_JD.T @ coefficients.covariance_CPP @ sources_JD)


def published_mix(sources_JD: Floats, items: Items, values_Cn: Floats) -> Abilities:
    """Return the abilities of the mix of sources that `combination` finds."""
    return combined(combination(items, sources_JD, values_Cn), sources_JD)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixing:
    """The law of a merged ability: theta = sum_j lambda_j theta_j + r, a mix of the sources' that may leave their span.

    lambda_j ~ N(l/J, 1/s) and r ~ N(0, o I), so that theta ~ N(l mean_j theta_j, sum_j theta_j theta_j' / s + o I).

    Attributes:
        sources_JD: abilities of the sources.
        total: l, what the coefficients are expected to add up to.
        strength: s, the precision of the coefficients.
        outside: o, the variance of what no mix of the sources explains.
    """

    sources_JD: Floats
    total: float
    strength: float
    outside: float

    @property
    def prior(self) -> Prior:
        """The law of theta."""
        inside_DD = self.sources_JD.T @ self.sources_JD / self.strength
        return Prior(self.total * self.sources_JD.mean(axis=0), inside_DD + self.outside * np.eye(inside_DD.shape[0]))

    def coefficients(self, found: Abilities) -> Coefficients:
        """Return posteriors of lambda, given posteriors of theta under `prior` (conditioning of normal laws)."""
        prior = self.prior
        gain_JD = self.sources_JD @ inverse(prior.covariance_DD) / self.strength
        J = len(self.sources_JD)
        rest_JJ = (np.eye(J) - gain_JD @ self.sources_JD.T) / self.strength
        mean_CJ = self.total / J + (found.mean_CD - prior.mean_D) @ gain_JD.T
        return Coefficients(mean_CJ, rest_JJ + gain_JD @ found.covariance_CDD @ gain_JD.T)


def learned_mixing(sources_JD: Floats, rows: Abilities) -> Mixing:
    """Return the law of merged abilities under which evaluated rows are most likely; a stated one without rows.

    A row's posterior N(c, C) under N(0, I) gives its likelihood as normal, with information H = C^-1 - I. With the
    prior N(m, V) of `Mixing` and r = C^-1 c + V^-1 m, the log marginal likelihood is, but for a constant,

        {r' (H + V^-1)^-1 r - m' V^-1 m - log |V| - log |H + V^-1|} / 2.

    Args:
        sources_JD: abilities of the sources.
        rows: posteriors of the abilities of rows that are not sources, from all their items.
    """
    if not len(rows.mean_CD):
        return Mixing(sources_JD=sources_JD, total=1.0, strength=STRENGTH, outside=OUTSIDE)
    sharp_MDD = inverse(rows.covariance_CDD)
    pull_MD = applied(sharp_MDD, rows.mean_CD)
    information_MDD = sharp_MDD - np.eye(sources_JD.shape[1])

    def evidence(mixing: Mixing) -> float:
        mean_D, covariance_DD = mixing.prior
        precision_DD = inverse(covariance_DD)
        both_MDD, both_MD = information_MDD + precision_DD, pull_MD + precision_DD @ mean_D
        won_M = (both_MD * applied(inverse(both_MDD), both_MD)).sum(axis=1)
        lost = mean_D @ precision_DD @ mean_D + np.linalg.slogdet(covariance_DD)[1]
        return float((won_M - lost - np.linalg.slogdet(both_MDD)[1]).sum())

    tried = itertools.product(_TOTALS, _STRENGTHS, _OUTSIDES)
    return max((Mixing(sources_JD=sources_JD, total=t, strength=s, outside=o) for t, s, o in tried), key=evidence)

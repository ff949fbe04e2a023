"""Estimators of scores from a response model of the rows: p-IRT and gp-IRT, mp-IRT and gmp-IRT.

`PIrt` adds the answers seen and the probabilities of those unseen; `MpIrt` does with an ability that is a mix of the
sources'; `GpIrt` and `GmpIrt` mix these forecasts with the anchors' weighted mean.
Legend of shapes: see `evomerge.fitness.responses`, `evomerge.fitness.irt` and `evomerge.fitness.ability`.
"""

# ruff: noqa: N802, N815  what holds or returns an array is named with its shape in capitals

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Self

import numpy as np

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.ability import (
    Abilities,
    learned_mixing,
    maximum_likelihood,
    posterior,
    published_mix,
)
from evomerge.fitness.anchors import EMBEDDINGS, anchors, embedding, nearest_shares
from evomerge.fitness.design import design
from evomerge.fitness.estimator import Choice, Estimate, Fit, checked, settled
from evomerge.fitness.irt import fit
from evomerge.fitness.prediction import Prediction, odd_error, patterns
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.value import value

#: How an ability is found: by empirical Bayes, or by maximum likelihood as published.
ABILITIES = ("eb", "ml")
#: The dimensions among which the published recipe chooses, how many rows it holds out, and what is near the best.
PUBLISHED_DIMENSIONS = (2, 5, 10)
_HELD_OUT_EVERY = 5
_NEAR_BEST = 0.0025
#: Fewer rows than this fit items poorly (the authors of tinyBenchmarks speak of 15 for a new benchmark).
ENOUGH_ROWS = 20
#: The error of a model of the responses where there is no row to measure it on.
_UNKNOWN_BIAS = 0.05
#: The published weight of the anchors in gmp-IRT, in the code of the authors.
_PUBLISHED_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What an estimator is made of, besides its settings."""

    name: str
    sources: bool = False
    mixed: bool = False


@value
class _Settings:
    """What the four estimators have in common.

    Attributes:
        ability: "eb", posteriors by empirical Bayes, or "ml", maximum likelihood as published.
        dimensions: of ability. None: 2, from 35 rows 4, from 90 rows 8; for "ml" chosen as published.
        anchors: how items are chosen: "correctness" or "irt", the centres of clusters in these terms; None: those that
            tell most of the scores (`evomerge.fitness.design`).
    """

    _plan: ClassVar[_Plan]

    ability: str = "eb"
    dimensions: int | None = None
    anchors: str | None = None

    def __post_init__(self) -> None:
        if self.ability not in ABILITIES:
            raise ExperimentError(f"ability: unknown {self.ability!r}; {nearest(self.ability, ABILITIES)}")
        if self.anchors is not None and self.anchors not in EMBEDDINGS:
            raise ExperimentError(f"anchors: unknown {self.anchors!r}; {nearest(self.anchors, EMBEDDINGS)}")
        if self.dimensions is not None and self.dimensions < 1:
            raise ExperimentError(f"dimensions: an ability has at least 1, got {self.dimensions}")

    @classmethod
    def as_published(cls) -> Self:
        """Return the settings of the papers: maximum likelihood, items clustered by their fitted parameters."""
        return cls(ability="ml", anchors="irt")

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit.

        Raises:
            ExperimentError: if there is no response, responses have no bounds, or a mix of sources is wanted and no row
                is known as a source's.
        """
        return _fitted(self, responses, seed)


@value
class PIrt(_Settings):
    """p-IRT: the answers seen, and the probabilities of those unseen (Polo 2024, arXiv 2402.14992, section 3.3).

    See `evomerge.fitness.prediction.Prediction` for the formula, and `_Settings` for the settings.
    """

    _plan: ClassVar[_Plan] = _Plan(name="p_irt")


@value
class GpIrt(_Settings):
    """gp-IRT: the anchors' mean and p-IRT, each as much as it can be trusted (Polo 2024, section 3.3).

        value_k = l_k sum_seen w_ki y_i + (1 - l_k) p-IRT_k,    l_k = b_k^2 / (v_k + b_k^2),    v_k = s_k^2 / (4 n)

    w_ki is the share of the items that are nearest to anchor i, s_k^2 the variance of a row's responses over the items,
    averaged over rows, and b_k the mean error that the model makes for rows held out, of whose items half are seen.
    The error is the root of l^2 v (1 - n/N) + (1 - l)^2 error_p^2.
    """

    anchors: str = "correctness"

    _plan: ClassVar[_Plan] = _Plan(name="gp_irt", mixed=True)


@value
class MpIrt(_Settings):
    """mp-IRT: p-IRT with theta = sum_j lambda_j theta_j (Minut 2025, MERGE3, arXiv 2502.10436, section 3.2).

    theta_j are the abilities of the sources, known from all their items. "ml" finds lambda as published; "eb" has the
    prior `evomerge.fitness.ability.Mixing`, of the strength that makes the evaluated rows most likely.
    """

    _plan: ClassVar[_Plan] = _Plan(name="mp_irt", sources=True)


@value
class GmpIrt(_Settings):
    """gmp-IRT: the anchors' mean and mp-IRT (Minut 2025, section 3.2).

    As for `GpIrt`; with "ml" the anchors' weight is 1/2 always, as in the published code.
    """

    anchors: str = "correctness"

    _plan: ClassVar[_Plan] = _Plan(name="gmp_irt", sources=True, mixed=True)


def anchor_weight(variance_K: Floats, bias_K: Floats, asked_K: Floats) -> Floats:
    """Return l = b^2 / (v + b^2) with v = s^2 / (4 n): which l makes l^2 v + (1 - l)^2 b^2 least; 0 where n is 0."""
    sampling_K = variance_K / (4.0 * np.maximum(asked_K, 1.0))
    total_K = np.maximum(sampling_K + bias_K**2, 1e-300)
    return np.where(asked_K > 0.0, bias_K**2, 0.0) / total_K


def choose_dimensions(responses: Responses) -> tuple[int, Floats]:
    """Return the dimensions that the published recipe chooses, and the error [K] that was measured with them.

    The fewest among `PUBLISHED_DIMENSIONS` whose error is within .0025 of the best (Polo 2024, appendix); see
    `held_out_error`. More than there are rows are not tried.
    """
    tried = [D for D in PUBLISHED_DIMENSIONS if len(responses.rows_M) > D] or [1]
    found = [(D, held_out_error(PIrt(ability="ml"), responses, D)) for D in tried]
    best = min(float(error_K.mean()) for _, error_K in found)
    return next(each for each in found if float(each[1].mean()) <= best + _NEAR_BEST)


def held_out_error(settings: _Settings, responses: Responses, dimensions: int) -> Floats:
    """Return the mean error [K] of the model on the odd items of every fifth row, from their even items.

    The other rows fit the model, sources among them always where the ability is a mix of theirs. A score with no odd
    item has the mean error of the others; without any row to measure on all have `_UNKNOWN_BIAS`.
    """
    rows = np.arange(len(responses.rows_M))
    others = np.setdiff1d(rows, responses.sources) if settings._plan.sources else rows
    held = others[::_HELD_OUT_EVERY]
    kept = np.setdiff1d(rows, held)
    error_K = np.full(len(responses.targets_KN), np.nan)
    if len(held) and np.isfinite(responses.values_MN[kept]).any():
        prediction = _predicting(settings, responses.only(kept), dimensions)
        error_K = odd_error(prediction, responses.targets_KN, responses.values_MN[held])
    measured = np.isfinite(error_K)
    return np.where(measured, error_K, error_K[measured].mean() if measured.any() else _UNKNOWN_BIAS)


def _predicting(settings: _Settings, responses: Responses, dimensions: int) -> Prediction:
    """Fit a model, and return it with the way to find abilities that the settings say."""
    model = fit(responses.values_MN, responses.rows_M, dimensions=dimensions)
    plain = settings.ability == "ml"
    if not settings._plan.sources:
        return Prediction(model=model, ability=maximum_likelihood if plain else posterior, plain=plain)
    places = list(responses.sources)
    if plain:
        sources_JD = maximum_likelihood(model.items, responses.values_MN[places]).mean_CD
        return Prediction(model=model, ability=partial(published_mix, sources_JD), plain=True)
    others = np.setdiff1d(np.arange(len(responses.rows_M)), places)
    rows = Abilities(model.abilities_MD[others], model.covariance_MDD[others])
    prior = learned_mixing(model.abilities_MD[places], rows).prior
    return Prediction(model=model, ability=partial(posterior, prior=prior), plain=False)


def _fitted(settings: _Settings, responses: Responses, seed: int) -> "_Fit":
    """Return the fit, having checked that there can be one."""
    plan = settings._plan
    if not responses.bounded or not np.isfinite(responses.values_MN).any():
        raise ExperimentError(f"{plan.name}: needs rows of responses in [0, 1], got none; use 'mean' instead")
    if plan.sources and not responses.sources:
        raise ExperimentError(f"{plan.name}: no row is known as a source's; score the sources, or use 'gp_irt'")
    dimensions, bias_K = settings.dimensions, None
    if dimensions is None and settings.ability == "ml":
        dimensions, bias_K = choose_dimensions(responses)
    elif dimensions is None:
        dimensions = usual_dimensions(int((responses.rows_M > 0.0).sum()))
    fixed = _PUBLISHED_WEIGHT if plan.sources and settings.ability == "ml" else None
    if plan.mixed and fixed is None and bias_K is None:
        bias_K = held_out_error(settings, responses, dimensions)
    return _Fit(
        responses=responses,
        prediction=_predicting(settings, responses, dimensions),
        name=plan.name,
        seed=seed,
        clusters=settings.anchors,
        mixed=plan.mixed,
        bias_K=np.full(len(responses.targets_KN), _UNKNOWN_BIAS) if bias_K is None else bias_K,
        fixed_weight=fixed,
    )


def usual_dimensions(rows: int) -> int:
    """Return how many dimensions of ability so many rows bear."""
    return 8 if rows >= 90 else 4 if rows >= 35 else 2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
    """A fitted estimator of this module.

    Attributes:
        responses: what was fitted.
        prediction: the model.
        name: of the estimator.
        seed: of the choice of items.
        clusters: how items are chosen, see `PIrt.anchors`.
        mixed: whether the anchors' mean counts.
        bias_K: measured error of the forecast.
        fixed_weight: of the anchors' mean; None: by formula.
    """

    responses: Responses
    prediction: Prediction
    name: str
    seed: int
    clusters: str | None
    mixed: bool
    bias_K: Floats
    fixed_weight: float | None
    _shares: dict[bytes, Floats] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The dimensions and what they are fitted to."""
        dimensions = self.prediction.model.items.dimensions
        return f"{self.name}: abilities of {dimensions} dimensions, fitted to {self._rows} rows"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says when there are too few rows."""
        if self._rows >= ENOUGH_ROWS:
            return ()
        return (f"{self.name}: fitted to {self._rows} rows; below {ENOUGH_ROWS} its item parameters are mostly chance",)

    @property
    def _rows(self) -> int:
        return int((self.responses.rows_M > 0.0).sum())

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Return items to ask; see `evomerge.fitness.estimator.Fit.choose`."""
        targets_KN = self.responses.targets_KN
        if self.clusters is None:
            items = design(self.prediction.model.items, targets_KN, count, taken, self.seed)
            choice = Choice(items, (1.0 / max(len(items), 1),) * len(items))
        else:
            choice = anchors(self._features_NF, targets_KN.mean(axis=0), count, taken, self.seed)
        # what all candidates' estimates have in common is made now, so that the first is as quick as the others
        self.estimate(choice.items, np.zeros((1, len(choice.items))))
        return choice

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return scores and raw errors; see `evomerge.fitness.estimator.Fit.estimate`. Margins are not used."""
        targets_KN = self.responses.targets_KN
        item_n, values_Cn = checked(items, values_Cn, targets_KN.shape[1])
        order_n = np.argsort(item_n)  # the nearest of equally near anchors must not hang on the order of the questions
        item_n, values_Cn = item_n[order_n], values_Cn[:, order_n]
        value_CK = np.zeros((len(values_Cn), len(targets_KN)))
        error_CK = np.zeros_like(value_CK)
        for rows, known in patterns(values_Cn):
            found = self.prediction(targets_KN, item_n[known], values_Cn[np.ix_(rows, known)])
            if self.mixed:
                found = self._mixed(found, item_n[known], values_Cn[np.ix_(rows, known)])
            value_CK[rows], error_CK[rows] = found
        return settled(Estimate(value_CK, error_CK), targets_KN, item_n.tolist(), values_Cn)

    def _mixed(self, found: Estimate, items: Places, values_Cn: Floats) -> Estimate:
        """Return the mix of the anchors' mean and the forecast."""
        targets_KN = self.responses.targets_KN
        asked_K = (targets_KN[:, items] > 0.0).sum(axis=1).astype(np.float64)
        total_K = (targets_KN > 0.0).sum(axis=1)
        level_K = anchor_weight(self._variance_K, self.bias_K, asked_K)
        if self.fixed_weight is not None:
            level_K = np.where(asked_K > 0.0, self.fixed_weight, 0.0)
        sampling_K = self._variance_K / (4.0 * np.maximum(asked_K, 1.0)) * (1.0 - asked_K / total_K)
        mean_CK = values_Cn @ self._shares_Kn(items).T
        error_CK = np.sqrt(level_K**2 * sampling_K + ((1.0 - level_K) * found.error_CK) ** 2)
        return Estimate(level_K * mean_CK + (1.0 - level_K) * found.value_CK, error_CK)

    def _shares_Kn(self, items: Places) -> Floats:
        """Return the weights of asked items, kept for the candidates that come after."""
        key = items.tobytes()
        if key not in self._shares:
            self._shares[key] = nearest_shares(self._features_NF, self.responses.targets_KN, items)
        return self._shares[key]

    @cached_property
    def _features_NF(self) -> Floats:
        return embedding(self.clusters or "correctness", self.responses, self.prediction.model.items)

    @cached_property
    def _variance_K(self) -> Floats:
        """The variance s^2 of a row's responses over the items of each score, averaged over rows as they count."""
        values_MN, targets_KN = self.responses.values_MN, self.responses.targets_KN
        asked_MN = np.isfinite(values_MN)
        right_MN = np.where(asked_MN, values_MN, 0.0)
        share_MK = np.maximum(asked_MN @ targets_KN.T, 1e-12)
        mean_MK, square_MK = right_MN @ targets_KN.T / share_MK, right_MN**2 @ targets_KN.T / share_MK
        weight_MK = self.responses.rows_M[:, None] * share_MK
        return np.asarray((weight_MK * (square_MK - mean_MK**2)).sum(axis=0) / np.maximum(weight_MK.sum(axis=0), 1e-12))

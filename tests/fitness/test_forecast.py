"""The four estimators of response models: one contract, their formulas against brute force, and true errors."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from evomerge.errors import ExperimentError
from evomerge.fitness.ability import OUTSIDE, STRENGTH, Abilities, Mixing, maximum_likelihood, posterior
from evomerge.fitness.anchors import embedding, nearest_shares
from evomerge.fitness.forecast import (
    GmpIrt,
    GpIrt,
    MpIrt,
    PIrt,
    anchor_weight,
    choose_dimensions,
    held_out_error,
    usual_dimensions,
)
from evomerge.fitness.irt import Items, Model, fit
from evomerge.fitness.prediction import Prediction, odd_error, patterns
from evomerge.fitness.responses import Responses

Floats = NDArray[np.float64]
ALL = [PIrt(), GpIrt(), MpIrt(), GmpIrt(), *(cls.as_published() for cls in (PIrt, GpIrt, MpIrt, GmpIrt))]
NAMES = ["p", "gp", "mp", "gmp", "p published", "gp published", "mp published", "gmp published"]


def simulated(rows: int, items: int, dimensions: int, seed: int) -> Floats:
    """Return responses of 0 and 1."""
    rng = np.random.default_rng(seed)
    truth = Items.known(rng.lognormal(0.0, 0.4, (items, dimensions)), rng.normal(0.0, 1.2, items))
    p = expit(truth.logits(rng.standard_normal((rows, dimensions))))
    return (rng.random(p.shape) < p).astype(float)


def bare(items: Items, dispersion: float) -> Model:
    """Return a model that is known to its items only."""
    D = items.dimensions
    nobody = np.zeros((0, D)), np.zeros((0, D, D))
    return Model(items=items, abilities_MD=nobody[0], covariance_MDD=nobody[1], dispersion=dispersion, sweeps=0)


def two_tasks(values: Floats) -> Responses:
    """Return responses to two tasks of half the items each, the first three rows being sources."""
    half = values.shape[1] // 2
    targets = np.zeros((2, values.shape[1]))
    targets[0, :half], targets[1, half:] = 1.0 / half, 1.0 / (values.shape[1] - half)
    return replace(Responses.of(values), targets_KN=targets, sources=(0, 1, 2))


VALUES = simulated(60, 60, 2, 0)
RESPONSES = two_tasks(VALUES[:40])
FITS = {name: settings.fit(RESPONSES, 0) for name, settings in zip(NAMES, ALL, strict=True)}


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    """What every estimator of this module does."""

    def test_all_items_give_the_mean(self, name: str) -> None:
        """Asked everything, in whatever order, the value is the mean of each task and the error 0."""
        order = tuple(np.random.default_rng(1).permutation(60).tolist())
        value, error = FITS[name].estimate(order, VALUES[40:][:, list(order)])
        np.testing.assert_allclose(value, VALUES[40:] @ RESPONSES.targets_KN.T)
        np.testing.assert_array_equal(error, 0.0)

    def test_rows_are_estimated_one_by_one(self, name: str) -> None:
        """What is beside a candidate in a batch does not matter, missing responses least of all."""
        items = (3, 8, 20, 31, 40, 59)
        values = VALUES[40:44][:, list(items)].copy()
        values[1, 2], values[2, :] = np.nan, np.nan
        value, error = FITS[name].estimate(items, values)
        for row in (0, 3):
            alone = FITS[name].estimate(items, values[row : row + 1])
            np.testing.assert_allclose(value[row], alone.value_CK[0], atol=2e-4)
            np.testing.assert_allclose(error[row], alone.error_CK[0], rtol=1e-2)
        known = [place for place in range(6) if place != 2]
        fewer = FITS[name].estimate(tuple(items[place] for place in known), values[1:2, known])
        np.testing.assert_allclose(value[1], fewer.value_CK[0], atol=2e-4)
        assert np.isfinite(value).all()
        assert (error >= 0.0).all()

    def test_choices_are_distinct_and_repeat(self, name: str) -> None:
        """As many distinct sorted items as wanted, none taken, weights that add up to 1, and the same again."""
        first = FITS[name].choose(10)
        assert first == FITS[name].choose(10)
        assert len(set(first.items)) == 10
        assert first.items == tuple(sorted(first.items))
        assert sum(first.weights) == pytest.approx(1.0)
        later = FITS[name].choose(10, first.items)
        assert set(first.items).isdisjoint(later.items)
        assert len(FITS[name].choose(55, first.items).items) == 50

    def test_all_right_and_all_wrong_are_ends(self, name: str) -> None:
        """A candidate that is right everywhere it was asked is above one that is wrong, and both lie in [0, 1]."""
        items = FITS[name].choose(12).items
        value, error = FITS[name].estimate(items, np.array([np.ones(12), np.zeros(12)]))
        assert (value[0] <= 1.0).all()
        assert (value[0] > value[1] + 0.2).all()
        assert (value[1] >= 0.0).all()
        assert (error <= 0.5).all()

    def test_few_or_odd_rows_still_fit(self, name: str) -> None:
        """Two rows, one item, constant items and holes give finite scores."""
        settings = dict(zip(NAMES, ALL, strict=True))[name]
        cases = [
            np.array([[1.0], [0.0]]),
            np.ones((3, 5)),
            VALUES[:2],
            np.where(VALUES[:9] < 1, np.nan, 1.0),
            VALUES[:5] / 3,
        ]
        for values in cases:
            responses = replace(Responses.of(values), sources=(0, 1))
            found = settings.fit(responses, 0)
            items = found.choose(2).items
            value, error = found.estimate(items, np.ones((1, len(items))))
            assert np.isfinite(value).all()
            assert np.isfinite(error).all()
            assert "fitted to" in found.warnings[0]

    def test_unbounded_responses_are_refused(self, name: str) -> None:
        """Without rows, or with responses that are not in [0, 1], there is one clear line."""
        settings = dict(zip(NAMES, ALL, strict=True))[name]
        for responses in (Responses.of(VALUES[:0]), replace(RESPONSES, values_MN=VALUES[:40] * 7.0, bounded=False)):
            with pytest.raises(ExperimentError, match=r"needs rows of responses in \[0, 1\]"):
                settings.fit(responses, 0)

    def test_fractions_and_strangers_are_checked(self, name: str) -> None:
        """Shapes that do not fit are refused."""
        with pytest.raises(ValueError, match="distinct"):
            FITS[name].estimate((1, 1), np.zeros((1, 2)))


@pytest.mark.parametrize(("settings", "share"), [(PIrt(), 0.75), (GpIrt(), 0.9)])
def test_forecasts_beat_the_plain_mean_with_true_errors(settings: PIrt | GpIrt, share: float) -> None:
    """On simulated rows 20 of 300 items forecast better than their mean does, and z-scores are near 1."""
    values = simulated(260, 300, 2, 3)
    found = settings.fit(Responses.of(values[:160]), 0)
    items = found.choose(20).items
    asked, truth = values[160:][:, list(items)], values[160:].mean(axis=1)
    value, error = found.estimate(items, asked)
    random_items = np.random.default_rng(4).choice(300, 20, replace=False)
    plain = np.abs(values[160:][:, random_items].mean(axis=1) - truth).mean()
    assert np.abs(value[:, 0] - truth).mean() < share * plain
    z = (truth - value[:, 0]) / error[:, 0]
    assert 0.7 < np.sqrt((z**2).mean()) < 1.35


def test_the_error_is_the_delta_method() -> None:
    """The variance is g' C g with g by finite differences of the value, and p (1 - p) of the unseen items."""
    rng = np.random.default_rng(5)
    items = Items.known(rng.lognormal(0.0, 0.3, (30, 2)), rng.standard_normal(30))
    model = Model(
        items=items, abilities_MD=np.zeros((1, 2)), covariance_MDD=np.zeros((1, 2, 2)), dispersion=0.7, sweeps=0
    )
    targets = rng.dirichlet(np.ones(30), 2)
    theta, covariance = rng.standard_normal(2), np.array([[0.3, 0.1], [0.1, 0.2]])
    asked = np.array([2, 5, 11])

    def at(theta_D: Floats) -> Prediction:
        law = Abilities(theta_D[None], covariance[None])
        return Prediction(model=model, ability=lambda _items, _values: law, plain=True)

    value, error = at(theta)(targets, asked, np.array([[1.0, 0.0, 0.5]]))
    step = 1e-5 * np.eye(2)
    slope = np.stack(
        [
            (
                at(theta + e)(targets, asked, np.zeros((1, 3))).value_CK[0]
                - at(theta - e)(targets, asked, np.zeros((1, 3))).value_CK[0]
            )
            / 2e-5
            for e in step
        ]
    )
    p = expit(items.logits(theta[None]))[0]
    unseen = np.setdiff1d(np.arange(30), asked)
    noise = 0.7 * (targets[:, unseen] ** 2 * (p * (1.0 - p))[unseen]).sum(axis=1)
    np.testing.assert_allclose(error[0] ** 2, np.diag(slope.T @ covariance @ slope) + noise, rtol=1e-5)
    wanted = targets[:, asked] @ [1.0, 0.0, 0.5] + targets[:, unseen] @ p[unseen]
    np.testing.assert_allclose(value[0], wanted)


def test_probabilities_average_over_what_is_not_known() -> None:
    """With uncertain ability and items the forecast is near the mean over draws of both."""
    rng = np.random.default_rng(6)
    spread = np.tile(np.diag([0.2, 0.1, 0.3]), (20, 1, 1))
    items = Items(
        parameters_NE=np.column_stack([rng.lognormal(0.0, 0.3, (20, 2)), rng.standard_normal(20)]),
        covariance_NEE=spread,
    )
    model = Model(
        items=items, abilities_MD=np.zeros((1, 2)), covariance_MDD=np.zeros((1, 2, 2)), dispersion=1.0, sweeps=0
    )
    law = Abilities(np.array([[1.0, -0.4]]), np.array([[[0.5, 0.1], [0.1, 0.4]]]))
    prediction = Prediction(model=model, ability=lambda _items, _values: law, plain=False)
    value = prediction(np.eye(20), np.array([], dtype=int), np.zeros((1, 0))).value_CK[0]
    theta = rng.multivariate_normal(law.mean_CD[0], law.covariance_CDD[0], 20_000)
    drawn = items.parameters_NE + rng.standard_normal((20_000, 20, 3)) * np.sqrt(np.diag(spread[0]))
    logit = np.einsum("snd,sd->sn", drawn[:, :, :2], theta) - drawn[:, :, 2]
    np.testing.assert_allclose(value, expit(logit).mean(axis=0), atol=0.02)


@pytest.mark.parametrize(
    ("variance", "bias", "asked"), [(0.2, 0.03, 10), (0.1, 0.1, 3), (0.25, 0.01, 200), (0.0, 0.02, 5)]
)
def test_the_weight_makes_the_sum_of_errors_least(variance: float, bias: float, asked: int) -> None:
    """The weight of the anchors is the numerical minimiser of l^2 v + (1 - l)^2 b^2."""
    sampling = variance / (4.0 * asked)
    wanted = minimize_scalar(
        lambda level: level**2 * sampling + (1.0 - level) ** 2 * bias**2, bounds=(0, 1), method="bounded"
    ).x
    found = anchor_weight(np.array([variance]), np.array([bias]), np.array([float(asked)]))
    assert found[0] == pytest.approx(wanted, abs=1e-4)


def test_the_weight_is_none_without_answers() -> None:
    """A score that no asked item counts in has the model alone."""
    assert anchor_weight(np.array([0.2]), np.array([0.05]), np.array([0.0]))[0] == 0.0


def test_published_gmp_is_half_and_half() -> None:
    """gmp-IRT as published is the mean of the anchors' weighted answers and mp-IRT."""
    items = (2, 7, 19, 33, 41, 50, 58)
    values = VALUES[45:50][:, list(items)]
    model = FITS["gmp published"].prediction.model  # type: ignore[attr-defined]  # how it is made, not what it promises
    features = embedding("irt", RESPONSES, model.items)
    shares = nearest_shares(features, RESPONSES.targets_KN, np.array(items))
    wanted = 0.5 * values @ shares.T + 0.5 * FITS["mp published"].estimate(items, values).value_CK
    found, alone = (FITS[name].estimate(items, values) for name in ("gmp published", "mp published"))
    np.testing.assert_allclose(found.value_CK, wanted)
    variance = np.array([VALUES[:40, :30].var(axis=1).mean(), VALUES[:40, 30:].var(axis=1).mean()])
    asked = np.array([3, 4])  # of 30 items each
    wanted_error = np.sqrt(0.25 * variance / (4.0 * asked) * (1.0 - asked / 30.0) + 0.25 * alone.error_CK**2)
    np.testing.assert_allclose(found.error_CK, wanted_error)


def test_gp_lies_between_the_anchors_and_the_model() -> None:
    """The mix is between the anchors' mean and p-IRT, nearer to the model for few items than for many."""
    found = GpIrt(dimensions=2).fit(Responses.of(VALUES[:40]), 0)
    model = PIrt(dimensions=2).fit(Responses.of(VALUES[:40]), 0)
    features = embedding("correctness", Responses.of(VALUES[:40]), None)
    levels = []
    for count in (5, 40):
        choice = found.choose(count)
        values = VALUES[40:][:, list(choice.items)]
        anchored = values @ nearest_shares(features, np.full((1, 60), 1.0 / 60.0), np.array(choice.items))[0]
        value, alone = (each.estimate(choice.items, values).value_CK[:, 0] for each in (found, model))
        levels.append(float(np.median((value - alone) / (anchored - alone))))
    assert 0.0 < levels[0] < levels[1] < 1.0


def test_abilities_change_the_forecast_as_named() -> None:
    """Empirical Bayes is drawn to the rows' mean, maximum likelihood is not: it goes further for all-right answers."""
    values = np.ones((1, 6))
    eb, ml = (
        PIrt(ability=name, dimensions=1).fit(RESPONSES, 0).estimate(tuple(range(6)), values) for name in ("eb", "ml")
    )
    assert (ml.value_CK > eb.value_CK).all()


def test_a_mix_of_sources_is_found_from_few_items() -> None:
    """Where abilities really are mixes of the sources' mp-IRT needs fewer items than p-IRT to be right."""
    rng = np.random.default_rng(8)
    items = Items.known(rng.lognormal(0.0, 0.4, (400, 5)), rng.normal(0.0, 1.5, 400))
    sources = rng.standard_normal((2, 5))
    mix = rng.dirichlet(np.ones(2), 160) @ sources
    ability = np.concatenate([sources, mix])
    values = (rng.random((162, 400)) < expit(items.logits(ability))).astype(float)
    responses = replace(Responses.of(values[:62]), sources=(0, 1))
    truth = values[62:].mean(axis=1)
    asked = tuple(rng.choice(400, 12, replace=False).tolist())
    errors = []
    for settings in (MpIrt(dimensions=2), MpIrt(ability="ml", dimensions=2)):
        value = settings.fit(responses, 0).estimate(asked, values[62:][:, list(asked)]).value_CK[:, 0]
        errors.append(np.abs(value - truth).mean())
    assert errors[0] < 0.7 * errors[1]


def test_sources_are_needed_for_a_mix() -> None:
    """Without rows that are known as sources there is one clear line, with the way out."""
    for settings in (MpIrt(), GmpIrt()):
        with pytest.raises(ExperimentError, match="no row is known as a source's; score the sources, or use 'gp_irt'"):
            settings.fit(Responses.of(VALUES[:30]), 0)


def test_few_rows_are_warned_of() -> None:
    """Below 20 rows that count there is a warning, from 20 on none; the reason names dimensions and rows."""
    few = replace(Responses.of(VALUES[:25]), sources=(0, 1), rows_M=np.r_[np.ones(19), np.zeros(6)])
    assert MpIrt().fit(few, 0).warnings[0].startswith("mp_irt: fitted to 19 rows; below 20")
    enough = MpIrt().fit(replace(Responses.of(VALUES[:20]), sources=(0, 1)), 0)
    assert enough.warnings == ()
    assert enough.reason == "mp_irt: abilities of 2 dimensions, fitted to 20 rows"


def test_dimensions_grow_with_rows() -> None:
    """Few rows bear two dimensions, fifty four and a large pool eight."""
    assert [usual_dimensions(rows) for rows in (5, 20, 34, 35, 50, 89, 90, 1000)] == [2, 2, 2, 4, 4, 4, 8, 8]


def test_published_dimensions_are_the_fewest_that_serve() -> None:
    """Two true dimensions need the fewest that are tried; the error measured is small, and large for noise."""
    chosen, error = choose_dimensions(Responses.of(simulated(80, 150, 2, 9)))
    assert chosen == 2
    assert error[0] < 0.08
    rng = np.random.default_rng(10)
    levels = rng.random((40, 2))[:, [0, 1] * 50]  # even and odd items have nothing in common
    noise = (rng.random((40, 100)) < levels).astype(float)
    assert choose_dimensions(Responses.of(noise))[1][0] > 0.1
    assert choose_dimensions(Responses.of(VALUES[:2]))[0] == 1


def test_the_measured_error_is_that_of_the_odd_items() -> None:
    """Known items and abilities give the error that a loop over rows computes, holes left out."""
    rng = np.random.default_rng(11)
    items = Items.known(rng.lognormal(0.0, 0.3, (20, 1)), rng.standard_normal(20))
    model = Model(
        items=items, abilities_MD=np.zeros((1, 1)), covariance_MDD=np.zeros((1, 1, 1)), dispersion=1.0, sweeps=0
    )
    values = (rng.random((4, 20)) < 0.6).astype(float)
    values[1, [3, 4]] = np.nan
    targets = np.stack([np.full(20, 0.05), np.where(np.arange(20) % 2, 0.0, 0.1)])
    wanted = []
    for row in values:
        even, odd = (np.flatnonzero(np.isfinite(row) & (np.arange(20) % 2 == side)) for side in (0, 1))
        theta = maximum_likelihood(items.only(even), row[None, even]).mean_CD
        wanted.append(abs(expit(items.logits(theta))[0, odd].mean() - row[odd].mean()))
    found = odd_error(Prediction(model=model, ability=maximum_likelihood, plain=True), targets, values)
    assert found[0] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert np.isnan(found[1])


def test_sources_are_not_held_out() -> None:
    """The error of a mix is measured on the first row that is no source's, from a fit to the sources alone."""
    responses = replace(Responses.of(VALUES[:3]), sources=(0, 1))
    model = fit(VALUES[:2], dimensions=1)
    stated = Mixing(sources_JD=model.abilities_MD, total=1.0, strength=STRENGTH, outside=OUTSIDE).prior
    prediction = Prediction(model=model, ability=partial(posterior, prior=stated), plain=False)
    found = held_out_error(MpIrt(), responses, 1)
    np.testing.assert_allclose(found, odd_error(prediction, responses.targets_KN, VALUES[2:3]))
    np.testing.assert_allclose(held_out_error(MpIrt(), responses.only(np.array([0, 1])), 1), 0.05)


def test_patterns_part_the_rows() -> None:
    """Every row is in the one group whose columns it has answered."""
    values = np.array([[1.0, np.nan], [0.0, 1.0], [0.5, np.nan], [np.nan, np.nan]])
    found = sorted((tuple(rows), tuple(columns)) for rows, columns in patterns(values))
    assert found == [((0, 2), (0,)), ((1,), (0, 1)), ((3,), ())]


def test_a_fit_hangs_on_no_global_state() -> None:
    """The same responses and seed give the same choices and values, whatever was drawn before."""
    one = GpIrt().fit(RESPONSES, 5)
    np.random.default_rng(0).random(10)
    other = GpIrt().fit(RESPONSES, 5)
    assert one.choose(9) == other.choose(9)
    items = one.choose(9).items
    np.testing.assert_array_equal(
        one.estimate(items, VALUES[50:, list(items)]).value_CK, other.estimate(items, VALUES[50:, list(items)]).value_CK
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"ability": "map"}, "ability: unknown 'map'"),
        ({"anchors": "corectness"}, "did you mean 'correctness'"),
        ({"dimensions": 0}, "at least 1, got 0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: dict[str, object], line: str) -> None:
    """Unknown names and impossible numbers are named, with the way out."""
    with pytest.raises(ExperimentError, match=line):
        PIrt(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_the_eb_ability_is_the_posterior() -> None:
    """p-IRT by empirical Bayes is the answers seen plus probabilities at the posterior, by plain sums."""
    responses = Responses.of(VALUES[:40])
    found = PIrt(dimensions=1).fit(responses, 0)
    model = fit(VALUES[:40], dimensions=1)
    asked = np.array([1, 2, 3, 30, 40])
    law = posterior(model.items.only(asked), VALUES[50:51, asked])
    total = VALUES[50, asked].sum()
    for item in np.setdiff1d(np.arange(60), asked):
        (a, b), spread = model.items.parameters_NE[item], model.items.covariance_NEE[item]
        mean, variance = law.mean_CD[0, 0], law.covariance_CDD[0, 0, 0]
        x = np.array([mean, -1.0])
        logit_variance = (a**2 + spread[0, 0]) * variance + x @ spread @ x
        total += expit((a * mean - b) / np.sqrt(1.0 + np.pi / 8.0 * logit_variance))
    value = found.estimate(tuple(asked.tolist()), VALUES[50:51, asked]).value_CK[0, 0]
    assert value == pytest.approx(total / 60.0, abs=1e-9)

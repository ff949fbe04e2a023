"""The response model: simulated items and abilities are recovered, and nothing degenerate breaks the fit."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from evomerge.fitness.irt import Items, curvature, doubled, fit, halved, outer, packed, unpacked

Floats = NDArray[np.float64]


def simulated(rows: int, items: int, dimensions: int, seed: int) -> tuple[Floats, Floats, Items]:
    """Return responses, the abilities and the items that they were drawn from."""
    rng = np.random.default_rng(seed)
    ability = rng.standard_normal((rows, dimensions))
    slopes = rng.lognormal(0.0, 0.4, (items, dimensions)) * np.where(rng.random((items, dimensions)) < 0.6, 1.5, 0.2)
    truth = Items.known(slopes, rng.normal(0.0, 1.2, items))
    return (rng.random((rows, items)) < expit(truth.logits(ability))).astype(float), ability, truth


def correlation(left: Floats, right: Floats) -> float:
    """Return the correlation of all entries."""
    return float(np.corrcoef(left.ravel(), right.ravel())[0, 1])


def test_one_dimension_is_recovered() -> None:
    """Slopes, difficulties and abilities of a simulation come back, on their own scale."""
    values, ability, truth = simulated(300, 300, 1, 0)
    model = fit(values, dimensions=1)
    assert correlation(model.abilities_MD, ability) > 0.98
    assert correlation(model.items.slopes_ND, truth.slopes_ND) > 0.95
    assert correlation(model.items.parameters_NE[:, -1], truth.parameters_NE[:, -1]) > 0.97
    slope = np.polyfit(truth.slopes_ND[:, 0], model.items.slopes_ND[:, 0], 1)[0]
    assert 0.75 < slope < 1.2


@pytest.mark.parametrize("dimensions", [2, 4])
def test_several_dimensions_are_recovered(dimensions: int) -> None:
    """The logits of a simulation come back, whatever the rotation; a model of one dimension misses them."""
    values, ability, truth = simulated(250, 500, dimensions, 1)
    wanted = truth.logits(ability)
    found = fit(values, dimensions=dimensions)
    assert correlation(found.items.logits(found.abilities_MD), wanted) > 0.96
    poorer = fit(values, dimensions=1)
    assert correlation(poorer.items.logits(poorer.abilities_MD), wanted) < 0.94


def test_a_harder_item_has_a_larger_difficulty() -> None:
    """The sign is that of the papers: the logit is a . theta minus b, and slopes are positive on the whole."""
    values = np.zeros((30, 2))
    values[:25, 0], values[:5, 1] = 1.0, 1.0
    items = fit(values, dimensions=1).items
    assert items.parameters_NE[1, -1] > 0.5 > -0.5 > items.parameters_NE[0, -1]
    assert items.slopes_ND.sum() > 0.0


def test_abilities_are_standard_normal_over_the_rows() -> None:
    """Means and posterior variances of the rows make mean 0 and covariance I, up to the two rows' worth of prior."""
    model = fit(simulated(200, 150, 3, 2)[0], dimensions=3)
    second = (outer(model.abilities_MD) + model.covariance_MDD).mean(axis=0)
    np.testing.assert_allclose(second, np.eye(3), atol=0.05)
    np.testing.assert_allclose(model.abilities_MD.mean(axis=0), 0.0, atol=0.05)


def test_item_uncertainty_is_nearly_true_and_falls_with_rows() -> None:
    """Most difficulties lie within 1.645 deviations of their estimates (VB promises 90 %), and more rows tell more."""
    values, _, truth = simulated(200, 400, 1, 3)
    model = fit(values, dimensions=1)
    deviation = np.sqrt(model.items.covariance_NEE[:, -1, -1])
    inside = np.abs(model.items.parameters_NE[:, -1] - truth.parameters_NE[:, -1]) < 1.645 * deviation
    assert 0.7 < inside.mean() < 0.97
    fewer = fit(values[:50], dimensions=1)
    assert np.sqrt(fewer.items.covariance_NEE[:, -1, -1]).mean() > 1.5 * deviation.mean()


def test_a_row_may_stand_for_several() -> None:
    """A row of weight 2 tells of the items what two equal rows tell, and one of weight 0 nothing."""
    values = simulated(40, 60, 2, 4)[0]
    twice = fit(np.concatenate([values, values[:10]]), dimensions=2, sweeps=300, tolerance=1e-7)
    weights = np.ones(45)
    weights[:10], weights[40:] = 2.0, 0.0
    noise = np.random.default_rng(0).random((5, 60)).round()
    weighted = fit(np.concatenate([values, noise]), weights, dimensions=2, sweeps=300, tolerance=1e-7)
    wanted = twice.items.logits(twice.abilities_MD[:40])
    found = weighted.items.logits(weighted.abilities_MD[:40])
    assert np.abs(found - wanted).max() < 0.05
    volumes = (np.linalg.slogdet(model.items.covariance_NEE)[1] for model in (weighted, twice))
    np.testing.assert_allclose(*volumes, atol=0.02)


def test_missing_responses_are_left_out() -> None:
    """With 3 of 10 responses missing the probabilities are nearly those of the whole, also of the missing ones."""
    values, ability, truth = simulated(200, 200, 2, 5)
    missing = np.random.default_rng(1).random(values.shape) < 0.3
    model = fit(np.where(missing, np.nan, values), dimensions=2)
    found = model.items.logits(model.abilities_MD)
    assert correlation(found[missing], truth.logits(ability)[missing]) > 0.94


def test_an_item_that_nobody_was_asked_has_the_prior() -> None:
    """A column without responses gets the mean of all items and the widest law."""
    values = simulated(60, 80, 1, 6)[0]
    values[:, 7] = np.nan
    items = fit(values, dimensions=1).items
    np.testing.assert_allclose(items.parameters_NE[7], items.parameters_NE.mean(axis=0), atol=0.02)
    assert np.linalg.slogdet(items.covariance_NEE)[1].argmax() == 7


def test_fractions_are_quasi_likelihood() -> None:
    """Fractional responses recover the probabilities they are near to, and their dispersion is found."""
    rng = np.random.default_rng(7)
    _, ability, truth = simulated(120, 100, 1, 7)
    p = expit(truth.logits(ability))
    fractions = rng.beta(9.0 * p, 9.0 * (1.0 - p))  # variance p (1 - p) / 10
    model = fit(fractions, dimensions=1)
    assert correlation(model.items.logits(model.abilities_MD), truth.logits(ability)) > 0.97
    assert model.dispersion == pytest.approx(0.1, abs=0.03)
    assert fit((rng.random(p.shape) < p).astype(float), dimensions=1).dispersion == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[1.0]]), 1),
        (np.array([[1.0], [0.0], [1.0]]), 1),
        (np.array([[1.0, 0.0, 1.0, 1.0]]), 1),
        (np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), 1),
        (np.ones((20, 30)), 8),
        (np.zeros((20, 30)), 8),
        (np.tile([1.0, 0.0, 0.5], (12, 1)), 3),
        (np.array([[1.0] * 9, [0.0] * 9, [1.0] * 9, [0.0] * 9, [1.0, 0.0, np.nan] * 3]), 4),
        (np.concatenate([np.ones((3, 40)), np.zeros((3, 40)), np.eye(40)[:20]]), 8),
    ],
)
def test_degenerate_responses_give_finite_models(values: Floats, wanted: int) -> None:
    """One row, one item, constant items, all-right and all-wrong rows fit, with no more dimensions than rows bear."""
    model = fit(values, dimensions=8)
    assert model.items.dimensions == wanted
    p = expit(model.items.logits(model.abilities_MD))
    assert np.isfinite(p).all()
    assert np.isfinite(model.items.covariance_NEE).all()
    known = np.isfinite(values)
    assert np.abs(p - values)[known].mean() < 0.45


def test_all_right_is_above_all_wrong() -> None:
    """A row that is right everywhere is forecast above one that is wrong everywhere, and neither as certain."""
    values = np.concatenate([simulated(30, 50, 1, 8)[0], np.ones((1, 50)), np.zeros((1, 50))])
    model = fit(values, dimensions=2)
    p = expit(model.items.logits(model.abilities_MD)).mean(axis=1)
    assert 1.0 > p[30] > p[:30].max()
    assert 0.0 < p[31] < p[:30].min()


def test_nothing_to_fit_is_refused() -> None:
    """A fit without rows, without items or without a response is an error."""
    for values in (np.zeros((0, 5)), np.zeros((5, 0)), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="needs responses of at least 1 row to 1 item"):
            fit(values, dimensions=1)


def test_fits_are_repeatable() -> None:
    """The same responses give the same model, bit by bit."""
    values = simulated(50, 70, 2, 9)[0]
    one, other = fit(values, dimensions=2), fit(values.copy(), dimensions=2)
    np.testing.assert_array_equal(one.items.parameters_NE, other.items.parameters_NE)


def test_the_curvature_bounds_the_logistic() -> None:
    """The quadratic with `curvature` lies below log sigmoid everywhere and touches it at xi."""
    z, xi = np.meshgrid(np.linspace(-8.0, 8.0, 161), np.array([0.0, 0.5, 2.0, 6.0]))
    bound = -np.logaddexp(0.0, -xi) + 0.5 * (z - xi) - curvature(xi**2) * (z**2 - xi**2)
    assert (bound <= -np.logaddexp(0.0, -z) + 1e-6).all()
    np.testing.assert_allclose(curvature(np.array([1e-9])), 0.125, atol=1e-5)


def test_packing_keeps_traces() -> None:
    """Upper halves unpack to the matrices; doubled ones multiply to traces."""
    rng = np.random.default_rng(10)
    left, right = (outer(rng.standard_normal((5, 4))) for _ in range(2))
    np.testing.assert_allclose(unpacked(packed(left)), left)
    np.testing.assert_allclose(halved(doubled(packed(left))), packed(left))
    np.testing.assert_allclose(
        (packed(left) * doubled(packed(right))).sum(axis=1), np.einsum("nij,nji->n", left, right)
    )


def test_some_items_are_the_same_items() -> None:
    """Restricted items keep their laws in the given order."""
    items = fit(simulated(30, 20, 2, 11)[0], dimensions=2).items
    some = items.only(np.array([4, 1]))
    np.testing.assert_array_equal(some.parameters_NE[1], items.parameters_NE[1])
    np.testing.assert_array_equal(some.covariance_NEE[0], items.covariance_NEE[4])

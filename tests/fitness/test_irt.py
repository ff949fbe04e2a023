"""The logistic response model against closed forms, quadrature and a fit made another way."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit

from evomerge.fitness.irt import ABILITY_SPREAD, Forecast, Items, ability, fit, posterior, probabilities

GRID = np.linspace(-8.0, 8.0, 801)


def simulated(rows: int, count: int, seed: int) -> tuple[np.ndarray, Items, np.ndarray]:
    """Return responses [M, N] of standard normal abilities, the true items, and the abilities [M]."""
    rng = np.random.default_rng(seed)
    items = Items(rng.uniform(0.5, 2.0, count), rng.normal(0.0, 1.2, count))
    theta = rng.normal(size=rows)
    responses = (rng.random((rows, count)) < expit(np.outer(theta, items.slope) - items.difficulty)).astype(float)
    return responses, items, theta


def test_probability_is_the_logistic_of_slope_times_ability_minus_difficulty() -> None:
    """The convention is a theta - b: at theta 2, slope 1.5 and difficulty .5 give 1 / (1 + exp(-2.5))."""
    found = probabilities(Items(np.array([1.5, 1.5]), np.array([0.5, 1.0])), np.array([2.0]))
    assert found[0, 0] == pytest.approx(1.0 / (1.0 + math.exp(-2.5)))
    assert found[0, 1] < found[0, 0], "a larger b is harder"


def test_ability_is_the_posterior_mean_and_deviation_by_adaptive_quadrature() -> None:
    """Mean and deviation on the grid equal those integrated by QUADPACK."""
    items = Items(np.array([1.2, 0.7, 2.0]), np.array([-0.5, 0.3, 1.0]))
    response = [1.0, 0.0, 0.4]

    def density(theta: float) -> float:
        likelihood = 1.0
        for slope, difficulty, y in zip(*items, response, strict=True):
            p = 1.0 / (1.0 + math.exp(difficulty - slope * theta))
            likelihood *= p**y * (1.0 - p) ** (1.0 - y)
        return likelihood * math.exp(-(theta**2) / (2.0 * 1.5**2))

    mass = quad(density, -12, 12)[0]
    mean = quad(lambda theta: theta * density(theta), -12, 12)[0] / mass
    variance = quad(lambda theta: (theta - mean) ** 2 * density(theta), -12, 12)[0] / mass
    found, deviation = ability(items, np.array([response]), np.linspace(-12, 12, 601), 1.5)
    assert found[0] == pytest.approx(mean, abs=1e-6)
    assert deviation[0] == pytest.approx(math.sqrt(variance), abs=1e-6)


def test_an_item_not_asked_says_nothing() -> None:
    """A missing response leaves the posterior that there would be without the item."""
    items = Items(np.array([1.0, 2.0]), np.array([0.0, 0.5]))
    both = posterior(items, np.array([[1.0, np.nan]]), GRID, 1.0)
    alone = posterior(Items(items.slope[:1], items.difficulty[:1]), np.array([[1.0]]), GRID, 1.0)
    np.testing.assert_allclose(both, alone, atol=1e-15)


def test_fit_recovers_the_items_that_made_the_responses() -> None:
    """From 800 simulated rows, slopes and difficulties come back nearly unbiased, and abilities in order."""
    responses, truth, theta = simulated(800, 40, seed=1)
    found = fit(responses)
    assert np.corrcoef(found.slope, truth.slope)[0, 1] > 0.93
    assert np.corrcoef(found.difficulty, truth.difficulty)[0, 1] > 0.99
    assert abs(np.mean(found.slope - truth.slope)) < 0.06
    assert np.sqrt(np.mean((found.difficulty - truth.difficulty) ** 2)) < 0.16
    assert np.corrcoef(ability(found, responses, GRID, 1.0)[0], theta)[0, 1] > 0.93


def test_fit_agrees_with_the_marginal_likelihood_climbed_by_a_general_optimiser() -> None:
    """With many rows the priors fade, and EM ends where L-BFGS on a Gauss-Hermite marginal likelihood ends."""
    responses, _, _ = simulated(3000, 6, seed=2)
    node, weight = np.polynomial.hermite_e.hermegauss(31)

    def loss(parameters: np.ndarray) -> float:
        p = expit(np.outer(node, parameters[:6]) - parameters[6:])
        log = responses @ np.log(p).T + (1.0 - responses) @ np.log1p(-p).T
        return -float(np.log(np.exp(log) @ weight).sum())

    best = minimize(loss, np.r_[np.ones(6), np.zeros(6)], method="L-BFGS-B").x
    found = fit(responses, sweeps=500, tolerance=1e-4)
    np.testing.assert_allclose(found.slope, best[:6], atol=0.12)
    np.testing.assert_allclose(found.difficulty, best[6:], atol=0.06)


def test_thirty_rows_give_a_stable_fit() -> None:
    """Few rows, items that all or none answer, and fractional responses give finite, moderate items in true order."""
    responses, truth, _ = simulated(30, 200, seed=3)
    responses[:, 0], responses[:, 1], responses[:, 2] = 1.0, 0.0, 0.5
    found = fit(responses)
    assert np.abs(np.concatenate(found)).max() < 6.0
    assert found.difficulty[0] < found.difficulty[2] < found.difficulty[1]
    assert np.corrcoef(found.difficulty[3:], truth.difficulty[3:])[0, 1] > 0.9


def test_a_row_that_was_asked_nothing_changes_nothing() -> None:
    """The fit ignores a row of missing responses, and is the same every time."""
    responses, _, _ = simulated(20, 15, seed=4)
    plain = fit(responses)
    padded = fit(np.vstack([responses, np.full(15, np.nan)]))
    np.testing.assert_allclose(np.concatenate(plain), np.concatenate(padded), atol=1e-9)
    assert np.array_equal(np.concatenate(plain), np.concatenate(fit(responses)))


@pytest.mark.parametrize(
    "responses",
    [
        np.ones((1, 5)),
        np.ones(5),
        np.ones((5, 0)),
        np.full((3, 3), 1.5),
        np.full((3, 3), -0.1),
        np.full((3, 3), np.inf),
        np.full((3, 3), np.nan),
    ],
)
def test_fit_refuses_what_is_no_matrix_of_responses(responses: np.ndarray) -> None:
    """One row, no item, and numbers outside [0, 1] are errors."""
    with pytest.raises(ValueError, match=r"rows|lie in"):
        fit(responses)


def test_forecast_is_the_total_of_seen_and_expected_responses() -> None:
    """Value and variance equal those of the joint law of unseen responses, enumerated and integrated."""
    items = Items(np.array([1.0, 0.8, 1.6, 0.5]), np.array([0.2, -0.7, 0.9, 0.0]))
    theta = np.linspace(-15, 15, 3001)
    p = expit(np.outer(theta, items.slope) - items.difficulty)
    density = p[:, 0] * (1 - p[:, 2]) * np.exp(-(theta**2) / (2 * ABILITY_SPREAD**2))
    density /= density.sum()
    totals, chances = [], []
    for first in (0, 1):
        for second in (0, 1):
            chance = np.where(first, p[:, 1], 1 - p[:, 1]) * np.where(second, p[:, 3], 1 - p[:, 3])
            totals.append((1.0 + first + second) / 4.0)
            chances.append(float(density @ chance))
    mean = np.dot(totals, chances)
    value, variance = Forecast(items)(np.array([2, 0]), np.array([0.0, 1.0]))
    assert value == pytest.approx(mean, abs=1e-6)
    assert variance == pytest.approx(np.dot((np.array(totals) - mean) ** 2, chances), abs=1e-6)


def test_forecast_follows_a_frontier_beyond_the_rows_of_the_fit() -> None:
    """Candidates three to four deviations better than any fitted row are not pulled back to the fitted ones."""
    rng = np.random.default_rng(5)
    items = Items(rng.uniform(0.7, 1.5, 500), rng.normal(3.0, 1.5, 500))
    seen = np.arange(0, 500, 12)
    forecast = Forecast(items)
    for theta in (-4.0, 3.0, 4.0):
        p = expit(items.slope * theta - items.difficulty)
        drawn = (rng.random((300, len(seen))) < p[seen]).astype(float)
        found = np.mean([forecast(seen, row)[0] for row in drawn])
        assert found == pytest.approx(p.mean(), abs=0.012)


def test_a_right_answer_more_never_lowers_the_forecast() -> None:
    """With positive slopes, the value grows with every seen response."""
    responses, items, _ = simulated(20, 60, seed=6)
    forecast, seen = Forecast(items), np.arange(25)
    for row in responses[:, :25]:
        before = forecast(seen, row)[0]
        for item in np.flatnonzero(row == 0.0):
            assert forecast(seen, np.where(seen == item, 1.0, row))[0] > before


def test_all_right_and_all_wrong_stay_inside_the_unit_interval() -> None:
    """The extremes have no maximum-likelihood ability; their forecasts are finite, near 0 and 1, and in doubt."""
    _, items, _ = simulated(2, 300, seed=7)
    seen, forecast = np.arange(40), Forecast(items)
    low, doubt = forecast(seen, np.zeros(40))
    high, _ = forecast(seen, np.ones(40))
    assert 0.0 < low < 0.08
    assert 0.92 < high < 1.0
    assert doubt > 0.0

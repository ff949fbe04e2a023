from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from evomerge.fitness import calibration
from evomerge.fitness.calibration import LEAST_SPREAD, UNKNOWN_SPREAD, monitor, spread, z_scores
from evomerge.fitness.estimator import Choice, Estimate
from evomerge.fitness.factor import Factor
from evomerge.fitness.responses import Responses


def answers(rows, items=120, seed=0):
    """0/1 responses of an item response model with three abilities."""
    rng = np.random.default_rng(seed)
    slopes = np.c_[rng.uniform(0.5, 1.5, items), 0.8 * rng.standard_normal((items, 2))]
    logits = np.random.default_rng(seed + 1).standard_normal((rows, 3)) @ slopes.T - rng.standard_normal(items)
    return (np.random.default_rng(seed + 2).random((rows, items)) < expit(logits)).astype(float)


class Known:
    """An estimator that is right up to normal noise, but claims another error."""

    def __init__(self, claimed, seen=None):
        self.claimed, self.seen, self.rng = claimed, seen, np.random.default_rng(5)
        self.reason, self.warnings = "", ()

    def fit(self, responses, seed):
        """Note how many rows there are."""
        if self.seen is not None:
            self.seen.append(len(responses.rows_M))
        return self

    def choose(self, count, taken=()):
        """The first items."""
        return Choice(tuple(range(count)), (1 / count,) * count)

    def estimate(self, items, values_Cn, margins_Cn=None):
        """The mean, with the claimed error."""
        value = values_Cn.mean(axis=1, keepdims=True)
        return Estimate(value, np.full_like(value, self.claimed))


def constant_half(rows):
    """Scores that are off by exactly .1 from the mean of the first half of the items."""
    values = np.full((rows, 4), 0.5)
    values[:, 2:] = 0.7
    return Responses.of(values)


def test_an_error_that_is_claimed_too_small_is_stretched():
    """Off by .1 where .02 is claimed: the spread is 5, up to what the prior pulls."""
    found = spread(Known(0.02), constant_half(200), 2, 0)

    assert found[0] == pytest.approx(np.sqrt((200 * 25 + 2 * UNKNOWN_SPREAD**2) / 202))


def test_every_complete_row_is_held_out_once():
    """In so many fits, each without the rows held out; rows that miss answers stay in all of them."""
    responses = constant_half(23)
    holes = responses.values_MN.copy()
    holes[0, 3] = np.nan
    seen = []

    z, weights = z_scores(Known(0.1, seen), replace(responses, values_MN=holes), 2, 0, folds=4)

    assert z.shape == (22, 1)
    np.testing.assert_allclose(z, 1.0)
    np.testing.assert_array_equal(weights, 1.0)
    assert sorted(seen) == [17, 17, 18, 18]
    assert len(z_scores(Known(0.1), constant_half(6), 2, 0, folds=50)[0]) == 6


def test_rows_count_as_in_the_fit():
    """A spread is that of the heavy rows where these have nearly all the weight."""
    values = np.full((40, 4), 0.5)
    values[:20, 2:] = 0.9
    heavy = np.where(np.arange(40) < 20, 1.0, 1e-6)

    even = spread(Known(0.1), Responses.of(values), 2, 0)
    uneven = spread(Known(0.1), replace(Responses.of(values), rows_M=heavy), 2, 0)

    assert even[0] == pytest.approx(np.sqrt((20 * 4 + 2 * 2.25) / 42))
    assert uneven[0] == pytest.approx(np.sqrt((20 * 4 + 2 * 2.25) / 22), rel=1e-3)


def test_few_rows_and_large_claims_have_bounds():
    """Fewer than five complete rows say nothing; too large a claim is not shrunk beyond the floor."""
    assert spread(Known(0.1), constant_half(4), 2, 0)[0] == UNKNOWN_SPREAD
    assert spread(Known(50.0), constant_half(100), 2, 0)[0] == LEAST_SPREAD
    assert spread(Known(0.0), constant_half(50), 2, 0)[0] == LEAST_SPREAD


@pytest.mark.parametrize(("rows", "count"), [(110, 10), (110, 30), (30, 12)])
def test_calibrated_intervals_cover(rows, count):
    """90 % intervals hold about 90 % of new models of the same population, each time with several draws."""
    held = []
    for seed in range(3):
        values = answers(rows + 200, seed=10 * seed)
        responses = Responses.of(values[:rows])
        settings = Factor(partner="none", shrinkage=0.3)
        fit = settings.fit(responses, seed)
        items = list(fit.choose(count).items)
        value, error = fit.estimate(tuple(items), values[rows:, items])
        stretched = spread(settings, responses, count, seed) * error
        held.append((np.abs(value[:, 0] - values[rows:].mean(axis=1)) < 1.645 * stretched[:, 0]).mean())

    assert 0.84 < np.mean(held) < 0.96


def test_settings_that_decide_do_so_once(monkeypatch):
    """The shrinkage is cross-validated on all rows, and the folds are fitted with it."""
    values = answers(105, items=60)
    calls = []
    decide = Factor.pinned
    monkeypatch.setattr(Factor, "pinned", lambda self, *given: calls.append(1) or decide(self, *given))

    found = calibration.spread(Factor(), Responses.of(values), 10, 0, folds=2)

    assert calls == [1]
    assert 0.8 < found[0] < 2.0


def test_margins_are_given_to_the_estimator():
    """Held-out rows are estimated with their margins, where there are some."""
    values = answers(40, items=60)
    responses = Responses.of(values, margins_MN=4.0 * values - 2.0 + 0.1 * np.arange(60))

    with_, without = (spread(Factor(margins=margins), responses, 8, 0) for margins in (True, False))

    assert with_[0] != without[0]


def test_the_monitor_speaks_up():
    """When promoted candidates are off by more than 1.5 of their errors; not for fewer than eight of them."""
    assert monitor([]).message == ""
    assert monitor([3.0] * 7) == (3.0, 1.0, "")
    assert monitor([1.0, -1.0] * 4) == (1.0, 1.0, "")
    found = monitor([2.0, -2.0] * 4)
    assert (found.rms, found.inflate) == (2.0, 2.0)
    assert "2.0 times" in found.message
    assert "promote more" in found.message

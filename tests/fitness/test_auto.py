"""What `auto` uses, and what it says about it."""

import numpy as np
import pytest

from evomerge.errors import ExperimentError
from evomerge.fitness.auto import Auto
from evomerge.fitness.factor import Factor
from evomerge.fitness.frontier import frontier
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean, Stratified


def responses(rows: int, bounded: bool = True) -> Responses:
    """Return responses of so many rows to 40 items."""
    rng = np.random.default_rng(rows)
    return Responses.of((rng.random((rows, 40)) < rng.random((rows, 1))).astype(float), bounded=bounded)


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        (responses(0), Stratified(), "stratified: 0 complete rows"),
        (responses(19), Stratified(), "stratified: 19 complete rows"),
        (responses(20), Factor(), "factor: 20 complete rows"),
        (responses(30, bounded=False), Mean(), "mean: the responses have no bounds"),
    ],
)
def test_it_is_the_estimator_that_suits_the_rows(given: Responses, settings: object, words: str) -> None:
    """Same choice and same estimate as the named one, and a reason in one line."""
    fit, same = Auto().fit(given, 5), settings.fit(given, 5)
    assert fit.choose(9, (1, 2)) == same.choose(9, (1, 2))
    answers = np.random.default_rng(0).random((2, 9)).round()
    found, expected = (one.estimate(fit.choose(9).items, answers) for one in (fit, same))
    np.testing.assert_array_equal(found.value_CK, expected.value_CK)
    np.testing.assert_array_equal(found.error_CK, expected.error_CK)
    assert fit.reason.startswith(words)
    assert "\n" not in fit.reason
    assert fit.warnings == same.warnings


def test_margins_are_used_where_rows_have_them() -> None:
    """As the factor model that is told to use them does, and unlike the one that is not."""
    rows = responses(40)
    margins = np.random.default_rng(1).normal(size=(40, 40)) + 4.0 * rows.values_MN
    given = Responses.of(rows.values_MN, margins_MN=margins)
    fit, same, other = (one.fit(given, 0) for one in (Auto(), Factor(margins=True), Factor()))
    items = fit.choose(8).items
    assert items == same.choose(8).items
    answers, soft = rows.values_MN[:3, list(items)], margins[:3, list(items)]
    found, expected, plain = (one.estimate(items, answers, soft).value_CK for one in (fit, same, other))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - plain).max() > 1e-6


@pytest.mark.parametrize("items", [40, 15], ids=["all items", "some items"])
def test_margins_are_used_at_the_frontier(items: int) -> None:
    """Also when promoted rows weigh more and far ones are left out, and where one task of two has margins."""
    rows = responses(60)
    margins = np.random.default_rng(1).normal(size=(60, 40)) + 4.0 * rows.values_MN
    margins[:, items:] = np.nan
    near = frontier(Responses.of(rows.values_MN, margins_MN=margins), np.arange(50, 60))
    fit, plain = Auto().fit(near, 0), Factor().fit(near, 0)
    chosen = (0, 1, 2, 3, 30, 31, 32)
    answers, soft = rows.values_MN[:3, list(chosen)], margins[:3, list(chosen)]
    assert len(near.rows_M) == 40
    assert "with margins" in fit.reason
    found = fit.estimate(chosen, answers, soft).value_CK
    assert np.isfinite(found).all()
    assert np.abs(found - plain.estimate(chosen, answers).value_CK).max() > 1e-6


def test_rows_with_gaps_are_not_complete() -> None:
    """Thirty rows of which twelve miss an item are eighteen."""
    given = responses(30)
    given.values_MN[:12, 3] = np.nan
    assert Auto().fit(given, 0).reason.startswith("stratified: 18 complete rows")
    assert Auto(rows=18).fit(given, 0).reason.startswith("factor: 18 complete rows")


def test_fewer_rows_than_two_are_refused() -> None:
    """No model of the items is fitted to one row."""
    with pytest.raises(ExperimentError, match="rows must be at least 2, got 1"):
        Auto(rows=1)

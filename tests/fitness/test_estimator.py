"""Scores with errors over the population of items, and the helpers that all estimators share."""

import numpy as np
import pytest

from evomerge.fitness.estimator import Estimate, checked, dispersion, free, scores, settled
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean


def two_tasks(values: np.ndarray, bounded: bool = True) -> Responses:
    """Return responses whose first 30 and last 10 items make a score each."""
    targets = np.zeros((2, 40))
    targets[0, :30], targets[1, 30:] = 1 / 30, 1 / 10
    return Responses(
        values_MN=values,
        targets_KN=targets,
        strata_N=np.zeros(40, dtype=np.intp),
        rows_M=np.ones(len(values)),
        bounded=bounded,
    )


def test_all_items_leave_the_error_of_their_own_sampling() -> None:
    """24 right of 30: middle 26 / 34, error^2 = m (1 - m) / 30 + (m - .8)^2; the other task likewise."""
    responses = two_tasks(np.zeros((0, 40)))
    answers = np.r_[np.ones(24), np.zeros(6), np.zeros(10)]
    first, second = scores(Mean().fit(responses, 0), np.ones(2), range(40), answers, responses)
    middle = 26 / 34
    assert first.value == pytest.approx(0.8)
    assert first.error == pytest.approx(np.sqrt(middle * (1 - middle) / 30 + (middle - 0.8) ** 2))
    assert (first.items, second.items) == (30, 10)
    assert second.value == 0.0
    assert second.error == pytest.approx(np.sqrt(2 / 14 * 12 / 14 / 10 + (2 / 14) ** 2))


def test_some_items_add_the_calibrated_error() -> None:
    """Twice the spread: four times that part of the squared error which is not sampling."""
    responses = two_tasks(np.zeros((0, 40)))
    fit = Mean().fit(responses, 0)
    items, answers = (0, 1, 2, 3, 30, 31), np.array([1.0, 0.0, 1.0, np.nan, 1.0, 0.0])
    raw = fit.estimate(items, answers[None]).error_CK[0]
    for narrow, wide, error in zip(
        scores(fit, np.ones(2), items, answers, responses),
        scores(fit, np.full(2, 2.0), items, answers, responses),
        raw,
        strict=True,
    ):
        assert wide.value == narrow.value
        assert wide.error**2 - narrow.error**2 == pytest.approx(3.0 * error**2)
    assert narrow.items == 2


def test_errors_over_the_population_cover_it() -> None:
    """Candidates of known chance, 200 items drawn from their population, 20 of these asked: 90 % of intervals hold."""
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(400):
        chance = rng.beta(2.0, 2.0)
        answers = (rng.random(200) < chance).astype(float)
        responses = Responses.of(np.zeros((0, 200)))
        fit = Mean().fit(responses, seed)
        items = fit.choose(20).items
        (found,) = scores(fit, np.ones(1), items, answers[list(items)], responses)
        inside.append(abs(found.value - chance) <= 1.645 * found.error)
    assert 0.86 < np.mean(inside) < 0.95


def test_fractions_vary_less_than_right_and_wrong() -> None:
    """Rows with responses at .4 and .6 have a 24th of the variance of those at 0 and 1; no rows, the whole."""
    assert dispersion(Responses.of(np.tile([0.4, 0.6], (3, 5))), 0) == pytest.approx(0.01 / 0.25)
    assert dispersion(Responses.of(np.tile([0.0, 1.0], (3, 5))), 0) == pytest.approx(1.0)
    assert dispersion(Responses.of(np.zeros((0, 5))), 0) == 1.0
    assert dispersion(Responses.of(np.ones((2, 5))), 0) == 1.0
    fractions = Responses.of(np.tile([0.4, 0.6], (3, 5)))
    (found,) = scores(Mean().fit(fractions, 0), np.ones(1), range(10), np.tile([0.4, 0.6], 5), fractions)
    assert found.error == pytest.approx(np.sqrt(0.04 * 0.25 / 10))


def test_responses_without_bounds_have_the_standard_error_of_their_mean() -> None:
    """Part by part: what is not asked yet, and that all items are a sample, are s^2 / n together."""
    responses = two_tasks(np.zeros((0, 40)), bounded=False)
    fit = Mean().fit(responses, 0)
    answers = np.array([100.0, 140.0, 120.0, 7.0])
    first, second = scores(fit, np.ones(2), (0, 1, 2, 35), answers, responses)
    assert first.value == pytest.approx(120.0)
    assert first.error == pytest.approx(20.0 / np.sqrt(3))
    assert second.error == pytest.approx(7.0)


def test_one_response_without_bounds_has_the_variance_of_the_rows() -> None:
    """Where rows are known."""
    rows = two_tasks(np.vstack([np.arange(40.0), np.arange(40.0)[::-1]]), bounded=False)
    _, second = scores(Mean().fit(rows, 0), np.ones(2), (0, 35), np.array([3.0, 7.0]), rows)
    assert second.error == pytest.approx(np.arange(10).std(ddof=1))


def test_nothing_answered_is_no_score() -> None:
    """A candidate without any answer is refused."""
    responses = two_tasks(np.zeros((0, 40)))
    with pytest.raises(ValueError, match="at least one answered"):
        scores(Mean().fit(responses, 0), np.ones(2), (1, 2), np.full(2, np.nan), responses)


def test_settled_scores_are_exact_and_others_stay() -> None:
    """Where all items that count in a score are answered; items without a share do not matter."""
    targets = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    guess = Estimate(np.full((2, 2), 0.3), np.full((2, 2), 0.1))
    found = settled(guess, targets, (1, 0), np.array([[1.0, 0.0], [1.0, np.nan]]))
    assert found.value_CK.tolist() == [[0.5, 0.3], [0.3, 0.3]]
    assert found.error_CK.tolist() == [[0.0, 0.1], [0.1, 0.1]]


def test_checked_and_free_places() -> None:
    """Arrays of the right kind, or a line that says what is wrong; free places are the others, in order."""
    item_n, values_Cn = checked([3, 1], [[1, 0]], 4)
    assert item_n.dtype == np.intp
    assert values_Cn.dtype == np.float64
    assert free(5, (3, 0)).tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match="2 items and responses"):
        checked([0, 1], np.zeros((1, 3)), 4)


def test_responses_without_bounds_are_not_held_to_the_unit_interval_but_finite() -> None:
    """Bounded ones are."""
    assert Responses.of(np.array([[7.0, -3.0]]), bounded=False).scores_MK[0, 0] == 2.0
    with pytest.raises(ValueError, match="must lie in"):
        Responses.of(np.array([[7.0, -3.0]]))
    with pytest.raises(ValueError, match="must be finite"):
        Responses.of(np.array([[np.inf, 0.0]]), bounded=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets_KN": np.full((1, 3), 1 / 3)}, "do not fit"),
        ({"margins_MN": np.zeros((2, 3))}, "do not fit"),
        ({"targets_KN": np.full((1, 2), 0.4)}, "add up to 1"),
        ({"targets_KN": np.array([[1.5, -0.5]])}, "at least 0"),
        ({"rows_M": np.array([1.0, -1.0])}, "less than 0"),
    ],
)
def test_responses_that_do_not_fit_are_refused(fields: dict[str, np.ndarray], message: str) -> None:
    """With what is wrong."""
    whole = {
        "values_MN": np.zeros((2, 2)),
        "targets_KN": np.full((1, 2), 0.5),
        "strata_N": np.zeros(2, dtype=np.intp),
        "rows_M": np.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        Responses(**(whole | fields))


def test_some_rows_keep_their_weights_margins_and_sources() -> None:
    """In the order that they are asked for."""
    whole = Responses(
        values_MN=np.eye(3),
        targets_KN=np.full((1, 3), 1 / 3),
        strata_N=np.zeros(3, dtype=np.intp),
        rows_M=np.array([1.0, 2.0, 3.0]),
        margins_MN=np.arange(9.0).reshape(3, 3),
        sources=(0, 2),
    )
    some = whole.only(np.array([2, 1]))
    assert some.rows_M.tolist() == [3.0, 2.0]
    assert some.sources == (0,)
    assert some.margins_MN is not None
    assert some.margins_MN[:, 0].tolist() == [6.0, 3.0]
    assert some.complete

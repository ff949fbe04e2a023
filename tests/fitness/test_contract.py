"""What every estimator keeps, whichever its settings: the same tests over all that the registry knows."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from evomerge.fitness.calibration import spread
from evomerge.fitness.estimator import Estimator, Fit
from evomerge.fitness.registry import ESTIMATORS, PUBLISHED
from evomerge.fitness.responses import Responses

SETTINGS: dict[str, Estimator] = {name: kind() for name, kind in ESTIMATORS.items()}
SETTINGS |= {f"{name} as published": settings for name, settings in PUBLISHED.items()}
#: They keep the noise of sampling by design.
SAMPLED = ("mean", "aipw")
#: Anchors, and abilities by maximum likelihood, need more rows or more items than these to beat a random subset; they
#: may not fall far behind it.
WEAK = tuple(name for name in SETTINGS if name == "anchors" or "published" in name)

every = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def simulated(seed: int, rows: int, items: int, tests: int = 0, tasks: int = 1) -> tuple[Responses, np.ndarray]:
    """Return responses of a two-dimensional logistic law, of which four rows are sources, and those of tests [T, N]."""
    rng = np.random.default_rng(seed)
    ability = rng.normal(size=(rows + tests, 2)) * [1.2, 0.4]
    ability[4:] = 0.5 * ability[4:] + 0.8 * rng.dirichlet(np.ones(4), rows + tests - 4) @ ability[:4] * 1.5
    logit = ability @ np.stack([rng.uniform(0.6, 2.0, items), rng.normal(size=items)]) - rng.normal(0.0, 1.3, items)
    values = (rng.random(logit.shape) < expit(logit)).astype(float)
    task = np.arange(items) % tasks
    targets = np.equal(np.arange(tasks)[:, None], task).astype(float)
    responses = Responses(
        values_MN=values[:rows],
        targets_KN=targets / targets.sum(axis=1, keepdims=True),
        strata_N=task.astype(np.intp),
        rows_M=np.ones(rows),
        sources=(0, 1, 2, 3),
    )
    return responses, values[rows:]


def fitted(settings: Estimator, seed: int = 0, **shape: int) -> tuple[Fit, Responses, np.ndarray]:
    """Return a fit to simulated responses, these, and those of tests."""
    responses, tests = simulated(seed, **{"rows": 40, "items": 60, "tests": 6} | shape)
    return settings.fit(responses, seed=3), responses, tests


@every
@pytest.mark.parametrize("tasks", [1, 3])
def test_given_all_items_the_value_is_the_mean_and_certain(settings: Estimator, tasks: int) -> None:
    """Nothing is left to predict, in whatever order the items come."""
    fit, _, tests = fitted(settings, tasks=tasks)
    order = np.random.default_rng(0).permutation(60)
    found = fit.estimate(tuple(order.tolist()), tests[:, order])
    truth = np.stack([tests[:, task::tasks].mean(axis=1) for task in range(tasks)], axis=1)
    np.testing.assert_allclose(found.value_CK, truth, atol=1e-12)
    assert not found.error_CK.any()


@every
def test_a_task_answered_in_full_is_certain_though_another_is_not(settings: Estimator) -> None:
    """Of three tasks the first is known, and the others are estimated with an error."""
    fit, _, tests = fitted(settings, tasks=3)
    items = np.union1d(np.arange(0, 60, 3), np.arange(15))
    found = fit.estimate(tuple(items.tolist()), tests[:, items])
    np.testing.assert_allclose(found.value_CK[:, 0], tests[:, ::3].mean(axis=1), atol=1e-12)
    assert not found.error_CK[:, 0].any()
    assert (found.error_CK[:, 1:] > 0.0).all()


@every
@pytest.mark.parametrize("tasks", [1, 3])
def test_chosen_items_are_sorted_distinct_and_not_taken(settings: Estimator, tasks: int) -> None:
    """As many as wanted, with weights that add up to 1; all that are left where they are fewer."""
    fit, _, _ = fitted(settings, tasks=tasks)
    for count, taken in [(1, ()), (7, ()), (7, (0, 3, 59)), (20, tuple(range(0, 60, 2))), (60, ()), (50, (4, 5))]:
        items, weights = fit.choose(count, taken)
        assert list(items) == sorted(set(items) - set(taken))
        assert len(items) == min(count, 60 - len(taken)) == len(weights)
        assert set(items) <= set(range(60))
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) >= 0.0
    assert set(fit.choose(99, (7,)).items) == set(range(60)) - {7}
    assert fit.choose(5, tuple(range(60))).items == ()


@every
def test_every_task_is_asked(settings: Estimator) -> None:
    """Twelve items for three tasks leave none out."""
    fit, _, _ = fitted(settings, tasks=3)
    assert {item % 3 for item in fit.choose(12).items} == {0, 1, 2}


@every
def test_the_same_seed_gives_the_same_choice_and_estimate(settings: Estimator) -> None:
    """Also from a fit made anew, and after other questions."""
    (one, _, tests), (other, _, _) = fitted(settings), fitted(settings)
    one.estimate((1, 2, 3), tests[:, [1, 2, 3]])
    items = one.choose(9).items
    assert other.choose(9) == one.choose(9)
    found, again = (fit.estimate(items, tests[:, list(items)]) for fit in (one, other))
    np.testing.assert_array_equal(found.value_CK, again.value_CK)
    np.testing.assert_array_equal(found.error_CK, again.error_CK)


@every
def test_items_are_a_set_and_candidates_are_apart(settings: Estimator) -> None:
    """Neither the order of items nor who else is estimated changes a score."""
    fit, _, tests = fitted(settings)
    items = np.array([2, 3, 11, 30, 41, 55])
    forth = fit.estimate(tuple(items.tolist()), tests[:, items])
    back = fit.estimate(tuple(items[::-1].tolist()), tests[:, items[::-1]])
    alone = fit.estimate(tuple(items.tolist()), tests[2:3, items])
    for a, b, c in zip(forth, back, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a[2:3], c, atol=1e-6)


@every
def test_an_item_without_an_answer_is_as_if_it_was_not_asked(settings: Estimator) -> None:
    """A candidate that missed one item has the score of the others."""
    fit, _, tests = fitted(settings)
    items = np.array([2, 3, 11, 30, 41, 55])
    values = tests[:, items].copy()
    values[1, 2] = np.nan
    rest = np.delete(items, 2)
    found = fit.estimate(tuple(items.tolist()), values)
    expected = fit.estimate(tuple(rest.tolist()), tests[1:2, rest])
    np.testing.assert_allclose(found.value_CK[1], expected.value_CK[0], atol=1e-6)
    np.testing.assert_allclose(found.error_CK[1], expected.error_CK[0], atol=1e-6)


@every
def test_who_answered_nothing_is_anywhere(settings: Estimator) -> None:
    """The value is finite and inside the unit interval, and the error is not small."""
    fit, _, _ = fitted(settings)
    for items in ((), (3, 4)):
        value, error = fit.estimate(items, np.full((1, len(items)), np.nan))
        assert 0.0 <= value[0, 0] <= 1.0
        assert 0.05 < error[0, 0] < 1.0


@every
def test_all_right_and_all_wrong_are_finite_in_order_and_in_doubt(settings: Estimator) -> None:
    """Where a maximum-likelihood ability does not exist."""
    fit, _, _ = fitted(settings)
    items = fit.choose(12).items
    found = fit.estimate(items, np.array([np.ones(12), np.full(12, 0.5), np.zeros(12)]))
    high, middle, low = found.value_CK[:, 0]
    assert -0.1 < low < middle < high < 1.1
    assert (found.error_CK > 0.0).all()
    assert (found.error_CK < 0.6).all()


@every
def test_rows_with_gaps_and_extreme_rows_and_items_are_fitted(settings: Estimator) -> None:
    """Missing responses, rows and items all right or all wrong, fractions: values stay near what was answered."""
    responses, tests = simulated(5, rows=40, items=60, tests=6)
    values = responses.values_MN.copy()
    values[6], values[7] = 1.0, 0.0
    values[:, 10], values[:, 11], values[:, 12] = 1.0, 0.0, 0.5
    values[8:, :][np.random.default_rng(1).random((32, 60)) < 0.2] = np.nan
    fit = settings.fit(_with(responses, values), 0)
    items = fit.choose(20).items
    found = fit.estimate(items, tests[:, list(items)])
    assert np.isfinite(found.value_CK).all()
    assert (found.error_CK > 0.0).all()
    assert np.abs(found.value_CK[:, 0] - tests.mean(axis=1)).mean() < 0.15


def _with(responses: Responses, values: np.ndarray) -> Responses:
    """Return the responses with other values."""
    return Responses(
        values_MN=values,
        targets_KN=responses.targets_KN,
        strata_N=responses.strata_N,
        rows_M=responses.rows_M,
        sources=responses.sources,
    )


@every
@pytest.mark.parametrize("items", [1, 2])
def test_one_item_and_two_items_are_a_split_too(settings: Estimator, items: int) -> None:
    """The only item is chosen, and its response is the score."""
    fit, _, tests = fitted(settings, items=items)
    assert fit.choose(1).items[0] in range(items)
    assert fit.choose(items).items == tuple(range(items))
    found = fit.estimate(tuple(range(items)), tests)
    np.testing.assert_allclose(found.value_CK[:, 0], tests.mean(axis=1), atol=1e-12)
    partly = fit.estimate((0,), tests[:, :1])
    assert np.isfinite(partly.value_CK).all()


@every
def test_items_that_all_answer_alike_do_not_break_a_fit(settings: Estimator) -> None:
    """Responses without any variance: the score is where they are."""
    responses, _ = simulated(0, rows=30, items=20)
    constant = np.broadcast_to((np.arange(20) < 15).astype(float), (30, 20)).copy()
    fit = settings.fit(_with(responses, constant), 0)
    items = fit.choose(8).items
    found = fit.estimate(items, constant[:1, list(items)])
    assert found.value_CK[0, 0] == pytest.approx(0.75, abs=0.16)


@every
def test_a_row_that_counts_nothing_changes_nothing_and_weights_are_no_error(settings: Estimator) -> None:
    """A fit with a row of weight 0, which contradicts all others, is finite and near that without."""
    responses, tests = simulated(2, rows=41, items=60, tests=6)
    weights = np.ones(41)
    weights[40] = 0.0
    values = responses.values_MN.copy()
    values[40] = 1.0 - values[39]
    weighted = Responses(
        values_MN=values,
        targets_KN=responses.targets_KN,
        strata_N=responses.strata_N,
        rows_M=weights,
        sources=responses.sources,
    )
    with_row, without = (settings.fit(given, 0) for given in (weighted, weighted.only(np.arange(40))))
    items = tuple(range(0, 60, 5))
    found, expected = (fit.estimate(items, tests[:, ::5]).value_CK for fit in (with_row, without))
    assert np.abs(found - expected).max() < 0.03


@every
@pytest.mark.parametrize(
    ("items", "shape", "message"),
    [
        ((1, 1), (1, 2), "distinct"),
        ((60,), (1, 1), "60 items"),
        ((-1,), (1, 1), "60 items"),
        ((0, 1), (1, 1), "column"),
    ],
)
def test_nonsense_is_refused(settings: Estimator, items: tuple[int, ...], shape: tuple[int, int], message: str) -> None:
    """With a line that says what was wrong."""
    fit, _, _ = fitted(settings)
    with pytest.raises(ValueError, match=message):
        fit.estimate(items, np.zeros(shape))


@every
def test_fits_say_what_they_did(settings: Estimator) -> None:
    """A reason and warnings of one line each."""
    fit, _, _ = fitted(settings)
    assert isinstance(fit.reason, str)
    assert isinstance(fit.warnings, tuple)
    assert all("\n" not in line for line in (fit.reason, *fit.warnings))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in SAMPLED])
def test_ranks_are_nearer_to_the_truth_than_those_of_a_random_subset(name: str) -> None:
    """Candidates by 25 of 200 items, over four simulations."""
    ours, theirs = [], []
    for seed in range(4):
        responses, tests = simulated(seed, rows=60, items=200, tests=60)
        truth = tests.mean(axis=1)
        for settings, found in ((SETTINGS[name], ours), (SETTINGS["mean"], theirs)):
            fit = settings.fit(responses, seed)
            items = fit.choose(25).items
            found.append(spearmanr(fit.estimate(items, tests[:, list(items)]).value_CK[:, 0], truth)[0])
    assert np.mean(ours) > np.mean(theirs) - (0.05 if name in WEAK else 0.0)


@every
def test_calibrated_intervals_cover(settings: Estimator) -> None:
    """90 % intervals, with the spread of rows held out, hold the truth of 75 to 99 in 100 candidates."""
    inside = []
    for seed in range(2):
        responses, tests = simulated(seed + 20, rows=60, items=120, tests=80)
        fit = settings.fit(responses, seed)
        items = fit.choose(20).items
        value, error = fit.estimate(items, tests[:, list(items)])
        scale = spread(settings, responses, 20, seed)
        inside.append(np.abs(value[:, 0] - tests.mean(axis=1)) <= 1.645 * scale[0] * error[:, 0])
    assert 0.75 < np.mean(inside) < 0.99

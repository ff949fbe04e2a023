"""Random and stratified subsets against enumeration, exact laws and simulated repetitions."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom

from evomerge.errors import ExperimentError
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean, Stratified, inclusion, patterns, quotas


def nothing(items: int, bounded: bool = True) -> Responses:
    """Return responses of no row."""
    return Responses.of(np.zeros((0, items)), bounded=bounded)


class TestMean:
    """The plain mean."""

    def test_value_and_error_have_their_closed_forms(self) -> None:
        """12 right of 16 of 100: middle 14 / 20; both parts shrink as the rest of the items does."""
        found = Mean().fit(nothing(100), 0).estimate(tuple(range(16)), np.array([[1.0] * 12 + [0.0] * 4]))
        assert found.value_CK[0, 0] == pytest.approx(0.75)
        assert found.error_CK[0, 0] == pytest.approx(np.sqrt(0.84 * 0.7 * 0.3 / 16 + (0.84 * 0.05) ** 2))

    def test_fractional_responses_use_their_own_variance(self) -> None:
        """Of sixteen halves only the four added answers are in doubt: variance 4 * .25 / 20."""
        found = Mean().fit(nothing(100_000), 0).estimate(tuple(range(16)), np.full((1, 16), 0.5))
        assert found.error_CK[0, 0] == pytest.approx(np.sqrt(1 / 320), rel=1e-3)

    def test_it_is_unbiased_over_its_seeds(self) -> None:
        """Every item is chosen equally often, and so is every pair, as far as 3000 draws tell."""
        pairs = np.zeros((8, 8))
        for seed in range(3000):
            chosen = list(Mean().fit(nothing(8), seed).choose(3).items)
            pairs[np.ix_(chosen, chosen)] += 1.0
        np.testing.assert_allclose(np.diag(pairs) / 3000, 3 / 8, atol=0.04)
        np.testing.assert_allclose(pairs[~np.eye(8, dtype=bool)] / 3000, 3 * 2 / (8 * 7), atol=0.03)

    def test_more_items_are_the_same_and_others(self) -> None:
        """So that whoever is asked more is compared on what all were asked."""
        fit = Mean().fit(nothing(50), 4)
        assert set(fit.choose(10).items) < set(fit.choose(20).items)
        assert set(fit.choose(10, fit.choose(10).items).items) == set(fit.choose(20).items) - set(fit.choose(10).items)

    @pytest.mark.parametrize("n", [20, 40, 200])
    def test_intervals_cover_the_truth_about_95_times_in_100(self, n: int) -> None:
        """By the exact binomial law at every probability on a fine grid from .01 to .99, many items being left."""
        answers = np.tri(n + 1, n, -1)
        value, error = Mean().fit(nothing(100_000), 0).estimate(tuple(range(n)), answers)
        low, high = value[:, 0] - 1.96 * error[:, 0], value[:, 0] + 1.96 * error[:, 0]
        for p in np.linspace(0.01, 0.99, 99):
            assert binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() > 0.92

    def test_its_error_is_that_of_all_possible_subsets(self) -> None:
        """Over all 252 subsets of five of ten items: the root mean square error is near the mean claimed one."""
        truth = np.array([1.0, 1, 1, 1, 0, 0, 1, 0, 0, 1])
        fit = Mean().fit(nothing(10), 0)
        found = [fit.estimate(subset, truth[None, list(subset)]) for subset in combinations(range(10), 5)]
        squares = np.mean([(one.value_CK[0, 0] - 0.6) ** 2 for one in found])
        claimed = np.mean([one.error_CK[0, 0] ** 2 for one in found])
        assert squares == pytest.approx(0.24 / 5 * 5 / 9)  # finite population
        assert claimed == pytest.approx(squares, rel=0.1)

    def test_responses_without_bounds_have_a_mean_and_its_standard_error(self) -> None:
        """Nothing is added to nats or tokens: s^2 / n, less what is not left to ask."""
        fit = Mean().fit(nothing(40, bounded=False), 0)
        values = np.array([[250.0, 310.0, 270.0, 290.0]])
        found = fit.estimate((1, 5, 6, 30), values)
        assert found.value_CK[0, 0] == pytest.approx(280.0)
        assert found.error_CK[0, 0] == pytest.approx(values.std(ddof=1) / 2.0 * np.sqrt(0.9))
        lone = fit.estimate((3,), np.array([[-7.0]]))
        assert lone.error_CK[0, 0] == pytest.approx(7.0 * np.sqrt(39 / 40))

    def test_one_response_without_bounds_varies_as_the_rows_do(self) -> None:
        """Where there are rows they say by how much items differ."""
        rows = Responses.of(np.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]]), bounded=False)
        found = Mean().fit(rows, 0).estimate((0,), np.array([[4.0]]))
        assert found.error_CK[0, 0] == pytest.approx(np.sqrt(np.mean([4.0, 0.0]) * 2 / 3))

    def test_tasks_are_asked_alike_whatever_their_sizes(self) -> None:
        """Two scores that count alike get as many items each, from 20 and from 200."""
        targets = np.zeros((2, 220))
        targets[0, :20], targets[1, 20:] = 1 / 20, 1 / 200
        responses = Responses(
            values_MN=np.zeros((0, 220)), targets_KN=targets, strata_N=np.zeros(220, dtype=np.intp), rows_M=np.zeros(0)
        )
        chosen = np.array(Mean().fit(responses, 0).choose(24).items)
        assert (chosen < 20).sum() == 12

    def test_a_score_of_unequal_shares_is_unbiased(self) -> None:
        """Heavy items are drawn more often and count no less: 1500 seeds average to the truth."""
        share = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
        truth = np.array([1.0, 0, 1, 0, 1, 1, 0, 0])
        responses = Responses(
            values_MN=np.zeros((0, 8)), targets_KN=share[None], strata_N=np.zeros(8, dtype=np.intp), rows_M=np.zeros(0)
        )
        found = []
        for seed in range(1500):
            fit = Mean().fit(responses, seed)
            items = fit.choose(4).items
            found.append(fit.estimate(items, truth[None, list(items)]).value_CK[0, 0])
        assert np.mean(found) == pytest.approx(share @ truth, abs=0.03)

    def test_a_task_that_was_not_asked_is_said_to_be_unknown(self) -> None:
        """Without rows one half, give or take as much; with rows their mean and deviation."""
        targets = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
        for values, mean, error in [
            (np.zeros((0, 3)), 0.5, 0.5),
            (np.array([[1.0, 0.0, 0.2], [1.0, 1.0, 0.4], [0.0, 0.0, 0.6]]), 0.4, 0.2),
        ]:
            responses = Responses(
                values_MN=values, targets_KN=targets, strata_N=np.zeros(3, dtype=np.intp), rows_M=np.ones(len(values))
            )
            found = Mean().fit(responses, 0).estimate((0,), np.array([[1.0]]))
            assert found.value_CK[0, 1] == pytest.approx(mean)
            assert found.error_CK[0, 1] == pytest.approx(error, abs=0.002)


class TestStratified:
    """The stratified subset."""

    def test_every_stratum_has_its_share(self) -> None:
        """Of strata of 60, 30 and 10 in 100 items, 20 items are 12, 6 and 2."""
        strata = np.repeat([0, 1, 2], [60, 30, 10])
        for seed in range(5):
            fit = Stratified().fit(Responses.of(np.zeros((0, 100)), strata), seed)
            counts = np.bincount(strata[list(fit.choose(20).items)])
            assert np.abs(counts - [12, 6, 2]).max() <= 1

    def test_every_difficulty_has_its_share(self) -> None:
        """Ten of 100 items: one of each tenth by the rows' means, give or take a neighbour."""
        level = np.random.default_rng(0).permutation(100)
        rows = (np.random.default_rng(1).random((400, 100)) < level / 100).astype(float)
        chosen = list(Stratified().fit(Responses.of(rows), 0).choose(10).items)
        assert np.abs(np.sort(level[chosen]) - np.arange(5, 100, 10)).max() < 12

    def test_it_is_nearer_than_the_mean_and_knows_it(self) -> None:
        """Where difficulty explains responses: over 200 draws less error, no bias, and an error that is true."""
        rng = np.random.default_rng(0)
        hardness = rng.uniform(-4.0, 4.0, 300)
        rows = (rng.random((50, 300)) < 1 / (1 + np.exp(hardness - rng.normal(size=(50, 1))))).astype(float)
        truth = (rng.random(300) < 1 / (1 + np.exp(hardness - 0.5))).astype(float)
        known, away = Responses.of(rows), {}
        for settings in (Mean(), Stratified()):
            found = []
            for seed in range(200):
                fit = settings.fit(known, seed)
                items = fit.choose(30).items
                value, error = fit.estimate(items, truth[None, list(items)])
                found.append((value[0, 0] - truth.mean(), error[0, 0]))
            away[type(settings)] = np.array(found)
        ours, theirs = away[Stratified], away[Mean]
        assert np.sqrt((ours[:, 0] ** 2).mean()) < 0.75 * np.sqrt((theirs[:, 0] ** 2).mean())
        assert abs(ours[:, 0].mean()) < 0.015
        assert 0.85 < (ours[:, 1] ** 2).mean() / (ours[:, 0] ** 2).mean() < 1.5
        assert (np.abs(ours[:, 0]) < 1.645 * ours[:, 1]).mean() > 0.9

    def test_items_that_sources_disagree_on_are_asked_more_often_if_wanted(self) -> None:
        """At .25 a unanimous item is drawn a quarter as often; the estimate makes up for it."""
        sources = np.vstack([np.ones(200), np.repeat([1.0, 0.0], 100)])
        responses = Responses(
            values_MN=sources,
            targets_KN=np.full((1, 200), 1 / 200),
            strata_N=patterns(sources, np.zeros(200, dtype=np.intp)),
            rows_M=np.ones(2),
            sources=(0, 1),
        )
        truth = np.repeat([1.0, 0.0], 100)
        found = []
        for seed in range(50):
            fit = Stratified(unanimous=0.25).fit(responses, seed)
            choice = fit.choose(20)
            assert abs((np.array(choice.items) >= 100).sum() - 16) <= 1
            weight = dict(zip(choice.items, choice.weights, strict=True))
            assert weight[min(weight)] == pytest.approx(4.0 * weight[max(weight)])
            found.append(fit.estimate(choice.items, truth[None, list(choice.items)]).value_CK[0, 0])
        assert np.mean(found) == pytest.approx(0.5, abs=0.02)

    def test_it_refuses_to_leave_items_out(self) -> None:
        """An item that is never drawn makes the estimate inconsistent."""
        with pytest.raises(ExperimentError, match="unanimous must be above 0"):
            Stratified(unanimous=0.0)


def test_patterns_are_tasks_and_who_is_right_in_order() -> None:
    """Three sources, two tasks: equal columns share a stratum, tasks do not mix, and more right ones come later."""
    sources = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0.4, 0], [1, 1, 0, np.nan, 1.0]])
    found = patterns(sources, np.array([0, 0, 0, 0, 1]))
    assert found.tolist() == [1, 1, 0, 0, 2]


def test_quotas_give_one_to_each_and_the_rest_by_weight() -> None:
    """As far as groups have any: the law of Sainte-Lague, by hand."""
    many = np.array([99, 99, 99])
    assert quotas(np.array([6.0, 3.0, 1.0]), many, 10).tolist() == [6, 3, 1]
    assert quotas(np.array([53.0, 24.0, 23.0]), many, 7).tolist() == [3, 2, 2]  # d'Hondt would give 4, 2, 1
    assert quotas(np.array([98.0, 1.0, 1.0]), many, 4).tolist() == [2, 1, 1]
    assert quotas(np.array([5.0, 3.0, 1.0]), many, 2).tolist() == [1, 1, 0]
    assert quotas(np.array([1.0, 1.0]), np.array([2, 9]), 8).tolist() == [2, 6]
    assert quotas(np.array([0.0, 1.0]), np.array([3, 3]), 9).tolist() == [3, 3]


def test_inclusion_adds_up_and_is_proportional_below_one() -> None:
    """Items that would be drawn more than once are drawn for sure, and the others by share."""
    share = np.array([10.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    found = inclusion(share, 3)
    assert found.sum() == pytest.approx(3.0)
    assert found[0] == 1.0
    np.testing.assert_allclose(found[1:5] / found[4], [4.0, 2.0, 1.0, 1.0])
    assert inclusion(share, 6).tolist() == [1.0] * 6

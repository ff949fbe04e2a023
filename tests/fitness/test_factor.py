import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from evomerge.errors import ExperimentError
from evomerge.fitness.conditional import Joint, expected, gain, joint, most_telling
from evomerge.fitness.factor import Factor
from evomerge.fitness.frontier import LEAST_ROWS, frontier
from evomerge.fitness.lowrank import Lowrank, effective, factorise, fill, missing_law
from evomerge.fitness.responses import Responses
from evomerge.fitness.shrinkage import MOST_STRATA, shrunk, target


def a_law(items=12, factors=3, seed=0):
    """A factor model of random parameters."""
    rng = np.random.default_rng(seed)
    return Lowrank(
        rng.uniform(0.2, 0.8, items), 0.3 * rng.standard_normal((items, factors)), rng.uniform(0.02, 0.2, items)
    )


def dense(law):
    """Its covariance matrix."""
    return law.loading_Nq @ law.loading_Nq.T + np.diag(law.noise_N)


def shares(scores=2, items=12, seed=1):
    """Shares of items in scores; one item has none in the first."""
    targets = np.random.default_rng(seed).uniform(0, 1, (scores, items))
    targets[0, 0] = 0.0
    return targets / targets.sum(axis=1, keepdims=True)


def drawn(law, rows, seed=0):
    """Rows drawn from a law."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, law.loading_Nq.shape[1]))
    return law.mean_N + z @ law.loading_Nq.T + np.sqrt(law.noise_N) * rng.standard_normal((rows, len(law.mean_N)))


def deviance(law, values, rows):
    """-2 log likelihood by the dense covariance of every row's known entries."""
    total = 0.0
    for y, weight in zip(values, rows, strict=True):
        known = np.isfinite(y)
        cov, x = dense(law)[np.ix_(known, known)], (y - law.mean_N)[known]
        total += weight * (np.linalg.slogdet(2 * np.pi * cov)[1] + x @ np.linalg.solve(cov, x))
    return total


def answers(rows=60, items=80, seed=0, factors=2, ability=1.2):
    """0/1 responses of an item response model with several abilities."""
    rng = np.random.default_rng(seed)
    slopes = np.c_[rng.uniform(0.5, 1.5, items) * ability, 0.7 * rng.standard_normal((items, factors - 1))]
    logits = rng.standard_normal((rows, factors)) @ slopes.T - rng.standard_normal(items)
    return (rng.random((rows, items)) < expit(logits)).astype(float)


@pytest.mark.parametrize("items", [[3], [0, 5, 11], list(range(12))])
def test_the_gain_is_the_conditional_law_of_the_dense_covariance(items):
    """Posterior means' weights and variances equal the textbook formula for a conditioned normal law."""
    law, targets = a_law(), shares()
    cov = dense(law)
    picked = cov[np.ix_(items, items)]
    weights = targets @ cov[:, items] @ np.linalg.inv(picked)
    variance = np.diag(targets @ cov @ targets.T - weights @ cov[items] @ targets.T)

    found = gain(joint(law, targets), np.array(items))

    np.testing.assert_allclose(found.weights_Kn, weights, atol=1e-9)
    np.testing.assert_allclose(found.variance_K, np.maximum(variance, 0), atol=1e-9)


def test_the_gain_of_other_features_is_the_conditional_law_too():
    """Where features are not the responses, the noise that they share with scores is conditioned on as well."""
    law, rng = a_law(), np.random.default_rng(3)
    load, own, rest = rng.standard_normal((2, 3)), 0.01 * rng.standard_normal((2, 12)), np.array([0.5, 0.7])
    both = Joint(*law, np.zeros(2), load, own, rest)
    items = np.array([1, 4, 9])
    cov_sx = (load @ law.loading_Nq.T + own)[:, items]
    weights = cov_sx @ np.linalg.inv(dense(law)[np.ix_(items, items)])
    variance = np.diag(load @ load.T + np.diag(rest) - weights @ cov_sx.T)

    found = gain(both, items)

    np.testing.assert_allclose(found.weights_Kn, weights, atol=1e-9)
    np.testing.assert_allclose(found.variance_K, variance, atol=1e-9)


@pytest.mark.parametrize("taken", [(), (4, 7)])
def test_every_chosen_item_lowers_the_variances_most(taken):
    """The greedy choice by rank-one updates equals trying every item with dense matrices; taken ones tell nothing."""
    law, targets = a_law(seed=5), shares(seed=6)
    cov = dense(law)

    def left(items):
        within = cov[np.ix_(items, items)] if items else np.zeros((0, 0))
        across = targets @ cov[:, items]
        open_ = np.diag(targets @ cov @ targets.T - across @ np.linalg.inv(within) @ across.T)
        return float((open_ / np.diag(targets @ cov @ targets.T)).sum())

    best = []
    for _ in range(4):
        best.append(min((i for i in range(12) if i not in (*best, *taken)), key=lambda i: left([*best, i])))

    assert most_telling(joint(law, targets), 4, taken) == best


def test_scores_count_alike_whatever_their_spread():
    """An item that settles half of a score that varies little comes before one that settles a quarter of a wide one."""
    first = np.arange(20) < 10
    law = Lowrank(np.full(20, 0.5), np.stack([0.1 * first, 0.4 * ~first], axis=1), np.where(first, 0.01, 0.5))
    targets = np.stack([first, ~first]) / 10.0

    assert most_telling(joint(law, targets), 1) == [0]


def test_missing_features_are_what_the_known_ones_let_expect():
    """They are filled with the conditional mean of the dense covariance."""
    law = a_law(seed=2)
    cov, items = dense(law), np.array([2, 5, 6, 8])
    values = np.array([[0.9, np.nan, 0.1, np.nan]])
    known, lost = [2, 6], [5, 8]
    want = law.mean_N[lost] + cov[np.ix_(lost, known)] @ np.linalg.solve(
        cov[np.ix_(known, known)], np.array([0.9, 0.1]) - law.mean_N[known]
    )

    np.testing.assert_allclose(expected(joint(law, shares()), items, values)[0, [1, 3]], want, atol=1e-9)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_every_sweep_raises_the_likelihood(missing):
    """Without priors expectation maximisation never lowers the likelihood of the table, complete or not."""
    values, rng = drawn(a_law(seed=8), 40), np.random.default_rng(0)
    values = np.clip(values, 0, 1)
    rows = rng.uniform(0.5, 2.0, 40)
    values[rng.random(values.shape) < missing] = np.nan

    def fitted(sweeps):
        if missing:
            return missing_law(values, rows, 2, sweeps, strength=0.0)
        return factorise(values, rows, 2, np.full(12, 0.1), sweeps=sweeps, strength=0.0)

    deviances = [deviance(fitted(sweeps), values, rows) for sweeps in (1, 2, 3, 5, 8, 13, 21)]

    assert np.all(np.diff(deviances) <= 1e-6)
    assert deviances[-1] < deviances[0] - 1.0


def test_a_covariance_of_few_factors_is_recovered():
    """From many rows the fitted covariance comes close to the one that they were drawn from."""
    law = a_law(items=30, factors=2, seed=4)
    values = drawn(law, 4000)

    found = factorise(values, np.ones(4000), 2, np.full(30, 0.1), sweeps=60)

    np.testing.assert_allclose(dense(found), dense(law), atol=0.04)


def test_a_table_with_missing_entries_gives_nearly_the_law_of_the_whole():
    """With 30 % missing the covariance is that of the whole; filled entries are nearer the truth than items' means."""
    law = a_law(items=20, factors=2, seed=4)
    values = np.clip(drawn(law, 1500), 0, 1)
    holes = np.random.default_rng(1).random(values.shape) < 0.3
    whole = factorise(values, np.ones(1500), 2, np.full(20, 0.1), sweeps=60)

    partial = missing_law(np.where(holes, np.nan, values), np.ones(1500), 2, 60)
    filled = fill(np.where(holes, np.nan, values), np.ones(1500), 2)

    np.testing.assert_allclose(dense(partial), dense(whole), atol=0.03)
    off = np.square(filled.values_MN - values)[holes].mean()
    assert off < 0.8 * np.square(values.mean(axis=0) - values)[holes].mean()
    np.testing.assert_array_equal(filled.values_MN[~holes], values[~holes])
    assert np.all(filled.lost_N > 0.0)


def test_a_weight_of_two_is_a_row_written_twice():
    """The fit of weighted rows equals that of repeated rows."""
    values = drawn(a_law(), 30)
    twice = np.concatenate([values, values[:10]])
    rows = np.concatenate([np.full(10, 2.0), np.ones(20)])

    weighted, repeated = (
        factorise(table, weights, 3, np.full(12, 0.1)) for table, weights in ((values, rows), (twice, np.ones(40)))
    )

    np.testing.assert_allclose(dense(weighted), dense(repeated), atol=1e-8)
    assert effective(rows).sum() == pytest.approx(40**2 / 60)


def test_the_target_finds_abilities_of_strata():
    """Drawn from its own law, the target finds the variances of ability and of the strata."""
    rng = np.random.default_rng(0)
    strata = np.repeat(np.arange(8), 100)
    level = rng.uniform(0.3, 0.7, 800)
    slope = level * (1 - level) + 0.02
    ability = 0.5 * rng.standard_normal((400, 1)) + 0.3 * rng.standard_normal((400, 8))[:, strata]
    values = (rng.random((400, 800)) < np.clip(level + slope * ability, 0, 1)).astype(float)

    found = target(values, np.ones(400), strata)

    assert found.ability == pytest.approx(0.25, rel=0.25)
    assert found.stratum == pytest.approx(0.09, rel=0.25)
    assert target(values[:, :100], np.ones(400), strata[:100]).stratum == 0.0


def test_many_strata_share_their_factors():
    """More strata than a limit do not make more factors, and labels need not be without gaps."""
    values = answers(rows=10, items=200)
    found = target(values, np.ones(10), np.arange(200) * 3)

    assert found.loading_Nq.shape == (200, MOST_STRATA + 1)


def test_a_shrunk_law_is_the_mix_of_covariances():
    """The covariance is (1 - a) of the law's plus a of the target's."""
    law, strata = a_law(), np.arange(12) % 2
    toward = target(np.clip(drawn(law, 20), 0, 1), np.ones(20), strata)
    mixed = toward.loading_Nq @ toward.loading_Nq.T + np.diag(toward.noise_N)

    np.testing.assert_allclose(dense(shrunk(law, toward, 0.3)), 0.7 * dense(law) + 0.3 * mixed, atol=1e-9)


@pytest.mark.parametrize("partner", ["none", "p_irt", "gaussian", "both"])
def test_at_all_items_the_score_is_the_mean(partner):
    """With every item answered the value is the weighted mean and the error 0, for two scores of unequal size."""
    values = answers(rows=25, items=30)
    targets = np.zeros((2, 30))
    targets[0, :7], targets[1, 7:] = 1 / 7, 1 / 23
    responses = replace(Responses.of(values), targets_KN=targets)

    fit = Factor(partner=partner).fit(responses, 0)
    found = fit.estimate(tuple(range(30)), values[:4])

    np.testing.assert_allclose(found.value_CK, values[:4] @ targets.T, atol=1e-12)
    np.testing.assert_array_equal(found.error_CK, 0.0)
    part = fit.estimate(tuple(range(7)), values[:4, :7])
    np.testing.assert_array_equal(part.error_CK[:, 0], 0.0)
    assert np.all(part.error_CK[:, 1] > 0.0)


@pytest.mark.parametrize("rows", [5, 20, 60, 120])
def test_new_models_are_ranked_better_than_by_random_items(rows):
    """Few chosen items tell more of new models of the same population than as many random ones."""
    values = answers(rows=rows + 150, items=200, seed=3)
    train, test = values[:rows], values[rows:]
    fit = Factor().fit(Responses.of(train), 0)
    items = fit.choose(15).items
    truth = test.mean(axis=1)

    found = fit.estimate(items, test[:, list(items)]).value_CK[:, 0]
    draws = [np.random.default_rng(seed).permutation(200)[:15] for seed in range(20)]
    by_chance = [np.abs(test[:, drawn_items].mean(axis=1) - truth).mean() for drawn_items in draws]

    assert len(items) == 15
    assert spearmanr(found, truth)[0] > (0.6 if rows == 5 else 0.8)
    assert np.abs(found - truth).mean() < 0.9 * np.mean(by_chance)


def test_several_scores_are_told_by_items_of_each():
    """With a score for each task the items come from all tasks, and every score is estimated."""
    values = np.concatenate([answers(rows=40, items=60, seed=1), answers(rows=40, items=20, seed=2)], axis=1)
    targets = np.zeros((2, 80))
    targets[0, :60], targets[1, 60:] = 1 / 60, 1 / 20
    fit = Factor().fit(replace(Responses.of(values), targets_KN=targets), 0)

    items = np.array(fit.choose(12).items)

    assert 2 <= (items >= 60).sum() <= 10
    assert fit.estimate(tuple(items), values[:3, items]).value_CK.shape == (3, 2)


def test_taken_items_are_not_chosen_again_and_nothing_is_left_at_the_end():
    """The choice is sorted, distinct and disjoint from what is taken; all that are left if they are fewer."""
    fit = Factor(partner="none").fit(Responses.of(answers(rows=10, items=12)), 0)

    first = fit.choose(5)
    rest = fit.choose(100, first.items)

    assert sorted(first.items + rest.items) == list(range(12))
    assert rest.items == tuple(sorted(rest.items))
    assert sum(rest.weights) == pytest.approx(1.0)
    assert fit.choose(3, tuple(range(12))).items == ()


@pytest.mark.parametrize("partner", ["auto", "gaussian"])
def test_a_missing_answer_is_as_if_it_had_not_been_asked(partner):
    """The factor model conditions on the answers that are there; a candidate without any gets the rows' mean."""
    values = answers(rows=30, items=40)
    fit = Factor(partner="none").fit(Responses.of(values), 0)
    answered = np.array([[1.0, np.nan, 0.0], [np.nan] * 3])

    found = fit.estimate((2, 9, 30), answered)
    some = fit.estimate((2, 30), answered[:1, [0, 2]])

    np.testing.assert_allclose(found.value_CK[0], some.value_CK[0])
    np.testing.assert_allclose(found.value_CK[1], values.mean(), atol=1e-9)
    assert found.error_CK[1] > found.error_CK[0]
    mixed = Factor(partner=partner).fit(Responses.of(values), 0).estimate((2, 9, 30), answered)
    assert np.isfinite(mixed.value_CK).all()


def test_rows_with_missing_answers_take_part():
    """A row that was asked half the items moves the fit, and none of the estimates is off by much."""
    values = answers(rows=60, items=60, seed=5)
    holes = values.copy()
    holes[30:, ::2] = np.nan
    whole, part = (Factor(partner="none").fit(Responses.of(each), 0) for each in (values, holes))
    items = whole.choose(15).items
    new = answers(rows=200, items=60, seed=5)[60:, list(items)]

    off = part.estimate(items, new).value_CK - whole.estimate(items, new).value_CK

    assert 0.0 < np.abs(off).mean() < 0.05
    assert "30 complete rows" in part.reason


@pytest.mark.parametrize(
    "values",
    [
        np.ones((6, 10)),
        np.zeros((6, 10)),
        np.repeat([[0.0], [1.0]], 3, axis=0) * np.ones(10),
        np.tile(np.arange(10) % 2, (6, 1)).astype(float),
        np.array([[0.0], [1.0], [1.0], [0.0], [1.0]]),
        np.random.default_rng(0).uniform(size=(5, 40)),
        np.random.default_rng(0).uniform(size=(2, 3)),
        np.random.default_rng(0).normal(40, 9, size=(25, 30)),
        np.full((4, 6), 7.5),
    ],
    ids=["right", "wrong", "either", "constant items", "one item", "fractions", "two rows", "tokens", "constant"],
)
def test_odd_tables_work(values):
    """Scores stay within what was seen (and a little), errors are finite, for tables without any information too."""
    fit = Factor().fit(Responses.of(values, bounded=values.max() <= 1.0), 0)

    items = fit.choose(3).items
    found = fit.estimate(items, values[:, list(items)])

    width = max(values.max() - values.min(), 0.5)
    assert np.all(found.value_CK > values.min() - width)
    assert np.all(found.value_CK < values.max() + width)
    assert np.isfinite(found.error_CK).all()


def test_unbounded_responses_are_estimated_on_their_own_scale():
    """Multiplied by a number and shifted, the scores are too."""
    values = answers(rows=40, items=50)
    low, high = (
        Factor(partner="gaussian").fit(Responses.of(table, bounded=False), 0) for table in (values, 30 * values + 5)
    )
    items = low.choose(10).items

    one, other = low.estimate(items, values[:, items]), high.estimate(items, 30 * values[:, items] + 5)

    assert high.choose(10).items == items
    np.testing.assert_allclose(other.value_CK, 30 * one.value_CK + 5, rtol=1e-6)
    np.testing.assert_allclose(other.error_CK, 30 * one.error_CK, rtol=1e-6)


def test_the_same_seed_gives_the_same_fit_and_settings_can_be_pinned():
    """Cross-validation is determined by the seed; pinned settings choose and estimate alike without it."""
    values = answers(rows=120, items=60)
    responses = Responses.of(values)
    pinned = Factor().pinned(responses, 3)

    fits = [settings.fit(responses, 3) for settings in (Factor(), Factor(), pinned)]
    items = [fit.choose(10).items for fit in fits]

    assert pinned.shrinkage is not None
    assert pinned.partner == "both"
    assert items[0] == items[1] == items[2]
    found = [fit.estimate(items[0], values[:5, list(items[0])]).value_CK for fit in fits]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_what_was_used_is_said():
    """The reason names shrinkage and partner by the rows and their weights, and few rows are warned of."""
    few = Factor().fit(Responses.of(answers(rows=10)), 0)
    many = Factor().fit(Responses.of(answers(rows=110)), 0)
    most = Factor().fit(Responses.of(answers(rows=260)), 0)
    uneven = replace(Responses.of(answers(rows=60)), rows_M=np.r_[np.full(50, 1.0), np.full(10, 5.0)])

    assert "p_irt" in few.reason
    assert "10 rows" not in few.warnings[0]
    assert "10 complete rows" in few.warnings[0]
    assert "with p_irt and a Gaussian process," in many.reason
    assert "with a Gaussian process," in most.reason
    assert many.warnings == ()
    assert "shrinkage 0.4, with no partner" in Factor().fit(uneven, 0).reason
    assert "shrinkage 0.6, with p_irt" in Factor().fit(replace(uneven, sources=(0, 1)), 0).reason
    assert "p_irt" in Factor(drift=False).fit(uneven, 0).reason
    assert "shrinkage 0.9" in Factor(shrinkage=0.9, rank=0).fit(uneven, 0).reason


@pytest.mark.parametrize("settings", [{"partner": "p-irt"}, {"shrinkage": 1.5}, {"rank": -1}])
def test_settings_that_do_not_exist_are_refused(settings):
    """In one line that names the setting."""
    with pytest.raises(ExperimentError, match=next(iter(settings))):
        Factor(**settings)


def test_a_single_row_is_refused():
    """One row says nothing of how items go together."""
    with pytest.raises(ExperimentError, match="at least 2 rows"):
        Factor().fit(Responses.of(np.ones((1, 5))), 0)


def test_promoted_rows_weigh_as_much_as_the_nearest_of_the_others():
    """The promoted ones get half the weight, and rows far from their scores are left out."""
    values = (np.arange(120) / 120 > np.linspace(0.9, 0.1, 200)[:, None]).astype(float)
    promoted = np.array([190, 199])

    found = frontier(Responses.of(values), promoted, share=0.5, nearest=0.25)

    assert len(found.rows_M) == int(0.25 * 198) + 1 + 2
    assert sorted(found.rows_M)[-2] > 1.0
    assert found.rows_M[found.rows_M > 1.0].sum() == pytest.approx(found.rows_M.sum() / 2)
    heavy = frontier(Responses.of(values), promoted).rows_M
    assert heavy[heavy > 1.0].sum() == pytest.approx(4 * 30)
    related = frontier(replace(Responses.of(values), sources=(198,)), promoted)
    assert related.rows_M[-1] * 2 == pytest.approx(related.rows_M.sum() / 2)
    assert found.scores_MK.min() > Responses.of(values).scores_MK[100:].min()
    assert len(frontier(Responses.of(values), promoted, nearest=0.0).rows_M) == LEAST_ROWS + 2
    assert len(frontier(Responses.of(values), promoted, nearest=None).rows_M) == 200


def test_a_frontier_needs_promoted_rows_and_keeps_what_it_cannot_place():
    """Without promoted rows nothing changes; rows of unknown score stay; a share of everything is refused."""
    values = answers(rows=80)
    holes = values.copy()
    holes[:20, 3] = np.nan
    responses = Responses.of(holes)

    assert frontier(responses, np.array([], dtype=int)) is responses
    assert len(frontier(responses, np.array([79])).rows_M) == 20 + LEAST_ROWS + 1
    assert len(frontier(responses, np.array([0])).rows_M) == 80
    with pytest.raises(ValueError, match="share"):
        frontier(responses, np.array([79]), share=1.0)


def test_promoted_rows_repair_the_ranks_beyond_the_first_rows():
    """Where other items tell strong models apart than weak ones, promoted rows at half the weight find them."""
    rng = np.random.default_rng(0)
    ability = np.sort(rng.standard_normal(300))
    level = np.where(np.arange(200) < 100, -1.2, 1.2)
    own = rng.standard_normal((300, 2))[:, (np.arange(200) >= 100).astype(int)]
    values = (rng.random((300, 200)) < expit(2.5 * (ability[:, None] - level) + own)).astype(float)
    rows = np.concatenate([np.arange(150), np.arange(210, 300, 9)])
    test = np.setdiff1d(np.arange(210, 300), rows)
    plain = Responses.of(values[rows])

    ranks = []
    for responses in (plain, frontier(plain, np.arange(150, len(rows)))):
        fit = Factor().fit(responses, 0)
        items = list(fit.choose(15).items)
        found = fit.estimate(tuple(items), values[test][:, items]).value_CK[:, 0]
        ranks.append(spearmanr(found, values[test].mean(axis=1))[0])

    assert ranks[1] > ranks[0]


def test_hundred_items_of_five_thousand_are_chosen_within_a_second():
    """Choice and estimate are quick enough for every generation."""
    values = answers(rows=40, items=5000)
    fit = Factor(partner="none").fit(Responses.of(values), 0)

    begun = time.process_time()
    items = fit.choose(100).items
    chosen = time.process_time() - begun
    fit.estimate(items, values[:1, list(items)])
    begun = time.process_time()
    fit.estimate(items, values[:1, list(items)])

    assert chosen < 1.0
    assert time.process_time() - begun < 0.02

"""Item banks: names, matching, weights, and what rows of a bank do to a fit."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from evomerge.fitness.bank import Table, distances, fit_bank, held_out, item_name, matched, prior, with_bank
from evomerge.fitness.factor import Factor
from evomerge.fitness.forecast import PIrt
from evomerge.fitness.responses import Responses

ITEMS = 200


def answers(
    abilities_MD: np.ndarray, rng: np.random.Generator, items: int = ITEMS, spread: float = 0.5
) -> np.ndarray:
    """Return responses drawn from the logistic model; the items are the same for the same number of dimensions."""
    law = np.random.default_rng(7)
    slopes_ND = law.lognormal(0.0, spread, (items, abilities_MD.shape[1]))
    p_MN = expit(abilities_MD @ slopes_ND.T - law.normal(0.0, 1.2, items))
    return (rng.random(p_MN.shape) < p_MN).astype(float)


def table(values_MN: np.ndarray, items: list[str] | None = None) -> Table:
    """Return a table with plain names."""
    rows, count = values_MN.shape
    return Table(
        values_MN=values_MN.astype(np.float16),
        models=tuple(f"m{i}" for i in range(rows)),
        items=tuple(items or [f"sums/{i}" for i in range(count)]),
        tasks=("sums",) * count,
        strata=("",) * count,
    )


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("own_rows", [1, 5, 30])
def test_the_rows_of_a_bank_have_the_stated_share_of_a_fit(weight: float, own_rows: int) -> None:
    """Shares are as asked for, own rows keep their proportions, and the sum is Kish's number of equal rows."""
    rng = np.random.default_rng(0)
    given_M = rng.uniform(0.5, 4.0, own_rows)
    own = replace(Responses.of(rng.random((own_rows, 12))), rows_M=given_M)
    both = with_bank(own, rng.random((40, 12)), weight=weight, nearest=False)

    rows_M = both.rows_M
    assert rows_M[own_rows:].sum() / rows_M.sum() == pytest.approx(weight)
    assert rows_M[:own_rows] / rows_M[0] == pytest.approx(given_M / given_M[0])
    assert rows_M[own_rows:] == pytest.approx(rows_M[-1])
    # n_eff of own weights a_i and 40 equal ones of sum S: (A + S)^2 / (sum a^2 + S^2 / 40), by hand
    sum_, bank = given_M.sum(), weight / (1 - weight) * given_M.sum()
    assert rows_M.sum() == pytest.approx((sum_ + bank) ** 2 / ((given_M**2).sum() + bank**2 / 40))


def test_own_rows_strata_and_targets_stay_as_they_are() -> None:
    """What the run knows of its items is not changed by a bank; its rows come first, its sources keep their places."""
    rng = np.random.default_rng(1)
    own = replace(Responses.of(rng.random((4, 9)), strata_N=np.arange(9) % 3), sources=(1, 2))
    both = with_bank(own, rng.random((6, 9)), weight=0.5, nearest=False)

    assert np.array_equal(both.values_MN[:4], own.values_MN)
    assert np.array_equal(both.strata_N, own.strata_N)
    assert np.array_equal(both.targets_KN, own.targets_KN)
    assert both.sources == (1, 2)
    assert both.margins_MN is None


def test_margins_are_taken_where_the_run_has_them() -> None:
    """A bank without margins has NaN in their place."""
    rng = np.random.default_rng(2)
    own = Responses.of(rng.random((2, 5)), margins_MN=rng.normal(size=(2, 5)))
    values_PN, margins_PN = rng.random((3, 5)), rng.normal(size=(3, 5))

    without, with_ = (with_bank(own, values_PN, given, weight=0.5, nearest=False) for given in (None, margins_PN))

    assert without.margins_MN is not None
    assert np.isnan(without.margins_MN[2:]).all()
    assert with_.margins_MN is not None
    assert np.array_equal(with_.margins_MN[2:], margins_PN)


def test_without_own_rows_a_fit_has_the_bank_alone() -> None:
    """Each model of the bank counts 1 then, none is too far away, and one without any answer is left out."""
    values_PN = np.random.default_rng(3).random((7, 5))
    values_PN[2] = np.nan
    both = with_bank(Responses.of(np.zeros((0, 5))), values_PN, weight=0.3, nearest=True)

    assert both.rows_M == pytest.approx(np.ones(6))
    assert np.array_equal(both.values_MN, np.delete(values_PN, 2, axis=0))


def test_nearest_keeps_the_third_whose_scores_are_nearest() -> None:
    """At least 30 models stay; distances are those of mean scores, by hand, over the items that both were asked."""
    own = Responses.of(np.array([[1.0, 0.0, 1.0, np.nan], [1.0, 1.0, 1.0, np.nan]]))  # means 1, .5, 1
    values_PN = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, np.nan, np.nan, 0.0], [np.nan] * 3 + [1.0]])

    assert distances(own, values_PN) == pytest.approx([2.5 / 3, 0.5 / 3, 0.0, np.inf])
    pool_PN = np.random.default_rng(0).permutation(np.repeat(values_PN, [40, 30, 10, 20], axis=0))
    kept = with_bank(own, pool_PN, weight=0.5, nearest=True).values_MN[2:]
    assert len(kept) == 34
    assert (distances(own, kept) < 0.2).all()
    assert np.isnan(kept).any(axis=1).sum() == 10
    assert len(with_bank(own, pool_PN[:50], weight=0.5, nearest=True).values_MN) == 2 + 30


def test_nearness_looks_at_every_score() -> None:
    """With two tasks, a model that is as good on average but not task by task is further away."""
    targets_KN = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    own = replace(Responses.of(np.array([[1.0, 1.0, 0.0, 0.0]])), targets_KN=targets_KN)
    values_PN = np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])

    assert distances(own, values_PN) == pytest.approx([1.0, np.sqrt(0.25 / 2)])


def test_a_bank_must_fit() -> None:
    """Other items, a share of all or nothing, and responses without bounds are refused."""
    own = Responses.of(np.ones((2, 4)))
    for rows, weight, mine in [
        (np.ones((3, 5)), 0.5, own),
        (np.ones((3, 4)), 1.0, own),
        (np.ones((3, 4)), 0.5, Responses.of(np.ones((2, 4)), bounded=False)),
    ]:
        with pytest.raises(ValueError, match="weight"):
            with_bank(mine, rows, weight=weight, nearest=False)


def test_items_are_matched_by_name_wherever_they_stand() -> None:
    """A bank with its items in another order gives the same prior and the same fit, bit for bit."""
    rng = np.random.default_rng(4)
    values_PN = answers(rng.normal(size=(40, 1)), rng, 60)
    order = rng.permutation(60)
    names = [f"sums/{i}" for i in range(60)]
    own = Responses.of(answers(rng.normal(size=(6, 1)), rng, 60))
    ids = {"sums": [str(i) for i in range(60)]}
    found = []
    for bank in (fit_bank(table(values_PN, names)), fit_bank(table(values_PN[:, order], [names[i] for i in order]))):
        known = prior(bank, ids, weight=0.5, nearest=True)
        assert (known.known, known.items) == (60, 60)
        fit = PIrt(dimensions=1).fit(known.beside(own, ["sums"]), seed=0)
        items = fit.choose(10).items
        found.append((items, fit.estimate(items, own.values_MN[:, items]).value_CK))

    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


def test_items_that_a_bank_lacks_are_missing() -> None:
    """Columns of several tasks stand in the order in which they are asked for; what is unknown is NaN."""
    values_PN = np.arange(4.0)[None] / 4
    bank = fit_bank(table(values_PN, ["sums/1", "sums/2", "arc_easy/0-aa", "plain"]))
    known = prior(bank, {"mine": ["arc_easy/0-aa", "arc_easy/1-bb"], "sums": ["2", "3", "plain"]}, 0.5, False)
    both = known.beside(Responses.of(np.zeros((1, 5))), ["mine", "sums"])

    assert both.values_MN[1] == pytest.approx([0.5, np.nan, 0.25, np.nan, 0.75], nan_ok=True)
    assert (known.known, known.items) == (3, 5)
    assert known.headline == "1 models, 3 of 5 items, 50 % of a fit's weight"


def test_a_name_that_two_items_answer_to_counts_for_neither() -> None:
    """Two tasks number their rows: a bank that only says `1` cannot mean both."""
    found = matched(["1", "a/2", "3"], {"a": ["1", "2"], "b": ["1", "3"]})

    assert {task: places.tolist() for task, places in found.items()} == {"a": [-1, 1], "b": [-1, 2]}
    assert item_name("a", "x/1") == "x/1"


def test_the_parameters_of_the_items_are_recovered() -> None:
    """Difficulties and slopes of many responses are close to those that the responses were drawn with."""
    rng = np.random.default_rng(5)
    law = np.random.default_rng(7)
    slope_N, difficulty_N = law.lognormal(0.0, 0.5, ITEMS), law.normal(0.0, 1.2, ITEMS)
    bank = fit_bank(table(answers(rng.normal(size=(400, 1)), rng)))

    assert np.corrcoef(bank.slope_N, slope_N)[0, 1] > 0.9
    assert np.corrcoef(bank.difficulty_N, difficulty_N)[0, 1] > 0.97
    z_N = (bank.difficulty_N - difficulty_N) / np.sqrt(bank.covariance_N3[:, 2])
    assert 0.7 < np.sqrt(np.mean(z_N**2)) < 1.6
    assert (bank.covariance_N3[:, 1] ** 2 <= bank.covariance_N3[:, 0] * bank.covariance_N3[:, 2]).all()


@pytest.mark.parametrize("settings", [PIrt(), Factor()])
def test_a_related_bank_ranks_better_than_five_rows_alone(settings: PIrt | Factor) -> None:
    """With 5 own rows and 12 items, models of the same kind raise the rank correlation on average over 6 draws."""
    alone, helped = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        own = Responses.of(answers(rng.normal(0.3, 0.5, (5, 2)), rng, spread=1.0))
        new = answers(rng.normal(0.3, 0.5, (60, 2)), rng, spread=1.0)
        both = with_bank(own, answers(rng.normal(0.0, 1.0, (90, 2)), rng, spread=1.0), weight=0.5, nearest=True)
        for found, responses in ((alone, own), (helped, both)):
            fit = settings.fit(responses, seed)
            items = list(fit.choose(12).items)
            value_C = fit.estimate(tuple(items), new[:, items]).value_CK[:, 0]
            found.append(_spearman(value_C, new.mean(axis=1)))

    assert np.mean(helped) > np.mean(alone) + 0.03


def test_held_out_models_are_estimated_as_well_as_they_can_be() -> None:
    """Models that were fitted do not count: where nothing tells items apart, the error is that of a sample."""
    rng = np.random.default_rng(6)
    found = held_out(table(answers(rng.normal(size=(60, 1)), rng)), PIrt(dimensions=1), 40)
    noise = held_out(table((rng.random((60, 200)) < 0.5).astype(float)), PIrt(dimensions=1), 40)

    assert found is not None
    assert noise is not None
    assert found.correlation > 0.9
    assert abs(noise.correlation) < 0.5
    assert found.items == 40
    assert found.models == 60
    assert held_out(table(np.eye(9)), PIrt(), 4) is None  # too few models


def test_a_table_holds_what_it_says() -> None:
    """Whatever does not fit is one clear line."""
    good = table(np.eye(3))
    for change, message in [
        ({"models": ("a", "b")}, "do not fit"),
        ({"items": ("a", "b", "a")}, "two items are called 'a'"),
        ({"models": ("a", "b", "")}, "needs a name"),
        ({"tasks": ("a",)}, "1 tasks"),
        ({"values_MN": np.eye(3, dtype=np.float16) * 2}, "model 'm0', item 'sums/0': responses must lie in .* got 2"),
        ({"values_MN": np.full((3, 3), np.nan, dtype=np.float16)}, "all responses are missing"),
        ({"margins_MN": np.zeros((2, 3), dtype=np.float16)}, "do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(good, **change)
    assert replace(good, values_MN=np.array([[1, np.nan, 0]] * 3, np.float16)).scores_M == pytest.approx(0.5)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from evomerge.fitness.factor import Factor
from evomerge.fitness.margins import MOST_CORRELATION, soft_law
from evomerge.fitness.responses import Responses


def answers(rows, items=150, seed=0, noise=1.5):
    """Margins of several abilities and the responses that they make: right where the margin is above 0."""
    rng = np.random.default_rng(seed)
    slopes = np.c_[rng.uniform(0.5, 1.5, items), 0.5 * rng.standard_normal(items)]
    drawn = np.random.default_rng(seed + 1)
    margins = drawn.standard_normal((rows, 2)) @ slopes.T - 1.5 * rng.standard_normal(items)
    margins = margins + noise * drawn.standard_normal((rows, items))
    return (margins > 0).astype(float), margins


def test_margins_tell_more_than_right_and_wrong():
    """From a handful of items the graded score of new models is foretold better with their margins."""
    values, margins = answers(240)
    train = Responses.of(values[:40], margins_MN=margins[:40])
    truth = values[40:].mean(axis=1)

    found = []
    for settings in (Factor(), Factor(margins=True)):
        fit = settings.fit(train, 0)
        items = list(fit.choose(6).items)
        found.append(fit.estimate(tuple(items), values[40:, items], margins[40:, items]).value_CK[:, 0])

    off = [np.abs(each - truth).mean() for each in found]
    assert off[1] < 0.9 * off[0]
    assert spearmanr(found[1], truth)[0] > spearmanr(found[0], truth)[0]


def test_margins_never_change_the_score_at_all_items():
    """With every item answered the value is the mean of the graded responses, whatever the margins are."""
    values, margins = answers(30, items=20)
    fit = Factor(margins=True).fit(Responses.of(values, margins_MN=margins), 0)

    found = fit.estimate(tuple(range(20)), values[:5], 100.0 * margins[:5] + 7.0)

    np.testing.assert_allclose(found.value_CK[:, 0], values[:5].mean(axis=1))
    np.testing.assert_array_equal(found.error_CK, 0.0)


def test_the_goal_is_the_graded_score():
    """Items whose margins say nothing of being right are given up; the mean estimate stays that of graded responses."""
    values, margins = answers(400)
    noise = np.random.default_rng(7).standard_normal(margins.shape)
    useless = Responses.of(values[:60], margins_MN=noise[:60])
    fit = Factor(margins=True, partner="none").fit(useless, 0)
    items = list(fit.choose(15).items)
    raised = 3.0 + np.abs(margins[60:, items])

    found = fit.estimate(tuple(items), values[60:, items], noise[60:, items]).value_CK
    high = fit.estimate(tuple(items), values[60:, items], raised).value_CK

    assert found.mean() == pytest.approx(values[60:].mean(), abs=0.03)
    assert high.mean() < found.mean() + 0.15


def test_without_margins_it_falls_back():
    """Rows without margins are left out; too few with them, or a candidate without any, is as without the setting."""
    values, margins = answers(40, items=60)
    none = Responses.of(values)
    some = replace(none, margins_MN=np.where(np.arange(40)[:, None] < 10, margins, np.nan))
    most = replace(none, margins_MN=np.where(np.arange(40)[:, None] < 30, margins, np.nan))
    plain = Factor().fit(none, 0)
    items = plain.choose(10).items
    want = plain.estimate(items, values[:4, list(items)]).value_CK

    for responses in (none, some):
        fit = Factor(margins=True).fit(responses, 0)
        assert "margins" not in fit.reason
        found = fit.estimate(items, values[:4, list(items)], margins[:4, list(items)])
        np.testing.assert_array_equal(found.value_CK, want)
    fit = Factor(margins=True).fit(most, 0)
    assert "with margins" in fit.reason
    np.testing.assert_array_equal(fit.estimate(items, values[:4, list(items)]).value_CK, want)
    half = margins[:4, list(items)].copy()
    half[0] = np.nan
    half[1, 3:] = np.nan
    mixed = fit.estimate(items, values[:4, list(items)], half).value_CK
    np.testing.assert_allclose(mixed[0], want[0])
    assert np.isfinite(mixed).all()
    assert not np.allclose(mixed[2], want[2])


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_unit_of_margins_does_not_matter(scale):
    """Margins are measured by their median, so that nats and bits give the same law."""
    values, margins = answers(50, items=40)
    settings = {"rank": 5, "shrinkage": 0.3}
    laws = [
        soft_law(values, each, np.ones(50), np.zeros(40, int), np.full((1, 40), 1 / 40), **settings)
        for each in (margins, scale * margins)
    ]

    assert laws[1].scale == pytest.approx(scale * laws[0].scale)
    np.testing.assert_allclose(laws[0].law.load_Kq, laws[1].law.load_Kq, atol=1e-9)


def test_the_joint_law_has_the_covariances_that_were_drawn():
    """From many rows cov(score, feature) and var(score) are near those of the table, and the law is a possible one."""
    values, margins = answers(3000, items=30, noise=4.0)
    targets = np.full((1, 30), 1 / 30)
    law = soft_law(values, margins, np.ones(3000), np.zeros(30, int), targets, rank=6, shrinkage=0.3).law
    scores = values @ targets.T
    features = expit(margins / (0.7 * np.median(np.abs(margins))))
    want = ((features - features.mean(axis=0)).T @ (scores - scores.mean())).T / 3000

    found = law.load_Kq @ law.loading_Nq.T + law.own_KN

    assert np.corrcoef(found[0], want[0])[0, 1] > 0.9
    assert found.mean() == pytest.approx(want.mean(), rel=0.1)
    assert law.prior_K[0] == pytest.approx(scores.var(), rel=0.2)
    assert np.all((law.own_KN**2 / law.noise_N).sum(axis=1) <= MOST_CORRELATION**2 * law.rest_K + 1e-12)


def test_tasks_without_margins_stay_with_their_responses():
    """Where one task of two has margins, both are foretold better than without them, from items of both."""
    targets = np.repeat(np.eye(2), 75, axis=1) / 75
    off = np.zeros((2, 2))
    for seed in (0, 7, 14, 21):
        values, margins = answers(240, seed=seed)
        margins[:, 75:] = np.nan
        train = replace(Responses.of(values[:40], margins_MN=margins[:40]), targets_KN=targets)
        for way, settings in enumerate((Factor(), Factor(margins=True))):
            fit = settings.fit(train, 0)
            items = np.array(fit.choose(16).items)
            assert 4 <= (items < 75).sum() <= 12
            found = fit.estimate(tuple(items.tolist()), values[40:, items], margins[40:, items]).value_CK
            off[way] += np.abs(found - values[40:] @ targets.T).mean(axis=0)

    assert "with margins" in fit.reason
    assert (off[1] < off[0]).all()
    asked = (80, 90)  # of the task without margins only
    fits = (fit, Factor().fit(train, 0))
    found, plain = (each.estimate(asked, values[40:, asked], margins[40:, asked]) for each in fits)
    np.testing.assert_array_equal(found.value_CK, plain.value_CK)

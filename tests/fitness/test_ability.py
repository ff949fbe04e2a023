"""Abilities from a few responses, against quadrature, another optimiser, published numbers and brute force."""

import itertools
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from evomerge.fitness.ability import (
    OUTSIDE,
    STRENGTH,
    Abilities,
    Mixing,
    Prior,
    combination,
    combined,
    learned_mixing,
    maximum_likelihood,
    posterior,
    published_mix,
)
from evomerge.fitness.design import design
from evomerge.fitness.irt import Items, Model
from evomerge.fitness.prediction import Prediction

Floats = NDArray[np.float64]

#: A worked example in the convention of the published code, logit = sum_d (a_d theta_d - b): our b is theirs times D.
SLOPES = np.array(
    [[0.8, 1.2, 0.5, 1.0, 0.9, 0.7, 1.1, 0.6, 0.4, 1.3], [0.3, 0.4, 1.0, 0.2, 0.6, 0.8, 0.5, 0.9, 1.1, 0.1]]
)
STORED = np.array([-0.5, 0.2, 0.1, 0.6, -0.2, 0.3, 0.8, -0.1, 0.4, -0.3])
EXAMPLE = Items.known(SLOPES.T, 2.0 * STORED)
ENDPOINTS = np.array([[1.0, -0.5], [-0.2, 1.1]])
ASKED = np.array([0, 1, 2, 3, 5, 8])
ANSWERS = np.array([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])


def random_items(count: int, dimensions: int, seed: int) -> Items:
    """Return items of usual slopes and difficulties."""
    rng = np.random.default_rng(seed)
    return Items.known(rng.lognormal(0.0, 0.4, (count, dimensions)), rng.normal(0.0, 1.0, count))


def answered(items: Items, ability: Floats, seed: int) -> Floats:
    """Return simulated responses of abilities."""
    rng = np.random.default_rng(seed)
    return (rng.random((len(ability), len(items.slopes_ND))) < expit(items.logits(ability))).astype(float)


def by_quadrature(items: Items, values: Floats, prior: tuple[float, float]) -> tuple[float, float]:
    """Return mean and standard deviation of the exact posterior of a one-dimensional ability."""
    theta = np.linspace(-12.0, 12.0, 4001)
    logit = items.logits(theta[:, None])
    log = (values * logit - np.logaddexp(0.0, logit)).sum(axis=1) - 0.5 * (theta - prior[0]) ** 2 / prior[1]
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = float(weight @ theta)
    return mean, float(np.sqrt(weight @ (theta - mean) ** 2))


@pytest.mark.parametrize("count", [1, 5, 20, 100])
@pytest.mark.parametrize("prior", [(0.0, 1.0), (0.7, 0.4)])
def test_the_posterior_is_nearly_exact(count: int, prior: tuple[float, float]) -> None:
    """Mean and deviation are those of numerical integration, within what the bound costs."""
    items = random_items(count, 1, count)
    values = answered(items, np.array([[-1.0], [0.0], [1.5]]), 1)
    found = posterior(items, values, Prior(np.array([prior[0]]), np.array([[prior[1]]])))
    for row, mean, covariance in zip(values, found.mean_CD, found.covariance_CDD, strict=True):
        wanted, deviation = by_quadrature(items, row, prior)
        assert mean[0] == pytest.approx(wanted, abs=0.12 * deviation)
        assert np.sqrt(covariance[0, 0]) == pytest.approx(deviation, rel=0.1)


def test_without_answers_the_posterior_is_the_prior() -> None:
    """No item, or only missing responses, leave N(0, I)."""
    items = random_items(3, 2, 0)
    for found in (
        posterior(items.only(np.array([], dtype=int)), np.zeros((2, 0))),
        posterior(items, np.full((2, 3), np.nan)),
    ):
        np.testing.assert_allclose(found.mean_CD, 0.0, atol=1e-12)
        np.testing.assert_allclose(found.covariance_CDD, np.tile(np.eye(2), (2, 1, 1)))


@pytest.mark.parametrize("find", [posterior, maximum_likelihood, partial(published_mix, ENDPOINTS)])
def test_missing_responses_do_not_count(find) -> None:  # type: ignore[no-untyped-def]  # three functions of one form
    """A row with missing responses has the ability that its answered items alone give, whoever is beside it."""
    items = random_items(30, 2, 2)
    values = answered(items, np.array([[0.5, -0.5], [0.1, 0.2]]), 3)
    kept = np.arange(30) % 3 != 0
    wanted = find(items.only(np.flatnonzero(kept)), values[:1, kept])
    holes = values.copy()
    holes[0, ~kept] = np.nan
    found = find(items, holes)
    np.testing.assert_allclose(found.mean_CD[0], wanted.mean_CD[0], atol=1e-3)
    np.testing.assert_allclose(found.covariance_CDD[0], wanted.covariance_CDD[0], rtol=1e-3)


def test_unsure_items_tell_less() -> None:
    """An ability from items whose parameters are not known well is less certain, and nearer to the prior."""
    sure = random_items(20, 2, 4)
    unsure = Items(parameters_NE=sure.parameters_NE, covariance_NEE=np.tile(0.5 * np.eye(3), (20, 1, 1)))
    values = np.ones((1, 20))
    known, guessed = posterior(sure, values), posterior(unsure, values)
    assert np.linalg.norm(guessed.mean_CD) < np.linalg.norm(known.mean_CD)


def likelihood(items: Items, values: Floats) -> partial[float]:
    """Return the negative log-likelihood of an ability as a function for another optimiser."""

    def negative(row: Floats, theta: Floats) -> float:
        logit = items.logits(theta[None])[0]
        return float(-(row * logit - np.logaddexp(0.0, logit)).sum())

    return partial(negative, values)


def test_maximum_likelihood_is_that_of_another_optimiser() -> None:
    """Abilities are those that BFGS finds, and the covariance the inverse of a numerical second derivative."""
    items = random_items(60, 3, 5)
    values = answered(items, np.random.default_rng(6).standard_normal((4, 3)), 7)
    found = maximum_likelihood(items, values)
    for row, mean, covariance in zip(values, found.mean_CD, found.covariance_CDD, strict=True):
        negative = likelihood(items, row)
        np.testing.assert_allclose(mean, minimize(negative, np.zeros(3), method="BFGS", tol=1e-7).x, atol=1e-4)
        step = 1e-3 * np.eye(3)
        hessian = [
            [
                (negative(mean + a + b) - negative(mean + a - b) - negative(mean - a + b) + negative(mean - a - b))
                / 4e-6
                for a in step
            ]
            for b in step
        ]
        np.testing.assert_allclose(np.linalg.inv(hessian), covariance, rtol=1e-2, atol=1e-3)


def test_steep_items_do_not_overshoot() -> None:
    """With slopes of 10, where a full step of Newton's method leads far off, abilities are still those of BFGS."""
    rng = np.random.default_rng(18)
    items = Items.known(10.0 * rng.standard_normal((40, 2)), 4.0 * rng.standard_normal(40))
    values = rng.random((5, 40)).round()
    found = maximum_likelihood(items, values).mean_CD
    for row, mean in zip(values, found, strict=True):
        negative = likelihood(items, row)
        wanted = minimize(negative, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).x
        np.testing.assert_allclose(mean, wanted, atol=1e-4)


def test_a_cliff_is_not_jumped_to_and_fro() -> None:
    """With one item of slope 50, half right, Newton's steps would jump over b / a for ever; they are halved."""
    cliff = Items.known(np.array([[50.0]]), np.array([10.0]))
    assert maximum_likelihood(cliff, np.array([[0.5]])).mean_CD[0, 0] == pytest.approx(0.2, abs=1e-4)


def test_separable_responses_stay_finite() -> None:
    """All right, all wrong, and fewer items than dimensions give abilities at which the likelihood is flat."""
    items = random_items(6, 8, 8)
    found = maximum_likelihood(items, np.array([np.ones(6), np.zeros(6), [1.0, 0, 1, 1, 0, 0]]))
    p = expit(items.logits(found.mean_CD))
    assert np.isfinite(found.covariance_CDD).all()
    assert p[0].min() > 0.999
    assert p[1].max() < 0.001


def test_the_published_mix_has_the_worked_numbers() -> None:
    """Coefficients, probabilities, score and model deviation of the worked example of mp-IRT."""
    coefficients = combination(EXAMPLE.only(ASKED), ENDPOINTS, ANSWERS)
    np.testing.assert_allclose(coefficients.mean_CP[0], [0.245426, 1.527920], atol=2e-6)
    unseen = EXAMPLE.only(np.array([4, 6, 7, 9]))
    found = combined(coefficients, ENDPOINTS)
    p = expit(unseen.logits(found.mean_CD))[0]
    np.testing.assert_allclose(p, [0.782562, 0.291693, 0.827227, 0.663202], atol=2e-6)
    slope = (p * (1.0 - p)) @ unseen.slopes_ND / 4.0
    assert np.sqrt(slope @ found.covariance_CDD[0] @ slope) == pytest.approx(0.209, abs=5e-4)
    model = Model(items=EXAMPLE, abilities_MD=ENDPOINTS, covariance_MDD=np.zeros((2, 2, 2)), dispersion=1.0, sweeps=0)
    prediction = Prediction(model=model, ability=partial(published_mix, ENDPOINTS), plain=True)
    value, error = prediction(np.full((1, 10), 0.1), ASKED, ANSWERS)
    assert value[0, 0] == pytest.approx(0.656468, abs=1e-6)
    assert 0.5 * ANSWERS.mean() + 0.5 * value[0, 0] == pytest.approx(0.661568, abs=1e-6)
    noise = 0.01 * (p * (1.0 - p)).sum()
    assert error[0, 0] == pytest.approx(np.sqrt((0.4 * 0.20931) ** 2 + noise), abs=1e-4)


def test_the_mix_is_that_of_another_optimiser() -> None:
    """Coefficients of three sources are those that BFGS finds from 1/3 each."""
    items = random_items(80, 4, 9)
    sources = np.random.default_rng(10).standard_normal((3, 4))
    values = answered(items, np.array([[0.6, 0.3, 0.2]]) @ sources, 11)
    negative = likelihood(items, values[0])
    wanted = minimize(lambda mix: negative(mix @ sources), np.full(3, 1.0 / 3.0), method="BFGS", tol=1e-8).x
    np.testing.assert_allclose(combination(items, sources, values).mean_CP[0], wanted, atol=1e-4)


def test_the_law_of_mixes_is_that_of_drawn_ones() -> None:
    """The prior of merged abilities is the law of simulated mixes, and coefficients follow by regression on them."""
    rng = np.random.default_rng(12)
    sources = rng.standard_normal((2, 3))
    mixing = Mixing(sources_JD=sources, total=0.8, strength=4.0, outside=0.1)
    mix = 0.4 + rng.standard_normal((200_000, 2)) / 2.0
    theta = mix @ sources + np.sqrt(0.1) * rng.standard_normal((200_000, 3))
    np.testing.assert_allclose(mixing.prior.mean_D, theta.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(mixing.prior.covariance_DD, np.cov(theta.T), atol=0.02)
    known = mixing.coefficients(Abilities(theta[:3], np.zeros((3, 3, 3))))
    design_matrix = np.column_stack([np.ones(len(theta)), theta])
    regression, residual = np.linalg.lstsq(design_matrix, mix, rcond=None)[:2]
    np.testing.assert_allclose(known.mean_CP, design_matrix[:3] @ regression, atol=0.01)
    np.testing.assert_allclose(np.diagonal(known.covariance_CPP[0]), residual / len(theta), rtol=0.02)


def test_unknown_abilities_leave_the_prior_of_the_coefficients() -> None:
    """If nothing was answered the coefficients keep their prior, N(1/J, 1/s)."""
    mixing = Mixing(sources_JD=ENDPOINTS, total=1.0, strength=2.0, outside=0.25)
    mean, covariance = mixing.prior
    found = mixing.coefficients(Abilities(mean[None], covariance[None]))
    np.testing.assert_allclose(found.mean_CP[0], 0.5)
    np.testing.assert_allclose(found.covariance_CPP[0], np.eye(2) / 2.0, atol=1e-12)


@pytest.mark.parametrize(("total", "strength", "outside"), [(1.0, 16.0, 0.05), (0.2, 0.5, 0.8)])
def test_the_law_of_mixes_is_learned(total: float, strength: float, outside: float) -> None:
    """From many rows the settings that they were drawn with come back, to within two steps of what is tried."""
    rng = np.random.default_rng(13)
    sources = 1.5 * rng.standard_normal((2, 5))
    mix = total / 2.0 + rng.standard_normal((400, 2)) / np.sqrt(strength)
    theta = mix @ sources + np.sqrt(outside) * rng.standard_normal((400, 5))
    sure = 0.01 * np.eye(5)
    shrunk = theta @ np.linalg.inv(np.eye(5) + sure)  # as posteriors under N(0, I) are
    covariance = np.linalg.inv(np.linalg.inv(sure) + np.eye(5))
    found = learned_mixing(sources, Abilities(shrunk, np.tile(covariance, (400, 1, 1))))
    assert abs(np.log2(found.strength / strength)) <= 1.0
    assert abs(np.log2(found.outside / outside)) <= 1.4
    assert found.total == pytest.approx(total, abs=0.2)


def test_without_rows_the_law_of_mixes_is_the_stated_one() -> None:
    """There is nothing to learn from, so the defaults hold."""
    found = learned_mixing(ENDPOINTS, Abilities(np.zeros((0, 2)), np.zeros((0, 2, 2))))
    assert (found.total, found.strength, found.outside) == (1.0, STRENGTH, OUTSIDE)


def doubt(items: Items, target: Floats, asked: tuple[int, ...], ability: Floats) -> float:
    """Return the mean posterior variance of the score, by inverting the information of the asked items."""
    total = 0.0
    for theta in ability:
        p = expit(items.logits(theta[None]))[0]
        weight = p * (1.0 - p)
        pull = (weight * target) @ items.slopes_ND
        some = items.slopes_ND[list(asked)]
        total += pull @ np.linalg.inv(np.eye(len(pull)) + (some.T * weight[list(asked)]) @ some) @ pull
    return total


def test_the_design_asks_what_tells_most() -> None:
    """The chosen pair leaves about as little doubt as the best of all pairs, far less than the average one."""
    items = random_items(25, 2, 14)
    target = np.random.default_rng(15).dirichlet(np.ones(25))
    ability = np.random.default_rng(16).standard_normal((150, 2))
    pairs = {pair: doubt(items, target, pair, ability) for pair in itertools.combinations(range(25), 2)}
    found = design(items, target[None], 2)
    assert pairs[(found[0], found[1])] <= np.quantile(list(pairs.values()), 0.03)


def test_the_design_is_greedy() -> None:
    """Each of six items is the one whose asking leaves least doubt, by inverting the information anew."""
    items = random_items(30, 3, 19)
    target = np.random.default_rng(20).dirichlet(np.ones(30))
    ability = np.random.default_rng(7).standard_normal((32, 3))
    asked = list(design(items, target[None], 1, seed=7))
    for _ in range(6):
        left = [item for item in range(30) if item not in asked]
        asked.append(min(left, key=lambda item: doubt(items, target, (*asked, item), ability)))
    assert design(items, target[None], 7, seed=7) == tuple(sorted(asked))


def test_the_design_serves_all_scores() -> None:
    """With two scores of different abilities each gets items; with one only the items that it is made of."""
    slopes = np.kron(np.eye(2), np.ones((20, 1))) + 0.01
    items = Items.known(slopes, np.linspace(-1.0, 1.0, 40))
    halves = np.kron(np.eye(2), np.full((1, 20), 0.05))
    assert sum(item < 20 for item in design(items, halves, 8)) == 4
    assert all(item >= 20 for item in design(items, halves[1:], 8))


def test_the_design_leaves_out_what_is_taken() -> None:
    """The choice is that among the other items alone, and no more are returned than are left."""
    items = random_items(12, 2, 17)
    target = np.full((1, 12), 1.0 / 12.0)
    first = design(items, target, 4)
    later = design(items, target, 4, first)
    assert set(first).isdisjoint(later)
    left = np.setdiff1d(np.arange(12), first)
    pulls = np.random.default_rng(0).standard_normal((400, 2))
    best = min(itertools.combinations(left.tolist(), 4), key=lambda some: doubt(items, target[0], some, pulls))
    asked = [doubt(items, target[0], some, pulls) for some in (best, later)]
    assert asked[1] < 1.05 * asked[0]
    assert design(items, target, 20, first) == tuple(sorted(set(range(12)) - set(first)))

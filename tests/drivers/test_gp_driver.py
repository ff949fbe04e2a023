"""Gaussian processes: the contract, what they expect against another implementation, and what errors of scores do."""

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from evomerge.drivers import Detail, Gp, Problem, Random
from evomerge.drivers.process import Features, Process, _loss
from evomerge.genome import ActiveIf, Choice, Real
from tests.drivers.contract import CUBE, Batches, DriverContract, FrontContract, Steady, best, problem, run, sphere


class TestGp(Batches, FrontContract):
    """The driver keeps the contract, with few evaluations."""

    settings = Gp(startup=8)
    budget = 48


class TestGpSteady(Steady, DriverContract):
    """In steady state too; how much it learns is measured in batches."""

    settings = Gp(steady=True)


def test_a_process_expects_what_another_implementation_expects() -> None:
    """With the same length scales and noise, mean and deviation are those of scikit-learn's regressor."""
    rng = np.random.default_rng(0)
    points, others = rng.random((12, 3)), rng.random((7, 3))
    losses, errors = np.sin(3 * points[:, 0]) + points[:, 1], np.full(12, 0.05)
    own = Process(np.arange(3))
    own.condition(points, losses, errors)
    mean, spread = own.predict(others)

    scales = np.exp(own._logs[:-1])
    noise = (errors / losses.std()) ** 2 + np.exp(own._logs[-1])
    theirs = GaussianProcessRegressor(Matern(scales, "fixed", nu=2.5), alpha=noise, optimizer=None, normalize_y=True)
    expected, deviation = theirs.fit(points, losses).predict(others, return_std=True)
    np.testing.assert_allclose(mean, expected, rtol=1e-8)
    np.testing.assert_allclose(spread, deviation, rtol=1e-6)


def test_the_gradient_is_that_of_the_posterior() -> None:
    """The fit's gradient agrees with finite differences."""
    rng = np.random.default_rng(1)
    points, losses = rng.random((9, 2)), rng.standard_normal(9)
    gaps = np.stack([(points[:, k, None] - points[:, k]) ** 2 for k in range(2)])
    known = np.full(9, 0.01)

    for _ in range(5):
        logs = rng.normal(0.0, 0.5, 3) + np.array([-0.5, -0.5, -3.0])
        parts = [lambda x, k=k: _loss(x, gaps, losses, known)[k] for k in (0, 1)]
        assert check_grad(*parts, logs) < 1e-4


def test_options_differ_by_one_and_axes_that_do_not_count_by_nothing() -> None:
    """The squared distance of genomes is the sum over their axes; of options it is 0 or 1."""
    axes = (
        Choice(name="c", options=("a", "b", "c")),
        Real(name="x", low=0, high=2),
        Real(name="y", low=0, high=1, active_if=ActiveIf(axis="c", options=("a",))),
    )
    rows = Features(axes)([("a", 0.0, 0.3), ("b", 1.0, 0.9), ("b", 1.0, 0.1)])

    assert ((rows[0] - rows[1]) ** 2).sum() == pytest.approx(1.0 + 0.25 + 0.04)
    assert (rows[1] == rows[2]).all()


def test_a_lucky_score_with_a_great_error_counts_for_less() -> None:
    """Of a genome that scored best by luck, with an error that says so, fewer neighbours are proposed."""
    rng = np.random.default_rng(2)
    genomes = [tuple(map(float, row)) for row in rng.random((24, 6))]
    lucky = (0.95,) * 6
    known = (*((genome, sphere(genome)) for genome in genomes), (lucky, (-0.5,)))
    near = []
    for error in (0.0, 2.0):
        details = (*(Detail(errors=(0.01,)) for _ in genomes), Detail(errors=(error,)))
        driver = Gp(batch=8).start(Problem(axes=CUBE, objectives=1, seed=0, known=known, details=details))
        near.append(np.mean([np.linalg.norm(np.subtract(driver.ask(), lucky)) for _ in range(8)]))

    assert near[1] > near[0] + 0.3


def test_few_evaluations_are_spent_better_than_by_chance() -> None:
    """On a bowl 40 evaluations lose less than half of what 160 random ones lose, in the median of five seeds."""
    ours = [best(sphere, run(Gp().start(problem(CUBE, 1, seed)), sphere, 40)) for seed in range(5)]
    blind = [best(sphere, run(Random().start(problem(CUBE, 1, seed)), sphere, 160)) for seed in range(5)]

    assert np.median(ours) < 0.5 * np.median(blind)

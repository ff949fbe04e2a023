import numpy as np
import pytest

from evomerge.fitness.gaussian import KEPT_ROWS, Kernel, fit_process


def data(rows=60, items=8, seed=0, noise=0.05):
    """Responses, and scores that are a curved function of their mean."""
    rng = np.random.default_rng(seed)
    values = (rng.random((rows, items)) < rng.uniform(size=(rows, 1))).astype(float)
    return values, np.tanh(values.mean(axis=1) * 2) + noise * rng.standard_normal(rows)


def by_hand(kernel, A, B):
    """The kernel matrix, entry by entry."""
    found = np.empty((len(A), len(B)))
    for i, a in enumerate(A):
        for j, b in enumerate(B):
            found[i, j] = kernel.linear * a @ b + kernel.radial * np.exp(-((a - b) ** 2).sum() / (2 * kernel.length**2))
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_the_posterior_is_the_dense_formula(weighted):
    """Means and variances equal k' (K + D)^-1 y and k(x, x) - k' (K + D)^-1 k, computed entry by entry."""
    values, scores = data()
    rows = np.random.default_rng(1).uniform(0.5, 2.0, 60) if weighted else np.ones(60)
    process = fit_process(values, scores, rows, 0)
    new = data(5, seed=9)[0]
    weights = rows / rows.mean()
    center, level = np.average(values, axis=0, weights=rows), np.average(scores, weights=rows)
    scale = np.sqrt(np.average((scores - level) ** 2, weights=rows))
    A, B = (values - center) / np.sqrt(8), (new - center) / np.sqrt(8)
    inverse = np.linalg.inv(by_hand(process.kernel, A, A) + np.diag(process.kernel.noise / weights + 1e-6))
    across = by_hand(process.kernel, A, B)
    mean = level + scale * across.T @ inverse @ ((scores - level) / scale)
    own = np.diag(by_hand(process.kernel, B, B)) + process.kernel.noise
    sd = scale * np.sqrt(own - np.diag(across.T @ inverse @ across))

    found, error = process.predict(new)

    np.testing.assert_allclose(found, mean, atol=1e-5)
    np.testing.assert_allclose(error, sd, rtol=1e-4)


def test_learned_hyperparameters_have_a_higher_likelihood_than_their_neighbours():
    """No small step in the logarithm of one of them raises the penalised likelihood."""
    values = data(80)[0]
    scores = np.sin(7.0 * values.mean(axis=1)) + 0.05 * np.random.default_rng(2).standard_normal(80)
    kernel = fit_process(values, scores, np.ones(80), 0).kernel
    X = (values - values.mean(axis=0)) / np.sqrt(8)
    y = (scores - scores.mean()) / scores.std()
    size = (X**2).sum(axis=1).mean()
    begin = np.log([0.5 / size, 0.5, np.sqrt(size), 0.3])

    def loss(logs):
        each = Kernel(*np.exp(logs))
        K = by_hand(each, X, X) + (each.noise + 1e-6) * np.eye(80)
        return 0.5 * y @ np.linalg.solve(K, y) + 0.5 * np.linalg.slogdet(K)[1] + 0.02 * ((logs - begin) ** 2).sum()

    best = np.log(kernel)
    for step in np.concatenate([0.1 * np.eye(4), -0.1 * np.eye(4)]):
        assert loss(best + step) > loss(best) - 1e-4


def test_a_curved_score_is_learned_with_true_errors():
    """New models are predicted within the noise, and 90 % intervals hold about 90 % of them."""
    values, scores = data(700)
    process = fit_process(values[:300], scores[:300], np.ones(300), 0)

    mean, sd = process.predict(values[300:])
    off = np.abs(mean - scores[300:])

    assert off.mean() < 0.06
    assert 0.85 < (off < 1.645 * sd).mean() < 0.96


def test_large_pools_are_subsampled_and_heavy_rows_stay():
    """Predictions rest on a bounded number of rows, drawn by the seed; the heaviest are among them."""
    values, scores = data(KEPT_ROWS + 300)
    rows = np.ones(len(scores))
    rows[-7:] = 5.0

    one, same, other = (fit_process(values, scores, rows, seed) for seed in (0, 0, 1))

    assert len(one.X_Mn) == KEPT_ROWS
    np.testing.assert_array_equal(one.X_Mn, same.X_Mn)
    assert not np.array_equal(one.X_Mn, other.X_Mn)
    restored = one.X_Mn[:7] * np.sqrt(8) + one.center_n
    assert {tuple(row) for row in np.round(restored, 6)} == {tuple(row) for row in values[-7:]}


@pytest.mark.parametrize("scores", [np.full(12, 0.4), np.r_[np.zeros(11), 1.0]])
def test_scores_without_pattern_are_no_obstacle(scores):
    """Constant scores, and features that are all alike, give finite predictions."""
    process = fit_process(np.ones((12, 3)), scores, np.ones(12), 0)

    mean, sd = process.predict(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))

    np.testing.assert_allclose(mean[0], scores.mean(), atol=0.05)
    assert np.isfinite(sd).all()

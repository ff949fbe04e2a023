"""Gaussian process regression from responses to scores: the factor model's partner where rows are many."""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from evomerge.fitness.responses import Floats

#: Rows from which hyperparameters are learned, and rows that predictions rest on; larger pools are subsampled.
LEARNED_ROWS, KEPT_ROWS = 200, 1000
#: Precision of the prior on log hyperparameters around their start, and noise that is always added.
PULL, JITTER = 0.04, 1e-6


class Kernel(NamedTuple):
    """k(x, x') = linear x.x' + radial exp(-|x - x'|^2 / (2 length^2)), and the noise of a row of weight 1."""

    linear: float
    radial: float
    length: float
    noise: float

    def between(self, A_Mn: Floats, B_Cn: Floats) -> Floats:
        """Return the kernel matrix [M, C] without noise."""
        products = A_Mn @ B_Cn.T
        apart = (A_Mn**2).sum(axis=1)[:, None] + (B_Cn**2).sum(axis=1)[None] - 2.0 * products
        return np.asarray(
            self.linear * products + self.radial * np.exp(-np.maximum(apart, 0.0) / (2.0 * self.length**2))
        )


class GaussianProcess(NamedTuple):
    """One score as a function of n responses, fitted; the score is standardised inside.

    The posterior (Rasmussen & Williams 2006, equations 2.25 and 2.26) is that of the standardised score:

        mean = k' (K + D)^-1 y,    variance = k(x, x) + noise - k' (K + D)^-1 k,    D = noise / weights
    """

    kernel: Kernel
    center_n: Floats
    X_Mn: Floats
    lower_MM: Floats
    solved_M: Floats
    level: float
    scale: float

    def predict(self, values_Cn: Floats) -> tuple[Floats, Floats]:
        """Return means [C] and standard deviations [C] of the score of candidates with these responses."""
        X_Cn = (values_Cn - self.center_n) / np.sqrt(max(values_Cn.shape[1], 1))
        K_MC = self.kernel.between(self.X_Mn, X_Cn)
        own_C = self.kernel.linear * (X_Cn**2).sum(axis=1) + self.kernel.radial + self.kernel.noise
        reduced_MC = solve_triangular(self.lower_MM, K_MC, lower=True, check_finite=False)
        var_C = np.maximum(own_C - (reduced_MC**2).sum(axis=0), JITTER)
        return self.level + self.scale * (K_MC.T @ self.solved_M), self.scale * np.sqrt(var_C)


def fit_process(values_Mn: Floats, scores_M: Floats, rows_M: Floats, seed: int) -> GaussianProcess:
    """Return the process fitted by type-II maximum likelihood (Rasmussen & Williams 2006, section 5.4.1).

    Hyperparameters are learned from at most `LEARNED_ROWS` rows and predictions rest on at most `KEPT_ROWS`: those of
    the largest weight, equal ones drawn by the seed.

    Args:
        values_Mn: the responses of M fitted models to n items, none missing.
        scores_M: their scores.
        rows_M: their weights; a row's noise is divided by its weight over the mean weight.
        seed: for the subsamples.
    """
    order_M = np.lexsort((np.random.default_rng(seed).permutation(len(scores_M)), -rows_M))[:KEPT_ROWS]
    X_Mn, y_M, weight_M = values_Mn[order_M], scores_M[order_M], rows_M[order_M]
    weight_M = np.maximum(weight_M / max(float(weight_M.mean()), 1e-12), 1e-6)
    center_n, level = np.average(X_Mn, axis=0, weights=weight_M), float(np.average(y_M, weights=weight_M))
    scale = float(np.sqrt(np.average((y_M - level) ** 2, weights=weight_M))) + 1e-9
    X_Mn, y_M = (X_Mn - center_n) / np.sqrt(max(X_Mn.shape[1], 1)), (y_M - level) / scale
    # the draw among equal weights is random, but the first rows are the heaviest: spread the learned ones over all
    learned = np.unique(np.linspace(0, len(y_M) - 1, min(LEARNED_ROWS, len(y_M))).astype(int))
    kernel = _learn(X_Mn[learned], y_M[learned], weight_M[learned])
    K_MM = kernel.between(X_Mn, X_Mn) + np.diag(kernel.noise / weight_M + JITTER)
    lower_MM = np.asarray(np.linalg.cholesky(K_MM), dtype=np.float64)
    return GaussianProcess(kernel, center_n, X_Mn, lower_MM, cho_solve((lower_MM, True), y_M), level, scale)


def _learn(X_Mn: Floats, y_M: Floats, weight_M: Floats) -> Kernel:
    products = X_Mn @ X_Mn.T
    squares_M = np.diag(products)
    apart = np.maximum(squares_M[:, None] + squares_M[None] - 2.0 * products, 0.0)
    size = max(float(squares_M.mean()), 1e-9)
    begin = np.log([0.5 / size, 0.5, np.sqrt(size), 0.3])

    def loss(logs: Floats) -> tuple[float, Floats]:
        linear, radial, length, noise = np.exp(logs)
        bell = radial * np.exp(-apart / (2.0 * length**2))
        K = linear * products + bell + np.diag(noise / weight_M + JITTER)
        try:
            lower = np.linalg.cholesky(K)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros(4)
        inverse = cho_solve((lower, True), np.eye(len(y_M)), check_finite=False)
        solved = inverse @ y_M
        value = 0.5 * y_M @ solved + np.log(np.diag(lower)).sum() + 0.5 * PULL * ((logs - begin) ** 2).sum()
        A = inverse - np.outer(solved, solved)  # the gradient is 0.5 tr(A dK)
        slopes = [
            (A * products).sum() * linear,
            (A * bell).sum(),
            (A * bell * apart).sum() / length**2,
            (np.diag(A) / weight_M).sum() * noise,
        ]
        return float(value), 0.5 * np.array(slopes) + PULL * (logs - begin)

    bounds = [(x - 8.0, x + 8.0) for x in begin]
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 20})
    return Kernel(*np.exp(found.x).tolist())

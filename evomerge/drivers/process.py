"""A Gaussian process on genomes: what a loss is expected to be where nothing was scored yet, and how surely."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from evomerge.genome import Axis, Choice, Genome, active, to_unit

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

#: Bounds of the logarithms of length scales and of the noise's variance, of losses of variance 1.
_LENGTHS = (math.log(0.05), math.log(100.0))
_NOISES = (math.log(1e-5), math.log(1.0))


class Features:
    """Genomes as points whose squared distance is the sum over axes of how much they differ: on an option by 1.

    Args:
        axes: of the genomes.
    """

    def __init__(self, axes: tuple[Axis, ...]) -> None:
        self._axes = axes
        sizes = [len(axis.options) if isinstance(axis, Choice) else 1 for axis in axes]
        self._first = np.cumsum([0, *sizes])
        #: The axis of each column.
        self.owner = np.repeat(np.arange(len(axes)), sizes)

    def __call__(self, genomes: Sequence[Genome]) -> Matrix:
        """Return one row for each genome; an axis that is not active is the same in all."""
        rows = np.zeros((len(genomes), len(self.owner)))
        for row, genome in zip(rows, genomes, strict=True):
            unit = to_unit(self._axes, genome)
            for i, (axis, on) in enumerate(zip(self._axes, active(self._axes, genome), strict=True)):
                if not isinstance(axis, Choice):
                    row[self._first[i]] = unit[i] if on else 0.5
                elif on:
                    row[self._first[i] + axis.options.index(str(genome[i]))] = math.sqrt(0.5)
        return rows


class Process:
    """A process with the kernel Matérn 5/2 and a length scale for each axis, on losses of any unit.

    Length scales and noise are where the posterior is greatest, with the priors of Hvarfner et al. 2024, "Vanilla
    Bayesian optimization performs great in high dimensions" (scales grow with the root of the number of axes).

    Args:
        owner: the axis of each column of the points.
    """

    def __init__(self, owner: NDArray[np.int64]) -> None:
        self._owner = owner
        self._axes = int(owner.max()) + 1
        self._logs = np.append(np.full(self._axes, math.log(0.3 * math.sqrt(self._axes))), math.log(1e-2))

    def fit(self, points: Matrix, losses: Vector, errors: Vector) -> None:
        """Find the length scales and the noise, beginning at those of the last fit.

        Args:
            points: shape (rows, columns).
            losses: shape (rows,).
            errors: the standard error of each loss that is known of; 0 where none is.
        """
        center, width = _standard(losses)
        standard, known = (losses - center) / width, (errors / width) ** 2
        gaps = np.stack([cdist(part, part, "sqeuclidean") for part in self._parts(points)])
        bounds = [_LENGTHS] * self._axes + [_NOISES]
        found = minimize(
            _loss, self._logs, (gaps, standard, known), "L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": 40}
        )
        self._logs = np.asarray(found.x, dtype=np.float64)

    def condition(self, points: Matrix, losses: Vector, errors: Vector) -> None:
        """Take what is known; arguments as for `fit`."""
        self._center, self._width = _standard(losses)
        self._points = points / self._lengths()
        kernel, _ = _matern(cdist(self._points, self._points, "sqeuclidean"))
        noise = (errors / self._width) ** 2 + math.exp(self._logs[-1])
        self._factor = np.linalg.cholesky(kernel + np.diag(noise))
        standard = (losses - self._center) / self._width
        self._weights = cho_solve((self._factor, True), standard)

    def predict(self, points: Matrix) -> tuple[Vector, Vector]:
        """Return the expected loss of each point without noise, and its standard deviation."""
        kernel, _ = _matern(cdist(self._points, points / self._lengths(), "sqeuclidean"))
        explained = solve_triangular(self._factor, kernel, lower=True)
        variance = np.maximum(1.0 - (explained**2).sum(axis=0), 1e-12)
        return self._center + self._width * (self._weights @ kernel), self._width * np.sqrt(variance)

    def _parts(self, points: Matrix) -> list[Matrix]:
        return [points[:, self._owner == axis] for axis in range(self._axes)]

    def _lengths(self) -> Vector:
        return np.asarray(np.exp(self._logs[:-1])[self._owner])


def _standard(losses: Vector) -> tuple[float, float]:
    return float(losses.mean()), float(losses.std()) or 1.0


def _matern(squares: Matrix) -> tuple[Matrix, Matrix]:
    """Return k = (1 + s + s²/3) exp(-s) with s = sqrt(5 squares), and minus twice its derivative by `squares`."""
    root = np.sqrt(5.0 * squares)
    decay = np.exp(-root)
    return (1.0 + root + root**2 / 3.0) * decay, (5.0 / 3.0) * (1.0 + root) * decay


def _loss(logs: Vector, gaps: NDArray[np.float64], losses: Vector, known: Vector) -> tuple[float, Vector]:
    """Return minus the log posterior of length scales and noise, up to a constant, and its gradient."""
    scales = np.exp(-2.0 * logs[:-1])
    kernel, slope = _matern(np.tensordot(scales, gaps, 1))
    noise = math.exp(logs[-1])
    factor = cho_factor(kernel + np.diag(known + noise), lower=True)
    weights = cho_solve(factor, losses)
    inner = 0.5 * (cho_solve(factor, np.eye(len(losses))) - np.outer(weights, weights))
    value = 0.5 * losses @ weights + np.log(np.diag(factor[0])).sum()
    gradient = np.append(scales * np.tensordot(gaps, inner * slope, 2), noise * np.trace(inner))
    mean = np.append(np.full(len(logs) - 1, math.sqrt(2.0) + 0.5 * math.log(len(logs) - 1)), -4.0)
    spread = np.append(np.full(len(logs) - 1, 3.0), 1.0)  # variances of the logarithms
    return float(value + (0.5 * (logs - mean) ** 2 / spread).sum()), gradient + (logs - mean) / spread

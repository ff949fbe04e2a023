"""A Gaussian process that foretells the losses of genomes from those of others: cheap, and the same on every replay."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Axis, Choice, Genome, active

#: Lengths over which losses vary, in median distances between the genomes, and shares of noise: what is tried.
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NOISES = (1e-3, 1e-2, 1e-1)

#: A forecast counts to so many digits: what comes after them may be another processor's rounding.
DIGITS = 9

Matrix = NDArray[np.float64]


class Forecast:
    """The mean of a Gaussian process with a Matérn 5/2 kernel, one per loss (Rasmussen, Williams 2006, chapters 2, 5).

    Of each loss, the length and the share of noise are those of the greatest marginal likelihood among `LENGTHS` and
    `NOISES`; its mean and variance follow in closed form. That takes one factorisation of a matrix of genomes x genomes
    for each pair of them, together some 0.1 s for 400 genomes.

    Args:
        axes: of the genomes.
        genomes: at least two that are not alike.
        losses_NK: the losses of each.
    """

    def __init__(self, axes: Sequence[Axis], genomes: Sequence[Genome], losses_NK: Matrix) -> None:
        self._axes = axes
        self._x_NF = features(axes, genomes)
        self._middle_K = losses_NK.mean(axis=0)
        apart_NN = _apart(self._x_NF, self._x_NF)
        self._unit = float(np.median(apart_NN[apart_NN > 0])) if (apart_NN > 0).any() else 1.0
        self._fitted = _likeliest(apart_NN / self._unit, losses_NK - self._middle_K)

    def losses(self, genomes: Sequence[Genome]) -> Matrix:
        """Return the losses that are expected of genomes. Shape (genomes, objectives)."""
        apart_GN = _apart(features(self._axes, genomes), self._x_NF) / self._unit
        found_KG = [_matern(apart_GN / length) @ weights_N for length, weights_N in self._fitted]
        return np.asarray(np.round(np.stack(found_KG, axis=1) + self._middle_K, DIGITS))


def features(axes: Sequence[Axis], genomes: Sequence[Genome]) -> Matrix:
    """Return genomes as points that are near where they are alike.

    A number is its coordinate in the unit cube, and 1/2 where it does not count; an option has a coordinate for each
    option of its axis, so that any two are 1 apart, and none where it does not count. Shape (genomes, features).
    """
    rows = []
    for genome in genomes:
        row: list[float] = []
        for axis, gene, counts in zip(axes, genome, active(axes, genome), strict=True):
            if isinstance(axis, Choice):
                row += [float(counts and gene == option) * 0.5**0.5 for option in axis.options]
            else:
                row.append(axis.to_unit(gene) if counts else 0.5)
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def _apart(one_GF: Matrix, two_NF: Matrix) -> Matrix:
    """Return Euclidean distances. Shape (G, N)."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(one_GF, two_NF))


def _matern(apart: Matrix) -> Matrix:
    """Return (1 + r + r²/3) exp(-r), r = sqrt(5) d."""
    r = 5.0**0.5 * apart
    return np.asarray((1.0 + r + r * r / 3.0) * np.exp(-r))


def _likeliest(apart_NN: Matrix, y_NK: Matrix) -> list[tuple[float, NDArray[np.float64]]]:
    """Return for each loss the likeliest length, and the weights (K + v I)^-1 y of the genomes."""
    from scipy.linalg import cho_factor, cho_solve

    count = len(y_NK)
    found: list[tuple[float, float, NDArray[np.float64]]] = [(-np.inf, 1.0, y_NK[:, 0])] * y_NK.shape[1]
    for length in LENGTHS:
        kernel_NN = _matern(apart_NN / length)
        for noise in NOISES:
            factor = cho_factor(kernel_NN + noise * np.eye(count), lower=True)
            weights_NK = cho_solve(factor, y_NK)
            # With the variance at its best, y' K^-1 y / N, what is left of the likelihood are these two terms.
            variance_K = np.maximum((y_NK * weights_NK).sum(axis=0) / count, 1e-300)
            likely_K = -0.5 * count * np.log(variance_K) - np.log(np.diag(factor[0])).sum()
            for k, likely in enumerate(likely_K.tolist()):
                if likely > found[k][0]:
                    found[k] = (likely, length, weights_NK[:, k])
    return [(length, weights_N) for _, length, weights_N in found]

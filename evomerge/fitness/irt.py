"""The two-parameter logistic response model in several dimensions: how probable is it that a model answers an item.

    p_i(theta) = 1 / (1 + exp(-(a_i . theta - b_i)))

theta is the ability of a model, a_i the slopes (discrimination) and b_i the difficulty of item i; a larger b is harder.
This is the convention of the papers (Polo 2024, tinyBenchmarks, arXiv 2402.14992, section 3.1; Minut 2025, MERGE3,
arXiv 2502.10436). Item parameters stored by the tinyBenchmarks code mean sum_d (a_id theta_d - b_i): their b is ours
divided by D.

Shapes: M rows, N items, D dimensions, E = D + 1 parameters of an item (a, b), F = E (E + 1) / 2 entries of a symmetric
matrix, of which only the upper half is kept. With x = (theta, -1) the logit is (a, b) . x.
"""

# ruff: noqa: N802, N815  what holds or returns an array is named with its shape in capitals

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from evomerge.fitness.responses import Floats, Places

Singles = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]

#: Sweeps before the hyperparameters move: the start is rough, and what it says of them is too.
_FIRST_SWEEPS = 4
#: The hyperparameters count as if so many more rows and items had confirmed where they begin: with one item or one row
#: they would otherwise confirm themselves, and shrink to nothing.
_PRIOR_COUNT = 2.0
_SLOPE_VARIANCE, _DIFFICULTY_VARIANCE = 0.5, 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """What is known of the items: a normal law of (a_i, b_i) for each.

    Attributes:
        parameters_NE: their means, the slopes a first and the difficulty b last.
        covariance_NEE: their covariances, which a fit makes rather too small (see `slope`); zeros where items are taken
            as known.
    """

    parameters_NE: Floats
    covariance_NEE: Floats

    @classmethod
    def known(cls, slopes_ND: Floats, difficulties_N: Floats) -> "Items":
        """Return items whose parameters are known exactly."""
        parameters_NE = np.column_stack([slopes_ND, difficulties_N]).astype(np.float64)
        count, width = parameters_NE.shape
        return cls(parameters_NE=parameters_NE, covariance_NEE=np.zeros((count, width, width)))

    @property
    def dimensions(self) -> int:
        """D."""
        return int(self.parameters_NE.shape[1]) - 1

    @property
    def slopes_ND(self) -> Floats:
        """The slopes a."""
        return self.parameters_NE[:, :-1]

    @cached_property
    def second_NF(self) -> Floats:
        """E[w w'] of w = (a, b), packed and doubled off the diagonal, so that a sum of products is a trace."""
        return doubled(packed(self.covariance_NEE + outer(self.parameters_NE)))

    @cached_property
    def spread_NF(self) -> Floats:
        """Cov(w), packed and doubled off the diagonal."""
        return doubled(packed(self.covariance_NEE))

    def only(self, places: Places) -> "Items":
        """Return some of the items."""
        return Items(parameters_NE=self.parameters_NE[places], covariance_NEE=self.covariance_NEE[places])

    def logits(self, abilities_MD: Floats) -> Floats:
        """Return a_i . theta_m - b_i, as [M, N]."""
        return np.asarray(abilities_MD @ self.slopes_ND.T - self.parameters_NE[:, -1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A fitted response model.

    Attributes:
        items: the laws of the items' parameters.
        abilities_MD: posterior means of the rows' abilities; over the rows they are standard normal.
        covariance_MDD: posterior covariances of the rows' abilities.
        dispersion: variance of responses about their probabilities, in units of p (1 - p): 1 for right or wrong,
            less for fractional responses.
        sweeps: how many were made.
    """

    items: Items
    abilities_MD: Floats
    covariance_MDD: Floats
    dispersion: float
    sweeps: int


def outer(vectors_NE: Floats) -> Floats:
    """Return the products v v' as [N, E, E]."""
    return np.asarray(vectors_NE[:, :, None] * vectors_NE[:, None, :])


def packed(matrices_NEE: Floats) -> Floats:
    """Return the upper halves [N, F] of symmetric matrices."""
    row_F, column_F, _ = _places(matrices_NEE.shape[-1])
    return np.ascontiguousarray(matrices_NEE[:, row_F, column_F])


def doubled(packed_NF: Floats) -> Floats:
    """Return upper halves with what stands off the diagonal twice."""
    return np.asarray(packed_NF * _times(packed_NF.shape[-1]))


def halved(doubled_NF: Floats) -> Floats:
    """Undo `doubled`."""
    return np.asarray(doubled_NF / _times(doubled_NF.shape[-1]))


def _times(entries: int) -> Floats:
    row_F, column_F, _ = _places(_width(entries))
    return np.where(row_F == column_F, 1.0, 2.0)


def unpacked(packed_NF: Reals) -> Floats:
    """Return the symmetric matrices [N, E, E] of upper halves, in double precision."""
    return np.asarray(packed_NF, dtype=np.float64)[:, _places(_width(packed_NF.shape[-1]))[2]]


@cache
def _places(width: int) -> tuple[Places, Places, Places]:
    """Return rows [F] and columns [F] of the upper half of a matrix, and where each entry [E, E] stands in it.

    Kept, as it would take half of the time of an estimate.
    """
    row_F, column_F = np.triu_indices(width)
    place_EE = np.zeros((width, width), dtype=np.intp)
    place_EE[row_F, column_F] = place_EE[column_F, row_F] = np.arange(len(row_F))
    return row_F, column_F, place_EE


def _width(entries: int) -> int:
    return int((np.sqrt(8.0 * entries + 1.0) - 1.0) / 2.0 + 0.5)


def extended(means_MD: Floats, covariance_MDD: Floats) -> Floats:
    """Return E[x x'] of x = (theta, -1), packed, as [M, F]."""
    rows, dimensions = means_MD.shape
    second_MEE = outer(np.column_stack([means_MD, np.full(rows, -1.0)]))
    second_MEE[:, :dimensions, :dimensions] += covariance_MDD
    return packed(second_MEE)


def curvature(square_MN: Reals) -> Reals:
    """Return lambda(xi) = tanh(xi / 2) / (4 xi), given xi squared: the curvature of the bound at xi.

    log sigmoid(z) >= log sigmoid(xi) + (z - xi) / 2 - lambda(xi) (z^2 - xi^2)     (Jaakkola 2000, equation 10)
    """
    xi_MN = np.sqrt(np.maximum(square_MN, 1e-6))
    return np.asarray(np.tanh(0.5 * xi_MN) / (4.0 * xi_MN))


def slope(logit_MN: Reals, variance_MN: Reals) -> Reals:
    """Return E[p (1 - p)] of logits with normal laws, about: s (1 - s) / r, s = sigmoid(z / r), r^2 = 1 + pi v / 8.

    The bound's `curvature` is larger than this wherever it does not touch, so that variances come out too small by up
    to a third. Those of abilities are taken from this once the means are found. Those of items are not: with few rows
    wider laws draw all forecasts to 1/2, which costs more than it mends.
    """
    rate_MN = np.sqrt(1.0 + np.pi / 8.0 * variance_MN)
    p_MN = expit(logit_MN / rate_MN)
    return np.asarray(p_MN * (1.0 - p_MN) / rate_MN)


def fit(
    values_MN: Floats, rows_M: Floats | None = None, *, dimensions: int, sweeps: int = 100, tolerance: float = 2e-4
) -> Model:
    """Fit the model by variational Bayes in closed form (Jaakkola 2000, Statistics and Computing 10, section 3).

    Abilities and item parameters have independent normal posteriors. A sweep sets the bounds' xi^2 = E[z^2], then
    items, then abilities, each the exact optimum given the others: three matrix products of M N F. The items' prior
    N(mu, S) is estimated along (empirical Bayes), and abilities are brought back to mean 0 and covariance I over the
    rows by a change of coordinates that leaves all logits as they are. The start is the singular value decomposition of
    the centred responses. Deterministic. The large products are single precision, all small matrices double.

    Args:
        values_MN: responses in [0, 1], NaN where not asked. A fraction counts as that share of a right answer
            (quasi-likelihood).
        rows_M: how much each row counts, as if it stood there so many times; all 1 where None.
        dimensions: D; cut to the number of items, and to one less than that of rows, but not below 1.
        sweeps: at most so many.
        tolerance: stop when no row's mean probability of a right answer moved further in ten sweeps.

    Raises:
        ValueError: if there is no row, no item or no response at all.
    """
    values_MN = np.asarray(values_MN, dtype=np.float64)
    if values_MN.ndim != 2 or not np.isfinite(values_MN).any():
        raise ValueError(f"an item fit needs responses of at least 1 row to 1 item, got shape {values_MN.shape}")
    rows, items = values_MN.shape
    return _Fitting(values_MN, np.ones(rows) if rows_M is None else np.asarray(rows_M, dtype=np.float64),
                    max(1, min(dimensions, rows - 1, items))).run(sweeps, tolerance)


class _Fitting:
    """The state of one fit: moments of abilities and items, and the items' prior."""

    def __init__(self, values_MN: Floats, rows_M: Floats, dimensions: int) -> None:
        asked_MN = np.isfinite(values_MN)
        self.D = dimensions
        self.rows_M = rows_M
        self.asked_MN: Singles | None = None if asked_MN.all() else asked_MN.astype(np.float32)
        self.centred_MN: Singles = np.where(asked_MN, values_MN - 0.5, 0.0).astype(np.float32)
        self.values_MN = values_MN
        self._start(asked_MN)

    def _start(self, asked_MN: NDArray[np.bool_]) -> None:
        """Set abilities and items from the leading singular vectors of the responses less the items' means."""
        rows, items = asked_MN.shape
        D, weight_M1 = self.D, self.rows_M[:, None]
        right_N = np.where(asked_MN, self.values_MN * weight_M1, 0.0).sum(axis=0)
        share_N = (right_N + 0.5) / ((asked_MN * weight_M1).sum(axis=0) + 1.0)
        left_MD, size_D, right_ND = _leading(np.where(asked_MN, self.values_MN - share_N, 0.0), D)
        noise_N = np.maximum(4.0 * share_N * (1.0 - share_N), 0.2)
        self.ability_MD = left_MD * np.sqrt(rows)
        self.ability_MDD = np.tile(0.05 * np.eye(D), (rows, 1, 1))
        slopes_ND = 2.8 * right_ND * (size_D / np.sqrt(rows)) / noise_N[:, None]  # 4 / (4 p (1 - p)), shrunk by .7
        self.item_NE = np.column_stack([slopes_ND, np.log((1.0 - share_N) / share_N)])
        self.item_NEE = np.tile(0.05 * np.eye(D + 1), (items, 1, 1))
        self.mean_E = self.item_NE.mean(axis=0)
        self.start_EE = np.diag([_SLOPE_VARIANCE] * D + [_DIFFICULTY_VARIANCE])
        self.prior_EE = self.start_EE + np.diag([0.0] * D + [float(self.item_NE[:, -1].var())])

    def run(self, sweeps: int, tolerance: float) -> Model:
        """Sweep until nothing moves, and return the model."""
        before_M = np.full(len(self.rows_M), np.inf)
        for sweep in range(1, sweeps + 1):
            self._sweep()
            if sweep >= _FIRST_SWEEPS:
                self._learn_prior()
                self._whiten()
            if sweep % 10 == 0 or sweep == sweeps:
                now_M = self._probabilities().mean(axis=1)
                if np.abs(now_M - before_M).max() < tolerance:
                    break
                before_M = now_M
        return self._model(sweep)

    def _sweep(self) -> None:
        rows_MF = extended(self.ability_MD, self.ability_MDD)
        items_NF = doubled(packed(self.item_NEE + outer(self.item_NE))).astype(np.float32)
        curve_MN = curvature(rows_MF.astype(np.float32) @ items_NF.T)
        if self.asked_MN is not None:
            curve_MN *= self.asked_MN
        self._set_items(curve_MN, rows_MF * self.rows_M[:, None])
        self._set_abilities(curve_MN)

    def _set_items(self, curve_MN: Reals, rows_MF: Floats) -> None:
        precision_EE = inverse(self.prior_EE)
        data_NF = curve_MN.T @ rows_MF.astype(np.float32)
        self.item_NEE = inverse(precision_EE + 2.0 * unpacked(data_NF))
        extended_ME = np.column_stack([self.ability_MD, np.full(len(self.rows_M), -1.0)]) * self.rows_M[:, None]
        pull_NE = precision_EE @ self.mean_E + self.centred_MN.T @ extended_ME.astype(np.float32)
        self.item_NE = applied(self.item_NEE, pull_NE)

    def _set_abilities(self, curve_MN: Reals) -> None:
        D = self.D
        items_NF = packed(self.item_NEE + outer(self.item_NE)).astype(np.float32)
        data_MEE = unpacked(curve_MN @ items_NF)
        self.ability_MDD = inverse(np.eye(D) + 2.0 * data_MEE[:, :D, :D])
        pull_MD = self.centred_MN @ self.item_NE[:, :D].astype(np.float32) + 2.0 * data_MEE[:, :D, D]
        self.ability_MD = applied(self.ability_MDD, pull_MD)

    def _learn_prior(self) -> None:
        """Set the items' prior to what their posteriors say, and two items' worth of where it began."""
        self.mean_E = self.item_NE.mean(axis=0)
        away_NE = self.item_NE - self.mean_E
        sum_EE = self.item_NEE.sum(axis=0) + away_NE.T @ away_NE
        self.prior_EE = (sum_EE + _PRIOR_COUNT * self.start_EE) / (len(away_NE) + _PRIOR_COUNT)

    def _whiten(self) -> None:
        """Change coordinates so that abilities have mean 0 and covariance I over the rows; no logit changes.

        theta = L t + c turns a . theta - b into (L' a) . t - (b - a . c).
        """
        D, rows_M = self.D, self.rows_M
        total = rows_M.sum() + _PRIOR_COUNT
        mean_D = rows_M @ self.ability_MD / total
        away_MD = self.ability_MD - mean_D
        spread_DD = np.einsum("m,mde->de", rows_M, self.ability_MDD) + (away_MD * rows_M[:, None]).T @ away_MD
        lower_DD = np.linalg.cholesky((spread_DD + _PRIOR_COUNT * np.eye(D)) / total)
        inverse_DD = inverse(lower_DD)
        self.ability_MD = away_MD @ inverse_DD.T
        self.ability_MDD = inverse_DD @ self.ability_MDD @ inverse_DD.T
        change_EE = np.eye(D + 1)
        change_EE[:D, :D], change_EE[D, :D] = lower_DD.T, -mean_D
        self.item_NE = self.item_NE @ change_EE.T
        self.item_NEE = change_EE @ self.item_NEE @ change_EE.T
        self.mean_E, self.prior_EE = change_EE @ self.mean_E, change_EE @ self.prior_EE @ change_EE.T

    def _probabilities(self) -> Singles:
        logit_MN = self.ability_MD.astype(np.float32) @ self.item_NE[:, :-1].T.astype(np.float32)
        return np.asarray(expit(logit_MN - self.item_NE[:, -1].astype(np.float32)))

    def _model(self, sweeps: int) -> Model:
        """Return what was fitted, with every dimension turned so that its slopes are positive on the whole."""
        sign_D = np.where(self.item_NE[:, :-1].sum(axis=0) < 0.0, -1.0, 1.0)
        sign_E = np.append(sign_D, 1.0)
        p_MN = self._probabilities().astype(np.float64)
        residual = np.nansum((self.values_MN - p_MN) ** 2)
        expected = (p_MN * (1.0 - p_MN))[np.isfinite(self.values_MN)].sum()
        return Model(
            items=Items(parameters_NE=self.item_NE * sign_E, covariance_NEE=self.item_NEE * np.outer(sign_E, sign_E)),
            abilities_MD=self.ability_MD * sign_D,
            covariance_MDD=self.ability_MDD * np.outer(sign_D, sign_D),
            dispersion=float(np.clip(residual / max(expected, 1e-9), 0.05, 1.0)),
            sweeps=sweeps,
        )


def _leading(centred_MN: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    """Return the `count` leading left vectors [M, D], singular values [D] and right vectors [N, D].

    From the smaller of the two product matrices; vectors of a vanishing singular value are zero.
    """
    if centred_MN.shape[0] > centred_MN.shape[1]:
        right_ND, size_D, left_MD = _leading(centred_MN.T, count)
        return left_MD, size_D, right_ND
    value, vector_MM = np.linalg.eigh(centred_MN @ centred_MN.T)
    size_D = np.sqrt(np.maximum(value[::-1][:count], 0.0))
    left_MD = vector_MM[:, ::-1][:, :count] * (size_D > 1e-6)
    return left_MD, size_D, centred_MN.T @ left_MD / np.maximum(size_D, 1e-6)


def inverse(matrices_NEE: Floats) -> Floats:
    """Return the inverses of matrices, one or many."""
    return np.asarray(np.linalg.inv(matrices_NEE), dtype=np.float64)


def applied(matrices_NEE: Floats, vectors_NE: Floats) -> Floats:
    """Return the products [N, E] of matrices and vectors."""
    return np.asarray((matrices_NEE @ vectors_NE[:, :, None])[:, :, 0])

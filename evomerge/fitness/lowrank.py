"""Factor analysis: a few common factors and independent noise as the law of a row of responses.

Legend of shapes, besides `evomerge.fitness.responses`: q factors, r = q + 1.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from typing import NamedTuple

import numpy as np

from evomerge.fitness.responses import Floats

#: Rows that the prior of an item's noise counts as: few rows must not make an item a certain measurement.
PRIOR_ROWS = 12.0
#: How much wider the prior of the loadings is than they are: at 1, empirical Bayes lets factors die out one by one.
LOOSE = 10.0
LEAST_NOISE = 1e-3
#: Factors with which missing entries are filled.
FILLING_RANK = 5
SWEEPS = 12


class Lowrank(NamedTuple):
    """The normal law y = mean + loading z + e of a row y, with z ~ N(0, I) and e ~ N(0, diag(noise))."""

    mean_N: Floats
    loading_Nq: Floats
    noise_N: Floats


class Filled(NamedTuple):
    """A table without missing entries, and what was lost: the summed variance [N] of the entries that were filled."""

    values_MN: Floats
    lost_N: Floats


def effective(rows_M: Floats) -> Floats:
    """Return weights that add up to the number of equal rows that they are worth, (sum w)^2 / sum w^2 (Kish 1965).

    >>> effective(np.array([2.0, 2.0, 0.0])).tolist()
    [1.0, 1.0, 0.0]
    """
    total, squares = float(rows_M.sum()), float((rows_M**2).sum())
    return rows_M * (total / squares) if squares > 0.0 else rows_M


def principal(X_MN: Floats, rank: int) -> Floats:
    """Return the loadings [N, q <= rank] of the leading principal components of a centred table X, over sqrt(M) X.

    The smaller of the two Gram matrices is decomposed. Directions without any spread are left out.
    """
    wide = X_MN.shape[0] <= X_MN.shape[1]
    squares_q, basis = np.linalg.eigh(X_MN @ X_MN.T if wide else X_MN.T @ X_MN)
    kept = np.argsort(-squares_q, kind="stable")[:rank]
    kept = kept[squares_q[kept] > 1e-10 * max(float(squares_q[-1]), 1e-12)]
    if wide:
        return np.asarray(X_MN.T @ basis[:, kept])
    return np.asarray(basis[:, kept] * np.sqrt(squares_q[kept]))


def factorise(
    values_MN: Floats,
    rows_M: Floats,
    rank: int,
    noise_N: Floats,
    *,
    lost_N: Floats | float = 0.0,
    sweeps: int = SWEEPS,
    strength: float = 1.0,
) -> Lowrank:
    """Return the factor model of a table by expectation maximisation (Rubin & Thayer 1982, Psychometrika 47:69).

    With X the centred rows times sqrt(weight), W the sum of weights, C the covariance and Z the means of the factors:

        C = (I + L' D^-1 L)^-1,    Z = X D^-1 L C,    S = W C + Z'Z
        L = X'Z (S + T^-1)^-1,    D_ii = {(X'X - 2 X'Z L' + L S L')_ii + lost_i + a noise_i} / (W + a)

    T is a diagonal prior variance of the loadings of each factor over the noise, `LOOSE` times what they have now; the
    noise prior counts a = `PRIOR_ROWS` rows.

    Args:
        values_MN: the table, none missing.
        rows_M: weights of the rows.
        rank: factors; fewer where the table spans fewer dimensions.
        noise_N: where the noise is expected, and begins.
        lost_N: what `fill` says was lost.
        sweeps: passes over the table.
        strength: of both priors; at 0 every sweep raises the likelihood.
    """
    weight = float(rows_M.sum())
    mean_N = rows_M @ values_MN / max(weight, 1e-12)
    X_MN = (values_MN - mean_N) * np.sqrt(rows_M)[:, None]
    squares_N = (X_MN**2).sum(axis=0)
    loading_Nq = principal(X_MN, rank) / np.sqrt(max(weight, 1e-12))
    prior_N, noise_N = noise_N, np.maximum(noise_N, LEAST_NOISE)
    counted = strength * PRIOR_ROWS
    for _ in range(sweeps if loading_Nq.shape[1] else 0):
        scaled_Nq = loading_Nq / noise_N[:, None]
        cov_qq = np.linalg.inv(np.eye(loading_Nq.shape[1]) + loading_Nq.T @ scaled_Nq)
        Z_Mq = X_MN @ (scaled_Nq @ cov_qq)
        second_qq = weight * cov_qq + Z_Mq.T @ Z_Mq
        cross_Nq = X_MN.T @ Z_Mq
        precision_q = strength / (LOOSE * (loading_Nq * scaled_Nq).mean(axis=0) + 1e-3)
        loading_Nq = np.linalg.solve(second_qq + np.diag(precision_q), cross_Nq.T).T
        left_N = squares_N + ((loading_Nq @ second_qq - 2.0 * cross_Nq) * loading_Nq).sum(axis=1)
        noise_N = np.maximum((left_N + lost_N + counted * prior_N) / (weight + counted), LEAST_NOISE)
    return Lowrank(mean_N, loading_Nq, noise_N)


def fill(values_MN: Floats, rows_M: Floats, rank: int = FILLING_RANK, sweeps: int = 20) -> Filled:
    """Return the table with missing entries (NaN) replaced by what the known ones of the row let expect.

    The law behind is a factor model of few factors, fitted by expectation maximisation in which missing entries are
    integrated out (Little & Rubin 2002, section 11.3); an item that nobody answered has the mean of all entries.
    """
    if np.isfinite(values_MN).all():
        return Filled(values_MN, np.zeros(values_MN.shape[1]))
    law = missing_law(values_MN, rows_M, rank, sweeps)
    known_MN = np.isfinite(values_MN)
    first_Mq, _ = _posterior(law, np.where(known_MN, values_MN, 0.0), known_MN.astype(float))
    expected_MN = np.clip(law.mean_N + first_Mq @ law.loading_Nq.T, 0.0, 1.0)
    return Filled(np.where(known_MN, values_MN, expected_MN), (rows_M @ ~known_MN) * law.noise_N)


def missing_law(values_MN: Floats, rows_M: Floats, rank: int, sweeps: int, strength: float = 1.0) -> Lowrank:
    """Return the factor model of a table with missing entries; as `factorise`, with mean and priors of its own.

    Every item has its own second moments of the factors, over the rows that answered it, and its mean is a loading on
    a factor that is 1. Costs M N r^2 a sweep.
    """
    known_MN = np.isfinite(values_MN).astype(float)
    Y_MN = np.where(known_MN > 0.0, values_MN, 0.0)
    weights_MN = known_MN * rows_M[:, None]
    counts_N = weights_MN.sum(axis=0)
    overall = float((weights_MN * Y_MN).sum() / max(counts_N.sum(), 1e-12))
    mean_N = ((weights_MN * Y_MN).sum(axis=0) + overall) / (counts_N + 1.0)
    X_MN = (Y_MN - mean_N) * known_MN * np.sqrt(rows_M)[:, None]
    squares_N = (weights_MN * Y_MN**2).sum(axis=0)
    prior_N = noise_N = ((X_MN**2).sum(axis=0) + mean_N * (1.0 - mean_N)) / (counts_N + 1.0) + LEAST_NOISE
    loading_Nq = principal(X_MN, min(rank, max(len(Y_MN) - 1, 0))) / np.sqrt(max(float(rows_M.sum()), 1e-12))
    rank, counted = loading_Nq.shape[1], strength * PRIOR_ROWS
    for _ in range(sweeps):
        first_Mq, cov_Mqq = _posterior(Lowrank(mean_N, loading_Nq, noise_N), Y_MN, known_MN)
        whole_Mr = np.column_stack([first_Mq, np.ones(len(Y_MN))])
        second_Mrr = whole_Mr[:, :, None] * whole_Mr[:, None, :]
        second_Mrr[:, :rank, :rank] += cov_Mqq
        second_Nrr = (weights_MN.T @ second_Mrr.reshape(len(Y_MN), -1)).reshape(-1, rank + 1, rank + 1)
        cross_Nr = (weights_MN * Y_MN).T @ whole_Mr
        size_q = LOOSE * (loading_Nq**2 / noise_N[:, None]).mean(axis=0) + 1e-3
        precision_rr = np.diag(np.append(strength / size_q, 1e-9))
        solved_Nr = np.linalg.solve(second_Nrr + precision_rr, cross_Nr[:, :, None])[:, :, 0]
        left_N = squares_N - 2.0 * (solved_Nr * cross_Nr).sum(axis=1)
        left_N += np.einsum("nr,nrs,ns->n", solved_Nr, second_Nrr, solved_Nr, optimize=True)
        loading_Nq, mean_N = solved_Nr[:, :rank], np.where(counts_N > 0.0, solved_Nr[:, rank], overall)
        noise_N = np.maximum((left_N + counted * prior_N) / np.maximum(counts_N + counted, 1e-12), LEAST_NOISE)
    return Lowrank(mean_N, loading_Nq, noise_N)


def _posterior(law: Lowrank, Y_MN: Floats, known_MN: Floats) -> tuple[Floats, Floats]:
    """Return means [M, q] and covariances [M, q, q] of the factors of rows, given their known entries."""
    rank = law.loading_Nq.shape[1]
    scaled_Nq = law.loading_Nq / law.noise_N[:, None]
    products_NQ = (scaled_Nq[:, :, None] * law.loading_Nq[:, None, :]).reshape(-1, rank * rank)
    cov_Mqq = np.linalg.inv(np.eye(rank) + (known_MN @ products_NQ).reshape(-1, rank, rank))
    pull_Mq = ((Y_MN - law.mean_N) * known_MN) @ scaled_Nq
    return np.einsum("mqr,mr->mq", cov_Mqq, pull_Mq), np.asarray(cov_Mqq, dtype=np.float64)

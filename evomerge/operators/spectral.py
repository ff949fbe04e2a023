"""Stages that look at matrices by their singular vectors or solve linear systems with them.

Shapes: N sources, matrices m x n as Linear stores them (out x in), r = min(m, n); see `state.State` for X, w, y. Each
function is a stage of `stages.STAGES`, which has its formula and reference. Arithmetic is float64 inside. What is said
about 1-D tensors holds for all that are no matrices; where tensors of more than 2 dimensions count as matrices (out x
all the rest), it says so. Weights enter as w_i X_i.
"""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from evomerge.operators.elementwise import mean, weighted
from evomerge.operators.state import Ask, Stage, State, each

#: Singular values below this share of the largest are zero: their vectors are arbitrary.
ZERO = 1e-12

#: Decay rates and guard of Adam, as published.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8

Given = float | str | Mapping[str, float]


def svd(A: Tensor, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD (U, s, V') of a matrix, float64; what belongs to singular values of zero is zero.

    Args:
        A: shape (m, n).
        size: what zero is relative to; by default the largest singular value.
    """
    U, s, V = torch.linalg.svd(A.double(), full_matrices=False)
    real = s > ZERO * (s[0] if size is None else size)
    return U * real, s * real, V * real[:, None]


def polar(A: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns (or rows), float64; of lower rank where A is."""
    U, _, V = svd(A)
    return U @ V


def _power(s: Tensor, exponent: float) -> Tensor:
    """Return singular values to a power, rescaled to their sum; zeros stay zero."""
    raised = torch.where(s > 0, s.clamp_min(torch.finfo(s.dtype).tiny) ** exponent, 0.0)
    return raised * s.sum() / raised.sum() if raised.any() else s


def _matrices(X: Tensor) -> Tensor:
    """Return (N, m, n) of (N, m, ...), more than 2 dimensions flattened to out x rest."""
    return X.flatten(2) if X.dim() > 3 else X


def _is_matrix(s: State, exclude: str = "") -> bool:
    return s.X.dim() == 3 and not any(fnmatchcase(s.site.tensor, pattern) for pattern in exclude.split())


def _scaled(s: State) -> Tensor:
    return s.X.double() * s.w.view(-1, *[1] * (s.X.dim() - 1))


def _plain_mean(s: State) -> Tensor:
    """Return sum_i w_i X_i / N, which published code does with what is no matrix."""
    return weighted(s, s.w / len(s.w))


def _each_matrix(X: Tensor, edit: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return what an edit makes of every contribution; 1-D contributions are returned as they are."""
    if X.dim() < 3:
        return X
    return torch.stack([edit(i, one).float() for i, one in enumerate(_matrices(X))]).view_as(X)


# --- origins


def centre(s: State) -> tuple[Tensor, Tensor]:
    """Take what each source has beyond the (weighted) mean of the sources, which is added back."""
    middle = mean(s, 1.0)
    return s.X - middle, middle


def lore(s: State, mu: float, iterations: float) -> tuple[Tensor, Tensor]:
    """Take low-rank contributions to a common model t that no base is needed for; both are estimated in turns.

    mu is relative to the largest singular value of any W_i - mean: 1 leaves the mean alone, 0 leaves W_i = t + X_i.
    More than 2 dimensions count as a matrix. 1-D: t is the mean, the contributions are 0. t is a weighted mean.
    """
    full = State(X=_matrices(s.X), w=s.w, site=s.site)
    t, X = mean(full, 1.0), torch.zeros_like(full.X)
    if full.X.dim() == 3:
        limit = mu * max(float(torch.linalg.matrix_norm(one.double(), 2)) for one in full.X - t)
        for _ in range(int(iterations)):
            X = _each_matrix(full.X - t, lambda _, one: _shrunk(one, limit))
            t = mean(State(X=full.X - X, w=s.w, site=s.site), 1.0)
    return X.view_as(s.X), t.view_as(s.X[0])


def _shrunk(A: Tensor, limit: float) -> Tensor:
    U, s, V = svd(A)
    return A if limit == 0 else U * (s - limit).clamp_min(0.0) @ V


# --- bases


def knots(s: State, cut: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Take coordinates in the left singular vectors that all contributions share: Z_i of shape (rank, n).

    Singular values up to `cut` are left out. The bias of a weight is one more input column of it (whoever reads the
    tensors joins them). Norms (1-D, "norm" or "ln" in the name) are diagonal matrices, other 1-D tensors one column.
    """
    shape = s.X.shape[1:]
    if len(shape) == 1 and any(part in s.site.tensor for part in ("norm", "ln")):
        return _diagonal(s.X, cut)
    X = s.X.flatten(2) if len(shape) > 1 else s.X.unsqueeze(2)
    U, singular, V = svd(torch.cat(list(X.double()), dim=1))
    rank = max(1, int((singular > cut).sum()))
    blocks = (singular[:rank, None] * V[:rank]).view(rank, len(X), -1).transpose(0, 1)
    return blocks.float().contiguous(), lambda y: (U[:, :rank] @ y.double()).float().reshape(shape)


def _diagonal(X: Tensor, cut: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the coordinates of diagonal matrices: their shared singular vectors are unit vectors."""
    singular = X.double().square().sum(dim=0).sqrt()
    kept = singular.sort(descending=True, stable=True).indices[: max(1, int((singular > cut).sum()))]
    places = torch.arange(len(kept), device=X.device)

    def decode(y: Tensor) -> Tensor:
        return torch.zeros_like(X[0]).index_put((kept,), y[places, kept])

    return torch.diag_embed(X)[:, kept], decode


# --- edits


def star(s: State, eta: Given) -> Tensor:
    """Keep the fewest greatest singular values of each contribution that reach eta of their sum, and that sum.

    More than 2 dimensions count as a matrix; 1-D contributions stay as they are.
    """
    shares = each(s.site, eta)

    def edit(i: int, one: Tensor) -> Tensor:
        U, singular, V = svd(one)
        sums = singular.cumsum(0)
        if sums[-1] == 0:
            return one
        rank = min(int(torch.searchsorted(sums, shares[i] * sums[-1])) + 1, len(sums))
        return U[:, :rank] * (singular[:rank] * sums[-1] / sums[rank - 1]) @ V[:rank]

    return _each_matrix(s.X, edit)


def lowrank(s: State, rank: Given) -> Tensor:
    """Keep the greatest singular values of each contribution: int(rank * r) of them, at least one unless rank is 0.

    More than 2 dimensions count as a matrix; 1-D contributions stay as they are.
    """
    shares = each(s.site, rank)

    def edit(i: int, one: Tensor) -> Tensor:
        U, singular, V = svd(one)
        kept = max(1, int(shares[i] * len(singular))) if shares[i] > 0 else 0
        return U[:, :kept] * singular[:kept] @ V[:kept]

    return _each_matrix(s.X, edit)


# --- combines


def polar_stack(s: State, common: float, rank: float, exponent: float, exclude: str) -> Tensor:
    """Return the sum of chosen singular triplets of all sources, their vectors made orthonormal together.

    k = round((r - int(common r)) / N) triplets are of each source, beyond the r - k N greatest ones of the sum; at
    common = 0 none is of the sum. Of k, a share `rank` is kept (at least one). The singular values are raised to
    `exponent` and rescaled to their sum. 1-D, tensors that a pattern in `exclude` names, and matrices with too few
    rows or columns to give each source one: the mean.
    """
    if not _is_matrix(s, exclude):
        return _plain_mean(s)
    D = _scaled(s)
    count, short = len(D), min(D.shape[1:])
    k = min(round((short - int(short * common)) / count), short // count)
    c = short - k * count if common > 0 else 0
    k = math.ceil(k * rank)
    if not k and not c:
        return _plain_mean(s)
    size = float(max(torch.linalg.matrix_norm(one) for one in D))
    U, singular, V = svd(D.sum(dim=0), size)
    U, singular, V = U[:, :c], singular[:c], V[:c]
    if k:
        own = [svd(one - U @ (U.T @ one), size) for one in D]
        U = polar(torch.cat([*(one[0][:, :k] for one in own), U], dim=1))
        V = polar(torch.cat([*(one[2][:k] for one in own), V]))
        singular = torch.cat([*(one[1][:k] for one in own), singular])
    return (U * _power(singular, exponent) @ V).float()


def delta_solve(s: State, filter: str, time: float, rank: float, rule: str, init: str, floor: float,
                exclude: str) -> Tensor:  # fmt: skip
    """Return the y with least interference sum_i w_i |(y - X_i) X_i'|^2 / |X_i|^2, in closed form.

    The eigenvectors of C that are kept are solved for, by how much says `filter`: "none" all the way, "exponential" 1 -
    exp(-time l), "ridge" time l / (1 + time l), l the eigenvalue, at least `floor`; what is left comes from `init`.
    `rule` says how many of the greatest are kept: "ratio" ceil(rank n), "energy" until their share of the sum reaches
    `rank`, "participation" ceil((sum l)^2 / sum l^2), "participation_sqrt" the same of sqrt(l), "entropy" and "stable"
    the ranks of these names, "gavish_donoho" those of sqrt(l) above the optimal threshold for singular values. With
    weights of mixed sign, eigenvectors below -floor are left alone. ACTMat is known by its abstract only: its traces
    are |X_i|^2, and the ridge is a guess. 1-D, and tensors that a pattern in `exclude` names: the mean.
    """
    if not _is_matrix(s, exclude):
        return _plain_mean(s)
    X = s.X.double()
    C, B = _system(X, s.w)
    values, V = torch.linalg.eigh(C)
    values, V = values.flip(0), V.flip(1)
    share = (values > -floor).double()
    values = values.clamp_min(floor)
    share[_kept(values, rank, rule, tuple(X.shape[1:])) :] = 0.0
    if filter != "none":
        share *= -torch.expm1(-time * values) if filter == "exponential" else time * values / (1 + time * values)
    start = _scaled(s).sum(dim=0) * {"sum": 1.0, "mean": 1 / len(X), "zero": 0.0}[init]
    inner = B @ V * (share / values) - start @ V * share
    return torch.add(start, inner @ V.T).float()


def _system(X: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return C = sum_i w_i X_i'X_i / |X_i|^2, shape (n, n), and B = sum_i w_i X_i X_i'X_i / |X_i|^2, shape (m, n)."""
    C, B = X.new_zeros(X.shape[2], X.shape[2]), torch.zeros_like(X[0])
    for one, weight in zip(X, w, strict=True):
        size = one.square().sum()
        if size > 0:
            part = one.T @ one * (weight / size)
            C += part
            B += one @ part
    return C, B


def _kept(values: Tensor, rank: float, rule: str, shape: tuple[int, ...]) -> int:
    """Return how many eigenvalues are kept, at least one, of those in falling order."""
    parts = values / values.sum()
    roots = values.sqrt()
    match rule:
        case "ratio":
            count = int(len(values) * rank + 0.999)  # as published: a whole product stays one, whatever its rounding
        case "energy":
            count = int((parts.cumsum(0) < rank).sum()) + 1
        case "gavish_donoho":
            count = int((roots > _optimal_threshold(min(shape) / max(shape)) * roots.median()).sum())
        case "entropy":
            count = math.ceil(float((-(parts * parts.log()).sum()).exp()))
        case "stable":
            count = math.ceil(float((values / values[0]).square().sum()))
        case _:
            base = roots if rule == "participation_sqrt" else values
            count = math.ceil(float(base.sum() ** 2 / base.square().sum()))
    return min(max(1, count), len(values))


def _optimal_threshold(beta: float) -> float:
    """Return the optimal threshold for singular values in units of their median, as SWUDI approximates the median.

    Gavish and Donoho 2014 (arXiv:1305.5870), eq. 11, for a matrix of aspect ratio beta <= 1.
    """
    square = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    median = (1 - beta) ** 2 + beta if beta < 1 else 2 + math.sqrt(3)
    return math.sqrt(square / median)


def descent(s: State, iterations: float, rate: float, exclude: str) -> Tensor:
    """Return where Adam comes to that starts at the sum and minimises the loss of `delta_solve`.

    No entry moves by much more than iterations * rate, so the result stays near the sum. 1-D, and tensors that a
    pattern in `exclude` names: the mean.
    """
    if not _is_matrix(s, exclude):
        return _plain_mean(s)
    C, B = _system(s.X.double(), s.w)
    y = _scaled(s).sum(dim=0)
    first, second = torch.zeros_like(y), torch.zeros_like(y)
    for t in range(1, int(iterations) + 1):
        gradient = 2 * (y @ C - B)
        first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient.square()
        size = (second / (1 - _BETAS[1] ** t)).sqrt() + _EPSILON
        y = y - rate * first / (1 - _BETAS[0] ** t) / size
    return y.float()


def opcm(s: State, alpha: float, order: Given, exclude: str) -> Stage:
    """Return a fold of the sources: of each, what is orthogonal to the merge so far is added.

    Sources are taken by rising `order`, then as listed. After each, the merge of the whole model is rescaled to the
    mean norm of the sources so far. Only matrices are projected; 1-D tensors, and those that a pattern in `exclude`
    names, are added. Every step asks the whole model, so all its tensors need the same number of sources.
    """
    places = each(s.site, order)
    D = _scaled(s)
    squares = yield Ask(how="sum", values=D.square(), scope="model")
    sizes = squares.flatten().sqrt()
    linear = _is_matrix(s, exclude)
    y, factor, total = torch.zeros_like(D[0]), 1.0, 0.0
    for count, i in enumerate(sorted(range(len(D)), key=lambda i: places[i]), start=1):
        total += float(sizes[i])
        y = factor * y + (_beyond(y, D[i], alpha) if linear and count > 1 else D[i])
        if count > 1:
            square = yield Ask(how="sum", values=y.square()[None], scope="model", common=True)
            size = float(square.flatten()[0]) ** 0.5
            factor = size * count / total if size and total else 1.0
            y = y / factor
    return y.float()


def _beyond(y: Tensor, D: Tensor, alpha: float) -> Tensor:
    """Return D without its part in the top singular vectors of y, and without its diagonal in the others.

    Top are the first singular values whose sum is at most alpha of the sum of all. The thin SVD gives what the full
    one gives.
    """
    U, singular, V = svd(y)
    sums = singular.cumsum(0)
    top = int((sums <= alpha * sums[-1]).sum())
    inner = U.T @ D @ V.T
    taken = torch.diag(inner.diagonal())
    taken[:top, :top] = inner[:top, :top]
    return D - U @ taken @ V


# --- shapes


def iso(s: State, exponent: float) -> Tensor:
    """Raise the singular values of the merged contribution to a power and rescale them to their sum: 0 makes all equal.

    More than 2 dimensions count as a matrix; 1-D tensors stay as they are.
    """
    return _each_matrix(s.merged[None], lambda _, y: _respelled(y, exponent))[0]


def _respelled(y: Tensor, exponent: float) -> Tensor:
    U, singular, V = svd(y)
    return U * _power(singular, exponent) @ V


def svc(s: State, alpha: float) -> Tensor:
    """Scale each singular value of the merged contribution down by how often the sources (without weights) repeat it.

    More than 2 dimensions count as a matrix; 1-D tensors stay as they are.
    """
    X = _matrices(s.X)

    def calibrated(_: int, y: Tensor) -> Tensor:
        U, singular, V = svd(y)
        merged, factor = singular[:, None] * V, torch.zeros_like(singular)
        for one in X:
            own = U.T @ one.double()
            size = own.square().sum(dim=1)
            share = torch.where(size > 0, (merged * own).sum(dim=1) / torch.where(size > 0, size, 1.0), 0.0)
            factor += share.clamp_min(alpha)
        return U * (singular * len(X) / factor) @ V

    return _each_matrix(s.merged[None], calibrated)[0]

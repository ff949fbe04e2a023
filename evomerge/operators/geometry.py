"""Stages that follow from lengths of the contributions and angles between them.

Shapes: N sources, `...` the shape of the tensor; see `state.State` for X, G, w, y. Each function is a stage of
`stages.STAGES`, which has its formula and reference. Their results are combinations of the contributions, so all
they need to know of a tensor is its inner products: shape (N, N, ...), float64, where `...` is all ones, or has one
entry for each row. Inner products are in double precision: in float32 those of task vectors lose the angle.
"""

import dataclasses
from collections.abc import Generator

import torch
from torch import Tensor

from evomerge.operators.gates import gated, shares
from evomerge.operators.state import Ask, Stage, State, added

#: A sine below which two directions are one: sin(t o) / sin(o) is t there, to double precision.
_SINE = 1e-6

#: A norm that counts as zero for peers who take the angle to a zero vector as a right one.
_ZERO = 1e-8


def inner(X: Tensor, scope: str) -> Generator[Ask, Tensor, Tensor]:
    """Ask for the inner products of the sources over a scope: shape (N, N, ...), float64."""
    count = len(X)
    if scope != "row":
        found = yield Ask(how="gram", values=X, scope=scope, about="X")
        found = found.expand(count, count)  # a trace answers with one column
        return found.reshape(count, count, *[1] * (X.dim() - 1))
    one, two = torch.triu_indices(count, count, device=X.device)
    sums = yield Ask(how="sum", values=X[one].double() * X[two].double(), scope="row")
    found = sums.new_zeros(count, count, *sums.shape[1:])
    found[one, two] = found[two, one] = sums
    return found


def _norms(products: Tensor) -> Tensor:
    """Return the lengths, shape (N, ...)."""
    return products.diagonal().movedim(-1, 0).sqrt()


def _inverse(values: Tensor) -> Tensor:
    """Return 1 / value, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1.0 / torch.where(values == 0, 1.0, values))


def _column(w: Tensor, X: Tensor) -> Tensor:
    """Return one number per source in the shape of coefficients, (N, 1, ..., 1), float64."""
    return w.view(-1, *[1] * (X.dim() - 1))


def _combined(s: State, X: Tensor, coefficients: Tensor) -> Tensor:
    """Return sum_i c_i X_i, source after source."""
    return added(X * s.border(coefficients.to(X.dtype)))


# --- combines


def slerp(s: State, t: float, collinear: float, zero: str, scope: str) -> Stage:
    """Go from one contribution to another along the great circle of their directions; lengths are not touched.

    The two sources of greatest positive weight take part (equal weights: by name). The way gone from the first of
    them, in the recipe's order, is t w_2 / ((1 - t) w_1 + t w_2), that is w_2 / (w_1 + w_2) at t = 0.5, and t at
    equal weights. Where the angle says nothing (|cos| above `collinear`, or a contribution of zero) the way is the
    chord; zero = "right_angle" takes the angle to a contribution of zero as 90 degrees, which shortens the other one
    by sin(t 90), as other tools do.
    """
    X = gated(s)
    if len(X) == 1:
        return X[0]
    products = yield from inner(X, scope)
    pair = _heaviest(s)
    to = s.number(t).to(s.w.dtype)
    w = s.w[pair].clamp(min=0.0) * torch.cat([1 - to.view(1), to.view(1)])
    way = w[1] * _inverse(w.sum())
    turned = _turned(products[pair][:, pair], way, s.number(collinear), zero) * (w.sum() > 0)
    return _combined(s, X, turned.new_zeros(len(X), *turned.shape[1:]).index_copy(0, pair, turned))


def _heaviest(s: State) -> Tensor:
    """Return the indices of the two sources of greatest weight, in the recipe's order, shape (2,)."""
    order = torch.tensor(sorted(range(len(s.w)), key=lambda i: s.site.names[i]), device=s.w.device)
    return order[s.w[order].argsort(descending=True, stable=True)[:2]].sort().values


def _turned(products: Tensor, way: Tensor, collinear: Tensor, zero: str) -> Tensor:
    """Return what two contributions are multiplied by, shape (2, ...), from their inner products."""
    length = _norms(products)
    cosine = (products[0, 1] * _inverse(length[0]) * _inverse(length[1])).clamp(-1.0, 1.0)
    nothing = length.amin(dim=0) <= (0.0 if zero == "chord" else _ZERO)
    cosine = torch.where(nothing, 1.0 if zero == "chord" else 0.0, cosine)
    angle = cosine.acos()
    chord = (cosine.abs() > collinear) | (angle.sin() < _SINE)
    sine = torch.where(chord, 1.0, angle.sin())
    both = torch.cat([1 - way.view(1), way.view(1)]).view(2, *[1] * angle.dim())
    return torch.where(chord, both, (both * angle).sin() / sine)


def nuslerp(s: State, axis: str, collinear: float, zero: str) -> Stage:
    """Do as `slerp` does, with one angle for the tensor ("flatten"), for each row (last dimension) or each column.

    Columns run along the first dimension; a vector is one row and one column.
    """
    turned = axis == "columns" and s.X.dim() > 2
    X = gated(s)
    s = dataclasses.replace(s, X=X.movedim(1, -1) if turned else X, G=None)
    y = yield from slerp(s, 0.5, collinear, zero, "tensor" if axis == "flatten" else "row")
    return y.movedim(-1, 0) if turned else y


def multislerp(s: State, normalize: float, scope: str) -> Stage:
    """Give the direction of the mean of directions the mean length.

    What the published code does at the mean direction's tangent plane cancels, so that this is all of it. With
    normalize = 0 the length is the weighted sum. Where the directions cancel the result is the mean.
    """
    X = gated(s)
    share = shares(s.w)
    w = share if normalize else s.w
    if len(X) == 1:
        return X[0] * s.column(w)[0]
    products = yield from inner(X, scope)
    length, w = _norms(products), _column(w, X)
    along = w * _inverse(length)
    size = (along * (products * along).sum(dim=1)).sum(dim=0).clamp(min=0.0).sqrt()
    apart = size > _SINE * (w.abs() * (length > 0)).sum(dim=0)
    stretched = along * (w * length).sum(dim=0) * _inverse(torch.where(apart, size, 0.0))
    return _combined(s, X, torch.where(apart, stretched, w))


def karcher(s: State, max_iter: float, tol: float, scope: str) -> Stage:
    """Give the Karcher mean of the directions (that of least squared angles) the mean length.

    A fixed-point iteration from the mean of directions, in coefficients of the directions: a step follows the mean of
    the tangents towards the sources; one shorter than tol is not taken. Sources of zero have no direction, and
    count in the mean length.
    """
    X = gated(s)
    if len(X) == 1:
        return X[0]
    products = yield from inner(X, scope)
    length, w, least = _norms(products), _column(shares(s.w), X), s.number(tol)
    unit = _inverse(length)
    cosines = products * unit * unit[:, None]

    def size(k: Tensor) -> Tensor:
        return (k * (cosines * k).sum(dim=1)).sum(dim=0).clamp(min=0.0).sqrt()

    a = w * (length > 0)
    a = a * _inverse(a.sum(dim=0))
    first = torch.zeros_like(a)
    first[:1] = 1.0
    k = torch.where(size(a) < least, first * (length > 0), a * _inverse(size(a)))
    for _ in range(int(max_iter)):
        towards = (cosines * k).sum(dim=1).clamp(-1.0, 1.0)
        angle = towards.acos()
        settled = (angle <= least) | (angle.sin() <= least)
        pull = torch.where(settled, 0.0, a * angle / torch.where(settled, 1.0, angle.sin()))
        tangent = pull - (pull * towards).sum(dim=0) * k
        step = size(tangent)
        moved = step.cos() * k + step.sin() * _inverse(step) * tangent
        k = torch.where(step <= least, k, moved * _inverse(size(moved)))
    return _combined(s, X, (w * length).sum(dim=0) * k * unit)


def doge(s: State, eta: float, density: float, elsewhere: str, cut: float) -> Stage:
    """Add to every task vector the one shared correction that makes peace among them, keep the greatest, sum.

    Weights are eta / |X_i| over the tensor, times w_i. The published code descends on the loss; without its projection
    the minimum has a closed form, one N x N system per row, at which sum_i w_i (X_i + d) has the inner product
    |X_j|^2 with every X_j. Directions of an eigenvalue below `cut` times the greatest are left out of that system.
    Vectors stay the base's, as published, or are summed without correction (elsewhere = "sum").
    """
    X = s.X if s.X.dim() > 2 else s.X.reshape(len(s.X), 1, -1)
    length = _norms((yield from inner(s.X, "tensor"))).view(-1, 1, 1)
    w = s.w.view(-1, 1, 1) * eta * _inverse(length)
    if s.X.dim() > 2:
        rows = X.flatten(2).double()
        X = (rows + _correction(rows, w, cut)).to(s.X.dtype).view_as(s.X)
    size = X.abs()
    counted = size if s.X.dim() > 2 or elsewhere == "sum" else size[..., :0]
    ask = Ask(how="rank", values=counted, scope="model", rank=lambda n: [int(density * n)] * len(X))
    kept = torch.where(size >= (yield ask), X, 0.0)
    y = _combined(s, kept.reshape(len(X), -1), w.flatten()[:, None]).view(s.X.shape[1:])
    return y if s.X.dim() > 2 or elsewhere == "sum" else torch.zeros_like(y)


def _correction(rows: Tensor, w: Tensor, cut: float) -> Tensor:
    """Return d of `doge`, shape (m, n), of least norm, from contributions of shape (N, m, n) and weights (N, 1, 1)."""
    products = torch.einsum("imn,jmn->mij", rows, rows)
    wanted = products.diagonal(dim1=1, dim2=2) - products @ w.flatten()
    solved = torch.linalg.pinv(products, rtol=cut, hermitian=True) @ wanted[:, :, None]
    return torch.einsum("mi,imn->mn", solved[:, :, 0], rows) * _inverse(w.sum())


# --- weighs


def norm(s: State, exponent: float, normalize: float, scope: str) -> Stage:
    """Weigh each source by a power of its length, times its weight; a contribution of zero weighs nothing."""
    length = _norms((yield from inner(gated(s), scope))).flatten()
    w = s.w * torch.where(length > 0, torch.where(length > 0, length, 1.0) ** s.number(exponent), 0.0)
    return shares(w) if normalize else w


# --- shapes


def stock(s: State, average: str, clamp: float, floor: float, scope: str) -> Stage:
    """Shorten the merged contribution as far as the sources disagree: by t, from the mean cosine among them.

    `average` is of "cosines", or of "angles". t is kept in [0, 1] unless clamp = 0: sources that oppose each other
    then extrapolate. Products of lengths below `floor` count as that. Where t has no finite value it is 0.
    """
    count = len(s.X)
    products = yield from inner(s.X, scope)
    length = _norms(products)
    one, two = torch.triu_indices(count, count, offset=1, device=s.X.device)
    cosines = products[one, two] * _inverse(torch.maximum(length[one] * length[two], s.number(floor)))
    cosine = cosines.mean(dim=0) if average == "cosines" else cosines.clamp(-1.0, 1.0).acos().mean(dim=0).cos()
    divisor = 1 + (count - 1) * cosine
    t = count * cosine * _inverse(torch.where(divisor.abs() < _SINE, 0.0, divisor))
    return s.merged * s.border((t.clamp(0.0, 1.0) if clamp else t).to(s.X.dtype))


def norm_match(s: State, scope: str) -> Stage:
    """Give the merged contribution the mean length of the sources' contributions; zero stays zero."""
    length = _norms((yield from inner(s.X, scope)))
    square = yield Ask(how="sum", values=s.merged.double()[None] ** 2, scope=scope, common=True)
    wanted = (_column(shares(s.w.abs()), s.X) * length).sum(dim=0)
    return s.merged * s.border((wanted * _inverse(square[0].sqrt())).to(s.X.dtype))

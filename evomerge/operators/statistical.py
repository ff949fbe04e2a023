"""Stages that take statistics of the sources as inputs: Fisher, Gram matrices, activations, losses.

Shapes: N sources, weights (N, m, n) as torch's Linear stores them (out x in), other tensors (N, ...). A tensor without
the statistic (an embedding has no Gram matrix) gets the plain mean, or is left as it is. Linear systems are solved in
float64.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.operators.elementwise import kept, mean
from evomerge.operators.state import Ask, Stage, State, each, per_source

#: Conjugate gradients stop where the residual is below this share of the right side, as scipy's do.
_TOLERANCE = 1e-5

Given = float | str | Mapping[str, float]


# --- gates and weighs


def fisher(s: State, floor: float, rule: str, floored: str, norm: str) -> Stage:
    """Let each entry count as much as its diagonal Fisher information.

    Fisher values below the floor are raised to it ("max"), or the floor is added to all of them ("add"), of all
    sources or of the first alone, which the official code does to favour it. Then they are divided by their L2
    norm over the tensor or the model. Where nothing is left to count (floor 0) all sources count alike.
    """
    given = s.site.statistics("fisher")
    F = torch.ones_like(s.X) if given is None else _stacked(s, given, s.X.shape[1:], "fisher")
    size = None
    if norm != "none":
        squares = F.double() ** 2 if given is not None else torch.zeros_like(s.X, dtype=torch.float64)
        size = (yield Ask(how="sum", values=squares, scope=norm)).sqrt() + (floor if rule == "add" else 0.0)
    if given is None:
        return F
    raised = F.clamp_min(floor) if rule == "max" else F + floor
    if floored == "first":
        raised = torch.cat([raised[:1], F[1:]])
    if size is not None:
        raised = raised / torch.where(size > 0, size, 1.0)
    total = raised.sum(dim=0)
    # shares rather than values: squared gradients may be too small for the products of float32
    return torch.where(total > 0, raised / torch.where(total > 0, total, 1.0), 1.0 / len(raised)).to(s.X.dtype)


def salient(s: State, density: Given, order: Given) -> Stage:
    """Give each entry to one source at most: source after source takes its most salient entries of those left.

    A source takes int(density n) of the tensor's n entries (at least 1), and none where it equals the base. Turns go by
    `order`, least first, then as the sources stand in the recipe. Without the statistic "square", of the inputs x,
    saliency is X_i^2 alone.
    """
    score = s.X.square() * _columns(s, s.site.statistics("square"), "square")
    turns, shares = each(s.site, order), each(s.site, density)
    free = torch.ones_like(s.X[0], dtype=torch.bool)
    gates = torch.zeros_like(s.X)
    for i in sorted(range(len(turns)), key=turns.__getitem__):
        left = torch.where(free, score[i], 0.0)
        count = kept(left.numel(), shares[i], "floor")
        edge = yield Ask(how="rank", values=left[None], rank=partial(_always, count))
        taken = (left >= edge[0]) & (left > 0)
        free = free & ~taken
        gates[i] = taken
    return gates


def sensitivity(s: State, temperature: float, transfer: Given, scope: str) -> Stage:
    """Weigh sources by the softmax of their sensitivities, normalised within each source: w_i softmax_i.

    a_i is the source's sensitivity of the scope (that of a layer is the sum over its tensors) divided by the L2 norm
    over all scopes of its model. `transfer` is how well the source does on the others' tasks (t_i), 1 if not measured.
    """
    given = s.site.statistics("sensitivity")
    found = torch.zeros(len(s.w), 1, dtype=torch.float64, device=s.X.device)
    if given is not None:
        found = torch.stack([one.double().reshape(1).to(s.X.device) for one in given])
    tensors = torch.ones_like(found)
    if scope == "layer":
        found = yield Ask(how="sum", values=found, scope="layer")
        tensors = yield Ask(how="sum", values=tensors, scope="layer")
    # every tensor of a scope brings its part of the scope's square
    total = yield Ask(how="sum", values=found**2 / tensors, scope="model")
    share = found / torch.where(total > 0, total, 1.0).sqrt() * per_source(s, transfer).double().view(-1, 1)
    return s.w * (share[:, 0] / temperature).softmax(dim=0)


def loss(s: State, temperature: float) -> Tensor:
    """Weigh sources by the softmax of minus their losses on a few examples: w_i softmax_i.

    The base is a candidate like any other in the published code: name it as a source to have it take part.

    Raises:
        RecipeError: if there are no losses.
    """
    given = s.site.statistics("loss")
    if given is None:
        raise RecipeError(f"tensor {s.site.tensor!r}: sources have no statistic 'loss', which their weights come from")
    losses = torch.stack([one.double().reshape(()).to(s.w.device) for one in given])
    return s.w * (-losses / temperature).softmax(dim=0)


# --- combines


def regmean(s: State, alpha: float, ridge: float) -> Tensor:
    """Return the matrix whose outputs on each source's inputs are nearest to that source's.

    A ridge adds that share of the mean diagonal to the sum of Gram matrices and pulls towards the plain mean; the
    published code has none. A single source comes back as it is.

    Raises:
        CandidateError: if the sum of the Gram matrices is singular.
    """
    plain = mean(s, 1.0)
    given = s.site.statistics("gram")
    if given is None or len(s.X) == 1:
        return plain
    X = _contributions(s)
    gram = _shrunk(_stacked(s, given, X.shape[2:] * 2, "gram").double(), alpha) * s.w.view(-1, 1, 1)
    right, left = (X @ gram).sum(dim=0), gram.sum(dim=0)
    pull = ridge * left.diagonal().mean()
    right = right + pull * plain.double().view_as(right)
    left = left + pull * torch.eye(len(left), dtype=left.dtype, device=left.device)
    factor, failed = torch.linalg.cholesky_ex(left)
    pivots = factor.diagonal() ** 2 / left.diagonal()
    if failed or not bool((pivots > len(left) * torch.finfo(left.dtype).eps).all()):
        raise CandidateError(
            f"tensor {s.site.tensor!r}: the sum of the sources' Gram matrices ({len(left)} x {len(left)}) is singular; "
            f"take alpha below 1, a ridge above 0 or more texts; got alpha {alpha:g}, ridge {ridge:g}"
        )
    return torch.cholesky_solve(right.T, factor).T.float().reshape(s.X.shape[1:])


def match_fisher(s: State, iterations: float, init: str) -> Tensor:
    """Return what conjugate gradients reach with C_i the diagonal Fisher information of source i."""
    given = s.site.statistics("fisher")
    if given is None:
        return mean(s, 1.0)
    F = _stacked(s, given, s.X.shape[1:], "fisher").double() * s.w.view(-1, *[1] * (s.X.dim() - 1))
    return _matched(s, lambda Y: F * Y, iterations, init, s.X.shape)


def match_gram(s: State, iterations: float, init: str, alpha: float) -> Tensor:
    """Return what conjugate gradients reach with C_i(W) = W G_i, G_i the Gram matrix of the inputs."""
    given = s.site.statistics("gram")
    if given is None:
        return mean(s, 1.0)
    shape = _contributions(s).shape
    gram = _shrunk(_stacked(s, given, shape[2:] * 2, "gram").double(), alpha) * s.w.view(-1, 1, 1)
    return _matched(s, lambda Y: Y @ gram, iterations, init, shape)


def match_kronecker(s: State, iterations: float, init: str, alpha: float) -> Tensor:
    """Return what conjugate gradients reach with C_i(W) = B_i W G_i: Gram matrices of output gradients and inputs.

    A tensor that lacks one of the two, such as the output head, is averaged.
    """
    inputs, outputs = s.site.statistics("gram"), s.site.statistics("gram_out")
    if inputs is None or outputs is None:
        return mean(s, 1.0)
    shape = _contributions(s).shape
    gram = _shrunk(_stacked(s, inputs, shape[2:] * 2, "gram").double(), alpha) * s.w.view(-1, 1, 1)
    gram_out = _shrunk(_stacked(s, outputs, shape[1:2] * 2, "gram_out").double(), alpha)
    return _matched(s, lambda Y: gram_out @ Y @ gram, iterations, init, shape)


def _matched(
    s: State, metric: Callable[[Tensor], Tensor], iterations: float, init: str, shape: Sequence[int]
) -> Tensor:
    """Solve sum_i C_i(W - W_i) = 0 by conjugate gradients, W of shape `shape[1:]`, in at most so many iterations.

    They stop where the residual's norm is at most `_TOLERANCE` times that of sum_i C_i(W_i).

    Args:
        s: the state.
        metric: applies each source's C_i to its row of (N, ...).
        iterations: how many at most: few keep the result near the beginning.
        init: "average" of the sources, or "base".
        shape: of the contributions, as the metric takes them.
    """
    if init == "base" and s.W0 is None:
        raise RecipeError(f"tensor {s.site.tensor!r}: init 'base' needs a base; name one as `base`, or take 'average'")
    X = _contributions(s).view(*shape)

    def applied(y: Tensor) -> Tensor:
        return metric(y.expand(*shape)).sum(dim=0)

    y = torch.zeros_like(X[0]) if init == "base" else mean(s, 1.0).double().view_as(X[0])
    full = X if s.W0 is None else X + s.W0.double().view_as(X[0])
    enough = _TOLERANCE * metric(full).sum(dim=0).norm()
    r = metric(X - y).sum(dim=0)
    p, size = r, (r * r).sum()
    for _ in range(int(iterations)):
        image = applied(p)
        curvature = (p * image).sum()
        if size.sqrt() <= enough or not curvature > 0:
            break
        step = size / curvature
        y, r = y + step * p, r - step * image
        before, size = size, (r * r).sum()
        p = r + (size / before) * p
    return y.float().reshape(s.X.shape[1:])


# --- shapes


def relax(s: State, omega: float) -> Tensor:
    """Keep the base where its own activations are great: y times 1 - (1 - omega) a / max(a), per input channel.

    a is the statistic "activation" of the base. Tensors without it (embeddings, biases) are left as they are.

    Raises:
        RecipeError: if the line has no base to stay near to.
    """
    if s.W0 is None:
        raise RecipeError(f"tensor {s.site.tensor!r}: relax keeps near to a base and needs one; name it as `base`")
    given = s.site.statistic("activation", None)
    if given is None:
        return s.merged
    a = _columns(s, [given], "activation")[0]
    return s.merged * (1 - (1 - omega) * a / torch.where(a.max() > 0, a.max(), 1.0))


# --- statistics in the shapes that the stages need


def _always(count: int, entries: int) -> list[int]:
    return [count]


def _contributions(s: State) -> Tensor:
    """Return the contributions that count, as matrices (N, m, n), float64."""
    X = s.X if s.G is None else s.X * s.G
    return X.double().flatten(2) if X.dim() > 2 else X.double()


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """Multiply what is off the diagonals of matrices (N, n, n)."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram * (alpha + (1 - alpha) * eye)


def _stacked(s: State, given: Sequence[Tensor], shape: Sequence[int], kind: str) -> Tensor:
    """Return the sources' statistics as one tensor (N, *shape), float32.

    Raises:
        CandidateError: if they have another shape: those of a weight that is stored in x out, say.
    """
    other = next((one for one in given if one.shape != tuple(shape)), None)
    if other is not None:
        raise CandidateError(
            f"tensor {s.site.tensor!r} {tuple(s.X.shape[1:])}: the statistic {kind!r} must have shape {tuple(shape)}, "
            f"got {tuple(other.shape)}; a weight must be stored out x in"
        )
    return torch.stack([one.to(s.X.device, torch.float32) for one in given])


def _columns(s: State, given: Sequence[Tensor] | None, kind: str) -> Tensor:
    """Return statistics per input channel so that they multiply X: (K, 1, n), (K, n) or (K, 1, n, 1, 1); 1 if none."""
    if given is None:
        return torch.ones((), device=s.X.device)
    shape = s.X.shape[1:]
    at = 0 if len(shape) == 1 else 1
    found = _stacked(s, given, shape[at : at + 1], kind)
    return found.view(-1, *[size if i == at else 1 for i, size in enumerate(shape)])

"""Gates and weighs: compare the sources' contributions and say which entries, or which sources, count how much.

Shapes: N sources, `...` the shape of the tensor; see `state.State` for X, G, w, y. Each function is a stage of
`stages.STAGES`, which has its formula and reference.
"""

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.operators.elementwise import TINY
from evomerge.operators.state import Ask, Stage, State, added, per_source

#: A magnitude below which `near` no longer divides by it.
_NEAR = 1e-6


def gated(s: State) -> Tensor:
    """Return the contributions as far as they count: G_i X_i, shape (N, ...)."""
    return s.X if s.G is None else s.X * s.G


def shares(w: Tensor) -> Tensor:
    """Return weights divided by their sum; where they cancel, by the sum of their magnitudes; zeros stay zeros."""
    signed, size = w.sum(), w.abs().sum()
    divisor = torch.where(signed.abs() < TINY * size, size, signed)
    return w / torch.where(divisor == 0, 1.0, divisor)


def _base(s: State, stage: str) -> Tensor:
    if s.W0 is None:
        raise RecipeError(f"tensor {s.site.tensor!r}: stage {stage} compares with the base; start the line with `base`")
    return s.W0


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


# --- edits


def near(s: State, t: float) -> Tensor:
    """Move from the base towards each source by at most t in every entry.

    Magnitudes below 1e-6 count as 1e-6 in the divisor, as in the published code, which knows one source only.
    """
    return s.X * (per_source(s, t) / s.X.abs().clamp(min=_NEAR)).clamp(max=1.0)


# --- variance and energy (SCE)


def variance(s: State, share: float) -> Stage:
    """Let the entries count that vary most among the sources: int(share * entries that vary at all) of them."""
    mask = yield from _most_varied(s, share)
    return mask.to(s.X.dtype).expand_as(s.X)


def energy(s: State, select: float, floor: float) -> Stage:
    """Weigh each source by the mean square of its contribution, times its weight.

    With select < 1 only the entries that vary most among the sources (see `variance`) are measured, while all are
    merged; gates before it play no part. Where the mean squares add up to nothing (to less than `floor`, if that is
    above 0) all count alike; with select = 0 none counts. Sums are in double precision: sources of tiny contributions
    keep their ratio.
    """
    X = s.X * (yield from _most_varied(s, select))
    total = (yield Ask(how="sum", values=X.double() ** 2)).flatten()
    entries = (yield Ask(how="sum", values=torch.ones_like(X[:1]))).flatten()
    nothing = (total.sum() < s.number(floor) * entries[0]) | (total.sum() == 0)
    w = shares(s.w * torch.where(nothing, 1.0, total / torch.where(nothing, 1.0, total.sum())))
    return w * (s.number(select) > 0)


def _most_varied(s: State, share: float) -> Stage:
    """Return the mask of the entries that vary most, shape (1, ...).

    It ranks the root of the summed squares, which orders alike and does not vanish in float32 as the variance would.
    """
    X = s.X.double()
    spread = added((X - added(X) / len(X)) ** 2).sqrt().float()[None]
    varied = yield Ask(how="sum", values=(spread > 0).float())
    count = lambda n: [n if share >= 1 else int(share * float(varied.sum()))]  # noqa: E731  # too short for a function
    return spread >= (yield Ask(how="rank", values=spread, rank=count))


# --- competition (PCB)


def compete(s: State, ratio: float, inter: str, scope: str) -> Stage:
    """Let each entry count by how it competes within its source and among the sources; the gates add up to 1.

    As in the published code the competition among sources looks at what the origin gave, that within a source at X,
    for which a winsor edit keeps one extreme entry from setting the scale of all others; the entry at the threshold
    gets the gate 0. Where no gate is open, none is. With `sum` after it weights multiply the numerator alone.
    """
    D, size, count = s.X if s.D is None else s.D, s.X.abs(), len(s.X)
    least = -(yield Ask(how="max", values=-size, scope=scope))
    most = yield Ask(how="max", values=size, scope=scope)
    level = _divided(size - least, most - least)
    others = D if inter == "raw" else D.sign() * level
    score = torch.exp(count * level**2) * torch.tanh(D * others.sum(dim=0))
    score = score + (yield Ask(how="max", values=-score, scope=scope))  # from 0 upwards, as ranks want it
    rank = Ask(how="rank", values=score, scope=scope, rank=lambda d: [d - int(d * (1 - ratio))] * count)
    threshold = (yield rank).clamp(min=0.0)
    span = (yield Ask(how="max", values=score, scope=scope)) - threshold
    G = torch.where(span > 0, _divided(score - threshold, span).clamp(min=0.0), (score >= threshold).to(D.dtype))
    return G / G.sum(dim=0).clamp(min=1e-12)


# --- columns (WIDEN)


def widen(s: State, threshold: float, score: float) -> Tensor:
    """Let each column count by how far its length and its direction moved from the base's, against the other sources.

    Within a source the moves are replaced by their ranks in [0, 1); the gate is their softmax over the sources, or
    `score` where a rank is above `threshold` times the mean. `embed_tokens` has its tokens as columns, as in the
    published code; more than two dimensions count as out x rest. Vectors take |X| itself in place of ranks.
    """
    W0 = _base(s, "widen")
    if s.X.dim() <= 2:
        return _scored(s.X.abs().reshape(len(s.X), -1), threshold, score).view_as(s.X)
    W, origin = (s.X + W0).flatten(2).double(), W0.flatten(1).double()[None]
    along = 2 if s.site.tensor.endswith("embed_tokens.weight") else 1
    length, before = W.norm(dim=along), origin.norm(dim=along)
    turned = 1 - _divided((W * origin).sum(dim=along), length * before)
    moves = (_ranks((length - before).abs()), _ranks(turned))
    G = (_scored(moves[0], threshold, score) + _scored(moves[1], threshold, score)) / 2
    return G.unsqueeze(along).expand_as(W).reshape(s.X.shape)


def _ranks(values: Tensor) -> Tensor:
    """Return the place of each value in its row divided by the row's length, float32; equals by their order."""
    count = values.shape[1]
    places = torch.arange(count, device=values.device, dtype=torch.float32) / count
    order = values.argsort(dim=1, stable=True)
    return torch.zeros_like(values, dtype=torch.float32).scatter(1, order, places.expand_as(order))


def _scored(level: Tensor, threshold: float, score: float) -> Tensor:
    above = level > threshold * level.mean(dim=1, keepdim=True)
    return torch.where(above, score, torch.softmax(level, dim=0))


# --- who changed what (RAM), whom to trust (TATR), what matters (Arcee Fusion)


def ram(s: State, epsilon: float) -> Tensor:
    """Let what one source alone changed count in full, and share what several changed evenly among them."""
    changed = (s.X.abs() > s.number(epsilon)).to(s.X.dtype)
    return changed / added(changed).clamp(min=1.0)


def own(s: State, r: float, alpha: float, scope: str) -> Stage:
    """Let what is a source's own count more (RAM+), to make up for what it gave away in sharing.

    An entry is a source's own where its gate is 1, and shared where it is between 0 and 1; see `ram`.
    """
    G = torch.ones_like(s.X) if s.G is None else s.G
    alone = yield Ask(how="sum", values=(G == 1).float(), scope=scope)
    shared = yield Ask(how="sum", values=((G > 0) & (G < 1)).float(), scope=scope)
    more = s.number(r) * torch.minimum(_divided(shared, alone), s.number(alpha))
    return torch.where(G == 1, (1 + more).to(G.dtype), 1.0)


def trust(s: State, quantile: float, scope: str) -> Stage:
    """Leave out the entries by which the sources disturb each other most.

    The disturbance is sum_{i != j} |g_i| |X_j| with g the gradient of source i's loss; this is the published variant
    without data, with |X_i| in place of |g_i|. Its root is ranked, which orders alike and does not vanish in float32.
    """
    size = s.X.abs().double()
    disturbance = (added(size) ** 2 - added(size**2)).clamp(min=0.0).sqrt().float().abs()[None]
    rank = Ask(how="rank", values=disturbance, scope=scope, rank=lambda n: [n - int(quantile * (n - 1))])
    threshold = yield rank
    return (disturbance <= threshold).to(s.X.dtype).expand_as(s.X)


def fusion(s: State, multiplier: float) -> Tensor:
    """Let the entries count whose importance stands out from their tensor's.

    Importance is |X| times the divergence of the row from the base's, both through a softmax to which 1e-8 is added;
    quartiles are the sorted values at int(q (entries - 1)).
    """
    W0 = _base(s, "fusion")
    last = W0.shape[-1] if W0.dim() else 1
    p, q = (torch.softmax(W.double().reshape(len(W), -1, last), dim=-1) + 1e-8 for W in (s.X + W0, W0[None]))
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    importance = (s.X.abs().view(len(p), -1, last) * divergence).flatten(1)
    places = [int(share * (importance.shape[1] - 1)) + 1 for share in (0.25, 0.5, 0.75)]
    low, middle, high = (importance.kthvalue(place, dim=1, keepdim=True).values for place in places)
    return (importance >= middle + multiplier * (high - low)).to(s.X.dtype).view_as(s.X)

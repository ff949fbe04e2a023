"""Stages of plain arithmetic: origins, thresholds, random masks, votes, sums, scales.

Shapes: N sources, `...` the shape of the tensor; see `state.State` for X, D, G, w, y. Each function is a stage of
`stages.STAGES`, which has its formula and reference, and says which are elementwise: given the answers to what they
ask, an entry of the result depends on that entry of the sources alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.operators.state import Ask, Stage, State, added, each, per_source

#: A sum of weights below this share of the sum of their magnitudes is no divisor.
TINY = 1e-3

#: An epsilon reaches no further than this share of the way from a density to 0 or 1: no certainty at the edges.
REACH = 0.999

Given = float | str | Mapping[str, float]


def zero(s: State) -> tuple[Tensor, None]:
    """Take the sources' full weights as contributions."""
    return s.X, None


def base(s: State) -> tuple[Tensor, Tensor | None]:
    """Take the task vectors W_i - W_0 as contributions."""
    return (s.X, None) if s.W0 is None else (s.X - s.W0, s.W0)


base_if_any = base


# --- edits


def trim(s: State, density: Given, scope: str, rescale: str, count: str) -> Stage:
    """Keep the entries of greatest magnitude of each contribution and zero the rest.

    The threshold is the magnitude of rank k; entries that equal it are kept. `count` says what k is for n entries:
    "floor" max(1, int(density n)) (0 at density 0), "above" int(density n) + 1, as the published code of TIES has
    it, "below" n - int(n (1 - density)) + 1, as counts from the dropped share have it.
    """
    shares = each(s.site, density)
    size = s.X.abs()
    rank = partial(_ranks, shares, count)
    threshold = yield Ask(how="rank", values=size, scope=scope, about="magnitude", rank=rank)
    X = torch.where(size >= threshold, s.X, 0.0)
    return (yield from rescaled(s, X, rescale, per_source(s, density, _inverse), scope))


def _ranks(shares: Sequence[float], count: str, entries: int) -> list[int]:
    return [kept(entries, share, count) for share in shares]


def kept(entries: int, density: float, count: str) -> int:
    """Return how many of so many entries a density keeps, by the rules of `trim`."""
    if density <= 0 or density >= 1:
        return entries if density >= 1 else 0
    if count == "above":
        return int(density * entries) + 1
    if count == "below":
        return entries - int(entries * round(1 - density, 12)) + 1  # 1 - 0.9 is 0.1, and not a little less
    return max(1, int(density * entries))


def drop(s: State, density: Given, rescale: str) -> Stage:
    """Keep entries at random, each with probability density, and make up for what was lost.

    Given masks (the statistic "mask", 1 = kept) take the place of those that are drawn.
    """
    given = s.site.statistics("mask")
    mask = s.chosen(density) if given is None else torch.stack(given).view_as(s.X).bool()
    factor = per_source(s, density, _inverse if rescale == "1/p" else _some)  # nothing is left at density 0
    X = torch.where(mask, s.X, 0.0) * factor
    return (yield from rescaled(s, X, "none" if rescale == "1/p" else rescale, factor, "tensor"))


def _some(p: float) -> float:
    return float(p > 0)


def _inverse(p: float) -> float:
    return 0.0 if p <= 0 else 1 / p


def magprune(s: State, density: Given, epsilon: Given, rank: str, rescale: str) -> Stage:
    """Keep entries at random, great ones more often: p rises linearly from density - epsilon to density + epsilon.

    It rises with the rank of |X| within the row (the last dimension) or the tensor, or with |X| itself between the
    least and the greatest of the row ("magnitude"). "1/p" divides each survivor by its own p. An epsilon that would
    leave (0, 1) is cut down, so that the expected share stays the density. A row of one entry has p = density. Given
    masks and probabilities (the statistics "mask" and "keep_prob") take the place of those made here.
    """
    given, likely = s.site.statistics("mask"), s.site.statistics("keep_prob")
    p = _rising(s, density, epsilon, rank) if likely is None else torch.stack(likely).view_as(s.X).float()
    mask = s.draw() < p if given is None else torch.stack(given).view_as(s.X).bool()
    inverse = torch.where(p > 0, 1 / p, 0.0) if rescale == "1/p" else p
    return (yield from rescaled(s, torch.where(mask, s.X, 0.0), rescale, inverse, "tensor"))


def _rising(s: State, density: Given, epsilon: Given, rank: str) -> Tensor:
    """Return the probabilities of `magprune`, shape (N, ...)."""
    size = s.X.abs()
    if rank == "tensor" or size.dim() == 1:
        size = size.reshape(len(size), -1)
    last = size.shape[-1] - 1
    if last < 1:
        place = torch.full_like(size, 0.5)
    elif rank == "magnitude":
        low, high = size.amin(dim=-1, keepdim=True), size.amax(dim=-1, keepdim=True)
        place = torch.where(high > low, (size - low) / (high - low + 1e-7), 0.5)
    else:
        steps = torch.arange(last + 1, device=size.device) / last
        place = torch.empty_like(size).scatter_(-1, size.argsort(dim=-1, stable=True), steps.expand_as(size))
    pairs = zip(each(s.site, density), each(s.site, epsilon), strict=True)
    reach = [min(far, REACH * min(p, 1 - p)) for p, far in pairs]
    window = s.column(torch.tensor(reach, dtype=torch.float64, device=s.X.device))
    return per_source(s, density) + window * (2 * place.view_as(s.X) - 1)


def band(s: State, density: Given, gamma: Given, scope: str, count: str, rescale: str) -> Stage:
    """Drop the entries of greatest magnitude, keep those next in size, drop the rest; entries at an edge are kept.

    `count` says what goes, of n entries: "after" int(gamma n) at the top, and int(density n) of what is left are
    kept, as the published code has it; "within" int(gamma n) at the top of the int(density n) greatest; "full"
    int(gamma n) at the top, but fewer where int(density n) would not be left; "bottom" int(gamma n) at the bottom,
    and at the top so many that n - int(n (1 - density)) are left.
    """
    pairs = list(zip(each(s.site, density), each(s.site, gamma), strict=True))
    size = s.X.abs()
    ask = partial(Ask, how="rank", values=size, scope=scope, about="magnitude")
    low = yield ask(rank=lambda n: [edges(n, *pair, count)[1] for pair in pairs])
    high = yield ask(rank=lambda n: [edges(n, *pair, count)[0] for pair in pairs])
    X = torch.where(torch.where(low == torch.inf, size < high, (size >= low) & (size <= high)), s.X, 0.0)
    return (yield from rescaled(s, X, rescale, per_source(s, density, _inverse), scope))


def edges(entries: int, density: float, gamma: float, count: str) -> tuple[int, int]:
    """Return the ranks of the greatest and the least entry that `band` keeps.

    The least is 0 where only entries below the greatest are kept, exclusively: none, or just the last of all.
    """
    top, wanted = int(gamma * entries), int(density * entries)
    match count:
        case "after":
            least = top + wanted
        case "within":
            least = wanted
        case "full":
            top, least = min(top, entries - wanted), min(top + wanted, entries)
        case _:
            least = entries - max(0, top - 1)
            top = max(0, int(entries * (1 - density)) - top)
    if wanted <= 0 or top >= min(least, entries):
        return entries, 0
    return (top + 1, least) if top + 1 < entries else (top, 0)


def sign1bit(s: State, scope: str) -> Stage:
    """Give all entries of a contribution that are not zero the same magnitude: the mean of theirs."""
    size = s.X.abs()
    total = yield Ask(how="sum", values=size, scope=scope)
    entries = yield Ask(how="sum", values=(size > 0).to(size.dtype), scope=scope)
    return s.X.sign() * (total / entries.clamp(min=1)).to(s.X.dtype)


def winsor(s: State, q: float, scope: str) -> Stage:
    """Move magnitudes beyond two order statistics to them, and leave the signs.

    For n entries the bounds are number int(n q) and number int(n (1 - q) - 1) of the sorted magnitudes, from 0.
    """
    size = s.X.abs()
    count = len(s.X)
    ask = partial(Ask, how="rank", values=size, scope=scope, about="magnitude")
    low = yield ask(rank=lambda n: [n - int(n * q)] * count)
    high = yield ask(rank=lambda n: [n - max(0, int(n * (1 - q) - 1))] * count)
    high = torch.where(high < 0, torch.inf, high)  # where all reach it, nothing lies beyond
    return s.X.sign() * torch.minimum(torch.maximum(size, low), high)


def rescaled(s: State, X: Tensor, rule: str, inverse: Tensor, scope: str) -> Stage:
    """Make up for what an edit took away: by 1/p, or so that the L1 or L2 norm over the scope is what it was."""
    if rule == "1/p":
        return X * inverse
    if rule in ("l1", "l2"):
        before = yield Ask(how="sum", values=_measure(s.X, rule), scope=scope)
        after = yield Ask(how="sum", values=_measure(X, rule), scope=scope)
        ratio = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 0.0)
        return X * (ratio if rule == "l1" else ratio.sqrt()).to(X.dtype)
    return X


def _measure(X: Tensor, rule: str) -> Tensor:
    return X.abs() if rule == "l1" else X.double() ** 2


# --- gates


def elect(s: State, zero: str, vote: str, slack: Given) -> Stage:
    """Let entries count that have the elected sign; an entry that is zero never counts.

    `vote` says what a source has to say: "sum" w_i X_i, "count" its sign, "share" w_i sign(X_i) X_i^2 / |X_i|^2 with
    the norm over the model. It is multiplied by 1 + slack_i: a great slack lets that source decide wherever it is
    not zero. `zero` says how a sum of zero counts: "plus", "minus", "none" (no entry counts), or as the sign of the
    sum of all elected signs of the model ("majority") or the tensor ("tensor_majority").
    """
    votes = s.X * s.column(s.w)
    says = votes.sign() if vote == "count" else votes
    if vote == "share":
        norms = yield Ask(how="sum", values=s.X.double() ** 2, scope="model")
        says = votes * s.X.abs() / torch.where(norms > 0, norms, 1.0).to(s.X.dtype)
    plain = isinstance(slack, float) and slack == 0
    total = added(says if plain else says * (1 + per_source(s, slack)))
    if zero.endswith("majority"):
        sign = total.sign()
        most = yield Ask(how="sum", values=sign[None], scope="model" if zero == "majority" else "tensor", common=True)
        sign = torch.where(sign == 0, most[0].sign().to(sign.dtype), sign)
    else:
        sign = {"plus": (total >= 0) * 2.0 - 1.0, "minus": (total > 0) * 2.0 - 1.0}.get(zero, total.sign())
    return ((votes * sign) > 0).to(s.X.dtype)


def argmax(s: State) -> Tensor:
    """Let the entry of greatest |w_i G_i X_i| count alone; of equal ones that of the last source."""
    size = (s.X * s.column(s.w) * (1.0 if s.G is None else s.G)).abs()
    greatest = (size == size.amax(dim=0)).unbind()
    gates, found = [greatest[-1]], greatest[-1]
    for one in reversed(greatest[:-1]):
        gates.append(one & ~found)
        found = found | one
    return torch.stack(gates[::-1]).to(s.X.dtype)


def exclusive(s: State, n: float, m: float, order: Given, reuse: float) -> Tensor:
    """Let each source in its turn take the n best entries of each block of m that no one has taken before.

    Blocks are of the flat tensor; the entries of an incomplete last block count for no source. Turns go by `order`,
    least first, then as the sources stand in the recipe. With `reuse`, where n >= m / 2, each source after the first
    takes all that is left and also its int(m / 2) best of those taken, as the 7B script has it.
    """
    wanted, width = min(int(n), int(m)), int(m)
    blocks = s.X[0].numel() // width
    best = s.X.abs().reshape(len(s.X), -1)[:, : blocks * width].reshape(len(s.X), blocks, width)
    taken = torch.zeros_like(best[0], dtype=torch.bool)
    gates = torch.zeros(len(s.X), s.X[0].numel(), dtype=s.X.dtype, device=s.X.device)
    turns = each(s.site, order)
    for place, i in enumerate(sorted(range(len(s.X)), key=lambda i: turns[i])):
        if reuse and place and 2 * wanted >= width:
            mine = ~taken | _best(best[i].masked_fill(~taken, -1.0), width // 2)
        else:
            mine = _best(best[i].masked_fill(taken, -1.0), wanted) & ~taken
        taken = taken | mine
        gates[i, : blocks * width] = mine.flatten().to(gates.dtype)
    return gates.view_as(s.X)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the greatest scores of each row; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


# --- weighs


def ema(s: State, decay: float) -> Tensor:
    """Weigh checkpoints as a running average does: a_i = decay a_(i-1) + (1 - decay) W_i from a_1 = W_1, in order."""
    ages = range(len(s.w) - 1, -1, -1)
    shares = [decay**age * (1.0 if age == len(s.w) - 1 else 1 - decay) for age in ages]
    return s.w * torch.tensor(shares, dtype=s.w.dtype, device=s.w.device)


def wma(s: State) -> Tensor:
    """Weigh checkpoints by their number, from 1, in the order of the recipe."""
    return s.w * torch.arange(1, len(s.w) + 1, dtype=s.w.dtype, device=s.w.device)


# --- combines


def sum(s: State) -> Tensor:
    """Return sum_i w_i G_i X_i."""
    return weighted(s, s.w)


def mean(s: State, normalize: float) -> Tensor:
    """Return sum_i w_i G_i X_i / sum_i w_i G_i; with normalize = 0 the sum alone.

    Without gates the weights are normalised first, in double precision, so that a single source comes back bit for
    bit. Where weights of mixed sign cancel (the divisor is below `TINY` times sum_i |w_i| G_i) the divisor is
    sum_i |w_i| G_i instead, which bounds the result; where no source counts the result is 0.
    """
    if not normalize:
        return weighted(s, s.w)
    if s.G is None:
        signed, size = s.w.sum(), s.w.abs().sum()
        return weighted(s, s.w / torch.where(signed.abs() < TINY * size, size, signed))
    return _divided(weighted(s, s.w), s)


def _divided(y: Tensor, s: State) -> Tensor:
    """Divide by the weights of what counts, entry by entry."""
    w, G = s.column(s.w), 1.0 if s.G is None else s.G
    signed, size = added(w * G), added(w.abs() * G)
    divisor = torch.where(signed.abs() < TINY * size, size, signed)
    return torch.where(size > 0, y / torch.where(size > 0, divisor, 1.0), 0.0)


def restored(s: State) -> Stage:
    """Return the mean, its terms stretched by how many entries of their row there are for each that counts.

    This is the adaptive factor by row ("ada_row") of the published code of DELLA: r_i is the number of entries of
    X_i in the row that are not zero over the number of those that count.
    """
    there = (s.X != 0).to(s.X.dtype)
    entries = yield Ask(how="sum", values=there, scope="row")
    counting = yield Ask(how="sum", values=there if s.G is None else there * (s.G > 0), scope="row")
    stretch = torch.where(counting > 0, entries / counting.clamp(min=1), 0.0).to(s.X.dtype)
    return _divided(weighted(dataclasses.replace(s, X=s.X * stretch), s.w), s)


def weighted(s: State, w: Tensor) -> Tensor:
    """Return sum_i w_i G_i X_i, source after source: one source at weight 1 comes back bit for bit."""
    terms = s.X * s.column(w)
    return added(terms if s.G is None else terms * s.G)


# --- shapes


def scale(s: State, scale: float) -> Tensor:
    """Multiply the merged contribution."""
    return s.merged * s.number(scale)


def gain(s: State, gain: float, of: float) -> Tensor:
    """Multiply what a norm multiplies by, which is stored without `of`."""
    return (s.merged + s.number(of)) * s.number(gain) - s.number(of)


def consensus(s: State, mask_scale: Given, k: float) -> Tensor:
    """Keep the entries that at least k sources claim; after `scale` the claims are on the scaled entries."""
    return s.merged * (added(_claims(s, mask_scale).to(s.X.dtype)) >= k)


def tall(s: State, mask_scale: Given, source: float) -> Tensor:
    """Keep the entries that one source claims, by its number from 0 among those that take part.

    Raises:
        RecipeError: if there are not so many.
    """
    if source >= len(s.X):
        raise RecipeError(f"tensor {s.site.tensor!r}: tall: source must be below {len(s.X)}, got {source:g}")
    return s.merged * _claims(s, mask_scale)[int(source)]


def _claims(s: State, mask_scale: Given) -> Tensor:
    """Return where each source's task vector outweighs the others' part of y: |D_i| > mask_scale_i |y - D_i|."""
    D = s.X if s.D is None else s.D
    return D.abs() > per_source(s, mask_scale) * (s.merged - D).abs()


def lines(s: State, a: float, b: float, mode: str) -> Stage:
    """Multiply by a line over depth: a at the first layer and outside the layers, a + b at the last.

    With mode "auto" a is the L1 norm, over the model, of the mean of the D_i over that of y. A model of one layer
    has its last.
    """
    place = s.site.layer / (s.site.depth - 1) if s.site.layer is not None and s.site.depth > 1 else 1.0
    slope = s.number(0.0 if s.site.layer is None else b * place)
    if mode == "given":
        return s.merged * (s.number(a) + slope)
    D = s.X if s.D is None else s.D
    norms = yield Ask(how="sum", values=torch.stack([D.mean(dim=0), s.merged]).abs(), scope="model", common=True)
    start = torch.where(norms[1] > 0, norms[0] / torch.where(norms[1] > 0, norms[1], 1.0), 0.0)
    return s.merged * (start.to(s.merged.dtype) + slope)

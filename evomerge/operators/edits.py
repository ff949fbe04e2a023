"""Edits: change each source's contribution by itself.

Shapes: N sources, `...` the shape of the tensor. Contributions X_N... are float32; the
scope of every threshold and norm is one source's whole tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(X: Tensor, density: Sequence[float], rescale: str = "none") -> Tensor:  # X_i of the papers
    """Keep the entries of greatest magnitude of each contribution and zero the rest.

    X_i <- X_i * [|X_i| among the k_i greatest], k_i = max(1, int(density_i * numel)); density 0
    keeps nothing. Among equal magnitudes the first in memory order are kept, so that exactly
    k_i remain on every device.

    Args:
        X: contributions, shape (N, ...), float32.
        density: kept share of each source, in [0, 1].
        rescale: "none", or "l1": multiply what is left so that its L1 norm is that of X_i.

    Returns:
        The trimmed contributions, shape (N, ...).

    Source: Yadav 2023 (arXiv:2306.01708) section 4.1, which takes its threshold over the whole
    model; here the scope is one tensor.
    """
    masks = torch.stack([largest(x, share) for x, share in zip(X, density, strict=True)])
    return rescaled(X, X * masks, density, rescale)


def drop(X: Tensor, masks: Tensor, density: Sequence[float], rescale: str = "1/p") -> Tensor:
    """Zero the entries outside given random masks and make up for what was lost.

    X_i <- M_i * X_i / p_i with p_i = density_i, so that the expectation over M_i is X_i.

    Args:
        X: contributions, shape (N, ...), float32.
        masks: True where an entry is kept, shape (N, ...); see `masks.bernoulli`.
        density: kept share p_i of each source, in [0, 1]; 0 keeps nothing.
        rescale: "1/p" (as published), "l1" (match the L1 norm of X_i) or "none".

    Returns:
        The thinned contributions, shape (N, ...).

    Source: Yu 2024 (arXiv:2311.03099) section 3, equation 2, whose p is the share dropped.
    """
    return rescaled(X, X * masks, density, rescale)


def largest(x: Tensor, density: float) -> Tensor:
    """Return the mask of the max(1, int(density * numel)) entries of greatest magnitude of one tensor."""
    if density >= 1 or x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(x, dtype=torch.bool)
    size = x.abs().flatten()
    count = max(1, int(density * size.numel()))
    threshold = size.kthvalue(size.numel() - count + 1).values
    above, at = size > threshold, size == threshold
    room = count - above.sum()
    return (above | (at & (at.cumsum(0) <= room))).view_as(x)


def rescaled(X: Tensor, kept: Tensor, density: Sequence[float], rescale: str) -> Tensor:
    """Multiply what was kept of each contribution by the factor that the rescale rule gives.

    Raises:
        ValueError: if the rule is not one of "none", "1/p", "l1".
    """
    if rescale == "none":
        return kept
    if rescale == "1/p":
        factors = [1.0 / share if share > 0 else 0.0 for share in density]
    elif rescale == "l1":
        factors = [_l1(x) / _l1(k) if _l1(k) > 0 else 0.0 for x, k in zip(X, kept, strict=True)]
    else:
        raise ValueError(f"rescale must be none, 1/p or l1, got {rescale!r}")
    return kept * torch.tensor(factors, dtype=kept.dtype, device=kept.device).view(-1, *[1] * (kept.dim() - 1))


def _l1(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))

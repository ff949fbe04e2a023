"""Combine: reduce the sources' contributions to one tensor.

Shapes: N sources, `...` the shape of the tensor. Contributions X and gates G are float32 of
shape (N, ...); weights w are N Python floats.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: A sum of weights below this share of the sum of their magnitudes is no divisor.
TINY = 1e-3

#: Above this cosine (in magnitude) two directions are interpolated along the chord.
COLLINEAR = 0.9995


def column(weights: Sequence[float], X: Tensor) -> Tensor:  # X_i of the papers
    """Return the weights as a tensor that multiplies X source by source, shape (N, 1, ..., 1)."""
    return torch.tensor(weights, dtype=X.dtype, device=X.device).view(-1, *[1] * (X.dim() - 1))


def total(X: Tensor, weights: Sequence[float], gates: Tensor | None = None) -> Tensor:
    """Return sum_i w_i G_i X_i, shape (...). Source: Ilharco 2023 (arXiv:2212.04089) section 2."""
    y = X[0] * weights[0] if gates is None else X[0] * weights[0] * gates[0]
    for i in range(1, len(X)):  # starting from the first term keeps one source at weight 1 bit for bit
        y = y + (X[i] * weights[i] if gates is None else X[i] * weights[i] * gates[i])
    return y


def mean(X: Tensor, weights: Sequence[float], gates: Tensor | None = None) -> Tensor:
    """Return sum_i w_i G_i X_i / sum_i w_i G_i, shape (...).

    Without gates the weights are normalised first, in double precision, so that a single
    source comes back bit for bit. Where weights of mixed sign cancel (the divisor is below
    `TINY` times sum_i |w_i| G_i) the divisor is sum_i |w_i| G_i instead, which bounds the
    result by the greatest contribution; where no source counts the result is 0.

    Source: Wortsman 2022 (arXiv:2203.05482) section 2; with the gates of `elect`, Yadav 2023
    (arXiv:2306.01708) section 4.1, step 3. The paper divides by the number of sources that
    agree; this divides by the sum of their weights, which is the same for equal weights.
    """
    if gates is None:
        return total(X, normalized(weights))
    signed = total(gates, weights)
    size = total(gates, [abs(w) for w in weights])
    divisor = torch.where(signed.abs() < TINY * size, size, signed)
    y = total(X, weights, gates)
    return torch.where(size > 0, y / torch.where(size > 0, divisor, torch.ones_like(divisor)), torch.zeros_like(y))


def normalized(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum, or by the sum of magnitudes where they cancel."""
    signed, size = math.fsum(weights), math.fsum(abs(w) for w in weights)
    divisor = size if cancels(weights) else signed
    return [w / divisor for w in weights] if divisor else list(weights)


def cancels(weights: Sequence[float]) -> bool:
    """Tell whether weights of mixed sign add up to (nearly) nothing, so that no average exists."""
    return abs(math.fsum(weights)) < TINY * math.fsum(abs(w) for w in weights)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a (t = 0) to b (t = 1) along the great circle of their directions.

    y = sin((1-t) o)/sin(o) a + sin(t o)/sin(o) b, with o the angle between a and b as
    flattened vectors; the norms are not touched. Where the angle says nothing (|cos o| above
    `COLLINEAR`, or a zero vector) the result is (1-t) a + t b, so that a task vector of zero
    does not inflate the other one.

    Args:
        a: a tensor of any shape, float32.
        b: a tensor of the same shape.
        t: in [0, 1].

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    # Double precision: float32 products of task vectors at fine-tuning scale lose the angle.
    norms = float(a.double().norm()) * float(b.double().norm())
    cosine = float((a.double() * b.double()).sum()) / norms if norms > 0 else 1.0
    if abs(cosine) > COLLINEAR:
        return a * (1 - t) + b * t
    angle = math.acos(cosine)
    return a * (math.sin((1 - t) * angle) / math.sin(angle)) + b * (math.sin(t * angle) / math.sin(angle))


def heaviest(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Return the indices of the at most two sources of greatest positive weight, equal ones by name."""
    order = sorted((i for i in range(len(names)) if weights[i] > 0), key=lambda i: (-weights[i], names[i]))
    return sorted(order[:2])

"""What logits say: log-likelihoods, whether they are the greatest, entropies and the likeliest tokens.

Legend of shapes: U positions, V tokens of the vocabulary, R readings, K likeliest tokens.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Most elements of the float32 copy of logits that is made at once.
CHUNK = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What some positions say of the token that comes next; in nats.

    Attributes:
        norm_U: the logarithm of the sum of exponentials of the logits.
        best_U: the likeliest token.
        entropy_U: of the distribution; where it was wanted.
        ids_UK, logp_UK: the likeliest tokens, likeliest first; where they were wanted.
    """

    norm_U: Tensor
    best_U: Tensor
    entropy_U: Tensor | None
    ids_UK: Tensor
    logp_UK: Tensor


def said(logits_UV: Tensor, *, entropy: bool = False, top: int = 0) -> Said:
    """Return what logits say, computed in float32.

    Args:
        logits_UV: of each position.
        entropy: whether entropies are wanted.
        top: how many of the likeliest tokens are wanted.
    """
    step = max(1, CHUNK // logits_UV.shape[-1])
    parts = [_said(logits_UV[start : start + step], entropy, top) for start in range(0, len(logits_UV), step)]
    norms, bests, entropies, ids, logps = zip(*parts, strict=True)
    return Said(
        norm_U=torch.cat(norms),
        best_U=torch.cat(bests),
        entropy_U=torch.cat(entropies) if entropy else None,
        ids_UK=torch.cat(ids),
        logp_UK=torch.cat(logps),
    )


def numbers(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's numbers on the CPU: whole ones as they are, others in float64."""
    return np.asarray((tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy())


def _said(logits_UV: Tensor, entropy: bool, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    floats_UV = logits_UV.float()
    norm_U = floats_UV.logsumexp(-1)
    logits_UK, ids_UK = floats_UV.topk(min(top, floats_UV.shape[-1]), dim=-1)
    entropy_U = norm_U
    if entropy:
        logp_UV = floats_UV - norm_U[:, None]
        # a token that cannot come has logit -inf, and adds nothing
        entropy_U = -(logp_UV.exp() * logp_UV.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    return norm_U, floats_UV.argmax(-1), entropy_U, ids_UK, logits_UK - norm_U[:, None]

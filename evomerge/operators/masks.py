"""Random masks that are a function of what they mask, and of nothing else.

Entry i of the mask of (seed, source, tensor) is decided by word i of a counter-based
generator keyed by SHA-256 of those three. So neither tensor order, shard, chunk, worker nor
device changes a bit, and no global generator is read.
"""

import hashlib

import torch
from torch import Tensor

#: Entries drawn at a time: 8 bytes each, several temporaries, so a few MiB in all.
CHUNK = 1 << 16

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def key(seed: int, source: str, tensor: str) -> int:
    """Return the 64-bit key of one tensor of one source."""
    text = f"{seed}\x00{source}\x00{tensor}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return words start .. start + count - 1 of the SplitMix64 sequence of a key, shape (count,), int64.

    Word i is the finaliser of key + (i + 1) * golden modulo 2^64, so any stretch can be drawn
    by itself. int64 products wrap around, which is the arithmetic modulo 2^64 that is needed.

    Source: Steele 2014, "Fast splittable pseudorandom number generators", section 3.
    """
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = z.mul_(_signed(_GOLDEN)).add_(_signed(key))
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_FIRST))
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shifted(z, 31))


def bernoulli(key: int, shape: tuple[int, ...], keep: float, device: torch.device | str = "cpu") -> Tensor:
    """Return a mask whose entries are True with probability `keep`, independently.

    Args:
        key: from `key`.
        shape: the shape of the tensor; entries are counted in memory order.
        keep: in [0, 1]; exact to 2^-53, and 0 and 1 are certain.
        device: where to draw; the mask is the same everywhere.
    """
    mask = torch.empty(torch.Size(shape).numel(), dtype=torch.bool, device=device)
    limit = int(keep * 2**53)
    for start in range(0, mask.numel(), CHUNK):
        count = min(CHUNK, mask.numel() - start)
        mask[start : start + count] = _shifted(words(key, start, count, device), 11) < limit
    return mask.view(shape)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(z: Tensor, by: int) -> Tensor:
    """Return z >> by with zeros shifted in (torch shifts int64 with its sign)."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)

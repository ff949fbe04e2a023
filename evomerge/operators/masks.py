"""Random numbers that are a function of what they mask, and of nothing else.

Entry i of (seed, source, tensor) gets number i of a counter-based generator keyed by SHA-256 of those three. So
neither tensor order, shard, chunk, worker nor device changes a bit, and no global generator is read.
Only 32-bit integer operations are used, which every device has in vectors.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Numbers after which the upper word of the counter changes.
_TURN = 1 << 32


def keys(seed: int, sources: Sequence[str], tensor: str) -> Tensor:
    """Return the key of one tensor of each source, shape (N, 2), int32: a word of the tensor, and one of both."""
    ours = _word(f"{seed}\x00{tensor}")
    words = [[ours, _word(f"{seed}\x00{source}\x00{tensor}")] for source in sources]
    return torch.tensor(words, dtype=torch.int32).view(-1, 2)


def uniform(keys: Tensor, start: Tensor | int, count: int) -> Tensor:
    """Return numbers start .. start + count - 1 of each key's sequence, uniform in [0, 1), shape (N, count), float32.

    They have 24 bits: the high ones of `words`.
    """
    return ((words(keys, start, count) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def limit(p: float) -> int:
    """Return the greatest word (of `words`, with its sign bit turned) whose number of `uniform` is less than p > 0."""
    return math.ceil(min(p, 1.0) * 2**24) * 2**8 - 1 - 2**31


def words(keys: Tensor, start: Tensor | int, count: int) -> Tensor:
    """Return words start .. start + count - 1 of each key's sequence, shape (N, count), int32.

    v_i = m(m(x ^ x >> 16) ^ k_1 ^ high(i)) with x = low(i) + k_0, low and high the words of the counter, and
    m(x) = (a ^ a >> 15) * 0x846CA68B, a = x * 0x7FEB352D. Up to a change of k_1 and to its low 16 bits that is the
    finaliser "lowbias32" (Wellons 2018, Prospecting for hash functions) applied twice: its last shift and the first
    of the next cancel. What is inside is the same for all sources, whose first words are equal.

    Args:
        keys: from `keys`, shape (N, 2).
        start: index of the first entry in its tensor, as flat memory; as a tensor (of no dimension, int64) it promises
            that the high word is the same for all that are asked for.
        count: how many.
    """
    if isinstance(start, Tensor):
        return _drawn(keys, start, count)
    found, end = [keys.new_zeros(len(keys), 0)], start + count
    while start < end:
        stop = min(end, (start // _TURN + 1) * _TURN)
        found.append(_drawn(keys, torch.tensor(start, device=keys.device), stop - start))
        start = stop
    return found[-1] if len(found) == 2 else torch.cat(found, dim=1)


def _drawn(keys: Tensor, start: Tensor, count: int) -> Tensor:
    low = torch.arange(count, dtype=torch.int32, device=keys.device) + start.to(torch.int32)
    high = (start >> 32).to(torch.int32)
    x = low + keys[:1, :1]
    return _mixed(_mixed(x ^ _right(x, 16)) ^ (keys[:, 1:] ^ high))


def _mixed(x: Tensor) -> Tensor:
    a = x * 0x7FEB352D
    return (a ^ _right(a, 15)) * (0x846CA68B - (1 << 32))


def _right(x: Tensor, by: int) -> Tensor:
    """Return x >> by with zeros shifted in (torch shifts int32 with its sign)."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little", signed=True)

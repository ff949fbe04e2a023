"""Magnitude tables: turn any number of entries to keep into the exact threshold, without a pass over the entries.

The differences of models in bfloat16 or float16 have few distinct magnitudes, so a table holds all of them, each with
the number of entries that reach it. Where there are too many (models in float32) it holds counts by the high bits of
the magnitude, and a lookup makes one pass over the entries to tell those of one bin apart.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Distinct magnitudes (8 bytes each) that a table may hold for each entry of its tensor; and those that it always may.
SHARE, ROOM = 1 / 64, 1 << 12

#: Bits of a float32 that are left out of the bins of a table with too many magnitudes.
_LOW = 16

#: Yields the entries that a table is about, float32, in pieces.
Pieces = Callable[[], Iterator[Tensor]]

_Bits = NDArray[np.uint32]
_Counts = NDArray[np.int64]


class Magnitudes:
    """The magnitudes of the entries of one source's tensor, or of several.

    Args:
        bits: bit patterns of distinct magnitudes (or of the lower edges of bins), ascending.
        counts: how many entries each has.
        exact: whether `bits` are magnitudes and not bins.
        pieces: the entries, for the pass that bins need.
    """

    def __init__(self, bits: _Bits, counts: _Counts, exact: bool, pieces: Pieces) -> None:
        """Sum the counts from above."""
        self.bits, self.counts, self.exact, self._pieces = bits, counts, exact, pieces
        self._above = np.cumsum(counts[::-1])[::-1]

    @property
    def entries(self) -> int:
        """How many entries it is about."""
        return int(self._above[0]) if len(self._above) else 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.bits.nbytes + self.counts.nbytes + self._above.nbytes

    def kth(self, count: int) -> float:
        """Return the greatest magnitude that `count` entries reach; all: minus infinity, none: infinity."""
        if count >= self.entries or count <= 0:
            return -np.inf if count >= self.entries else np.inf
        at = len(self._above) - 1 - int(np.searchsorted(self._above[::-1], count))
        if self.exact:
            return float(self.bits[at : at + 1].view(np.float32)[0])
        left = count - (int(self._above[at + 1]) if at + 1 < len(self._above) else 0)
        inside = np.concatenate([part[part >> _LOW == self.bits[at] >> _LOW] for part in map(_bits, self._pieces())])
        place = len(inside) - left
        return float(np.partition(inside, place)[place : place + 1].view(np.float32)[0])


def magnitudes(pieces: Pieces, entries: int) -> Magnitudes:
    """Return the table of the entries that are given in pieces."""
    room = max(ROOM, int(entries * SHARE))
    found: list[tuple[_Bits, _Counts]] = []
    for piece in pieces():
        found.append(_runs(np.sort(_bits(piece))))
        if sum(len(bits) for bits, _ in found) > 4 * room:
            found = [_merged(found)]
            if len(found[0][0]) > room:
                return _binned(pieces)
    bits, counts = _merged(found)
    return Magnitudes(bits, counts, True, pieces) if len(bits) <= room else _binned(pieces)


def union(tables: Sequence[Magnitudes]) -> Magnitudes:
    """Return the table of the entries of several."""

    def pieces() -> Iterator[Tensor]:
        for table in tables:
            yield from table._pieces()

    exact = all(table.exact for table in tables)
    if exact:
        return Magnitudes(*_merged([(table.bits, table.counts) for table in tables]), exact, pieces)
    binned = [(table.bits >> np.uint32(_LOW) << np.uint32(_LOW), table.counts) for table in tables]
    return Magnitudes(*_merged(binned), exact, pieces)


def _binned(pieces: Pieces) -> Magnitudes:
    counts = np.zeros(1 << 31 - _LOW, dtype=np.int64)
    for piece in pieces():
        counts += np.bincount(_bits(piece) >> _LOW, minlength=len(counts))
    there = np.flatnonzero(counts)
    return Magnitudes(there.astype(np.uint32) << np.uint32(_LOW), counts[there], False, pieces)


def _bits(piece: Tensor) -> _Bits:
    """Return the bit patterns of |x|, which are ordered as the magnitudes are."""
    bits = piece.flatten().contiguous().view(torch.int32) & 0x7FFFFFFF
    return bits.cpu().numpy().view(np.uint32)


def _runs(ordered: _Bits) -> tuple[_Bits, _Counts]:
    """Return the distinct values of an ordered array, and how often each is there."""
    starts = np.flatnonzero(np.concatenate([ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))


def _merged(parts: Iterable[tuple[_Bits, _Counts]]) -> tuple[_Bits, _Counts]:
    """Return distinct values of several arrays, and the sums of their counts."""
    listed = list(parts)
    bits = np.concatenate([part for part, _ in listed]) if listed else np.zeros(0, dtype=np.uint32)
    counts = np.concatenate([part for _, part in listed]) if listed else np.zeros(0, dtype=np.int64)
    order = np.argsort(bits, kind="stable")
    values, _ = _runs(bits[order])
    starts = np.searchsorted(bits[order], values)
    return values, np.add.reduceat(counts[order], starts) if len(starts) else counts

"""Answers to what stages ask: at once about one tensor, in passes over many about a layer or a model."""

import math
from collections.abc import Hashable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.operators.state import Ask

#: Entries whose float64 sum is taken in one go; fixed, so that threads and chunks change no bit.
BLOCK = 1 << 14

#: Bits of a float32 >= 0 that the first and the second pass of a radix selection tell apart.
_HIGH, _LOW = 16, 15


#: What a question is called: the parts that it is about, its stage and its number there, the layer if it is about one.
Number = tuple[str, tuple[str, int], int | None]


class Unanswered(Exception):
    """A run met a question about more than its tensor, which is not answered yet."""

    def __init__(self, ask: Ask, number: Number) -> None:
        """Carry the question, and what it is called."""
        super().__init__(number)
        self.ask = ask
        self.number = number


def answer(ask: Ask) -> Tensor:
    """Answer a question about one tensor (or its rows), given that tensor's values."""
    values = ask.values
    if ask.scope == "row" and values.dim() > 1:
        return _about_rows(ask)
    flat = values.reshape(len(values), -1)
    if ask.how == "gram":
        return gram(flat)
    shape = (-1, *[1] * (values.dim() - 1))
    if ask.how == "sum":
        return sums(flat).view(shape)
    if ask.how == "max":
        return flat.amax(dim=1).view(shape)
    counts = ask.rank(flat.shape[1])
    found = [kth(row, count) for row, count in zip(flat, counts, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=values.device).view(shape)


def kth(values: Tensor, count: int) -> float:
    """Return the greatest number that `count` of the values reach; all: minus infinity, none: infinity."""
    if count >= values.numel():
        return -math.inf
    if count <= 0:
        return math.inf
    place = values.numel() - count
    if values.device.type == "cpu":  # numpy selects with vectors, many times faster than kthvalue
        return float(np.partition(values.numpy(), place)[place])
    return float(values.kthvalue(place + 1).values)


def sums(flat: Tensor) -> Tensor:
    """Return the sum of each row, shape (K,), float64, the same whatever the number of threads."""
    return torch.tensor([math.fsum(part) for part in partial_sums(flat)], dtype=torch.float64, device=flat.device)


def partial_sums(flat: Tensor) -> list[list[float]]:
    """Return the sum of each row block by block: K lists, whose exact sums are those of all blocks in any order."""
    whole = flat.shape[1] // BLOCK * BLOCK
    blocks = flat[:, :whole].reshape(len(flat), -1, BLOCK).sum(dim=2, dtype=torch.float64)
    rest = flat[:, whole:].sum(dim=1, dtype=torch.float64, keepdim=True)
    return torch.cat([blocks, rest], dim=1).tolist()


def grams(flat: Tensor) -> list[list[float]]:
    """Return the inner products of the rows block by block: K * K lists of partial sums."""
    starts = range(0, flat.shape[1], BLOCK)
    parts = [(part := flat[:, start : start + BLOCK].double()) @ part.T for start in starts]
    return torch.stack(parts, dim=-1).flatten(0, 1).tolist() if parts else [[] for _ in range(len(flat) ** 2)]


def gram(flat: Tensor) -> Tensor:
    """Return the inner products of the rows, shape (K, K), float64, the same whatever the number of threads."""
    found = [math.fsum(part) for part in grams(flat)]
    return torch.tensor(found, dtype=torch.float64, device=flat.device).view(len(flat), len(flat))


def _about_rows(ask: Ask) -> Tensor:
    values = ask.values
    if ask.how == "max":
        return values.amax(dim=-1, keepdim=True)
    if ask.how == "sum":
        return values.sum(dim=-1, keepdim=True, dtype=torch.float64)
    ordered = values.sort(dim=-1).values
    found = []
    for row, count in zip(ordered, ask.rank(values.shape[-1]), strict=True):
        edge = torch.full_like(row[..., :1], -math.inf if count >= row.shape[-1] else math.inf)
        found.append(row[..., [-count]] if 0 < count < row.shape[-1] else edge)
    return torch.stack(found)


class Tally:
    """Collects what parts contribute to one question of wide scope, in one pass or (for a rank) two."""

    def __init__(self, ask: Ask) -> None:
        """Start the tally of a question."""
        self._how = ask.how
        self._found: dict[Hashable, Any] = {}
        self._ranks: dict[Hashable, tuple[int, int]] = {}  # of a row: the high bits of its threshold, and what is left
        self._edges: dict[Hashable, float] = {}
        self._answers: dict[Hashable, float] = {}

    def add(self, ask: Ask, labels: tuple[Hashable, ...]) -> None:
        """Add what one part contributes; `labels` names the rows."""
        flat = ask.values.reshape(len(ask.values), -1)
        if self._how == "gram":
            for pair, found in zip(product(labels, labels), grams(flat), strict=True):
                self._found.setdefault(pair, []).extend(found)
            return
        for i, label in enumerate(labels):
            if self._how == "sum":
                self._found.setdefault(label, []).extend(partial_sums(flat[i : i + 1])[0])
            elif self._how == "max":
                self._found[label] = max(self._found.get(label, -math.inf), float(flat[i].max()))
            else:
                self._count(label, flat[i], ask, i)

    def close(self) -> bool:
        """End a pass; tell whether the question is answered, or another pass is needed."""
        if self._how != "rank":
            added = self._how in ("sum", "gram")
            self._answers = {label: math.fsum(found) if added else found for label, found in self._found.items()}
            return True
        if not self._ranks and not self._edges:
            for label, (counts, rank) in self._found.items():
                self._high(label, counts, rank(int(counts.sum())))
            self._found = {}
            return not self._ranks
        for label, (high, left) in self._ranks.items():
            low = _place(self._found[label][0], left)[0]
            self._answers[label] = float(torch.tensor(high << _LOW | low, dtype=torch.int32).view(torch.float32))
        self._answers |= self._edges
        return True

    def answer(self, ask: Ask, labels: tuple[Hashable, ...]) -> Tensor:
        """Return the answer for one part's rows."""
        found = self._answers or self._edges
        if self._how == "gram":
            table = [[found[one, two] for two in labels] for one in labels]
            return torch.tensor(table, dtype=torch.float64, device=ask.values.device)
        kind = torch.float64 if self._how == "sum" else torch.float32
        flat = torch.tensor([found[label] for label in labels], dtype=kind, device=ask.values.device)
        return flat.view(-1, *[1] * (ask.values.dim() - 1))

    def _count(self, label: Hashable, values: Tensor, ask: Ask, row: int) -> None:
        """Count values by their high bits, or in the second pass those within the bin by their low bits."""
        if label in self._edges:
            return
        bits = values.contiguous().view(torch.int32) & 0x7FFFFFFF  # -0.0 is 0.0
        if label in self._ranks:
            bits = bits[bits >> _LOW == self._ranks[label][0]] & ((1 << _LOW) - 1)
            counts = torch.bincount(bits, minlength=1 << _LOW)
        else:
            counts = torch.bincount(bits >> _LOW, minlength=1 << _HIGH)
        before = self._found.get(label)
        self._found[label] = (counts if before is None else before[0] + counts, lambda n: ask.rank(n)[row])

    def _high(self, label: Hashable, counts: Tensor, count: int) -> None:
        entries = int(counts.sum())
        if count >= entries or count <= 0:
            self._edges[label] = -math.inf if count >= entries else math.inf
        else:
            self._ranks[label] = _place(counts, count)


def _place(counts: Tensor, count: int) -> tuple[int, int]:
    """Return the bin of the count-th greatest value, and how many of that bin are at least as great."""
    above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(above, torch.tensor([count], device=above.device))[0])
    before = int(above[at - 1]) if at else 0
    return len(counts) - 1 - at, count - before


class Facts:
    """Answers of wide scope, by the group of parts that they are about."""

    def __init__(self) -> None:
        """Start with none."""
        self._tallies: dict[Hashable, Tally] = {}
        self._open: dict[Hashable, Tally] = {}

    def answer(self, ask: Ask, number: Number, labels: tuple[Hashable, ...]) -> Tensor:
        """Return the answer to a question.

        Raises:
            Unanswered: if it has none yet.
        """
        if number not in self._tallies:
            raise Unanswered(ask, number)
        return self._tallies[number].answer(ask, labels)

    def add(self, problem: Unanswered, labels: tuple[Hashable, ...]) -> None:
        """Add one part's contribution to a question that is open."""
        tally = self._open.setdefault(problem.number, Tally(problem.ask))
        tally.add(problem.ask, labels)

    def close(self) -> None:
        """End a pass over the parts."""
        answered = {number: tally for number, tally in self._open.items() if tally.close()}
        self._tallies |= answered
        self._open = {number: tally for number, tally in self._open.items() if number not in answered}


def labels(ask: Ask, names: tuple[str, ...]) -> tuple[Hashable, ...]:
    """Return what the rows of a question are called: the sources, where there is one row for each."""
    return names if len(ask.values) == len(names) and not ask.common else tuple(range(len(ask.values)))

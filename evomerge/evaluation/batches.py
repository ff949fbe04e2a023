"""Batches: rows of tokens that are fed together, and where they are read.

Legend of shapes: B rows of a batch, T tokens of a row, S tokens of a row and of all before it, U positions that are
read, R token readings (one for each token of a continuation; several may read one position).
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The greatest share of padding in a batch of texts.
PADDING = 0.2

#: A reading: the position, the token whose likelihood is wanted there, and its place among all readings of the plan.
Reading = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A row that is read.

    Attributes:
        ids: its tokens, without what the batch's texts begin with alike.
        reads: what is read in it; positions count within `ids`.
        branches: texts that go on from its end.
    """

    ids: tuple[int, ...]
    reads: tuple[Reading, ...]
    branches: tuple["Text", ...] = ()

    @property
    def longest(self) -> int:
        """The number of tokens to the end of its longest branch."""
        return len(self.ids) + max((len(branch.ids) for branch in self.branches), default=0)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row that is continued: its tokens without what all begin with alike, and its place among the requests."""

    ids: tuple[int, ...]
    request: int

    @property
    def longest(self) -> int:
        """The number of its tokens."""
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a forward pass is fed and where it is read.

    Attributes:
        ids_BT: tokens, padded on the right; causal attention never looks there.
        row_U, place_U: the positions that are read.
        at_R, token_R: which position each reading reads, and the token whose likelihood it wants there.
        flat_R: its place among all readings of the plan (CPU).
        from_B: the rows of the pass before that these go on from.
        mask_BS, positions_BT: what of everything before and in these rows is no padding, and positions in the text;
            None where there is no padding between.
    """

    ids_BT: Tensor
    row_U: Tensor
    place_U: Tensor
    at_R: Tensor
    token_R: Tensor
    flat_R: Tensor
    from_B: Tensor | None = None
    mask_BS: Tensor | None = None
    positions_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A batch of texts: a forward pass for them, and others for their branches.

    Attributes:
        prefix: what all of them begin with.
        texts: the rows.
        rows, tokens: the most rows of a pass, and rows times length.
        device: where the tensors go.
    """

    prefix: tuple[int, ...]
    texts: tuple[Text, ...]
    rows: int
    tokens: int
    device: str

    @cached_property
    def first(self) -> Read:
        """The pass of the texts themselves."""
        return _read(self.texts, self.device)

    @cached_property
    def after(self) -> tuple[Read, ...]:
        """The passes of their branches."""
        return tuple(self._branches())

    @property
    def alone(self) -> bool:
        """Whether it cannot be made smaller: every pass has one row."""
        return len(self.texts) == 1 and all(len(read.ids_BT) == 1 for read in self.after)

    @cached_property
    def size(self) -> int:
        """Rows times length of its greatest pass, the beginning included."""
        before = len(self.prefix) + max(len(text.ids) for text in self.texts)
        branches = [read.ids_BT.shape[0] * (before + read.ids_BT.shape[1]) for read in self.after]
        return max(len(self.texts) * before, *branches, 0)

    def within(self, tokens: int) -> "tuple[Texts, ...]":
        """Return the batch as smaller ones, no pass of which has more tokens than given, but for those of one row."""
        if self.alone or self.size <= tokens:
            return (self,)
        if len(self.texts) == 1:
            return (replace(self, tokens=tokens),)
        middle = len(self.texts) // 2
        parts = (replace(self, texts=part) for part in (self.texts[:middle], self.texts[middle:]))
        return tuple(small for part in parts for small in part.within(tokens))

    def _branches(self) -> Iterator[Read]:
        """Yield the passes of the branches, shortest first."""
        pairs = [(branch, row) for row, text in enumerate(self.texts) for branch in text.branches]
        pairs.sort(key=lambda pair: len(pair[0].ids))
        before = len(self.prefix) + max(len(text.ids) for text in self.texts)
        uneven = len({len(text.ids) for text in self.texts}) > 1
        for part in cut_batches(pairs, lambda pair: before + len(pair[0].ids), self.rows, self.tokens):
            read = _read([branch for branch, _ in part], self.device)
            rows = [row for _, row in part]
            masks = self._masks(rows, read.ids_BT.shape[1]) if uneven else {}
            yield replace(read, from_B=torch.tensor(rows, device=self.device), **masks)

    def _masks(self, rows: Sequence[int], length: int) -> dict[str, Tensor]:
        """Return mask and positions of branches whose contexts are padded."""
        longest = max(len(text.ids) for text in self.texts)
        own_B = torch.tensor([len(self.texts[row].ids) for row in rows])
        mask_BT = torch.arange(longest) < own_B[:, None]
        ones = [torch.ones(len(rows), n, dtype=torch.bool) for n in (len(self.prefix), length)]
        positions_BT = len(self.prefix) + own_B[:, None] + torch.arange(length)
        mask_BS = torch.cat((ones[0], mask_BT, ones[1]), 1).long()
        return {"mask_BS": mask_BS.to(self.device), "positions_BT": positions_BT.to(self.device)}


class Way(NamedTuple):
    """How prompts are continued: as in `Request`."""

    stop: tuple[str, ...]
    most: int
    entropy: bool
    top: int


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts to continue by the likeliest token.

    Attributes:
        prefix: what all of them begin with.
        prompts: the rows.
        way: how they are continued.
        device: where the tensors go.
    """

    prefix: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    way: Way
    device: str

    @cached_property
    def ids_BT(self) -> Tensor:  # noqa: N802  a tensor, so its name has its shape
        """Tokens, padded on the left."""
        longest = max(len(prompt.ids) for prompt in self.prompts)
        # any token may stand in the padding, the mask hides it; a row's own is sure to be in the vocabulary
        ids = [(*prompt.ids[:1] * (longest - len(prompt.ids)), *prompt.ids) for prompt in self.prompts]
        return torch.tensor(ids, device=self.device)

    @cached_property
    def mask_BS(self) -> Tensor | None:  # noqa: N802  as above
        """1 for what is no padding, from the beginning on to the end of the longest answer; None without padding."""
        lengths = torch.tensor([len(prompt.ids) for prompt in self.prompts], device=self.device)
        longest = self.ids_BT.shape[1]
        if bool((lengths == longest).all()):
            return None
        mask_BT = torch.arange(longest, device=self.device) >= longest - lengths[:, None]
        before, after = (
            torch.ones(len(lengths), n, dtype=torch.bool, device=self.device) for n in (len(self.prefix), self.way.most)
        )
        return torch.cat((before, mask_BT, after), 1).long()

    @property
    def alone(self) -> bool:
        """Whether it cannot be made smaller."""
        return len(self.prompts) == 1

    @property
    def size(self) -> int:
        """Rows times length, beginning and answers included."""
        longest = max(len(prompt.ids) for prompt in self.prompts)
        return len(self.prompts) * (len(self.prefix) + longest + self.way.most)

    def within(self, tokens: int) -> "tuple[Prompts, ...]":
        """Return the batch as smaller ones with no more tokens than given, but for those of one row."""
        if self.alone or self.size <= tokens:
            return (self,)
        middle = len(self.prompts) // 2
        parts = (replace(self, prompts=part) for part in (self.prompts[:middle], self.prompts[middle:]))
        return tuple(small for part in parts for small in part.within(tokens))


def cut_batches(
    rows: Sequence[Any], length: Callable[[Any], int], most: int, tokens: int, equal: bool = False
) -> Iterator[list[Any]]:
    """Yield batches of rows in their order, within bounds on rows, on tokens (rows times length) and on padding."""
    part: list[Any] = []
    longest = total = 0
    for row in rows:
        now = max(longest, length(row))
        full = len(part) >= most or now * (len(part) + 1) > tokens
        wasted = 4 * len(part) >= most and now * (len(part) + 1) > (total + length(row)) * (1 + PADDING)
        if part and (full or wasted or (equal and len(row.ids) != len(part[0].ids))):
            yield part
            part, total, now = [], 0, length(row)
        part.append(row)
        longest, total = now, total + length(row)
    if part:
        yield part


def _read(texts: Sequence[Text], device: str) -> Read:
    """Return the pass of some texts, with each position that is read once."""
    length = max(len(text.ids) for text in texts)
    positions: dict[tuple[int, int], int] = {}
    readings = [
        (positions.setdefault((row, place), len(positions)), token, flat)
        for row, text in enumerate(texts)
        for place, token, flat in text.reads
    ]
    ids = [(*text.ids, *text.ids[-1:] * (length - len(text.ids))) for text in texts]
    row_U, place_U = zip(*positions, strict=True)
    at_R, token_R, flat_R = zip(*readings, strict=True)
    made = {"ids_BT": ids, "row_U": row_U, "place_U": place_U, "at_R": at_R, "token_R": token_R}
    tensors = {name: torch.tensor(given, device=device) for name, given in made.items()}
    return Read(**tensors, flat_R=torch.tensor(flat_R))

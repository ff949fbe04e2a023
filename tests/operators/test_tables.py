"""Magnitude tables: any number of entries to keep, looked up as if the entries were sorted."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evomerge.operators import tables
from evomerge.operators.tables import Magnitudes, magnitudes, union

#: The tables of models in float32 are binned, from a few thousand distinct magnitudes on.
MANY = 3 * tables.ROOM


def table(*pieces: Tensor) -> Magnitudes:
    """Return the table of entries that come in pieces."""
    return magnitudes(lambda: iter(pieces), sum(piece.numel() for piece in pieces))


def by_sorting(entries: Tensor, count: int) -> float:
    """Return the greatest magnitude that `count` entries reach, by its definition."""
    if count >= entries.numel():
        return -math.inf
    if count <= 0:
        return math.inf
    return float(entries.flatten().abs().sort(descending=True).values[count - 1])


def counts(entries: int) -> Sequence[int]:
    """Return the counts that matter: both edges, what lies beyond them, and some between."""
    third, half = entries // 3, entries // 2
    return sorted({-3, 0, 1, 2, third, half, entries - 2, entries - 1, entries, entries + 1, 2 * entries})


def normal(entries: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the differences of a random model and a fine-tuned one, of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(entries, generator=generator).mul(0.02).to(dtype).float()
    return (before + torch.randn(entries, generator=generator) * 1e-3).to(dtype).float() - before


ENTRIES = {
    "none": torch.zeros(0),
    "one": torch.tensor([-2.0]),
    "zeros": torch.zeros(99),
    "minus zeros": torch.tensor([-0.0, 0.0] * 20),
    "constant": torch.full((50,), -1.5),
    "ties": torch.tensor([1.0, -1.0, 2.0, 0.5, -2.0, 1.0, -0.0, 0.5] * 4),
    "subnormal": torch.tensor([1e-45, -1e-45, 3e-45, 0.0, -1e-39, 1e-38, 1e-45]),
    "infinite": torch.tensor([math.inf, -math.inf, 3e38, 1.0, 0.0]),
    "bfloat16": normal(20_000, 0, torch.bfloat16),
    "float16": normal(20_000, 1, torch.float16),
    "float32": normal(MANY, 2),
    "float32, zeros": torch.cat([normal(MANY, 3), torch.zeros(MANY), -torch.zeros(7)])[torch.randperm(2 * MANY + 7)],
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_lookup_is_a_sort(kind: str) -> None:
    """The answer equals that of sorting, at every edge, with ties, zeros of both signs, subnormals and infinities."""
    found = table(ENTRIES[kind])

    assert found.entries == ENTRIES[kind].numel()
    for count in counts(found.entries):
        assert found.kth(count) == by_sorting(ENTRIES[kind], count), count


def test_which_tables_hold_all_magnitudes() -> None:
    """Few distinct magnitudes are all kept, many are binned, and a table is then smaller than its entries."""
    few, many = table(normal(20_000, 4, torch.bfloat16)), table(normal(1 << 18, 5))

    assert few.exact
    assert not many.exact
    assert 0 < many.nbytes < (1 << 18) * 4 / 4


def test_pieces_and_their_order_are_irrelevant() -> None:
    """The table of pieces is that of all entries in one, in whatever order the pieces come."""
    for entries in (normal(30_001, 6, torch.bfloat16), normal(MANY + 1, 7)):
        whole, pieces = table(entries), entries.split(1009)
        for split in (table(*pieces), table(*reversed(pieces)), table(entries.view(1, -1))):
            assert (split.bits == whole.bits).all()
            assert (split.counts == whole.counts).all()
            assert split.exact == whole.exact
            assert [split.kth(count) for count in counts(len(entries))] == [
                by_sorting(entries, count) for count in counts(len(entries))
            ]


def test_many_distinct_pieces_may_have_few_magnitudes_in_all() -> None:
    """Tables of pieces that repeat each other are merged before it is said that there is too much."""
    piece = torch.arange(3000.0)
    found = table(*[piece] * 9)

    assert found.exact
    assert len(found.bits) == 3000
    assert found.kth(9) == 2999.0
    assert found.kth(10) == 2998.0


PARTS = {
    "exact and exact": ("bfloat16", "float16"),
    "exact and binned": ("bfloat16", "float32"),
    "binned and binned": ("float32", "float32, zeros"),
    "three, one of nothing": ("none", "ties", "float32"),
    "zeros": ("zeros", "minus zeros"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_union_is_the_table_of_all_entries(kind: str) -> None:
    """Tables of several tensors together answer as the table of all their entries does, in either order."""
    parts = [ENTRIES[name] for name in PARTS[kind]]
    together = torch.cat(parts)

    for ordered in (parts, parts[::-1]):
        found = union([table(part) for part in ordered])

        assert found.entries == len(together)
        assert found.exact == all(table(part).exact for part in parts)
        for count in counts(len(together)):
            assert found.kth(count) == by_sorting(together, count), count


def test_a_union_of_unions_and_of_nothing() -> None:
    """Unions are tables; that of no table has no entries, and one table's is itself."""
    one, two, three = (table(normal(5000, seed)) for seed in range(3))
    flat, nested = union([one, two, three]), union([union([one, two]), three])

    assert [flat.kth(count) for count in (1, 700, 14_999)] == [nested.kth(count) for count in (1, 700, 14_999)]
    assert union([]).entries == 0
    assert union([]).kth(0) == -math.inf
    assert union([two]).kth(77) == two.kth(77)


def test_entries_of_another_dtype_or_layout_are_not_mistaken() -> None:
    """A transposed piece counts like its copy."""
    entries = normal(6000, 8).view(60, 100)

    assert table(entries.T).kth(100) == table(entries).kth(100) == by_sorting(entries, 100)

"""Random masks are a function of (seed, source, tensor) and of the place in the tensor."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.operators import masks

FULL = (1 << 32) - 1


def lowbias32(x: int) -> int:
    """Return the published finaliser of a 32-bit number, in plain Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & FULL
    x ^= x >> 15
    x = x * 0x846CA68B & FULL
    return x ^ x >> 16


def drawn(first: int, second: int, place: int) -> float:
    """Return number `place` of the sequence of a key, in plain Python integers: the finaliser, twice.

    The generator leaves out the shifts at the seam, which cancel up to the second word of the key, and the last one.
    """
    word = second ^ place >> 32
    outer = lowbias32(lowbias32((place + first) & FULL) ^ word ^ word >> 16)
    return ((outer ^ outer >> 16) >> 8) / 2**24


def uniform(seed: int = 0, source: str = "a", tensor: str = "w", start: int = 0, count: int = 40000) -> Tensor:
    """Return numbers of one sequence."""
    return masks.uniform(masks.keys(seed, [source], tensor), start, count)[0]


@settings(max_examples=60, deadline=None)
@given(
    key=st.tuples(st.integers(0, FULL), st.integers(0, FULL)),
    start=st.one_of(st.integers(0, 100), st.integers((1 << 31) - 5, (1 << 31) + 5), st.integers(0, 1 << 45)),
)
def test_numbers_are_those_of_unbounded_integers(key: tuple[int, int], start: int) -> None:
    """Vectorised int32 arithmetic equals integers modulo 2^32, also where the counter passes 2^31 and 2^32."""
    words = torch.tensor([[word - (1 << 32) if word >> 31 else word for word in key]], dtype=torch.int32)

    assert masks.uniform(words, start, 6)[0].tolist() == [drawn(*key, start + i) for i in range(6)]


def test_a_tensor_of_more_than_2_to_the_32_entries_does_not_repeat() -> None:
    """The sequence goes on after 2^32 entries with other numbers, and has no seam there."""
    keys = masks.keys(3, ["a", "b"], "w")
    across = masks.uniform(keys, (1 << 32) - 500, 1000)

    assert torch.equal(across[:, 500:], masks.uniform(keys, 1 << 32, 500))
    agreeing = (masks.uniform(keys, 0, 20000) == masks.uniform(keys, 1 << 32, 20000)).sum()
    assert int(agreeing) < 5


def test_a_draw_does_not_depend_on_the_piece() -> None:
    """Pieces of any size, with a number or a tensor for their start, give what one piece gives."""
    keys = masks.keys(5, ["a", "b", "c"], "w")
    whole = masks.uniform(keys, 0, 377)
    for size in (1, 17, 100, 400):
        pieces = [masks.uniform(keys, at, min(size, 377 - at)) for at in range(0, 377, size)]
        assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(masks.uniform(keys, torch.tensor(100), 50), whole[:, 100:150])


def test_sources_are_drawn_as_alone() -> None:
    """The row of a source is the same whoever else takes part."""
    together = masks.uniform(masks.keys(5, ["a", "b"], "w"), 0, 100)

    assert torch.equal(together[1], uniform(5, "b", count=100))


def test_keys_differ_by_seed_source_and_tensor() -> None:
    """Seed, source and tensor all count, and cannot be shifted into each other."""
    found = {
        tuple(masks.keys(seed, [source], tensor)[0].tolist())
        for seed in (0, 1, 11)
        for source in ("a", "ab", "1a")
        for tensor in ("w", "v", "bw")
    }

    assert len(found) == 27
    assert masks.keys(0, [], "w").shape == (0, 2)


def test_numbers_lie_in_the_half_open_unit_interval() -> None:
    """Nothing is below 0 and nothing reaches 1, so probability 1 keeps everything and 0 nothing."""
    found = uniform(count=1 << 20)

    assert float(found.min()) >= 0
    assert float(found.max()) < 1


@pytest.mark.parametrize("keep", [0.001, 0.02, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_probability(keep: float) -> None:
    """The share below a probability is within five standard deviations of it, for several keys and starts."""
    count = 40000
    for seed, start in ((0, 0), (1, 0), (2, 1 << 33)):
        share = (uniform(seed, start=start) < keep).double().mean()

        assert abs(float(share) - keep) < 5 * math.sqrt(keep * (1 - keep) / count)


def test_numbers_are_uniform_in_a_chi_squared_test() -> None:
    """Counts in 256 equal cells scatter as uniform ones do, by the high and by the low bits."""
    cells, count = 256, 1 << 18
    found = uniform(7, count=count)
    for scaled in (found * cells, found * 2**24 % cells):
        counts = torch.bincount(scaled.long(), minlength=cells).double()
        statistic = float(((counts - count / cells) ** 2).sum() / (count / cells))
        assert abs(statistic - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


def test_neighbours_and_keys_are_uncorrelated() -> None:
    """Entries at small lags and at powers of two, sources, tensors and seeds agree as often as independent ones do."""
    rows = [uniform(0, source) < 0.5 for source in "abc"] + [uniform(1) < 0.5, uniform(tensor="v") < 0.5]
    lagged = [(row[lag:], row[:-lag]) for row in rows for lag in (1, 2, 3, 64, 4096)]
    for left, right in lagged + list(pairwise(rows)):
        assert abs(float((left == right).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(len(left))


def test_no_global_generator_is_read_or_moved() -> None:
    """Draws neither depend on torch's generator nor advance it."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = uniform(count=1000)

    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, uniform(count=1000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same() -> None:
    """The device changes no bit."""
    keys = masks.keys(9, ["a", "b"], "w")
    for start in (0, (1 << 31) - 50, (1 << 32) - 50):
        assert torch.equal(masks.uniform(keys.cuda(), start, 100001).cpu(), masks.uniform(keys, start, 100001))

"""Random masks are a function of (seed, source, tensor) and of the place in the tensor."""

import math
from itertools import pairwise

import pytest
import torch

from evomerge.operators import masks

#: First words of SplitMix64 with seed 1234567, as published with its reference implementation.
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


def splitmix64(state: int, count: int) -> list[int]:
    """Return words of SplitMix64 in plain Python integers, from the published formula."""
    found, full = [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & full
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        found.append(z ^ (z >> 31))
    return found


def test_words_are_the_published_sequence() -> None:
    """The words of a key are those of SplitMix64 seeded with it."""
    found = [word & ((1 << 64) - 1) for word in masks.words(1234567, 0, 5).tolist()]

    assert tuple(found) == PUBLISHED


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, masks.key(7, "a", "model.norm.weight")])
def test_words_agree_with_plain_integers_from_any_start(key: int) -> None:
    """Vectorised int64 arithmetic equals unbounded integers modulo 2^64, at the start and in the middle."""
    expected = splitmix64(key, 1000)
    full = (1 << 64) - 1

    assert [w & full for w in masks.words(key, 0, 1000).tolist()] == expected
    assert [w & full for w in masks.words(key, 990, 10).tolist()] == expected[990:]


def test_a_mask_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing in small pieces gives the mask that one piece gives."""
    whole = masks.bernoulli(5, (13, 29), 0.4)
    monkeypatch.setattr(masks, "CHUNK", 17)

    assert torch.equal(masks.bernoulli(5, (13, 29), 0.4), whole)


def test_entries_count_in_memory_order() -> None:
    """The mask of a matrix is the mask of its flattened form."""
    assert torch.equal(masks.bernoulli(5, (6, 4), 0.5).flatten(), masks.bernoulli(5, (24,), 0.5))


def test_keys_differ_by_seed_source_and_tensor() -> None:
    """Seed, source and tensor all count, and cannot be shifted into each other."""
    keys = {
        masks.key(seed, source, tensor)
        for seed in (0, 1, 11)
        for source in ("a", "ab", "1a")
        for tensor in ("w", "v", "bw")
    }

    assert len(keys) == 27


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_probability(keep: float) -> None:
    """The share of True is within five standard deviations of the probability, for several keys."""
    count = 40000
    for seed in range(3):
        share = masks.bernoulli(masks.key(seed, "a", "w"), (count,), keep).double().mean()

        assert abs(float(share) - keep) < 5 * math.sqrt(keep * (1 - keep) / count)


def test_neighbours_and_keys_are_uncorrelated() -> None:
    """Entries at lag 1, and masks of two sources, agree as often as independent ones do."""
    drawn = [masks.bernoulli(masks.key(0, source, "w"), (40000,), 0.5) for source in "abc"]
    pairs = [(mask[1:], mask[:-1]) for mask in drawn] + list(pairwise(drawn))
    for left, right in pairs:
        assert abs(float((left == right).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(40000)


def test_certain_probabilities_are_exact() -> None:
    """Probability 0 keeps nothing, 1 keeps everything, also of an empty tensor."""
    assert not masks.bernoulli(3, (5000,), 0.0).any()
    assert masks.bernoulli(3, (5000,), 1.0).all()
    assert masks.bernoulli(3, (0, 4), 0.5).shape == (0, 4)


def test_no_global_generator_is_read_or_moved() -> None:
    """Masks neither depend on torch's generator nor advance it."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = masks.bernoulli(9, (1000,), 0.5)

    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, masks.bernoulli(9, (1000,), 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_mask() -> None:
    """The device changes no bit."""
    assert torch.equal(masks.bernoulli(9, (100001,), 0.37, "cuda").cpu(), masks.bernoulli(9, (100001,), 0.37))

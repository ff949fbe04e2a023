"""The stages by themselves: edits, gates, combinations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.operators import combine, edits, gates, shapes


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=40),
    density=st.floats(0.0, 1.0),
)
def test_trim_keeps_the_count_of_greatest_magnitude(values: list[int], density: float) -> None:
    """Exactly max(1, int(d N)) entries stay; among equals the first; a sort in plain Python agrees."""
    count = len(values) if density == 1 else 0 if density == 0 else max(1, int(density * len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    expected = [values[i] if i in order[:count] else 0 for i in range(len(values))]

    found = edits.trim(torch.tensor([values], dtype=torch.float32), [density])

    assert found[0].tolist() == expected


def test_trim_takes_each_source_by_itself() -> None:
    """Densities differ by source, and the threshold is of the whole tensor, not of a row."""
    X = torch.stack([torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.tensor([[1.0, -2.0], [3.0, -4.0]])])

    found = edits.trim(X, [0.5, 0.25])

    assert found.tolist() == [[[9, 8], [0, 0]], [[0, 0], [0, -4]]]


def test_l1_rescale_restores_the_l1_norm() -> None:
    """What is left after a trim or a drop is stretched to the L1 norm that was there before."""
    X = randn(3, 7, 5)
    mask = randn(3, 7, 5, seed=1) > 0
    before = X.abs().sum(dim=(1, 2))
    for found in (edits.trim(X, [0.2, 0.5, 0.9], "l1"), edits.drop(X, mask, [0.5] * 3, "l1")):
        torch.testing.assert_close(found.abs().sum(dim=(1, 2)), before)


def test_rescale_of_nothing_is_nothing() -> None:
    """Where nothing is kept no rule divides by zero."""
    X = randn(2, 6)
    for rule in ("none", "l1", "1/p"):
        found = edits.drop(X, torch.zeros(2, 6, dtype=torch.bool), [0.0, 0.0], rule)

        assert torch.equal(found, torch.zeros(2, 6))


def test_unknown_rescale_is_refused() -> None:
    """A rule that does not exist is named."""
    with pytest.raises(ValueError, match="got 'l7'"):
        edits.trim(randn(1, 4), [0.5], "l7")


def test_drop_with_1_p_is_unbiased() -> None:
    """The mean over many masks is the tensor that was thinned, within five standard errors."""
    x, p, trials = randn(1, 12), 0.3, 20000
    kept = torch.rand(trials, 12, generator=torch.Generator().manual_seed(3)) < p
    thinned = torch.stack([edits.drop(x, mask[None], [p], "1/p")[0] for mask in kept[:2000]])
    spread = x[0].abs() * math.sqrt((1 - p) / p / len(thinned))

    assert ((thinned.mean(dim=0) - x[0]).abs() < 5 * spread).all()


def test_elect_counts_zero_sum_as_plus_and_zero_entries_never() -> None:
    """A tie goes to plus, a zero entry is on nobody's side, a negative weight turns a vote around."""
    X = torch.tensor([[1.0, 2.0, 0.0, -3.0], [-1.0, 1.0, -1.0, 1.0]])

    assert gates.elect(X, [1.0, 1.0]).tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]
    assert gates.elect(X, [1.0, -1.0]).tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]


def test_mean_with_gates_is_an_entrywise_weighted_mean() -> None:
    """Against plain Python, entry by entry, over those that count."""
    X, w = randn(4, 9), [0.5, 1.0, 2.0, 0.25]
    G = (randn(4, 9, seed=2) > 0).float()
    G[:, 0] = 0

    found = combine.mean(X, w, G).tolist()

    assert found[0] == 0
    for j in range(1, 9):
        counting = [(w[i], float(X[i, j])) for i in range(4) if G[i, j]]
        expected = sum(a * b for a, b in counting) / sum(a for a, _ in counting) if counting else 0
        assert found[j] == pytest.approx(expected, rel=1e-5)


def test_mean_is_bounded_where_mixed_weights_cancel() -> None:
    """A sum of weights near zero never blows entries up beyond the greatest contribution."""
    X = randn(2, 50)
    for other in (-1.0, -1.0 + 1e-9, -0.9999):
        for found in (combine.mean(X, [1.0, other]), combine.mean(X, [1.0, other], torch.ones(2, 50))):
            assert (found.abs() <= X.abs().max() + 1e-6).all()


def test_weights_of_tiny_size_keep_their_ratio() -> None:
    """The guard is relative: weights of 1e-9 normalise like weights of 1."""
    assert combine.normalized([3e-9, 1e-9]) == pytest.approx([0.75, 0.25])
    assert combine.normalized([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_of_unit_vectors_turns_by_the_share_of_the_angle(t: float) -> None:
    """On the unit circle the result is the point at angle t times the angle between."""
    angle = 1.2
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])

    found = combine.slerp(a, b, t)

    torch.testing.assert_close(found, torch.tensor([math.cos(t * angle), math.sin(t * angle)]))


@pytest.mark.parametrize("size", [1e-7, 1e-25])
def test_slerp_of_tiny_task_vectors_sees_the_angle(size: float) -> None:
    """Task vectors are turned alike whatever their size, even where float32 products would vanish."""
    a, b = randn(64), randn(64, seed=1)

    torch.testing.assert_close(combine.slerp(a * size, b * size, 0.3) / size, combine.slerp(a, b, 0.3))


def test_slerp_without_an_angle_is_linear() -> None:
    """A zero vector or equal directions interpolate along the chord: no factor sin(45 degrees)."""
    a = randn(16)
    zero = torch.zeros(16)

    torch.testing.assert_close(combine.slerp(zero, a, 0.5), a / 2)
    torch.testing.assert_close(combine.slerp(a, 3 * a, 0.25), a * 1.5)
    assert torch.equal(combine.slerp(zero, zero, 0.5), zero)


def test_heaviest_are_two_positive_ones_and_ties_go_by_name() -> None:
    """At most two sources take part in a slerp; zero and negative weights never do."""
    assert combine.heaviest(["a", "b", "c"], [0.2, 0.9, 0.5]) == [1, 2]
    assert combine.heaviest(["c", "b", "a"], [0.5, 0.5, 0.5]) == [1, 2]
    assert combine.heaviest(["a", "b"], [-1.0, 0.5]) == [1]
    assert combine.heaviest(["a"], [0.0]) == []


def test_scale_multiplies() -> None:
    """The shape stage `scale` is a product."""
    assert shapes.scale(torch.tensor([1.0, -2.0]), 0.5).tolist() == [0.5, -1.0]

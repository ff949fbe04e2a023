"""Pareto: against brute force, moocore, Monte Carlo and the laws of dominance."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evomerge import pareto

# Few distinct values, so that ties and duplicates are common.
POINTS = st.integers(1, 4).flatmap(
    lambda m: hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(m)), elements=st.integers(0, 4).map(float))
)


def boxes(losses: np.ndarray, reference: np.ndarray) -> float:
    """Count the unit cells that integer losses dominate: hypervolume by brute force."""
    cells = itertools.product(*(range(int(r)) for r in reference))
    return float(sum(any((point <= cell).all() for point in losses) for cell in map(np.array, cells)))


@given(POINTS)
@settings(max_examples=60, deadline=None)
def test_front_is_brute_force(losses):
    """The front is whoever is dominated by nobody, one pair at a time."""
    expected = [not any(pareto.dominates(other, point) for other in losses) for point in losses]

    assert pareto.front(losses).tolist() == expected


@given(POINTS)
@settings(max_examples=60, deadline=None)
def test_ranks_peel_the_front(losses):
    """Taking away front after front gives the ranks."""
    left, expected = list(range(len(losses))), np.full(len(losses), -1)
    for rank in range(len(losses)):
        peeled = [i for i in left if not any(pareto.dominates(losses[j], losses[i]) for j in left)]
        expected[peeled] = rank
        left = [i for i in left if i not in peeled]

    assert pareto.ranks(losses).tolist() == expected.tolist()


@given(POINTS)
@settings(max_examples=60, deadline=None)
def test_dominance_is_a_strict_partial_order(losses):
    """Nobody dominates itself, no two dominate each other, and dominance is transitive."""
    for a, b, c in itertools.product(losses[:5], repeat=3):
        assert not pareto.dominates(a, a)
        assert not (pareto.dominates(a, b) and pareto.dominates(b, a))
        assert pareto.dominates(a, c) or not (pareto.dominates(a, b) and pareto.dominates(b, c))


def test_front_keeps_duplicates():
    """Equal candidates do not dominate each other."""
    assert pareto.front([[1, 2], [1, 2], [2, 1], [2, 2]]).tolist() == [True, True, True, False]


@given(POINTS)
@settings(max_examples=60, deadline=None)
def test_hypervolume_counts_cells(losses):
    """On integers the hypervolume is the number of unit cells that are dominated."""
    reference = np.full(losses.shape[1], 4.0)

    assert pareto.hypervolume(losses, reference) == pytest.approx(boxes(losses, reference), abs=1e-9)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5, 6])
def test_hypervolume_agrees_with_moocore(objectives):
    """moocore, another implementation, gives the same volume for spheres of random points."""
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(objectives)
    losses = np.abs(rng.standard_normal((30, objectives)))
    losses /= np.linalg.norm(losses, axis=1, keepdims=True)
    losses[5] = 1.5  # beyond the reference

    expected = moocore.hypervolume(losses, ref=np.full(objectives, 1.1))

    assert pareto.hypervolume(losses, [1.1] * objectives) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_agrees_with_sampling():
    """The share of uniform points that are dominated estimates the volume."""
    rng = np.random.default_rng(7)
    losses, samples = rng.random((12, 3)), rng.random((40_000, 3))
    share = (losses[None] <= samples[:, None]).all(axis=2).any(axis=1).mean()

    assert pareto.hypervolume(losses, [1, 1, 1]) == pytest.approx(share, abs=4 * np.sqrt(0.25 / len(samples)))


@given(POINTS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_hypervolume_laws(losses, random):
    """Order and dominated candidates do not matter; another candidate never makes it smaller."""
    reference = np.full(losses.shape[1], 3.5)
    volume = pareto.hypervolume(losses, reference)
    shuffled = losses[random.sample(range(len(losses)), len(losses))]

    assert pareto.hypervolume(shuffled, reference) == pytest.approx(volume)
    assert pareto.hypervolume(losses[pareto.front(losses)], reference) == pytest.approx(volume)
    assert pareto.hypervolume(losses[:-1], reference) <= volume + 1e-12


def test_hypervolume_of_nothing_and_of_the_reference_is_zero():
    """No candidate, or one on the border of the reference, dominates no volume."""
    assert pareto.hypervolume([], [1.0, 1.0]) == 0.0
    assert pareto.hypervolume([[1.0, 0.0]], [1.0, 1.0]) == 0.0


@given(POINTS, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_spread_is_the_plain_greedy_choice(losses, count):
    """With all gains computed anew at each step, front by front, the same volumes are reached."""
    corner = np.full(losses.shape[1], 5.0)
    ranks, chosen = pareto.ranks(losses), []
    for rank in range(ranks.max() + 1):
        left = [i for i in range(len(losses)) if ranks[i] == rank]
        while left and len(chosen) < count:
            chosen.append(max(left, key=lambda i: (boxes(losses[[*chosen, i]], corner), -i)))
            left.remove(chosen[-1])

    found = pareto.spread(losses, corner, count)

    assert len(set(found)) == len(found) == min(count, len(losses))
    for k in range(1, len(found) + 1):
        assert boxes(losses[found[:k]], corner) == boxes(losses[chosen[:k]], corner)
        assert ranks[found[k - 1]] == ranks[chosen[k - 1]]


def test_spread_is_near_the_best_choice():
    """Of 12 points on a front 4 are chosen that reach 1 - 1/e of the best four's volume, found by trying all."""
    rng = np.random.default_rng(0)
    moocore = pytest.importorskip("moocore")
    for _ in range(5):
        losses = -np.abs(rng.normal(size=(12, 3)))
        losses /= np.linalg.norm(losses, axis=1, keepdims=True)
        fours = itertools.combinations(range(12), 4)
        volumes = [moocore.hypervolume(losses[list(four)], ref=np.zeros(3)) for four in fours]
        found = moocore.hypervolume(losses[pareto.spread(losses, (0, 0, 0), 4)], ref=np.zeros(3))

        assert (1 - 1 / np.e) * max(volumes) <= found <= max(volumes) + 1e-12


@given(POINTS)
@settings(max_examples=80, deadline=None)
def test_knee_and_extremes_lie_on_the_front(losses):
    """Both name members of the front, and an extreme has the least loss of its objective."""
    on_front = pareto.front(losses)

    assert on_front[pareto.knee(losses)]
    for objective, index in enumerate(pareto.extremes(losses)):
        assert on_front[index]
        assert losses[index, objective] == losses[:, objective].min()


def test_knee_is_the_bend():
    """On a staircase with one bend the knee is the bend, whatever the units of the objectives."""
    losses = np.array([[0, 1], [0.1, 0.5], [0.2, 0.1], [0.6, 0.05], [1, 0]])

    assert pareto.knee(losses) == 2
    assert pareto.knee(losses * [1000, 1] + [5, -3]) == 2


def test_knee_measures_from_the_plane_through_the_extremes():
    """With three objectives and extremes off the axes, the knee is furthest below their plane."""
    corners = np.array([[0, 1, 0.4], [0.4, 0, 1], [1, 0.4, 0]])  # plane: the sum is 1.4
    losses = np.vstack([corners, [[0.3, 0.3, 0.7], [0.35, 0.35, 0.35]]])

    assert pareto.knee(losses) == 4


def test_knee_uses_a_tilted_plane():
    """Unequal extremes tilt the plane: a candidate with a greater sum can be further below it."""
    corners = np.array([[0.0, 0.8, 1.0], [1.0, 0.0, 0.1], [0.9, 1.0, 0.0]])
    inner = np.array([[0.3, 0.6, 0.3], [0.45, 0.3, 0.4]])
    normal = np.linalg.solve(corners, np.ones(3))
    depth = (1 - inner @ normal) / np.linalg.norm(normal)

    assert pareto.knee(np.vstack([corners, inner])) == 3 + int(np.argmax(depth))
    assert np.argmax(depth) != np.argmin(inner.sum(axis=1))


def test_knee_of_one_candidate_and_of_one_objective():
    """A single candidate is its own knee; with one objective the knee is the best."""
    assert pareto.knee([[3, 4]]) == 0
    assert pareto.knee([[3], [1], [2]]) == 1
    assert pareto.knee([[1, 1], [1, 1]]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto.front([[np.nan, 1]]), "finite"),
        (lambda: pareto.front([1, 2]), "shape"),
        (lambda: pareto.dominates([1], [1, 2]), "one length"),
        (lambda: pareto.hypervolume([[1, 2]], [3]), "1 losses"),
        (lambda: pareto.hypervolume([[1, 2]], [np.inf, 3]), "reference"),
        (lambda: pareto.knee([]), "no knee"),
        (lambda: pareto.extremes([]), "no extremes"),
    ],
)
def test_refuses_what_has_no_answer(call, message):
    """Losses that are not finite, or of unequal width, are an error that says so."""
    with pytest.raises(ValueError, match=message):
        call()

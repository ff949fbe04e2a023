"""Anchors: k-means against brute force, weights as shares of the score, and awkward features."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.fitness.anchors import EMBEDDINGS, anchors, correctness, embedding, nearest_shares
from evomerge.fitness.irt import Items
from evomerge.fitness.responses import Responses

Floats = NDArray[np.float64]


def inertia(features: Floats, share: Floats, labels: tuple[int, ...]) -> float:
    """Return the weighted sum of squares within clusters."""
    total = 0.0
    for cluster in set(labels):
        own = np.array(labels) == cluster
        centre = np.average(features[own], axis=0, weights=share[own])
        total += float((share[own] * ((features[own] - centre) ** 2).sum(axis=1)).sum())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_the_best_of_all(seed: int) -> None:
    """On eight items and three clusters anchors and weights are those of the best of all partitions."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((8, 2)) + 8.0 * np.array([0, 1, 2, 0, 1, 2, 0, 0])[:, None]
    share = rng.dirichlet(np.full(8, 5.0))
    partitions = (labels for labels in itertools.product(range(3), repeat=8) if set(labels) == {0, 1, 2})
    best = np.array(min(partitions, key=lambda labels: inertia(features, share, labels)))
    wanted = {}
    for cluster in range(3):
        own = np.flatnonzero(best == cluster)
        centre = np.average(features[own], axis=0, weights=share[own])
        item = int(own[((features[own] - centre) ** 2).sum(axis=1).round(6).argmin()])
        wanted[item] = share[own].sum()
    found = anchors(features, share, 3, seed=1)
    assert found.items == tuple(sorted(wanted))
    np.testing.assert_allclose(found.weights, [wanted[item] for item in found.items])


def test_anchors_find_the_groups_of_a_simulation() -> None:
    """Items that six patterns of right answers stand behind give one anchor per pattern, weighted with its share."""
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat(np.arange(6), [100, 80, 60, 30, 20, 10]))
    patterns = rng.random((30, 6)).round()
    values = np.abs(patterns[:, group] - (rng.random((30, 300)) < 0.03))
    found = anchors(correctness(Responses.of(values)), np.full(300, 1.0 / 300.0), 6, seed=0)
    assert sorted(group[list(found.items)]) == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.weights, np.bincount(group)[group[list(found.items)]] / 300.0)


def test_choices_repeat_and_hang_on_the_seed() -> None:
    """The same seed gives the same anchors; among several seeds some differ; weights add up to 1."""
    features = np.random.default_rng(2).standard_normal((200, 5))
    share = np.full(200, 1.0 / 200.0)
    runs = [anchors(features, share, 12, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len({run.items for run in runs}) > 1
    for run in runs:
        assert len(set(run.items)) == 12
        assert run.items == tuple(sorted(run.items))
        assert sum(run.weights) == pytest.approx(1.0)


def test_last_bits_do_not_choose() -> None:
    """Features that differ by rounding errors only give the same anchors."""
    rng = np.random.default_rng(3)
    values = Responses.of(rng.random((40, 150)).round())
    other = Responses.of(values.values_MN[np.random.default_rng(4).permutation(40)])  # sums in another order
    share = np.full(150, 1.0 / 150.0)
    assert anchors(correctness(values), share, 10, seed=0) == anchors(correctness(other), share, 10, seed=0)


def test_taken_items_are_left_out() -> None:
    """Nothing that is taken is chosen; all that are left are returned where more are wanted."""
    features = np.random.default_rng(5).standard_normal((30, 3))
    share = np.full(30, 1.0 / 30.0)
    first = anchors(features, share, 6, seed=0)
    later = anchors(features, share, 6, first.items, seed=0)
    assert set(first.items).isdisjoint(later.items)
    assert len(later.items) == 6
    rest = anchors(features, share, 100, first.items, seed=0)
    assert rest.items == tuple(sorted(set(range(30)) - set(first.items)))
    np.testing.assert_allclose(rest.weights, 1.0 / 24.0)
    assert anchors(features, share, 5, tuple(range(30)), seed=0) == ((), ())


def test_items_that_do_not_count_come_last() -> None:
    """Items without a share of the score are chosen only when nothing else is left, with weight 0."""
    features = np.random.default_rng(6).standard_normal((10, 2))
    share = np.array([0.25] * 4 + [0.0] * 6)
    assert set(anchors(features, share, 3, seed=0).items) <= {0, 1, 2, 3}
    more = anchors(features, share, 6, seed=0)
    assert set(more.items) >= {0, 1, 2, 3}
    assert sum(more.weights) == pytest.approx(1.0)
    nothing = anchors(features, share, 2, (0, 1, 2, 3), seed=0)
    np.testing.assert_allclose(nothing.weights, 0.5)


def test_equal_items_give_distinct_anchors() -> None:
    """Fewer distinct items than clusters, or all alike, still give as many different anchors as wanted."""
    for features in (np.zeros((20, 3)), np.repeat(np.eye(3), 6, axis=0)):
        found = anchors(features, np.full(len(features), 1.0 / len(features)), 7, seed=0)
        assert len(set(found.items)) == 7
        assert sum(found.weights) == pytest.approx(1.0)


def test_correctness_keeps_distances() -> None:
    """Distances of items are those of their columns of responses, rows counting as they do."""
    rng = np.random.default_rng(7)
    values = rng.random((12, 25)).round()
    weights = rng.random(12)
    responses = Responses.of(values)
    object.__setattr__(responses, "rows_M", weights)
    features = correctness(responses)
    found = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    wanted = (weights * (values.T[:, None] - values.T[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_missing_responses_count_as_the_items_mean() -> None:
    """A hole is as far from other items as the mean of the item's other responses is."""
    values = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, np.nan], [0.0, 1.0, 0.0]])
    filled = values.copy()
    filled[1, 2] = 0.5
    found, wanted = (correctness(Responses.of(each)) for each in (values, filled))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_embeddings_are_correctness_and_parameters() -> None:
    """Items are described by their responses, or by their slopes and difficulty."""
    responses = Responses.of(np.random.default_rng(8).random((5, 4)).round())
    items = Items.known(np.arange(8.0).reshape(4, 2), np.arange(4.0))
    assert EMBEDDINGS == ("correctness", "irt")
    np.testing.assert_array_equal(embedding("irt", responses, items), items.parameters_NE)
    np.testing.assert_array_equal(embedding("correctness", responses, None), correctness(responses))


def test_asked_items_stand_for_their_neighbours() -> None:
    """Each item's share goes to the nearest asked item of the same score; a score that has none has no weights."""
    features = np.array([[0.0], [0.1], [1.0], [1.2], [5.0]])
    targets = np.array([[0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    found = nearest_shares(features, targets, np.array([0, 3]))
    np.testing.assert_allclose(found, [[0.4, 0.6], [0.0, 1.0], [0.0, 0.0]])


def test_anchors_of_a_large_task_take_seconds() -> None:
    """Twelve thousand items give fifty distinct anchors within seconds."""
    values = np.random.default_rng(9).random((30, 12_000)).round()
    found = anchors(correctness(Responses.of(values)), np.full(12_000, 1.0 / 12_000.0), 50, seed=0)
    assert len(set(found.items)) == 50


def test_of_equally_near_anchors_the_first_item_counts_in_whatever_order_they_come() -> None:
    """Items 1 and 3 are alike: what is near both counts for item 1."""
    features = np.array([[0.0], [1.0], [1.0], [1.0], [5.0]])
    targets = np.full((1, 5), 0.2)
    assert nearest_shares(features, targets, np.array([1, 3, 4])) == pytest.approx(np.array([[0.8, 0.0, 0.2]]))
    assert nearest_shares(features, targets, np.array([4, 3, 1])) == pytest.approx(np.array([[0.2, 0.0, 0.8]]))

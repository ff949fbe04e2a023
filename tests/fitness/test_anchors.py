"""Anchors: laws of the choice, planted clusters, and k-means made by others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from evomerge.errors import ExperimentError
from evomerge.fitness.anchors import SELECTIONS, cluster, correctness_features, select
from evomerge.fitness.irt import Items


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    total=st.integers(1, 40),
    count=st.integers(1, 45),
    seed=st.integers(0, 2**40),
    right=st.floats(0.0, 1.0),
    selection=st.sampled_from(SELECTIONS),
)
def test_anchors_are_distinct_sorted_items_whose_weights_sum_to_one(
    rows: int, total: int, count: int, seed: int, right: float, selection: str
) -> None:
    """Whatever the responses, even when many items are answered alike, and the same again for the same seed."""
    rng = np.random.default_rng(seed)
    responses = (rng.random((rows, total)) < right).astype(float)
    items = Items(responses.sum(axis=0) + 1.0, responses[0])
    found = select(selection, responses, items, count, seed)
    assert len(found.items) == min(count, total)
    assert list(found.items) == sorted(set(found.items))
    assert set(found.items) <= set(range(total))
    assert sum(found.weights) == pytest.approx(1.0)
    assert min(found.weights) > 0.0
    assert found == select(selection, responses, items, count, seed)


def test_planted_clusters_are_found_with_their_shares() -> None:
    """Three kinds of item, answered by different rows, give one anchor each, weighted 10, 20 and 30 of 60."""
    kinds = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 0]], dtype=float)
    kind_of_item = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 20, 30]))
    found = cluster(kinds[kind_of_item], 3, seed=9)
    shares = {int(kind_of_item[item]): weight for item, weight in zip(*found, strict=True)}
    assert shares == {0: pytest.approx(1 / 6), 1: pytest.approx(1 / 3), 2: pytest.approx(1 / 2)}


def test_items_lie_as_near_to_their_anchors_as_with_the_k_means_of_scipy() -> None:
    """Over five starts, the mean squared distance to the nearest anchor is that of scipy's best of five, or less."""
    features = np.random.default_rng(1).normal(size=(300, 4))

    def loss(anchors: np.ndarray) -> float:
        return float(((features[:, None] - features[anchors][None]) ** 2).sum(axis=2).min(axis=1).mean())

    def theirs(seed: int) -> float:
        rng = np.random.default_rng(seed)
        runs = [kmeans2(features, 20, minit="++", iter=50, rng=rng)[0] for _ in range(5)]
        distances = [((features[:, None] - centres[None]) ** 2).sum(axis=2) for centres in runs]
        return loss(min(distances, key=lambda distance: float(distance.min(axis=1).sum())).argmin(axis=0))

    ours = np.mean([loss(np.array(cluster(features, 20, seed).items)) for seed in range(5)])
    assert ours < 1.02 * np.mean([theirs(seed) for seed in range(5)])
    assert ours < 0.8 * loss(np.arange(20)), "better than the first items that come"


def test_asking_as_many_items_as_there_are_takes_all_with_equal_weights() -> None:
    """Then there is nothing to choose."""
    found = cluster(np.zeros((4, 2)), 9, seed=0)
    assert found.items == (0, 1, 2, 3)
    assert found.weights == (0.25,) * 4


def test_a_missing_response_counts_as_the_mean_of_its_item() -> None:
    """An item that nobody was asked counts as never right."""
    features = correctness_features(np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, np.nan]]))
    np.testing.assert_array_equal(features, [[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])


def test_an_unknown_selection_is_named_with_the_nearest_known_one() -> None:
    """And so is a count that asks nothing."""
    responses, items = np.ones((2, 3)), Items(np.ones(3), np.zeros(3))
    with pytest.raises(ExperimentError, match="did you mean 'correctness'"):
        select("corectness", responses, items, 2, 0)
    with pytest.raises(ExperimentError, match="at least 1 item must be asked, got 0"):
        select("irt", responses, items, 0, 0)

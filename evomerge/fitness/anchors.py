"""Choosing the few items that every candidate is asked, so that they stand for all the others.

Both published ways are k-means with one cluster per anchor (Polo 2024, tinyBenchmarks, arXiv 2402.14992, section 3.2):
over the items' columns of responses ("correctness") or over their fitted slope and difficulty ("irt"). The anchor of a
cluster is the item nearest to its centre, its weight the cluster's share of the items.
Shapes: M rows, N items, F features of an item, K clusters.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.irt import Floats, Items, product

SELECTIONS = ("correctness", "irt")
_RESTARTS = 5
_SWEEPS = 50


class Anchors(NamedTuple):
    """The chosen items, sorted and distinct, and their weights, which sum to 1."""

    items: tuple[int, ...]
    weights: tuple[float, ...]


def select(selection: str, responses: Floats, items: Items, count: int, seed: int) -> Anchors:
    """Choose `count` anchors in the named way from responses [M, N] and the items fitted to them.

    Args:
        selection: "correctness" or "irt".
        responses: in [0, 1]; NaN (not asked) is replaced by the item's mean.
        items: slopes and difficulties [N].
        count: how many; all items are returned when there are no more than this.
        seed: of the k-means starts; the same seed gives the same anchors.

    Raises:
        ExperimentError: if the selection is unknown or count is below 1.
    """
    if selection not in SELECTIONS:
        raise ExperimentError(f"anchors: unknown selection {selection!r}; {nearest(selection, SELECTIONS)}")
    if count < 1:
        raise ExperimentError(f"anchors: at least 1 item must be asked, got {count}")
    if selection == "correctness":
        return cluster(correctness_features(responses), count, seed)
    return cluster(np.stack([items.slope, items.difficulty], axis=1), count, seed)


def correctness_features(responses: Floats) -> Floats:
    """Return features [N, M]: an item is described by who answers it; missing responses get the item's mean."""
    asked_MN = np.isfinite(responses)
    mean_N = np.where(asked_MN, responses, 0.0).sum(axis=0) / np.maximum(asked_MN.sum(axis=0), 1)
    return np.where(asked_MN, responses, mean_N).T


def cluster(features: Floats, count: int, seed: int) -> Anchors:
    """Return the items nearest to the centres of `count` k-means clusters of features [N, F], and the shares.

    Of several seeded starts the one of least inertia is kept. An empty cluster takes over the item that is worst
    served; an item that two centres share goes to the first, the other takes the nearest one that is free.
    """
    total = len(features)
    if count >= total:
        return Anchors(tuple(range(total)), (1.0 / total,) * total)
    rng = np.random.default_rng(np.random.SeedSequence([seed, total, count]))
    runs = [_lloyd(features, _scattered(features, count, rng)) for _ in range(_RESTARTS)]
    distance_NK, label_N = min(runs, key=_inertia)
    chosen: list[int] = []
    for k in range(count):
        distance_N = distance_NK[:, k].copy()
        distance_N[chosen] = np.inf
        chosen.append(int(np.argmin(distance_N)))
    shares = np.bincount(label_N, minlength=count) / total
    order = np.argsort(chosen)
    return Anchors(tuple(chosen[k] for k in order), tuple(float(shares[k]) for k in order))


def _inertia(run: tuple[Floats, NDArray[np.intp]]) -> float:
    distance_NK, label_N = run
    return float(distance_NK[np.arange(len(label_N)), label_N].sum())


def _distances(features: Floats, centres: Floats) -> Floats:
    """Return squared distances [N, K], rounded so that items answered alike tie."""
    squares = (features**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    return np.asarray(np.maximum(squares - 2.0 * product("nf,kf->nk", features, centres), 0.0).round(9))


def _scattered(features: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Return starting centres [K, F] that keep apart (k-means++, Arthur 2007)."""
    chosen = [int(rng.integers(len(features)))]
    gap_N = _distances(features, features[chosen])[:, 0]
    for _ in range(count - 1):
        gap_N[chosen] = 0.0
        total = gap_N.sum()
        free_N = np.ones(len(features))
        free_N[chosen] = 0.0
        weight_N = gap_N / total if total > 0 else free_N / free_N.sum()
        chosen.append(int(rng.choice(len(features), p=weight_N)))
        gap_N = np.minimum(gap_N, _distances(features, features[chosen[-1:]])[:, 0])
    return features[chosen].copy()


def _lloyd(features: Floats, centres: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Return squared distances [N, K] to the centres and the nearest one [N], after the usual alternation."""
    previous: NDArray[np.intp] | None = None
    for _ in range(_SWEEPS):
        distance_NK = _distances(features, centres)
        label_N = distance_NK.argmin(axis=1)
        size_K = np.bincount(label_N, minlength=len(centres))
        for k in np.flatnonzero(size_K == 0):
            # only from clusters that stay non-empty without the item
            spare_N = np.where(size_K[label_N] > 1, distance_NK[np.arange(len(features)), label_N], -1.0)
            item = int(np.argmax(spare_N))
            size_K[label_N[item]] -= 1
            size_K[k] += 1
            label_N[item] = k
        if previous is not None and np.array_equal(label_N, previous):
            break
        previous = label_N
        member_KN = np.equal(np.arange(len(centres))[:, None], label_N[None, :]).astype(float)
        centres = product("kn,nf->kf", member_KN, features) / size_K[:, None]
    return distance_NK, label_N

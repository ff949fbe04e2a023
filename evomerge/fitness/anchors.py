"""Choosing the few items that stand for all the others: the centres of clusters of items that models answer alike.

Both published ways are k-means with one cluster per anchor (Polo 2024, tinyBenchmarks, arXiv 2402.14992, section 3.2):
over the items' columns of responses ("correctness") or over their fitted slopes and difficulty ("irt"). The anchor of a
cluster is the item nearest to its centre, its weight the cluster's share of the score.
Legend of shapes, besides `evomerge.fitness.responses`: F features of an item, A anchors (clusters).
"""

import numpy as np

from evomerge.fitness.estimator import Choice, free
from evomerge.fitness.irt import Items
from evomerge.fitness.responses import Floats, Places, Responses

#: What items can be clustered by.
EMBEDDINGS = ("correctness", "irt")
_RESTARTS = 5
_SWEEPS = 30
#: Correctness is reduced to so many principal components: beyond, columns of 0 and 1 hold noise of single responses.
_COMPONENTS = 40
#: Features are rounded to so many decimals, as their last bits hang on the BLAS library.
_DECIMALS = 6


def correctness(responses: Responses) -> Floats:
    """Return features [N, F]: an item is described by who answers it rightly; missing responses get the item's mean.

    Rows count as they do in a fit. Principal components stand for the columns where there are many rows.
    """
    rows_M1 = responses.rows_M[:, None]
    asked_MN = np.isfinite(responses.values_MN)
    right_N = np.where(asked_MN, responses.values_MN * rows_M1, 0.0).sum(axis=0)
    mean_N = right_N / np.maximum((asked_MN * rows_M1).sum(axis=0), 1e-12)
    filled_MN = np.where(asked_MN, responses.values_MN, mean_N) * np.sqrt(rows_M1)
    filled_MN -= filled_MN.mean(axis=1, keepdims=True)  # distances stay
    vectors_MM = np.linalg.eigh(filled_MN @ filled_MN.T)[1]
    return np.asarray(filled_MN.T @ vectors_MM[:, ::-1][:, :_COMPONENTS]).round(_DECIMALS)


def embedding(name: str, responses: Responses, items: Items | None) -> Floats:
    """Return the features [N, F] of items in the named way, one of `EMBEDDINGS`; "irt" needs fitted items."""
    if name == "irt" and items is not None:
        return items.parameters_NE.round(_DECIMALS)
    return correctness(responses)


def anchors(features_NF: Floats, share_N: Floats, count: int, taken: tuple[int, ...] = (), seed: int = 0) -> Choice:
    """Return the items nearest to the centres of `count` clusters, and the clusters' shares.

    Of five seeded starts the one of least inertia is kept. Items without a share of the score are neither anchors nor
    clustered, unless nothing else is left.

    Args:
        features_NF: of all items.
        share_N: how much each item counts, at least 0.
        count: how many; all that are not taken if they are fewer.
        taken: items that are not to be chosen.
        seed: of the starts.
    """
    left = free(len(features_NF), taken)
    counted = left[share_N[left] > 0.0]
    if count >= len(counted):
        chosen = np.concatenate([counted, left[share_N[left] <= 0.0]])[:count]
        weight_n = np.maximum(share_N[chosen], 0.0)
    else:
        place_A, weight_n = _clustered(features_NF[counted], share_N[counted], count, seed)
        chosen = counted[place_A]
    total = weight_n.sum()
    weight_n = weight_n / total if total > 0.0 else np.full(len(chosen), 1.0 / max(len(chosen), 1))
    order = np.argsort(chosen)
    return Choice(tuple(chosen[order].tolist()), tuple(weight_n[order].tolist()))


def nearest_shares(features_NF: Floats, targets_KN: Floats, items: Places) -> Floats:
    """Return the weights [K, n] of asked items, whichever way they were chosen: what they are nearest to.

    Every item's share of score k goes to the nearest asked item that counts in score k as well; of equally near ones to
    that which is first among all items, in whatever order they were asked.
    A score in which none of the asked items counts has weights 0.
    """
    order_n = np.argsort(items)
    distance_Nn = _distances(features_NF, features_NF[items])
    weights_Kn = np.zeros((len(targets_KN), len(items)))
    for weight_n, target_N in zip(weights_Kn, targets_KN, strict=True):
        counted_n = order_n[target_N[items[order_n]] > 0.0]
        if len(counted_n):
            nearest_N = counted_n[distance_Nn[:, counted_n].argmin(axis=1)]
            weight_n += np.bincount(nearest_N, weights=target_N, minlength=len(items))
    return weights_Kn


def _clustered(features_NF: Floats, share_N: Floats, count: int, seed: int) -> tuple[Places, Floats]:
    """Return the anchors' places [A], distinct, and the shares of their clusters [A]."""
    rng = np.random.default_rng(seed)
    runs = [_lloyd(features_NF, share_N, _scattered(features_NF, share_N, count, rng)) for _ in range(_RESTARTS)]
    _, distance_NA, label_N = min(runs, key=lambda run: run[0])
    chosen: list[int] = []
    for cluster in range(count):
        own_N = np.where(label_N == cluster, distance_NA[:, cluster], np.inf)
        chosen.append(int(np.argmin(own_N)))
    shares_A = np.bincount(label_N, weights=share_N, minlength=count)
    return np.array(chosen, dtype=np.intp), np.asarray(shares_A, dtype=np.float64)


def _distances(features_NF: Floats, centres_AF: Floats) -> Floats:
    """Return squared distances [N, A], in whole millionths: what hangs on the BLAS library must decide nothing."""
    distance_NA = features_NF @ (-2e6 * centres_AF.T)
    distance_NA += 1e6 * (features_NF**2).sum(axis=1)[:, None]
    distance_NA += 1e6 * (centres_AF**2).sum(axis=1)
    return np.rint(distance_NA, out=distance_NA)


def _scattered(features_NF: Floats, share_N: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Return starting centres [A, F], items that keep apart (k-means++, Arthur 2007)."""
    gap_N = np.ones(len(features_NF))
    chosen: list[int] = []
    for _ in range(count):
        weight_N = np.cumsum(share_N * gap_N)
        if not weight_N[-1] > 0.0:  # fewer distinct items than clusters
            gap_N = np.ones(len(features_NF))
            gap_N[chosen] = 0.0
            weight_N = np.cumsum(share_N * gap_N)
        place = int(np.searchsorted(weight_N, rng.random() * weight_N[-1], side="right"))
        chosen.append(min(place, len(features_NF) - 1))
        gap_N = np.minimum(gap_N, np.maximum(_distances(features_NF, features_NF[chosen[-1:]])[:, 0], 0.0))
        gap_N[chosen] = 0.0
    return features_NF[chosen].copy()


def _lloyd(features_NF: Floats, share_N: Floats, centres_AF: Floats) -> tuple[float, Floats, Places]:
    """Return inertia, squared distances [N, A] to the centres and clusters [N], none empty, after the alternation."""
    count = len(centres_AF)
    previous_N = np.full(len(features_NF), -1)
    for _ in range(_SWEEPS):
        distance_NA = _distances(features_NF, centres_AF)
        label_N = distance_NA.argmin(axis=1)
        own_N = np.take_along_axis(distance_NA, label_N[:, None], axis=1)[:, 0]
        _fill(label_N, own_N, count)
        if np.array_equal(label_N, previous_N):
            break
        previous_N = label_N
        size_A = np.bincount(label_N, weights=share_N, minlength=count)
        sums_AF = [np.bincount(label_N, weights=share_N * column_N, minlength=count) for column_N in features_NF.T]
        centres_AF = np.stack(sums_AF, axis=1) / size_A[:, None]
    return float((share_N * own_N).sum().round(3)), distance_NA, label_N


def _fill(label_N: Places, own_N: Floats, count: int) -> None:
    """Give each empty cluster the item that is worst served, from a cluster that stays non-empty without it."""
    size_A = np.bincount(label_N, minlength=count)
    for cluster in np.flatnonzero(size_A == 0):
        item = int(np.argmax(np.where(size_A[label_N] > 1, own_N, -1.0)))
        size_A[label_N[item]] -= 1
        size_A[cluster] += 1
        label_N[item], own_N[item] = cluster, 0.0

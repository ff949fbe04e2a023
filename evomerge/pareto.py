"""Pareto dominance over losses: front, ranks, hypervolume, spread, knee, extremes.

All losses are minimised; every function takes an array of shape (candidates, objectives).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Losses of shape (candidates, objectives).
Matrix = NDArray[np.float64]


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Tell whether the first losses are nowhere worse than the second and somewhere better."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise ValueError(f"losses to compare must have one length, got {one.shape} and {two.shape}")
    return bool((one <= two).all() and (one < two).any())


def front(losses: ArrayLike) -> NDArray[np.bool_]:
    """Return which candidates no other one dominates; equal candidates are all kept. Shape (candidates,).

    In lexicographic order a candidate stands before all that it dominates. So the first that is left belongs to the
    front, and takes away what it dominates (Kung, Luccio, Preparata 1975, "On finding the maxima of a set of vectors").
    """
    points = _matrix(losses)
    best = np.zeros(len(points), dtype=bool)
    left = np.lexsort(points.T[::-1])
    while left.size:
        first, others = points[left[0]], points[left]
        best[left[0]] = True
        beaten = (first <= others).all(axis=1) & (first < others).any(axis=1)
        beaten[0] = True
        left = left[~beaten]
    return best


def ranks(losses: ArrayLike, deepest: int | None = None) -> NDArray[np.int64]:
    """Return the front that each candidate belongs to, 0 for the best.

    Front k are the non-dominated candidates once fronts 0 to k-1 are taken away
    (Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", section III-A).

    Args:
        losses: shape (candidates, objectives), finite.
        deepest: the last front to tell apart; all candidates beyond it get `deepest + 1`.

    Returns:
        Ranks of shape (candidates,).
    """
    points = _matrix(losses)
    count = len(points)
    # dominated[i, j]: i dominates j; one row at a time keeps the memory at candidates x objectives.
    dominated = np.zeros((count, count), dtype=bool)
    for i, point in enumerate(points):
        dominated[i] = (point <= points).all(axis=1) & (point < points).any(axis=1)
    found = np.full(count, -1, dtype=np.int64)
    rank = 0
    while (found < 0).any():
        left = found < 0
        if deepest is not None and rank > deepest:
            found[left] = rank
            break
        found[left & ~dominated[left].any(axis=0)] = rank
        rank += 1
    return found


def hypervolume(losses: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume that the candidates dominate, up to a reference point; exact for any number of objectives.

    Candidates that are not better than the reference in every objective count nothing.
    One and two objectives are swept; more go through the exclusive volumes of
    While, Bradstreet, Barone 2012, "A fast way of calculating exact hypervolumes" (WFG).

    Args:
        losses: shape (candidates, objectives), finite.
        reference: the corner, shape (objectives,); it must be fixed before a run to compare candidates of the run.
    """
    corner = np.asarray(reference, dtype=np.float64)
    points = _matrix(losses)
    if corner.ndim != 1 or not np.isfinite(corner).all():
        raise ValueError(f"a reference point must be a finite row of losses, got {corner.tolist()}")
    if points.size == 0:
        return 0.0
    if points.shape[1] != len(corner):
        raise ValueError(f"the reference point has {len(corner)} losses, the candidates have {points.shape[1]}")
    gains = corner - points
    return _volume(_maximal(gains[(gains > 0).all(axis=1)]))


def spread(losses: ArrayLike, reference: Sequence[float], count: int) -> list[int]:
    """Return the indices of at most `count` candidates that together dominate a great volume, in the order chosen.

    Greedy: each next one adds the most volume (at least 1 - 1/e of the best possible choice in
    volume, Nemhauser 1978); a gain only shrinks as others are chosen, so old gains are upper
    bounds and few are computed again (Minoux 1978). Where no candidate adds volume any more,
    the next fronts follow in their order.
    """
    points = _matrix(losses)
    rank = ranks(points)
    chosen: list[int] = []
    for level in range(int(rank.max(initial=-1)) + 1):
        gains = dict.fromkeys((int(i) for i in np.flatnonzero(rank == level)), np.inf)
        volume = hypervolume(points[chosen], reference) if chosen else 0.0
        while gains and len(chosen) < count:
            best = max(gains, key=lambda i: (gains[i], -i))
            now = hypervolume(points[[*chosen, best]], reference) - volume
            rival = max(((gain, -i) for i, gain in gains.items() if i != best), default=(0.0, -best))
            if now < gains[best] and (now, -best) < rival:
                gains[best] = now
                continue
            chosen.append(best)
            volume += now
            del gains[best]
    return chosen


def extremes(losses: ArrayLike) -> tuple[int, ...]:
    """Return for each objective the index of its best candidate, always one of the front.

    Ties go to the least sum of losses, then to the first candidate.
    """
    points = _matrix(losses)
    if len(points) == 0:
        raise ValueError("no candidates: there are no extremes")
    total = points.sum(axis=1)
    return tuple(int(np.lexsort((total, column))[0]) for column in points.T)


def knee(losses: ArrayLike) -> int:
    """Return the index of the candidate where the front bends most, always one of the front.

    The losses of the front are scaled to [0, 1]; the knee lies furthest below the hyperplane
    through the extremes (Das 1999, "On characterizing the 'knee' of the Pareto curve based on
    normal-boundary intersection"). Where the extremes give no plane that falls in every
    objective (fewer distinct extremes than objectives), it is the plane of equal sums, that is,
    the knee has the least sum of scaled losses. Ties go to the first candidate.
    """
    points = _matrix(losses)
    if len(points) == 0:
        raise ValueError("no candidates: there is no knee")
    members = np.flatnonzero(front(points))
    low, width = points[members].min(axis=0), np.ptp(points[members], axis=0)
    # An objective in which the whole front is equal says nothing about the bend.
    scaled = (points[members] - low)[:, width > 0] / width[width > 0]
    if scaled.shape[1] == 0:
        return int(members[0])
    normal = _normal(scaled[list(extremes(scaled))])
    return int(members[np.argmin(scaled @ normal)])


def _normal(corners: Matrix) -> NDArray[np.float64]:
    """Return the normal n of the plane n.x = 1 through the corners, or all ones if it does not point upward."""
    plain = np.ones(len(corners))
    if np.linalg.matrix_rank(corners) < len(corners):
        return plain
    normal = np.linalg.solve(corners, plain).astype(np.float64)
    return normal if (normal > 0).all() else plain


def _matrix(losses: ArrayLike) -> Matrix:
    points = np.asarray(losses, dtype=np.float64)
    if points.size == 0:
        points = points.reshape(0, points.shape[1] if points.ndim == 2 else 0)
    if points.ndim != 2:
        raise ValueError(f"losses must have shape (candidates, objectives), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("losses must be finite; leave failed candidates out")
    return points


def _maximal(gains: Matrix) -> Matrix:
    """Return the distinct gains that no other gain covers, least last gain first."""
    unique = np.unique(gains, axis=0)
    kept = unique[front(-unique)] if len(unique) > 1 else unique
    return kept[np.argsort(kept[:, -1], kind="stable")] if len(kept) else kept


def _volume(gains: Matrix) -> float:
    """Return the volume of the union of the boxes [0, gain], of gains as `_maximal` gives them.

    Each box adds what the later ones leave uncovered. All later gains reach at least as far in the
    last objective, so that the overlap is a volume of one objective less, times the last gain.
    """
    count, objectives = gains.shape
    if count == 0:
        return 0.0
    if count == 1 or objectives == 1:
        return float(gains[0].prod())
    if objectives == 2:
        # The second gain rises, so the first falls: a staircase.
        steps = np.diff(gains[:, 1], prepend=0.0)
        return float((steps * gains[:, 0]).sum())
    total = 0.0
    for i, gain in enumerate(gains):
        overlap = _volume(_maximal(np.minimum(gains[i + 1 :, :-1], gain[:-1])))
        total += float(gain[-1]) * (float(gain[:-1].prod()) - overlap)
    return total

"""How much losses add to those met so far, as one number: it leads to the front, and then along it to its gaps."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from evomerge import pareto
from evomerge.drivers.serving import Result
from evomerge.genome import Genome
from evomerge.objective import Losses

#: Losses of shape (genomes, objectives).
Matrix = NDArray[np.float64]

#: The reference point of the hypervolume in every objective, where the front reaches from 0 to 1.
CORNER = 1.1


class Archive:
    """Genomes and what they lose, which may change."""

    def __init__(self) -> None:
        self._genomes: list[Genome] = []
        self._losses: list[Losses | None] = []
        self._places: dict[int, int] = {}  # by index

    def add(self, results: Iterable[Result]) -> None:
        """Keep results; those of index -1 stay as they are."""
        for result in results:
            if result.index != -1:
                self._places[result.index] = len(self._losses)
            self._genomes.append(result.genome)
            self._losses.append(result.losses)

    def revise(self, index: int, losses: Losses | None) -> None:
        """Change what a genome loses, if it is here."""
        if index in self._places:
            self._losses[self._places[index]] = losses

    def front(self) -> tuple[list[Genome], Matrix]:
        """Return the genomes that nothing dominates, one for each losses, and these."""
        scored = [(genome, row) for genome, row in zip(self._genomes, self._losses, strict=True) if row is not None]
        losses = np.array([row for _, row in scored], dtype=np.float64)
        places = minima(losses)
        return [scored[place][0] for place in places], losses[places]


def minima(losses: Matrix) -> NDArray[np.int64]:
    """Return the places of the rows that no other row dominates, the first of equal ones, in their order.

    In front times rows, where `pareto.front` takes rows times rows.
    """
    left = np.argsort(losses.sum(axis=1), kind="stable") if len(losses) else np.empty(0, dtype=np.int64)
    found = []
    while len(left):
        found.append(left[0])  # what dominates it would have a lesser sum
        left = left[(losses[left] < losses[left[0]]).any(axis=1)]
    return np.sort(np.array(found, dtype=np.int64))


def additions(front: Matrix, points: Matrix) -> NDArray[np.float64]:
    """Return by how much each point adds to a front: a number to rank by, also where all add nothing.

    The uncrowded hypervolume improvement of Touré et al. 2019, "Uncrowded Hypervolume Improvement: COMO-CMA-ES and the
    Sofomore framework": what the point adds to the hypervolume; where it adds nothing, minus how far it would have
    to move to be nowhere worse than one of the front. Losses are measured from the least to the greatest of
    the front with the points, objective by objective, since objectives have units of their own.

    Args:
        front: losses that do not dominate each other, shape (front, objectives); may be empty.
        points: losses of shape (points, objectives).
    """
    members = front.reshape(-1, points.shape[1])
    low, width = _scale(np.concatenate([members, points]))
    members, corner = (members - low) / width, np.full(points.shape[1], CORNER)
    return np.array([_addition(members, point, corner) for point in (points - low) / width])


def _scale(losses: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least losses of the front, and how wide it is: where it has no width, all losses, or else 1."""
    front = losses[minima(losses)]
    low, width = front.min(axis=0), np.ptp(front, axis=0)
    width = np.where(width > 0, width, np.ptp(losses, axis=0))
    return low, np.where(width > 0, width, 1.0)


def _addition(front: Matrix, point: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    beyond = np.maximum(point - corner, 0.0).sum()
    if not len(front):
        return float(np.prod(np.maximum(corner - point, 0.0)) - beyond)
    if (front <= point).all(axis=1).any() or (point >= corner).any():
        behind = np.sqrt((np.maximum(point - front, 0.0) ** 2).sum(axis=1)).min()
        return float(-behind - beyond)
    # What both dominate is what the front dominates of the box between the point and the corner.
    return float(np.prod(corner - point)) - pareto.hypervolume(np.maximum(front, point), corner.tolist())

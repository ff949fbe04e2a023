"""Who gained most lately: the hypervolume that each result adds, and a bandit that shares evaluations by it."""

import numpy as np
from numpy.typing import NDArray

from evomerge.objective import Losses
from evomerge.pareto import hypervolume


class Volume:
    """The front of all that was scored, and how much hypervolume a result adds to it.

    Args:
        reference: the corner that volume is measured from; None: the worst of each loss so far.
    """

    def __init__(self, reference: Losses | None) -> None:
        self._reference = reference
        self._losses: dict[int, Losses] = {}
        self._front: NDArray[np.float64] | None = None  # None: to be found anew
        self._worst: NDArray[np.float64] | None = None

    def add(self, number: int, losses: Losses) -> float:
        """Take losses under a number of their own, and return the volume that they add."""
        point = np.array(losses, dtype=np.float64)
        front = self._found()
        self._losses[number] = losses
        self._worst = point if self._worst is None else np.maximum(self._worst, point)
        self._front = _joined(front, point)
        corner = self._worst if self._reference is None else np.array(self._reference)
        if self._front is front or (point >= corner).any():
            return 0.0
        covered = hypervolume(np.maximum(front, point), corner.tolist()) if len(front) else 0.0
        return float(np.prod(corner - point)) - covered

    def revise(self, number: int, losses: Losses | None) -> None:
        """Take better known losses, or a failure, in place of those of a number."""
        self._losses.pop(number, None)
        if losses is not None:
            self._losses[number] = losses
        self._front = None

    def _found(self) -> NDArray[np.float64]:
        if self._front is None:
            points = np.array(list(self._losses.values()), dtype=np.float64)
            self._worst = points.max(axis=0) if len(points) else None
            self._front = points[:0]
            for point in points:
                self._front = _joined(self._front, point)
        return self._front


class Bandit:
    """Shares evaluations among arms by what each gained per evaluation lately.

    What was gained and how often an arm was chosen both fade with every evaluation, as in a discounted bandit
    (Garivier, Moulines 2011, "On upper-confidence bound policies for switching bandit problems"); an arm's chance is
    in proportion to its gain per evaluation (probability matching, Goldberg 1990; Thierens 2005), but for a floor that
    all share alike, so that an arm that gains nothing now can come back later.

    Args:
        arms: how many there are.
        floor: the part of evaluations that is shared alike.
        memory: after so many evaluations a gain counts 1/e.
    """

    def __init__(self, arms: int, floor: float, memory: float) -> None:
        self._floor = floor
        self._fading = float(np.exp(-1.0 / memory))
        self._gained = np.zeros(arms)
        self._tried = np.zeros(arms)

    def credit(self, arm: int, gain: float) -> None:
        """Take what an evaluation that an arm asked for has gained."""
        self._gained *= self._fading
        self._tried *= self._fading
        self._gained[arm] += gain
        self._tried[arm] += 1.0

    def shares(self) -> NDArray[np.float64]:
        """Return the chance of each arm. An arm that was never tried counts as the best. Shape (arms,)."""
        count = len(self._gained)
        tried = self._tried > 0
        rates = np.divide(self._gained, self._tried, out=np.zeros(count), where=tried)
        rates[~tried] = rates.max(initial=0.0)
        if rates.sum() <= 0:
            return np.full(count, 1.0 / count)
        shares: NDArray[np.float64] = self._floor / count + (1.0 - self._floor) * rates / rates.sum()
        return shares

    def order(self, rng: np.random.Generator) -> list[int]:
        """Return the arms in a random order, each time one of those that are left by their shares."""
        # The exponential race: the first is an arm with the chance of its share, and so on among the others.
        times = rng.exponential(size=len(self._gained)) / np.maximum(self.shares(), 1e-12)
        return [int(arm) for arm in np.argsort(times, kind="stable")]


def _joined(front: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the front of a front and a point."""
    if not len(front):
        return point[None]
    if (front <= point).all(axis=1).any():
        return front
    return np.concatenate([front[~(point <= front).all(axis=1)], point[None]])


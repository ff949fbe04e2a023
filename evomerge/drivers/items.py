"""What candidates answered, item by item, and what each item is worth to whoever answers it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.seen import latin
from evomerge.objective import Losses
from evomerge.value import value

#: How many points of the space of losses stand for items where there are none.
POINTS = 512

#: How far these points go beyond the archive's worst losses, in widths of the archive, so that whoever is best in one
#: objective and worst in another has points too. Half a width kept fronts of three tasks broader than a tenth did.
MARGIN = 0.5

#: Scores of shape (members, items); NaN where an item was not answered.
Scores = NDArray[np.float64]


@value
class Answers:
    """What one candidate answered: the columns of its items and the responses to them, by task."""

    tasks: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


class Items:
    """The items that anybody has answered so far, each with a column of its own."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, int], int] = {}

    def read(self, responses: Mapping[str, Mapping[int, float]]) -> Answers:
        """Return what one candidate answered; tasks without an answer are left out."""
        tasks = {}
        for task, own in responses.items():
            if own:
                columns = [self._columns.setdefault((task, place), len(self._columns)) for place in own]
                tasks[task] = np.array(columns), np.array(list(own.values()), dtype=np.float64)
        return Answers(tasks=tasks)

    def scores(self, members: Sequence[Answers], losses: Sequence[Losses]) -> Scores:
        """Return what the members of an archive scored on everything they compete for.

        Items are those of the tasks that every member answered something of, with responses in [0, 1] only. Where
        there are fewer such tasks than objectives, some objectives are not told by any item (a property, or responses
        without bounds). Then the members compete for losses besides, in the form of pseudo-items: points of the space
        of losses, which everybody solves who is nowhere worse, as many as there are items and at least `POINTS`. To
        share them is to share hypervolume (Bader, Zitzler 2011, "HypE").

        Args:
            members: what each answered.
            losses: of each, one number per objective.

        Returns:
            Scores in [0, 1] of shape (members, items and pseudo-items).
        """
        tasks = [task for task in (members[0].tasks if members else {}) if _usable(task, members)]
        scores_ND = np.full((len(members), len(self._columns)), np.nan)
        for row, member in zip(scores_ND, members, strict=True):
            for task in tasks:
                columns, responses = member.tasks[task]
                row[columns] = responses
        scores_ND = scores_ND[:, ~np.isnan(scores_ND).all(axis=0)]
        losses_NK = np.array(losses, dtype=np.float64)
        if len(tasks) >= losses_NK.shape[1]:
            return scores_ND
        return np.concatenate([scores_ND, _points(losses_NK, max(POINTS, scores_ND.shape[1]))], axis=1)


def worth(scores_ND: Scores, alpha: float) -> Scores:
    """Return what each item gives to each member: F_id = s_id / z_d^alpha.

    z_d, the niche count, is the sum of all members' scores on item d; of a member that did not answer it, the mean of
    the others counts. An item that nobody solves gives nothing.
    """
    answered_D = (~np.isnan(scores_ND)).sum(axis=0)
    z_D = np.nansum(scores_ND, axis=0) * len(scores_ND) / np.maximum(answered_D, 1)
    return np.asarray(scores_ND / np.where(z_D > 0, z_D, 1.0) ** alpha)


def fitness(worth_ND: Scores) -> NDArray[np.float64]:
    """Return f_i = sum_d F_id; of a member that answered some items only, the mean of those, times all. Shape (N,)."""
    return _sums(worth_ND)


def attraction(worth_ND: Scores, first: int) -> NDArray[np.float64]:
    """Return how much each member has that the first lacks: sum_d max(0, F_2d - F_1d).

    Of a pair that has not answered all items in common, it is the mean of those that both answered, times all; 0 where
    there are none. Shape (N,).
    """
    return _sums(np.maximum(worth_ND - worth_ND[first], 0.0))


def _sums(amounts_ND: Scores) -> NDArray[np.float64]:
    known_N = (~np.isnan(amounts_ND)).sum(axis=1)
    return np.asarray(np.nansum(amounts_ND, axis=1) * amounts_ND.shape[1] / np.maximum(known_N, 1))


def _usable(task: str, members: Sequence[Answers]) -> bool:
    return all(
        task in member.tasks and bool(((member.tasks[task][1] >= 0) & (member.tasks[task][1] <= 1)).all())
        for member in members
    )


def _points(losses_NK: NDArray[np.float64], count: int) -> Scores:
    """Return which members reach points that are spread over the box of their losses, and beyond it by `MARGIN`."""
    points_PK = latin(np.random.default_rng(0), count, losses_NK.shape[1]) * (1.0 + MARGIN)
    width = np.ptp(losses_NK, axis=0)
    scaled_NK = (losses_NK - losses_NK.min(axis=0)) / np.where(width > 0, width, 1.0)
    return np.asarray((scaled_NK[:, None] <= points_PK).all(axis=2), dtype=np.float64)

"""Schedules: which items to ask of a candidate next, and when its answers are complete."""

from collections.abc import Mapping

from evomerge.value import value

#: Items by task: places within the task's search split.
Items = Mapping[str, tuple[int, ...]]


@value
class Fixed:
    """Every candidate is asked the same items."""

    items: Items

    def next(self, candidate: int, answered: bool) -> Items | None:
        """Return what to ask of a candidate; None when its score is final."""
        del candidate
        return None if answered else self.items


@value
class Warmup:
    """The first candidates are asked all items, the others the few that a fit on those chose.

    Attributes:
        rows: number of candidates that are asked everything (the sources, the baselines and
            random genomes): the rows on which the item bank is fitted.
        full: all items of the search split.
        anchors: the chosen items.
    """

    rows: int
    full: Items
    anchors: Items

    def next(self, candidate: int, answered: bool) -> Items | None:
        """Return what to ask of a candidate; None when its score is final."""
        if answered:
            return None
        return self.full if candidate < self.rows else self.anchors

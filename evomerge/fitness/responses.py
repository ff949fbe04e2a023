"""Responses of many models to many items: what estimators are fitted on.

Legend of shapes, here and in all of `evomerge.fitness`:
M rows (models), N items, K scores, n items asked, C candidates.
"""

# ruff: noqa: N802, N815  fields and properties carry their shapes in capitals, as variables do

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """What models answered, and what their scores are made of.

    The score k of row m is the sum over items of `targets_KN[k] * values_MN[m]`.

    Attributes:
        values_MN: responses in [0, 1], or any numbers if not `bounded`; NaN where an item was not asked.
        targets_KN: the share of each item in each score, at least 0; rows add up to 1. With several tasks K is their
            number, and an item has a share in its own task's score only.
        strata_N: which stratum an item belongs to, from 0: its task, and which sources answer it rightly.
        rows_M: how much each row counts in a fit; 1 is usual.
        margins_MN: log-likelihood margins in nats, NaN where there are none; features for predicting the responses,
            never a goal.
        sources: the rows that are sources, where they are known (for `mp_irt`).
        bounded: whether responses lie in [0, 1]; others (nats, tokens) are estimated by plain means only.

    Raises:
        ValueError: if shapes or values are not as described.
    """

    values_MN: Floats
    targets_KN: Floats
    strata_N: Places
    rows_M: Floats
    margins_MN: Floats | None = None
    sources: tuple[int, ...] = field(default=())
    bounded: bool = True

    def __post_init__(self) -> None:
        rows, items = self.values_MN.shape
        shapes = [self.targets_KN.shape[1:] == (items,), self.strata_N.shape == (items,), self.rows_M.shape == (rows,)]
        if not all(shapes) or (self.margins_MN is not None and self.margins_MN.shape != (rows, items)):
            raise ValueError(f"responses of {rows} rows and {items} items: targets, strata, rows or margins do not fit")
        known = self.values_MN[~np.isnan(self.values_MN)]
        if np.isinf(known).any():
            raise ValueError("responses must be finite, or NaN where an item was not asked")
        if self.bounded and known.size and not (known.min() >= 0.0 and known.max() <= 1.0):
            raise ValueError(f"responses must lie in [0, 1], got {known.min():g} to {known.max():g}")
        if not np.allclose(self.targets_KN.sum(axis=1), 1.0) or self.targets_KN.min() < 0.0:
            raise ValueError("the shares of the items in a score must be at least 0 and add up to 1")
        if rows and self.rows_M.min() < 0.0:
            raise ValueError("a row must not count less than 0")

    @classmethod
    def of(
        cls,
        values_MN: Floats,
        strata_N: Places | None = None,
        margins_MN: Floats | None = None,
        bounded: bool = True,
    ) -> Self:
        """Return the responses to one task, whose items count alike."""
        rows, items = values_MN.shape
        return cls(
            values_MN=np.asarray(values_MN, dtype=np.float64),
            targets_KN=np.full((1, items), 1.0 / items),
            strata_N=np.zeros(items, dtype=np.intp) if strata_N is None else strata_N,
            rows_M=np.ones(rows),
            margins_MN=margins_MN,
            bounded=bounded,
        )

    @property
    def complete(self) -> bool:
        """Whether every row was asked every item."""
        return not bool(np.isnan(self.values_MN).any())

    @property
    def scores_MK(self) -> Floats:
        """The scores of all rows; NaN for a row that was not asked everything that counts in one."""
        missing_MN = np.isnan(self.values_MN)
        lost_MK = missing_MN.astype(float) @ (self.targets_KN > 0.0).T.astype(float) > 0.5
        return np.where(lost_MK, np.nan, np.where(missing_MN, 0.0, self.values_MN) @ self.targets_KN.T)

    def only(self, rows: Places) -> Self:
        """Return some of the rows; the sources among them stay sources."""
        place = {int(row): new for new, row in enumerate(rows)}
        return replace(
            self,
            values_MN=self.values_MN[rows],
            rows_M=self.rows_M[rows],
            margins_MN=None if self.margins_MN is None else self.margins_MN[rows],
            sources=tuple(place[row] for row in self.sources if row in place),
        )

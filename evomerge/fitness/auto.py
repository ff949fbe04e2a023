"""The estimator for those who do not want to choose one: by how many complete rows there are."""

import numpy as np

from evomerge.errors import ExperimentError
from evomerge.fitness.estimator import Choice, Estimate, Fit
from evomerge.fitness.factor import Factor
from evomerge.fitness.responses import Floats, Responses
from evomerge.fitness.sampling import Mean, Stratified
from evomerge.value import value


@value
class Auto:
    """`Stratified` while fewer than `rows` complete rows are known, then `Factor`; `Mean` for unbounded responses.

    With fewer than about 15 rows every model of the items that was tried ranks candidates worse than a random subset.
    The factor model takes margins where the rows have them.

    Attributes:
        rows: complete rows from which on the factor model is fitted.
    """

    rows: int = 20

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ExperimentError(f"auto: rows must be at least 2, got {self.rows}")

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit of the estimator that suits the rows; its `reason` names it."""
        if not responses.bounded:
            return _Named(Mean().fit(responses, seed), "mean: the responses have no bounds")
        full = int(np.isfinite(responses.scores_MK).all(axis=1).sum())
        if full < self.rows:
            reason = f"stratified: {full} complete rows, and below {self.rows} a model of the items ranks worse"
            return _Named(Stratified().fit(responses, seed), reason)
        reason = f"factor: {full} complete rows, at least the {self.rows} that its model needs"
        factor = Factor(margins=responses.margins_MN is not None)
        return _Named(factor.fit(responses, seed), reason)


class _Named:
    """A fit with a reason of its own."""

    def __init__(self, fit: Fit, reason: str) -> None:
        self._fit = fit
        self.reason = f"{reason}; {fit.reason}" if fit.reason else reason
        self.warnings = fit.warnings

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Choose as the chosen estimator does."""
        return self._fit.choose(count, taken)

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Estimate as the chosen estimator does."""
        return self._fit.estimate(items, values_Cn, margins_Cn)

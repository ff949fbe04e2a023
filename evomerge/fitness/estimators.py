"""Estimators: from the responses of a candidate on some items to its score, with a standard error.

The score is the expected response on the population of items that a task stands for, so that even a candidate that has
answered every item of a split has an error.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.bank import ItemBank
from evomerge.fitness.irt import Floats, Forecast
from evomerge.objective import Score


class Estimator(Protocol):
    """Turns responses into a score; pure.

    Example::

        Mean().score([4, 7], [1.0, 0.0])    # Score(value=0.5, error=0.353..., items=2)
    """

    def score(self, items: Sequence[int], responses: Sequence[float]) -> Score:
        """Return the score of a candidate.

        Args:
            items: distinct indices of the items asked, into the split.
            responses: one per item, each in [0, 1].

        Raises:
            ValueError: if nothing was asked, lengths differ, an item is repeated or unknown, or a response is
                outside [0, 1].
        """
        ...


class Mean:
    """The plain mean of the responses.

    The error comes from adding two right and two wrong answers (Agresti 1998, The American Statistician 52:119) to the
    n responses y of mean p: with m = (n p + 2) / (n + 4) and v = (sum (y - m)^2 + 2 m^2 + 2 (1 - m)^2) / (n + 4), which
    is m (1 - m) when all y are 0 or 1,

        value = p,    error = sqrt(v / n + (p - m)^2),

    the expected distance of the truth from the value, so that neither 0 of n nor n of n has error 0.
    """

    def __init__(self, total: int | None = None) -> None:
        """Take the number of items of the split, where known, to refuse items outside it."""
        self.total = total

    def score(self, items: Sequence[int], responses: Sequence[float]) -> Score:
        """Return mean and standard error; see `Estimator.score`."""
        _, response_n = _checked(items, responses, self.total)
        n, value = len(response_n), float(response_n.mean())
        middle = (n * value + 2.0) / (n + 4.0)
        squares = float(((response_n - middle) ** 2).sum()) + 2.0 * middle**2 + 2.0 * (1.0 - middle) ** 2
        error = np.sqrt(squares / (n + 4.0) / n + (value - middle) ** 2)
        return Score(value=value, error=float(error), items=n)


class PIrt:
    """p-IRT: seen items count as observed, unseen ones by the response model at the candidate's ability.

    The value and its raw variance are those of `evomerge.fitness.irt.Forecast`, which has formula and reference;

        error = sqrt(spread^2 variance + m (1 - m) / N + (value - m)^2),    m = (N value + 2) / (N + 4)

    with the bank's `spread` from held-out warm-up rows; the rest is the error that a `Mean` over all N items, right or
    wrong, would have. Given all N items, the score is that of `Mean`.
    """

    def __init__(self, bank: ItemBank) -> None:
        """Take a fitted bank."""
        self.bank = bank
        self._forecast = Forecast(bank.parameters)

    def score(self, items: Sequence[int], responses: Sequence[float]) -> Score:
        """Return value and calibrated standard error; see `Estimator.score`."""
        total = self.bank.total
        item_n, response_n = _checked(items, responses, total)
        if len(item_n) == total:
            return Mean(total).score(items, responses)
        value, variance = self._forecast(item_n, response_n)
        middle = (total * value + 2.0) / (total + 4.0)
        sampling = middle * (1.0 - middle) / total + (value - middle) ** 2
        error = np.sqrt(self.bank.spread**2 * variance + sampling)
        return Score(value=value, error=float(error), items=len(item_n))


def _checked(items: Sequence[int], responses: Sequence[float], total: int | None) -> tuple[NDArray[np.intp], Floats]:
    item_n = np.asarray(items, dtype=np.intp)
    response_n = np.asarray(responses, dtype=np.float64)
    if item_n.ndim != 1 or item_n.shape != response_n.shape or len(item_n) == 0:
        raise ValueError(f"one response per item is needed, got {len(items)} items, {len(responses)} responses")
    if len(np.unique(item_n)) != len(item_n):
        raise ValueError("a score needs distinct items, got one twice")
    if item_n.min() < 0 or (total is not None and item_n.max() >= total):
        raise ValueError(f"items must lie in the split of {total} items, got {item_n.min()} to {item_n.max()}")
    if not (np.all(response_n >= 0.0) and np.all(response_n <= 1.0)):
        raise ValueError("responses must lie in [0, 1]")
    return item_n, response_n

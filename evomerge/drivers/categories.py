"""A distribution of options, one for each categorical axis, that learns from the best and never gives an option up."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Choice

#: How far the probabilities go towards what the best have, at each step.
RATE = 0.3


class Categories:
    """Independent probabilities of the options of each axis.

    The options beside a normal distribution, as in Hamano et al. 2024, "CatCMA: Stochastic Optimization for
    Mixed-Category Problems": probabilities move towards the options of the best, by the weights that CMA-ES gives
    them, and none falls below a margin (their section 4.2), so that a late change is still tried. The step is constant,
    where theirs adapts.

    Args:
        axes: the categorical axes.
        options: the option of each axis to begin around; None: all options are alike.
        sigma: how wide to begin: an option is kept as often as a normal number of this deviation, in the middle of the
            option's cell of the unit interval, stays in the cell.
    """

    def __init__(self, axes: Sequence[Choice], options: Sequence[str] | None, sigma: float) -> None:
        self._axes = axes
        self._margins = [_margin(len(axes), len(axis.options)) for axis in axes]
        self._chances = [np.full(len(axis.options), 1.0 / len(axis.options)) for axis in axes]
        for i, option in enumerate(options or ()):
            count = len(axes[i].options)
            kept = math.erf(0.5 / count / (sigma * math.sqrt(2.0))) if count > 1 else 1.0
            self._chances[i][:] = (1.0 - kept) / max(count - 1, 1)
            self._chances[i][axes[i].options.index(option)] = kept

    def sample(self, rng: np.random.Generator) -> list[str]:
        """Return an option of each axis."""
        places = [np.searchsorted(np.cumsum(chances[:-1]), rng.random(), "right") for chances in self._chances]
        return [axis.options[place] for axis, place in zip(self._axes, places, strict=True)]

    def learn(self, best: Sequence[Sequence[str]], weights: Sequence[float]) -> None:
        """Move towards the options of the best.

        Args:
            best: options of each axis, one row per genome.
            weights: how much each row counts; their sum is 1.
        """
        for i, axis in enumerate(self._axes):
            wanted = np.zeros(len(axis.options))
            for row, weight in zip(best, weights, strict=True):
                wanted[axis.options.index(row[i])] += weight
            self._chances[i] = _at_least(self._chances[i] + RATE * (wanted - self._chances[i]), self._margins[i])


def _margin(axes: int, options: int) -> float:
    """Return the least probability of an option: with all at it, 0.73 of the genomes have the likeliest everywhere."""
    return float((1.0 - 0.73 ** (1.0 / axes)) / (options - 1)) if options > 1 else 0.0


def _at_least(chances: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """Return probabilities of which none is below the margin, at the cost of those above it."""
    raised = np.maximum(chances, margin)
    above = raised - margin
    return np.asarray(raised + (1.0 - raised.sum()) * above / above.sum() if above.any() else raised)

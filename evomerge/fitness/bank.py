"""The item bank of a task: what the warm-up taught about its items, which of them to ask, and how far to trust it."""

import json
import os
from pathlib import Path

import numpy as np

from evomerge.errors import ExperimentError
from evomerge.fitness.anchors import SELECTIONS, select
from evomerge.fitness.irt import Floats, Forecast, Items, fit
from evomerge.value import Plain, canonical, parse, plain, value

#: With fewer, there is nothing to hold out.
FEWEST_ROWS = 4
_FOLDS = 5
#: Least variance of a forecast that a z-score is taken by; below it the forecast has no doubt left to scale.
_LEAST_VARIANCE = 1e-9


@value
class ItemBank:
    """Items of one split of one task, as fitted to a warm-up; file and JSON forms keep every bit.

    Attributes:
        slope: a_j of each of the N items.
        difficulty: b_j of each item (larger: harder).
        anchors: the items to ask of every candidate, sorted.
        weights: the share of the items that each anchor stands for.
        spread: by how much raw standard errors are multiplied, at least 1.
        rows: how many candidates the fit had.
    """

    slope: tuple[float, ...]
    difficulty: tuple[float, ...]
    anchors: tuple[int, ...]
    weights: tuple[float, ...]
    spread: float = 1.0
    rows: int = 0

    def __post_init__(self) -> None:
        total = len(self.slope)
        if total == 0 or len(self.difficulty) != total:
            raise ExperimentError(f"item bank: {total} slopes and {len(self.difficulty)} difficulties do not match")
        if list(self.anchors) != sorted(set(self.anchors)) or not all(0 <= item < total for item in self.anchors):
            raise ExperimentError(f"item bank: anchors must be sorted, distinct and in 0 to {total - 1}")
        if not self.anchors or len(self.weights) != len(self.anchors):
            raise ExperimentError(
                f"item bank: at least one anchor and a weight for each are needed, "
                f"got {len(self.anchors)} anchors and {len(self.weights)} weights"
            )

    @property
    def total(self) -> int:
        """The number of items N."""
        return len(self.slope)

    @property
    def parameters(self) -> Items:
        """Slopes and difficulties as arrays [N]."""
        return Items(np.asarray(self.slope), np.asarray(self.difficulty))

    def to_plain(self) -> Plain:
        """Return the JSON form."""
        return plain(self)

    @classmethod
    def from_plain(cls, data: Plain, place: str = "item bank") -> "ItemBank":
        """Return the bank of a JSON form.

        Raises:
            ExperimentError: if it is not one; `place` (a file, a key path) is named.
        """
        return parse(cls, data, place, ExperimentError)

    def save(self, path: Path) -> None:
        """Write the bank as one JSON file, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(canonical(self) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "ItemBank":
        """Read a bank that `save` wrote.

        Raises:
            ExperimentError: if there is no such file, or it holds no item bank.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise ExperimentError(f"{path}: not readable as an item bank: {problem}") from problem
        return cls.from_plain(data, str(path))


def fit_bank(responses: Floats, anchors: int, seed: int, selection: str = SELECTIONS[0]) -> ItemBank:
    """Fit an item bank to a warm-up.

    The spread is the root mean square of (truth - value) / error over rows that were held out, and at least 1. In each
    of five folds the items are refitted and the anchors chosen anew: on the rows that they were chosen on, they look
    better than they are.

    Args:
        responses: [M, N] in [0, 1]; NaN where not asked. Below 15 rows the fit is hardly worth its name; 20 to 40 are
            usual, spread over the search space.
        anchors: how many items each candidate is to be asked.
        seed: of the k-means starts.
        selection: how anchors are chosen, see `evomerge.fitness.anchors`.

    Raises:
        ExperimentError: if there are too few rows, or an unknown selection.
        ValueError: if responses are not as described.
    """
    responses = np.asarray(responses, dtype=np.float64)
    responses = responses[np.isfinite(responses).any(axis=1)] if responses.ndim == 2 else responses
    if len(responses) < FEWEST_ROWS:
        raise ExperimentError(
            f"item bank: p_irt needs a warm-up of at least {FEWEST_ROWS} scored candidates, got {len(responses)}; "
            "make the warm-up longer, or use the estimator mean"
        )
    items = fit(responses)
    chosen = select(selection, responses, items, anchors, seed)
    return ItemBank(
        slope=tuple(items.slope.tolist()),
        difficulty=tuple(items.difficulty.tolist()),
        anchors=chosen.items,
        weights=chosen.weights,
        spread=_calibrate(responses, anchors, seed, selection),
        rows=len(responses),
    )


def _calibrate(responses: Floats, anchors: int, seed: int, selection: str) -> float:
    """Return the root mean square z-score of held-out rows, at least 1."""
    total = responses.shape[1]
    if anchors >= total:
        return 1.0
    # neighbours in the warm-up may be relatives, so folds are strided rather than blocks
    fold_M = np.arange(len(responses)) % min(_FOLDS, len(responses))
    truth_M = np.nanmean(responses, axis=1)
    squares = []
    for fold in range(fold_M.max() + 1):
        kept = responses[fold_M != fold]
        kept = np.where(np.isfinite(kept).any(axis=0), kept, np.nanmean(kept))
        items = fit(kept)
        seen_n = np.asarray(select(selection, kept, items, anchors, seed).items)
        forecast = Forecast(items)
        for row in np.flatnonzero(fold_M == fold):
            known = np.isfinite(responses[row, seen_n])
            if known.any():
                found, variance = forecast(seen_n[known], responses[row, seen_n[known]])
                squares.append((truth_M[row] - found) ** 2 / max(variance, _LEAST_VARIANCE))
    return float(max(1.0, np.sqrt(np.mean(squares)))) if squares else 1.0

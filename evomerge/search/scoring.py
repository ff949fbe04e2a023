"""From answers to scores: fits the estimator to the candidates that answered everything, block by block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evomerge.fitness.bank import Prior
from evomerge.fitness.calibration import LEAST_ROWS, spread
from evomerge.fitness.estimator import Estimator, Fit, scores
from evomerge.fitness.frontier import frontier
from evomerge.fitness.responses import Floats
from evomerge.fitness.sampling import Mean
from evomerge.fitness.schedule import Items
from evomerge.objective import Score
from evomerge.search.asking import Answers
from evomerge.search.blocks import Block

#: Streams of random numbers; drivers, warm-up and masks have their own.
_STREAM_FIT, _STREAM_SPREAD = 2, 3


class Model:
    """What is known of the items, block by block: chooses which to ask, and turns answers into scores.

    Args:
        blocks: the items of a split.
        estimator: the settings of the estimator of bounded tasks.
        rows: the candidates that answered everything.
        sources: those of them that are sources.
        recent: the places of the rows that are like the candidates to come.
        share: of the weight of a fit, what the recent rows have together, at least.
        seed: of the run.
        bank: what other models answered to the items of bounded tasks.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        estimator: Estimator,
        rows: Sequence[Answers] = (),
        sources: Sequence[Answers] = (),
        recent: Sequence[int] = (),
        share: float = 0.5,
        seed: int = 0,
        bank: Prior | None = None,
    ) -> None:
        self._blocks = blocks
        self._seed = seed
        self._settings: list[Estimator] = [estimator if block.bounded else Mean() for block in blocks]
        self._responses = [block.responses(rows, sources) for block in blocks]
        for i, block in enumerate(blocks):
            if block.bounded:
                near = frontier(self._responses[i], np.array(recent, dtype=np.intp), share=share)
                self._responses[i] = near if bank is None else bank.beside(near, tuple(block.sizes))
        number = _number(seed, _STREAM_FIT, len(rows))
        self._fits: list[Fit] = [
            settings.fit(responses, number) for settings, responses in zip(self._settings, self._responses, strict=True)
        ]

    @property
    def reason(self) -> str:
        """Which estimator was used for the bounded tasks, and why."""
        return next((fit.reason for fit, block in zip(self._fits, self._blocks, strict=True) if block.bounded), "")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(text for fit in self._fits for text in fit.warnings)

    def choose(self, each: int, taken: Items) -> dict[str, tuple[int, ...]]:
        """Return items to ask: so many a task on average, none of those taken."""
        found: dict[str, tuple[int, ...]] = {}
        for block, fit in zip(self._blocks, self._fits, strict=True):
            found |= block.items(fit.choose(_count(block, each), block.places(taken)).items)
        return found

    def scores(self, own: Answers, spreads: Mapping[str, float]) -> dict[str, Score]:
        """Return a candidate's score on each task, by all that it answered.

        Args:
            own: its answers.
            spreads: by how much raw errors are multiplied, by task; those that are not named: 1.
        """
        found: dict[str, Score] = {}
        for block, fit, responses in zip(self._blocks, self._fits, self._responses, strict=True):
            places, values_n, margins_n = _asked(block, own)
            spread_K = np.array([spreads.get(task, 1.0) for task in block.sizes])
            own_K = scores(fit, spread_K, places, values_n, responses, margins_n)
            # Rounded, so that equal shares of right answers are equal, whatever items they are made of.
            found |= {t: replace(s, value=round(s.value, 12)) for t, s in zip(block.sizes, own_K, strict=True)}
        return found

    def estimates(self, own: Answers) -> dict[str, tuple[float, float]]:
        """Return value and raw error of a candidate on each bounded task."""
        found: dict[str, tuple[float, float]] = {}
        for block, fit in zip(self._blocks, self._fits, strict=True):
            if block.bounded:
                places, values_n, margins_n = _asked(block, own)
                margins_1n = None if margins_n is None else margins_n[None]
                value_CK, error_CK = fit.estimate(places, values_n[None], margins_1n)
                found |= zip(block.sizes, zip(value_CK[0].tolist(), error_CK[0].tolist(), strict=True), strict=True)
        return found

    def spread(self, each: int) -> dict[str, float]:
        """Return by how much raw errors of estimates from so many items a task are off, by bounded task."""
        found: dict[str, float] = {}
        for block, settings, responses in zip(self._blocks, self._settings, self._responses, strict=True):
            rows, count = len(responses.rows_M), _count(block, each)
            if block.bounded and rows >= LEAST_ROWS and count < block.total:
                spread_K = spread(settings, responses, count, _number(self._seed, _STREAM_SPREAD, rows))
                found |= zip(block.sizes, (round(factor, 4) for factor in spread_K.tolist()), strict=True)
        return found


def _count(block: Block, each: int) -> int:
    return sum(min(each, size) for size in block.sizes.values())


def _asked(block: Block, own: Answers) -> tuple[tuple[int, ...], Floats, Floats | None]:
    """Return the places of a block that a candidate answered, its responses there, and its margins if there are any."""
    values_N, margins_N = block.row(own.values), block.row(own.margins)
    places = np.flatnonzero(np.isfinite(values_N))
    margins_n = margins_N[places]
    return tuple(places.tolist()), values_N[places], margins_n if np.isfinite(margins_n).any() else None


def _number(*names: int) -> int:
    return int(np.random.SeedSequence(list(names)).generate_state(1)[0])

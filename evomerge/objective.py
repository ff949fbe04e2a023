"""Scores and objectives, and the one place where "better" gets a sign."""

import math
from collections.abc import Mapping, Sequence

from evomerge.errors import ExperimentError
from evomerge.value import value

#: What drivers minimise, one number per objective.
Losses = tuple[float, ...]

#: Half width of a 95 % interval in standard errors (normal approximation).
Z95 = 1.959963984540054


@value
class Score:
    """An estimate of a candidate's expected response on a task.

    `error` is its standard error over the population of items that the task stands for,
    `items` how many items were asked to get it, `bounded` whether it lies in [0, 1].
    """

    value: float
    error: float
    items: int
    bounded: bool = True

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; of a bounded score, cut to [0, 1]."""
        low, high = self.value - Z95 * self.error, self.value + Z95 * self.error
        return (max(0.0, low), min(1.0, high)) if self.bounded else (low, high)


@value
class Objective:
    """One thing to optimise: a task's score or a property of the model, with a direction."""

    name: str
    kind: str = "task"
    direction: str = "maximize"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("task", "property"):
            raise ExperimentError(f"objective {self.name!r}: kind must be task or property, got {self.kind!r}")
        if self.direction not in ("maximize", "minimize"):
            raise ExperimentError(
                f"objective {self.name!r}: direction must be maximize or minimize, got {self.direction!r}"
            )

    def loss(self, amount: float) -> float:
        """Return the number to minimise."""
        return -amount if self.direction == "maximize" else amount


def losses(objectives: Sequence[Objective], values: Mapping[str, float]) -> Losses:
    """Return one loss per objective from the values of tasks and properties, by name.

    Raises:
        ValueError: if a value is missing or not finite.
    """
    missing = [objective.name for objective in objectives if objective.name not in values]
    if missing:
        raise ValueError(f"no value of {', '.join(missing)} among {dict(values)}")
    found = tuple(objective.loss(values[objective.name]) for objective in objectives)
    if not all(math.isfinite(loss) for loss in found):
        raise ValueError(f"losses must be finite, got {dict(values)}")
    return found

"""What a driver is asked to solve, and the ask/tell contract that all drivers keep."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import field
from typing import Protocol, runtime_checkable

import numpy as np

from evomerge.errors import ExperimentError
from evomerge.genome import Axis, Genome, check_axes, check_genome
from evomerge.objective import Losses
from evomerge.value import value


@value
class Detail:
    """What is known of a scored genome beside its losses, for drivers that can use it.

    Attributes:
        errors: the standard error of each loss; empty where it is not known.
        responses: what was answered, by task and by the item's place; of as many items as were asked.
    """

    errors: tuple[float, ...] = ()
    responses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


#: Nothing is known beside the losses.
NOTHING = Detail()


@value
class Problem:
    """Axes to choose on, how many losses come back, and the seed of everything random.

    `known` are genomes scored before the search proper (baselines, warm-up), in candidate order.
    `weights` are the objectives' weights for drivers that need one number; equal if left out. `start` is where the
    space says that a search begins, and `draw` gives the random genomes that it hopes most of; a driver that draws its
    own even ones, or has a better start, may ignore them. `same` gives what two genomes have in common that are the
    same candidate, beyond genes that do not count. `details` are those of the known genomes, in their order; empty
    where there are none. `reference` is the reference point of the hypervolume; if left out, drivers that need one
    take the worst loss that they have seen.
    """

    axes: tuple[Axis, ...]
    objectives: int
    seed: int
    known: tuple[tuple[Genome, Losses], ...] = ()
    weights: tuple[float, ...] | None = None
    start: Genome | None = None
    draw: Callable[[np.random.Generator], Genome] | None = None
    same: Callable[[Genome], Hashable] | None = None
    details: tuple[Detail, ...] = ()
    reference: Losses | None = None

    def __post_init__(self) -> None:
        check_axes(self.axes)
        if not self.axes:
            raise ExperimentError("the search space has no axes; there is nothing to search")
        if self.objectives < 1 or self.seed < 0:
            raise ExperimentError(
                f"a search needs an objective and a seed from 0 up, got {self.objectives} and {self.seed}"
            )
        if self.weights is not None and not _usable(self.weights, self.objectives):
            raise ExperimentError(f"weights must be {self.objectives} numbers from 0 up, not all 0, got {self.weights}")
        if self.start is not None:
            check_genome(self.axes, self.start, "start")
        for i, (genome, losses) in enumerate(self.known):
            check_genome(self.axes, genome, f"known candidate {i}")
            check_losses(losses, self.objectives, f"known candidate {i}")
        if self.details and len(self.details) != len(self.known):
            raise ValueError(f"{len(self.known)} candidates are known, and details of {len(self.details)}")
        if self.reference is not None:
            check_losses(self.reference, self.objectives, "reference")

    def total(self, losses: Losses) -> float:
        """Return the weighted sum of losses."""
        weights = self.weights or (1.0,) * self.objectives
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


class Driver(Protocol):
    """Proposes genomes and learns from their losses.

    There are two manners. In batches, a driver proposes a generation and waits for all of it, so that the order of
    results changes nothing. In steady state, it proposes as long as fewer genomes are in flight than its limit, and
    learns from each result as it comes: no worker waits, and the order of asks and tells is part of the run.

    A driver holds no clock, no file and no global randomness: fed with the same asks and tells
    in the same order, a fresh driver of the same settings, problem and library versions goes on
    exactly as the first. That is how a search resumes.

    Example, a generation of two::

        driver = Random(batch=2).start(problem)
        driver.ask()                            # genome of index 0
        driver.ask()                            # genome of index 1
        driver.ask()                            # None: both are in flight
        driver.tell(1, genome_1, (0.3, 0.7))    # any order
        driver.ask()                            # None: index 0 is still out
        driver.tell(0, genome_0, None)          # index 0 failed
        driver.ask()                            # genome of index 2
    """

    def ask(self) -> Genome | None:
        """Return the next genome, or None when nothing more can be proposed until told.

        None with nothing in flight means that the search space is exhausted.
        """
        ...

    def tell(self, index: int, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Take the losses of a proposed genome.

        Args:
            index: which ask of this driver proposed it, counting genomes from 0.
            genome: what was really scored, as the ledger has it; on another processor it
                may differ in the last bits from what this driver proposed, and it wins.
            losses: one finite number per objective, or None if the candidate failed.
            detail: what else is known of it.

        Raises:
            ValueError: if the index is not in flight, or the losses are not usable.
            RecipeError: if the genome does not fit the axes.
        """
        ...

    def revise(self, index: int, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Take better known losses of a genome that was told before; a driver that keeps no genomes may ignore them.

        Args:
            index: as for `tell`.
            losses: one finite number per objective, or None if the candidate has failed since.
            detail: what else is known of it.

        Raises:
            ValueError: if the index was never told, or the losses are not usable.
        """
        ...

    def inject(self, genome: Genome, losses: Losses | None, detail: Detail = NOTHING) -> None:
        """Take the losses of a genome that somebody else proposed, at any time.

        Args:
            genome: what was scored; this driver will not propose it.
            losses: one finite number per objective, or None if the candidate failed.
            detail: what else is known of it.

        Raises:
            ValueError: if the losses are not usable.
            RecipeError: if the genome does not fit the axes.
        """
        ...


@runtime_checkable  # settings of a driver that is made of others are checked to hold some
class Settings(Protocol):
    """Settings of one kind of driver: a frozen value."""

    @property
    def steady(self) -> bool:
        """Whether the driver is in steady state, not in batches."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """The distributions whose version decides what the driver proposes, beside numpy and scipy."""
        ...

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time in a space of so many axes; in steady state, its limit."""
        ...

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        ...


def check_losses(losses: Losses, objectives: int, place: str) -> None:
    """Refuse losses of the wrong length or that are not finite.

    Raises:
        ValueError: naming the place.
    """
    if len(losses) != objectives or not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"{place}: expected {objectives} finite losses, got {losses}; tell None for a failure")


def check_at_least(name: str, amount: float, least: float) -> None:
    """Refuse a driver setting below its least value.

    Raises:
        ExperimentError: naming the setting.
    """
    if not (math.isfinite(amount) and amount >= least):
        raise ExperimentError(f"driver setting {name!r} must be at least {least}, got {amount}")


def _usable(weights: tuple[float, ...], objectives: int) -> bool:
    return len(weights) == objectives and all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0

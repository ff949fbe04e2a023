"""Genomes and their axes: what a driver may choose, and the map between genomes and the unit cube."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import RecipeError, nearest
from evomerge.recipe import Recipe
from evomerge.value import value

#: One value per axis; hashable, JSON as it is.
Gene = float | int | str
Genome = tuple[Gene, ...]


@value
class ActiveIf:
    """A condition on another axis: the axis that carries it counts only where `axis` has one of `options`."""

    axis: str
    options: tuple[str, ...]


@value
class Real:
    """A real axis in [low, high]; with `log` the unit interval is spread over the logarithm."""

    name: str
    low: float
    high: float
    log: bool = False
    active_if: ActiveIf | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.name, self.low, self.high, self.log)

    def from_unit(self, u: float) -> float:
        """Return the gene at u in [0, 1]."""
        u = _clip(u)
        if self.log:
            found = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + u * (self.high - self.low)
        return min(max(found, self.low), self.high)

    def to_unit(self, gene: Gene) -> float:
        """Return u in [0, 1] for a gene."""
        x, low, high = float(gene), self.low, self.high
        if self.log:
            x, low, high = math.log(x), math.log(low), math.log(high)
        # Equal also where the bounds are so close that their logarithms are one number.
        return 0.5 if low == high else (x - low) / (high - low)

    def contains(self, gene: Gene) -> bool:
        """Tell whether a gene is a number within the bounds."""
        return isinstance(gene, int | float) and not isinstance(gene, bool) and self.low <= gene <= self.high


@value
class Whole:
    """An integer axis with low and high included; the unit interval is cut into equal cells."""

    name: str
    low: int
    high: int
    log: bool = False
    active_if: ActiveIf | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.name, self.low, self.high, self.log)

    def from_unit(self, u: float) -> int:
        """Return the integer whose cell holds u."""
        low, high = self._edges()
        x = low + _clip(u) * (high - low)
        return min(max(round(math.exp(x) if self.log else x), self.low), self.high)

    def to_unit(self, gene: Gene) -> float:
        """Return the place of the integer within the unit interval."""
        low, high = self._edges()
        return ((math.log(float(gene)) if self.log else float(gene)) - low) / (high - low)

    def contains(self, gene: Gene) -> bool:
        """Tell whether a gene is an integer within the bounds."""
        return isinstance(gene, int) and not isinstance(gene, bool) and self.low <= gene <= self.high

    def _edges(self) -> tuple[float, float]:
        low, high = self.low - 0.5, self.high + 0.5
        return (math.log(low), math.log(high)) if self.log else (low, high)


@value
class Choice:
    """A categorical axis; the unit interval is cut into one equal cell per option."""

    name: str
    options: tuple[str, ...]
    active_if: ActiveIf | None = None

    def __post_init__(self) -> None:
        if not self.options or len(set(self.options)) != len(self.options):
            raise RecipeError(f"axis {self.name!r}: options must be distinct and at least one, got {self.options}")

    def from_unit(self, u: float) -> str:
        """Return the option whose cell holds u."""
        return self.options[min(int(_clip(u) * len(self.options)), len(self.options) - 1)]

    def to_unit(self, gene: Gene) -> float:
        """Return the middle of the option's cell."""
        return (self.options.index(str(gene)) + 0.5) / len(self.options)

    def contains(self, gene: Gene) -> bool:
        """Tell whether a gene is one of the options."""
        return isinstance(gene, str) and gene in self.options


Axis = Real | Whole | Choice


class SearchSpace(Protocol):
    """What can be searched: axes, and a pure and total map from genomes to recipes."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, in the order of the genome."""
        ...

    @property
    def start(self) -> Genome | None:
        """Where a search should begin, if the space knows that."""
        ...

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome; every genome within the bounds is some recipe."""
        ...


def from_unit(axes: Sequence[Axis], point: Sequence[float] | NDArray[np.float64]) -> Genome:
    """Return the genome at a point of the unit cube; coordinates outside [0, 1] are clipped."""
    return tuple(axis.from_unit(float(u)) for axis, u in zip(axes, point, strict=True))


def to_unit(axes: Sequence[Axis], genome: Genome) -> NDArray[np.float64]:
    """Return the point of the unit cube that `from_unit` maps to this genome. Shape (len(axes),)."""
    return np.array([axis.to_unit(gene) for axis, gene in zip(axes, genome, strict=True)], dtype=np.float64)


def active(axes: Sequence[Axis], genome: Genome) -> tuple[bool, ...]:
    """Tell for each axis whether its condition holds in this genome."""
    genes = {axis.name: gene for axis, gene in zip(axes, genome, strict=True)}
    return tuple(axis.active_if is None or genes[axis.active_if.axis] in axis.active_if.options for axis in axes)


def check_axes(axes: Sequence[Axis]) -> None:
    """Refuse axes with equal names, or with a condition on an axis or option that does not exist.

    Raises:
        RecipeError: naming the axis and the way out.
    """
    named = {axis.name: axis for axis in axes}
    if len(named) != len(axes):
        raise RecipeError("a search space has two axes of one name; rename one")
    for axis in axes:
        condition = axis.active_if
        if condition is None:
            continue
        other = named.get(condition.axis)
        if not isinstance(other, Choice):
            way = nearest(condition.axis, [a.name for a in axes if isinstance(a, Choice)])
            raise RecipeError(f"axis {axis.name!r}: active_if names {condition.axis!r}, not a choice; {way}")
        for option in condition.options:
            if option not in other.options:
                raise RecipeError(f"axis {axis.name!r}: active_if option {option!r}; {nearest(option, other.options)}")


def check_genome(axes: Sequence[Axis], genome: Genome, place: str) -> None:
    """Refuse a genome that does not fit the axes.

    Raises:
        RecipeError: naming the place, the axis and the offending gene.
    """
    if len(genome) != len(axes):
        raise RecipeError(f"{place}: the genome has {len(genome)} genes, the search space has {len(axes)} axes")
    for axis, gene in zip(axes, genome, strict=True):
        if not axis.contains(gene):
            raise RecipeError(f"{place}: gene {gene!r} is not within the axis {axis}")


def _clip(u: float) -> float:
    if math.isnan(u):
        raise ValueError("a coordinate of the unit cube is NaN")
    return min(max(u, 0.0), 1.0)


def _check_bounds(name: str, low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RecipeError(f"axis {name!r}: bounds must be finite with low <= high, got [{low}, {high}]")
    if log and low <= 0:
        raise RecipeError(f"axis {name!r}: a logarithmic axis needs low > 0, got {low}")

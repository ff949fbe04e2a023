"""A full factorial grid over mixed axes, in an order that spreads it however early it is cut off."""

import math
from collections.abc import Sequence
from typing import ClassVar

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, serve
from evomerge.drivers.sobol import Points
from evomerge.genome import Axis, Choice, Gene, Genome, Real
from evomerge.value import value

#: How many points in a row may be no new candidate before the grid counts as exhausted.
MISSES = 50_000


@value
class Grid:
    """Settings of a grid search: every combination of some values of each axis, once.

    A number has `levels` values, evenly spread from bound to bound, an integer as many as it has at most; a choice has
    all its options. If `levels` is left out, it is the greatest number, from 2 up, with which the grid has at most
    `points` points. Axes that are not active do not multiply. The points come in the order in which a Sobol sequence
    falls on them, then the rest in an order of the seed. With `steady` at most `batch` genomes are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ()

    levels: int | None = None
    points: int = 1024
    batch: int = 16
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("levels", 1 if self.levels is None else self.levels, 1)
        check_at_least("points", self.points, 1)
        check_at_least("batch", self.batch, 1)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        return serve(_Walk(self, problem), problem, self.batch if self.steady else None)


class Lattice:
    """The points of a grid, countable without listing them: there may be more than fit any memory.

    The axes are a forest: one that is active only where a choice has certain options hangs on that choice. So the
    number of points is a product over the roots, and of a choice it is a sum over its options of such products.

    Args:
        axes: of the space.
        levels: the most values of a number.
    """

    def __init__(self, axes: Sequence[Axis], levels: int) -> None:
        self._axes = axes
        self._values = [values(axis, levels) for axis in axes]
        places = {axis.name: i for i, axis in enumerate(axes)}
        self._hanging: list[list[int]] = [[] for _ in axes]
        self._roots: list[int] = []
        for i, axis in enumerate(axes):
            own = self._roots if axis.active_if is None else self._hanging[places[axis.active_if.axis]]
            own.append(i)
        #: Of each axis, how many points it and all that hangs on it have, by its value.
        self._sizes: list[list[int]] = [[] for _ in axes]
        #: How many points there are.
        self.size = math.prod(self._measure(root) for root in self._roots)

    def at(self, rank: int) -> Genome:
        """Return the point of a rank in [0, size), one of each; axes that are not active have their first value."""
        found = [own[0] for own in self._values]
        self._fill(found, self._roots, rank)
        return tuple(found)

    def near(self, genome: Genome) -> Genome:
        """Return the point in whose cell a genome lies; the cells of an axis are equal parts of the unit interval."""
        found = [own[0] for own in self._values]
        waiting = list(self._roots)
        while waiting:
            i = waiting.pop()
            cells = len(self._values[i])
            found[i] = self._values[i][min(int(self._axes[i].to_unit(genome[i]) * cells), cells - 1)]
            waiting += self._below(i, found[i])
        return tuple(found)

    def _fill(self, found: list[Gene], axes: Sequence[int], rank: int) -> None:
        """Set the values of axes and of all that hangs on them; the digits of the rank, least first, are theirs."""
        for i in axes:
            rank, own = divmod(rank, sum(self._sizes[i]))
            for gene, size in zip(self._values[i], self._sizes[i], strict=True):
                if own < size:
                    found[i] = gene
                    self._fill(found, self._below(i, gene), own)
                    break
                own -= size

    def _measure(self, i: int) -> int:
        self._sizes[i] = [math.prod(self._measure(j) for j in self._below(i, gene)) for gene in self._values[i]]
        return sum(self._sizes[i])

    def _below(self, i: int, gene: Gene) -> list[int]:
        """Return which of the axes that hang on one are active where it has a value."""
        conditions = ((j, self._axes[j].active_if) for j in self._hanging[i])
        return [j for j, condition in conditions if condition is not None and gene in condition.options]


class _Walk:
    """The points that are left, and where on the way through all of them it stands."""

    def __init__(self, settings: Grid, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], same=problem.same)
        self._points = Points(problem)
        self._lattice = Lattice(problem.axes, settings.levels or fitting(problem.axes, settings.points))
        size = self._lattice.size
        self._stride = _stride(size)
        start = int.from_bytes(generator(problem.seed, "grid", 0, "start").bytes(size.bit_length() // 8 + 8), "little")
        self._rank = start % size
        self._hope = min(size, MISSES)  # how many more points are tried before the grid counts as exhausted

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return the next points of the grid, none when all were met."""
        wanted = factor * (1 if self._settings.steady else self._settings.batch)
        if not self._hope:
            return []
        spread = [self._lattice.near(genome) for genome in self._points.take(step * wanted, wanted)]
        fresh = [genome for genome in spread if self._seen.add(genome)]
        while len(fresh) < wanted and self._hope:
            genome = self._lattice.at(self._rank)
            self._rank = (self._rank + self._stride) % self._lattice.size
            self._hope -= 1
            if self._seen.add(genome):
                fresh.append(genome)
                self._hope = min(self._lattice.size, MISSES)
        return fresh

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Take them back; they come again at the end."""
        self._seen.drop(genomes)
        self._hope = min(self._lattice.size, MISSES)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Remember what was scored."""
        for result in results:
            self._seen.add(result.genome)

    def revise(self, result: Result) -> None:
        """Nothing: what was scored does not matter."""

    def inject(self, result: Result) -> None:
        """Remember what was scored."""
        self._seen.add(result.genome)


def values(axis: Axis, levels: int) -> tuple[Gene, ...]:
    """Return the values of an axis on a grid: all of a choice or a short integer, else `levels` evenly spread ones."""
    if isinstance(axis, Choice):
        return axis.options
    if not isinstance(axis, Real) and axis.high - axis.low < levels:
        return tuple(range(axis.low, axis.high + 1))
    places = [0.5] if levels == 1 else [i / (levels - 1) for i in range(levels)]
    return tuple(dict.fromkeys(axis.from_unit(place) for place in places))


def fitting(axes: Sequence[Axis], points: int) -> int:
    """Return the greatest number of levels, from 2 up, with which the grid has at most so many points."""
    low, high = 2, max(points, 2)
    while low < high:
        middle = (low + high + 1) // 2
        if Lattice(axes, middle).size <= points:
            low = middle
        else:
            high = middle - 1
    return low


def _stride(size: int) -> int:
    """Return a stride near the golden section of a size that comes by every rank: it shares no divisor with it."""
    stride = max(size * 618_033_988_749_895 // 10**15, 1)
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride

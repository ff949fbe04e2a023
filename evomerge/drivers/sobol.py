"""A scrambled Sobol sequence: genomes that fill the unit cube evenly, and learn nothing."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, serve
from evomerge.genome import Genome, from_unit
from evomerge.value import value


@value
class Sobol:
    """Settings of a Sobol sequence (Sobol 1967; scrambled as in Matousek 1998, "On the L2-discrepancy").

    Each genome falls where the ones before it left most room, so that any number of them is spread over all axes
    together; powers of two are the most even. What the sequence repeats, where axes have few values, is drawn at
    random. With `steady` at most `batch` genomes are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ()

    batch: int = 16
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        return serve(_Sequence(self, problem), problem, self.batch if self.steady else None)


class _Sequence:
    def __init__(self, settings: Sobol, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], same=problem.same)
        self._points = Points(problem)

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return the next of the sequence that are new; random ones for those that are not."""
        wanted = factor * (1 if self._settings.steady else self._settings.batch)
        fresh = [genome for genome in self._points.take(step * wanted, wanted) if self._seen.add(genome)]
        rng = generator(self._problem.seed, "sobol", step, "ask")
        return fresh + self._seen.draw(rng, wanted - len(fresh))

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Forget them; they may be drawn again."""
        self._seen.drop(genomes)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Remember what was scored."""
        for result in results:
            self._seen.add(result.genome)

    def revise(self, result: Result) -> None:
        """Nothing: what was scored does not matter."""

    def inject(self, result: Result) -> None:
        """Remember what was scored."""
        self._seen.add(result.genome)


class Points:
    """A problem's Sobol sequence, from any place on; going on from the last place is what costs least."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._place = 0
        self._points = self._first()

    def take(self, first: int, count: int) -> list[Genome]:
        """Return so many genomes from the place `first` on."""
        if first < self._place:
            self._place, self._points = 0, self._first()
        if first > self._place:
            self._points.fast_forward(first - self._place)
        self._place = first + count
        with warnings.catch_warnings():
            # The balance of the whole sequence is lost if a batch is not a power of two: the user's choice.
            warnings.simplefilter("ignore", UserWarning)
            return [from_unit(self._problem.axes, point) for point in self._points.random(count)]

    def _first(self) -> Any:
        from scipy.stats import qmc

        rng = generator(self._problem.seed, "sobol", 0, "scramble")
        return qmc.Sobol(len(self._problem.axes), rng=rng)

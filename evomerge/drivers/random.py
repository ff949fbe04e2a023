"""Random search: uniform genomes, spread over every axis, that learn nothing."""

from collections.abc import Sequence
from typing import ClassVar

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, serve
from evomerge.genome import Genome
from evomerge.value import value


@value
class Random:
    """Settings of random search; each batch is a Latin hypercube.

    With `steady` at most `batch` genomes are in flight, each drawn by itself.
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
        return serve(_Uniform(self, problem), problem, self.batch if self.steady else None)


class _Uniform:
    def __init__(self, settings: Random, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], same=problem.same)

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return new genomes."""
        wanted = factor * (1 if self._settings.steady else self._settings.batch)
        return self._seen.draw(generator(self._problem.seed, "random", step, "ask"), wanted)

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

"""Random search: uniform genomes, or a scrambled Sobol sequence, that learn nothing."""

import warnings
from collections.abc import Sequence

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.generational import Generational, Seen, generator
from evomerge.genome import Genome, from_unit
from evomerge.objective import Losses
from evomerge.value import value


@value
class Random:
    """Settings of random search; with `sobol` the genomes fill the unit cube evenly."""

    batch: int = 16
    sobol: bool = False

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver."""
        return Generational(_Uniform(self, problem), problem)


class _Uniform:
    def __init__(self, settings: Random, problem: Problem) -> None:
        self._settings = settings
        self._problem = problem
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], same=problem.same)

    def propose(self, generation: int) -> list[Genome]:
        """Return new genomes; what the Sobol sequence repeats after rounding is drawn uniformly."""
        batch = self._settings.batch
        rng = generator(self._problem.seed, "random", generation, "ask")
        even = [genome for genome in self._sobol(generation) if self._seen.add(genome)]
        return even + self._seen.draw(rng, batch - len(even))

    def learn(self, generation: int, genomes: Sequence[Genome], losses: Sequence[Losses | None]) -> None:
        """Remember what was scored."""
        for genome in genomes:
            self._seen.add(genome)

    def revise(self, index: int, losses: Losses | None) -> None:
        """Nothing: what was scored does not matter."""

    def _sobol(self, generation: int) -> list[Genome]:
        if not self._settings.sobol:
            return []
        from scipy.stats import qmc

        axes, batch = self._problem.axes, self._settings.batch
        sequence = qmc.Sobol(len(axes), rng=generator(self._problem.seed, "random", 0, "scramble"))
        if generation > 0:  # scipy overflows on 0
            sequence.fast_forward(generation * batch)
        with warnings.catch_warnings():
            # The balance of the whole sequence is lost if a batch is not a power of two: the user's choice.
            warnings.simplefilter("ignore", UserWarning)
            return [from_unit(axes, point) for point in sequence.random(batch)]

"""Candidates as the trials of an optuna study in memory, for the drivers that draw from one of its samplers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evomerge.drivers.contract import Problem
from evomerge.drivers.seen import Seen, generator
from evomerge.drivers.serving import Result, known
from evomerge.genome import Axis, Choice, Genome, Whole
from evomerge.value import value

#: How often the sampler is asked for a new genome before a random one takes its place.
ATTEMPTS = 8


@value
class Plan:
    """How genomes are drawn from a study.

    Attributes:
        name: of the driver, which names its random numbers.
        batch: how many genomes are drawn at a time.
        startup: genomes are random until so many candidates are scored, known ones included.
        sampler: gives optuna's sampler for a seed; it is asked for each genome anew, so that no state is lost.
    """

    name: str
    batch: int
    startup: int
    sampler: Callable[[int], Any]


class Study:
    """A strategy: scored genomes are complete trials, those in flight running ones, which samplers keep away from."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        self._plan = plan
        self._problem = problem
        self._names = [axis.name for axis in problem.axes]
        self._distributions = {axis.name: _distribution(axis) for axis in problem.axes}
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._results: list[Result] = []
        self._worst: list[float] = []  # the greatest loss so far in every objective, once one is known
        self._flying: dict[Genome, int] = {}  # the number of the running trial
        self._stale = False  # whether losses were revised that the study still has as they were
        self._study = self._open()
        for result in known(problem):
            self._add(result)

    def propose(self, step: int, factor: int = 1) -> list[Genome]:
        """Return a batch of new genomes."""
        rng = generator(self._problem.seed, self._plan.name, step, "ask")
        wanted = factor * self._plan.batch
        if sum(result.losses is not None for result in self._results) < self._plan.startup:
            return self._seen.draw(rng, wanted)
        if self._stale:
            self._rebuild()
        fresh: list[Genome] = []
        while len(fresh) < wanted:
            genome = self._sample(rng)
            if genome is None:
                break
            fresh.append(genome)
        return fresh

    def drop(self, genomes: Sequence[Genome]) -> None:
        """Take running trials back."""
        self._seen.drop(genomes)
        for genome in genomes:
            self._end(genome)

    def learn(self, step: int, results: Sequence[Result]) -> None:
        """Complete the trials; a failure counts as bad as the worst seen so far in every objective.

        optuna would leave failures out, and so propose the same region again and again.
        """
        for result in results:
            self._seen.add(result.genome)
            self._add(result)

    def revise(self, result: Result) -> None:
        """Change what a genome loses; optuna does not let go of what it was told, so the study is built anew."""
        for i, one in enumerate(self._results):
            if one.index == result.index and one.losses != result.losses:
                self._results[i] = replace(one, losses=result.losses)
                self._stale = True

    def inject(self, result: Result) -> None:
        """Add a foreign genome."""
        self._seen.add(result.genome)
        self._add(result)

    def _open(self) -> Any:
        import optuna

        # optuna announces every study on stderr, and warns of speed without the package greenlet.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(directions=["minimize"] * self._problem.objectives)

    def _rebuild(self) -> None:
        results, flying = self._results, list(self._flying)
        self._results, self._worst, self._flying, self._stale = [], [], {}, False
        self._study = self._open()
        for result in results:
            self._add(result)
        for genome in flying:
            self._run(genome)

    def _add(self, result: Result) -> None:
        """Complete the running trial of a genome, or where it is another genome than was asked, add a trial."""
        import optuna

        self._results.append(result)
        if result.losses is not None:
            losses = result.losses
            self._worst = list(map(max, losses, self._worst)) if self._worst else list(losses)
        values = list(result.losses) if result.losses is not None else self._worst
        if result.genome == result.proposed and result.genome in self._flying and values:
            self._study.tell(self._flying.pop(result.genome), values)
            return
        self._end(result.proposed)
        if values:
            self._study.add_trial(
                optuna.trial.create_trial(
                    values=values, params=self._parameters(result.genome), distributions=self._distributions
                )
            )

    def _run(self, genome: Genome) -> None:
        """Add a running trial."""
        import optuna

        self._flying[genome] = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=self._parameters(genome),
                distributions=self._distributions,
            )
        )

    def _end(self, genome: Genome) -> None:
        import optuna

        if genome in self._flying:
            self._study.tell(self._flying.pop(genome), state=optuna.trial.TrialState.FAIL)

    def _sample(self, rng: np.random.Generator) -> Genome | None:
        """Return a new genome of the sampler, else a random one, else None; its trial is running."""
        import optuna

        for _ in range(ATTEMPTS):
            with warnings.catch_warnings():
                # Arguments are pinned that are experimental in optuna, because their defaults change.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.sampler = self._plan.sampler(int(rng.integers(2**32)))
            trial = self._study.ask(self._distributions)
            genome = self._genome(trial.params)
            if self._seen.add(genome):
                self._flying[genome] = trial.number
                return genome
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        for genome in self._seen.draw(rng, 1):
            self._run(genome)
            return genome
        return None

    def _parameters(self, genome: Genome) -> dict[str, Any]:
        return dict(zip(self._names, genome, strict=True))

    def _genome(self, parameters: Mapping[str, Any]) -> Genome:
        return tuple(parameters[name] for name in self._names)


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if isinstance(axis, Choice):
        return distributions.CategoricalDistribution(axis.options)
    if isinstance(axis, Whole):
        return distributions.IntDistribution(axis.low, axis.high, log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)

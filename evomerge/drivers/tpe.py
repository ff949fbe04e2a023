"""Tree-structured Parzen estimators for one or several objectives: optuna on a study in memory."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.generational import Generational, Seen, generator
from evomerge.genome import Axis, Choice, Genome, Whole
from evomerge.objective import Losses
from evomerge.value import value

#: How often the sampler is asked for a new genome before a random one takes its place.
ATTEMPTS = 8


@value
class Tpe:
    """Settings of TPE (Ozaki et al. 2020, "Multiobjective tree-structured Parzen estimator").

    Genomes are random until `startup` candidates are scored, known ones included. Then each batch
    is drawn from one model, with every genome already in the batch taken as bad ("constant liar"),
    so that a batch spreads. `multivariate` models axes jointly.
    """

    batch: int = 8
    startup: int = 16
    multivariate: bool = True

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("startup", self.startup, 2)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver that has learned from the known genomes."""
        return Generational(_Parzen(self, problem), problem)


class _Parzen:
    """The study: scored genomes as complete trials, the batch in flight as running ones."""

    def __init__(self, settings: Tpe, problem: Problem) -> None:
        import optuna

        self._settings = settings
        self._problem = problem
        self._names = [axis.name for axis in problem.axes]
        self._distributions = {axis.name: _distribution(axis) for axis in problem.axes}
        self._seen = Seen(problem.axes, [genome for genome, _ in problem.known], problem.draw, problem.same)
        self._scored: list[Losses] = []
        self._open: list[int] = []
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # optuna announces every study on stderr
        self._study = optuna.create_study(directions=["minimize"] * problem.objectives)
        self._add(problem.known)

    def propose(self, generation: int) -> list[Genome]:
        """Return a batch of new genomes."""
        rng = generator(self._problem.seed, "tpe", generation, "ask")
        if len(self._scored) < self._settings.startup:
            return self._seen.draw(rng, self._settings.batch)
        fresh: list[Genome] = []
        while len(fresh) < self._settings.batch:
            genome = self._sample(rng)
            if genome is None:
                return fresh
            fresh.append(genome)
        return fresh

    def learn(self, generation: int, genomes: Sequence[Genome], losses: Sequence[Losses | None]) -> None:
        """Add the results; a failure counts as bad as the worst seen so far in every objective.

        optuna would leave failures out, and so propose the same region again and again.
        """
        import optuna

        # What was scored may differ from what was asked, so the running trials make way for new ones.
        for number in self._open:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)
        self._open = []
        for genome in genomes:
            self._seen.add(genome)
        self._scored += [loss for loss in losses if loss is not None]
        worst = tuple(max(column) for column in zip(*self._scored, strict=True))
        results = [(genome, loss or worst) for genome, loss in zip(genomes, losses, strict=True)]
        self._record(pair for pair in results if pair[1])

    def revise(self, index: int, losses: Losses | None) -> None:
        """Nothing: optuna does not let go of what it was told."""

    def _add(self, known: Iterable[tuple[Genome, Losses]]) -> None:
        pairs = list(known)
        self._scored += [losses for _, losses in pairs]
        self._record(pairs)

    def _record(self, results: Iterable[tuple[Genome, Losses]]) -> None:
        import optuna

        for genome, losses in results:
            self._study.add_trial(
                optuna.trial.create_trial(
                    values=list(losses), params=self._parameters(genome), distributions=self._distributions
                )
            )

    def _sample(self, rng: np.random.Generator) -> Genome | None:
        """Return a new genome of the model, else a random one, else None; it stays in the study as running."""
        import optuna

        for _ in range(ATTEMPTS):
            self._study.sampler = self._sampler(int(rng.integers(2**32)))
            trial = self._study.ask(self._distributions)
            genome = self._genome(trial.params)
            if self._seen.add(genome):
                self._open.append(trial.number)
                return genome
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        drawn = self._seen.draw(rng, 1)
        for genome in drawn:
            self._open.append(len(self._study.get_trials(deepcopy=False)))
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=self._parameters(genome),
                    distributions=self._distributions,
                )
            )
        return drawn[0] if drawn else None

    def _sampler(self, seed: int) -> Any:
        import optuna

        with warnings.catch_warnings():
            # The arguments are experimental in optuna, and pinned here because their defaults change.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=self._settings.multivariate, constant_liar=True
            )

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

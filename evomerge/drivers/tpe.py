"""Tree-structured Parzen estimators for one or several objectives: a sampler of optuna."""

from typing import Any, ClassVar

from evomerge.drivers.contract import Driver, Problem, check_at_least
from evomerge.drivers.serving import serve
from evomerge.drivers.study import Plan, Study
from evomerge.value import value


@value
class Tpe:
    """Settings of TPE (Ozaki et al. 2020, "Multiobjective tree-structured Parzen estimator").

    Genomes are random until `startup` candidates are scored, known ones included. Then each batch
    is drawn from one model, with every genome already in the batch taken as bad ("constant liar"),
    so that a batch spreads. `multivariate` models axes jointly. With `steady` each genome is drawn when a worker is
    free, and at most `batch` are in flight.
    """

    libraries: ClassVar[tuple[str, ...]] = ("optuna",)

    batch: int = 8
    startup: int = 16
    multivariate: bool = True
    steady: bool = False

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("startup", self.startup, 2)

    def generation(self, axes: int) -> int:
        """Return how many genomes are proposed at a time; in steady state, the limit."""
        return self.batch

    def start(self, problem: Problem) -> Driver:
        """Return a fresh driver that has learned from the known genomes."""
        at_a_time = 1 if self.steady else self.batch
        plan = Plan(name="tpe", batch=at_a_time, startup=self.startup, sampler=self._sampler)
        return serve(Study(plan, problem), problem, self.batch if self.steady else None)

    def _sampler(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=0, multivariate=self.multivariate, constant_liar=True
        )

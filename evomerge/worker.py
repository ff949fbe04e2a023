"""The worker: recipe and items in, responses out, in one process with one live model."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import TaskError, nearest
from evomerge.evaluation import Response, Task, read_task
from evomerge.pool import Answer, Job, answer_safely
from evomerge.recipe import Source
from evomerge.value import value

#: Bytes of sources from which on compiled lines pay for their compilation (ten seconds or so, once per line), and
#: magnitude tables for their storing.
LARGE = 1 << 28

if TYPE_CHECKING:
    from evomerge.operators.parts import Statistic


@value
class WorkerSetup:
    """What a worker needs to know, as plain values that travel to other processes.

    Attributes:
        template: the model folder that lends config and tokenizer: the base, or the first source.
        sources: the folders of all sources and of the base, by the names that recipes use.
        tasks: tasks, or task files, by name.
        dtype: the dtype that the live model computes in.
        device: a torch device.
        threads: torch threads.
        batch: the most rows of a batch.
        trust_remote_code: whether code in the template's folder may run.
        statistics: the folder where statistics of sources are kept; default: in the user's cache.
        budget: the most bytes of sources on a device that is not the CPU; None: all of them.
    """

    template: Path
    sources: Mapping[str, Path]
    tasks: Mapping[str, Task | Path]
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    batch: int = 128
    trust_remote_code: bool = False
    statistics: Path | None = None
    budget: int | None = None

    def make(self) -> "ModelWorker":
        """Return a worker; this is what imports torch.

        Raises:
            ModelError, TaskError: if a folder or a task file is broken.
        """
        return ModelWorker(self)


class ModelWorker:
    """Answers jobs with one live model and resident sources.

    The live model is rewritten in place for each candidate, and left alone when the next job asks for the
    recipe that it holds. One worker serves one thread.

    Raises:
        ModelError, TaskError: if a folder or a task file is broken.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        import torch

        torch.set_num_threads(setup.threads)

        from evomerge.evaluation.engine import Engine
        from evomerge.models.materialize import cache_folder
        from evomerge.models.resident import Resident
        from evomerge.operators.fused import Lines, unavailable

        self._device = setup.device
        self._tasks = {
            name: given if isinstance(given, Task) else read_task(given, name) for name, given in setup.tasks.items()
        }
        self._sources = Resident(setup.sources, setup.device, setup.budget)
        self._engine = Engine(
            setup.template, setup.dtype, setup.device, setup.batch, trust_remote_code=setup.trust_remote_code
        )
        self._live: str | None = None
        self._held: Mapping[str, str] | None = None
        large = self._sources.bytes > LARGE
        if large:
            self._sources.store(cache_folder("tables"), _say)
        why = unavailable() if large else None
        if why is not None:
            _say(f"lines are run plainly, which is slower for large models: {why}")
        self._lines = Lines() if large and why is None else None
        self._told = False
        self._setup = setup
        self._statistics: dict[Source | None, Statistic] = {}

    def answer(self, job: Job) -> Answer:
        """Build the job's candidate and ask it; what goes wrong with it is in the answer's `error`."""
        return answer_safely(self.ask, job)

    def ask(self, job: Job) -> Answer:
        """Build the job's candidate and ask it.

        Raises:
            CandidateError: if it cannot be built or scored.
            RecipeError, ModelError, TaskError: if job and worker do not fit.
        """
        start = time.monotonic()
        for name in job.items:
            if name not in self._tasks:
                raise TaskError(f"task {name!r} is not among the worker's; {nearest(name, self._tasks)}")
        self._load(job)
        found = {name: self._ask(name, job.split, items) for name, items in job.items.items()}
        return Answer(
            candidate=job.candidate,
            split=job.split,
            responses={name: tuple(response.value for response in own) for name, own in found.items()},
            margins={name: tuple(margins) for name, own in found.items() if (margins := _margins(own))},
            error=None,
            seconds=time.monotonic() - start,
        )

    def _load(self, job: Job) -> None:
        from evomerge.models.materialize import Blueprint, statistics_for

        digest = job.recipe.digest
        if digest == self._live:
            return
        self._live = None  # a failure on the way leaves a mixture
        if job.recipe.calibration not in self._statistics:
            self._statistics[job.recipe.calibration] = statistics_for(
                job.recipe, self._setup.sources, self._setup.statistics, self._device, self._setup.trust_remote_code
            )
        statistic = self._statistics[job.recipe.calibration]
        before, self._held = self._held, None
        blueprint = Blueprint(job.recipe, self._sources, self._device, statistic, self._lines)
        self._engine.load(blueprint.fill(before))
        self._held = blueprint.keys()
        if self._lines is not None and self._lines.problem and not self._told:
            self._told = True
            _say(f"a line could not be compiled and is run plainly: {self._lines.problem}")
        self._live = digest

    def _ask(self, name: str, split: str, items: tuple[int, ...]) -> list[Response]:
        return self._engine.answer(self._engine.plan(self._tasks[name], split, items))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _margins(responses: list[Response]) -> list[float]:
    return [response.margin for response in responses if response.margin is not None]

"""The worker: recipe and items in, responses out, in one process with one live model."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CandidateError, TaskError, nearest
from evomerge.evaluation import Response, Task, read_task
from evomerge.evaluation.gates import Gates, failures, pass_gates
from evomerge.evaluation.request import Outcome
from evomerge.pool import Answer, Job, answer_safely
from evomerge.recipe import Recipe, Source, copy_of
from evomerge.value import value

#: Bytes of sources from which on compiled lines pay for their compilation (ten seconds or so, once per line), and
#: magnitude tables for their storing.
LARGE = 1 << 28

if TYPE_CHECKING:
    from evomerge.evaluation.prefix import Counts, Course
    from evomerge.models.stack import Stacks
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
        tokens: the most tokens of a batch, rows times length.
        gates: what a merge must pass before its first item.
        trust_remote_code: whether code in the template's folder may run.
        statistics: the folder where statistics of sources are kept; default: in the user's cache.
        budget: the most bytes of sources on a device that is not the CPU; None: all of them.
        models: sources that are recipes themselves, by the names that recipes use; made of `sources`.
        stacked: whether candidates are stacks: made of resident layers, instead of written into one live model.
        prefixes: the most bytes of hidden states that are kept for stacks that begin alike.
    """

    template: Path
    sources: Mapping[str, Path]
    tasks: Mapping[str, Task | Path]
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    batch: int = 128
    tokens: int = 1 << 14
    gates: Gates = field(default_factory=Gates)
    trust_remote_code: bool = False
    statistics: Path | None = None
    budget: int | None = None
    models: Mapping[str, Recipe] = field(default_factory=dict)
    stacked: bool = False
    prefixes: int = 0

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
        from evomerge.evaluation.prefix import Counts, Prefixes
        from evomerge.models.materialize import cache_folder
        from evomerge.models.resident import Resident
        from evomerge.operators.fused import Lines, unavailable

        self._device = setup.device
        self._tasks = {
            name: read_task(given, name, setup.template) if isinstance(given, Path) else given
            for name, given in setup.tasks.items()
        }
        self._sources = Resident(setup.sources, setup.device, setup.budget)
        self._stacks = self._stacks_of(setup)
        self._prefixes, self._counts = Prefixes(setup.prefixes), Counts()
        self._course: Course | None = None
        self._engine = Engine(
            setup.template,
            setup.dtype,
            setup.device,
            setup.batch,
            setup.tokens,
            trust_remote_code=setup.trust_remote_code,
            prepare=None if self._stacks is None else self._stacks.adopt,
            say=_say,
        )
        self._live: str | None = None
        self._passed: str | None = None
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
        self._references: dict[tuple[str, str], list[tuple[Outcome, ...]]] = {}
        self._excused: Mapping[str, str] | None = None

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
        self._refer(job)
        counts = dataclasses.replace(self._counts)
        self._judge(job.recipe, job.branches)
        found = {name: self._ask(name, job.split, items) for name, items in job.items.items()}
        return Answer(
            candidate=job.candidate,
            split=job.split,
            responses={name: tuple(response.value for response in own) for name, own in found.items()},
            margins={name: tuple(margins) for name, own in found.items() if (margins := _margins(own))},
            error=None,
            seconds=time.monotonic() - start,
            layers=self._layers(counts),
        )

    def _layers(self, before: "Counts") -> dict[str, int]:
        """Return the layer passes since then; nothing where candidates are no stacks."""
        if self._stacks is None:
            return {}
        now = vars(self._counts)
        return {name: now[name] - then for name, then in vars(before).items()} | {"bytes": self._prefixes.bytes}

    def _stacks_of(self, setup: WorkerSetup) -> "Stacks | None":
        if not setup.stacked:
            return None
        from evomerge.models.stack import Stacks

        lasting = [recipe.digest for recipe in setup.models.values()]
        return Stacks(setup.template, self._sources, setup.dtype, setup.device, setup.trust_remote_code, lasting)

    def _refer(self, job: Job) -> None:
        """Have what the references of the job's tasks say, in the splits that it asks.

        A source is asked a whole split at once, so that what it says does not depend on the jobs of a worker.
        """
        from evomerge.evaluation.asking import outcomes

        for name in job.items:
            task = self._tasks[name]
            key = (task.fingerprint, job.split)
            if task.reference is None or key in self._references:
                continue
            self._load(self._copy(task.reference, name))
            try:
                everything = range(task.count(job.split))
                self._references[key] = outcomes(self._engine, task, job.split, everything)
            except CandidateError as problem:
                raise TaskError(f"the reference {task.reference!r} cannot answer: {problem}") from None

    def _copy(self, source: str, task: str) -> Recipe:
        """Return the recipe of a source as it is."""
        known = {**self._setup.sources, **self._setup.models}
        if source not in known:
            way_out = nearest(source, known)
            raise TaskError(f"task {task!r}: its reference {source!r} is not among the sources; {way_out}")
        recipe = self._setup.models.get(source)
        path = "" if recipe is not None else str(self._setup.sources[source])
        model = Source(name=source, path=path, recipe=recipe)
        return copy_of(model, self._sources.depth, self._setup.dtype)

    def _judge(self, recipe: Recipe, branches: tuple[int, ...] = ()) -> None:
        """Have a candidate live that has passed the gates.

        A source that does not pass stays in the run, with a warning. What the template does not pass by itself, as a
        model may that was never taught to stop, is no gate for merges.

        Raises:
            CandidateError: if a merge does not pass.
        """
        if recipe.digest == self._passed:
            self._load(recipe, branches)
            return
        gates = self._setup.gates
        first = recipe.sources[0] if recipe.sources else None
        alone = first is not None and first.recipe is None and self._is_copy(recipe, first)
        if self._excused is None:
            self._excused = self._excuses()
        self._load(recipe, branches)
        if alone:
            for reason in failures(self._engine, gates, self._tasks).values():
                _say(f"the source {recipe.sources[0].name} does not pass the gates for merges: {reason}")
        else:
            pass_gates(self._engine, gates, self._tasks, self._excused)
        self._passed = recipe.digest

    def _is_copy(self, recipe: Recipe, source: Source) -> bool:
        return recipe.digest == copy_of(source, self._sources.depth, recipe.dtype).digest

    def _excuses(self) -> Mapping[str, str]:
        """Return the gates that the template does not pass by itself, and say so; weights are never excused."""
        folders = self._setup.sources
        template = next((name for name, folder in folders.items() if folder == self._setup.template), None)
        if template is None or not (self._setup.gates.repetition or self._setup.gates.language):
            return {}
        self._load(self._copy(template, ""))
        found = failures(self._engine, self._setup.gates, self._tasks)
        excused = {name: reason for name, reason in found.items() if name in ("repetition", "language")}
        for name, reason in excused.items():
            _say(f"no gate for {name}: of {template} itself, {reason}")
        return excused

    def _load(self, recipe: Recipe, branches: tuple[int, ...] = ()) -> None:
        from evomerge.models.materialize import Blueprint, statistics_for

        digest = recipe.digest
        if digest == self._live:
            if self._course is not None:
                self._course.branches = branches
            return
        self._live = None  # a failure on the way leaves a mixture
        if recipe.calibration not in self._statistics:
            self._statistics[recipe.calibration] = statistics_for(
                recipe, self._setup.sources, self._setup.statistics, self._device, self._setup.trust_remote_code
            )
        statistic = self._statistics[recipe.calibration]
        if self._stacks is not None:
            self._stack(self._stacks, recipe, statistic, branches)
            self._live = digest
            return
        before, self._held = self._held, None
        blueprint = Blueprint(recipe, self._sources, self._device, statistic, self._lines)
        self._engine.load(blueprint.fill(before))
        self._held = blueprint.keys()
        if self._lines is not None and self._lines.problem and not self._told:
            self._told = True
            _say(f"a line could not be compiled and is run plainly: {self._lines.problem}")
        self._live = digest

    def _stack(self, stacks: "Stacks", recipe: Recipe, statistic: "Statistic", branches: tuple[int, ...]) -> None:
        """Have a stack live, and follow it."""
        from evomerge.evaluation.prefix import Course

        live = stacks.build(recipe, statistic)
        live.watch = self._course = Course(self._prefixes, live.path, self._counts)
        self._course.branches = branches
        self._engine.show(live.model, self._course)

    def _ask(self, name: str, split: str, items: tuple[int, ...]) -> list[Response]:
        from evomerge.evaluation.asking import asked

        task = self._tasks[name]
        known = self._references.get((task.fingerprint, split))
        places = range(len(known or ()))
        if known is None or not all(place in places for place in items):
            return asked(self._engine, task, split, items)
        return asked(self._engine, task, split, items, [known[place] for place in items])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _margins(responses: list[Response]) -> list[float]:
    return [response.margin for response in responses if response.margin is not None]

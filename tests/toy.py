"""A toy experiment without models: responses follow from a recipe's weights by a formula."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.drivers import read_driver
from evomerge.evaluation.gates import Gates
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import Response
from evomerge.experiment import Experiment, ExperimentFile
from evomerge.fitness.registry import read_estimator
from evomerge.fitness.schedule import SCHEDULES
from evomerge.objective import Objective
from evomerge.pool import Answer, Job, WorkerStatus, failure
from evomerge.recipe import Recipe, Source
from evomerge.spaces.blend import BlendSpace, Range
from evomerge.value import digest, plain, value

TASKS = ("left", "right")
SIZES = {"search": 60, "validation": 40, "test": 40}
#: The task without bounds: how long answers are.
LENGTH = "length"
FILE: dict[str, Any] = {
    "name": "toy",
    "seed": 3,
    "models": {"base": "base", "sources": {"a": "a", "b": "b"}},
    "space": {"methods": ["task_arithmetic"]},
    "budget": {"candidates": 24},
    "baselines": {"lambdas": [0.2, 0.5]},
    "finalists": 4,
    "dtype": "float32",
}
#: What marks a driver in steady state.
STEADY = " steady"
#: The drivers' settings, small, so that a run of some dozen candidates has several generations.
SETTINGS: dict[str, dict[str, Any]] = {
    "nsga2": {"population": 8},
    "nsga3": {"population": 8},
    "cma": {},
    "tpe": {"batch": 6},
    "gp": {"batch": 4, "startup": 8},
    "random": {"batch": 6},
    "sobol": {"batch": 4},
    "grid": {"batch": 6},
    "greedy": {"top": 4, "startup": 6},
    "map_elites": {"batch": 4, "startup": 6},
    "m2n2": {"population": 6},
    "portfolio": {"drivers": [{"name": "nsga2", "population": 6}, {"name": "cma"}], "batch": 6, "startup": 6},
    "screened": {"driver": {"name": "nsga2", "population": 6}, "startup": 8},
}


WARMUP: dict[str, Any] = {
    "name": "warmup", "random": 10, "items": 8, "promote": 1, "honest": 1, "every": 2, "elites": 2, "final": 2,
}  # fmt: skip


@value
class ToyTask:
    """A task whose items have a difficulty and no text."""

    name: str
    sizes: Mapping[str, int]
    bounded: bool = True
    direction: str = "maximize"
    reference: str | None = None

    @property
    def fingerprint(self) -> str:
        """The content address."""
        return digest(plain(self))

    def count(self, split: str) -> int:
        """Return the number of items of a split."""
        return self.sizes[split]

    def ids(self, split: str) -> tuple[str, ...]:
        """Return names of the items."""
        return tuple(f"{split}-{place}" for place in range(self.sizes[split]))

    def contents(self, split: str) -> tuple[str, ...]:
        """Return the content addresses of the items."""
        return tuple(digest([self.name, name]) for name in self.ids(split))

    def strata(self, split: str) -> tuple[str, ...]:
        """Return two subtasks by turns."""
        return tuple("even" if place % 2 == 0 else "odd" for place in range(self.sizes[split]))

    def requests(self, split: str, place: int, reference: tuple[Outcome, ...] = ()) -> tuple[Request, ...]:
        """Return one question."""
        return (Request(kind="generate", context=f"{self.name} {split} {place}", most=1),)

    def grade(
        self, split: str, place: int, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...] = ()
    ) -> Response:
        """Return how long the answer is."""
        return Response(value=float(outcomes[0].tokens))

    def cut(self, sizes: Mapping[str, int]) -> "ToyTask":
        """Return the task with fewer items."""
        return replace(self, sizes={**self.sizes, **sizes})


def toy(
    driver: str = "nsga2",
    schedule: Mapping[str, Any] | None = None,
    estimator: Mapping[str, Any] | None = None,
    tasks: tuple[str, ...] = TASKS,
    **changes: Any,
) -> Experiment:
    """Return an experiment on two sources and two tasks (or three); keys of the file can be changed."""
    kind = driver.removesuffix(STEADY)
    settings = {"name": kind, **SETTINGS[kind]} | ({"steady": True} if driver.endswith(STEADY) else {})
    asked = {"schedule": dict(schedule or WARMUP), "estimator": dict(estimator or {"name": "stratified"})}
    named = {"driver": settings, "objectives": [{"task": task} for task in tasks]}
    file = ExperimentFile.model_validate(FILE | named | asked | changes)
    base = Source(name="base", path="base", fingerprint="0")
    sources = tuple(Source(name=name, path=name, fingerprint=name) for name in ("a", "b"))
    given = {key: item for key, item in file.schedule.items() if key != "name"}
    known = {task: _task(task) for task in tasks}
    return Experiment(
        file=file,
        folders={source.name: Path(source.path) for source in (base, *sources)},
        baselines=(base, *sources),
        space=BlendSpace(
            sources=sources,
            base=base,
            depth=2,
            methods=("task_arithmetic",),
            knots=2,
            profile="constant",
            modules=(("attention", "mlp", "other"),),
            weight=Range(low=0.0, high=1.0),
            parameters={},
            dtype="float32",
            seed=file.seed,
        ),
        objectives=tuple(Objective(name=task, direction=own.direction) for task, own in known.items()),
        tasks=known,
        driver=read_driver(settings, "toy"),
        estimator=read_estimator(file.estimator, "toy"),
        schedule=SCHEDULES[file.schedule["name"]](**given),
        gates=Gates(**file.gates.model_dump()),
    )


def quality(recipe: Recipe, task: str) -> float:
    """Return how able a recipe is at a task, on the scale of item difficulties.

    Source a helps at the left and hurts at the right, source b the other way round, and more
    than a weight of one in all hurts both: so there is a front of trade-offs within the space.
    """
    weights = [recipe.route("q.weight", "attention", k).blend.weights for k in range(len(recipe.layers))]
    a = float(np.mean([w.get("a", 0.0) for w in weights]))
    b = float(np.mean([w.get("b", 0.0) for w in weights]))
    gain = 3 * b - a if task == "right" else 3 * a - b
    return gain - 4 * max(0.0, a + b - 1.0)


class ToyWorker:
    """Answers from `quality` and the items' difficulties; counts what it was asked.

    Args:
        fail: returns the reason why a job has no answer, or None.
        pause: seconds that each job takes.
        margins: whether answers have margins.
    """

    def __init__(
        self, fail: Callable[[Job], str | None] = lambda job: None, pause: float = 0.0, margins: bool = False
    ) -> None:
        self.jobs: list[Job] = []
        self._fail = fail
        self._pause = pause
        self._margins = margins

    def answer(self, job: Job) -> Answer:
        """Return responses of 0 and 1 (any number for the task without bounds), the same for the same items."""
        self.jobs.append(job)
        time.sleep(self._pause)
        reason = self._fail(job)
        if reason is not None:
            return failure(job, reason, 0.0)
        above = {task: _above(job, task) for task in job.items}
        return Answer(
            candidate=job.candidate,
            split=job.split,
            responses={t: tuple(20 + m if t == LENGTH else float(m > 0) for m in own) for t, own in above.items()},
            margins={task: own for task, own in above.items() if self._margins and task != LENGTH},
            error=None,
            seconds=0.001,
        )


class ShufflingPool:
    """A pool that answers in an order of its own, as several workers would."""

    def __init__(self, worker: ToyWorker, seed: int) -> None:
        self._worker = worker
        self._rng = np.random.default_rng(seed)
        self._jobs: list[Job] = []

    @property
    def room(self) -> int:
        """How many jobs it can start at once."""
        return max(0, 3 - len(self._jobs))

    @property
    def pending(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """Say nothing of them."""
        return ()

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)

    def drain(self) -> list[Answer]:
        """Answer one more, now and then."""
        return [self.wait()] if self._jobs and self._rng.random() < 0.3 else []

    def wait(self) -> Answer:
        """Answer any of the jobs."""
        return self._worker.answer(self._jobs.pop(int(self._rng.integers(len(self._jobs)))))

    def close(self) -> None:
        """Forget the jobs."""
        self._jobs.clear()

    def __enter__(self) -> "ShufflingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _task(name: str) -> ToyTask:
    if name == LENGTH:
        return ToyTask(name=name, sizes=SIZES, bounded=False, direction="minimize")
    return ToyTask(name=name, sizes=SIZES)


def _above(job: Job, task: str) -> tuple[float, ...]:
    """Return by how much a candidate's ability is above each item's difficulty."""
    ability = quality(job.recipe, task)
    return tuple(ability - difficulty(task, job.split, place) for place in job.items[task])


def difficulty(task: str, split: str, item: int) -> float:
    """Return an item's difficulty, spread evenly over [-2, 2]."""
    key = hashlib.sha256(f"{task} {split} {item}".encode()).digest()
    return int.from_bytes(key[:4], "big") / 2**32 * 4 - 2

"""A toy experiment without models: responses follow from a recipe's weights by a formula."""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.drivers import DRIVERS
from evomerge.evaluation.task import Item, Task
from evomerge.experiment import Experiment, ExperimentFile
from evomerge.objective import Objective
from evomerge.pool import Answer, Job, failure
from evomerge.recipe import Recipe, Source
from evomerge.spaces.blend import BlendSpace, Range

TASKS = ("left", "right")
SIZES = {"search": 60, "validation": 40, "test": 40}
FILE: dict[str, Any] = {
    "name": "toy",
    "seed": 3,
    "models": {"base": "base", "sources": {"a": "a", "b": "b"}},
    "space": {"methods": ["task_arithmetic"]},
    "objectives": [{"task": task} for task in TASKS],
    "budget": {"candidates": 24},
    "baselines": {"lambdas": [0.2, 0.5]},
    "finalists": 4,
    "dtype": "float32",
}


def toy(driver: str = "nsga2", estimator: Mapping[str, Any] | None = None, **changes: Any) -> Experiment:
    """Return an experiment on two sources and two tasks; keys of the file can be changed."""
    settings = {"nsga2": {"population": 8}, "tpe": {"batch": 6}, "random": {"batch": 6}, "cma": {}}[driver]
    few = dict(estimator or {"name": "p_irt", "anchors": 8, "warmup": 10})
    file = ExperimentFile.model_validate(FILE | {"driver": {"name": driver}, "estimator": few} | changes)
    base = Source(name="base", path="base", fingerprint="0")
    sources = tuple(Source(name=name, path=name, fingerprint=name) for name in ("a", "b"))
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
        objectives=tuple(Objective(name=task) for task in TASKS),
        tasks={task: _task(task) for task in TASKS},
        driver=DRIVERS[driver](**settings),
    )


def quality(recipe: Recipe, task: str) -> float:
    """Return how able a recipe is at a task, on the scale of item difficulties.

    Source a helps at the left and hurts at the right, source b the other way round, and more
    than a weight of one in all hurts both: so there is a front of trade-offs within the space.
    """
    weights = [recipe.route("q.weight", "attention", k).blend.weights for k in range(len(recipe.layers))]
    a = float(np.mean([w.get("a", 0.0) for w in weights]))
    b = float(np.mean([w.get("b", 0.0) for w in weights]))
    gain = 3 * a - b if task == "left" else 3 * b - a
    return gain - 4 * max(0.0, a + b - 1.0)


class ToyWorker:
    """Answers from `quality` and the items' difficulties; counts what it was asked.

    Args:
        fail: returns the reason why a job has no answer, or None.
        pause: seconds that each job takes.
    """

    def __init__(self, fail: Callable[[Job], str | None] = lambda job: None, pause: float = 0.0) -> None:
        self.jobs: list[Job] = []
        self._fail = fail
        self._pause = pause

    def answer(self, job: Job) -> Answer:
        """Return responses of 0 and 1, the same for the same recipe and items."""
        self.jobs.append(job)
        time.sleep(self._pause)
        reason = self._fail(job)
        if reason is not None:
            return failure(job, reason, 0.0)
        responses = {task: _responses(job, task) for task in job.items}
        return Answer(
            candidate=job.candidate, split=job.split, responses=responses, margins={}, error=None, seconds=0.001
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
        return 3

    @property
    def pending(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)

    def wait(self) -> Answer:
        """Answer one of the first three jobs."""
        return self._worker.answer(self._jobs.pop(int(self._rng.integers(min(3, len(self._jobs))))))

    def close(self) -> None:
        """Forget the jobs."""
        self._jobs.clear()

    def __enter__(self) -> "ShufflingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _task(name: str) -> Task:
    splits = {
        split: tuple(Item(id=f"{split}-{i}", prompt=f"{name} {split} {i}", answer="1") for i in range(size))
        for split, size in SIZES.items()
    }
    return Task(name=name, kind="generate", splits=splits, max_new_tokens=1)


def _responses(job: Job, task: str) -> tuple[float, ...]:
    ability = quality(job.recipe, task)
    return tuple(float(ability > difficulty(task, job.split, i)) for i in job.items[task])


def difficulty(task: str, split: str, item: int) -> float:
    """Return an item's difficulty, spread evenly over [-2, 2]."""
    key = hashlib.sha256(f"{task} {split} {item}".encode()).digest()
    return int.from_bytes(key[:4], "big") / 2**32 * 4 - 2

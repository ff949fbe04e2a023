"""Measures what workers and the driver's own work cost: two workers against one, idle workers, overhead, and resuming.

    workers   candidates a second of two workers and of one, on the quickstart's models, in turns in one run
    idle      the share of their time in which 16 simulated workers of 100 ms a candidate have nothing to do, while the
              driver has proposed between a fifth and four fifths of its candidates
    overhead  seconds of the driver's process for each candidate of a search, without those of a simulated worker
    resume    the time from opening the ledger of as many candidates to the first event that is new

The last three search a space of sums of task vectors whose candidates are scored by a formula, so that all the time is
the driver's. `--profile` says where it goes.

    python experiments/benchmarks/cluster.py [PART …] [--candidates 10000] [--driver '{name: random}'] [--json]
"""

import argparse
import cProfile
import hashlib
import heapq
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from evomerge.drivers.registry import read_driver
from evomerge.evaluation.gates import Gates
from evomerge.experiment import Experiment, ExperimentFile, load
from evomerge.fitness.registry import read_estimator
from evomerge.fitness.schedule import SCHEDULES
from evomerge.ledger import Asked, Event, Promoted, Told
from evomerge.objective import Objective
from evomerge.pool import Answer, Job, RayPool, WorkerStatus, idle_share
from evomerge.recipe import Recipe, Source
from evomerge.search import Search, prepare
from evomerge.spaces.blend import BlendSpace, Range
from evomerge.value import digest, plain, value
from evomerge.worker import WorkerSetup

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "experiments/quickstart.yaml"
PARTS = ("workers", "idle", "overhead", "resume")

#: What was asked for.
SPEEDUP, IDLE, OVERHEAD, RESUME = 1.7, 0.10, 0.020, 20.0

WORKERS, SECONDS = 16, 0.1
SOURCES, TASKS, ITEMS = ("a", "b", "c"), ("left", "right"), 30
SIZES = {"search": 120, "validation": 60, "test": 60}


def main() -> int:
    """Measure what is wanted, print it, and return 1 if something is not as good as was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--candidates", type=int, default=10_000, help="of the searches for overhead and resume")
    parser.add_argument("--driver", type=yaml.safe_load, default={"name": "nsga2", "population": 20, "steady": True})
    parser.add_argument("--schedule", type=yaml.safe_load, default={"name": "fixed", "items": ITEMS})
    parser.add_argument("--seconds", type=float, default=20.0, help="of the search with simulated workers, or so")
    parser.add_argument("--profile", action="store_true", help="say where the driver's time goes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*PARTS}:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parts = options.parts or PARTS
    found: dict[str, Any] = {"driver": options.driver, "schedule": options.schedule}
    profile = cProfile.Profile() if options.profile else None
    with tempfile.TemporaryDirectory() as folder:
        if "workers" in parts:
            found["workers"] = _workers()
        if "idle" in parts:
            found["idle"] = _idle(options, Path(folder) / "idle")
        if "overhead" in parts or "resume" in parts:
            found |= _driving(options, Path(folder) / "long", profile)
    found["holds"] = all(found[part]["holds"] for part in parts)
    if options.json:
        print(json.dumps(found))
    else:
        for part in parts:
            print(f"{part:9}{_line(found[part])}")
    if profile is not None:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
    return 0 if found["holds"] else 1


def _line(row: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{name} {amount:.4g}" for name, amount in row.items() if name != "holds")
    return f"{'' if row['holds'] else 'NOT AS ASKED: '}{numbers}"


# Two workers against one.


def _workers(rounds: int = 6, each: int = 24) -> dict[str, Any]:
    """Return the candidates a second of two workers and one, by turns, and the median of the ratios of neighbours."""
    experiment = load(QUICKSTART)
    setup = WorkerSetup(
        template=experiment.template, sources=experiment.folders, tasks=experiment.tasks, gates=experiment.gates
    )
    rng = np.random.default_rng(0)
    number = 0

    def rate(pool: RayPool, count: int) -> float:
        """Have as many candidates answered; the clock starts when every worker is at work and ends with the last."""
        nonlocal number
        for _ in range(count):
            number += 1
            recipe = experiment.space.decode(experiment.space.sample(rng))
            items = {task: places[:160] for task, places in experiment.items("search").items()}
            pool.submit(Job(candidate=number, recipe=recipe, split="search", items=items))
        start = time.perf_counter()
        while pool.pending:
            answer = pool.wait()
            if answer.error is not None:
                raise SystemExit(f"candidate {answer.candidate} failed: {answer.error}")
        return count / (time.perf_counter() - start)

    one_rates, two_rates = [], []
    # Ray books next to nothing, so that both pools fit: those who have no job take no time.
    with RayPool(setup.make, 1, cpus=0.1) as one, RayPool(setup.make, 2, cpus=0.1) as two:
        rate(one, 4)
        while sum(worker.done > 1 for worker in two.workers) < 2:
            rate(two, 4)
        for _ in range(rounds):
            one_rates.append(rate(one, each // 2))
            two_rates.append(rate(two, each))
    ratio = statistics.median(two / one for one, two in zip(one_rates, two_rates, strict=True))
    return {
        "one": statistics.median(one_rates),
        "two": statistics.median(two_rates),
        "ratio": ratio,
        "holds": ratio >= SPEEDUP,
    }


# The driver alone.


def _idle(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return how idle simulated workers are in the middle of a search."""
    candidates = round(options.seconds * WORKERS / SECONDS)
    experiment = _experiment(options.driver, options.schedule, candidates)
    pool = SimulatedPool(WORKERS, SECONDS)
    marks: list[tuple[WorkerStatus, ...]] = []
    proposed = 0

    def watch(event: Event, replayed: bool) -> None:
        nonlocal proposed
        proposed += isinstance(event, Asked) and event.origin == "search"
        if isinstance(event, Asked) and proposed in (candidates // 5, 4 * candidates // 5):
            marks.append(pool.workers)

    with prepare(experiment, folder) as record:
        Search(experiment, record, pool, watch).run()
    early, late = marks[0], marks[-1]
    busy, seconds = (
        sum(getattr(worker, name) for worker in late) - sum(getattr(worker, name) for worker in early)
        for name in ("busy", "seconds")
    )
    share = 1 - busy / seconds
    return {"candidates": candidates, "idle": share, "whole run": idle_share(pool.workers), "holds": share < IDLE}


def _driving(options: argparse.Namespace, folder: Path, profile: cProfile.Profile | None) -> dict[str, Any]:
    """Return what a long search costs the driver, and how long it takes to go on with it."""
    experiment = _experiment(options.driver, options.schedule, options.candidates)
    pool = SimulatedPool(WORKERS, 0.0)
    done: list[float] = []  # the driver's seconds when the candidates were told, one by one

    def watch(event: Event, replayed: bool) -> None:
        if isinstance(event, Told):
            done.append(time.perf_counter() - start - pool.spent)

    if profile is not None:
        profile.enable()
    start = time.perf_counter()
    with prepare(experiment, folder) as record:
        Search(experiment, record, pool, watch).run()
    if profile is not None:
        profile.disable()
    tenth = max(1, len(done) // 10)
    mean = done[-1] / len(done)
    overhead = {
        "candidates": options.candidates,
        "seconds each": mean,
        "the first tenth": done[tenth - 1] / tenth,
        "the last tenth": (done[-1] - done[-tenth - 1]) / tenth,
        "holds": mean < OVERHEAD,
    }
    _cut(folder / "ledger.jsonl")
    return {"overhead": overhead, "resume": _resume(experiment, folder, profile)}


def _cut(ledger: Path) -> None:
    """Cut a ledger back into the search: what is told of its last candidates is lost."""
    lines = ledger.read_bytes().splitlines(keepends=True)
    kind = f'"event":"{Promoted.__name__.lower()}"'.encode()
    end = next((i for i, line in enumerate(lines) if kind in line and b'"split":"validation"' in line), len(lines))
    ledger.write_bytes(b"".join(lines[: end - WORKERS]))


class _New(BaseException):
    """Raised at the first event that was not recorded: the run goes on."""


def _resume(experiment: Experiment, folder: Path, profile: cProfile.Profile | None) -> dict[str, Any]:
    replayed_events = 0

    def watch(event: Event, replayed: bool) -> None:
        nonlocal replayed_events
        replayed_events += replayed
        if not replayed:
            raise _New

    if profile is not None:
        profile.enable()
    start = time.perf_counter()
    try:
        with prepare(experiment, folder) as record:
            Search(experiment, record, SimulatedPool(WORKERS, 0.0), watch).run()
    except _New:
        pass
    seconds = time.perf_counter() - start
    if profile is not None:
        profile.disable()
    return {"events": replayed_events, "seconds": seconds, "holds": seconds < RESUME}


# An experiment without models, and workers that only take time.


@value
class FormulaTask:
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

    def strata(self, split: str) -> tuple[str, ...]:
        """Return no subtasks."""
        return ("",) * self.sizes[split]

    def difficulties(self, split: str) -> np.ndarray:
        """Return the items' difficulties, spread over [-2, 2]."""
        keys = (hashlib.sha256(f"{self.name} {split} {place}".encode()).digest() for place in range(self.count(split)))
        return np.array([int.from_bytes(key[:4], "big") / 2**32 * 4 - 2 for key in keys])


def _experiment(driver: Mapping[str, Any], schedule: Mapping[str, Any], candidates: int) -> Experiment:
    data: dict[str, Any] = {
        "name": "formula",
        "seed": 0,
        "models": {"base": "base", "sources": {name: name for name in SOURCES}},
        "space": {"methods": ["task_arithmetic"]},
        "objectives": [{"task": task} for task in TASKS],
        "driver": driver,
        "budget": {"candidates": candidates},
        "schedule": schedule,
        "finalists": 4,
        "dtype": "float32",
    }
    file = ExperimentFile.model_validate(data)
    base, *sources = (Source(name=name, path=name, fingerprint=name) for name in ("base", *SOURCES))
    return Experiment(
        file=file,
        folders={source.name: Path(source.path) for source in (base, *sources)},
        baselines=(base, *sources),
        space=BlendSpace(
            sources=tuple(sources),
            base=base,
            depth=8,
            methods=("task_arithmetic",),
            knots=2,
            profile="linear",
            modules=(("attention",), ("mlp", "other")),
            weight=Range(low=0.0, high=1.0),
            parameters={},
            dtype="float32",
            seed=0,
        ),
        objectives=tuple(Objective(name=task) for task in TASKS),
        tasks={task: FormulaTask(name=task, sizes=SIZES) for task in TASKS},
        driver=read_driver(driver, "driver"),
        estimator=read_estimator(file.estimator, "estimator"),
        schedule=SCHEDULES[schedule["name"]](**{key: item for key, item in schedule.items() if key != "name"}),
        gates=Gates(),
    )


def _ability(recipe: Recipe, task: str) -> float:
    """Return how able a recipe is: sources help at one task and hurt at the other, and too much of all hurts."""
    weights = [recipe.route("q.weight", "attention", k).blend.weights for k in range(0, 8, 3)]
    weights += [recipe.route("up.weight", "mlp", k).blend.weights for k in range(0, 8, 3)]
    a, b, c = (float(np.mean([own.get(name, 0.0) for own in weights])) for name in SOURCES)
    gain = 3 * a - b + c if task == "left" else 3 * b - a + c
    return gain - 4 * max(0.0, a + b + c - 1.0) - float(np.std([own.get("c", 0.0) for own in weights]))


class SimulatedPool:
    """Workers that answer by a formula when their time is up, by the real clock, in this process.

    As in a pool of processes, a worker that is done gets its next job when the driver looks: at `submit`, `wait` or
    `drain`. `spent` are the seconds in which the driver waited, or an answer was computed for a worker.

    Args:
        count: how many.
        seconds: that each takes for a job.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._free = list(range(count))
        self._running: list[tuple[float, int, Job]] = []
        self._queue: deque[Job] = deque()
        self._answers: deque[Answer] = deque()
        self._done = [0] * count
        self._began = time.perf_counter()
        self._tasks = {task: FormulaTask(name=task, sizes=SIZES) for task in TASKS}
        self._difficulties = {
            (task, split): own.difficulties(split) for task, own in self._tasks.items() for split in SIZES
        }
        self.spent = 0.0

    @property
    def room(self) -> int:
        """How many workers have nothing to do."""
        self._look()
        return max(0, len(self._free) - len(self._queue))

    @property
    def pending(self) -> int:
        """How many jobs are not answered yet."""
        return len(self._queue) + len(self._running) + len(self._answers)

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """How each is doing."""
        now = time.perf_counter()
        left = {number: max(0.0, end - now) for end, number, _ in self._running}
        return tuple(
            WorkerStatus(
                node="simulated",
                pid=number,
                state="busy" if number in left else "idle",
                done=done,
                failures=0,
                busy=done * self._seconds + (self._seconds - left[number] if number in left else 0.0),
                seconds=now - self._began,
            )
            for number, done in enumerate(self._done)
        )

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._queue.append(job)
        self._look()

    def wait(self) -> Answer:
        """Return the next answer."""
        self._look()
        while not self._answers:
            start = time.perf_counter()
            time.sleep(max(0.0, self._running[0][0] - start))
            self.spent += time.perf_counter() - start
            self._look()
        return self._answers.popleft()

    def drain(self) -> list[Answer]:
        """Return the answers that are there."""
        self._look()
        found = list(self._answers)
        self._answers.clear()
        return found

    def close(self) -> None:
        """Forget all jobs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        now = time.perf_counter()
        while self._running and self._running[0][0] <= now:
            _, number, job = heapq.heappop(self._running)
            self._free.append(number)
            self._done[number] += 1
            self._answers.append(self._answer(job))
        while self._queue and self._free:
            end = time.perf_counter() + self._seconds
            heapq.heappush(self._running, (end, self._free.pop(), self._queue.popleft()))

    def _answer(self, job: Job) -> Answer:
        start = time.perf_counter()
        responses = {}
        for task, places in job.items.items():
            above = _ability(job.recipe, task) - self._difficulties[task, job.split][list(places)]
            responses[task] = tuple(map(float, above > 0))
        self.spent += time.perf_counter() - start
        return Answer(
            candidate=job.candidate,
            split=job.split,
            responses=responses,
            margins={},
            error=None,
            seconds=self._seconds,
        )


if __name__ == "__main__":
    sys.exit(main())

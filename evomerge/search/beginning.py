"""The beginning of a run: what identifies it, its folder, its first candidates, its workers."""

import json
import math
import os
import platform
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import yaml

from evomerge import __version__
from evomerge.errors import LedgerError
from evomerge.evaluation.task import SPLITS
from evomerge.experiment import Experiment
from evomerge.fitness.schedule import Warmup
from evomerge.hops import origins
from evomerge.ledger import Event, Ledger, Started
from evomerge.models.architecture import place
from evomerge.models.checkpoint import Checkpoint
from evomerge.pool import InlinePool, Pool, RayPool
from evomerge.recipe import Recipe, copy_of
from evomerge.search.storing import behind_store
from evomerge.spaces.edits import Prior
from evomerge.spaces.proposals import Proposal, baselines, probes, warmup
from evomerge.whole import write_whole
from evomerge.worker import WorkerSetup

#: Libraries whose version decides the course of a run, beside the driver's own.
_LIBRARIES = ("numpy", "scipy", "torch", "transformers", "tokenizers")

#: What to do about a file that could not be written before the first candidate.
_AGAIN = "give the same command again"


def baselines_of(experiment: Experiment) -> list[Proposal]:
    """Return the baselines of an experiment, which always run first."""
    return baselines(experiment.space, experiment.baselines, experiment.file.baselines.lambdas)


def probes_of(experiment: Experiment) -> list[Proposal]:
    """Return the layer probes of an experiment, which run after the baselines; none where no layers are stacked."""
    return probes(experiment.space)


def warmup_of(experiment: Experiment, prior: Prior | None = None) -> list[Proposal]:
    """Return the random genomes that are asked everything, where the schedule has a warm-up.

    Args:
        experiment: what is run.
        prior: what the probes let hope of each layer.
    """
    schedule = experiment.schedule
    count = schedule.random if isinstance(schedule, Warmup) else 0
    return warmup(experiment.space, count, experiment.file.seed, prior)


def versions(experiment: Experiment) -> dict[str, str]:
    """Return the versions that decide the course of a run."""
    libraries = sorted({*_LIBRARIES, *experiment.driver.libraries})
    return {"evomerge": __version__} | {name: version(name) for name in libraries}


def properties(experiment: Experiment, recipe: Recipe) -> dict[str, float]:
    """Return the properties of a model that can be objectives: number of parameters, and of layers."""
    ends, layers = _sizes(experiment.template)
    depths = origins(recipe, len(layers))
    return {"parameters": float(ends + sum(layers[k] for k in depths)), "depth": float(len(depths))}


@lru_cache(maxsize=16)
def _sizes(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Return the numbers of parameters of a model outside its layers, and in each; its files are read once."""
    checkpoint = Checkpoint(folder)
    sizes: Counter[int | None] = Counter()
    for name in checkpoint.names:
        sizes[place(name, checkpoint.depth).layer] += math.prod(checkpoint.shape(name))
    return sizes[None], tuple(sizes[k] for k in range(checkpoint.depth))


def reference(experiment: Experiment) -> tuple[float | None, ...]:
    """Return the reference point of the hypervolume, as far as it is known before the run.

    Zero for a score that is maximised, one for a score that is minimised, and for a property the greatest (or least)
    value among the sources, or that of a stack with one layer more than the space allows, so that each counts. For a
    score without bounds it is the worst among the sources too, which the run finds out: None.
    """
    sources = []
    if any(objective.kind == "property" for objective in experiment.objectives):
        known = [p.recipe for p in baselines_of(experiment) if p.origin == "source"]
        if experiment.stacked:
            source = copy_of(experiment.baselines[0], experiment.space.depth, experiment.file.dtype)
            known += (replace(source, layers=(k,) * (experiment.space.most + 1)) for k in source.layers)
        sources = [properties(experiment, recipe) for recipe in known]
    found: list[float | None] = []
    for objective in experiment.objectives:
        minimised = objective.direction == "minimize"
        if objective.kind == "task":
            bounded = experiment.tasks[objective.name].bounded
            found.append((1.0 if minimised else 0.0) if bounded else None)
        else:
            found.append(max(objective.loss(source[objective.name]) for source in sources))
    return tuple(found)


def started(experiment: Experiment) -> Started:
    """Return the event that begins a run of this experiment."""
    return Started(
        identity=experiment.identity,
        seed=experiment.file.seed,
        objectives=experiment.objectives,
        reference=reference(experiment),
        items={s: {t: len(i) for t, i in experiment.items(s).items()} for s in SPLITS},
        versions=versions(experiment),
        time=now(),
    )


def check_started(first: Event, ours: Started) -> None:
    """Refuse a ledger that another experiment, or other versions, began.

    Raises:
        LedgerError: saying what differs, and the way out.
    """
    if not isinstance(first, Started):
        raise LedgerError("the ledger does not begin with 'started'; restore it, or start the run anew")
    if first.versions != ours.versions:
        names = sorted({*first.versions, *ours.versions})
        changed = [n for n in names if first.versions.get(n) != ours.versions.get(n)]
        detail = ", ".join(f"{n} {first.versions.get(n)} -> {ours.versions.get(n)}" for n in changed)
        raise LedgerError(f"the run was begun with other versions ({detail}); install those, or start another run")
    if first.seed != ours.seed:
        raise LedgerError(f"the run was begun with seed {first.seed}, not {ours.seed}; give it another name")
    if first.identity != ours.identity:
        raise LedgerError(
            f"the run belongs to another experiment ({first.identity}, this one is {ours.identity}): its models, "
            "space, items or settings differ; give the experiment another name, or remove the run's folder"
        )


def open_pool(experiment: Experiment) -> Pool:
    """Return the pool that the experiment asks for, behind its store if it names one."""
    return behind_store(experiment, lambda: _open_workers(experiment))


def setup_of(experiment: Experiment) -> WorkerSetup:
    """Return what each worker of an experiment needs to know."""
    settings = experiment.file.workers
    return WorkerSetup(
        template=experiment.template,
        sources=experiment.folders,
        tasks=experiment.tasks,
        dtype=experiment.file.dtype,
        device=settings.device,
        threads=settings.threads,
        batch=settings.batch,
        tokens=settings.tokens,
        budget=None if settings.resident_gb is None else int(settings.resident_gb * 1e9),
        trust_remote_code=experiment.file.trust_remote_code,
        gates=experiment.gates,
        models={source.name: source.recipe for source in experiment.baselines if source.recipe is not None},
        stacked=experiment.stacked,
        prefixes=int(settings.prefixes_gb * 1e9),
    )


def _open_workers(experiment: Experiment) -> Pool:
    """Return the pool of workers that the experiment asks for; they start with the first job."""
    settings, setup, ray = experiment.file.workers, setup_of(experiment), experiment.file.ray
    if ray is None:
        return InlinePool(setup.make, settings.time_limit)
    return RayPool(
        setup.make,
        ray.actors,
        settings.time_limit,
        gpus=ray.gpus_per_worker,
        cpus=settings.threads if ray.cpus_per_worker is None else ray.cpus_per_worker,
        threads=settings.threads,
        attempts=ray.max_attempts,
        max_failures=ray.max_failures,
        address=ray.address,
    )


def prepare(experiment: Experiment, folder: Path) -> Ledger:
    """Make or reopen the folder of a run and return its ledger, refusing one of another experiment.

    Writes `experiment.yaml` (with absolute references) where there is none yet, and adds this
    session to `environment.json`.

    Raises:
        LedgerError: if the folder belongs to another experiment, or another process has it open.
    """
    record = Ledger(folder / "ledger.jsonl")
    try:
        if record.past:
            check_started(record.past[0], started(experiment))
        else:
            text = yaml.safe_dump(experiment.file.model_dump(mode="json", exclude_none=True), sort_keys=False)
            write_whole(folder / "experiment.yaml", text, _AGAIN, LedgerError)
        _note_session(experiment, folder / "environment.json")
    except BaseException:
        record.close()
        raise
    return record


def _note_session(experiment: Experiment, file: Path) -> None:
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []  # only a diary: a lost one is begun anew
    session = {
        "time": now(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "versions": versions(experiment),
        "workers": experiment.file.workers.model_dump(mode="json"),
        "ray": None if experiment.file.ray is None else experiment.file.ray.model_dump(mode="json"),
    }
    text = json.dumps({"sessions": [*sessions, session]}, indent=2) + "\n"
    write_whole(file, text, _AGAIN, LedgerError)


def now() -> float:
    """Return the time in seconds since 1970, to the millisecond."""
    return round(time.time(), 3)

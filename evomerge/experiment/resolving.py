"""Resolves what an experiment file refers to into values that a search can use."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge import library
from evomerge.drivers import DRIVERS, Settings
from evomerge.errors import ExperimentError, InvalidInput, nearest
from evomerge.evaluation.jsonl import TaskFile, build_task, read_task
from evomerge.evaluation.task import SPLITS, Task
from evomerge.experiment.entries import ExperimentFile, ModelsEntry, ObjectiveEntry, SpaceEntry, SplitsEntry
from evomerge.experiment.reading import one_line, read_file, read_yaml
from evomerge.models.checkpoint import Checkpoint, check_compatible
from evomerge.models.locate import locate
from evomerge.objective import Objective
from evomerge.operators.methods import METHODS, method
from evomerge.recipe import Source
from evomerge.spaces.blend import BlendSpace, ParameterRange, Range
from evomerge.value import digest, parse, plain, value


@value
class Experiment:
    """An experiment with every reference resolved.

    Attributes:
        file: the checked file, with absolute references.
        folders: the folder of every model, the base's included, by name.
        baselines: the models to score as they are, base first.
        space: what is searched.
        objectives: what is optimised, in order.
        tasks: the tasks that are asked, by name, cut to the splits' sizes.
        driver: the settings of the driver.
    """

    file: ExperimentFile
    folders: Mapping[str, Path]
    baselines: tuple[Source, ...]
    space: BlendSpace
    objectives: tuple[Objective, ...]
    tasks: Mapping[str, Task]
    driver: Settings

    @property
    def identity(self) -> str:
        """The content address of all that decides the course of the run; the pool and paths do not count."""
        space = plain(self.space)
        for source in [*space["sources"], *([space["base"]] if space["base"] else [])]:
            del source["path"]
        asked = self.file.model_dump(include={"seed", "budget", "estimator", "baselines", "finalists", "dtype"})
        # The last bits of answers may depend on these; how many workers there are, and where, changes nothing.
        arithmetic = self.file.workers.model_dump(include={"batch", "device", "threads"})
        tasks = {name: task.fingerprint for name, task in self.tasks.items()}
        driver = [type(self.driver).__name__, plain(self.driver)]
        return digest([space, asked, arithmetic, tasks, driver, plain(self.objectives), len(self.baselines)])

    def items(self, split: str) -> dict[str, tuple[int, ...]]:
        """Return all items of a split, by task."""
        return {name: tuple(range(len(task.splits[split]))) for name, task in self.tasks.items()}


def load(path: Path) -> Experiment:
    """Read an experiment file and everything that it refers to; no tensor is read.

    Raises:
        InvalidInput: one line with file, key path and the way out.
    """
    return resolve(read_file(path), path)


def resolve(file: ExperimentFile, path: Path) -> Experiment:
    """Resolve what an experiment file refers to.

    Args:
        file: the checked file.
        path: where it lies; references are relative to it.

    Raises:
        InvalidInput: one line with file, key path and the way out.
    """
    folders = _find_models(file, path)
    checkpoints = _open_models(file, folders, path)
    named = {
        name: Source(name=name, path=str(folders[name]), fingerprint=checkpoint.fingerprint)
        for name, checkpoint in checkpoints.items()
    }
    entry = _find_space(file, path)
    depth = next(iter(checkpoints.values())).depth
    space = _space(entry, file, named, depth, f"{path}: space")
    objectives, tasks, places = _find_objectives(file, path)
    return Experiment(
        file=_absolute(file, folders, entry, places),
        folders=folders,
        baselines=tuple(named.values()),
        space=space,
        objectives=objectives,
        tasks=tasks,
        driver=_driver(file, f"{path}: driver"),
    )


def _find_models(file: ExperimentFile, path: Path) -> dict[str, Path]:
    if len({f"{amount:g}" for amount in file.baselines.lambdas}) < len(file.baselines.lambdas):
        raise ExperimentError(f"{path}: baselines.lambdas: two are equal: {file.baselines.lambdas}; leave one out")
    if "base" in file.models.sources:
        raise ExperimentError(f"{path}: models.sources.base: the name is kept for models.base; rename the source")
    references = ({"base": file.models.base} if file.models.base is not None else {}) | file.models.sources
    found = {}
    for name, reference in references.items():
        place = _model_key(name)
        if "." in name:
            raise ExperimentError(f"{path}: {place}: a source's name must not hold a dot; rename it")
        try:
            found[name] = locate(reference, path.resolve().parent)
        except InvalidInput as problem:
            raise ExperimentError(f"{path}: {place}: {problem}") from None
    return found


def _open_models(file: ExperimentFile, folders: Mapping[str, Path], path: Path) -> dict[str, Checkpoint]:
    """Read the headers of all models and refuse those that cannot be merged."""
    checkpoints = {}
    for name, folder in folders.items():
        try:
            checkpoints[name] = Checkpoint(folder)
        except InvalidInput as problem:
            raise ExperimentError(f"{path}: {_model_key(name)}: {problem}") from None
    try:
        check_compatible(checkpoints.get("base"), {name: checkpoints[name] for name in file.models.sources})
    except InvalidInput as problem:
        raise ExperimentError(f"{path}: models: {problem}") from None
    return checkpoints


def _model_key(name: str) -> str:
    return "models.base" if name == "base" else f"models.sources.{name}"


def _find_space(file: ExperimentFile, path: Path) -> SpaceEntry:
    if isinstance(file.space, SpaceEntry):
        return file.space
    found = library.find("search_spaces", file.space, path, f"{path}: space")
    try:
        return SpaceEntry.model_validate(read_yaml(found))
    except ValidationError as problem:
        raise ExperimentError(one_line(problem, found, SpaceEntry)) from None


def _space(
    entry: SpaceEntry, file: ExperimentFile, named: Mapping[str, Source], depth: int, place: str
) -> BlendSpace:
    base = named.get("base")
    for i, name in enumerate(entry.methods):
        try:
            found = method(name)
        except InvalidInput as problem:
            raise ExperimentError(f"{place}.methods[{i}]: {problem}") from None
        if found.needs_base and base is None:
            raise ExperimentError(f"{place}.methods[{i}]: {name!r} takes task vectors; give models.base")
    parameters = {name: _parameter_range(name, entry, f"{place}.parameters") for name in entry.parameters}
    try:
        return BlendSpace(
            sources=tuple(source for name, source in named.items() if name != "base"),
            base=base,
            depth=depth,
            methods=tuple(entry.methods),
            knots=entry.knots,
            profile=entry.profile,
            modules=tuple(tuple(modules) for modules in entry.modules),
            weight=Range(**entry.weight.model_dump()),
            parameters=parameters,
            dtype=file.dtype,
            seed=file.seed,
        )
    except InvalidInput as problem:
        raise ExperimentError(f"{place}: {problem}") from None


def _parameter_range(name: str, entry: SpaceEntry, place: str) -> ParameterRange:
    bounds = entry.parameters[name]
    methods = tuple(m for m in entry.methods if name in METHODS[m].parameters)
    if not methods:
        known = {parameter for m in entry.methods for parameter in METHODS[m].parameters}
        raise ExperimentError(f"{place}.{name}: no method of the space has it; {nearest(name, sorted(known))}")
    for m in methods:
        limit = METHODS[m].parameters[name]
        low, high = (-math.inf if limit.low is None else limit.low), (math.inf if limit.high is None else limit.high)
        if isinstance(limit.default, str):
            raise ExperimentError(f"{place}.{name}: {m}'s {name} is not a number and has no range; leave it out")
        if not low <= bounds.low <= bounds.high <= high:
            raise ExperimentError(
                f"{place}.{name}: must lie in [{low:g}, {high:g}] for {m}, got [{bounds.low:g}, {bounds.high:g}]"
            )
        if bounds.per_source and not limit.per_source:
            raise ExperimentError(f"{place}.{name}.per_source: {m} has one {name} for all sources; leave it out")
    return ParameterRange(**bounds.model_dump(), methods=methods)


def _find_objectives(
    file: ExperimentFile, path: Path
) -> tuple[tuple[Objective, ...], dict[str, Task], dict[int, str | dict[str, Any]]]:
    objectives: list[Objective] = []
    tasks: dict[str, Task] = {}
    places: dict[int, str | dict[str, Any]] = {}
    for i, entry in enumerate(file.objectives):
        place = f"{path}: objectives.{i}"
        if (entry.task is None) == (entry.property is None):
            raise ExperimentError(f"{place}: give either task or property")
        if entry.task is not None:
            task, places[i] = _find_task(entry, path, place)
            tasks[task.name] = _cut(task, file.splits, place)
            name = task.name
        else:
            name = entry.name or str(entry.property)
            if name != entry.property:
                raise ExperimentError(f"{place}.name: a property keeps its name, {entry.property!r}; leave it out")
        if name in [objective.name for objective in objectives]:
            raise ExperimentError(f"{place}: a second objective {name!r}; give it another name")
        kind, usual = ("task", "maximize") if entry.task is not None else ("property", "minimize")
        direction = entry.direction or usual
        objectives.append(Objective(name=name, kind=kind, direction=direction, weight=entry.weight))
    if not tasks:
        raise ExperimentError(f"{path}: objectives: at least one must be a task")
    return tuple(objectives), tasks, places


def _find_task(entry: ObjectiveEntry, path: Path, place: str) -> tuple[Task, str | dict[str, Any]]:
    if isinstance(entry.task, dict):
        if entry.name is None:
            raise ExperimentError(f"{place}.name: missing; a task that is given in place needs a name")
        data = dict(entry.task)
        if isinstance(data.get("data"), str) and (path.parent / data["data"]).is_file():
            data["data"] = str((path.parent / data["data"]).resolve())
        task = parse(TaskFile, data, f"{place}.task", ExperimentError)
        return build_task(task, entry.name, path.resolve().parent, f"{place}.task"), data
    found = library.find("fitness", str(entry.task), path, f"{place}.task")
    return read_task(found, entry.name), str(found)


def _cut(task: Task, sizes: SplitsEntry, place: str) -> Task:
    """Keep the first items of each split.

    Raises:
        ExperimentError: if a split has fewer items than asked for, or none.
    """
    splits = {}
    for split in SPLITS:
        items = task.splits.get(split, ())
        wanted = getattr(sizes, split)
        if not items or (wanted is not None and wanted > len(items)):
            wants = f"splits.{split} wants {wanted}" if wanted else "at least one is needed"
            raise ExperimentError(f"{place}: task {task.name!r} has {len(items)} {split} items; {wants}")
        splits[split] = items[:wanted]
    return dataclasses.replace(task, splits=splits)


def _driver(file: ExperimentFile, place: str) -> Settings:
    given = dict(file.driver)
    name = given.pop("name", None)
    if name is None:
        raise ExperimentError(f"{place}.name: missing; known: {', '.join(DRIVERS)}")
    if name not in DRIVERS:
        raise ExperimentError(f"{place}.name: unknown driver {name!r}; {nearest(str(name), DRIVERS)}")
    try:
        return parse(DRIVERS[name], given, place, ExperimentError)
    except ExperimentError as problem:
        text = str(problem)
        raise ExperimentError(text if text.startswith(place) else f"{place}: {text}") from None


def _absolute(
    file: ExperimentFile, folders: Mapping[str, Path], space: SpaceEntry, tasks: Mapping[int, str | dict[str, Any]]
) -> ExperimentFile:
    """Return the file with references that mean the same from wherever it is read."""
    models = ModelsEntry(
        base=str(folders["base"]) if file.models.base is not None else None,
        sources={name: str(folders[name]) for name in file.models.sources},
    )
    objectives = [
        entry.model_copy(update={"task": tasks[i]}) if i in tasks else entry
        for i, entry in enumerate(file.objectives)
    ]
    return file.model_copy(update={"models": models, "space": space, "objectives": objectives})

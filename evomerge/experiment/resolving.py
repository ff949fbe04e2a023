"""Resolves what an experiment file refers to into values that a search can use."""

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from evomerge import library
from evomerge.bankfile import files_of, read_bank
from evomerge.drivers import Settings, default_driver, plain_driver, read_driver
from evomerge.errors import ExperimentError, InvalidInput, nearest
from evomerge.evaluation import SPLITS, Task, build_task, read_task
from evomerge.evaluation.gates import Gates
from evomerge.experiment.entries import (
    SPACES,
    BlendEntry,
    ExperimentFile,
    HybridEntry,
    ModelsEntry,
    ObjectiveEntry,
    ParameterEntry,
    SakanaEntry,
    SpaceEntry,
    SplitsEntry,
)
from evomerge.experiment.reading import one_line, read_file, read_yaml
from evomerge.experiment.sources import Models, find_models, leaf_of, pathless
from evomerge.experiment.stacking import hybrid_space, measured, path_space, sakana_space, stackable
from evomerge.experiment.warm import warm_starts
from evomerge.fitness.bank import Prior, prior
from evomerge.fitness.estimator import Estimator
from evomerge.fitness.registry import plain_estimator, read_estimator
from evomerge.fitness.schedule import SCHEDULES, Fixed, Race, Warmup
from evomerge.methods import Method, Parameter, check, method
from evomerge.objective import Objective
from evomerge.recipe import Route, Source
from evomerge.spaces.blend import METHOD_AXIS, NONE, BlendSpace, ParameterRange, Range, Slot
from evomerge.spaces.proposals import Proposal, Space, baselines
from evomerge.value import digest, parse, plain, value

T = TypeVar("T")

#: Estimators that need no candidate that was asked everything.
_ROWLESS = ("auto", "mean", "stratified")

#: The share of the search items that a bank must know.
_LEAST_KNOWN = 0.5

#: Keys of a task that is given in place, which may name a file or folder beside the experiment.
_FILES = ("data", "include_path")

#: The most lines that the slots of a space may make: each is checked before the search.
_MOST_LINES = 4096


@value
class Experiment:
    """An experiment with every reference resolved.

    Attributes:
        file: the checked file, with absolute references.
        folders: the folder of every model, the base's and those of merges among the sources included, by name.
        baselines: the models to score as they are, base first.
        space: what is searched.
        objectives: what is optimised, in order.
        tasks: the tasks that are asked, by name, cut to the splits' sizes.
        driver: the settings of the driver.
        estimator: the settings of the estimator.
        schedule: who is asked how many items, and when.
        gates: what a candidate must pass before its first item.
        bank: what other models answered to the search items, if the experiment names a bank.
        store: the file that keeps every response, if the experiment names one; it decides nothing.
        warm: what is asked beside the baselines before the search begins.
    """

    file: ExperimentFile
    folders: Mapping[str, Path]
    baselines: tuple[Source, ...]
    space: Space
    objectives: tuple[Objective, ...]
    tasks: Mapping[str, Task]
    driver: Settings
    estimator: Estimator
    schedule: Fixed | Warmup | Race
    gates: Gates
    bank: Prior | None = None
    store: Path | None = None
    warm: tuple[Proposal, ...] = ()

    @property
    def identity(self) -> str:
        """The content address of all that decides the course of the run; the pool and paths do not count."""
        space = pathless(plain(self.space))
        asked = self.file.model_dump(include={"seed", "budget", "baselines", "finalists", "dtype"})
        # The last bits of answers may depend on these; how many workers there are, and where, changes nothing.
        arithmetic = self.file.workers.model_dump(include={"batch", "tokens", "device", "threads"})
        tasks = {name: task.fingerprint for name, task in self.tasks.items()}
        named = [[type(one).__name__, plain(one)] for one in (self.schedule, self.gates)]
        bank = None if self.bank is None else [self.bank.digest, self.bank.weight, self.bank.nearest]
        asking = [plain_driver(self.driver), *named, plain_estimator(self.estimator), bank]
        warm = [[one.origin, one.label, one.recipe.digest, plain(one.genome)] for one in self.warm]
        begun = [warm] if warm else []
        return digest([space, asked, arithmetic, tasks, asking, plain(self.objectives), len(self.baselines), *begun])

    @property
    def proposals(self) -> list[Proposal]:
        """All that is asked before the search and has no genome to be found again by: baselines, warm starts."""
        return [*baselines(self.space, self.baselines, self.file.baselines.lambdas), *self.warm]

    @property
    def template(self) -> Path:
        """The folder that lends config and tokenizer: the base's or the first source's."""
        return self.folders[leaf_of(self.space.base or self.space.sources[0])]

    @property
    def stacked(self) -> bool:
        """Whether candidates are stacks of layers."""
        return not isinstance(self.space, BlendSpace)

    def items(self, split: str) -> dict[str, tuple[int, ...]]:
        """Return all items of a split, by task."""
        return {name: tuple(range(task.count(split))) for name, task in self.tasks.items()}


def load(path: Path) -> Experiment:
    """Read an experiment file and everything that it refers to; no tensor is read.

    Raises:
        InvalidInput: one line with file, key path and the way out.
    """
    return resolve(read_file(path), path)


def resolve(file: ExperimentFile, path: Path, stages: Mapping[str, str] | None = None) -> Experiment:
    """Resolve what an experiment file refers to.

    Args:
        file: the checked file.
        path: where it lies; references are relative to it.
        stages: what stands for `run:NAME` where NAME is a stage: the folder of its run, or another reference.

    Raises:
        InvalidInput: one line with file, key path and the way out.
    """
    models = find_models(file, path, stages)
    entry = _find_space(file, path)
    objectives, tasks, places = _find_objectives(file, path, models.template)
    space, entry = _space(entry, file, models, tasks, path)
    estimator, schedule = _asked(file, path)
    bank = _bank(file, path, tasks)
    warm, begun = warm_starts(file, path, models, space, stages or {})
    stacked = not isinstance(space, BlendSpace)
    driver = default_driver(stacked) if file.driver is None else read_driver(file.driver, f"{path}: driver")
    found = {"warm": begun, "driver": plain_driver(driver) if file.driver is None else file.driver}
    return Experiment(
        file=_absolute(file, path, models, entry, places).model_copy(update=found),
        folders=models.folders,
        baselines=tuple(models.named.values()),
        space=space,
        objectives=objectives,
        tasks=tasks,
        driver=driver,
        estimator=estimator,
        schedule=schedule,
        gates=_gates(file, f"{path}: gates"),
        bank=bank,
        store=None if file.store is None else _beside(path, file.store),
        warm=warm,
    )


def tasks_of(path: Path) -> dict[str, Task]:
    """Return the tasks of an experiment file, cut to the splits' sizes; its models need not be there.

    Raises:
        InvalidInput: one line with file, key path and the way out.
    """
    file = read_file(path)
    template = path.resolve().parent / (file.models.base or next(iter(file.models.sources.values())))
    return _find_objectives(file, path, template if template.is_dir() else None)[1]


def _find_space(file: ExperimentFile, path: Path) -> SpaceEntry:
    if not isinstance(file.space, str):
        return file.space
    found = library.find("search_spaces", file.space, path, f"{path}: space")
    data = read_yaml(found)
    kind = data.get("kind", "blend")
    if kind not in SPACES:
        raise ExperimentError(f"{found}: kind: unknown kind {kind!r}; {nearest(str(kind), SPACES)}")
    try:
        return SPACES[kind].model_validate(data)
    except ValidationError as problem:
        raise ExperimentError(one_line(problem, found, SPACES[kind])) from None


def _space(
    entry: SpaceEntry, file: ExperimentFile, models: Models, tasks: Mapping[str, Task], path: Path
) -> tuple[Space, SpaceEntry]:
    """Return the space, and its entry with all that was found out for it."""
    place, depth, calibration = f"{path}: space", models.checkpoint.depth, _calibration(file, path)
    if isinstance(entry, BlendEntry):
        return _blend_space(entry, file, models.named, depth, calibration, place), entry
    try:
        anatomy = stackable(models, file.trust_remote_code)
        if isinstance(entry, SakanaEntry):
            return sakana_space(entry, models, anatomy, file.dtype), entry
        if isinstance(entry, HybridEntry):
            blend = _blend_space(entry.blend, file, models.named, depth, calibration, f"{place}.blend")
            return hybrid_space(entry, blend, models, anatomy), entry
        if entry.matching and not entry.sizes:
            entry = entry.model_copy(update={"sizes": measured(models, tasks, file)})
        return path_space(entry, models, anatomy, file.dtype), entry
    except InvalidInput as problem:
        text = str(problem)
        raise ExperimentError(text if text.startswith(place) else f"{place}: {text}") from None


def _blend_space(
    entry: BlendEntry,
    file: ExperimentFile,
    named: Mapping[str, Source],
    depth: int,
    calibration: Source | None,
    place: str,
) -> BlendSpace:
    base = named.get("base")
    if bool(entry.methods) == bool(entry.slots):
        raise ExperimentError(f"{place}: give either methods or slots")
    slots = entry.slots or {METHOD_AXIS: entry.methods}
    lines = _lines(slots, base is not None, f"{place}.slots" if entry.slots else f"{place}.methods")
    routes = tuple(_route(route, named, f"{place}.routes[{i}]") for i, route in enumerate(entry.routes))
    used = [*lines.values(), *(method(route.blend.method, place) for route in routes)]
    wanting = next((line for line in used if line.statistics), None)
    if wanting is not None and calibration is None:
        kinds = ", ".join(wanting.statistics)
        way = "give `calibration`, a file of texts"
        raise ExperimentError(f"{place}: {wanting.name} takes statistics ({kinds}); {way}")
    parameters = {name: _parameter_range(name, entry, slots, lines, f"{place}.parameters") for name in entry.parameters}
    try:
        return BlendSpace(
            sources=tuple(source for name, source in named.items() if name != "base"),
            base=base,
            depth=depth,
            methods=tuple(entry.methods),
            slots=tuple(Slot(name=name, options=tuple(options)) for name, options in entry.slots.items()),
            knots=entry.knots if isinstance(entry.knots, int) else tuple(entry.knots),
            profile=entry.profile,
            modules=tuple(tuple(modules) for modules in entry.modules),
            weight=_weights(entry, f"{place}.weight"),
            parameters=parameters,
            routes=routes,
            dtype=file.dtype,
            seed=file.seed,
            calibration=calibration,
            per_knot=entry.per_knot,
            first=entry.start,
        )
    except InvalidInput as problem:
        text = str(problem)
        raise ExperimentError(text if text.startswith(place) else f"{place}: {text}") from None


def _weights(entry: BlendEntry, place: str) -> Range:
    """Return the bounds of the weights; methods that they are for must be among the space's."""
    for name in entry.weight.methods:
        if name not in entry.methods:
            known = nearest(name, entry.methods)
            raise ExperimentError(f"{place}.methods: {name!r} is no method of the space; {known}")
    return Range(**entry.weight.model_dump() | {"methods": tuple(entry.weight.methods)})


def _calibration(file: ExperimentFile, path: Path) -> Source | None:
    if file.calibration is None:
        return None
    from evomerge.models.statistics import digest_of

    texts = path.parent / file.calibration
    try:
        return Source(name="calibration", path=str(texts.resolve()), fingerprint=digest_of(texts))
    except InvalidInput as problem:
        raise ExperimentError(f"{path}: calibration: {problem}") from None


def _route(given: Mapping[str, Any], named: Mapping[str, Source], place: str) -> Route:
    route = parse(Route, given, place, ExperimentError)
    sources = [name for name in named if name != "base"]
    for name in route.blend.weights:
        if name not in sources:
            raise ExperimentError(f"{place}.blend.weights.{name}: no source is called so; {nearest(name, sources)}")
    try:
        check(route.blend.method, route.blend.weights, route.blend.parameters, f"{place}.blend", "base" in named)
    except InvalidInput as problem:
        raise ExperimentError(str(problem)) from None
    return route


def _lines(slots: Mapping[str, list[str]], has_base: bool, place: str) -> dict[tuple[str, ...], Method]:
    """Return the method of every choice of options, so that each is known to be one before the search."""
    count = math.prod(len(options) for options in slots.values())
    if not 1 <= count <= _MOST_LINES:
        raise ExperimentError(f"{place}: {count} lines can be made; every slot needs an option; at most {_MOST_LINES}")
    found = {}
    for i, options in enumerate(product(*slots.values())):
        line = " | ".join(option for option in options if option != NONE)
        where = f"{place}[{i}]" if list(slots) == [METHOD_AXIS] else place
        try:
            found[options] = method(line, where)
        except InvalidInput as problem:
            raise ExperimentError(str(problem)) from None
        if found[options].needs_base and not has_base:
            raise ExperimentError(f"{where}: {line!r} takes task vectors; give models.base")
    return found


def _parameter_range(
    name: str, entry: BlendEntry, slots: Mapping[str, list[str]], lines: Mapping[tuple[str, ...], Method], place: str
) -> ParameterRange:
    given = entry.parameters[name]
    having = {options: found for options, line in lines.items() if (found := line.find(name)) is not None}
    if not having:
        known = {parameter for line in lines.values() for parameter in line.parameters}
        raise ExperimentError(f"{place}.{name}: no method of the space has it; {nearest(name, sorted(known))}")
    for options, parameter in having.items():
        _check_range(given, parameter, " | ".join(options), f"{place}.{name}")
    slot, methods = _owner(slots, lines, set(having), f"{place}.{name}")
    if isinstance(given, ParameterEntry):
        whole = any(parameter.whole for parameter in having.values())
        return ParameterRange(**given.model_dump(), whole=whole, slot=slot, methods=methods)
    if isinstance(given, float):
        return ParameterRange(low=given, high=given, slot=slot, methods=methods)
    return ParameterRange(options=(given,) if isinstance(given, str) else tuple(given), slot=slot, methods=methods)


def _check_range(given: ParameterEntry | float | str | list[str], limit: Parameter, line: str, place: str) -> None:
    """Refuse values that a method would refuse."""
    if not isinstance(given, ParameterEntry):
        if given == []:
            raise ExperimentError(f"{place}: the list is empty; give it a value, or leave it out")
        for each in given if isinstance(given, list) else [given]:
            limit.check(each, place)
        return
    low, high = (-math.inf if limit.low is None else limit.low), (math.inf if limit.high is None else limit.high)
    if isinstance(limit.default, str):
        raise ExperimentError(f"{place}: is a word in {line} and has no range; give one, or a list: {limit.options}")
    if not low <= given.low <= given.high <= high:
        limits = f"[{low:g}, {high:g}]"
        raise ExperimentError(f"{place}: must lie in {limits} for {line}, got [{given.low:g}, {given.high:g}]")
    if limit.whole and (given.low % 1 or given.high % 1):
        raise ExperimentError(f"{place}: is a whole number in {line}, got [{given.low:g}, {given.high:g}]")
    if given.per_source and not limit.per_source:
        raise ExperimentError(f"{place}.per_source: {line} has one value for all sources; leave it out")


def _owner(
    slots: Mapping[str, list[str]], lines: Mapping[tuple[str, ...], Method], having: set[tuple[str, ...]], place: str
) -> tuple[str, tuple[str, ...]]:
    """Return the slot whose choice decides whether the lines have a parameter, and the options with which they do."""
    for i, (slot, options) in enumerate(slots.items()):
        with_it = tuple(option for option in options if any(line[i] == option for line in having))
        if having == {line for line in lines if line[i] in with_it}:
            return slot, with_it
    raise ExperimentError(f"{place}: hangs on more than one slot; name it as stage.parameter")


def _find_objectives(
    file: ExperimentFile, path: Path, template: Path | None
) -> tuple[tuple[Objective, ...], dict[str, Task], dict[int, str | dict[str, Any]]]:
    objectives: list[Objective] = []
    tasks: dict[str, Task] = {}
    places: dict[int, str | dict[str, Any]] = {}
    for i, entry in enumerate(file.objectives):
        place = f"{path}: objectives.{i}"
        if (entry.task is None) == (entry.property is None):
            raise ExperimentError(f"{place}: give either task or property")
        if entry.task is not None:
            task, places[i] = _find_task(entry, path, place, template)
            if task.reference is not None and task.reference not in [*file.models.sources, "base"]:
                known = nearest(task.reference, [*file.models.sources, "base"])
                raise ExperimentError(f"{place}: task {task.name!r} refers to no source {task.reference!r}; {known}")
            tasks[task.name] = _cut(task, file.splits, place)
            name, usual = task.name, task.direction
        else:
            name, usual = entry.name or str(entry.property), "minimize"
            if name != entry.property:
                raise ExperimentError(f"{place}.name: a property keeps its name, {entry.property!r}; leave it out")
        if name in [objective.name for objective in objectives]:
            raise ExperimentError(f"{place}: a second objective {name!r}; give it another name")
        kind = "task" if entry.task is not None else "property"
        direction = entry.direction or usual
        objectives.append(Objective(name=name, kind=kind, direction=direction, weight=entry.weight))
    if not tasks:
        raise ExperimentError(f"{path}: objectives: at least one must be a task")
    return tuple(objectives), tasks, places


def _find_task(
    entry: ObjectiveEntry, path: Path, place: str, template: Path | None
) -> tuple[Task, str | dict[str, Any]]:
    if isinstance(entry.task, dict):
        if entry.name is None:
            raise ExperimentError(f"{place}.name: missing; a task that is given in place needs a name")
        data = dict(entry.task)
        near = path.resolve().parent
        task = build_task(data, entry.name, near, f"{place}.task", template)
        files = [key for key, item in data.items() if isinstance(item, str) and (near / item).exists()]
        return task, data | {key: str((near / data[key]).resolve()) for key in files if key in _FILES}
    found = library.find("fitness", str(entry.task), path, f"{place}.task")
    return read_task(found, entry.name, template), str(found)


def _cut(task: Task, sizes: SplitsEntry, place: str) -> Task:
    """Keep the first items of each split.

    Raises:
        ExperimentError: if a split has fewer items than asked for, or none.
    """
    for split in SPLITS:
        count, wanted = task.count(split), getattr(sizes, split)
        if not count or (wanted is not None and wanted > count):
            wants = f"splits.{split} wants {wanted}" if wanted else "at least one is needed"
            raise ExperimentError(f"{place}: task {task.name!r} has {count} {split} items; {wants}")
    return task.cut({split: size for split in SPLITS if (size := getattr(sizes, split)) is not None})


def _asked(file: ExperimentFile, path: Path) -> tuple[Estimator, Fixed | Warmup | Race]:
    """Return estimator and schedule, and refuse two that do not fit."""
    estimator = read_estimator(file.estimator, f"{path}: estimator")
    kind, given = _kind(file.schedule, SCHEDULES, f"{path}: schedule")
    schedule = _settings(kind, given, f"{path}: schedule")
    rows = file.bank is not None or not isinstance(schedule, Fixed) or schedule.items is None
    if not rows and file.estimator["name"] not in _ROWLESS:
        raise ExperimentError(
            f"{path}: estimator.name: {file.estimator['name']!r} is fitted to candidates that were asked everything, "
            f"and the schedule fixed has none; take {', '.join(_ROWLESS)}, the schedule warmup, or a bank"
        )
    return estimator, schedule


def _bank(file: ExperimentFile, path: Path, tasks: Mapping[str, Task]) -> Prior | None:
    """Read the bank and bring it to the search items; refuse one that knows too few of them."""
    if file.bank is None:
        return None
    place = f"{path}: bank.path"
    try:
        bank = read_bank(path.resolve().parent / file.bank.path)
    except InvalidInput as problem:
        raise ExperimentError(f"{place}: {problem}") from None
    ids = {name: task.ids("search") for name, task in tasks.items() if task.bounded}
    found = prior(bank, ids, file.bank.weight, file.bank.nearest)
    if found.known < _LEAST_KNOWN * found.items or not found.items:
        ours, theirs = next((own[0] for own in ids.values()), "none with bounds"), bank.table.items[0]
        raise ExperimentError(
            f"{place}: {file.bank.path} knows {found.known} of the {found.items} search items, and half are needed; "
            f"its items are called like {theirs!r}, the search's like {ours!r}: give a bank of these, or leave it out"
        )
    return found


def _gates(file: ExperimentFile, place: str) -> Gates:
    try:
        return Gates(**file.gates.model_dump())
    except InvalidInput as problem:
        raise ExperimentError(f"{place}: {problem}") from None


def _kind(given: Mapping[str, Any], known: Mapping[str, type[T]], place: str) -> tuple[type[T], dict[str, Any]]:
    """Return the class that is given by its name, and the other keys."""
    name = given.get("name")
    if name is None:
        raise ExperimentError(f"{place}.name: missing; known: {', '.join(known)}")
    if name not in known:
        kind = place.rpartition(" ")[2]
        raise ExperimentError(f"{place}.name: unknown {kind} {name!r}; {nearest(str(name), known)}")
    return known[name], {key: item for key, item in given.items() if key != "name"}


def _settings(kind: type[T], given: Mapping[str, Any], place: str) -> T:
    try:
        return parse(kind, given, place, ExperimentError)
    except ExperimentError as problem:
        text = str(problem)
        raise ExperimentError(text if text.startswith(place) else f"{place}: {text}") from None


def _absolute(
    file: ExperimentFile,
    path: Path,
    models: Models,
    space: SpaceEntry,
    tasks: Mapping[int, str | dict[str, Any]],
) -> ExperimentFile:
    """Return the file with references that mean the same from wherever it is read."""
    found = models.references
    entry = ModelsEntry(base=found.get("base"), sources={name: found[name] for name in file.models.sources})
    objectives = [
        entry.model_copy(update={"task": tasks[i]}) if i in tasks else entry for i, entry in enumerate(file.objectives)
    ]
    calibration = None if file.calibration is None else str((path.parent / file.calibration).resolve())
    bank = file.bank
    if bank is not None:
        bank = bank.model_copy(update={"path": str(files_of((path.parent / bank.path).resolve())[1])})
    store = None if file.store is None else str(_beside(path, file.store))
    return file.model_copy(
        update={
            "models": entry,
            "space": space,
            "objectives": objectives,
            "calibration": calibration,
            "bank": bank,
            "store": store,
        }
    )


def _beside(path: Path, reference: str) -> Path:
    """Return the file that a reference in an experiment means."""
    return (path.resolve().parent / Path(reference).expanduser()).resolve()

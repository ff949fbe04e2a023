"""The models that an experiment names: folders, models of the hub, and candidates of other runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from evomerge.errors import ExperimentError, InvalidInput, LedgerError
from evomerge.experiment.entries import ExperimentFile
from evomerge.ledger import BASELINES, Asked, Event, Finished, Rescored, read
from evomerge.models.checkpoint import Checkpoint, check_compatible
from evomerge.models.locate import locate
from evomerge.pareto import knee
from evomerge.recipe import Recipe, Source, models_of
from evomerge.spaces.proposals import WARM, recipe_of
from evomerge.value import Plain

#: How a reference to a candidate of a run begins: run:FOLDER, run:FOLDER@best, run:FOLDER@knee or run:FOLDER@17.
RUN = "run:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The models of an experiment.

    Attributes:
        named: base and sources by name; a candidate of another run is a source that is a recipe.
        references: what means the same from wherever it is read, by name.
        folders: of every model that lies in one, those that recipes are made of included, by name.
        checkpoints: what lies there.
    """

    named: Mapping[str, Source]
    references: Mapping[str, str]
    folders: Mapping[str, Path]
    checkpoints: Mapping[str, Checkpoint]

    @cached_property
    def template(self) -> Path:
        """The folder that lends config and tokenizer: of the base, or else of the first source."""
        return self.folders[leaf_of(next(iter(self.named.values())))]

    @property
    def checkpoint(self) -> Checkpoint:
        """What lies in it."""
        return self.checkpoints[leaf_of(next(iter(self.named.values())))]

    @property
    def sources(self) -> tuple[Source, ...]:
        """The models without the base."""
        return tuple(source for name, source in self.named.items() if name != "base")


def leaf_of(source: Source) -> str:
    """Return the name of the model in a folder that stands first in a source: its base, or its first source."""
    while source.recipe is not None:
        source = source.recipe.base or source.recipe.sources[0]
    return source.name


def pathless(form: Plain) -> Plain:
    """Return a plain form in which no source says where it lies; fingerprints say what it is."""
    if isinstance(form, dict):
        source = form.keys() == {field.name for field in dataclasses.fields(Source)}
        return {key: pathless(each) for key, each in form.items() if not (source and key == "path")}
    return [pathless(each) for each in form] if isinstance(form, list) else form


def find_models(file: ExperimentFile, path: Path, stages: Mapping[str, str] | None = None) -> Models:
    """Find the models of an experiment, read their headers, and refuse those that do not fit each other.

    Args:
        file: the checked file.
        path: where it lies.
        stages: what stands for `run:NAME` where NAME is a stage.

    Raises:
        ExperimentError: with the key path and the way out.
    """
    if len({f"{amount:g}" for amount in file.baselines.lambdas}) < len(file.baselines.lambdas):
        raise ExperimentError(f"{path}: baselines.lambdas: two are equal: {file.baselines.lambdas}; leave one out")
    if "base" in file.models.sources:
        raise ExperimentError(f"{path}: models.sources.base: the name is kept for models.base; rename the source")
    given = ({"base": file.models.base} if file.models.base is not None else {}) | file.models.sources
    named: dict[str, Source] = {}
    references: dict[str, str] = {}
    for name, reference in given.items():
        place = _model_key(name)
        if "." in name:
            raise ExperimentError(f"{path}: {place}: a source's name must not hold a dot; rename it")
        try:
            named[name], references[name] = _found(name, staged(reference, stages or {}), path)
        except InvalidInput as problem:
            raise ExperimentError(f"{path}: {place}: {problem}") from None
    folders = _leaves(named, path)
    checkpoints = _open(folders, path)
    named = {name: _printed(source, checkpoints, path) for name, source in named.items()}
    return Models(named=named, references=references, folders=folders, checkpoints=checkpoints)


def staged(reference: str, stages: Mapping[str, str]) -> str:
    """Return what a reference to a stage stands for; any other as it is."""
    stage, at, which = reference.partition("@")
    if stage not in stages:
        return reference
    return stages[stage] + (at + which if stages[stage].startswith(RUN) else "")


def _found(name: str, reference: str, path: Path) -> tuple[Source, str]:
    """Return what a reference means, and the reference that means it from everywhere."""
    near = path.resolve().parent
    if not reference.startswith(RUN):
        folder = locate(reference, near)
        return Source(name=name, path=str(folder)), str(folder)
    folder, which = run_of(reference, near)
    [(event, recipe)] = candidates_of(folder, which or "best")
    return Source(name=name, recipe=recipe), f"{RUN}{folder}@{event.candidate}"


def run_of(reference: str, near: Path) -> tuple[Path, str]:
    """Return the folder of the run that a reference means, and which candidate, where it says so.

    Args:
        reference: run:FOLDER, or run:FOLDER@WHICH.
        near: the folder of the experiment.
    """
    text, _, which = reference.removeprefix(RUN).partition("@")
    places = [near / Path(text).expanduser(), Path(text).expanduser()]
    return next((place.resolve() for place in places if (place / "ledger.jsonl").is_file()), places[0]), which


def candidates_of(folder: Path, which: str) -> list[tuple[Asked, Recipe]]:
    """Return candidates of a run and their recipes.

    Args:
        folder: of the run.
        which: a number; `knee` of the front; `best`, with the least weighted sum of losses on the validation split
            among the merges of the front, and among all of the front where there is no merge; or nothing: all merges
            of the front.

    Raises:
        LedgerError: if there is no such run or candidate, or the run has no front yet.
    """
    from evomerge.experiment.resolving import load  # which reads the models of that run in its turn

    ledger = folder / "ledger.jsonl"
    if not ledger.is_file():
        raise LedgerError(f"{folder}: no run lies here (no ledger.jsonl); give the folder of one, run:runs/quickstart")
    events = read(ledger)
    asked = {event.candidate: event for event in events if isinstance(event, Asked)}
    experiment = load(folder / "experiment.yaml")
    if which.isdecimal():
        if int(which) not in asked:
            raise LedgerError(f"{folder}: has no candidate {int(which)}; give one below {len(asked)}")
        numbers = [int(which)]
    elif which in ("", "best", "knee"):
        front = next((event.front for event in events if isinstance(event, Finished)), ())
        if not front:
            raise LedgerError(f"{folder}: the run has no front yet; finish it, or name a candidate as @NUMBER")
        weights = [objective.weight for objective in experiment.objectives]
        numbers = _chosen(events, asked, front, weights, which)
    else:
        raise LedgerError(f"{folder}@{which}: give a candidate's number, best or knee")
    return [(asked[i], recipe_of(experiment.proposals, experiment.space, asked[i])) for i in numbers]


def _chosen(
    events: Sequence[Event], asked: Mapping[int, Asked], front: Sequence[int], weights: Sequence[float], which: str
) -> list[int]:
    """Return the best, the knee or, where nothing is said, all merges of a front."""
    if not which:
        return [i for i in front if asked[i].origin not in BASELINES]
    made = {i for i, event in asked.items() if event.genome is not None and event.origin != "source"}
    made |= {i for i, event in asked.items() if event.origin in WARM}
    merges = [i for i in front if i in made] or list(front)
    losses = {
        event.candidate: event.losses
        for event in events
        if isinstance(event, Rescored) and event.split == "validation" and event.losses is not None
    }
    matrix = np.array([losses[i] for i in merges])
    return [merges[knee(matrix) if which == "knee" else int((matrix @ np.array(weights)).argmin())]]


def _leaves(named: Mapping[str, Source], path: Path) -> dict[str, Path]:
    """Return the folder of every model that lies in one, by name."""
    found: dict[str, Path] = {}
    for name, source in named.items():
        inside = {name: source} if source.recipe is None else models_of(source.recipe)
        for own, model in inside.items():
            folder = Path(model.path)
            if found.setdefault(own, folder) != folder:
                raise ExperimentError(
                    f"{path}: {_model_key(name)}: {own!r} is {folder} there, and {found[own]} here; rename one"
                )
    return found


def _open(folders: Mapping[str, Path], path: Path) -> dict[str, Checkpoint]:
    """Read the headers of all models and refuse those that cannot be merged."""
    checkpoints = {}
    for name, folder in folders.items():
        try:
            checkpoints[name] = Checkpoint(folder)
        except InvalidInput as problem:
            raise ExperimentError(f"{path}: {_model_key(name)}: {problem}") from None
    try:
        check_compatible(None, checkpoints)
    except InvalidInput as problem:
        raise ExperimentError(f"{path}: models: {problem}") from None
    return checkpoints


def _printed(source: Source, checkpoints: Mapping[str, Checkpoint], path: Path) -> Source:
    """Return a source with the fingerprint of its files; one that is a recipe must still be of the files it was."""
    if source.recipe is None:
        return dataclasses.replace(source, fingerprint=checkpoints[source.name].fingerprint)
    for name, model in models_of(source.recipe).items():
        try:
            model.check(checkpoints[name].fingerprint, "model")
        except InvalidInput as problem:
            raise ExperimentError(f"{path}: {_model_key(source.name)}: {problem}") from None
    return source


def _model_key(name: str) -> str:
    return "models.base" if name == "base" else f"models.sources.{name}"

"""Experiments in stages: one file, several searches in turn, each a run of its own, built on those before it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge.errors import ExperimentError, nearest
from evomerge.experiment.entries import ExperimentFile
from evomerge.experiment.reading import one_line, read_yaml
from evomerge.experiment.resolving import Experiment, resolve
from evomerge.experiment.sources import RUN
from evomerge.value import Plain, value

#: The key that makes an experiment one of stages, and the key of a written one that says where references begin.
STAGES, DIRECTORY = "stages", "directory"

#: The file of a run in stages that says what they are.
FILE = "stages.yaml"


@value
class Stages:
    """An experiment in stages.

    Attributes:
        name: of the whole; the folder of its runs.
        names: of the stages, in order; the folders of their runs, and what `run:NAME` means in later ones.
        files: what each stage is as an experiment file.
        path: where references begin.
        data: what was read, with the folder that references begin in.
    """

    name: str
    names: tuple[str, ...]
    files: tuple[ExperimentFile, ...]
    path: Path
    data: Mapping[str, Plain]

    def load(self, k: int, folder: Path) -> Experiment:
        """Return a stage with everything that it refers to; those before it are finished.

        Args:
            k: which one, from 0.
            folder: of the runs of all stages.

        Raises:
            InvalidInput: one line with file, key path and the way out.
        """
        before = {f"{RUN}{name}": f"{RUN}{(folder / name).resolve()}" for name in self.names[:k]}
        return resolve(self.files[k], self.path, before)

    def check(self, k: int) -> Experiment:
        """Return a stage in which a source of the first stage stands for what those before it will find."""
        models = self.files[0].models
        first = models.base or next(iter(models.sources.values()))
        return resolve(self.files[k], self.path, {f"{RUN}{name}": first for name in self.names[:k]})


def read_stages(path: Path) -> Stages | None:
    """Return the stages of an experiment file; None where it has none.

    Raises:
        ExperimentError: one line with file, key path and the nearest valid name.
    """
    data = read_yaml(path)
    if STAGES not in data:
        return None
    given = data[STAGES]
    shared = {key: each for key, each in data.items() if key not in (STAGES, DIRECTORY)}
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise ExperimentError(f"{path}: {STAGES}: must be a list of mappings, each with a name and its own keys")
    if not isinstance(data.get("name"), str):
        raise ExperimentError(f"{path}: name: missing; it is the folder of the stages' runs")
    names = [str(each.get("name", "")) for each in given]
    if "" in names or len(set(names)) < len(names):
        raise ExperimentError(f"{path}: {STAGES}: each needs a name of its own, got {names}")
    files = [_file(shared | each, path, k, len(given)) for k, each in enumerate(given)]
    for k, file in enumerate(files):
        _check_references(file, names, k, path)
    at = Path(str(data[DIRECTORY])) / path.name if DIRECTORY in data else path
    return Stages(
        name=data["name"],
        names=tuple(names),
        files=tuple(files),
        path=at,
        data={**data, DIRECTORY: str(at.resolve().parent)},
    )


def _file(data: dict[str, Any], path: Path, k: int, count: int) -> ExperimentFile:
    """Return a stage as an experiment file; only the last one exports models, unless it says otherwise."""
    if k < count - 1:
        data = {"export": {"front": "none"}, **data}
    try:
        return ExperimentFile.model_validate(data)
    except ValidationError as problem:
        line = one_line(problem, path, ExperimentFile).removeprefix(f"{path}: ")
        raise ExperimentError(f"{path}: {STAGES}.{k}: {line}") from None


def _check_references(file: ExperimentFile, names: Sequence[str], k: int, path: Path) -> None:
    """Refuse a reference to a stage that is not before this one."""
    for source, reference in file.models.sources.items():
        name = reference.removeprefix(RUN).partition("@")[0]
        if reference.startswith(RUN) and "/" not in name and name not in names[:k]:
            way = nearest(name, names[:k]) if k else "the first stage has none before it"
            raise ExperimentError(f"{path}: {STAGES}.{k}.models.sources.{source}: no stage {name!r} before it; {way}")

"""Warm starts: named methods at their defaults, earlier runs and recipes in files, as proposals of a new run."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

import yaml

from evomerge.errors import ExperimentError, InvalidInput, RecipeError, nearest
from evomerge.experiment.entries import ExperimentFile, WarmEntry, WarmRecipeEntry
from evomerge.experiment.sources import RUN, Models, candidates_of, run_of, staged
from evomerge.genome import Genome, check_genome
from evomerge.methods import check, draws
from evomerge.models import mergekit
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.locate import locate
from evomerge.recipe import Blend, Recipe, Source, from_plain, read, to_yaml
from evomerge.spaces.blend import BlendSpace
from evomerge.spaces.proposals import EARLIER, FILE, METHOD, Proposal, Space, applicable, lacking, named_methods
from evomerge.stages import METHODS


def warm_starts(
    file: ExperimentFile, path: Path, models: Models, space: Space, stages: Mapping[str, str]
) -> tuple[tuple[Proposal, ...], WarmEntry]:
    """Return the warm starts of an experiment, and its entry with all that runs and files held in place of their names.

    So the file of a run says by itself what it began with, whatever becomes of the other run.

    Args:
        file: the checked file.
        path: where it lies; references are relative to it.
        models: the models of the experiment: what is begun with must be made of the same.
        space: what is searched.
        stages: what stands for `run:NAME` where NAME is a stage.

    Raises:
        ExperimentError: one line with file, key path and the way out.
    """
    given, place = file.warm, f"{path}: warm"
    names = _names(given.methods, space, f"{place}.methods")
    found = named_methods(space, names)
    for proposal in _read(given, path, _Reader(models, space), stages):
        same = [one for one in found if (one.origin, one.recipe.digest) == (proposal.origin, proposal.recipe.digest)]
        if not same:
            found.append(replace(proposal, label=_free(proposal.label, [one.label for one in found])))
    recipes = [_entry(one) for one in found if one.origin != METHOD]
    return tuple(found), WarmEntry(methods=names or False, recipes=recipes)


def _names(given: bool | list[str], space: Space, place: str) -> list[str]:
    """Return the named methods that are meant."""
    if isinstance(given, bool):
        return applicable(space) if given else []
    for i, name in enumerate(given):
        if name not in METHODS:
            raise ExperimentError(f"{place}.{i}: unknown method {name!r}; {nearest(name, METHODS)}")
        if name in given[:i]:
            raise ExperimentError(f"{place}.{i}: {name} stands twice; leave one out")
        if missing := lacking(space, name):
            raise ExperimentError(f"{place}.{i}: {name} {missing}")
    return given


def _read(given: WarmEntry, path: Path, reader: "_Reader", stages: Mapping[str, str]) -> Iterator[Proposal]:
    """Yield what stands in place, then what runs found, then what files hold."""
    near = path.resolve().parent
    for i, one in enumerate(given.recipes):
        with _at(f"{path}: warm.recipes.{i}"):
            recipe = reader.fitted(from_plain(one.recipe, "recipe"), near)
            genome = None if one.genome is None else tuple(one.genome)
            yield Proposal(origin=one.origin, label=one.label, genome=reader.genome(genome, recipe), recipe=recipe)
    for i, reference in enumerate(given.runs):
        with _at(f"{path}: warm.runs.{i}"):
            if not reference.startswith(RUN):
                raise ExperimentError(f"{reference!r} is no run; write run:FOLDER, or run:FOLDER@NUMBER")
            meant = staged(reference, stages)
            if not meant.startswith(RUN):
                continue  # a stage that has not run yet, in a check
            folder, which = run_of(meant, near)
            for event, made in candidates_of(folder, which):
                recipe = reader.fitted(made, folder)
                yield Proposal(
                    origin=EARLIER,
                    label=f"run {folder.name} {event.candidate}",
                    genome=reader.genome(event.genome, recipe),
                    recipe=recipe,
                )
    for i, name in enumerate(given.files):
        with _at(f"{path}: warm.files.{i}"):
            at = near / Path(name).expanduser()
            theirs = mergekit.is_mergekit(at)
            recipe = reader.fitted(mergekit.read(at) if theirs else read(at), at.parent, theirs)
            yield Proposal(origin=FILE, label=at.name, genome=None, recipe=recipe)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put a place before what is wrong within a block."""
    try:
        yield
    except InvalidInput as problem:
        raise ExperimentError(f"{place}: {problem}") from None


def _free(label: str, taken: Collection[str]) -> str:
    """Return a label that is not taken, with a number where it was."""
    labels = (label if i == 1 else f"{label} ({i})" for i in count(1))
    return next(each for each in labels if each not in taken)


def _entry(proposal: Proposal) -> WarmRecipeEntry:
    """Return a warm start as an experiment's file has it in place."""
    genome = None if proposal.genome is None else list(proposal.genome)
    recipe = yaml.safe_load(to_yaml(proposal.recipe))
    origin: Literal["earlier", "file"] = "earlier" if proposal.origin == EARLIER else "file"
    return WarmRecipeEntry(label=proposal.label, origin=origin, genome=genome, recipe=recipe)


class _Reader:
    """Brings recipes to the models, the dtype and the axes of an experiment."""

    def __init__(self, models: Models, space: Space) -> None:
        self._models, self._space = models, space

    def genome(self, given: Genome | None, recipe: Recipe) -> Genome | None:
        """Return a genome if this space makes the same recipe of it."""
        if given is None:
            return None
        try:
            check_genome(self._space.axes, given, "genome")
        except RecipeError:
            return None
        return given if self._space.decode(given).digest == recipe.digest else None

    def fitted(self, recipe: Recipe, near: Path, theirs: bool = False) -> Recipe:
        """Return the recipe that makes the same of this experiment's models, in its dtype.

        Args:
            recipe: any, of the same models.
            near: the folder that its paths start from.
            theirs: whether names are not its author's, so that no mask that was scored was drawn by them.

        Raises:
            InvalidInput: if a model is none of this experiment's, or candidates of its space cannot be so.
        """
        recipe = self._renamed(recipe, near, theirs)
        depth = self._space.depth
        layers = recipe.layers or tuple(range(depth))
        each = [{given} if isinstance(given, int) else set(given.values()) for given in layers]
        if isinstance(self._space, BlendSpace) and (recipe.scaled or each != [{k} for k in range(depth)]):
            raise RecipeError(
                f"is a stack of {len(layers)} layers, and candidates of a space of blends have the {depth} of their "
                "sources in order; leave it out, or search a space of stacks"
            )
        return replace(recipe, layers=layers, dtype=self._space.dtype)

    def _renamed(self, recipe: Recipe, near: Path, theirs: bool) -> Recipe:
        """Return a recipe with this experiment's names for its models, and where they lie here."""
        for blend in recipe.blends():
            check(blend.method, blend.weights, blend.parameters, "its recipe", recipe.base is not None)
        models = {one.name: one for one in (*recipe.sources, *([recipe.base] if recipe.base else []))}
        new = {name: self._model(one, near, theirs) for name, one in models.items()}
        names = {name: one.name for name, one in new.items()}
        moved = [name for name, own in names.items() if own != name]
        if moved and not theirs and any(draws(one.method, one.weights, one.parameters) for one in recipe.blends()):
            way = f"call the source {moved[0]!r} here too, not {names[moved[0]]!r}"
            raise RecipeError(f"draws masks by the names of its models; {way}")
        base = None if recipe.base is None else new[recipe.base.name]
        if recipe.tokenizer and base is not None and base.name in [names[one.name] for one in recipe.sources]:
            base = None  # mergekit's, which only lends tokens: all models of a search have the same
        return replace(
            recipe,
            sources=tuple(new[one.name] for one in recipe.sources),
            base=base,
            routes=tuple(replace(route, blend=_called(route.blend, names)) for route in recipe.routes),
            layers=tuple(
                given if isinstance(given, int) else {names[name]: layer for name, layer in given.items()}
                for given in recipe.layers
            ),
            calibration=None if recipe.calibration is None else _texts(recipe.calibration, near),
            tokenizer="",
        )

    def _model(self, source: Source, near: Path, theirs: bool) -> Source:
        """Return a source of a recipe as this experiment has it."""
        if source.recipe is not None:
            return replace(source, recipe=self._renamed(source.recipe, near, theirs))
        checkpoints = self._models.checkpoints
        content = source.fingerprint or Checkpoint(locate(source.path, near)).fingerprint
        names = [name for name, own in checkpoints.items() if own.fingerprint == content]
        if not names:
            raise RecipeError(
                f"its model {source.name!r} ({source.path}) is none of this experiment's, {', '.join(checkpoints)}; "
                "name it among models.sources, or leave this out"
            )
        name = source.name if source.name in names else names[0]
        return Source(name=name, path=str(self._models.folders[name]), fingerprint=content)


def _called(blend: Blend, names: Mapping[str, str]) -> Blend:
    """Return a blend with other names for its sources."""

    def called(given: Mapping[str, float]) -> dict[str, float]:
        return {names[source]: each for source, each in given.items()}

    parameters = {
        name: called(given) if isinstance(given, Mapping) else given for name, given in blend.parameters.items()
    }
    return Blend(method=blend.method, weights=called(blend.weights), parameters=parameters)


def _texts(given: Source, near: Path) -> Source:
    """Return calibration texts with their absolute path, and their fingerprint where the recipe gives none."""
    from evomerge.models.statistics import digest_of

    file = (near / Path(given.path).expanduser()).resolve()
    content = digest_of(file)
    given.check(content, "calibration")
    return replace(given, path=str(file), fingerprint=content)

"""From a recipe and its sources to a stream of tensors: the only place that merges."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evomerge.errors import CandidateError, ModelError, RecipeError
from evomerge.hops import folded
from evomerge.methods import canonical, check, draws, method
from evomerge.models.architecture import Place, place, renamed, split
from evomerge.models.resident import Sources
from evomerge.operators.fused import Lines
from evomerge.operators.parts import DRAWS, Merge, Part, Statistic, no_statistics
from evomerge.operators.tables import Magnitudes
from evomerge.recipe import Blend, Recipe, Source
from evomerge.value import digest, value


@value
class Step:
    """One tensor to build: its name, the layer it stands in, the tensors that it comes from, and how to blend them.

    `origins` gives the tensor of each source whose name differs from `origin`.
    """

    name: str
    origin: str
    blend: Blend
    layer: int | None = None
    origins: Mapping[str, str]

    def of(self, source: str) -> str:
        """Return the name of the tensor that a source (or the base) gives."""
        return self.origins.get(source, self.origin)


def plan(recipe: Recipe, names: Sequence[str], depth: int) -> list[Step]:
    """Return what to build, in order: embedding, layer by layer, head.

    Args:
        recipe: what to build; its layer k takes the tensors of layer `recipe.layers[k]`.
        names: the tensors that every source has.
        depth: the number of layers of every source.

    Raises:
        RecipeError: if a blend is wrong or takes statistics without texts for them, a tensor fits no route, a layer
            takes from one that no source has, or the recipe of a source does not fit.
        ModelError: if a tensor's name has no place in the architecture.
    """
    places = {name: place(name, depth) for name in sorted(names)}
    _check_blends(recipe)
    for source, inner in _inner_recipes(recipe).items():
        try:
            built = {step.name for step in plan(inner, names, depth)}
        except RecipeError as problem:
            raise RecipeError(f"source {source!r}: {problem}") from None
        if built != set(names):
            raise RecipeError(f"source {source!r}: its recipe has another number of layers than the other sources")
    layers = recipe.layers or tuple(range(depth))
    middle = [step for k, given in enumerate(layers) for step in _layer(recipe, places, k, given, depth)]
    first, last = (
        [
            Step(name=name, origin=name, origins={}, blend=recipe.route(name, end, None).blend)
            for name, at in places.items()
            if at.end == end
        ]
        for end in ("embedding", "head")
    )
    return [*first, *middle, *last]


def _check_blends(recipe: Recipe) -> None:
    """Refuse a blend that no tensor could be merged by, and one that takes statistics without texts for them."""
    for i, blend in enumerate(recipe.blends()):
        where = f"recipe.routes[{i}].blend"
        check(blend.method, blend.weights, blend.parameters, where, recipe.base is not None)
        kinds = method(blend.method).statistics
        if kinds and recipe.calibration is None:
            raise RecipeError(
                f"{where}.method: {blend.method} takes statistics ({', '.join(kinds)}); name a file of texts as "
                "`calibration: {name: texts, path: …}`"
            )


def _inner_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipes among sources and base by name; one without texts of its own takes those of the outer one.

    Raises:
        RecipeError: if one names other texts.
    """
    found = {}
    outer = recipe.calibration
    for source in _named(recipe):
        if source.recipe is None:
            continue
        own = source.recipe.calibration
        if own is not None and (outer is None or not _same(own, outer)):
            given = "none" if outer is None else outer.path
            raise RecipeError(
                f"source {source.name!r}: its recipe takes statistics from {own.path}, the outer one from {given}; "
                "give both the same `calibration`"
            )
        found[source.name] = dataclasses.replace(source.recipe, calibration=outer)
    return found


def _same(one: Source, other: Source) -> bool:
    """Tell whether two files have the same content, by what is known of them."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.path == other.path


def _layer(
    recipe: Recipe, places: Mapping[str, Place], k: int, given: int | Mapping[str, int], depth: int
) -> Iterator[Step]:
    """Yield the steps of one layer of the model to build."""
    of = given if isinstance(given, Mapping) else {}
    first = given if isinstance(given, int) else next(iter(of.values()), 0)
    for source, taken in {"": first, **of}.items():
        if not 0 <= taken < depth:
            owner = f" of {source}" if source else ""
            raise RecipeError(f"recipe layer {k} takes from layer {taken}{owner}, but the sources have {depth} layers")
    for name, at in places.items():
        if at.layer == first:
            built = renamed(name, k)
            origins = {source: renamed(name, taken) for source, taken in of.items() if taken != first}
            blend = recipe.route(built, at.group, k).blend
            yield Step(name=built, origin=name, origins=origins, blend=blend, layer=k)


def materialize(
    recipe: Recipe,
    sources: Sources,
    device: str = "cpu",
    statistic: Statistic = no_statistics,
    additions: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Build the model of a recipe as a stream of (name, tensor) in the recipe's dtype.

    The same stream fills a live model and the shards of an export, so that what is shipped is
    what was scored. Every tensor of the sources' layers that the recipe uses, and of both
    ends, comes once. Tensors that are not floating point are copied from the first source.

    Args:
        recipe: what to build.
        sources: where the tensors of all models come from that the recipe names, those of inner recipes too.
        device: where to merge; the tensors come out there.
        statistic: returns the statistics that methods take, by kind, name of the model, and its tensor.
        additions: for recipes with scales, see `evomerge.hops.folded` and `evomerge.models.anatomy`.

    Raises:
        RecipeError, ModelError: at the call, if recipe and sources do not fit.
        CandidateError: while streaming, naming the tensor whose values are not finite.
    """
    return Blueprint(recipe, sources, device, statistic, additions=additions).stream()


def without_scales(recipe: Recipe, names: Sequence[str], additions: Mapping[str, float] | None) -> Recipe:
    """Return the recipe with its scales folded into the tensors that they are folded into; see `evomerge.hops.folded`.

    Args:
        recipe: with scales or without.
        names: the tensors that every source has.
        additions: what layers add is proportional to these; None or none: it is not known.

    Raises:
        RecipeError: if there are scales, and they cannot be folded.
    """
    if not recipe.scaled:
        return recipe
    if not additions:
        raise RecipeError("recipe has scales, but what its layers add to the stream is not known, or cannot be scaled")
    known = {parts[2] for name in names if (parts := split(name)) is not None}
    missing = next((name for name in additions if name not in known), None)
    if missing is not None:
        raise RecipeError(f"recipe has scales, to be folded into {missing!r} of each layer, which is no tensor here")
    return folded(recipe, additions)


def statistics_for(
    recipe: Recipe,
    folders: Mapping[str, Path],
    cache: Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Statistic:
    """Return a lookup of the statistics that a recipe's methods take, computed from its calibration texts when needed.

    Args:
        recipe: what to build.
        folders: the folder of every model, by name.
        cache: where statistics are kept; default: a folder of the user's cache, shared by all runs.
        device: where they are computed.
        trust_remote_code: whether code in the models' folders may run.
        say: takes one line per computation.

    Raises:
        RecipeError: if the texts are not those that the recipe was made with.
        InvalidInput: if they cannot be read.
    """
    if recipe.calibration is None:
        return no_statistics
    from evomerge.models.statistics import Statistics  # transformers behind it is slow to start

    found = Statistics(
        folders,
        Path(recipe.calibration.path),
        cache or cache_folder("statistics"),
        device=device,
        say=say,
        trust_remote_code=trust_remote_code,
    )
    recipe.calibration.check(found.provenance, "calibration")
    return lambda kind, source, tensor: found.tensor(str(source), kind, tensor)


def cache_folder(kind: str) -> Path:
    """Return where the user's cache keeps what is computed from models once: content-addressed, safe to remove."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge" / kind


class Blueprint:
    """A recipe with its sources at hand: what to build, and each of its tensors on demand.

    A source that is itself a recipe is built tensor by tensor as it is read, in the dtype that it declares.

    Args and Raises: see `materialize`.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        device: str = "cpu",
        statistic: Statistic = no_statistics,
        lines: Lines | None = None,
        additions: Mapping[str, float] | None = None,
    ) -> None:
        """Plan the model and answer the questions of its methods about the whole of it."""
        if not _named(recipe):
            raise RecipeError("recipe has neither sources nor a base; name at least one source")
        recipe = without_scales(recipe, sources.names, additions)
        named = _named(recipe)
        self.recipe = recipe
        self._sources, self._device, self._statistic = sources, device, statistic
        self._first = named[0].name
        self._base = None if recipe.base is None else recipe.base.name
        self._steps = {step.name: step for step in plan(recipe, sources.names, sources.depth)}
        self._inner = {
            name: Blueprint(inner, sources, device, statistic, additions=additions)
            for name, inner in _inner_recipes(recipe).items()
        }
        kinds = {name: sources.dtype(self._leaf(), step.of(self._first)) for name, step in self._steps.items()}
        floating = [step for step in self._steps.values() if kinds[step.name].is_floating_point]
        self._merge = Merge(
            [Part(tensor=s.name, blend=s.blend, shape=self._shape(s), layer=s.layer) for s in floating],
            self._read,
            [source.name for source in recipe.sources],
            has_base=self._base is not None,
            depth=len(recipe.layers) or sources.depth,
            seed=recipe.seed,
            statistic=self._known_statistic,
            known=self if sources.kept is not None else None,
            lines=lines,
        )
        self._part_of = {name: part for part in self._merge.parts for name in part.tensors}

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in order: embedding, layers, head."""
        done: set[str] = set()
        for name in self._steps:
            if name in done:
                continue
            for built, tensor in self._build(name):
                done.add(built)
                yield built, tensor

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        return next(tensor for built, tensor in self._build(name) if built == name)

    def _build(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield a tensor, and the one that is merged together with it, if any."""
        if name not in self._part_of:
            yield name, self._of(self._first, self._steps[name].of(self._first)).to(self._device, copy=True)
            return
        dtype = self.recipe.dtype
        for built, merged in self._merge.build(self._part_of[name], getattr(torch, dtype)):
            # A sum takes a fifth of the time of a look at every value, which only one that is not finite calls for.
            if not math.isfinite(float(merged.sum(dtype=torch.float32))) and not bool(torch.isfinite(merged).all()):
                wrong = int((~torch.isfinite(merged)).sum())
                raise CandidateError(f"tensor {built!r}: {wrong} of {merged.numel()} values are not finite in {dtype}")
            yield built, merged

    def _read(self, part: Part, source: str | None) -> Tensor:
        name = str(self._base) if source is None else source
        return self._of(name, self._steps[part.tensor].of(name)).to(self._device)

    def _of(self, source: str, tensor: str) -> Tensor:
        return self._inner[source].tensor(tensor) if source in self._inner else self._sources.tensor(source, tensor)

    def magnitudes(self, parts: Sequence[Part], source: str) -> Magnitudes | None:
        """Return what is kept of the magnitudes of a source's task vector in some parts together."""
        if self._sources.kept is None or {source, self._base} & self._inner.keys():
            return None
        base = str(self._base)
        steps = [self._steps[part.tensor] for part in parts]
        return self._sources.kept.magnitudes(tuple(((source, s.of(source)), (base, s.of(base))) for s in steps))

    def gram(self, part: Part, names: tuple[str, ...], task_vectors: bool) -> Tensor | None:
        """Return what is kept of the inner products of the sources in a part."""
        if self._sources.kept is None or {*names, *([self._base] if task_vectors else [])} & self._inner.keys():
            return None
        step, base = self._steps[part.tensor], str(self._base)
        origin = (base, step.of(base)) if task_vectors else None
        return self._sources.kept.gram(tuple((name, step.of(name)) for name in names), origin)

    def keys(self) -> dict[str, str]:
        """Return for each tensor what decides its bits: where two recipes have the same, the tensors are equal."""
        blends: dict[int, object] = {}
        for step in self._steps.values():
            if id(step.blend) not in blends:
                given = (step.blend.method, step.blend.weights, step.blend.parameters)
                blends[id(step.blend)] = [canonical(*given), self.recipe.seed if draws(*given) else None]
        inner = {name: blueprint.recipe.digest for name, blueprint in self._inner.items()}
        names = [source.name for source in self.recipe.sources]  # some methods care about their order
        shared = digest([inner, names, self._base, self.recipe.dtype, self.recipe.calibration])
        found = {id_: f"{digest(form)} {shared}" for id_, form in blends.items()}
        return {name: f"{found[id(step.blend)]} {self._key(step)}" for name, step in self._steps.items()}

    def fill(self, before: Mapping[str, str] | None = None) -> Iterator[tuple[str, Callable[[Tensor], None]]]:
        """Yield every tensor's name and what writes it into a tensor of its shape, of any floating dtype.

        Args:
            before: `keys` of the recipe that the tensors to be written hold: what they hold already is not written.
        """
        for name, key in self.keys().items():
            yield name, partial(self._write, name) if before is None or before.get(name) != key else _leave

    def _write(self, name: str, out: Tensor) -> None:
        shape = self._shape(self._steps[name])
        if tuple(out.shape) != shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(shape)}, the live model's has {list(out.shape)}; "
                "the base's config.json must fit the sources"
            )
        part = self._part_of.get(name)
        if part is None or out.dtype != getattr(torch, self.recipe.dtype) or not self._merge.write(part, out):
            out.copy_(self.tensor(name))

    def _key(self, step: Step) -> str:
        """Return what decides a tensor besides its blend: where it comes from, and the whole where it asks about it."""
        part = self._part_of.get(step.name)
        whole = self.recipe.digest if part is not None and self._merge.is_wide(part) else ""
        together = () if part is None else part.tensors
        return f"{step.origin} {dict(step.origins)} {step.layer} {len(self.recipe.layers)} {together} {whole}"

    def _known_statistic(self, kind: str, source: str | None, tensor: str) -> Tensor | None:
        if kind in DRAWS:
            return None
        name = str(self._base) if source is None else source
        found = self._statistic(kind, name, self._steps[tensor].of(name))
        return None if found is None else found.to(self._device)

    def _leaf(self) -> str:
        """Return a model that lies in a folder, whose tensors have the shapes and kinds of all."""
        return self._inner[self._first]._leaf() if self._first in self._inner else self._first

    def _shape(self, step: Step) -> tuple[int, ...]:
        return self._sources.shape(self._leaf(), step.of(self._first))


def _leave(out: Tensor) -> None:
    """Write nothing."""


def _named(recipe: Recipe) -> list[Source]:
    return [*recipe.sources, *([recipe.base] if recipe.base is not None else [])]

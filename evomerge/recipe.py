"""Recipes: plain data that says exactly which model to build, with nothing left to decide."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from evomerge.errors import RecipeError, nearest
from evomerge.methods import Given, canonical, draws
from evomerge.value import Plain, digest, parse, plain, read_yaml, value

#: A parameter of a method: one for all sources, or one per source name.
Parameter = Given

#: The module groups that a recipe tells apart: three inside a layer, and the two ends.
GROUPS = ("attention", "mlp", "other")
ENDS = ("embedding", "head")

#: The form of recipes.
VERSION = 2

#: Output dtypes that a recipe may declare.
DTYPES = ("float32", "bfloat16", "float16")


@value
class Source:
    """A model that goes into a merge: a folder, or what another recipe makes.

    `fingerprint` is the content address of its files, so that a recipe built on another
    machine can tell that it met the same model; the digest of a recipe counts it and not the path.
    """

    name: str
    path: str = ""
    fingerprint: str = ""
    recipe: "Recipe | None" = None

    def __post_init__(self) -> None:
        if bool(self.path) == (self.recipe is not None):
            raise RecipeError(f"source {self.name!r} must have either a path or a recipe")

    def check(self, fingerprint: str, what: str) -> None:
        """Refuse files that are not those which the recipe was made with.

        Args:
            fingerprint: of the files in `path`.
            what: what they are, for the error.

        Raises:
            RecipeError: with both fingerprints, where the recipe gives another one.
        """
        if self.fingerprint not in ("", fingerprint):
            raise RecipeError(
                f"{what} {self.name!r} in {self.path} is not the one that the recipe was made with: "
                f"its fingerprint is {fingerprint}, not {self.fingerprint}"
            )


@value
class Blend:
    """One merge of some tensors: a method or line of stages, a weight per source, and the method's parameters."""

    method: str
    weights: Mapping[str, float]
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)


@value
class Route:
    """Which tensors a blend is for: those that fit all that is given here.

    Attributes:
        blend: how to merge them.
        tensors: a shell pattern that the name of the tensor that is built must fit.
        groups: module groups and ends; empty: all.
        layers: the first layer and the one after the last, of the model that is built; None: everywhere, ends included.
    """

    blend: Blend
    tensors: str = "*"
    groups: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for group in self.groups:
            if group not in GROUPS + ENDS:
                raise RecipeError(f"group {group!r} is not known; {nearest(group, GROUPS + ENDS)}")
        if self.layers is not None and (len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]):
            raise RecipeError(f"layers must be the first layer and the one after the last, got {list(self.layers)}")

    def takes(self, tensor: str, group: str, layer: int | None) -> bool:
        """Tell whether a tensor of the model that is built goes this way.

        Args:
            tensor: its name.
            group: its module group, or the end that it stands at.
            layer: its layer, or None at the ends.
        """
        if self.groups and group not in self.groups:
            return False
        if self.layers is not None and (layer is None or not self.layers[0] <= layer < self.layers[1]):
            return False
        return self.tensors == "*" or fnmatch.fnmatchcase(tensor, self.tensors)


@value
class Recipe:
    """What to build: sources, the base of task vectors, and the first route that fits a tensor says how to blend it.

    Attributes:
        sources: what goes in, in an order that some methods care about.
        base: the model that task vectors are taken from.
        routes: in order; a tensor that none fits is an error.
        dtype: of the model that is built, scored and shipped.
        layers: the layer of the sources that each layer takes its tensors from: one number for all of them, or one
            per source and base; empty: each its own.
        scales: by what the input of each layer is multiplied; empty: by 1. What is written has them folded into the
            layers' output projections, see `evomerge.hops`.
        seed: keys the random masks of methods that have them.
        calibration: a file of texts, for methods that take statistics.
        tokenizer: empty where all sources share one vocabulary; "union" of theirs, or the source (or base) whose
            vocabulary the model gets; embeddings and head are then brought to it.
    """

    sources: tuple[Source, ...]
    base: Source | None = None
    routes: tuple[Route, ...]
    dtype: str
    layers: tuple[int | Mapping[str, int], ...] = ()
    scales: tuple[float, ...] = ()
    seed: int = 0
    calibration: Source | None = None
    tokenizer: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise RecipeError(f"recipe version {self.version} is not known; this evomerge reads version {VERSION}")
        if self.dtype not in DTYPES:
            raise RecipeError(f"recipe dtype {self.dtype!r} is not known; use one of {', '.join(DTYPES)}")
        names = [source.name for source in (*self.sources, *([self.base] if self.base else []))]
        if len(set(names)) != len(names):
            raise RecipeError(f"recipe sources and base must have distinct names, got {names}")
        if self.tokenizer not in ("", "union", *names):
            raise RecipeError(f"recipe tokenizer {self.tokenizer!r} is no source; {nearest(self.tokenizer, names)}")
        if not self.routes:
            raise RecipeError("recipe has no route; give at least one, with a blend")
        if self.calibration is not None and not self.calibration.path:
            raise RecipeError("recipe calibration must be a file of texts; give its path")
        for k, given in enumerate(self.layers):
            if isinstance(given, Mapping) and set(given) != set(names):
                way = f"give one layer for all, or each of {names} its own"
                raise RecipeError(f"recipe layer {k}: {way}, got {dict(given)}")
        if self.scales and len(self.scales) != len(self.layers):
            raise RecipeError(f"recipe has {len(self.layers)} layers but {len(self.scales)} scales; give one for each")
        for k, scale in enumerate(self.scales):
            if not (math.isfinite(scale) and scale > 0):
                raise RecipeError(f"recipe scale {k} must be finite and above 0, got {scale}; no weight can undo it")
        sources = names[: len(self.sources)]
        for blend in self.blends():
            for name in blend.weights:
                if name not in sources:
                    raise RecipeError(f"a blend of the recipe weighs {name!r}; {nearest(name, sources)}")

    def blends(self) -> Iterator[Blend]:
        """Yield the blend of every route."""
        return (route.blend for route in self.routes)

    def route(self, tensor: str, group: str, layer: int | None) -> Route:
        """Return the first route that a tensor fits; see `Route.takes`.

        Raises:
            RecipeError: if none does.
        """
        found = next((route for route in self.routes if route.takes(tensor, group, layer)), None)
        if found is None:
            where = f"group {group}" if layer is None else f"group {group}, layer {layer}"
            raise RecipeError(f"tensor {tensor!r} ({where}) fits no route; add one without conditions at the end")
        return found

    @property
    def digest(self) -> str:
        """The content address of what is built: 16 hexadecimal digits, the same wherever the models lie.

        Recipes that build the same by the same arithmetic have the same one: a named method and its line, a stage
        that does nothing and none, a source without weight and its parameters.
        """
        form = plain(self)
        for name in ("sources", "base", "calibration"):
            form[name] = [_content(source) for source in _listed(getattr(self, name))]
        for route, each in zip(self.routes, form["routes"], strict=True):
            each["blend"] = canonical(route.blend.method, route.blend.weights, route.blend.parameters)
        if not any(draws(blend.method, blend.weights, blend.parameters) for blend in self.blends()):
            del form["seed"]
        if not self.scaled:
            del form["scales"]
        return digest(form)

    @property
    def scaled(self) -> bool:
        """Whether any layer's input is multiplied by another number than 1."""
        return any(scale != 1.0 for scale in self.scales)


def _listed(sources: "Source | tuple[Source, ...] | None") -> tuple[Source, ...]:
    return (sources,) if isinstance(sources, Source) else sources or ()


def _content(source: Source) -> list[str]:
    return [source.name, source.recipe.digest if source.recipe else source.fingerprint]


def models_of(recipe: Recipe) -> dict[str, Source]:
    """Return every model that lies in a folder and goes into a recipe, by name: sources, base, those of inner recipes.

    Raises:
        RecipeError: if one name stands for two models.
    """
    found: dict[str, Source] = {}
    for source in (*recipe.sources, *_listed(recipe.base)):
        for name, model in (models_of(source.recipe) if source.recipe else {source.name: source}).items():
            if found.setdefault(name, model) != model:
                raise RecipeError(f"recipe: {name!r} names two models, {found[name].path} and {model.path}; rename one")
    return found


def depths_of(recipe: Recipe, source: str) -> list[int]:
    """Return the layer of a source (or the base) that each layer of a recipe takes from; none: each its own."""
    return [given if isinstance(given, int) else given[source] for given in recipe.layers]


def copy_of(source: Source, depth: int, dtype: str) -> Recipe:
    """Return the recipe that rebuilds one source as it is (in the declared dtype)."""
    route = Route(blend=Blend(method="linear", weights={source.name: 1.0}))
    texts = None if source.recipe is None else source.recipe.calibration
    return Recipe(sources=(source,), routes=(route,), layers=tuple(range(depth)), calibration=texts, dtype=dtype)


def to_yaml(recipe: Recipe) -> str:
    """Return the YAML text of a recipe: what differs from a default, equal blends once (YAML anchors)."""
    shared: dict[str, Plain] = {}
    form = _short(recipe)
    for route in form["routes"]:
        route["blend"] = shared.setdefault(digest(route["blend"]), route["blend"])
    # Without allow_unicode, whose text PyYAML does not always read back: "\x85" would come back as a space.
    return yaml.safe_dump(form, sort_keys=False, default_flow_style=None, width=110)


def _short(thing: object) -> Plain:
    """Return the plain form without the fields that equal their default; a recipe keeps its version."""
    if isinstance(thing, tuple):
        return [_short(item) for item in thing]
    if not dataclasses.is_dataclass(thing):
        return plain(thing)
    kept = {}
    for field in dataclasses.fields(thing):
        default = {} if field.default_factory is dict else field.default
        given = getattr(thing, field.name)
        if field.name == "version" or given != default:
            kept[field.name] = _short(given)
    return kept


def from_plain(data: Plain, place: str) -> Recipe:
    """Build a recipe from its plain form.

    Raises:
        RecipeError: naming the place and what does not fit.
    """
    version = data.get("version", VERSION) if isinstance(data, Mapping) else VERSION
    if version != VERSION:  # before the keys, which are those of another version
        raise RecipeError(f"{place}: recipe version {version} is not known; this evomerge reads version {VERSION}")
    return parse(Recipe, data, place, RecipeError)


def read(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: if the file is missing, not YAML, or not a recipe.
    """
    return from_plain(read_yaml(path, "a recipe.yaml", RecipeError), str(path))

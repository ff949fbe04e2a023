"""Recipes: plain data that says exactly which model to build, with nothing left to decide."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from evomerge.errors import RecipeError
from evomerge.value import Plain, digest, parse, plain, value

#: A parameter of a method: one for all sources, or one per source name.
Parameter = float | str | Mapping[str, float]

#: The module groups that a recipe tells apart inside a layer.
GROUPS = ("attention", "mlp", "other")

#: Output dtypes that a recipe may declare.
DTYPES = ("float32", "bfloat16", "float16")


@value
class Source:
    """A model that goes into a merge.

    `fingerprint` is the content address of its files, so that a recipe built on another
    machine can tell that it met the same model; the digest of a recipe counts it and not the path.
    """

    name: str
    path: str
    fingerprint: str = ""


@value
class Blend:
    """One merge of some tensors: a method, a weight per source, and the method's parameters."""

    method: str
    weights: Mapping[str, float]
    parameters: Mapping[str, Parameter]


@value
class Layer:
    """One layer of the model to build: `depth` is the layer of the sources that its tensors come from."""

    depth: int
    attention: Blend
    mlp: Blend
    other: Blend

    def group(self, name: str) -> Blend:
        """Return the blend of a module group (`attention`, `mlp`, `other`)."""
        return {"attention": self.attention, "mlp": self.mlp, "other": self.other}[name]


@value
class Recipe:
    """What to build: sources, the base of task vectors, one `Layer` per layer, and both ends.

    `embedding` blends the tensors before the first layer, `head` those after the last
    (final norm and output head). `dtype` is the dtype of the model that is built, scored
    and shipped. `seed` keys the random masks of methods that have them.
    """

    sources: tuple[Source, ...]
    base: Source | None
    embedding: Blend
    layers: tuple[Layer, ...]
    head: Blend
    dtype: str
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise RecipeError(f"recipe version {self.version} is not known; this evomerge reads version 1")
        if self.dtype not in DTYPES:
            raise RecipeError(f"recipe dtype {self.dtype!r} is not known; use one of {', '.join(DTYPES)}")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise RecipeError(f"recipe sources must have distinct names, got {names}")
        for blend in self.blends():
            for name in blend.weights:
                if name not in names:
                    raise RecipeError(f"a blend of the recipe weighs {name!r}, which is not a source ({names})")

    def blends(self) -> Iterator[Blend]:
        """Yield every blend of the recipe, ends included."""
        yield self.embedding
        for layer in self.layers:
            yield from (layer.attention, layer.mlp, layer.other)
        yield self.head

    @property
    def digest(self) -> str:
        """The content address of what is built: 16 hexadecimal digits, the same wherever the models lie."""
        form = plain(self)
        for source in [*form["sources"], form["base"]]:
            if source is not None:
                del source["path"]
        return digest(form)


def copy_of(source: Source, depth: int, dtype: str) -> Recipe:
    """Return the recipe that rebuilds one source as it is (in the declared dtype)."""
    blend = Blend(method="linear", weights={source.name: 1.0}, parameters={})
    layers = tuple(Layer(depth=i, attention=blend, mlp=blend, other=blend) for i in range(depth))
    return Recipe(sources=(source,), base=None, embedding=blend, layers=layers, head=blend, dtype=dtype)


def to_yaml(recipe: Recipe) -> str:
    """Return the YAML text of a recipe; equal blends are written once (YAML anchors)."""
    shared: dict[str, Plain] = {}

    def share(form: Plain) -> Plain:
        return shared.setdefault(digest(form), form)

    form = plain(recipe)
    form["embedding"], form["head"] = share(form["embedding"]), share(form["head"])
    for layer in form["layers"]:
        layer.update({group: share(layer[group]) for group in GROUPS})
    # Without allow_unicode, whose text PyYAML does not always read back: "\x85" would come back as a space.
    return yaml.safe_dump(form, sort_keys=False)


def from_plain(data: Plain, place: str) -> Recipe:
    """Build a recipe from its plain form.

    Raises:
        RecipeError: naming the place and what does not fit.
    """
    return parse(Recipe, data, place, RecipeError)


def read(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: if the file is missing, not YAML, or not a recipe.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read ({problem.strerror}); give the path of a recipe.yaml") from None
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: not UTF-8, or a date like 2020-13-01
        raise RecipeError(f"{path}: not YAML ({' '.join(str(problem).split())})") from None
    return from_plain(data, str(path))

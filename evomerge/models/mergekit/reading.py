"""mergekit's YAML read into a recipe: every parameter settled for every tensor, in as few routes as say it.

Facts about mergekit 0.1.5, found by running it. A parameter of a model is looked for at the model, then at the slice,
then in the file; one that all models share at the slice, then in the file. A list whose filters none fits counts as not
given. Gradients begin anew in each slice; the embedding takes the first value of the first slice, final norm and head
the first value of the last one. Filters are matched with the name of the tensor that is built.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from evomerge.errors import RecipeError, nearest
from evomerge.models.architecture import place as place_of
from evomerge.models.architecture import renamed
from evomerge.models.mergekit.conventions import LINES, PARAMETERS, Line, Values
from evomerge.models.mergekit.references import Models
from evomerge.models.mergekit.routes import compressed
from evomerge.models.mergekit.settings import Spot, filters, resolved, where
from evomerge.recipe import DTYPES, Blend, Recipe, Source
from evomerge.value import Plain, read_yaml, value

#: Keys of the file that are read, and those that mergekit has and no recipe can say, with the way out.
_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer",
         "tokenizer_source")  # fmt: skip
_BEYOND = {
    "modules": "merge each module by a file of its own",
    "chat_template": "set the template in the tokenizer_config.json of the model afterwards",
}


@value
class _Input:
    """A model in a slice: its reference, the layers that it gives, its own parameters."""

    model: str
    layers: tuple[int, int]
    parameters: Mapping[str, Plain]


@value
class _Slice:
    """Layers that are merged from as many layers of each input."""

    inputs: tuple[_Input, ...]
    base: str
    parameters: Mapping[str, Plain]
    place: str

    @property
    def length(self) -> int:
        return self.inputs[0].layers[1] - self.inputs[0].layers[0]


def is_mergekit(path: Path) -> bool:
    """Tell whether a file is mergekit's."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return False
    return isinstance(data, dict) and "merge_method" in data


def read(path: Path) -> Recipe:
    """Read a file of mergekit's as the recipe of the same model.

    Models are folders, found from the current folder or from that of the file, or hub ids; their headers are read.
    Arithmetic is in float32 here whatever `dtype` says, and random masks are drawn by another generator.

    Raises:
        RecipeError: if the file is wrong, or says what no recipe can: named, with the way out.
        ModelError: if a model is not there or broken.
    """
    data = read_yaml(path, "a YAML file", RecipeError)
    place = str(path)
    _keys(data, _KEYS, place)
    lines = [line for line in LINES if line.name == data.get("merge_method")]
    if not lines:
        wanted, known = data.get("merge_method"), dict.fromkeys(line.name for line in LINES)
        raise RecipeError(f"{place}.merge_method: {wanted!r} is not known; {nearest(str(wanted), known)}")
    return _File(data, lines, path).recipe()


class _File:
    """A file of mergekit's with the models that it names."""

    def __init__(self, data: Mapping[str, Plain], lines: Sequence[Line], path: Path) -> None:
        self.data, self.lines, self.path, self.place = data, lines, path, str(path)
        self._models = Models(path)
        self.slices = tuple(self._slices())

    def recipe(self) -> Recipe:
        """Return the recipe that says the same."""
        for each in self.slices:
            self._check(each)
        base = self._base()
        models = dict.fromkeys(one.model for each in self.slices for one in self._taking(each))
        listed = self.slices[0].base  # where tokens come from, though the method takes it as a model like the others
        matters = self._asked_tokenizer() and (len(models) > 2 or listed != next(iter(models), ""))
        spare = listed if not base and matters and listed in models else ""
        built = {name: self._blend(*self._at(name, layer)) for name, layer in self._tensors()}
        depth = sum(each.length for each in self.slices)
        return Recipe(
            sources=tuple(self._models.source(model) for model in models),
            base=self._models.source(base) if base else self._spare(spare),
            routes=compressed(built, depth, list(filters(dict(self.data)))),
            dtype=self._dtype(),
            layers=self._layers(),
            tokenizer=self._tokenizer(base or listed or next(iter(models)), list(models) + [base] * bool(base)),
        )

    def _slices(self) -> Iterator[_Slice]:
        given = {key: self.data[key] for key in ("models", "slices") if self.data.get(key) is not None}
        if len(given) != 1 or not isinstance(next(iter(given.values())), list) or not next(iter(given.values())):
            raise RecipeError(f"{self.place}: must have a list of either models or slices")
        base = self._models.reference(self.data.get("base_model"), "base_model")
        if "models" in given:
            inputs = [self._input(each, f"models[{i}]", base) for i, each in enumerate(given["models"])]
            if base and base not in [each.model for each in inputs]:
                inputs.insert(0, _Input(model=base, layers=(0, self._models.checkpoint(base).depth), parameters={}))
            yield _Slice(inputs=tuple(inputs), base=base, parameters={}, place=f"{self.place}.models")
            return
        for i, each in enumerate(given["slices"]):
            at = f"slices[{i}]"
            _keys(each, ("sources", "base_model", "parameters"), f"{self.place}.{at}")
            own = self._models.reference(each.get("base_model"), f"{at}.base_model") or base
            sources = _listed(each.get("sources"), f"{self.place}.{at}.sources")
            yield _Slice(
                inputs=tuple(self._input(one, f"{at}.sources[{k}]", own) for k, one in enumerate(sources)),
                base=own, parameters=self._parameters(each, at, shared=True), place=f"{self.place}.{at}",
            )  # fmt: skip

    def _input(self, given: Plain, at: str, base: str) -> _Input:
        whole = at.startswith("models")
        _keys(given, ("model", "parameters") if whole else ("model", "layer_range", "parameters"), f"{self.place}.{at}")
        model = self._models.reference(given.get("model"), f"{at}.model")
        if not model:
            raise RecipeError(f"{self.place}.{at}.model: missing; name a folder or a hub id")
        depth = self._models.checkpoint(model).depth
        layers = [0, depth] if whole else given.get("layer_range")
        if not (isinstance(layers, list) and len(layers) == 2 and all(type(each) is int for each in layers)):
            raise RecipeError(f"{self.place}.{at}.layer_range: must be two whole numbers, got {layers!r}")
        if not 0 <= layers[0] < layers[1] <= depth:
            raise RecipeError(f"{self.place}.{at}.layer_range: {layers} is not within the {depth} layers of {model}")
        shared = model == base and self.lines[0].base != "ignored"
        parameters = self._parameters(given, at, shared=shared)
        return _Input(model=model, layers=(layers[0], layers[1]), parameters=parameters)

    def _parameters(self, given: Mapping[str, Plain], at: str, *, shared: bool) -> Mapping[str, Plain]:
        """Return the parameters that stand at one level, after a check that they can mean something there."""
        found = given.get("parameters") or {}
        where_ = f"{self.place}.{at}.parameters" if at else f"{self.place}.parameters"
        if not isinstance(found, Mapping):
            raise RecipeError(f"{where_}: must be a mapping, got {found!r}")
        for name in found:
            says = self.lines[0].parameters.get(name)
            if name not in PARAMETERS:
                way = nearest(str(name), PARAMETERS)
                raise RecipeError(f"{where_}.{name}: {self.lines[0].name} has no such parameter; {way}")
            if says is not None and not says.each and not shared and name != "int8_mask":
                raise RecipeError(f"{where_}.{name}: all models share it; give it to the slice or the whole file")
        return found

    def _check(self, each: _Slice) -> None:
        """Refuse a slice that mergekit refuses too."""
        line, models = self.lines[0], [one.model for one in each.inputs]
        twice = next((model for model in models if models.count(model) > 1), None)
        if twice:
            raise RecipeError(f"{each.place}: {twice} stands there twice; name each model once")
        if line.base in ("required", "first") and not each.base:
            raise RecipeError(f"{self.place}.base_model: missing; {line.name} needs one")
        if line.base in ("required", "first") and each.base not in models:
            raise RecipeError(f"{each.place}: {each.base} is not among its sources; add it with a layer_range")
        lengths = {one.layers[1] - one.layers[0] for one in each.inputs}
        if len(lengths) > 1:
            raise RecipeError(f"{each.place}: layer ranges must be of one length, got {sorted(lengths)}")
        count = len(self._taking(each))
        if not line.count[0] <= count <= line.count[1]:
            least, most = line.count
            wanted = f"{least}" if least == most else f"at least {least}"
            kind = "models" if line.base in ("ignored", "first") else "models besides the base"
            raise RecipeError(f"{each.place}: {line.name} merges {wanted} {kind}, got {count}")

    def _taking(self, each: _Slice) -> tuple[_Input, ...]:
        """Return the models that are merged, in order: the base only where the method takes it as one of them."""
        base = self.lines[0].base
        if base == "ignored":
            return each.inputs
        if base == "first":
            return tuple(sorted(each.inputs, key=lambda one: one.model != each.base))
        return tuple(one for one in each.inputs if one.model != each.base)

    def _base(self) -> str:
        """Return the model that task vectors are taken from, or nothing."""
        line = self.lines[0]
        found = sorted({each.base for each in self.slices if line.base in ("required", "optional")} - {""})
        if len(found) > 1:
            raise RecipeError(f"{self.place}.slices: several base models ({', '.join(found)}); a recipe has one")
        return found[0] if found else ""

    def _tensors(self) -> Iterator[tuple[str, int | None]]:
        """Yield every tensor that is built, with its layer in the first model of its slice."""
        first = self._models.checkpoint(self.slices[0].inputs[0].model)
        built = 0
        for name in first.names:
            if place_of(name, first.depth).layer is None:
                yield name, None
        for each in self.slices:
            checkpoint = self._models.checkpoint(each.inputs[0].model)
            for k in range(each.length):
                taken = each.inputs[0].layers[0] + k
                for name in checkpoint.names:
                    if place_of(name, checkpoint.depth).layer == taken:
                        yield renamed(name, built), built
                built += 1

    def _at(self, name: str, layer: int | None) -> tuple[_Slice, Spot]:
        """Return the slice of a tensor, and where it stands there."""
        if layer is None:
            embedding = place_of(name, 1).end == "embedding"
            return self.slices[0 if embedding else -1], Spot(tensor=name, t=0.0)
        for each in self.slices:
            if layer < each.length:
                return each, Spot(tensor=name, t=where(layer, each.length))
            layer -= each.length
        raise ValueError(f"layer {layer} is beyond the slices")

    def _blend(self, each: _Slice, spot: Spot) -> Blend:
        """Return the blend of one tensor."""
        taking = self._taking(each)
        everywhere = self._parameters(self.data, "", shared=True)
        values: Values = {}
        for name, says in self.lines[0].parameters.items():
            levels = [each.parameters.get(name), everywhere.get(name)]
            at = f"{self.place}: parameter {name}"
            if says.each:
                values[name] = {
                    self._models.name(one.model): resolved(
                        [one.parameters.get(name), *levels], says, spot, f"{at} of {one.model}"
                    )
                    for one in taking
                }
            else:
                values[name] = {"": resolved(levels, says, spot, at)}
        line = next(line for line in self.lines if all(values[name][""] == flag for name, flag in line.when.items()))
        return line.blend(values, [self._models.name(one.model) for one in taking])

    def _layers(self) -> tuple[int | Mapping[str, int], ...]:
        """Return the layer that each source gives to each layer that is built; nothing where each gives its own.

        A model that is not in the slice gets a number too, which nothing asks for.
        """
        everyone = dict.fromkeys(self._models.name(one.model) for each in self.slices for one in each.inputs)
        taken = [
            {self._models.name(one.model): one.layers[0] + k for one in each.inputs}
            for each in self.slices
            for k in range(each.length)
        ]
        full = [{name: of.get(name, next(iter(of.values()))) for name in everyone} for of in taken]
        short = [next(iter(of.values())) if len(set(of.values())) == 1 else of for of in full]
        depth = self._models.checkpoint(self.slices[0].inputs[0].model).depth
        return () if short == list(range(depth)) else tuple(short)

    def _dtype(self) -> str:
        for key in ("out_dtype", "dtype"):
            given = self.data.get(key)
            if given is not None:
                if given not in DTYPES:
                    raise RecipeError(f"{self.place}.{key}: {given!r} is not known; use one of {', '.join(DTYPES)}")
                return str(given)
        checkpoint = self._models.checkpoint(self.slices[0].inputs[0].model)
        return str(checkpoint.dtype(checkpoint.names[0])).removeprefix("torch.")

    def _asked_tokenizer(self) -> bool:
        return self.data.get("tokenizer") is not None or self.data.get("tokenizer_source") is not None

    def _spare(self, model: str) -> Source | None:
        """Return a model that is a source too as a base, which gives the tokens that others lack."""
        if not model:
            return None
        return Source(name=f"{self._models.name(model)} as base", path=str(self._models.folder(model)))

    def _tokenizer(self, base: str, models: Sequence[str]) -> str:
        given = self.data.get("tokenizer")
        old = self.data.get("tokenizer_source")
        if given is not None and old is not None:
            raise RecipeError(f"{self.place}: has both tokenizer and tokenizer_source; remove one")
        at = "tokenizer_source" if old is not None else "tokenizer.source"
        if given is not None:
            _keys(given, ("source",), f"{self.place}.tokenizer", {
                "tokens": "a recipe brings every token from the models that have it; remove it",
                "pad_to_multiple_of": "resize the embedding of the model afterwards",
            })  # fmt: skip
            old = given.get("source", "union")
        if old is None or old == "union":
            return str(old or "")
        model = base if old == "base" else self._models.reference(old, at)
        if model not in models:
            raise RecipeError(f"{self.place}.{at}: {model} is none of the merged models; {nearest(model, models)}")
        return self._models.name(model)


def _keys(given: Plain, known: Sequence[str], place: str, beyond: Mapping[str, str] = _BEYOND) -> None:
    """Refuse what is no mapping, and keys that are not known or that no recipe can say."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{place}: expected a mapping, got {given!r}"[:200])
    for key, each in given.items():
        if key in beyond and each is not None:
            raise RecipeError(f"{place}.{key}: no recipe can say it; {beyond[key]}")
        if key not in known and key not in beyond:
            raise RecipeError(f"{place}.{key}: unknown key; {nearest(str(key), known)}")


def _listed(given: Plain, place: str) -> list[Plain]:
    if not isinstance(given, list) or not given:
        raise RecipeError(f"{place}: must be a list of models with their layers")
    return given

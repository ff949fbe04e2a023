"""Recipes written as mergekit's YAML, where mergekit makes the same tensors of it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import yaml

from evomerge.errors import InvalidInput
from evomerge.methods import method
from evomerge.models.architecture import place, split
from evomerge.models.materialize import Step, plan
from evomerge.models.mergekit.conventions import LINES, Line, Says, Scalar, Values
from evomerge.recipe import Blend, Recipe, Source
from evomerge.value import Plain, value


class _Beyond(Exception):
    """What mergekit cannot say."""


@value
class _Run:
    """Layers that are built from consecutive layers of each model."""

    first: int
    last: int
    taken: Mapping[str, int]


def to_mergekit(recipe: Recipe, names: Sequence[str], depth: int) -> str | None:
    """Return the YAML with which mergekit 0.1.5 makes the model of a recipe; None if there is none.

    Models are named by the paths of the recipe. Arithmetic is float32, as here.

    Args:
        recipe: what is built.
        names: the tensors that every source has.
        depth: the number of layers of every source.
    """
    try:
        return yaml.safe_dump(_written(recipe, names, depth), sort_keys=False, default_flow_style=None, width=110)
    except (_Beyond, InvalidInput):
        return None


def expressible(recipe: Recipe, names: Sequence[str], depth: int) -> str:
    """Return why mergekit cannot make the model of a recipe; empty where it can. See `to_mergekit`."""
    try:
        _written(recipe, names, depth)
    except (_Beyond, InvalidInput) as problem:
        return str(problem)
    return ""


def _written(recipe: Recipe, names: Sequence[str], depth: int) -> dict[str, Plain]:
    """Return the plain form of the file."""
    models = {source.name: source for source in (*recipe.sources, *([recipe.base] if recipe.base else []))}
    nested = next((name for name, source in models.items() if source.recipe is not None), None)
    if nested is not None:
        raise _Beyond(f"source {nested!r} is a recipe itself")
    steps = plan(recipe, names, depth)
    for blend in recipe.blends():
        _check(blend)
    name, values = _method(recipe, steps)
    line = next(line for line in LINES if line.name == name)
    base = recipe.base if line.base in ("required", "optional") else None
    inputs = [*recipe.sources, *([base] if base else [])]
    runs = list(_runs(recipe, [source.name for source in inputs], depth, values))
    _check_ends(steps, values, runs, depth)
    form: dict[str, Plain] = {"merge_method": name}
    if base or line.base == "first":
        form["base_model"] = (base or recipe.sources[0]).path
    elif recipe.tokenizer and recipe.base is not None:
        if recipe.base.path not in [source.path for source in recipe.sources]:
            raise _Beyond(f"{recipe.base.name!r} gives tokens, but {name} of mergekit merges it as well")
        form["base_model"] = recipe.base.path
    parts = [_part(run, line, steps, values, models, base, depth) for run in runs]
    if len(runs) == 1 and set(runs[0].taken.values()) == {0} and runs[0].last == depth:
        sources, shared = parts[0]
        form["models"] = [{key: given for key, given in each.items() if key != "layer_range"} for each in sources]
        form |= {"parameters": shared} if shared else {}
    else:
        form["slices"] = [{"sources": own, **({"parameters": shared} if shared else {})} for own, shared in parts]
    form["dtype"] = "float32"
    if recipe.dtype != "float32":
        form["out_dtype"] = recipe.dtype
    if recipe.tokenizer:
        source = recipe.tokenizer if recipe.tokenizer == "union" else models[recipe.tokenizer].path
        form["tokenizer"] = {"source": source}
    return form


def _check(blend: Blend) -> None:
    taking = [name for name, weight in blend.weights.items() if weight != 0]
    found = method(blend.method)
    if any(step.stage.random for step in found.bound(blend.parameters, taking)):
        raise _Beyond(f"{found.name} draws random masks, which mergekit draws by another generator")
    if found.statistics:
        raise _Beyond(f"{found.name} takes statistics ({', '.join(found.statistics)}), which mergekit does not know")


def _method(recipe: Recipe, steps: Sequence[Step]) -> tuple[str, dict[str, Values]]:
    """Return the method of mergekit's that makes every blend, and its values for each tensor."""
    has_base = recipe.base is not None
    everyone = tuple(source.name for source in recipe.sources)
    for name in dict.fromkeys(line.name for line in LINES):
        found: dict[str, Values] = {}
        for step in steps:
            said = _said(name, step.blend, everyone, has_base)
            if said is None:
                break
            found[step.name] = said
        else:
            return name, found
    for blend in (step.blend for step in steps):
        if all(_said(line.name, blend, everyone, has_base) is None for line in LINES):
            break
    else:
        raise _Beyond("no single method of mergekit makes all of its blends")
    given = f" with {dict(blend.parameters)}" if blend.parameters else ""
    raise _Beyond(f"no method of mergekit does what {blend.method}{given} does")


def _said(name: str, blend: Blend, everyone: tuple[str, ...], has_base: bool) -> Values | None:
    """Return the values with which a method of mergekit's makes a blend, or None."""
    taking = tuple(source for source in everyone if blend.weights.get(source, 0.0) != 0)
    models = taking if name == "passthrough" else everyone
    for line in LINES:
        based = line.base == "required"
        if line.name != name or (based and not has_base) or not (based or taking):
            continue
        if line.count[0] <= len(models) <= line.count[1]:
            said = line.values(blend, models, has_base)
            if said is not None:
                return said
    return None


def _runs(recipe: Recipe, everyone: Sequence[str], depth: int, values: Mapping[str, Values]) -> Iterator[_Run]:
    """Yield the runs of layers, each with the layer that every model's part of it begins at."""
    single: dict[int, str] = {}
    for name, settings in values.items():
        parts = split(name)
        if parts is not None and "scale" in settings:
            model = next(iter(settings["scale"]))
            if single.setdefault(parts[1], model) != model:
                raise _Beyond(f"layer {parts[1]} takes its tensors from several models, each by itself")
    taken = []
    for k, given in enumerate(recipe.layers or range(depth)):
        of = given if isinstance(given, Mapping) else dict.fromkeys(everyone, given)
        of = {name: of.get(name, next(iter(of.values()))) for name in everyone}
        taken.append({name: layer for name, layer in of.items() if k not in single or name == single[k]})
    first = 0
    for k in range(1, len(taken) + 1):
        if k == len(taken) or taken[k] != {name: layer + k - first for name, layer in taken[first].items()}:
            yield _Run(first=first, last=k, taken=taken[first])
            first = k


def _check_ends(steps: Sequence[Step], values: Mapping[str, Values], runs: Sequence[_Run], depth: int) -> None:
    """Refuse a passthrough whose ends come from other models than the layers beside them."""
    for step in steps:
        if step.layer is None and "scale" in values[step.name]:
            run = runs[0 if place(step.name, depth).end == "embedding" else -1]
            if set(values[step.name]["scale"]) != set(run.taken):
                raise _Beyond(f"{step.name!r} comes from another model than the layer beside it")


def _part(
    run: _Run, line: Line, steps: Sequence[Step], values: Mapping[str, Values], models: Mapping[str, Source],
    base: Source | None, depth: int,
) -> tuple[list[dict[str, Plain]], dict[str, Plain]]:  # fmt: skip
    """Return the sources of one slice, with their parameters, and the parameters that they share."""
    last = max(step.layer + 1 for step in steps if step.layer is not None)
    ends = {"embedding": run.first == 0, "head": run.last == last}
    inside = [
        step.name
        for step in steps
        if (run.first <= step.layer < run.last if step.layer is not None else ends[str(place(step.name, depth).end)])
    ]
    shared = {
        name: _setting({tensor: values[tensor][name][""] for tensor in inside}, says)
        for name, says in line.parameters.items()
        if not says.each
    }
    sources = []
    for name, begin in run.taken.items():
        form: dict[str, Plain] = {"model": models[name].path, "layer_range": [begin, begin + run.last - run.first]}
        own = {
            parameter: _setting({tensor: values[tensor][parameter][name] for tensor in inside}, says)
            for parameter, says in line.parameters.items()
            if says.each and models[name] != base
        }
        own = {parameter: given for parameter, given in own.items() if given is not None}
        sources.append(form | ({"parameters": own} if own else {}))
    return sources, {name: given for name, given in shared.items() if given is not None}


def _setting(values: Mapping[str, Scalar], says: Says) -> Plain:
    """Return one value, or the filters under which each tensor has its own; None where the default will do."""
    counted = Counter(values.values()).most_common()
    default = counted[0][0]
    if len(counted) == 1:
        return None if default == says.default else default
    entries: list[Plain] = []
    candidates = list(dict.fromkeys(part for rank in range(5) for name in values for part in _parts(name, rank)))
    for each, _ in counted[1:]:
        left = {name for name, mine in values.items() if mine == each}
        for part in candidates:
            fitting = {name for name in values if part in name} if left else set()
            if fitting & left and all(values[name] == each for name in fitting):
                entries.append({"filter": part, "value": each})
                left -= fitting
        if left:
            raise _Beyond(f"no filter is for tensor {min(left)!r} alone")
    return [*entries, {"value": default}]


def _parts(name: str, rank: int) -> list[str]:
    """Return the parts of a tensor's name that a filter may ask for; those of a greater rank fit fewer tensors."""
    parts = split(name)
    if parts is None:
        return [name] if rank == 4 else []
    before, k, after = parts
    layer, component = f"{before}.{k}.", after.split(".")[0]
    return [(f".{component}.", f".{after}", layer, f"{layer}{component}.", name)[rank]]

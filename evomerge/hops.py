"""Layer stacks as hops: a recipe read as which source's which layer comes next and scaled by how much, and written so.

Legend: hop t takes h_{t-1} to h_t = s_t h_{t-1} + F_t(s_t h_{t-1}), where F_t is what its layer adds to the stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from operator import mul

from evomerge.errors import RecipeError
from evomerge.methods import canonical
from evomerge.recipe import ENDS, GROUPS, Blend, Recipe, Route, Source, depths_of
from evomerge.value import value


@value
class Hop:
    """One step of a stack: which source's which layer comes next, and by what its input is multiplied."""

    source: str
    layer: int
    scale: float = 1.0


@value
class Stack:
    """A model as hops: the source that embeds, the hops, and the source whose last norm and head end it."""

    embedding: str
    hops: tuple[Hop, ...]
    head: str


def copy_blend(source: str) -> Blend:
    """Return the blend that is one source as it is."""
    return Blend(method="linear", weights={source: 1.0})


def copied(blend: Blend) -> str | None:
    """Return the source of which a blend is a copy; None if it is more than that."""
    if len(names := [name for name, weight in blend.weights.items() if weight != 0]) != 1:
        return None
    form = canonical(blend.method, blend.weights, blend.parameters)
    plain = (canonical(method, {names[0]: 1.0}, {}) for method in ("linear", "passthrough"))
    return names[0] if form in plain else None


def stack_of(recipe: Recipe) -> Stack | None:
    """Return the stack that a recipe is, or None if any layer or end is more than a copy of one source's."""
    ends = {end: _single(route.blend for route in _meeting(recipe, (end,), None)) for end in ENDS}
    hops = []
    for k, given in enumerate(recipe.layers):
        source = _single(route.blend for route in _meeting(recipe, GROUPS, k))
        if source is None:
            return None
        layer = given if isinstance(given, int) else given[source]
        hops.append(Hop(source=source, layer=layer, scale=recipe.scales[k] if recipe.scales else 1.0))
    if ends["embedding"] is None or ends["head"] is None or not hops:
        return None
    return Stack(embedding=ends["embedding"], hops=tuple(hops), head=ends["head"])


def recipe_of(stack: Stack, sources: Sequence[Source], dtype: str) -> Recipe:
    """Return the recipe of a stack whose ends are of one source; equal stacks have equal recipes.

    Args:
        stack: the stack.
        sources: all that it may take from; only those that it does are named, in this order.
        dtype: of the model.
    """
    used = {stack.head, *(hop.source for hop in stack.hops)}
    texts = (source.recipe.calibration for source in sources if source.name in used and source.recipe is not None)
    runs: list[Route] = []
    for source, places in groupby(range(len(stack.hops)), lambda k: stack.hops[k].source):
        span = list(places)
        if source != stack.head:
            runs.append(Route(blend=copy_blend(source), layers=(span[0], span[-1] + 1)))
    scales = tuple(hop.scale for hop in stack.hops)
    return Recipe(
        sources=tuple(source for source in sources if source.name in used),
        routes=(*runs, Route(blend=copy_blend(stack.head))),
        layers=tuple(hop.layer for hop in stack.hops),
        scales=scales if any(scale != 1.0 for scale in scales) else (),
        calibration=next((text for text in texts if text is not None), None),
        dtype=dtype,
    )


def folded(recipe: Recipe, additions: Mapping[str, float]) -> Recipe:
    """Return the recipe without scales whose model gives the same logits: what the layers add is divided instead.

    Norms take no notice of a positive factor. So with c_t = s_1 ... s_t and h_t = c_t g_t each hop is
    g_t = g_{t-1} + F_t(g_{t-1}) / c_t, and the last norm drops c_T (up to the epsilon of the norms).

    Args:
        recipe: with scales or without.
        additions: the tensors of a layer that what it adds is proportional to, by their name within the layer, and for
            each what it is stored without: 1 where a norm multiplies by 1 + weight, else 0.

    Raises:
        RecipeError: if a scaled layer is no copy of one source's.
    """
    if not recipe.scaled:
        return replace(recipe, scales=())
    stack = stack_of(recipe)
    if stack is None:
        raise RecipeError("recipe has scales, but not all of its layers are copies; make the blend a source of its own")
    totals = list(accumulate((hop.scale for hop in stack.hops), mul))
    routes: list[Route] = []
    for (source, total), places in groupby(
        range(len(totals)), lambda k: (stack.hops[k].source, totals[k])
    ):
        span = list(places)
        if total != 1.0:
            layers = (span[0], span[-1] + 1)
            routes += (
                Route(tensors=f"*.{name}", layers=layers, blend=_divided(source, total, without))
                for name, without in additions.items()
            )
    return replace(recipe, routes=(*routes, *passed_through(recipe).routes), scales=())


def passed_through(recipe: Recipe) -> Recipe:
    """Return a recipe that builds the same, whose copies are made by the method that mergekit makes them by."""
    routes = (
        replace(route, blend=replace(copy_blend(source), method="passthrough")) if source is not None else route
        for route, source in ((route, copied(route.blend)) for route in recipe.routes)
    )
    return replace(recipe, routes=tuple(routes))


def path_of(recipe: Recipe, known: Stack | None = None) -> tuple[tuple[str, int, float], ...]:
    """Return what a recipe's hops do, in order: stacks that begin alike have equal beginnings; () for no stack.

    The first hop says what embeds, too.

    Args:
        recipe: any.
        known: the stack that it is, where that is known.
    """
    stack = known or stack_of(recipe)
    if stack is None:
        return ()
    content = {source.name: source.recipe.digest if source.recipe else source.name for source in recipe.sources}
    path = [(content[hop.source], hop.layer, hop.scale) for hop in stack.hops]
    source, layer, scale = path[0]
    return ((f"{content[stack.embedding]} | {source}", layer, scale), *path[1:])


def origins(recipe: Recipe, depth: int, known: Stack | None = None) -> list[int]:
    """Return for each layer of a recipe the layer of the models in folders that it is of the kind of.

    That of the hop's source in a stack, of the base or the first source in a blend; through sources that are recipes.

    Args:
        recipe: what is built.
        depth: the number of layers of the models in folders.
        known: the stack that it is, where that is known.
    """
    stack = known or stack_of(recipe)
    if stack is None:
        owner = recipe.base or recipe.sources[0]
        takes = [(owner, layer) for layer in depths_of(recipe, owner.name) or range(depth)]
    else:
        models = {source.name: source for source in recipe.sources}
        takes = [(models[hop.source], hop.layer) for hop in stack.hops]
    return [layer if source.recipe is None else origins(source.recipe, depth)[layer] for source, layer in takes]


def described(stack: Stack) -> str:
    """Return a stack as people write it: runs of layers of a source, with the scale at the seam before them.

    >>> hops = [Hop(source="a", layer=0), Hop(source="a", layer=1), Hop(source="b", layer=1, scale=1.25)]
    >>> described(Stack(embedding="a", hops=tuple(hops), head="a"))
    'a 0-1, b 1 (x 1.25)'
    """
    runs: list[list[Hop]] = []
    for hop in stack.hops:
        last = runs[-1][-1] if runs else None
        if last and (hop.source, hop.layer, hop.scale) == (last.source, last.layer + 1, 1.0):
            runs[-1].append(hop)
        else:
            runs.append([hop])
    texts = []
    for run in runs:
        first, last_ = run[0], run[-1]
        span = f"{first.layer}-{last_.layer}" if len(run) > 1 else f"{first.layer}"
        texts.append(f"{first.source} {span}" + (f" (x {first.scale:g})" if first.scale != 1.0 else ""))
    return ", ".join(texts)


def alike(one: Sequence[object], two: Sequence[object]) -> int:
    """Return how many hops two paths begin with alike."""
    return next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _divided(source: str, total: float, without: float) -> Blend:
    if without:
        return Blend(method="zero | sum | gain", weights={source: 1.0}, parameters={"gain": 1 / total, "of": without})
    return Blend(method="passthrough", weights={source: 1.0}, parameters={"scale": 1 / total})


def _meeting(recipe: Recipe, groups: Sequence[str], layer: int | None) -> Iterator[Route]:
    """Yield the routes that tensors of these groups may go, up to the first that takes all of them."""
    left = set(groups)
    for route in recipe.routes:
        inside = route.layers is None or (layer is not None and route.layers[0] <= layer < route.layers[1])
        if inside and (not route.groups or left & set(route.groups)):
            yield route
            if route.tensors == "*":
                left -= set(route.groups or groups)
            if not left:
                return


def _single(blends: Iterator[Blend]) -> str | None:
    """Return the one source that all of some blends are copies of."""
    found = {copied(blend) for blend in blends}
    return found.pop() if len(found) == 1 else None

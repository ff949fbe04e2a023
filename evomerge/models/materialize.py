"""From a recipe and its sources to a stream of tensors: the only place that merges."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.models.architecture import place, renamed
from evomerge.models.resident import Sources
from evomerge.operators.merging import merge_tensor, needs_base
from evomerge.operators.methods import check_blend
from evomerge.recipe import Blend, Recipe
from evomerge.value import value


@value
class Step:
    """One tensor to build: its name, the tensor of the sources that it comes from, and how to blend it."""

    name: str
    origin: str
    blend: Blend


def plan(recipe: Recipe, names: Sequence[str], depth: int) -> list[Step]:
    """Return what to build, in order: embedding, layer by layer, head.

    Args:
        recipe: what to build; its layer k takes the tensors of layer `recipe.layers[k].depth`.
        names: the tensors that every source has.
        depth: the number of layers of every source.

    Raises:
        RecipeError: if a blend is wrong or a layer takes from a layer that no source has.
        ModelError: if a tensor's name has no place in the architecture.
    """
    places = {name: place(name, depth) for name in sorted(names)}
    for k, layer in enumerate(recipe.layers):
        if not 0 <= layer.depth < depth:
            raise RecipeError(f"recipe layer {k} takes from layer {layer.depth}, but the sources have {depth} layers")
    for blend in recipe.blends():
        check_blend(blend, "recipe", recipe.base is not None)
    ends = {"embedding": recipe.embedding, "head": recipe.head}
    first, last = (
        [Step(name=name, origin=name, blend=ends[end]) for name, at in places.items() if at.end == end]
        for end in ("embedding", "head")
    )
    middle = [
        Step(name=renamed(name, k), origin=name, blend=layer.group(at.group))
        for k, layer in enumerate(recipe.layers)
        for name, at in places.items()
        if at.layer == layer.depth
    ]
    return [*first, *middle, *last]


def materialize(recipe: Recipe, sources: Sources, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Build the model of a recipe as a stream of (name, tensor) in the recipe's dtype.

    The same stream fills a live model and the shards of an export, so that what is shipped is
    what was scored. Every tensor of the sources' layers that the recipe uses, and of both
    ends, comes once. Tensors that are not floating point are copied from the first source.

    Args:
        recipe: what to build.
        sources: where the tensors of the recipe's sources and base come from, by their names.
        device: where to merge; the tensors come out there.

    Raises:
        RecipeError, ModelError: at the call, if recipe and sources do not fit.
        CandidateError: while streaming, naming the tensor whose values are not finite.
    """
    if not recipe.sources and recipe.base is None:
        raise RecipeError("recipe has neither sources nor a base; name at least one source")
    steps = plan(recipe, sources.names, sources.depth)
    return (_built(step, recipe, sources, device) for step in steps)


def _built(step: Step, recipe: Recipe, sources: Sources, device: str) -> tuple[str, Tensor]:
    """Build one tensor."""

    def read(source: str) -> Tensor:
        return sources.tensor(source, step.origin).to(device)

    first = read((recipe.sources[0] if recipe.sources else recipe.base).name)  # type: ignore[union-attr]  # one exists
    if not first.is_floating_point():
        return step.name, first.clone()
    base = read(recipe.base.name) if recipe.base is not None and needs_base(step.blend) else None
    tensors = {source: read(source) for source, weight in step.blend.weights.items() if weight != 0}
    # Masks are keyed by the name that is built: a layer that stands twice is thinned in two ways.
    merged = merge_tensor(step.blend, base, tensors, tensor=step.name, seed=recipe.seed)
    merged = merged.to(getattr(torch, recipe.dtype))
    if not bool(torch.isfinite(merged).all()):
        wrong = int((~torch.isfinite(merged)).sum())
        raise CandidateError(
            f"tensor {step.name!r}: {wrong} of {merged.numel()} values are not finite in {recipe.dtype}"
        )
    return step.name, merged

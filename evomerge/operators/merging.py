"""The public entry: merges models, or tensors of one name, that are given as tensors."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods import Given, check, method
from evomerge.operators.parts import Merge, Part, Statistic, no_statistics
from evomerge.recipe import Blend

#: Where a tensor's name has the number of its layer.
_LAYER = re.compile(r"\.(\d+)\.")


def merge_tensor(
    blend: Blend,
    base: Tensor | None,
    sources: Mapping[str, Tensor],
    *,
    tensor: str = "tensor",
    seed: int = 0,
    statistic: Statistic = no_statistics,
) -> Tensor:
    """Merge the tensors of one name; layer and model are then this tensor alone.

    Args:
        blend: method, weights by source name, parameters.
        base: the tensor W_0 of the base, or None.
        sources: the tensor W_i of each source by name, of one shape; any floating dtype.
        tensor: the name of the tensor, which keys random masks.
        seed: the seed of the recipe, which keys random masks.
        statistic: returns statistics.

    Returns:
        The merged tensor, float32.

    Raises:
        RecipeError: if the method is unknown, needs a base and has none, or weighs an absent source.
        CandidateError: if no source is left and there is no base, or normalised weights cancel.
    """

    def read(part: Part, source: str | None) -> Tensor:
        return base if source is None else sources[source]  # type: ignore[return-value]  # asked for only where there is one

    tensors = list(sources.values()) if base is None else [base, *sources.values()]
    part = Part(tensor=tensor, blend=blend, shape=tuple(tensors[0].shape) if tensors else ())
    merge = Merge([part], read, list(sources), has_base=base is not None, seed=seed, statistic=statistic)
    return next(merge.build(part))[1]


def merge(
    method: str,
    sources: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float | Mapping[str, float]] | None = None,
    parameters: Mapping[str, float | str | Sequence[float]] | None = None,
    statistics: Mapping[str, Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge whole models given as mappings from tensor name to tensor.

    Args:
        method: a name in `METHODS`, or a line of stages such as ``base | trim(0.2) | elect | mean``.
        sources: the models; all have the same names and shapes.
        base: the model that task vectors are taken from.
        weights: one per source, or one per source and tensor; all 1 if not given.
        parameters: by name; a sequence gives one value per source.
        statistics: by kind: a sequence of one mapping from tensor name per source, or one mapping for the base.
        seed: keys the random masks; source i is called `str(i)` there.

    Returns:
        The merged model in the dtype of the first source; tensors that are not floating point
        are copied from it.

    Raises:
        RecipeError: if method, parameters, weights, statistics, names or shapes do not fit.
        CandidateError: if weights that are to be normalised cancel.

    >>> merge("linear", [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])["w"]
    tensor([2.])
    """
    named = {str(i): source for i, source in enumerate(sources)}
    given: list[float | Mapping[str, float]] = [1.0] * len(named) if weights is None else list(weights)
    if not named or len(given) != len(named):
        raise RecipeError(f"merge: {len(named)} sources and {len(given)} weights; give one weight per source")
    _check_alike({**named, **({} if base is None else {"base": base})})
    per_source = {name: _by_source(name, each, named) for name, each in (parameters or {}).items()}
    parts: list[Part] = []
    for name, first in sources[0].items():
        if first.is_floating_point():
            own = {source: _weight(each, source, name) for source, each in zip(named, given, strict=True)}
            blend = Blend(method=method, weights=own, parameters=per_source)
            if not parts or own != parts[-1].blend.weights:
                check(method, own, per_source, "merge", base is not None)
            found = _LAYER.search(name)
            parts.append(
                Part(tensor=name, blend=blend, shape=tuple(first.shape), layer=int(found[1]) if found else None)
            )
    depth = 1 + max((part.layer for part in parts if part.layer is not None), default=0)

    def read(part: Part, source: str | None) -> Tensor:
        return base[part.tensor] if source is None else named[source][part.tensor]  # type: ignore[index]  # asked for only where there is one

    whole = Merge(
        parts, read, list(named), has_base=base is not None, depth=depth, seed=seed,
        statistic=_given(statistics or {}, method, named),
    )  # fmt: skip
    merged = {name: tensor for part in whole.parts for name, tensor in whole.build(part)}
    return {
        name: merged[name].to(first.dtype) if name in merged else first.clone() for name, first in sources[0].items()
    }


def _weight(given: float | Mapping[str, float], source: str, tensor: str) -> float:
    if not isinstance(given, Mapping):
        return float(given)
    if tensor not in given:
        raise RecipeError(f"merge: the weights of source {source} have none for tensor {tensor!r}")
    return float(given[tensor])


def _by_source(name: str, given: float | str | Sequence[float], sources: Mapping[str, object]) -> Given:
    if isinstance(given, str | int | float):
        return given
    if len(given) != len(sources):
        raise RecipeError(f"merge: parameter {name!r} has {len(given)} values for {len(sources)} sources")
    return dict(zip(sources, given, strict=True))


def _given(
    statistics: Mapping[str, Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]],
    name: str,
    sources: Mapping[str, object],
) -> Statistic:
    """Return a lookup in given statistics, after a check that those which the method needs are there."""
    for kind in method(name).statistics:
        if kind not in statistics and kind not in ("mask",):
            raise RecipeError(f"merge: {name} needs the statistic {kind!r}; give it in `statistics`")
    for kind, found in statistics.items():
        if not isinstance(found, Mapping) and len(found) != len(sources):
            raise RecipeError(f"merge: statistic {kind!r} has {len(found)} entries for {len(sources)} sources")

    def look(kind: str, source: str | None, tensor: str) -> Tensor | None:
        found = statistics.get(kind)
        if found is None or isinstance(found, Mapping) != (source is None):
            return None
        mine = found if isinstance(found, Mapping) else found[int(source or 0)]
        return mine.get(tensor, mine.get(""))  # what is said of a whole model has the name ""

    return look


def _check_alike(models: Mapping[str, Mapping[str, Tensor]]) -> None:
    first = models["0"]
    for source, model in models.items():
        differing = sorted(set(model) ^ set(first))
        if differing:
            raise RecipeError(f"merge: tensor {differing[0]!r} is not in all of source 0 and {source}")
        for name, tensor in model.items():
            if tensor.shape != first[name].shape:
                shapes_seen = f"{tuple(first[name].shape)} and {tuple(tensor.shape)}"
                raise RecipeError(f"merge: tensor {name!r} has shapes {shapes_seen} in source 0 and {source}")

"""Run a method's line of stages on the tensors of one name: the one interpreter of `methods`.

Arithmetic is float32 whatever the storage dtype; sources are taken in the order of their
names, so that a mapping's order changes no bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.operators import combine, edits, gates, masks, shapes
from evomerge.operators.methods import Method, Stage, check_blend, method
from evomerge.recipe import Blend
from evomerge.recipe import Parameter as Given


@dataclasses.dataclass(kw_only=True)
class _State:
    """What the stages hand on: contributions X (N, ...), gates G (N, ...) or None, the merged y (...)."""

    X: Tensor
    G: Tensor | None = None
    y: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    """What is fixed during one merge: names and weights of the N sources, parameters, and the keys of masks."""

    names: list[str]
    weights: list[float]
    parameters: Mapping[str, Given]
    method: Method
    tensor: str
    seed: int

    def argument(self, stage: Stage, name: str) -> Given:
        """Return the value of a stage's argument: fixed, given by the blend, or the method's default."""
        given = stage.parameters[name]
        if isinstance(given, str) and given in self.method.parameters:
            return self.parameters.get(given, self.method.parameters[given].default)
        return given

    def number(self, stage: Stage, name: str) -> float:
        """Return a number that is one for all sources."""
        given = self.argument(stage, name)
        if isinstance(given, Mapping):
            raise RecipeError(f"{self.method.name}: {name} takes one value for all sources, got {dict(given)}")
        return float(given)

    def each(self, stage: Stage, name: str) -> list[float]:
        """Return a number for each source, the default where the blend names none for it."""
        given = self.argument(stage, name)
        if not isinstance(given, Mapping):
            return [float(given)] * len(self.names)
        default = self.method.parameters[str(stage.parameters[name])].default
        return [float(given.get(source, default)) for source in self.names]


def merge_tensor(blend: Blend, base: Tensor | None, sources: Mapping[str, Tensor], *, tensor: str, seed: int) -> Tensor:
    """Merge the tensors of one name.

    Sources without a weight, or with weight zero, take no part; where none is left, the result
    is the base.

    Args:
        blend: method, weights by source name, parameters.
        base: the tensor W_0 of the base, or None.
        sources: the tensor W_i of each source by name, of one shape; any floating dtype.
        tensor: the name of the tensor, which keys random masks.
        seed: the seed of the recipe, which keys random masks.

    Returns:
        The merged tensor, float32.

    Raises:
        RecipeError: if the method is unknown, needs a base and has none, or weighs an absent source.
        CandidateError: if no source is left and there is no base, or normalised weights cancel.
    """
    found = method(blend.method)
    names = _taking_part(found, blend.weights)
    if not names:
        return _base_alone(base, tensor)
    missing = [name for name in names if name not in sources]
    if missing:
        raise RecipeError(f"tensor {tensor!r}: the blend weighs {missing[0]!r}, which is not among {sorted(sources)}")
    if found.needs_base and base is None:
        raise RecipeError(f"tensor {tensor!r}: {found.name} works on task vectors and needs a base; name one")
    setting = _Setting(
        names=names, weights=[blend.weights[name] for name in names],
        parameters=blend.parameters, method=found, tensor=tensor, seed=seed,
    )  # fmt: skip
    full = torch.stack([sources[name].float() for name in names])
    origin = None if found.stages[0].name == "zero" or base is None else base.float()
    state = _State(X=full if origin is None else full - origin)
    for stage in found.stages[1:]:
        _run(stage, state, setting)
    if state.y is None:
        raise RecipeError(f"method {found.name!r} has no combine stage")
    return state.y if origin is None else origin + state.y


def needs_base(blend: Blend) -> bool:
    """Tell whether merging with this blend reads the base's tensor (so that nobody loads it in vain)."""
    found = method(blend.method)
    return found.stages[0].name != "zero" or not _taking_part(found, blend.weights)


def merge(
    method: str,
    sources: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, float | str | Sequence[float]] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge whole models given as mappings from tensor name to tensor.

    Args:
        method: a name in `METHODS`.
        sources: the models; all have the same names and shapes.
        base: the model that task vectors are taken from.
        weights: one per source; all 1 if not given.
        parameters: by name; a sequence gives one value per source.
        seed: keys the random masks; source i is called `str(i)` there.

    Returns:
        The merged model in the dtype of the first source; tensors that are not floating point
        are copied from it.

    Raises:
        RecipeError: if method, parameters, weights, names or shapes do not fit.

    >>> merge("linear", [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])["w"]
    tensor([2.])
    """
    named = {str(i): source for i, source in enumerate(sources)}
    given = [1.0] * len(named) if weights is None else list(weights)
    if not named or len(given) != len(named):
        raise RecipeError(f"merge: {len(named)} sources and {len(given)} weights; give one weight per source")
    per_source = {name: _by_source(name, each, named) for name, each in (parameters or {}).items()}
    blend = Blend(method=method, weights=dict(zip(named, given, strict=True)), parameters=per_source)
    check_blend(blend, "merge", base is not None)
    _check_alike({**named, **({} if base is None else {"base": base})})
    merged = {}
    for name, first in sources[0].items():
        if first.is_floating_point():
            tensors = {source: model[name] for source, model in named.items()}
            start = None if base is None else base[name]
            merged[name] = merge_tensor(blend, start, tensors, tensor=name, seed=seed).to(first.dtype)
        else:
            merged[name] = first.clone()
    return merged


def _taking_part(found: Method, weights: Mapping[str, float]) -> list[str]:
    """Return the sources that matter, in the order of their names."""
    names = sorted(name for name, weight in weights.items() if weight != 0)
    if found.stages[-2].name == "slerp":
        return [names[i] for i in combine.heaviest(names, [weights[name] for name in names])]
    return names


def _base_alone(base: Tensor | None, tensor: str) -> Tensor:
    if base is None:
        raise CandidateError(f"tensor {tensor!r}: no source has a weight that counts, and there is no base")
    return base.to(torch.float32, copy=True)  # the caller may write to what it gets


def _run(stage: Stage, state: _State, setting: _Setting) -> None:
    """Apply one stage after the origin to the state."""
    match stage.kind, stage.name:
        case "edit", "trim":
            density, rescale = setting.each(stage, "density"), str(setting.argument(stage, "rescale"))
            state.X = edits.trim(state.X, density, rescale)
        case "edit", "drop":
            density, rescale = setting.each(stage, "density"), str(setting.argument(stage, "rescale"))
            state.X = edits.drop(state.X, _masks(state.X, density, setting), density, rescale)
        case "gate", "elect":
            state.G = gates.elect(state.X, setting.weights)
        case "combine", _:
            state.y = _combined(stage, state, setting)
        case "shape", "scale" if state.y is not None:
            state.y = shapes.scale(state.y, setting.number(stage, "by"))
        case _:
            raise RecipeError(f"method {setting.method.name!r}: no stage {stage.kind} {stage.name!r}")


def _combined(stage: Stage, state: _State, setting: _Setting) -> Tensor:
    weights = setting.weights
    if stage.name == "slerp":
        if len(weights) == 1:
            return state.X[0]
        return combine.slerp(state.X[0], state.X[1], weights[1] / (weights[0] + weights[1]))
    if stage.name == "mean" and setting.number(stage, "normalize") >= 0.5:
        if state.G is None and combine.cancels(weights):
            shown = ", ".join(f"{name} {weight:g}" for name, weight in zip(setting.names, weights, strict=True))
            raise CandidateError(f"tensor {setting.tensor!r}: weights cancel and have no average ({shown})")
        return combine.mean(state.X, weights, state.G)
    return combine.total(state.X, weights, state.G)


def _masks(X: Tensor, density: Sequence[float], setting: _Setting) -> Tensor:  # X_i of the papers
    shape = tuple(X.shape[1:])
    return torch.stack(
        [
            masks.bernoulli(masks.key(setting.seed, name, setting.tensor), shape, share, X.device)
            for name, share in zip(setting.names, density, strict=True)
        ]
    )


def _by_source(name: str, given: float | str | Sequence[float], sources: Mapping[str, object]) -> Given:
    if isinstance(given, str | int | float):
        return given
    if len(given) != len(sources):
        raise RecipeError(f"merge: parameter {name!r} has {len(given)} values for {len(sources)} sources")
    return dict(zip(sources, given, strict=True))


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

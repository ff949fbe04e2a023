"""Named ways to merge tensors, each one line of stages: pure data, checked here, run by `merging`.

A method is a line ``origin | edit* | gate* | combine | shape*``:

* an *origin* turns sources W_i (and the base W_0) into contributions X_i,
* an *edit* changes each X_i by itself,
* a *gate* compares the X_i and decides which entries of each count,
* a *combine* reduces the contributions to one tensor,
* a *shape* changes the result; the origin is then added back.

This module imports no torch, so that names and bounds can be checked and listed at once.
"""

import math
from collections.abc import Mapping

from evomerge.errors import RecipeError, nearest
from evomerge.recipe import Blend
from evomerge.value import value

#: The kinds of stages, in the order in which they may stand.
KINDS = ("origin", "edit", "gate", "combine", "shape")


@value
class Stage:
    """One step of a method; `parameters` gives a fixed value or names a parameter of the method."""

    kind: str
    name: str
    parameters: Mapping[str, float | str]


@value
class Parameter:
    """A number in [low, high] (None: unbounded), or one of `options`; per source where it says so."""

    default: float | str
    low: float | None = None
    high: float | None = None
    per_source: bool = False
    options: tuple[str, ...] = ()


@value
class Method:
    """A line of stages with its parameters; `needs_base` where task vectors are taken."""

    name: str
    stages: tuple[Stage, ...]
    parameters: Mapping[str, Parameter]
    needs_base: bool
    summary: str


def _stage(kind: str, name: str, **parameters: float | str) -> Stage:
    return Stage(kind=kind, name=name, parameters=parameters)


_DENSITY = Parameter(default=0.5, low=0.0, high=1.0, per_source=True)
_SCALE = Parameter(default=1.0)
_NORMALIZE_ON = Parameter(default=1.0, low=0.0, high=1.0)
_NORMALIZE_OFF = Parameter(default=0.0, low=0.0, high=1.0)
_TRIM_RESCALE = Parameter(default="none", options=("none", "l1"))
_DROP_RESCALE = Parameter(default="1/p", options=("1/p", "l1", "none"))

_TRIM = _stage("edit", "trim", density="density", rescale="rescale")
_DROP = _stage("edit", "drop", density="density", rescale="rescale")
_ELECT = _stage("gate", "elect")
_MEAN = _stage("combine", "mean", normalize="normalize")
_SCALED = _stage("shape", "scale", by="scale")

_LINE = (
    Method(
        name="linear",
        stages=(_stage("origin", "zero"), _MEAN),
        parameters={"normalize": _NORMALIZE_ON},
        needs_base=False,
        summary="Weighted average of full weights (Wortsman 2022, arXiv:2203.05482, section 2).",
    ),
    Method(
        name="slerp",
        stages=(_stage("origin", "base_if_any"), _stage("combine", "slerp"), _SCALED),
        parameters={"scale": _SCALE},
        needs_base=False,
        summary="Spherical interpolation of the two heaviest sources' task vectors (Shoemake 1985, section 3.3).",
    ),
    Method(
        name="task_arithmetic",
        stages=(_stage("origin", "base"), _stage("combine", "sum"), _SCALED),
        parameters={"scale": _SCALE},
        needs_base=True,
        summary="Base plus the scaled sum of weighted task vectors (Ilharco 2023, arXiv:2212.04089, section 2).",
    ),
    Method(
        name="ties",
        stages=(_stage("origin", "base"), _TRIM, _ELECT, _MEAN, _SCALED),
        parameters={"density": _DENSITY, "rescale": _TRIM_RESCALE, "normalize": _NORMALIZE_ON, "scale": _SCALE},
        needs_base=True,
        summary="Trim small entries, elect a sign, average those that agree (Yadav 2023, arXiv:2306.01708, section 4).",
    ),
    Method(
        name="dare_linear",
        stages=(_stage("origin", "base"), _DROP, _MEAN, _SCALED),
        parameters={"density": _DENSITY, "rescale": _DROP_RESCALE, "normalize": _NORMALIZE_OFF, "scale": _SCALE},
        needs_base=True,
        summary="Drop entries at random, rescale, add task vectors (Yu 2024, arXiv:2311.03099, section 3).",
    ),
    Method(
        name="dare_ties",
        stages=(_stage("origin", "base"), _DROP, _ELECT, _MEAN, _SCALED),
        parameters={"density": _DENSITY, "rescale": _DROP_RESCALE, "normalize": _NORMALIZE_OFF, "scale": _SCALE},
        needs_base=True,
        summary="Drop entries at random, then elect signs as TIES does (Yu 2024, arXiv:2311.03099, section 3).",
    ),
)

#: Every method by name.
METHODS: Mapping[str, Method] = {method.name: method for method in _LINE}


def method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        RecipeError: if there is none, with the nearest known name.
    """
    if name not in METHODS:
        raise RecipeError(f"method {name!r} is not known; {nearest(name, METHODS)}")
    return METHODS[name]


def check_blend(blend: Blend, place: str, has_base: bool) -> None:
    """Refuse a blend that no candidate could be built from.

    Args:
        blend: method, weights and parameters.
        place: file and key path, named in errors.
        has_base: whether the recipe names a base.

    Raises:
        RecipeError: for an unknown method or parameter, a value out of range, or a missing base.
    """
    if blend.method not in METHODS:
        raise RecipeError(f"{place}.method: unknown method {blend.method!r}; {nearest(blend.method, METHODS)}")
    found = METHODS[blend.method]
    if found.needs_base and not has_base:
        raise RecipeError(f"{place}.method: {found.name} works on task vectors and needs a base; name one as `base`")
    for source, weight in blend.weights.items():
        if not math.isfinite(weight):
            raise RecipeError(f"{place}.weights.{source}: a weight must be finite, got {weight}")
    for name, given in blend.parameters.items():
        if name not in found.parameters:
            way = nearest(name, found.parameters)
            raise RecipeError(f"{place}.parameters.{name}: {found.name} has no such parameter; {way}")
        _check_parameter(found.parameters[name], given, blend.weights, f"{place}.parameters.{name}")
    if "scale" in blend.parameters and found.name == "slerp" and not has_base and blend.parameters["scale"] != 1.0:
        raise RecipeError(
            f"{place}.parameters.scale: slerp without a base works on full weights, which only scale 1 keeps a model; "
            f"name a base or remove scale, got {blend.parameters['scale']}"
        )


def _check_parameter(
    parameter: Parameter, given: float | str | Mapping[str, float], sources: Mapping[str, float], place: str
) -> None:
    if not isinstance(given, Mapping):
        _check_value(parameter, given, place)
        return
    if not parameter.per_source:
        raise RecipeError(f"{place}: one value for all sources is expected, got one per source {dict(given)}")
    for source, each in given.items():
        if source not in sources:
            raise RecipeError(f"{place}.{source}: not a source of this blend; {nearest(source, sources)}")
        _check_value(parameter, each, f"{place}.{source}")


def _check_value(parameter: Parameter, given: float | str, place: str) -> None:
    if parameter.options:
        if given not in parameter.options:
            raise RecipeError(f"{place}: must be one of {', '.join(parameter.options)}, got {given!r}")
        return
    if isinstance(given, str | bool):
        raise RecipeError(f"{place}: must be a number, got {given!r}")
    low = -math.inf if parameter.low is None else parameter.low
    high = math.inf if parameter.high is None else parameter.high
    if not (math.isfinite(given) and low <= given <= high):
        raise RecipeError(f"{place}: must be finite and lie in [{low:g}, {high:g}], got {given}")

"""What the methods and parameters of mergekit 0.1.5 are here: one line each, for reading and for writing."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from evomerge.methods import Given, method
from evomerge.recipe import Blend
from evomerge.value import value

#: A value of a parameter in mergekit's file.
Scalar = float | bool

#: Values by parameter and model; what all models share stands under "".
Values = dict[str, dict[str, Scalar]]


@value
class Says:
    """What a parameter of mergekit's says.

    Attributes:
        default: its value where none is given; None: one must be given.
        each: whether each model has its own.
        ours: the parameter of the method here; empty: the weights, a condition of the line, or nothing at all.
        also: a second one that has the same value.
        no: what false is here.
        yes: what true is here.
    """

    default: Scalar | None = None
    each: bool = False
    ours: str = ""
    also: str = ""
    no: float | str = 0.0
    yes: float | str = 1.0

    @property
    def flag(self) -> bool:
        """Whether it is true or false."""
        return isinstance(self.default, bool)

    def here(self, given: Scalar) -> float | str:
        """Return a value as it is said here."""
        return (self.yes if given else self.no) if self.flag else float(given)

    def there(self, given: float | str) -> Scalar | None:
        """Return a value as mergekit says it, or None if it cannot."""
        if self.flag:
            return {self.no: False, self.yes: True}.get(given)
        return None if isinstance(given, str) else given


@value
class Line:
    """A method of mergekit's, or what it is under some of its own parameters.

    Attributes:
        name: in mergekit.
        method: here.
        base: "required", "optional" (task vectors if there is one), "first" (the first of two models that are merged),
            or "ignored" (a model like the others).
        count: the least and the most models; the base counts where it is one of them.
        parameters: by mergekit's name; "weight" is the weight of a model.
        when: the values of yes-or-no parameters under which this line holds.
        fixed: parameters here that say what mergekit always does.
    """

    name: str
    method: str
    base: str
    count: tuple[int, float]
    parameters: Mapping[str, Says]
    when: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, float | str] = dataclasses.field(default_factory=dict)

    def blend(self, values: Values, models: Sequence[str]) -> Blend:
        """Return the blend of some models: in order, the base only where it is one of them."""
        weights = values.get("weight", {})
        known = method(self.method).parameters
        parameters: dict[str, Given] = {
            name: given for name, given in self.fixed.items() if given != known[name].default
        }
        for name, says in self.parameters.items():
            found = {model: says.here(each) for model, each in values[name].items()}
            for ours in filter(None, (says.ours, says.also)):
                if len(set(found.values())) > 1:
                    parameters[ours] = {model: float(each) for model, each in found.items()}
                elif found and (one := next(iter(found.values()))) != known[ours].default:
                    parameters[ours] = one
        return Blend(
            method=self.method, weights={name: float(weights.get(name, 1.0)) for name in models}, parameters=parameters
        )

    def values(self, blend: Blend, models: Sequence[str], has_base: bool) -> Values | None:
        """Return the values with which mergekit merges some models as a blend does; None if it cannot."""
        wanted = _between(blend, models) if self.base == "first" else blend
        found: Values = {}
        for name, says in self.parameters.items():
            if name == "weight":
                found[name] = {model: wanted.weights.get(model, 0.0) for model in models}
            else:
                said = self._said(name, says, wanted, models)
                if said is None:
                    return None
                found[name] = said
        return found if _form(self.blend(found, models), has_base) == _form(wanted, has_base) else None

    def _said(self, name: str, says: Says, blend: Blend, models: Sequence[str]) -> dict[str, Scalar] | None:
        """Return the value of a parameter for each model, or of all under ""; None if mergekit cannot say it."""
        known = method(blend.method).parameters
        if says.ours not in known:
            default = self.when.get(name, says.default)
            return None if default is None else dict.fromkeys(models if says.each else [""], default)
        usual = known[says.ours].default
        given = blend.parameters.get(says.ours, usual)
        said = {m: says.there(given.get(m, usual) if isinstance(given, Mapping) else given) for m in models}
        sure = {model: each for model, each in said.items() if each is not None}
        if len(sure) < len(said) or (not says.each and len(set(sure.values())) > 1):
            return None
        return sure if says.each else {"": next(iter(sure.values()))}


def _between(blend: Blend, models: Sequence[str]) -> Blend:
    """Return a blend of two models that says how far to go by the parameter t alone."""
    weights = [blend.weights.get(model, 0.0) for model in models]
    t = blend.parameters.get("t", 0.5)
    if len(weights) != 2 or min(weights) < 0 or max(weights) == 0 or not isinstance(t, float | int):
        return blend
    one, two = (1 - t) * weights[0], t * weights[1]
    way = two / (one + two) if one + two else t
    return Blend(method=blend.method, weights=dict.fromkeys(models, 1.0), parameters={**blend.parameters, "t": way})


def _form(blend: Blend, has_base: bool) -> object:
    """Return what is the same for blends that merge alike, given whether there is a base."""
    taking = {name: weight for name, weight in blend.weights.items() if weight != 0}
    steps = [
        ("base" if has_base else "zero", {}) if step.stage.name == "base_if_any" else (step.stage.name, step.values)
        for step in method(blend.method).bound(blend.parameters, list(taking))
    ]
    return steps, taking


_WEIGHT = Says(each=True)
_SCALE = Says(default=1.0, ours="scale")
_IGNORED = {"int8_mask": Says(default=False)}


def _sparse(
    name: str, *, normalize: bool, rescale: bool, fixed: Mapping[str, float | str] | None = None, **more: Says
) -> Line:
    """Return the line of a method that thins task vectors and adds them up."""
    return Line(
        name=name, method=name, base="required", count=(0, math.inf), fixed=fixed or {},
        parameters={
            "weight": _WEIGHT, "density": Says(default=1.0, each=True, ours="density"), **more,
            "normalize": Says(default=normalize, ours="normalize"),
            "rescale": Says(default=rescale, ours="rescale", no="none", yes="l1"), "lambda": _SCALE, **_IGNORED,
        },
    )  # fmt: skip


def _task_arithmetic(ours: str, normalize: bool) -> Line:
    unused = {"density": Says(default=1.0, each=True), "rescale": Says(default=False), **_IGNORED}
    return Line(
        name="task_arithmetic", method=ours, base="required", count=(0, math.inf), when={"normalize": normalize},
        parameters={"weight": _WEIGHT, "normalize": Says(default=False), "lambda": _SCALE, **unused},
    )  # fmt: skip


def _nuslerp(axis: str, **when: bool) -> Line:
    return Line(
        name="nuslerp", method="nuslerp", base="optional", count=(2, 2), when=when,
        fixed={"axis": axis, "zero": "right_angle"},
        parameters={
            "weight": _WEIGHT, "nuslerp_flatten": Says(default=True), "nuslerp_row_wise": Says(default=False)
        },
    )  # fmt: skip


def _model_stock(scope: str, rows: bool) -> Line:
    return Line(
        name="model_stock", method="model_stock", base="required", count=(2, math.inf), when={"filter_wise": rows},
        fixed={"scope": scope, "clamp": 0.0, "floor": 1e-6}, parameters={"filter_wise": Says(default=False)},
    )  # fmt: skip


_EPSILON = Says(default=0.15, each=True, ours="epsilon")
_GAMMA = Says(default=0.01, each=True, ours="gamma")
_BAND: dict[str, float | str] = {"scope": "tensor", "count": "full"}
_RAM = {"epsilon": Says(default=1e-5, ours="epsilon")}

#: Every method of mergekit; of several lines of one name the first holds whose conditions do.
LINES = (
    Line(name="passthrough", method="passthrough", base="ignored", count=(1, 1),
         parameters={"scale": Says(default=1.0, each=True, ours="scale")}),
    Line(name="linear", method="linear", base="ignored", count=(1, math.inf),
         parameters={"weight": _WEIGHT, "normalize": Says(default=True, ours="normalize")}),
    Line(name="slerp", method="zero | slerp", base="first", count=(2, 2), fixed={"zero": "right_angle"},
         parameters={"t": Says(ours="t")}),
    _nuslerp("flatten", nuslerp_flatten=True),
    _nuslerp("rows", nuslerp_flatten=False, nuslerp_row_wise=False),
    _nuslerp("columns", nuslerp_flatten=False, nuslerp_row_wise=True),
    Line(name="multislerp", method="multislerp", base="optional", count=(1, math.inf),
         parameters={"weight": _WEIGHT, "normalize_weights": Says(default=True, ours="normalize"),
                     "eps": Says(default=1e-8)}),
    Line(name="karcher", method="zero | karcher", base="ignored", count=(1, math.inf),
         parameters={"max_iter": Says(default=10.0, ours="max_iter"), "tol": Says(default=1e-5, ours="tol")}),
    _task_arithmetic("task_arithmetic", False),
    _task_arithmetic("base | mean | scale", True),
    _sparse("ties", normalize=True, rescale=False, fixed={"scope": "tensor"}),
    _sparse("dare_linear", normalize=False, rescale=True),
    _sparse("dare_ties", normalize=False, rescale=True),
    _sparse("della", normalize=True, rescale=True, epsilon=_EPSILON),
    _sparse("della_linear", normalize=False, rescale=True, epsilon=_EPSILON),
    _sparse("breadcrumbs", normalize=False, rescale=False, fixed=_BAND, gamma=_GAMMA),
    _sparse("breadcrumbs_ties", normalize=False, rescale=False, fixed=_BAND, gamma=_GAMMA),
    _model_stock("tensor", False),
    _model_stock("row", True),
    Line(name="sce", method="base | variance | elect | energy(floor=0.000001) | mean", base="required",
         count=(0, math.inf), parameters={"select_topk": Says(default=1.0, ours="share", also="select"), **_IGNORED}),
    Line(name="nearswap", method="nearswap", base="required", count=(1, 1), parameters={"t": Says(ours="t")}),
    Line(name="arcee_fusion", method="arcee_fusion", base="required", count=(1, 1), parameters={}),
    Line(name="ram", method="ram", base="required", count=(0, math.inf), parameters=_RAM),
    Line(name="ramplus_tl", method="ramplus_tl", base="required", count=(0, math.inf),
         parameters={"r": Says(default=0.1, ours="r"), "alpha": Says(default=0.2, ours="alpha"), **_RAM}),
)  # fmt: skip

#: Every parameter of mergekit's methods.
PARAMETERS = tuple(dict.fromkeys(name for line in LINES for name in line.parameters))

"""Methods: lines of stages, as text and as plain data, checked and brought to one form without torch.

A line reads ``base | trim(density=0.2, scope=model) | elect | mean | scale``. Its stages stand in this order:

* one *origin* turns the sources W_i (and the base W_0) into contributions X_i,
* a *basis*, if any, gives the X_i new coordinates; the merged tensor is brought back at the end,
* *edits* change each X_i by itself,
* *gates* compare the X_i and say which entries of each count; *weighs* set the weights,
* one *combine* reduces the contributions to one tensor,
* *shapes* change the result; what the origin took away is then added back.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from evomerge.errors import RecipeError, nearest
from evomerge.value import value

#: What a parameter of a stage may be: one for all sources, or one per source name.
Given = float | str | Mapping[str, float]

#: The kinds of stages, with their rank in a line: it never falls.
KINDS = {"origin": 0, "basis": 1, "edit": 2, "gate": 3, "weigh": 3, "combine": 4, "shape": 5}


@value
class Parameter:
    """A number in [low, high] (None: unbounded), or one of `options`; per source, and whole, where it says so."""

    default: float | str
    low: float | None = None
    high: float | None = None
    per_source: bool = False
    whole: bool = False
    options: tuple[str, ...] = ()
    text: bool = False

    def check(self, given: object, place: str) -> None:
        """Refuse a value that is no option, no number, or out of range.

        Raises:
            RecipeError: with the place, what is allowed, and the value.
        """
        if self.options:
            if given not in self.options:
                raise RecipeError(f"{place}: must be one of {', '.join(self.options)}, got {given!r}")
            return
        if self.text:
            if not isinstance(given, str):
                raise RecipeError(f"{place}: must be a text, got {given!r}")
            return
        if isinstance(given, str | bool) or not isinstance(given, int | float):
            raise RecipeError(f"{place}: must be a number, got {given!r}")
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if not (math.isfinite(given) and low <= given <= high):
            raise RecipeError(f"{place}: must be finite and lie in [{low:g}, {high:g}], got {given}")
        if self.whole and given != int(given):
            raise RecipeError(f"{place}: must be a whole number, got {given}")


@value
class Stage:
    """A kind of step that lines are made of.

    Attributes:
        name: unique among all stages.
        kind: one of `KINDS`.
        parameters: by name.
        formula: what it does, in the symbols of the module docstring.
        reference: where it was published.
        neutral: parameter values with which it does nothing, so that it drops out of a line.
        alone: whether it does nothing to a single source.
        elementwise: whether an entry of the result depends on that entry of the sources alone, given the facts
            about the whole tensor (or layer, or model) that the stage asks for.
        random: whether it draws masks.
        statistics: kinds of statistics that it takes as inputs.
    """

    name: str
    kind: str
    parameters: Mapping[str, Parameter]
    formula: str
    reference: str = ""
    neutral: Mapping[str, float | str] | None = None
    alone: bool = False
    elementwise: bool = False
    random: bool = False
    statistics: tuple[str, ...] = ()


@value
class Step:
    """One stage of a line with the values that the line gives it."""

    stage: Stage
    values: Mapping[str, Given]


@value
class Method:
    """A line of stages, named or a user's own.

    Every parameter of its stages is a parameter of the method; the line holds this method's defaults.
    `parameters` names them: by the parameter's name where one stage of the line has it, else `stage.parameter`.
    """

    name: str
    line: str
    steps: tuple[Step, ...]
    reference: str = ""

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors."""
        return self.steps[0].stage.name == "base"

    @property
    def statistics(self) -> tuple[str, ...]:
        """The kinds of statistics that it takes as inputs."""
        return tuple(dict.fromkeys(kind for step in self.steps for kind in step.stage.statistics))

    @property
    def random(self) -> bool:
        """Whether it draws masks."""
        return any(step.stage.random for step in self.steps)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter, with this method's default."""
        return {
            name: Parameter(**{**vars(step.stage.parameters[own]), "default": step.values[own]})
            for name, (step, own) in self._addresses().items()
            if name == own or own not in self._addresses()
        }

    def find(self, name: str) -> Parameter | None:
        """Return the parameter of this name, or None; `stage.parameter` is always a name."""
        found = self._addresses().get(name)
        return None if found is None else found[0].stage.parameters[found[1]]

    def bound(self, given: Mapping[str, Given], names: Sequence[str]) -> tuple[Step, ...]:
        """Return the steps with given values in place of defaults, and without those that do nothing.

        Args:
            given: values by parameter name.
            names: the sources that take part; a value per source is completed to one for each of them, and
                becomes one number where they are all the same.
        """
        values = [dict(step.values) for step in self.steps]
        order = {id(step): i for i, step in enumerate(self.steps)}
        for name, (step, own) in self._addresses().items():
            if name in given:
                values[order[id(step)]][own] = _completed(given[name], step.values[own], names)
        steps = [Step(stage=step.stage, values=mine) for step, mine in zip(self.steps, values, strict=True)]
        return tuple(step for step in steps if not _does_nothing(step, len(names)))

    def _addresses(self) -> dict[str, tuple[Step, str]]:
        pairs = [(step, own) for step in self.steps for own in step.stage.parameters]
        names = [own for _, own in pairs]
        short = {own: (step, own) for step, own in pairs if names.count(own) == 1}
        return short | {f"{step.stage.name}.{own}": (step, own) for step, own in pairs}


def _does_nothing(step: Step, sources: int) -> bool:
    if step.stage.alone and sources == 1:
        return True
    neutral = step.stage.neutral
    if not neutral:
        return False
    return all(step.values[name] == value for name, value in neutral.items())


def _completed(given: Given, default: Given, names: Sequence[str]) -> Given:
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        return float(given)
    each: dict[str, float] = {name: float(given.get(name, default)) for name in names}  # type: ignore[arg-type]  # a line's default is a number
    return next(iter(each.values())) if len(set(each.values())) == 1 else each


_STEP = re.compile(r"^(?P<name>\w+)\s*(?:\((?P<arguments>[^()]*)\))?$", re.ASCII)


def parse_line(line: str, stages: Mapping[str, Stage], place: str) -> tuple[Step, ...]:
    """Read a line of stages.

    Args:
        line: like ``base | trim(density=0.2) | mean``; the first argument of a stage may stand without its name.
        stages: what the names mean.
        place: named in errors.

    Raises:
        RecipeError: for an unknown stage or parameter, a wrong value, or an order that makes no line.
    """
    steps = tuple(_step(part.strip(), stages, place) for part in line.split("|"))
    names = [step.stage.name for step in steps]
    ranks = [KINDS[step.stage.kind] for step in steps]
    for one, two in pairwise(steps):
        if KINDS[one.stage.kind] > KINDS[two.stage.kind]:
            raise RecipeError(
                f"{place}: {one.stage.kind} {one.stage.name!r} stands before {two.stage.kind} {two.stage.name!r}; "
                f"the order is {' | '.join(KINDS)}"
            )
    for kind in ("origin", "combine"):
        if ranks.count(KINDS[kind]) != 1:
            known = ", ".join(stage.name for stage in stages.values() if stage.kind == kind)
            raise RecipeError(f"{place}: a line has exactly one {kind}, got {line!r}; {kind}s: {known}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{place}: stage {twice!r} stands twice in {line!r}; leave one out")
    return steps


def _step(text: str, stages: Mapping[str, Stage], place: str) -> Step:
    found = _STEP.match(text)
    if not found:
        raise RecipeError(f"{place}: {text!r} is not a stage; write name or name(parameter=value, …)")
    if found["name"] not in stages:
        raise RecipeError(f"{place}: unknown stage {found['name']!r}; {nearest(found['name'], stages)}")
    stage = stages[found["name"]]
    values: dict[str, Given] = {name: parameter.default for name, parameter in stage.parameters.items()}
    given = [part.strip() for part in (found["arguments"] or "").split(",") if part.strip()]
    for i, argument in enumerate(given):
        name, equals, number = (part.strip() for part in argument.partition("="))
        if not equals:
            name, number = next(iter(stage.parameters), ""), name
            if i or not name:
                raise RecipeError(f"{place}: {text!r}: only the first argument may stand without its name")
        if name not in stage.parameters:
            raise RecipeError(f"{place}: {stage.name} has no parameter {name!r}; {nearest(name, stage.parameters)}")
        values[name] = _number(number)
        stage.parameters[name].check(values[name], f"{place}.{name}")
    return Step(stage=stage, values=values)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@lru_cache(maxsize=1024)
def method(name: str, place: str = "method") -> Method:
    """Return the method of this name, or the one that a line of stages is.

    Raises:
        RecipeError: if there is none, with the nearest known name; if the line is wrong.
    """
    from evomerge.stages import METHODS, STAGES

    if name in METHODS:
        return METHODS[name]
    if "|" not in name:
        raise RecipeError(f"{place}: unknown method {name!r}; {nearest(name, METHODS)}")
    return Method(name=name, line=name, steps=parse_line(name, STAGES, place))


def check(
    name: str,
    weights: Mapping[str, float],
    parameters: Mapping[str, Given],
    place: str,
    has_base: bool,
) -> None:
    """Refuse a method with weights and parameters that no tensor could be merged by.

    Args:
        name: a method's name, or a line of stages.
        weights: by source name.
        parameters: by name, one value or one per source.
        place: file and key path, named in errors.
        has_base: whether there is a base.

    Raises:
        RecipeError: for an unknown method or parameter, a value out of range, or a missing base.
    """
    found = method(name, f"{place}.method")
    if found.needs_base and not has_base:
        raise RecipeError(f"{place}.method: {found.name} works on task vectors and needs a base; name one as `base`")
    for source, weight in weights.items():
        if not math.isfinite(weight):
            raise RecipeError(f"{place}.weights.{source}: a weight must be finite, got {weight}")
    known = found.parameters
    for name_, given in parameters.items():
        parameter = found.find(name_)
        if parameter is None:
            way = nearest(name_, known) if known else "it has none"
            raise RecipeError(f"{place}.parameters.{name_}: {found.name} has no such parameter; {way}")
        short = name_.partition(".")[2]
        if name_ not in known and short in parameters:
            raise RecipeError(f"{place}.parameters.{name_}: given a second time as {short!r}; leave one out")
        _check_given(parameter, given, weights, f"{place}.parameters.{name_}")
    if not has_base and found.steps[0].stage.name == "base_if_any":
        scale = parameters.get("scale", 1.0)
        if "scale" in known and scale != 1.0:
            raise RecipeError(
                f"{place}.parameters.scale: {found.name} without a base works on full weights, which only scale 1 "
                f"keeps a model; name a base or remove scale, got {scale}"
            )


def _check_given(parameter: Parameter, given: Given, sources: Mapping[str, float], place: str) -> None:
    if not isinstance(given, Mapping):
        parameter.check(given, place)
        return
    if not parameter.per_source:
        raise RecipeError(f"{place}: one value for all sources is expected, got one per source {dict(given)}")
    for source, each in given.items():
        if source not in sources:
            raise RecipeError(f"{place}.{source}: not a source of this blend; {nearest(source, sources)}")
        parameter.check(each, f"{place}.{source}")


def draws(name: str, weights: Mapping[str, float], parameters: Mapping[str, Given]) -> bool:
    """Tell whether a method with these weights and parameters draws random masks; what is no method draws none."""
    try:
        steps = method(name).bound(parameters, [source for source, weight in weights.items() if weight != 0])
    except RecipeError:
        return False
    return any(step.stage.random for step in steps)


def canonical(name: str, weights: Mapping[str, float], parameters: Mapping[str, Given]) -> Sequence[object]:
    """Return the one form of a method with its weights and parameters, equal for all that merge alike.

    Sources without weight take no part and are left out, stages that do nothing too; a named method
    and its line are the same; a parameter that is the same for all sources is one number.
    """
    try:
        found = method(name)
    except RecipeError:  # told where it is checked; a digest must not raise
        return [name, dict(weights), dict(parameters)]
    taking = {source: float(weight) for source, weight in sorted(weights.items()) if weight != 0}
    if weights and not taking:
        return []  # the base, whatever the method
    return [[[step.stage.name, step.values] for step in found.bound(parameters, list(taking))], taking]

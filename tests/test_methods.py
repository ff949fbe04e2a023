"""Methods: the grammar of lines, parameters and their names, what is dropped, and the tables of stages and methods."""

import inspect
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.methods import KINDS, Method, Parameter, Stage, canonical, check, draws, method, parse_line
from evomerge.stages import METHODS, STAGES

SHARE = Parameter(default=0.5, low=0.0, high=1.0, per_source=True)
WORD = Parameter(default="red", options=("red", "1/p", "green"))
#: A small table, so that the grammar is tested apart from the stages that there are.
TABLE = {
    stage.name: stage
    for stage in (
        Stage(name="start", kind="origin", parameters={}, formula="X"),
        Stage(name="other", kind="origin", parameters={}, formula="X"),
        Stage(name="turn", kind="basis", parameters={}, formula="X"),
        Stage(
            name="cut",
            kind="edit",
            parameters={"keep": SHARE, "colour": WORD, "pattern": Parameter(default="*", text=True)},
            formula="X",
            neutral={"keep": 1.0},
        ),
        Stage(name="thin", kind="edit", parameters={"keep": SHARE}, formula="X", neutral={"keep": 1.0}, random=True),
        Stage(name="vote", kind="gate", parameters={}, formula="G", alone=True),
        Stage(name="sway", kind="weigh", parameters={}, formula="w", statistics=("loss", "gram")),
        Stage(
            name="add",
            kind="combine",
            parameters={"times": Parameter(default=1.0, low=1.0, whole=True)},
            formula="y",
            statistics=("gram",),
        ),
        Stage(name="grow", kind="shape", parameters={"by": Parameter(default=2.0)}, formula="y", neutral={"by": 1.0}),
    )
}


def line(text):
    """Return the method that a line of the small table is."""
    return Method(name=text, line=text, steps=parse_line(text, TABLE, "here"))


def told(steps):
    """Return the names and values of steps."""
    return [(step.stage.name, dict(step.values)) for step in steps]


def test_a_line_is_read_stage_by_stage() -> None:
    """Defaults are the stage's, the first argument may stand without its name, spaces do not count."""
    found = parse_line("start|cut( 0.25 ,colour = 1/p,pattern=*_a.? ) | vote() |add| grow ( by=-1e-3 )", TABLE, "here")

    assert told(found) == [
        ("start", {}),
        ("cut", {"keep": 0.25, "colour": "1/p", "pattern": "*_a.?"}),
        ("vote", {}),
        ("add", {"times": 1.0}),
        ("grow", {"by": -1e-3}),
    ]
    assert [type(value) for value in found[1].values.values()] == [float, str, str]


@pytest.mark.parametrize("text", ["start | turn | cut | thin | vote | sway | add | grow", "start | sway | vote | add"])
def test_every_kind_has_its_place(text: str) -> None:
    """The longest line is one; gates and weighs stand in any order."""
    assert " | ".join(step.stage.name for step in parse_line(text, TABLE, "here")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a stage; write name or name(parameter=value, …)"),
        ("start || add", "'' is not a stage"),
        ("start | cut(1 | add", "'cut(1' is not a stage"),
        ("start | cut(0.1)(0.2) | add", "'cut(0.1)(0.2)' is not a stage"),
        ("start | cüt | add", "'cüt' is not a stage"),
        ("start | cutt | add", "unknown stage 'cutt'; did you mean 'cut'?"),
        ("start | cut(kep=0.1) | add", "cut has no parameter 'kep'; did you mean 'keep'?"),
        ("start | cut(colour=red, 0.5) | add", "only the first argument may stand without its name"),
        ("start | vote(1) | add", "only the first argument may stand without its name"),
        ("start | vote(by=1) | add", "vote has no parameter 'by'"),
        ("start | cut(1.5) | add", "here.keep: must be finite and lie in [0, 1], got 1.5"),
        ("start | cut(nan) | add", "here.keep: must be finite"),
        ("start | cut(much) | add", "here.keep: must be a number, got 'much'"),
        ("start | cut(colour=blue) | add", "here.colour: must be one of red, 1/p, green, got 'blue'"),
        ("start | cut(pattern=3) | add", "here.pattern: must be a text, got 3.0"),
        ("start | add(1.5)", "here.times: must be a whole number, got 1.5"),
        ("start | add(0)", "here.times: must be finite and lie in [1, inf], got 0.0"),
        ("start | add | grow(inf)", "here.by: must be finite"),
        ("cut | start | add", "edit 'cut' stands before origin 'start'; the order is " + " | ".join(KINDS)),
        ("start | vote | cut | add", "gate 'vote' stands before edit 'cut'"),
        ("start | add | vote", "combine 'add' stands before gate 'vote'"),
        ("start | grow | add", "shape 'grow' stands before combine 'add'"),
        ("cut | add", "a line has exactly one origin, got 'cut | add'; origins: start, other"),
        ("start | other | add", "a line has exactly one origin"),
        ("start | cut", "a line has exactly one combine, got 'start | cut'; combines: add"),
        ("start | cut | cut | add", "stage 'cut' stands twice in 'start | cut | cut | add'; leave one out"),
    ],
)
def test_what_is_no_line_is_refused(text: str, message: str) -> None:
    """The error names the place, the part that is wrong, and what it may be."""
    with pytest.raises(RecipeError) as caught:
        parse_line(text, TABLE, "here")
    assert str(caught.value).startswith("here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_have_short_names_where_one_stage_has_them() -> None:
    """A name that two stages have is `stage.parameter`, which finds every parameter; defaults are the line's."""
    found = line("start | cut(0.25) | thin | add | grow")

    assert {name: parameter.default for name, parameter in found.parameters.items()} == {
        "cut.keep": 0.25,
        "colour": "red",
        "pattern": "*",
        "thin.keep": 0.5,
        "times": 1.0,
        "by": 2.0,
    }
    assert found.find("keep") is None
    assert found.find("cut.keep") == found.find("thin.keep") == SHARE
    assert found.find("grow.by") == found.find("by") == TABLE["grow"].parameters["by"]
    assert line("start | cut | add").find("keep") == SHARE
    assert found.find("cut") is None


def test_bound_puts_values_in_place_of_defaults() -> None:
    """By either name; the line's own values stay where none are given."""
    found = line("start | cut(0.25) | thin | add | grow")
    steps = found.bound({"cut.keep": 0.75, "grow.by": 3, "colour": "green"}, ["a", "b"])

    assert told(steps) == [
        ("start", {}),
        ("cut", {"keep": 0.75, "colour": "green", "pattern": "*"}),
        ("thin", {"keep": 0.5}),
        ("add", {"times": 1.0}),
        ("grow", {"by": 3.0}),
    ]
    assert told(found.steps)[1] == ("cut", {"keep": 0.25, "colour": "red", "pattern": "*"})


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2}),
        ({"b": 0.2}, {"a": 0.25, "b": 0.2}),
        ({"c": 0.2}, 0.25),
        ({"a": 0.2, "b": 0.2, "c": 0.9}, 0.2),
        ({}, 0.25),
        (1, 1.0),
    ],
)
def test_a_value_per_source_is_completed(given_: object, expected: object) -> None:
    """By the line's default, for the sources that take part alone; equal ones become one number."""
    steps = line("start | cut(0.25) | add").bound({"keep": given_}, ["a", "b"])  # type: ignore[dict-item]  # of every kind

    if expected == 1.0:
        assert [step.stage.name for step in steps] == ["start", "add"]
    else:
        assert steps[1].values["keep"] == expected


def test_stages_that_do_nothing_are_dropped() -> None:
    """Neutral values, given or of the line, for all sources; gates of one source; and nothing else."""

    def names(text: str, sources: str, **given_: object) -> list[str]:
        return [step.stage.name for step in line(text).bound(given_, list(sources))]  # type: ignore[arg-type]  # of every kind

    text = "start | cut(1) | vote | add | grow"
    assert names(text, "ab") == ["start", "vote", "add", "grow"]
    assert names(text, "a") == ["start", "add", "grow"]
    assert names(text, "ab", by=1) == ["start", "vote", "add"]
    assert names(text, "ab", keep=0.9) == ["start", "cut", "vote", "add", "grow"]
    assert names(text, "ab", keep={"a": 0.9}) == ["start", "cut", "vote", "add", "grow"]
    assert names(text, "ab", keep={"c": 0.9}) == ["start", "vote", "add", "grow"]
    assert names("start | cut(0) | add(times=1)", "a") == ["start", "cut", "add"]


def test_a_method_knows_what_its_stages_need() -> None:
    """Statistics once each, random masks, and a base where the origin takes task vectors."""
    assert line("start | sway | add").statistics == ("loss", "gram")
    assert line("start | cut | add").statistics == ("gram",)
    assert (line("start | thin | add").random, line("start | cut | add").random) == (True, False)
    assert (method("base | sum").needs_base, method("zero | mean").needs_base) == (True, False)
    assert not method("base_if_any | mean").needs_base


def test_a_method_is_found_by_name_or_is_a_line() -> None:
    """What has a bar is a line; other names must be known, and the error names the nearest one."""
    assert method("ties") is METHODS["ties"]
    assert told(method("base|sum").steps) == [("base", {}), ("sum", {})]
    with pytest.raises(RecipeError, match=r"^place: unknown method 'tiess'; did you mean 'ties'\?$"):
        method("tiess", "place")
    with pytest.raises(RecipeError, match=r"^place: unknown stage 'sun'; did you mean 'sum'\?$"):
        method("base | sun", "place")
    with pytest.raises(RecipeError, match="unknown method 'mean'"):
        method("mean")


WEIGHTS = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("name", "weights", "parameters", "message"),
    [
        ("tie", WEIGHTS, {}, "here.method: unknown method 'tie'"),
        ("base | trim(2) | sum", WEIGHTS, {}, r"here.method.density: must be finite and lie in \[0, 1\], got 2"),
        ("ties", {"a": math.nan}, {}, "here.weights.a: a weight must be finite, got nan"),
        ("ties", {"a": -math.inf}, {}, "here.weights.a: a weight must be finite, got -inf"),
        ("ties", WEIGHTS, {"densty": 0.1}, r"here.parameters.densty: ties has no such parameter; did you mean 'dens"),
        ("base | sum", WEIGHTS, {"x": 0.1}, r"here.parameters.x: base \| sum has no such parameter; it has none"),
        ("ties", WEIGHTS, {"density": 1.5}, r"here.parameters.density: must be finite and lie in \[0, 1\], got 1.5"),
        ("ties", WEIGHTS, {"density": "0.5"}, "here.parameters.density: must be a number, got '0.5'"),
        ("ties", WEIGHTS, {"density": True}, "here.parameters.density: must be a number, got True"),
        ("ties", WEIGHTS, {"density": {"a": 2}}, r"here.parameters.density.a: must be finite and lie in \[0, 1\]"),
        (
            "ties",
            WEIGHTS,
            {"density": {"c": 0.5}},
            "here.parameters.density.c: not a source of this blend; known: a, b",
        ),
        (
            "ties",
            WEIGHTS,
            {"scale": {"a": 1.0}},
            "here.parameters.scale: one value for all sources is expected, got one",
        ),
        (
            "ties",
            WEIGHTS,
            {"trim.scope": "modle"},
            "here.parameters.trim.scope: must be one of tensor, row, layer, model",
        ),
        ("linear", WEIGHTS, {"normalize": 0.5}, "here.parameters.normalize: must be a whole number, got 0.5"),
        (
            "ties",
            WEIGHTS,
            {"density": 0.5, "trim.density": 0.5},
            "here.parameters.trim.density: given a second time as 'density'; leave one out",
        ),
    ],
)
def test_wrong_blends_are_refused(name: str, weights: dict, parameters: dict, message: str) -> None:
    """The error names the key path, what is allowed, and the value."""
    with pytest.raises(RecipeError, match=f"^{message}"):
        check(name, weights, parameters, "here", has_base=True)


def test_a_missing_base_is_refused_where_it_is_needed() -> None:
    """Task vectors need one; what takes either works on full weights, which a scale would spoil."""
    check("linear", WEIGHTS, {}, "here", has_base=False)
    check("base_if_any | mean | scale", WEIGHTS, {"scale": 1}, "here", has_base=False)
    check("base_if_any | mean | scale", WEIGHTS, {"scale": 0.5}, "here", has_base=True)
    with pytest.raises(RecipeError, match=r"^here\.method: ties works on task vectors and needs a base; name one as"):
        check("ties", WEIGHTS, {}, "here", has_base=False)
    with pytest.raises(RecipeError, match=r"^here\.parameters\.scale: .* full weights, .*, got 0.5"):
        check("base_if_any | mean | scale", WEIGHTS, {"scale": 0.5}, "here", has_base=False)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_named_method_is_its_line(name: str) -> None:
    """One canonical form and the same parameters, with and without values; the defaults are the line's."""
    found, as_line = METHODS[name], method(METHODS[name].line)
    numbers = {
        key: 0.75 for key, parameter in found.parameters.items() if parameter.per_source and parameter.high == 1.0
    }

    assert found.parameters == as_line.parameters
    for weights in (WEIGHTS, {"a": 1.0, "b": 0.0}):
        for parameters in ({}, numbers):
            assert canonical(name, weights, parameters) == canonical(found.line, weights, parameters)
    check(name, WEIGHTS, {key: parameter.default for key, parameter in found.parameters.items()}, "here", has_base=True)
    defaults = {key: parameter.default for key, parameter in found.parameters.items()}
    assert canonical(name, WEIGHTS, defaults) == canonical(name, WEIGHTS, {})


@settings(max_examples=40, deadline=None)
@given(density=st.floats(0, 1), scale=st.floats(-2, 2), weight=st.floats(-2, 2))
def test_the_canonical_form_counts_what_counts(density: float, scale: float, weight: float) -> None:
    """It is the same with neutral stages written or left out, and another with any other number."""
    weights = {"a": 1.0, "b": weight}
    stages = ["base", f"trim({density!r})" if density != 1 else "", "sum", f"scale({scale!r})" if scale != 1 else ""]
    short = " | ".join(filter(None, stages))
    long = canonical("base | trim | drop(1) | sum | scale", weights, {"trim.density": density, "scale": scale})

    assert canonical(short, weights, {}) == long
    assert canonical(short, weights | {"b": weight + 1}, {}) != long
    assert canonical(short, weights | {"c": 0.0}, {}) == long


def test_what_is_no_method_has_a_form_too() -> None:
    """A digest never raises: unknown methods count as they are written, and draw nothing."""
    assert canonical("nothing", {"a": 0.0}, {"p": 1}) != canonical("nothing", {}, {"p": 1})
    assert not draws("nothing", WEIGHTS, {})


def test_masks_are_drawn_where_a_stage_draws_them() -> None:
    """Not where the stage does nothing: for all sources, or for those that have a weight."""
    assert draws("dare_linear", WEIGHTS, {})
    assert not draws("ties", WEIGHTS, {})
    assert not draws("dare_linear", WEIGHTS, {"density": 1})
    assert draws("dare_linear", WEIGHTS, {"density": {"a": 1.0}})
    assert not draws("dare_linear", {"a": 1.0, "b": 0.0}, {"density": {"a": 1.0}})


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_stage_is_told_and_has_its_function(name: str) -> None:
    """Its kind is known, its neutral values are values, and its function takes exactly the table's parameters."""
    from evomerge.operators.line import functions

    stage = STAGES[name]
    assert (stage.name, stage.kind in KINDS, bool(stage.formula)) == (name, True, True)
    for key, parameter in stage.parameters.items():
        parameter.check(parameter.default, f"{name}.{key}")
        assert "." not in key
    for key, neutral in (stage.neutral or {}).items():
        stage.parameters[key].check(neutral, f"{name}.{key}")
    state, *taken = inspect.signature(functions()[name]).parameters.values()
    assert state.name == "s"
    assert [parameter.name for parameter in taken] == list(stage.parameters)
    assert all(parameter.default is inspect.Parameter.empty for parameter in taken)


def test_every_method_says_where_it_was_published() -> None:
    """Each has a reference, and so has each stage but those that nobody had to publish."""
    assert all(found.reference for found in METHODS.values())
    assert {name for name, stage in STAGES.items() if not stage.reference} <= {
        "zero",
        "base_if_any",
        "centre",
        "norm_match",
    }

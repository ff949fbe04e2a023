"""Values and errors: the plain form, its digest, and what is refused on the way back."""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import errors
from evomerge.errors import EvomergeError, InvalidInput, ModelError, RecipeError, nearest
from evomerge.value import Plain, canonical, digest, encoded, parse, plain, value


@value
class Point:
    """A value in a value."""

    x: float
    label: str = ""


@value
class Everything:
    """One field of every type that the values of evomerge have."""

    real: float
    whole: int
    text: str
    flag: bool
    maybe: float | None
    gene: tuple[float | int | str, ...]
    point: Point
    points: tuple[Point, ...]
    named: Mapping[str, Point]
    parameter: float | str | Mapping[str, float]
    table: Mapping[str, tuple[float, ...]]
    anything: Plain = None


@value
class Even:
    """A value with a rule of its own."""

    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise RecipeError(f"number must be even, got {self.number}")


REALS = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.builds(Point, x=REALS, label=st.text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | REALS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
VALUES = st.builds(
    Everything,
    real=REALS,
    whole=st.integers(),
    text=st.text(),
    flag=st.booleans(),
    maybe=st.none() | REALS,
    gene=st.lists(REALS | st.integers() | st.text(), max_size=4).map(tuple),
    point=POINTS,
    points=st.lists(POINTS, max_size=3).map(tuple),
    named=st.dictionaries(st.text(), POINTS, max_size=3),
    parameter=REALS | st.text() | st.dictionaries(st.text(), REALS, max_size=3),
    table=st.dictionaries(st.text(), st.lists(REALS, max_size=3).map(tuple), max_size=3),
    anything=JSON,
)
ONE = Everything(
    real=1.5, whole=2, text="a", flag=True, maybe=None, gene=(1, 1.0, "one"), point=Point(x=0.0),
    points=(), named={"p": Point(x=1.0)}, parameter=0.5, table={"t": (0.0, 1.0)},
)  # fmt: skip


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_parse_undoes_plain(thing):
    """A value comes back from its plain form, and from that form as JSON text, equal and of the same types."""
    assert parse(Everything, plain(thing), "here") == thing

    back = parse(Everything, json.loads(canonical(thing)), "here")
    assert back == thing
    assert [type(gene) for gene in back.gene] == [type(gene) for gene in thing.gene]


@given(st.dictionaries(st.text(), JSON, max_size=4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_digest_does_not_depend_on_the_order_of_keys(form, rng):
    """Whoever fills a mapping, in whatever order, gets the same content address."""
    keys = list(form)
    rng.shuffle(keys)

    assert digest({key: form[key] for key in keys}) == digest(form)


def test_the_digest_is_sha256_of_the_json_text():
    """Another program finds the same address with a JSON library and SHA-256."""
    text = '{"label":"ä","x":0.1}'

    assert canonical(Point(x=0.1, label="ä")) == text
    assert digest(Point(x=0.1, label="ä")) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_plain_holds_only_what_json_holds():
    """Values become mappings with their defaults, tuples lists, keys text."""
    assert plain({1: (Point(x=1.0),)}) == {"1": [{"x": 1.0, "label": ""}]}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_address_for_what_is_not_finite(number):
    """JSON has no NaN and no infinity, so neither has the text of a value."""
    with pytest.raises(ValueError, match="JSON"):
        canonical({"x": number})


def test_text_that_utf8_cannot_hold_is_escaped_as_in_json():
    """A file name that is not text can stand in a message: its address and its bytes exist and read back."""
    odd = "no file \\" + b"\xff".decode(errors="surrogateescape")

    assert json.loads(encoded(canonical([odd]))) == [odd]
    assert digest(odd) != digest("no file \\")


def test_values_are_frozen_and_given_by_keyword():
    """A value cannot be changed or built by position."""
    with pytest.raises(FrozenInstanceError):
        Point(x=1.0).x = 2.0
    with pytest.raises(TypeError):
        Point(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reel": 1.0}, r"file.reel: unknown key; did you mean 'real'\?"),
        ({1: 1.0}, "file.1: unknown key; known: real, whole"),
        ({"real": "1"}, "file.real: expected float, got str '1'"),
        ({"real": True}, "file.real: expected float, got bool True"),
        ({"real": math.nan}, "file.real: expected a finite number, got nan"),
        ({"real": 10**400}, "file.real: expected a number below 1.8e308"),
        ({"whole": 1.0}, "file.whole: expected int, got float 1.0"),
        ({"whole": True}, "file.whole: expected int, got bool True"),
        ({"text": None}, "file.text: expected str, got NoneType None"),
        ({"flag": 1}, "file.flag: expected bool, got int 1"),
        ({"maybe": "x"}, "file.maybe: expected float, got str 'x'"),
        ({"maybe": math.inf}, "file.maybe: expected a finite number, got inf"),
        ({"gene": [1, None]}, r"file.gene\[1\]: expected str, got NoneType None"),
        ({"gene": [math.nan]}, r"file.gene\[0\]: expected a finite number, got nan"),
        ({"gene": "abc"}, "file.gene: expected a list, got str 'abc'"),
        ({"point": 3}, "file.point: expected a mapping for Point, got int 3"),
        ({"point": {}}, "file.point.x: missing; Point needs it"),
        ({"points": [{"x": 1}, {"y": 1}]}, r"file.points\[1\].y: unknown key"),
        ({"named": []}, r"file.named: expected a mapping, got list \[\]"),
        ({"named": {"p": {"x": []}}}, r"file.named.p.x: expected float, got list \[\]"),
        ({"parameter": [1]}, r"file.parameter: expected a mapping, got list \[1\]"),
        ({"parameter": {"a": math.inf}}, "file.parameter.a: expected a finite number, got inf"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change, message):
    """The error has the class asked for, the key path and the offending value, on one line."""
    with pytest.raises(ModelError, match=f"^{message}") as caught:
        parse(Everything, plain(ONE) | change, "file", ModelError)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_taken_for_real_ones_but_not_the_other_way_round():
    """`1` in a file fills a float, alone and among other types; where int is allowed it stays one."""
    thing = parse(Everything, plain(ONE) | {"real": 1, "maybe": 2, "parameter": 3, "gene": [4]}, "file")

    assert [type(x) for x in (thing.real, thing.maybe, thing.parameter, *thing.gene)] == [float, float, float, int]


def test_a_rule_of_the_class_is_told_with_its_place():
    """What `__post_init__` refuses gets the place, and the class of error of the caller."""
    with pytest.raises(ModelError, match=r"^file: number must be even, got 3$"):
        parse(Even, {"number": 3}, "file", ModelError)


def test_a_missing_field_is_named_and_defaults_are_filled():
    """A field without default must be given, one with a default need not."""
    assert parse(Point, {"x": 1}, "file") == Point(x=1.0, label="")
    with pytest.raises(InvalidInput, match=r"^file.x: missing; Point needs it$"):
        parse(Point, {"label": "a"}, "file")


def test_nearest_names_the_way_out():
    """A misspelt name gets its correction, a strange one the list, and an empty list says so."""
    assert nearest("tiess", ["ties", "slerp"]) == "did you mean 'ties'?"
    assert nearest("zzz", ["ties", "slerp"]) == "known: ties, slerp"
    assert nearest("ties", []) == "none is known here"


def test_the_tree_of_errors_is_the_one_drawn():
    """Every error class stands in the module's drawing, and bad input can be told from the rest by its class."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EvomergeError)]
    user = {c.__name__ for c in classes if issubclass(c, InvalidInput)}

    assert all(c.__name__ in errors.__doc__ for c in classes)
    assert user == {"InvalidInput", "ExperimentError", "RecipeError", "TaskError", "ModelError", "LedgerError"}

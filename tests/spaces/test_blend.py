"""The parameter space: its axes, and recipes that say what the genome says, layer by layer."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.genome import active, check_axes, from_unit, to_unit
from evomerge.methods import method
from evomerge.recipe import ENDS, GROUPS, Blend, Route, Source
from evomerge.spaces.blend import NONE, BlendSpace, ParameterRange, Range, Slot

BASE = Source(name="base", path="base", fingerprint="0")
A, B = (Source(name=name, path=name, fingerprint=name) for name in ("a", "b"))
TOGETHER = (GROUPS,)
APART = (("attention",), ("mlp",), ("other",))
DENSITY = ParameterRange(low=0.1, high=1.0, per_source=True, methods=("ties", "dare_ties"))
SCALE = ParameterRange(low=0.5, high=2.0, log=True, methods=("ties", "task_arithmetic"))


def make(**changes):
    """Return a space of two sources, four layers and two knots; any setting can be changed."""
    given = {
        "sources": (A, B),
        "base": BASE,
        "depth": 4,
        "methods": ("task_arithmetic",),
        "knots": 2,
        "profile": "constant",
        "modules": TOGETHER,
        "weight": Range(low=0.0, high=1.0),
        "parameters": {},
        "dtype": "float32",
        "seed": 5,
    }
    return BlendSpace(**given | changes)


def blends(recipe, group="mlp"):
    """Return the blend of a module group, layer by layer."""
    return [recipe.route("any.weight", group, layer).blend for layer in range(len(recipe.layers))]


def end(recipe, name):
    """Return the blend of an end of the model."""
    return recipe.route("any.weight", name, None).blend


@st.composite
def spaces(draw):
    """Draw a space: any number of sources, layers, knots and methods, with and without parameters."""
    names = draw(st.lists(st.sampled_from(["a", "b", "llama-3.1", "0.0"]), min_size=1, max_size=3, unique=True))
    depth = draw(st.integers(1, 7))
    return make(
        sources=tuple(Source(name=name, path=name) for name in names),
        depth=depth,
        methods=draw(
            st.lists(st.sampled_from(["ties", "task_arithmetic", "dare_ties"]), min_size=1, unique=True).map(tuple)
        ),
        knots=draw(st.integers(1, depth)),
        profile=draw(st.sampled_from(["constant", "linear"])),
        modules=draw(st.sampled_from([TOGETHER, APART, (("mlp", "other"), ("attention",))])),
        parameters=draw(st.sampled_from([{}, {"density": DENSITY}, {"density": DENSITY, "scale": SCALE}])),
    )


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_every_point_of_the_cube_is_a_recipe(space, data):
    """Decoding is total and pure, and what it builds has the depth, sources, dtype and seed of the space."""
    unit = st.lists(st.floats(0, 1), min_size=len(space.axes), max_size=len(space.axes))
    genome = from_unit(space.axes, data.draw(unit))
    recipe = space.decode(genome)

    assert recipe == space.decode(genome)
    assert recipe.layers == tuple(range(space.depth))
    assert (recipe.sources, recipe.base, recipe.dtype, recipe.seed) == (space.sources, BASE, "float32", 5)
    every = [blend for group in GROUPS for blend in blends(recipe, group)]
    for blend in [*every, *(end(recipe, name) for name in ENDS), *recipe.blends()]:
        assert list(blend.weights) == [source.name for source in space.sources]
        assert all(0.0 <= weight <= 1.0 for weight in blend.weights.values())


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_the_number_of_axes_is_the_product(space):
    """Sources x knots x modules weights, one gene for a choice of methods, and the parameters of these methods."""
    weights = len(space.sources) * space.knots * len(space.modules)
    expected = weights + (len(space.methods) > 1)
    if "density" in space.parameters and {"ties", "dare_ties"} & set(space.methods):
        expected += len(space.sources)
    if "scale" in space.parameters and {"ties", "task_arithmetic"} & set(space.methods):
        expected += 1

    assert len(space.axes) == expected
    check_axes(space.axes)


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_genes_that_are_not_active_change_nothing(space, data):
    """Two genomes that agree on the active axes are the same recipe."""
    unit = st.lists(st.floats(0, 1), min_size=len(space.axes), max_size=len(space.axes))
    one, other = from_unit(space.axes, data.draw(unit)), from_unit(space.axes, data.draw(unit))
    mixed = tuple(
        gene if counts else rest for gene, rest, counts in zip(one, other, active(space.axes, one), strict=True)
    )

    assert space.decode(mixed).digest == space.decode(one).digest


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_constant_recipe_comes_back_from_its_genome(space, data):
    """Where the space can express equal weights, it has the genome that decodes to them; else it says so."""
    weight = {source.name: data.draw(st.floats(-0.5, 1.5)) for source in space.sources}
    method = data.draw(st.sampled_from(["ties", "task_arithmetic", "linear"]))
    genome = space.genome_of_constant(method, weight)

    has_parameters = any(method in bounds.methods for bounds in space.parameters.values())
    inside = all(0 <= w <= 1 for w in weight.values())
    assert (genome is not None) == (inside and method in space.methods and not has_parameters)
    if genome is not None:
        assert space.decode(genome) == space.constant(method, weight)


def test_axes_stand_in_their_order_with_their_names():
    """Method first, then weights source by source, module by module, knot by knot, then parameters."""
    space = make(methods=("task_arithmetic", "ties"), modules=APART[:2] + APART[2:], knots=1,
                 parameters={"density": DENSITY, "scale": SCALE})  # fmt: skip

    assert [axis.name for axis in space.axes] == [
        "method",
        *("weight.a.0.0", "weight.a.1.0", "weight.a.2.0"),
        *("weight.b.0.0", "weight.b.1.0", "weight.b.2.0"),
        *("density.a", "density.b", "scale"),
    ]
    method = space.axes[0]
    assert method.options == ("task_arithmetic", "ties")
    assert [axis.active_if.options for axis in space.axes[-3:]] == [("ties",), ("ties",), ("task_arithmetic", "ties")]
    assert (space.axes[-1].low, space.axes[-1].high, space.axes[-1].log) == (0.5, 2.0, True)


def test_a_constant_profile_gives_each_group_of_layers_its_own_weight():
    """Four layers and two knots: two layers each; the ends of the model take the end values."""
    recipe = make().decode((0.1, 0.2, 0.3, 0.4))

    expected = [{"a": 0.1, "b": 0.3}] * 2 + [{"a": 0.2, "b": 0.4}] * 2
    assert all([blend.weights for blend in blends(recipe, group)] == expected for group in GROUPS)
    assert end(recipe, "embedding").weights == {"a": 0.1, "b": 0.3}
    assert end(recipe, "head").weights == {"a": 0.2, "b": 0.4}


@given(st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_of_layers_are_as_equal_as_can_be(depth, data):
    """Groups are runs of layers in order whose sizes differ by one at most."""
    knots = data.draw(st.integers(1, depth))
    space = make(sources=(A,), depth=depth, knots=knots, weight=Range(low=0, high=100))
    recipe = space.decode(tuple(float(k) for k in range(knots)))
    found = [blend.weights["a"] for blend in blends(recipe, "attention")]
    sizes = [found.count(float(k)) for k in range(knots)]

    assert found == sorted(found)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_linear_profile_interpolates_between_knots():
    """Five layers and three knots: the knots at both ends and in the middle, halves between them."""
    recipe = make(sources=(A,), depth=5, knots=3, profile="linear").decode((0.0, 1.0, 0.5))

    assert [blend.weights["a"] for blend in blends(recipe, "other")] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])
    assert [end(recipe, name).weights["a"] for name in ENDS] == [0.0, 0.5]


@given(st.integers(2, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_a_linear_profile_of_rising_knots_rises_evenly(depth, data):
    """Knots on a line give layers on that line: layer i of n has i / (n - 1)."""
    knots = data.draw(st.integers(2, depth))
    space = make(sources=(A,), depth=depth, knots=knots, profile="linear")
    recipe = space.decode(tuple(k / (knots - 1) for k in range(knots)))
    found = [blend.weights["a"] for blend in blends(recipe)]

    assert found == pytest.approx([i / (depth - 1) for i in range(depth)])
    assert all(one < other for one, other in pairwise(found))


def test_module_groups_have_weights_of_their_own():
    """Each set of modules reads its genes; both ends go with `other`."""
    space = make(sources=(A,), knots=1, modules=(("other", "attention"), ("mlp",)))
    recipe = space.decode((0.25, 0.75))

    for group, weight in zip(GROUPS, [0.25, 0.75, 0.25], strict=True):
        assert [blend.weights["a"] for blend in blends(recipe, group)] == [weight] * 4
    assert all(end(recipe, name).weights == {"a": 0.25} for name in ENDS)


def test_parameters_go_to_the_methods_that_have_them():
    """The method gene decides which parameters a blend carries, per source where it says so."""
    space = make(methods=("task_arithmetic", "dare_ties"), knots=1, parameters={"density": DENSITY, "scale": SCALE})

    one = space.decode(("task_arithmetic", 0.5, 0.5, 0.2, 0.3, 1.25)).routes[0].blend
    other = space.decode(("dare_ties", 0.5, 0.5, 0.2, 0.3, 1.25)).routes[-1].blend
    assert one == Blend(method="task_arithmetic", weights={"a": 0.5, "b": 0.5}, parameters={"scale": 1.25})
    assert other.parameters == {"density": {"a": 0.2, "b": 0.3}}


def test_parameters_of_methods_that_are_not_searched_have_no_axis():
    """A range for a method that is not among the methods is left out."""
    space = make(parameters={"density": DENSITY})

    assert all(axis.name.startswith("weight.") for axis in space.axes)
    assert space.decode(from_unit(space.axes, [0.5] * 4)).routes[0].blend.parameters == {}


def test_weights_can_be_searched_on_a_logarithmic_scale():
    """The bounds' scale is that of every weight gene."""
    space = make(weight=Range(low=0.01, high=1.0, log=True), knots=1)

    assert from_unit(space.axes, [0.5, 1.0]) == pytest.approx((0.1, 1.0))
    assert to_unit(space.axes, (0.1, 1.0)).tolist() == pytest.approx([0.5, 1.0])


def test_a_constant_recipe_may_lie_outside_the_bounds():
    """Baselines need a recipe also where the space has no genome for it."""
    space = make()

    weights = [blend.weights for blend in space.constant("task_arithmetic", {"a": 2.0, "b": -1.0}).blends()]
    assert weights == [{"a": 2.0, "b": -1.0}] * 3
    assert space.genome_of_constant("task_arithmetic", {"a": 2.0, "b": -1.0}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": (("attention",), ("mlp",))}, "modules must hold each of attention, mlp, other once"),
        ({"modules": (*TOGETHER, ("mlp",))}, "modules must hold each of attention, mlp, other once"),
        ({"profile": "step"}, "profile must be constant or linear, got 'step'"),
        ({"knots": 5}, r"knots must lie in \[1, 4\] for 4 layers, got 5"),
        ({"knots": 0}, r"knots must lie in \[1, 4\]"),
        ({"weight": Range(low=1, high=0)}, "axis 'weight.a.0.0': bounds must be finite with low <= high"),
        ({"methods": ("ties", "ties")}, "axis 'method': options must be distinct"),
        ({"methods": ()}, "a space has either methods or slots, at least one"),
        ({"slots": (Slot(name="x", options=("base | sum",)),)}, "a space has either methods or slots, at least one"),
    ],
)
def test_impossible_spaces_are_refused(change, message):
    """The setting, what it may be and what it was are named."""
    with pytest.raises(RecipeError, match=message):
        make(**change)


LAYERED = {
    "density": ParameterRange(low=0.1, high=0.9, per_source=True, per_knot=True, methods=("ties",)),
    "scale": ParameterRange(low=0.0, high=2.0, per_knot=True, methods=("ties", "task_arithmetic")),
    "normalize": ParameterRange(low=0.0, high=0.0, methods=("ties",)),
}


def test_parameters_may_stand_at_knots_as_weights_do():
    """One gene per source, module set and knot; a layer reads those of its set, between knots on the line."""
    space = make(
        methods=("ties",), depth=3, profile="linear", modules=(("attention", "other"), ("mlp",)), parameters=LAYERED
    )
    genes = {axis.name: axis.low for axis in space.axes}
    genes |= {"density.b.1.0": 0.2, "density.b.1.1": 0.8, "scale.1.0": 1.0, "scale.1.1": 2.0, "scale.0.1": 0.5}
    recipe = space.decode(tuple(genes.values()))

    assert [name for name in genes if not name.startswith("weight")] == [
        *(f"density.{source}.{m}.{k}" for source in "ab" for m in (0, 1) for k in (0, 1)),
        *("scale.0.0", "scale.0.1", "scale.1.0", "scale.1.1"),
    ]
    found = [blend.parameters for blend in blends(recipe, "mlp")]
    assert [each["density"]["b"] for each in found] == pytest.approx([0.2, 0.5, 0.8])
    assert [each["density"]["a"] for each in found] == pytest.approx([0.1] * 3)
    assert [each["scale"] for each in found] == pytest.approx([1.0, 1.5, 2.0])
    assert [blend.parameters["scale"] for blend in blends(recipe, "attention")] == pytest.approx([0.0, 0.25, 0.5])
    assert end(recipe, "head").parameters["scale"] == 0.5
    assert all(each["normalize"] == 0.0 for each in found)


def test_module_sets_may_have_numbers_of_knots_of_their_own():
    """Three values over depth for one, one value for another."""
    space = make(sources=(A,), depth=5, knots=(3, 1), profile="linear", modules=(("attention",), ("mlp", "other")))
    recipe = space.decode((0.0, 1.0, 0.5, 0.25))

    assert [axis.name for axis in space.axes] == ["weight.a.0.0", "weight.a.0.1", "weight.a.0.2", "weight.a.1.0"]
    found = {group: [blend.weights["a"] for blend in blends(recipe, group)] for group in GROUPS}
    assert found["attention"] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])
    assert found["mlp"] == found["other"] == [0.25] * 5
    assert "3 | 1 linear" in space.headline


def test_weights_that_are_not_searched_are_no_genes():
    """Equal bounds are every weight; methods that weights are not for give each source a weight of 1."""
    fixed = make(weight=Range(low=0.5, high=0.5), methods=("ties",), knots=1, parameters=LAYERED)
    some = make(weight=Range(low=0.0, high=1.0, methods=("linear",)), methods=("linear", "ties"), knots=1)
    axes = {axis.name: axis for axis in some.axes}

    assert not any(axis.name.startswith("weight") for axis in fixed.axes)
    assert fixed.decode(tuple(axis.low for axis in fixed.axes)).routes[0].blend.weights == {"a": 0.5, "b": 0.5}
    assert axes["weight.a.0.0"].active_if.options == ("linear",)
    assert some.decode(("linear", 0.2, 0.3)).routes[0].blend.weights == {"a": 0.2, "b": 0.3}
    assert some.decode(("ties", 0.2, 0.3)).routes[0].blend.weights == {"a": 1.0, "b": 1.0}
    assert some.genome_of_constant("linear", {"a": 0.2, "b": 0.3}) == ("linear", 0.2, 0.3)
    assert some.genome_of_constant("ties", {"a": 0.2, "b": 0.3}) is None
    assert fixed.genome_of_constant("ties", {"a": 1.0, "b": 1.0}) is None


def test_each_group_of_layers_may_have_a_method_of_its_own():
    """A choice per knot, under which the genes of that knot are active; all modules of a layer have the method."""
    space = make(
        per_knot=True,
        methods=("linear", "ties"),
        modules=(("attention",), ("mlp", "other")),
        weight=Range(low=0.0, high=1.0, methods=("linear",)),
        parameters=LAYERED | {"slack": ParameterRange(low=0.0, high=1.0, methods=("ties",))},
    )
    axes = {axis.name: axis for axis in space.axes}
    genes = {axis.name: axis.from_unit(0.5) for axis in space.axes} | {"method.0": "ties", "method.1": "linear"}
    genes |= {"scale.0.0": 0.25, "scale.1.0": 0.75, "weight.a.0.1": 0.125, "slack": 0.5}
    recipe = space.decode(tuple(genes.values()))

    assert list(axes)[:2] == ["method.0", "method.1"]
    assert axes["weight.b.1.1"].active_if.axis == "method.1"
    assert axes["density.b.1.0"].active_if.axis == "method.0"
    assert axes["slack"].active_if is None
    for group, m in {"attention": 0, "mlp": 1, "other": 1}.items():
        first, second, third, fourth = blends(recipe, group)
        assert first == second
        assert third == fourth
        assert (first.method, third.method) == ("ties", "linear")
        assert first.weights == {"a": 1.0, "b": 1.0}
        assert third.weights == {"a": 0.125 if m == 0 else 0.5, "b": 0.5}
        assert first.parameters["scale"] == (0.25, 0.75)[m]
        assert first.parameters["slack"] == 0.5
        assert third.parameters == {}
    assert (end(recipe, "embedding").method, end(recipe, "head").method) == ("ties", "linear")
    assert space.genome_of_constant("linear", {"a": 1.0, "b": 0.0})[:2] == ("linear", "linear")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_genes_of_a_group_that_are_not_active_change_nothing(data):
    """With a choice per knot, and weights for one of the methods, inactive genes are those that are not read."""
    space = make(
        per_knot=True, methods=("linear", "ties"), modules=APART, parameters=LAYERED,
        weight=Range(low=0.0, high=1.0, methods=("linear",)),
    )  # fmt: skip
    unit = st.lists(st.floats(0, 1), min_size=len(space.axes), max_size=len(space.axes))
    one, other = from_unit(space.axes, data.draw(unit)), from_unit(space.axes, data.draw(unit))
    mixed = tuple(
        gene if counts else rest for gene, rest, counts in zip(one, other, active(space.axes, one), strict=True)
    )

    assert space.decode(mixed).digest == space.decode(one).digest


def test_the_ends_of_a_way_between_two_sources_are_these():
    """The first source is at t = 0 everywhere, the second at 1; what is neither has no genome."""
    way = ParameterRange(low=0.0, high=1.0, per_knot=True, methods=("zero | slerp",))
    space = make(methods=("zero | slerp",), weight=Range(low=1.0, high=1.0), parameters={"t": way})

    assert space.genome_of_constant("linear", {"a": 1.0, "b": 0.0}) == (0.0, 0.0)
    assert space.genome_of_constant("linear", {"a": 0.0, "b": 1.0}) == (1.0, 1.0)
    assert space.genome_of_constant("linear", {"a": 0.5, "b": 0.5}) is None
    short = replace(space, parameters={"t": replace(way, low=0.25)})
    assert short.genome_of_constant("linear", {"a": 1.0, "b": 0.0}) is None
    three = replace(space, sources=(A, B, Source(name="c", path="c")))
    assert three.genome_of_constant("linear", {"a": 1.0, "b": 0.0, "c": 0.0}) is None


def test_a_space_may_say_where_a_search_begins():
    """By an axis's name or what it begins with, the longest counts; what is not named begins in its middle."""
    first = {"weight": 0.25, "weight.b": 0.75, "density.a": 0.5}
    space = make(methods=("task_arithmetic", "dare_ties"), parameters={"density": DENSITY}, first=first)

    assert space.start == ("dare_ties", 0.25, 0.25, 0.75, 0.75, 0.5, pytest.approx(0.55))
    assert make().start is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": (2, 2)}, r"knots must be one number, or one for each of the 1 module sets, got \(2, 2\)"),
        ({"knots": (5,)}, r"knots must lie in \[1, 4\] for 4 layers, got 5"),
        ({"per_knot": True, "profile": "linear"}, "methods per knot need a constant profile"),
        ({"per_knot": True, "knots": (2, 1), "modules": (("mlp", "other"), ("attention",))}, "as many knots for all"),
        ({"parameters": {"zero": ParameterRange(options=("plus",), per_knot=True)}}, "parameter 'zero' cannot differ"),
        ({"first": {"wieght": 0.5}}, "start: no axis is called 'wieght'"),
        ({"first": {"weight.a": 1.5}}, "start: gene 1.5 is not within the axis"),
    ],
)
def test_what_cannot_stand_at_knots_or_begin_a_search_is_refused(change, message):
    """The setting, what it may be and what it was are named."""
    with pytest.raises(RecipeError, match=message):
        make(**change)


@pytest.mark.parametrize("genome", [(), (0.1, 0.2, 0.3), (0.1, 0.2, 0.3, 1.5), (0.1, 0.2, 0.3, "x")])
def test_genomes_that_do_not_fit_are_refused(genome):
    """Length, type and bounds are checked before anything is built."""
    with pytest.raises(RecipeError, match=r"^decode: "):
        make().decode(genome)


SLOTS = (
    Slot(name="origin", options=("base",)),
    Slot(name="edit", options=(NONE, "trim", "drop", "trim(0.3, scope=model)")),
    Slot(name="gate", options=(NONE, "elect")),
    Slot(name="combine", options=("sum", "mean(normalize=0)", "mean")),
    Slot(name="shape", options=("scale",)),
)
OWNED = {
    "trim.density": ParameterRange(low=0.1, high=0.9, per_source=True, slot="edit", methods=("trim",)),
    "count": ParameterRange(options=("floor", "above"), slot="edit", methods=("trim", "trim(0.3, scope=model)")),
    "drop.density": ParameterRange(low=0.2, high=0.2, slot="edit", methods=("drop",)),
    "zero": ParameterRange(options=("minus",), slot="gate", methods=("elect",)),
    "scale": ParameterRange(low=0.5, high=2.0, log=True, slot="shape", methods=("scale",)),
    "slack": ParameterRange(low=0, high=3, whole=True, slot="gate", methods=("elect",)),
}


def slotted(**changes):
    """Return a space whose method is made of slots, with every kind of parameter."""
    return make(methods=(), slots=SLOTS, parameters=OWNED, knots=1, **changes)


def test_slots_are_axes_and_their_parameters_hang_on_them():
    """A slot with a choice is an axis; a parameter is one where it has a choice, active under its slot's options."""
    axes = {axis.name: axis for axis in slotted().axes}

    assert list(axes) == [
        *("edit", "gate", "combine"),
        *("weight.a.0.0", "weight.b.0.0"),
        *("trim.density.a", "trim.density.b", "count", "scale", "slack"),
    ]
    assert axes["edit"].options == SLOTS[1].options
    assert axes["count"].options == ("floor", "above")
    assert {name: (axis.active_if.axis, axis.active_if.options) for name, axis in axes.items() if axis.active_if} == {
        "trim.density.a": ("edit", ("trim",)),
        "trim.density.b": ("edit", ("trim",)),
        "count": ("edit", ("trim", "trim(0.3, scope=model)")),
        "slack": ("gate", ("elect",)),
    }
    assert [axes["slack"].from_unit(u) for u in (0.0, 0.5, 1.0)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("chosen", "line", "parameters"),
    [
        ((NONE, NONE, "sum"), "base | sum | scale", {"scale": 1.5}),
        (
            ("trim", "elect", "mean"),
            "base | trim | elect | mean | scale",
            {"trim.density": {"a": 0.2, "b": 0.4}, "count": "above", "zero": "minus", "scale": 1.5, "slack": 2.0},
        ),
        (("drop", NONE, "sum"), "base | drop | sum | scale", {"drop.density": 0.2, "scale": 1.5}),
        (
            ("trim(0.3, scope=model)", NONE, "mean(normalize=0)"),
            "base | trim(0.3, scope=model) | mean(normalize=0) | scale",
            {"count": "above", "scale": 1.5},
        ),
    ],
)
def test_chosen_options_make_a_line(chosen, line, parameters):
    """`none` leaves a slot empty; the blend carries the parameters of what was chosen, constants included."""
    recipe = slotted().decode((*chosen, 0.5, 0.25, 0.2, 0.4, "above", 1.5, 2))

    for blend in recipe.blends():
        assert blend == Blend(method=line, weights={"a": 0.5, "b": 0.25}, parameters=parameters)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_point_of_a_space_of_slots_is_a_method_with_its_parameters(data):
    """Decoding is total: the line is one, knows all its parameters, and genes that are not active change nothing."""
    space = slotted()
    unit = st.lists(st.floats(0, 1), min_size=len(space.axes), max_size=len(space.axes))
    one, other = from_unit(space.axes, data.draw(unit)), from_unit(space.axes, data.draw(unit))
    recipe = space.decode(one)
    mixed = tuple(
        gene if counts else rest for gene, rest, counts in zip(one, other, active(space.axes, one), strict=True)
    )

    for blend in recipe.blends():
        found = method(blend.method)
        for name, given_ in blend.parameters.items():
            for each in given_.values() if isinstance(given_, dict) else [given_]:
                found.find(name).check(each, name)
    assert space.decode(mixed).digest == recipe.digest


def test_a_line_of_slots_is_found_for_a_baseline():
    """Equal weights under task arithmetic are a point of a space that can leave its other slots empty."""
    space = replace(slotted(), parameters={})
    genome = space.genome_of_constant("task_arithmetic", {"a": 0.5, "b": 0.25})

    assert genome == (NONE, NONE, "sum", 0.5, 0.25)
    assert space.decode(genome).digest == space.constant("task_arithmetic", {"a": 0.5, "b": 0.25}).digest
    assert space.genome_of_constant("linear", {"a": 0.5, "b": 0.25}) is None
    assert slotted().genome_of_constant("task_arithmetic", {"a": 0.5, "b": 0.25}) is None


def test_a_space_of_too_many_lines_is_not_searched_for_a_baseline():
    """More than 4096 lines are not looked through."""
    many = (Slot(name=f"s{i}", options=(NONE, *"abc")) for i in range(7))
    space = replace(slotted(), slots=(SLOTS[0], *many, SLOTS[3]), parameters={})

    assert space.genome_of_constant("task_arithmetic", {"a": 0.5, "b": 0.25}) is None


def test_fixed_routes_go_before_those_of_the_genome():
    """What they take is not searched: neither weights nor method of the genome reach it."""
    kept = Route(blend=Blend(method="linear", weights={"a": 1.0}), groups=("embedding", "head"))
    norms = Route(blend=Blend(method="linear", weights={"b": 1.0}), tensors="*norm*")
    space = make(routes=(kept, norms))

    for recipe in (space.decode((0.1, 0.2, 0.3, 0.4)), space.constant("ties", {"a": 1.0, "b": 1.0})):
        assert recipe.routes[:2] == (kept, norms)
        assert [end(recipe, name) for name in ENDS] == [kept.blend] * 2
        assert recipe.route("layers.2.input_norm.weight", "other", 2) == norms
        assert recipe.route("layers.2.up.weight", "mlp", 2) not in (kept, norms)
    assert space.axes == make().axes


def test_routes_say_no_more_than_they_must():
    """Layers that are blended alike share one route, without layers where that is the whole depth."""
    whole = make(knots=1).decode((0.5, 0.25))
    halves = make(modules=(("attention",), ("mlp", "other"))).decode((0.1, 0.2, 0.3, 0.3, 0.5, 0.5, 0.7, 0.7))

    assert [(route.groups, route.layers) for route in whole.routes] == [*(((name,), None) for name in ENDS), ((), None)]
    assert [(route.groups, route.layers) for route in halves.routes[2:]] == [
        (("attention",), (0, 2)),
        (("attention",), (2, 4)),
        (("mlp", "other"), None),
    ]


def test_paths_of_models_change_no_digest():
    """The same models in another place give the same candidates."""
    moved = make(sources=tuple(replace(source, path="/elsewhere") for source in (A, B)))

    assert moved.decode((0.1, 0.2, 0.3, 0.4)).digest == make().decode((0.1, 0.2, 0.3, 0.4)).digest

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

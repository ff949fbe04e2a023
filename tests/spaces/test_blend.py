"""The parameter space: its axes, and recipes that say what the genome says, layer by layer."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.genome import active, check_axes, from_unit, to_unit
from evomerge.recipe import GROUPS, Blend, Source
from evomerge.spaces.blend import BlendSpace, ParameterRange, Range

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
    assert [layer.depth for layer in recipe.layers] == list(range(space.depth))
    assert (recipe.sources, recipe.base, recipe.dtype, recipe.seed) == (space.sources, BASE, "float32", 5)
    for blend in recipe.blends():
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

    assert [layer.mlp.weights for layer in recipe.layers] == [{"a": 0.1, "b": 0.3}] * 2 + [{"a": 0.2, "b": 0.4}] * 2
    assert recipe.embedding.weights == {"a": 0.1, "b": 0.3}
    assert recipe.head.weights == {"a": 0.2, "b": 0.4}


@given(st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_of_layers_are_as_equal_as_can_be(depth, data):
    """Groups are runs of layers in order whose sizes differ by one at most."""
    knots = data.draw(st.integers(1, depth))
    space = make(sources=(A,), depth=depth, knots=knots, weight=Range(low=0, high=100))
    recipe = space.decode(tuple(float(k) for k in range(knots)))
    found = [layer.attention.weights["a"] for layer in recipe.layers]
    sizes = [found.count(float(k)) for k in range(knots)]

    assert found == sorted(found)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_linear_profile_interpolates_between_knots():
    """Five layers and three knots: the knots at both ends and in the middle, halves between them."""
    recipe = make(sources=(A,), depth=5, knots=3, profile="linear").decode((0.0, 1.0, 0.5))

    assert [layer.other.weights["a"] for layer in recipe.layers] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])
    assert (recipe.embedding.weights["a"], recipe.head.weights["a"]) == (0.0, 0.5)


@given(st.integers(2, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_a_linear_profile_of_rising_knots_rises_evenly(depth, data):
    """Knots on a line give layers on that line: layer i of n has i / (n - 1)."""
    knots = data.draw(st.integers(2, depth))
    space = make(sources=(A,), depth=depth, knots=knots, profile="linear")
    recipe = space.decode(tuple(k / (knots - 1) for k in range(knots)))
    found = [layer.mlp.weights["a"] for layer in recipe.layers]

    assert found == pytest.approx([i / (depth - 1) for i in range(depth)])
    assert all(one < other for one, other in pairwise(found))


def test_module_groups_have_weights_of_their_own():
    """Each set of modules reads its genes; both ends go with `other`."""
    space = make(sources=(A,), knots=1, modules=(("other", "attention"), ("mlp",)))
    recipe = space.decode((0.25, 0.75))

    for layer in recipe.layers:
        assert [layer.group(group).weights["a"] for group in GROUPS] == [0.25, 0.75, 0.25]
    assert recipe.embedding.weights == recipe.head.weights == {"a": 0.25}


def test_parameters_go_to_the_methods_that_have_them():
    """The method gene decides which parameters a blend carries, per source where it says so."""
    space = make(
        methods=("task_arithmetic", "dare_ties"), knots=1, parameters={"density": DENSITY, "scale": SCALE}
    )

    one = space.decode(("task_arithmetic", 0.5, 0.5, 0.2, 0.3, 1.25)).head
    other = space.decode(("dare_ties", 0.5, 0.5, 0.2, 0.3, 1.25)).head
    assert one == Blend(method="task_arithmetic", weights={"a": 0.5, "b": 0.5}, parameters={"scale": 1.25})
    assert other.parameters == {"density": {"a": 0.2, "b": 0.3}}


def test_parameters_of_methods_that_are_not_searched_have_no_axis():
    """A range for a method that is not among the methods is left out."""
    space = make(parameters={"density": DENSITY})

    assert all(axis.name.startswith("weight.") for axis in space.axes)
    assert space.decode(from_unit(space.axes, [0.5] * 4)).head.parameters == {}


def test_weights_can_be_searched_on_a_logarithmic_scale():
    """The bounds' scale is that of every weight gene."""
    space = make(weight=Range(low=0.01, high=1.0, log=True), knots=1)

    assert from_unit(space.axes, [0.5, 1.0]) == pytest.approx((0.1, 1.0))
    assert to_unit(space.axes, (0.1, 1.0)).tolist() == pytest.approx([0.5, 1.0])


def test_a_constant_recipe_may_lie_outside_the_bounds():
    """Baselines need a recipe also where the space has no genome for it."""
    space = make()

    assert space.constant("task_arithmetic", {"a": 2.0, "b": -1.0}).head.weights == {"a": 2.0, "b": -1.0}
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


def test_paths_of_models_change_no_digest():
    """The same models in another place give the same candidates."""
    moved = make(sources=tuple(replace(source, path="/elsewhere") for source in (A, B)))

    assert moved.decode((0.1, 0.2, 0.3, 0.4)).digest == make().decode((0.1, 0.2, 0.3, 0.4)).digest

"""The hybrid space: blends as sources of stacks, and what every space of a run says of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from evomerge.errors import RecipeError
from evomerge.genome import Gene, Genome, active, check_axes, check_genome, from_unit, to_unit
from evomerge.hops import Hop, path_of, stack_of
from evomerge.recipe import GROUPS, Source
from evomerge.spaces.blend import BlendSpace, ParameterRange, Range
from evomerge.spaces.edits import NONE, Edits, Steps
from evomerge.spaces.hybrid import BLEND, HybridSpace

BASE = Source(name="base", path="base", fingerprint="0")
A, B = (Source(name=name, path=name, fingerprint=name) for name in "ab")
TEXTS = Source(name="texts", path="texts.txt", fingerprint="t")
#: A genome of the blend: two sources, two knots.
GENES: Genome = (0.125, 0.25, 0.5, 0.75)


def blending(**changes: object) -> BlendSpace:
    """Return a space of blends of two sources, four layers and two knots; any setting can be changed."""
    given = {
        "sources": (A, B),
        "base": BASE,
        "depth": 4,
        "methods": ("task_arithmetic",),
        "knots": 2,
        "profile": "constant",
        "modules": (GROUPS,),
        "weight": Range(low=0.0, high=1.0),
        "parameters": {},
        "dtype": "float32",
        "seed": 5,
    }
    return BlendSpace(**given | changes)


def editing(**changes: object) -> Edits:
    """Return edits of four layers of the blend, with those of both sources at hand; any setting can be changed."""
    given = {
        "names": (BLEND, "a", "b"),
        "primary": BLEND,
        "sizes": (1, 1, 1, 1),
        "edits": 2,
        "most": 7,
        "scales": Steps(low=0.5, high=1.5, step=0.25),
    }
    return Edits(**given | changes)


def make(blend: BlendSpace | None = None, edits: Edits | None = None) -> HybridSpace:
    """Return a hybrid space."""
    return HybridSpace(blend=blend or blending(), edits=edits or editing())


def genome_of(space: HybridSpace, *steps: Mapping[str, Gene]) -> Genome:
    """Return the genome of the blend above and some edits, the genes of each by name."""
    rest = dict(zip((axis.name for axis in space.edits.axes), space.edits.rest(), strict=True))
    said = {f"{name}.{k}": gene for k, step in enumerate(steps) for name, gene in step.items()}
    return (*GENES, *(rest | said).values())


@st.composite
def spaces(draw: st.DrawFn) -> HybridSpace:
    """Draw a space: any knots, methods, parameters, calibration, operations and bounds."""
    depth = draw(st.integers(1, 5))
    blend = blending(
        depth=depth,
        knots=draw(st.integers(1, depth)),
        methods=draw(st.sampled_from([("ties",), ("task_arithmetic", "ties")])),
        parameters=draw(st.sampled_from([{}, {"density": ParameterRange(low=0.1, high=0.9, methods=("ties",))}])),
        calibration=draw(st.sampled_from([None, TEXTS])),
    )
    operations = st.lists(st.sampled_from(["drop", "repeat", "insert", "swap", "move"]), min_size=1, unique=True)
    edits = editing(
        sizes=(3,) * depth,
        operations=tuple(draw(operations)),
        names=draw(st.sampled_from([(BLEND,), (BLEND, "b"), (BLEND, "a", "b")])),
        least=draw(st.integers(1, depth)),
        most=depth + draw(st.integers(0, 3)),
        scales=draw(st.sampled_from([None, Steps(low=0.5, high=1.5, step=0.25)])),
        parameters=draw(st.sampled_from([None, 3 * depth, 3 * depth + 4])),
    )
    return make(blend, edits)


def unit(axes: Sequence[object]) -> st.SearchStrategy[list[float]]:
    """Return points of the unit cube."""
    return st.lists(st.floats(0, 1), min_size=len(axes), max_size=len(axes))


def test_axes_are_those_of_the_blend_and_then_those_of_the_edits() -> None:
    """Nothing is renamed, and the start is the middle of the blend's with nothing edited."""
    space = make()

    assert space.axes == (*space.blend.axes, *space.edits.axes)
    check_axes(space.axes)
    assert space.start == (0.5, 0.5, 0.5, 0.5, *space.edits.rest())
    assert (space.sources, space.base, space.depth, space.most, space.dtype) == ((A, B), BASE, 4, 7, "float32")
    assert space.headline == f"{space.blend.headline}; {space.edits.headline}"


def test_nothing_edited_is_the_blend_itself() -> None:
    """The recipe is the blend's own, with no stack around it, also where edits undo each other or cannot be done."""
    space = make()
    blend = space.blend.decode(GENES)
    same = [
        (),
        ({"op": "swap", "at": 1, "source": BLEND, "enter": 2, "leave": 6},),
        ({"op": "repeat", "at": 2}, {"op": "drop", "at": 2}),
        ({"op": "swap", "at": 1, "source": "a"}, {"op": "swap", "at": 1, "source": BLEND}),
        ({"op": "move", "at": 2, "shift": 1},),
    ]

    for steps in same:
        recipe = space.decode(genome_of(space, *steps))
        assert recipe == blend
        assert recipe.digest == blend.digest


def test_an_edited_blend_is_a_stack_of_it() -> None:
    """Layers are those of a source that is the blend's recipe, and of sources that edits bring; no other is named."""
    space = make()
    blend = space.blend.decode(GENES)
    recipe = space.decode(
        genome_of(space, {"op": "swap", "at": 1, "source": "b", "enter": 2, "leave": 6}, {"op": "drop", "at": 3})
    )
    stack = stack_of(recipe)

    assert recipe.sources == (Source(name=BLEND, recipe=blend), B)
    assert recipe.base is None
    assert recipe.layers == (0, 1, 2)
    assert recipe.scales == (1.0, 0.5, 1.5)
    assert stack is not None
    assert [(hop.source, hop.layer) for hop in stack.hops] == [(BLEND, 0), ("b", 1), (BLEND, 2)]
    assert (stack.embedding, stack.head) == (BLEND, BLEND)


def test_stacks_of_one_blend_begin_alike_and_those_of_others_do_not() -> None:
    """What hops do is told by what the blend is, not by what it is called."""
    space = make()
    one, two = (space.decode(genome_of(space, {"op": "drop", "at": at})) for at in (2, 3))
    other = space.decode((0.25, *genome_of(space, {"op": "drop", "at": 3})[1:]))

    assert path_of(one)[:2] == path_of(two)[:2]
    assert path_of(one)[2] != path_of(two)[2]
    assert path_of(other)[0] != path_of(two)[0]


@given(spaces(), st.data())
@settings(max_examples=100, deadline=None)
def test_every_point_of_the_cube_is_a_blend_or_a_stack_of_it(space: HybridSpace, data: st.DataObject) -> None:
    """Decoding is total and pure, the stack is that of the edits, and the blend in it is that of the blend's genes."""
    genome = from_unit(space.axes, data.draw(unit(space.axes)))
    split = len(space.blend.axes)
    blend, stack = space.blend.decode(genome[:split]), space.edits.stack(genome[split:])
    recipe = space.decode(genome)

    assert recipe == space.decode(genome)
    assert space.edits.least <= len(recipe.layers) <= space.most
    if stack.hops == tuple(Hop(source=BLEND, layer=layer) for layer in range(space.depth)):
        assert recipe == blend
        return
    assert stack_of(recipe) == stack
    assert recipe.sources[0] == Source(name=BLEND, recipe=blend)
    assert {source.name for source in recipe.sources[1:]} == {hop.source for hop in stack.hops} - {BLEND}
    if space.edits.parameters is not None:
        assert 3 * len(stack.hops) <= space.edits.parameters


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_genes_that_do_not_count_change_nothing(space: HybridSpace, data: st.DataObject) -> None:
    """Two genomes that agree on the active axes are the same recipe."""
    one, other = (from_unit(space.axes, data.draw(unit(space.axes))) for _ in range(2))
    mixed = tuple(
        gene if counts else rest for gene, rest, counts in zip(one, other, active(space.axes, one), strict=True)
    )

    assert space.decode(mixed).digest == space.decode(one).digest


def test_calibration_goes_with_the_stack() -> None:
    """The texts of methods that take statistics are named by the recipe that is built, edited or not."""
    space = make(blending(calibration=TEXTS))
    plain, stacked = (space.decode(genome_of(space, *steps)) for steps in ((), ({"op": "drop", "at": 1},)))

    assert plain.calibration == stacked.calibration == TEXTS
    assert stacked.sources[0].recipe is not None
    assert stacked.sources[0].recipe.calibration == TEXTS
    assert make().decode(genome_of(make(), {"op": "drop", "at": 1})).calibration is None


def test_probes_are_single_edits_of_the_blend_in_the_middle() -> None:
    """The first is unedited, for the others to be compared with: single drops, then single repeats."""
    space = make()
    probes = space.probes()
    middle = space.blend.decode((0.5,) * 4)

    assert [(kind, at) for kind, at, _ in probes] == [
        (NONE, 0), *(("drop", at) for at in range(4)), *(("repeat", at) for at in range(4)),
    ]  # fmt: skip
    assert space.decode(probes[0][2]) == middle
    for kind, at, genome in probes[1:]:
        recipe = space.decode(genome)
        rest = at + 1 if kind == "drop" else at
        before = at if kind == "drop" else at + 1
        assert recipe.layers == (*range(before), *range(rest, 4))
        assert recipe.sources == (Source(name=BLEND, recipe=middle),)
    assert replace(space, probed=False).probes() == []


def test_random_genomes_are_even_for_the_blend_and_few_edits() -> None:
    """The blend's genes are uniform, the edits' are those that the edits draw, with their prior."""
    space = make(edits=editing(operations=("drop",), edits=1))
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng, {"drop": (0.0, 0.0, 1.0, 0.0)}) for _ in range(400)]

    for genome in drawn[:20]:
        check_genome(space.axes, genome, "sample")
    assert all(kstest([genome[k] for genome in drawn], "uniform").pvalue > 1e-4 for k in range(4))
    assert {genome[5] for genome in drawn if genome[4] == "drop"} == {2}
    assert 0.2 < np.mean([genome[4] == NONE for genome in drawn]) < 0.6


def test_a_baseline_has_the_genome_of_the_blend_with_nothing_edited() -> None:
    """Constant blends are in the space where they are in that of the blend."""
    space = make()
    weight = {"a": 0.25, "b": 0.5}
    genome = space.genome_of_constant("task_arithmetic", weight)

    assert genome == (0.25, 0.25, 0.5, 0.5, *space.edits.rest())
    assert space.decode(genome) == space.constant("task_arithmetic", weight)
    assert space.constant("ties", weight) == space.blend.constant("ties", weight)
    assert space.genome_of_constant("ties", weight) is None
    assert space.genome_of_constant("task_arithmetic", {"a": 1.5, "b": 0.0}) is None


def test_names_that_clash_are_refused() -> None:
    """No source is called like the blend, the blend is the primary, and no axis has the name of another."""
    with pytest.raises(RecipeError, match="a source must not be called 'blend' in a hybrid space; rename it"):
        make(blending(sources=(A, Source(name=BLEND, path="c"))))
    with pytest.raises(RecipeError, match="the primary source of a hybrid space is 'blend', not 'a'"):
        make(edits=editing(names=("a", "b"), primary="a"))
    twice = ParameterRange(low=0.1, high=0.9, per_source=True, methods=("task_arithmetic",))
    with pytest.raises(RecipeError, match="a search space has two axes of one name; rename one"):
        make(blending(sources=(A, Source(name="0", path="0")), parameters={"at": twice}))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (editing(names=(BLEND, "a", "x")), "'x'"),
        (editing(sizes=(1,) * 5), "layers"),
    ],
)
def test_edits_that_do_not_fit_the_blend_are_refused(edits: Edits, message: str) -> None:
    """Layers come from sources that there are, and a blend has as many as its sources."""
    with pytest.raises(RecipeError, match=message):
        make(edits=edits)


@pytest.mark.parametrize("genome", [(), GENES, (1.5, *GENES[1:], *editing().rest()), (*GENES, "turn")])
def test_genomes_that_do_not_fit_are_refused(genome: Genome) -> None:
    """Length, type and bounds of both parts are checked before anything is built."""
    with pytest.raises(RecipeError, match=r"^decode: "):
        make().decode(genome)


def test_a_space_of_blends_says_what_it_is() -> None:
    """It has as many layers as its sources, no start and no probes of its own, and its random genomes are uniform."""
    space = blending(modules=(("attention",), ("mlp", "other")), knots=3, methods=("ties", "linear"))
    rng = np.random.default_rng(1)
    drawn = [space.sample(rng, {"drop": (1.0,) * 4}) for _ in range(300)]

    assert space.headline == "ties, linear; 3 constant over depth, modules attention | mlp+other"
    assert (space.most, space.start, space.probes()) == (4, None, [])
    for genome in drawn[:20]:
        check_genome(space.axes, genome, "sample")
    points = np.array([to_unit(space.axes, genome) for genome in drawn])
    assert all(kstest(column, "uniform").pvalue > 1e-4 for column in points[:, 1:].T)
    assert set(points[:, 0].tolist()) == {0.25, 0.75}
    assert drawn[0] == space.sample(np.random.default_rng(1))

"""The spaces of layer stacks: edits worked by hand, laws of edits and scales, and the published data flow space."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.genome import Choice, Gene, Genome, active, check_axes, check_genome, from_unit
from evomerge.hops import Hop, stack_of
from evomerge.recipe import Recipe, Source, copy_of
from evomerge.spaces.edits import NONE, OPERATIONS, Edits, Steps, prior_of
from evomerge.spaces.stack import SAKANA_SIGMA, PathSpace, SakanaSpace

A, B, C = (Source(name=name, path=name, fingerprint=name) for name in "abc")
QUARTERS = Steps(low=0.25, high=2.0, step=0.25)

#: What an edit says: its genes by name, without its number.
Edit = Mapping[str, Gene]


def make(**changes: object) -> Edits:
    """Return edits of five layers of `a`, with layers of `b` at hand; any setting can be changed."""
    given = {
        "names": ("a", "b"),
        "primary": "a",
        "sizes": (1, 1, 1, 1, 1),
        "edits": 3,
        "block": 2,
        "reach": 2,
        "least": 1,
        "most": 9,
        "scales": QUARTERS,
    }
    return Edits(**given | changes)


def over(edits: Edits) -> PathSpace:
    """Return a space of these edits over sources of their names."""
    sources = tuple(source for source in (A, B, C) if source.name in edits.names)
    return PathSpace(sources=sources, edits=edits, dtype="float32")


def space(**changes: object) -> PathSpace:
    """Return a space of `make`'s edits."""
    return over(make(**changes))


def genome_of(edits: Edits, *steps: Edit) -> Genome:
    """Return the genome of some edits; what they do not say is plain, and edits that are left do nothing."""
    plain: dict[str, Gene] = {"op": NONE, "at": 0, "layers": 1, "source": "b", "offset": 0, "shift": 0}
    if edits.scales is not None:
        plain |= dict.fromkeys(("enter", "leave"), round(1 / edits.scales.step))
    genes: list[Gene] = []
    for axis in edits.axes:
        name, _, k = axis.name.rpartition(".")
        own = steps[int(k)] if int(k) < len(steps) else {}
        genes.append(own.get(name, plain[name]))
    return tuple(genes)


def shown(hops: Sequence[Hop]) -> str:
    """Return hops as one reads them: `a0 b1*0.5` is layer 0 of a, then layer 1 of b with its input halved."""
    return " ".join(f"{hop.source}{hop.layer}" + (f"*{hop.scale:g}" if hop.scale != 1 else "") for hop in hops)


def edited(*steps: Edit, **changes: object) -> str:
    """Return the stack that some edits make of five layers."""
    edits = make(**changes)
    return shown(edits.stack(genome_of(edits, *steps)).hops)


def seams(hops: Sequence[Hop]) -> list[int]:
    """Return where a layer does not follow the one before it in its own source."""
    return [
        k for k in range(1, len(hops)) if (hops[k].source, hops[k].layer) != (hops[k - 1].source, hops[k - 1].layer + 1)
    ]


def drop(at: int, layers: int = 1, **more: Gene) -> Edit:
    """Return the genes of a drop."""
    return {"op": "drop", "at": at, "layers": layers, **more}


def again(at: int, layers: int = 1, **more: Gene) -> Edit:
    """Return the genes of a repeat."""
    return {"op": "repeat", "at": at, "layers": layers, **more}


def insert(at: int, layers: int = 1, offset: int = 0, **more: Gene) -> Edit:
    """Return the genes of an insert, of `b` if nothing else is said."""
    return {"op": "insert", "at": at, "layers": layers, "offset": offset, **more}


def swap(at: int, layers: int = 1, **more: Gene) -> Edit:
    """Return the genes of a swap, to `b` if nothing else is said."""
    return {"op": "swap", "at": at, "layers": layers, **more}


def move(at: int, shift: int) -> Edit:
    """Return the genes of a move."""
    return {"op": "move", "at": at, "shift": shift}


@st.composite
def spaces(draw: st.DrawFn) -> PathSpace:
    """Draw a space: any number of sources, layers, edits, operations and bounds, with and without scales."""
    names = draw(st.sampled_from([("a",), ("a", "b"), ("b", "a", "c")]))
    depth = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth).map(tuple))
    hops = st.builds(Hop, source=st.sampled_from(names), layer=st.integers(0, depth - 1))
    incumbent = draw(st.one_of(st.just(()), st.lists(hops, min_size=1, max_size=7).map(tuple)))
    start = [sizes[hop.layer] for hop in incumbent] or list(sizes)
    sizing = st.lists(st.floats(0.1, 10), min_size=depth, max_size=depth).map(tuple)
    edits = Edits(
        names=names,
        primary=draw(st.sampled_from(names)),
        sizes=sizes,
        ends=draw(st.integers(0, 20)),
        operations=tuple(draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, unique=True))),
        edits=draw(st.integers(1, 4)),
        block=draw(st.integers(1, 4)),
        reach=draw(st.integers(0, 3)),
        least=draw(st.integers(1, len(start))),
        most=draw(st.integers(len(start), len(start) + 5)),
        scales=draw(st.sampled_from([None, QUARTERS, Steps(low=0.5, high=1.0, step=0.125)])),
        matches=draw(st.sampled_from([{}, {name: (draw(sizing), draw(sizing)) for name in names}])),
        incumbent=incumbent,
    )
    least = edits.ends + sum(start)
    return over(replace(edits, parameters=draw(st.sampled_from([None, least, least + 5, least + 20]))))


def cube(axes: Sequence[object]) -> st.SearchStrategy[list[float]]:
    """Return points of the unit cube."""
    return st.lists(st.floats(0, 1), min_size=len(axes), max_size=len(axes))


@given(spaces(), st.data())
@settings(max_examples=150, deadline=None)
def test_every_point_of_the_cube_is_a_stack_within_the_bounds(own: PathSpace, data: st.DataObject) -> None:
    """Decoding is total and pure; depth and parameters keep their bounds, and every layer is some source's."""
    edits = own.edits
    genome = from_unit(own.axes, data.draw(cube(own.axes)))
    recipe = own.decode(genome)
    stack = edits.stack(genome)

    assert recipe == own.decode(genome)
    assert edits.least <= len(recipe.layers) <= edits.most == own.most
    assert stack_of(recipe) == stack
    assert (stack.embedding, stack.head) == (edits.primary, edits.primary)
    assert {hop.source for hop in stack.hops} | {edits.primary} == {source.name for source in recipe.sources}
    assert all(0 <= hop.layer < own.depth for hop in stack.hops)
    if edits.parameters is not None:
        assert edits.ends + sum(edits.sizes[hop.layer] for hop in stack.hops) <= edits.parameters


@given(spaces(), st.data())
@settings(max_examples=150, deadline=None)
def test_scales_stand_at_seams_alone(own: PathSpace, data: st.DataObject) -> None:
    """Where a layer follows the one before it in its own source its scale is 1, and without matches all are steps."""
    edits = own.edits
    hops = edits.stack(from_unit(own.axes, data.draw(cube(own.axes)))).hops

    assert {k for k, hop in enumerate(hops) if hop.scale != 1.0} <= set(seams(hops))
    if edits.scales is not None and not edits.matches:
        assert all(edits.scales.low <= hop.scale <= edits.scales.high for hop in hops)
        assert all((hop.scale / edits.scales.step).is_integer() for hop in hops)
    if edits.scales is None and not edits.matches:
        assert all(hop.scale == 1.0 for hop in hops)


@given(spaces(), st.data())
@settings(max_examples=100, deadline=None)
def test_genes_that_do_not_count_change_nothing(own: PathSpace, data: st.DataObject) -> None:
    """Two genomes that agree on the active axes are the same recipe."""
    one, other = (from_unit(own.axes, data.draw(cube(own.axes))) for _ in range(2))
    mixed = tuple(
        gene if counts else rest for gene, rest, counts in zip(one, other, active(own.axes, one), strict=True)
    )

    assert own.decode(mixed).digest == own.decode(one).digest


@given(spaces(), st.data())
@settings(max_examples=100, deadline=None)
def test_random_genomes_fit_the_axes(own: PathSpace, data: st.DataObject) -> None:
    """With a prior and without, whatever was drawn before, and one stream of random numbers gives one genome."""
    count = len(own.edits.begin)
    gains = st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=count, max_size=count)
    prior = data.draw(st.one_of(st.none(), st.fixed_dictionaries({"drop": gains, "repeat": gains}).map(prior_of)))
    seed = data.draw(st.integers(0, 2**32))
    genomes = [own.sample(np.random.default_rng(seed), prior) for _ in range(2)]

    check_genome(own.axes, genomes[0], "sample")
    assert genomes[0] == genomes[1]


DROPS = {
    "one": ([drop(2)], "a0 a1 a3 a4"),
    "a block": ([drop(2, 2)], "a0 a1 a4"),
    "a block is clipped at the end": ([drop(4, 2)], "a0 a1 a2 a3"),
    "beyond the end the last": ([drop(8)], "a0 a1 a2 a3"),
    "the first": ([drop(0)], "a1 a2 a3 a4"),
    "its scale stands at the seam": ([drop(1, enter=3)], "a0 a2*0.75 a3 a4"),
    "no scale before the first": ([drop(0, enter=3)], "a1 a2 a3 a4"),
    "no scale without a layer behind": ([drop(4, enter=3)], "a0 a1 a2 a3"),
    "two": ([drop(1), drop(2)], "a0 a2 a4"),
}
REPEATS = {
    "one": ([again(1)], "a0 a1 a1 a2 a3 a4"),
    "a block": ([again(1, 2)], "a0 a1 a2 a1 a2 a3 a4"),
    "a block is clipped at the end": ([again(4, 2)], "a0 a1 a2 a3 a4 a4"),
    "the scale enters the second time": ([again(1, 2, enter=5)], "a0 a1 a2 a1*1.25 a2 a3 a4"),
    "what was repeated": ([again(1), again(1, 2)], "a0 a1 a1 a1 a1 a2 a3 a4"),
    "with the seams within": ([again(1, enter=6), again(1, 2, enter=2)], "a0 a1 a1*1.5 a1*0.5 a1*1.5 a2 a3 a4"),
}
INSERTS = {
    "of its own depth": ([insert(2)], "a0 a1 b2 a2 a3 a4"),
    "of an earlier one": ([insert(2, offset=-1)], "a0 a1 b1 a2 a3 a4"),
    "a block of later ones": ([insert(1, 2, offset=2)], "a0 b3 b4 a1 a2 a3 a4"),
    "clipped at the first layer": ([insert(0, offset=-2)], "b0 a0 a1 a2 a3 a4"),
    "clipped at the last layer": ([insert(4, offset=2)], "a0 a1 a2 a3 b4 a4"),
    "a block clipped at the last layer": ([insert(3, 2, offset=2)], "a0 a1 a2 b3 b4 a3 a4"),
    "before the last where there is no such place": ([insert(8)], "a0 a1 a2 a3 b4 a4"),
    "of the source itself": ([insert(2, source="a")], "a0 a1 a2 a2 a3 a4"),
    "with a scale on either side": ([insert(2, 2, enter=2, leave=6)], "a0 a1 b2*0.5 b3 a2*1.5 a3 a4"),
    "first, so only one side is a seam": ([insert(0, enter=2, leave=6)], "b0 a0*1.5 a1 a2 a3 a4"),
    "beside its own kind": ([swap(2), insert(3, offset=0, enter=2)], "a0 a1 b2 b3 a3 a4"),
}
SWAPS = {
    "one": ([swap(1)], "a0 b1 a2 a3 a4"),
    "a block is clipped at the end": ([swap(4, 2)], "a0 a1 a2 a3 b4"),
    "with a scale on either side": ([swap(1, 2, enter=2, leave=6)], "a0 b1*0.5 b2 a3*1.5 a4"),
    "the first": ([swap(0, enter=2, leave=6)], "b0 a1*1.5 a2 a3 a4"),
    "with the own source": ([swap(1, 2, source="a", enter=2, leave=6)], "a0 a1 a2 a3 a4"),
    "and back": ([swap(1, enter=2, leave=6), swap(1, source="a")], "a0 a1 a2 a3 a4"),
    "side by side": ([swap(1), swap(2, enter=2)], "a0 b1 b2 a3 a4"),
}
#: Before each: a0 a1 | b2*0.75 b3 | a4*1.5.
TWO_SEAMS = swap(2, 2, enter=3, leave=6)
MOVES = {
    "to the right": ([TWO_SEAMS, move(0, 1)], "a0 a1 a2 b3*0.75 a4*1.5"),
    "to the right to the next seam, which then is none": ([TWO_SEAMS, move(0, 2)], "a0 a1 a2 a3 a4"),
    "to the left": ([TWO_SEAMS, move(0, -1)], "a0 b1*0.75 b2 b3 a4*1.5"),
    "to the left to the beginning, where there is no scale": ([TWO_SEAMS, move(0, -2)], "b0 b1 b2 b3 a4*1.5"),
    "of the second seam to the right end": ([TWO_SEAMS, move(1, 1)], "a0 a1 b2*0.75 b3 b4"),
    "no further than the right end": ([TWO_SEAMS, move(1, 2)], "a0 a1 b2*0.75 b3 b4"),
    "of the second seam to the left": ([TWO_SEAMS, move(1, -1)], "a0 a1 b2*0.75 a3*1.5 a4"),
    "of the second seam to the first": ([TWO_SEAMS, move(1, -2)], "a0 a1 a2 a3 a4"),
    "of seams in turn": ([TWO_SEAMS, move(2, 1)], "a0 a1 a2 b3*0.75 a4*1.5"),
    "by nothing": ([TWO_SEAMS, move(0, 0)], "a0 a1 b2*0.75 b3 a4*1.5"),
    "without a seam": ([move(3, 1), move(0, -2)], "a0 a1 a2 a3 a4"),
    "not before the first layer": ([again(0, enter=3), move(0, -1)], "a0 a0*0.75 a1 a2 a3 a4"),
    "not behind the last layer": ([again(4, enter=3), move(0, 1)], "a0 a1 a2 a3 a4 a4*0.75"),
    "within one source": ([drop(2, 2, enter=6), move(0, -1)], "a0 a3*1.5 a4"),
}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(*case, id=f"{kind}: {name}")
        for kind, cases in {
            "drop": DROPS, "repeat": REPEATS, "insert": INSERTS, "swap": SWAPS, "move": MOVES,
        }.items()
        for name, case in cases.items()
    ],
)  # fmt: skip
def test_edits_worked_by_hand(steps: list[Edit], expected: str) -> None:
    """Each operation does to five layers what its words say, with its scales at the seams that it makes."""
    assert edited(*steps) == expected


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({"least": 5}, [drop(2)], "a0 a1 a2 a3 a4"),
        ({"least": 4}, [drop(2, 2)], "a0 a1 a2 a3 a4"),
        ({"least": 4}, [drop(2), drop(0)], "a0 a1 a3 a4"),
        ({"block": 5}, [drop(0, 5)], "a0 a1 a2 a3 a4"),
        ({"most": 5}, [again(2), insert(2), swap(2)], "a0 a1 b2 a3 a4"),
        ({"most": 6}, [again(2, 2), insert(1), again(0)], "a0 b1 a1 a2 a3 a4"),
        ({"sizes": (1, 1, 9, 1, 1), "ends": 7, "parameters": 21}, [again(2), again(1), again(1)],
         "a0 a1 a1 a2 a3 a4"),
        ({"sizes": (1, 1, 9, 1, 1), "ends": 7, "parameters": 28}, [again(2), drop(0), again(1)],
         "a1 a2 a2 a3 a4"),
        ({"sizes": (1, 1, 9, 1, 1), "ends": 7, "parameters": 29}, [again(2), again(0), drop(0)],
         "a1 a2 a2 a3 a4"),
        ({"least": 5}, [TWO_SEAMS, move(0, 2), drop(0)], "a0 a1 a2 a3 a4"),
    ],
)  # fmt: skip
def test_an_edit_that_would_leave_the_bounds_does_nothing(
    changes: dict[str, object], steps: list[Edit], expected: str
) -> None:
    """It is left out as a whole, never done in part, and the edits after it are done all the same."""
    assert edited(*steps, **changes) == expected


def test_a_block_of_a_source_is_no_longer_than_the_source() -> None:
    """Of a longer one the whole source is inserted, wherever it was meant to begin."""
    for offset in (-2, 0, 1):
        assert edited(insert(1, 4, offset), sizes=(1, 1), block=4) == "a0 b0 b1 a1"


def test_edits_apply_in_their_order() -> None:
    """Places count in the stack that the edits before have left, and so do bounds."""
    assert edited(drop(1), again(2)) == "a0 a2 a3 a3 a4"
    assert edited(again(2), drop(1)) == "a0 a2 a2 a3 a4"
    assert edited(again(0), drop(4), most=5) == "a0 a1 a2 a3"
    assert edited(drop(4), again(0), most=5) == "a0 a0 a1 a2 a3"


def test_a_scale_vanishes_with_its_seam() -> None:
    """Where a later edit puts a layer behind its own predecessor again, nothing is left of the seam, scale included."""
    assert edited(TWO_SEAMS) == "a0 a1 b2*0.75 b3 a4*1.5"
    assert edited(TWO_SEAMS, move(0, 2)) == "a0 a1 a2 a3 a4"
    assert edited(drop(1, enter=3), insert(1, source="a", offset=-1)) == "a0 a1 a2 a3 a4"
    assert edited(again(0, enter=3), drop(0)) == "a0 a1 a2 a3 a4"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([drop(2), drop(2)], [drop(2, 2)]),
        ([drop(2), drop(1)], [drop(1, 2)]),
        ([again(2)], [insert(2, source="a")]),
        ([again(2), drop(2)], []),
        ([swap(1), swap(2)], [swap(1, 2)]),
        ([swap(1, source="a", enter=1, leave=8)], []),
        ([swap(1), swap(1, source="a", enter=1)], []),
        ([swap(4), move(0, 1)], []),
        ([swap(3, 2), move(0, 1)], [swap(4)]),
        ([move(4, -2)], []),
        ([insert(0), drop(0)], []),
        ([drop(8, enter=2), again(0)], [again(0), drop(5)]),
    ],
)
def test_equal_stacks_are_equal_recipes(one: list[Edit], other: list[Edit]) -> None:
    """However it was reached, a stack has one recipe and one digest."""
    own = space()
    first, second = (own.decode(genome_of(own.edits, *steps)) for steps in (one, other))

    assert first == second
    assert first.digest == second.digest


@given(spaces(), st.data())
@settings(max_examples=150, deadline=None)
def test_digests_tell_stacks_apart(own: PathSpace, data: st.DataObject) -> None:
    """Two genomes have one digest if and only if they have the same hops."""
    genomes = [own.sample(np.random.default_rng(data.draw(st.integers(0, 99)))) for _ in range(2)]
    hops = [own.edits.stack(genome).hops for genome in genomes]

    assert (own.decode(genomes[0]).digest == own.decode(genomes[1]).digest) == (hops[0] == hops[1])


@pytest.mark.parametrize("changes", [{}, {"scales": None}, {"names": ("a",)}, {"operations": ("move",), "reach": 1}])
def test_nothing_edited_is_the_primary_source(changes: dict[str, object]) -> None:
    """At rest a genome decodes to the copy of the primary source, where a search starts and baselines find it."""
    own = space(**changes)
    copy = copy_of(A, 5, "float32")

    assert own.decode(own.edits.rest()) == copy
    assert own.decode(own.edits.rest()).digest == copy.digest
    assert own.start == own.edits.rest()
    assert own.genome_of_constant("linear", {"a": 1.0, "b": 0.0}) == own.start
    assert own.genome_of_constant("linear", {"a": 0.0, "b": 1.0}) is None
    assert own.genome_of_constant("linear", {"a": 0.5, "b": 0.0}) is None
    assert own.genome_of_constant("linear", {"a": 0.5, "b": 0.5}) is None


def test_the_primary_need_not_be_the_first_source() -> None:
    """Ends and incumbent are those of the primary, whatever the order of sources."""
    own = space(primary="b")

    assert own.decode(own.edits.rest()).digest == copy_of(B, 5, "float32").digest
    assert own.decode(genome_of(own.edits, swap(0, 2, source="a"))).route("any.weight", "head", None).blend.weights == {
        "b": 1.0
    }


def test_a_recipe_names_what_it_takes_from_in_the_order_of_the_space() -> None:
    """Sources without a layer or an end in the stack are left out; each layer takes from its own."""
    own = space(names=("c", "b", "a"))
    recipe = own.decode(genome_of(own.edits, swap(1, 2)))

    assert [source.name for source in recipe.sources] == ["a", "b"]
    assert recipe.layers == (0, 1, 2, 3, 4)
    taken = [recipe.route("any.weight", "mlp", k).blend.weights for k in range(5)]
    assert taken == [{"a": 1.0}, {"b": 1.0}, {"b": 1.0}, {"a": 1.0}, {"a": 1.0}]
    assert [recipe.route("any.weight", end, None).blend.weights for end in ("embedding", "head")] == [{"a": 1.0}] * 2
    assert recipe.scales == ()


def test_scales_are_in_the_recipe() -> None:
    """A recipe has a scale for each layer as soon as one is not 1."""
    own = space()

    assert own.decode(genome_of(own.edits, swap(1, enter=2, leave=8))).scales == (1.0, 0.5, 2.0, 1.0, 1.0)


INCUMBENT = tuple(Hop(source=source, layer=layer) for source, layer in [("b", 1), ("b", 2), ("a", 2), ("a", 4)])


def test_another_incumbent_is_what_is_edited() -> None:
    """Places are places in the incumbent, whose ends are the primary's; it is the start, and no source is in it."""
    own = space(incumbent=INCUMBENT)
    decoded = own.decode(own.edits.rest())

    assert shown(own.edits.stack(own.edits.rest()).hops) == "b1 b2 a2 a4"
    assert decoded == own.decode(own.start or ())
    assert decoded.route("any.weight", "embedding", None).blend.weights == {"a": 1.0}
    assert edited(drop(1, enter=2), incumbent=INCUMBENT) == "b1 a2*0.5 a4"
    assert edited(again(3), incumbent=INCUMBENT) == "b1 b2 a2 a4 a4"
    assert edited(insert(2, offset=1), incumbent=INCUMBENT) == "b1 b2 b3 a2 a4"
    assert edited(move(0, 1), incumbent=INCUMBENT) == "b1 b2 b3 a4"
    assert edited(move(1, -1), incumbent=INCUMBENT) == "b1 b2 a3 a4"
    assert own.genome_of_constant("linear", {"a": 1.0, "b": 0.0}) is None


def test_an_incumbent_that_is_spelled_out_is_the_primary_all_the_same() -> None:
    """Hops that are the whole primary source are as good as none."""
    whole = tuple(Hop(source="a", layer=k) for k in range(5))

    assert space(incumbent=whole).genome_of_constant("linear", {"a": 1.0, "b": 0.0}) == space().start


def subsequence(short: Sequence[object], long: Sequence[object]) -> bool:
    """Tell whether one sequence is left of another when some of it is taken out."""
    left = iter(long)
    return all(any(one == other for other in left) for one in short)


@pytest.mark.parametrize("operation", ["drop", "repeat"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_pruning_and_repeating_alone(operation: str, data: st.DataObject) -> None:
    """With only drops every stack is the primary with layers left out, with only repeats the primary is left in it."""
    own = space(operations=(operation,), block=3)
    genome = from_unit(own.axes, data.draw(cube(own.axes)))
    layers, whole = own.decode(genome).layers, tuple(range(5))

    assert {axis.name.partition(".")[0] for axis in own.axes} == {"op", "at", "layers", "enter"}
    if operation == "drop":
        assert subsequence(layers, whole)
        assert len(set(layers)) == len(layers)
    else:
        assert subsequence(whole, layers)
        assert set(layers) == set(whole)
    assert {source.name for source in own.decode(genome).sources} == {"a"}


def test_axes_stand_edit_by_edit_with_their_names() -> None:
    """Each edit has the genes of its operations, which count under these alone."""
    own = make(edits=2)
    each = ["op", "at", "layers", "source", "offset", "shift", "enter", "leave"]

    assert [axis.name for axis in own.axes] == [f"{name}.{k}" for k in range(2) for name in each]
    assert {axis.name: axis.active_if.options for axis in own.axes if axis.active_if and axis.name.endswith("1")} == {
        "at.1": OPERATIONS,
        "layers.1": ("drop", "repeat", "insert", "swap"),
        "source.1": ("insert", "swap"),
        "offset.1": ("insert",),
        "shift.1": ("move",),
        "enter.1": ("drop", "repeat", "insert", "swap"),
        "leave.1": ("insert", "swap"),
    }
    assert isinstance(own.axes[0], Choice)
    assert own.axes[0].options == (NONE, *OPERATIONS)
    bounds = {name: (axis.low, axis.high) for name, axis in zip(each, own.axes, strict=False) if hasattr(axis, "low")}
    assert bounds == {
        "at": (0, 8), "layers": (1, 2), "offset": (-2, 2), "shift": (-2, 2), "enter": (1, 8), "leave": (1, 8),
    }  # fmt: skip
    check_axes(own.axes)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"block": 1}, ["op", "at", "source", "offset", "shift", "enter", "leave"]),
        ({"names": ("a",)}, ["op", "at", "layers", "offset", "shift", "enter", "leave"]),
        ({"reach": 0}, ["op", "at", "layers", "source", "enter", "leave"]),
        ({"scales": None}, ["op", "at", "layers", "source", "offset", "shift"]),
        ({"operations": ("move",)}, ["op", "at", "shift"]),
        ({"operations": ("swap", "move"), "scales": None}, ["op", "at", "layers", "source", "shift"]),
    ],
)
def test_genes_without_a_choice_are_no_axes(changes: dict[str, object], left: list[str]) -> None:
    """Blocks of one layer, one source, no reach, no scales and operations that are left out take their axes along."""
    assert [axis.name for axis in make(edits=1, **changes).axes] == [f"{name}.0" for name in left]


@pytest.mark.parametrize("changes", [{}, {"incumbent": INCUMBENT}, {"operations": ("repeat", "move")}])
def test_probes_are_single_drops_and_repeats_of_each_layer(changes: dict[str, object]) -> None:
    """One per operation and layer, in order, each the incumbent with just that edit."""
    own = space(**changes)
    begin = list(own.edits.begin)
    probes = own.probes()
    kinds = [kind for kind in ("drop", "repeat") if kind in own.edits.operations]

    assert [(kind, at) for kind, at, _ in probes] == list(product(kinds, range(len(begin))))
    for kind, at, genome in probes:
        check_genome(own.axes, genome, "probe")
        expected = begin[:at] + begin[at + 1 :] if kind == "drop" else begin[: at + 1] + begin[at:]
        assert list(own.edits.stack(genome).hops) == expected
    assert replace(own, probed=False).probes() == []


def test_a_space_says_what_it_is_in_a_line() -> None:
    """The line names the number of edits and their kinds, the incumbent and the bounds."""
    assert space(operations=("drop", "swap")).headline == (
        "3 edits (drop, swap) of a's 5 layers, 1 to 9 layers, scales 0.25 to 2 at seams"
    )
    assert space(operations=("drop",), scales=None, incumbent=INCUMBENT).headline == (
        "3 edits (drop) of an incumbent of 4 layers, 1 to 9 layers, no scales"
    )


def test_a_blend_of_sources_is_no_stack_but_a_baseline() -> None:
    """Constant recipes blend every tensor alike, with the base that the space has for them."""
    own = replace(space(), base=C)
    recipe = own.constant("task_arithmetic", {"a": 0.5, "b": 0.25})

    assert (recipe.sources, recipe.base, recipe.layers) == ((A, B), C, (0, 1, 2, 3, 4))
    assert [(blend.method, blend.weights) for blend in recipe.blends()] == [("task_arithmetic", {"a": 0.5, "b": 0.25})]
    assert stack_of(recipe) is None


#: What layers return and what they take, by source.
MATCHES = {
    "a": ((1.0, 2.0, 4.0, 8.0, 16.0), (1.0, 1.0, 2.0, 4.0, 8.0)),
    "b": ((2.0, 5.0, 8.0, 1000.0, 32.0), (2.0, 2.0, 4.3, 8.0, 16.0)),
}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # b2 takes 4.3 and a1 returns 2: 2.15, nearest 2.25; a3 takes 4 and b2 returns 8
        ([swap(2)], "a0 a1 b2*2.25 a3*0.5 a4"),
        ([swap(2, enter=2, leave=6)], "a0 a1 b2*1.125 a3*0.75 a4"),
        # a4 takes 8 and b3 returns 1000: nearest 0, so one step
        ([swap(3)], "a0 a1 a2 b3*2 a4*0.25"),
        # a2 takes 2 and a2 returns 4
        ([again(2)], "a0 a1 a2 a2*0.5 a3 a4"),
        # a1 takes 1 and b0 returns 2; nothing before the first
        ([swap(0)], "b0 a1*0.5 a2 a3 a4"),
        # a3 takes 4 and a1 returns 2; 2 * 0.75
        ([drop(2, enter=3)], "a0 a1 a3*1.5 a4"),
        ([drop(0)], "a1 a2 a3 a4"),
    ],
)
def test_seams_are_matched_by_the_quantised_ratio_of_sizes(steps: list[Edit], expected: str) -> None:
    """A seam's scale is what its layer is used to by what the layer before returns, in steps, times the gene."""
    assert edited(*steps, matches=MATCHES) == expected


def test_seams_are_matched_without_scales_too() -> None:
    """Where no scale is searched the ratio is kept in steps of 1/64."""
    edits = make(scales=None, matches=MATCHES)
    hops = edits.stack(genome_of(edits, swap(2))).hops

    # 2.15 * 64 = 137.6
    assert [hop.scale for hop in hops] == [1.0, 1.0, 138 / 64, 0.5, 1.0]
    assert edits.stack(edits.rest()).hops == edits.begin


def test_random_places_are_where_the_prior_hopes() -> None:
    """A prior with nearly all weight on one layer puts that operation's edits there, and no other operation's."""
    own = space(operations=("drop", "insert"), edits=1)
    prior = {"drop": (0.001, 0.001, 0.001, 0.996, 0.001)}
    rng = np.random.default_rng(0)
    drawn = [own.sample(rng, prior) for _ in range(1500)]
    places = {op: Counter(genome[1] for genome in drawn if genome[0] == op) for op in ("drop", "insert")}

    assert places["drop"][3] > 0.97 * places["drop"].total() > 300
    assert set(places["insert"]) == set(range(5))
    # a fifth each, within four standard errors
    share = np.array([places["insert"][at] for at in range(5)]) / places["insert"].total()
    assert np.abs(share - 0.2).max() < 4 * math.sqrt(0.16 / places["insert"].total())


def test_random_places_follow_the_prior_in_proportion() -> None:
    """Weights that do not sum to 1 count by their share; without a prior every layer of the incumbent is as likely."""
    own = space(operations=("drop",), edits=1)
    rng = np.random.default_rng(1)
    for prior, shares in (({"drop": (8.0, 0.0, 4.0, 0.0, 4.0)}, (0.5, 0, 0.25, 0, 0.25)), (None, (0.2,) * 5)):
        genomes = [own.sample(rng, prior) for _ in range(2000)]
        found = Counter(genome[1] for genome in genomes if genome[0] == "drop")
        error = 4 * math.sqrt(0.25 / found.total())
        assert [found[at] / found.total() for at in range(5)] == pytest.approx(shares, abs=error)


def test_random_genomes_are_few_and_short_edits() -> None:
    """More than two edits are rare, blocks of one layer are most, and about half of the scales are 1."""
    own = space(block=4)
    rng = np.random.default_rng(2)
    names = [axis.name.partition(".")[0] for axis in own.axes]
    drawn = [list(zip(names, own.sample(rng), strict=True)) for _ in range(800)]
    genes = {name: [gene for genome in drawn for own_name, gene in genome if own_name == name] for name in names}

    assert set(genes["op"]) == {NONE, *OPERATIONS}
    blocks = Counter(genes["layers"])
    assert blocks[1] > blocks[2] > blocks[3]
    assert 0.4 < genes["enter"].count(4) / len(genes["enter"]) < 0.7
    assert set(genes["enter"]) == set(range(1, 9))
    assert set(genes["source"]) == {"a", "b"}


gains = st.lists(st.integers(-32, 32).map(lambda n: n / 8), min_size=1, max_size=9)


@given(gains, st.integers(-64, 64))
@settings(deadline=None)
def test_a_prior_is_a_distribution_that_is_ordered_as_gains(own: list[float], shift: int) -> None:
    """It sums to 1, rises with the gain, leaves every layer its even share, and only differences of gains count."""
    found = prior_of({"drop": own})["drop"]

    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0.25 / len(own)
    for (one, p), (two, q) in product(zip(own, found, strict=True), repeat=2):
        assert (p < q) == (one < two) or p == pytest.approx(q, rel=1e-12)
        assert one != two or p == q
    assert prior_of({"drop": [gain + shift for gain in own]})["drop"] == pytest.approx(found)


@given(gains, st.data())
@settings(deadline=None)
def test_a_failed_probe_is_as_bad_as_the_worst(own: list[float], data: st.DataObject) -> None:
    """A layer whose probe failed has the prior of one that gained the least."""
    places = data.draw(st.sets(st.integers(0, len(own)), min_size=1))
    mixed: list[float | None] = list(own)
    for place in sorted(places, reverse=True):
        mixed.insert(place, None)
    filled = [min(own) if gain is None else gain for gain in mixed]

    assert prior_of({"repeat": mixed}) == prior_of({"repeat": filled})


def test_a_prior_worked_by_hand() -> None:
    """Gains 0 and 1 spread by 1/2, so their odds are e^2 within the three quarters that are not spread evenly."""
    found = prior_of({"drop": [0.0, 1.0], "repeat": [None, None], "swap": [3.0]})

    high = math.exp(2) / (1 + math.exp(2))
    assert found["drop"] == pytest.approx((0.125 + 0.75 * (1 - high), 0.125 + 0.75 * high))
    assert found["repeat"] == pytest.approx((0.5, 0.5))
    assert found["swap"] == pytest.approx((1.0,))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"low": 0.5, "high": 2.0, "step": 0.0}, "must have a step above 0 and bounds around 1, above 0, got Steps"),
        ({"low": 0.5, "high": 2.0, "step": -0.5}, "must have a step above 0"),
        ({"low": 0.5, "high": 2.0, "step": float("nan")}, "must have a step above 0"),
        ({"low": 0.0, "high": 2.0, "step": 0.5}, "bounds around 1, above 0"),
        ({"low": float("nan"), "high": 2.0, "step": 0.5}, "bounds around 1, above 0"),
        ({"low": 1.5, "high": 2.0, "step": 0.5}, "bounds around 1"),
        ({"low": 0.25, "high": 0.5, "step": 0.25}, "bounds around 1"),
        ({"low": 0.5, "high": 1.75, "step": 0.5}, "low, high and 1 must be whole multiples of the step"),
        ({"low": 0.3, "high": 1.5, "step": 0.5}, "low, high and 1 must be whole multiples of the step"),
        ({"low": 0.8, "high": 1.6, "step": 0.8}, "low, high and 1 must be whole multiples of the step"),
        ({"low": 0.5, "high": 1.0, "step": 1e10}, "scales"),
        ({"low": 0.5, "high": 1.0, "step": float("inf")}, "scales"),
        ({"low": 0.5, "high": float("inf"), "step": 0.5}, "scales"),
    ],
)
def test_impossible_scales_are_refused(steps: dict[str, float], message: str) -> None:
    """Steps and bounds that hold no 1, or that steps do not meet, are named."""
    with pytest.raises(RecipeError, match=message):
        Steps(**steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary": "x"}, "^primary: 'x' is no source; .*a, b"),
        ({"operations": ("drop", "swop")}, "^operations: 'swop' is not known; did you mean 'swap'"),
        ({"operations": ()}, "a stack needs an operation, an edit, and a block of a layer or more"),
        ({"edits": 0}, "a stack needs an operation, an edit"),
        ({"block": 0}, "a block of a layer or more"),
        ({"reach": -1}, "a stack needs"),
        ({"incumbent": (Hop(source="x", layer=0),)}, "^incumbent: no source has layer 0 of 'x'"),
        ({"incumbent": (Hop(source="a", layer=5),)}, "^incumbent: no source has layer 5 of 'a'"),
        ({"incumbent": (Hop(source="a", layer=-1),)}, "^incumbent: no source has layer -1 of 'a'"),
        ({"least": 6}, r"^depth: the incumbent has 5 layers, which is not within \[6, 9\]"),
        ({"most": 4}, r"^depth: the incumbent has 5 layers, which is not within \[1, 4\]"),
        ({"incumbent": INCUMBENT, "least": 5}, r"^depth: the incumbent has 4 layers, which is not within \[5, 9\]"),
        ({"sizes": (1000,) * 5, "ends": 5, "parameters": 5004},
         "^parameters: the incumbent has 5,005, more than 5,004"),
        ({"operations": ("drop", "drop")}, "axis 'op.0': options must be distinct"),
        ({"names": ("a", "a")}, "axis 'source.0': options must be distinct"),
        ({"least": 0}, "depth|least|a stack needs"),
        ({"matches": {"a": MATCHES["a"]}}, "matches|sizes"),
        ({"matches": {**MATCHES, "b": ((1.0,) * 4, (1.0,) * 5)}}, "matches|sizes"),
        ({"matches": {**MATCHES, "b": ((0.0,) * 5, (1.0,) * 5)}}, "matches|sizes"),
    ],
)  # fmt: skip
def test_impossible_edits_are_refused(changes: dict[str, object], message: str) -> None:
    """The setting, what it may be and what it was are named."""
    with pytest.raises(RecipeError, match=message):
        make(**changes)


def test_edits_that_do_not_fit_the_sources_are_refused() -> None:
    """What edits may take layers from must be among the sources of the space."""
    with pytest.raises(RecipeError, match="'b'"):
        PathSpace(sources=(A, C), edits=make(), dtype="float32")


def test_a_genome_that_does_not_fit_is_refused() -> None:
    """Length and genes are checked before anything is edited."""
    own = space()
    for genome in ((), own.edits.rest()[:-1], ("turn", *own.edits.rest()[1:])):
        with pytest.raises(RecipeError, match=r"^decode: "):
            own.decode(genome)


# The published data flow space.


def published(**changes: object) -> SakanaSpace:
    """Return the space of two sources with three layers: M = 6, gone through twice."""
    given = {"sources": (A, B), "depth": 3, "dtype": "float32", "repetitions": 2}
    return SakanaSpace(**given | changes)


def flow(taken: Sequence[int], scales: Mapping[tuple[int, int], float], own: SakanaSpace) -> Genome:
    """Return the genome with these indicators above 0 and these entries of W; all others of W are 0.9."""
    count = own.layers
    indicators = [0.01 if t in taken else (0.0 if t % 2 else -1.0) for t in range(count * own.repetitions)]
    rows = [scales.get((i, j), 0.9) for i in range(count) for j in range(count)]
    return (*indicators, *rows)


@pytest.mark.parametrize(
    ("taken", "scales", "expected"),
    [
        # a0 a1 a2 b0 b1 b2 are 0 to 5; the ends are a0 and a2
        ([], {(0, 2): -0.5}, "a0 a2*0.5"),
        # 8 is 2 again
        ([1, 3, 8], {(0, 1): 0.25, (1, 3): -0.5, (3, 2): 0.5, (2, 2): 1.0}, "a0 a1*1.25 b0*0.5 a2*1.5 a2*2"),
        ([0, 5, 6, 11], {(0, 0): 0.5, (0, 5): -0.25, (5, 0): 0.0, (5, 2): -0.75},
         "a0 a0*1.5 b2*0.75 a0 b2*0.75 a2*0.25"),
        # a seam's scale in one direction is not that in the other
        ([4, 3, 10, 9], {(0, 3): 0.0, (3, 4): 0.25, (4, 3): -0.25, (4, 2): 0.5},
         "a0 b0 b1*1.25 b0*0.75 b1*1.25 a2*1.5"),
        (range(12), dict.fromkeys(product(range(6), repeat=2), 0.0),
         "a0 a0 a1 a2 b0 b1 b2 a0 a1 a2 b0 b1 b2 a2"),
    ],
)  # fmt: skip
def test_the_published_space_worked_by_hand(
    taken: Sequence[int], scales: Mapping[tuple[int, int], float], expected: str
) -> None:
    """Hops with an indicator above 0 in their order between the primary's ends, each entered at 1 + W of the two."""
    own = published()
    stack = stack_of(own.decode(flow(taken, scales, own)))

    assert stack is not None
    assert shown(stack.hops) == expected
    assert (stack.embedding, stack.head) == ("a", "a")


def test_the_published_space_has_as_many_genes_as_published() -> None:
    """T + M^2 genes; with M = 64 and r = 3 these are 192 + 4096, and every hop may be taken."""
    wide = published(depth=32, repetitions=3)
    start = wide.start or ()

    assert (wide.layers, len(wide.axes), len(start)) == (64, 4288, 4288)
    assert sum(axis.name.startswith("indicator.") for axis in wide.axes) == 192
    assert wide.decode(start).layers == (0, *range(32), 31)
    assert wide.most == 194
    assert len(published().axes) == 12 + 36
    assert len(published(sources=(A,), depth=4, repetitions=5).axes) == 20 + 16


def test_the_published_search_starts_at_the_primary_between_its_forced_ends() -> None:
    """The primary's indicators of the first repetition have the favour, the rest is 0, scales included."""
    own = published(favour=0.25)

    assert own.start == (0.25, 0.25, 0.25, *(0.0,) * 9, *(0.0,) * 36)
    recipe = own.decode(own.start)
    assert recipe.layers == (0, 0, 1, 2, 2)
    assert recipe.sources == (A,)
    assert recipe.scales == ()
    assert own.genome_of_constant("linear", {"a": 1.0, "b": 0.0}) is None
    assert own.probes() == []


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data())
@settings(max_examples=60, deadline=None)
def test_every_point_of_the_published_space_is_a_stack(
    sources: int, depth: int, repetitions: int, data: st.DataObject
) -> None:
    """Decoding is total: as many hops as indicators above 0 and two ends, all scales above 0."""
    own = SakanaSpace(sources=(A, B, C)[:sources], depth=depth, dtype="float32", repetitions=repetitions)
    genome = from_unit(own.axes, data.draw(cube(own.axes)))
    recipe = own.decode(genome)
    stack = stack_of(recipe)

    assert stack is not None
    ahead = sum(float(gene) > 0 for gene in genome[: own.layers * repetitions])
    assert len(stack.hops) == ahead + 2 <= own.most
    assert stack.hops[0] == Hop(source="a", layer=0, scale=1.0)
    assert (stack.hops[-1].source, stack.hops[-1].layer) == ("a", depth - 1)
    assert all(0 < hop.scale <= 2.1 for hop in stack.hops)


def test_random_genomes_of_the_published_space_lie_about_the_start() -> None:
    """They are normal about the first mean, with the published deviation: over 4288 genes it is met within a tenth."""
    wide = published(depth=32, repetitions=3)
    drawn = wide.sample(np.random.default_rng(0))
    away = np.array(drawn) - np.array(wide.start)

    check_genome(wide.axes, drawn, "sample")
    assert SAKANA_SIGMA == 0.1
    assert float(away.std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float(away.mean())) < 4 * 0.1 / math.sqrt(4288)
    assert drawn == wide.sample(np.random.default_rng(0), {"drop": (1.0,)})


def test_genes_of_the_published_space_are_all_as_wide() -> None:
    """Axes are 2 wide, as a deviation in the cube supposes, and scales are above 0."""
    axes = published().axes

    assert {axis.high - axis.low for axis in axes} == {2.0}
    assert all(axis.low > -1 for axis in axes if axis.name.startswith("scale."))
    check_axes(axes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"favour": -0.1}, r"favour must lie in \[0, 1\], got -0.1"),
        ({"favour": 1.5}, r"favour must lie in \[0, 1\], got 1.5"),
        ({"favour": float("nan")}, r"favour must lie in \[0, 1\]"),
    ],
)
def test_impossible_published_spaces_are_refused(changes: dict[str, object], message: str) -> None:
    """The setting, what it may be and what it was are named."""
    with pytest.raises(RecipeError, match=message):
        published(**changes)


@pytest.mark.parametrize("genome", [(), (0.5,) * 47, (1.5,) + (0.0,) * 47, ("a",) + (0.0,) * 47])
def test_genomes_that_do_not_fit_the_published_space_are_refused(genome: Genome) -> None:
    """Length, type and bounds are checked."""
    with pytest.raises(RecipeError, match=r"^decode: "):
        published().decode(genome)


def test_the_published_space_says_what_it_is() -> None:
    """The line names M, r, the number of scales and whose the ends are; baselines blend as in other spaces."""
    own = published(base=C)
    recipe = own.constant("linear", {"a": 0.5, "b": 0.5})

    assert own.headline == "stacks as Akiba 2024: 6 layers gone through 2 times, 36 scales, ends of a"
    assert isinstance(recipe, Recipe)
    assert (recipe.layers, recipe.base, [blend.weights for blend in recipe.blends()]) == (
        (0, 1, 2), C, [{"a": 0.5, "b": 0.5}],
    )  # fmt: skip

"""Hops: stacks written as recipes and read back, and scales folded into what layers add, against the law behind it."""

import doctest
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import hops as hops_module
from evomerge.errors import RecipeError
from evomerge.hops import (
    Hop,
    Stack,
    alike,
    copied,
    copy_blend,
    described,
    folded,
    passed_through,
    path_of,
    recipe_of,
    stack_of,
)
from evomerge.methods import canonical
from evomerge.models.materialize import materialize
from evomerge.models.resident import InMemory
from evomerge.recipe import ENDS, GROUPS, Blend, Recipe, Route, Source, copy_of, from_plain, to_yaml

SOURCES = tuple(Source(name=name, path=name) for name in "abc")
BOTH = Blend(method="linear", weights={"a": 0.5, "b": 0.5})

#: What a layer adds is proportional to in the models of these tests: a projection, or a norm stored without its 1.
OUT, NORM = {"mlp.out.weight": 0.0}, {"ln_post.weight": 1.0}

SCALES = st.sampled_from([1.0, 1.0, 0.5, 2.0, 1.25, 0.8])
HOPS = st.builds(Hop, source=st.sampled_from("abc"), layer=st.integers(0, 3), scale=SCALES)


def stack(hops: list[Hop], end: str = "a") -> Stack:
    """Return a stack whose ends are of one source."""
    return Stack(embedding=end, hops=tuple(hops), head=end)


STACKS = st.builds(stack, st.lists(HOPS, min_size=1, max_size=8), st.sampled_from("abc"))


def written(given: Stack, sources: tuple[Source, ...] = SOURCES) -> Recipe:
    """Return the recipe of a stack of the sources here."""
    return recipe_of(given, sources, "float32")


def plain(*layers: int, scales: tuple[float, ...] = (), routes: tuple[Route, ...] = ()) -> Recipe:
    """Return a recipe of a and b, by these routes and else copies of a."""
    routes = (*routes, Route(blend=copy_blend("a")))
    return Recipe(sources=SOURCES[:2], routes=routes, layers=layers, scales=scales, dtype="float32")


# --- stacks as recipes


@settings(max_examples=100, deadline=None)
@given(given=STACKS)
def test_a_stack_comes_back_from_its_recipe(given: Stack) -> None:
    """Also from the recipe's text; only the sources that it takes from are named, in their order."""
    recipe = written(given)
    used = {given.head, *(hop.source for hop in given.hops)}

    assert stack_of(recipe) == given
    assert stack_of(from_plain(yaml.safe_load(to_yaml(recipe)), "here")) == given
    assert [source.name for source in recipe.sources] == sorted(used)
    assert recipe.layers == tuple(hop.layer for hop in given.hops)


@settings(max_examples=100, deadline=None)
@given(given=STACKS)
def test_each_tensor_of_a_stacks_recipe_is_a_copy_of_its_hops_source(given: Stack) -> None:
    """The first route that takes a tensor of layer k copies what hop k names; at the ends, what the stack names."""
    recipe = written(given)
    for k, hop in enumerate(given.hops):
        assert {copied(recipe.route("h.w", group, k).blend) for group in GROUPS} == {hop.source}
    assert {copied(recipe.route("w", end, None).blend) for end in ENDS} == {given.head}


@settings(max_examples=100, deadline=None)
@given(one=STACKS, two=STACKS, same=st.booleans(), data=st.data())
def test_stacks_are_equal_where_their_digests_are(one: Stack, two: Stack, same: bool, data: st.DataObject) -> None:
    """A stack made anew has the same digest; one with another hop, scale or end has another."""
    if same:
        k = data.draw(st.integers(0, len(one.hops) - 1))
        hops = [Hop(source=hop.source, layer=hop.layer, scale=hop.scale) for hop in one.hops]
        assert written(stack(hops, one.head)).digest == written(one).digest
        two = stack([*hops[:k], data.draw(HOPS), *hops[k + 1 :]], one.head)

    assert (written(one).digest == written(two).digest) == (one == two)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_stack_that_is_one_source_has_the_digest_of_its_copy(name: str) -> None:
    """All layers once, in order, of one source: the recipe that copies it, whichever others there are."""
    source = next(source for source in SOURCES if source.name == name)
    given = stack([Hop(source=name, layer=k) for k in range(5)], name)

    assert written(given).digest == copy_of(source, 5, "float32").digest
    assert stack_of(copy_of(source, 5, "float32")) == given
    assert written(replace(given, hops=given.hops[::-1])).digest != copy_of(source, 5, "float32").digest


def test_what_copies_in_other_words_is_a_stack() -> None:
    """Passthrough, sources without weight, routes by group, layers by source, and separate ends are read alike."""
    routes = (
        Route(blend=Blend(method="passthrough", weights={"b": 1.0}), groups=("attention", "mlp"), layers=(1, 2)),
        Route(blend=Blend(method="linear", weights={"a": 0.0, "b": 1.0}), groups=("other",), layers=(1, 2)),
        Route(blend=copy_blend("b"), groups=("embedding",)),
    )
    found = stack_of(replace(plain(2, routes=routes), layers=(2, {"a": 0, "b": 3})))

    assert found == Stack(embedding="b", hops=(Hop(source="a", layer=2), Hop(source="b", layer=3)), head="a")


@pytest.mark.parametrize(
    "routes",
    [
        (Route(blend=BOTH),),
        (Route(blend=BOTH, layers=(1, 2)),),
        (Route(blend=BOTH, groups=("mlp",), layers=(0, 1)),),
        (Route(blend=BOTH, groups=("embedding",)),),
        (Route(blend=BOTH, groups=("head",)),),
        (Route(blend=BOTH, tensors="*.norm.weight"),),
        (Route(blend=copy_blend("b"), groups=("attention",), layers=(0, 1)),),
        (Route(blend=copy_blend("b"), tensors="*.q_proj.weight", layers=(1, 2)),),
        (Route(blend=Blend(method="passthrough", weights={"a": 1.0}, parameters={"scale": 0.5}), layers=(0, 1)),),
        (Route(blend=Blend(method="linear", weights={"a": 0.0})),),
    ],
    ids=["all", "layer", "group", "embedding", "head", "pattern", "two copies", "two by pattern", "scaled", "none"],
)
def test_what_is_more_than_copies_is_no_stack(routes: tuple[Route, ...]) -> None:
    """One blend of two, one layer of two sources, or one tensor that is not as it was, and there are no hops."""
    assert stack_of(plain(0, 1)) is not None
    assert stack_of(plain(0, 1, routes=routes)) is None
    assert path_of(plain(0, 1, routes=routes)) == ()


def test_without_layers_there_are_no_hops() -> None:
    """A recipe that leaves layers out does not say how many there are."""
    assert stack_of(plain()) is None


def test_a_route_that_comes_too_late_does_not_count() -> None:
    """Only the first route that takes a tensor says what becomes of it."""
    late = replace(plain(0, 1), routes=(Route(blend=copy_blend("b")), Route(blend=BOTH), Route(blend=copy_blend("a"))))

    assert stack_of(late) == stack([Hop(source="b", layer=0), Hop(source="b", layer=1)], "b")


def test_copied_names_the_one_source_that_is_copied() -> None:
    """By any method that leaves one source as it is; None for a sum, a scaled source, and a task vector."""
    assert copied(Blend(method="linear", weights={"a": 0.0, "b": 1.0})) == "b"
    assert copied(Blend(method="zero | sum | scale", weights={"b": 1.0}, parameters={"scale": 1.0})) == "b"
    assert copied(BOTH) is None
    assert copied(Blend(method="passthrough", weights={"b": 1.0}, parameters={"scale": 2.0})) is None
    assert copied(Blend(method="task_arithmetic", weights={"b": 0.5})) is None


# --- scales in recipes


@settings(max_examples=50, deadline=None)
@given(given=STACKS, scale=st.floats(0.01, 100.0).filter(lambda scale: scale != 1.0), data=st.data())
def test_scales_of_1_do_not_count_and_others_do(given: Stack, scale: float, data: st.DataObject) -> None:
    """Written out or left out, scales of 1 are one digest; any other scale, at any layer, is another."""
    bare = written(replace(given, hops=tuple(replace(hop, scale=1.0) for hop in given.hops)))
    ones = replace(bare, scales=(1.0,) * len(given.hops))
    k = data.draw(st.integers(0, len(given.hops) - 1))
    other = replace(bare, scales=(*ones.scales[:k], scale, *ones.scales[k + 1 :]))

    assert bare.scales == ()
    assert ones.digest == bare.digest
    assert (bare.scaled, ones.scaled, other.scaled) == (False, False, True)
    assert other.digest != bare.digest
    assert stack_of(ones) == stack_of(bare)


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ((1.0,), "has 2 layers but 1 scales; give one for each"),
        ((1.0, 1.0, 1.0), "has 2 layers but 3 scales"),
        ((1.0, 0.0), "scale 1 must be finite and above 0, got 0.0"),
        ((-0.5, 1.0), "scale 0 must be finite and above 0, got -0.5"),
        ((1.0, math.nan), "scale 1 must be finite and above 0, got nan"),
        ((math.inf, 1.0), "scale 0 must be finite and above 0, got inf"),
    ],
)
def test_scales_that_nothing_can_undo_are_refused(scales: tuple[float, ...], says: str) -> None:
    """There is one for each layer, finite and above 0."""
    with pytest.raises(RecipeError, match=says):
        plain(0, 1, scales=scales)


def test_scales_without_layers_are_refused() -> None:
    """A recipe that leaves its layers out has none to scale."""
    with pytest.raises(RecipeError, match="has 0 layers but 2 scales"):
        plain(scales=(1.0, 2.0))


# --- scales folded


def test_folded_divides_by_all_scales_so_far() -> None:
    """By hand: scales 2, 1/2, 4, 1 give products 2, 1, 4, 4, so additions are times 1/2, 1, 1/4, 1/4."""
    hops = [("a", 0, 2.0), ("b", 1, 0.5), ("b", 2, 4.0), ("a", 2, 1.0)]
    recipe = written(stack([Hop(source=s, layer=layer, scale=scale) for s, layer, scale in hops]))
    found = folded(recipe, {**OUT, **NORM})

    def form(route: Route) -> Sequence[object]:
        return canonical(route.blend.method, route.blend.weights, route.blend.parameters)

    for k, (source, _, _) in enumerate(hops):
        share = (0.5, 1.0, 0.25, 0.25)[k]
        divided = canonical("zero | sum | scale", {source: 1.0}, {"scale": share})
        gained = canonical("zero | sum | gain", {source: 1.0}, {"gain": share, "of": 1.0})
        assert form(found.route(f"h.{k}.mlp.out.weight", "mlp", k)) == divided
        assert form(found.route(f"h.{k}.ln_post.weight", "other", k)) == gained
        for other in ("mlp.in.weight", "mlp.out.bias", "ln_post.weight.scale", "mlp_out.weight"):
            assert copied(found.route(f"h.{k}.{other}", "mlp", k).blend) == source
    for end in ENDS:
        assert copied(found.route("wte.weight", end, None).blend) == "a"
    assert found.scales == ()
    assert found.layers == recipe.layers
    assert sorted(route.layers or () for route in found.routes if route.tensors != "*") == sorted(
        span for span in ((0, 1), (2, 3), (3, 4)) for _ in ("out", "norm")
    )


def test_folded_tensors_are_quotients() -> None:
    """A projection is divided by the product; of a norm stored without 1, what it multiplies by is."""
    source = {
        "wte.weight": torch.tensor([3.0]), "h.0.mlp.out.weight": torch.tensor([8.0, -2.0]),
        "h.0.mlp.in.weight": torch.tensor([8.0]), "h.0.ln_post.weight": torch.tensor([1.0, -0.5, 0.0]),
    }  # fmt: skip
    recipe = written(stack([Hop(source="a", layer=0, scale=2.0), Hop(source="a", layer=0, scale=2.0)]))
    found = dict(materialize(recipe, InMemory({"a": source}, 1), additions={**OUT, **NORM}))

    assert found["h.0.mlp.out.weight"].tolist() == [4.0, -1.0]
    assert found["h.1.mlp.out.weight"].tolist() == [2.0, -0.5]
    assert found["h.0.ln_post.weight"].tolist() == [0.0, -0.75, -0.5]
    assert found["h.1.ln_post.weight"].tolist() == [-0.5, -0.875, -0.75]
    assert found["h.1.mlp.in.weight"].tolist() == [8.0]
    assert found["wte.weight"].tolist() == [3.0]


def test_a_recipe_without_scales_is_folded_already() -> None:
    """It comes back with its routes, also where blends are in it; scales of 1 are left out."""
    for recipe in (plain(0, 1), plain(0, 1, routes=(Route(blend=BOTH),))):
        for scales in ((), (1.0, 1.0)):
            assert folded(replace(recipe, scales=scales), OUT) == recipe


@pytest.mark.parametrize("route", [Route(blend=BOTH, layers=(1, 2)), Route(blend=BOTH, groups=("head",))])
def test_scales_of_what_is_no_stack_are_refused(route: Route) -> None:
    """A layer or an end that is a blend leaves no one source whose additions could be divided."""
    with pytest.raises(RecipeError, match="not all of its layers are copies; make the blend a source of its own"):
        folded(plain(0, 1, scales=(1.0, 2.0), routes=(route,)), OUT)


def test_scales_are_not_written_where_nobody_knows_what_layers_add() -> None:
    """Without additions, and with those that no layer has, a scaled recipe is refused before the first tensor."""
    models = InMemory({"a": {"wte.weight": torch.ones(2), "h.0.mlp.w": torch.ones(2)}}, 1)
    recipe = written(stack([Hop(source="a", layer=0, scale=2.0)]))

    for additions in (None, {}):
        with pytest.raises(RecipeError, match="what its layers add to the stream is not known, or cannot be scaled"):
            materialize(recipe, models, additions=additions)
    with pytest.raises(RecipeError, match=r"to be folded into 'mlp\.out\.weight' of each layer, which is no tensor"):
        materialize(recipe, models, additions=OUT)


def rms(x: Tensor) -> Tensor:
    """Return a stream of which every vector has mean square 1: a norm without an epsilon."""
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def toy(seed: int, depth: int = 4, width: int = 6) -> dict[str, Tensor]:
    """Return the tensors of a residual network."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mlp.in.weight": (9, width), "mlp.out.weight": (width, 9), "ln.weight": (width,)}
    shapes["ln_post.weight"] = (width,)
    names = {f"h.{k}.{name}": shape for k in range(depth) for name, shape in shapes.items()}
    names |= {"wte.weight": (5, width), "norm.weight": (width,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def answers(model: Mapping[str, Tensor], scales: list[float], post: bool) -> Tensor:
    """Return what the network gives: h <- s h + F(norm(s h)), and a last norm; `post`: F ends in a norm by 1 + w."""
    of = {name: tensor.double() for name, tensor in model.items()}
    h = of["wte.weight"]
    for k, s in enumerate(scales):
        x = rms(s * h) * of[f"h.{k}.ln.weight"]
        F = torch.tanh(x @ of[f"h.{k}.mlp.in.weight"].T) @ of[f"h.{k}.mlp.out.weight"].T
        h = s * h + (rms(F) * (1 + of[f"h.{k}.ln_post.weight"]) if post else F)
    return rms(h) * of["norm.weight"]


@pytest.mark.parametrize(("post", "additions"), [(False, OUT), (True, NORM)], ids=["projection", "norm"])
@settings(max_examples=25, deadline=None)
@given(given=STACKS)
def test_the_folded_model_gives_what_the_scaled_one_does(
    post: bool, additions: Mapping[str, float], given: Stack
) -> None:
    """After the last norm: layers chained by hand and their inputs multiplied, against the model that is written."""
    models = {name: toy(seed) for seed, name in enumerate("abc")}
    chained = {name: tensor for name, tensor in models[given.head].items() if not name.startswith("h.")}
    for k, hop in enumerate(given.hops):
        own = f"h.{hop.layer}."
        chained |= {f"h.{k}.{n.removeprefix(own)}": t for n, t in models[hop.source].items() if n.startswith(own)}
    built = dict(materialize(written(given), InMemory(models, 4), additions=additions))
    scales = [hop.scale for hop in given.hops]

    assert built.keys() == chained.keys()
    expected = answers(chained, scales, post)
    torch.testing.assert_close(answers(built, [1.0] * len(scales), post), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(given=STACKS)
def test_copies_passed_through_are_the_same_copies(given: Stack) -> None:
    """In mergekit's words for a copy a stack is the same stack; real blends and scales are left as they are."""
    recipe = written(given)
    found = passed_through(recipe)
    mixed = plain(0, 1, routes=(Route(blend=BOTH, layers=(0, 1)),))

    assert stack_of(found) == given
    assert {route.blend.method for route in found.routes} == {"passthrough"}
    assert passed_through(mixed).routes[0] == mixed.routes[0]
    assert passed_through(mixed).routes[1].blend == Blend(method="passthrough", weights={"a": 1.0})


# --- paths


@settings(max_examples=100, deadline=None)
@given(begin=st.lists(HOPS, max_size=4), one=st.lists(HOPS, max_size=3), two=st.lists(HOPS, max_size=3))
def test_stacks_that_begin_alike_have_paths_that_do(begin: list[Hop], one: list[Hop], two: list[Hop]) -> None:
    """As many hops of two paths are alike as the lists of hops have in common from their beginning."""
    assume(begin + one)
    assume(begin + two)
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1
    first, second = (path_of(written(stack(begin + rest))) for rest in (one, two))

    assert (len(first), len(second)) == (len(begin + one), len(begin + two))
    assert alike(first, second) == alike(second, first) == len(begin) + common


def test_what_embeds_counts_in_the_first_hop() -> None:
    """The same hops after another embedding have nothing in common from the first hop on; a head does not count."""
    hops = [Hop(source="b", layer=0), Hop(source="b", layer=1)]
    first, other = path_of(written(stack(hops, "a"))), path_of(written(stack(hops, "c")))
    ends = Route(blend=copy_blend("a"), groups=("embedding",)), Route(blend=copy_blend("b"), layers=(0, 2))
    head = Recipe(sources=SOURCES, routes=(*ends, Route(blend=copy_blend("c"))), layers=(0, 1), dtype="float32")

    assert alike(first, other) == 0
    assert first[1:] == other[1:]
    assert path_of(head) == first


def test_a_scale_counts_in_its_hop() -> None:
    """Hops up to the first that is scaled otherwise are alike."""
    one = path_of(written(stack([Hop(source="a", layer=k) for k in range(3)])))
    two = path_of(written(stack([Hop(source="a", layer=k, scale=1.0 + (k == 1)) for k in range(3)])))

    assert alike(one, two) == 1


def test_a_source_that_is_a_recipe_is_known_by_its_digest() -> None:
    """Two names of one recipe are one, also as what embeds; one name of two recipes is two."""
    average, other = plain(0, 1, routes=(Route(blend=BOTH),)), plain(1, 0, routes=(Route(blend=BOTH),))

    def path(name: str, recipe: Recipe) -> tuple[tuple[str, int, float], ...]:
        sources = (SOURCES[0], Source(name=name, recipe=recipe))
        hops = [Hop(source="a", layer=0), Hop(source=name, layer=1)]
        return path_of(written(stack(hops, "a"), sources)) + path_of(written(stack(hops, name), sources))

    assert path("winner", average) == path("champion", average)
    assert alike(path("winner", average), path("winner", other)) == 1
    assert path("winner", average)[1][0] == average.digest


def test_paths_of_nothing_have_nothing_in_common() -> None:
    """No stack has no path, and an empty path begins like any other with no hop."""
    path = path_of(written(stack([Hop(source="a", layer=0)])))

    assert path_of(plain(0, routes=(Route(blend=BOTH),))) == ()
    assert alike((), path) == alike(path, ()) == alike((), ()) == 0
    assert alike(path, path) == 1


def test_a_stack_is_described_by_its_runs() -> None:
    """The example of the docstring, and that a scale begins a run even where layers follow each other."""
    assert doctest.testmod(hops_module).failed == 0
    scaled = tuple(Hop(source="a", layer=k, scale=0.5 if k == 1 else 1.0) for k in range(3))
    assert described(Stack(embedding="a", hops=scaled, head="a")) == "a 0, a 1-2 (x 0.5)"

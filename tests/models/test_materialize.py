"""From recipes to streams of tensors, from memory and from disk."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import CandidateError, InvalidInput, ModelError, RecipeError
from evomerge.models.architecture import place
from evomerge.models.materialize import Blueprint, materialize, plan, statistics_for
from evomerge.models.resident import InMemory, Kept, OnDisk, Resident, Sources
from evomerge.models.statistics import digest_of
from evomerge.operators import METHODS, merge_tensor
from evomerge.operators.parts import Statistic
from evomerge.recipe import Blend, Parameter, Recipe, Route, Source, copy_of

TEXTS, OTHERS = Source(name="texts", path="texts.txt"), Source(name="texts", path="others.txt")


def blend(method: str = "task_arithmetic", a: float = 0.5, b: float = 0.25, **parameters: Parameter) -> Blend:
    """Return a blend of sources a and b."""
    return Blend(method=method, weights={"a": a, "b": b}, parameters=parameters)


def uniform(given: Blend, depths: tuple[int, ...] = (0, 1, 2), dtype: str = "bfloat16", base: bool = True) -> Recipe:
    """Return a recipe with one blend everywhere."""
    return Recipe(
        sources=(Source(name="a", path="a"), Source(name="b", path="b")),
        base=Source(name="base", path="base") if base else None,
        routes=(Route(blend=given),), layers=depths, dtype=dtype, seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stored(family: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every model."""
    return {name: load_file(path / "model.safetensors") for name, path in family.items()}


class Fake:
    """Sources made of given tensors."""

    def __init__(self, models: Mapping[str, Mapping[str, Tensor]], depth: int) -> None:
        """Keep the tensors."""
        self.models, self.depth = models, depth
        self.names = tuple(sorted(next(iter(models.values()))))
        self.kept: Kept | None = None

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one of them."""
        return self.models[source][name]

    def shape(self, source: str, name: str) -> tuple[int, ...]:
        """Return the shape of one of them."""
        return tuple(self.models[source][name].shape)

    def dtype(self, source: str, name: str) -> torch.dtype:
        """Return the dtype of one of them."""
        return self.models[source][name].dtype


@pytest.mark.parametrize("sources", [Resident, OnDisk])
def test_a_copy_is_bit_for_bit(
    sources: type[Resident] | type[OnDisk], family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """The recipe that rebuilds one source gives its tensors, all of them, once, in its dtype."""
    found = list(materialize(copy_of(Source(name="b", path="b"), 3, "bfloat16"), sources(family)))

    assert sorted(name for name, _ in found) == sorted(stored["b"])
    assert all(torch.equal(tensor, stored["b"][name]) for name, tensor in found)
    assert {tensor.dtype for _, tensor in found} == {torch.bfloat16}


def test_every_tensor_gets_the_blend_of_its_place(
    family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """Ends, layers and module groups each have their own weights, and the arithmetic is W_0 + sum w D."""
    blends = [blend(a=0.1 * i, b=1 - 0.1 * i) for i in range(11)]
    at = {"attention": 1, "mlp": 2, "other": 3}
    routes = [Route(blend=blends[0], groups=("embedding",)), Route(blend=blends[10], groups=("head",))]
    routes += [
        Route(blend=blends[3 * k + i], groups=(group,), layers=(k, k + 1)) for k in range(3) for group, i in at.items()
    ]
    recipe = replace(uniform(blend(), dtype="float32"), routes=tuple(routes))
    for name, tensor in materialize(recipe, Resident(family)):
        where = place(name, 3)
        i = {"embedding": 0, "head": 10}[where.end] if where.end else 3 * (where.layer or 0) + at[where.group]
        base, a, b = (stored[source][name].double() for source in ("base", "a", "b"))
        expected = base + 0.1 * i * (a - base) + (1 - 0.1 * i) * (b - base)

        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(name for name, found in METHODS.items() if not found.statistics))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_and_disk_give_the_same_stream(method: str, dtype: str, family: dict[str, Path]) -> None:
    """A live model and an export get the same names, order and bits, a second time too."""
    recipe = uniform(blend(method), dtype=dtype)
    resident = Resident(family)
    first = list(materialize(recipe, resident))

    for again in (materialize(recipe, resident), materialize(recipe, OnDisk(family))):
        for (name, tensor), (other, same) in zip(first, again, strict=True):
            assert name == other
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, same)


def test_layers_may_be_repeated_left_out_and_turned(
    family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """Layer k comes from layer depths[k] and is renamed; order in the stream is ends outside, layers between."""
    depths = (2, 0, 0, 1)
    names = []
    for name, tensor in materialize(uniform(blend(), depths), Resident(family)):
        names.append(name)
        where = place(name, len(depths))
        origin = name if where.layer is None else name.replace(f".{where.layer}.", f".{depths[where.layer]}.", 1)
        merged = merge_tensor(
            blend(), stored["base"][origin], {s: stored[s][origin] for s in "ab"}, tensor=name, seed=3
        )
        assert torch.equal(tensor, merged.bfloat16())
    layers = [place(name, 4).layer for name in names]

    assert names[0] == "model.embed_tokens.weight"
    assert set(names[-2:]) == {"lm_head.weight", "model.norm.weight"}
    assert layers[1:-2] == sorted(layer for layer in layers if layer is not None)


def test_a_repeated_layer_is_thinned_in_two_ways(family: dict[str, Path]) -> None:
    """Random masks follow the tensor that is built, so that a copy of a layer is not thinned alike."""
    found = dict(materialize(uniform(blend("dare_linear"), (1, 1), dtype="float32"), Resident(family)))
    first, second = (found[f"model.layers.{k}.mlp.up_proj.weight"] for k in (0, 1))

    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_what_is_not_a_float_is_copied_from_the_first_source() -> None:
    """Integers and booleans are never averaged."""
    models = {
        name: {"h.0.attn.mask": torch.tensor([i, 7]), "wte.weight": torch.ones(2) * i}
        for i, name in enumerate(("base", "a", "b"))
    }
    found = dict(materialize(uniform(blend("linear"), (0,)), Fake(models, 1)))

    assert found["h.0.attn.mask"].tolist() == [1, 7]
    assert found["h.0.attn.mask"].dtype == torch.int64


def test_sources_are_not_written_to(family: dict[str, Path], stored: dict[str, dict[str, Tensor]]) -> None:
    """A stream that is changed by its reader leaves the resident tensors alone."""
    resident = Resident(family)
    for given in (blend(), blend("linear", a=0.0, b=1.0), blend(a=0.0, b=0.0)):
        for dtype in ("bfloat16", "float32"):
            for _, tensor in materialize(uniform(given, dtype=dtype), resident):
                tensor.fill_(7)

    assert all(torch.equal(resident.tensor(s, n), t) for s, model in stored.items() for n, t in model.items())


def test_float32_sources_are_not_written_to_either() -> None:
    """Where no cast makes a copy, the stream still is one."""
    models = {name: {"wte.weight": torch.ones(2)} for name in ("base", "a", "b")}
    for given in (blend(a=0.0, b=0.0), blend("linear", a=0.0), blend("slerp", a=0.0), blend(scale=0.0)):
        for _, tensor in materialize(uniform(given, (), dtype="float32"), Fake(models, 1)):
            tensor.fill_(7)

    assert all(tensor.eq(1).all() for model in models.values() for tensor in model.values())


@pytest.mark.parametrize(("scale", "dtype"), [(1e30, "float16"), (3e38, "float32")])
def test_values_that_are_not_finite_fail_the_candidate(family: dict[str, Path], scale: float, dtype: str) -> None:
    """Overflow in the declared dtype is a failed candidate that names the tensor, not a model of NaN."""
    recipe = uniform(blend(a=1e10, scale=scale), dtype=dtype)

    with pytest.raises(CandidateError, match=rf"tensor 'model\.embed_tokens\.weight': \d+ of 320 values .* {dtype}"):
        list(materialize(recipe, Resident(family)))


def test_what_does_not_fit_is_refused_at_the_call(family: dict[str, Path]) -> None:
    """A layer that no source has, a wrong method, no source at all: before the first tensor."""
    resident = Resident(family)
    for recipe, says in (
        (uniform(blend(), (0, 3)), "recipe layer 1 takes from layer 3, but the sources have 3 layers"),
        (uniform(blend("tiess")), r"recipe\.routes\[0\]\.blend\.method: unknown method 'tiess'"),
        (uniform(blend(), base=False), "needs a base"),
        (replace(uniform(blend()), routes=(Route(blend=blend(), layers=(0, 9)),)), r"'model\.embed_tokens\.weight' \("),
        (replace(uniform(blend()), layers=({"a": 0, "b": 3, "base": 0},)), "layer 0 takes from layer 3 of b, but"),
        (replace(uniform(blend()), layers=(-1,)), "recipe layer 0 takes from layer -1, but the sources have 3 layers"),
        (Recipe(sources=(), routes=(Route(blend=Blend(method="linear", weights={})),), dtype="float32"), "has neither"),
        (nested(inner=replace(uniform(blend()), layers=(0, 1))), "source 'inner': its recipe has another number of"),
        (uniform(blend("regmean")), r"routes\[0\]\.blend\.method: regmean takes statistics \(gram\); name a file of"),
        (nested(inner=uniform(blend("fisher"))), r"source 'inner': recipe\.routes\[0\]\.blend\.method: fisher takes"),
        (nested(inner=replace(uniform(blend()), calibration=TEXTS)), "from texts.txt, the outer one from none; give"),
        (
            replace(nested(inner=replace(uniform(blend()), calibration=TEXTS)), calibration=OTHERS),
            "source 'inner': its recipe takes statistics from texts.txt, the outer one from others.txt; give both the",
        ),
    ):
        with pytest.raises(RecipeError, match=says):
            materialize(recipe, resident)


@pytest.mark.parametrize("own", [None, TEXTS, replace(TEXTS, name="same", fingerprint="1")])
def test_statistics_of_an_inner_recipe_are_of_the_outer_texts(own: Source | None) -> None:
    """RegMean of diagonal Gram matrices is a mean weighted by them: with no texts of its own, or with the same."""
    models = {"a": {"h.0.mlp.w": torch.tensor([[1.0, 2.0]])}, "b": {"h.0.mlp.w": torch.tensor([[3.0, 6.0]])}}
    grams = {"a": torch.diag(torch.tensor([1.0, 3.0])), "b": torch.diag(torch.tensor([3.0, 1.0]))}
    regmean = replace(uniform(blend("regmean", a=1.0, b=1.0), (), "float32", base=False), calibration=own)
    outer = Recipe(
        sources=(Source(name="inner", recipe=regmean), Source(name="a", path="a")),
        routes=(Route(blend=Blend(method="linear", weights={"inner": 1.0, "a": 1.0})),),
        dtype="float32",
        calibration=TEXTS,
    )
    found = dict(materialize(outer, Fake(models, 1), statistic=lambda kind, source, tensor: grams[str(source)]))

    torch.testing.assert_close(found["h.0.mlp.w"], torch.tensor([[(2.5 + 1) / 2, (3.0 + 2) / 2]]))


def test_statistics_are_of_the_texts_that_the_recipe_was_made_with(tmp_path: Path) -> None:
    """Texts of another fingerprint are refused, before any statistic; the right ones and unknown ones are not."""
    texts = tmp_path / "texts.txt"
    texts.write_text("some text\n")

    def lookup(fingerprint: str) -> Statistic:
        given = Source(name="texts", path=str(texts), fingerprint=fingerprint)
        return statistics_for(replace(uniform(blend("regmean")), calibration=given), {}, tmp_path / "cache")

    for fingerprint in ("", digest_of(texts)):
        with pytest.raises(InvalidInput, match="statistics have no source 'a'"):  # and are asked for
            lookup(fingerprint)("gram", "a", "h.0.mlp.w")
    with pytest.raises(RecipeError, match=rf"its fingerprint is {digest_of(texts)}, not 0123$"):
        lookup("0123")


def nested(inner: Recipe, dtype: str = "float32", method: str = "ties") -> Recipe:
    """Return a recipe of source a and of what another recipe makes."""
    return Recipe(
        sources=(Source(name="a", path="a"), Source(name="inner", recipe=inner)),
        base=Source(name="base", path="base"),
        routes=(Route(blend=Blend(method=method, weights={"a": 0.75, "inner": 0.5})),),
        dtype=dtype,
        seed=11,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp"])
def test_a_nested_recipe_is_built_before_it_is_merged(
    method: str, dtype: str, family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """What comes out is bit for bit what two steps give: build the inner model in its dtype, then merge it."""
    inner = uniform(blend("dare_linear", density=0.5), dtype=dtype)
    found = dict(materialize(nested(inner, method=method), Resident(family)))
    first = dict(materialize(inner, Resident(family)))
    flat = replace(nested(inner, method=method), sources=(Source(name="a", path="a"), Source(name="inner", path="x")))
    second = dict(materialize(flat, Fake({**stored, "inner": first}, 3)))

    assert found.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in found.items())


def test_a_base_may_be_a_recipe_and_recipes_may_be_nested_twice(
    family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """Task vectors are then taken from what the base's recipe makes."""
    soup = uniform(blend("linear", a=0.5, b=0.5), dtype="float32", base=False)
    deep = Recipe(
        sources=(Source(name="soup", recipe=soup),), dtype="float32",
        routes=(Route(blend=Blend(method="linear", weights={"soup": 1.0})),),
    )  # fmt: skip
    recipe = replace(uniform(blend(a=0.5, b=0.25), dtype="float32"), base=Source(name="deep", recipe=deep))

    for name, tensor in materialize(recipe, OnDisk(family)):
        a, b = stored["a"][name].double(), stored["b"][name].double()
        middle = (a + b) / 2
        expected = middle + 0.5 * (a - middle) + 0.25 * (b - middle)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sources", [Resident, OnDisk])
def test_each_source_gives_the_layer_that_the_recipe_says(
    sources: type[Resident] | type[OnDisk], family: dict[str, Path], stored: dict[str, dict[str, Tensor]]
) -> None:
    """Layers may differ per source and base, also where one model is there twice, as source or as base."""
    layers = ({"a": 2, "b": 0, "base": 1}, 1, {"a": 0, "b": 0, "base": 2}, {"a": 1, "b": 2, "base": 1})
    recipe = replace(uniform(blend(a=0.5, b=0.25), dtype="float32"), layers=layers)
    for name, tensor in materialize(recipe, sources(family)):
        layer = place(name, 4).layer
        taken = {}
        for source in ("a", "b", "base"):
            at = layers[layer] if layer is not None else 0
            origin = name.replace(f".{layer}.", f".{at if isinstance(at, int) else at[source]}.", 1)
            taken[source] = stored[source][origin].double()
        base = taken["base"]
        expected = base + 0.5 * (taken["a"] - base) + 0.25 * (taken["b"] - base)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)

    twice = replace(
        uniform(Blend(method="linear", weights={"a": 0.5, "b": 0.5}), dtype="float32", base=False),
        layers=({"a": 0, "b": 1},),
    )
    both = {"a": family["a"], "b": family["a"]}
    found = dict(materialize(twice, sources(both)))["model.layers.0.mlp.up_proj.weight"]
    one, two = (stored["a"][f"model.layers.{k}.mlp.up_proj.weight"].float() for k in (0, 1))
    torch.testing.assert_close(found, (one + two) / 2)


def threshold(values: Tensor, density: float) -> float:
    """Return the least magnitude that a share of all values, at least one, reach; of no share infinity."""
    kept = sorted(values.abs().tolist(), reverse=True)[: max(1, int(density * values.numel())) if density else 0]
    return kept[-1] if kept else float("inf")


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("kind", ["kept", "bare"])
def test_a_threshold_of_wide_scope_is_that_of_the_flattened_model(scope: str, kind: str) -> None:
    """Over the whole model, or each layer and the ends, whichever sources have a weight where."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (7, 3)}
    shapes |= {f"h.{k}.{name}": shape for k in range(3) for name, shape in (("attn.w", (4, 5)), ("mlp.w", (6,)))}
    models = {n: {t: torch.randn(s, generator=g) for t, s in shapes.items()} for n in ("base", "a", "b")}
    weights = {None: {"a": 1.0, "b": 0.5}, 0: {"a": 1.0, "b": 0.0}, 1: {"b": 2.0, "a": 0.0}, 2: {"a": 0.5, "b": 1.0}}
    density = {"a": 0.4, "b": 0.15}
    routes = [
        Route(
            blend=Blend(method="ties", weights=weights[layer], parameters={"density": density, "trim.scope": scope}),
            layers=None if layer is None else (layer, layer + 1),
        )
        for layer in (0, 1, 2, None)
    ]
    recipe = replace(uniform(blend(), (0, 1, 2), dtype="float32"), routes=tuple(routes))
    sources: Sources = InMemory(models, 3) if kind == "kept" else Fake(models, 3)
    found = dict(materialize(recipe, sources))

    def at(name: str) -> int | None:
        return place(name, 3).layer

    def of(source: str, layer: int | None) -> float:
        names = [n for n in shapes if weights[at(n)].get(source, 0) and (scope == "model" or at(n) == layer)]
        every = torch.cat([(models[source][n] - models["base"][n]).flatten() for n in names])
        return threshold(every, density[source])

    for name in shapes:
        taking = {source: w for source, w in weights[at(name)].items() if w}
        vectors = {source: models[source][name] - models["base"][name] for source in taking}
        cut = {source: d * (d.abs() >= of(source, at(name))) for source, d in vectors.items()}
        total = sum(taking[source] * d for source, d in cut.items())
        sign = torch.where(torch.as_tensor(total) >= 0, 1.0, -1.0)
        gate = {s: (torch.sign(taking[s] * d) == sign).float() if len(taking) > 1 else torch.ones_like(d)
                for s, d in cut.items()}  # fmt: skip
        mass = sum(taking[s] * gate[s] for s in taking)
        mean = sum(taking[s] * gate[s] * d for s, d in cut.items()) / torch.where(torch.as_tensor(mass) > 0, mass, 1.0)
        torch.testing.assert_close(found[name], models["base"][name] + mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["trim", "band"])
@pytest.mark.parametrize("kind", ["kept", "bare", "nested"])
def test_wide_questions_do_not_depend_on_stages_that_do_nothing_somewhere(kind: str, first: str) -> None:
    """A stage that is neutral for the sources of one tensor leaves every threshold what it is with the stage."""
    g = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (9,), "h.0.mlp.w": (4, 5), "h.1.mlp.w": (8, 5)}
    models = {n: {t: torch.randn(s, generator=g) for t, s in shapes.items()} for n in ("base", "a", "b")}
    second = "band" if first == "trim" else "trim"
    line = f"base | {first}(1, scope=model) | {second}(1, scope=model) | sum"
    density = {"a": 1.0 if first == "trim" else 0.4, "b": 0.5}
    gamma = {"a": 0.0 if first == "band" else 0.25, "b": 0.25}
    parameters = {"trim.density": density, "gamma": gamma}
    weights = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0, "b": 0.0}, None: {"a": 0.0, "b": 1.0}}
    routes = tuple(
        Route(
            blend=Blend(method=line, weights=weights[k], parameters=parameters),
            layers=None if k is None else (k, k + 1),
        )
        for k in (0, 1, None)
    )
    recipe = replace(uniform(blend(), (0, 1), dtype="float32"), routes=routes)
    if kind == "nested":  # of which nothing is kept
        b = Source(name="b", recipe=copy_of(Source(name="z", path="z"), 2, "float32"))
        recipe = replace(recipe, sources=(recipe.sources[0], b))
    tensors = {**models, "z": models["b"]}
    sources: Sources = Fake(tensors, 2) if kind == "bare" else InMemory(tensors, 2)
    found = dict(materialize(recipe, sources))

    layer = {"wte.weight": None, "h.0.mlp.w": 0, "h.1.mlp.w": 1}
    vectors = {s: {t: models[s][t] - models["base"][t] for t in shapes if weights[layer[t]][s]} for s in ("a", "b")}
    for s, each in vectors.items():
        for stage in (first, second):
            every = torch.cat([d.flatten() for d in each.values()])
            edge = threshold(every, density[s] if stage == "trim" else gamma[s])
            kept = {t: d.abs() >= edge if stage == "trim" else d.abs() < edge for t, d in each.items()}
            each.update({t: d * kept[t] for t, d in each.items()})
    for t in shapes:
        expected = models["base"][t] + sum(each[t] for each in vectors.values() if t in each)
        torch.testing.assert_close(found[t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_wide_questions_are_answered_though_the_smallest_tensors_ask_none(scope: str) -> None:
    """A tensor of no source asks nothing, and a layer of one entry, which is kept, is told so in fewer passes."""
    shapes = {"wte.weight": (1,), "h.0.mlp.w": (1,), "h.1.attn.w": (2,), "h.1.mlp.w": (8, 5)}
    g = torch.Generator().manual_seed(3)
    models = {n: {t: torch.randn(s, generator=g) for t, s in shapes.items()} for n in ("base", "a")}
    line = f"base | trim(0.25, scope={scope}) | sum"
    routes = (
        Route(blend=Blend(method=line, weights={"a": 0.0}), groups=("embedding", "attention")),
        Route(blend=Blend(method=line, weights={"a": 1.0})),
    )
    recipe = replace(uniform(blend(), (0, 1), dtype="float32"), sources=(Source(name="a", path="a"),), routes=routes)
    found = dict(materialize(recipe, Fake(models, 2)))

    vectors = {t: models["a"][t] - models["base"][t] for t in shapes}
    groups = [["h.0.mlp.w", "h.1.mlp.w"]] if scope == "model" else [["h.0.mlp.w"], ["h.1.mlp.w"]]
    assert all(torch.equal(found[t], models["base"][t]) for t in ("wte.weight", "h.1.attn.w"))
    for names in groups:
        edge = threshold(torch.cat([vectors[t].flatten() for t in names]), 0.25)
        for t in names:
            expected = models["base"][t] + vectors[t] * (vectors[t].abs() >= edge)
            torch.testing.assert_close(found[t], expected, rtol=1e-5, atol=1e-6)


def test_questions_about_all_sources_together_reach_every_tensor() -> None:
    """LiNeS takes two norms over the model, also where some tensors are merged of two sources and some of one."""
    g = torch.Generator().manual_seed(2)
    shapes = {"wte.weight": (9,), "h.0.mlp.w": (4, 5), "h.1.mlp.w": (8, 5)}
    models = {n: {t: torch.randn(s, generator=g) for t, s in shapes.items()} for n in ("base", "a", "b")}
    weights = {None: {"a": 1.0, "b": 0.5}, 0: {"a": 1.0, "b": 0.0}, 1: {"a": 0.5, "b": 1.0}}
    routes = tuple(
        Route(blend=Blend(method="lines", weights=weights[k]), layers=None if k is None else (k, k + 1))
        for k in (0, 1, None)
    )
    found = dict(materialize(replace(uniform(blend(), (0, 1), dtype="float32"), routes=routes), Fake(models, 2)))

    layer = {"wte.weight": None, "h.0.mlp.w": 0, "h.1.mlp.w": 1}
    y, mean = {}, {}
    for t in shapes:
        vectors = {s: models[s][t] - models["base"][t] for s, w in weights[layer[t]].items() if w}
        y[t] = torch.stack([weights[layer[t]][s] * d for s, d in vectors.items()]).sum(0)
        mean[t] = torch.stack(list(vectors.values())).mean(0)
    a = sum(float(m.abs().sum()) for m in mean.values()) / sum(float(each.abs().sum()) for each in y.values())
    factor = {None: a, 0: a, 1: a + 0.5}  # alpha + beta at the last layer, alpha at the first and at the ends
    for t in shapes:
        torch.testing.assert_close(found[t], models["base"][t] + factor[layer[t]] * y[t], rtol=1e-5, atol=1e-6)


def test_a_tensor_of_a_blueprint_is_that_of_the_stream(family: dict[str, Path]) -> None:
    """One tensor on demand has the bits that it has among all, whatever was asked before."""
    recipe = uniform(blend("dare_ties"))
    stream = dict(materialize(recipe, Resident(family)))
    blueprint = Blueprint(recipe, Resident(family))

    for name in sorted(stream, reverse=True):
        assert torch.equal(blueprint.tensor(name), stream[name])


def test_tensors_of_equal_keys_are_equal(family: dict[str, Path]) -> None:
    """Whatever two recipes differ in, a tensor that has the same key in both has the same bits; and some have."""
    one = uniform(blend("dare_ties", a=0.5, b=0.25), dtype="float32")
    edited = Route(blend=blend("ties", a=0.5, b=0.25), groups=("mlp",))
    recipes = [
        one,
        replace(one, seed=4),
        replace(one, layers=(0, 1, 1)),
        replace(one, layers=(0, 1, {"a": 2, "b": 1, "base": 2})),
        replace(one, routes=(edited, *one.routes)),
        replace(one, routes=(edited, Route(blend=edited.blend, groups=("other",)), *one.routes)),
        replace(one, dtype="bfloat16"),
        replace(one, base=Source(name="base", recipe=copy_of(Source(name="b", path="b"), 3, "float32"))),
        uniform(blend("cabs"), dtype="float32"),
        replace(uniform(blend("cabs"), dtype="float32"), sources=one.sources[::-1]),
        uniform(blend("cabs", a=0.5, b=0.0), dtype="float32"),
        uniform(blend("lines"), dtype="float32"),
        replace(uniform(blend("lines"), dtype="float32"), routes=(edited, Route(blend=blend("lines")))),
    ]
    resident = Resident(family)
    built = [(Blueprint(recipe, resident).keys(), dict(materialize(recipe, resident))) for recipe in recipes]
    shared = 0
    for i, (keys, tensors) in enumerate(built):
        for others, theirs in built[i + 1 :]:
            equal = [name for name in keys if keys[name] == others[name]]
            shared += len(equal)
            assert all(torch.equal(tensors[name], theirs[name]) for name in equal)
    assert shared > 10


def test_spellings_of_one_line_share_their_questions() -> None:
    """A named method and its line of stages in three routes have one threshold, over all that they make."""
    shapes = {"wte.weight": (9,), "h.0.mlp.w": (4, 5), "h.1.mlp.w": (8, 5)}
    g = torch.Generator().manual_seed(4)
    models = {n: {t: s * torch.randn(shapes[t], generator=g) for s, t in enumerate(shapes, 1)} for n in ("base", "a")}
    line = "base | trim(0.3, scope=model) | elect | mean"
    weight = {"a": 1.0}
    routes = (
        Route(blend=Blend(method="ties", weights=weight, parameters={"density": 0.3}), groups=("embedding",)),
        Route(blend=Blend(method=line, weights=weight), layers=(0, 1)),
        Route(blend=Blend(method=line.replace("0.3", "0.9"), weights=weight, parameters={"trim.density": {"a": 0.3}})),
    )
    recipe = replace(uniform(blend(), (0, 1), dtype="float32"), sources=(Source(name="a", path="a"),), routes=routes)
    found = dict(materialize(recipe, Fake(models, 2)))

    vectors = {t: models["a"][t] - models["base"][t] for t in shapes}
    edge = threshold(torch.cat([d.flatten() for d in vectors.values()]), 0.3)
    for t, d in vectors.items():
        torch.testing.assert_close(found[t], models["base"][t] + d * (d.abs() >= edge), rtol=1e-5, atol=1e-6)


def test_a_live_tensor_of_another_shape_is_refused() -> None:
    """What could be spread over a live tensor, or has as many entries, is no less wrong than what could not."""
    models = {name: {"wte.weight": torch.ones(1, 4)} for name in ("base", "a", "b")}
    ((_, write),) = Blueprint(uniform(blend(), (), dtype="float32"), Fake(models, 1)).fill()
    for shape in ((3, 4), (4, 1), (4,), (2, 3)):
        out = torch.zeros(shape)
        with pytest.raises(ModelError, match=rf"'wte.weight' has shape \[1, 4\], the live model's has \[{shape[0]}"):
            write(out)
        assert not out.any()


def test_a_plan_goes_from_the_embedding_through_the_layers_to_the_head(family: dict[str, Path]) -> None:
    """The stream has the order of the plan: ends outside, layers in order, names sorted within each."""
    resident = Resident(family)
    recipe = uniform(blend(), (1, 0))
    steps = plan(recipe, resident.names, resident.depth)
    layers = [step.layer for step in steps if step.layer is not None]

    assert [name for name, _ in materialize(recipe, resident)] == [step.name for step in steps]
    assert layers == sorted(layers)
    assert [step.layer for step in steps] == [None, *layers, None, None]
    assert steps[1].origin == steps[1].name.replace(".0.", ".1.")
    for k in (0, 1):
        names = [step.origin for step in steps if step.layer == k]
        assert names == sorted(names)
    # Without layers every one is its own.
    assert [s.name for s in plan(replace(recipe, layers=()), resident.names, 3)] == [
        s.name for s in plan(replace(recipe, layers=(0, 1, 2)), resident.names, 3)
    ]


def test_integers_of_an_inner_recipe_are_copied_too() -> None:
    """From the first source, at its own layer, through every recipe on the way."""
    models = {
        name: {f"h.{k}.attn.mask": torch.tensor([i, k]) for k in range(2)} | {"wte.weight": torch.ones(2)}
        for i, name in enumerate(("base", "a", "b"))
    }
    inner = replace(uniform(blend("linear"), (1, 0)), sources=(Source(name="b", path="b"), Source(name="a", path="a")))
    recipe = Recipe(
        sources=(Source(name="inner", recipe=inner), Source(name="a", path="a")),
        routes=(Route(blend=Blend(method="linear", weights={"a": 1.0})),),
        layers=({"inner": 0, "a": 1},),
        dtype="float32",
    )
    found = dict(materialize(recipe, Fake(models, 2)))

    assert found["h.0.attn.mask"].tolist() == [2, 1]
    assert found.keys() == {"h.0.attn.mask", "wte.weight"}


def test_a_source_that_is_not_there_is_named(family: dict[str, Path]) -> None:
    """A recipe whose source was not opened fails with that name."""
    resident = Resident({name: family[name] for name in ("base", "a")})

    with pytest.raises(ModelError, match="source 'b' is not resident"):
        list(materialize(uniform(blend()), resident))

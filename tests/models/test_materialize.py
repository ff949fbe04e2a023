"""From recipes to streams of tensors, from memory and from disk."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import CandidateError, ModelError, RecipeError
from evomerge.models.architecture import place
from evomerge.models.materialize import materialize
from evomerge.models.resident import OnDisk, Resident
from evomerge.operators import METHODS, merge_tensor
from evomerge.recipe import Blend, Layer, Parameter, Recipe, Source, copy_of


def blend(method: str = "task_arithmetic", a: float = 0.5, b: float = 0.25, **parameters: Parameter) -> Blend:
    """Return a blend of sources a and b."""
    return Blend(method=method, weights={"a": a, "b": b}, parameters=parameters)


def uniform(given: Blend, depths: tuple[int, ...] = (0, 1, 2), dtype: str = "bfloat16", base: bool = True) -> Recipe:
    """Return a recipe with one blend everywhere."""
    layers = tuple(Layer(depth=depth, attention=given, mlp=given, other=given) for depth in depths)
    return Recipe(
        sources=(Source(name="a", path="a"), Source(name="b", path="b")),
        base=Source(name="base", path="base") if base else None,
        embedding=given, layers=layers, head=given, dtype=dtype, seed=3,
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

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one of them."""
        return self.models[source][name]


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
    recipe = Recipe(
        sources=(Source(name="a", path="a"), Source(name="b", path="b")), base=Source(name="base", path="base"),
        embedding=blends[0], head=blends[10], dtype="float32",
        layers=tuple(
            Layer(depth=k, attention=blends[3 * k + 1], mlp=blends[3 * k + 2], other=blends[3 * k + 3])
            for k in range(3)
        ),
    )  # fmt: skip
    at = {"attention": 1, "mlp": 2, "other": 3}
    for name, tensor in materialize(recipe, Resident(family)):
        where = place(name, 3)
        i = {"embedding": 0, "head": 10}[where.end] if where.end else 3 * (where.layer or 0) + at[where.group]
        base, a, b = (stored[source][name].double() for source in ("base", "a", "b"))
        expected = base + 0.1 * i * (a - base) + (1 - 0.1 * i) * (b - base)

        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
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
        (uniform(blend("tiess")), "unknown method 'tiess'"),
        (uniform(blend(), base=False), "needs a base"),
        (uniform(Blend(method="linear", weights={}, parameters={}), (), base=False), "no sources and no base|neither"),
    ):
        bare = recipe if recipe.blends().__next__().weights else Recipe(
            sources=(), base=None, embedding=recipe.embedding, layers=(), head=recipe.head, dtype="float32"
        )  # fmt: skip
        with pytest.raises(RecipeError, match=says):
            materialize(bare, resident)


def test_a_source_that_is_not_there_is_named(family: dict[str, Path]) -> None:
    """A recipe whose source was not opened fails with that name."""
    resident = Resident({name: family[name] for name in ("base", "a")})

    with pytest.raises(ModelError, match="source 'b' is not resident"):
        list(materialize(uniform(blend()), resident))

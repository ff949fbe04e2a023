"""Merging whole models and single tensors: what questions are about, what is read, and what is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.operators import METHODS, merge, merge_tensor
from evomerge.operators.parts import PIECE, Merge, Part
from evomerge.recipe import Blend

#: Methods that need nothing but sources and a base.
PLAIN = sorted(name for name, found in METHODS.items() if not found.statistics)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Return a model of two layers with an end on either side; tensors differ much in size."""
    return {
        "embed.weight": spread * randn(7, 4, seed=seed),
        "layers.0.up.weight": 3 * spread * randn(4, 4, seed=seed + 1),
        "layers.0.norm.weight": spread * randn(4, seed=seed + 2),
        "layers.1.up.weight": 0.2 * spread * randn(4, 4, seed=seed + 3),
        "norm.weight": spread * randn(4, seed=seed + 4),
    }


def family(count: int = 3, shape: tuple[int, ...] = (6, 5), spread: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a base and sources around it."""
    base = randn(*shape, seed=99)
    return base, {name: base + spread * randn(*shape, seed=i) for i, name in enumerate("abcdef"[:count])}


def merged(
    method: str, weights: Mapping[str, float], base: Tensor | None, sources: Mapping[str, Tensor], **parameters: Any
) -> Tensor:
    """Merge under one tensor name."""
    return merge_tensor(Blend(method=method, weights=weights, parameters=parameters), base, sources, tensor="w")


# --- scopes


def trimmed(D: Mapping[str, Tensor], share: float, scopes: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the greatest share of one task vector within each scope, by sorting; `scopes` says who is in which."""
    found = {}
    for name, delta in D.items():
        inside = torch.cat([D[other].abs().flatten() for other in D if scopes[other] == scopes[name]])
        threshold = inside.sort(descending=True).values[max(1, int(share * len(inside))) - 1]
        found[name] = torch.where(delta.abs() >= threshold, delta, 0.0)
    return found


@pytest.mark.parametrize("share", [0.01, 0.2, 0.55, 0.97])
def test_thresholds_are_of_the_tensor_the_layer_or_the_model(share: float) -> None:
    """The wider the scope the more tensors share a threshold; each source has its own."""
    base = model(50)
    sources = [{name: tensor + model(10 * i)[name] for name, tensor in base.items()} for i in (1, 2)]
    layers = {"embed.weight": None, "norm.weight": None, "layers.1.up.weight": 1}
    belongs: dict[str, dict[str, object]] = {
        "model": dict.fromkeys(base, 0),
        "layer": {name: layers.get(name, 0) for name in base},
        "tensor": {name: name for name in base},
    }
    for scope, scopes in belongs.items():
        found = merge(f"base | trim(scope={scope}) | sum", sources, base, parameters={"density": [share, 0.5]})
        one, two = (
            trimmed({name: source[name] - base[name] for name in base}, p, scopes)
            for source, p in zip(sources, (share, 0.5), strict=True)
        )
        for name in base:
            torch.testing.assert_close(found[name], base[name] + one[name] + two[name], msg=f"{scope} {name}")


def test_a_wide_threshold_is_of_the_tensors_that_a_source_takes_part_in() -> None:
    """A source without weight in a tensor has no entries there; and tensors without any source are the base."""
    base = model(50)
    one, two = ({name: tensor + model(10 * i)[name] for name, tensor in base.items()} for i in (1, 2))
    everywhere = dict.fromkeys(base, 1.0)
    some = {**everywhere, "embed.weight": 0.0, "norm.weight": 0.0}
    line = "base | trim(0.3, scope=model) | elect | sum"

    found = merge(line, [one, two], base, weights=[some, {**everywhere, "norm.weight": 0.0}])
    left = trimmed({name: two[name] - base[name] for name in base if name != "norm.weight"}, 0.3, dict.fromkeys(base))
    torch.testing.assert_close(found["embed.weight"], base["embed.weight"] + left["embed.weight"])
    assert torch.equal(found["norm.weight"], base["norm.weight"])


def test_the_l1_norm_of_a_model_is_restored_for_each_source() -> None:
    """A sum over the model is asked source by source, after the threshold."""
    base = {name: torch.zeros_like(tensor) for name, tensor in model(0).items()}
    sources = [model(10), model(20, 5.0)]
    line = "base | trim(0.3, scope=model, rescale=l1) | sum"
    for source, weights in zip(sources, ([1.0, 0.0], [0.0, 1.0]), strict=True):
        found = merge(line, sources, base, weights=weights)
        total = sum(float(tensor.abs().sum()) for tensor in found.values())
        assert total == pytest.approx(sum(float(tensor.abs().sum()) for tensor in source.values()), rel=1e-5)


# --- one tensor


def test_one_tensor_is_a_whole_model() -> None:
    """Merging one tensor is merging the model that has only it, for every method that takes no statistics."""
    base, sources = family(3)
    weights = {"a": 0.5, "b": 0.3, "c": 0.4}
    for method in PLAIN:
        blend = Blend(method=method, weights={str(i): w for i, w in enumerate(weights.values())}, parameters={})
        alone = merge_tensor(blend, base, {str(i): t for i, t in enumerate(sources.values())}, tensor="w")
        whole = merge(method, [{"w": t} for t in sources.values()], {"w": base}, list(weights.values()))
        assert torch.equal(alone, whole["w"]), method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_linear_is_that_source_bit_for_bit(dtype: torch.dtype) -> None:
    """A copy of a source is exact in every dtype, whatever its weight."""
    sources = {name: tensor.to(dtype) for name, tensor in family()[1].items()}
    sources["b"].view(-1)[:2] = torch.tensor([-0.0, 1e-7])
    for weight in (1.0, 0.3, 7.0):
        found = merged("linear", {"a": 0.0, "b": weight}, None, sources).to(dtype)

        assert torch.equal(found, sources["b"])
        assert torch.equal(torch.signbit(found), torch.signbit(sources["b"]))


def test_arithmetic_is_float32_whatever_the_storage() -> None:
    """From bfloat16 storage the result is that of the same numbers in float32, and scalars are not rounded."""
    base, sources = family(3)
    base, sources = base.bfloat16(), {name: tensor.bfloat16() for name, tensor in sources.items()}
    wide = {name: tensor.float() for name, tensor in sources.items()}
    for method in ("linear", "ties", "dare_ties", "della", "cabs", "emr"):
        found = merged(method, {"a": 0.333, "b": 0.101, "c": 0.77}, base, sources)

        assert found.dtype == torch.float32
        assert torch.equal(found, merged(method, {"a": 0.333, "b": 0.101, "c": 0.77}, base.float(), wide))


def test_without_any_source_the_base_is_left() -> None:
    """All weights zero give a copy of the base, or one failed candidate where there is none."""
    base, sources = family(2)
    for method in ("linear", "ties"):
        found = merged(method, {"a": 0.0, "b": 0.0}, base, sources)
        assert torch.equal(found, base)
        assert found.data_ptr() != base.data_ptr()
    with pytest.raises(CandidateError, match="tensor 'w': no source has a weight that counts, and there is no base"):
        merged("linear", {}, None, sources)


def test_sources_without_weight_take_no_part() -> None:
    """A source that is absent from the weights, or has weight zero, may even be broken."""
    base, sources = family(3)
    broken = {**sources, "c": torch.full((6, 5), torch.nan)}
    weights = {"a": 0.5, "b": 0.3}
    for method in PLAIN:
        expected = merged(method, weights, base, sources)
        assert torch.equal(merged(method, weights, base, broken), expected)
        assert torch.equal(merged(method, {**weights, "c": 0.0}, base, broken), expected)


def test_cancelling_weights_are_reported() -> None:
    """An average with weights that add up to nothing is a failed candidate with its reason."""
    base, sources = family(2)
    with pytest.raises(CandidateError, match=r"weights cancel and have no average \(a 0\.5, b -0\.5\)"):
        merged("linear", {"a": 0.5, "b": -0.5}, None, sources)
    with pytest.raises(CandidateError, match="weights cancel"):
        merged("dare_linear", {"a": 0.5, "b": -0.5}, base, sources, normalize=1.0)

    assert torch.isfinite(merged("linear", {"a": 0.5, "b": -0.5}, None, sources, normalize=0.0)).all()
    assert torch.isfinite(merged("ties", {"a": 0.5, "b": -0.5}, base, sources)).all()


def test_what_does_not_fit_is_refused() -> None:
    """An unknown source, method or stage and a missing base are named."""
    _, sources = family(2)
    with pytest.raises(RecipeError, match="tensor 'w': the blend weighs 'z'"):
        merged("linear", {"z": 1.0}, None, sources)
    with pytest.raises(RecipeError, match="tensor 'w': ties works on task vectors and needs a base"):
        merged("ties", {"a": 1.0}, None, sources)
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        merged("tiess", {"a": 1.0}, None, sources)
    with pytest.raises(RecipeError, match="unknown stage 'shave'"):
        merged("zero | shave | mean", {"a": 1.0}, None, sources)


# --- whole models


def test_a_model_is_merged_name_by_name() -> None:
    """The first source's dtype is kept, and what is not a number is copied from it."""
    models = [{"w": randn(3, 2, seed=i).bfloat16(), "mask": torch.tensor([True, i == 0])} for i in range(2)]
    base = {"w": randn(3, 2, seed=9).bfloat16(), "mask": torch.tensor([False, False])}

    found = merge("dare_ties", models, base, weights=[0.5, 0.7], parameters={"density": [0.5, 1.0]}, seed=4)

    blend = Blend(method="dare_ties", weights={"0": 0.5, "1": 0.7}, parameters={"density": {"0": 0.5, "1": 1.0}})
    expected = merge_tensor(blend, base["w"], {"0": models[0]["w"], "1": models[1]["w"]}, tensor="w", seed=4)
    assert torch.equal(found["w"], expected.bfloat16())
    assert found["w"].dtype == torch.bfloat16
    assert found["mask"].tolist() == [True, True]
    assert found["mask"] is not models[0]["mask"]


def test_weights_may_differ_by_tensor() -> None:
    """A mapping from tensor name to weight in place of one number."""
    models = [model(1), model(2)]
    weights = {name: float(i) for i, name in enumerate(models[0])}
    found = merge("base | sum", models, model(3), weights=[weights, 0.5])
    for name, weight in weights.items():
        base = model(3)[name]
        torch.testing.assert_close(
            found[name], base + weight * (models[0][name] - base) + 0.5 * (models[1][name] - base)
        )


def test_the_order_of_tensors_changes_nothing() -> None:
    """Masks and wide thresholds do not depend on the order in which tensors come."""
    models, base = [model(1), model(2)], model(3)
    for method in ("dare_ties", "ties", "della", "consensus_ties"):
        found = merge(method, models, base, seed=5)
        turned = merge(method, [dict(reversed(one.items())) for one in models], base, seed=5)
        assert all(torch.equal(found[name], turned[name]) for name in base)


def test_the_seed_moves_random_masks_only() -> None:
    """The same seed gives the same bits, another seed other masks; what draws nothing does not care."""
    models, base = [model(1), model(2)], model(3)
    for method, draws in (("dare_linear", True), ("della", True), ("ties", False)):
        found = [merge(method, models, base, seed=seed)["embed.weight"] for seed in (0, 0, 1)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2]) != draws


def test_statistics_are_looked_up_by_kind_source_and_tensor() -> None:
    """Given masks say what is kept of each source and tensor; a tensor without one draws its own."""
    base = {"v": torch.zeros(3), "w": torch.zeros(3)}
    models = [{"v": torch.ones(3), "w": torch.ones(3)}, {"v": torch.full((3,), 10.0), "w": torch.full((3,), 10.0)}]
    kept = [{"w": torch.tensor([True, False, True])}, {"w": torch.tensor([False, False, True])}]

    found = merge("dare_linear", models, base, parameters={"rescale": "none"}, statistics={"mask": kept})
    drawn = merge("dare_linear", models, base, parameters={"rescale": "none"})
    assert found["w"].tolist() == [1.0, 0.0, 11.0]
    assert torch.equal(found["v"], drawn["v"])

    with pytest.raises(RecipeError, match="source '1' has no statistic 'mask', others have"):
        merge("dare_linear", models, base, statistics={"mask": [kept[0], {}]})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sources": []}, "0 sources"),
        ({"weights": [1.0]}, "2 sources and 1 weights"),
        ({"weights": [1.0, {"v": 1.0}]}, "the weights of source 1 have none for tensor 'w'"),
        ({"parameters": {"normalize": [1.0]}}, "parameter 'normalize' has 1 values for 2 sources"),
        ({"parameters": {"normalize": [1.0, 1.0]}}, "one value for all sources"),
        ({"parameters": {"normalise": 1.0}}, "did you mean 'normalize'"),
        ({"parameters": {"normalize": 3.0}}, r"must be finite and lie in \[0, 1\], got 3"),
        ({"method": "ties"}, "needs a base"),
        ({"method": "fisher"}, "fisher needs the statistic 'fisher'"),
        ({"method": "fisher", "statistics": {"fisher": [{}]}}, "statistic 'fisher' has 1 entries for 2 sources"),
        ({"sources": [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}]}, "tensor 'v' is not in all of source 0 and 1"),
        ({"sources": [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}]}, r"shapes \(2,\) and \(3,\)"),
        ({"base": {"w": torch.zeros(4)}}, "in source 0 and base"),
    ],
)
def test_merge_refuses_what_does_not_fit(arguments: dict[str, Any], says: str) -> None:
    """Counts, names, ranges and shapes are checked at the door."""
    whole = {"method": "linear", "sources": [{"w": torch.zeros(2)}, {"w": torch.ones(2)}], **arguments}
    with pytest.raises(RecipeError, match=says):
        merge(**whole)


# --- parts


def test_a_bias_goes_with_its_weight_where_the_method_says_so() -> None:
    """For a basis of whole layers weight and bias are one matrix, split again at the end; else they stand alone."""
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.bias": (5,), "c.weight": (3,), "c.bias": (3,)}
    models = [{name: randn(*shape, seed=i) for name, shape in shapes.items()} for i in range(2)]
    reads: list[str] = []

    def read(part: Part, source: str | None) -> Tensor:
        reads.append(part.tensor)
        return models[int(source or 0)][part.tensor]

    def parts(method: str, weight: float = 1.0) -> list[Part]:
        blend = Blend(method=method, weights={"0": weight, "1": 1.0}, parameters={})
        return [Part(tensor=name, blend=blend, shape=tuple(models[0][name].shape)) for name in shapes]

    whole = Merge(parts("base | knots | mean"), read, ["0", "1"], has_base=True)
    assert [(part.tensor, part.bias.tensor if part.bias else None) for part in whole.parts] == [
        ("a.weight", "a.bias"), ("b.bias", None), ("c.weight", None), ("c.bias", None)
    ]  # fmt: skip
    built = dict(pair for part in whole.parts for pair in whole.build(part))
    assert {name: tuple(tensor.shape) for name, tensor in built.items()} == shapes
    torch.testing.assert_close(built["a.bias"], (models[0]["a.bias"] + models[1]["a.bias"]) / 2)
    assert all(part.bias is None for part in Merge(parts("linear"), read, ["0", "1"], has_base=False).parts)


def test_nothing_is_read_before_it_is_needed() -> None:
    """A method without wide questions reads each source once for each tensor that is built."""
    reads: list[tuple[str, str | None]] = []

    def read(part: Part, source: str | None) -> Tensor:
        reads.append((part.tensor, source))
        return torch.ones(4)

    blend = Blend(method="linear", weights={"a": 1.0, "b": 0.0}, parameters={})
    whole = Merge([Part(tensor="w", blend=blend, shape=(4,))], read, ["a", "b"], has_base=True)
    next(whole.build(whole.parts[0]))

    assert reads == [("w", "a")]


def test_nothing_is_read_for_its_shape() -> None:
    """A tensor that is merged piece by piece is read once for it, and a bias is joined to its weight without a look."""
    shapes = {"w": (2, PIECE), "a.weight": (4, 3), "a.bias": (4,)}
    reads: list[tuple[str, str | None]] = []

    def read(part: Part, source: str | None) -> Tensor:
        reads.append((part.tensor, source))
        return torch.ones(shapes[part.tensor])

    def parts(method: str, *names: str) -> list[Part]:
        blend = Blend(method=method, weights={"a": 1.0, "b": 2.0}, parameters={})
        return [Part(tensor=name, blend=blend, shape=shapes[name]) for name in names]

    pieces = Merge(parts("linear", "w"), read, ["a", "b"], has_base=False)
    reads.clear()  # those of the questions
    ((_, built),) = pieces.build(pieces.parts[0])
    assert built.shape == shapes["w"]
    assert reads == [("w", "a"), ("w", "b")]

    reads.clear()
    joined = Merge(parts("base | knots | mean", "a.weight", "a.bias"), read, ["a", "b"], has_base=True)
    assert [part.tensors for part in joined.parts] == [("a.weight", "a.bias")]
    assert {len(list(joined.build(part))) for part in joined.parts} == {2}
    assert sorted(reads, key=str) == [(t, s) for t in ("a.bias", "a.weight") for s in ("a", "b", None)]

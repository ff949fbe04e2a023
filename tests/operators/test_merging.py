"""Merging one name's tensors: against other projects' numbers, and the laws that every method obeys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.operators import METHODS, masks, merge, merge_tensor, merging, methods
from evomerge.recipe import Blend, Parameter

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "operator_oracles.json").read_text())["cases"]
ON_TASK_VECTORS = [name for name, found in METHODS.items() if found.needs_base]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Return the recorded tensors of the cases."""
    return load_file(DATA / "operator_oracles.safetensors")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blend(method: str, weights: Mapping[str, float], **parameters: Parameter) -> Blend:
    """Return a blend."""
    return Blend(method=method, weights=weights, parameters=parameters)


def merged(method: str, weights: Mapping[str, float], base: Tensor | None, sources: Mapping[str, Tensor],
           seed: int = 0, **parameters: Parameter) -> Tensor:  # fmt: skip
    """Merge under one tensor name."""
    return merge_tensor(blend(method, weights, **parameters), base, sources, tensor="w", seed=seed)


def family(count: int = 3, shape: tuple[int, ...] = (6, 5), spread: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a base and sources around it."""
    base = randn(*shape, seed=99)
    return base, {name: base + spread * randn(*shape, seed=i) for i, name in enumerate("abcdef"[:count])}


# --- against other projects


def ours(case: Mapping[str, Any]) -> Blend:
    """Translate a recorded case's parameters to a blend over sources named by their order."""
    given = case["parameters"]
    names = [f"s{i}" for i in range(len(case["sources"]))]
    if case["method"] == "slerp":
        return blend("slerp", dict(zip(names, (1 - given["t"], given["t"]), strict=True)))
    weights = given.get("weights") or [1.0] * len(names)
    known = METHODS[case["method"]].parameters
    parameters: dict[str, Parameter] = {}
    if "scale" in known:
        parameters["scale"] = given["lam"]
    if "density" in known:
        each = given["density"] if isinstance(given["density"], list) else [given["density"]] * len(names)
        parameters["density"] = dict(zip(names, each, strict=True))
        parameters["rescale"] = given.get("rescale", "none")
    if "normalize" in known:
        parameters["normalize"] = float(given.get("normalize", given.get("aggregate") == "mean"))
    elif given.get("normalize"):
        parameters["scale"] = given["lam"] / sum(weights)
    return blend(case["method"], dict(zip(names, weights, strict=True)), **parameters)


def tensors(reference: str | None, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a reference's tensors by name; one tensor has the name ""."""
    if reference is None:
        return {}
    if not reference.endswith("/"):
        return {"": recorded[reference]}
    return {key.removeprefix(reference): tensor for key, tensor in recorded.items() if key.startswith(reference)}


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_gives_the_numbers_of_other_projects(
    case: dict[str, Any], recorded: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded inputs give the recorded output within the case's tolerance; recorded masks replace ours."""
    if case["id"] == "slerp_zero_tensor":
        pytest.skip("the recorded sin(45 degrees) of a zero source is what we avoid: test_zero_task_vector")
    base = tensors(case["base"], recorded)
    sources = [tensors(reference, recorded) for reference in case["sources"]]
    kept = [tensors(reference, recorded) for reference in case["masks"]]
    monkeypatch.setattr(masks, "key", lambda seed, source, tensor: (int(source[1:]), tensor))
    monkeypatch.setattr(masks, "bernoulli", lambda key, shape, keep, device: kept[key[0]][key[1]].view(shape))
    for name, expected in tensors(case["output"], recorded).items():
        found = merge_tensor(
            ours(case), base.get(name), {f"s{i}": source[name] for i, source in enumerate(sources)},
            tensor=name, seed=0,
        )  # fmt: skip

        error = (found - expected.float()).abs() - case["rtol"] * expected.float().abs()
        assert float(error.max()) <= case["atol"], name


def test_every_method_has_recorded_cases() -> None:
    """No method is without numbers from elsewhere."""
    assert {case["method"] for case in CASES} == set(METHODS)


# --- laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_linear_is_that_source_bit_for_bit(dtype: torch.dtype) -> None:
    """A copy of a source is exact in every dtype, whatever its weight."""
    sources = {name: tensor.to(dtype) for name, tensor in family()[1].items()}
    sources["b"].view(-1)[:2] = torch.tensor([-0.0, 1e-7])
    for weight in (1.0, 0.3, 7.0):
        found = merged("linear", {"a": 0.0, "b": weight}, None, sources).to(dtype)

        assert torch.equal(found, sources["b"])
        assert torch.equal(torch.signbit(found), torch.signbit(sources["b"]))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_sources_equal_to_the_base_give_the_base(method: str) -> None:
    """Where nothing differs, nothing changes."""
    base, _ = family()
    found = merged(method, {"a": 0.4, "b": 0.6}, base, {"a": base, "b": base.clone()})

    torch.testing.assert_close(found, base)


@pytest.mark.parametrize("method", [name for name in sorted(METHODS) if "scale" in METHODS[name].parameters])
def test_scale_zero_is_the_base(method: str) -> None:
    """At scale 0 the base comes back exactly."""
    base, sources = family()

    assert torch.equal(merged(method, dict.fromkeys(sources, 0.5), base, sources, scale=0.0), base)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_permuting_sources_with_their_parameters_changes_no_bit(method: str) -> None:
    """The order in which sources, weights and densities are given does not matter."""
    base, sources = family(4)
    weights = {"a": 0.3, "b": 0.7, "c": -0.2, "d": 0.45}
    per = {"a": 0.2, "b": 0.5, "c": 0.8, "d": 1.0}
    parameters: dict[str, Parameter] = {"density": per} if "density" in METHODS[method].parameters else {}
    turned: dict[str, Parameter] = {"density": dict(reversed(per.items()))} if parameters else {}

    found = merged(method, weights, base, sources, **parameters)
    other = merged(
        method, dict(reversed(weights.items())), base, dict(reversed(sources.items())), **turned
    )  # fmt: skip

    assert torch.equal(found, other)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_sources_without_weight_take_no_part(method: str) -> None:
    """A source that is absent from the weights, or has weight zero, may even be broken."""
    base, sources = family(3)
    broken = {**sources, "c": torch.full((6, 5), torch.nan)}
    weights = {"a": 0.5, "b": 0.3}

    expected = merged(method, weights, base, sources)

    assert torch.equal(merged(method, weights, base, broken), expected)
    assert torch.equal(merged(method, {**weights, "c": 0.0}, base, broken), expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_any_source_the_base_is_left(method: str) -> None:
    """All weights zero give the base, or one failed candidate where there is none."""
    base, sources = family(2)

    assert torch.equal(merged(method, {"a": 0.0, "b": 0.0}, base, sources), base)
    with pytest.raises(CandidateError, match="there is no base"):
        merged(method, {}, None, sources)


def test_ties_of_one_source_at_density_one_is_task_arithmetic() -> None:
    """One source has nobody to disagree with."""
    base, sources = family(1)
    torch.testing.assert_close(
        merged("ties", {"a": 0.7}, base, sources, density=1.0, normalize=0.0),
        merged("task_arithmetic", {"a": 0.7}, base, sources),
    )


def test_task_arithmetic_of_all_at_one_over_n_is_the_average() -> None:
    """W_0 + 1/N sum D_i is the plain mean of the sources."""
    base, sources = family(4)
    torch.testing.assert_close(
        merged("task_arithmetic", dict.fromkeys(sources, 1.0), base, sources, scale=0.25),
        merged("linear", dict.fromkeys(sources, 1.0), None, sources),
    )


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3),
    density=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_ties_entries_have_the_elected_sign_and_lie_among_the_agreeing(
    weights: list[float], density: float, seed: int
) -> None:
    """Every merged entry lies between the trimmed entries that agree with the weighted vote, in plain Python."""
    base = torch.zeros(20)
    sources = {name: randn(20, seed=seed + i) for i, name in enumerate("abc")}
    found = merged("ties", dict(zip("abc", weights, strict=True)), base, sources, density=density).tolist()
    count = 20 if density == 1 else max(1, int(density * 20))
    kept = []
    for tensor in sources.values():
        threshold = sorted((abs(x) for x in tensor.tolist()), reverse=True)[count - 1]
        kept.append([x if abs(x) >= threshold else 0.0 for x in tensor.tolist()])
    for j in range(20):
        vote = sum(w * row[j] for w, row in zip(weights, kept, strict=True))
        agreeing = [row[j] for row in kept if row[j] != 0 and (row[j] > 0) == (vote >= 0)]
        if not agreeing:
            assert found[j] == 0
        else:
            assert min(agreeing) - 1e-5 <= found[j] <= max(agreeing) + 1e-5


def test_dare_at_density_one_is_the_plain_sum() -> None:
    """Nothing dropped, nothing rescaled."""
    base, sources = family(3)
    weights = {"a": 0.5, "b": 0.8, "c": -0.1}
    expected = merged("task_arithmetic", weights, base, sources)
    for rescale in ("1/p", "l1", "none"):
        found = merged("dare_linear", weights, base, sources, density=1.0, rescale=rescale)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (3, 0), (7, 3)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_any_density_is_valid_on_any_tensor(method: str, shape: tuple[int, ...], density: float) -> None:
    """Density 0 and 1, and tensors smaller than 1/density, give finite numbers; density 0 the base."""
    base, sources = family(2, shape)
    for rescale in METHODS[method].parameters["rescale"].options:
        found = merged(method, {"a": 1.0, "b": 0.5}, base, sources, density=density, rescale=rescale)

        assert found.shape == shape
        assert torch.isfinite(found).all()
        if density == 0:
            assert torch.equal(found, base)


def test_zero_task_vector_in_slerp() -> None:
    """Both task vectors zero give the base, one zero gives its share of the other."""
    base, sources = family(2)
    half = base + (sources["b"] - base) / 2

    assert torch.equal(merged("slerp", {"a": 0.5, "b": 0.5}, base, {"a": base, "b": base}), base)
    torch.testing.assert_close(merged("slerp", {"a": 0.5, "b": 0.5}, base, {"a": base, "b": sources["b"]}), half)


def test_slerp_is_of_the_two_heaviest_and_their_shares() -> None:
    """A third lighter source takes no part; one alone comes back; t is the share of the second."""
    base, sources = family(3)
    two = merged("slerp", {"a": 0.6, "b": 0.2}, base, sources)

    assert torch.equal(merged("slerp", {"a": 0.6, "b": 0.2, "c": 0.1}, base, sources), two)
    assert torch.equal(merged("slerp", {"a": 3.0, "b": 1.0}, base, sources), two)
    torch.testing.assert_close(merged("slerp", {"a": 0.6, "b": -0.2}, base, sources), sources["a"])


def test_slerp_on_task_vectors_differs_from_the_plain_mean() -> None:
    """With a base the angle is between task vectors, so the result keeps their length."""
    base, sources = family(2, (40, 40), spread=1e-3)
    length = [float((sources[name] - base).norm()) for name in "ab"]

    on_vectors = merged("slerp", {"a": 0.5, "b": 0.5}, base, sources) - base

    assert float(on_vectors.norm()) == pytest.approx(sum(length) / 2, rel=0.02)
    average = merged("linear", {"a": 0.5, "b": 0.5}, None, sources) - base
    assert float(average.norm()) < 0.8 * sum(length) / 2


def test_cancelling_weights_are_reported() -> None:
    """An average with weights that add up to nothing is a failed candidate with its reason."""
    base, sources = family(2)
    with pytest.raises(CandidateError, match=r"weights cancel and have no average \(a 0\.5, b -0\.5\)"):
        merged("linear", {"a": 0.5, "b": -0.5}, None, sources)
    with pytest.raises(CandidateError, match="weights cancel"):
        merged("dare_linear", {"a": 0.5, "b": -0.5}, base, sources, normalize=1.0)

    assert torch.isfinite(merged("linear", {"a": 0.5, "b": -0.5}, None, sources, normalize=0.0)).all()
    assert torch.isfinite(merged("ties", {"a": 0.5, "b": -0.5}, base, sources)).all()


def test_arithmetic_is_float32_whatever_the_storage() -> None:
    """From bfloat16 storage the result is that of the same numbers in float32, and scalars are not rounded."""
    base, sources = family(3)
    base, sources = base.bfloat16(), {name: tensor.bfloat16() for name, tensor in sources.items()}
    weights = {"a": 0.333, "b": 0.101, "c": 0.77}
    for method in METHODS:
        found = merged(method, weights, base, sources)

        assert found.dtype == torch.float32
        wide = {name: tensor.float() for name, tensor in sources.items()}
        assert torch.equal(found, merged(method, weights, base.float(), wide))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_divides_by_the_kept_share_unless_told_otherwise(method: str) -> None:
    """The published rescale is the default: survivors of a task vector of ones are 1/p, at density 0.5 by default."""
    found = merged(method, {"a": 1.0}, torch.zeros(100), {"a": torch.ones(100)})

    assert set(found.tolist()) == {0.0, 2.0}
    quarter = merged(method, {"a": 1.0}, torch.zeros(100), {"a": torch.ones(100)}, density=0.25)
    assert set(quarter.tolist()) == {0.0, 4.0}


def test_masks_depend_on_seed_source_and_tensor_only() -> None:
    """The same source thins the same entries whoever else takes part; another seed or name thins others."""
    base = torch.zeros(200)
    sources = {name: torch.full((200,), 2.0**i) for i, name in enumerate("ab")}

    def kept(weights: Mapping[str, float], tensor: str = "w", seed: int = 0) -> list[bool]:
        chosen = blend("dare_linear", weights, rescale="none")
        bits = merge_tensor(chosen, base, sources, tensor=tensor, seed=seed).int()
        return [bool(x & 1) for x in bits.tolist()]

    alone = kept({"a": 1.0})
    assert kept({"b": 1.0, "a": 1.0}) == alone
    assert kept({"a": 1.0}, seed=1) != alone
    assert kept({"a": 1.0}, tensor="v") != alone


def test_what_does_not_fit_is_refused() -> None:
    """An unknown source, a missing base and a parameter of the wrong form are named."""
    base, sources = family(2)
    with pytest.raises(RecipeError, match="the blend weighs 'z'"):
        merged("linear", {"z": 1.0}, base, sources)
    with pytest.raises(RecipeError, match="needs a base"):
        merged("ties", {"a": 1.0}, None, sources)
    with pytest.raises(RecipeError, match="by takes one value"):
        merged("ties", {"a": 1.0}, base, sources, scale={"a": 1.0})


def test_a_method_with_an_unknown_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter names a stage that it does not know, and a line that never combines."""
    base, sources = family(2)
    origin, combined = METHODS["task_arithmetic"].stages[0], METHODS["task_arithmetic"].stages[1]
    odd = methods.Stage(kind="edit", name="shave", parameters={})
    for stages, says in (((origin, odd, combined), "no stage edit 'shave'"), ((origin, methods._TRIM), "no combine")):
        line = methods.Method(
            name="odd", stages=stages, parameters=METHODS["ties"].parameters, needs_base=True, summary=""
        )
        monkeypatch.setattr(merging, "method", lambda name, line=line: line)
        with pytest.raises(RecipeError, match=says):
            merged("odd", {"a": 1.0, "b": 1.0}, base, sources)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_needs_base_tells_what_is_read(method: str) -> None:
    """The base's tensor is asked for exactly where it changes the result."""
    base, sources = family(2)
    weights = {"a": 0.5, "b": 0.3}
    same = torch.equal(merged(method, weights, base, sources), merged(method, weights, base + 1, sources))

    assert merging.needs_base(blend(method, weights)) != same
    assert merging.needs_base(blend(method, {"a": 0.0}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_gpu_gives_the_same(method: str) -> None:
    """The device changes nothing beyond the last bit."""
    base, sources = family(3, (40, 33))
    weights = {"a": 0.5, "b": 0.3, "c": 0.4}
    found = merged(method, weights, base.cuda(), {name: tensor.cuda() for name, tensor in sources.items()})

    torch.testing.assert_close(found.cpu(), merged(method, weights, base, sources), rtol=1e-6, atol=1e-7)


# --- whole models


def test_merge_of_whole_models() -> None:
    """The public entry merges name by name, keeps the first source's dtype and copies what is not a number."""
    models = [{"w": randn(3, 2, seed=i).bfloat16(), "mask": torch.tensor([True, i == 0])} for i in range(2)]
    base = {"w": randn(3, 2, seed=9).bfloat16(), "mask": torch.tensor([False, False])}

    found = merge("ties", models, base, weights=[0.5, 0.7], parameters={"density": [0.5, 1.0]}, seed=4)

    expected = merge_tensor(
        blend("ties", {"0": 0.5, "1": 0.7}, density={"0": 0.5, "1": 1.0}),
        base["w"], {"0": models[0]["w"], "1": models[1]["w"]}, tensor="w", seed=4,
    )  # fmt: skip
    assert torch.equal(found["w"], expected.bfloat16())
    assert found["w"].dtype == torch.bfloat16
    assert found["mask"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sources": []}, "0 sources"),
        ({"weights": [1.0]}, "2 sources and 1 weights"),
        ({"parameters": {"normalize": [1.0]}}, "parameter 'normalize' has 1 values for 2 sources"),
        ({"parameters": {"normalize": [1.0, 1.0]}}, "one value for all sources"),
        ({"method": "ties"}, "needs a base"),
        ({"sources": [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}]}, "tensor 'v' is not in all of source 0 and 1"),
        ({"sources": [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}]}, r"shapes \(2,\) and \(3,\)"),
        ({"base": {"w": torch.zeros(4)}}, "in source 0 and base"),
    ],
)
def test_merge_refuses_what_does_not_fit(arguments: dict[str, Any], says: str) -> None:
    """Counts, names and shapes are checked at the door."""
    whole = {"method": "linear", "sources": [{"w": torch.zeros(2)}, {"w": torch.ones(2)}], **arguments}
    with pytest.raises(RecipeError, match=says):
        merge(**whole)

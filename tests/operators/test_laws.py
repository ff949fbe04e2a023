"""Laws that every named method obeys, on small models of every shape; what obeys no law is listed with its reason."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods import Given, Method, Step, canonical, method
from evomerge.operators import merge
from evomerge.operators.facts import answer
from evomerge.operators.line import run
from evomerge.operators.masks import keys
from evomerge.operators.parts import Merge, Part
from evomerge.operators.state import Ask, Site, State
from evomerge.recipe import Blend
from evomerge.stages import METHODS

Model = dict[str, Tensor]

#: Names and shapes of the tensors: matrices, a vector, 3-D and 4-D, one column, one row, one entry.
SHAPES = {
    "model.embed_tokens.weight": (5, 4),
    "model.layers.0.a.weight": (4, 6),
    "model.layers.0.a.bias": (4,),
    "model.layers.0.norm.weight": (6,),
    "model.layers.0.stacked.weight": (3, 2, 2),
    "model.layers.1.conv.weight": (2, 2, 1, 3),
    "model.layers.1.column.weight": (6, 1),
    "model.layers.1.row.weight": (1, 6),
    "model.layers.1.entry.weight": (1,),
    "lm_head.weight": (5, 4),
}

#: Parameters that make a method quick, and no other: steps of descent.
QUICK = {"wudi_adam": {"iterations": 3}}

ALL = tuple(METHODS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A base, sources and weights by name, and a statistic for every kind, source and tensor."""

    seed: int
    base: Model
    sources: Mapping[str, Model]
    weights: Mapping[str, float]

    def statistic(self, kind: str, source: str | None, tensor: str) -> Tensor | None:
        """Return a statistic that is a function of its arguments and the seed, so that order does not matter."""
        shape = SHAPES[tensor]
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, f"{kind} {source} {tensor}")))
        if kind in ("mask", "keep_prob"):
            return None
        if kind in ("loss", "sensitivity"):
            return torch.rand((), generator=generator)
        if kind == "fisher":
            return torch.rand(shape, generator=generator)
        channels = shape[1] if len(shape) > 1 else shape[0]
        if kind in ("activation", "square"):
            return torch.rand(channels, generator=generator)
        if len(shape) != 2:
            return None
        size = shape[1] if kind == "gram" else shape[0]
        x = torch.randn(3 * size, size, generator=generator)
        return x.T @ x / len(x)

    def statistics(self, found: Method) -> dict[str, Any]:
        """Return what `merge` takes: the statistics of a method, of the base where only the base has them."""

        def of(kind: str, source: str | None) -> Model:
            each = {tensor: self.statistic(kind, source, tensor) for tensor in SHAPES}
            return {tensor: value for tensor, value in each.items() if value is not None}

        return {
            kind: of(kind, None) if kind == "activation" else [of(kind, source) for source in self.sources]
            for kind in found.statistics
            if kind not in ("mask", "keep_prob")
        }


def world(seed: int, count: int = 3, size: float = 0.1) -> World:
    """Return `count` sources near a base; the names are not in the order of the alphabet."""
    generator = torch.Generator().manual_seed(seed)

    def model() -> Model:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = model()
    sources = {name: {t: base[t] + size * d for t, d in model().items()} for name in ("s2", "s0", "s3", "s1")[:count]}
    return World(seed=seed, base=base, sources=sources, weights=dict(zip(sources, (0.9, 0.4, 0.7, 0.6), strict=False)))


SIZES = st.sampled_from([1e-3, 0.1, 1.0])
worlds = st.builds(world, st.integers(0, 10**6), st.integers(1, 4), SIZES)
groups = st.builds(world, st.integers(0, 10**6), st.integers(2, 4), SIZES)


def law(examples: int) -> Any:
    """Set how many worlds a law is tried on, for each method."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # worlds are as small as they get, so that there is nothing to shrink
    )  # fmt: skip


def build(
    name: str,
    w: World,
    parameters: Mapping[str, Given] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
    tensors: Sequence[str] | None = None,
    base: bool = True,
) -> Model:
    """Merge a world (or some sources and tensors of it, in some order) in float32."""
    weights, names = w.weights if weights is None else weights, list(w.sources) if names is None else names
    known = method(name).parameters
    given = {key: value for key, value in {**QUICK.get(name, {}), **(parameters or {})}.items() if key in known}
    blend = Blend(method=name, weights=weights, parameters=given)
    parts = [
        Part(
            tensor=tensor, blend=blend, layer=int(tensor.split(".")[2]) if ".layers." in tensor else None,
            shape=tuple(w.base[tensor].shape),
        )
        for tensor in tensors or SHAPES
    ]  # fmt: skip

    def read(part: Part, source: str | None) -> Tensor:
        return (w.base if source is None else w.sources[source])[part.tensor]

    found = Merge(parts, read, names, has_base=base, depth=2, seed=w.seed, statistic=w.statistic)
    return {tensor: value for part in found.parts for tensor, value in found.build(part)}


def neutral(name: str) -> dict[str, Given]:
    """Return the parameters of a method with which its edits, gates and shapes do nothing, as far as there are any."""
    found = {}
    for address, (step, own) in method(name)._addresses().items():
        if own in (step.stage.neutral or {}):
            found[address] = (step.stage.neutral or {})[own]
    return {**found, "density": 1.0, "normalize": 1.0}


def assert_near(found: Model, expected: Model, share: float = 2e-5) -> None:
    """Assert equality up to float32 rounding of the greatest entry."""
    for name, value in expected.items():
        error, size = float((found[name] - value).abs().max()), max(1.0, float(value.abs().max()))
        assert error <= share * size, f"{name}: off by {error:.3g}"


def assert_same(found: Model, expected: Model) -> None:
    """Assert equality of bits."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: off by {float((found[name] - value).abs().max()):.3g}"


def some(exceptions: Mapping[str, str], among: Sequence[str] = ALL) -> list[str]:
    """Return the methods that a law holds for; an exception that names no method is a mistake."""
    assert set(exceptions) <= set(among), sorted(set(exceptions) - set(among))
    return [name for name in among if name not in exceptions]


def has(parameter: str) -> list[str]:
    """Return the methods with a parameter."""
    return [name for name in ALL if parameter in METHODS[name].parameters]


# --- what comes back as it was

#: Parameters with which a method without neutral ones lets a single source through.
OPEN = {
    "cabs": {"n": 1.0, "m": 1.0},
    "lines": {"mode": "given", "a": 1.0, "b": 0.0},
    "nearswap": {"t": 1e9},
    "knots_ties": {"cut": 0.0},
    "knots_mean": {"cut": 0.0},
}

#: Why a single source at weight 1 does not come back, even with all that can be switched off switched off.
CHANGES_ONE_SOURCE = {
    "one_bit": "keeps signs and one magnitude",
    "pcb": "its gate is a score, for one source too",
    "arcee_fusion": "takes the entries of greatest importance only",
    "doge": "eta sets the length of task vectors",
    "iso_c": "levels the singular values",
    "iso_cts": "levels the singular values",
}

#: Combines that divide by the sum of weights.
NORMALIZING = (
    "mean", "regmean", "slerp", "nuslerp", "multislerp", "karcher", "match_fisher", "match_gram", "match_kronecker",
)  # fmt: skip


@pytest.mark.parametrize("name", some(CHANGES_ONE_SOURCE))
@law(3)
@given(w=worlds, data=st.data())
def test_one_hot_weights_give_that_source(name: str, w: World, data: st.DataObject) -> None:
    """A source at weight 1 among others at 0 comes back; at any weight, where weights are normalised."""
    source = data.draw(st.sampled_from(list(w.sources)))
    weight = 0.3 if any(step.stage.name in NORMALIZING for step in METHODS[name].steps) else 1.0

    found = build(
        name, w, {**neutral(name), **OPEN.get(name, {})}, weights={n: weight * (n == source) for n in w.sources}
    )

    assert_near(found, w.sources[source], 5e-6)


@pytest.mark.parametrize("name", some({"passthrough": "sums full weights, of one source in practice"}))
@law(3)
@given(w=worlds)
def test_sources_that_equal_the_base_give_the_base(name: str, w: World) -> None:
    """Task vectors of zero merge to zero, without an error; so do their directions."""
    w = dataclasses.replace(w, sources=dict.fromkeys(w.sources, w.base))

    assert_near(build(name, w), w.base, 5e-6)


@pytest.mark.parametrize(
    "name",
    some(
        {
            "passthrough": "has no base",
            "cart": "adds to the sources' mean, not to the base",
            "lore": "adds to its own estimate of what the sources share",
        },
        has("scale"),
    ),
)
@law(3)
@given(w=worlds)
def test_scale_0_gives_the_base(name: str, w: World) -> None:
    """Nothing of the task vectors is left at scale 0: the base comes back bit for bit."""
    assert_same(build(name, w, {"scale": 0.0}, base=True), w.base)


@pytest.mark.parametrize("name", ALL)
def test_no_weights_give_the_base(name: str) -> None:
    """Where no source has a weight the base comes back bit for bit."""
    w = world(1)

    assert_same(build(name, w, weights=dict.fromkeys(w.sources, 0.0)), w.base)


@law(20)
@given(w=worlds, data=st.data())
def test_ties_at_density_1_with_one_source_is_task_arithmetic(w: World, data: st.DataObject) -> None:
    """Nothing is trimmed and no sign is contested: W_0 + scale * D, bit for bit."""
    source = data.draw(st.sampled_from(list(w.sources)))
    given = {"scale": data.draw(st.floats(-2, 2, width=32))}

    ties = build("ties", w, {**given, "density": 1.0}, weights={source: 1.0})

    assert_same(ties, build("task_arithmetic", w, given, weights={source: 1.0}))
    assert_near(ties, {n: w.base[n] + given["scale"] * (w.sources[source][n] - w.base[n]) for n in SHAPES}, 1e-6)


# --- what changes nothing


@pytest.mark.parametrize(
    "name",
    some(
        {
            "ema": "the order of checkpoints is its parameter",
            "wma": "the order of checkpoints is its parameter",
            "tall_mask": "its parameter is the number of a source",
        }
    ),
)
@law(3)
@given(w=worlds)
def test_the_order_of_sources_changes_nothing(name: str, w: World) -> None:
    """Sources in another order, each with its weight, parameters and statistics, merge to the same."""
    numbers = {source: float(i) for i, source in enumerate(w.sources)}
    each = {key: p for key, p in METHODS[name].parameters.items() if p.per_source}
    apart = {key: {n: float(p.default) * (1 - 0.1 * i) for n, i in numbers.items()} for key, p in each.items()}
    parameters = apart | ({"order": numbers} if "order" in each else {})

    found = build(name, w, parameters, names=list(w.sources)[::-1])

    assert_near(found, build(name, w, parameters), 5e-6)


@pytest.mark.parametrize("name", ALL)
@law(2)
@given(w=worlds)
def test_merging_twice_gives_the_same_bits(name: str, w: World) -> None:
    """Nothing is kept between merges, inputs are not written to, and the global generator is not touched."""
    copies = {key: {n: t.clone() for n, t in model.items()} for key, model in {**w.sources, "": w.base}.items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()

    found = build(name, w)

    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(build(name, w), found)
    for key, model in {**w.sources, "": w.base}.items():
        assert_same(model, copies[key])


@pytest.mark.parametrize("name", ALL)
@law(2)
@given(w=worlds)
def test_the_order_of_tensors_changes_nothing(name: str, w: World) -> None:
    """A model whose tensors come in another order merges to the same, whatever is asked about all of them."""
    found = build(name, w, tensors=list(SHAPES)[::-1])

    assert_near(found, build(name, w), 5e-6)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].random])
@law(3)
@given(w=worlds)
def test_masks_depend_on_their_tensor_and_source_alone(name: str, w: World) -> None:
    """A tensor gets the same bits without the others and in any order; other names and other seeds, other masks."""
    alike = {
        key: {**m, "lm_head.weight": m["model.embed_tokens.weight"]} for key, m in {**w.sources, "": w.base}.items()
    }
    w = dataclasses.replace(w, base=alike.pop(""), sources=alike)
    whole = build(name, w)
    some_tensors = ["lm_head.weight", "model.layers.0.a.weight"]

    assert_same(build(name, w, tensors=some_tensors), {tensor: whole[tensor] for tensor in some_tensors})
    assert not torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])
    other = build(name, dataclasses.replace(w, seed=w.seed + 1))
    assert any(not torch.equal(whole[tensor], other[tensor]) for tensor in SHAPES)


# --- sizes, densities, types


@pytest.mark.parametrize("name", has("density"))
@law(3)
@given(w=worlds, low=st.sampled_from([0.01, 0.2]))
def test_densities_0_and_1_and_tensors_smaller_than_1_over_density(name: str, w: World, low: float) -> None:
    """Density 0 gives the base; every other one a finite model, of tensors of a single entry too."""
    assert_same(build(name, w, {"density": 0.0}), w.base)
    for density in (low, 1.0):
        for tensor, found in build(name, w, {"density": density}).items():
            assert found.shape == SHAPES[tensor]
            assert bool(found.isfinite().all()), tensor


def ends() -> list[tuple[str, str, float]]:
    """Return each method with each number of its own at each bound that it has, but for long loops."""
    return [
        (name, key, end)
        for name in ALL
        for key, parameter in METHODS[name].parameters.items()
        for end in (parameter.low, parameter.high)
        if end is not None and end <= 100
    ]


@pytest.mark.parametrize(("name", "key", "end"), ends())
def test_every_parameter_works_at_its_bounds(name: str, key: str, end: float) -> None:
    """Results are finite, of the right shape, for matrices, vectors, one column, one row and one entry."""
    for count in (1, 3):
        for tensor, found in build(name, world(2, count), {key: end}).items():
            assert found.shape == SHAPES[tensor]
            assert bool(found.isfinite().all()), tensor


@pytest.mark.parametrize("name", ALL)
@law(3)
@given(
    seed=st.integers(0, 10**6),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple) | st.sampled_from([(1, 1), (7, 1), (1, 7)]),
    count=st.integers(1, 3),
)
def test_any_shape_gives_a_finite_tensor(name: str, seed: int, shape: tuple[int, ...], count: int) -> None:
    """A single tensor of any shape merges to a finite one of that shape, where sources repeat or equal the base too."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    D = 0.1 * torch.randn(shape, generator=generator)
    models = [{"w": base + D}, {"w": base + D}, {"w": base}][:count]
    F = torch.rand(shape, generator=generator)
    scalar, none = [{"w": torch.tensor(0.5)}] * count, [{}] * count
    statistics = {
        "fisher": [{"w": F}] * count, "loss": scalar, "sensitivity": scalar, "gram": none, "gram_out": none,
        "square": none, "activation": {},
    }  # fmt: skip

    found = merge(name, models, {"w": base}, parameters=QUICK.get(name), statistics=statistics, seed=seed)["w"]

    assert found.shape == shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_storage_is_the_rounding_of_the_float32_result(name: str, dtype: torch.dtype) -> None:
    """Arithmetic is float32: what is stored in another type is the float32 result of the same inputs, rounded once."""
    w = world(3)

    def found(storage: torch.dtype) -> Model:
        models = [{n: t.to(dtype).to(storage) for n, t in m.items()} for m in (*w.sources.values(), w.base)]
        return merge(
            name, models[:-1], models[-1], list(w.weights.values()), QUICK.get(name), w.statistics(METHODS[name])
        )  # fmt: skip

    stored = found(dtype)

    assert {t.dtype for t in stored.values()} == {dtype}
    assert_same(stored, {n: t.to(dtype) for n, t in found(torch.float32).items()})


# --- geometry

#: What is left of a task vector that is merged with one of zero, at equal weights.
GEOMETRIC = {"slerp": 0.5, "nuslerp": 0.5, "multislerp": 0.5, "karcher": 0.5, "model_stock": 0.0, "metagpt": 1.0}


@pytest.mark.parametrize("name", GEOMETRIC)
@law(5)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-4, 0.1]))
def test_a_zero_task_vector_has_no_direction(name: str, seed: int, size: float) -> None:
    """Zero beside a task vector leaves its share of that one: half of it on the chord, and no factor 0.707, no NaN."""
    w = world(seed, 2, size)
    w = dataclasses.replace(w, sources={**w.sources, "s0": w.base}, weights={"s2": 1.0, "s0": 1.0})

    for tensor, found in build(name, w).items():
        D = w.sources["s2"][tensor] - w.base[tensor]

        torch.testing.assert_close(found, w.base[tensor] + GEOMETRIC[name] * D, atol=1e-6, rtol=0.0)


# --- pieces

PIECEWISE = [name for name in ALL if all(step.stage.elementwise for step in METHODS[name].steps)]


def over_tensors(name: str, names: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of a method with every scope of rows widened to the tensor."""
    scopes = {key: "tensor" for key in METHODS[name].parameters if key.rpartition(".")[2] == "scope"}
    return METHODS[name].bound(scopes, names)


@pytest.mark.parametrize("name", PIECEWISE)
@law(3)
@given(w=worlds, tensor=st.sampled_from(list(SHAPES)), size=st.integers(1, 20))
def test_pieces_give_what_the_whole_gives(name: str, w: World, tensor: str, size: int) -> None:
    """With the answers known, a line run on flat pieces of a tensor gives the bits that it gives on the whole."""
    names = tuple(w.sources)
    X = torch.stack([w.sources[n][tensor] for n in names])
    site = Site(
        tensor=tensor, names=names, layer=1, depth=2, seed=w.seed, statistic=lambda k, s: w.statistic(k, s, tensor)
    )
    weights = torch.tensor([w.weights[n] for n in names], dtype=torch.float64)
    W0 = w.base[tensor] if METHODS[name].steps[0].stage.name != "zero" else None
    state = State(X=X, w=weights, site=site, W0=W0, keys=keys(w.seed, names, tensor))
    answers: dict[tuple[str, int], Tensor] = {}
    steps = over_tensors(name, names)

    def learn(number: tuple[str, int], ask: Ask) -> Tensor:
        found = answer(ask)
        answers[number] = found if ask.how == "gram" else found.view(-1, 1)
        return found

    whole = run(steps, state, learn).flatten()
    for start in range(0, whole.numel(), size):
        piece = slice(start, start + size)
        part = dataclasses.replace(
            state, X=X.flatten(1)[:, piece], W0=None if W0 is None else W0.flatten()[piece], start=start
        )
        found = run(steps, part, lambda number, ask: answers[number])

        torch.testing.assert_close(found, whole[piece], atol=0.0, rtol=1e-6)


# --- one form


def text(steps: Sequence[Step]) -> str:
    """Return the line that steps are."""
    return " | ".join(
        f"{s.stage.name}({', '.join(f'{key}={value}' for key, value in s.values.items())})" for s in steps
    )


@pytest.mark.parametrize("name", ALL)
@law(2)
@given(w=worlds)
def test_a_method_is_its_line(name: str, w: World) -> None:
    """Named, as its line, and as its line with all defaults said: one digest, the same bits."""
    found = build(name, w, QUICK.get(name))

    for line in (METHODS[name].line, text(METHODS[name].steps)):
        assert canonical(line, w.weights, {}) == canonical(name, w.weights, {})
        if name not in QUICK:
            assert_same(build(line, w), found)


def droppable() -> list[tuple[str, int]]:
    """Return each method with each of its stages that can be made to do nothing."""
    return [(name, i) for name in ALL for i, step in enumerate(METHODS[name].steps) if step.stage.neutral]


@pytest.mark.parametrize(("name", "at"), droppable())
@law(2)
@given(w=worlds)
def test_a_stage_that_does_nothing_is_no_stage(name: str, at: int, w: World) -> None:
    """A stage at its neutral values (density 1, scale 1) has the digest and the bits of the line without it."""
    steps = METHODS[name].steps
    loud = [dataclasses.replace(step, values={**step.values, **(step.stage.neutral or {})}) for step in steps]
    with_it = text([*steps[:at], loud[at], *steps[at + 1 :]])
    without = text([*steps[:at], *steps[at + 1 :]])

    assert canonical(with_it, w.weights, {}) == canonical(without, w.weights, {})
    assert_same(build(with_it, w), build(without, w))
    found = run_all(loud[at], w)
    assert all(torch.allclose(found[n], w.sources["s2"][n], atol=1e-6) for n in SHAPES)


#: Stages that are never run where they do nothing, and could not be.
SKIPPED = {
    "stock": "the mean cosine of no pairs is not defined",
    "trust": "the quantile of a single entry is none",
}


def run_all(step: Step, w: World) -> Model:
    """Return what one source becomes by a stage that is really run, between an origin and a sum."""
    found = {}
    if step.stage.name in SKIPPED:
        return w.sources["s2"]
    for tensor in SHAPES:
        first, last = METHODS["task_arithmetic"].steps[:2]
        line = (first, step, last) if step.stage.kind in ("edit", "gate", "weigh") else (first, last, step)
        site = Site(tensor=tensor, names=("s2",), statistic=lambda k, s, tensor=tensor: w.statistic(k, s, tensor))  # type: ignore[misc]  # bound at once
        X, weight = w.sources["s2"][tensor][None], torch.ones(1, dtype=torch.float64)
        found[tensor] = run(line, State(X=X, w=weight, site=site, W0=w.base[tensor]))
    return found


@pytest.mark.parametrize("name", ALL)
@law(3)
@given(w=groups, data=st.data())
def test_a_source_without_weight_is_no_source(name: str, w: World, data: st.DataObject) -> None:
    """Weight 0 and absence have one digest and the same bits, and one value for all is a value for each."""
    out = data.draw(st.sampled_from(list(w.sources)))
    zero = {**w.weights, out: 0.0}
    absent = {n: weight for n, weight in w.weights.items() if n != out}
    each = {key: p.default for key, p in METHODS[name].parameters.items() if p.per_source}
    apart = {key: dict.fromkeys(w.sources, value) for key, value in each.items()}

    assert canonical(name, zero, apart) == canonical(name, absent, each) == canonical(name, absent, {})
    assert_same(build(name, w, apart, weights=zero), build(name, w, weights=absent, names=list(absent)))


@pytest.mark.parametrize("name", [name for name in ALL if any(step.stage.alone for step in METHODS[name].steps)])
@law(3)
@given(w=worlds)
def test_a_stage_that_compares_does_nothing_to_one_source(name: str, w: World) -> None:
    """With one source a stage marked so is left out of the digest, and running it would change no bit."""
    steps, one = METHODS[name].steps, {"s2": 1.0}
    without = text([step for step in steps if not step.stage.alone])

    assert canonical(name, one, {}) == canonical(without, one, {})
    for step in steps:
        if step.stage.alone:
            found = run_all(step, w)
            assert all(torch.allclose(found[n], w.sources["s2"][n], atol=1e-6) for n in SHAPES), step.stage.name

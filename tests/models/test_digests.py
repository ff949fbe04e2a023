"""Digests: every way of building a recipe's tensors gives the same bits, in whatever pieces, order and process."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomerge.models import resident
from evomerge.models.materialize import Blueprint
from evomerge.models.resident import InMemory, OnDisk, Resident, Sources
from evomerge.operators import parts
from evomerge.operators.fused import Lines, unavailable
from evomerge.recipe import Blend, Parameter, Recipe, Route, Source

DEPTH = 3

#: Shapes of the tensors of a layer: one of several pieces, a bias that goes with its matrix, and a vector.
SHAPES = {
    "self_attn.q_proj.weight": (130, 300),
    "self_attn.q_proj.bias": (130,),
    "mlp.up_proj.weight": (64, 40),
    "input_layernorm.weight": (300,),
}

#: Methods with parameters: of every scope, with masks, with angles, of singular values, with sums over the model.
METHODS: dict[str, tuple[str, dict[str, Parameter]]] = {
    "linear": ("linear", {}),
    "ties, model": ("ties", {"density": 0.3}),
    "ties, layer": ("ties", {"density": {"a": 0.3, "b": 0.6}, "trim.scope": "layer"}),
    "ties, tensor": ("ties", {"density": 0.3, "trim.scope": "tensor", "rescale": "l1"}),
    "ties, row": ("ties", {"density": 0.3, "trim.scope": "row"}),
    "ties, majority": ("ties", {"zero": "majority", "vote": "share"}),
    "dare_ties": ("dare_ties", {"density": 0.4}),
    "dare, l2": ("dare_linear", {"density": 0.4, "rescale": "l2"}),
    "della": ("della", {}),
    "breadcrumbs": ("breadcrumbs", {"scope": "tensor"}),
    "one_bit": ("one_bit", {}),
    "lines": ("lines", {"b": 0.3}),
    "lines, given": ("lines", {"mode": "given", "a": 0.2, "b": 0.7}),
    "sce": ("sce", {}),
    "tatr": ("tatr", {"quantile": 0.8}),
    "slerp": ("slerp", {"t": 0.3}),
    "slerp, model": ("slerp", {"t": 0.3, "slerp.scope": "model"}),
    "model_stock": ("model_stock", {}),
    "metagpt": ("metagpt", {}),
    "star": ("star", {}),
    "knots_ties": ("knots_ties", {"density": 0.5}),
}

#: Those whose lines the compiler can take when it is told all thresholds.
COMPILED = ("linear", "ties, model", "dare_ties", "breadcrumbs", "lines, given", "slerp", "model_stock")


def tensors(seed: int) -> dict[str, Tensor]:
    """Return a model with a few equal entries and zeros."""
    generator = torch.Generator().manual_seed(seed)
    names = [("model.embed_tokens.weight", (50, 300)), ("lm_head.weight", (50, 300)), ("model.norm.weight", (300,))]
    names += [(f"model.layers.{k}.{name}", shape) for k in range(DEPTH) for name, shape in SHAPES.items()]
    made = {}
    for name, shape in names:
        origin = torch.Generator().manual_seed(len(name) + shape[0])
        made[name] = torch.randn(*shape, generator=origin) + 0.05 * torch.randn(*shape, generator=generator)
        made[name].view(-1)[::13] = 0.25
    return {name: tensor.bfloat16() for name, tensor in made.items()}


MODELS = {name: tensors(seed) for seed, name in enumerate(("base", "a", "b"))}


def recipe(method: str, parameters: Mapping[str, Parameter], a: float = 0.7, b: float = 0.4, seed: int = 3) -> Recipe:
    """Return a recipe with one blend everywhere but in the head, where b stands alone."""
    return Recipe(
        sources=(Source(name="a", path="a"), Source(name="b", path="b")),
        base=Source(name="base", path="base"),
        routes=(
            Route(blend=Blend(method=method, weights={"a": 0.0, "b": b}, parameters=parameters), groups=("head",)),
            Route(blend=Blend(method=method, weights={"a": a, "b": b}, parameters=parameters)),
        ),
        layers=tuple(range(DEPTH)), dtype="bfloat16", seed=seed,
    )  # fmt: skip


def named(kind: str, a: float = 0.7, b: float = 0.4, seed: int = 3) -> Recipe:
    """Return a recipe of one of the `METHODS` here."""
    return recipe(*METHODS[kind], a, b, seed)


def sha(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(given: Recipe, sources: Sources, lines: Lines | None = None) -> dict[str, str]:
    """Return the digest of every tensor as it is streamed."""
    return {name: sha(tensor) for name, tensor in Blueprint(given, sources, lines=lines).stream()}


def live() -> dict[str, Tensor]:
    """Return what a live model has: tensors to be written into."""
    return {name: torch.full_like(tensor, 9.0) for name, tensor in MODELS["a"].items()}


def filled(
    given: Recipe, sources: Sources, into: dict[str, Tensor], before: Mapping[str, str] | None = None,
    lines: Lines | None = None,
) -> dict[str, str]:  # fmt: skip
    """Fill a live model and return the digest of every tensor."""
    for name, write in Blueprint(given, sources, lines=lines).fill(before):
        write(into[name])
    return {name: sha(tensor) for name, tensor in into.items()}


def without_knowledge() -> InMemory:
    """Return sources that keep no tables and no inner products."""
    sources = InMemory(MODELS, DEPTH)
    sources.kept = None
    return sources


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, str]]:
    """Return the digests of a stream without anything kept, for every method."""
    return {kind: digests(named(kind), without_knowledge()) for kind in METHODS}


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_kept_changes_no_bit(kind: str, expected: dict[str, dict[str, str]]) -> None:
    """Streams from memory, first and again, and what is written into a live model, have one digest."""
    sources = InMemory(MODELS, DEPTH)

    assert digests(named(kind), sources) == expected[kind]
    assert filled(named(kind), sources, live()) == expected[kind]
    assert digests(named(kind), sources) == expected[kind]


@pytest.mark.parametrize("entries", [1 << 14, 1 << 15, 1 << 30])
@pytest.mark.parametrize("kind", METHODS)
def test_pieces_change_no_bit(
    kind: str, entries: int, expected: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are merged in many pieces, in few, or whole, with and without what is kept."""
    monkeypatch.setattr(parts, "PIECE", entries)
    monkeypatch.setattr(resident, "_PIECE", entries)

    assert digests(named(kind), without_knowledge()) == expected[kind]
    assert digests(named(kind), InMemory(MODELS, DEPTH)) == expected[kind]


@pytest.mark.parametrize("kind", METHODS)
def test_only_what_changed_is_written(kind: str) -> None:
    """A live model that held another candidate becomes the same as a fresh one; the same again writes nothing."""
    sources, into = InMemory(MODELS, DEPTH), live()
    first = Blueprint(named(kind, 0.2, 0.9), sources).keys()
    filled(named(kind, 0.2, 0.9), sources, into)
    only = Route(blend=Blend(method="linear", weights={"a": 1.0}, parameters={}), layers=(1, 2))
    changed = replace(named(kind), routes=(only, *named(kind).routes))
    for given in (named(kind, 0.2, 0.4), named(kind), changed, named(kind, seed=4), named("linear"), named(kind)):
        assert filled(given, sources, into, first) == digests(given, sources)
        first = Blueprint(given, sources).keys()
    for tensor in into.values():
        tensor.fill_(5.0)
    filled(named(kind), sources, into, first)

    assert all(bool((tensor == 5.0).all()) for tensor in into.values())


def test_a_bias_that_no_longer_goes_with_its_matrix_is_written() -> None:
    """Whether a bias is merged inside its matrix depends on both their blends, and so does what must be written."""
    line = "base | knots | trim(0.3) | mean"
    both = Blend(method=line, weights={"a": 0.7, "b": 0.4}, parameters={})
    other = Blend(method="linear", weights={"a": 1.0, "b": 1.0}, parameters={})
    one = replace(recipe("linear", {}), routes=(Route(blend=both),))
    two = replace(one, routes=(Route(blend=other, tensors="*weight"), Route(blend=both)))
    sources, into = InMemory(MODELS, DEPTH), live()

    for before, after in ((one, two), (two, one)):
        filled(before, sources, into)
        held = Blueprint(before, sources).keys()
        assert filled(after, sources, into, held) == digests(after, sources)


def test_a_model_of_another_depth_is_written() -> None:
    """A line over depth has other factors in a model of fewer layers."""
    sources, into = InMemory(MODELS, DEPTH), live()
    deep = named("lines, given")
    flat = replace(deep, layers=deep.layers[:2])
    filled(deep, sources, into)
    found = filled(flat, sources, into, Blueprint(deep, sources).keys())
    fresh = digests(flat, sources)

    assert {name: found[name] for name in fresh} == fresh


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lines]:
    """Return compiled lines, which are kept for this session."""
    problem = unavailable()
    if problem is not None:
        pytest.skip(f"nothing can be compiled here: {problem}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield Lines()


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_lines_change_no_bit(kind: str, compiler: Lines, expected: dict[str, dict[str, str]]) -> None:
    """A compiled pass into the live model gives what the plain stream gives, and is what wrote it."""
    before = len(compiler._compiled)
    assert filled(named(kind), InMemory(MODELS, DEPTH), live(), lines=compiler) == expected[kind]
    assert len(compiler._compiled) > before
    count = len(compiler._compiled)
    assert filled(named(kind, 0.3, -0.2), InMemory(MODELS, DEPTH), live(), lines=compiler) == digests(
        named(kind, 0.3, -0.2), without_knowledge()
    )
    assert len(compiler._compiled) == count
    assert compiler.problem is None


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind not in ("star", "knots_ties")])
def test_threads_change_no_bit(kind: str, expected: dict[str, dict[str, str]]) -> None:
    """Two threads build what one builds, where no linear algebra library is asked for singular values."""
    try:
        torch.set_num_threads(2)
        assert digests(named(kind), InMemory(MODELS, DEPTH)) == expected[kind]
        assert digests(named(kind), without_knowledge()) == expected[kind]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", METHODS)
def test_the_order_of_parts_changes_no_bit(kind: str, expected: dict[str, dict[str, str]]) -> None:
    """Parts that come in another order are merged to the same tensors, thresholds of the whole model included."""

    class Backwards(Blueprint):
        """A blueprint whose parts come in reverse."""

        def __init__(self, given: Recipe, sources: Sources) -> None:
            super().__init__(given, sources)
            merge = self._merge
            self._merge = parts.Merge(
                merge.parts[::-1], self._read, merge._names, has_base=True, depth=DEPTH, seed=given.seed, known=None,
            )  # fmt: skip
            self._part_of = {name: part for part in self._merge.parts for name in part.tensors}

    found = {name: sha(tensor) for name, tensor in Backwards(named(kind), without_knowledge()).stream()}
    assert found == expected[kind]


@pytest.mark.parametrize("kind", [kind for kind in METHODS if "dare" in kind or kind == "della"])
def test_masks_go_by_the_seed(kind: str, expected: dict[str, dict[str, str]]) -> None:
    """Another seed is another model: the digests do tell."""
    again = digests(named(kind, seed=4), without_knowledge())

    assert sum(again[name] == digest for name, digest in expected[kind].items()) <= 1


def test_maps_and_files_change_no_bit(family: dict[str, Path]) -> None:
    """Views of files, tensors read one by one and tensors in memory are merged alike."""
    memory = InMemory(
        {name: {key: OnDisk(family).tensor(name, key) for key in OnDisk(family).names} for name in family}, DEPTH
    )
    for kind in METHODS:
        found = [digests(named(kind), sources) for sources in (memory, Resident(family), OnDisk(family))]
        assert found[0] == found[1] == found[2], kind


PROCESS = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from evomerge.models.resident import Resident
from tests.models.test_digests import METHODS, digests, named
family = json.loads(sys.argv[1])
sources = Resident({name: Path(family[name]) for name in family})
print(json.dumps({kind: digests(named(kind), sources) for kind in METHODS}))
"""


def test_another_process_gives_the_same_digests(family: dict[str, Path]) -> None:
    """A restart with other hashes of strings changes no bit."""
    found = []
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, json.dumps({name: str(path) for name, path in family.items()})],
            env=os.environ | {"PYTHONHASHSEED": hashes}, capture_output=True, text=True, check=False, cwd=Path.cwd(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))

    assert found[0] == found[1]
    assert found[0] == {kind: digests(named(kind), OnDisk(family)) for kind in METHODS}

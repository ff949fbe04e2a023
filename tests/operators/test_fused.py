"""Compiled lines: the same bits as the plain run of the same stages, from one program for all numbers."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.methods import Given, Method, Parameter, Step, method
from evomerge.operators import fused, masks
from evomerge.operators.fused import Lines, columns_of, unavailable
from evomerge.operators.line import at_once, run
from evomerge.operators.state import Ask, Site, State
from evomerge.stages import METHODS, STAGES

#: Weights of up to five sources: of both signs, and not all different.
WEIGHTS = (0.7, -0.3, 0.55, 0.7, 0.1)

#: Lines in which every elementwise stage stands once at least, with the number of their sources.
LINES = {
    "zero | wma | mean": 3,
    "base | winsor(0.1) | trim(0.2, scope=model) | elect | mean | scale": 3,
    "base | drop | elect | mean(normalize=0) | scale": 2,
    "base | near | argmax | sum | consensus(k=1) | scale": 3,
    "base | band | sign1bit | ram | own | sum | tall": 2,
    "base | trust | energy(0.5) | mean | lines(mode=given)": 3,
    "centre | variance(0.5) | sum | stock | norm_match": 3,
    "base_if_any | slerp | scale": 3,
    "base_if_any | multislerp | scale": 2,
    "base | norm | karcher | lines": 2,
    "zero | sum | gain": 2,
}

ELEMENTWISE = [name for name, found in METHODS.items() if all(step.stage.elementwise for step in found.steps)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the compiler keep what it makes in a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def compiled() -> Lines:
    """Return the lines that the tests of this file compile, each once."""
    problem = unavailable()
    if problem is not None:
        pytest.skip(f"nothing can be compiled here: {problem}")
    return Lines()


@dataclass(frozen=True)
class World:
    """Sources, a base or none, and what is to be built from them, flat."""

    sources: list[Tensor]
    base: Tensor | None
    site: Site

    @property
    def weights(self) -> Tensor:
        """The weights of the sources."""
        return torch.tensor(WEIGHTS[: len(self.sources)], dtype=torch.float64)


def world(count: int, entries: int, base: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> World:
    """Return random sources with equal entries, zeros of both signs and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.randn(entries, generator=generator)
    sources = [origin + 0.1 * torch.randn(entries, generator=generator) for _ in range(count)]
    for i, tensor in enumerate((origin, *sources)):
        tensor[3::17] = 0.0
        tensor[4::17] = -0.0
        tensor[5 + i :: 19] *= 1e-40
        tensor[6::23] = origin[6::23]
    names = tuple("abcde"[:count])
    site = Site(tensor="model.layers.1.x.weight", names=names, layer=1, depth=4, seed=seed)
    return World([tensor.to(dtype) for tensor in sources], origin.to(dtype) if base else None, site)


def settings(found: Method, names: tuple[str, ...]) -> list[dict[str, Given]]:
    """Return two settings of all numbers of a method, none of them a default; the second source by source."""

    def number(parameter: Parameter, share: float) -> float:
        low = 0.0 if parameter.low is None else parameter.low
        return low + share * ((1.0 if parameter.high is None else parameter.high) - low)

    free = {
        name: parameter
        for name, parameter in found.parameters.items()
        if not (parameter.whole or parameter.options or parameter.text)
    }
    one: dict[str, Given] = {name: number(parameter, 0.37) for name, parameter in free.items()}
    two: dict[str, Given] = {
        name: {source: number(parameter, 0.3 + 0.13 * i) for i, source in enumerate(names)}
        if parameter.per_source and len(names) > 1
        else number(parameter, 0.61)
        for name, parameter in free.items()
    }
    return [one, two]


def plain(steps: tuple[Step, ...], given: World) -> tuple[Tensor, dict[tuple[str, int], Tensor], Tensor | None]:
    """Return what the plain run gives, float32, the answers on its way, and the keys of its masks."""
    answers: dict[tuple[str, int], Tensor] = {}

    def reply(number: tuple[str, int], ask: Ask) -> Tensor:
        answers[number] = at_once(number, ask)
        return answers[number]

    draws = any(step.stage.random for step in steps)
    keys = masks.keys(given.site.seed, given.site.names, given.site.tensor) if draws else None
    reads_base = given.base is not None and steps[0].stage.name in ("base", "base_if_any")
    state = State(
        X=torch.stack([source.float() for source in given.sources]), w=given.weights, site=given.site,
        W0=given.base.float() if reads_base and given.base is not None else None,
    )  # fmt: skip
    return run(steps, state, reply), answers, keys


def through(
    compiled: Lines, steps: tuple[Step, ...], given: World, out: torch.dtype
) -> tuple[Tensor, float | None, Tensor]:
    """Return what the compiled line wrote, what it says about it, and what the plain run gives."""
    expected, answers, keys = plain(steps, given)
    built = torch.full((len(given.sources[0]),), 7.0, dtype=out)
    base = given.base if steps[0].stage.name in ("base", "base_if_any") else None
    reply = lambda number, ask: answers[number]  # noqa: E731  # too short for a function
    columns = columns_of(steps, given.site, base is not None, given.weights, keys, reply)
    found = compiled.run(steps, columns, given.sources, base, keys, built)
    return built, found, expected.to(out)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors have the same bits, signs of zeros included."""
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == two.dtype and torch.equal(one.view(kind), two.view(kind))


def agrees(compiled: Lines, line: str, given: World, parameters: Mapping[str, Given], out: torch.dtype) -> bool:
    """Tell whether the compiled line was run, gave finite values, and has the bits of the plain one."""
    steps = method(line).bound(parameters, given.site.names)
    built, found, expected = through(compiled, steps, given, out)
    return found == 0.0 and same_bits(built, expected)


def test_the_lines_here_have_every_elementwise_stage() -> None:
    """No elementwise stage is left out below, save `ema`, whose number is part of its program."""
    there = {step.stage.name for line in LINES for step in method(line).steps}

    assert {name for name, stage in STAGES.items() if stage.elementwise} - there <= {"ema", "base", "zero"}


@pytest.mark.parametrize("line", LINES)
def test_a_compiled_line_has_the_bits_of_the_plain_one(compiled: Lines, line: str) -> None:
    """Two settings of all its numbers go through one program, and through tensors of any size."""
    count, before = LINES[line], len(compiled._compiled)
    one, two = settings(method(line), tuple("abcde"[:count]))

    assert agrees(compiled, line, world(count, 4099), one, torch.bfloat16)
    assert len(compiled._compiled) == before + 1
    assert agrees(compiled, line, world(count, 4099), two, torch.bfloat16)
    for seed, entries in enumerate((1, 2, 15, 16, 17, 33, 5000)):
        assert agrees(compiled, line, world(count, entries, seed=seed), (one, two)[seed % 2], torch.bfloat16)
    assert len(compiled._compiled) == before + 1
    assert not compiled._static


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("line", ["base | drop | elect | mean(normalize=0) | scale", "zero | mean"])
def test_any_number_of_sources(compiled: Lines, line: str, count: int) -> None:
    """One source, two, and five: what does nothing to one source is not there."""
    for parameters in settings(method(line), tuple("abcde"[:count])):
        assert agrees(compiled, line, world(count, 1000), parameters, torch.bfloat16)


def test_without_a_base_where_there_may_be_one(compiled: Lines) -> None:
    """A line that takes a base if there is one goes without."""
    assert agrees(compiled, "base_if_any | slerp | scale", world(2, 1000, base=False), {}, torch.bfloat16)


@pytest.mark.parametrize("line", ["base | trim | elect | mean", "zero | mean"])
def test_sources_and_results_in_float32(compiled: Lines, line: str) -> None:
    """Tensors in float32 have the bits of the plain run too, subnormal ones included."""
    given = world(3, 3001, dtype=torch.float32)

    assert agrees(compiled, line, given, {"density": 0.4} if "base" in line else {}, torch.float32)


def test_sources_of_several_dtypes(compiled: Lines) -> None:
    """A program for tensors of one dtype is not run on those of another."""
    for kinds in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")):
        given = world(2, 500)
        mixed = [source.to(getattr(torch, kind)) for source, kind in zip(given.sources, kinds, strict=True)]
        assert agrees(compiled, "zero | sum", World(mixed, None, given.site), {}, torch.bfloat16)
    wide = world(2, 500)
    for base in (wide.base, wide.base.float() if wide.base is not None else None):
        assert agrees(compiled, "base | sum", World(wide.sources, base, wide.site), {}, torch.bfloat16)


def test_a_line_that_cannot_be_compiled_is_left_to_the_plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler refuses is tried once, told, and not written."""
    asked: list[int] = []

    def refuse(body: Any, example: Any) -> Any:
        asked.append(1)
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(fused, "_compiled", refuse)
    lines, given = Lines(), world(2, 10)
    for _ in range(2):
        built, found, _ = through(lines, method("zero | mean").bound({}, given.site.names), given, torch.bfloat16)
        assert found is None
        assert (built == 7.0).all()

    assert asked == [1]
    assert lines.problem == "no such luck"


def test_numbers_of_no_column_have_programs_of_their_own(compiled: Lines) -> None:
    """Where a stage computes with a number that makes no column, each value is right all the same."""
    for decay in (0.8, 0.3, 0.55, 0.3):
        assert agrees(compiled, "zero | ema | mean", world(3, 200), {"decay": decay}, torch.bfloat16)


@pytest.mark.parametrize("most", [64, 1000, 4099])
def test_long_tensors_go_in_pieces(compiled: Lines, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a tensor continue the masks of those before them."""
    monkeypatch.setattr(fused, "_MOST", most)
    for line in ("base | drop | elect | mean(normalize=0) | scale", "base_if_any | slerp | scale"):
        count = LINES[line]
        one, _ = settings(method(line), tuple("abc"[:count]))
        assert agrees(compiled, line, world(count, 4099), one, torch.bfloat16)


def test_masks_go_by_seed_and_names(compiled: Lines) -> None:
    """Another seed, other names and another tensor are other masks, from the same program."""
    line, given, found = "base | drop | elect | mean(normalize=0) | scale", world(2, 2000), []
    steps = method(line).bound({"density": 0.5, "scale": 0.9, "slack": 0.1}, given.site.names)
    for change in ({}, {"seed": 9}, {"names": ("d", "e")}, {"tensor": "other"}):
        site = Site(**{**vars(given.site), **change})
        built, _, expected = through(compiled, steps, World(given.sources, given.base, site), torch.bfloat16)
        assert same_bits(built, expected)
        found.append(built)

    assert all(not torch.equal(one, two) for i, one in enumerate(found) for two in found[:i])


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_values_that_are_not_finite_are_told(compiled: Lines, wrong: float) -> None:
    """An infinite or undefined result is reported, wherever it stands, an overflow in the stored dtype too."""
    for place in (0, 17, 4098):
        given = world(3, 4099)
        given.sources[1][place] = wrong
        given.sources[0][place] = -1e38 if wrong == 3e38 else 1.0
        steps = method("base | winsor(0.1) | trim(0.2, scope=model) | elect | mean | scale").bound(
            {"density": 0.9, "q": 1e-6, "scale": 7.0, "slack": 0.1}, given.site.names
        )
        _, found, expected = through(compiled, steps, given, torch.bfloat16)

        assert found is not None
        assert (found == 0.0) == bool(expected.isfinite().all())
        _, sum_found, _ = through(compiled, method("zero | mean").bound({}, given.site.names), given, torch.bfloat16)
        assert sum_found is not None
        if wrong != 3e38:
            assert sum_found != 0.0


def test_two_threads_give_the_bits_of_one(compiled: Lines) -> None:
    """A compiled line does not depend on the number of threads."""
    line, given = "base | drop | elect | mean(normalize=0) | scale", world(2, 200_001)
    steps = method(line).bound({"density": 0.5, "scale": 0.9, "slack": 0.1}, given.site.names)
    one, _, expected = through(compiled, steps, given, torch.bfloat16)
    try:
        torch.set_num_threads(2)
        two, _, _ = through(compiled, steps, given, torch.bfloat16)
    finally:
        torch.set_num_threads(1)

    assert same_bits(one, expected)
    assert same_bits(one, two)


@pytest.mark.slow
@pytest.mark.skipif("EVOMERGE_EVERY_LINE" not in os.environ, reason="takes a minute; set EVOMERGE_EVERY_LINE")
def test_every_elementwise_method(compiled: Lines) -> None:
    """All named methods whose stages are elementwise: two settings each, one program, with three sources."""
    assert len(ELEMENTWISE) >= 30
    for name in ELEMENTWISE:
        given = world(3, 4099)
        for parameters in settings(METHODS[name], given.site.names):
            assert agrees(compiled, name, given, parameters, torch.bfloat16)


def process(code: str, **environment: str) -> str:
    """Return what a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path.cwd(),
        env={name: value for name, value in os.environ.items() if name not in ("CC", "CXX")} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


MERGING = """
import torch
from evomerge.operators.fused import Lines, unavailable
from evomerge.operators.parts import Merge, Part
from evomerge.recipe import Blend

def read(part, source):
    return torch.arange(5.0) * {None: 1, "a": 2, "b": 3}[source]

print(unavailable())
part = Part(tensor="t", blend=Blend(method="task_arithmetic", weights={"a": 1.0, "b": 1.0}, parameters={}), shape=(5,))
out = torch.zeros(5)
merge = Merge([part], read, ["a", "b"], has_base=True, lines=Lines())
print(merge.write(part, out), out.tolist(), next(merge.build(part))[1].tolist())
"""


def test_without_a_compiler_the_plain_run_remains(tmp_path: Path) -> None:
    """Where no compiler is found it is said, in one line; lines are not written then, and parts are built."""
    said, written = process(MERGING, PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).splitlines()

    assert said.startswith("no working C++ compiler (")
    assert written == "False [0.0, 0.0, 0.0, 0.0, 0.0] [0.0, 4.0, 8.0, 12.0, 16.0]"


def test_no_graph_is_kept_as_a_pickle(compiled: Lines) -> None:
    """The compiler's folder has object code, and neither of the two caches whose files would be unpickled."""
    assert any(function is not None for function in compiled._compiled.values())
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    kept = {path.name for path in folder.iterdir()}

    assert kept
    assert not kept & {"fxgraph", "aotautograd"}

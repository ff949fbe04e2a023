"""What models take of memory, against the files' sizes, models that transformers builds and tables that are kept."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.evaluation.engine import Engine
from evomerge.models.footprint import building, in_pieces, weights
from evomerge.models.materialize import Blueprint
from evomerge.models.resident import Resident
from evomerge.models.stack import Stacks
from evomerge.operators.parts import PIECE
from evomerge.recipe import Blend, Recipe, Route, Source
from tests.evaluation.tiny import make_model, save

NAMES = ("base", "a", "b")


def recipe(method: str, **parameters: object) -> Recipe:
    """Return a merge of two sources over their base."""
    blend = Blend(method=method, weights={"a": 0.5, "b": 0.5}, parameters=parameters)
    base, *sources = (Source(name=name, path=name) for name in NAMES)
    return Recipe(
        sources=tuple(sources), base=base, routes=(Route(blend=blend),), layers=(0, 1, 2), dtype="float32", seed=0
    )


def memory_of(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of a model's parameters, as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def test_sources_are_as_large_as_their_files(family: dict[str, Path]) -> None:
    """All tensors of all models, base included: the files without their headers."""
    data = 0
    for folder in family.values():
        content = (folder / "model.safetensors").read_bytes()
        data += len(content) - 8 - int.from_bytes(content[:8], "little")

    assert weights(family, "float32").sources == data
    assert weights(family, "float32").sources == Resident(family).bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama0", "gpt0"])
def test_the_live_model_is_as_large_as_transformers_builds_it(tied: dict[str, Path], kind: str, dtype: str) -> None:
    """In the dtype that it computes in, whatever is stored; a tied head counts once."""
    expected = memory_of(tied[kind], getattr(torch, dtype))

    assert weights({"base": tied[kind]}, dtype).live == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stacks_need_copies_of_sources_in_another_dtype_only(tmp_path: Path, dtype: str) -> None:
    """What resident layers hold beside the sources' own memory, after each source was a candidate."""
    family = {name: save(tmp_path / name, make_model(seed=seed)) for seed, name in enumerate(NAMES)}
    sources = Resident(family)
    stacks = Stacks(family["base"], sources, dtype)
    Engine(family["base"], dtype, prepare=stacks.adopt)
    own = {sources.tensor(source, name).untyped_storage().data_ptr() for source in NAMES for name in sources.names}
    held: dict[int, int] = {}
    live = []
    for source in NAMES:
        copy = Blend(method="linear", weights={source: 1.0})
        model = Source(name=source, path=source)
        live.append(
            stacks.build(
                Recipe(sources=(model,), routes=(Route(blend=copy),), layers=(0, 1, 2), dtype=dtype, seed=0)
            ).model
        )
        for parameter in live[-1].parameters():
            where = parameter.untyped_storage().data_ptr()
            held |= {} if where in own else {where: parameter.nbytes}

    assert weights(family, dtype, stacked=True).live == sum(held.values())


def test_tables_are_counted_where_thresholds_are_asked_for(family: dict[str, Path]) -> None:
    """As much as is kept after a merge by sizes, or somewhat more; nothing where no method asks."""
    asks = recipe("ties", density={"a": 0.3, "b": 0.6}, scope="tensor")
    sources = Resident(family)
    list(Blueprint(asks, sources).stream())
    kept = sources.kept
    assert kept is not None

    foreseen = weights(family, "float32", [asks]).known
    assert foreseen / 2 < kept.nbytes <= foreseen  # type: ignore[attr-defined]  # the size of `Knowledge`
    assert weights(family, "float32", [recipe("task_arithmetic")]).known == 0


def test_building_takes_pieces_where_a_line_allows_and_whole_tensors_elsewhere() -> None:
    """Beyond a piece an elementwise line takes no more for a larger tensor; another takes in proportion to it."""
    pieces = Blend(method="task_arithmetic", weights={"a": 1.0})
    whole = Blend(method="tsv_m", weights={"a": 1.0, "b": 1.0})
    assert (in_pieces(pieces), in_pieces(whole)) == (True, False)

    small, large = (building(pieces, size * PIECE, 12, "float32", 3) for size in (1, 50))
    assert small == large
    small, large = (building(whole, size * PIECE, 12, "float32", 3) for size in (1, 50))
    assert large == 50 * small
    written = building(pieces, 50 * PIECE, 12, "float32", 3, straight=False)
    assert written - building(pieces, 50 * PIECE, 12, "float32", 3) == 50 * PIECE * (12 + 4 + 8)
    assert building(pieces, PIECE, 12, "float32", 3, straight=False, plain=False) == building(
        whole, PIECE, 12, "float32", 3
    )

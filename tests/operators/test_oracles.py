"""The operators against numbers that other projects' code produced, read from a pack of cases.

The pack is the folder in the environment variable EVOMERGE_ORACLES, by default the copy among the tests' data.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from evomerge.operators import merge
from tests.operators.conventions import Call, gates, plain, spectral, statistical

PACK = Path(os.environ.get("EVOMERGE_ORACLES") or Path(__file__).parents[1] / "data" / "oracles")
MANIFEST = json.loads((PACK / "manifest.json").read_text(encoding="utf-8"))

TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any]], Call]] = {
    **plain.TRANSLATIONS,
    **gates.TRANSLATIONS,
    **spectral.TRANSLATIONS,
    **statistical.TRANSLATIONS,
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Return every recorded tensor of the pack."""
    return load_file(PACK / MANIFEST["tensor_file"])


def model(reference: str | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the mapping that a reference stands for; a single tensor is a model of one."""
    if reference is None:
        return None
    if not reference.endswith("/"):
        return {"tensor": tensors[reference]}
    return {name.removeprefix(reference): tensor for name, tensor in tensors.items() if name.startswith(reference)}


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["id"])
def test_merge_gives_the_numbers_of_the_peer(case: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every recorded case comes out within its tolerance, with the peer's conventions said as parameters."""
    call = TRANSLATIONS[case["method"]](case)
    inputs = case["inputs"]
    base = model(inputs["base"], tensors)
    statistics = {
        call.statistics.get(kind, kind): [model(reference, tensors) for reference in references]
        for kind, references in (inputs.get("stats") or {}).items()
    }
    statistics.pop(None, None)

    merged = merge(
        call.method,
        [model(reference, tensors) for reference in inputs["models"]],
        base=base,
        weights=call.weights,
        parameters=call.parameters,
        statistics=statistics,
    )

    expected = model(case["output"], tensors)
    assert set(expected) <= set(merged)
    allowed = case["tolerance"]
    for name, theirs in expected.items():
        ours = merged[name].double()
        if case["output_kind"] == "unified_task_vector":
            ours = ours - base[name].double()
        excess = (ours - theirs.double()).abs() - allowed["atol"] - allowed["rtol"] * theirs.double().abs()
        assert float(excess.max()) <= 0, f"{name}: off by {float((ours - theirs.double()).abs().max()):.3g}"

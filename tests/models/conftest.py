"""Tiny models with random weights, made once for the tests of `evomerge.models`."""

import shutil
from pathlib import Path

import pytest

from tests.models.folders import make_gpt2, make_llama


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a Llama base and two sources."""
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "a", "b")):
        make_llama(root / name, seed)
    return {name: root / name for name in ("base", "a", "b")}


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of two tied Llamas and two GPT-2."""
    root = tmp_path_factory.mktemp("tied")
    for seed in range(2):
        make_llama(root / f"llama{seed}", seed, tied=True)
        make_gpt2(root / f"gpt{seed}", seed)
    return {name: root / name for name in ("llama0", "llama1", "gpt0", "gpt1")}


@pytest.fixture
def copy(family: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of source a that a test may damage."""
    shutil.copytree(family["a"], tmp_path / "a")
    return tmp_path / "a"

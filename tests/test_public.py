"""What `import evomerge` offers: the names on its one screen, and nothing slow to start."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import evomerge
from evomerge.cli import app
from evomerge.experiment import load
from evomerge.export import export_models
from evomerge.run import open_run
from evomerge.search import Search


def test_public_names_are_those_of_their_modules() -> None:
    """Each name of `__all__` is there, and is the object that its module has."""
    for name in evomerge.__all__:
        assert getattr(evomerge, name) is not None
    assert (evomerge.load, evomerge.open_run, evomerge.Search, evomerge.export_models) == (
        load,
        open_run,
        Search,
        export_models,
    )
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        _ = evomerge.serach


def test_the_import_alone_loads_nothing() -> None:
    """`import evomerge` imports no module of its own and no library."""
    code = "import sys, evomerge; print([n for n in sys.modules if n.startswith(('evomerge.', 'torch', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_version_is_one() -> None:
    """Command line and package say the same version."""
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"evomerge {evomerge.__version__}"


def test_python_dash_m_is_the_command_line() -> None:
    """`python -m evomerge` and the script are one program."""
    done = subprocess.run(
        [sys.executable, "-m", "evomerge", "--version"], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )

    assert done.stdout.strip() == f"evomerge {evomerge.__version__}"


def test_zoo_build_passes_folder_and_seed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`zoo build DIR --seed N` calls the builder, whose own test trains models."""
    calls = []
    monkeypatch.setattr("evomerge.zoo.build", lambda directory, seed, say: calls.append((directory, seed)))

    assert CliRunner().invoke(app, ["zoo", "build", str(tmp_path / "zoo"), "--seed", "7"]).exit_code == 0
    assert calls == [(tmp_path / "zoo", 7)]

"""The import contract of pyproject.toml holds, would notice a breach, and keeps light modules light."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What handles models or reads their headers; everything else starts without the libraries of `HEAVY`.
MODEL_MODULES = (
    "evomerge.operators",
    "evomerge.models",
    "evomerge.evaluation",
    "evomerge.zoo",
    "evomerge.experiment",
    "evomerge.search",
    "evomerge.export",
    "evomerge.oneoff",
    "evomerge.banking",
)
#: Data in these packages that must start as light as the rest: `check` reads it.
LIGHT_INSIDE = (
    "evomerge.evaluation.task",
    "evomerge.evaluation.jsonl",
    "evomerge.evaluation.files",
    "evomerge.evaluation.harness",
    "evomerge.operators",
)
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "ray", "pymoo", "optuna", "cma")

LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True, no_logo=True))
"""

IMPORT_EACH = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1])
loaded = {}
for name in names:
    importlib.import_module(name)
    for library in heavy:
        if library in sys.modules:
            loaded.setdefault(library, name)
print(json.dumps(loaded))
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contract of a folder's pyproject.toml on the package that lies there."""
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, check=False)


def light_modules() -> list[str]:
    """Return every module of the package, by name, that has no business with live models."""
    paths = sorted((ROOT / "evomerge").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    light = [name for name in names if not name.endswith("__main__") and not _inside(name, MODEL_MODULES)]
    return [*light, *LIGHT_INSIDE]


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_every_module_stands_on_its_floor() -> None:
    """Every import goes to the own package or a lower floor, and outside libraries only where they are allowed."""
    found = lint_imports(ROOT)

    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("library.py", "import evomerge.search", "Floors"),
        ("spaces/blend.py", "import evomerge.operators", "Floors"),
        ("ledger.py", "def late():\n    from evomerge import pool", "Floors"),
        ("homeless.py", "import json", "Floors"),
        ("search.py", "import torch", "torch:"),
        ("drivers/random.py", "import pymoo.core.problem", "pymoo:"),
        ("worker.py", "import ray", "ray:"),
        ("recipe.py", "from pydantic import BaseModel", "pydantic:"),
    ],
)
def test_a_breach_is_noticed(module: str, line: str, contract: str, tmp_path: Path) -> None:
    """A forbidden import, inside a function too, or a module without a floor breaks exactly that contract."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "evomerge", tmp_path / "evomerge", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "evomerge" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")

    found = lint_imports(tmp_path)
    broken = [row for row in found.stdout.splitlines() if row.endswith("BROKEN")]

    assert found.returncode == 1, found.stdout + found.stderr
    assert [row.startswith(contract) for row in broken] == [True]


def test_what_needs_no_model_starts_without_the_heavy_libraries() -> None:
    """Importing the command line, reports, drivers, pools and all values loads no library that is slow to start."""
    found = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps([light_modules(), HEAVY])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {}

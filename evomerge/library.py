"""Finds search spaces, tasks and experiments by name: first in the user's workspace, then among those that ship."""

from collections.abc import Iterator
from pathlib import Path

from evomerge.errors import ExperimentError, nearest

#: The three folders of nouns, as they are called in a workspace.
KINDS = ("search_spaces", "fitness", "experiments")

_SUFFIXES = (".yaml", ".yml")


def shipped() -> Path:
    """Return the workspace that comes with evomerge: inside an installed package, or the checkout."""
    package = Path(__file__).resolve().parent
    carried = package / "_library"
    return carried if carried.is_dir() else package.parent


def workspace(file: Path) -> Path | None:
    """Return the workspace of a file: the nearest folder above it that holds its `experiments/`."""
    for folder in file.resolve().parents:
        if folder.name == "experiments":
            return folder.parent
    return None


def find(kind: str, reference: str, near: Path, place: str) -> Path:
    """Return the file that a reference names: a path (relative to `near`'s folder), or a name.

    A name is looked up in the workspace of `near`, then among what ships.

    Args:
        kind: one of `KINDS`.
        reference: what the user wrote.
        near: the file that holds the reference.
        place: file and key path, named in errors.

    Raises:
        ExperimentError: naming the place and the nearest known name.
    """
    if reference.endswith(_SUFFIXES):
        path = (near.resolve().parent / reference).resolve()
        if path.is_file():
            return path
        raise ExperimentError(f"{place}: no file {path}; give a path relative to {near}, or a name")
    roots = [root for root in (workspace(near), shipped()) if root is not None]
    for root in roots:
        for suffix in _SUFFIXES:
            path = root / kind / f"{reference}{suffix}"
            if path.is_file():
                return path
    known = sorted({name for root in roots for name, _ in names(kind, root)})
    raise ExperimentError(f"{place}: no {kind} entry {reference!r}; {nearest(reference, known)}")


def names(kind: str, root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Yield name and file of everything of a kind in a workspace (default: what ships), sorted."""
    folder = (root or shipped()) / kind
    for path in sorted(folder.rglob("*")):
        # Hidden within the workspace, not above it: evomerge may be installed below a `.venv`.
        inside = path.relative_to(folder)
        if path.suffix in _SUFFIXES and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield inside.with_suffix("").as_posix(), path


def headline(path: Path) -> str:
    """Return the first comment line of a file: by custom, the sentence on what it is for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""

"""From a reference in an experiment to a model folder on this machine: paths first, then the hub."""

import re
from pathlib import Path

from evomerge.errors import ModelError, nearest

#: What a model needs: never a pickle, never code.
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")

_HUB = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$", re.ASCII)


def locate(reference: str, near: Path) -> Path:
    """Return the folder of a model.

    Args:
        reference: a path (relative ones start at `near`), or a hub id, with `@revision` if wanted.
        near: the folder of the file that the reference stands in.

    Raises:
        ModelError: if there is no such folder and no such model on the hub.
    """
    path = near / Path(reference).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{path}: is a file; give the folder that holds config.json and the safetensors")
    if not _HUB.match(reference) or reference.startswith("."):
        raise ModelError(f"model {reference!r}: no folder {path}; {_neighbours(path)}")
    return _from_hub(reference, path)


def called(folder: Path) -> str:
    """Return what people call the model of a folder: `organisation/name@revision` in the hub's cache, else its name."""
    owner = folder.parent.parent
    if folder.parent.name == "snapshots" and owner.name.startswith("models--"):
        return f"{owner.name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name


def _from_hub(reference: str, path: Path) -> Path:
    """Return the snapshot folder of a hub id: from the local cache if it is there, else downloaded."""
    import huggingface_hub  # slow to import, and needed only for what is not a path

    name, _, revision = reference.partition("@")
    for local in (True, False):
        try:
            found = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(PATTERNS), local_files_only=local
            )
            return Path(found)
        except Exception as problem:  # the hub client raises from four libraries
            reason = type(problem).__name__
    raise ModelError(
        f"model {reference!r}: no folder {path}, and not to be had from the hub ({reason}); {_neighbours(path)}"
    )


def _neighbours(path: Path) -> str:
    """Return the way out: the folder of the nearest name beside the one that is missing."""
    beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) if path.parent.is_dir() else []
    return nearest(path.name, beside) if beside else "give the path of a model folder or a hub id"

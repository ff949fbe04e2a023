"""The models that a file of mergekit's names: their references, folders, headers, and names in a recipe."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import RecipeError
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.locate import locate
from evomerge.recipe import Source
from evomerge.value import Plain


class Models:
    """The models of a file, each opened once.

    Args:
        file: where they are named.
    """

    def __init__(self, file: Path) -> None:
        """Know none yet."""
        self._file = file
        self._folders: dict[str, Path] = {}
        self._names: dict[str, str] = {}
        self._checkpoints: dict[str, Checkpoint] = {}

    def reference(self, given: Plain, at: str) -> str:
        """Return the reference of a model as one text."""
        if isinstance(given, Mapping):
            part = given.get("model")
            for key in ("lora", "override_architecture"):
                if given.get(key) is not None:
                    raise RecipeError(f"{self._file}.{at}.{key}: no recipe can say it; save the model to a folder")
            inner = part if isinstance(part, Mapping) else given
            found = str(inner.get("path", part))
            return f"{found}@{inner['revision']}" if inner.get("revision") else found
        if given is not None and not isinstance(given, str):
            raise RecipeError(f"{self._file}.{at}: must be a folder or a hub id, got {given!r}")
        if given and "+" in given and not self._beside(given).exists():
            raise RecipeError(f"{self._file}.{at}: {given!r} adds a LoRA; merge it into its model first, and name that")
        return given or ""

    def _beside(self, reference: str) -> Path:
        here = Path(reference)
        return here if here.exists() else self._file.parent / here

    def checkpoint(self, model: str) -> Checkpoint:
        """Return the headers of a model."""
        if model not in self._checkpoints:
            self._checkpoints[model] = Checkpoint(self.folder(model))
        return self._checkpoints[model]

    def folder(self, model: str) -> Path:
        """Return the folder of a model: from the current folder, from that of the file, or of the hub."""
        if model not in self._folders:
            here = Path(model).expanduser()
            self._folders[model] = here.resolve() if here.is_dir() else locate(model, self._file.parent)
        return self._folders[model]

    def name(self, model: str) -> str:
        """Return what a recipe calls a model: the last part of its path or hub id, with a number where it is taken."""
        if model not in self._names:
            wanted = Path(model.partition("@")[0]).name or self.folder(model).name
            taken = set(self._names.values())
            self._names[model] = next(
                name for i in range(1, len(taken) + 2) if (name := wanted if i == 1 else f"{wanted}-{i}") not in taken
            )
        return self._names[model]

    def source(self, model: str) -> Source:
        """Return a model as the source of a recipe."""
        return Source(name=self.name(model), path=str(self.folder(model)))

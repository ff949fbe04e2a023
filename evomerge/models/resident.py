"""Where `materialize` gets tensors from: read when asked for, or kept in memory for a whole search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from evomerge.errors import ModelError, nearest
from evomerge.models.checkpoint import Checkpoint, check_compatible


class Sources(Protocol):
    """Models of one architecture, by name; a base is one of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that every model has, sorted."""
        ...

    @property
    def depth(self) -> int:
        """The number of layers of every model."""
        ...

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one tensor of one model, as stored; it must not be written to."""
        ...


class OnDisk:
    """Sources that are read tensor by tensor, so that a merge needs memory for one tensor of each.

    Args:
        paths: the model folder of each source, the base included, by name.

    Raises:
        ModelError: if a folder is broken or the models do not fit each other.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Open the folders and read their headers."""
        self._checkpoints = {name: Checkpoint(path) for name, path in paths.items()}
        check_compatible(None, self._checkpoints)
        first = next(iter(self._checkpoints.values()))
        self.names = first.names
        self.depth = first.depth

    def tensor(self, source: str, name: str) -> Tensor:
        """Read one tensor of one model, as stored."""
        if source not in self._checkpoints:
            raise ModelError(f"source {source!r} is not among those opened; {nearest(source, self._checkpoints)}")
        return self._checkpoints[source].tensor(name)


class Resident:
    """Sources that are kept in memory, on one device, for a whole search.

    Args:
        paths: the model folder of each source, the base included, by name.
        device: where the tensors stay.

    Raises:
        ModelError: if a folder is broken or the models do not fit each other.
    """

    def __init__(self, paths: Mapping[str, Path], device: str = "cpu") -> None:
        """Read every tensor of every folder."""
        disk = OnDisk(paths)
        self.names = disk.names
        self.depth = disk.depth
        place = torch.device(device)
        self._tensors = {source: {name: disk.tensor(source, name).to(place) for name in disk.names} for source in paths}

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one tensor of one model, as stored; it is shared, so do not write to it."""
        if source not in self._tensors:
            raise ModelError(f"source {source!r} is not resident; {nearest(source, self._tensors)}")
        if name not in self._tensors[source]:
            raise ModelError(f"source {source!r} has no tensor {name!r}; {nearest(name, self.names)}")
        return self._tensors[source][name]

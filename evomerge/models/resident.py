"""Where `materialize` gets tensors from: read when asked for, or kept in memory for a whole search."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evomerge.errors import ModelError, nearest
from evomerge.models.checkpoint import Checkpoint, check_compatible
from evomerge.operators.facts import grams
from evomerge.operators.tables import Magnitudes, Pieces, magnitudes, union

#: Entries of which something is computed at a time, so that they stay in the processor's cache.
_PIECE = 1 << 20

#: Tables of several tensors together that are kept: whole models and layers, as few groups of them come again.
_UNIONS = 64


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

    @property
    def kept(self) -> "Kept | None":
        """What is kept about the models, if anything."""
        ...

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one tensor of one model, as stored; it must not be written to."""
        ...

    def shape(self, source: str, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor of one model, without reading it."""
        ...

    def dtype(self, source: str, name: str) -> torch.dtype:
        """Return the dtype of one tensor of one model, without reading it."""
        ...


#: A tensor of a model: the model's name and the tensor's.
Place = tuple[str, str]


class Kept(Protocol):
    """What is kept about sources because it does not depend on the genome."""

    def magnitudes(self, pairs: tuple[tuple[Place, Place], ...]) -> Magnitudes:
        """Return the magnitudes of task vectors, each of a source and a base in a tensor, all together."""
        ...

    def gram(self, sources: tuple[Place, ...], base: Place | None) -> Tensor:
        """Return the inner products of sources, or of their task vectors, in a tensor: (N, N), float64."""
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
        self.kept: Kept | None = None

    def tensor(self, source: str, name: str) -> Tensor:
        """Read one tensor of one model, as stored."""
        return self._of(source).tensor(name)

    def shape(self, source: str, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, from the header."""
        return self._of(source).shape(name)

    def dtype(self, source: str, name: str) -> torch.dtype:
        """Return the dtype of one tensor, from the header."""
        return self._of(source).dtype(name)

    def _of(self, source: str) -> Checkpoint:
        if source not in self._checkpoints:
            raise ModelError(f"source {source!r} is not among those opened; {nearest(source, self._checkpoints)}")
        return self._checkpoints[source]


class InMemory:
    """Sources that are given as tensors.

    Args:
        models: the tensors of each source, the base included, by name of the source and of the tensor; all alike.
        depth: the number of layers of every model.
    """

    def __init__(self, models: Mapping[str, Mapping[str, Tensor]], depth: int) -> None:
        """Keep the tensors; nothing is copied."""
        self._tensors = {source: dict(tensors) for source, tensors in models.items()}
        self.names = tuple(sorted(next(iter(models.values()))))
        self.depth = depth
        self.kept: Kept | None = Knowledge(self)

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors.values())

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one tensor of one model, as stored; it is shared, so do not write to it."""
        if source not in self._tensors:
            raise ModelError(f"source {source!r} is not resident; {nearest(source, self._tensors)}")
        if name not in self._tensors[source]:
            raise ModelError(f"source {source!r} has no tensor {name!r}; {nearest(name, self.names)}")
        return self._tensors[source][name]

    def shape(self, source: str, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self.tensor(source, name).shape)

    def dtype(self, source: str, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self.tensor(source, name).dtype


class Resident(InMemory):
    """Sources that stay at hand for a whole search, with what is known about them once computed.

    On the CPU the tensors are views of the files, which all processes of the machine share, so that nothing is read
    before it is used and nothing is there twice. On another device they are copied there, as many as the budget
    allows, in the order of their names; the others stay views and are moved when they are used.

    Args:
        paths: the model folder of each source, the base included, by name.
        device: where the tensors stay.
        budget: the most bytes of tensors on that device; None: all.

    Raises:
        ModelError: if a folder is broken or the models do not fit each other.
    """

    def __init__(self, paths: Mapping[str, Path], device: str = "cpu", budget: int | None = None) -> None:
        """Map every file."""
        self._checkpoints = {name: Checkpoint(path) for name, path in paths.items()}
        check_compatible(None, self._checkpoints)
        first = next(iter(self._checkpoints.values()))
        mapped = {
            source: {name: checkpoint.mapped(name) for name in first.names}
            for source, checkpoint in self._checkpoints.items()
        }
        super().__init__(mapped, first.depth)
        self.bytes_moved = 0
        if torch.device(device).type != "cpu":
            self._move(torch.device(device), budget)

    def store(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """Keep magnitude tables in a folder too, for other workers and later runs.

        Args:
            folder: content-addressed, so that it may be shared.
            say: takes a line when tables have been built: how many, how large they are and how long it took.
        """
        prints = {name: checkpoint.fingerprint for name, checkpoint in self._checkpoints.items()}
        self.kept = Knowledge(self, Tables(folder, prints), say)

    def _move(self, device: torch.device, budget: int | None) -> None:
        """Copy tensors to the device, name by name for all sources, while the budget allows."""
        for name in self.names:
            size = sum(tensors[name].nbytes for tensors in self._tensors.values())
            if budget is not None and self.bytes_moved + size > budget:
                continue
            self.bytes_moved += size
            for tensors in self._tensors.values():
                tensors[name] = tensors[name].to(device)


class Knowledge:
    """What does not depend on the genome, computed when it is first asked for and kept.

    Args:
        sources: the models that it is about.
        stored: where magnitude tables are kept between runs, if anywhere.
        say: takes a line when those of a source have been built.
    """

    def __init__(
        self, sources: Sources, stored: "Tables | None" = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Start with nothing."""
        self._sources, self._stored, self._say = sources, stored, say
        self._magnitudes: dict[tuple[tuple[Place, Place], ...], Magnitudes] = {}
        self._grams: dict[tuple[tuple[Place, ...], Place | None], Tensor] = {}
        self.seconds = 0.0

    @property
    def nbytes(self) -> int:
        """The size of what is kept."""
        tables = sum(table.nbytes for table in self._magnitudes.values())
        return tables + sum(gram.nbytes for gram in self._grams.values())

    def magnitudes(self, pairs: tuple[tuple[Place, Place], ...]) -> Magnitudes:
        """Return the magnitudes of task vectors, each of a source and a base in a tensor, all together."""
        if pairs not in self._magnitudes:
            tables = [self.magnitudes((pair,)) for pair in pairs] if len(pairs) > 1 else []
            start = time.perf_counter()
            if tables:
                unions = [key for key in self._magnitudes if len(key) > 1]
                if len(unions) >= _UNIONS:
                    del self._magnitudes[unions[0]]
                self._magnitudes[pairs] = union(tables)
            else:
                self._build(*pairs[0])
            self.seconds += time.perf_counter() - start
        return self._magnitudes[pairs]

    def _build(self, source: Place, base: Place) -> None:
        """Build one table; where tables are stored, load or build and store those of all tensors of the two models."""
        alike = self._stored is not None and source[1] == base[1]
        places = [((source[0], name), (base[0], name)) for name in self._sources.names] if alike else [(source, base)]
        places = [(one, two) for one, two in places if self._sources.dtype(*one).is_floating_point]
        pieces = {one[1]: partial(self._differences, one, two) for one, two in places}
        if self._stored is not None and alike:
            found = self._stored.load(source[0], base[0], pieces)
            if found is None:
                start = time.perf_counter()
                found = {one[1]: self._table(one, pieces[one[1]]) for one, _ in places}
                self._stored.save(source[0], base[0], found)
                size = sum(table.nbytes for table in found.values()) / 1e6
                took = time.perf_counter() - start
                self._say(f"magnitude tables of {source[0]}: {len(found)} tensors, {size:.1f} MB, {took:.1f} s")
        else:
            found = {source[1]: self._table(source, pieces[source[1]])}
        self._magnitudes |= {((one, two),): found[one[1]] for one, two in places}

    def _table(self, source: Place, pieces: Pieces) -> Magnitudes:
        return magnitudes(pieces, self._sources.tensor(*source).numel())

    def gram(self, sources: tuple[Place, ...], base: Place | None) -> Tensor:
        """Return the inner products of sources, or of their task vectors, in a tensor: (N, N), float64."""
        key = (sources, base)
        if key not in self._grams:
            start = time.perf_counter()
            pieces = zip(*(self._differences(source, base) for source in sources), strict=True)
            found: list[list[float]] = [[] for _ in range(len(sources) ** 2)]
            for piece in pieces:
                for one, more in zip(found, grams(torch.stack(piece)), strict=True):
                    one.extend(more)
            sums = torch.tensor([math.fsum(one) for one in found], dtype=torch.float64)
            self._grams[key] = sums.view(len(sources), len(sources))
            self.seconds += time.perf_counter() - start
        return self._grams[key]

    def _differences(self, source: Place, base: Place | None) -> Iterator[Tensor]:
        """Yield a source's task vector (without a base: its weights) in a tensor, float32, piece by piece."""
        full = self._sources.tensor(*source).flatten()
        origin = None if base is None else self._sources.tensor(*base).flatten()
        for start in range(0, full.numel(), _PIECE):
            piece = full[start : start + _PIECE].float()
            yield piece if origin is None else piece - origin[start : start + _PIECE].float()


class Tables:
    """Magnitude tables in files, one for each pair of a source and a base, keyed by what is in them.

    Args:
        folder: where they lie; it is made when the first is saved.
        prints: the fingerprint of each model by name.
    """

    def __init__(self, folder: Path, prints: Mapping[str, str]) -> None:
        """Touch nothing."""
        self._folder, self._prints = folder, dict(prints)

    def load(self, source: str, base: str, pieces: Mapping[str, Pieces]) -> dict[str, Magnitudes] | None:
        """Return the tables of a source by tensor, or None where they are not stored as a whole."""
        try:
            with safe_open(self._file(source, base), framework="pt") as file:
                kinds = file.metadata() or {}
                return {
                    name: Magnitudes(
                        file.get_tensor(f"bits.{name}").numpy().view(np.uint32),
                        file.get_tensor(f"counts.{name}").numpy(),
                        kinds[name] == "exact",
                        again,
                    )
                    for name, again in pieces.items()
                }
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, source: str, base: str, tables: Mapping[str, Magnitudes]) -> None:
        """Write the tables of a source; a folder that cannot be written to keeps none."""
        tensors, kinds = {}, {}
        for name, table in tables.items():
            tensors[f"bits.{name}"] = torch.from_numpy(table.bits.view(np.int32).copy())
            tensors[f"counts.{name}"] = torch.from_numpy(table.counts.astype(np.int64))
            kinds[name] = "exact" if table.exact else "bins"
        file = self._file(source, base)
        partial_file = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial_file, metadata=kinds)
            os.replace(partial_file, file)
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial_file.unlink()

    def _file(self, source: str, base: str) -> Path:
        return self._folder / f"{self._prints[source]}-{self._prints[base]}-magnitudes.safetensors"

"""How much memory models take beside the asking, from headers alone: sources, what is live, what is known, building."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from evomerge.methods import method
from evomerge.models.checkpoint import Checkpoint
from evomerge.operators.parts import PIECE, flat
from evomerge.recipe import Blend, Recipe
from evomerge.value import value

#: Tensors in float32 that the arithmetic of a line holds at once, for each model and beside them; and pieces, with what
#: the allocator of a thread keeps of those that it had.
_COPIES, _BESIDE = 4, 4
_PIECES, _PIECES_BESIDE = 8, 8

#: Bytes of an entry of a finished tensor beside its own: in float32, and while it is checked for what is not finite.
FINISHED = 8

#: Bytes of an entry of a magnitude table, and of the table of one tensor of one source at most: measured on task
#: vectors in bfloat16 and float32, whose tables have some 5,000 magnitudes or bins, however large the tensor.
_MAGNITUDE, _TABLE = 20, 110_000


@value
class Weights:
    """Bytes of memory.

    Attributes:
        sources: all tensors of all sources and of the base as stored: on the CPU mapped, so that all workers of a
            machine share them, while each has them in its resident size.
        live: what is written for candidates: the live model, or copies of sources' layers in another dtype.
        known: magnitude tables.
        building: what the arithmetic of one tensor holds at once.
    """

    sources: int
    live: int
    known: int
    building: int


def weights(
    folders: Mapping[str, Path],
    dtype: str,
    recipes: Iterable[Recipe] = (),
    *,
    stacked: bool = False,
    lasting: int = 0,
) -> Weights:
    """Return what models and the building of candidates take.

    Args:
        folders: the folders of all sources and of the base, by name.
        dtype: the dtype of the live model.
        recipes: some candidates, which stand for all.
        stacked: whether candidates are made of resident layers.
        lasting: how many sources are recipes themselves, whose layers stay once they are built.

    Raises:
        ModelError: if a folder is broken.
    """
    models = [Checkpoint(folder) for folder in folders.values()]
    stored = [sum(_bytes(one, name) for name in one.names) for one in models]
    live = sum(_bytes(models[0], name, dtype) for name in models[0].names)
    blends = {str(blend): blend for recipe in recipes for blend in recipe.blends()}.values()
    merged = any(sum(map(bool, blend.weights.values())) > 1 for blend in blends)
    if stacked:
        other = [not all(_kind(one, name, dtype) == one.dtype(name) for name in one.names) for one in models]
        live = live * (sum(other) + lasting + 2 * merged)  # what is merged stays for its stack and for the next
    tables = any("density" in blend.parameters for blend in blends)
    sizes = [(math.prod(models[0].shape(name)), models[0].dtype(name).itemsize) for name in models[0].names]
    entries, size = max(sizes)
    takes = [building(blend, entries, size * len(models), dtype, len(models)) for blend in blends]
    return Weights(
        sources=sum(stored),
        live=live,
        known=sum(min(_MAGNITUDE * count, _TABLE) for count, _ in sizes) * (len(models) - 1) * tables,
        building=max(takes, default=0),
    )


def building(
    blend: Blend, entries: int, stored: int, dtype: str, models: int, *, straight: bool = True, plain: bool = True
) -> int:
    """Return the bytes that building one tensor needs.

    Args:
        blend: how it is built.
        entries: how many it has.
        stored: bytes of an entry in all models together, as they are read.
        dtype: of the tensor that is built.
        models: how many models go into it.
        straight: whether a line that is run on pieces writes straight into the live model.
        plain: whether the tensors of all models are used as they lie on the disk.
    """
    finished = entries * (stored + int(getattr(torch, dtype).itemsize) + FINISHED)
    if plain and in_pieces(blend):
        own = 4 * min(entries, PIECE) * (_PIECES * models + _PIECES_BESIDE)
        return own if straight else finished + own
    return finished + 4 * entries * (_COPIES * models + _BESIDE)


def in_pieces(blend: Blend) -> bool:
    """Tell whether a blend is run on flat pieces of its tensors."""
    taking: Sequence[str] = [name for name, weight in blend.weights.items() if weight]
    return flat(method(blend.method).bound(blend.parameters, taking))


def _kind(model: Checkpoint, name: str, dtype: str) -> torch.dtype:
    """Return the dtype that a tensor has in a live model."""
    stored = model.dtype(name)
    declared: torch.dtype = getattr(torch, dtype)
    return declared if stored.is_floating_point else stored


def _bytes(model: Checkpoint, name: str, dtype: str | None = None) -> int:
    """Return the size of a tensor: as stored, or in a live model of a dtype."""
    kind = model.dtype(name) if dtype is None else _kind(model, name, dtype)
    return math.prod(model.shape(name)) * kind.itemsize

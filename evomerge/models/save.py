"""From a stream of tensors to a model folder that plain transformers loads: whole, or not there at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.errors import ModelError
from evomerge.models.architecture import place, renamed, reshaped
from evomerge.models.checkpoint import Checkpoint

#: Size of a shard unless told otherwise, in bytes.
SHARD_BYTES = 5 * 10**9


def save(
    stream: Iterable[tuple[str, Tensor]],
    template: Checkpoint,
    directory: Path,
    *,
    dtype: str,
    extra_files: Mapping[str, str] | None = None,
    depths: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write a model folder: shards, config, generation config, tokenizer and further text files.

    Everything goes to `.<name>.partial-<process>` beside the folder, is flushed to disk, and is
    renamed at the end, so that an interruption leaves nothing that looks like a model.

    Args:
        stream: (name, tensor) as `materialize` yields them.
        template: the model whose config, tokenizer and tensor names the new one has.
        directory: the folder to make; its parent is made where it is missing.
        dtype: the declared dtype; every floating point tensor must have it.
        extra_files: text by file name, such as recipe.yaml and README.md.
        depths: the template's layer that each new layer comes from; None for all, once, in order.
        shard_bytes: a new shard is begun before one would grow beyond this.
        replace: whether an existing folder gives way; otherwise it is refused.

    Raises:
        ModelError: if the folder exists, or tensors are missing, unknown, twice there, of another
            shape or of another dtype.
    """
    directory = Path(directory)
    if directory.exists() and not replace:
        raise ModelError(f"{directory}: exists already; remove it or choose another folder")
    layers = list(range(template.depth)) if depths is None else list(depths)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_tensors(stream, _expected(template, layers), partial, dtype, shard_bytes)
        _write_json(partial / "config.json", reshaped(template.config, layers, dtype))
        _copy_files(template, partial)
        for name, text in (extra_files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        _flush(partial)
        _swap(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _expected(template: Checkpoint, depths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the new model must have, by name."""
    places = {name: place(name, template.depth) for name in template.names}
    found = {name: template.shape(name) for name, at in places.items() if at.layer is None}
    for k, depth in enumerate(depths):
        found |= {renamed(name, k): template.shape(name) for name, at in places.items() if at.layer == depth}
    return found


def _write_tensors(
    stream: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Write the stream to shards, with an index where there is more than one."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0
    seen: set[str] = set()

    def finish() -> None:
        # The name says how many shards there are, so it is given at the end.
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in stream:
        _check(name, tensor, expected, seen, dtype)
        seen.add(name)
        if shard and size + tensor.nbytes > shard_bytes:
            finish()
            size = 0
        shard[name] = tensor.detach().to("cpu").contiguous().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    missing = sorted(set(expected) - seen)
    if missing:
        raise ModelError(f"the model to save lacks {len(missing)} tensors, the first is {missing[0]!r}")
    finish()
    _name_shards(shards, total, folder)


def _name_shards(shards: Sequence[Sequence[str]], total: int, folder: Path) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _check(name: str, tensor: Tensor, expected: Mapping[str, tuple[int, ...]], seen: set[str], dtype: str) -> None:
    if name not in expected:
        raise ModelError(f"tensor {name!r} has no place in the model to save")
    if name in seen:
        raise ModelError(f"tensor {name!r} comes twice")
    if tuple(tensor.shape) != expected[name]:
        raise ModelError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model to save {expected[name]}")
    if tensor.is_floating_point() and tensor.dtype != getattr(torch, dtype):
        raise ModelError(f"tensor {name!r} is {tensor.dtype}, but {dtype} is declared")


def _copy_files(template: Checkpoint, folder: Path) -> None:
    for file in (template.path / "generation_config.json", *template.tokenizer_files):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Force files and folder to disk, so that the rename never outlives its content."""
    mode = (folder / "config.json").stat().st_mode
    for path in (*folder.iterdir(), folder):
        if path != folder:
            path.chmod(mode)  # safetensors makes its files for their owner alone, whatever the user's umask says
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, directory: Path) -> None:
    """Put the finished folder in place; an old one is moved aside first and then removed."""
    old = directory.parent / f".{directory.name}.old-{os.getpid()}"
    if directory.exists():
        os.replace(directory, old)
    try:
        os.replace(partial, directory)
    except BaseException:
        if old.exists():
            os.replace(old, directory)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)

"""From a stream of tensors to a model folder that plain transformers loads: whole, or not there at all."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import FULL, EvomergeError, ModelError, unwritten
from evomerge.models.architecture import place, renamed, reshaped, text_part
from evomerge.models.checkpoint import Checkpoint
from evomerge.value import value

#: Size of a shard unless told otherwise, in bytes.
SHARD_BYTES = 5 * 10**9

#: What headers of safetensors call the dtypes.
_WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@value
class _Slot:
    """Where one tensor of the new model goes: its shard and its first and last byte among the shard's data."""

    shard: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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

    Where each tensor goes is known before the first comes, so that each is written at once and none is kept.
    Everything goes to `.<name>.partial-<process>` beside the folder, is flushed to disk, and is
    renamed at the end, so that an interruption leaves nothing that looks like a model.

    Args:
        stream: (name, tensor) as `materialize` yields them.
        template: the model whose config, tokenizer and tensor names the new one has.
        directory: the folder to make; its parent is made where it is missing.
        dtype: the declared dtype; every floating point tensor must have it, others the dtype that the template stores.
        extra_files: text by file name, such as recipe.yaml and README.md.
        depths: the template's layer that each new layer comes from; None for all, once, in order.
        shard_bytes: a new shard is begun before one would grow beyond this.
        replace: whether an existing folder gives way; otherwise it is refused.

    Raises:
        ModelError: if the folder exists, or tensors are missing, unknown, twice there, of another
            shape or of another dtype.
        EvomergeError: if the disk is full.
    """
    directory = Path(directory)
    if directory.exists() and not replace:
        raise ModelError(f"{directory}: exists already; remove it or choose another folder")
    layers = list(range(template.depth)) if depths is None else list(depths)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    slots = _slots(template, layers, dtype, shard_bytes)
    partial.mkdir()
    try:
        _write_tensors(stream, slots, partial)
        _write_json(partial / "config.json", reshaped(_full_config(template, layers), layers, dtype))
        _copy_files(template, partial)
        for name, text in (extra_files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        _flush(partial)
        _swap(partial, directory)
    except BaseException as problem:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(problem, OSError) and problem.errno in FULL:
            way = f"write the model again: it needs {sum(slot.bytes for slot in slots.values()) / 1e6:,.1f} MB"
            raise EvomergeError(unwritten(directory, problem, way)) from None
        raise


def _full_config(template: Checkpoint, depths: Sequence[int]) -> dict[str, Any]:
    """Return the template's config, with the kinds of its layers where their order is about to change.

    Where a config leaves them out, transformers derives them from the layers' numbers.
    """
    config = template.config
    if list(depths) == list(range(template.depth)) or "layer_types" in text_part(config):
        return config
    from transformers import AutoConfig

    try:
        kinds = getattr(AutoConfig.from_pretrained(template.path).get_text_config(), "layer_types", None)
    except (OSError, ValueError, KeyError):  # no architecture of transformers' own: nothing is derived there
        kinds = None
    if kinds and len(kinds) == template.depth:
        part = config["text_config"] if text_part(config) is not config else config
        part["layer_types"] = list(kinds)
    return config


def _slots(template: Checkpoint, depths: Sequence[int], dtype: str, shard_bytes: int) -> dict[str, _Slot]:
    """Return a place for every tensor that the new model must have, by name: embedding, layers, head."""
    shards: list[dict[str, _Slot]] = [{}]
    size = 0
    for name, origin in _expected(template, depths):
        stored = template.dtype(origin)
        kind = getattr(torch, dtype) if stored.is_floating_point else stored
        slot = _Slot(shard=len(shards) - 1, shape=template.shape(origin), dtype=kind)
        if shards[-1] and size + slot.bytes > shard_bytes:
            slot = dataclasses.replace(slot, shard=len(shards))
            shards.append({})
            size = 0
        shards[-1][name] = slot
        size += slot.bytes
    return {name: slot for shard in shards for name, slot in _laid_out(shard).items()}


def _expected(template: Checkpoint, depths: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield the name of every tensor of the new model, and of the template's tensor that has its shape."""
    places = {name: place(name, template.depth) for name in template.names}
    yield from ((name, name) for name, at in places.items() if at.end == "embedding")
    for k, depth in enumerate(depths):
        yield from ((renamed(name, k), name) for name, at in places.items() if at.layer == depth)
    yield from ((name, name) for name, at in places.items() if at.end == "head")


def _laid_out(shard: Mapping[str, _Slot]) -> dict[str, _Slot]:
    """Put the tensors of a shard one behind the other; those of wider entries first, so that all are aligned."""
    found: dict[str, _Slot] = {}
    start = 0
    for name, slot in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):
        found[name] = dataclasses.replace(slot, start=start)
        start += slot.bytes
    return found


def _write_tensors(stream: Iterable[tuple[str, Tensor]], slots: Mapping[str, _Slot], folder: Path) -> None:
    """Write each tensor of the stream to its place as it comes, so that none is kept."""
    files = _begin(slots, folder)
    seen: set[str] = set()
    for name, tensor in stream:
        _check(name, tensor, slots, seen)
        seen.add(name)
        file, begin = files[slots[name].shard]
        with file.open("r+b") as out:
            out.seek(begin + slots[name].start)
            out.write(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    missing = sorted(set(slots) - seen)
    if missing:
        raise ModelError(f"the model to save lacks {len(missing)} tensors, the first is {missing[0]!r}")


def _begin(slots: Mapping[str, _Slot], folder: Path) -> list[tuple[Path, int]]:
    """Write the headers of all shards, and an index where there is more than one; return files and where data begin."""
    count = 1 + max(slot.shard for slot in slots.values())
    single = folder / "model.safetensors"
    files = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [single]
    begins = []
    for i, file in enumerate(files):
        header = _header({name: slot for name, slot in slots.items() if slot.shard == i})
        file.write_bytes(header)
        begins.append(len(header))
    if count > 1:
        total = sum(slot.bytes for slot in slots.values())
        weight_map = {name: files[slot.shard].name for name, slot in sorted(slots.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return list(zip(files, begins, strict=True))


def _header(shard: Mapping[str, _Slot]) -> bytes:
    """Return what stands before the data of a shard: the header's length, and the header."""
    entries = {
        name: {
            "dtype": _WORDS[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.start, slot.start + slot.bytes],
        }
        for name, slot in shard.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def _check(name: str, tensor: Tensor, slots: Mapping[str, _Slot], seen: set[str]) -> None:
    if name not in slots:
        raise ModelError(f"tensor {name!r} has no place in the model to save")
    if name in seen:
        raise ModelError(f"tensor {name!r} comes twice")
    slot = slots[name]
    if tuple(tensor.shape) != slot.shape:
        raise ModelError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model to save {slot.shape}")
    if tensor.dtype != slot.dtype:
        declared = str(slot.dtype).removeprefix("torch.")
        raise ModelError(f"tensor {name!r} is {tensor.dtype}, but {declared} is declared")


def _copy_files(template: Checkpoint, folder: Path) -> None:
    for file in (template.path / "generation_config.json", *template.tokenizer_files):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Force files and folder to disk, so that the rename never outlives its content."""
    for path in (*folder.iterdir(), folder):
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

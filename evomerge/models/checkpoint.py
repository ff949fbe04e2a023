"""A lazy, read-only view of a model folder: config, safetensors headers, tensors when asked for."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.errors import ModelError, nearest
from evomerge.models.architecture import is_head, place, read_config, read_json, text_part
from evomerge.models.locate import locate
from evomerge.value import value

__all__ = ["TOKENIZER_FILES", "Checkpoint", "Entry", "check_compatible", "locate"]

#: Files that make up a tokenizer, copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

#: How much of a shard goes into the fingerprint: this many blocks of this many bytes.
_BLOCKS, _BLOCK = 256, 4096

#: Keys of configs that say how a layer's tensors are cut into heads: equal shapes may hide other heads.
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "head_dim")

#: Keys of configs that say what a layer computes besides.
_SETTINGS = (
    "hidden_act", "hidden_activation", "activation_function", "layer_types", "sliding_window", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters",
    "rotary_pct", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "use_parallel_residual",
    "residual_multiplier", "attention_multiplier", "no_rope_layers", "mlp_only_layers",
)  # fmt: skip

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@value
class Entry:
    """One tensor as a shard's header describes it; `dtype` in the words of safetensors, `start` its first byte."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Checkpoint:
    """A model folder: one `model.safetensors`, or shards with `model.safetensors.index.json`.

    Opening reads config and headers, never tensors. Where the config ties the output head to
    the embedding, a head that is stored all the same is no tensor of its own and is left out
    of `names` (and refused if its values differ).

    Raises:
        ModelError: if a part is missing or broken; one line with the file and the way out.
    """

    def __init__(self, path: Path) -> None:
        """Read config and headers of the folder."""
        self.path = Path(path)
        self.architecture, self._config = read_config(self.path)
        self._entries = _entries(self.path)
        self._maps: dict[Path, Tensor] = {}
        self._check_layers()
        self._settle_head()

    def __repr__(self) -> str:
        """Show the folder."""
        return f"Checkpoint({str(self.path)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """A copy of config.json; changing it changes nothing here."""
        return copy.deepcopy(self._config)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._entries))

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.architecture.depth

    @property
    def parameters(self) -> int:
        """The number of elements of all floating point tensors."""
        return sum(torch.Size(self.shape(name)).numel() for name in self._entries if self.dtype(name).is_floating_point)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored, from the header."""
        return _DTYPES[self._entry(name).dtype]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor to the CPU, as stored.

        Raises:
            ModelError: if there is none of this name, or its shard cannot be read any more.
        """
        entry = self._entry(name)
        try:
            with safe_open(entry.shard, framework="pt") as shard:
                return shard.get_tensor(name)  # type: ignore[no-any-return]  # safetensors is not annotated
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"{entry.shard}: cannot read {name!r} ({_line(problem)}); copy the file again") from None

    def mapped(self, name: str) -> Tensor:
        """Return a tensor as a view of its shard in memory; it must not be written to.

        Nothing is read before it is used, and all processes of the machine that map the file share its pages.

        Raises:
            ModelError: if there is none of this name, or its shard cannot be opened any more.
        """
        entry = self._entry(name)
        kind = _DTYPES[entry.dtype]
        if entry.start % kind.itemsize:
            return self.tensor(name)
        if entry.shard not in self._maps:
            try:
                size = entry.shard.stat().st_size
                whole = torch.from_file(str(entry.shard), shared=False, size=size, dtype=torch.uint8)
            except (OSError, RuntimeError) as problem:
                raise ModelError(f"{entry.shard}: cannot be opened ({_line(problem)}); copy the file again") from None
            self._maps[entry.shard] = whole
        count = torch.Size(entry.shape).numel() * kind.itemsize
        return self._maps[entry.shard][entry.start : entry.start + count].view(kind).view(entry.shape)

    @cached_property
    def fingerprint(self) -> str:
        """The content address: 16 hexadecimal digits of SHA-256 over config, headers and samples of the bytes.

        A shard up to 1 MiB is read whole; of a greater one 256 blocks of 4 KiB spread evenly.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard in sorted({entry.shard for entry in self._entries.values()}):
            digest.update(shard.name.encode())
            _sample(shard, digest)
        return digest.hexdigest()[:16]

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that are in the folder."""
        return tuple(self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file())

    @cached_property
    def vocabulary(self) -> str | None:
        """A digest of what maps text to token numbers; None if the folder has no tokenizer."""
        fast = self.path / "tokenizer.json"
        if fast.is_file():
            return _fast_vocabulary(fast)
        slow = [self.path / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")]
        found = [file for file in slow if file.is_file()]
        if not found:
            return None
        return hashlib.sha256(b"\x00".join(file.read_bytes() for file in found)).hexdigest()[:16]

    def _check_layers(self) -> None:
        """Refuse tensors of layers that the config does not have, and layers without tensors."""
        try:
            layers = {place(name, self.depth).layer for name in self._entries}
        except ModelError as problem:
            raise ModelError(f"{self.path}: {problem}") from None
        for layer in range(self.depth):
            if layer not in layers:
                raise ModelError(
                    f"{self.path}: config.json says that there are {self.depth} layers, but layer {layer} "
                    "has no tensor; copy the missing shards or correct the config"
                )

    def _settle_head(self) -> None:
        """Leave out a stored head that is the embedding; where the config is silent, a stored head is its own."""
        heads = [name for name in self._entries if is_head(name)]
        if not (heads and self.architecture.tied):
            return
        if not _says_tied(self._config):
            self.architecture = dataclasses.replace(self.architecture, tied=False)
            return
        embeddings = [name for name in self._entries if place(name, self.depth).end == "embedding"]
        for head in heads:
            if not any(torch.equal(self.tensor(head), self.tensor(name)) for name in embeddings):
                raise ModelError(
                    f"{self.path}: config.json ties the head to the embedding, but {head!r} is another tensor; "
                    "set tie_word_embeddings to false or remove the tensor"
                )
            del self._entries[head]

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ModelError(f"{self.path}: has no tensor {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]


def check_compatible(base: Checkpoint | None, sources: Mapping[str, Checkpoint]) -> None:
    """Refuse models that cannot be merged tensor by tensor; reads headers and tokenizers only.

    Raises:
        ModelError: naming the source, what differs and from which model.
    """
    models = {**({} if base is None else {"base": base}), **sources}
    if not models:
        raise ModelError("no model is given; name at least one source")
    (reference, first), *others = models.items()
    for name, other in others:
        _check_architecture(reference, first, name, other)
        _check_settings(reference, first, name, other, _HEADS, "merge models of one architecture")
        _check_tensors(reference, first, name, other)
        if None not in (first.vocabulary, other.vocabulary) and first.vocabulary != other.vocabulary:
            raise ModelError(
                f"source {name!r} ({other.path}): its tokenizer has another vocabulary than {reference!r}; "
                "merge models with one tokenizer"
            )


def _check_architecture(reference: str, first: Checkpoint, name: str, other: Checkpoint) -> None:
    for field, words in (("model_type", "model_type"), ("depth", "the number of layers"), ("hidden", "hidden size"),
                         ("tied", "tie_word_embeddings"), ("vocabulary", "vocab_size")):  # fmt: skip
        mine, theirs = getattr(first.architecture, field), getattr(other.architecture, field)
        if mine != theirs:
            raise ModelError(
                f"source {name!r} ({other.path}): {words} is {theirs} but {mine} in {reference!r}; "
                "merge models of one architecture"
            )


def check_stackable(sources: Mapping[str, Checkpoint]) -> None:
    """Refuse models whose layers would compute differently in each other's place; reads configs only.

    Raises:
        ModelError: naming the source, what differs and from which model.
    """
    (reference, first), *others = sources.items()
    for name, other in others:
        _check_settings(reference, first, name, other, _SETTINGS, "a layer would compute otherwise in its place")


def _check_settings(
    reference: str, first: Checkpoint, name: str, other: Checkpoint, keys: Sequence[str], why: str
) -> None:
    mine, theirs = text_part(first.config), text_part(other.config)
    for key in keys:
        if None not in (mine.get(key), theirs.get(key)) and mine[key] != theirs[key]:
            raise ModelError(
                f"source {name!r} ({other.path}): {key} is {theirs[key]} but {mine[key]} in {reference!r}; {why}"
            )


def _check_tensors(reference: str, first: Checkpoint, name: str, other: Checkpoint) -> None:
    for tensor in first.names:
        if tensor not in other.names:
            raise ModelError(f"source {name!r} ({other.path}): lacks tensor {tensor!r} that {reference!r} has")
        if first.shape(tensor) != other.shape(tensor):
            raise ModelError(
                f"source {name!r} ({other.path}): tensor {tensor!r} has shape {other.shape(tensor)} "
                f"but {first.shape(tensor)} in {reference!r}"
            )
    extra = sorted(set(other.names) - set(first.names))
    if extra:
        raise ModelError(f"source {name!r} ({other.path}): has tensor {extra[0]!r} that {reference!r} lacks")


def _says_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", text_part(config).get("tie_word_embeddings", False)))


def _entries(folder: Path) -> dict[str, Entry]:
    """Return all tensors of a folder by name, from the headers of its shards."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return _sharded(folder, index)
    if single.is_file():
        return _header(single)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelError(
            f"{folder}: has {pickles[0]} but no safetensors; pickles are never loaded, convert it "
            "with save_pretrained of transformers"
        )
    raise ModelError(f"{folder}: has no model.safetensors and no model.safetensors.index.json; copy the weights")


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to files; copy the file again")
    headers = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(f"{index}: names the shard {shard!r}, which is not in the folder; copy it there")
        headers[shard] = _header(folder / shard)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ModelError(f"{folder / shard}: lacks tensor {name!r} that the index places there; copy it again")
    for shard, header in headers.items():
        stray = sorted(set(header) - {name for name, at in weight_map.items() if at == shard})
        if stray:
            raise ModelError(f"{folder / shard}: has tensor {stray[0]!r} that the index does not place there")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _header(file: Path) -> dict[str, Entry]:
    """Read a safetensors header and check that the bytes it promises are there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if size >= 8 and length <= size - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {
            name: Entry(
                shard=file,
                shape=tuple(entry["shape"]),
                dtype=entry["dtype"],
                start=8 + length + int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise ModelError(f"{file}: not a safetensors file, or cut off in its header; copy it again") from None
    if end != size:
        raise ModelError(f"{file}: has {size} bytes where its header says {end}; copy it again")
    for name, entry in found.items():
        if entry.dtype not in _DTYPES:
            raise ModelError(f"{file}: tensor {name!r} has dtype {entry.dtype}, which is not read; convert it")
    return found


def _sample(file: Path, digest: "hashlib._Hash") -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(length))
        if size <= _BLOCKS * _BLOCK:
            digest.update(stream.read())
            return
        for i in range(_BLOCKS):
            stream.seek(8 + length + i * max(0, size - 8 - length - _BLOCK) // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))


def _fast_vocabulary(file: Path) -> str:
    tokenizer = read_json(file)
    model = tokenizer.get("model") or {}
    added = [(token.get("id"), token.get("content")) for token in tokenizer.get("added_tokens") or []]
    text = json.dumps([model.get("vocab"), model.get("merges"), added], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())

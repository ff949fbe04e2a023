"""What a model's config and tensor names say about its layers: no table per architecture."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.value import value

#: Configs name one thing in several ways; the first that is present counts.
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_VOCABULARY = ("vocab_size",)

#: Config keys that list the indices of the layers that are special.
_INDEX_LISTS = ("mlp_only_layers",)

#: How the names of output heads end.
HEADS = ("lm_head.weight", "embed_out.weight")

_LAYER = re.compile(r"^(?P<before>.+?)\.(?P<index>\d+)\.(?P<after>.+)$")
_NORM = re.compile(r"norm|(^|_)ln(_|$)")
_EMBEDDING = re.compile(r"embed(?!_out)|(^|\.)wte\.|(^|\.)wpe\.")


@value
class Architecture:
    """What all sources of a merge must share; `tied`: the output head is the embedding."""

    model_type: str
    depth: int
    hidden: int
    tied: bool
    vocabulary: int


@value
class Place:
    """Where a tensor stands: in a layer, with its module group, or (`layer` None) at one end."""

    layer: int | None
    group: str
    end: str | None = None


def read_config(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """Read `config.json` of a model folder.

    Returns:
        The architecture, and the whole config as a fresh dictionary.

    Raises:
        ModelError: if folder or file are missing, broken, or lack what an architecture needs.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; give the path of a model folder")
    if not file.is_file():
        raise ModelError(f"{path}: has no config.json; give a folder as save_pretrained writes it")
    config = read_json(file)
    part = text_part(config)
    architecture = Architecture(
        model_type=str(config.get("model_type", "")),
        depth=_number(part, _DEPTH, file),
        hidden=_number(part, _HIDDEN, file),
        tied=bool(config.get("tie_word_embeddings", part.get("tie_word_embeddings", True))),
        vocabulary=_number(part, _VOCABULARY, file),
    )
    return architecture, config


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: naming file, line and column if it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        at = f"line {problem.lineno} column {problem.colno}"
        raise ModelError(f"{file}: broken JSON at {at} ({problem.msg}); copy the file again") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"{file}: cannot be read ({problem}); copy the file again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(found).__name__}; copy the file again")
    return found


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model (models with images nest it)."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def split(name: str) -> tuple[str, int, str] | None:
    """Split a tensor name at its layer: what comes before, the index, what comes after; None outside layers.

    >>> split("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3, 'mlp.up_proj.weight')
    """
    found = _LAYER.match(name)
    return (found["before"], int(found["index"]), found["after"]) if found else None


def place(name: str, depth: int) -> Place:
    """Return where a tensor stands in a model of this depth.

    Inside a layer the group follows from the first component after the index; outside, names
    of embeddings stand before the first layer and everything else after the last.

    Raises:
        ModelError: if the name has a layer index that the depth does not allow.

    >>> place("model.layers.3.self_attn.q_proj.weight", 4)
    Place(layer=3, group='attention', end=None)
    """
    parts = split(name)
    if parts is None:
        return Place(layer=None, group="other", end="embedding" if _EMBEDDING.search(name) else "head")
    _, index, after = parts
    if index >= depth:
        raise ModelError(f"tensor {name!r} is of layer {index}, but config.json says that there are {depth} layers")
    return Place(layer=index, group=_group(after.split(".")[0].lower()))


def is_head(name: str) -> bool:
    """Tell whether a tensor is the weight of an output head, whatever the file calls it."""
    return name.endswith(HEADS)


def renamed(name: str, layer: int) -> str:
    """Return the name that a layer's tensor has when it stands in another layer."""
    parts = split(name)
    if parts is None:
        raise ValueError(f"tensor {name!r} is not of a layer")
    return f"{parts[0]}.{layer}.{parts[2]}"


def reshaped(config: Mapping[str, Any], depths: Sequence[int], dtype: str) -> dict[str, Any]:
    """Return a copy of a config for a model whose layer k is layer depths[k] of the original.

    Every per-layer list follows the layers; the original is not touched.
    """
    new = copy.deepcopy(dict(config))
    old = _number(text_part(new), _DEPTH, Path("config.json"))
    for part in {id(part): part for part in (new, text_part(new))}.values():
        _reshape(part, old, depths, dtype)  # type: ignore[arg-type]  # parts of the deep copy are dictionaries
    new["dtype"] = dtype
    return new


def _reshape(part: dict[str, Any], old: int, depths: Sequence[int], dtype: str) -> None:
    """Rewrite one part of a config in place; see `reshaped`."""
    for key, given in part.items():
        if key in ("dtype", "torch_dtype"):
            part[key] = dtype
        elif key in _DEPTH and given == old:
            part[key] = len(depths)
        elif key in _INDEX_LISTS and isinstance(given, list):
            part[key] = [k for k, depth in enumerate(depths) if depth in given]
        elif isinstance(given, list) and "layer" in key and len(given) == old:
            part[key] = [given[depth] for depth in depths]


def _group(component: str) -> str:
    if _NORM.search(component):
        return "other"
    if "attn" in component or "attention" in component:
        return "attention"
    if any(word in component for word in ("mlp", "ffn", "feed_forward", "fc1", "fc2", "experts", "moe")):
        return "mlp"
    return "other"


def _number(config: Mapping[str, Any], keys: Sequence[str], file: Path) -> int:
    for key in keys:
        if key in config:
            if isinstance(config[key], int) and config[key] > 0:
                return int(config[key])
            raise ModelError(f"{file}: {key} must be a positive whole number, got {config[key]!r}")
    raise ModelError(f"{file}: lacks {keys[0]}; evomerge merges decoder language models of transformers")

"""Builds a live model and its tokenizer from a folder, and tells what the model can be fed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError

#: Kinds of layers whose keys and values can be kept by position and gone on from; and all that have nothing else.
_BY_POSITION = {"full_attention", "sliding_attention"}
_ATTENTION = {*_BY_POSITION, "chunked_attention"}


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model can be fed.

    Attributes:
        caches: whether keys and values can be kept and gone on from.
        positions: whether it can be told positions, so that padding may stand between tokens.
        state: whether it can go on with a state that it made itself.
        window: the shortest sliding window of its attention, where it has one: beyond it, padding would be counted.
    """

    caches: bool
    positions: bool
    state: bool
    window: int | None = None


def build(folder: Path, dtype: torch.dtype, trust_remote_code: bool, pretrained: bool) -> tuple[Any, Any]:
    """Return tokenizer and model; unless pretrained, the model's weights are whatever memory held."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a transformers model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if pretrained:
            model = _load_plainly(folder, trust_remote_code)
        else:
            # random initial weights would cost minutes for a large model, and move the global random stream
            with torch.random.fork_rng(devices=[]), no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            model.tie_weights()
        # Else some models warn when a generated token happens to be it; past the check of its type, which some have.
        vars(model.config)["pad_token_id"] = None
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{folder}: transformers cannot build it ({type(problem).__name__}: {reason})") from None
    if model.dtype != dtype:
        raise ModelError(f"{folder}: loads as {model.dtype}, but {dtype} is declared; check dtype in its config.json")
    return tokenizer, model.eval().requires_grad_(False)


def _load_plainly(folder: Path, trust_remote_code: bool) -> Any:
    """Return the model as a user's one line loads it: no dtype is named, so config.json's must be right."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)


def end_tokens(folder: Path, model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a sequence, from all three places that may name some."""
    named = [tokenizer.eos_token_id, model.config.get_text_config().eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        named.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    flat = [token for one in named for token in (one if isinstance(one, list) else [one])]
    return frozenset(token for token in flat if token is not None)


def abilities_of(model: Any, accepts: frozenset[str]) -> Abilities:
    """Return what a model can be fed, as far as its class and config tell.

    Keys and values are gone on from only where they are kept by position and by layer: not in models with another
    state, and not in code that is not transformers' own.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    flagged = bool(getattr(model, "_is_stateful", False))
    # a state that every token goes into takes in padding too, so there must be none
    stateful = flagged or not kinds <= _ATTENTION
    plain = type(model).__module__.startswith("transformers.models.") and kinds <= _BY_POSITION
    shared = bool(getattr(config, "num_kv_shared_layers", 0))
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_window_size", "window_size")]
    slides = getattr(config, "use_sliding_window", True) and kinds != {"full_attention"}
    return Abilities(
        caches=plain and not stateful and not shared and "past_key_values" in accepts,
        positions=not stateful and {"position_ids", "past_key_values"} <= accepts,
        state="past_key_values" in accepts and (flagged or not stateful),
        window=min((size for size in windows if isinstance(size, int)), default=None) if slides else None,
    )

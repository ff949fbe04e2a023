"""Greedy decoding of a batch of prompts with the model's own key-value cache.

Legend of shapes: B rows, T tokens of a prompt, V tokens of the vocabulary.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation.plan import Prompts


@dataclass(frozen=True, kw_only=True)
class Stops:
    """What ends an answer.

    Attributes:
        texts: the stop texts.
        ends_V: tokens that end an answer by themselves: end of sequence, and stop texts that are special tokens.
        suspects_V: tokens that may complete a stop text.
    """

    texts: tuple[str, ...]
    ends_V: Tensor
    suspects_V: Tensor


def make_stops(tokenizer: Any, ends: Collection[int], texts: Sequence[str], vocabulary: int, device: str) -> Stops:
    """Return what ends an answer, for one tokenizer and one task's stop texts.

    A token is a suspect when its text holds the last character of a stop text, or an incomplete
    character; so only a few rows have to be decoded while others are still going.
    """
    special = {tokenizer.convert_tokens_to_ids(text) for text in texts if text in tokenizer.all_special_tokens}
    ends_V = torch.zeros(vocabulary, dtype=torch.bool)
    ends_V[[token for token in {*ends, *special} if 0 <= token < vocabulary]] = True
    suspects_V = torch.zeros(vocabulary, dtype=torch.bool)
    if texts:
        marks = {text[-1] for text in texts} | {"\ufffd"}
        known = range(min(len(tokenizer), vocabulary))
        # decoded after another token: many tokenizers drop a blank at the very start of a text
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        start = len(tokenizer.decode(anchor))
        decoded = tokenizer.batch_decode([[*anchor, token] for token in known], skip_special_tokens=True)
        for token, text in zip(known, decoded, strict=True):
            suspects_V[token] = any(mark in text[start:] for mark in marks)
    return Stops(texts=tuple(texts), ends_V=ends_V.to(device), suspects_V=suspects_V.to(device))


def continue_greedily(
    forward: Callable[..., Any], prompts: Prompts, stops: Stops, longest: int, text: Callable[[tuple[int, ...]], str]
) -> tuple[list[tuple[int, ...]], bool]:
    """Continue each prompt by its likeliest token, until all rows have ended or are `longest` tokens long.

    Args:
        forward: the model; takes input_ids and, where given, attention_mask, position_ids and
            past_key_values; returns an object with `logits` and, if it caches, `past_key_values`.
        prompts: the batch.
        stops: what ends a row.
        longest: the most tokens of an answer.
        text: decodes tokens.

    Returns:
        The answers' tokens without the one that ended them (a stop text may still be in them), and
        whether the logits of all unfinished rows were finite throughout.
    """
    mask_BT, positions_BT = _padded(prompts, longest)
    length = prompts.ids_BT.shape[1]
    fed_BT, seen_BT = prompts.ids_BT, prompts.ids_BT
    cache = None
    done_B = torch.zeros(len(prompts.rows), dtype=torch.bool, device=fed_BT.device)
    finite_B = ~done_B
    answers: list[Tensor] = []
    for step in range(longest):
        arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if mask_BT is not None and positions_BT is not None:
            seen = length + step
            arguments["attention_mask"] = mask_BT[:, :seen]
            arguments["position_ids"] = positions_BT[:, seen - fed_BT.shape[1] : seen]
        out = forward(input_ids=fed_BT, use_cache=True, logits_to_keep=1, **arguments)
        logits_BV = out.logits[:, -1]
        token_B = logits_BV.argmax(-1)  # NaN counts as the greatest of all, so this finds it
        finite_B &= done_B | logits_BV.gather(1, token_B[:, None])[:, 0].isfinite()
        answers.append(token_B)
        done_B = done_B | stops.ends_V[token_B]
        done_B = done_B | _stopped(answers, stops, done_B, text)
        if bool(done_B.all()):
            break
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            seen_BT = torch.cat((seen_BT, token_B[:, None]), 1)
        fed_BT = seen_BT if cache is None else token_B[:, None]
    return _cut(torch.stack(answers, 1), stops), bool(finite_B.all())


def _padded(prompts: Prompts, longest: int) -> tuple[Tensor | None, Tensor | None]:
    """Return attention mask and position ids of a padded batch, for prompts and answers together."""
    if prompts.mask_BT is None:
        return None, None
    mask_BT = torch.nn.functional.pad(prompts.mask_BT, (0, longest), value=1)
    return mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0)


def _stopped(
    answers: Sequence[Tensor], stops: Stops, done_B: Tensor, text: Callable[[tuple[int, ...]], str]
) -> Tensor:
    """Tell which rows have a stop text in them."""
    stopped_B = torch.zeros_like(done_B)
    if not stops.texts:
        return stopped_B
    rows = (stops.suspects_V[answers[-1]] & ~done_B).nonzero()[:, 0]
    for row, ids in zip(rows.tolist(), torch.stack(list(answers), 1)[rows].tolist(), strict=True):
        found = text(tuple(ids))
        stopped_B[row] = any(mark in found for mark in stops.texts)
    return stopped_B


def _cut(answers_BT: Tensor, stops: Stops) -> list[tuple[int, ...]]:
    """Return each row up to its first token that ends an answer."""
    ended_BT = stops.ends_V[answers_BT]
    lengths = torch.where(ended_BT.any(1), ended_BT.int().argmax(1), answers_BT.shape[1])
    return [tuple(row[:end]) for row, end in zip(answers_BT.tolist(), lengths.tolist(), strict=True)]

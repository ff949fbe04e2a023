"""Greedy decoding of a batch of prompts, with room for the answers made once and ended rows dropped on the way.

Legend of shapes: B rows of the batch, A rows that still go on, T tokens of a prompt, S tokens of prefix, prompt and
answer, V tokens of the vocabulary, K likeliest tokens.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from evomerge.evaluation.batches import Prompts
from evomerge.evaluation.reading import said

#: The share of rows that must have ended before they are dropped; dropping copies the keys and values of the others.
ENDED = 0.25


class Cache(Protocol):
    """Keys and values of what was fed; `caches.Rooms` is one."""

    @property
    def holds(self) -> bool:
        """Whether what was fed is in it; if not, all of a row is fed at each step."""
        ...

    def keep(self, rows_B: Tensor) -> None:
        """Drop all rows but these."""
        ...


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


@dataclass
class Answer:
    """An answer while it is being given.

    Attributes:
        ids: its tokens, without one that ended it by itself.
        steps: how many tokens were generated, that one included.
        stopped: whether a token ended it or completed a stop text.
        entropies: of the distribution of each step, in nats, where they were wanted.
        top: the likeliest tokens of each step with their log-probabilities, where they were wanted.
    """

    ids: list[int] = field(default_factory=list)
    steps: int = 0
    stopped: bool = False
    entropies: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)


def make_stops(tokenizer: Any, ends: Collection[int], texts: Sequence[str], vocabulary: int, device: str) -> Stops:
    """Return what ends an answer, for one tokenizer and some stop texts.

    A token is a suspect when its text holds the last character of a stop text, or an incomplete
    character; so only a few rows have to be decoded while others are still going.
    """
    texts = [text for text in texts if text]  # an empty one would end every answer; lm-eval passes over it too
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
    forward: Callable[..., Tensor],
    prompts: Prompts,
    stops: Stops,
    text: Callable[[tuple[int, ...]], str],
    cache: Cache | None,
) -> tuple[list[Answer], bool]:
    """Continue each prompt by its likeliest token, until all rows have ended or are as long as they may be.

    Args:
        forward: takes input_ids and, where there is something to say, attention_mask, position_ids and
            past_key_values; returns the logits after the last token of each row, (B, V).
        prompts: the batch.
        stops: what ends a row.
        text: decodes tokens.
        cache: for the prompts and their answers; it holds their prefix already. None: the model keeps nothing, and
            is fed all of a row at each step.

    Returns:
        The answers in the order of the rows (a stop text may still be in them), and whether the logits of all
        unfinished rows were finite throughout.
    """
    way, mask_BS = prompts.way, prompts.mask_BS
    positions_BS = None if mask_BS is None else (mask_BS.cumsum(1) - 1).clamp(min=0)
    answers = [Answer() for _ in prompts.prompts]
    going = list(range(len(answers)))  # the answer of each row
    done: set[int] = set()
    start, seen_AT = len(prompts.prefix), prompts.ids_BT
    fed_AT = seen_AT
    for _ in range(way.most):
        end = start + fed_AT.shape[1]
        arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if mask_BS is not None and positions_BS is not None:
            arguments |= {"attention_mask": mask_BS[:, :end], "position_ids": positions_BS[:, start:end]}
        logits_AV = forward(input_ids=fed_AT, **arguments)
        word = said(logits_AV, entropy=way.entropy, top=way.top)
        # the sum over all tokens is finite only if no logit is infinite or not a number
        if not _finite(word.norm_U, [place not in done for place in going]):
            return answers, False
        token_A = word.best_U
        _note(answers, going, done, word, token_A, stops, text)
        if len(done) == len(answers):
            break
        held = cache is not None and cache.holds
        seen_AT = torch.cat((seen_AT, token_A[:, None]), 1)
        left = [row for row, place in enumerate(going) if place not in done]
        if len(going) - len(left) >= ENDED * len(going):
            rows_A = torch.tensor(left, device=fed_AT.device)
            going, seen_AT = [going[row] for row in left], seen_AT[rows_A]
            if mask_BS is not None and positions_BS is not None:
                mask_BS, positions_BS = mask_BS[rows_A], positions_BS[rows_A]
            if cache is not None and held:
                cache.keep(rows_A)
        start, fed_AT = (end, seen_AT[:, -1:]) if held else (start, seen_AT)
    return answers, True


def _finite(norm_A: Tensor, unfinished: Sequence[bool]) -> bool:
    finite = norm_A.isfinite().tolist()
    return all(good for good, counts in zip(finite, unfinished, strict=True) if counts)


def _note(
    answers: Sequence[Answer],
    going: Sequence[int],
    done: set[int],
    word: Any,
    token_A: Tensor,
    stops: Stops,
    text: Callable[[tuple[int, ...]], str],
) -> None:
    """Write a step's tokens into the answers, and those that end with it into `done`."""
    ends, suspects, tokens = stops.ends_V[token_A].tolist(), stops.suspects_V[token_A].tolist(), token_A.tolist()
    entropies = None if word.entropy_U is None else word.entropy_U.tolist()
    ids, logps = (word.ids_UK.tolist(), word.logp_UK.tolist()) if word.ids_UK.shape[1] else (None, None)
    for row, place in enumerate(going):
        if place in done:
            continue
        answer = answers[place]
        answer.steps += 1
        if entropies is not None:
            answer.entropies.append(entropies[row])
        if ids is not None and logps is not None:
            answer.top.append((tuple(ids[row]), tuple(logps[row])))
        if not ends[row]:
            answer.ids.append(tokens[row])
        answer.stopped = ends[row] or (suspects[row] and _stopped(text(tuple(answer.ids)), stops))
        if answer.stopped:
            done.add(place)


def _stopped(found: str, stops: Stops) -> bool:
    """Tell whether a text has a stop text in it."""
    return any(mark in found for mark in stops.texts)

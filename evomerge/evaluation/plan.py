"""Plans: the items of a task as batches of tokens, made once and asked of every candidate.

Legend of shapes: B rows of a batch, T tokens of a row, K positions whose logits are kept, R token
readings of a batch (one per token of a choice).
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import TaskError
from evomerge.evaluation.task import Item, Task


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts to continue.

    Attributes:
        rows: places in the plan's items, B of them.
        ids_BT: tokens, padded on the left.
        mask_BT: 1 for tokens and 0 for padding; None when all prompts have one length.
    """

    rows: tuple[int, ...]
    ids_BT: Tensor
    mask_BT: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """A batch of texts whose next-token likelihoods are read.

    Attributes:
        ids_BT: tokens, padded on the right; causal attention never looks there, so no mask is needed.
        keep_K: the positions whose logits are needed.
        row_R, place_R, token_R: what each reading reads: a row, a place in `keep_K`, the token there.
        choice_R: which choice of the plan the reading belongs to (CPU).
    """

    ids_BT: Tensor
    keep_K: Tensor
    row_R: Tensor
    place_R: Tensor
    token_R: Tensor
    choice_R: Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask: the items, in the caller's order, and the batches that ask them.

    `right[i]` is the place of item i's right choice; its choices are `first[i]` up to `first[i + 1]`.
    """

    task: Task
    items: tuple[Item, ...]
    prompts: tuple[Prompts, ...] = ()
    contexts: tuple[Contexts, ...] = ()
    first: tuple[int, ...] = ()
    right: tuple[int, ...] = ()


def plan_prompts(
    task: Task, items: Sequence[Item], tokenizer: Any, *, batch: int, room: int | None, padding: bool, device: str
) -> Plan:
    """Plan greedy generation.

    Args:
        task: the task; its items may be other than `items`.
        items: what to ask, in the order of the responses.
        tokenizer: a transformers tokenizer.
        batch: the most rows of a batch.
        room: the most tokens of prompt and answer together, where the model has a limit.
        padding: whether prompts of different lengths may share a batch.
        device: where the batches go.
    """
    room = None if room is None else room - task.max_new_tokens
    encoded = _prompts(task, items, tokenizer, room, "the answer")
    batches = []
    for rows in cut_batches([len(ids) for ids in encoded], batch, padding):
        length = max(len(encoded[row]) for row in rows)
        short = [length - len(encoded[row]) for row in rows]
        # any token may stand in the padding, the mask hides it; a row's own is sure to be in the vocabulary
        ids = [encoded[row][:1] * gap + encoded[row] for row, gap in zip(rows, short, strict=True)]
        mask = [[0] * gap + [1] * (length - gap) for gap in short] if any(short) else None
        batches.append(
            Prompts(
                rows=tuple(rows),
                ids_BT=torch.tensor(ids, device=device),
                mask_BT=None if mask is None else torch.tensor(mask, device=device),
            )
        )
    return Plan(task=task, items=tuple(items), prompts=tuple(batches))


def plan_contexts(
    task: Task, items: Sequence[Item], tokenizer: Any, *, batch: int, room: int | None, device: str
) -> Plan:
    """Plan the log-likelihoods of all choices; arguments as in `plan_prompts`.

    A choice of n tokens is read off n positions of one text: the prompt and the choice without its last
    token. Choices share a text when one's is a prefix of the other's; so ten choices of one token
    each cost a single row.
    """
    encoded = _prompts(task, items, tokenizer, room, "its choices")
    first = [0, *itertools.accumulate(len(item.choices) for item in items)]
    texts = [choice for item in items for choice in item.choices]
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    contexts: list[_Context] = []
    for place, item in enumerate(items):
        own = {choice: tokens[choice] for choice in range(first[place], first[place + 1])}
        empty = next((choice for choice, ids in own.items() if not ids), None)
        if empty is not None:
            raise TaskError(f"task {task.name!r}, item {item.id!r}: choice {texts[empty]!r} has no tokens")
        found = _share(encoded[place], own)
        _check_room(task, item, max(len(context.ids) for context in found), room, "its choices")
        contexts.extend(found)
    batches = [
        _read([contexts[row] for row in rows], tokens, device)
        for rows in cut_batches([len(context.ids) for context in contexts], batch, padding=True)
    ]
    right = tuple(item.choices.index(item.answer) for item in items)
    return Plan(task=task, items=tuple(items), contexts=tuple(batches), first=tuple(first), right=right)


def cut_batches(lengths: Sequence[int], batch: int, padding: bool) -> Iterator[list[int]]:
    """Yield batches of rows, shortest first, at most `batch` of them each.

    Rows of one length go without padding when they fill at least a quarter of a batch; what is left
    over is mixed where `padding` allows it.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    by_length: dict[int, list[int]] = {}
    for row in order:
        by_length.setdefault(lengths[row], []).append(row)
    rest: list[int] = []
    for rows in by_length.values():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            if padding and 4 * len(part) < batch:
                rest.extend(part)
            else:
                yield part
    for start in range(0, len(rest), batch):
        yield rest[start : start + batch]


@dataclass(frozen=True)
class _Context:
    """A text, where its prompt ends, and the choices that are read off it."""

    ids: list[int]
    start: int
    choices: list[int]


def _share(prompt: list[int], tokens: Mapping[int, list[int]]) -> list[_Context]:
    """Return the fewest texts that hold the contexts of all choices: prefixes of others are dropped."""
    found: list[_Context] = []
    for choice, ids in sorted(tokens.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        text = prompt + ids[:-1]
        home = next((context for context in found if context.ids[: len(text)] == text), None)
        if home is None:
            found.append(_Context(text, len(prompt) - 1, [choice]))
        else:
            home.choices.append(choice)
    return found


def _read(contexts: Sequence[_Context], tokens: Sequence[list[int]], device: str) -> Contexts:
    """Return the batch of these texts, with a reading for each token of each of their choices."""
    length = max(len(context.ids) for context in contexts)
    readings = [
        (row, context.start + step, token, choice)
        for row, context in enumerate(contexts)
        for choice in context.choices
        for step, token in enumerate(tokens[choice])
    ]
    rows, positions, read, choices = zip(*readings, strict=True)
    keep = sorted(set(positions))
    place_of = {position: place for place, position in enumerate(keep)}
    ids = [context.ids + context.ids[-1:] * (length - len(context.ids)) for context in contexts]
    return Contexts(
        ids_BT=torch.tensor(ids, device=device),
        keep_K=torch.tensor(keep, device=device),
        row_R=torch.tensor(rows, device=device),
        place_R=torch.tensor([place_of[position] for position in positions], device=device),
        token_R=torch.tensor(read, device=device),
        choice_R=torch.tensor(choices),
    )


def _prompts(task: Task, items: Sequence[Item], tokenizer: Any, room: int | None, rest: str) -> list[list[int]]:
    if not items:
        return []
    encoded: list[list[int]] = tokenizer([item.prompt for item in items])["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for item, ids in zip(items, encoded, strict=True):
        if not ids:
            if start is None:
                raise TaskError(f"task {task.name!r}, item {item.id!r}: the prompt has no tokens; write one")
            ids.append(start)
        _check_room(task, item, len(ids), room, rest)
    return encoded


def _check_room(task: Task, item: Item, length: int, room: int | None, rest: str) -> None:
    if room is not None and length > room:
        raise TaskError(
            f"task {task.name!r}, item {item.id!r}: {length} tokens, but the model has room for {room} "
            f"beside {rest}; shorten the prompt or max_new_tokens"
        )

"""Brings embeddings and heads of models with different tokenizers to one vocabulary, token by token."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import ModelError, nearest
from evomerge.models.architecture import place, read_json, text_part
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.resident import Kept

#: What has a row per position, not per token.
_POSITIONS = ("wpe", "position")


class Aligned:
    """Sources whose vocabularies differ, seen as if all had the target's.

    A row of a token that a model lacks is the base's where the base has the token, else that of the one model that has
    it, else the mean over the models that have it (as mergekit 0.1.5 does). Rows that are no token's in any model
    (padding) stay where all models have as many rows.

    Args:
        paths: the model folder of each source, the base included, by name.
        target: the source whose vocabulary all get, or "union".
        base: the name of the base, or None. A union begins with its tokens, else with those of the first source; what
            the others add follows source by source in the order of their numbers.

    Attributes:
        names, depth: as of every `Sources`.
        taken: how many rows each model takes from others.
        template: the model folder whose config and tokenizer a merge gets, with the target's number of rows.
        files: text of tokenizer files that differ from the template's, by file name.

    Raises:
        ModelError: if a folder is broken, has no tokenizer.json, or the models differ in more than their vocabulary.
    """

    def __init__(self, paths: Mapping[str, Path], target: str, base: str | None = None) -> None:
        """Open the folders, read headers and tokenizers."""
        self._models = {name: Checkpoint(path) for name, path in paths.items()}
        reference = (base or next(iter(paths))) if target == "union" else target
        first = self._models[reference]
        self._ends = _ends(first)
        for name, other in self._models.items():
            _check(reference, first, name, other, self._ends)
        order = [reference, *(name for name in self._models if name != reference)]
        tokens = {name: tokens_of(self._models[name].path) for name in order}
        self.tokens = union(list(tokens.values())) if target == "union" else tokens[reference]
        rows = {model.shape(self._ends[0])[0] for model in self._models.values()} if self._ends else {0}
        self._rows = _rows(rows, tokens.values(), self.tokens)
        self._row = {name: _row(tokens[name], self.tokens, self._rows, min(rows)) for name in self._models}
        self._order = ([base] if base in order else []) + [name for name in order if name != base]
        self._base = base
        self._lacking = torch.zeros(self._rows, dtype=torch.bool)
        for row in self._row.values():
            self._lacking |= row < 0
        self._filled: tuple[str, Tensor] | None = None
        self.names, self.depth = first.names, first.depth
        self.kept: Kept | None = None
        self.taken = {name: int((row < 0).sum()) for name, row in self._row.items()}
        self.template = _Template(first.path, self._rows, self._ends)
        self.files = _tokenizer(first.path, self.tokens, tokens[reference], [self._models[n].path for n in order])

    def tensor(self, source: str, name: str) -> Tensor:
        """Return one tensor of one model; embedding and head in the order of the target's vocabulary."""
        own = self._of(source).tensor(name)
        if name not in self._ends:
            return own
        row = self._row[source]
        if len(own) == self._rows and bool((row == torch.arange(self._rows)).all()):
            return own
        found = own[row.clamp(min=0)]
        mine = row[self._lacking] < 0
        found[row < 0] = self._fallback(name)[mine].to(own.dtype)
        return found

    def shape(self, source: str, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        shape = self._of(source).shape(name)
        return (self._rows, *shape[1:]) if name in self._ends else shape

    def dtype(self, source: str, name: str) -> torch.dtype:
        """Return the dtype of one tensor, from the header."""
        return self._of(source).dtype(name)

    def _of(self, source: str) -> Checkpoint:
        if source not in self._models:
            raise ModelError(f"source {source!r} is not among those opened; {nearest(source, self._models)}")
        return self._models[source]

    def _fallback(self, name: str) -> Tensor:
        """Return the rows of tokens that some model lacks, float32; kept for the tensor that was asked for last."""
        if self._filled is None or self._filled[0] != name:
            shape = self._of(self._order[0]).shape(name)
            total = torch.zeros(int(self._lacking.sum()), *shape[1:])
            count = torch.zeros(len(total))
            for source in self._order:
                row = self._row[source][self._lacking]
                having = row >= 0
                if source == self._base:
                    count[having] = -1.0  # the base's own row is taken, whoever else has the token
                    total[having] = self._of(source).tensor(name)[row[having]].float()
                    continue
                having &= count >= 0
                total[having] += self._of(source).tensor(name)[row[having]].float()
                count[having] += 1
            divisor = count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
            self._filled = (name, total / divisor)
        return self._filled[1]


class _Template(Checkpoint):
    """A model folder with another number of rows in embedding and head."""

    def __init__(self, path: Path, rows: int, ends: Sequence[str]) -> None:
        super().__init__(path)
        self._rows, self._ends = rows, tuple(ends)

    @property
    def config(self) -> dict[str, Any]:
        config = super().config
        part: Any = text_part(config)
        part["vocab_size"] = self._rows
        return config

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return (self._rows, *shape[1:]) if name in self._ends else shape


def tokens_of(folder: Path) -> dict[str, int]:
    """Return the number of every token of a model, by its text, from tokenizer.json.

    Raises:
        ModelError: if there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder}: has no tokenizer.json, which says its tokens; save its tokenizer as a fast one")
    data = read_json(file)
    given = (data.get("model") or {}).get("vocab") or {}
    found = {entry[0]: i for i, entry in enumerate(given)} if isinstance(given, list) else dict(given)
    for token in data.get("added_tokens") or []:
        found[str(token["content"])] = int(token["id"])
    return found


def union(vocabularies: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the first vocabulary with the tokens that the others add, one after the other, each by its numbers.

    >>> union([{"a": 0, "b": 1}, {"c": 0, "a": 1}])
    {'a': 0, 'b': 1, 'c': 2}
    """
    found = dict(vocabularies[0])
    free = max(found.values(), default=-1) + 1
    for vocabulary in vocabularies[1:]:
        for _, token in sorted((number, token) for token, number in vocabulary.items()):
            if token not in found:
                found[token] = free
                free += 1
    return found


def _ends(model: Checkpoint) -> tuple[str, ...]:
    """Return the tensors that have a row per token."""
    rows = model.architecture.vocabulary
    return tuple(
        name
        for name in model.names
        if place(name, model.depth).layer is None
        and model.shape(name)[:1] == (rows,)
        and not any(word in name for word in _POSITIONS)
    )


def _check(reference: str, first: Checkpoint, name: str, other: Checkpoint, ends: Sequence[str]) -> None:
    """Refuse a model that differs in more than its vocabulary."""
    for field in ("model_type", "depth", "hidden", "tied"):
        mine, theirs = getattr(first.architecture, field), getattr(other.architecture, field)
        if mine != theirs:
            raise ModelError(f"source {name!r} ({other.path}): {field} is {theirs} but {mine} in {reference!r}")
    differing = sorted(set(first.names) ^ set(other.names))
    if differing:
        raise ModelError(f"source {name!r} ({other.path}): tensor {differing[0]!r} is not in both it and {reference!r}")
    for tensor in first.names:
        mine, theirs = first.shape(tensor), other.shape(tensor)
        if mine[1:] != theirs[1:] or (tensor not in ends and mine != theirs):
            raise ModelError(f"source {name!r} ({other.path}): tensor {tensor!r} has shape {theirs}, not {mine}")


def _rows(rows: set[int], vocabularies: Any, tokens: Mapping[str, int]) -> int:
    """Return how many rows the target has: one per token, and the padding that all models have alike."""
    needed = max(tokens.values(), default=-1) + 1
    most = max(max(vocabulary.values(), default=-1) + 1 for vocabulary in vocabularies)
    alike = len(rows) == 1 and max(needed, most) <= min(rows)
    return min(rows) if alike and most <= needed else needed


def _row(own: Mapping[str, int], target: Mapping[str, int], rows: int, least: int) -> Tensor:
    """Return the row of a model for each row of the target, -1 where it lacks the token; padding keeps its place."""
    found = torch.full((rows,), -1, dtype=torch.int64)
    used = set(own.values())
    tokens = set(target.values())
    padding = [i for i in range(min(rows, least)) if i not in tokens and i not in used]
    found[padding] = torch.tensor(padding, dtype=torch.int64)
    shared = [(i, own[token]) for token, i in target.items() if token in own]
    if shared:
        there, here = torch.tensor(shared, dtype=torch.int64).unbind(1)
        found[there] = here
    return found


def _tokenizer(
    folder: Path, target: Mapping[str, int], own: Mapping[str, int], others: Sequence[Path]
) -> dict[str, str]:
    """Return tokenizer.json with the tokens that a union adds, each as the model that brings it describes it."""
    if dict(target) == dict(own):
        return {}
    tokenizer = copy.deepcopy(read_json(folder / "tokenizer.json"))
    described: dict[str, dict[str, Any]] = {}
    for other in others:
        for token in read_json(other / "tokenizer.json").get("added_tokens") or []:
            described.setdefault(str(token["content"]), token)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = list(tokenizer.get("added_tokens") or [])
    for token, number in sorted(target.items(), key=lambda item: item[1]):
        if token not in own:
            added.append({"content": token, **plain, **described.get(token, {}), "id": number})
    tokenizer["added_tokens"] = added
    return {"tokenizer.json": json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n"}

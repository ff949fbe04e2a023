"""Collects what a model says to the requests of a plan, batch by batch, and makes outcomes of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.evaluation.batches import Read
from evomerge.evaluation.decoding import Answer
from evomerge.evaluation.plan import Plan
from evomerge.evaluation.reading import numbers, said
from evomerge.evaluation.request import Outcome, Request


class Sheet:
    """What has been said so far.

    Readings have their place in the plan, so that sums do not depend on how they were batched.

    Args:
        plan: what is asked.
    """

    def __init__(self, plan: Plan) -> None:
        """Start with nothing."""
        self._plan = plan
        reading = [request for request in plan.requests if request.kind != "generate"]
        self._wants_entropy = any(request.entropy for request in reading)
        self._top = max((request.top for request in reading), default=0)
        self._named = any(request.at for request in reading)
        count = plan.first[-1]
        self._logp, self._hit, self._entropy = np.zeros(count), np.zeros(count, dtype=bool), np.zeros(count)
        self._ids = np.zeros((count, self._top), dtype=np.int64)
        self._logps = np.zeros((count, self._top))
        self._asked: dict[int, tuple[float, ...]] = {}
        self._answers: dict[int, Outcome] = {}

    def note(self, read: Read, logits_UV: Tensor) -> bool:
        """Note what a pass says at its positions; tell whether all log-likelihoods are finite."""
        word = said(logits_UV, entropy=self._wants_entropy, top=self._top)
        flat, at_R = read.flat_R.numpy(), read.at_R
        logp = numbers(logits_UV[at_R, read.token_R].float() - word.norm_U[at_R])
        self._logp[flat] = logp
        self._hit[flat] = numbers(word.best_U[at_R] == read.token_R)
        if word.entropy_U is not None:
            self._entropy[flat] = numbers(word.entropy_U[at_R])
        if self._top:
            self._ids[flat], self._logps[flat] = numbers(word.ids_UK[at_R]), numbers(word.logp_UK[at_R])
        if self._named:
            self._note_named(read, logits_UV, word.norm_U)
        return bool(np.isfinite(logp).all())

    def put(self, place: int, answer: Answer, text: str, stop: Sequence[str]) -> None:
        """Note an answer to a request of the kind `generate`."""
        ends = [end for mark in stop if mark and (end := text.find(mark)) >= 0]
        self._answers[place] = Outcome(
            tokens=answer.steps - answer.stopped,
            text=text[: min(ends)] if ends else text,
            entropy=float(np.mean(answer.entropies)) if answer.entropies else 0.0,
            ids=tuple(ids for ids, _ in answer.top),
            logp=tuple(logp for _, logp in answer.top),
        )

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes in the order of the requests."""
        return [
            self._answers[place] if request.kind == "generate" else self._outcome(place, request)
            for place, request in enumerate(self._plan.requests)
        ]

    def _note_named(self, read: Read, logits_UV: Tensor, norm_U: Tensor) -> None:
        """Note the log-probabilities of the tokens that requests named."""
        flat, at = read.flat_R.tolist(), read.at_R.tolist()
        named = [(place, row, own) for place, row in zip(flat, at, strict=True) if (own := self._tokens(place))]
        if not named:
            return
        rows = torch.tensor([row for _, row, own in named for _ in own], device=logits_UV.device)
        tokens = torch.tensor([token for _, _, own in named for token in own], device=logits_UV.device)
        logp: list[float] = numbers(logits_UV[rows, tokens].float() - norm_U[rows]).tolist()
        start = 0
        for place, _, own in named:
            self._asked[place] = tuple(logp[start : start + len(own)])
            start += len(own)

    def _tokens(self, flat: int) -> tuple[int, ...]:
        """Return the tokens that are named for a reading."""
        place = int(np.searchsorted(self._plan.first, flat, side="right")) - 1
        at = self._plan.requests[place].at
        return at[flat - self._plan.first[place]] if at else ()

    def _outcome(self, place: int, request: Request) -> Outcome:
        first, end = self._plan.first[place], self._plan.first[place + 1]
        more: dict[str, Any] = {}
        if request.entropy:
            more["entropy"] = float(self._entropy[first:end].mean())
        if request.at:
            more["logp"] = tuple(self._asked.get(flat, ()) for flat in range(first, end))
        elif request.top:
            more["ids"] = tuple(map(tuple, self._ids[first:end, : request.top].tolist()))
            more["logp"] = tuple(map(tuple, self._logps[first:end, : request.top].tolist()))
        return Outcome(
            tokens=end - first,
            loglikelihood=float(self._logp[first:end].sum()),
            greedy=bool(self._hit[first:end].all()),
            **more,
        )

"""Turns the texts of requests into tokens, the one way for all tasks: as lm-eval's `HFLM` does.

A context and its continuation are encoded together and cut where the context alone ends (lm-eval 0.4.13,
`TemplateLM._encode_pair`), so that the tokens are those which a model saw in training.
"""

from collections.abc import Sequence
from typing import Any

from evomerge.errors import TaskError
from evomerge.evaluation.request import Request

#: The length of rolling windows where neither model nor tokenizer names one; lm-eval's.
LENGTH = 2048

#: From here on a tokenizer's length means that it has none.
_ENDLESS = 10**12


class Refused(TaskError):
    """A request that this model cannot be asked; `request` is its place among those that were planned."""

    def __init__(self, request: int, reason: str) -> None:
        """Say which and why."""
        super().__init__(f"request {request}: {reason}")
        self.request, self.reason = request, reason


class Encoder:
    """A tokenizer, as requests are encoded with it.

    Args:
        tokenizer: a transformers tokenizer.
        room: the most tokens that the model takes, where it has a limit.
    """

    def __init__(self, tokenizer: Any, room: int | None) -> None:
        """Look up what a text begins with where it has no tokens of its own."""
        self.tokenizer, self.room = tokenizer, room
        first = tokenizer.bos_token_id
        self.start: int | None = tokenizer.eos_token_id if first is None else first
        self._first = "" if self.start is None else str(tokenizer.decode(self.start))
        named = getattr(tokenizer, "model_max_length", _ENDLESS)
        self.window: int = room or (int(named) if named < _ENDLESS else LENGTH)

    def texts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the tokens of each text, with the special tokens that the tokenizer adds, unless it has them."""
        plain = [text for text in dict.fromkeys(texts) if not self._first or not text.startswith(self._first)]
        begun = [text for text in dict.fromkeys(texts) if self._first and text.startswith(self._first)]
        return self._batch(plain, special=True) | self._batch(begun, special=False)

    def pairs(self, requests: Sequence[tuple[int, Request]]) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of context and continuation of each request, neither of them empty.

        Args:
            requests: each with its place in the plan.

        Raises:
            Refused: if a continuation has no tokens or more than fit, or both together have too many and must not be
                cut; or if there is nothing to begin with.
        """
        split = [_split(request.context, request.continuation) for _, request in requests]
        known = self.texts([text for context, whole in split if context for text in (context, whole)])
        bare = self._batch([whole for context, whole in split if not context], special=False)
        found = []
        for (place, request), (context, whole) in zip(requests, split, strict=True):
            if context and known[context]:
                pair = (known[context], known[whole][len(known[context]) :])
            else:
                pair = self._begun(place, bare[whole] if not context else known[whole])
            found.append(self._fitting(place, request, *pair))
        return found

    def windows(self, place: int, request: Request, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return contexts and continuations that together read a whole text, each of its tokens once.

        As in lm-eval's `get_rolling_token_windows` with a context of one token: no window is longer than the model
        allows. A text that is to be cut is its last window only.
        """
        if not tokens:
            raise Refused(place, "the text has no tokens; write one")
        start, length = self._start(place), self.window
        if request.cut:
            tokens = tokens[-length:]
        found = [([start], tokens[:length])]
        for done in range(length, len(tokens), length):
            new = tokens[done : done + length]
            # a last, shorter window goes as far back as the model allows
            found.append((tokens[max(0, done + len(new) - length - 1) : done], new))
        return found

    def prompts(self, requests: Sequence[tuple[int, Request]]) -> list[list[int]]:
        """Return the tokens of what each request goes on from; Refused if they and the answer do not fit."""
        known = self.texts([request.context for _, request in requests])
        found = []
        for place, request in requests:
            ids = known[request.context] or [self._start(place)]
            most = self.window - request.most
            if request.cut and most > 0:
                ids = ids[-most:]
            elif self.room is not None and len(ids) > self.room - request.most:
                raise Refused(place, _long(len(ids), self.room - request.most, "the answer"))
            found.append(ids)
        return found

    def _begun(self, place: int, ids: list[int]) -> tuple[list[int], list[int]]:
        """Put the first token there is before a continuation without context, unless it is there."""
        start = self._start(place)
        return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)

    def _fitting(
        self, place: int, request: Request, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        if not continuation:
            raise Refused(place, f"the continuation {request.continuation!r} has no tokens")
        if len(continuation) > self.window:
            raise Refused(place, _long(len(continuation), self.window))
        over = len(context) + len(continuation) - 1  # the last token is read and never fed
        if request.cut and over > self.window:
            return context[over - self.window :], continuation
        if self.room is not None and over > self.room:
            raise Refused(place, _long(over, self.room, "its continuations"))
        return context, continuation

    def _start(self, place: int) -> int:
        if self.start is None:
            raise Refused(place, "the prompt has no tokens, and the tokenizer no first token; write one")
        return self.start

    def _batch(self, texts: Sequence[str], *, special: bool) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        given: list[list[int]] = self.tokenizer(unique, add_special_tokens=special)["input_ids"]
        return dict(zip(unique, given, strict=True))


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Return the context without blanks at its end, and all of the text: the blanks belong to the continuation."""
    return context.rstrip(), context + continuation


def _long(length: int, room: int, rest: str = "") -> str:
    if not rest:
        return f"{length} tokens, but the model has room for {room}; shorten the text, or make its `window` smaller"
    return f"{length} tokens, but the model has room for {room} beside {rest}; shorten the prompt or the answer"

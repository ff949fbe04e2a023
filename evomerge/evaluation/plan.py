"""Plans: requests as batches of tokens, made once and asked of every candidate.

What texts begin with alike is fed once: a long beginning that many have (the examples of a prompt) once per candidate,
and the context of several continuations once for all of them.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evomerge.evaluation.batches import Prompt, Prompts, Reading, Text, Texts, Way, cut_batches
from evomerge.evaluation.building import Abilities
from evomerge.evaluation.encoding import Encoder, Refused
from evomerge.evaluation.prefixes import shared_beginnings
from evomerge.evaluation.request import KINDS, Request

#: The shortest context that is fed once for several continuations; a shorter one does not pay for a second pass.
CONTEXT = 8

#: The most entries of logits that a batch may ask for.
LOGITS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that may share batches.

    Attributes:
        prefix: what all of them begin with.
        rows: texts, or prompts.
        way: how prompts are continued; None for texts.
        equal: whether the rows of a batch must have one length.
    """

    prefix: tuple[int, ...]
    rows: tuple[Text | Prompt, ...]
    way: Way | None = None
    equal: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask.

    Attributes:
        requests: in the caller's order.
        first: where each request's readings begin among all; one more than there are requests.
        groups: the rows that ask them.
        batch: the most rows of a batch.
        vocabulary: entries of a position's logits.
        device: where the batches go.
    """

    requests: tuple[Request, ...]
    first: tuple[int, ...]
    groups: tuple[Group, ...]
    batch: int
    vocabulary: int
    device: str
    _made: dict[int, tuple[Texts | Prompts, ...]] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether answers are generated."""
        return any(group.way is not None for group in self.groups)

    def batches(self, tokens: int) -> tuple[Texts | Prompts, ...]:
        """Return the batches under a budget of tokens (rows times length), made when it is first asked for."""
        if tokens not in self._made:
            self._made[tokens] = tuple(batch for group in self.groups for batch in self._cut(group, tokens))
        return self._made[tokens]

    def _cut(self, group: Group, tokens: int) -> Iterator[Texts | Prompts]:
        way = group.way
        more = len(group.prefix) + (way.most if way is not None else 0)
        widest = max(_wide(row) for row in group.rows)
        rows = max(1, min(self.batch, LOGITS // (self.vocabulary * widest)))
        order = sorted(group.rows, key=lambda row: len(row.ids))
        for part in cut_batches(order, lambda row: more + row.longest, rows, tokens, group.equal):
            if way is not None:
                yield Prompts(prefix=group.prefix, prompts=tuple(part), way=way, device=self.device)
            else:
                yield Texts(prefix=group.prefix, texts=tuple(part), rows=rows, tokens=tokens, device=self.device)


def make_plan(
    requests: Sequence[Request],
    encoder: Encoder,
    abilities: Abilities,
    *,
    batch: int,
    vocabulary: int,
    device: str,
    sharing: bool = True,
) -> Plan:
    """Plan requests.

    Args:
        requests: what to ask, in the order of the outcomes.
        encoder: the tokenizer.
        abilities: what the model can be fed.
        batch: the most rows of a batch.
        vocabulary: entries of a position's logits.
        device: where the batches go.
        sharing: whether what texts begin with alike is fed once.

    Raises:
        Refused: for a request that the model cannot be asked.
    """
    by_kind: dict[str, list[tuple[int, Request]]] = {kind: [] for kind in KINDS}
    for place, request in enumerate(requests):
        if request.kind not in by_kind:
            raise Refused(place, f"kind {request.kind!r} is none of {', '.join(KINDS)}")
        by_kind[request.kind].append((place, request))
    pairs: dict[int, list[tuple[list[int], list[int]]]] = {}
    for (place, _), pair in zip(by_kind["loglikelihood"], encoder.pairs(by_kind["loglikelihood"]), strict=True):
        pairs[place] = [pair]
    known = encoder.texts([request.continuation for _, request in by_kind["rolling"]])
    for place, request in by_kind["rolling"]:
        pairs[place] = encoder.windows(place, request, known[request.continuation])
    counts = [sum(len(tokens) for _, tokens in pairs.get(place, ())) for place in range(len(requests))]
    first = (0, *itertools.accumulate(counts))
    texts = _texts(pairs, first, requests, sharing and abilities.caches)
    return Plan(
        requests=tuple(requests),
        first=first,
        groups=(
            *_reading(texts, abilities, sharing),
            *_continuing(by_kind["generate"], encoder, abilities, sharing),
        ),
        batch=batch,
        vocabulary=vocabulary,
        device=device,
    )


def _texts(
    pairs: Mapping[int, list[tuple[list[int], list[int]]]],
    first: Sequence[int],
    requests: Sequence[Request],
    sharing: bool,
) -> list[Text]:
    """Return the texts that are read for pairs of context and continuation, those with one context together."""
    by_context: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}
    for place in sorted(pairs):
        flat = first[place]
        for context, continuation in pairs[place]:
            by_context.setdefault(tuple(context), []).append((continuation, flat))
            flat += len(continuation)
        _check_at(place, requests[place], flat - first[place])
    texts: list[Text] = []
    for beginning, own in by_context.items():
        rows = _rows(beginning, own)
        if sharing and len(rows) > 1 and len(beginning) >= CONTEXT:
            texts.append(_branching(beginning, rows))
        else:
            texts.extend(rows)
    return texts


def _rows(context: tuple[int, ...], own: Sequence[tuple[list[int], int]]) -> list[Text]:
    """Return the fewest texts that hold all continuations of a context: beginnings of others are read off those.

    A continuation of n tokens is read off n positions: the last one of the context, and its own but the last.
    """
    found: list[tuple[tuple[int, ...], list[Reading]]] = []
    for continuation, flat in sorted(own, key=lambda pair: (-len(pair[0]), pair[1])):
        ids = (*context, *continuation[:-1])
        home = next((reads for held, reads in found if held[: len(ids)] == ids), None)
        if home is None:
            found.append((ids, home := []))
        home.extend((len(context) - 1 + step, token, flat + step) for step, token in enumerate(continuation))
    return [Text(ids=ids, reads=tuple(reads)) for ids, reads in found]


def _branching(context: tuple[int, ...], rows: Sequence[Text]) -> Text:
    """Return the context as a text of its own, from which the rest of each row goes on."""
    length = len(context)
    reads = tuple(reading for row in rows for reading in row.reads if reading[0] < length)
    branches = (
        Text(
            ids=row.ids[length:],
            reads=tuple((place - length, token, flat) for place, token, flat in row.reads if place >= length),
        )
        for row in rows
        if len(row.ids) > length
    )
    return Text(ids=context, reads=reads, branches=tuple(branches))


def _reading(texts: Sequence[Text], abilities: Abilities, sharing: bool) -> Iterator[Group]:
    """Yield the groups of texts that begin alike."""
    limits = [min(place for place, _, _ in text.reads) for text in texts]
    beginnings = shared_beginnings([text.ids for text in texts], limits, sharing and abilities.caches)
    for prefix, places in beginnings:
        rows = [_without(texts[place], len(prefix)) for place in places]
        exact = not abilities.positions or _beyond(abilities, len(prefix) + max(row.longest for row in rows))
        for branching in (False, True):
            part = tuple(row for row in rows if bool(row.branches) is branching)
            if part:
                yield Group(prefix=prefix, rows=part, equal=branching and exact)


def _continuing(
    requests: Sequence[tuple[int, Request]], encoder: Encoder, abilities: Abilities, sharing: bool
) -> Iterator[Group]:
    """Yield the groups of prompts that begin alike and are continued in the same way."""
    encoded = dict(zip((place for place, _ in requests), encoder.prompts(requests), strict=True))
    by_way: dict[Way, list[int]] = {}
    for place, request in requests:
        if request.at:
            raise Refused(place, "`at` is for what is read; an answer has no positions before it is there")
        if request.most < 1:
            raise Refused(place, f"an answer needs room for a token or more, got {request.most}")
        by_way.setdefault(Way(request.stop, request.most, request.entropy, request.top), []).append(place)
    for way, places in by_way.items():
        texts = [tuple(encoded[place]) for place in places]
        beginnings = shared_beginnings(texts, [len(ids) - 1 for ids in texts], sharing and abilities.caches)
        for prefix, members in beginnings:
            rows = tuple(Prompt(ids=texts[own][len(prefix) :], request=places[own]) for own in members)
            longest = len(prefix) + way.most + max(len(row.ids) for row in rows)
            # padding to the left of everything is outside of every window, but after a prefix it would be counted
            equal = not abilities.positions or (bool(prefix) and _beyond(abilities, longest))
            yield Group(prefix=prefix, rows=rows, way=way, equal=equal)


def _without(text: Text, length: int) -> Text:
    """Return a text without its first tokens."""
    reads = tuple((place - length, token, flat) for place, token, flat in text.reads)
    return replace(text, ids=text.ids[length:], reads=reads)


def _beyond(abilities: Abilities, length: int) -> bool:
    return abilities.window is not None and length > abilities.window


def _wide(row: Text | Prompt) -> int:
    """Return how many positions of a row are read in one pass."""
    if isinstance(row, Prompt):
        return 1
    return max(len({place for place, _, _ in own.reads}) for own in (row, *row.branches))


def _check_at(place: int, request: Request, count: int) -> None:
    if request.at and len(request.at) != count:
        raise Refused(place, f"tokens are named at {len(request.at)} positions, but {count} are read")

"""Finds what many texts begin with alike, so that it is fed once."""

import itertools
from collections.abc import Iterator, Sequence

#: What a beginning must have: tokens, texts that share it, and tokens that are saved by it.
TOKENS, TEXTS, SAVED = 16, 4, 128

#: How often groups are divided further.
DEPTH = 100

Ids = tuple[int, ...]


def shared_beginnings(texts: Sequence[Ids], limits: Sequence[int], wanted: bool = True) -> list[tuple[Ids, list[int]]]:
    """Return groups of texts, each with what all of its texts begin with; each text is in one group.

    Groups are chosen so that as few tokens as possible are left. Beginnings that are shared by few or save little are
    left where they are.

    Args:
        texts: the tokens of each text.
        limits: how much of each may be taken away.
        wanted: if not, there is one group with nothing in common.

    Returns:
        For each group the beginning and the places of its texts; places in rising order, the group without a beginning
        last.
    """
    order = sorted(range(len(texts)), key=lambda place: texts[place][: limits[place]]) if wanted else []
    heads = [texts[place][: limits[place]] for place in order]
    alike = [_alike(one, two) for one, two in itertools.pairwise(heads)]
    found = [(heads[lo][:length], sorted(order[lo:hi])) for lo, hi, length in _best(alike, 0, len(heads))[1]]
    taken = {place for _, places in found for place in places}
    rest = [place for place in range(len(texts)) if place not in taken]
    return [*found, *([((), rest)] if rest else [])]


def _best(alike: Sequence[int], lo: int, hi: int, depth: int = 0) -> tuple[int, list[tuple[int, int, int]]]:
    """Return the most tokens that groups of neighbours save, and these groups: bounds and length of the beginning.

    `alike` has the length of what each text and the next one begin with.
    """
    if hi - lo < TEXTS or depth > DEPTH:
        return 0, []
    length = min(alike[lo : hi - 1])
    saved = length * (hi - lo - 1)
    whole = (saved, [(lo, hi, length)]) if length >= TOKENS and saved >= SAVED else (0, [])
    parts = [_best(alike, a, b, depth + 1) for a, b in _runs(alike, lo, hi, length)]
    apart = sum(part[0] for part in parts), [group for part in parts for group in part[1]]
    return max(whole, apart, key=lambda one: one[0])


def _runs(alike: Sequence[int], lo: int, hi: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of neighbours that have more in common than all have."""
    start = lo
    for place in range(lo, hi - 1):
        if alike[place] == length:
            yield start, place + 1
            start = place + 1
    yield start, hi


def _alike(one: Ids, two: Ids) -> int:
    """Return how many tokens two texts begin with alike."""
    shorter = min(len(one), len(two))
    return next((place for place in range(shorter) if one[place] != two[place]), shorter)

"""From one blend per tensor to the few routes that say the same."""

import dataclasses
import fnmatch
import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from evomerge.models.architecture import place, split
from evomerge.recipe import ENDS, GROUPS, Blend, Route
from evomerge.value import canonical


def compressed(blends: Mapping[str, Blend], depth: int, hints: Sequence[str] = ()) -> tuple[Route, ...]:
    """Return routes that give every tensor its blend, as few and as plain as are easily found.

    Where all layers are alike one set of routes serves them all; else each run of layers that are alike has its own.

    Args:
        blends: of every tensor of the model that is built, by name.
        depth: its number of layers.
        hints: parts of tensor names that a route may ask for, such as the filters of a file.
    """
    keys = {name: canonical(blend) for name, blend in blends.items()}
    known = {keys[name]: blend for name, blend in blends.items()}
    layers: list[dict[str, str]] = [{} for _ in range(depth)]
    for name in blends:
        parts = split(name)
        if parts is not None:
            layers[parts[1]][parts[2]] = keys[name]
    if all(layer == layers[0] for layer in layers):
        return tuple(_cover(keys, known, depth, hints, None))
    ends = {name: key for name, key in keys.items() if split(name) is None}
    routes = []
    for first, last in _runs(layers):
        inside = {name: key for name, key in keys.items() if (p := split(name)) is not None and first <= p[1] < last}
        routes += _cover(inside, known, depth, hints, (first, last))
    return (*_ends(ends, known, depth, hints), *routes)


def _runs(layers: Sequence[Mapping[str, str]]) -> Iterator[tuple[int, int]]:
    """Yield the first layer and the one after the last of each run of layers that are alike."""
    first = 0
    for k in range(1, len(layers) + 1):
        if k == len(layers) or layers[k] != layers[first]:
            yield first, k
            first = k


def _ends(
    keys: Mapping[str, str], known: Mapping[str, Blend], depth: int, hints: Sequence[str]
) -> Iterator[Route]:
    """Yield the routes of what stands outside the layers: of each end by itself."""
    for end in ENDS:
        mine = {name: key for name, key in keys.items() if place(name, depth).end == end}
        for route in _cover(mine, known, depth, hints, None):
            yield dataclasses.replace(route, groups=(end,))


def _cover(
    keys: Mapping[str, str],
    known: Mapping[str, Blend],
    depth: int,
    hints: Sequence[str],
    layers: tuple[int, int] | None,
) -> list[Route]:
    """Return routes for some tensors: one for each that differs from the most common blend, and that one last."""
    if not keys:
        return []
    default = Counter(keys.values()).most_common(1)[0][0]
    routes: list[Route] = []
    for key in dict.fromkeys(key for key in keys.values() if key != default):
        wanted = {name for name, mine in keys.items() if mine == key}
        groups, patterns = _conditions(wanted, list(keys), depth, hints)
        if groups:
            routes.append(Route(blend=known[key], groups=groups, layers=layers))
        routes += [Route(blend=known[key], tensors=pattern, layers=layers) for pattern in patterns]
    return [*routes, Route(blend=known[default], layers=layers)]


def _conditions(
    wanted: set[str], names: Sequence[str], depth: int, hints: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the groups and the patterns that some names, and no others, fit."""
    by_group: dict[str, set[str]] = {}
    for name in names:
        at = place(name, depth)
        by_group.setdefault(at.end or at.group, set()).add(name)
    groups = tuple(group for group in (*GROUPS, *ENDS) if group in by_group and by_group[group] <= wanted)
    left = wanted - {name for group in groups for name in by_group[group]}
    patterns = [f"*{glob.escape(hint)}*" for hint in dict.fromkeys(hints)]
    patterns += [f"*.{glob.escape(parts[2])}" for name in sorted(left) if (parts := split(name))]
    patterns += [glob.escape(name) for name in sorted(left)]
    chosen = []
    for pattern in patterns:
        fitting = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if fitting <= wanted and fitting & left:
            chosen.append(pattern)
            left -= fitting
    return groups, chosen

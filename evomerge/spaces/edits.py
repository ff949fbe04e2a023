"""Edits of an incumbent stack: which layers are dropped, repeated, inserted, swapped or moved, scaled by how much."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from evomerge.errors import RecipeError, nearest
from evomerge.genome import ActiveIf, Axis, Choice, Gene, Genome, Whole, check_axes, check_genome, from_unit
from evomerge.hops import Hop, Stack
from evomerge.value import value

#: What an edit may do to a stack.
OPERATIONS = ("drop", "repeat", "insert", "swap", "move")

#: Those that are about a block of layers, and those that bring layers of a source.
_BLOCKS, _BRINGING = ("drop", "repeat", "insert", "swap"), ("insert", "swap")

#: The option of an edit that does nothing.
NONE = "none"

#: In random genomes, the chance of an edit to do nothing, of a scale to be 1, and of each further layer of a block.
_IDLE, _PLAIN, _LONGER = 0.4, 0.5, 0.35

#: The share of a prior that is spread evenly, so that no layer is left out for good.
_EVEN = 0.25

#: For each operation, how much is hoped of each layer of the primary source; see `prior_of`.
Prior = Mapping[str, tuple[float, ...]]


@value
class Steps:
    """Bounds of scales, and the step between two of them; steps that are powers of 1/2 are met exactly."""

    low: float
    high: float
    step: float

    def __post_init__(self) -> None:
        if not self.step > 0 or not 0 < self.low <= 1 <= self.high < math.inf:
            raise RecipeError(f"scales must have a step above 0 and bounds around 1, above 0, got {self}")
        steps = [edge / self.step for edge in (self.low, self.high, 1.0)]
        if self.step > 1 or any(abs(count - round(count)) > 1e-9 for count in steps):
            raise RecipeError(f"low, high and 1 must be whole multiples of the step of scales, got {self}")

    def axis(self, name: str, condition: ActiveIf) -> Whole:
        """Return the axis of a scale, in steps."""
        low, high = (round(edge / self.step) for edge in (self.low, self.high))
        return Whole(name=name, low=low, high=high, active_if=condition)


@value
class Edits:
    """Stacks that are an incumbent stack with a few edits, in order.

    An edit drops, repeats or inserts a block of layers, swaps its source, or moves the boundary between two blocks. One
    that would leave the bounds does nothing, so every genome is a stack. Scales stand only at seams: where a layer does
    not follow the layer before it in its own source. Edits may reach one stack in many ways; the stacks are equal.

    Attributes:
        names: what layers may be taken from.
        primary: the one that lends the ends, and the incumbent unless one is given.
        sizes: the number of parameters of each layer of a source; as many as there are layers.
        ends: the number of parameters outside of layers.
        operations: of `OPERATIONS`, those that edits may be.
        edits: how many there are.
        block: the longest block of layers.
        reach: how far from its own depth a layer may be inserted, and how far a boundary may be moved.
        least: the fewest layers.
        most: the most layers.
        parameters: the most parameters; None: as many as there are.
        scales: what scales may be; None: there are none.
        matches: by which number each seam's scale is multiplied: the ratio of what a layer is used to (second list) to
            what the layer before returns (first list), both root mean squares by source and layer; empty: none.
        incumbent: what is edited; empty: the primary source.
    """

    names: tuple[str, ...]
    primary: str
    sizes: tuple[int, ...]
    ends: int = 0
    operations: tuple[str, ...] = OPERATIONS
    edits: int = 3
    block: int = 2
    reach: int = 2
    least: int = 1
    most: int = 0
    parameters: int | None = None
    scales: Steps | None = None
    matches: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    incumbent: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        if self.primary not in self.names:
            raise RecipeError(f"primary: {self.primary!r} is no source; {nearest(self.primary, self.names)}")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise RecipeError(f"operations: {operation!r} is not known; {nearest(operation, OPERATIONS)}")
        if not self.operations or self.edits < 1 or self.block < 1 or self.reach < 0:
            raise RecipeError("a stack needs an operation, an edit, and a block of a layer or more")
        for hop in self.incumbent:
            if hop.source not in self.names or not 0 <= hop.layer < self.depth:
                raise RecipeError(f"incumbent: no source has layer {hop.layer} of {hop.source!r}")
        for name in self.names if self.matches else ():
            known = self.matches.get(name, ((), ()))
            if any(len(own) != self.depth or not all(0 < size < math.inf for size in own) for own in known):
                raise RecipeError(f"sizes: {name!r} needs what its {self.depth} layers return and take, all above 0")
        if self.least < 1:
            raise RecipeError(f"depth: a stack has a layer or more, got {self.least}")
        start = self.begin
        if not self.least <= len(start) <= self.most:
            raise RecipeError(
                f"depth: the incumbent has {len(start)} layers, which is not within [{self.least}, {self.most}]"
            )
        if self.parameters is not None and self.count(start) > self.parameters:
            raise RecipeError(f"parameters: the incumbent has {self.count(start):,}, more than {self.parameters:,}")
        check_axes(self.axes)

    @property
    def depth(self) -> int:
        """The number of layers of every source."""
        return len(self.sizes)

    @property
    def begin(self) -> tuple[Hop, ...]:
        """The stack that is edited."""
        return self.incumbent or tuple(Hop(source=self.primary, layer=k) for k in range(self.depth))

    @property
    def headline(self) -> str:
        """What the stacks are, in a line."""
        kinds = ", ".join(self.operations)
        scales = f"scales {self.scales.low:g} to {self.scales.high:g} at seams" if self.scales else "no scales"
        start = "an incumbent of" if self.incumbent else f"{self.primary}'s"
        return (
            f"{self.edits} edits ({kinds}) of {start} {len(self.begin)} layers, "
            f"{self.least} to {self.most} layers, {scales}"
        )

    def count(self, hops: Sequence[Hop]) -> int:
        """Return the number of parameters of a stack, each layer counted as often as it is there."""
        return self.ends + sum(self.sizes[hop.layer] for hop in hops)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, edit by edit."""
        return tuple(axis for k in range(self.edits) for axis in self._axes(k))

    def stack(self, genome: Genome) -> Stack:
        """Return the stack of a genome.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        check_genome(self.axes, genome, "decode")
        genes = {axis.name: gene for axis, gene in zip(self.axes, genome, strict=True)}
        hops = list(self.begin)
        for k in range(self.edits):
            hops = self._edited(hops, {name: genes.get(f"{name}.{k}") for name in _GENES})
        return Stack(embedding=self.primary, hops=tuple(self._settled(hops)), head=self.primary)

    def rest(self) -> Genome:
        """Return the genome that edits nothing."""
        return self.edit({})

    def edit(self, first: Mapping[str, Gene]) -> Genome:
        """Return the genome whose first edit has these genes, and that is else at rest."""
        genes: list[Gene] = []
        for axis in self.axes:
            name, _, k = axis.name.rpartition(".")
            known: dict[str, Gene] = {"op": NONE, "at": 0, "layers": 1, "source": self.names[0]}
            if self.scales is not None:
                known |= dict.fromkeys(("enter", "leave"), round(1 / self.scales.step))
            plain = known.get(name, 0)
            genes.append(first.get(name, plain) if k == "0" else plain)
        return tuple(genes)

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return single drops and single repeats of every layer of the incumbent: operation, place, genome."""
        kinds = [kind for kind in ("drop", "repeat") if kind in self.operations]
        return [
            (kind, at, self.edit({"op": kind, "at": at})) for kind in kinds for at in range(len(self.begin))
        ]

    def sample(self, rng: np.random.Generator, prior: Prior | None = None) -> Genome:
        """Return a random genome: few and short edits, at places of which the prior hopes much."""
        genes: list[Gene] = []
        operation = NONE
        for axis in self.axes:
            name = axis.name.rpartition(".")[0]
            if name == "op":
                operation = NONE if rng.random() < _IDLE else str(rng.choice(self.operations))
                genes.append(operation)
            elif name == "at":
                genes.append(self._place(operation, rng, prior or {}))
            elif name == "layers":
                genes.append(min(int(rng.geometric(1 - _LONGER)), self.block))
            elif name in ("enter", "leave") and self.scales is not None and rng.random() < _PLAIN:
                genes.append(round(1 / self.scales.step))
            else:
                genes.append(from_unit([axis], [rng.random()])[0])
        return tuple(genes)

    def _place(self, operation: str, rng: np.random.Generator, prior: Prior) -> int:
        hopes = prior.get(operation, (1.0,) * len(self.begin))
        return int(rng.choice(len(hopes), p=np.array(hopes) / sum(hopes)))

    def _axes(self, k: int) -> Iterator[Axis]:
        def only(*operations: str) -> ActiveIf | None:
            having = tuple(each for each in self.operations if each in operations)
            return ActiveIf(axis=f"op.{k}", options=having) if having else None

        yield Choice(name=f"op.{k}", options=(NONE, *self.operations))
        yield Whole(name=f"at.{k}", low=0, high=self.most - 1, active_if=only(*OPERATIONS))
        if self.block > 1 and (condition := only(*_BLOCKS)):
            yield Whole(name=f"layers.{k}", low=1, high=self.block, active_if=condition)
        if len(self.names) > 1 and (condition := only(*_BRINGING)):
            yield Choice(name=f"source.{k}", options=self.names, active_if=condition)
        if self.reach and (condition := only("insert")):
            yield Whole(name=f"offset.{k}", low=-self.reach, high=self.reach, active_if=condition)
        if self.reach and (condition := only("move")):
            yield Whole(name=f"shift.{k}", low=-self.reach, high=self.reach, active_if=condition)
        if self.scales is not None and (condition := only(*_BLOCKS)):
            yield self.scales.axis(f"enter.{k}", condition)
        if self.scales is not None and (condition := only(*_BRINGING)):
            yield self.scales.axis(f"leave.{k}", condition)

    def _edited(self, hops: list[Hop], genes: Mapping[str, Gene | None]) -> list[Hop]:
        """Return the stack after one edit; the same where it would leave the bounds."""
        operation, at = str(genes["op"]), int(genes["at"] or 0)
        if operation == NONE:
            return hops
        if operation == "move":
            new = self._moved(hops, at, int(genes["shift"] or 0))
        else:
            new = self._changed(hops, operation, min(at, len(hops) - 1), genes)
        fits = self.least <= len(new) <= self.most
        return new if fits and (self.parameters is None or self.count(new) <= self.parameters) else hops

    def _changed(self, hops: list[Hop], operation: str, at: int, genes: Mapping[str, Gene | None]) -> list[Hop]:
        """Return the stack with a block dropped, repeated, inserted, or taken from another source."""
        length = int(genes["layers"] or 1)
        source = str(genes["source"] or self.names[0])
        enter, leave = (self._scale(genes[name]) for name in ("enter", "leave"))
        before, block, after = hops[:at], hops[at : at + length], hops[at + length :]
        if operation == "drop":
            return [*before, *_entered(after, enter)]
        if operation == "repeat":
            return [*before, *block, *_entered(block, enter), *after]
        if operation == "swap":
            brought = [replace(hop, source=source) for hop in block]
            return [*before, *_entered(brought, enter), *_entered(after, leave)]
        length = min(length, self.depth)
        first = min(max(hops[at].layer + int(genes["offset"] or 0), 0), self.depth - length)
        brought = [Hop(source=source, layer=first + k) for k in range(length)]
        return [*before, *_entered(brought, enter), *_entered([*block, *after], leave)]

    def _moved(self, hops: list[Hop], at: int, shift: int) -> list[Hop]:
        """Return the stack with the boundary at one of its seams moved: one side grows by what the other loses."""
        seams = [0, *(k + 1 for k, (one, two) in enumerate(pairwise(hops)) if not follows(two, one)), len(hops)]
        if len(seams) == 2 or shift == 0:
            return hops
        k = 1 + at % (len(seams) - 2)
        start, seam, end = seams[k - 1 : k + 2]
        left, right = hops[start:seam], hops[seam:end]
        if shift > 0:
            grown = min(shift, len(right), self.depth - 1 - left[-1].layer)
            left += [replace(left[-1], layer=left[-1].layer + 1 + i, scale=1.0) for i in range(grown)]
            right = _entered(right[grown:], right[0].scale)
        else:
            grown = min(-shift, len(left), right[0].layer)
            left = left[: len(left) - grown]
            first = right[0]
            right = [replace(first, layer=first.layer - grown + i, scale=1.0) for i in range(grown)] + right
            right = _entered([*right[:grown], replace(right[grown], scale=1.0), *right[grown + 1 :]], first.scale)
        return [*hops[:start], *left, *right, *hops[end:]]

    def _scale(self, gene: Gene | None) -> float:
        return 1.0 if gene is None or self.scales is None else float(gene) * self.scales.step

    def _settled(self, hops: Sequence[Hop]) -> Iterator[Hop]:
        """Yield the hops with scales at seams alone, matched where that is wanted."""
        for k, hop in enumerate(hops):
            if k == 0 or follows(hop, hops[k - 1]):
                yield replace(hop, scale=1.0)
            else:
                yield replace(hop, scale=hop.scale * self._match(hops[k - 1], hop))

    def _match(self, before: Hop, hop: Hop) -> float:
        """Return the ratio of the size that a layer is used to, to the size that it gets; in steps where there are."""
        if not self.matches:
            return 1.0
        ratio = self.matches[hop.source][1][hop.layer] / self.matches[before.source][0][before.layer]
        step = self.scales.step if self.scales is not None else 2.0**-6
        return max(round(ratio / step), 1) * step


#: The genes of an edit.
_GENES = ("op", "at", "layers", "source", "offset", "shift", "enter", "leave")


def check_names(edits: Edits, known: Sequence[str]) -> None:
    """Refuse edits that take layers of what is no source.

    Raises:
        RecipeError: with the nearest name.
    """
    for name in edits.names:
        if name not in known:
            raise RecipeError(f"edits take layers of {name!r}, which is no source; {nearest(name, known)}")


def prior_of(gains: Mapping[str, Sequence[float | None]]) -> Prior:
    """Return how much is hoped of each layer from what probes gained there, by operation.

    A Boltzmann distribution over gains, whose temperature is their own spread, beside an even share. A probe that
    failed (None) counts as the worst.

    Args:
        gains: by operation, for each layer: the mean score of the probe minus that of the stack that was probed.
    """
    found: dict[str, tuple[float, ...]] = {}
    for operation, own in gains.items():
        if not own:
            continue
        worst = min((gain for gain in own if gain is not None), default=0.0)
        full = np.array([worst if gain is None else gain for gain in own])
        spread = float(full.std()) or 1.0
        hopes = np.exp((full - full.max()) / spread)
        even = _EVEN / len(hopes)
        found[operation] = tuple((even + (1 - _EVEN) * hopes / hopes.sum()).tolist())
    return found


def follows(hop: Hop, before: Hop) -> bool:
    """Tell whether a layer stands behind the one before it in its own source too."""
    return hop.source == before.source and hop.layer == before.layer + 1


def _entered(hops: Sequence[Hop], scale: float) -> list[Hop]:
    """Return hops of which the first has another scale."""
    return [replace(hops[0], scale=scale), *hops[1:]] if hops else []

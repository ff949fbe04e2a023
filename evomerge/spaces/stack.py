"""The spaces of layer stacks: which source's which layer comes next, how often, and scaled by how much."""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise

import numpy as np

from evomerge.errors import RecipeError
from evomerge.genome import Axis, Genome, Real, check_genome
from evomerge.hops import Hop, Stack, recipe_of
from evomerge.recipe import Blend, Recipe, Route, Source
from evomerge.spaces.edits import Edits, Prior, check_names
from evomerge.value import value


@value
class PathSpace:
    """Stacks of the layers of several sources as they are, by edits of an incumbent.

    Attributes:
        sources: the models that layers are taken from.
        edits: what may be done.
        dtype: of the models to build.
        base: a model that only baselines take task vectors from.
        probed: whether single drops and repeats are asked before the search, as a prior over edits.
    """

    sources: tuple[Source, ...]
    edits: Edits
    dtype: str
    base: Source | None = None
    probed: bool = True

    def __post_init__(self) -> None:
        check_names(self.edits, [source.name for source in self.sources])

    @property
    def depth(self) -> int:
        """The number of layers of every source."""
        return self.edits.depth

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, edit by edit."""
        return self.edits.axes

    @property
    def most(self) -> int:
        """The most layers that a candidate has."""
        return self.edits.most

    @property
    def headline(self) -> str:
        """What the space is, in a line."""
        return self.edits.headline

    @property
    def start(self) -> Genome | None:
        """Where a search begins: the incumbent."""
        return self.edits.rest()

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        return recipe_of(self.edits.stack(genome), self.sources, self.dtype)

    def sample(self, rng: np.random.Generator, prior: Prior | None = None) -> Genome:
        """Return a random genome."""
        return self.edits.sample(rng, prior)

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return what is asked first to learn which layers matter: operation, place, genome."""
        return self.edits.probes() if self.probed else []

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe of a blend of all sources with one weight each, for baselines."""
        return blended(self.sources, self.base, self.depth, self.dtype, method, weight)

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome of a source as it is, if it is the incumbent; None for all else."""
        alone = [name for name, own in weight.items() if own != 0]
        whole = tuple(Hop(source=self.edits.primary, layer=k) for k in range(self.depth))
        same = self.edits.begin == whole and alone == [self.edits.primary] and weight[alone[0]] == 1.0
        return self.edits.rest() if same else None

    def genome_of_defaults(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return what `genome_of_constant` does: no parameter is searched."""
        return self.genome_of_constant(method, weight)


@value
class SakanaSpace:
    """The data flow space of Akiba 2024 ("Evolutionary optimization of model merging recipes", 3.2), as published.

    The layers of all sources stand one after the other, and all of that r times: hop t is taken where its indicator is
    above 0. The input of layer j that comes from layer i is multiplied by 1 + W_ij. The first and the last layer of the
    primary source begin and end every stack. A genome is the T = M r indicators, then W row by row: T + M^2 genes.

    Attributes:
        sources: the models that layers are taken from, the primary first.
        depth: number of layers of every source; M is that times the number of sources.
        dtype: of the models to build.
        repetitions: r.
        favour: the mean of the primary source's indicators in the first repetition when a search begins; others' is 0.
        base: a model that only baselines take task vectors from.
    """

    sources: tuple[Source, ...]
    depth: int
    dtype: str
    repetitions: int = 3
    favour: float = 0.2
    base: Source | None = None

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise RecipeError(f"repetitions must be at least 1, got {self.repetitions}")
        if not 0 <= self.favour <= 1:
            raise RecipeError(f"favour must lie in [0, 1], got {self.favour}")

    @property
    def layers(self) -> int:
        """M, the number of layers of all sources together."""
        return self.depth * len(self.sources)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes: indicators, then scales from every layer to every layer, all of them 2 wide."""
        count = self.layers
        indicators = (Real(name=f"indicator.{t}", low=-1.0, high=1.0) for t in range(count * self.repetitions))
        # above -1, so that no scale is 0 or less
        scales = (Real(name=f"scale.{i}.{j}", low=-0.9, high=1.1) for i in range(count) for j in range(count))
        return (*indicators, *scales)

    @property
    def most(self) -> int:
        """The most layers that a candidate has: every indicator's, and both ends."""
        return self.layers * self.repetitions + 2

    @property
    def headline(self) -> str:
        """What the space is, in a line."""
        return (
            f"stacks as Akiba 2024: {self.layers} layers gone through {self.repetitions} times, "
            f"{self.layers**2} scales, ends of {self.sources[0].name}"
        )

    @property
    def start(self) -> Genome | None:
        """The first mean: the primary source's layers favoured, no scale."""
        hops, count = self.layers * self.repetitions, self.layers
        return tuple(self.favour if t < self.depth else 0.0 for t in range(hops)) + (0.0,) * count**2

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        check_genome(self.axes, genome, "decode")
        count = self.layers
        split = count * self.repetitions
        taken = [t % count for t in range(split) if float(genome[t]) > 0]
        path = [0, *taken, self.depth - 1]
        scales = [1.0, *(1.0 + float(genome[split + i * count + j]) for i, j in pairwise(path))]
        hops = tuple(
            Hop(source=self.sources[j // self.depth].name, layer=j % self.depth, scale=scale)
            for j, scale in zip(path, scales, strict=True)
        )
        primary = self.sources[0].name
        return recipe_of(Stack(embedding=primary, hops=hops, head=primary), self.sources, self.dtype)

    def sample(self, rng: np.random.Generator, prior: Prior | None = None) -> Genome:
        """Return a genome drawn about the first mean, with the published standard deviation of a search's beginning."""
        mean = np.array(self.start, dtype=np.float64)
        drawn = mean + SAKANA_SIGMA * rng.standard_normal(len(mean))
        return tuple(
            float(np.clip(x, axis.low, axis.high))
            for x, axis in zip(drawn.tolist(), self.axes, strict=True)
            if isinstance(axis, Real)
        )

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return nothing: the published search has no probes."""
        return []

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe of a blend of all sources with one weight each, for baselines."""
        return blended(self.sources, self.base, self.depth, self.dtype, method, weight)

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return None: the forced ends stand beside those that indicators name, so no source is in the space."""
        return None

    def genome_of_defaults(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return what `genome_of_constant` does: no parameter is searched."""
        return self.genome_of_constant(method, weight)


#: The standard deviation with which EvoJAX's CMA-ES begins by default.
SAKANA_SIGMA = 0.1


def blended(
    sources: tuple[Source, ...],
    base: Source | None,
    depth: int,
    dtype: str,
    method: str,
    weight: Mapping[str, float],
) -> Recipe:
    """Return the recipe of one blend of all tensors."""
    route = Route(blend=Blend(method=method, weights=dict(weight)))
    return Recipe(sources=sources, base=base, routes=(route,), layers=tuple(range(depth)), dtype=dtype)

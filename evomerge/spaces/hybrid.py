"""The hybrid space: stacks whose layers are blends; parameter-space genes for layers, stacking genes for order."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from evomerge.errors import RecipeError
from evomerge.genome import Axis, Genome, check_axes, check_genome, from_unit
from evomerge.hops import Hop, recipe_of
from evomerge.recipe import Recipe, Source
from evomerge.spaces.blend import BlendSpace
from evomerge.spaces.edits import NONE, Edits, Prior, check_names
from evomerge.value import value

#: What the blend is called among the sources of a stack.
BLEND = "blend"


@value
class HybridSpace:
    """Stacks of one blend's layers, and of sources' own where edits bring them.

    Attributes:
        blend: how the layers are blended.
        edits: how they are stacked; `BLEND` is the primary source.
        probed: whether the blend that a search begins with is asked before it, with single drops and repeats.
    """

    blend: BlendSpace
    edits: Edits
    probed: bool = True

    def __post_init__(self) -> None:
        if any(source.name == BLEND for source in self.blend.sources):
            raise RecipeError(f"a source must not be called {BLEND!r} in a hybrid space; rename it")
        if self.edits.primary != BLEND:
            raise RecipeError(f"the primary source of a hybrid space is {BLEND!r}, not {self.edits.primary!r}")
        check_axes(self.axes)
        check_names(self.edits, [BLEND, *(source.name for source in self.blend.sources)])
        if self.edits.depth != self.blend.depth:
            raise RecipeError(f"edits are of {self.edits.depth} layers, but the blend has {self.blend.depth} layers")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The models that are blended and stacked."""
        return self.blend.sources

    @property
    def base(self) -> Source | None:
        """The model that task vectors are taken from."""
        return self.blend.base

    @property
    def depth(self) -> int:
        """The number of layers of every source."""
        return self.blend.depth

    @property
    def dtype(self) -> str:
        """The dtype of the models to build."""
        return self.blend.dtype

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the blend, then those of the edits."""
        return (*self.blend.axes, *self.edits.axes)

    @property
    def most(self) -> int:
        """The most layers that a candidate has."""
        return self.edits.most

    @property
    def headline(self) -> str:
        """What the space is, in a line."""
        return f"{self.blend.headline}; {self.edits.headline}"

    @property
    def start(self) -> Genome | None:
        """Where the blend begins, or the middle of its axes, nothing edited."""
        blend = self.blend.start or from_unit(self.blend.axes, [0.5] * len(self.blend.axes))
        return (*blend, *self.edits.rest())

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome: a stack of a source that is a recipe itself, or that recipe alone.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        check_genome(self.axes, genome, "decode")
        split = len(self.blend.axes)
        inner = self.blend.decode(genome[:split])
        stack = self.edits.stack(genome[split:])
        if stack.hops == tuple(Hop(source=BLEND, layer=k) for k in range(self.depth)):
            return inner
        return recipe_of(stack, (Source(name=BLEND, recipe=inner), *self.sources), self.dtype)

    def sample(self, rng: np.random.Generator, prior: Prior | None = None) -> Genome:
        """Return a random genome: uniform for the blend, few edits."""
        blend = from_unit(self.blend.axes, rng.random(len(self.blend.axes)))
        return (*blend, *self.edits.sample(rng, prior))

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return what is asked first to learn which layers matter: operation, place, genome."""
        if not self.probed:
            return []
        blend = (self.start or ())[: len(self.blend.axes)]
        edits = [(NONE, 0, self.edits.rest()), *self.edits.probes()]
        return [(kind, at, (*blend, *genes)) for kind, at, genes in edits]

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe with one weight per source everywhere and the method's default parameters."""
        return self.blend.constant(method, weight)

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome that decodes to `constant(method, weight)`, or None if the space has none."""
        found = self.blend.genome_of_constant(method, weight)
        return None if found is None else (*found, *self.edits.rest())

    def genome_of_defaults(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome that decodes to `constant(method, weight)` where parameters are searched too, or None."""
        found = self.blend.genome_of_defaults(method, weight)
        return None if found is None else (*found, *self.edits.rest())

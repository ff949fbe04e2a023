"""The parameter space: how much of each source, layer by layer and module by module, by which method."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import product

import numpy as np

from evomerge.errors import RecipeError
from evomerge.genome import ActiveIf, Axis, Choice, Gene, Genome, Real, check_axes, check_genome
from evomerge.recipe import GROUPS, Blend, Layer, Parameter, Recipe, Source
from evomerge.value import value

#: The name of the axis that chooses the method, where there is a choice.
METHOD_AXIS = "method"


@value
class Range:
    """Bounds of a gene; with `log` it is searched on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@value
class ParameterRange:
    """Bounds of a method's parameter: one gene for the whole recipe, or one per source.

    `methods` are those that have the parameter; where the method is itself a gene, the
    parameter's genes are active only under them.
    """

    low: float
    high: float
    log: bool = False
    per_source: bool = False
    methods: tuple[str, ...] = ()


@value
class BlendSpace:
    """Blends of sources that share one architecture.

    There is one weight gene per source, depth knot and module set, so `sources x knots x
    modules` weights; then the parameters of the methods, and the method itself where
    several are given.

    Attributes:
        sources: the models that are blended.
        base: the model that task vectors are taken from; None for methods that need none.
        depth: number of layers of the sources.
        methods: names of the methods; the choice is a gene where there are several.
        knots: number of values over depth.
        profile: `constant` cuts the depth into `knots` groups of layers as equal as can be
            and gives each one value; `linear` places the values evenly from the first to the
            last layer and interpolates between them.
        modules: sets of module groups that share weights; together all of `GROUPS`.
        weight: bounds of every weight gene.
        parameters: bounds of the methods' parameters, by name.
        dtype: dtype of the models to build.
        seed: key of the methods' random masks, the same for every candidate of a run.
    """

    sources: tuple[Source, ...]
    base: Source | None
    depth: int
    methods: tuple[str, ...]
    knots: int
    profile: str
    modules: tuple[tuple[str, ...], ...]
    weight: Range
    parameters: Mapping[str, ParameterRange]
    dtype: str
    seed: int = 0

    def __post_init__(self) -> None:
        if sorted(group for modules in self.modules for group in modules) != sorted(GROUPS):
            raise RecipeError(f"modules must hold each of {', '.join(GROUPS)} once, got {self.modules}")
        if self.profile not in ("constant", "linear"):
            raise RecipeError(f"profile must be constant or linear, got {self.profile!r}")
        if not 1 <= self.knots <= self.depth:
            raise RecipeError(f"knots must lie in [1, {self.depth}] for {self.depth} layers, got {self.knots}")
        check_axes(self.axes)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, method first, then weights (source by source), then parameters."""
        return tuple(self._axes())

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        check_genome(self.axes, genome, "decode")
        genes = {axis.name: gene for axis, gene in zip(self.axes, genome, strict=True)}
        method = str(genes.get(METHOD_AXIS, self.methods[0]))
        knots = {
            (source.name, m): [float(genes[f"weight.{source.name}.{m}.{k}"]) for k in range(self.knots)]
            for source, m in product(self.sources, range(len(self.modules)))
        }
        return self._recipe(method, knots, self._read_parameters(method, genes))

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe with one weight per source everywhere and the method's default parameters.

        It need not lie within the bounds: the baselines of a run are made by it.
        """
        knots = {
            (source.name, m): [weight[source.name]] * self.knots
            for source, m in product(self.sources, range(len(self.modules)))
        }
        return self._recipe(method, knots, {})

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome that decodes to `constant(method, weight)`, or None if the space has none."""
        if method not in self.methods or self._parameters_of(method):
            return None
        genes: list[Gene] = []
        for axis in self.axes:
            if axis.name == METHOD_AXIS:
                genes.append(method)
            elif axis.name.startswith("weight."):
                # The name of a source may have dots of its own.
                genes.append(weight[axis.name.removeprefix("weight.").rsplit(".", 2)[0]])
            else:
                genes.append(axis.from_unit(0.5))
        fits = all(axis.contains(gene) for axis, gene in zip(self.axes, genes, strict=True))
        return tuple(genes) if fits else None

    def _axes(self) -> Iterator[Axis]:
        several = len(self.methods) > 1
        if several:
            yield Choice(name=METHOD_AXIS, options=self.methods)
        for source, m, k in product(self.sources, range(len(self.modules)), range(self.knots)):
            w = self.weight
            yield Real(name=f"weight.{source.name}.{m}.{k}", low=w.low, high=w.high, log=w.log)
        for name, bounds in self.parameters.items():
            methods = tuple(method for method in self.methods if method in bounds.methods)
            if not methods:
                continue
            condition = ActiveIf(axis=METHOD_AXIS, options=methods) if several else None
            owners = [f".{source.name}" for source in self.sources] if bounds.per_source else [""]
            for owner in owners:
                yield Real(
                    name=name + owner, low=bounds.low, high=bounds.high, log=bounds.log, active_if=condition
                )

    def _parameters_of(self, method: str) -> list[str]:
        return [name for name, bounds in self.parameters.items() if method in bounds.methods]

    def _read_parameters(self, method: str, genes: Mapping[str, Gene]) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        for name in self._parameters_of(method):
            if self.parameters[name].per_source:
                found[name] = {source.name: float(genes[f"{name}.{source.name}"]) for source in self.sources}
            else:
                found[name] = float(genes[name])
        return found

    def _recipe(
        self, method: str, knots: Mapping[tuple[str, int], list[float]], parameters: Mapping[str, Parameter]
    ) -> Recipe:
        module_of = {group: m for m, modules in enumerate(self.modules) for group in modules}

        def blend(group: str, layer: int) -> Blend:
            m = module_of[group]
            weights = {source.name: self._at(knots[source.name, m], layer) for source in self.sources}
            return Blend(method=method, weights=weights, parameters=parameters)

        layers = tuple(
            Layer(depth=i, attention=blend("attention", i), mlp=blend("mlp", i), other=blend("other", i))
            for i in range(self.depth)
        )
        return Recipe(
            sources=self.sources,
            base=self.base,
            embedding=blend("other", 0),
            layers=layers,
            head=blend("other", self.depth - 1),
            dtype=self.dtype,
            seed=self.seed,
        )

    def _at(self, knots: list[float], layer: int) -> float:
        """Return the value of a depth profile at a layer; both ends of the model take the end values."""
        if self.profile == "constant" or len(knots) == 1:
            return knots[layer * len(knots) // self.depth]
        place = layer / (self.depth - 1) * (len(knots) - 1)
        return float(np.interp(place, range(len(knots)), knots))

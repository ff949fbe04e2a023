"""The parameter space: how much of each source, layer by layer and module by module, by which method."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import product

import numpy as np

from evomerge.errors import RecipeError
from evomerge.genome import ActiveIf, Axis, Choice, Gene, Genome, Real, Whole, check_axes, check_genome, from_unit
from evomerge.methods import canonical
from evomerge.recipe import ENDS, GROUPS, Blend, Parameter, Recipe, Route, Source
from evomerge.value import value

#: The name of the axis that chooses the method, where there is a choice.
METHOD_AXIS = "method"

#: The option of a slot that leaves it empty.
NONE = "none"


@value
class Range:
    """Bounds of a gene; with `log` it is searched on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@value
class ParameterRange:
    """What a method's parameter may be: a range or options, one gene for the whole recipe or one per source.

    With one value or option it is no gene.

    Attributes:
        low: the least value, where it is a number.
        high: the greatest.
        log: whether it is searched on a logarithmic scale.
        whole: whether it is a whole number.
        options: its values, where it is a word.
        per_source: whether each source has its own.
        methods: those that have the parameter; where the method is itself a gene, the parameter's genes are active
            only under them. Where a line is made of slots, these are options of `slot`.
        slot: the slot whose choice decides whether the parameter counts.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    options: tuple[str, ...] = ()
    per_source: bool = False
    methods: tuple[str, ...] = ()
    slot: str = METHOD_AXIS

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.options) == 1 if self.options else self.low == self.high

    def axis(self, name: str, active_if: ActiveIf | None) -> Axis:
        """Return the axis of one of its genes."""
        if self.options:
            return Choice(name=name, options=self.options, active_if=active_if)
        if self.whole:
            return Whole(name=name, low=int(self.low), high=int(self.high), log=self.log, active_if=active_if)
        return Real(name=name, low=self.low, high=self.high, log=self.log, active_if=active_if)


@value
class Slot:
    """A place in a line of stages and what may stand there: stages with or without settings, or `none`."""

    name: str
    options: tuple[str, ...]


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
        methods: names of methods, or lines of stages; the choice is a gene where there are several.
        slots: in place of methods: the parts of a line, in order, each a gene where it has several options.
        calibration: a file of texts, for methods that take statistics.
        routes: go before those that the genome makes: tensors that they take are not searched.
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
    slots: tuple[Slot, ...] = ()
    routes: tuple[Route, ...] = ()
    calibration: Source | None = None

    def __post_init__(self) -> None:
        if bool(self.methods) == bool(self.slots):
            raise RecipeError("a space has either methods or slots, at least one")
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

    @property
    def most(self) -> int:
        """The most layers that a candidate has: as many as the sources."""
        return self.depth

    @property
    def headline(self) -> str:
        """What the space is, in a line."""
        line = ", ".join(self.methods) or " | ".join(slot.name for slot in self.slots)
        modules = " | ".join("+".join(own) for own in self.modules)
        return f"{line}; {self.knots} {self.profile} over depth, modules {modules}"

    @property
    def start(self) -> Genome | None:
        """Nothing: a search begins with the best that is known."""
        return None

    def sample(self, rng: np.random.Generator, prior: Mapping[str, tuple[float, ...]] | None = None) -> Genome:
        """Return a random genome, uniform in the unit cube; there is no prior."""
        return from_unit(self.axes, rng.random(len(self.axes)))

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return nothing: layers are neither left out nor repeated."""
        return []

    def decode(self, genome: Genome) -> Recipe:
        """Return the recipe of a genome.

        Raises:
            RecipeError: if the genome does not fit the axes.
        """
        check_genome(self.axes, genome, "decode")
        genes = {axis.name: gene for axis, gene in zip(self.axes, genome, strict=True)}
        chosen = {slot.name: str(genes.get(slot.name, slot.options[0])) for slot in self._slots}
        knots = {
            (source.name, m): [float(genes[f"weight.{source.name}.{m}.{k}"]) for k in range(self.knots)]
            for source, m in product(self.sources, range(len(self.modules)))
        }
        return self._recipe(_line(chosen), knots, self._read_parameters(chosen, genes))

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
        chosen = self._choice_of(method)
        if chosen is None or self._parameters_of(chosen):
            return None
        genes: list[Gene] = []
        for axis in self.axes:
            if axis.name in chosen:
                genes.append(chosen[axis.name])
            elif axis.name.startswith("weight."):
                # The name of a source may have dots of its own.
                genes.append(weight[axis.name.removeprefix("weight.").rsplit(".", 2)[0]])
            else:
                genes.append(axis.from_unit(0.5))
        fits = all(axis.contains(gene) for axis, gene in zip(self.axes, genes, strict=True))
        return tuple(genes) if fits else None

    @property
    def _slots(self) -> tuple[Slot, ...]:
        return self.slots or (Slot(name=METHOD_AXIS, options=self.methods),)

    def _choice_of(self, method: str) -> dict[str, str] | None:
        """Return the options whose line is a method, or None; a long list of lines is not looked through."""
        options = [slot.options for slot in self._slots]
        if math.prod(len(each) for each in options) > _MOST_LINES:
            return None
        wanted = canonical(method, {}, {})
        for choice in product(*options):
            chosen = dict(zip((slot.name for slot in self._slots), choice, strict=True))
            if canonical(_line(chosen), {}, {}) == wanted:
                return chosen
        return None

    def _axes(self) -> Iterator[Axis]:
        for slot in self._slots:
            if len(slot.options) > 1:
                yield Choice(name=slot.name, options=slot.options)
        for source, m, k in product(self.sources, range(len(self.modules)), range(self.knots)):
            w = self.weight
            yield Real(name=f"weight.{source.name}.{m}.{k}", low=w.low, high=w.high, log=w.log)
        for name, bounds in self.parameters.items():
            options = next((slot.options for slot in self._slots if slot.name == bounds.slot), ())
            having = tuple(option for option in options if option in bounds.methods)
            if not having or bounds.fixed:
                continue
            condition = ActiveIf(axis=bounds.slot, options=having) if len(options) > 1 else None
            owners = [f".{source.name}" for source in self.sources] if bounds.per_source else [""]
            yield from (bounds.axis(name + owner, condition) for owner in owners)

    def _parameters_of(self, chosen: Mapping[str, str]) -> list[str]:
        return [name for name, bounds in self.parameters.items() if chosen.get(bounds.slot) in bounds.methods]

    def _read_parameters(self, chosen: Mapping[str, str], genes: Mapping[str, Gene]) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        for name in self._parameters_of(chosen):
            bounds = self.parameters[name]
            if bounds.fixed:
                found[name] = bounds.options[0] if bounds.options else bounds.low
            elif bounds.options:
                found[name] = str(genes[name])
            elif bounds.per_source:
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

        ends = zip(ENDS, (0, self.depth - 1), strict=True)
        return Recipe(
            sources=self.sources,
            base=self.base,
            routes=(
                *self.routes,
                *(Route(blend=blend("other", layer), groups=(end,)) for end, layer in ends),
                *(route for modules in self.modules for route in self._runs(modules, blend)),
            ),
            layers=tuple(range(self.depth)),
            dtype=self.dtype,
            seed=self.seed,
            calibration=self.calibration,
        )

    def _runs(self, modules: tuple[str, ...], blend: Callable[[str, int], Blend]) -> Iterator[Route]:
        """Yield one route for each run of layers that are blended alike."""
        groups = () if set(modules) == set(GROUPS) else modules
        blends = [blend(modules[0], layer) for layer in range(self.depth)]
        start = 0
        for stop in range(1, self.depth + 1):
            if stop == self.depth or blends[stop] != blends[start]:
                whole = (start, stop) == (0, self.depth)
                yield Route(blend=blends[start], groups=groups, layers=None if whole else (start, stop))
                start = stop

    def _at(self, knots: list[float], layer: int) -> float:
        """Return the value of a depth profile at a layer; both ends of the model take the end values."""
        if self.profile == "constant" or len(knots) == 1:
            return knots[layer * len(knots) // self.depth]
        place = layer / (self.depth - 1) * (len(knots) - 1)
        return float(np.interp(place, range(len(knots)), knots))


#: The most lines that are looked through for one that is a given method.
_MOST_LINES = 4096


def _line(chosen: Mapping[str, str]) -> str:
    """Return the method that the chosen options of all slots make."""
    return " | ".join(option for option in chosen.values() if option != NONE)

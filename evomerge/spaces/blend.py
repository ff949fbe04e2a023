"""The parameter space: how much of each source, layer by layer and module by module, by which method."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from itertools import count, product

import numpy as np

from evomerge.errors import RecipeError, nearest
from evomerge.genome import ActiveIf, Axis, Choice, Gene, Genome, Real, Whole, check_axes, check_genome, from_unit
from evomerge.methods import canonical
from evomerge.methods import method as method_of
from evomerge.recipe import ENDS, GROUPS, Blend, Parameter, Recipe, Route, Source
from evomerge.spaces.ranges import METHOD_AXIS, NONE, ParameterRange, Range, Slot
from evomerge.value import value

__all__ = ["METHOD_AXIS", "NONE", "BlendSpace", "ParameterRange", "Range", "Slot"]

#: Which options stand in the slots, by the slot's name.
Chosen = Mapping[str, str]


@value
class BlendSpace:
    """Blends of sources that share one architecture.

    There is one weight gene per source, module set and depth knot of it, so `sources x knots x
    modules` weights where all sets have equally many knots; then the parameters of the methods, and
    the method itself where several are given.

    Attributes:
        sources: the models that are blended.
        base: the model that task vectors are taken from; None for methods that need none.
        depth: number of layers of the sources.
        methods: names of methods, or lines of stages; the choice is a gene where there are several.
        slots: in place of methods: the parts of a line, in order, each a gene where it has several options.
        calibration: a file of texts, for methods that take statistics.
        routes: go before those that the genome makes: tensors that they take are not searched.
        knots: number of values over depth: one for all module sets, or one for each.
        profile: `constant` cuts the depth into `knots` groups of layers as equal as can be
            and gives each one value; `linear` places the values evenly from the first to the
            last layer and interpolates between them.
        modules: sets of module groups that share weights; together all of `GROUPS`.
        weight: bounds of every weight gene.
        parameters: bounds of the methods' parameters, by name.
        per_knot: whether methods, or the options of slots, are chosen for each group of layers and not for all.
        first: where a search begins: genes by the name of their axis or what it begins with before a dot (`weight`,
            `density.math`), the longest counts; axes that are not named begin in their middle. Empty: nowhere.
        dtype: dtype of the models to build.
        seed: key of the methods' random masks, the same for every candidate of a run.
    """

    sources: tuple[Source, ...]
    base: Source | None
    depth: int
    methods: tuple[str, ...]
    knots: int | tuple[int, ...]
    profile: str
    modules: tuple[tuple[str, ...], ...]
    weight: Range
    parameters: Mapping[str, ParameterRange]
    dtype: str
    seed: int = 0
    slots: tuple[Slot, ...] = ()
    routes: tuple[Route, ...] = ()
    calibration: Source | None = None
    per_knot: bool = False
    first: Mapping[str, Gene] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.methods) == bool(self.slots):
            raise RecipeError("a space has either methods or slots, at least one")
        if sorted(group for modules in self.modules for group in modules) != sorted(GROUPS):
            raise RecipeError(f"modules must hold each of {', '.join(GROUPS)} once, got {self.modules}")
        if self.profile not in ("constant", "linear"):
            raise RecipeError(f"profile must be constant or linear, got {self.profile!r}")
        self._check_knots()
        check_axes(self.axes)
        self._check_first()

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
        same = len(set(self._knots)) == 1
        knots = " | ".join(str(count) for count in self._knots[: 1 if same else None])
        return f"{line}; {knots} {self.profile} over depth, modules {modules}"

    @cached_property
    def start(self) -> Genome | None:
        """Where a search begins, if the space says so; else it begins with the best that is known."""
        return tuple(self._begin(axis) for axis in self.axes) if self.first else None

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
        return self._recipe(lambda m, layer: self._blend(genes, m, layer))

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe with one weight per source everywhere and the method's default parameters.

        It need not lie within the bounds: the baselines of a run are made by it.
        """
        weights = {source.name: weight[source.name] for source in self.sources}
        return self._recipe(lambda m, layer: Blend(method=method, weights=weights))

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome that decodes to `constant(method, weight)`, or None if the space has none.

        Where `t` goes from one of two sources to the other, one of them alone is an end of it, up to the rounding of
        sums.
        """
        chosen = self._choice_of(method)
        if chosen is None and "t" in self.parameters and self.weight.fixed:
            return self._end([weight[source.name] for source in self.sources])
        if chosen is None or self._parameters_of(chosen):
            return None
        return self._constant_genome(method, weight, chosen, {})

    def genome_of_defaults(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome that decodes to `constant(method, weight)` where parameters are searched too.

        None if the space has none, as where the method's default is outside of a parameter's bounds.
        """
        chosen = self._choice_of(method)
        if chosen is None:
            return None
        known = method_of(method).parameters
        # `stage.parameter` is a name for what may have a shorter one
        found = {name: known.get(name) or known.get(name.rpartition(".")[2]) for name in self._parameters_of(chosen)}
        defaults = {name: parameter.default for name, parameter in found.items() if parameter is not None}
        return self._constant_genome(method, weight, chosen, defaults)

    def _constant_genome(
        self, method: str, weight: Mapping[str, float], chosen: Chosen, parameters: Mapping[str, Gene]
    ) -> Genome | None:
        """Return the genome with one weight per source everywhere; None if there is none that decodes to that."""
        given: dict[str, Gene] = {}
        for slot, option in chosen.items():
            given |= dict.fromkeys(self._choices(slot), option)
        for source, m in product(self.sources, range(len(self.modules))):
            given |= dict.fromkeys(self._at_knots(f"weight.{source.name}", m), weight[source.name])
        for name, default in parameters.items():
            given |= dict.fromkeys((each for each, _ in self._genes_of(name)), default)
        genome = self._genome_of(given)
        same = genome is not None and self.decode(genome).digest == self.constant(method, weight).digest
        return genome if same else None

    def _end(self, shares: list[float]) -> Genome | None:
        """Return the genome with `t` at 0 or 1 everywhere, where that gives all to one of two sources."""
        if shares not in ([1.0, 0.0], [0.0, 1.0]):
            return None
        return self._genome_of(dict.fromkeys((each for each, _ in self._genes_of("t")), shares[1]))

    def _genome_of(self, given: Mapping[str, Gene]) -> Genome | None:
        """Return the genome with some genes, by axis, and the middle of all others; None if a gene is out of bounds."""
        genome = tuple(
            _gene(axis, given[axis.name]) if axis.name in given else axis.from_unit(0.5) for axis in self.axes
        )
        return genome if all(axis.contains(g) for axis, g in zip(self.axes, genome, strict=True)) else None

    @property
    def _slots(self) -> tuple[Slot, ...]:
        return self.slots or (Slot(name=METHOD_AXIS, options=self.methods),)

    @cached_property
    def _knots(self) -> tuple[int, ...]:
        """The number of knots of each module set."""
        return (self.knots,) * len(self.modules) if isinstance(self.knots, int) else self.knots

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
                yield from (Choice(name=name, options=slot.options) for name in self._choices(slot.name))
        if not self.weight.fixed:
            yield from self._weights()
        for name, bounds in self.parameters.items():
            options = next((slot.options for slot in self._slots if slot.name == bounds.slot), ())
            having = tuple(option for option in options if option in bounds.methods)
            if having and not bounds.fixed:
                yield from (bounds.axis(each, self._if(bounds.slot, having, k)) for each, k in self._genes_of(name))

    def _weights(self) -> Iterator[Axis]:
        w = self.weight
        for source, m in product(self.sources, range(len(self.modules))):
            for k, name in enumerate(self._at_knots(f"weight.{source.name}", m)):
                condition = self._if(METHOD_AXIS, w.methods, k) if w.methods else None
                yield Real(name=name, low=w.low, high=w.high, log=w.log, active_if=condition)

    def _if(self, slot: str, having: tuple[str, ...], knot: int | None) -> ActiveIf | None:
        """Return the condition that a slot has one of some options, for a gene at a knot or for the whole depth."""
        if sum(len(each.options) for each in self._slots if each.name == slot) < 2:
            return None
        if not self.per_knot:
            return ActiveIf(axis=slot, options=having)
        # What is one for the whole depth counts wherever the choice is made.
        return None if knot is None else ActiveIf(axis=f"{slot}.{knot}", options=having)

    def _choices(self, slot: str) -> list[str]:
        """Return the names of a slot's axes."""
        return self._at_knots(slot) if self.per_knot else [slot]

    def _genes_of(self, parameter: str) -> list[tuple[str, int | None]]:
        """Return the names of a parameter's axes, and the knot that each stands at; None: all."""
        bounds = self.parameters[parameter]
        owners = [f"{parameter}.{source.name}" for source in self.sources] if bounds.per_source else [parameter]
        if not bounds.per_knot:
            return [(owner, None) for owner in owners]
        sets = range(len(self.modules))
        return [each for owner, m in product(owners, sets) for each in zip(self._at_knots(owner, m), count())]

    def _at_knots(self, name: str, modules: int | None = None) -> list[str]:
        """Return the names of the axes at all knots of a module set, or of what all sets have in common."""
        if modules is None:
            return [f"{name}.{k}" for k in range(self._knots[0])]
        return [f"{name}.{modules}.{k}" for k in range(self._knots[modules])]

    def _parameters_of(self, chosen: Chosen) -> list[str]:
        return [name for name, bounds in self.parameters.items() if chosen.get(bounds.slot) in bounds.methods]

    def _blend(self, genes: Mapping[str, Gene], modules: int, layer: int) -> Blend:
        """Return what a genome says of a module set in a layer."""

        def at(name: str) -> float:
            return self._at([float(genes[each]) for each in self._at_knots(name, modules)], layer)

        group = layer * self._knots[0] // self.depth
        chosen = {
            slot.name: str(genes.get(f"{slot.name}.{group}" if self.per_knot else slot.name, slot.options[0]))
            for slot in self._slots
        }
        method, w = _line(chosen), self.weight
        searched = not w.methods or method in w.methods
        weights = {
            source.name: (w.low if w.fixed else at(f"weight.{source.name}")) if searched else 1.0
            for source in self.sources
        }
        parameters = {name: self._parameter(name, genes, at) for name in self._parameters_of(chosen)}
        return Blend(method=method, weights=weights, parameters=parameters)

    def _parameter(self, name: str, genes: Mapping[str, Gene], at: Callable[[str], float]) -> Parameter:
        """Return what a genome says of a parameter; `at` reads genes that stand at knots."""
        bounds = self.parameters[name]
        if bounds.fixed:
            return bounds.constant
        if bounds.options:
            return str(genes[name])

        def read(owner: str) -> float:
            return at(owner) if bounds.per_knot else float(genes[owner])

        if bounds.per_source:
            return {source.name: read(f"{name}.{source.name}") for source in self.sources}
        return read(name)

    def _recipe(self, blend: Callable[[int, int], Blend]) -> Recipe:
        """Return the recipe of what is to be done with each module set in each layer."""
        other = next(m for m, modules in enumerate(self.modules) if "other" in modules)
        ends = zip(ENDS, (0, self.depth - 1), strict=True)
        return Recipe(
            sources=self.sources,
            base=self.base,
            routes=(
                *self.routes,
                *(Route(blend=blend(other, layer), groups=(end,)) for end, layer in ends),
                *(route for m in range(len(self.modules)) for route in self._runs(m, blend)),
            ),
            layers=tuple(range(self.depth)),
            dtype=self.dtype,
            seed=self.seed,
            calibration=self.calibration,
        )

    def _runs(self, m: int, blend: Callable[[int, int], Blend]) -> Iterator[Route]:
        """Yield one route for each run of layers that are blended alike."""
        groups = () if set(self.modules[m]) == set(GROUPS) else self.modules[m]
        blends = [blend(m, layer) for layer in range(self.depth)]
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

    def _begin(self, axis: Axis) -> Gene:
        """Return the gene that a search begins with."""
        keys = [key for key in self.first if _names(key, axis)]
        return _gene(axis, self.first[max(keys, key=len)]) if keys else axis.from_unit(0.5)

    def _check_knots(self) -> None:
        """Refuse numbers of knots that there is no room for, and choices or words between knots."""
        if len(self._knots) != len(self.modules):
            raise RecipeError(
                f"knots must be one number, or one for each of the {len(self.modules)} module sets, got {self.knots}"
            )
        for knots in self._knots:
            if not 1 <= knots <= self.depth:
                raise RecipeError(f"knots must lie in [1, {self.depth}] for {self.depth} layers, got {knots}")
        if self.per_knot and (len(set(self._knots)) > 1 or self.profile != "constant"):
            raise RecipeError("methods per knot need a constant profile, and as many knots for all module sets")
        for name, bounds in self.parameters.items():
            if bounds.per_knot and (bounds.options or bounds.whole):
                raise RecipeError(f"parameter {name!r} cannot differ from knot to knot: it is no real number")

    def _check_first(self) -> None:
        """Refuse a beginning that names no axis, or lies out of its bounds."""
        for key in self.first:
            if not any(_names(key, axis) for axis in self.axes):
                known = nearest(key, [axis.name for axis in self.axes])
                raise RecipeError(f"start: no axis is called {key!r}; {known}")
        for axis, gene in zip(self.axes, self.start or (), strict=False):
            if not axis.contains(gene):
                raise RecipeError(f"start: gene {gene!r} is not within the axis {axis}")


#: The most lines that are looked through for one that is a given method.
_MOST_LINES = 4096


def _names(key: str, axis: Axis) -> bool:
    """Tell whether a key is an axis's name, or what it begins with before a dot."""
    return f"{axis.name}.".startswith(f"{key}.")


def _gene(axis: Axis, given: Gene) -> Gene:
    """Return a value as a gene of its axis."""
    return int(given) if isinstance(axis, Whole) and isinstance(given, float) and given.is_integer() else given


def _line(chosen: Chosen) -> str:
    """Return the method that the chosen options of all slots make."""
    return " | ".join(option for option in chosen.values() if option != NONE)

"""Candidates that nobody searched for: baselines, warm starts, layer probes, and a warm-up's random genomes."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from evomerge.errors import LedgerError
from evomerge.genome import Genome, SearchSpace
from evomerge.methods import canonical
from evomerge.recipe import Recipe, Source, copy_of
from evomerge.spaces.edits import Prior
from evomerge.stages import METHODS
from evomerge.value import value

#: The origin of layer probes; their labels are an operation and a place.
PROBE = "probe"

#: The origins of warm starts: a named method at its defaults, a candidate of an earlier run, a recipe in a file.
METHOD, EARLIER, FILE = "method", "earlier", "file"
WARM = (METHOD, EARLIER, FILE)

#: Named methods that are defined for one model beside the base, and for two.
_SINGLE = ("passthrough", "expo", "nearswap", "arcee_fusion")
_PAIR = ("slerp", "nuslerp")

#: What baselines are made by.
_BASELINES = ("linear", "task_arithmetic")

#: Stream of random numbers of the warm-up; other parts of a run have their own.
_STREAM = 1


class Space(SearchSpace, Protocol):
    """What the experiments of a run have in common: models, and what is proposed of them without a search."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The models that are searched."""
        ...

    @property
    def base(self) -> Source | None:
        """The model that task vectors are taken from."""
        ...

    @property
    def depth(self) -> int:
        """The number of layers of every source."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of the models to build."""
        ...

    @property
    def most(self) -> int:
        """The most layers that a candidate has."""
        ...

    @property
    def headline(self) -> str:
        """What the space is, in a line."""
        ...

    def sample(self, rng: np.random.Generator, prior: Prior | None = None) -> Genome:
        """Return a random genome, as the space hopes most of it."""
        ...

    def probes(self) -> list[tuple[str, int, Genome]]:
        """Return what is asked first to learn which layers matter: operation, place, genome."""
        ...

    def constant(self, method: str, weight: Mapping[str, float]) -> Recipe:
        """Return the recipe with one weight per source everywhere."""
        ...

    def genome_of_constant(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome of it, or None if the space has none, or searches parameters of the method."""
        ...

    def genome_of_defaults(self, method: str, weight: Mapping[str, float]) -> Genome | None:
        """Return the genome of it, or None if the space has none; parameters that are searched have their defaults."""
        ...


@value
class Proposal:
    """A candidate before it has a number: where it comes from, what reports call it, and its recipe.

    `genome` is the point of the space that makes this model, where there is one: drivers start from
    it. A source's genome has one weight of 1, which gives that source up to the rounding of sums.
    """

    origin: str
    label: str
    genome: Genome | None
    recipe: Recipe


class Recorded(Protocol):
    """What a ledger knows of a proposed candidate; `recipe` is the digest."""

    @property
    def candidate(self) -> int:
        """Its number."""
        ...

    @property
    def origin(self) -> str:
        """Who proposed it."""
        ...

    @property
    def label(self) -> str:
        """What reports call it; empty for those of the search."""
        ...

    @property
    def genome(self) -> Genome | None:
        """Its genome, where it has one."""
        ...

    @property
    def recipe(self) -> str:
        """The digest of its recipe."""
        ...


def baselines(space: Space, models: Sequence[Source], lambdas: Sequence[float]) -> list[Proposal]:
    """Return what always runs first: each model as it is, the sources' average, single-lambda task arithmetic.

    Args:
        space: the space of the run; baselines that it can express carry their genome.
        models: the base and the sources.
        lambdas: the totals of task arithmetic (Ilharco 2023, section 2); none without a base.
    """
    found = [
        Proposal(
            origin="source",
            label=model.name,
            genome=_genome(space, {source.name: float(source.name == model.name) for source in space.sources}),
            recipe=copy_of(model, space.depth, space.dtype),
        )
        for model in models
    ]
    share = {source.name: 1 / len(space.sources) for source in space.sources}
    found.append(_constant(space, "average", "average", "linear", share))
    if space.base is None:
        return found
    for amount in lambdas:
        weights = {source.name: float(amount) for source in space.sources}
        found.append(_constant(space, "arithmetic", f"lambda {amount:g}", "task_arithmetic", weights))
    return found


def applicable(space: Space) -> list[str]:
    """Return the named methods that can merge all sources of a space, each kind once; not those of the baselines.

    Those that take task vectors need a base, those that take statistics a file of texts, and some are defined for one
    or for two models.
    """
    weights = {source.name: 1.0 for source in space.sources}
    made = [canonical(name, weights, {}) for name in _BASELINES]
    found = []
    for name in METHODS:
        form = canonical(name, weights, {})
        if not lacking(space, name) and form not in made:
            found.append(name)
            made.append(form)
    return found


def lacking(space: Space, name: str) -> str:
    """Return what a named method needs and a space has not; nothing where it can merge all sources."""
    count = len(space.sources)
    if METHODS[name].needs_base and space.base is None:
        return "takes task vectors; give models.base"
    if METHODS[name].statistics:
        texts = space.constant("linear", {source.name: 1.0 for source in space.sources}).calibration
        if texts is None:
            return f"takes statistics ({', '.join(METHODS[name].statistics)}); give `calibration`, in a space of blends"
    wanted = 1 if name in _SINGLE else 2 if name in _PAIR else count
    return "" if count == wanted else f"merges {wanted} of the {count} sources; leave it out"


def named_methods(space: Space, names: Sequence[str]) -> list[Proposal]:
    """Return merges of all sources by named methods at their defaults, every source with a weight of 1."""
    weights = {source.name: 1.0 for source in space.sources}
    return [
        Proposal(
            origin=METHOD,
            label=name,
            genome=space.genome_of_defaults(name, weights),
            recipe=space.constant(name, weights),
        )
        for name in names
    ]


def probes(space: Space) -> list[Proposal]:
    """Return single edits of where a search of stacks begins, which tell what each layer is worth."""
    return [
        Proposal(origin=PROBE, label=f"{kind} {at}", genome=genome, recipe=space.decode(genome))
        for kind, at, genome in space.probes()
    ]


def warmup(space: Space, count: int, seed: int, prior: Prior | None = None) -> list[Proposal]:
    """Return random genomes, as the space draws them: the rows on which an item bank is fitted."""
    rng = np.random.default_rng([seed, _STREAM])
    genomes = [space.sample(rng, prior) for _ in range(count)]
    return [
        Proposal(origin="warmup", label=f"warm-up {i}", genome=genome, recipe=space.decode(genome))
        for i, genome in enumerate(genomes)
    ]


def recipe_of(known: Sequence[Proposal], space: Space, event: Recorded) -> Recipe:
    """Return the recipe of a candidate that a ledger names.

    Args:
        known: the baselines and the warm starts of the run.
        space: its space.
        event: what the ledger says.

    Raises:
        LedgerError: if this space does not decode it to the recipe that was scored.
    """
    # By origin too: a source may be called "average".
    named = (proposal for proposal in known if (proposal.origin, proposal.label) == (event.origin, event.label))
    found = next((proposal.recipe for proposal in named), None)
    if found is None and event.genome is not None:
        found = space.decode(event.genome)
    if found is None or found.digest != event.recipe:
        raise LedgerError(
            f"candidate {event.candidate}: the recipe that was scored is {event.recipe}, this experiment makes "
            f"{found.digest if found else 'none'} of it; use the experiment and the version of the run"
        )
    return found


def _constant(space: Space, origin: str, label: str, method: str, weights: Mapping[str, float]) -> Proposal:
    return Proposal(
        origin=origin, label=label, genome=_genome(space, weights), recipe=space.constant(method, weights)
    )


def _genome(space: Space, weights: Mapping[str, float]) -> Genome | None:
    """Return the genome of a sum of task vectors; with weights that add up to 1 it is an average of sources too."""
    methods = ["task_arithmetic"]
    if math.isclose(sum(weights.values()), 1.0):
        methods.append("linear")
    genomes = (space.genome_of_constant(method, weights) for method in methods)
    return next((genome for genome in genomes if genome is not None), None)

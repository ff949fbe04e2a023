"""Proposals: the baselines of a run, its warm-up, and recipes found again from the ledger."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest

from evomerge.errors import LedgerError
from evomerge.genome import to_unit
from evomerge.ledger import Asked
from evomerge.methods import canonical, check
from evomerge.recipe import GROUPS, Source, copy_of
from evomerge.spaces.blend import BlendSpace, ParameterRange, Range
from evomerge.spaces.proposals import applicable, baselines, lacking, named_methods, recipe_of, warmup
from evomerge.spaces.stack import SakanaSpace
from evomerge.stages import METHODS

BASE = Source(name="base", path="base", fingerprint="0")
A, B = (Source(name=name, path=name, fingerprint=name) for name in ("a", "average"))
SPACE = BlendSpace(
    sources=(A, B),
    base=BASE,
    depth=3,
    methods=("task_arithmetic",),
    knots=1,
    profile="constant",
    modules=(GROUPS,),
    weight=Range(low=0.0, high=1.0),
    parameters={},
    dtype="float32",
)


def asked(number, proposal, **changes):
    """Return what a ledger says of a proposal."""
    event = Asked(
        candidate=number,
        origin=proposal.origin,
        label=proposal.label,
        genome=proposal.genome,
        recipe=proposal.recipe.digest,
    )
    return replace(event, **changes)


def test_baselines_are_the_models_the_average_and_single_lambdas():
    """In this order, with the labels of reports and the recipes that they stand for."""
    found = baselines(SPACE, (BASE, A, B), (0.3, 1))

    assert [(p.origin, p.label) for p in found] == [
        ("source", "base"),
        ("source", "a"),
        ("source", "average"),
        ("average", "average"),
        ("arithmetic", "lambda 0.3"),
        ("arithmetic", "lambda 1"),
    ]
    assert [p.recipe for p in found[:3]] == [copy_of(model, 3, "float32") for model in (BASE, A, B)]
    assert {blend.method for blend in found[3].recipe.blends()} == {"linear"}
    assert [blend.weights for blend in found[3].recipe.blends()] == [{"a": 0.5, "average": 0.5}] * 3
    assert [blend.weights for blend in found[4].recipe.blends()] == [{"a": 0.3, "average": 0.3}] * 3
    assert {blend.method for blend in found[5].recipe.blends()} == {"task_arithmetic"}


def built(recipe):
    """Return the model that a recipe builds of models with one number each, by the definition of both methods."""
    numbers = {"base": 1.0, "a": 3.0, "average": -2.5}
    (found,) = {(blend.method, tuple(blend.weights.items())) for blend in recipe.blends()}
    method, weights = found
    if method == "linear":
        return sum(w * numbers[name] for name, w in weights) / sum(w for _, w in weights)
    return 1.0 + sum(w * (numbers[name] - 1.0) for name, w in weights)


@pytest.mark.parametrize("methods", [("task_arithmetic",), ("linear",), ("linear", "task_arithmetic"), ("ties",)])
def test_a_genome_of_a_baseline_builds_the_same_model(methods):
    """A driver may start from it: what it decodes to is, up to rounding, the model that was scored."""
    space = replace(SPACE, methods=methods)
    found = baselines(space, (BASE, A, B), (0.3, 0.5))

    for proposal in found:
        assert proposal.genome is None or built(space.decode(proposal.genome)) == pytest.approx(built(proposal.recipe))
    given = {proposal.label for proposal in found if proposal.genome is not None}
    sums_to_one = {"a", "average", "lambda 0.5"}
    if "task_arithmetic" in methods:
        assert given == {"base", "lambda 0.3", *sums_to_one}
    else:
        assert given == (sums_to_one if methods == ("linear",) else set())


def test_baselines_out_of_bounds_or_with_searched_parameters_have_no_genome():
    """What the space cannot express, or only with a parameter set, is not passed off as one of its points."""
    searched = ParameterRange(low=0.0, high=2.0, methods=("task_arithmetic",))

    assert baselines(SPACE, (BASE,), (2.0,))[-1].genome is None
    assert baselines(replace(SPACE, parameters={"scale": searched}), (BASE,), (0.3,))[-1].genome is None


def test_without_a_base_there_are_no_task_vectors():
    """Only the sources and their average are left."""
    found = baselines(replace(SPACE, base=None, methods=("linear",)), (A, B), (0.3,))

    assert [p.origin for p in found] == ["source", "source", "average"]


def test_the_warm_up_is_uniform_in_the_unit_cube():
    """A Kolmogorov-Smirnov test finds nothing against it, and both axes are independent."""
    found = warmup(SPACE, 400, seed=1)
    points = np.array([to_unit(SPACE.axes, p.genome) for p in found])

    assert all(kstest(column, "uniform").pvalue > 1e-3 for column in points.T)
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.2
    assert all(p.recipe == SPACE.decode(p.genome) for p in found[:5])
    assert [(p.origin, p.label) for p in found[:2]] == [("warmup", "warm-up 0"), ("warmup", "warm-up 1")]


def test_the_warm_up_follows_from_the_seed():
    """The same seed gives the same genomes, a longer one begins with the shorter one, another seed others."""
    assert warmup(SPACE, 4, seed=1) == warmup(SPACE, 9, seed=1)[:4]
    assert warmup(SPACE, 4, seed=1) != warmup(SPACE, 4, seed=2)
    assert warmup(SPACE, 0, seed=1) == []


def test_recipes_are_found_again_from_the_ledger():
    """A baseline by what it is called, even where a source has the name of another one; the rest by the genome."""
    known = baselines(SPACE, (BASE, A, B), (0.3,))
    proposals = [*known, *warmup(SPACE, 2, seed=1)]

    for number, proposal in enumerate(proposals):
        assert recipe_of(known, SPACE, asked(number, proposal)) == proposal.recipe
    searched = asked(7, proposals[-1], origin="search", label="")
    assert recipe_of(known, SPACE, searched) == proposals[-1].recipe


@pytest.mark.parametrize("number", [4, 5])
def test_another_recipe_than_the_scored_one_is_refused(number):
    """What was scored and what would be built are both named."""
    known = baselines(SPACE, (BASE, A, B), (0.3,))
    proposal = [*known, *warmup(SPACE, 1, seed=1)][number]
    event = asked(number, proposal)
    other = replace(SPACE, dtype="bfloat16")

    with pytest.raises(LedgerError, match=f"^candidate {number}: the recipe that was scored is {event.recipe}, this "):
        recipe_of(baselines(other, (BASE, A, B), (0.3,)), other, event)


def test_a_baseline_that_is_no_more_is_refused():
    """With a lambda taken out of the experiment nothing makes the recipe."""
    event = asked(9, baselines(SPACE, (BASE, A, B), (2.0,))[-1])

    with pytest.raises(LedgerError, match="makes none of it; use the experiment"):
        recipe_of(baselines(SPACE, (BASE, A, B), (0.3,)), SPACE, event)


C = Source(name="c", path="c", fingerprint="c")
TEXTS = Source(name="calibration", path="texts", fingerprint="t")


@pytest.mark.parametrize("sources", [(A,), (A, B), (A, B, C)])
@pytest.mark.parametrize("base", [None, BASE])
@pytest.mark.parametrize("texts", [None, TEXTS])
def test_applicable_methods_are_all_that_can_be_built_each_kind_once(sources, base, texts):
    """A method is left out for a stated reason, for being a baseline, or for being another one by another name."""
    space = replace(SPACE, sources=sources, base=base, calibration=texts, methods=("linear",))
    found = applicable(space)
    weights = {source.name: 1.0 for source in sources}
    forms = [canonical(name, weights, {}) for name in found]

    assert len({str(form) for form in forms}) == len(found)
    for name in found:
        check(name, weights, {}, name, base is not None)
        assert texts is not None or not METHODS[name].statistics
    for name in METHODS.keys() - set(found):
        assert lacking(space, name) or canonical(name, weights, {}) in [
            *forms, *(canonical(made, weights, {}) for made in ("linear", "task_arithmetic"))
        ]  # fmt: skip
    assert ("slerp" in found, "nearswap" in found) == (len(sources) == 2, len(sources) == 1 and base is not None)
    assert ("ties" in found and "regmean" in found) == (base is not None and texts is not None)


def test_what_a_method_lacks_is_said_with_the_way_out():
    """Each condition in words; a space of stacks has no texts for its blends."""
    without = replace(SPACE, base=None, methods=("linear",))
    stacks = SakanaSpace(sources=(A, B), depth=3, dtype="float32")

    assert "models.base" in lacking(without, "ties")
    assert "calibration" in lacking(SPACE, "fisher")
    assert "spaces" not in lacking(replace(SPACE, calibration=TEXTS), "fisher")
    assert "calibration" in lacking(stacks, "fisher")
    assert "1 of the 2" in lacking(SPACE, "expo")
    assert [lacking(SPACE, name) for name in ("ties", "slerp", "karcher")] == ["", "", ""]


def test_named_methods_weigh_every_source_with_1_and_have_the_spaces_genome_where_there_is_one():
    """The recipe is the method at its defaults; the genome decodes to the same recipe, its digest says."""
    density = ParameterRange(low=0.1, high=0.9, per_source=True, methods=("ties", "dare_linear"))
    narrow = replace(density, low=0.3)
    whole = ParameterRange(low=16, high=128, whole=True, methods=("cabs",))
    space = replace(SPACE, methods=("ties", "dare_linear", "cabs"), parameters={"density": density, "n": whole})
    names = ["ties", "dare_linear", "cabs", "karcher"]
    found = named_methods(space, names)

    assert [(p.origin, p.label) for p in found] == [("method", name) for name in names]
    assert [{str(blend) for blend in p.recipe.blends()} for p in found] == [
        {str(blend) for blend in space.constant(name, {"a": 1.0, "average": 1.0}).blends()} for name in names
    ]
    assert [p.genome for p in found] == [
        ("ties", 1.0, 1.0, 0.2, 0.2, 72),
        ("dare_linear", 1.0, 1.0, 0.5, 0.5, 72),
        ("cabs", 1.0, 1.0, 0.5, 0.5, 64),
        None,
    ]
    assert all(space.decode(p.genome).digest == p.recipe.digest for p in found[:3])
    # the default of ties, 0.2, lies outside of the bounds; that of dare, 0.5, within
    other = named_methods(replace(space, parameters={"density": narrow, "n": whole}), names)
    assert [p.genome is None for p in other] == [True, False, False, True]
    assert named_methods(SakanaSpace(sources=(A, B), depth=3, dtype="float32"), ["karcher"])[0].genome is None
    low = named_methods(replace(space, weight=Range(low=0.0, high=0.9)), ["ties"])
    assert low[0].genome is None


def test_warm_starts_are_found_again_by_origin_and_label():
    """Also one without a genome, and one that is called as a source is."""
    known = [*baselines(SPACE, (BASE, A, B), (0.3,)), *named_methods(SPACE, ["karcher", "ties"])]
    known.append(replace(known[-1], origin="file", label="a"))

    for number, proposal in enumerate(known):
        assert recipe_of(known, SPACE, asked(number, proposal)) == proposal.recipe

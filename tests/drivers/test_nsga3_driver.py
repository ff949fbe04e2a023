"""NSGA-III: the contract, its directions against the paper, and pymoo's own algorithm as the oracle of progress."""

import warnings
from math import comb

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import Nsga2, Nsga3, Problem
from evomerge.drivers.nsga2 import Crowding
from evomerge.drivers.nsga3 import directions
from evomerge.errors import ExperimentError
from evomerge.genome import Real
from tests.drivers.contract import CUBE, Batches, DriverContract, FrontContract, Steady, asks, run

WIDE = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(9))


class TestNsga3(Batches, FrontContract):
    """NSGA-III keeps the contract."""

    settings = Nsga3(population=14)


class TestNsga3OfFew(Batches, DriverContract):
    """NSGA-III with a small population that mutates often keeps the contract."""

    settings = Nsga3(population=6, offspring=6, mutation_rate=0.4)


class TestNsga3Steady(Steady, FrontContract):
    """NSGA-III in steady state keeps the contract."""

    settings = Nsga3(population=14, steady=True)


def dtlz2(x, objectives=3):
    """DTLZ2 (Deb et al. 2002): the front is the part of the unit sphere with no negative loss."""
    angles = np.array(x[: objectives - 1]) * np.pi / 2
    radius = 1 + sum((u - 0.5) ** 2 for u in x[objectives - 1 :])
    found = []
    for k in range(objectives):
        last = objectives - 1 - k
        loss = radius * np.prod(np.cos(angles[:last]))
        found.append(float(loss if k == 0 else loss * np.sin(angles[last])))
    return tuple(found)


def ours(settings, seed, count):
    """The hypervolume of a run of our driver on DTLZ2 with three objectives."""
    events = run(settings.start(Problem(axes=WIDE, objectives=3, seed=seed)), dtlz2, count)
    return pareto.hypervolume([dtlz2(genome) for genome in asks(events)], (2.0, 2.0, 2.0))


def theirs(seed, count):
    """The hypervolume of a run of pymoo's algorithm with as many directions."""
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.optimize import minimize

    found = []

    class Dtlz2(ElementwiseProblem):
        def _evaluate(self, x, out, *args, **kwargs):
            found.append(dtlz2(x))
            out["F"] = found[-1]

    algorithm = NSGA3(ref_dirs=directions(3, 28), pop_size=28)
    with warnings.catch_warnings():  # pymoo changes the filters
        minimize(Dtlz2(n_var=9, n_obj=3, xl=0.0, xu=1.0), algorithm, ("n_eval", count), seed=seed)
    return pareto.hypervolume(found[:count], (2.0, 2.0, 2.0))


def test_progress_is_that_of_pymoo():
    """On DTLZ2 the median hypervolume is within 1 % of pymoo's own algorithm, or better, one by one too."""
    oracle = np.median([theirs(seed, 280) for seed in range(3)])

    assert np.median([ours(Nsga3(population=28), seed, 280) for seed in range(3)]) > 0.99 * oracle
    assert np.median([ours(Nsga3(population=28, steady=True), seed, 280) for seed in range(3)]) > 0.99 * oracle


def test_a_population_spreads_over_the_directions():
    """On the sphere of DTLZ2 nearly every direction of the paper's has a survivor of its own, and NSGA-II has fewer."""
    niches = {}
    for kind in (Nsga2, Nsga3):
        driver = kind(population=28).start(Problem(axes=WIDE, objectives=3, seed=1))
        run(driver, dtlz2, 28 * 30)
        losses = driver.strategy._population.get("F")
        cosines = losses / np.linalg.norm(losses, axis=1, keepdims=True) @ _normed(directions(3, 28)).T
        niches[kind] = len(set(cosines.argmax(axis=1).tolist()))

    assert niches[Nsga3] >= 24
    assert niches[Nsga3] > niches[Nsga2]


def _normed(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("objectives", "most", "count"),
    [
        (2, 40, 40),
        (3, 91, 91),  # table I of the paper: 3 objectives, 12 steps
        (3, 92, 91),
        (5, 210, 210),  # 5 objectives, 6 steps
        (8, 156, 156),  # two layers of 3 and 2 steps
        (10, 275, 275),
        (15, 135, 135),  # two layers of 2 and 1 steps
        (6, 4, 6),  # never less than one per objective
    ],
)
def test_directions_are_those_of_the_paper(objectives, most, count):
    """As many as in table I of Deb, Jain 2014, on the unit simplex, all different."""
    found = directions(objectives, most)

    assert found.shape == (count, objectives)
    assert found.min() >= 0
    assert found.sum(axis=1) == pytest.approx(np.ones(count))
    assert len({tuple(row) for row in found.round(9).tolist()}) == count


def test_directions_of_one_layer_are_a_lattice():
    """With three objectives they are all points with coordinates in steps of 1/p."""
    found = directions(3, 40)
    steps = next(p for p in range(20, 0, -1) if comb(3 + p - 1, p) <= 40)
    expected = {(a, b, steps - a - b) for a in range(steps + 1) for b in range(steps + 1 - a)}

    assert {tuple(row) for row in (found * steps).round().astype(int).tolist()} == expected


def test_one_objective_is_that_of_nsga2():
    """With one loss there is nothing to spread over: survival and selection are those of NSGA-II."""
    one, two = (Nsga3().start(Problem(axes=CUBE, objectives=m, seed=0)).strategy._survival for m in (1, 2))

    assert isinstance(one, Crowding)
    assert not isinstance(two, Crowding)


def test_what_was_a_mistake_no_longer_scales():
    """An ideal point that was revised away is forgotten: the next survival takes it from who is there."""
    driver = Nsga3(population=6).start(Problem(axes=CUBE, objectives=2, seed=3))
    genomes = [driver.ask() for _ in range(6)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, (-50.0, -50.0) if index == 2 else (index / 5, 1 - index / 5))
    assert driver.strategy._survival._survival.norm.ideal_point.tolist() == [-50.0, -50.0]

    driver.revise(2, (0.4, 0.6))
    for index in range(6, 12):
        driver.tell(index, driver.ask(), (3.0, 3.0))

    assert driver.strategy._survival._survival.norm.ideal_point.tolist() == [0.0, 0.0]


def test_warnings_are_left_as_they_are():
    """While it scales losses, pymoo silences all warnings for good; a run does not."""
    before = list(warnings.filters)
    run(Nsga3(population=14).start(Problem(axes=WIDE, objectives=3, seed=0)), dtlz2, 60)

    assert list(warnings.filters) == before


def test_settings_out_of_range():
    """A population of one and a negative rate are refused."""
    with pytest.raises(ExperimentError, match="'population' must be at least 2, got 1"):
        Nsga3(population=1)
    with pytest.raises(ExperimentError, match="'mutation_rate' must be at least 0"):
        Nsga3(mutation_rate=-0.1)

"""NSGA-II: its variation on mixed axes, and pymoo's own algorithm as the oracle of its progress."""

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import Nsga2, Problem
from evomerge.drivers.breeding import cross, hoped, mutate
from evomerge.genome import Choice, Real, Whole, to_unit

AXES = (
    Real(name="x", low=0, high=1),
    Whole(name="k", low=0, high=4),
    Choice(name="c", options=("a", "b", "c", "d", "e")),
)


def zdt1(x):
    """ZDT1 on the unit cube: front 1 - sqrt(x0)."""
    g = 1 + 9 * np.sum(x[1:]) / (len(x) - 1)
    return float(x[0]), float(g * (1 - np.sqrt(x[0] / g)))


def volume(losses):
    """Hypervolume up to (1.1, 6)."""
    return pareto.hypervolume(losses, (1.1, 6.0))


def ours(seed, count):
    """The hypervolume of a run of our driver."""
    axes = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(6))
    driver, found = Nsga2(population=20).start(Problem(axes=axes, objectives=2, seed=seed)), []
    for index in range(count):
        genome = driver.ask()
        found.append(zdt1(genome))
        driver.tell(index, genome, found[-1])
    return volume(found)


def first_generation(driver):
    """Tell a generation of six along a front, all as good, and return its genomes."""
    genomes = [driver.ask() for _ in range(6)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, (index / 5, 1 - index / 5))
    return genomes


def learned(revisions):
    """Return the first losses in the population after revisions and a second generation of poor genomes."""
    driver = Nsga2(population=6).start(Problem(axes=AXES[:1], objectives=2, seed=3))
    first_generation(driver)
    for index, losses in revisions.items():
        driver.revise(index, losses)
    for index in range(6, 12):
        driver.tell(index, driver.ask(), (3.0, 3.0))
    return sorted(driver.strategy._population.get("F")[:, 0].tolist())


def test_a_revised_individual_counts_by_what_is_known_now():
    """Better: it stays as such; worse than the newcomers: it has to go; failed: it is gone at once."""
    plain = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]

    assert learned({}) == pytest.approx(plain)
    assert learned({2: (0.45, 0.5)}) == pytest.approx([*plain[:2], 0.45, *plain[3:]])
    assert learned({5: (9.0, 9.0)}) == pytest.approx([*plain[:5], 3.0])
    assert learned({0: None, 1: None}) == pytest.approx([*plain[2:], 3.0, 3.0])


def theirs(seed, count):
    """The hypervolume of a run of pymoo's algorithm."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.optimize import minimize

    found = []

    class Zdt1(ElementwiseProblem):
        def _evaluate(self, x, out, *args, **kwargs):
            found.append(zdt1(x))
            out["F"] = found[-1]

    minimize(Zdt1(n_var=6, n_obj=2, xl=0.0, xu=1.0), NSGA2(pop_size=20), ("n_eval", count), seed=seed)
    return volume(found[:count])


def test_progress_is_that_of_pymoo():
    """On a continuous problem the median hypervolume is within 3 % of pymoo's own algorithm, or better."""
    assert np.median([ours(s, 300) for s in range(5)]) > 0.97 * np.median([theirs(s, 300) for s in range(5)])


def test_children_inherit_options():
    """Crossover gives each child one parent's option, both ways about equally often, and never a third."""
    one, two = to_unit(AXES, (0.2, 1, "a")), to_unit(AXES, (0.8, 3, "e"))
    pairs = np.stack([np.tile(one, (400, 1)), np.tile(two, (400, 1))])

    children = cross(pairs, AXES, Nsga2(), np.random.default_rng(0))

    options = [AXES[2].from_unit(u) for u in children[0, :, 2]]
    assert set(options) == {"a", "e"}
    assert 0.3 < options.count("e") / 400 < 0.6
    assert all(
        {a, b} == {"a", "e"} for a, b in zip(options, [AXES[2].from_unit(u) for u in children[1, :, 2]], strict=True)
    )


def test_no_crossover_copies_the_parents():
    """At a crossover rate of zero, children are their parents."""
    pairs = np.random.default_rng(0).random((2, 9, 3))

    assert (cross(pairs, AXES, Nsga2(crossover_rate=0.0), np.random.default_rng(1)) == pairs).all()


def test_mutation_moves_integers_and_options():
    """At a rate of one every option changes, to each other one, and every inner integer moves by one or more."""
    points = np.tile(to_unit(AXES, (0.5, 2, "c")), (300, 1))

    mutants = mutate(points, AXES, Nsga2(mutation_rate=1.0), np.random.default_rng(0))

    assert {option for _, _, option in mutants} == {"a", "b", "d", "e"}
    assert {k for _, k, _ in mutants} >= {1, 3}
    assert all(k != 2 for _, k, _ in mutants)
    assert len({x for x, _, _ in mutants}) > 290


def test_no_mutation_keeps_genomes():
    """At a rate of zero nothing changes."""
    genome = (0.25, 3, "b")

    mutants = mutate(to_unit(AXES, genome)[None], AXES, Nsga2(mutation_rate=0.0), np.random.default_rng(0))

    assert mutants == [(pytest.approx(0.25, abs=1e-15), 3, "b")]


def test_known_candidates_are_the_first_population():
    """With as many known genomes as the population the first proposals are their children, near the best."""
    axes = (Real(name="x", low=0, high=1), Real(name="y", low=0, high=1))
    rng = np.random.default_rng(0)
    known = tuple(((float(x), float(y)), (float(abs(x - 0.7)),)) for x, y in 0.7 + 0.01 * rng.standard_normal((20, 2)))
    driver = Nsga2(population=20).start(Problem(axes=axes, objectives=1, seed=0, known=known))

    firsts = np.array([driver.ask() for _ in range(20)])

    assert np.median(np.abs(firsts - 0.7)) < 0.05


def test_known_candidates_are_filled_up():
    """With fewer known genomes than the population the first generation is what is missing."""
    axes = (Real(name="x", low=0, high=1),)
    known = tuple(((i / 7,), (float(i),)) for i in range(7))
    driver = Nsga2(population=10).start(Problem(axes=axes, objectives=1, seed=0, known=known))

    assert [driver.ask() is None for _ in range(4)] == [False, False, False, True]


CORNERS = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(6))


def corner(rng):
    """Draw a genome of quarters and three quarters."""
    return tuple(rng.choice([0.25, 0.75], size=len(CORNERS)).tolist())


def test_the_first_population_is_what_the_space_draws():
    """Random genomes are those of the space, as many as known ones leave room for; children may be others."""
    known = tuple(((0.5,) * 6, (float(k), float(-k))) for k in range(3))
    for given in ((), known):
        driver = Nsga2(population=10).start(Problem(axes=CORNERS, objectives=2, seed=0, known=given, draw=corner))
        first = [driver.ask() for _ in range(10 - len(given))]
        assert driver.ask() is None
        assert {gene for genome in first for gene in genome} == {0.25, 0.75}
        for index, genome in enumerate(first):
            driver.tell(index, genome, (genome[0] + sum(genome), -sum(genome)))
        assert not {gene for genome in [driver.ask() for _ in range(10)] for gene in genome} <= {0.25, 0.75}


def test_the_space_is_asked_again_where_a_whole_population_failed():
    """Without anyone to breed from, the next generation is drawn too, and is new."""
    driver = Nsga2(population=8).start(Problem(axes=CORNERS, objectives=2, seed=0, draw=corner))
    found = []
    for index in range(24):
        found.append(driver.ask())
        driver.tell(index, found[-1], None)

    assert {gene for genome in found for gene in genome} == {0.25, 0.75}
    assert len(set(found)) == 24


def test_without_a_space_that_draws_the_first_population_is_a_latin_hypercube():
    """One genome stands in each slice of every axis."""
    driver = Nsga2(population=10).start(Problem(axes=CORNERS, objectives=2, seed=0))
    first = np.array([driver.ask() for _ in range(10)])

    assert [sorted((column * 10).astype(int)) for column in first.T] == [list(range(10))] * 6


def test_children_take_a_step_that_the_space_hopes_much_of():
    """One of a drawn genome's options and integers on average, each as often, and never a real number."""
    child, drawn, rng = (0.5, 1, "a"), (0.25, 3, "d"), np.random.default_rng(0)
    found = [hoped(child, drawn, AXES, rng) for _ in range(2000)]
    taken = np.array([[gene == other for gene, other in zip(each, drawn, strict=True)] for each in found])

    assert all(gene in pair for each in found for gene, pair in zip(each, zip(child, drawn, strict=True), strict=True))
    assert not taken[:, 0].any()
    # one of two, within four standard errors
    assert np.abs(taken[:, 1:].mean(axis=0) - 0.5).max() < 4 * np.sqrt(0.25 / 2000)
    assert hoped((0.5,), (0.25,), AXES[:1], rng) == (0.5,)

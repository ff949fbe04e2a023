"""CMA-ES: convergence, bounds by reflection, restarts, integers, and the weighted sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.drivers import Cma, Problem
from evomerge.drivers.cma import _reflect, _unreflect
from evomerge.genome import Choice, Real, Whole

CUBE = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(5))


def search(driver, function, count):
    """Run a driver one candidate at a time; return the genomes."""
    found = []
    for index in range(count):
        found.append(driver.ask())
        driver.tell(index, found[-1], function(found[-1]))
    return np.array(found)


@given(st.floats(-9, 9))
def test_reflection_is_a_mirror(z):
    """The mirror leaves [0, 1] alone, is even, and has period two."""
    inside = _reflect(np.array([z]))

    assert 0 <= inside[0] <= 1
    assert _reflect(-np.array([z])) == pytest.approx(inside, abs=1e-12)
    assert _reflect(np.array([z + 2])) == pytest.approx(inside, abs=1e-12)
    assert _reflect(inside) == inside


@given(st.floats(0, 1), st.floats(-9, 9))
def test_unreflect_is_the_nearest_preimage(unit, near):
    """It reflects back to the point, and no other preimage on a wide grid is nearer."""
    found = _unreflect(np.array([unit]), np.array([near]))[0]
    preimages = np.concatenate([unit + 2.0 * np.arange(-8, 9), -unit + 2.0 * np.arange(-8, 9)])

    assert _reflect(np.array([found]))[0] == pytest.approx(unit, abs=1e-12)
    assert abs(found - near) == pytest.approx(np.abs(preimages - near).min(), abs=1e-12)


@pytest.mark.parametrize("target", [0.35, 0.0, 1.0])
def test_converges_on_an_ill_conditioned_bowl(target):
    """CMA-ES learns the scales: an ellipsoid of condition 1e4 is solved to 1e-6, also at the bounds."""
    scales = 10.0 ** np.linspace(0, 4, 5)
    bowl = lambda g: (float(scales @ (np.array(g) - target) ** 2),)  # noqa: E731
    driver = Cma(restart_below=0.0).start(Problem(axes=CUBE, objectives=1, seed=0))

    assert min(bowl(genome)[0] for genome in search(driver, bowl, 1200)) < 1e-6


def test_default_population():
    """4 + floor(3 ln n), as in the tutorial's table 1."""
    assert [Cma().generation(axes) for axes in (2, 3, 10, 50)] == [6, 7, 10, 15]


def test_minimises_the_weighted_sum():
    """Two bowls weighed 1 to 3 have their sum's least point at the weighted mean of the centres."""
    axes = CUBE[:2]
    bowls = lambda g: (sum((x - 0.2) ** 2 for x in g), sum((x - 0.6) ** 2 for x in g))  # noqa: E731
    driver = Cma(scalarise="sum").start(Problem(axes=axes, objectives=2, seed=0, weights=(1.0, 3.0)))

    last = search(driver, bowls, 300)[-6:]

    assert last.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.01)


def test_starts_at_the_best_known():
    """The first generation lies around the known genome with the least weighted sum."""
    known = (((0.1,) * 5, (3.0, 0.0)), ((0.8,) * 5, (1.0, 1.0)), ((0.2,) * 5, (0.0, 3.0)))
    driver = Cma(sigma=0.01).start(Problem(axes=CUBE, objectives=2, seed=0, known=known))

    assert np.array([driver.ask() for _ in range(8)]) == pytest.approx(np.full((8, 5), 0.8), abs=0.06)


@pytest.mark.parametrize("start", [(0.3,) * 5, (0.0, 0.25, 0.5, 0.75, 1.0)])
def test_starts_where_the_space_begins(start):
    """The first generation lies around the start that a space has, also where a better genome is known."""
    known = (((0.8,) * 5, (0.0,)),)
    for more in ({}, {"known": known}):
        driver = Cma(sigma=0.01).start(Problem(axes=CUBE, objectives=1, seed=0, start=start, **more))
        assert np.array([driver.ask() for _ in range(8)]) == pytest.approx(np.tile(start, (8, 1)), abs=0.06)


def test_a_start_counts_by_its_cells():
    """On logarithmic, whole and categorical axes, and on one axis alone, a narrow first generation is the start."""
    axes = (
        Real(name="x", low=0.01, high=100, log=True),
        Whole(name="k", low=0, high=9),
        Choice(name="c", options=("a", "b", "c", "d")),
    )
    driver = Cma(sigma=0.005).start(Problem(axes=axes, objectives=1, seed=0, start=(1.0, 7, "d")))
    found = [driver.ask() for _ in range(7)]

    # half a cell is ten deviations or more; a deviation of the logarithm is 0.005 of four decades
    assert {genome[1:] for genome in found} == {(7, "d")}
    assert [np.log10(genome[0]) for genome in found] == pytest.approx([0.0] * 7, abs=0.1)
    alone = Cma(sigma=0.005).start(Problem(axes=CUBE[:1], objectives=1, seed=0, start=(0.9,)))
    assert [alone.ask()[0] for _ in range(6)] == pytest.approx([0.9] * 6, abs=0.03)


def test_random_genomes_are_its_own():
    """What a space would draw changes nothing: the distribution is what genomes are drawn from."""
    runs = [
        search(Cma().start(Problem(axes=CUBE, objectives=1, seed=0, draw=draw)), lambda g: (sum(g),), 20)
        for draw in (None, lambda rng: (0.5,) * 5)
    ]

    assert (runs[0] == runs[1]).all()


def test_restarts_when_converged():
    """Below the smallest deviation the search starts anew elsewhere, and finds a second basin."""
    axes = CUBE[:2]
    # A wide basin at 0.2 and a deeper, narrow one at 0.8.
    two = lambda g: (min(sum((x - 0.2) ** 2 for x in g), sum((x - 0.8) ** 2 for x in g) * 4 - 0.05),)  # noqa: E731
    known = (((0.2, 0.2), (0.0,)),)
    found = {}
    for below in (0.0, 1e-2):
        driver = Cma(sigma=0.05, restart_below=below).start(Problem(axes=axes, objectives=1, seed=1, known=known))
        found[below] = min(two(genome)[0] for genome in search(driver, two, 500))

    assert found[0.0] == pytest.approx(0.0, abs=1e-9)
    assert found[1e-2] == pytest.approx(-0.05, abs=1e-2)


def test_integers_stay_mobile():
    """An integer axis keeps moving after the reals have converged, so that a late neighbour is tried."""
    axes = (*CUBE[:2], Whole(name="k", low=0, high=9))
    bowl = lambda g: (sum((x - 0.5) ** 2 for x in g[:2]) + abs(g[2] - 6),)  # noqa: E731
    driver = Cma(restart_below=0.0).start(Problem(axes=axes, objectives=1, seed=0))

    late = search(driver, bowl, 600)[-100:, 2]

    assert np.median(late) == 6
    assert len(set(late)) > 1


def test_failures_rank_last():
    """A half of the cube that fails is left, even where its losses would be best."""
    fails = lambda g: None if g[0] > 0.5 else (-g[0],)  # noqa: E731
    driver = Cma().start(Problem(axes=CUBE[:2], objectives=1, seed=0))

    late = search(driver, fails, 300)[-60:, 0]

    assert np.median(late) == pytest.approx(0.5, abs=0.05)

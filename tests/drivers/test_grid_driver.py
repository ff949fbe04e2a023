"""Grids: the contract, itertools.product as the oracle of what is on them, and how a part of one is spread."""

import itertools

import numpy as np
import pytest

from evomerge.drivers import Grid, Problem
from evomerge.drivers.grid import Lattice, _stride, fitting, values
from evomerge.errors import ExperimentError
from evomerge.genome import ActiveIf, Choice, Real, Whole, active
from tests.drivers.contract import Batches, DriverContract, Steady, asks, run

AXES = (
    Real(name="x", low=-1, high=1),
    Real(name="rate", low=0.01, high=1, log=True),
    Whole(name="k", low=0, high=9),
    Whole(name="few", low=4, high=5),
    Choice(name="c", options=("a", "b", "c", "d")),
)
#: Two axes hang on the method, one of them a choice on which another one hangs.
TREE = (
    Real(name="weight", low=0, high=1),
    Choice(name="method", options=("linear", "ties", "dare")),
    Real(name="density", low=0, high=1, active_if=ActiveIf(axis="method", options=("ties", "dare"))),
    Choice(name="rescale", options=("no", "by"), active_if=ActiveIf(axis="method", options=("dare",))),
    Whole(name="times", low=1, high=3, active_if=ActiveIf(axis="rescale", options=("by",))),
)


class TestGrid(Batches, DriverContract):
    """A grid keeps the contract."""

    settings = Grid(batch=8)
    learns = False


class TestGridSteady(Steady, DriverContract):
    """A grid in steady state keeps the contract."""

    settings = Grid(batch=6, steady=True)
    learns = False


def proposed(settings, axes, count=10_000, seed=0, **more):
    """The first genomes of a run."""
    return asks(run(settings.start(Problem(axes=axes, objectives=1, seed=seed, **more)), lambda g: (0.0,), count))


def test_a_grid_is_the_product_of_the_values():
    """Three values of each number, both values of a short integer, all options: each combination once, and no more."""
    found = proposed(Grid(levels=3), AXES)
    expected = list(
        itertools.product((-1.0, 0.0, 1.0), (0.01, 0.1, 1.0), (0, 4, 9), (4, 5), ("a", "b", "c", "d"))
    )
    near = [tuple(round(g, 9) if isinstance(g, float) else g for g in genome) for genome in found]

    assert len(found) == len(expected) == 216
    assert sorted(near) == sorted(expected)


def test_the_walk_comes_by_every_point():
    """A stride near the golden section that shares a divisor with the number of points would miss most of them."""
    for size in range(1, 300):
        assert {k * _stride(size) % size for k in range(size)} == set(range(size))


def test_axes_that_are_not_active_do_not_multiply():
    """The grid is a tree: an axis that does not count keeps one value."""
    tails = [("linear", None, None, None)]
    tails += [("ties", density, None, None) for density in (0.0, 1.0)]
    tails += [("dare", density, "no", None) for density in (0.0, 1.0)]
    tails += [("dare", density, "by", times) for density in (0.0, 1.0) for times in (1, 3)]
    expected = {(weight, *tail) for weight in (0.0, 1.0) for tail in tails}
    found = proposed(Grid(levels=2), TREE)
    # `times` counts only where `rescale` does.
    shown = {
        tuple(g if on and not (a.name == "times" and genome[1] != "dare") else None for a, g, on in zip(
            TREE, genome, active(TREE, genome), strict=True))
        for genome in found
    }  # fmt: skip

    assert len(found) == Lattice(TREE, 2).size == len(expected) == 18
    assert shown == expected


@pytest.mark.parametrize(("axes", "levels"), [(AXES, 3), (TREE, 2), (TREE, 4), (AXES[:1], 7)])
def test_each_rank_is_another_point(axes, levels):
    """Ranks and points are one to one, and each point lies in its own cell."""
    lattice = Lattice(axes, levels)
    points = [lattice.at(rank) for rank in range(lattice.size)]

    assert len(set(points)) == lattice.size
    assert all(lattice.near(point) == point for point in points)


def test_levels_follow_from_the_number_of_points():
    """As many levels as fit; two at least, however many points that makes."""
    cube = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(3))

    assert fitting(cube, 1000) == 10
    assert fitting(cube, 999) == 9
    assert fitting(cube[:1], 64) == 64
    assert fitting(cube, 5) == 2
    assert len(proposed(Grid(points=100), cube)) == 64
    # 3 * 10 combinations of option and integer; the integer has no more values than ten
    assert fitting((AXES[2], Choice(name="c", options=("a", "b", "c"))), 30) == 30
    assert len(proposed(Grid(points=30), (AXES[2], Choice(name="c", options=("a", "b", "c"))))) == 30


def test_values_of_an_axis():
    """From bound to bound, evenly; one value is the middle; integers repeat none."""
    assert values(AXES[0], 5) == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert values(AXES[0], 1) == (0.0,)
    assert values(AXES[2], 2) == (0, 9)
    assert values(AXES[3], 9) == (4, 5)
    assert values(Real(name="still", low=2, high=2), 3) == (2.0,)
    log = values(Whole(name="k", low=1, high=512, log=True), 10)
    assert log[0] == 1
    assert log[-1] == 512
    assert list(log) == sorted(set(log))


def test_a_part_of_a_grid_is_spread():
    """The first eighth of a grid of 8 x 8 x 8 takes every value of every axis about as often as any other."""
    cube = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(3))
    found = np.array(proposed(Grid(levels=8), cube, 64))

    for column in found.T:
        counts = np.unique(column, return_counts=True)[1]
        assert len(counts) == 8
        assert counts.min() >= 6
        assert counts.max() <= 10


def test_a_grid_beyond_memory_is_walked():
    """Sixty axes of two values give new corners, both values of each axis equally often."""
    cube = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(60))
    found = np.array(proposed(Grid(), cube, 256))

    assert set(found.ravel().tolist()) == {0.0, 1.0}
    assert len({tuple(row) for row in found.tolist()}) == 256
    assert np.abs(found.mean(axis=0) - 0.5).max() < 0.1


def test_what_was_dropped_comes_at_the_end():
    """A grid is complete though three quarters of it were put back at first."""
    strategy = Grid(levels=4, batch=4).start(Problem(axes=AXES[:2], objectives=1, seed=0)).strategy
    kept, step = [], 0
    while proposals := strategy.propose(step, factor=4):
        strategy.drop(proposals[4:])
        kept += proposals[:4]
        step += 1

    assert len(kept) == len(set(kept)) == 16


def test_settings_out_of_range():
    """No levels, no points and an empty batch are refused."""
    for settings, message in ({"levels": 0}, "'levels'"), ({"points": 0}, "'points'"), ({"batch": 0}, "'batch'"):
        with pytest.raises(ExperimentError, match=f"{message} must be at least 1, got 0"):
            Grid(**settings)

"""Sobol sequences: the contract, the balance that the sequence promises, and scipy as its source."""

import numpy as np

from evomerge.drivers import Problem, Sobol
from evomerge.genome import Choice, Real
from tests.drivers.contract import CUBE, Batches, DriverContract, Steady, asks, run

SQUARE = (Real(name="x", low=0, high=1), Real(name="y", low=0, high=1))


class TestSobol(Batches, DriverContract):
    """A Sobol sequence keeps the contract."""

    settings = Sobol(batch=8)
    learns = False


class TestSobolSteady(Steady, DriverContract):
    """A Sobol sequence in steady state keeps the contract."""

    settings = Sobol(batch=6, steady=True)
    learns = False


def proposed(settings, axes, count, seed=0):
    """The first genomes of a run."""
    return asks(run(settings.start(Problem(axes=axes, objectives=1, seed=seed)), lambda g: (0.0,), count))


def test_boxes_of_equal_size_hold_equally_many():
    """Of 32 points one lies in each 32nd of an axis and in each box of a quarter by an eighth, however batches cut."""
    points = np.array(proposed(Sobol(batch=8), SQUARE, 32))

    assert [sorted((column * 32).astype(int)) for column in points.T] == [list(range(32))] * 2
    for across, up in ((4, 8), (8, 4), (2, 16)):
        boxes = np.floor(points * [across, up]).astype(int)
        assert len({tuple(box) for box in boxes.tolist()}) == 32


def test_one_at_a_time_is_the_same_sequence():
    """In steady state the genomes are those of batches, and a greater batch cuts the same sequence elsewhere."""
    first = proposed(Sobol(batch=8), CUBE, 48)

    assert proposed(Sobol(batch=8, steady=True), CUBE, 48) == first
    assert proposed(Sobol(batch=12), CUBE, 48) == first
    assert proposed(Sobol(batch=8), CUBE, 48, seed=1) != first


def test_what_repeats_is_replaced():
    """Where options are few, every combination comes once, and then there are no more."""
    axes = tuple(Choice(name=name, options=("a", "b", "c")) for name in "xyz")
    found = proposed(Sobol(batch=5), axes, 100)

    assert len(found) == len(set(found)) == 27


def test_more_are_proposed_than_asked():
    """A factor gives so many times as many, and what is dropped can come again."""
    strategy = Sobol(batch=4).start(Problem(axes=SQUARE, objectives=1, seed=0)).strategy
    many = strategy.propose(0, factor=3)
    strategy.drop(many[4:])
    more = strategy.propose(1, factor=3)

    assert len(many) == len(set(many)) == 12
    assert len(more) == 12
    assert not set(many[:4]) & set(more)

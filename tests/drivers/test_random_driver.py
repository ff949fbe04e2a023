"""Random search: uniform over mixed axes, and spread within each batch."""

import numpy as np

from evomerge.drivers import Problem, Random
from evomerge.genome import Choice, Real, Whole

SQUARE = (Real(name="x", low=0, high=1), Real(name="y", low=0, high=1))


def propose(driver, count):
    """Ask for genomes, telling each."""
    found = []
    for index in range(count):
        found.append(driver.ask())
        driver.tell(index, found[-1], (0.0,))
    return found


def test_a_batch_is_a_latin_hypercube():
    """Of eight genomes one lies in each eighth of every axis, in every batch."""
    points = np.array(propose(Random(batch=8).start(Problem(axes=SQUARE, objectives=1, seed=0)), 16))

    for batch in (points[:8], points[8:]):
        assert [sorted((column * 8).astype(int)) for column in batch.T] == [list(range(8))] * 2


def test_uniform_over_every_kind_of_axis():
    """Integers and options come equally often, reals have their mean and spread (four standard errors)."""
    axes = (SQUARE[0], Whole(name="k", low=1, high=4), Choice(name="c", options=("a", "b", "c")))
    found = propose(Random(batch=7).start(Problem(axes=axes, objectives=1, seed=0)), 700)
    reals = np.array([genome[0] for genome in found])

    for gene, column, cells in [(2, 1, 4), ("b", 2, 3)]:
        share, p = np.mean([genome[column] == gene for genome in found]), 1 / cells
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / len(found))
    assert abs(reals.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(found))
    assert abs(reals.var() - 1 / 12) < 0.01

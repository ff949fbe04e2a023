"""TPE: startup, failures, and batches that spread."""

import numpy as np

from evomerge.drivers import Problem, Tpe
from evomerge.genome import Choice, Real

SQUARE = (Real(name="x", low=0, high=1), Real(name="y", low=0, high=1))


def search(driver, function, count):
    """Run a driver one candidate at a time; return the genomes."""
    found = []
    for index in range(count):
        found.append(driver.ask())
        driver.tell(index, found[-1], function(found[-1]))
    return found


def test_failures_are_avoided():
    """A region that fails is proposed much less than its share once some of it has failed."""
    fails = lambda g: None if g[0] < 0.5 else (g[1], 1 - g[1])  # noqa: E731
    late = search(Tpe().start(Problem(axes=SQUARE, objectives=2, seed=0)), fails, 120)[40:]

    assert np.mean([genome[0] < 0.5 for genome in late]) < 0.25


def test_startup_is_spread():
    """Before the startup is over a batch is a Latin hypercube: one point per slice of every axis."""
    driver = Tpe(batch=8).start(Problem(axes=SQUARE, objectives=1, seed=0))
    batch = np.array([driver.ask() for _ in range(8)])

    assert [sorted((column * 8).astype(int)) for column in batch.T] == [list(range(8))] * 2


def test_startup_is_what_the_space_draws():
    """Where a space draws random genomes, those before the startup is over are its own; the model's are others."""
    axes = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(6))
    draw = lambda rng: tuple(rng.choice([0.25, 0.75], size=6).tolist())  # noqa: E731
    driver = Tpe(batch=8, startup=16).start(Problem(axes=axes, objectives=1, seed=0, draw=draw))
    found = search(driver, lambda g: (sum(g),), 24)

    assert {gene for genome in found[:16] for gene in genome} == {0.25, 0.75}
    assert len(set(found[:16])) == 16
    assert not {gene for genome in found[16:] for gene in genome} <= {0.25, 0.75}


def test_known_candidates_replace_the_startup():
    """With enough known genomes the first batch is drawn from the model, near the best ones."""
    rng = np.random.default_rng(0)
    known = tuple(((float(x), float(y)), (float((x - 0.8) ** 2 + (y - 0.8) ** 2),)) for x, y in rng.random((60, 2)))
    driver = Tpe(batch=16).start(Problem(axes=SQUARE, objectives=1, seed=0, known=known))
    batch = np.array([driver.ask() for _ in range(16)])

    assert np.median(np.linalg.norm(batch - 0.8, axis=1)) < 0.3


def test_univariate_learns_too():
    """With one model per axis the best option is found, and proposed more than its share."""
    axes = (*SQUARE, Choice(name="c", options=("a", "b", "c", "d", "e")))
    losses = lambda g: (g[0] + g[1] + (g[2] != "b"),)  # noqa: E731
    late = search(Tpe(multivariate=False).start(Problem(axes=axes, objectives=1, seed=0)), losses, 80)[40:]

    assert np.mean([genome[2] == "b" for genome in late]) > 0.5

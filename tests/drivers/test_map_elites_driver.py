"""MAP-Elites: the contract, archives against a plain dictionary, chances and children against cases by hand."""

import numpy as np
import pytest

from evomerge.drivers import MapElites, Problem
from evomerge.drivers.map_elites import elites
from evomerge.errors import ExperimentError
from evomerge.genome import Real
from tests.drivers.contract import CUBE, Batches, DriverContract, FrontContract, Steady

LINE = (Real(name="x", low=0, high=1), Real(name="y", low=0, high=1))


class TestMapElites(Batches, FrontContract):
    """MAP-Elites in batches keeps the contract."""

    settings = MapElites()


class TestMapElitesSteady(Steady, FrontContract):
    """MAP-Elites in steady state keeps the contract."""

    settings = MapElites(steady=True)


class TestMapElitesAsPublished(Steady, DriverContract):
    """MAP-Elites with CycleQD's settings keeps the contract of drivers."""

    settings = MapElites(bins=15, crossover="mixture", crossover_sigma=0.01, growth=0.1, steady=True)


def started(known, objectives, settings, axes=LINE, **more):
    """A driver that knows genomes and their losses."""
    return settings.start(Problem(axes=axes, objectives=objectives, seed=2, known=tuple(known), **more))


def first_of(driver, quality):
    """The elites of an objective's archive, by the first gene, with their chances."""
    genomes, chances = driver.strategy._elites(quality)
    return [genome[0] for genome in genomes], chances.tolist()


@pytest.mark.parametrize("axes", [1, 2, 4])
def test_an_archive_is_a_dictionary_of_the_best(axes):
    """Cell by cell, the elite is the least loss of all that fall into it; of equals the first, outside in end cells."""
    rng = np.random.default_rng(axes)
    losses, behaviour = rng.integers(0, 20, 400) / 20.0, rng.uniform(-0.4, 1.4, (400, axes))
    best = {}
    for i in range(400):
        cell = tuple(min(max(int(np.floor(5 * x)), 0), 4) for x in behaviour[i])
        if cell not in best or losses[i] < losses[best[cell]]:
            best[cell] = i

    assert elites(losses, behaviour, [(0.0, 1.0)] * axes, 5) == [best[cell] for cell in sorted(best)]


def test_cells_are_limited():
    """With many axes of behaviour there are fewer bins, and losses far outside harm nothing."""
    rng = np.random.default_rng(0)
    behaviour = np.concatenate([rng.random((50, 12)), np.full((1, 12), 1e300)])

    # 50,000 cells are two bins on each of twelve axes.
    assert len(elites(np.zeros(51), behaviour, [(0.0, 1.0)] * 12, 15)) == len(
        {tuple(row) for row in (np.clip(behaviour, 0, 1) >= 0.5).tolist()}
    )


def test_each_objective_is_the_quality_in_turn():
    """With one bin an archive has one elite, the best in its objective, and children of each generation lie there."""
    known = (((0.2, 0.2), (0.0, 1.0)), ((0.8, 0.8), (1.0, 0.0)), ((0.5, 0.5), (0.5, 0.5)))
    settings = MapElites(bins=1, startup=1, batch=6, mutation_rate=1.0, mutation_sigma=0.001)
    driver = started(known, 2, settings)
    for generation in range(4):
        genomes = [driver.ask() for _ in range(6)]
        for i, genome in enumerate(genomes):
            driver.tell(6 * generation + i, genome, (2.0, 2.0))

        assert np.abs(np.array(genomes) - (0.2, 0.8)[generation % 2]).max() < 0.01


def test_behaviour_is_cut_into_bins():
    """Of two that are alike in the other objective the better stays, and ranges or a reference move the cuts."""
    known = [((i / 10, 0.5), losses) for i, losses in enumerate([(0.3, 0.1), (0.2, 0.4), (0.1, 0.6), (0.5, 0.9)])]

    # bins of [0.1, 0.9]: below and above 0.5
    assert first_of(started(known, 2, MapElites(bins=2)), 0)[0] == [0.1, 0.2]
    # of [0.1, 1.3]: below and above 0.7
    assert first_of(started(known, 2, MapElites(bins=2), reference=(9.0, 1.3)), 0)[0] == [0.2, 0.3]
    # of [0.8, 1.0]: all but the last lie outside, below
    assert first_of(started(known, 2, MapElites(bins=2, ranges=((1.0, 0.0), (1.0, 0.8)))), 0)[0] == [0.2, 0.3]


def test_one_objective_is_spread_over_two_genes():
    """With one objective, the best of each quarter of the first two genes is an elite."""
    known = [(point, (sum(point),)) for point in [(0.1, 0.1), (0.3, 0.3), (0.9, 0.2), (0.6, 0.7), (0.2, 0.8)]]

    assert first_of(started(known, 1, MapElites(bins=2)), 0)[0] == [0.1, 0.2, 0.9, 0.6]


def test_chances_are_products():
    """The best in both of two objectives has the chance 0.8 * 0.8, the worst 0.5 * 0.5, before they are scaled."""
    known = [((0.1, 0.5), (0.0, 0.0)), ((0.2, 0.5), (1.0, 1.0)), ((0.3, 0.5), (0.5, 0.5))]
    genes, chances = first_of(started(known, 2, MapElites(bins=15)), 0)
    gamma = np.array([0.64, 0.65**2, 0.25])

    assert genes == [0.1, 0.3, 0.2]
    assert chances == pytest.approx((gamma / gamma.sum()).tolist())
    assert first_of(started(known, 2, MapElites(sampling="random")), 1)[1] == pytest.approx([1 / 3] * 3)


def test_children_are_mixtures_that_grow():
    """With no moves, a child of two genomes is their middle times 1 to 1.1; on the line it lies on it."""
    known = [((0.2, 0.2), (0.0, 1.0)), ((0.4, 0.8), (1.0, 0.0))]
    still = {"startup": 1, "batch": 30, "mutation_rate": 0.0}
    mixing = started(known, 2, MapElites(crossover="mixture", crossover_sigma=0.0, growth=0.1, **still))
    found = np.array([mixing.ask() for _ in range(30)]) / (0.3, 0.5)
    assert ((found >= 1 - 1e-12) & (found <= 1.1)).all()
    assert found.mean() == pytest.approx(1.05, abs=0.02)

    along = started(known, 2, MapElites(crossover_sigma=0.1, **still))
    x, y = np.array([along.ask() for _ in range(30)]).T
    assert y == pytest.approx(0.2 + 3 * (x - 0.2))
    assert np.minimum(np.abs(x - 0.2), np.abs(x - 0.4)).max() < 0.4 * 0.2


def test_revised_elites_give_their_cell_back():
    """An elite told worse, or as a failure, makes room for who was there before it."""
    driver = MapElites(bins=1, startup=3, batch=3).start(Problem(axes=CUBE, objectives=2, seed=1))
    genomes = [driver.ask() for _ in range(3)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, (float(-index), 0.0))
    assert first_of(driver, 0)[0] == [genomes[2][0]]
    driver.revise(2, (5.0, 0.0))
    assert first_of(driver, 0)[0] == [genomes[1][0]]
    driver.revise(1, None)
    assert first_of(driver, 0)[0] == [genomes[0][0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MapElites(bins=0), "'bins' must be at least 1, got 0"),
        (lambda: MapElites(least=0.9), "'most' must be at least 0.9, got 0.8"),
        (lambda: MapElites(sampling="best"), "'sampling' must be elite or random, got 'best'"),
        (lambda: MapElites(crossover="none"), "'crossover' must be line or mixture, got 'none'"),
        (lambda: MapElites(ranges=((0.0, 0.0),)), r"each needs two different losses, got \[0.0, 0.0\]"),
        (lambda: started((), 2, MapElites(ranges=((0.0, 1.0),))), "one per objective, 2 of them, got 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    """Settings out of range name the setting, what it may be and the value."""
    with pytest.raises(ExperimentError, match=message):
        make()

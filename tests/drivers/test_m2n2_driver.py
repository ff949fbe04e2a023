"""M2N2: the contract, and worth, attraction, survival and crossover against cases worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest

from evomerge.drivers import Detail, M2n2, Problem
from evomerge.drivers.items import Items, attraction, fitness, worth
from evomerge.drivers.mixing import moved
from evomerge.errors import ExperimentError
from evomerge.genome import Choice, Real, Whole
from tests.drivers.contract import MIXED, Batches, FrontContract, Steady

LINE = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(5))

# Three members, four items: all solve the first, nobody the last.
SOLVED = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]])


class TestM2n2(Batches, FrontContract):
    """M2N2 in batches keeps the contract."""

    settings = M2n2()


class TestM2n2Steady(Steady, FrontContract):
    """M2N2 in steady state keeps the contract."""

    settings = M2n2(steady=True)


def answers(*bits):
    """Details of what was answered to a task's items, None where one was not asked."""
    return Detail(responses={"t": {i: float(bit) for i, bit in enumerate(bits) if bit is not None}})


def archive(*details, axes=LINE, **settings):
    """A driver that knows one genome per detail, x0 = 0, 0.1, 0.2 and so on, with equal losses."""
    known = tuple(((i / 10, *(0.5,) * 4), (0.0,)) for i in range(len(details)))
    problem = Problem(axes=axes, objectives=1, seed=1, known=known, details=details)
    return M2n2(population=len(details), **settings).start(problem)


def members(driver):
    """The first gene of each member of the archive."""
    return [member.genome[0] for member in driver.strategy._members]


def test_worth_is_what_was_worked_out_by_hand():
    """On three members and four items, fitness and attraction are the sums of shares of items."""
    shared = worth(SOLVED, 1.0)

    assert shared.tolist() == [[1 / 3, 1, 0, 0], [1 / 3, 0, 1, 0], [1 / 3, 0, 0, 0]]
    assert fitness(shared).tolist() == pytest.approx([4 / 3, 4 / 3, 1 / 3])
    assert attraction(shared, 0).tolist() == [0, 1, 0]
    assert attraction(shared, 2).tolist() == [1, 1, 0]
    assert fitness(worth(SOLVED, 0.0)).tolist() == [2, 2, 1]
    assert fitness(worth(SOLVED, 2.0)).tolist() == pytest.approx([10 / 9, 10 / 9, 1 / 9])


def test_all_of_every_item_is_shared_out():
    """With alpha 1 the fitness of all members adds up to the number of items that anybody solved, whatever they are."""
    scores = np.random.default_rng(0).choice([0.0, 0.0, 0.3, 1.0], (7, 50))

    assert fitness(worth(scores, 1.0)).sum() == pytest.approx((scores > 0).any(axis=0).sum())


def test_items_that_were_not_answered_are_weighed():
    """Who did not answer an item counts as the mean of who did; a pair is compared on what both answered."""
    shared = worth(np.array([[1.0, 1.0, 0.0], [1.0, np.nan, np.nan], [0.0, 1.0, 1.0]]), 1.0)

    # z = 2, 2 * 3/2, 1 * 3/2
    assert shared[0].tolist() == pytest.approx([1 / 2, 1 / 3, 0])
    assert fitness(shared).tolist() == pytest.approx([5 / 6, 3 / 2, 1])
    assert attraction(shared, 0).tolist() == pytest.approx([0, 0, 2 / 3])
    assert attraction(shared, 1).tolist() == pytest.approx([0, 0, 0])
    assert attraction(worth(np.array([[1.0, np.nan], [np.nan, 1.0]]), 1.0), 0).tolist() == [0, 0]


def test_losses_stand_in_where_responses_have_no_bounds():
    """A task counts by items if all its responses lie in [0, 1]; else points of losses count too."""
    items = Items()
    bits = items.read({"t": {3: 1.0, 9: 0.0}, "length": {0: 41.0}}), items.read({"t": {3: 0.5}, "length": {0: 0.0}})
    found = items.scores(bits, [(-1.0, 5.0), (-2.0, 5.0)])

    assert found[:, :2].tolist() == [[1.0, 0.0], [0.5, pytest.approx(np.nan, nan_ok=True)]]
    # The points reach half a width beyond the worst: the second, best member reaches all, the first a third.
    assert found[:, 2:].mean(axis=1).tolist() == pytest.approx([1 / 3, 1], abs=0.01)
    assert items.scores(bits, [(-1.0,), (-2.0,)]).shape == (2, 2)


def test_points_of_losses_share_hypervolume():
    """Without items, fitness is the volume that each dominates, shared by all who dominate it as well."""
    losses = [(0.0, 1.0), (1.0, 0.0), (0.25, 0.5), (0.5, 0.5)]
    scores = Items().scores([Items().read({})] * 4, losses)
    shares = fitness(worth(scores, 1.0)) / scores.shape[1] * 1.5**2

    # Cell by cell, up to (1.5, 1.5), of the grid of all coordinates.
    edges = [0.0, 0.25, 0.5, 1.0, 1.5]
    expected = np.zeros(4)
    for x, right in pairwise(edges):
        for y, top in pairwise(edges):
            owners = [i for i, (a, b) in enumerate(losses) if a <= x and b <= y]
            expected[owners] += (right - x) * (top - y) / max(len(owners), 1)
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_who_can_do_what_nobody_else_can_stays():
    """Of four, the only one to solve the third item stays although it solves least; without competition it leaves."""
    crowd, alone = answers(1, 1, 0), answers(0, 0, 1)
    for alpha, left in ((1.0, [0.1, 0.2, 0.9]), (0.0, [0.0, 0.1, 0.9])):
        driver = archive(crowd, crowd, alone, alpha=alpha)
        driver.inject((0.9, *(0.5,) * 4), (0.0,), crowd)

        assert members(driver) == left


def test_a_revised_member_competes_by_what_is_known_now():
    """What was told again changes who leaves next, and a failure is out at once."""
    driver = M2n2(population=3, batch=3).start(Problem(axes=LINE, objectives=1, seed=1))
    genomes = [driver.ask() for _ in range(3)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, (0.0,), answers(1, 1, 0))
    driver.revise(2, (0.0,), answers(0, 1, 0))
    driver.inject((0.9,) * 5, (0.0,), answers(1, 1, 0))
    assert members(driver) == [genomes[0][0], genomes[1][0], 0.9]
    driver.revise(0, None)
    driver.revise(2, (0.0,), answers(1, 1, 1))  # it has left, and does not return
    assert members(driver) == [genomes[1][0], 0.9]


def test_a_child_crosses_over_once():
    """Of parents at two ends of a line, the share is w up to a place and 1 - w after it, and options follow it."""
    axes = (*LINE[:4], Choice(name="c", options=("a", "b")))
    known = (((0.0, 0.0, 0.0, 0.0, "a"), (0.0,)), ((1.0, 1.0, 1.0, 1.0, "b"), (0.0,)))
    problem = Problem(axes=axes, objectives=1, seed=3, known=known, details=(answers(1, 0), answers(0, 1)))
    driver = M2n2(population=2, mutation_rate=0.0, batch=40).start(problem)
    places = set()
    for child in (driver.ask() for _ in range(40)):
        w, *numbers, option = child
        place = next((i for i in range(1, 4) if numbers[i - 1] != pytest.approx(w)), 4)
        places.add(place)
        assert numbers == pytest.approx([w] * (place - 1) + [1 - w] * (4 - place))
        assert option == ("b" if 1 - w > 0.5 else "a")

    assert places == {1, 2, 3, 4}


def test_parents_complement_each_other():
    """The second parent is who solves what the first does not: of two pairs of twins, never the twin."""
    known = tuple(((float(i // 2), i / 10, *(0.5,) * 3), (0.0,)) for i in range(4))
    twins = answers(1, 0), answers(1, 0), answers(0, 1), answers(0, 1)
    problem = Problem(axes=LINE, objectives=1, seed=1, known=known, details=twins)
    driver = M2n2(population=4, mutation_rate=0.0, batch=60).start(problem)

    # Twins have the same first gene, 0 or 1, and so would their children.
    assert all(0 < driver.ask()[0] < 1 for _ in range(60))


def test_moves_are_normal_and_reflected():
    """Steps have the deviation that was asked for, mirror at the bounds, and move integers and options for sure."""
    axes = (Real(name="x", low=0, high=10), Whole(name="k", low=0, high=3), Choice(name="c", options=("a", "b", "c")))
    rng = np.random.default_rng(0)
    inner = [moved(axes, (5.0, 1, "b"), 1.0, 0.1, rng) for _ in range(2000)]
    outer = np.array([moved(axes, (0.0, 1, "b"), 1.0, 0.1, rng)[0] for _ in range(2000)])

    assert np.std([genome[0] for genome in inner]) == pytest.approx(1.0, rel=0.05)
    assert {genome[1] for genome in inner} == {0, 2}
    assert {genome[2] for genome in inner} == {"a", "c"}
    # The mean of |N(0, 1)| is sqrt(2 / pi).
    assert outer.mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.05)
    assert moved(MIXED, (0.5, 0.1, 3, "ties", 0.5), 0.0, 0.1, rng) == (0.5, 0.1, 3, "ties", 0.5)


def test_bad_settings_are_refused():
    """Settings out of range name the setting, its bound and the value."""
    with pytest.raises(ExperimentError, match="'population' must be at least 2, got 1"):
        M2n2(population=1)
    with pytest.raises(ExperimentError, match="'alpha' must be at least 0, got -1"):
        M2n2(alpha=-1.0)

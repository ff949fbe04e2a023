"""Greedy merging: the contract, the merges of a family worked out by hand, and mixtures of genomes."""


import numpy as np
import pytest

from evomerge.drivers import Greedy, Problem
from evomerge.drivers.greedy import crowding, kinship, mixture
from evomerge.errors import ExperimentError
from evomerge.genome import ActiveIf, Choice, Real, Whole
from tests.drivers.contract import Batches, FrontContract, Steady


class TestGreedy(Batches, FrontContract):
    """Greedy merging keeps the contract."""

    settings = Greedy()


class TestGreedySteady(Steady, FrontContract):
    """Greedy merging in steady state keeps the contract."""

    settings = Greedy(steady=True)


LINE = tuple(Real(name=name, low=0, high=1) for name in "xy")
MIX = (
    Real(name="x", low=0, high=1),
    Real(name="rate", low=0.01, high=1, log=True),
    Whole(name="k", low=0, high=8),
    Choice(name="c", options=("a", "b")),
    Real(name="density", low=0, high=1, active_if=ActiveIf(axis="c", options=("b",))),
)
#: Best first; the third is the least akin to the first, seen from the middle of the square.
FOUNDERS = ((0.9, 0.9), (0.9, 0.6), (0.0, 0.1), (0.7, 0.9))


def founded(settings, genomes=FOUNDERS):
    """A driver that knows these genomes, each worse than the one before."""
    known = tuple((genome, (float(i),)) for i, genome in enumerate(genomes))
    return settings.start(Problem(axes=LINE, objectives=1, seed=0, known=known))


def middle(one, two):
    """The point between two."""
    return tuple(round((a + b) / 2, 9) for a, b in zip(one, two, strict=True))


def test_a_generation_is_all_pairs_of_the_best_and_one_to_explore():
    """Of the best three all pairs are merged in the middle, and the best with the one whose cosine is least."""
    driver = founded(Greedy(top=3, startup=4))
    found = [tuple(round(gene, 9) for gene in driver.ask()) for _ in range(4)]
    one, two, far, _ = FOUNDERS

    # The explored pair is one of the three, so that its second merge is in other shares.
    assert driver.ask() is None
    assert {middle(one, two), middle(two, far), middle(one, far)} == set(found[:3])

    driver = founded(Greedy(top=2, startup=4))
    found = [tuple(round(gene, 9) for gene in driver.ask()) for _ in range(2)]
    assert found == [middle(one, two), middle(one, far)]


def test_pairs_are_not_merged_twice_before_the_circle_widens():
    """With two at the top, the third joins when the two are merged, and takes turns with a second merge of them."""
    driver = founded(Greedy(top=2, startup=4, steady=True))
    strategy = driver.strategy
    middles = {middle(one, two) for i, two in enumerate(FOUNDERS) for one in FOUNDERS[:i]}
    found = [tuple(round(gene, 9) for gene in strategy.propose(2 * k)[0]) for k in range(4)]

    assert found[0] == middle(*FOUNDERS[:2])
    # then the two of the third with the first and second, and once more the first pair, in any order
    assert sum(genome in middles for genome in found[1:]) == 2
    assert middle(FOUNDERS[0], FOUNDERS[2]) in found
    assert middle(FOUNDERS[1], FOUNDERS[2]) in found


def test_merges_of_merges_reach_beyond_both():
    """A merge of founders lies between them, one of a merge may lie outside by `reach`, and at 0 never does."""
    for reach, outside in ((0.0, False), (0.5, True)):
        driver, found = founded(Greedy(top=3, startup=4, reach=reach)), []
        for index in range(40):
            found.append(driver.ask())
            driver.tell(index, found[-1], (-1.0 - index,))
        own = np.array(found)
        low, high = np.array(FOUNDERS).min(axis=0), np.array(FOUNDERS).max(axis=0)
        assert bool((own < low - 1e-9).any() or (own > high + 1e-9).any()) is outside


def test_the_best_of_several_objectives_are_spread():
    """Of one front those with most room come first: the ends, and then the one with the farthest neighbours."""
    losses = ((0.0, 1.0), (0.1, 0.8), (0.15, 0.75), (0.6, 0.3), (1.0, 0.0), (2.0, 2.0))
    known = tuple(((i / 8, 0.5), amounts) for i, amounts in enumerate(losses))
    strategy = Greedy(top=3).start(Problem(axes=LINE, objectives=2, seed=0, known=known)).strategy

    assert [member.losses for member in strategy._members[:3]] == [losses[0], losses[4], losses[3]]
    assert strategy._members[-1].losses == losses[5]


def test_room_is_the_crowding_distance():
    """It is the one of pymoo, which divides by the number of objectives."""
    from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function

    for objectives in (2, 3, 4):
        losses = np.random.default_rng(objectives).random((12, objectives))
        theirs = get_crowding_function("cd").do(losses, n_remove=0)

        assert crowding(losses) == pytest.approx(theirs * objectives)


def test_kinship_is_the_cosine():
    """Alike is 1, at a right angle 0, opposite -1; what does not differ from the start is akin to nobody."""
    one = np.array([1.0, 2.0])

    assert kinship(one, 3 * one) == pytest.approx(1.0)
    assert kinship(one, np.array([2.0, -1.0])) == pytest.approx(0.0)
    assert kinship(one, -one) == pytest.approx(-1.0)
    assert kinship(one, np.zeros(2)) == 0.0


def test_a_mixture_lies_between():
    """Numbers lie in the middle on their own scale, integers are rounded, options are one of both."""
    one, two = (0.2, 0.01, 2, "b", 0.4), (0.6, 1.0, 6, "b", 0.8)
    rng = np.random.default_rng(0)

    assert mixture(MIX, one, two, np.full(5, 0.5), rng) == pytest.approx((0.4, 0.1, 4, "b", 0.6))
    assert mixture(MIX, one, two, np.zeros(5), rng) == pytest.approx(one)
    assert mixture(MIX, one, two, np.ones(5), rng) == pytest.approx(two)
    # beyond both, up to the bounds
    assert mixture(MIX, one, two, np.full(5, 1.5), rng)[:3] == pytest.approx((0.8, 1.0, 8))


def test_an_axis_that_counts_in_one_parent_is_that_ones():
    """Where the option of one parent switches an axis off, its value there means nothing."""
    one, two = (0.2, 0.1, 2, "a", 0.0), (0.6, 0.1, 6, "b", 0.8)
    found = [mixture(MIX, one, two, np.full(5, 0.5), np.random.default_rng(k)) for k in range(40)]

    assert {genome[4] for genome in found} == {0.8}
    assert 10 < sum(genome[3] == "a" for genome in found) < 30


def test_a_revised_member_takes_its_place():
    """What was the best by luck is no longer merged once it is known to be the worst; what failed is gone."""
    driver = Greedy(top=2, startup=4).start(Problem(axes=LINE, objectives=1, seed=0))
    for index in range(4):
        driver.tell(index, driver.ask(), (float(index),))
    strategy = driver.strategy
    driver.revise(0, (9.0,))
    driver.revise(1, None)

    assert [member.losses for member in strategy._members] == [(2.0,), (3.0,), (9.0,)]


def test_settings_out_of_range():
    """Fewer than two at the top, and a reach below nothing, are refused."""
    with pytest.raises(ExperimentError, match="'top' must be at least 2, got 1"):
        Greedy(top=1)
    with pytest.raises(ExperimentError, match="'reach' must be at least 0"):
        Greedy(reach=-0.1)

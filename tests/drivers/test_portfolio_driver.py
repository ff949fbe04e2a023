"""Portfolios: the contract, who is told what, credit and bandit against cases worked out by hand."""

import dataclasses

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import Cma, Greedy, Grid, Nsga2, Nsga3, Portfolio, Problem, Random, Tpe
from evomerge.drivers.credit import Bandit, Volume
from evomerge.errors import ExperimentError
from tests.drivers.contract import CUBE, TINY, Batches, DriverContract, FrontContract, Steady, asks, run, sphere

ARMS = (Nsga2(population=14), Nsga3(population=10), Greedy(startup=8))


class TestPortfolioSteady(Steady, FrontContract):
    """A portfolio in steady state keeps the contract."""

    settings = Portfolio(drivers=ARMS, batch=8, steady=True)


class TestPortfolioByDefault(Batches, FrontContract):
    """A portfolio of the drivers that it has by default keeps the contract."""

    settings = Portfolio()


class TestPortfolioOfModels(Steady, DriverContract):
    """A portfolio of drivers that keep a distribution or a model keeps the contract."""

    settings = Portfolio(drivers=(Cma(), Tpe()), batch=6, steady=True)


class TestPortfolioOfOne(Batches, DriverContract):
    """A portfolio of one driver keeps the contract."""

    settings = Portfolio(drivers=(Nsga2(population=14),), batch=14, startup=14)


def problem(**more):
    """Two losses on six axes."""
    return Problem(**{"axes": CUBE, "objectives": 2, "seed": 5, **more})


class Watched:
    """A strategy that walks along the first axis and writes down what it is told."""

    def __init__(self, offset, count=10**6):
        self.offset, self.count, self.events = offset, count, []

    def propose(self, step, factor=1):
        """Return the next of its walk."""
        if step >= self.count:
            return []
        return [(self.offset + (step + k) / 1000, 0.5, 0.5, 0.5, 0.5, 0.5) for k in range(factor)]

    def drop(self, genomes):
        """Write it down."""
        self.events.append(("drop", *genomes))

    def learn(self, step, results):
        """Write it down."""
        self.events += [("learn", step, one.index, one.genome, one.losses) for one in results]

    def revise(self, result):
        """Write it down."""
        self.events.append(("revise", result.index, result.losses))

    def inject(self, result):
        """Write it down."""
        self.events.append(("inject", result.index, result.genome, result.losses))


def watched(*strategies, floor=1.0, **more):
    """A steady portfolio of watched strategies, without random genomes at the start."""
    settings = Portfolio(drivers=(Random(),) * len(strategies), startup=0, floor=floor, steady=True)
    driver = settings.start(problem(**more))
    for arm, strategy in zip(driver.strategy._arms, strategies, strict=True):
        arm._strategy = strategy
    return driver


def test_all_are_told_and_only_who_proposed_learns():
    """Each result is learned by its arm under the arm's own count, and injected into the other under a negative one."""
    one, two = Watched(0.0), Watched(0.5)
    driver = watched(one, two)
    genomes = [driver.ask() for _ in range(12)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, None if index == 3 else (float(index), -float(index)))

    for own, other, low in ((one, two, 0.0), (two, one, 0.5)):
        mine = [(i, g) for i, g in enumerate(genomes) if low <= g[0] < low + 0.5]
        assert mine
        assert [event for event in own.events if event[0] == "learn"] == [
            ("learn", k, k, g, None if i == 3 else (float(i), -float(i))) for k, (i, g) in enumerate(mine)
        ]
        injected = [event for event in other.events if event[0] == "inject"]
        assert [event[2] for event in injected] == [g for _, g in mine]
        assert all(event[1] < -1 for event in injected)
    numbers = [event[1] for event in one.events + two.events if event[0] == "inject"]
    assert len(set(numbers)) == len(numbers)


def test_what_is_revised_reaches_everybody_under_the_index_that_they_know():
    """The arm that proposed it knows it by its own count, the other by the number under which it was injected."""
    one, two = Watched(0.0), Watched(0.5)
    driver = watched(one, two)
    for index in range(6):
        driver.tell(index, driver.ask(), (float(index), -float(index)))
    for index in range(6):
        driver.revise(index, (10.0 + index, 0.0))

    for strategy in (one, two):
        first = {event[-1][0]: event[2] if event[0] == "learn" else event[1] for event in strategy.events[:6]}
        revised = {event[2][0] - 10: event[1] for event in strategy.events[6:]}
        assert revised == first


def test_what_two_propose_is_scored_once():
    """An arm that repeats what was scored is told at once; one that repeats what is in flight, with the first."""
    one, two = Watched(0.0), Watched(0.0)
    driver = watched(one, two)
    found = [driver.ask() for _ in range(8)]
    assert len(set(found)) == 8
    for index, genome in enumerate(found):
        driver.tell(index, genome, (float(index), 0.0))
    while len(found) < 60:
        found.append(driver.ask())
        driver.tell(len(found) - 1, found[-1], (float(len(found)), 0.0))

    assert len(set(found)) == 60
    losses = {genome: (float(i if i < 8 else i + 1), 0.0) for i, genome in enumerate(found)}
    for arm, strategy in zip(driver.strategy._arms, (one, two), strict=True):
        learned = [event for event in strategy.events if event[0] == "learn"]
        assert [event[2] for event in learned] == list(range(arm._asked))
        assert all(event[4] == losses[event[3]] for event in learned)


def test_when_one_has_nothing_more_the_others_go_on():
    """An arm that is exhausted is passed over, and when all are, random genomes are drawn."""
    driver = watched(Watched(0.0, count=3), Watched(0.5, count=5))
    found = []
    for index in range(12):
        found.append(driver.ask())
        driver.tell(index, found[-1], (1.0, 1.0))

    walked = [genome for genome in found if genome[1:] == (0.5,) * 5]
    assert len(walked) == 8
    assert walked == found[:8]
    assert len(set(found)) == 12


def test_a_finite_space_ends():
    """Of grids over a finite space every genome comes once, and then None."""
    settings = Portfolio(drivers=(Grid(), Nsga2(population=4)), batch=4, startup=2)
    driver = settings.start(Problem(axes=TINY, objectives=1, seed=0))
    found = asks(run(driver, lambda genome: (float(genome[1]),), 100))

    assert len(found) == len(set(found)) == 12
    assert driver.ask() is None


def test_what_is_dropped_goes_back_to_who_proposed_it():
    """Of four times as many as asked, those dropped are given back to their arms, and can come again."""
    one, two = Watched(0.0), Watched(0.5)
    strategy = watched(one, two).strategy
    many = strategy.propose(0, factor=20)
    strategy.drop(many[4:])

    given_back = {event[1] for own in (one, two) for event in own.events if event[0] == "drop"}
    assert len(many) == 20
    assert given_back == set(many[4:])
    assert {event[1][0] < 0.5 for event in one.events} <= {True}


def test_the_one_that_gains_is_asked_more():
    """An arm whose every genome is better than all before gets what is not shared alike; the other keeps its floor."""
    one, two = Watched(0.0), Watched(0.5)
    driver = watched(one, two, floor=0.2, reference=(1.0, 1.0))
    counts = [0, 0]
    for index in range(400):
        genome = driver.ask()
        gains = genome[0] < 0.5
        counts[0 if gains else 1] += 1
        driver.tell(index, genome, (0.5 - index / 1000, 0.5) if gains else (0.99, 0.99))

    # the floor of one of two is 10 %; four standard errors
    assert counts[1] / 400 == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 400) + 0.01)


def test_a_change_of_luck_is_noticed():
    """Gains of long ago fade: where one arm stops gaining and the other begins, most evaluations change hands."""
    one, two = Watched(0.0), Watched(0.5)
    driver = watched(one, two, floor=0.2, reference=(1.0, 1.0))
    later = []
    best = 0.9
    for index in range(600):
        genome = driver.ask()
        first = genome[0] < 0.5
        later.append(first)
        if first == (index < 300):
            best -= 0.001
        driver.tell(index, genome, (best, 0.5) if first == (index < 300) else (0.95, 0.95))

    assert np.mean(later[100:300]) > 0.8
    assert np.mean(later[500:]) < 0.2


def test_shares_follow_gains_per_evaluation():
    """Three arms, four evaluations, no fading: by hand 2, 1 and 0 per evaluation, with a floor of 0.3."""
    bandit = Bandit(3, 0.3, 1e9)
    for arm, gain in ((0, 3.0), (0, 1.0), (1, 1.0), (2, 0.0)):
        bandit.credit(arm, gain)

    assert bandit.shares() == pytest.approx([0.1 + 0.7 * 2 / 3, 0.1 + 0.7 / 3, 0.1])
    orders = np.array([bandit.order(np.random.default_rng(k)) for k in range(4000)])
    assert np.bincount(orders[:, 0], minlength=3) / 4000 == pytest.approx(bandit.shares(), abs=4 * 0.5 / np.sqrt(4000))
    assert (np.sort(orders, axis=1) == [0, 1, 2]).all()


def test_gains_fade():
    """After `memory` evaluations by another arm, a gain counts 1/e, and so does the trial that brought it."""
    bandit = Bandit(2, 0.0, 10.0)
    bandit.credit(0, 1.0)
    for _ in range(10):
        bandit.credit(1, 0.5)

    assert bandit._gained[0] == pytest.approx(np.exp(-1))
    # per evaluation nothing changed: 1 and 0.5
    assert bandit.shares() == pytest.approx([2 / 3, 1 / 3])


def test_without_gains_all_share_alike():
    """At the start, and where nobody gains; one that was never tried counts as the best of the others."""
    bandit = Bandit(4, 0.2, 50.0)
    assert bandit.shares() == pytest.approx([0.25] * 4)
    bandit.credit(1, 0.0)
    assert bandit.shares() == pytest.approx([0.25] * 4)
    bandit.credit(1, 1.0)
    assert bandit.shares() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_volumes_that_are_gained_add_up(objectives):
    """Added one by one, gains sum to the hypervolume of all; so they do after losses were revised."""
    rng = np.random.default_rng(objectives)
    losses = [tuple(row) for row in (1.2 * rng.random((60, objectives))).tolist()]
    volume, reference = Volume((1.0,) * objectives), (1.0,) * objectives
    gains = [volume.add(i, row) for i, row in enumerate(losses)]

    assert min(gains) == 0.0
    assert sum(gains) == pytest.approx(pareto.hypervolume(losses, reference))
    for i in range(0, 60, 2):
        losses[i] = None if i % 4 else tuple(0.5 + 0.5 * np.array(losses[i]))
        volume.revise(i, losses[i])
    left = [row for row in losses if row is not None]
    more = tuple([0.1] * objectives)
    assert volume.add(60, more) == pytest.approx(
        pareto.hypervolume([*left, more], reference) - pareto.hypervolume(left, reference)
    )


def test_without_a_reference_volume_is_measured_from_the_worst():
    """The corner is the worst of each loss so far, what is being added included."""
    volume = Volume(None)

    assert [volume.add(i, row) for i, row in enumerate([(3.0, 1.0), (1.0, 3.0)])] == [0.0, 0.0]
    assert volume.add(2, (2.0, 2.0)) == pytest.approx(1.0)
    volume.revise(1, (1.0, 4.0))
    # the corner is now (3, 4); of the box from (1.5, 1.5) the other one covers 1 x 2
    assert volume.add(3, (1.5, 1.5)) == pytest.approx(1.5 * 2.5 - 1.0 * 2.0)


def test_libraries_are_those_of_all():
    """Each once, and those of arms that are portfolios too."""
    inner = Portfolio(drivers=(Tpe(), Nsga2()))

    assert Portfolio(drivers=(Nsga2(), inner, Random())).libraries == ("optuna", "pymoo")


def test_a_portfolio_can_be_an_arm():
    """A portfolio within one proposes, learns and takes revisions as any other arm."""
    inner = Portfolio(drivers=(Nsga2(population=6), Greedy(startup=4)), startup=4)
    driver = Portfolio(drivers=(inner, Random()), startup=4, batch=8).start(problem(objectives=1))
    events = run(driver, sphere, 120)
    for index in range(0, 120, 7):
        driver.revise(index, (5.0,))

    assert len(set(asks(events))) == 120
    assert driver.ask() is not None


def test_settings_out_of_range():
    """No arms, a floor above one, a batch of nothing and a memory of less than one evaluation are refused."""
    for settings, message in (
        ({"drivers": ()}, "needs drivers"),
        ({"floor": 1.5}, "a floor from 0 to 1"),
        ({"batch": 0}, "'batch' must be at least 1"),
        ({"memory": 0.5}, "'memory' must be at least 1"),
    ):
        with pytest.raises(ExperimentError, match=message):
            Portfolio(**settings)
    assert dataclasses.replace(Portfolio(), steady=True).generation(6) == 16

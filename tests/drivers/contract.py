"""The contract of drivers as test classes, to be inherited by one class per driver that gives its settings."""

import json
from collections import deque
from typing import ClassVar

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import Problem, Random
from evomerge.errors import RecipeError
from evomerge.genome import ActiveIf, Choice, Real, Whole, check_genome, from_unit
from evomerge.spaces.edits import Edits, Steps

MIXED = (
    Real(name="weight", low=-1, high=2),
    Real(name="rate", low=1e-3, high=1, log=True),
    Whole(name="depth", low=2, high=6),
    Choice(name="method", options=("ties", "slerp", "linear")),
    Real(name="density", low=0.1, high=1, active_if=ActiveIf(axis="method", options=("ties",))),
)
CUBE = tuple(Real(name=f"x{i}", low=0, high=1) for i in range(6))
OPTIONS = (
    *(Choice(name=f"c{i}", options=("a", "b", "c", "d")) for i in range(6)),
    *(Whole(name=f"k{i}", low=0, high=9) for i in range(3)),
)
STACKS = Edits(
    names=("a", "b"), primary="a", sizes=(1, 1, 1, 1), edits=2, most=6, scales=Steps(low=0.75, high=1.25, step=0.125)
)
TINY = (Choice(name="c", options=("a", "b", "c")), Whole(name="k", low=0, high=3))


def mixed(genome):
    """Two losses in conflict on MIXED."""
    weight, rate, depth, method, density = genome
    first = (weight - 0.5) ** 2 + (np.log10(rate) + 1) ** 2 + (method != "ties") * (1 + density)
    return float(first), float(weight + depth)


def stacked(genome):
    """Two losses on the axes of STACKS: how many layers there are, and how many are not of b."""
    hops = STACKS.stack(genome).hops
    return float(len(hops)), float(sum(hop.source != "b" for hop in hops))


def sphere(genome):
    """One loss, least at 0.3 in every coordinate."""
    return (float(sum((x - 0.3) ** 2 for x in genome)),)


def mismatches(genome):
    """One loss: options that are not "c", and integers by their distance from 7."""
    return (float(sum(gene != "c" for gene in genome[:6]) + sum(abs(gene - 7) / 9 for gene in genome[6:])),)


def zdt1(genome):
    """ZDT1 (Zitzler, Deb, Thiele 2000): the front is 1 - sqrt(x0), all other coordinates 0."""
    g = 1 + 9 * sum(genome[1:]) / (len(genome) - 1)
    return float(genome[0]), float(g * (1 - np.sqrt(genome[0] / g)))


def run(driver, function, count, in_flight=1, shuffle=0, fails=lambda index: False):
    """Search with a number of candidates in flight; return the events, ("ask", genome) or ("tell", index, ...)."""
    rng, events, flying, asked = np.random.default_rng(shuffle), [], deque(), 0
    while True:
        while len(flying) < in_flight and asked < count and (genome := driver.ask()) is not None:
            events.append(("ask", genome))
            flying.append((asked, genome))
            asked += 1
        if not flying:
            return events
        flying.rotate(int(rng.integers(len(flying))))
        index, genome = flying.popleft()
        losses = None if fails(index) else function(genome)
        driver.tell(index, genome, losses)
        events.append(("tell", index, genome, losses))


def asks(events):
    """The genomes that were proposed, in order."""
    return [event[1] for event in events if event[0] == "ask"]


def replay(driver, events):
    """Feed events to a driver; return the genomes it proposes meanwhile."""
    found = []
    for event in events:
        if event[0] == "ask":
            found.append(driver.ask())
        else:
            driver.tell(*event[1:])
    return found


def best(function, events):
    """The least first loss of a run."""
    return min(function(genome)[0] for genome in asks(events))


class DriverContract:
    """What every driver keeps, in either manner; a class inherits it and one of `Batches` and `Steady`."""

    settings: ClassVar = None
    repeats = False  # whether a genome may be proposed twice
    learns = True

    def start(self, axes=MIXED, objectives=2, seed=11, **more):
        """Return a fresh driver."""
        return self.settings.start(Problem(axes=axes, objectives=objectives, seed=seed, **more))

    def test_genomes_fit_the_axes(self):
        """Every gene has the type of its axis and lies within the bounds."""
        for genome in asks(run(self.start(), mixed, 60)):
            assert [type(gene) for gene in genome] == [float, float, int, str, float]
            assert all(axis.contains(gene) for axis, gene in zip(MIXED, genome, strict=True))
            assert json.loads(json.dumps(genome)) == list(genome)

    def test_replay_goes_on_as_if_nothing_happened(self):
        """A fresh driver fed the events up to any cut proposes what the first proposed after it."""
        make = lambda: self.start()  # noqa: E731  (a name for the next four lines)
        events = run(make(), mixed, 60, in_flight=5, shuffle=1, fails=lambda i: i % 7 == 3)
        stored = [
            (kind, *[tuple(part) if isinstance(part, list) else part for part in rest])
            for kind, *rest in json.loads(json.dumps(events))
        ]
        assert replay(make(), stored) == asks(events)

        for cut in (1, 37, 98):
            driver = make()
            replay(driver, stored[:cut])
            for _ in range(3):
                make().ask()  # another driver in between shares nothing
            np.random.seed(cut)
            assert replay(driver, stored[cut:]) == asks(stored[cut:])

    def test_seed_decides(self):
        """Another seed gives other genomes."""
        assert asks(run(self.start(seed=1), mixed, 5)) != asks(run(self.start(seed=2), mixed, 5))

    def test_global_randomness_is_left_alone(self):
        """A run neither draws from numpy's global generator nor seeds it."""
        np.random.seed(5)
        before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
        run(self.start(), mixed, 40)

        assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before

    def test_failures_do_not_stop_a_run(self):
        """Whole generations of failures, at the start too, are survived, and the run still gets better."""
        size = self.settings.generation(len(CUBE))
        failing = lambda i: i // size in (0, 2) or i % 5 == 0  # noqa: E731
        events = run(self.start(CUBE, 1), sphere, 8 * size, fails=failing)
        scored = [event[3][0] for event in events if event[0] == "tell" and event[3]]

        assert len(asks(events)) == 8 * size
        assert min(scored) < scored[0]

    def test_nothing_but_failures(self):
        """When every candidate fails, the driver keeps proposing."""
        assert len(asks(run(self.start(), mixed, 50, fails=lambda i: True))) == 50

    def test_equal_losses(self):
        """A flat landscape neither stops nor breaks a driver."""
        assert len(asks(run(self.start(CUBE, 1), lambda g: (0.5,), 80))) == 80

    def test_genomes_are_new(self):
        """No genome is proposed twice, known ones included, and a finite space ends with None."""
        if self.repeats:
            pytest.skip("repeats are part of this algorithm; equal recipes are answered from the ledger")
        known = ((("a", 0), (0.0, 1.0)), (("b", 3), (1.0, 0.0)))
        driver = self.start(TINY, known=known)
        found = asks(run(driver, lambda g: (float(g[1]), float(g[0] == "a")), 100))

        assert len(found) == len(set(found)) == 10
        assert not {("a", 0), ("b", 3)} & set(found)
        assert driver.ask() is None

    def test_a_ledger_from_another_processor_replays(self):
        """Genomes told with other last bits than proposed are taken, and replay as they are."""
        first, second, told = self.start(CUBE, 1), self.start(CUBE, 1), []
        for index in range(30):
            genome = tuple(np.nextafter(gene, 0.5).item() for gene in first.ask())
            told.append((index, genome, sphere(genome)))
            first.tell(*told[-1])
        for event in told:
            assert second.ask() is not None
            second.tell(*event)

        assert second.ask() == first.ask()

    def test_known_candidates_fit(self):
        """Known genomes, also more of them than a generation, are taken at the start; the seed still decides."""
        rng = np.random.default_rng(0)
        genomes = [from_unit(MIXED, rng.random(len(MIXED))) for _ in range(70)]
        known = tuple((genome, mixed(genome)) for genome in genomes)
        driver, other = self.start(known=known), self.start(known=known, seed=12)

        assert driver.ask() != other.ask()
        assert len(asks(run(self.start(known=known), mixed, 30))) == 30

    @pytest.mark.parametrize(
        "axes",
        [
            (Real(name="x", low=0, high=1),),
            (Real(name="x", low=0, high=1), Real(name="still", low=2, high=2), Whole(name="k", low=3, high=3)),
            (Choice(name="one", options=("only",)), Whole(name="k", low=1, high=512, log=True)),
        ],
    )
    def test_odd_axes(self, axes):
        """One axis, axes with one value only, and a logarithmic integer work."""
        found = asks(run(self.start(axes, 1), lambda g: (float(g[0] != "only") * 0.5,), 24))

        assert len(found) == 24
        assert all(axis.contains(gene) for genome in found for axis, gene in zip(axes, genome, strict=True))

    def test_a_space_of_stacks_is_searched(self):
        """With start, random genomes and digests of a space whole generations fit, replay, and repeat no candidate."""
        axes, more = STACKS.axes, {"start": STACKS.rest(), "draw": STACKS.sample, "same": STACKS.stack}
        events = run(self.start(axes, **more), stacked, 3 * self.settings.generation(len(axes)) + 1, in_flight=3)
        found = asks(events)

        assert len(found) == 3 * self.settings.generation(len(axes)) + 1
        for genome in found:
            check_genome(axes, genome, "asked")
            assert json.loads(json.dumps(genome)) == list(genome)
        assert self.repeats or len({STACKS.stack(genome) for genome in found}) == len(found)
        assert replay(self.start(axes, **more), events) == found
        assert asks(run(self.start(axes, seed=12, **more), stacked, 5)) != found[:5]

    def test_candidates_are_new_where_many_genomes_are_one(self):
        """Each candidate of a finite space is proposed once, however many genomes it has, and known ones not at all."""
        if self.repeats:
            pytest.skip("repeats are part of this algorithm; equal recipes are answered from the ledger")
        own = Edits(names=("a",), primary="a", sizes=(1, 1, 1), operations=("drop",), edits=2, block=1, most=3)
        known = ((own.rest(), (3.0, 0.0)),)
        driver = self.start(own.axes, known=known, draw=own.sample, same=own.stack)
        found = asks(run(driver, lambda genome: (float(len(own.stack(genome).hops)), 0.0), 100))

        # one or two of three layers are left
        assert sorted(tuple(hop.layer for hop in own.stack(genome).hops) for genome in found) == [
            (0,), (0, 1), (0, 2), (1,), (1, 2), (2,),
        ]  # fmt: skip
        assert driver.ask() is None

    def test_revised_losses_are_taken_and_replay(self):
        """Losses told again, and failures, of any earlier genome neither stop a driver nor leave a replay's course."""
        size = self.settings.generation(len(MIXED))
        runs = []
        for _ in range(2):
            driver, found, index = self.start(), [], 0
            while len(found) < 4 * size:
                batch = []
                while (genome := driver.ask()) is not None:
                    batch.append(genome)
                for earlier in range(0, index, 3):
                    driver.revise(earlier, None if earlier % 2 else (float(earlier), 0.5))
                for genome in batch:
                    driver.tell(index, genome, mixed(genome))
                    index += 1
                found += batch
            runs.append(found)

        assert runs[0] == runs[1]

    def test_injected_genomes_count_as_met_and_replay(self):
        """What others found is not proposed again, in flight or not, and a fresh driver fed the same goes on alike."""
        runs = []
        for _ in range(2):
            driver, found, rng = self.start(TINY), [], np.random.default_rng(3)
            driver.inject(("c", 2), (0.0, 0.0))
            for index in range(6):
                found.append(driver.ask())
                if found[-1] is None:
                    break
                if index == 3:
                    driver.inject(("a", int(rng.integers(4))), None)
                driver.tell(index, found[-1], (float(found[-1][1]), 1.0))
            runs.append(found)

        assert runs[0] == runs[1]
        assert self.repeats or ("c", 2) not in runs[0]
        with pytest.raises(ValueError, match="2 finite losses"):
            driver.inject(("a", 0), (0.0,))
        with pytest.raises(RecipeError, match="injected: gene"):
            driver.inject(("z", 0), (0.0, 0.0))

    def test_bad_tells_are_refused(self):
        """What was not asked, told twice, not finite or of the wrong shape is an error, and changes nothing."""
        driver, clean = self.start(), self.start()
        genome = driver.ask()
        with pytest.raises(ValueError, match="index 1 is not in flight"):
            driver.tell(1, genome, (0.0, 0.0))
        with pytest.raises(ValueError, match="2 finite losses"):
            driver.tell(0, genome, (0.0, float("nan")))
        with pytest.raises(ValueError, match="2 finite losses"):
            driver.tell(0, genome, (0.0,))
        with pytest.raises(RecipeError, match="not within the axis"):
            driver.tell(0, (9.0, *genome[1:]), (0.0, 0.0))
        driver.tell(0, genome, mixed(genome))
        with pytest.raises(ValueError, match="told already"):
            driver.tell(0, genome, mixed(genome))
        clean.tell(0, clean.ask(), mixed(genome))

        assert driver.ask() == clean.ask()


class Batches:
    """What drivers keep that propose generations."""

    def test_order_of_results_does_not_matter(self):
        """One, three or sixteen candidates in flight and any order of results give the same run."""
        one = asks(run(self.start(), mixed, 50))

        assert asks(run(self.start(), mixed, 50, in_flight=3, shuffle=2)) == one
        assert asks(run(self.start(), mixed, 50, in_flight=16, shuffle=3)) == one

    def test_nothing_more_while_a_generation_is_in_flight(self):
        """A whole generation can be asked at once; then ask gives None until all of it is told."""
        driver, size = self.start(), self.settings.generation(len(MIXED))
        genomes = [driver.ask() for _ in range(size)]

        assert None not in genomes
        for index in reversed(range(size)):
            assert driver.ask() is None
            driver.tell(index, genomes[index], mixed(genomes[index]))
        assert driver.ask() is not None


class Steady:
    """What drivers keep that propose whenever a worker is free."""

    def test_as_many_are_in_flight_as_may_be(self):
        """Up to the limit genomes can be asked without a result; each result makes room for one more."""
        driver, limit = self.start(), self.settings.generation(len(MIXED))
        genomes = [driver.ask() for _ in range(limit)]

        assert None not in genomes
        for index in range(2 * limit):
            assert driver.ask() is None
            driver.tell(index, genomes[index], mixed(genomes[index]))
            genomes.append(driver.ask())
            assert genomes[-1] is not None

    def test_asking_in_vain_changes_nothing(self):
        """A driver that was asked when it had nothing to propose goes on as one that was not."""
        eager, calm = self.start(), self.start()
        limit = self.settings.generation(len(MIXED))
        asked = [(eager.ask(), calm.ask()) for _ in range(limit)]
        for index in range(3 * limit):
            assert [eager.ask() for _ in range(3)] == [None] * 3
            genome = asked[index][0]
            eager.tell(index, genome, mixed(genome))
            calm.tell(index, genome, mixed(genome))
            asked.append((eager.ask(), calm.ask()))

        assert all(one == two for one, two in asked)

    def test_results_count_at_once(self):
        """What is told while others are in flight changes what is proposed next, for drivers that learn."""
        if not self.learns:
            pytest.skip("this driver learns nothing")
        found = []
        for good in (0, 1):
            driver, limit = self.start(CUBE, 1), self.settings.generation(len(CUBE))
            events = run(driver, sphere, 6 * limit, in_flight=limit)
            genomes = [driver.ask() for _ in range(2)]
            first = len(asks(events))
            driver.tell(first, genomes[0], (float(good),))
            found.append([driver.ask() for _ in range(3)])

        assert found[0] != found[1]


class LearningContract(DriverContract):
    """What drivers that learn must keep besides, at a budget of candidates."""

    budget = 240

    def test_beats_random_on_a_sphere(self):
        """At an equal budget the median best loss over seeds is less than half that of random search."""
        ours = [best(sphere, run(self.start(CUBE, 1, seed), sphere, self.budget)) for seed in range(3)]
        blind = [best(sphere, run(Random().start(problem(CUBE, 1, seed)), sphere, self.budget)) for seed in range(3)]

        assert np.median(ours) < 0.5 * np.median(blind)

    def test_beats_random_on_options(self):
        """At an equal budget the median best loss on options and integers is less than that of random search."""
        ours = [best(mismatches, run(self.start(OPTIONS, 1, seed), mismatches, self.budget)) for seed in range(3)]
        blind = [
            best(mismatches, run(Random().start(problem(OPTIONS, 1, seed)), mismatches, self.budget))
            for seed in range(3)
        ]

        assert np.median(ours) < np.median(blind) - 0.5

    def test_what_was_scored_counts(self):
        """A driver learns from the genome it is told, not from the one it proposed."""
        driver, size = self.start(CUBE, 1), self.settings.generation(len(CUBE))
        proposed = []
        for index in range(12 * size):
            proposed.append(driver.ask())
            scored = tuple(0.8 + 0.2 * gene for gene in proposed[-1])
            driver.tell(index, scored, (sum((gene - 0.9) ** 2 for gene in scored),))

        # Learning from the proposed genomes would lead to 0.5.
        assert np.mean(proposed[-size:]) > 0.65

    def test_known_candidates_help(self):
        """Told good genomes before the start, the first generations are better than without."""
        rng = np.random.default_rng(1)
        good = [tuple(map(float, np.clip(0.3 + 0.05 * rng.standard_normal(6), 0, 1))) for _ in range(20)]
        known = tuple((genome, sphere(genome)) for genome in good)
        warm = best(sphere, run(self.start(CUBE, 1, known=known), sphere, 40))
        cold = best(sphere, run(self.start(CUBE, 1), sphere, 40))

        assert warm < cold


class FrontContract(LearningContract):
    """What drivers with several objectives must keep besides."""

    def test_beats_random_on_a_front(self):
        """At an equal budget the median hypervolume on ZDT1 is greater than that of random search."""

        def volume(driver):
            return pareto.hypervolume([zdt1(genome) for genome in asks(run(driver, zdt1, self.budget))], (1.1, 6.0))

        ours = [volume(self.start(CUBE, 2, seed)) for seed in range(3)]
        blind = [volume(Random().start(problem(CUBE, 2, seed))) for seed in range(3)]

        assert np.median(ours) > np.median(blind) + 0.2


def problem(axes, objectives, seed):
    """A problem without known candidates."""
    return Problem(axes=axes, objectives=objectives, seed=seed)

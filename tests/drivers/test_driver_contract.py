"""What every driver must keep, whatever library it hides: one contract, inherited per driver."""

import json
import os
import subprocess
import sys
from collections import deque
from typing import ClassVar

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import DRIVERS, Cma, Nsga2, Problem, Random, Tpe
from evomerge.errors import ExperimentError, RecipeError
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
    """Inherited by one class per driver, which gives its settings."""

    settings: ClassVar = None
    repeats = False  # whether a genome may be proposed twice

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

    def test_order_of_results_does_not_matter(self):
        """One, three or sixteen candidates in flight and any order of results give the same run."""
        one = asks(run(self.start(), mixed, 50))

        assert asks(run(self.start(), mixed, 50, in_flight=3, shuffle=2)) == one
        assert asks(run(self.start(), mixed, 50, in_flight=16, shuffle=3)) == one

    def test_seed_decides(self):
        """Another seed gives other genomes."""
        assert asks(run(self.start(seed=1), mixed, 5)) != asks(run(self.start(seed=2), mixed, 5))

    def test_global_randomness_is_left_alone(self):
        """A run neither draws from numpy's global generator nor seeds it."""
        np.random.seed(5)
        before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
        run(self.start(), mixed, 40)

        assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before

    def test_nothing_more_while_a_generation_is_in_flight(self):
        """A whole generation can be asked at once; then ask gives None until all of it is told."""
        driver, size = self.start(), self.settings.generation(len(MIXED))
        genomes = [driver.ask() for _ in range(size)]

        assert None not in genomes
        for index in reversed(range(size)):
            assert driver.ask() is None
            driver.tell(index, genomes[index], mixed(genomes[index]))
        assert driver.ask() is not None

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


class TestNsga2(FrontContract):
    """NSGA-II keeps the contract."""

    settings = Nsga2(population=14)


class TestNsga2FewOffspring(DriverContract):
    """NSGA-II with fewer offspring than population keeps the contract."""

    settings = Nsga2(population=5, offspring=5, mutation_rate=0.4)


class TestTpe(FrontContract):
    """TPE keeps the contract."""

    settings = Tpe()
    budget = 140


class TestCma(LearningContract):
    """CMA-ES keeps the contract, but for repeats."""

    settings = Cma()
    repeats = True


class TestRandom(DriverContract):
    """Random search keeps the contract."""

    settings = Random(batch=6)


class TestSobol(DriverContract):
    """The Sobol sequence keeps the contract."""

    settings = Random(batch=8, sobol=True)


SCRIPT = """
import json, sys
import evomerge.drivers as drivers
loaded = {"pymoo", "optuna", "cma", "torch", "ray"} & set(sys.modules)
assert not loaded, loaded
sys.path.insert(0, sys.argv[1])
from test_driver_contract import MIXED, asks, mixed, run
found = {}
for name, kind in drivers.DRIVERS.items():
    driver = kind().start(drivers.Problem(axes=MIXED, objectives=2, seed=4))
    found[name] = asks(run(driver, mixed, 60))
print(json.dumps(found))
"""


def test_another_process_gives_the_same_run(request):
    """Another process with another hash seed proposes the same; importing drivers loads no optimiser."""
    here = str(request.path.parent)
    root = str(request.config.rootpath)
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": root}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, here], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""

    for name, found in json.loads(out.stdout).items():
        assert [tuple(genome) for genome in found] == asks(run(DRIVERS[name]().start(problem(MIXED, 2, 4)), mixed, 60))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nsga2(population=1), "'population' must be at least 2, got 1"),
        (lambda: Nsga2(offspring=0), "'offspring' must be at least 1, got 0"),
        (lambda: Nsga2(mutation_rate=-0.1), "'mutation_rate' must be at least 0"),
        (lambda: Cma(population=2), "'population' must be at least 4, got 2"),
        (lambda: Cma(sigma=0.0), "'sigma' must be at least"),
        (lambda: Tpe(batch=0), "'batch' must be at least 1, got 0"),
        (lambda: Random(batch=0), "'batch' must be at least 1, got 0"),
        (lambda: Problem(axes=(), objectives=1, seed=0), "no axes"),
        (lambda: Problem(axes=CUBE, objectives=0, seed=0), "needs an objective"),
        (lambda: Problem(axes=CUBE, objectives=2, seed=0, weights=(1.0,)), "weights must be 2"),
        (lambda: Problem(axes=CUBE, objectives=2, seed=0, weights=(0.0, 0.0)), "not all 0"),
    ],
)
def test_settings_out_of_range(make, message):
    """Settings and problems that cannot be used name the setting, its bound and the value."""
    with pytest.raises(ExperimentError, match=message):
        make()


def test_known_candidates_must_fit():
    """A known genome outside the axes, or losses that are not finite, are refused with their place."""
    with pytest.raises(RecipeError, match="known candidate 0: gene"):
        Problem(axes=TINY, objectives=1, seed=0, known=((("z", 1), (0.0,)),))
    with pytest.raises(ValueError, match="known candidate 0: expected 1 finite"):
        Problem(axes=TINY, objectives=1, seed=0, known=((("a", 1), (float("inf"),)),))


def test_a_start_must_fit():
    """A genome to begin with that lies outside the axes is refused, and what is wrong with it is said."""
    for start, message in (
        (("z", 1), "^start: gene 'z' is not within the axis"),
        (("a", 9), "^start: gene 9 is not within the axis"),
        (("a",), "^start: the genome has 1 genes, the search space has 2 axes"),
    ):
        with pytest.raises(RecipeError, match=message):
            Problem(axes=TINY, objectives=1, seed=0, start=start)
    assert Problem(axes=TINY, objectives=1, seed=0, start=("c", 3)).start == ("c", 3)

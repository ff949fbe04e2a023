"""Generational: what a strategy gets to see, and the helpers that keep a run new and repeatable."""

import numpy as np
import pytest

from evomerge.drivers import Generational, Problem
from evomerge.drivers.seen import Seen, generator, latin
from evomerge.genome import ActiveIf, Choice, Real, Whole, from_unit

AXES = (Whole(name="k", low=0, high=99),)
GATED = (
    Choice(name="method", options=("ties", "linear")),
    Real(name="density", low=0, high=1, active_if=ActiveIf(axis="method", options=("ties",))),
)


class Recorder:
    """A strategy that proposes generations of given sizes and writes down what it is taught."""

    def __init__(self, *sizes):
        self.sizes, self.taught, self.proposals = sizes, [], 0

    def propose(self, step, factor=1):
        """Return numbered genomes."""
        self.proposals += 1
        return [(10 * step + i,) for i in range(self.sizes[step])]

    def drop(self, genomes):
        """Refuse: nobody drops any."""
        raise AssertionError(genomes)

    def learn(self, step, results):
        """Write everything down."""
        self.taught.append((step, [r.genome for r in results], [r.losses for r in results]))

    def revise(self, result):
        """Write it down."""
        self.taught.append((result.index, result.losses))

    def inject(self, result):
        """Write it down."""
        self.taught.append((result.index, result.genome, result.losses))


def test_strategy_learns_whole_generations_in_index_order():
    """Results told backwards reach the strategy in index order, once, with what was told."""
    strategy = Recorder(3, 2, 0)
    driver = Generational(strategy, Problem(axes=AXES, objectives=1, seed=0))
    assert [driver.ask() for _ in range(4)] == [(0,), (1,), (2,), None]

    driver.tell(2, (2,), (0.2,))
    driver.tell(0, (50,), (0.0,))
    assert strategy.taught == []
    driver.tell(1, (1,), None)

    assert strategy.taught == [(0, [(50,), (1,), (2,)], [(0.0,), None, (0.2,)])]
    assert driver.ask() == (10,)
    driver.tell(3, (10,), (1.0,))
    assert driver.ask() == (11,)
    driver.tell(4, (11,), None)
    assert strategy.taught[1] == (1, [(10,), (11,)], [(1.0,), None])


def test_only_earlier_generations_are_revised():
    """What was learned may be told again; what is in flight or was never asked may not."""
    strategy = Recorder(2, 2)
    driver = Generational(strategy, Problem(axes=AXES, objectives=1, seed=0))
    for index in range(2):
        driver.tell(index, driver.ask(), (0.5,))
    strategy.taught.clear()
    driver.tell(2, driver.ask(), (0.5,))

    driver.revise(1, (0.25,))
    driver.revise(0, None)
    assert strategy.taught == [(1, (0.25,)), (0, None)]
    for index in (-1, 2, 3):
        with pytest.raises(ValueError, match="of no earlier generation"):
            driver.revise(index, (0.5,))
    with pytest.raises(ValueError, match="1 finite losses"):
        driver.revise(0, (float("inf"),))


def test_an_empty_generation_ends_the_run():
    """Once a strategy proposes nothing it is not asked again."""
    strategy = Recorder(0)
    driver = Generational(strategy, Problem(axes=AXES, objectives=1, seed=0))

    assert [driver.ask() for _ in range(3)] == [None] * 3
    assert strategy.proposals == 1


def test_genes_that_do_not_count_do_not_make_a_genome_new():
    """Two genomes that differ in an inactive axis, or by rounding, are one."""
    seen = Seen(GATED, [("linear", 0.2)])

    assert not seen.add(("linear", 0.9))
    assert seen.add(("ties", 0.2))
    assert not seen.add(("ties", 0.2 + 1e-15))
    assert seen.add(("ties", 0.9))


def test_draw_exhausts_a_finite_space():
    """Random draws find every genome of a small space once, then no more."""
    seen = Seen((Whole(name="k", low=0, high=8),), [(4,)])

    drawn = seen.draw(np.random.default_rng(0), 20)

    assert sorted(drawn) == [(k,) for k in range(9) if k != 4]
    assert seen.draw(np.random.default_rng(1), 1) == []


def test_without_a_space_that_draws_random_genomes_are_a_latin_hypercube():
    """New genomes are the points of the hypercube of that generator, as long as none of them is known."""
    axes = tuple(Real(name=f"x{i}", low=-1, high=3) for i in range(3))
    points = latin(np.random.default_rng(5), 9, 3)

    assert Seen(axes).draw(np.random.default_rng(5), 9) == [from_unit(axes, point) for point in points]


def test_random_genomes_are_those_that_a_space_draws():
    """They come from it alone, from the generator that was given; what it draws again or is known is left out."""
    drawn = []

    def draw(rng):
        drawn.append((int(rng.integers(7)) * 3,))
        return drawn[-1]

    seen = Seen(AXES, [(9,)], draw)
    found = seen.draw(np.random.default_rng(2), 4)

    rng, expected = np.random.default_rng(2), []
    while len(expected) < 4:
        genome = (int(rng.integers(7)) * 3,)
        if genome not in [(9,), *expected]:
            expected.append(genome)
    assert found == expected
    # all multiples of 3 to 18 but 9: there are six
    assert sorted(found + seen.draw(rng, 10)) == [(k,) for k in (0, 3, 6, 12, 15, 18)]
    assert seen.draw(rng, 1) == []


def test_genes_that_do_not_count_do_not_make_a_drawn_genome_new():
    """A space that draws one model in two guises gives it once."""
    seen = Seen(GATED, draw=lambda rng: ("linear", float(rng.random())))

    assert len(seen.draw(np.random.default_rng(0), 3)) == 1


def test_genomes_of_one_candidate_are_one():
    """What a problem calls the same is met once, and nothing else counts."""
    seen = Seen(AXES, [(14,)], same=lambda genome: genome[0] // 10)

    assert [seen.add((k,)) for k in (15, 20, 29, 9, 0, 30)] == [False, True, False, True, False, True]
    assert sorted(k // 10 for (k,) in seen.draw(np.random.default_rng(0), 99)) == [4, 5, 6, 7, 8, 9]


def test_latin_hypercube_has_one_point_per_slice():
    """Every axis has exactly one point in each of its equal slices."""
    points = latin(np.random.default_rng(0), 7, 3)

    assert points.shape == (7, 3)
    assert [sorted((column * 7).astype(int)) for column in points.T] == [list(range(7))] * 3


def test_generators_are_functions_of_their_name():
    """The same name gives the same numbers; any other part of the name gives others."""
    names = [
        (1, "cma", 0, "ask"),
        (2, "cma", 0, "ask"),
        (1, "tpe", 0, "ask"),
        (1, "cma", 1, "ask"),
        (1, "cma", 0, "tell"),
    ]
    numbers = [generator(*name).random() for name in names]

    assert len(set(numbers)) == len(names)
    assert numbers == [generator(*name).random() for name in names]

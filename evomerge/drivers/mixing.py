"""Children of two genomes as mixtures of their genes, and small moves of genes: what M2N2 and MAP-Elites share."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.drivers.breeding import gene_at, hoped
from evomerge.drivers.contract import Problem
from evomerge.drivers.seen import Seen
from evomerge.genome import Axis, Choice, Genome, to_unit

#: How often as many children as are wanted may be bred to find new ones, before random genomes fill up.
ROUNDS = 20


def mixed(
    axes: Sequence[Axis],
    first: Genome,
    second: Genome,
    shares_A: NDArray[np.float64],
    firsts_A: NDArray[np.bool_],
) -> Genome:
    """Return a genome between two: numbers on the line between the parents' in the unit cube, options of one of them.

    Args:
        axes: of the genomes.
        first: a parent.
        second: the other one.
        shares_A: how much of each number is of the first, the rest is of the second.
        firsts_A: which options are those of the first.
    """
    line_A = shares_A * to_unit(axes, first) + (1.0 - shares_A) * to_unit(axes, second)
    return tuple(
        (one if from_first else two) if one == two or isinstance(axis, Choice) else axis.from_unit(u)
        for axis, one, two, u, from_first in zip(axes, first, second, line_A.tolist(), firsts_A.tolist(), strict=True)
    )


def moved(axes: Sequence[Axis], genome: Genome, rate: float | None, sigma: float, rng: np.random.Generator) -> Genome:
    """Return a genome of which some genes have moved, by a normal step on the unit interval that bounds reflect.

    An integer moves by at least one, an option becomes another one.

    Args:
        axes: of the genome.
        genome: what is moved.
        rate: the chance of each gene; None: 1 / axes.
        sigma: the standard deviation of a step.
        rng: of the moves.
    """
    count = len(axes)
    hit_A = rng.random(count) < (1.0 / count if rate is None else rate)
    steps_A, picks_A = sigma * rng.standard_normal(count), rng.random(count)
    found = list(genome)
    for i in np.flatnonzero(hit_A).tolist():
        before = axes[i].to_unit(genome[i])
        found[i] = gene_at(axes[i], before, _reflected(before + float(steps_A[i])), True, float(picks_A[i]))
    return tuple(found)


def fresh_ones(
    problem: Problem, seen: Seen, breed: Callable[[], Genome] | None, wanted: int, rng: np.random.Generator
) -> list[Genome]:
    """Return as many new genomes, children first, random ones where these do not suffice; fewer if there are no more.

    Args:
        problem: whose space may know what to hope for: a gene or two of a child are then of such a genome.
        seen: what was met; gains what is returned.
        breed: returns a child; None: all are random.
        wanted: how many.
        rng: of what is drawn.
    """
    fresh: list[Genome] = []
    for _ in range(ROUNDS * wanted if breed is not None else 0):
        if len(fresh) == wanted or breed is None:
            break
        child = breed()
        if problem.draw is not None:
            child = hoped(child, problem.draw(rng), problem.axes, rng)
        if seen.add(child):
            fresh.append(child)
    return fresh + seen.draw(rng, wanted - len(fresh))


def _reflected(u: float) -> float:
    """Return the coordinate of [0, 1] that mirrors at both ends put in place of any number."""
    u %= 2.0
    return 2.0 - u if u > 1.0 else u

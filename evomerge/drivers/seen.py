"""What a run has met: new random genomes, and random numbers that are functions of their names."""

import zlib
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from evomerge.genome import Axis, Gene, Genome, Real, active, from_unit

#: How often a new genome is looked for by chance before the space counts as exhausted.
DRAWS = 200


class Seen:
    """The genomes that a run has met; proposes new ones only.

    Genes of axes that are not active do not make a genome new, nor do differences of less than
    a billionth of an axis, which the way to the unit cube and back can leave. Where the problem knows of more genomes
    that are the same candidate, they are one.
    """

    def __init__(
        self,
        axes: tuple[Axis, ...],
        genomes: Iterable[Genome] = (),
        draw: Callable[[np.random.Generator], Genome] | None = None,
        same: Callable[[Genome], Hashable] | None = None,
    ) -> None:
        self._axes = axes
        self._drawn = draw
        self._same = same
        self._keys = {self.key(genome) for genome in genomes}

    def add(self, genome: Genome) -> bool:
        """Remember a genome; tell whether it was new."""
        key = self.key(genome)
        new = key not in self._keys
        self._keys.add(key)
        return new

    def drop(self, genomes: Iterable[Genome]) -> None:
        """Forget genomes."""
        self._keys -= {self.key(genome) for genome in genomes}

    def draw(self, rng: np.random.Generator, count: int) -> list[Genome]:
        """Return up to `count` new random genomes, and remember them.

        They are drawn as the space hopes most of them; where it hopes nothing, spread as a Latin hypercube. Fewer only
        when `DRAWS` draws in a row give nothing new: the space is exhausted.
        """
        fresh: list[Genome] = []
        if self._drawn is None:
            spread = [from_unit(self._axes, point) for point in latin(rng, count, len(self._axes))]
            fresh = [genome for genome in spread if self.add(genome)]
        while len(fresh) < count:
            for _ in range(DRAWS):
                genome = self._drawn(rng) if self._drawn else from_unit(self._axes, rng.random(len(self._axes)))
                if self.add(genome):
                    fresh.append(genome)
                    break
            else:
                break
        return fresh

    def key(self, genome: Genome) -> Hashable:
        """Return what genomes have in common that are the same candidate."""
        if self._same is not None:
            return self._same(genome)
        counts = active(self._axes, genome)
        return tuple(
            (_coarse(axis, gene) if on else None) for axis, gene, on in zip(self._axes, genome, counts, strict=True)
        )


def _coarse(axis: Axis, gene: Gene) -> Gene:
    return round(axis.to_unit(gene), 9) if isinstance(axis, Real) else gene


def generator(seed: int, driver: str, generation: int, step: str) -> np.random.Generator:
    """Return the random generator of one step of one generation: a function of its name, with no state to save."""
    names = [zlib.crc32(name.encode()) for name in (driver, step)]
    return np.random.default_rng(np.random.SeedSequence([seed, *names, generation]))


def latin(rng: np.random.Generator, count: int, axes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return points of the unit cube with one in each of `count` slices of every axis. Shape (count, axes).

    McKay, Beckman, Conover 1979, "A comparison of three methods for selecting values of input variables".
    """
    slices = np.stack([rng.permutation(count) for _ in range(axes)], axis=1)
    return (slices + rng.random((count, axes))) / max(count, 1)

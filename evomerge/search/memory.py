"""How much memory a worker takes at its peak, from headers, items and settings alone."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from evomerge.evaluation.footprint import asking, plans, shape_of, sketch
from evomerge.models.footprint import weights
from evomerge.recipe import Recipe
from evomerge.value import value
from evomerge.worker import LARGE, WorkerSetup

#: Bytes that a worker has beside all that is counted, once it has answered: torch's kernels and their scratch; and,
#: where models are large, the compiler of lines and what the C library's allocator keeps. Measured on Llamas of 0.2 to
#: 400 M parameters.
_BEGUN, _COMPILED = 30_000_000, 50_000_000

#: Bytes that a worker has more than the driver that foresees it, by where it runs: in the driver's process, in one of
#: its own, which does without 50 MB of libraries that only a driver imports, or in one of Ray's, which has 90 MB of
#: Ray's. Measured with Ray 2.60 on the models of the quickstart.
_MORE: Mapping[str, int] = {"here": 0, "apart": -50_000_000, "ray": 40_000_000}

#: Bytes of a program with torch and transformers, where the system does not tell those of this one: measured with
#: Python 3.11, torch 2.13 for the CPU and transformers 5.23 on Linux.
_PROGRAM = 400_000_000

#: Bytes that CUDA takes of the machine's memory in each process, and of the GPU's: its context and libraries. Measured
#: on one H200 with torch 2.11 for CUDA 13 on six of the cases of experiments/benchmarks/memory.py: 570 to 980 MB, and
#: 730 MB.
_CUDA, _CONTEXT = 850_000_000, 730_000_000


@value
class Memory:
    """Bytes of memory that a worker takes at its peak.

    Attributes:
        program: Python with its libraries, the tokenizer and the code of the model.
        sources: as stored; on the CPU the workers of a machine share them.
        model: what is written for candidates, and what is known of sources.
        candidate: the most that a candidate takes while it is built or asked.
        prefixes: hidden states that are kept for stacks that begin alike, at most.
        device: where all but the program lies.
        context: what the device's own libraries take there.
    """

    program: int
    sources: int
    model: int
    candidate: int
    prefixes: int = 0
    device: str = "cpu"
    context: int = 0

    @property
    def working(self) -> int:
        """What each worker needs for itself where it computes."""
        return self.model + self.candidate + self.prefixes + self.context

    @property
    def own(self) -> int:
        """What each worker needs for itself in the memory of its machine."""
        return self.program + (self.working if self.device == "cpu" else 0)

    @property
    def resident(self) -> int:
        """The resident size of a worker's process: its own, and the pages of the sources, which others may have too."""
        return self.own + self.sources


def memory_of(
    setup: WorkerSetup,
    recipes: Iterable[Recipe],
    most: int | None = None,
    where: Literal["here", "apart", "ray"] = "here",
) -> Memory:
    """Return what a worker takes at its peak.

    The batches are those that the worker will feed, planned by a model without memory. What the program takes is what
    this process has once it did that: the same libraries, tokenizer and code of the model. Not counted are the
    statistics that some methods take while they are computed.

    Args:
        setup: what the worker knows.
        recipes: some candidates, which stand for all.
        most: the most layers that a candidate may have; None: as many as its sources.
        where: the worker's process: this one, one of its own, or one of Ray's.

    Raises:
        ModelError: if a folder is broken, or the model cannot be built.
        TaskError: for an item that the model cannot be asked.
    """
    found = weights(setup.sources, setup.dtype, recipes, stacked=setup.stacked, lasting=len(setup.models))
    engine = sketch(setup.template, setup.dtype, setup.batch, setup.tokens, setup.trust_remote_code)
    shape = shape_of(engine, most)
    tasks = {name: task for name, task in setup.tasks.items() if not isinstance(task, Path)}
    asked = max((asking(plan, shape, setup.tokens) for plan in plans(engine, tasks, setup.gates)), default=0)
    held = found.sources if setup.budget is None else min(found.sources, setup.budget)
    cuda = setup.device.startswith("cuda")
    return Memory(
        program=program() + _MORE[where] + _BEGUN + _COMPILED * (found.sources > LARGE) + _CUDA * cuda,
        sources=found.sources,
        model=found.live + found.known + (held if setup.device != "cpu" else 0),
        candidate=max(asked, found.building),
        prefixes=setup.prefixes if setup.stacked else 0,
        device=setup.device,
        context=_CONTEXT * cuda,
    )


def program() -> int:
    """Return the bytes that this process has now, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return _PROGRAM
    return pages * os.sysconf("SC_PAGE_SIZE")

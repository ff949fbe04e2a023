"""What a run needs of memory and disk, against what is there; refused, with the way out, where it cannot fit."""

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from evomerge.errors import ExperimentError
from evomerge.experiment import Experiment
from evomerge.models.footprint import weights
from evomerge.search.beginning import setup_of
from evomerge.search.memory import Memory, memory_of
from evomerge.search.pace import planned
from evomerge.spaces.proposals import warmup
from evomerge.value import value

#: Candidates that are drawn to see how they are built.
_DRAWN = 8

#: Bytes of the ledger at most: for a candidate, for each of its genes, and for each item that it is asked. In ledgers
#: of the quickstarts a candidate takes 630, genes included, and an item 6 to 13; a margin, or a response that is no
#: whole number, takes 20 more.
_CANDIDATE, _GENE, _ITEM = 1000, 24, 45

#: The share of what a worker takes from which on a setting is named as a way out.
_SHARE = 0.1

#: The way out where no setting matters.
_SMALLER = "merge smaller models, or in dtype bfloat16"


@value
class Machine:
    """What there is: bytes of memory, of each GPU, and of free disk; None where it is not known."""

    memory: int | None
    gpus: tuple[int, ...]
    disk: int | None


@value
class Disk:
    """Bytes that a run writes at most: its ledger, and its models as exported, of which it may write so many."""

    ledger: int
    model: int
    models: int

    @property
    def all(self) -> int:
        """All together; while a model is written in place of an older one, both are there."""
        return self.ledger + self.model * (self.models + (self.models > 0))


@value
class Resources:
    """What a run needs, and what there is.

    Attributes:
        memory: of one worker; None where it could not be planned.
        unknown: why not.
        workers: how many share this machine; None where they run on machines that are not known yet.
        sharing: how many share a GPU.
        actors: how many there are in a cluster; None elsewhere, and where they follow its GPUs.
        disk: what is written.
        machine: what there is here.
    """

    memory: Memory | None
    unknown: str
    workers: int | None
    sharing: int
    disk: Disk
    machine: Machine
    actors: int | None = None

    @property
    def rows(self) -> dict[str, str]:
        """Say it in a few words, by heading."""
        if self.memory is None:
            return {"memory": f"not known ({self.unknown})", "disk": self._disk_row}
        found = {"memory": self._memory_row(self.memory), "GPU memory": self._gpu_row(self.memory)}
        return {heading: text for heading, text in found.items() if text} | {"disk": self._disk_row}

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ExperimentError: saying what is too much, and the way out.
        """
        if self.memory is not None:
            self._check_machine(self.memory)
            self._check_gpu(self.memory)
        free = self.machine.disk
        least = self.disk.ledger + self.disk.model * min(self.disk.models, 1)
        if free is not None and least > free:
            way = "free space, or name another folder with --runs"
            more = ", or set export: {front: none}" if self.disk.models else ""
            need = f"the run writes at least {size(least)}, and {size(free)} are free"
            raise ExperimentError(f"disk: {need}; {way}{more}")

    def check_cluster(self, nodes: Sequence[tuple[str, int]]) -> None:
        """Refuse more workers than the machines of a cluster have memory for; those that join later may have more.

        Args:
            nodes: name and bytes of memory of each.

        Raises:
            ExperimentError: saying for how many there is room.
        """
        memory = self.memory
        if memory is None or self.actors is None:
            return
        room = [(name, max(0, there // memory.own)) for name, there in sorted(nodes)]
        fit = sum(count for _, count in room)
        if fit < self.actors:
            each = ", ".join(f"{name} for {count}" for name, count in room)
            ways = [*([f"set ray: {{actors: {fit}}}"] if fit else []), *_ways(memory)]
            raise ExperimentError(
                f"memory: {self.actors} workers need {size(memory.own)} each for themselves, and the machines of the "
                f"cluster have room for {fit} ({each}); {', or '.join(ways) or _SMALLER}"
            )

    def _check_machine(self, memory: Memory) -> None:
        total, count = self.machine.memory, self.workers
        if total is None or count is None or count * memory.own <= total:
            return
        fit = total // memory.own
        if fit:
            raise ExperimentError(
                f"memory: {count} workers need {size(count * memory.own)} for themselves, and this machine has "
                f"{size(total)}; {', or '.join([f'set ray: {{actors: {fit}}}', *_ways(memory)])}"
            )
        ways = ", or ".join(_ways(memory)) or _SMALLER
        raise ExperimentError(
            f"memory: a worker needs {size(memory.own)} for itself, and this machine has {size(total)}; {ways}"
        )

    def _check_gpu(self, memory: Memory) -> None:
        if memory.device == "cpu" or not self.machine.gpus or self.workers is None:
            return
        total = min(self.machine.gpus)
        if self.sharing * memory.working > total:
            several = f"{self.sharing} workers that share a GPU need" if self.sharing > 1 else "a worker needs"
            ways = [*_ways(memory), *(["raise ray.gpus_per_worker"] if self.sharing > 1 else [])]
            raise ExperimentError(
                f"GPU memory: {several} {size(self.sharing * memory.working)}, and it has {size(total)}; "
                f"{', or '.join(ways) or _SMALLER}"
            )

    def _memory_row(self, memory: Memory) -> str:
        kept = f" (up to {size(memory.prefixes)} by prefixes_gb)" if memory.prefixes else ""
        text = (
            f"a worker's process grows to {size(memory.resident)}: {size(memory.own)} of its own{kept}, "
            f"{size(memory.sources)} of sources, which the workers of a machine share"
        )
        if self.workers is None:
            return f"{text}; so a machine needs {size(memory.sources)} and {size(memory.own)} for each of its workers"
        need = self.workers * memory.own + memory.sources
        here = f"; here {self.workers} take {size(need)}" if self.workers > 1 else ""
        total = self.machine.memory
        if total is None:
            return text + here
        slow = ", so sources are read from the disk again and again" if need > total else ""
        return f"{text}{here}, of {size(total)}{slow}"

    def _gpu_row(self, memory: Memory) -> str:
        if memory.device == "cpu":
            return ""
        need = f"{size(memory.working)} a worker" + f", {self.sharing} share one" * (self.sharing > 1)
        return need + (f", of {size(min(self.machine.gpus))}" if self.machine.gpus else "")

    @property
    def _disk_row(self) -> str:
        disk = self.disk
        models = f", {disk.models} model{'s' if disk.models > 1 else ''} of {size(disk.model)}" if disk.models else ""
        free = "" if self.machine.disk is None else f", of {size(self.machine.disk)} that are free"
        slow = "; not all of them may fit" if self.machine.disk is not None and disk.all > self.machine.disk else ""
        return f"at most {size(disk.ledger)} for the ledger{models}{free}{slow}"


def needs_of(experiment: Experiment, folder: Path) -> Resources:
    """Return what a run of an experiment needs, and what there is.

    Args:
        experiment: what will be run.
        folder: where its folder will be.
    """
    memory, unknown = None, ""
    try:
        recipes = [one.recipe for one in warmup(experiment.space, _DRAWN, experiment.file.seed, None)]
        recipes += [proposal.recipe for proposal in experiment.proposals]
        where: Literal["here", "ray"] = "here" if experiment.file.ray is None else "ray"
        memory = memory_of(setup_of(experiment), recipes, experiment.space.most, where)
    except Exception as problem:  # a plan that cannot be made is no reason not to run: what is wrong shows there
        unknown = " ".join(str(problem).split())[:120]
    machine = here(folder)
    ray, each = experiment.file.ray, 1
    workers: int | None = 1
    spread: int | None = None
    if ray is not None:
        each = max(1, math.floor(1 / ray.gpus_per_worker + 1e-9)) if ray.gpus_per_worker else 1
        actors = ray.actors if isinstance(ray.actors, int) else each * len(machine.gpus)
        workers = actors if ray.address == "local" else None
        spread = ray.actors if isinstance(ray.actors, int) and workers is None else None
        each = each if ray.gpus_per_worker else actors
    return Resources(
        memory=memory,
        unknown=unknown,
        workers=workers,
        sharing=each,
        disk=disk_of(experiment),
        machine=machine,
        actors=spread,
    )


def disk_of(experiment: Experiment) -> Disk:
    """Return what a run writes into its folder at most."""
    steps = planned(experiment).values()
    candidates = sum(count for count, _ in steps)
    items = sum(count * asked for count, asked in steps)
    which = experiment.file.export.front
    few = {"none": 0, "knee": 1, "extremes": len(experiment.objectives)}
    live = weights({"template": experiment.template}, experiment.file.dtype).live
    return Disk(
        ledger=candidates * (_CANDIDATE + _GENE * len(experiment.space.axes)) + items * _ITEM,
        model=math.ceil(live * max(1.0, experiment.space.most / experiment.space.depth)),
        models=min(few.get(which, experiment.file.finalists), experiment.file.finalists),
    )


def here(folder: Path) -> Machine:
    """Return what this machine has; the disk is that of a folder that may not be there yet."""
    there = next((each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir()), None)
    return Machine(
        memory=_memory(),
        gpus=_gpus(),
        disk=None if there is None else shutil.disk_usage(there).free,
    )


def size(count: int) -> str:
    """Return a number of bytes in the unit that people would use."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{count / 10**6:.0f} MB"


def _ways(memory: Memory) -> list[str]:
    """Return the settings by which a worker takes less, those that matter."""
    whole = max(1, memory.working if memory.device != "cpu" else memory.own)
    ways = [
        ("lower prefixes_gb of workers", memory.prefixes),
        ("lower batch or tokens of workers", memory.candidate),
        ("set resident_gb of workers", memory.sources if memory.device != "cpu" else 0),
    ]
    return [way for way, part in ways if part >= _SHARE * whole]


def _memory() -> int | None:
    """Return the bytes of memory that programs here may use: the machine's, or those of a container."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, in their two versions
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def _gpus() -> tuple[int, ...]:
    """Return the bytes of each GPU, as its driver says; asking torch would take some of them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30)
        return tuple(int(line) * 2**20 for line in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()

"""How the workers of a run are doing, as values that can be shown and written down."""

import json
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import InvalidInput
from evomerge.value import parse, plain, value
from evomerge.whole import write_whole


@value
class WorkerStatus:
    """How one worker is doing; the counts go on when its process is replaced.

    Attributes:
        node: the name of the machine that it runs on; empty while it has none.
        pid: its process there.
        state: `waiting` for a place in the cluster, `starting`, `idle`, `busy`, or `resting`: it could not be made, and
            will be tried again.
        done: jobs that it answered, failures included.
        failures: candidates that failed in its hands, and jobs over which its process died or hung.
        busy: seconds in which it worked on jobs.
        seconds: seconds in which it was there to work.
        note: why it rests.
    """

    node: str
    pid: int | None
    state: str
    done: int
    failures: int
    busy: float
    seconds: float
    note: str = ""


@value
class Crew:
    """The workers of a run at a moment, and what got done in the last minute.

    Attributes:
        time: the moment, in seconds since 1970.
        pid: the driver's process.
        node: the driver's machine.
        candidates: how many answered something, a minute.
        items: how many were answered, a minute.
        failures: candidates that failed, in this session.
        workers: each of them.
        ended: whether the driver has stopped, by itself.
    """

    time: float
    pid: int
    node: str
    candidates: float
    items: float
    failures: int
    workers: tuple[WorkerStatus, ...]
    ended: bool = False

    @property
    def idle(self) -> float | None:
        """The idle share; see `idle_share`."""
        return idle_share(self.workers)

    @property
    def line(self) -> str:
        """All of it but the failures and the workers one by one."""
        ready = sum(worker.state in ("idle", "busy") for worker in self.workers)
        total = len(self.workers)
        parts = [
            f"{total} worker{'s' if total != 1 else ''}" + (f" ({ready} at hand)" if ready < total else ""),
            f"{self.candidates:,.0f} candidates and {self.items:,.0f} items a minute",
        ]
        return ", ".join(parts if self.idle is None else [*parts, f"idle {self.idle:.0%}"])


def idle_share(workers: Sequence[WorkerStatus]) -> float | None:
    """Return the share of the workers' time in which they had no job; None before there was any."""
    seconds = sum(worker.seconds for worker in workers)
    return max(0.0, 1 - sum(worker.busy for worker in workers) / seconds) if seconds else None


def write_crew(crew: Crew, file: Path) -> None:
    """Write a crew to a file, which is whole at any moment.

    Raises:
        EvomergeError: if it cannot be written.
    """
    write_whole(file, json.dumps(plain(crew)) + "\n", "go on with the run")


def read_crew(file: Path) -> Crew | None:
    """Return what a file says of a crew; None where it is not there or says nothing, for nothing hangs on it."""
    try:
        return parse(Crew, json.loads(file.read_text(encoding="utf-8")), str(file), InvalidInput)
    except (OSError, ValueError, InvalidInput):
        return None

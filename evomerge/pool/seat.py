"""A place for one worker in a cluster: the actor that sits there, the job that it has, and how it has done so far."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.pool.contract import Answer, Job, Worker, answer_safely
from evomerge.pool.crew import WorkerStatus

#: The longest time in seconds that a place rests before a worker is tried there again.
_LONGEST_REST = 60.0


class Host:
    """What runs in an actor: makes the worker there and passes jobs to it."""

    def __init__(self, threads: int) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)  # libraries read them when they are first imported
        self._worker: Worker | None = None

    def where(self) -> tuple[str, str, int]:
        """Return machine, Ray's name of it, and process; it says that the actor has found a place."""
        import ray

        return platform.node(), ray.get_runtime_context().get_node_id(), os.getpid()

    def start(self, make: Callable[[], Worker]) -> None:
        """Make the worker.

        Raises:
            EvomergeError: what it raised, with the node: its files may be missing there and nowhere else.
        """
        try:
            self._worker = make()
        except EvomergeError as problem:
            raise type(problem)(f"worker on node {platform.node()}: {problem}") from None
        except OSError as problem:
            raise EvomergeError(f"worker on node {platform.node()}: {problem}") from None

    def answer(self, job: Job) -> tuple[Answer, float]:
        """Return the answer, and the seconds that it took here."""
        if self._worker is None:
            raise RuntimeError("the worker was not started")
        start = time.monotonic()
        return answer_safely(self._worker.answer, job), time.monotonic() - start


@dataclass(eq=False)
class Ticket:
    """A job on its way: how many work on it and died over it, was it given to a second, has it its answer."""

    job: Job
    working: int = 0
    deaths: int = 0
    helped: bool = False
    answered: bool = False

    @property
    def items(self) -> int:
        """How many items are asked."""
        return sum(len(places) for places in self.job.items.values())


@dataclass(eq=False)
class Seat:
    """A place for one actor; the counts stay when the actor is another.

    `call` is what the actor was asked last and has not been heard of since, `falls` how many in a row died or failed
    at their start, and `problem` why the last of them did.
    """

    actor: Any = None
    call: Any = None
    made: Any = None
    state: str = "waiting"
    since: float = 0.0
    ticket: Ticket | None = None
    node: str = ""
    place: str = ""
    pid: int | None = None
    falls: int = 0
    problem: BaseException | None = None
    done: int = 0
    failures: int = 0
    busy: float = 0.0
    ready: float = 0.0

    def open(self, actor: Any, make: Any) -> None:
        """Put an actor here; it makes its worker as soon as it has a place."""
        self.actor, self.call, self.made = actor, actor.where.remote(), actor.start.remote(make)
        self.node, self.place, self.pid, self.ticket = "", "", None, None
        self.turn("waiting")

    def placed(self, where: tuple[str, str, int]) -> None:
        """Note that the actor runs, and where."""
        self.node, self.place, self.pid = where
        self.call = self.made
        self.turn("starting")

    def started(self) -> None:
        """Note that the worker is made."""
        self.call, self.falls, self.problem = None, 0, None
        self.turn("idle")

    def take(self, ticket: Ticket) -> None:
        """Give the worker a job."""
        self.ticket = ticket
        ticket.working += 1
        self.turn("busy")
        self.call = self.actor.answer.remote(ticket.job)

    def leave(self, seconds: float | None = None) -> Ticket:
        """Take the job away; the worker was at it for so many seconds of the time since (default: all)."""
        if self.ticket is None:
            raise RuntimeError("no job to take away")
        ticket, self.ticket, self.call = self.ticket, None, None
        ticket.working -= 1
        self.done += 1
        age = self.age
        self.busy += age if seconds is None else min(seconds, age)
        self.turn("idle")
        return ticket

    def fall(self, problem: BaseException) -> None:
        """Note that the actor died or failed while it started."""
        self.falls += 1
        self.problem = problem
        self.call = None
        self.turn("resting")

    @property
    def rested(self) -> bool:
        """Whether a new worker should be tried here: some seconds after the last, and later every time."""
        return self.state == "resting" and self.age >= min(2.0**self.falls, _LONGEST_REST)

    @property
    def age(self) -> float:
        """How many seconds it has been in its state."""
        return time.monotonic() - self.since

    @property
    def present(self) -> bool:
        """Whether there is a worker."""
        return self.state in ("idle", "busy")

    def turn(self, state: str) -> None:
        """Change the state."""
        now = time.monotonic()
        if self.present:
            self.ready += now - self.since
        self.state, self.since = state, now

    def status(self) -> WorkerStatus:
        """Return how it is doing."""
        age = self.age
        return WorkerStatus(
            node=self.node,
            pid=self.pid,
            state=self.state,
            done=self.done,
            failures=self.failures,
            busy=self.busy + (age if self.state == "busy" else 0.0),
            seconds=self.ready + (age if self.present else 0.0),
            note="" if self.problem is None else " ".join(str(self.problem).split()),
        )

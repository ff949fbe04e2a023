"""Pools: where jobs go to be answered, in this process or in Ray actors; a failure is an answer."""

import contextlib
import math
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from evomerge.errors import EvomergeError
from evomerge.recipe import Recipe
from evomerge.value import value


@value
class Job:
    """Items to ask of one candidate: places in a split, by task.

    `branches` says after how many hops stacks that are still to be asked branch off from this one.
    """

    candidate: int
    recipe: Recipe
    split: str
    items: Mapping[str, tuple[int, ...]]
    branches: tuple[int, ...] = ()


@value
class Answer:
    """What came back for a job: responses by task, in the order of the job's items, or the reason why not.

    `margins` holds the log-likelihood margins of the tasks that have them, in nats; `error` is one
    line, and then `responses` is None; `seconds` is how long the worker took. `layers` counts, for stacks, the layer
    passes of this job; see `evomerge.ledger.Answered`.
    """

    candidate: int
    split: str
    responses: Mapping[str, tuple[float, ...]] | None
    margins: Mapping[str, tuple[float, ...]]
    error: str | None
    seconds: float
    layers: Mapping[str, int] = field(default_factory=dict)


class Worker(Protocol):
    """Answers jobs, one after the other, in one process."""

    def answer(self, job: Job) -> Answer:
        """Answer a job; whatever goes wrong with the candidate should be in the answer."""
        ...


class Pool(Protocol):
    """Takes jobs and gives answers, in any order.

    Example:
        A search keeps a pool busy and takes each answer as it comes::

            with InlinePool(make) as pool:
                for job in jobs:
                    pool.submit(job)
                while pool.pending:
                    answer = pool.wait()

    A worker that cannot be made is nobody's answer: `wait` raises what its making raised.
    """

    @property
    def room(self) -> int:
        """How many jobs it can start at once; more may be submitted and will queue."""
        ...

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        ...

    def submit(self, job: Job) -> None:
        """Take a job; returns at once."""
        ...

    def wait(self) -> Answer:
        """Return the next answer; ValueError if no job is pending."""
        ...

    def close(self) -> None:
        """Stop the workers and forget the jobs; may be called twice."""
        ...

    def __enter__(self) -> Self:
        """Return the pool itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""
        ...


class _Closing(ABC):
    """What both pools have in common: leaving a `with` block closes them."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers and forget the jobs; may be called twice."""

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""
        self.close()


class _TimeUp(BaseException):
    """Raised by the alarm; not an Exception, so that no worker mistakes it for its candidate's failure."""


def failure(job: Job, reason: str, seconds: float) -> Answer:
    """Return the answer that says why a job has none; the reason is put on one line."""
    line = " ".join(reason.split())
    return Answer(
        candidate=job.candidate, split=job.split, responses=None, margins={}, error=line, seconds=seconds
    )


def answer_safely(ask: Callable[[Job], Answer], job: Job) -> Answer:
    """Return the answer to a job, or what asking raised as an answer (KeyboardInterrupt excepted)."""
    start = time.monotonic()
    try:
        return ask(job)
    except (KeyboardInterrupt, _TimeUp):
        raise
    except BaseException as problem:  # SystemExit too: a candidate must not end the search
        return failure(job, f"{type(problem).__name__}: {problem}", time.monotonic() - start)


class InlinePool(_Closing):
    """Answers jobs in this process, one at each `wait`, in the order of their submission.

    Args:
        make: makes the worker, at the first job.
        time_limit: seconds for a job, without the making of the worker. Kept by an alarm, which needs the
            main thread and a system with SIGALRM, and strikes between two steps of Python: elsewhere
            there is no limit. A worker that was struck is replaced.
    """

    def __init__(self, make: Callable[[], Worker], time_limit: float | None = None) -> None:
        _check_limit(time_limit)
        self._make, self._limit = make, time_limit
        self._worker: Worker | None = None
        self._queue: deque[Job] = deque()

    @property
    def room(self) -> int:
        """1 when idle, else 0."""
        return max(0, 1 - len(self._queue))

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Queue a job for a later `wait`."""
        self._queue.append(job)

    def wait(self) -> Answer:
        """Answer the oldest job, here and now; ValueError if there is none."""
        if not self._queue:
            raise ValueError("no job is pending; submit one first")
        if self._worker is None:
            self._worker = self._make()
        job = self._queue[0]
        start = time.monotonic()
        try:
            with _alarm(self._limit):
                answer = answer_safely(self._worker.answer, job)
        except _TimeUp:
            self._worker = None  # struck in the middle of something; who knows what state it is in
            answer = failure(job, _late(self._limit), time.monotonic() - start)
        self._queue.popleft()
        return answer

    def close(self) -> None:
        """Forget worker and jobs."""
        self._queue.clear()
        self._worker = None


@dataclass
class _Ticket:
    """A job on its way: how often a worker died over it, and since when it runs."""

    job: Job
    deaths: int = 0
    since: float = 0.0


@dataclass
class _Seat:
    """A place for one actor: starting while `pid` is None, idle while `ticket` is None."""

    actor: Any
    call: Any
    since: float
    pid: int | None = None
    ticket: _Ticket | None = None


class _Host:
    """What runs in an actor: makes the worker there and passes jobs to it."""

    def __init__(self, make: Callable[[], Worker], threads: int) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)  # libraries read them when they are first imported
        self._make = make
        self._worker: Worker | None = None

    def start(self) -> int:
        self._worker = self._make()
        return os.getpid()

    def answer(self, job: Job) -> Answer:
        if self._worker is None:
            raise RuntimeError("the worker was not started")
        return answer_safely(self._worker.answer, job)


class RayPool(_Closing):
    """Answers jobs in Ray actors, one job at a time in each, queued jobs in the order of their submission.

    Ray is started on this machine unless it is running in this process already or an address is
    given, and stopped by `close` only if it was started here. Ray itself retries nothing: an
    actor that died is replaced, and its job goes to the next free actor.

    Args:
        make: makes a worker; travels to the actors, so it must not hold open files or live models.
        count: the number of actors.
        time_limit: seconds for a job, counted from when its actor took it; then the actor is killed
            and replaced, and the job's answer is the failure.
        gpus: the share of a GPU of each actor.
        cpus: the processors that Ray books for each actor.
        threads: threads of the numerical libraries in each actor.
        attempts: how many actors may die over one job before that is its answer; and how many in
            a row may die at their start before `wait` gives up.
        startup_limit: seconds that an actor may take to make its worker.
        address: a running Ray cluster.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        count: int,
        time_limit: float | None = None,
        *,
        gpus: float = 0,
        cpus: float = 1,
        threads: int = 1,
        attempts: int = 3,
        startup_limit: float = 300,
        address: str | None = None,
    ) -> None:
        _check_limit(time_limit)
        if count < 1 or attempts < 1:
            raise ValueError(f"a pool needs at least one worker and one attempt, got {count} and {attempts}")
        self._make, self._limit, self._threads = make, time_limit, threads
        self._attempts, self._startup_limit = attempts, startup_limit
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        self._queue: deque[_Ticket] = deque()
        self._answers: deque[Answer] = deque()
        self._seats: list[_Seat] = []
        self._lost_starts = 0
        self._owns_ray = _start_ray(address, math.ceil(count * cpus), gpus > 0)
        try:
            self._seats = [self._seat() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    @property
    def room(self) -> int:
        """How many actors have nothing to do."""
        return max(0, len(self._seats) - self.pending)

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        return len(self._queue) + len(self._answers) + sum(seat.ticket is not None for seat in self._seats)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the actors that have started."""
        return tuple(seat.pid for seat in self._seats if seat.pid is not None)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts at once if an actor is free."""
        self._queue.append(_Ticket(job))
        self._dispatch()

    def wait(self) -> Answer:
        """Return the next answer, in any order.

        Raises:
            ValueError: if no job is pending.
            EvomergeError: if workers cannot be started; or whatever the making of one raised.
        """
        import ray

        if not self.pending:
            raise ValueError("no job is pending; submit one first")
        while not self._answers:
            self._dispatch()
            calls = {seat.call: seat for seat in self._seats if seat.call is not None}
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=self._patience())
            for call in ready:
                self._collect(calls[call])
            for seat in list(self._seats):
                self._check_time(seat)
        self._dispatch()
        return self._answers.popleft()

    def close(self) -> None:
        """Kill the actors, forget the jobs, and stop Ray if it was started here."""
        import ray

        self._queue.clear()
        self._answers.clear()
        while self._seats:
            with contextlib.suppress(Exception):  # nothing to do about an actor or a Ray that is gone already
                ray.kill(self._seats.pop().actor)
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    def _seat(self) -> _Seat:
        import ray

        host: Any = ray.remote(_Host)
        actor = host.options(**self._options).remote(self._make, self._threads)
        return _Seat(actor=actor, call=actor.start.remote(), since=time.monotonic())

    def _replace(self, seat: _Seat) -> None:
        """Put a new actor where one died or hung."""
        import ray

        with contextlib.suppress(Exception):  # it is dead already, most of the time
            ray.kill(seat.actor)
        self._seats[self._seats.index(seat)] = self._seat()

    def _dispatch(self) -> None:
        for seat in self._seats:
            if self._queue and seat.pid is not None and seat.ticket is None:
                seat.ticket = self._queue.popleft()
                seat.ticket.since = time.monotonic()
                seat.call = seat.actor.answer.remote(seat.ticket.job)

    def _patience(self) -> float:
        """Return seconds until the next limit is reached, at most 1: nothing else wakes `wait`."""
        now = time.monotonic()
        left = [1.0]
        for seat in self._seats:
            if seat.pid is None:
                left.append(seat.since + self._startup_limit - now)
            elif seat.ticket is not None and self._limit is not None:
                left.append(seat.ticket.since + self._limit - now)
        return max(0.001, min(left))

    def _collect(self, seat: _Seat) -> None:
        """Take what a finished call returned or raised."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        ticket = seat.ticket
        try:
            result = ray.get(seat.call)
        except RayActorError as problem:
            self._bury(seat, problem)
            return
        except RayTaskError as problem:
            if ticket is None:
                raise _cause(problem) from None
            result = failure(ticket.job, f"{type(problem.cause).__name__}: {problem.cause}", _age(ticket))
        seat.call = None
        if ticket is None:
            seat.pid = result
            self._lost_starts = 0
        else:
            seat.ticket = None
            self._answers.append(result)

    def _bury(self, seat: _Seat, problem: Exception) -> None:
        """Replace a dead actor; its job goes to the head of the queue, unless it killed too many."""
        ticket = seat.ticket
        if ticket is None:
            self._lost_starts += 1
            if self._lost_starts >= self._attempts:
                reason = " ".join(str(problem).split())[:200]
                raise EvomergeError(f"{self._lost_starts} workers in a row died while they started: {reason}") from None
        else:
            ticket.deaths += 1
            if ticket.deaths < self._attempts:
                self._queue.appendleft(ticket)
            else:
                reason = f"the worker process died {ticket.deaths} times at this candidate"
                self._answers.append(failure(ticket.job, reason, _age(ticket)))
        self._replace(seat)

    def _check_time(self, seat: _Seat) -> None:
        """Kill an actor that is past its limit."""
        now = time.monotonic()
        if seat.pid is None:
            if now - seat.since > self._startup_limit:
                raise EvomergeError(
                    f"a worker did not start within {self._startup_limit:g} s; are there processors and GPUs "
                    f"for {len(self._seats)} workers? (each asks for {self._options})"
                )
        elif seat.ticket is not None and self._limit is not None and now - seat.ticket.since > self._limit:
            self._answers.append(failure(seat.ticket.job, _late(self._limit), _age(seat.ticket)))
            self._replace(seat)


def _start_ray(address: str | None, cpus: int, gpus: bool) -> bool:
    """Start Ray or connect to it; tell whether it is ours to stop."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        # jobs and answers are small; workers map their sources from disk themselves
        local: dict[str, Any] = {} if gpus else {"num_gpus": 0}
        ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20, **local, **quiet)
    return True


def _cause(problem: Any) -> BaseException:
    """Return what a worker's making raised, as itself where it could travel."""
    cause = problem.cause
    return cause if isinstance(cause, BaseException) else problem


def _age(ticket: _Ticket) -> float:
    return time.monotonic() - ticket.since


def _late(limit: float | None) -> str:
    return f"time limit of {limit:g} s exceeded"


def _check_limit(limit: float | None) -> None:
    if limit is not None and not limit > 0:
        raise ValueError(f"a time limit must be positive, got {limit}")


@contextlib.contextmanager
def _alarm(limit: float | None) -> Iterator[None]:
    """Raise _TimeUp in the block after `limit` seconds, where the system can."""
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if limit is None or not able:
        yield
        return

    def strike(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, strike)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)

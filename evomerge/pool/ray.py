"""The pool of Ray actors: workers that join, die, hang and are lost with their nodes, and a job for each of them."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.pool.contract import Answer, Closing, Job, Worker, check_limit, failure, late
from evomerge.pool.crew import WorkerStatus
from evomerge.pool.seat import Seat, Ticket
from evomerge.pool.seating import Seating
from evomerge.pool.session import connect

#: A job that takes so many times as long as expected, and longer than so many seconds, is given to an idle worker too.
_SLOW, _SHORT = 3.0, 1.0
#: Seconds between two looks at who takes too long, while somebody could help.
_GLANCE = 0.2
#: How many of the last answers tell what is expected, and how many there must be.
_KNOWN, _ENOUGH = 64, 3


class RayPool(Closing):
    """Answers jobs in Ray actors, one job at a time in each, queued jobs in the order of their submission.

    Each place for a worker is a seat. An actor that died, hung or was lost with its node is replaced, where and as soon
    as Ray finds room; its job goes to the next free actor. Ray itself retries and restarts nothing. No actor is
    detached, so all end with the process that has the pool. At the end of a phase, when nothing is queued and a worker
    is idle, a job that takes much longer than the others did is given to that worker too, and the first answer counts.

    Ray is started on this machine unless it is running in this process already or an address is given, and stopped by
    `close` only if it was started here.

    Args:
        make: makes a worker; travels to the actors, so it must not hold open files or live models.
        count: the number of actors, or `per_gpu`: as many as the cluster's GPUs have room for at any time.
        time_limit: seconds for a job, counted from when its actor took it; then the actor is killed
            and replaced, and the job's answer is the failure.
        gpus: the share of a GPU of each actor.
        cpus: the processors that Ray books for each actor.
        threads: threads of the numerical libraries in each actor.
        attempts: how many actors may die over one job before that is its answer; and how many in a row may die at
            the start of one seat before it rests for a while.
        startup_limit: seconds that an actor may take to make its worker, and that the pool may be without any.
        max_failures: when so many jobs failed because workers died or hung, `wait` gives up; None: never.
        address: `local`, `auto` or HOST:PORT; see `evomerge.pool.session.connect`.

    Raises:
        EvomergeError: if no Ray can be reached at the address.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        count: int | Literal["per_gpu"],
        time_limit: float | None = None,
        *,
        gpus: float = 0,
        cpus: float = 1,
        threads: int = 1,
        attempts: int = 3,
        startup_limit: float = 300,
        max_failures: int | None = None,
        address: str = "local",
    ) -> None:
        check_limit(time_limit)
        if (count != "per_gpu" and count < 1) or attempts < 1:
            raise ValueError(f"a pool needs at least one worker and one attempt, got {count} and {attempts}")
        if count == "per_gpu" and not gpus > 0:
            raise ValueError(f"workers per GPU need a share of one, got {gpus}")
        self._limit, self._startup_limit = time_limit, startup_limit
        self._attempts, self._max_failures = attempts, max_failures
        self._queue: deque[Ticket] = deque()
        self._answers: deque[Answer] = deque()
        self._times: deque[tuple[float, float]] = deque(maxlen=_KNOWN)  # seconds, and seconds an item, of answers
        self._open = 0  # jobs that were submitted and whose answers nobody took yet
        self._lost: list[str] = []  # why jobs failed that workers died or hung over
        number = None if count == "per_gpu" else count
        self._owns_ray = connect(address, None if number is None else math.ceil(number * cpus), gpus > 0)
        try:
            needs = {"num_cpus": cpus, "num_gpus": gpus}
            self._seating = Seating(make, number, needs, threads, attempts, startup_limit)
        except BaseException:
            self._end_ray()
            raise

    @property
    def room(self) -> int:
        """How many actors have nothing to do, those that may soon be there included."""
        free = sum(seat.state == "idle" or self._seating.expected(seat) for seat in self._seating.seats)
        return max(free - len(self._queue), 0 if self._open else 1)

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        return self._open

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """How each worker is doing, seat by seat."""
        return tuple(seat.status() for seat in list(self._seating.seats))

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the actors that have started."""
        return tuple(seat.pid for seat in self._seating.seats if seat.present and seat.pid is not None)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts at once if an actor is free."""
        self._open += 1
        self._queue.append(Ticket(job))
        self._seating.follow()
        self._dispatch()

    def wait(self) -> Answer:
        """Return the next answer, in any order.

        Raises:
            ValueError: if no job is pending.
            EvomergeError: if no worker can be started, or too many jobs were lost; or whatever making one raised.
        """
        if not self._open:
            raise ValueError("no job is pending; submit one first")
        self._round(0.0)
        while not self._answers:
            self._check_losses()
            self._seating.check()
            self._round(self._patience())
        self._open -= 1
        return self._answers.popleft()

    def drain(self) -> list[Answer]:
        """Return the answers that are there already; the workers that gave them get their next jobs."""
        if self._open:
            self._round(0.0)
        found = list(self._answers)
        self._answers.clear()
        self._open -= len(found)
        return found

    def close(self) -> None:
        """Kill the actors, forget the jobs, and stop Ray if it was started here."""
        self._queue.clear()
        self._answers.clear()
        self._open = 0
        self._seating.close()
        self._end_ray()

    def _end_ray(self) -> None:
        import ray

        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    # Jobs: who has which.

    def _dispatch(self) -> None:
        for seat in self._seating.seats:
            if not self._queue:
                return
            if seat.state == "idle":
                seat.take(self._queue.popleft())

    def _help(self) -> None:
        """Give what takes too long to those who have nothing to do."""
        idle = [seat for seat in self._seating.seats if seat.state == "idle"]
        if self._queue or not idle or len(self._times) < _ENOUGH:
            return
        for seat in sorted(self._seating.seats, key=lambda seat: -seat.age):
            ticket = seat.ticket
            if not idle or ticket is None or ticket.helped or ticket.answered:
                continue
            if seat.age > max(_SHORT, _SLOW * self._expected(ticket)):
                ticket.helped = True  # once: what hangs everywhere would otherwise go round for ever
                idle.pop().take(ticket)

    def _expected(self, ticket: Ticket) -> float:
        """Return how many seconds a job should take, by the last answers: more where it asks more."""
        seconds, each = (statistics.median(column) for column in zip(*self._times, strict=True))
        return float(max(seconds, each * ticket.items))

    def _round(self, timeout: float) -> None:
        """Take all that is there, at the latest when the time is up; then have everybody at work."""
        import ray

        self._seating.follow()
        calls = {seat.call: seat for seat in self._seating.seats if seat.call is not None}
        if calls:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout)
            if ready and len(calls) > 1:
                ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in ready:
                if calls[call].call == call:  # an answer before this one may have had the actor replaced
                    self._collect(calls[call])
        elif timeout:
            time.sleep(min(timeout, 0.1))
        for seat in self._seating.seats:
            self._check_time(seat)
        self._dispatch()
        self._help()

    def _patience(self) -> float:
        """Return seconds until the next limit is reached, or help may be due: nothing else wakes `wait`."""
        helpers = not self._queue and any(seat.state == "idle" for seat in self._seating.seats)
        left = [_GLANCE if helpers else 1.0]
        for seat in self._seating.seats:
            if seat.state == "starting":
                left.append(self._startup_limit - seat.age)
            elif seat.state == "busy" and self._limit is not None:
                left.append(self._limit - seat.age)
        return max(0.001, min(left))

    def _collect(self, seat: Seat) -> None:
        """Take what a finished call returned or raised."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            result = ray.get(seat.call)
        except RayTaskError as problem:
            if seat.ticket is None:
                seat.fall(_cause(problem))
                return
            cause = _cause(problem)
            result = failure(seat.ticket.job, f"{type(cause).__name__}: {cause}", seat.age), seat.age
        except RayError as problem:  # the actor or its node is gone, or took its answer with it
            self._bury(seat, problem)
            return
        if seat.state == "waiting":
            seat.placed(result)
        elif seat.state == "starting":
            seat.started()
        else:
            self._receive(seat, *result)

    def _receive(self, seat: Seat, answer: Answer, seconds: float) -> None:
        """Take an answer, unless there is one already; whoever hangs over the same job is replaced."""
        ticket = seat.leave(seconds)
        if ticket.answered:
            return
        ticket.answered = True
        seat.failures += answer.error is not None
        if answer.error is None:
            self._times.append((seconds, seconds / max(1, ticket.items)))
        self._answers.append(answer)
        for other in self._seating.seats:
            if other.ticket is ticket and other.age > 2 * seconds:
                self._drop(other)

    def _drop(self, seat: Seat) -> Ticket:
        """Replace the actor of a job, which hangs or died."""
        ticket = seat.leave()
        seat.failures += 1
        self._seating.fill(seat)
        return ticket

    def _bury(self, seat: Seat, problem: Exception) -> None:
        """Replace a dead actor; its job goes to the head of the queue, unless it killed too many."""
        if seat.ticket is None:
            self._seating.bury(seat, problem)
            return
        age = seat.age
        ticket = self._drop(seat)
        ticket.deaths += 1
        if ticket.answered or ticket.working:
            return
        if ticket.deaths < self._attempts:
            self._queue.appendleft(ticket)
        else:
            self._give_up(ticket, f"the worker process died {ticket.deaths} times at this candidate", age)

    def _check_time(self, seat: Seat) -> None:
        """Kill an actor that is past its limit; its job has failed, unless somebody else is at it."""
        if seat.state == "busy" and self._limit is not None and (age := seat.age) > self._limit:
            ticket = self._drop(seat)
            if not ticket.answered and not ticket.working:
                self._give_up(ticket, late(self._limit), age)

    def _give_up(self, ticket: Ticket, reason: str, seconds: float) -> None:
        ticket.answered = True
        self._lost.append(f"candidate {ticket.job.candidate}: {reason}")
        self._answers.append(failure(ticket.job, reason, seconds))

    def _check_losses(self) -> None:
        """Raise when workers died or hung over too many jobs."""
        if self._max_failures is not None and len(self._lost) >= self._max_failures:
            raise EvomergeError(
                f"{len(self._lost)} candidates failed because workers died or hung, and ray.max_failures is "
                f"{self._max_failures} (the last was {self._lost[-1]}); mend the workers and go on with `evomerge "
                "resume`: nothing that was answered is lost"
            )


def _cause(problem: Any) -> BaseException:
    """Return what was raised in an actor, as itself where it could travel."""
    cause = problem.cause
    return cause if isinstance(cause, BaseException) else problem

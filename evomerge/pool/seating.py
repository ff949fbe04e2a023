"""The seats of a pool: how many there are while nodes come and go, and who sits there."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.pool.contract import Worker
from evomerge.pool.seat import Host, Seat
from evomerge.pool.session import capacity, living

#: Seconds between two looks at which nodes the cluster has.
_LOOK = 2.0


class Seating:
    """Keeps an actor on every seat, and as many seats as there should be.

    Args:
        make: makes a worker.
        count: how many seats; None: as many as the cluster's GPUs have room for.
        needs: what Ray books for each actor: `num_cpus`, `num_gpus`.
        threads: threads of the numerical libraries in each actor.
        attempts: how many actors in a row may die at the start of one seat before it rests for a while.
        limit: seconds that an actor may take to make its worker, and that there may be no worker at all.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        count: int | None,
        needs: Mapping[str, float],
        threads: int,
        attempts: int,
        limit: float,
    ) -> None:
        import ray

        self.seats: list[Seat] = []
        self._count, self._needs, self._threads = count, dict(needs), threads
        self._attempts, self._limit = attempts, limit
        self._looked = -math.inf
        self._lively = time.monotonic()  # when there was a worker the last time
        host: Any = ray.remote(Host)
        self._actors = host.options(**needs, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
        self._make = ray.put(make)  # once, however many actors there will be
        self.follow()

    def follow(self) -> None:
        """Have as many seats as there should be, and new actors where one was lost or has rested."""
        now = time.monotonic()
        if now - self._looked > _LOOK:
            self._looked = now
            self._resize()
            nodes = living()
            for seat in self.seats:
                if seat.state == "idle" and seat.place not in nodes:  # nobody is asked there, so nobody would notice
                    self.fill(seat)
        for seat in self.seats:
            if seat.rested:
                self.fill(seat)
            elif seat.state == "starting" and seat.age > self._limit:
                self._kill(seat)
                seat.fall(EvomergeError(f"worker on node {seat.node}: not ready within {self._limit:g} s"))

    def _resize(self) -> None:
        wanted = capacity(self._needs["num_gpus"]) if self._count is None else self._count
        for seat in [seat for seat in self.seats if seat.state in ("waiting", "resting")]:
            if len(self.seats) > wanted:
                self._kill(seat)
                self.seats.remove(seat)
        while len(self.seats) < wanted:
            self.seats.append(Seat())
            self.fill(self.seats[-1])

    def fill(self, seat: Seat) -> None:
        """Put a new actor on a seat, wherever Ray finds room for it; one that sits there is killed."""
        self._kill(seat)
        seat.open(self._actors.remote(self._threads), self._make)

    def bury(self, seat: Seat, problem: Exception) -> None:
        """Note that an actor died while it started; the next is tried at once, unless there were many in a row."""
        reason = " ".join(str(problem).split())[:200]
        many = f"{seat.falls + 1} workers in a row" if seat.falls else "a worker"
        seat.fall(EvomergeError(f"{many} died while starting: {reason}"))
        if seat.falls < self._attempts:
            self.fill(seat)

    def expected(self, seat: Seat) -> bool:
        """Tell whether a seat without a worker should soon have one."""
        return seat.state == "starting" or (seat.state == "waiting" and seat.age < self._limit)

    def check(self) -> None:
        """Raise why there is no worker, when none lives and none can be expected."""
        now = time.monotonic()
        if any(seat.present for seat in self.seats):
            self._lively = now
            return
        problems = [seat.problem for seat in self.seats if seat.problem is not None]
        resting = bool(self.seats) and all(seat.state == "resting" for seat in self.seats)
        starting = any(seat.state == "starting" for seat in self.seats)  # each has a limit of its own
        late = now - self._lively > self._limit and not starting
        if problems and (resting or late):
            raise problems[0]
        if late:
            raise EvomergeError(
                f"no worker started within {self._limit:g} s; are there processors and GPUs in the cluster? "
                f"({len(self.seats)} workers, and each asks for {self._needs})"
            )

    def close(self) -> None:
        """Kill all actors."""
        while self.seats:
            self._kill(self.seats.pop())

    def _kill(self, seat: Seat) -> None:
        import ray

        with contextlib.suppress(Exception):  # nothing to do about an actor or a Ray that is gone already
            ray.kill(seat.actor)

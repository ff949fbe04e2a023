"""The pool without other processes: one worker, in this one."""

import contextlib
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from evomerge.pool.contract import Answer, Closing, Job, TimeUp, Worker, answer_safely, check_limit, failure, late
from evomerge.pool.crew import WorkerStatus


class InlinePool(Closing):
    """Answers jobs in this process, one at each `wait`, in the order of their submission.

    Args:
        make: makes the worker, at the first job.
        time_limit: seconds for a job, without the making of the worker. Kept by an alarm, which needs the
            main thread and a system with SIGALRM, and strikes between two steps of Python: elsewhere
            there is no limit. A worker that was struck is replaced.
    """

    def __init__(self, make: Callable[[], Worker], time_limit: float | None = None) -> None:
        check_limit(time_limit)
        self._make, self._limit = make, time_limit
        self._worker: Worker | None = None
        self._queue: deque[Job] = deque()
        self._done = self._failures = 0
        self._busy = 0.0
        self._ready: float | None = None
        self._began: float | None = None

    @property
    def room(self) -> int:
        """1 when idle, else 0."""
        return max(0, 1 - len(self._queue))

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        return len(self._queue)

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """How the one worker is doing; idle is when the driver thinks."""
        now, began, ready = time.monotonic(), self._began, self._ready
        return (
            WorkerStatus(
                node=platform.node(),
                pid=os.getpid(),
                state="starting" if ready is None else "idle" if began is None else "busy",
                done=self._done,
                failures=self._failures,
                busy=self._busy + (0.0 if began is None else now - began),
                seconds=0.0 if ready is None else now - ready,
            ),
        )

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
        start = self._began = time.monotonic()
        self._ready = self._ready or start
        try:
            with _alarm(self._limit):
                answer = answer_safely(self._worker.answer, job)
        except TimeUp:
            self._worker = None  # struck in the middle of something; who knows what state it is in
            answer = failure(job, late(self._limit), time.monotonic() - start)
        finally:
            self._busy, self._began = self._busy + time.monotonic() - start, None
        self._queue.popleft()
        self._done += 1
        self._failures += answer.error is not None
        return answer

    def drain(self) -> list[Answer]:
        """Return nothing: a job is answered when it is waited for."""
        return []

    def close(self) -> None:
        """Forget worker and jobs."""
        self._queue.clear()
        self._worker = None


@contextlib.contextmanager
def _alarm(limit: float | None) -> Iterator[None]:
    """Raise TimeUp in the block after `limit` seconds, where the system can."""
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if limit is None or not able:
        yield
        return

    def strike(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, strike)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)

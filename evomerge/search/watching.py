"""Watches the workers of a run: what they get done, kept beside the ledger for whoever asks how the run is."""

import contextlib
import os
import platform
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from evomerge.errors import EvomergeError
from evomerge.ledger import Answered, Event
from evomerge.pool import Crew, Pool, write_crew

#: Seconds between two writes.
_EVERY = 3.0
#: Seconds over which the throughput is taken.
_WINDOW = 60.0


class Watching:
    """Notes every few seconds, in a thread of its own, how the workers are doing.

    Nothing of it is in the ledger, and nothing hangs on it: a file that cannot be written is left as it is.

    Args:
        pool: whose workers.
        file: where to note it; see `evomerge.pool.read_crew`.
        every: seconds between two notes.
    """

    def __init__(self, pool: Pool, file: Path, every: float = _EVERY) -> None:
        self._pool, self._file, self._every = pool, file, every
        self._began = time.monotonic()
        self._recent: deque[tuple[float, tuple[int, str], int]] = deque()
        self._lock = threading.Lock()  # a display and the thread look at the same time
        self._failures = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="watching", daemon=True)

    def add(self, event: Event, replayed: bool) -> None:
        """Take in an event of the run."""
        if isinstance(event, Answered) and not replayed:
            items = sum(len(own) for own in event.responses.values())
            with self._lock:
                self._recent.append((time.monotonic(), (event.candidate, event.split), items))
            self._failures += event.error is not None

    def crew(self, ended: bool = False) -> Crew:
        """Return how they are doing now."""
        now = time.monotonic()
        with self._lock:
            while self._recent and now - self._recent[0][0] > _WINDOW:
                self._recent.popleft()
            recent = list(self._recent)
        minutes = max(min(now - self._began, _WINDOW), 1.0) / 60
        return Crew(
            time=round(time.time(), 3),
            pid=os.getpid(),
            node=platform.node(),
            candidates=len({who for _, who, _ in recent}) / minutes,
            items=sum(items for _, _, items in recent) / minutes,
            failures=self._failures,
            workers=self._pool.workers,
            ended=ended,
        )

    def __enter__(self) -> Self:
        """Begin to take notes."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the last note."""
        self._over.set()
        self._thread.join()
        self._note(ended=True)

    def _keep(self) -> None:
        self._note()
        while not self._over.wait(self._every):
            self._note()

    def _note(self, ended: bool = False) -> None:
        with contextlib.suppress(EvomergeError):  # a full disk is the ledger's to complain about
            write_crew(self.crew(ended), self._file)

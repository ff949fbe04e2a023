"""What a pool is: jobs go in, answers come out, and a failure is an answer."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import field
from types import TracebackType
from typing import Protocol, Self

from evomerge.pool.crew import WorkerStatus
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
    """Takes jobs and gives answers, in any order, one for each job.

    Example:
        A search keeps a pool busy and takes answers as they come::

            with InlinePool(make) as pool:
                for job in jobs:
                    pool.submit(job)
                while pool.pending:
                    for answer in [pool.wait(), *pool.drain()]:
                        ...

    A worker that cannot be made is nobody's answer: `wait` raises what its making raised, unless others live.
    """

    @property
    def room(self) -> int:
        """How many jobs it can start at once; more may be submitted and will queue. At least 1 when none is pending."""
        ...

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        ...

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """How each worker is doing; may be read from another thread."""
        ...

    def submit(self, job: Job) -> None:
        """Take a job; returns at once."""
        ...

    def wait(self) -> Answer:
        """Return the next answer; ValueError if no job is pending."""
        ...

    def drain(self) -> list[Answer]:
        """Return the answers that are there already, without waiting; often none."""
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


class Closing(ABC):
    """What all pools have in common: leaving a `with` block closes them."""

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


class TimeUp(BaseException):
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
    except (KeyboardInterrupt, TimeUp):
        raise
    except BaseException as problem:  # SystemExit too: a candidate must not end the search
        return failure(job, f"{type(problem).__name__}: {problem}", time.monotonic() - start)


def late(limit: float | None) -> str:
    """Return the reason of a job that took too long."""
    return f"time limit of {limit:g} s exceeded"


def check_limit(limit: float | None) -> None:
    """Raise ValueError for a time limit that is no time."""
    if limit is not None and not limit > 0:
        raise ValueError(f"a time limit must be positive, got {limit}")

"""The ledger: the append-only record of a run, from which everything else is derived."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from evomerge.errors import FULL, LedgerError, nearest, unwritten
from evomerge.genome import Genome
from evomerge.holder import Hold
from evomerge.objective import Objective
from evomerge.value import canonical, encoded, parse, plain, value

#: Version of the ledger's form; a ledger of another version is refused.
FORM = 2

#: Origins of candidates that the search did not propose: the baselines of a run.
BASELINES = ("source", "average", "arithmetic")


@value
class Started:
    """A run began: what identifies it, and what its numbers refer to.

    `identity` is the content address of all that decides the course of the run (models,
    space, objectives, items, driver, estimator, schedule, seed). `reference` is the reference point
    of the hypervolume, as losses; None where it is the worst of the sources, which is not known yet.
    `items` counts the items of each split, task by task.
    """

    identity: str
    seed: int
    objectives: tuple[Objective, ...]
    reference: tuple[float | None, ...]
    items: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    time: float = 0.0
    form: int = FORM


@value
class Asked:
    """A candidate was proposed.

    `origin` says by whom: source, average, arithmetic (the baselines), method, earlier, file (warm starts), probe,
    warmup or search.
    `same_as` names an earlier candidate whose recipe is the same: its answers count for both.
    """

    candidate: int
    origin: str
    label: str
    genome: tuple[float | int | str, ...] | None
    recipe: str
    same_as: int | None = None


@value
class Answered:
    """A worker answered items of a split for a candidate, or says why it could not.

    `items` holds the items by task; of a task that is not in it all items of the split were asked, if it has responses.
    A candidate may answer a split bit by bit. `layers` counts, for stacks, what the worker did: layers that were `run`
    on a batch and that were `spared` because hidden states were kept, both also in tokens (`run_tokens`,
    `spared_tokens`), and the `bytes` that it keeps. It depends on who was asked before by the same worker.
    """

    candidate: int
    split: str
    items: Mapping[str, tuple[int, ...]]
    responses: Mapping[str, tuple[float, ...]]
    margins: Mapping[str, tuple[float, ...]]
    error: str | None = None
    seconds: float = 0.0
    layers: Mapping[str, int] = field(default_factory=dict)


@value
class Fitted:
    """The estimator was fitted to all that is known before a generation, and chose what to ask of it.

    Attributes:
        step: the number of the generation, from 0.
        items: what everybody in it is asked, by task; empty where that is decided one by one.
        again: candidates of earlier generations that are asked these items too.
        spread: by how much the raw error of each task's estimates is multiplied, from held-out rows.
        inflation: by how much more, because estimates of promoted candidates were further off than their errors said.
        rows: how many candidates that had answered everything went into the fit.
        reason: which estimator was used, and why.
    """

    step: int
    items: Mapping[str, tuple[int, ...]]
    again: tuple[int, ...]
    spread: Mapping[str, float]
    inflation: float
    rows: int
    reason: str = ""


@value
class Told:
    """A candidate's score became final and was told to the driver; losses None: it failed.

    A score is (value, standard error, number of items). It may be told again, when more is known of the candidate.
    """

    candidate: int
    losses: tuple[float, ...] | None
    scores: Mapping[str, tuple[float, ...]]


@value
class Promoted:
    """Candidates were chosen to be asked more: all items of a split, or those of `search` that `items` names by task.

    `estimates` holds for each candidate, where there are any, what was thought of it before: by task, the value and its
    raw error.
    """

    split: str
    candidates: tuple[int, ...]
    estimates: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    items: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@value
class Rescored:
    """A candidate's scores on all items of a held-out split; losses None: it failed there."""

    candidate: int
    split: str
    losses: tuple[float, ...] | None
    scores: Mapping[str, tuple[float, ...]]


@value
class Warned:
    """Something that the user should know and that did not stop the run."""

    text: str


@value
class Finished:
    """The run is complete; `front` holds the non-dominated candidates, by the validation split."""

    front: tuple[int, ...]
    time: float = 0.0


Event = Started | Asked | Answered | Fitted | Told | Promoted | Rescored | Warned | Finished

_KINDS: Mapping[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Started, Asked, Answered, Fitted, Told, Promoted, Rescored, Warned, Finished)
}


class Ledger:
    """A ledger opened for appending, by one process at a time.

    Opening it forgives a torn last line (a write that a crash cut short): the line is
    removed from the file. A broken line anywhere else is refused.

    What is appended is handed to the operating system at once, so that it outlives this process, and is on the disk,
    so that it outlives the machine, when `sync` returns. Where that fails, because the disk is full or otherwise, the
    file is cut back to what it last held for sure, and the ledger takes no more: opened again, it goes on from there.

    Raises:
        LedgerError: if it cannot be written, another process has it open, or a line is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as problem:
            if problem.errno in FULL:
                raise LedgerError(unwritten(path, problem, "start again")) from None
            raise LedgerError(f"{path}: cannot be written ({problem.strerror}); give another folder") from None
        try:
            self._hold = Hold(path, self._file.fileno())
        except BaseException:
            self._file.close()
            raise
        self._failed = False
        try:
            self.past = read(path)
            self._size = self._synced = _whole_bytes(path)
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())  # what an earlier process appended may not be on the disk yet
        except BaseException:
            self._release()
            raise

    def append(self, event: Event) -> None:
        """Write an event; it is on the disk after the next `sync`.

        Raises:
            LedgerError: if there is no room for it; the file then ends with the event before it.
        """
        if self._hold.due():
            self._hold.renew()
        self.write(line(event))

    def write(self, data: bytes) -> None:
        """Hand bytes to the operating system, all or none."""
        if self._failed:
            raise LedgerError(f"{self._path}: an earlier write failed; go on with: evomerge resume {self._path.parent}")
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as problem:
            raise self._cut(self._size, problem) from None
        self._size += len(data)

    def sync(self) -> None:
        """Force to the disk all that was appended since the last time; does nothing where nothing was.

        Raises:
            LedgerError: if that fails; the file is then cut back to what was on the disk before.
        """
        self._hold.renew()
        if self._failed or self._synced == self._size:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise self._cut(self._synced, problem) from None
        self._synced = self._size

    def close(self) -> None:
        """Force what was appended to the disk and release the file."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _release(self) -> None:
        self._hold.release()
        self._file.close()

    def _cut(self, size: int, problem: OSError) -> LedgerError:
        """Cut the file back after a failed write and return the error to raise."""
        self._failed = True
        with contextlib.suppress(OSError):  # a torn last line is forgiven when the file is opened again
            self._file.truncate(size)
        return LedgerError(unwritten(self._path, problem, f"go on with: evomerge resume {self._path.parent}"))


def line(event: Event) -> bytes:
    """Return the line of an event, newline included."""
    return encoded(canonical({"event": type(event).__name__.lower(), **plain(event)}) + "\n")


def read(path: Path) -> tuple[Event, ...]:
    """Read the events of a ledger; a torn last line is left out.

    Raises:
        LedgerError: if the file is missing, or a line is broken, naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise LedgerError(f"{path}: cannot be read ({problem.strerror}); give the folder of a run") from None
    lines = data.split(b"\n")[:-1]
    return tuple(_event(text, f"{path}:{number}") for number, text in enumerate(lines, start=1))


def settled(events: Sequence[Event]) -> list[Event]:
    """Return what two runs of one experiment have in common whatever their timing.

    Timing fields are set to zero, counts of layer passes left out, and the answers between two other events, which
    arrive in any order when several workers are at work, are sorted by candidate; those of one candidate keep their
    order.
    """
    found: list[Event] = []
    answers: list[Answered] = []
    for event in events:
        if isinstance(event, Answered):
            answers.append(replace(event, seconds=0.0, layers={}))
            continue
        found += _by_candidate(answers)
        answers = []
        found.append(replace(event, time=0.0) if isinstance(event, Started | Finished) else event)
    return found + _by_candidate(answers)


def genome_of(event: Asked) -> Genome:
    """Return the genome of an asked candidate.

    Raises:
        LedgerError: if it has none (a source).
    """
    if event.genome is None:
        raise LedgerError(f"candidate {event.candidate} ({event.label}) has no genome")
    return event.genome


def _by_candidate(answers: list[Answered]) -> list[Answered]:
    return sorted(answers, key=lambda answer: answer.candidate)


def _event(text: bytes, place: str) -> Event:
    try:
        form = json.loads(text)
    except (ValueError, RecursionError) as problem:  # ValueError: no JSON, not UTF-8, or an endless number
        raise LedgerError(
            f"{place}: broken line ({problem}); restore the file, or delete this line and all after it"
        ) from None
    kind = str(form.pop("event", None)) if isinstance(form, dict) else type(form).__name__
    if kind not in _KINDS:
        raise LedgerError(f"{place}: unknown event {kind!r}; {nearest(kind, _KINDS)}")
    if kind == "started" and form.get("form") != FORM:
        raise LedgerError(
            f"{place}: written in form {form.get('form')}, this evomerge reads form {FORM}; "
            "finish the run with the version that began it"
        )
    return parse(_KINDS[kind], form, place, LedgerError)


def _whole_bytes(path: Path) -> int:
    """Return the number of bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1

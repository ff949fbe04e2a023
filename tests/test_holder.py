"""Who holds a run: the second is refused and told who has it, with locks and without; nobody is locked out for good."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge import holder
from evomerge.errors import LedgerError
from evomerge.holder import STALE, Holder, holder_of
from evomerge.ledger import Ledger, Warned, read

#: A process that holds a run until it is killed; where `flock` is told to fail, as on a file system without locks.
HOLDING = """
import errno, fcntl, os, pathlib, sys, time
from evomerge.ledger import Ledger
if sys.argv[2] == "without":
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
book = Ledger(pathlib.Path(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Return the path of a ledger that is not there yet."""
    return tmp_path / "ledger.jsonl"


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file system one that has no locks, in each way in which it may say so."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def holding(ledger: Path, locks: str) -> "subprocess.Popen[str]":
    """Start a process that holds a ledger, and wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(ledger), locks], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == str(process.pid)
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and wait until it is gone."""
    with process:
        process.send_signal(signal.SIGKILL)


def test_the_second_is_told_who_holds_the_run(ledger: Path) -> None:
    """Host, process and time stand in the line; a killed holder's note is in nobody's way."""
    began = time.time()
    process = holding(ledger, "with")
    try:
        with pytest.raises(LedgerError) as caught:
            Ledger(ledger)
        known = holder_of(ledger)
    finally:
        kill(process)

    assert known is not None
    assert (known.host, known.process) == (platform.node(), process.pid)
    assert began <= known.since <= time.time()
    assert str(caught.value) == (
        f"{ledger}: another evomerge is writing this run ({known}); wait for it, or stop it first"
    )
    assert f"process {process.pid} on {platform.node()}, since 20" in str(known)
    with Ledger(ledger):
        now = holder_of(ledger)
        assert now is not None
        assert now.process == os.getpid()


def test_a_run_that_is_let_go_has_no_holder(ledger: Path) -> None:
    """The folder is left with the ledger alone, also where opening it was refused."""
    with Ledger(ledger):
        assert sorted(path.name for path in ledger.parent.iterdir()) == ["holder.json", "ledger.jsonl"]
    assert [path.name for path in ledger.parent.iterdir()] == ["ledger.jsonl"]

    ledger.write_bytes(b"{\n")
    with pytest.raises(LedgerError, match="broken line"):
        Ledger(ledger)
    assert [path.name for path in ledger.parent.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_a_note_that_says_nothing_stops_nobody(ledger: Path, text: str) -> None:
    """Where there are locks they decide; a broken note is written anew, and without one the refusal names nobody."""
    (ledger.parent / "holder.json").write_text(text, encoding="utf-8")
    assert holder_of(ledger) is None

    with Ledger(ledger):
        assert holder_of(ledger) is not None
        (ledger.parent / "holder.json").unlink()
        with pytest.raises(LedgerError, match="is writing this run; wait for it"):
            Ledger(ledger)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_second_is_refused_too(ledger: Path) -> None:
    """The line says who, how long ago it gave a sign, and the way out; then the way is free."""
    with Ledger(ledger) as book:
        book.append(Warned(text="mine"))
        way = rf"no locks.*\d s old: if it is surely dead, remove {ledger.parent}/holder.json"
        with pytest.raises(LedgerError, match=rf"process {os.getpid()} on .*{way}"):
            Ledger(ledger)
        book.append(Warned(text="still mine"))
    with Ledger(ledger) as book:
        assert len(book.past) == 2
    assert [path.name for path in ledger.parent.iterdir()] == ["ledger.jsonl"]


def test_without_locks_a_killed_holder_is_in_the_way_until_its_file_is_removed_or_stale(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells a dead process of another machine from a living one, but time."""
    kill(holding(ledger, "without"))

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    note = ledger.parent / "holder.json"
    with pytest.raises(LedgerError, match="surely dead"):
        Ledger(ledger)
    os.utime(note, (time.time() - STALE + 20,) * 2)
    with pytest.raises(LedgerError, match="surely dead"):
        Ledger(ledger)
    os.utime(note, (time.time() - STALE - 1,) * 2)
    with Ledger(ledger):
        pass
    kill(holding(ledger, "without"))
    note.unlink()
    with Ledger(ledger):
        pass


@pytest.mark.usefixtures("without_locks")
def test_who_slept_through_a_takeover_writes_no_more(ledger: Path) -> None:
    """Of two that both think that they hold the run, one goes on: the one whose name stands in the file."""
    old = Ledger(ledger)
    old.append(Warned(text="old"))
    note = ledger.parent / "holder.json"
    os.utime(note, (time.time() - STALE - 1,) * 2)
    new = Ledger(ledger)
    assert new.past == (Warned(text="old"),)

    with pytest.raises(LedgerError, match=f"taken over by process {os.getpid()} on .*let that one go on"):
        old.sync()
    new.append(Warned(text="new"))
    new.sync()
    with pytest.raises(LedgerError, match="taken over"):
        old.close()
    assert holder_of(ledger) is not None  # the note of another is not taken back
    new.close()
    assert read(ledger) == (Warned(text="old"), Warned(text="new"))


@pytest.mark.usefixtures("without_locks")
def test_who_gave_no_sign_for_long_looks_before_it_writes(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for minutes, and was taken for dead, does not get a line into the other's ledger."""
    old = Ledger(ledger)
    (ledger.parent / "holder.json").unlink()
    new = Ledger(ledger)
    now = time.monotonic
    monkeypatch.setattr(holder.time, "monotonic", lambda: now() + STALE)

    with pytest.raises(LedgerError, match="taken over"):
        old.append(Warned(text="late"))
    new.close()
    with pytest.raises(LedgerError):
        old.close()
    assert read(ledger) == ()


@pytest.mark.usefixtures("without_locks")
def test_signs_are_given_while_a_run_waits_for_answers(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that takes an hour makes nobody believe that the driver is dead; one that is done gives none."""
    monkeypatch.setattr(holder, "_BEAT", 0.01)
    note = ledger.parent / "holder.json"

    def renewed() -> bool:
        os.utime(note, (1, 1))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            if note.stat().st_mtime > 1:
                return True
            time.sleep(0.005)
        return False

    with Ledger(ledger):
        assert renewed()
    note.touch()
    assert not renewed()


def test_a_holder_comes_back_as_it_was_written() -> None:
    """The line for people is in universal time, so that it means the same on every machine."""
    assert str(Holder(host="node3", process=12, since=0.5)) == "process 12 on node3, since 1970-01-01 00:00:00 UTC"

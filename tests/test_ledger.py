"""The ledger: what is written comes back bit for bit, torn tails are forgiven, everything else is refused."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import ledger
from evomerge.errors import LedgerError
from evomerge.ledger import (
    Answered,
    Asked,
    Event,
    Finished,
    Fitted,
    Ledger,
    Promoted,
    Rescored,
    Started,
    Told,
    Warned,
    genome_of,
    line,
    read,
    settled,
)
from evomerge.objective import Objective
from evomerge.value import plain
from tests.full import full_beyond

REALS = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.lists(REALS, max_size=3).map(tuple)
NUMBERS = st.lists(st.integers(0, 10**9), max_size=3).map(tuple)
TEXT = st.text(max_size=6)


def by_task(rows):
    """Draw a mapping from tasks to rows."""
    return st.dictionaries(TEXT, rows, max_size=2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | REALS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECTIVES = st.lists(
    st.builds(
        Objective,
        name=TEXT,
        kind=st.sampled_from(["task", "property"]),
        direction=st.sampled_from(["maximize", "minimize"]),
        weight=REALS,
    ),
    max_size=2,
).map(tuple)
GENOMES = st.none() | st.lists(REALS | st.integers() | TEXT, max_size=4).map(tuple)
MAYBE = {"losses": st.none() | ROWS, "scores": by_task(ROWS)}
EVENTS = st.one_of(
    st.builds(
        Started,
        identity=TEXT,
        seed=st.integers(),
        objectives=OBJECTIVES,
        reference=st.lists(st.none() | REALS, max_size=3).map(tuple),
        items=by_task(st.dictionaries(TEXT, st.integers(), max_size=2)),
        versions=st.dictionaries(TEXT, TEXT, max_size=2),
        time=REALS,
    ),
    st.builds(
        Asked,
        candidate=st.integers(),
        origin=TEXT,
        label=TEXT,
        genome=GENOMES,
        recipe=TEXT,
        same_as=st.none() | st.integers(),
    ),
    st.builds(
        Answered,
        candidate=st.integers(),
        split=TEXT,
        items=by_task(NUMBERS),
        responses=by_task(ROWS),
        margins=by_task(ROWS),
        error=st.none() | TEXT,
        seconds=REALS,
    ),
    st.builds(
        Fitted,
        step=st.integers(),
        items=by_task(NUMBERS),
        again=NUMBERS,
        spread=by_task(REALS),
        inflation=REALS,
        rows=st.integers(),
        reason=TEXT,
    ),
    st.builds(Told, candidate=st.integers(), **MAYBE),
    st.builds(Promoted, split=TEXT, candidates=NUMBERS, estimates=st.lists(by_task(ROWS), max_size=2).map(tuple)),
    st.builds(Rescored, candidate=st.integers(), split=TEXT, **MAYBE),
    st.builds(Warned, text=TEXT),
    st.builds(Finished, front=NUMBERS, time=REALS),
)

STARTED = Started(
    identity="x",
    seed=1,
    objectives=(Objective(name="a"),),
    reference=(0.0,),
    items={"search": {"a": 2}},
    versions={"evomerge": "1"},
    time=12.5,
)
ASKED = Asked(candidate=0, origin="search", label="", genome=(0.1, 2, "ties"), recipe="0123")
ANSWERED = Answered(candidate=0, split="search", items={"a": (0,)}, responses={"a": (1.0,)}, margins={}, seconds=2.0)
TOLD = Told(candidate=0, losses=(-1.0,), scores={"a": (1.0, 0.1, 1.0)})
FEW = (STARTED, ASKED, ANSWERED, TOLD)


def write(path, *events):
    """Append events through a ledger of their own."""
    with Ledger(path) as book:
        for event in events:
            book.append(event)


@given(st.lists(EVENTS, max_size=4))
@settings(max_examples=80, deadline=None)
def test_events_come_back_bit_for_bit(tmp_path_factory, events):
    """Reals to the last bit, whole numbers as whole numbers, text as it was; and a line is one line."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    back = read(path)

    assert list(back) == events
    assert path.read_bytes().count(b"\n") == len(events)
    # The shortest decimal text of a real number is its own, signed zeros included, and types differ by their text.
    assert list(map(line, back)) == list(map(line, events))


def test_every_kind_of_event_is_known():
    """The union of events and the names in the file are the same nine."""
    assert {kind.__name__.lower() for kind in get_args(Event)} == set(ledger._KINDS)
    assert len(ledger._KINDS) == 9


def test_a_line_is_json_with_the_kind_of_event():
    """Another program reads the file as JSON lines."""
    text = line(TOLD)

    assert text.endswith(b"}\n")
    assert json.loads(text) == {"event": "told", "candidate": 0, "losses": [-1.0], "scores": {"a": [1.0, 0.1, 1.0]}}


def test_a_reason_that_is_no_text_is_recorded_too(tmp_path):
    """A file name with broken bytes in an error message does not end a search, and comes back."""
    event = replace(ANSWERED, error="FileNotFoundError: " + b"\xff".decode(errors="surrogateescape"))
    write(tmp_path / "ledger.jsonl", event)

    assert read(tmp_path / "ledger.jsonl") == (event,)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_written(number, tmp_path):
    """Such an event is refused before a byte of it is in the file."""
    with Ledger(tmp_path / "ledger.jsonl") as book, pytest.raises(ValueError, match="JSON"):
        book.append(replace(TOLD, losses=(number,)))
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


def test_appending_goes_on_where_the_file_ends(tmp_path):
    """Two sessions of one run leave the lines of both, and the second one knows the past."""
    path = tmp_path / "new/folder/ledger.jsonl"
    write(path, STARTED, ASKED)
    with Ledger(path) as book:
        assert book.past == (STARTED, ASKED)
        book.append(ANSWERED)

    assert read(path) == (STARTED, ASKED, ANSWERED)


def test_an_event_is_with_the_operating_system_before_append_returns(tmp_path):
    """A process that is killed right after it loses nothing: another one reads the whole line."""
    path = tmp_path / "ledger.jsonl"
    code = (
        "import os, signal; from pathlib import Path; from evomerge.ledger import Ledger, Warned; "
        f"Ledger(Path({str(path)!r})).append(Warned(text='so')); os.kill(os.getpid(), signal.SIGKILL)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert read(path) == (Warned(text="so"),)


def test_sync_forces_to_the_disk_what_was_appended_and_is_free_where_nothing_was(tmp_path, monkeypatch):
    """Many events cost one fsync; opening and closing see to what is left."""
    path, seen = tmp_path / "ledger.jsonl", []
    monkeypatch.setattr("evomerge.ledger.os.fsync", lambda handle: seen.append(os.fstat(handle).st_size))
    sizes = [0, len(line(STARTED) + line(ASKED)), len(line(STARTED) + line(ASKED) + line(TOLD))]
    with Ledger(path) as book:
        assert seen == sizes[:1]
        book.append(STARTED)
        book.append(ASKED)
        assert seen == sizes[:1]
        book.sync()
        book.sync()
        assert seen == sizes[:2]
        book.append(TOLD)
    assert seen == sizes
    book.close()
    with Ledger(path):
        pass

    assert seen == [*sizes, sizes[-1]]


@pytest.mark.parametrize("fits", [0, 1, len(line(ASKED)) - 1])
def test_a_full_disk_keeps_every_whole_line(fits, tmp_path):
    """What still fitted of the line is removed, and the same ledger goes on when there is room again."""
    path = tmp_path / "ledger.jsonl"
    book = Ledger(path)
    book.append(STARTED)
    with full_beyond(len(line(STARTED)) + fits), pytest.raises(LedgerError) as caught:
        book.append(ASKED)
    assert str(caught.value) == (
        f"{path}: cannot be written (File too large); free space, then go on with: evomerge resume {tmp_path}"
    )
    assert path.read_bytes() == line(STARTED)
    with pytest.raises(LedgerError, match=f"earlier write failed; go on with: evomerge resume {tmp_path}"):
        book.append(TOLD)
    book.close()
    write(path, ASKED)

    assert read(path) == (STARTED, ASKED)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_forced_to_the_disk_is_taken_back(reason, tmp_path, monkeypatch):
    """Some file systems find out only then that they are full; what had been forced there before stays."""
    path = tmp_path / "ledger.jsonl"
    book = Ledger(path)
    book.append(STARTED)
    book.sync()
    book.append(ASKED)

    def fsync(handle):
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as broken:
        broken.setattr("evomerge.ledger.os.fsync", fsync)
        with pytest.raises(LedgerError, match=f"{os.strerror(reason)}.*then go on with: evomerge resume"):
            book.sync()
    book.close()

    assert read(path) == (STARTED,)


def test_a_file_cut_at_any_byte_gives_its_whole_lines(tmp_path):
    """A crash can cut a write anywhere: reading keeps the whole lines, opening removes the rest and goes on."""
    lines = [line(event) for event in FEW]
    whole, path = b"".join(lines), tmp_path / "ledger.jsonl"
    ends = [len(b"".join(lines[:i])) for i in range(len(lines) + 1)]

    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        count = sum(end <= cut for end in ends) - 1
        assert read(path) == FEW[:count]
    for cut in range(ends[-2], ends[-1]):
        path.write_bytes(whole[:cut])
        with Ledger(path) as book:
            assert book.past == FEW[:-1]
            book.write(lines[-1])
        assert path.read_bytes() == whole


def test_a_torn_tail_may_hold_anything(tmp_path):
    """Bytes after the last newline are not looked at, not even as text."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(line(STARTED) + b"\xff\x00{")

    assert read(path) == (STARTED,)
    with Ledger(path):
        assert path.read_bytes() == line(STARTED)


def changed(event, /, **keys):
    """Return the line of an event with keys set, or left out where the value is None."""
    form = {"event": type(event).__name__.lower(), **plain(event)} | keys
    return json.dumps({key: item for key, item in form.items() if item is not None}).encode() + b"\n"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (line(ASKED)[:40] + b"\n", "broken line .*restore the file, or delete this line and all after it"),
        (b"\n", "broken line"),
        (b"\xff\xfe\n", "broken line"),
        (line(ASKED).replace(b"0.1", b"1" * 5000), "broken line"),
        (b"[" * 100_000 + b"\n", "broken line"),
        (b"[1]\n", "unknown event 'list'; known: started, asked"),
        (b"7\n", "unknown event 'int'"),
        (b"{}\n", "unknown event 'None'"),
        (changed(ASKED, event="askd"), "unknown event 'askd'; did you mean 'asked'"),
        (changed(ASKED, lable="x"), "lable: unknown key; did you mean 'label'"),
        (changed(ASKED, recipe=None), "recipe: missing; Asked needs it"),
        (changed(ASKED, candidate="0"), "candidate: expected int, got str '0'"),
        (changed(ASKED, candidate=True), "candidate: expected int, got bool True"),
        (changed(ASKED, genome=[float("nan")]), r"genome\[0\]: expected a finite number, got nan"),
        (changed(TOLD, losses=[None]), r"losses\[0\]: expected float, got NoneType None"),
        (changed(STARTED, form=1), "written in form 1, this evomerge reads form 2; finish the run with the version"),
        (changed(STARTED, form=None), "written in form None"),
        (changed(STARTED, objectives=[{"name": "a", "direction": "up"}]), "direction must be maximize or minimize"),
    ],
)
def test_a_broken_line_is_refused_and_the_file_left_alone(broken, message, tmp_path):
    """The file and the number of the line are named, whether the line stands in the middle or at the end."""
    path = tmp_path / "ledger.jsonl"
    for after in (b"", line(TOLD), line(TOLD)[:9]):
        path.write_bytes(line(STARTED) + broken + after)
        before = path.read_bytes()
        for use in (read, Ledger):
            with pytest.raises(LedgerError, match=message) as caught:
                use(path)
            assert str(caught.value).startswith(f"{path}:2")
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


def test_after_a_broken_line_the_file_is_free_again(tmp_path):
    """A refused ledger is not kept locked: repaired, it opens."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"{\n")
    with pytest.raises(LedgerError):
        Ledger(path)
    path.write_bytes(b"")

    with Ledger(path) as book:
        assert book.past == ()


def test_one_process_writes_at_a_time(tmp_path):
    """A second one is told who holds the run; once the first is done, or dead, the way is free."""
    path = tmp_path / "ledger.jsonl"
    with Ledger(path):
        since = datetime.fromtimestamp(time.time(), UTC)
        who = f"process {os.getpid()} on {platform.node()}, since {since:%Y-%m-%d}"
        with pytest.raises(LedgerError, match=f"is writing this run .{who}.*; wait for it, or stop it first"):
            Ledger(path)
        code = f"import fcntl; fcntl.flock(open({str(path)!r}, 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(LedgerError, match="another evomerge"):
            Ledger(path)
    write(path, STARTED)

    assert read(path) == (STARTED,)


def test_reading_needs_no_lock(tmp_path):
    """A run can be looked at while it is written."""
    with Ledger(tmp_path / "ledger.jsonl") as book:
        book.append(STARTED)
        assert read(tmp_path / "ledger.jsonl") == (STARTED,)


def test_a_refused_second_writer_changes_nothing(tmp_path):
    """It neither cuts the line that the first one is writing nor creates anything."""
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as book:
        book.write(line(STARTED)[:10])
        with pytest.raises(LedgerError):
            Ledger(path)
        assert path.read_bytes() == line(STARTED)[:10]


def test_a_missing_ledger_and_one_that_cannot_be_written_are_named(tmp_path):
    """The path and the way out stand in the error."""
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"none.jsonl: cannot be read \(No such file.*give the folder of a run"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(LedgerError, match=r"ledger.jsonl: cannot be written \(.*give another folder"):
        Ledger(tmp_path / "file/ledger.jsonl")


def test_settled_forgets_timing_and_the_order_of_answers():
    """Two ledgers of one experiment are equal once times are gone and neighbouring answers are sorted."""
    asked = [replace(ASKED, candidate=i) for i in range(3)]
    answers = [replace(ANSWERED, candidate=i, seconds=float(i)) for i in range(3)]
    one = [STARTED, *asked, *answers, TOLD, replace(ANSWERED, split="test"), Finished(front=(0,), time=3.0)]
    other = [replace(STARTED, time=99.0), *asked, answers[2], answers[0], replace(answers[1], seconds=7.0), TOLD,
             replace(ANSWERED, split="test", seconds=0.5), Finished(front=(0,), time=4.0)]  # fmt: skip

    assert settled(one) == settled(other)
    assert len(settled(one)) == len(one)
    assert settled(settled(one)) == settled(one)


@pytest.mark.parametrize(
    "other",
    [
        [STARTED, ANSWERED, ASKED],  # an answer on the other side of an event
        [STARTED, ASKED, replace(ANSWERED, responses={"a": (0.0,)})],
        [STARTED, ASKED],
        [replace(STARTED, seed=2), ASKED, ANSWERED],
    ],
)
def test_settled_keeps_every_other_difference(other):
    """Order between kinds, responses, seeds and missing events still tell two ledgers apart."""
    assert settled([STARTED, ASKED, ANSWERED]) != settled(other)


def test_settled_keeps_the_order_of_one_candidates_answers():
    """Whatever came between them: what a candidate is asked follows from what it answered before."""
    rungs = [replace(ANSWERED, items={"a": (i,)}) for i in (5, 1, 3)]
    other = replace(ANSWERED, candidate=1)

    assert settled([other, *rungs]) == settled([rungs[0], other, *rungs[1:]])
    assert settled(rungs) != settled(rungs[::-1])


def test_settled_keeps_trailing_answers():
    """A run that was cut in the middle of its answers keeps them."""
    assert settled([ASKED, replace(ANSWERED, candidate=1), ANSWERED]) == [
        ASKED,
        replace(ANSWERED, seconds=0.0),
        replace(ANSWERED, candidate=1, seconds=0.0),
    ]


def test_a_candidate_without_a_genome_says_so():
    """A genome is returned as it is; a source has none."""
    assert genome_of(ASKED) == (0.1, 2, "ties")
    with pytest.raises(LedgerError, match=r"candidate 4 \(base\) has no genome"):
        genome_of(replace(ASKED, candidate=4, label="base", genome=None))

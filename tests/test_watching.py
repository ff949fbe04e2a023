"""Watching the workers: what is noted of them, and how it is shown."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.ledger import Answered
from evomerge.pool import Crew, InlinePool, WorkerStatus, read_crew, write_crew
from evomerge.search import Search, Watching, prepare
from tests.toy import ShufflingPool, ToyWorker, toy

CREW = Crew(
    time=0.0,
    pid=17,
    node="head.example",
    candidates=41.6,
    items=1234.4,
    failures=3,
    workers=(
        WorkerStatus(node="left.example", pid=21, state="busy", done=5, failures=1, busy=9.0, seconds=10.0),
        WorkerStatus(node="right.example", pid=22, state="idle", done=7, failures=0, busy=15.0, seconds=20.0),
        WorkerStatus(node="", pid=None, state="waiting", done=0, failures=0, busy=0.0, seconds=0.0),
        WorkerStatus(
            node="far.example",
            pid=5,
            state="resting",
            done=0,
            failures=0,
            busy=0.0,
            seconds=0.0,
            note="no [such] folder",
        ),
    ),
)


def answered(candidate: int, items: int, error: str | None = None) -> Answered:
    """Return an answer to so many items."""
    responses = {} if error else {"task": (1.0,) * items}
    return Answered(candidate=candidate, split="search", items={}, responses=responses, margins={}, error=error)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr("evomerge.search.watching.time.monotonic", lambda: now[0])
    return now


def test_the_throughput_is_that_of_the_last_minute(clock: list[float], tmp_path: Path) -> None:
    """Candidates are counted once however often they answer, what was replayed not at all, and old answers no more."""
    watching = Watching(ShufflingPool(ToyWorker(), 0), tmp_path / "workers.json")
    watching.add(answered(0, 1000), replayed=True)
    clock[0] += 10
    for event in (answered(1, 30), answered(1, 60), answered(2, 30), answered(3, 0, "it broke")):
        watching.add(event, replayed=False)
    clock[0] += 20

    early = watching.crew()
    clock[0] += 40
    watching.add(answered(4, 10), replayed=False)
    clock[0] += 5
    late = watching.crew()

    assert (early.candidates, early.items, early.failures) == (pytest.approx(3 * 2), pytest.approx(120 * 2), 1)
    assert (late.candidates, late.items, late.failures) == (pytest.approx(1), pytest.approx(10), 1)


def test_a_note_is_taken_every_while_and_at_the_end(tmp_path: Path) -> None:
    """A file is there as soon as the run has begun, changes while it goes on, and the last one says that it ended."""
    file = tmp_path / "workers.json"
    seen = []
    with InlinePool(ToyWorker) as pool, Watching(pool, file, every=0.02):
        end = time.monotonic() + 10
        while len({crew.time for crew in seen}) < 3 and time.monotonic() < end:
            if crew := read_crew(file):
                seen.append(crew)
    last = read_crew(file)

    assert len({crew.time for crew in seen}) >= 3
    assert not any(crew.ended for crew in seen)
    assert last is not None
    assert last.ended
    assert [path.name for path in tmp_path.iterdir()] == ["workers.json"]


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """There is no such folder, and the run goes on."""
    with InlinePool(ToyWorker) as pool, Watching(pool, tmp_path / "none/workers.json", every=0.01):
        time.sleep(0.05)


@pytest.mark.parametrize("text", [None, "", "[]", '{"time": 1}', '{"time": ', json.dumps({"what": 1})])
def test_a_file_that_says_nothing_is_nobody(text: str | None, tmp_path: Path) -> None:
    """Missing, torn, or of another version: then nothing is known of the workers, and nothing is wrong."""
    file = tmp_path / "workers.json"
    if text is not None:
        file.write_text(text)

    assert read_crew(file) is None


def test_a_crew_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every field survives, also a node whose name is no text."""
    odd = replace(CREW, node="\udc80")
    write_crew(odd, tmp_path / "workers.json")

    assert read_crew(tmp_path / "workers.json") == odd


def test_the_line_counts_who_is_there_and_how_idle_they_are() -> None:
    """Two of four are at hand; they had 30 s, and no job for 6 of them."""
    assert CREW.line == "4 workers (2 at hand), 42 candidates and 1,234 items a minute, idle 20%"
    assert replace(CREW, workers=CREW.workers[:1]).line.startswith("1 worker, 42")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has not finished."""
    with prepare(toy(), tmp_path / "run") as record, InlinePool(ToyWorker) as pool:
        Search(toy(), record, pool).run()
    ledger = tmp_path / "run/ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:60]))
    return tmp_path / "run"


def status(folder: Path) -> str:
    """Return what `evomerge status` prints."""
    result = CliRunner().invoke(app, ["status", str(folder)], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    return result.output


def test_status_shows_workers_at_work(folder: Path) -> None:
    """Each has a row with node, process, state, jobs, failures and idle share; the sum is above."""
    write_crew(replace(CREW, time=time.time()), folder / "workers.json")
    rows = [line.split() for line in status(folder).splitlines()]

    assert ["left.example", "21", "busy", "5", "1", "10%"] in rows
    assert ["right.example", "22", "idle", "7", "0", "25%"] in rows
    assert ["…", "…", "waiting", "for", "a", "place", "0", "0", "…"] in rows
    assert "given up for a while: no [such] folder" in status(folder)
    assert f"Workers: {CREW.line}, 3 failed" in status(folder)


def test_status_says_that_the_driver_is_gone(folder: Path) -> None:
    """Of a note that is a minute old it says when it was taken, by whom, and the way out."""
    write_crew(replace(CREW, time=time.time() - 60), folder / "workers.json")
    shown = " ".join(status(folder).split())

    assert "when the driver was seen last, 60 s ago (process 17 on head.example)" in shown
    assert "evomerge resume" in shown


def test_status_without_a_note_says_nothing_of_workers(folder: Path) -> None:
    """A run of another version has none."""
    assert "orkers" not in status(folder)


def test_status_of_a_session_that_ended_says_how_it_was(folder: Path) -> None:
    """No table of processes that are gone; how much they did and how idle they were."""
    write_crew(replace(CREW, time=time.time(), ended=True), folder / "workers.json")
    shown = status(folder)

    assert f"Workers at the end of the last session: {CREW.line}, 3 failed." in " ".join(shown.split())
    assert "left.example" not in shown

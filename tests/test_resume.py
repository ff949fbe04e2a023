"""Every driver, in batches and in steady state: killed ten times at random, a run ends as it should."""

import random
from pathlib import Path

import pytest

from evomerge.drivers import DRIVERS
from evomerge.ledger import line, read, settled
from tests.test_search import SMALL, conduct, cut_ledger, no_fsync
from tests.test_steady import check_complete
from tests.toy import SETTINGS, STEADY, ShufflingPool, ToyWorker, toy

__all__ = ["no_fsync"]

FEW = {"name": "fixed", "items": 12}
KILLS = 10


def killed(driver: str, folder: Path) -> bytes:
    """Kill and resume a run ten times, three workers answering in another order each time; return its ledger."""
    experiment = toy(driver, FEW, **SMALL)
    rng, path = random.Random(driver), folder / "ledger.jsonl"
    kept = b""
    for kill in range(KILLS + 1):
        conduct(experiment, folder, pool=ShufflingPool(ToyWorker(), kill))
        assert path.read_bytes().startswith(kept), kill
        if kill < KILLS:
            # The later a kill, the more is kept, so that every part of the run is gone through again and again.
            events = len(read(path))
            cut = rng.randrange(kill * events // (KILLS + 2), events)
            cut_ledger(path, path, cut, rng.choice([0, 1, 40]))
            kept = b"".join(path.read_bytes().splitlines(keepends=True)[:cut])
    return path.read_bytes()


def test_all_drivers_are_here() -> None:
    """No driver is left out of these tests."""
    assert set(SETTINGS) == set(DRIVERS)


@pytest.mark.parametrize("driver", SETTINGS)
def test_in_batches_the_ledger_is_that_of_the_uninterrupted_run(driver: str, tmp_path: Path) -> None:
    """Ten kills, torn lines and answers in other orders leave the ledger of a run with one worker and no kill."""
    killed(driver, tmp_path / "killed")
    whole = conduct(toy(driver, FEW, **SMALL), tmp_path / "whole")

    assert settled(read(tmp_path / "killed/ledger.jsonl")) == settled(whole)


@pytest.mark.parametrize("driver", SETTINGS)
def test_in_steady_state_the_ledger_replays(driver: str, tmp_path: Path) -> None:
    """After ten kills all candidates are told, and a fresh driver goes through the same events and asks nobody."""
    ledger = killed(driver + STEADY, tmp_path)
    worker = ToyWorker()
    experiment = toy(driver + STEADY, FEW, **SMALL)
    events = conduct(experiment, tmp_path, worker)

    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger
    assert worker.jobs == []
    check_complete(events, experiment.file.budget.candidates)
    # genomes that came out differently would have left a warning
    assert not [event for event in events if line(event).startswith(b'{"event":"warned"')]

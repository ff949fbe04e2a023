"""A run on a disk that fills up: one line, nothing lost, and on it goes when there is room."""

from pathlib import Path

import pytest

from evomerge.errors import LedgerError
from evomerge.ledger import Finished, read, settled
from evomerge.pool import InlinePool
from evomerge.search import Search, prepare
from tests.full import full_beyond
from tests.toy import ToyWorker, toy


def conduct(folder: Path) -> Finished:
    """Run the toy experiment in a folder, or go on with it."""
    experiment = toy()
    with prepare(experiment, folder) as record, InlinePool(ToyWorker) as pool:
        return Search(experiment, record, pool).run()


def test_a_run_whose_disk_fills_up_again_and_again_ends_like_one_with_room(tmp_path: Path) -> None:
    """Wherever it happens: the ledger keeps its whole lines, and grows into that of the run that was never stopped."""
    finished = conduct(tmp_path / "whole")
    whole = tmp_path / "whole/ledger.jsonl"
    ledger = tmp_path / "full/ledger.jsonl"
    size = whole.stat().st_size
    before = b""
    for share in (0.1, 0.11, 0.5, 0.9, 0.999):
        room = max(int(share * size), 4000)  # so that the experiment's own file fits
        with full_beyond(room), pytest.raises(LedgerError, match="free space, then go on with: evomerge resume"):
            conduct(tmp_path / "full")
        now = ledger.read_bytes()
        assert now.startswith(before)
        assert now.endswith(b"\n")
        assert len(now) <= room
        before = now

    assert conduct(tmp_path / "full").front == finished.front
    assert settled(read(ledger)) == settled(read(whole))


def test_a_disk_that_is_full_from_the_start_is_one_line_too(tmp_path: Path) -> None:
    """The first file that does not fit is named; the same command works when there is room."""
    with full_beyond(200), pytest.raises(LedgerError) as caught:
        conduct(tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'run/experiment.yaml'}: cannot be written (File too large); free space, then give the same "
        "command again"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ledger.jsonl"]

    assert conduct(tmp_path / "run").front

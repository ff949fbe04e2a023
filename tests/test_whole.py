"""A small file is whole at any moment: a full disk leaves what was there, and one line."""

from pathlib import Path

import pytest

from evomerge.errors import EvomergeError, LedgerError
from evomerge.whole import write_whole
from tests.full import full_beyond


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    """Nothing else is left in the folder."""
    for text in ("one", "zwei\n", "drüben"):
        write_whole(tmp_path / "a.txt", text, "again")
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """The line names the file, what happened and the way out."""
    file = tmp_path / "a.txt"
    write_whole(file, "old", "again")
    with full_beyond(3), pytest.raises(LedgerError) as caught:
        write_whole(file, "too long", "export again", LedgerError)

    assert str(caught.value) == f"{file}: cannot be written (File too large); free space, then export again"
    assert (file.read_text(encoding="utf-8"), list(tmp_path.iterdir())) == ("old", [file])


def test_another_cause_is_named_too(tmp_path: Path) -> None:
    """A folder that is not there is no full disk."""
    with pytest.raises(EvomergeError, match=r"b/a.txt: cannot be written \(No such file.*; mend that, then try again"):
        write_whole(tmp_path / "b" / "a.txt", "x", "try again")

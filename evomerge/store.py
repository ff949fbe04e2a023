"""A store of responses: what was answered once, by content address, in one file that several runs may share.

A record is a key, 16 bytes that say all on which an answer depends, and one or two numbers; the same key never has two
records, and nothing is ever changed. So the file may be deleted at any time, and is then filled anew.

Several processes may have it open, also on several machines, if the file system locks ranges of bytes for all of them
(`fcntl`): local ones do, and NFS from version 4, CephFS, GPFS, and Lustre mounted with `flock`. Not safe are Lustre
with `localflock`, SMB with `nobrl`, NFS 3 without its lock daemon, sshfs, and buckets mounted as folders. SQLite keeps
its rollback journal, and no write-ahead log, which would need memory that all of them share.
"""

import contextlib
import math
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evomerge.errors import ExperimentError

#: What a record holds: a response and, if it has one, its margin; nothing where the key says it all.
Numbers = tuple[float, ...]

#: What marks a file as a store, and the version of its form.
_MARK, _FORM = 0x65766F6D, 1

#: Seconds to wait for others that write, seconds between two writes of this process, keys looked up at once.
_PATIENCE, _BETWEEN, _AT_ONCE = 30.0, 1.0, 500

#: How many tables a file has.
_TABLES = "select count(*) from sqlite_schema"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Store:
    """A store, opened for reading and adding.

    Records are written at most once a second, so a process that is killed may lose those of its last second; the run's
    own are in its ledger anyway. A store that can no longer be written or read, on a full disk for instance, says so
    once, and takes or gives nothing more: it never ends a run.

    Args:
        path: the file, which is made if it is not there.
        say: called with a warning.

    Raises:
        ExperimentError: if it cannot be opened or is no store, with the way out.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = _say) -> None:
        self._path, self._say = path, say
        self._new: dict[bytes, Numbers] = {}
        self._written = -math.inf
        self._reads = self._writes = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE)
        except (OSError, sqlite3.Error) as problem:
            raise ExperimentError(f"{path}: the store cannot be opened ({problem}); give another `store`") from None
        try:
            self._begin()
        except sqlite3.Error as problem:
            self._file.close()
            way = "delete it, and it is made anew, or give another `store`"
            raise ExperimentError(f"{path}: is no store that can be read ({problem}); {way}") from None
        except ExperimentError:
            self._file.close()
            raise

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Numbers]:
        """Return the records of those keys that have one."""
        found = {key: self._new[key] for key in keys if key in self._new}
        missing = [key for key in keys if key not in found]
        try:
            for start in range(0, len(missing) if self._reads else 0, _AT_ONCE):
                some = missing[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._file.execute(f"select key, body from records where key in ({marks})", some)
                found |= {key: _unpacked(body) for key, body in rows}
        except (sqlite3.Error, struct.error) as problem:
            self._reads = self._writes = False
            self._warn(f"cannot be read ({problem}); the run goes on without it; delete it afterwards")
        return found

    def put(self, records: Mapping[bytes, Numbers]) -> None:
        """Add records; keys that have one keep it.

        Raises:
            ValueError: for a number that is not finite.
        """
        for key, numbers in records.items():
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"a record holds finite numbers, got {numbers}")
            if self._writes:
                self._new.setdefault(key, numbers)
        if time.monotonic() - self._written >= _BETWEEN:
            self.write()

    def write(self) -> None:
        """Write what was added, and wait until it is on the disk."""
        rows = [(key, struct.pack(f"<{len(numbers)}d", *numbers)) for key, numbers in self._new.items()]
        if not rows or not self._writes:
            return
        try:
            self._file.execute("begin immediate")
            try:
                self._file.executemany("insert or ignore into records values (?, ?)", rows)
                self._file.execute("commit")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # some errors have rolled back already
                    self._file.execute("rollback")
                raise
        except sqlite3.Error as problem:
            self._writes = False
            self._warn(f"cannot be written ({problem}); the run goes on without storing")
            return
        self._new.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Write what was added, and release the file; may be called twice."""
        if self._reads or self._writes:
            self.write()
        self._reads = self._writes = False
        self._file.close()

    def _warn(self, text: str) -> None:
        self._say(f"warning: {self._path}: the store {text}")

    def _begin(self) -> None:
        """Make a new file a store, and refuse what is none."""
        self._file.execute("pragma journal_mode = truncate")
        self._file.execute("pragma synchronous = full")
        if not self._number(_TABLES):
            self._make()
        mark, form = self._number("pragma application_id"), self._number("pragma user_version")
        if (mark, form) != (_MARK, _FORM):
            what = f"a store of form {form}, not {_FORM}" if mark == _MARK else "another program's file"
            raise ExperimentError(f"{self._path}: is {what}; give another `store`")

    def _make(self) -> None:
        """Make an empty file a store, unless another process has done so by now."""
        self._file.execute("begin immediate")
        if not self._number(_TABLES):
            self._file.execute("create table records (key blob primary key, body blob not null) strict, without rowid")
            self._file.execute(f"pragma application_id = {_MARK}")
            self._file.execute(f"pragma user_version = {_FORM}")
        self._file.execute("commit")

    def _number(self, query: str) -> int:
        [found] = self._file.execute(query).fetchone()
        return int(found)


def _unpacked(body: bytes) -> Numbers:
    return struct.unpack(f"<{len(body) // 8}d", body)

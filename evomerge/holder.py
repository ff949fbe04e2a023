"""Who holds a run: one process at a time may write its ledger, and a file beside it says which."""

import errno
import fcntl
import os
import platform
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from evomerge.errors import InvalidInput, LedgerError, unwritten
from evomerge.value import canonical, parse, read_yaml, value
from evomerge.whole import write_whole

#: Seconds after which a holder that gave no sign is taken for dead, where the file system has no locks.
STALE = 300.0

#: Seconds between two signs.
_BEAT = 30.0

#: What to do about a note that could not be made.
_AGAIN = "give the same command again"

#: How a lock is refused that another process has.
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@value
class Holder:
    """A process that writes a run: `since` is in seconds since 1970."""

    host: str
    process: int
    since: float

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.process} on {self.host}, since {began:%Y-%m-%d %H:%M:%S} UTC"


def holder_of(ledger: Path) -> Holder | None:
    """Return who holds a ledger, or held it when it died; None if nobody says so."""
    try:
        return parse(Holder, read_yaml(_beside(ledger), "a run's holder", LedgerError), str(ledger), LedgerError)
    except InvalidInput:
        return None  # missing, or just being written


class Hold:
    """A ledger that is held by this process until it is let go, or dies.

    Where the file system has locks (flock), the lock decides, and the operating system ends it with its process; the
    file only says who has it. Where it has none, as on some NFS, the file decides: it is made by one process only, its
    time of change is renewed every half minute and whenever the ledger is forced to disk, and a file that was not
    renewed for `STALE` seconds, by the file system's own clock, is taken over.

    Args:
        ledger: the ledger's path.
        handle: the descriptor of the open ledger.

    Raises:
        LedgerError: if another process holds it, saying who; or if it cannot be noted.
    """

    def __init__(self, ledger: Path, handle: int) -> None:
        self._ledger = ledger
        self._file = _beside(ledger)
        self._own = Holder(host=platform.node(), process=os.getpid(), since=round(time.time(), 6))
        self._done: threading.Event | None = None
        self._seen = time.monotonic()
        try:
            locked = _lock(handle)
        except BlockingIOError:
            raise LedgerError(self._refusal("wait for it, or stop it first")) from None
        if locked:
            write_whole(self._file, self._text, _AGAIN, LedgerError)
            return
        try:
            self._take()
        except OSError as problem:
            raise LedgerError(unwritten(self._file, problem, _AGAIN)) from None

    def renew(self) -> None:
        """Give a sign of life, where the file decides.

        Raises:
            LedgerError: if another process took the run over meanwhile, as this one had given no sign for too long.
        """
        if self._done is None:
            return
        if (other := holder_of(self._ledger)) != self._own:
            self._done.set()
            raise LedgerError(
                f"{self._ledger}: the run was taken over by {other or 'somebody'}, as this process gave no sign of "
                "life for too long; let that one go on"
            )
        self._beat()

    def due(self) -> bool:
        """Tell whether so much time has passed that the run may be somebody else's by now."""
        return self._done is not None and time.monotonic() - self._seen > STALE / 2

    def release(self) -> None:
        """Take back the note; the lock ends when the ledger is closed."""
        if self._done is not None:
            self._done.set()
        if holder_of(self._ledger) == self._own:
            self._file.unlink(missing_ok=True)

    def _take(self) -> None:
        """Make the file, or take over one that was not renewed; then renew it in a thread."""
        if not self._made():
            self._refuse_the_living()
            self._file.unlink(missing_ok=True)
            if not self._made():
                raise LedgerError(self._refusal("wait for it, or stop it first"))
        self._done = threading.Event()
        threading.Thread(target=self._keep, args=(self._done,), name="evomerge holds a run", daemon=True).start()

    def _made(self) -> bool:
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._text)
        return True

    def _refuse_the_living(self) -> None:
        """Refuse if the file was renewed lately."""
        probe = self._file.with_name(f".{self._file.name}.{self._own.process}")
        try:
            probe.write_text(self._text, encoding="utf-8")
            age = probe.stat().st_mtime - self._file.stat().st_mtime  # both by the clock of the file system
        except FileNotFoundError:
            return  # it was released just now
        finally:
            probe.unlink(missing_ok=True)
        if age < STALE:
            raise LedgerError(
                self._refusal(
                    "wait for it, or stop it first; this file system has no locks, and its last sign of life is "
                    f"{max(age, 0):.0f} s old: if it is surely dead, remove {self._file}"
                )
            )

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(_BEAT):
            self._beat()

    def _beat(self) -> None:
        try:
            os.utime(self._file)
        except OSError:
            return  # the next sync says what is wrong
        self._seen = time.monotonic()

    def _refusal(self, out: str) -> str:
        holder = holder_of(self._ledger)
        who = f" ({holder})" if holder else ""
        return f"{self._ledger}: another evomerge is writing this run{who}; {out}"

    @property
    def _text(self) -> str:
        return canonical(self._own) + "\n"


def _beside(ledger: Path) -> Path:
    return ledger.with_name("holder.json")


def _lock(handle: int) -> bool:
    """Lock an open file; False where its file system has no locks.

    Raises:
        BlockingIOError: if another process has locked it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in _TAKEN:
            raise BlockingIOError from None
        return False
    return True

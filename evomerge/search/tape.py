"""The ledger as a run goes along it: what is recorded is taken, and only past its end anything is made and written."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from evomerge.errors import LedgerError
from evomerge.ledger import Answered, Event, Ledger, Warned

#: Called with every event, and whether it was replayed from the ledger.
Watch = Callable[[Event, bool], None]

E = TypeVar("E", bound=Event)


class Tape:
    """A ledger that is replayed to its end and then written on.

    Args:
        record: the open ledger.
        watch: called with every event.
    """

    def __init__(self, record: Ledger, watch: Watch) -> None:
        self._record = record
        self._watch = watch
        self._past = deque(event for event in record.past if not isinstance(event, Warned))
        self._warned = {event.text for event in record.past if isinstance(event, Warned)}
        self._warnings: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether everything that was recorded has been taken."""
        return not self._past

    @property
    def first(self) -> Event | None:
        """The next recorded event, if there is one."""
        return self._past[0] if self._past else None

    def take(self, kind: type[E], make: Callable[[], E], candidate: int | None = None) -> E:
        """Return the ledger's event at this place; past its end, make one and write it.

        Args:
            kind: what the run comes to.
            make: makes the event; not called where the ledger has one.
            candidate: whom the event is about, if about one.

        Raises:
            LedgerError: if the ledger has another event here.
        """
        if not self._past:
            return self.write(make())
        recorded = self._past.popleft()
        number = None if candidate is None else getattr(recorded, "candidate", None)
        if not isinstance(recorded, kind) or number != candidate:
            whom = "" if candidate is None else f" of candidate {candidate}"
            raise LedgerError(
                f"the ledger has {type(recorded).__name__.lower()} where this run comes to "
                f"{kind.__name__.lower()}{whom}; it was written by another version or has been edited: "
                "start the run anew"
            )
        self._watch(recorded, True)
        return recorded

    def answers(self, most: int | None = None) -> Iterator[Answered]:
        """Yield the recorded answers that stand next, up to another event, or so many."""
        while self._past and isinstance(event := self._past[0], Answered) and most != 0:
            self._past.popleft()
            self._watch(event, True)
            most = None if most is None else most - 1
            yield event

    def write(self, event: E) -> E:
        """Append an event."""
        self._flush()
        self._record.append(event)
        self._watch(event, False)
        return event

    def sync(self) -> None:
        """Have on the disk all that was written; until then a power cut may take it, and then it is done again."""
        self._record.sync()

    def warn(self, text: str) -> None:
        """Write a warning, once in a run; while the ledger is replayed it waits for the end."""
        if text not in self._warned:
            self._warned.add(text)
            self._warnings.append(text)
        if not self._past:
            self._flush()

    def _flush(self) -> None:
        waiting, self._warnings = self._warnings, []
        for text in waiting:
            self._record.append(Warned(text=text))
            self._watch(Warned(text=text), False)

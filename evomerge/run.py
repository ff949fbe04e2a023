"""What a ledger says of a run: its candidates, its scores, its front and what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from evomerge.errors import LedgerError
from evomerge.ledger import (
    BASELINES,
    Answered,
    Asked,
    Event,
    Finished,
    Fitted,
    Promoted,
    Rescored,
    Started,
    Told,
    Warned,
    read,
)
from evomerge.objective import Losses, Objective, Score
from evomerge.pareto import extremes, front, hypervolume, knee
from evomerge.spaces.edits import NONE
from evomerge.spaces.proposals import PROBE, WARM

#: What a run asks items for: of everybody at its beginning, of the search's candidates, of some of those the rest, and
#: of the finalists.
STEPS = ("warm-up", "search", "promotion", "validation", "test")


class Run:
    """What a ledger says of a run, kept up to date event by event."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.started: Started | None = None
        self.asked: list[Asked] = []
        self.told: dict[int, Told] = {}
        self.rescored: dict[str, dict[int, Rescored]] = {"validation": {}, "test": {}}
        self.promoted: dict[str, tuple[int, ...]] = {}
        self.errors: dict[int, str] = {}
        self.warnings: list[str] = []
        self.finished: Finished | None = None
        self.seconds = 0.0
        self.fitted: list[Fitted] = []
        self._answered: set[int] = set()
        self._promoting: set[int] = set()
        #: Layer passes of stacks, run and spared, also in tokens; and the most bytes that a worker kept for that.
        self.layers: dict[str, int] = {}
        #: Responses in answers that took no time: of whole jobs that a store knew.
        self.stored = 0
        #: Items asked so far, by step.
        self.items = dict.fromkeys(STEPS, 0)
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case Started():
                self.started = event
            case Asked():
                self.asked.append(event)
            case Answered():
                self._count(event)
            case Fitted():
                self.fitted.append(event)
            case Told():
                self.told[event.candidate] = event
                self._promoting.discard(event.candidate)
            case Promoted(split="search"):
                self._promoting |= set(event.candidates)
            case Promoted():
                self.promoted[event.split] = event.candidates
            case Rescored():
                self.rescored[event.split][event.candidate] = event
            case Warned():
                self.warnings.append(event.text)
            case Finished():
                self.finished = event

    def _count(self, event: Answered) -> None:
        self.seconds += event.seconds
        for name, count in event.layers.items():
            known = self.layers.get(name, 0)
            self.layers[name] = max(known, count) if name == "bytes" else known + count
        if event.error is not None:
            self.errors[event.candidate] = event.error
        step = event.split
        origin = self.asked[event.candidate].origin
        if step == "search" and event.error is None and origin == "search":
            self._answered.add(event.candidate)
        if step == "search" and event.candidate in self._promoting:
            step = "promotion"
        elif step == "search" and origin != "search":
            step = "warm-up"
        count = sum(len(responses) for responses in event.responses.values())
        self.items[step] += count
        self.stored += count if event.seconds == 0.0 and event.error is None else 0

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, in order."""
        return self._begun.objectives

    @property
    def _begun(self) -> Started:
        if self.started is None:
            raise LedgerError("the ledger is empty: the run has not begun; start it with `evomerge run`")
        return self.started

    @property
    def searched(self) -> list[Asked]:
        """The candidates that the driver proposed."""
        return [event for event in self.asked if event.origin == "search"]

    @property
    def scored(self) -> list[Asked]:
        """The candidates whose score on the search split is final; failures are left out."""
        return [event for event in self.asked if (t := self.told.get(event.candidate)) and t.losses is not None]

    @property
    def reference(self) -> Losses:
        """The reference point of the hypervolume."""
        return corner_of(self._begun.reference, list(self.losses(("source",)).values()))

    def losses(self, origins: Iterable[str], split: str = "search") -> dict[int, Losses]:
        """Return the losses of candidates on a split, by number; failures are left out."""
        wanted = set(origins)
        known: Mapping[int, Told | Rescored] = self.told if split == "search" else self.rescored[split]
        return {
            event.candidate: found
            for event in self.asked
            if event.origin in wanted and event.candidate in known
            if (found := known[event.candidate].losses) is not None
        }

    def hypervolume(self, candidates: Iterable[int], split: str = "search") -> float:
        """Return the hypervolume that candidates dominate together, from the run's fixed reference point."""
        known: Mapping[int, Told | Rescored] = self.told if split == "search" else self.rescored[split]
        found = [known[i].losses for i in candidates if i in known and known[i].losses is not None]
        if not found:
            return 0.0
        return float(hypervolume(np.array(found), self.reference))

    def front_so_far(self) -> list[int]:
        """Return the non-dominated candidates by the search split's estimates, baselines left out."""
        found = self.losses((*WARM, PROBE, "warmup", "search"))
        if not found:
            return []
        mask = front(np.array(list(found.values())))
        return [number for number, good in zip(found, mask, strict=True) if good]

    def front(self) -> tuple[int, ...]:
        """Return the final front, by the validation split.

        Raises:
            LedgerError: if the run is not finished.
        """
        if self.finished is None:
            raise LedgerError("the run has no front yet: it is not finished; go on with `evomerge resume`")
        return self.finished.front

    def models(self) -> list[int]:
        """Return the members of the final front that are merges of the search: those worth a file of their own."""
        return [i for i in self.front() if self.asked[i].origin not in BASELINES]

    def select(self, which: str) -> list[int]:
        """Return models of the final front: all, knee, extremes, none, or any candidates by their numbers.

        Raises:
            LedgerError: for anything else, or a number that is no candidate.
        """
        numbers = self.models()
        matrix = np.array([self.rescored["validation"][i].losses for i in numbers], dtype=np.float64)
        if which == "none" or (which in ("all", "knee", "extremes") and not numbers):
            return []
        if which == "all":
            return numbers
        if which == "knee":
            return [numbers[knee(matrix)]]
        if which == "extremes":
            return [numbers[i] for i in sorted({int(i) for i in extremes(matrix)})]
        return list(dict.fromkeys(self._number(text) for text in which.replace(",", " ").split()))

    def _number(self, text: str) -> int:
        if text.isdecimal() and int(text) < len(self.asked):
            return int(text)
        front_numbers = ", ".join(map(str, self.models()))
        raise LedgerError(
            f"--front {text}: give all, knee, extremes, or candidate numbers up to {len(self.asked) - 1} "
            f"(front: {front_numbers})"
        )

    def scores(self, number: int, split: str) -> dict[str, Score]:
        """Return a candidate's scores on a split, by task."""
        known: Mapping[int, Told | Rescored] = self.told if split == "search" else self.rescored[split]
        if number not in known:
            return {}
        pairs = zip(self.objectives, self._begun.reference, strict=True)
        unbounded = {objective.name for objective, corner in pairs if corner is None}
        return {
            task: Score(value=s[0], error=s[1], items=int(s[2]), bounded=task not in unbounded)
            for task, s in known[number].scores.items()
        }

    def name(self, number: int) -> str:
        """Return what reports call a candidate."""
        event = self.asked[number]
        return event.label if event.origin in BASELINES else f"candidate {number}"

    def title(self, number: int) -> str:
        """Return what tables call a candidate: its name and, of a warm start, what it began as."""
        event = self.asked[number]
        return f"{self.name(number)} ({event.label})" if event.origin in WARM else self.name(number)

    def asking_everything(self) -> int:
        """Return the items that scoring every candidate on all search items would have asked."""
        each = sum(self._begun.items["search"].values())
        return each * sum(1 for event in self.asked if event.same_as is None)

    def per_candidate(self) -> tuple[float, float, int]:
        """Return the items asked of a candidate after the warm-up, on average, and all search items.

        Twice: without and with the rest that some were asked by promotion.
        """
        each, count = sum(self._begun.items["search"].values()), max(1, len(self._answered))
        few = self.items["search"]
        return few / count, (few + self.items["promotion"]) / count, each


def gains_of(
    objectives: Sequence[Objective], asked: Iterable[Asked], told: Mapping[int, Told]
) -> dict[str, tuple[float | None, ...]]:
    """Return what layer probes gained: by operation, for each layer, the mean over tasks of what a score changed by.

    The change is that from the stack that was probed, in the direction that the objective wants; None: the probe
    failed. The stack that was probed is a probe without an edit, or else the source with a genome; without it the
    changes are from 0.
    """
    tasks = [objective for objective in objectives if objective.kind == "task"]

    def total(event: Asked) -> float | None:
        found = told[event.candidate].scores if event.candidate in told else {}
        if any(task.name not in found for task in tasks):
            return None
        return -sum(task.loss(found[task.name][0]) for task in tasks) / len(tasks)

    events = list(asked)
    whole = [event for event in events if event.origin == PROBE and event.label.split()[0] == NONE]
    whole += [event for event in events if event.origin == "source" and event.genome is not None]
    start = total(whole[0]) if whole else None
    found: dict[str, list[float | None]] = {}
    for event in events:
        if event.origin == PROBE and event not in whole:
            own = total(event)
            found.setdefault(event.label.split()[0], []).append(None if own is None else own - (start or 0.0))
    return {operation: tuple(gains) for operation, gains in found.items()}


def corner_of(reference: Sequence[float | None], sources: Sequence[Losses]) -> Losses:
    """Return the reference point of a run, with what was not known at its beginning.

    Args:
        reference: as the run began; None for what is the worst loss among the sources.
        sources: the losses of those that were scored. Before any was, that loss is 0.
    """
    worst = [max((own[k] for own in sources), default=0.0) for k in range(len(reference))]
    return tuple(worst[k] if fixed is None else fixed for k, fixed in enumerate(reference))


def open_run(folder: Path) -> Run:
    """Read the ledger of a run's folder.

    Raises:
        LedgerError: if there is none, or it is broken.
    """
    path = folder / "ledger.jsonl"
    if not path.is_file():
        raise LedgerError(f"{folder}: no run lies here (no ledger.jsonl); give a run's folder, like runs/quickstart")
    try:
        run = Run(read(path))
    except (IndexError, KeyError):
        raise LedgerError(f"{path}: an answer of a candidate or split that was never asked; restore the file") from None
    if run.started is None:
        raise LedgerError(f"{path}: the ledger is empty: the run has not begun; start it with `evomerge run`")
    return run

"""Shows a run to people: its state, its front beside the baselines, and its cost, as text tables."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evomerge.ledger import BASELINES, Event
from evomerge.objective import Z95, Objective
from evomerge.pool import Crew, idle_share
from evomerge.run import Run, gains_of

#: What probes of an operation are called.
_PROBES = {"drop": "left out", "repeat": "repeated"}


#: What states of workers are called that do not explain themselves.
_STATES = {"waiting": "waiting for a place", "resting": "given up for a while"}

#: Seconds after which a note about workers is old: a driver writes one every few seconds.
_OLD = 30.0


def render_status(run: Run, crew: Crew | None = None) -> RenderableType:
    """Return a run's state in a few lines.

    Args:
        run: the run.
        crew: what was noted last of its workers.
    """
    state = "finished" if run.finished else ("searching" if run.searched else "warming up")
    if run.promoted and not run.finished:
        state = "re-scoring the finalists"
    found, scored = run.front_so_far(), run.scored
    driven = sum(1 for event in scored if event.origin == "search")
    table = Table.grid(padding=(0, 2))
    rows = {
        "state": state,
        "candidates": f"{len(scored)} scored, of these {driven} by the driver; {len(run.errors)} failed",
        "front so far": f"{len(found)} candidates, hypervolume {run.hypervolume(found):.4f} (estimated)",
        "items asked": f"{sum(run.items.values()):,} ({', '.join(f'{k} {v:,}' for k, v in run.items.items() if v)})",
        "cost": " ".join(_saving(run)),
        "estimator": (run.fitted[-1].reason if run.fitted else "") or "the mean of what was asked",
        "worker time": f"{run.seconds:.0f} s",
        **({"store": _stored(run)[0]} if run.stored else {}),
    }
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    return Group(table, *_crew(run, crew), *_probes(run), *_notes(run))


def _crew(run: Run, crew: Crew | None) -> Sequence[RenderableType]:
    """Return how workers are doing, or were when the driver was seen last; nothing where nobody noted it."""
    if crew is None:
        return []
    ago = max(0.0, time.time() - crew.time)
    line = f"{crew.line}, {crew.failures} failed"
    if crew.ended or run.finished:
        return [Text(f"Workers at the end of the last session: {line}.")]
    if ago > _OLD:
        lost = f"Workers when the driver was seen last, {ago:.0f} s ago (process {crew.pid} on {crew.node}): {line}."
        return [Text(f"{lost} If it is gone: evomerge resume.", style="yellow")]
    table = Table(title=Text(f"Workers: {line}"), title_justify="left", box=box.SIMPLE)
    for head in ("node", "process", "state", "jobs", "failed", "idle"):
        table.add_column(head, justify="left" if head in ("node", "state") else "right")
    for worker in crew.workers:
        idle = idle_share([worker])
        table.add_row(
            Text(worker.node or "…"),
            "…" if worker.pid is None else str(worker.pid),
            Text(_STATES.get(worker.state, worker.state) + (f": {worker.note}" if worker.note else "")),
            str(worker.done),
            str(worker.failures),
            "…" if idle is None else f"{idle:.0%}",
        )
    return [table]


def render_report(run: Run) -> RenderableType:
    """Return the table of the front beside sources and baselines, and what the run cost."""
    if run.finished is None:
        return render_status(run)
    tested = run.rescored["test"]
    members = [i for i in run.front() if i in tested]
    table = Table(title="Scores on the test split, with 95 % intervals", title_justify="left", box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for objective in run.objectives:
        # As Text: a name with square brackets would be taken for markup.
        head = Text(f"{objective.name} {'↑' if objective.direction == 'maximize' else '↓'}")
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("front")
    for number in sorted(tested, key=lambda i: (run.asked[i].origin not in BASELINES, i)):
        first_model = number == next((i for i in sorted(members) if run.asked[i].origin not in BASELINES), None)
        if first_model:
            table.add_section()
        table.add_row(
            Text(run.title(number)),
            *(cell(run, number, objective, "test") for objective in run.objectives),
            "yes" if number in members else "",
        )
    return Group(table, *_probes(run), _volumes(run), _cost(run), *_notes(run))


def cell(run: Run, number: int, objective: Objective, split: str) -> str:
    """Return an objective's value with its 95 % interval, or what there is instead."""
    if objective.kind == "property":
        found = run.rescored[split][number].losses if number in run.rescored[split] else None
        if found is None:
            return "failed"
        return f"{objective.loss(found[run.objectives.index(objective)]):,.0f}"
    score = run.scores(number, split).get(objective.name)
    if score is None:
        return "failed"
    return f"{score.value:.3f} ±{Z95 * score.error:.3f}"


def _volumes(run: Run) -> RenderableType:
    tested = run.rescored["test"]
    groups = {
        "front": [i for i in run.models() if i in tested],
        "sources": [i for i in tested if run.asked[i].origin == "source"],
        "average": [i for i in tested if run.asked[i].origin == "average"],
        "single-lambda task arithmetic": [i for i in tested if run.asked[i].origin == "arithmetic"],
    }
    groups["all baselines together"] = [i for i in tested if run.asked[i].origin in BASELINES]
    table = Table(title="Hypervolume on the test split", title_justify="left", show_header=False, box=box.SIMPLE)
    for name, numbers in groups.items():
        if numbers:
            table.add_row(name, f"{run.hypervolume(numbers, 'test'):.4f}")
    return table


def _probes(run: Run) -> Sequence[RenderableType]:
    """Return the table of what single edits of the stack that a search begins with gained; nothing without probes."""
    gains = gains_of(run.objectives, run.asked, run.told)
    if not gains:
        return []
    table = Table("layer", box=box.SIMPLE)
    for operation in gains:
        table.add_column(_PROBES.get(operation, operation), justify="right")
    for layer, own in enumerate(zip_longest(*gains.values())):
        table.add_row(str(layer), *("failed" if gain is None else f"{gain:+.3f}" for gain in own))
    return [Text("Layer probes: change of the mean score over the tasks", style="italic"), table]


def _cost(run: Run) -> RenderableType:
    failed = f"Candidates failed: {len(run.errors)}. Worker time: {run.seconds:.0f} s."
    return Text("\n".join([*_saving(run), *_sparing(run), *_stored(run), failed]))


def _stored(run: Run) -> list[str]:
    """Return what a store spared the workers, in a line; nothing where it knew no whole job."""
    return [f"Responses that a store had and no worker was asked for: {run.stored:,}."] if run.stored else []


def _sparing(run: Run) -> list[str]:
    """Return what kept hidden states spared a search over stacks, in a line; nothing for any other search."""
    made = run.layers.get("run", 0)
    if not made:
        return []
    shares = (
        run.layers[f"spared{unit}"] / (run.layers[f"spared{unit}"] + run.layers[f"run{unit}"])
        for unit in ("", "_tokens")
    )
    passes, tokens = (f"{share:.0%}" for share in shares)
    return [
        f"Layer passes: {made:,} run, {run.layers['spared']:,} spared by kept hidden states ({passes}, by tokens "
        f"{tokens}); at most {run.layers['bytes'] / 1e6:.1f} MB kept by a worker."
    ]


def _saving(run: Run) -> list[str]:
    """Return what was asked of the whole run and of a candidate, each against asking everything, in a line each."""
    total, everything = sum(run.items.values()), run.asking_everything()
    each, more, all_items = run.per_candidate()
    lines = [f"Items asked: {total:,} in the whole run; scoring every candidate on all search items: {everything:,}"]
    if total:
        lines[0] += f" ({everything / total:.1f} times as many)."
    if each:
        lines.append(
            f"Items asked of a candidate after the warm-up: {each:.0f} of {all_items:,} "
            f"({all_items / each:.1f} times fewer)"
            + (f"; {more:.0f} with those promoted ({all_items / more:.1f} times fewer)." if more > each else ".")
        )
    return lines


def _notes(run: Run) -> Sequence[RenderableType]:
    notes = [f"candidate {number} failed: {error}" for number, error in list(run.errors.items())[-3:]]
    return [Text(line, style="yellow") for line in [*notes, *(f"warning: {text}" for text in run.warnings)]]


class Progress:
    """The live view of a run: what is done, how good it is, how long it will take.

    Args:
        plan: the items that the run will ask at most, step by step.
    """

    def __init__(self, plan: Mapping[str, int], candidates: int) -> None:
        self.run = Run()
        #: Says how the workers are doing, once there are any.
        self.crew: Callable[[], Crew] | None = None
        self._plan = plan
        self._candidates = candidates
        self._begun = time.monotonic()
        self._new = 0
        # The front costs some milliseconds; it is drawn again only when a candidate was told since.
        self._seen, self._front = 0, (0, 0.0)

    def start(self) -> None:
        """Start the clock of this session's rate."""
        self._begun = time.monotonic()

    def add(self, event: Event, replayed: bool) -> None:
        """Take in the next event of the run."""
        before = sum(self.run.items.values())
        self.run.add(event)
        if not replayed:
            self._new += sum(self.run.items.values()) - before

    @property
    def rate(self) -> float:
        """Items per second in this session."""
        return self._new / max(time.monotonic() - self._begun, 1e-9)

    @property
    def step(self) -> str:
        """The step that the run is in."""
        if self.run.promoted:
            return list(self.run.promoted)[-1]
        return "search" if self.run.searched else "warm-up"

    @property
    def left(self) -> float:
        """Seconds that are left at this session's rate, or infinity before there is one."""
        steps = list(self._plan)
        ahead = sum(max(self._plan[s] - self.run.items[s], 0) for s in steps[steps.index(self.step) :])
        return ahead / self.rate if self._new else float("inf")

    def line(self) -> str:
        """Return the view as one line."""
        return ", ".join([f"{self.step}: {self._done()}", *self._facts()])

    def render(self) -> RenderableType:
        """Return the view as a bar with the facts below it."""
        asked, planned = sum(self.run.items.values()), sum(self._plan.values())
        bar = Table.grid(padding=(0, 1))
        bar.add_row(Text(f"{self.step:>10}", style="bold"), ProgressBar(total=planned, completed=asked, width=40))
        return Group(bar, Text(f"{self._done()}, {', '.join(self._facts())}"))

    def _done(self) -> str:
        done = sum(1 for event in self.run.searched if event.candidate in self.run.told)
        return f"{len(self.run.scored)} candidates scored, {done}/{self._candidates} of the driver's done"

    def _facts(self) -> list[str]:
        if len(self.run.told) != self._seen:
            self._seen = len(self.run.told)
            found = self.run.front_so_far()
            self._front = len(found), self.run.hypervolume(found)
        return [
            f"{len(self.run.errors)} failed",
            f"front {self._front[0]}",
            f"estimated hypervolume {self._front[1]:.4f}",
            f"{self.rate:,.0f} items/s",
            f"{self.left:.0f} s left" if self.left < float("inf") else "time left: not yet known",
            *([] if self.crew is None else [self.crew().line]),
        ]

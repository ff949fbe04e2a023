"""The search in steady state on a toy problem: nobody waits, and what was recorded replays."""

import random
from pathlib import Path

import pytest

from evomerge.errors import LedgerError
from evomerge.ledger import Answered, Asked, Event, Finished, Fitted, Promoted, Told, line, read, settled
from evomerge.pool import Answer, Job
from evomerge.run import Run
from tests.test_search import SCHEDULES, SMALL, asked_of, conduct, cut_ledger, no_fsync, of
from tests.toy import TASKS, ShufflingPool, ToyWorker, toy

__all__ = ["no_fsync"]

DRIVERS = ("nsga2 steady", "tpe steady", "random steady")
COURSES = [("nsga2 steady", name) for name in SCHEDULES] + [("tpe steady", "fixed"), ("random steady", "warmup")]


class Stubborn(ShufflingPool):
    """A pool of three workers that answers one candidate's search items only when all others are answered."""

    def __init__(self, number: int) -> None:
        super().__init__(ToyWorker(), 0)
        self._number = number
        self._held: list[Job] = []

    @property
    def room(self) -> int:
        """How many of the workers are free."""
        return max(0, super().room - len(self._held))

    @property
    def pending(self) -> int:
        """How many jobs wait."""
        return super().pending + len(self._held)

    def submit(self, job: Job) -> None:
        """Keep the one candidate's job back."""
        if (job.candidate, job.split) == (self._number, "search"):
            self._held.append(job)
        else:
            super().submit(job)

    def wait(self) -> Answer:
        """Answer another job, as long as there is one."""
        if not super().pending:
            super().submit(self._held.pop())
        return super().wait()


@pytest.mark.parametrize(("driver", "schedule"), COURSES)
def test_one_worker_killed_after_any_event_ends_as_if_it_had_not_been(
    driver: str, schedule: str, tmp_path: Path
) -> None:
    """With one worker even a run in steady state has one order of events, so that a resumed ledger is the same."""
    experiment = toy(driver, SCHEDULES[schedule], **SMALL)
    whole = conduct(experiment, tmp_path / "whole")
    rng = random.Random(driver + schedule)
    for cut in sorted(rng.sample(range(1, len(whole)), 12)):
        folder = tmp_path / f"cut {cut}"
        cut_ledger(tmp_path / "whole/ledger.jsonl", folder / "ledger.jsonl", cut, rng.randrange(40))
        assert settled_but_for_time(conduct(experiment, folder)) == settled_but_for_time(whole), cut


@pytest.mark.parametrize(("driver", "schedule"), COURSES)
def test_with_several_workers_any_cut_goes_on_and_what_comes_of_it_replays(
    driver: str, schedule: str, tmp_path: Path
) -> None:
    """Ten times killed and resumed with answers in other orders: every line stays, and the whole replays unchanged."""
    experiment = toy(driver, SCHEDULES[schedule], **SMALL)
    conduct(experiment, tmp_path / "0", pool=ShufflingPool(ToyWorker(), 0))
    rng = random.Random(schedule + driver)
    for kill in range(1, 11):
        before, folder = tmp_path / str(kill - 1) / "ledger.jsonl", tmp_path / str(kill)
        cut = rng.randrange(1, len(read(before)))
        cut_ledger(before, folder / "ledger.jsonl", cut, rng.randrange(40))
        events = conduct(experiment, folder, pool=ShufflingPool(ToyWorker(), kill))
        assert [line(event) for event in events[:cut]] == before.read_bytes().splitlines(keepends=True)[:cut]
        check_complete(events, experiment.file.budget.candidates)
    last = (folder / "ledger.jsonl").read_bytes()
    worker = ToyWorker()
    conduct(experiment, folder, worker)

    assert worker.jobs == []
    assert (folder / "ledger.jsonl").read_bytes() == last


def test_nobody_waits_for_a_straggler(tmp_path: Path) -> None:
    """While one candidate hangs, all others of the budget are asked and told; then it is told itself."""
    experiment = toy("nsga2 steady", SCHEDULES["fixed"])
    first = Run(conduct(experiment, tmp_path / "plain")).searched[0].candidate
    events = conduct(experiment, tmp_path / "held", pool=Stubborn(first))
    told = [event.candidate for event in of(events, Told) if event.candidate >= first]

    assert told[-1] == first
    assert len(told) == experiment.file.budget.candidates


def test_chapters_are_what_generations_are(tmp_path: Path) -> None:
    """Each has its own items, some of it are promoted to all of them, and these are told again."""
    experiment = toy("nsga2 steady", SCHEDULES["warmup"] | {"every": 1, "elites": 2})
    events = conduct(experiment, tmp_path, pool=ShufflingPool(ToyWorker(), 3))
    fitted, run = of(events, Fitted), Run(events)

    assert [event.step for event in fitted] == [0, 1, 2]
    for event in fitted:
        for number in range(16 + 8 * event.step, 24 + 8 * event.step):
            own = asked_of(events, number)
            if run.asked[number].same_as is None:
                assert all(set(event.items.get(task, ())) <= set(own[task]) for task in TASKS)
    promoted = [event for event in of(events, Promoted) if event.split == "search"][:-1]
    assert len(promoted) == 3
    for event in promoted:
        for number in event.candidates:
            assert {len(set(own)) for own in asked_of(events, number).values()} == {60}
            assert sum(told.candidate == number for told in of(events, Told)) >= 2
    assert isinstance(events[-1], Finished)


def test_failures_do_not_stop_it(tmp_path: Path) -> None:
    """Every third candidate fails; all are told, and the run is finished."""

    def fail(job: Job) -> str | None:
        return "out of luck" if job.candidate % 3 == 2 and job.candidate > 5 else None

    for driver in DRIVERS:
        experiment = toy(driver, SCHEDULES["fixed"])
        events = conduct(experiment, tmp_path / driver, pool=ShufflingPool(ToyWorker(fail), 1))
        run = Run(events)
        check_complete(events, experiment.file.budget.candidates)
        assert all(run.told[i].losses is None for i in run.errors)
        assert len(run.errors) > 4


def test_a_ledger_in_another_order_is_refused(tmp_path: Path) -> None:
    """An answer of a candidate that was not asked yet cannot be part of a run."""
    experiment = toy("nsga2 steady", SCHEDULES["fixed"], **SMALL)
    conduct(experiment, tmp_path / "whole")
    lines = (tmp_path / "whole/ledger.jsonl").read_bytes().splitlines(keepends=True)
    events = read(tmp_path / "whole/ledger.jsonl")
    last = max(k for k, event in enumerate(events) if isinstance(event, Asked))
    answer = next(k for k, event in enumerate(events) if k > last and isinstance(event, Answered))
    (tmp_path / "edited").mkdir()
    edited = [*lines[:last], lines[answer], *lines[last:answer]]
    (tmp_path / "edited/ledger.jsonl").write_bytes(b"".join(edited))

    with pytest.raises(LedgerError, match="was not asked for"):
        conduct(experiment, tmp_path / "edited")


def check_complete(events: list[Event], budget: int) -> None:
    """Check that every candidate of the budget was asked once, and told."""
    run = Run(events)
    assert [event.candidate for event in run.asked] == list(range(len(run.asked)))
    assert len(run.searched) == budget
    assert set(run.told) == set(range(len(run.asked)))
    assert isinstance(events[-1], Finished)


def settled_but_for_time(events: list[Event]) -> list[bytes]:
    """Return the lines of events with no times, in their order."""
    return [line(settled([event])[0]) for event in events]

"""The search loop on a toy problem: what it records and asks, how it resumes, what failures do to it."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from evomerge.drivers import NOTHING, Detail, Driver, Problem, Random
from evomerge.errors import EvomergeError, LedgerError
from evomerge.experiment import Experiment
from evomerge.fitness.estimator import Fit
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Stratified
from evomerge.ledger import (
    Answered,
    Asked,
    Event,
    Finished,
    Fitted,
    Ledger,
    Promoted,
    Rescored,
    Told,
    Warned,
    line,
    read,
    settled,
)
from evomerge.objective import Losses
from evomerge.pareto import dominates, hypervolume
from evomerge.pool import Answer, InlinePool, Job, Pool
from evomerge.run import Run
from evomerge.search import Search, measure_pace, planned, planned_items, prepare, reference
from evomerge.spaces.blend import Range
from evomerge.value import value as frozen
from tests.toy import LENGTH, SIZES, TASKS, WARMUP, ShufflingPool, ToyWorker, difficulty, quality, toy

DRIVERS = ("nsga2", "cma", "tpe", "random")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the wait for the disk, which only a power cut could tell from the real thing."""
    monkeypatch.setattr("evomerge.ledger.os.fsync", lambda handle: None)


def conduct(
    experiment: Experiment, folder: Path, worker: ToyWorker | None = None, pool: Pool | None = None
) -> list[Event]:
    """Run an experiment in a folder and return the events of its ledger."""
    with prepare(experiment, folder) as record, pool or InlinePool(lambda: worker or ToyWorker()) as open_pool:
        Search(experiment, record, open_pool).run()
    return list(read(folder / "ledger.jsonl"))


def cut_ledger(source: Path, target: Path, events: int, extra_bytes: int = 0) -> None:
    """Write the first events of a ledger, and some bytes of the next one: what a kill leaves."""
    lines = source.read_bytes().splitlines(keepends=True)
    torn = lines[events][:-1][:extra_bytes] if events < len(lines) else b""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"".join(lines[:events]) + torn)


def of(events: Sequence[Event], kind: type[Any]) -> list[Any]:
    """Return the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


#: The schedules, small: few items, and every kind of step.
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed": {"name": "fixed", "items": 12},
    "warmup": WARMUP,
    "race": {"name": "race", "first": 4, "alpha": 0.5},
}


def large(experiment: Experiment) -> Experiment:
    """Return the experiment with many search items."""
    return replace(experiment, tasks={name: task.cut({"search": 400}) for name, task in experiment.tasks.items()})


def asked_of(events: Sequence[Event], number: int, split: str = "search") -> dict[str, list[int]]:
    """Return what a candidate was asked of a split, in order, by task."""
    found: dict[str, list[int]] = {task: [] for task in TASKS}
    for event in of(events, Answered):
        if event.candidate == number and event.split == split:
            for task in event.responses:
                found[task] += event.items.get(task, range(SIZES[split]))
    return found


def test_a_run_goes_through_all_its_steps(tmp_path: Path) -> None:
    """Baselines and warm-up are asked everything, the search few items, some the rest, finalists held-out ones."""
    events = conduct(toy(), tmp_path)
    run = Run(events)

    origins = [event.origin for event in run.asked]
    assert origins == ["source"] * 3 + ["average"] + ["arithmetic"] * 2 + ["warmup"] * 10 + ["search"] * 24
    for number in range(16):
        assert asked_of(events, number) == {task: list(range(60)) for task in TASKS}
    assert [event.split for event in of(events, Promoted)] == ["search", "search", "validation", "test"]
    assert [event.step for event in of(events, Fitted)] == [0, 1, 2]
    assert isinstance(events[-1], Finished)


def test_a_generation_shares_its_items(tmp_path: Path) -> None:
    """Its candidates are asked what was chosen for it, so are its elites, and the next one is asked others."""
    events = conduct(toy(), tmp_path)
    fitted = of(events, Fitted)

    for event in fitted:
        assert sum(map(len, event.items.values())) == 2 * 8
        for number in range(16 + 8 * event.step, 24 + 8 * event.step):
            own = asked_of(events, number)
            assert all(own[task][: len(event.items.get(task, ()))] == list(event.items.get(task, ())) for task in TASKS)
        for number in event.again:
            own = asked_of(events, number)
            assert all(set(own[task]) >= set(event.items.get(task, ())) for task in TASKS)
    assert fitted[0].again == ()
    assert len({number for event in fitted for number in event.again}) >= 2
    assert len({str(event.items) for event in fitted}) == 3


def test_nobody_is_asked_an_item_twice(tmp_path: Path) -> None:
    """However often a candidate is asked, its questions are new; who was promoted has answered them all."""
    for name, schedule in SCHEDULES.items():
        events = conduct(toy(schedule=schedule, budget={"candidates": 16}), tmp_path / name)
        for event in of(events, Asked):
            for split in SIZES:
                for places in asked_of(events, event.candidate, split).values():
                    assert len(set(places)) == len(places)
        for event in of(events, Promoted):
            for number in event.candidates:
                assert {len(own) for own in asked_of(events, number, event.split).values()} == {SIZES[event.split]}


def test_a_warm_up_asks_what_its_settings_add_up_to(tmp_path: Path) -> None:
    """(6 + 10) x 120 items, 24 x 16, floor(3 / 2) x (1 + 2) + 3 times the 104 that are left, as was planned."""
    schedule = WARMUP | {"promote": 1, "honest": 2, "elites": 0, "final": 3}
    experiment = toy(schedule=schedule)
    run = Run(conduct(experiment, tmp_path))

    assert run.items["warm-up"] == 16 * 120
    assert run.items["search"] == 24 * 16
    assert run.items["promotion"] == (1 * (1 + 2) + 3) * (120 - 16)
    assert run.per_candidate() == (16.0, 16.0 + 6 * 104 / 24, 120)


def test_the_best_are_compared_at_the_end_on_items_that_no_fit_has_chosen(tmp_path: Path) -> None:
    """Six answer the same 20 items a task, are told the means of those, and finalists come from them alone."""
    schedule = WARMUP | {"promote": 0, "honest": 0, "elites": 0, "final": 1, "closing": 6, "closing_items": 20}
    experiment = toy(schedule=schedule, finalists=3)
    events = conduct(experiment, tmp_path)
    closing, finalists = of(events, Promoted)[-3:-1]

    assert (closing.split, len(closing.candidates)) == ("search", 6)
    assert {task: len(set(places)) for task, places in closing.items.items()} == dict.fromkeys(TASKS, 20)
    assert {i for i in finalists.candidates if of(events, Asked)[i].origin == "search"} <= set(closing.candidates)
    last = {event.candidate: event for event in of(events, Told)}
    for number in closing.candidates:
        given: dict[str, dict[int, float]] = {task: {} for task in TASKS}
        for answer in of(events, Answered):
            if answer.candidate == number and answer.split == "search":
                for task, responses in answer.responses.items():
                    places = answer.items.get(task, range(SIZES["search"]))
                    given[task] |= dict(zip(places, responses, strict=True))
        for task in TASKS:
            full = len(given[task]) == SIZES["search"]
            counted = list(given[task].values()) if full else [given[task][i] for i in closing.items[task]]
            assert last[number].scores[task][0] == pytest.approx(np.mean(counted))
    most = 1 * (120 - 16) + 6 * 2 * 20
    assert Run(events).items["promotion"] <= most <= planned_items(experiment)["promotion"] < most + 1 + 6


def test_promoted_candidates_are_the_best_by_estimate_and_one_by_chance(tmp_path: Path) -> None:
    """The one chosen dominates the most volume of the generation by what was thought of it; scores are then exact."""
    experiment = toy("random", schedule=WARMUP | {"elites": 0, "every": 1, "final": 0})
    events = conduct(experiment, tmp_path)
    run = Run(events)
    promoted = [event for event in of(events, Promoted) if event.split == "search"]

    assert len(promoted) == 4
    for step, event in enumerate(promoted):
        batch = range(16 + 6 * step, 22 + 6 * step)
        assert len(event.candidates) == 2
        assert set(event.candidates) <= set(batch)
        for number, thought in zip(event.candidates, event.estimates, strict=True):
            genome = run.asked[number].genome
            assert genome is not None
            recipe = experiment.space.decode(genome)
            for task in TASKS:
                right = [quality(recipe, task) > difficulty(task, "search", i) for i in range(60)]
                assert run.told[number].scores[task][0] == pytest.approx(np.mean(right))
                assert abs(thought[task][0] - np.mean(right)) < 0.3
                assert thought[task][1] > 0


def test_the_unpromoted_are_scored_with_what_promotion_taught(tmp_path: Path) -> None:
    """Scores of few items are near the truth, have an error, and say on how many items they rest."""
    auto = {"name": "auto", "rows": 12}
    experiment = large(toy("random", WARMUP | {"every": 2, "items": 30}, auto, budget={"candidates": 12}))
    run = Run(conduct(experiment, tmp_path))
    off = []
    for event in run.searched:
        assert event.genome is not None
        recipe = experiment.space.decode(event.genome)
        for task in TASKS:
            value, error, items = run.told[event.candidate].scores[task]
            truth = np.mean([quality(recipe, task) > difficulty(task, "search", i) for i in range(400)])
            off.append((value - truth) / error)
            assert 0 < error < 0.3
            assert items >= 5
    assert np.mean(np.abs(off) < 2.5) > 0.9


def test_a_race_asks_fewer_items_and_finds_as_good_a_front(tmp_path: Path) -> None:
    """The dominated stop on the way, the front has answered everything, and its volume is that of asking all."""
    settings: dict[str, Any] = {"budget": {"candidates": 48}}
    races = large(toy("random", {"name": "race", "first": 10}, **settings))
    events = conduct(races, tmp_path / "race")
    run = Run(events)
    whole = Run(conduct(large(toy("random", {"name": "fixed"}, **settings)), tmp_path / "all"))

    assert run.items["search"] < 0.8 * whole.items["search"]
    assert all(run.told[i].scores["left"][2] == 400 for i in run.front_so_far() if run.asked[i].origin == "search")
    volumes = [found.hypervolume(found.models(), "test") for found in (run, whole)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.05)


def test_a_task_without_bounds_is_estimated_by_its_mean(tmp_path: Path) -> None:
    """Its score is the mean of its own items, in its unit, and its reference point the worst of the sources."""
    experiment = toy(tasks=(*TASKS, LENGTH))
    events = conduct(experiment, tmp_path)
    run = Run(events)
    sources = [run.told[i].scores[LENGTH][0] for i in range(3)]

    assert reference(experiment) == (0.0, 0.0, None)
    assert run.reference == (0.0, 0.0, max(sources))
    for event in run.searched:
        rows = [e for e in of(events, Answered) if e.candidate == event.candidate and e.split == "search"]
        found = [amount for row in rows for amount in row.responses.get(LENGTH, ())]
        told = run.told[event.candidate]
        assert told.losses is not None
        assert told.losses[2] == pytest.approx(np.mean(found))
        assert told.scores[LENGTH][1] > 0


def test_margins_are_taken_where_there_are_any(tmp_path: Path) -> None:
    """They stand in the ledger with the answers, and a run with them goes through all its steps."""
    events = conduct(toy(), tmp_path, ToyWorker(margins=True))

    assert all(set(event.margins) == set(event.responses) for event in of(events, Answered))
    assert isinstance(events[-1], Finished)


def test_scores_of_full_answers_are_the_fraction_of_items_below_the_ability(tmp_path: Path) -> None:
    """What is told of a fully asked candidate is the mean that the toy's formula gives."""
    experiment = toy()
    run = Run(conduct(experiment, tmp_path))

    for event in run.asked[6:16]:
        assert event.genome is not None
        recipe = experiment.space.decode(event.genome)
        for task in TASKS:
            right = [quality(recipe, task) > difficulty(task, "search", i) for i in range(SIZES["search"])]
            assert run.told[event.candidate].scores[task][0] == pytest.approx(np.mean(right))


def test_the_front_is_not_dominated_on_the_validation_split(tmp_path: Path) -> None:
    """No member of the front is dominated by anything that was validated, and what is left out is."""
    run = Run(conduct(toy(), tmp_path))
    validated = {i: event.losses for i, event in run.rescored["validation"].items()}
    front = set(run.front())

    for number, losses in validated.items():
        beaten = any(dominates(other, losses) for other in validated.values())
        assert (number in front) == (not beaten)


def test_the_search_beats_its_baselines(tmp_path: Path) -> None:
    """On the test split the front's hypervolume is greater than that of all baselines together."""
    run = Run(conduct(toy(), tmp_path))

    tested = run.rescored["test"]
    rivals = [i for i in tested if run.asked[i].origin in ("source", "average", "arithmetic")]
    assert run.hypervolume(run.models(), "test") > run.hypervolume(rivals, "test")


#: The smallest run that has every step, and more than one generation.
SMALL: dict[str, Any] = {"budget": {"candidates": 14}, "finalists": 2, "baselines": {"lambdas": [0.3]}}
#: Each driver under a schedule, and each schedule under a driver that may revise.
COURSES = [
    ("nsga2", "warmup"),
    ("nsga2", "race"),
    ("nsga2", "fixed"),
    ("cma", "warmup"),
    ("tpe", "race"),
    ("random", "warmup"),
]


def course(driver: str, schedule: str) -> Experiment:
    """Return the smallest experiment that has every step of the schedule."""
    more = {"random": 4, "items": 4, "elites": 2, "closing": 5, "closing_items": 9} if schedule == "warmup" else {}
    auto = {"name": "auto", "rows": 9}
    return toy(driver, SCHEDULES[schedule] | more, auto if (driver, schedule) == ("nsga2", "warmup") else None, **SMALL)


def kept(events: Sequence[Event]) -> set[str]:
    """Return what was answered, as text that tells one question from another."""
    return {f"{e.candidate} {e.split} {sorted(e.items.items())}" for e in of(events, Answered)}


@pytest.mark.parametrize(("driver", "schedule"), COURSES)
def test_a_run_killed_after_any_event_ends_as_the_uninterrupted_one(driver: str, schedule: str, tmp_path: Path) -> None:
    """Cut anywhere, with or without a torn line, the ledger grows to the same, and nothing is asked twice."""
    experiment = course(driver, schedule)
    whole = conduct(experiment, tmp_path / "whole")
    rng = random.Random(driver + schedule)

    for cut in sorted(rng.sample(range(len(whole)), 9)):
        folder = tmp_path / f"cut{cut}"
        cut_ledger(tmp_path / "whole/ledger.jsonl", folder / "ledger.jsonl", cut, rng.choice([0, 1, 40, 2000]))
        worker = ToyWorker()

        resumed = conduct(experiment, folder, worker)

        assert settled(resumed) == settled(whole)
        assert len(worker.jobs) == len(of(whole, Answered)) - len(of(whole[:cut], Answered))
        assert len(kept(resumed)) == len(of(resumed, Answered))


@pytest.mark.parametrize(("driver", "schedule"), COURSES)
def test_the_order_in_which_answers_arrive_changes_nothing(driver: str, schedule: str, tmp_path: Path) -> None:
    """Three workers that answer out of order leave the ledger of one, but for the order of answers."""
    experiment = course(driver, schedule)
    whole = conduct(experiment, tmp_path / "one")

    for seed in range(2):
        shuffled = conduct(experiment, tmp_path / str(seed), pool=ShufflingPool(ToyWorker(), seed))
        assert settled(shuffled) == settled(whole)
        assert [line(event) for event in shuffled] != [line(event) for event in whole]


FITS: list[int] = []


@frozen
class Counting:
    """Settings of an estimator that counts how often it is fitted."""

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Count, and fit another one."""
        FITS.append(len(responses.values_MN))
        return Stratified().fit(responses, seed)


def test_a_replay_fits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All decisions of a run that is finished come from its ledger; half of one is fitted from its middle on."""
    monkeypatch.setattr("evomerge.experiment.resolving.plain_estimator", lambda estimator: "counting")
    experiment = replace(toy(schedule=WARMUP | {"every": 1}), estimator=Counting())
    whole = conduct(experiment, tmp_path / "whole")
    needed = len(FITS)
    FITS.clear()
    conduct(experiment, tmp_path / "whole")
    assert not FITS

    middle = next(i for i, event in enumerate(whole) if isinstance(event, Fitted) and event.step == 2)
    cut_ledger(tmp_path / "whole/ledger.jsonl", tmp_path / "half/ledger.jsonl", middle)
    conduct(experiment, tmp_path / "half")
    assert 0 < len(FITS) < needed


def test_elites_are_told_again_and_drivers_learn_of_it(tmp_path: Path) -> None:
    """Who is asked again has a second score that rests on more items, and the driver is told that one."""
    LEARNED.clear()
    experiment = replace(toy(schedule=WARMUP | {"promote": 0, "honest": 0}), driver=Listening())
    events = conduct(experiment, tmp_path)
    again = [number for event in of(events, Fitted) for number in event.again]
    told: dict[int, list[Told]] = {}
    for event in of(events, Told):
        told.setdefault(event.candidate, []).append(event)

    assert again
    second = [told[number][1 + again[:i].count(number)].losses for i, number in enumerate(again)]
    assert [(number - 16, losses) for number, losses in zip(again, second, strict=True)] == LEARNED
    for number in again:
        sums = [sum(items for _, _, items in event.scores.values()) for event in told[number]]
        assert sums == sorted(set(sums))


LEARNED: list[tuple[int, Losses | None]] = []


@frozen
class Listening:
    """Settings of a random driver that notes what is revised."""

    steady: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    def generation(self, axes: int) -> int:
        """Return six."""
        return 6

    def start(self, problem: Problem) -> Driver:
        """Return a driver whose `revise` is noted."""
        driver = Random(batch=6).start(problem)
        revise = driver.revise

        def noted(index: int, losses: Losses | None, detail: Detail = NOTHING) -> None:
            LEARNED.append((index, losses))
            revise(index, losses, detail)

        driver.revise = noted  # type: ignore[method-assign]  # a listener
        return driver


def test_other_seeds_search_elsewhere(tmp_path: Path) -> None:
    """The seed decides the genomes."""
    genomes = [[event.genome for event in of(conduct(toy(seed=s), tmp_path / str(s)), Asked)] for s in (1, 2)]

    assert genomes[0] != genomes[1]


def test_failed_candidates_are_recorded_with_their_reason(tmp_path: Path) -> None:
    """A third of the candidates fail; each is told as failed, the run completes, none of them is in the front."""

    def fail(job: Job) -> str | None:
        return "OutOfMemoryError: too big" if job.candidate % 3 == 2 else None

    run = Run(conduct(toy(), tmp_path, ToyWorker(fail)))

    assert run.finished is not None
    failed = {i for i, told in run.told.items() if told.losses is None}
    assert failed == {i for i in range(40) if i % 3 == 2 and run.asked[i].same_as is None}
    assert set(run.errors.values()) == {"OutOfMemoryError: too big"}
    assert failed.isdisjoint(run.front())


def test_who_fails_when_promoted_has_failed(tmp_path: Path) -> None:
    """What could not answer the rest of the items is told as failed, is fitted to nobody, and the run goes on."""

    def fail(job: Job) -> str | None:
        return "no" if job.candidate >= 16 and sum(map(len, job.items.values())) > 60 else None

    events = conduct(toy(schedule=WARMUP | {"every": 1}), tmp_path, ToyWorker(fail))
    run = Run(events)
    promoted = {i for event in of(events, Promoted) if event.split == "search" for i in event.candidates}

    assert len(promoted) >= 6
    assert all(run.told[i].losses is None for i in promoted)
    assert {event.rows for event in of(events, Fitted)} == {16}
    assert promoted.isdisjoint(run.promoted["validation"])
    assert run.finished is not None


def test_an_elite_that_fails_when_asked_again_is_dropped(tmp_path: Path) -> None:
    """It is told once more, as failed, and neither promoted nor a finalist."""
    seen: set[int] = set()

    def fail(job: Job) -> str | None:
        again = job.split == "search" and job.candidate in seen and job.candidate >= 16
        seen.add(job.candidate)
        return "no" if again else None

    events = conduct(toy(schedule=WARMUP | {"promote": 0, "honest": 0, "final": 0}), tmp_path, ToyWorker(fail))
    run = Run(events)
    dropped = {number for event in of(events, Fitted) for number in event.again}

    assert dropped
    assert all(run.told[number].losses is None for number in dropped)
    assert dropped.isdisjoint(run.promoted["validation"])


def test_a_warm_up_that_fails_in_part_is_fitted_to_the_rest(tmp_path: Path) -> None:
    """A source and random genomes that fail are no rows; the search goes on with the others."""

    def fail(job: Job) -> str | None:
        return "no" if job.candidate in (1, 7, 8, 9) else None

    for name, schedule in SCHEDULES.items():
        run = Run(conduct(toy(schedule=schedule), tmp_path / name, ToyWorker(fail)))
        assert run.finished is not None
        assert all(event.rows == 0 or 1 not in run.front() for event in run.fitted)


def test_a_generation_that_fails_as_a_whole_does_not_end_the_search(tmp_path: Path) -> None:
    """Eight candidates in a row fail and the search still spends its budget."""

    def fail(job: Job) -> str | None:
        return "no" if 16 <= job.candidate < 24 else None

    for driver, schedule in COURSES:
        experiment = toy(driver, SCHEDULES[schedule])
        run = Run(conduct(experiment, tmp_path / f"{driver} {schedule}", ToyWorker(fail)))
        assert len(run.searched) == 24
        assert run.finished is not None


def test_a_candidate_that_fails_only_on_held_out_items_is_not_in_the_front(tmp_path: Path) -> None:
    """A failure while re-scoring is recorded, and the candidate is dropped."""
    reference_front = Run(conduct(toy(), tmp_path / "good")).models()

    def fail(job: Job) -> str | None:
        return "no" if job.split == "validation" and job.candidate == reference_front[0] else None

    run = Run(conduct(toy(), tmp_path / "bad", ToyWorker(fail)))

    assert reference_front[0] not in run.front()
    assert run.finished is not None


def test_when_nothing_can_be_scored_the_first_reason_is_said(tmp_path: Path) -> None:
    """A worker that never answers ends the run with one line that has the reason."""
    with pytest.raises(EvomergeError, match=r"not even the sources.*CUDA is gone"):
        conduct(toy(), tmp_path, ToyWorker(lambda job: "CUDA is gone"))


def test_equal_recipes_are_evaluated_once(tmp_path: Path) -> None:
    """A recipe that came before is told its score at once; no worker sees it."""
    experiment = toy("random", budget={"candidates": 3})
    worker = ToyWorker()
    events = conduct(experiment, tmp_path / "first", worker)
    asked = of(events, Asked)
    # Between two neighbouring numbers there are 16 genomes, so a warm-up of ten draws some twice.
    point = replace(experiment.space, weight=Range(low=0.5, high=math.nextafter(0.5, 1.0)))
    same = replace(experiment, space=point)
    again = of(conduct(same, tmp_path / "second", worker := ToyWorker()), Asked)

    assert len({event.recipe for event in asked}) == len(asked)
    twins = [event for event in again if event.same_as is not None]
    assert twins
    assert {again[event.same_as].recipe for event in twins} == {event.recipe for event in twins}
    built = {job.candidate for job in worker.jobs if job.split == "search"}
    assert built == {event.candidate for event in again if event.same_as is None}
    assert len(built) == len({event.recipe for event in again})


@pytest.mark.parametrize("estimator", ["mean", "stratified", "auto"])
def test_a_fixed_schedule_needs_no_warm_up(estimator: str, tmp_path: Path) -> None:
    """Every candidate is asked the same random subset, and nobody more."""
    run = Run(events := conduct(toy(schedule=SCHEDULES["fixed"], estimator={"name": estimator}), tmp_path))

    assert {event.origin for event in run.asked} == {"source", "average", "arithmetic", "search"}
    items = [tuple(event.items["left"]) for event in of(events, Answered) if event.split == "search"]
    assert len(set(items)) == 1
    assert len(set(items[0])) == 12


def test_planned_items_are_an_upper_bound(tmp_path: Path) -> None:
    """No step asks more items than was said before the run."""
    for driver, name in [*COURSES, ("nsga2", "all")]:
        experiment = toy(driver, SCHEDULES.get(name, {"name": "fixed"}))
        run = Run(conduct(experiment, tmp_path / f"{driver} {name}"))
        asked, planned = dict(run.items), planned_items(experiment)
        assert list(asked) == list(planned)
        assert all(asked[step] <= planned[step] for step in planned)


def test_the_planned_items_hold_when_every_baseline_reaches_the_test(tmp_path: Path) -> None:
    """Lambdas that are in the front (here they are equal on all items) are tested too, and the bound said so."""
    experiment = toy(baselines={"lambdas": [0.4998, 0.4999, 0.5, 0.5001]}, finalists=1)
    run = Run(conduct(experiment, tmp_path))

    assert sum(1 for i in run.rescored["test"] if run.asked[i].origin == "arithmetic") == 4
    assert run.items["test"] <= planned_items(experiment)["test"]


class Timed(ToyWorker):
    """A worker whose answers say that they took so many seconds each, and so many per item."""

    def __init__(self, candidate: float, item: float) -> None:
        super().__init__()
        self.candidate, self.item = candidate, item

    def answer(self, job: Job) -> Answer:
        """Answer, and say how long it took."""
        items = sum(len(places) for places in job.items.values())
        return replace(super().answer(job), seconds=self.candidate + items * self.item)


@pytest.mark.parametrize(("candidate", "item"), [(0.02, 0.0005), (0.0, 0.003), (0.5, 0.1), (20.0, 3.0)])
def test_the_pace_is_that_of_the_worker(candidate: float, item: float) -> None:
    """Seconds per candidate and per item are found; a slow worker is asked few items, and its start weighs on them."""
    worker = Timed(candidate, item)
    with InlinePool(lambda: worker) as pool:
        pace = measure_pace(toy(), pool, workers=1)

    asked = sum(len(places) for job in worker.jobs for places in job.items.values())
    few = 2 * 4  # tasks x items of the first question
    if candidate + few * item > 1:  # a single point gives no line: all is taken to be the items'
        assert (pace.candidate, pace.item) == pytest.approx((0.0, candidate / few + item))
        assert asked == 3 * few
    else:
        assert (pace.candidate, pace.item) == pytest.approx((candidate, item))
    total = sum(c * (pace.candidate + n * pace.item) for c, n in planned(toy()).values())
    assert pace.seconds(toy(), dict.fromkeys(planned(toy()), 0)) == pytest.approx(total)
    assert pace.seconds(toy(), planned_items(toy())) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "begun with seed 3, not 4"),
        ({"budget": {"candidates": 30}}, "belongs to another experiment"),
        ({"finalists": 5}, "belongs to another experiment"),
    ],
)
def test_a_ledger_of_another_experiment_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Seed and settings that decide the course of a run must be those of its ledger."""
    conduct(toy(), tmp_path)

    with pytest.raises(LedgerError, match=message):
        conduct(toy(**change), tmp_path)


def test_a_ledger_of_other_versions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is not continued by libraries that may draw other numbers."""
    conduct(toy(), tmp_path)
    monkeypatch.setattr("evomerge.search.beginning.version", lambda name: "0.0")

    with pytest.raises(LedgerError, match=r"other versions.*install those"):
        conduct(toy(), tmp_path)


def test_a_genome_from_another_processor_is_taken_from_the_ledger_with_a_warning(tmp_path: Path) -> None:
    """A recorded genome that differs in its last bit from the one asked for again wins, and a warning is recorded."""
    experiment = toy("random")
    events = conduct(experiment, tmp_path / "a")
    number = 20
    genome = list(of(events, Asked)[number].genome)
    genome[0] = float(np.nextafter(genome[0], 1.0))
    recipe = experiment.space.decode(tuple(genome)).digest
    lines = []
    for event in events[: next(i for i, e in enumerate(events) if isinstance(e, Told) and e.candidate == number)]:
        form = event
        if isinstance(event, Asked) and event.candidate == number:
            form = replace(event, genome=tuple(genome), recipe=recipe)
        lines.append(line(form))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/ledger.jsonl").write_bytes(b"".join(lines))

    resumed = conduct(experiment, tmp_path / "b")

    assert of(resumed, Asked)[number].genome == tuple(genome)
    assert [event.text for event in of(resumed, Warned)] == [
        "candidate 20 was proposed differently than in the ledger; the ledger's genome is used"
    ]
    assert conduct(experiment, tmp_path / "b") == resumed


def test_an_edited_ledger_is_refused(tmp_path: Path) -> None:
    """A ledger without one of its events does not replay, and says where."""
    events = conduct(toy(), tmp_path / "a")
    told = next(i for i, event in enumerate(events) if isinstance(event, Told) and event.candidate == 7)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/ledger.jsonl").write_bytes(b"".join(line(e) for i, e in enumerate(events) if i != told))

    with pytest.raises(LedgerError, match="told where this run comes to told of candidate 7"):
        conduct(toy(), tmp_path / "b")


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    """The ledger is locked while it is open."""
    with Ledger(tmp_path / "ledger.jsonl"), pytest.raises(LedgerError, match="another evomerge is writing"):
        Ledger(tmp_path / "ledger.jsonl")


def test_the_reference_point_is_zero_for_scores(tmp_path: Path) -> None:
    """The hypervolume of one candidate is the product of its scores."""
    run = Run(conduct(toy(), tmp_path))
    number = run.models()[0]
    values = [score.value for score in run.scores(number, "test").values()]

    assert reference(toy()) == (0.0, 0.0)
    assert run.hypervolume([number], "test") == pytest.approx(np.prod(values))
    assert hypervolume([[-value for value in values]], (0.0, 0.0)) == pytest.approx(np.prod(values))


def test_every_rescored_candidate_has_scores_with_errors(tmp_path: Path) -> None:
    """Value, standard error and number of items of every held-out score are there, and no error is zero."""
    events = conduct(toy(), tmp_path)

    for event in of(events, Rescored):
        for value, error, items in event.scores.values():
            assert 0 <= value <= 1
            assert 0 < error < 0.2
            assert items == SIZES[event.split]


SEEN: list[Problem] = []


@frozen
class Spy:
    """Settings of a driver that lets one see what problem it was given; no field, for all fields are its identity."""

    steady: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    def generation(self, axes: int) -> int:
        """Return any size."""
        return axes

    def start(self, problem: Problem) -> Driver:
        """Note the problem and search at random."""
        SEEN.append(problem)
        return Random(batch=6).start(problem)


def test_the_driver_starts_from_all_that_is_known(tmp_path: Path) -> None:
    """Baselines and warm-up come to the driver with their genomes and losses, in order; also after a resume."""
    SEEN.clear()
    experiment = replace(toy(), driver=Spy())
    run = Run(conduct(experiment, tmp_path))
    conduct(experiment, tmp_path)

    first = [event for event in run.asked if event.origin != "search" and event.genome is not None]
    expected = [(event.genome, run.told[event.candidate].losses) for event in first]
    assert [list(problem.known) for problem in SEEN] == [expected, expected]
    assert {event.origin for event in first} == {"source", "average", "arithmetic", "warmup"}


def test_finalists_are_the_searchs_own_and_nobody_is_asked_twice(tmp_path: Path) -> None:
    """Validation is asked of every baseline and of as many others as the experiment says, once each."""
    few = Run(conduct(toy(), tmp_path / "few")).promoted["validation"]
    everyone = Run(conduct(toy(finalists=100), tmp_path / "all")).promoted["validation"]

    assert len(set(few)) == len(few) == 6 + 4
    assert set(few) >= set(range(6))
    assert sorted(everyone) == list(range(6 + 10 + 24))


def test_the_identity_counts_what_decides_and_nothing_else() -> None:
    """Batch, device and threads may change the last bits of answers; who else works, and time limits, may not."""
    identity = toy().identity

    assert toy(workers={"time_limit": 5.0}, ray={"actors": 3}).identity == identity
    assert toy(export={"front": "knee"}).identity == identity
    others: list[dict[str, Any]] = [
        {"workers": {"batch": 3}},
        {"workers": {"device": "cuda"}},
        {"workers": {"threads": 2}},
        {"seed": 4},
        {"finalists": 5},
        {"baselines": {"lambdas": [0.2]}},
        {"schedule": {"name": "race"}},
        {"schedule": WARMUP | {"items": 9}},
        {"estimator": {"name": "mean"}},
        {"estimator": {"name": "stratified", "unanimous": 0.5}},
        {"gates": {"finite": False}},
        {"tasks": (*TASKS, LENGTH)},
    ]
    assert len({toy(**change).identity for change in others} | {identity}) == len(others) + 1

"""The search loop on a toy problem: what it records, how it resumes, what failures do to it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.drivers import Driver, Problem, Random
from evomerge.errors import EvomergeError, LedgerError
from evomerge.experiment import Experiment
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
from evomerge.pareto import dominates, hypervolume
from evomerge.pool import Answer, InlinePool, Job, Pool
from evomerge.run import Run
from evomerge.search import Search, measure_pace, planned, planned_items, prepare, reference
from evomerge.spaces.blend import Range
from evomerge.value import value as frozen
from tests.toy import SIZES, TASKS, ShufflingPool, ToyWorker, difficulty, quality, toy

DRIVERS = ("nsga2", "cma", "tpe", "random")


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


def test_a_run_goes_through_all_its_steps(tmp_path: Path) -> None:
    """Baselines and warm-up are asked everything, the search few items, finalists held-out ones, the front the test."""
    events = conduct(toy(), tmp_path)
    run = Run(events)

    origins = [event.origin for event in run.asked]
    assert origins == ["source"] * 3 + ["average"] + ["arithmetic"] * 2 + ["warmup"] * 10 + ["search"] * 24
    for answer in of(events, Answered):
        sizes = {task: len(responses) for task, responses in answer.responses.items()}
        searched = answer.split == "search" and run.asked[answer.candidate].origin == "search"
        assert sizes == dict.fromkeys(TASKS, 8 if searched else SIZES[answer.split])
    assert [event.split for event in of(events, Promoted)] == ["validation", "test"]
    assert isinstance(events[-1], Finished)
    assert len(of(events, Fitted)) == 1


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


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the wait for the disk, which only a power cut could tell from the real thing."""
    monkeypatch.setattr("evomerge.ledger.os.fsync", lambda handle: None)


#: The smallest run that has every step, and more than one generation.
SMALL: dict[str, Any] = {"budget": {"candidates": 14}, "finalists": 2, "baselines": {"lambdas": [0.3]}}
ESTIMATORS = {"nsga2": {"name": "p_irt", "anchors": 4, "warmup": 4}}


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_run_killed_after_any_event_ends_as_the_uninterrupted_one(driver: str, tmp_path: Path) -> None:
    """Cut anywhere, with or without a torn line, the ledger grows to the same, and nothing is asked twice."""
    experiment = toy(driver, ESTIMATORS.get(driver, {"name": "mean"}), **SMALL)
    whole = conduct(experiment, tmp_path / "whole")
    rng = random.Random(driver)

    for cut in sorted(rng.sample(range(len(whole)), 25)):
        folder = tmp_path / f"cut{cut}"
        cut_ledger(tmp_path / "whole/ledger.jsonl", folder / "ledger.jsonl", cut, rng.choice([0, 1, 40, 2000]))
        worker = ToyWorker()

        resumed = conduct(experiment, folder, worker)

        assert settled(resumed) == settled(whole)
        answered = {(event.candidate, event.split) for event in of(whole[:cut], Answered)}
        assert answered.isdisjoint((job.candidate, job.split) for job in worker.jobs)
        assert len(worker.jobs) == len(of(whole, Answered)) - len(answered)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_order_in_which_answers_arrive_changes_nothing(driver: str, tmp_path: Path) -> None:
    """Three workers that answer out of order leave the ledger of one, but for the order of answers."""
    experiment = toy(driver, ESTIMATORS.get(driver, {"name": "mean"}), **SMALL)
    whole = conduct(experiment, tmp_path / "one")

    for seed in range(2):
        shuffled = conduct(experiment, tmp_path / str(seed), pool=ShufflingPool(ToyWorker(), seed))
        assert settled(shuffled) == settled(whole)
        assert [line(event) for event in shuffled] != [line(event) for event in whole]


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


def test_a_generation_that_fails_as_a_whole_does_not_end_the_search(tmp_path: Path) -> None:
    """Eight candidates in a row fail and the search still spends its budget."""

    def fail(job: Job) -> str | None:
        return "no" if 16 <= job.candidate < 24 else None

    for driver in DRIVERS:
        run = Run(conduct(toy(driver), tmp_path / driver, ToyWorker(fail)))
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
    # A space of a single point proposes the same recipe for ever.
    point = replace(experiment.space, weight=Range(low=0.5, high=0.5))
    same = replace(experiment, space=point)
    again = of(conduct(same, tmp_path / "second", worker := ToyWorker()), Asked)

    assert len({event.recipe for event in asked}) == len(asked)
    twins = [event for event in again if event.same_as is not None]
    assert twins
    assert {again[event.same_as].recipe for event in twins} == {event.recipe for event in twins}
    assert len([job for job in worker.jobs if job.split == "search"]) == len({event.recipe for event in again})


def test_the_mean_estimator_needs_no_warm_up(tmp_path: Path) -> None:
    """With `mean` every candidate is asked the same random subset."""
    run = Run(events := conduct(toy(estimator={"name": "mean", "items": 12}), tmp_path))

    assert {event.origin for event in run.asked} == {"source", "average", "arithmetic", "search"}
    items = [tuple(event.items["left"]) for event in of(events, Answered) if event.split == "search"]
    assert len(set(items)) == 1
    assert len(set(items[0])) == 12


def test_planned_items_are_an_upper_bound(tmp_path: Path) -> None:
    """No step asks more items than was said before the run."""
    for estimator in ({"name": "mean"}, {"name": "p_irt", "anchors": 8, "warmup": 10}):
        experiment = toy(estimator=estimator)
        run = Run(conduct(experiment, tmp_path / str(estimator["name"])))
        asked, planned = dict(run.items), planned_items(experiment)
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
    few = of(conduct(toy(), tmp_path / "few"), Promoted)[0].candidates
    everyone = of(conduct(toy(finalists=100), tmp_path / "all"), Promoted)[0].candidates

    assert len(set(few)) == len(few) == 6 + 4
    assert set(few) >= set(range(6))
    assert sorted(everyone) == list(range(6 + 10 + 24))


def test_the_identity_counts_what_decides_and_nothing_else() -> None:
    """Batch, device and threads may change the last bits of answers; count, pool and time limit may not."""
    identity = toy().identity

    assert toy(workers={"count": 3, "pool": "ray", "time_limit": 5.0}).identity == identity
    assert toy(export={"front": "knee"}).identity == identity
    others: list[dict[str, Any]] = [
        {"workers": {"batch": 3}},
        {"workers": {"device": "cuda"}},
        {"workers": {"threads": 2}},
        {"seed": 4},
        {"finalists": 5},
        {"baselines": {"lambdas": [0.2]}},
    ]
    assert len({toy(**change).identity for change in others} | {identity}) == len(others) + 1

"""Runs and their reports: against a ledger made by hand, whose numbers are worked out on paper, and a toy run."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from moocore import hypervolume as moocore_hypervolume
from rich.console import Console

from evomerge.errors import LedgerError
from evomerge.ledger import (
    Answered,
    Asked,
    Finished,
    Fitted,
    Ledger,
    Promoted,
    Rescored,
    Started,
    Told,
    Warned,
    line,
)
from evomerge.objective import Objective, Score
from evomerge.pool import InlinePool
from evomerge.report import Progress, render_report, render_status
from evomerge.run import Run, corner_of, open_run
from evomerge.search import Search, planned_items, prepare
from tests.toy import SIZES, ToyWorker, toy

STARTED = Started(
    identity="x",
    seed=1,
    objectives=(Objective(name="left"), Objective(name="right")),
    reference=(0.0, 0.0),
    items={"search": {"left": 10, "right": 10}, "validation": {"left": 5, "right": 5}, "test": {"left": 4, "right": 4}},
    versions={},
)
FITTED = Fitted(
    step=0, items={"left": (0, 1, 2, 3)}, again=(), spread={"left": 1.2}, inflation=1.0, rows=7, reason="as it must"
)
ORIGINS = ["source"] * 3 + ["average", "arithmetic"] + ["warmup"] * 2 + ["search"] * 6
LABELS = ["base", "a[b]", "b", "average", "lambda 0.3", "warm-up 0", "warm-up 1"] + [""] * 6
#: Scores on the search split; 10 is 7 again, 11 fails, 12 fails only when re-scored.
SCORES = {
    **dict(enumerate([(0.1, 0.1), (0.7, 0.1), (0.1, 0.7), (0.4, 0.4), (0.5, 0.4), (0.2, 0.2), (0.85, 0.05)])),
    **dict(zip([7, 8, 9, 10, 12], [(0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.2), (0.4, 0.4)], strict=True)),
}
VALIDATION = {**SCORES, 7: (0.8, 0.3), 8: (0.7, 0.7), 9: (0.3, 0.8)}
TEST = {0: (0.0, 0.25), 1: (0.75, 0.25), 2: (0.25, 0.75), 3: (0.5, 0.5), 4: (0.5, 0.25),
        7: (0.8, 0.2), 8: (0.5, 0.5), 9: (0.2, 0.8)}  # fmt: skip
FRONT = (7, 8, 9)


def asked(number):
    """Return what the ledger says of a candidate."""
    same = 7 if number == 10 else None
    genome = None if number < 5 else (number / 20,)
    return Asked(
        candidate=number, origin=ORIGINS[number], label=LABELS[number], genome=genome, recipe=str(same or number),
        same_as=same,
    )  # fmt: skip


def answered(number, split, items, error=None):
    """Return an answer with so many items a task, that took two seconds."""
    rows = {} if error else dict.fromkeys(("left", "right"), (1.0,) * items)
    places = {task: tuple(range(items)) for task in rows}
    return Answered(candidate=number, split=split, items=places, responses=rows, margins={}, error=error, seconds=2.0)


def scores(pair, items):
    """Return what the ledger says of scores, with an error of 0.08 each."""
    if pair is None:
        return {"losses": None, "scores": {}}
    left, right = ((value, 0.08, float(items)) for value in pair)
    return {"losses": (-pair[0], -pair[1]), "scores": {"left": left, "right": right}}


def searching():
    """Return the events up to the end of the search."""
    events = [STARTED]
    for number in range(13):
        if number == 7:
            events.append(FITTED)
        events.append(asked(number))
        items = 10 if number < 7 else 4
        if number != 10:
            events.append(answered(number, "search", items, "ValueError: no" if number == 11 else None))
        events.append(Told(candidate=number, **scores(SCORES.get(number), items)))
    return events


def whole():
    """Return all events of the run."""
    events = [*searching(), Promoted(split="validation", candidates=(*range(5), 7, 8, 9, 12))]
    for number in (*range(5), 7, 8, 9):
        events += [answered(number, "validation", 5),
                   Rescored(candidate=number, split="validation", **scores(VALIDATION[number], 5))]  # fmt: skip
    events += [answered(12, "validation", 5, "OSError: gone"),
               Rescored(candidate=12, split="validation", **scores(None, 5))]  # fmt: skip
    events.append(Promoted(split="test", candidates=tuple(TEST)))
    for number, pair in TEST.items():
        events += [answered(number, "test", 4), Rescored(candidate=number, split="test", **scores(pair, 4))]
    return [*events, Warned(text="look [here]"), Finished(front=FRONT, time=9.0)]


def shown(renderable):
    """Return what a wide terminal would show."""
    console = Console(file=io.StringIO(), width=240)
    console.print(renderable)
    return console.file.getvalue()


def row(text, name):
    """Return the cells of the table row that begins with a name."""
    for printed in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"[│┃]|\s{2,}", printed) if cell.strip()]
        if cells and cells[0] == name:
            return cells[1:]
    raise AssertionError(f"no row {name!r} in\n{text}")


@pytest.fixture(scope="module")
def done():
    """Return the run of the whole ledger."""
    return Run(whole())


def test_a_run_knows_its_candidates(done):
    """Who was asked, scored, failed and why, what was warned of and how long it took."""
    assert [event.candidate for event in done.searched] == list(range(7, 13))
    assert [event.candidate for event in done.scored] == [*range(11), 12]
    assert done.errors == {11: "ValueError: no", 12: "OSError: gone"}
    assert done.warnings == ["look [here]"]
    assert done.promoted["test"] == tuple(TEST)
    assert done.fitted == [FITTED]
    assert done.seconds == 2.0 * (12 + 9 + 8)
    assert done.objectives == STARTED.objectives


def test_names_are_those_of_reports(done):
    """Baselines by their label, the others by their number."""
    assert [done.name(i) for i in (1, 3, 4, 5, 8)] == ["a[b]", "average", "lambda 0.3", "candidate 5", "candidate 8"]


def test_losses_are_chosen_by_origin_and_split(done):
    """Failures are left out, and each split has its own."""
    assert done.losses(["search"]) == {i: tuple(-x for x in SCORES[i]) for i in (7, 8, 9, 10, 12)}
    assert done.losses(["search"], "test") == {i: tuple(-x for x in TEST[i]) for i in (7, 8, 9)}
    assert done.losses(("source", "average"), "validation").keys() == {0, 1, 2, 3}
    assert done.losses(()) == {}


def test_hypervolume_is_the_area_of_the_staircase(done):
    """0.8 x 0.2 + 0.5 x 0.3 + 0.2 x 0.3 = 0.37; failures and strangers add nothing."""
    assert done.hypervolume([7, 8, 9]) == pytest.approx(0.37)
    assert done.hypervolume([7, 8, 9, 10, 11, 99]) == pytest.approx(0.37)
    assert done.hypervolume([8], "validation") == pytest.approx(0.49)
    assert done.hypervolume([11]) == 0.0
    assert done.hypervolume([], "test") == 0.0


def test_the_front_so_far_leaves_baselines_out(done):
    """Warm-up and search, by the search split; equal candidates are all in it."""
    assert done.front_so_far() == [6, 7, 8, 9, 10]
    assert Run([STARTED]).front_so_far() == []
    assert Run(searching()[:2]).front_so_far() == []


def test_models_of_the_front_can_be_chosen(done):
    """All, the one in the bend, the best of each objective, none, or any numbers, each once."""
    assert done.front() == FRONT
    assert done.select("all") == [7, 8, 9]
    assert done.select("knee") == [8]
    assert done.select("extremes") == [7, 9]
    assert done.select("none") == []
    assert done.select("9, 7 9") == [9, 7]
    assert done.select("0") == [0]


def test_baselines_in_the_front_are_no_models():
    """A source may be in the front, but there is nothing to export of it."""
    events = [*whole()[:-1], Finished(front=(0, 7))]

    assert Run(events).models() == [7]
    assert Run(events).select("extremes") == [7]
    only = Run([*whole()[:-1], Finished(front=(0,))])
    assert [only.select(which) for which in ("all", "knee", "extremes")] == [[], [], []]


@pytest.mark.parametrize("which", ["13", "-1", "best", "7 x", "1.0", "²"])
def test_what_names_no_candidate_is_refused(which, done):
    """The choices and the front are named."""
    with pytest.raises(LedgerError, match=r"give all, knee, extremes, or .* up to 12 \(front: 7, 8, 9\)"):
        done.select(which)


def test_an_unfinished_run_has_no_front():
    """The way out is to go on."""
    run = Run(whole()[:-1])

    for use in (run.front, run.models, lambda: run.select("all")):
        with pytest.raises(LedgerError, match="not finished; go on with `evomerge resume`"):
            use()


def test_items_are_counted_step_by_step(done):
    """Seven candidates were asked 20 items, four 8; nine candidates 10 less the failure, eight 8."""
    assert done.items == {"warm-up": 140, "search": 32, "promotion": 0, "validation": 80, "test": 64}


def test_the_saving_is_counted_over_those_who_answered(done):
    """Twelve different recipes on 20 items; of the search's, four answered 8 each, whatever became of them later."""
    assert done.asking_everything() == 12 * 20
    assert done.per_candidate() == (8.0, 8.0, 20)
    assert Run([STARTED]).per_candidate() == (0.0, 0.0, 20)


def promoting():
    """Return the events up to the end of a search in which 8 and 9 were asked the other 6 items of each task."""
    events = [*searching(), Promoted(split="search", candidates=(8, 9))]
    rest = dict.fromkeys(("left", "right"), (4, 5, 6, 7, 8, 9))
    events += [replace(answered(number, "search", 6), items=rest) for number in (8, 9)]
    return [*events, Told(candidate=8, **scores((0.6, 0.5), 10)), Told(candidate=9, **scores(None, 10))]


def test_promotions_are_counted_apart():
    """Twelve items each of two: 8 a candidate without them, 8 + 24 / 4 with them; what was told last counts."""
    run = Run(promoting())

    assert run.items == {"warm-up": 140, "search": 32, "promotion": 24, "validation": 0, "test": 0}
    assert run.per_candidate() == (8.0, 14.0, 20)
    assert run.losses(["search"])[8] == (-0.6, -0.5)
    assert 9 not in run.front_so_far()
    assert not run.promoted
    text = shown(render_status(run))
    assert "196 (warm-up 140, search 32, promotion 24)" in text
    assert "a candidate after the warm-up: 8 of 20 (2.5 times fewer); 14 with those promoted (1.4 times fewer)" in text
    assert re.search(r"estimator +as it must", text)
    assert re.search(r"state +searching", text)


def test_the_reference_of_a_score_without_bounds_is_the_worst_source():
    """What is known at the beginning stays; the rest is the greatest loss among the sources, failures left out."""
    assert corner_of((0.0, None), [(-0.5, 3.0), (-0.2, 7.0)]) == (0.0, 7.0)
    assert corner_of((None,), []) == (0.0,)
    run = Run([replace(STARTED, reference=(None, 0.0)), *searching()[1:]])
    assert run.reference == (-0.1, 0.0)
    assert run.hypervolume([7]) == pytest.approx(0.7 * 0.2)


def test_scores_have_their_error_and_items(done):
    """As they were told, or re-scored; of a failure, or before, there are none."""
    assert done.scores(8, "search") == {task: Score(value=0.5, error=0.08, items=4) for task in ("left", "right")}
    assert done.scores(8, "validation")["left"] == Score(value=0.7, error=0.08, items=5)
    assert done.scores(11, "search") == done.scores(5, "test") == {}


def test_a_score_without_bounds_is_known_by_its_reference():
    """That of the ledger is not known at the beginning then."""
    found = Run([replace(STARTED, reference=(None, 0.0)), *searching()[1:]]).scores(7, "search")
    assert {task: score.bounded for task, score in found.items()} == {"left": False, "right": True}


def test_a_run_is_read_from_its_folder(tmp_path):
    """The events of the file make the run; a torn tail does not matter."""
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(map(line, whole())) + b"{")

    assert vars(open_run(tmp_path)) == vars(Run(whole()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no run lies here \(no ledger.jsonl\); give a run's folder"),
        (b"", "the ledger is empty: the run has not begun; start it with `evomerge run`"),
        (b"{}\n", "unknown event"),
        (line(STARTED) + line(answered(0, "search", 1)), "an answer of a candidate or split that was never asked"),
        (line(STARTED) + line(asked(0)) + line(answered(0, "train", 1)), "an answer of a candidate or split"),
    ],
)
def test_what_is_no_run_is_refused(content, message, tmp_path):
    """The folder or the file is named."""
    if content is not None:
        (tmp_path / "ledger.jsonl").write_bytes(content)

    with pytest.raises(LedgerError, match=message) as caught:
        open_run(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_before_its_first_event_a_run_has_no_objectives():
    """Whoever asks is told how to start."""
    with pytest.raises(LedgerError, match="start it with `evomerge run`"):
        _ = Run().objectives


def test_the_report_compares_the_front_with_every_baseline(done):
    """Baselines first, then the front, each with its test scores and 1.96 x 0.08 around them."""
    text = shown(render_report(done))

    assert row(text, "model") == ["left ↑", "right ↑", "front"]
    assert row(text, "candidate 7") == ["0.800 ±0.157", "0.200 ±0.157", "yes"]
    assert row(text, "a[b]") == ["0.750 ±0.157", "0.250 ±0.157"]
    order = [done.name(i) for i in TEST]
    assert sorted(order, key=lambda name: re.search(rf"[│ ] {re.escape(name)}\s", text).start()) == order
    assert "candidate 12 " not in text.split("Hypervolume")[0]


def test_the_report_gives_the_hypervolume_of_each_group(done):
    """Worked out on paper: 0.8 x 0.2 + 0.5 x 0.3 + 0.2 x 0.3, and so on."""
    text = shown(render_report(done)).split("Hypervolume on the test split")[1]

    assert row(text, "front") == ["0.3700"]
    assert row(text, "sources") == ["0.3125"]  # 0.75 x 0.25 + 0.25 x 0.5
    assert row(text, "average") == ["0.2500"]
    assert row(text, "single-lambda task arithmetic") == ["0.1250"]
    assert row(text, "all baselines together") == ["0.3750"]  # 0.75 x 0.25 + 0.5 x 0.25 + 0.25 x 0.25


def test_the_report_gives_the_cost(done):
    """Items in all, what asking everything would have been, and how many fewer a candidate was asked."""
    text = shown(render_report(done))

    assert "Items asked: 316 in the whole run; scoring every candidate on all search items: 240 (0.8 times" in text
    assert "Items asked of a candidate after the warm-up: 8 of 20 (2.5 times fewer)." in text
    assert "Candidates failed: 2. Worker time: 58 s." in text
    assert "candidate 11 failed: ValueError: no" in text
    assert "warning: look [here]" in text


def test_properties_are_shown_as_they_are():
    """Parameters to minimise: the number with its thousands, no interval, and what failed says so."""
    size = Objective(name="parameters", kind="property", direction="minimize")
    depth = Objective(name="depth[x]", kind="property")
    events = [
        replace(STARTED, objectives=(size, depth), reference=(2e6, 0.0)),
        asked(0),
        asked(1),
        Rescored(candidate=0, split="test", losses=(1234567.0, -12.0), scores={}),
        Rescored(candidate=1, split="test", losses=None, scores={}),
        Finished(front=(0,)),
    ]
    text = shown(render_report(Run(events)))

    assert row(text, "model") == ["parameters ↓", "depth[x] ↑", "front"]
    assert row(text, "base") == ["1,234,567", "12", "yes"]
    assert row(text, "a[b]") == ["failed", "failed"]


def test_a_failed_test_is_shown_as_failed():
    """A baseline without test scores keeps its row."""
    events = [e for e in whole() if not (isinstance(e, Rescored) and e.split == "test" and e.candidate == 0)]
    events.insert(-1, Rescored(candidate=0, split="test", **scores(None, 4)))

    assert row(shown(render_report(Run(events))), "base") == ["failed", "failed"]


def test_the_status_says_where_a_run_is():
    """Its state follows from its events, and an unfinished run's report is its status."""
    events = whole()
    first = next(i for i, event in enumerate(events) if isinstance(event, Promoted))
    states = {
        "warming up": events[:10],
        "searching": events[:first],
        "re-scoring the finalists": events[: first + 3],
        "finished": events,
    }
    for state, some in states.items():
        assert re.search(rf"state +{state}\b", shown(render_status(Run(some))))

    text = shown(render_status(Run(events[:first])))
    assert "12 scored, of these 5 by the driver; 1 failed" in text
    assert "5 candidates, hypervolume 0.3725 (estimated)" in text  # 0.37 and 0.05 x 0.05
    assert "172 (warm-up 140, search 32)" in text
    assert re.search(r"worker time +24 s", text)
    assert shown(render_report(Run(events[:first]))) == text


def test_a_candidate_that_is_asked_is_not_yet_scored():
    """What is still with a worker is not counted as done."""
    text = shown(render_status(Run([STARTED, asked(7), asked(8), Told(candidate=7, **scores(SCORES[7], 4))])))

    assert "1 scored, of these 1 by the driver" in text


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def monotonic(self):
        """Return the seconds that the test says."""
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Let the test say what time it is."""
    clock = Clock()
    monkeypatch.setattr("evomerge.report.time", clock)
    return clock


PLAN = {"warm-up": 140, "search": 48, "promotion": 0, "validation": 100, "test": 64}


def feed(progress, events, replayed=False):
    """Give events to the view."""
    for event in events:
        progress.add(event, replayed)


def test_time_left_is_items_left_over_items_a_second(clock):
    """40 of 140 were replayed, 60 took 3 s: 40 + 48 + 100 + 64 items are left at 20 a second."""
    progress, events = Progress(PLAN, 6), searching()
    asks = [event for event in events if isinstance(event, Asked)]
    answers = [event for event in events if isinstance(event, Answered)]
    feed(progress, [STARTED, *asks[:7], *answers[:2]], replayed=True)
    clock.now = 200.0
    progress.start()
    assert progress.left == float("inf")
    assert "time left: not yet known" in progress.line()

    feed(progress, answers[2:5])
    clock.now = 203.0

    assert progress.step == "warm-up"
    assert progress.rate == pytest.approx(20.0)
    assert progress.left == pytest.approx((140 - 100 + 48 + 100 + 64) / 20)
    assert "20 items/s, 13 s left" in progress.line()


def test_time_left_counts_the_steps_ahead_only(clock):
    """What a step did not need of its plan is not waited for once the next one has begun."""
    progress = Progress(PLAN, 6)
    events = whole()
    progress.start()
    first, second = (i for i, event in enumerate(events) if isinstance(event, Promoted))
    feed(progress, events[:first])
    clock.now += 17.2
    assert progress.step == "search"
    assert progress.left == pytest.approx((48 - 32 + 100 + 64) / 10)

    feed(progress, events[first:second])
    clock.now += 8.0
    assert progress.step == "validation"
    assert progress.left == pytest.approx((100 - 80 + 64) / 10)

    feed(progress, events[second:])
    clock.now += 6.4
    assert progress.step == "test"
    assert progress.left == 0.0


def test_promotions_that_are_ahead_are_waited_for(clock):
    """They belong to the search, so that what was planned of them and not asked is left."""
    progress = Progress(PLAN | {"promotion": 100}, 6)
    progress.start()
    feed(progress, promoting())
    clock.now += 19.6

    assert progress.step == "search"
    assert progress.left == pytest.approx((48 - 32 + 100 - 24 + 100 + 64) / 10)


def test_a_step_that_asked_more_than_planned_has_nothing_left(clock):
    """The plan never makes time left negative."""
    progress = Progress(PLAN | {"search": 10}, 6)
    progress.start()
    feed(progress, searching())
    clock.now += 17.2

    assert progress.left == pytest.approx(164 / 10)


def test_the_line_says_what_is_done(clock):
    """Candidates, failures, front, hypervolume, speed and time, in one line."""
    progress = Progress(PLAN, 6)
    progress.start()
    feed(progress, searching())
    clock.now += 17.2

    assert progress.line() == (
        "search: 12 candidates scored, 6/6 of the driver's done, 1 failed, front 5, estimated hypervolume 0.3725, "
        "10 items/s, 18 s left"
    )


@pytest.fixture(scope="module")
def conducted(tmp_path_factory):
    """Return the folder and the experiment of a toy run."""
    folder, experiment = tmp_path_factory.mktemp("toy"), toy("random", budget={"candidates": 8})
    with prepare(experiment, folder) as record, InlinePool(lambda: ToyWorker()) as pool:
        Search(experiment, record, pool).run()
    return folder, experiment


def test_a_real_ledger_gives_the_numbers_of_another_library(conducted):
    """The hypervolume of the front is moocore's, and items are what the answers hold."""
    folder, _ = conducted
    run = open_run(folder)
    with Ledger(folder / "ledger.jsonl") as book:
        answers = [event for event in book.past if isinstance(event, Answered)]
    losses = np.array([run.rescored["test"][i].losses for i in run.front()])

    assert run.hypervolume(run.front(), "test") == pytest.approx(moocore_hypervolume(losses, ref=[0.0, 0.0]))
    assert sum(run.items.values()) == sum(len(row) for event in answers for row in event.responses.values())
    assert run.per_candidate()[2] == 2 * SIZES["search"]
    assert run.asking_everything() == 2 * SIZES["search"] * len({event.recipe for event in run.asked})
    assert set(run.select("extremes")) | set(run.select("knee")) <= set(run.select("all"))


def test_the_view_of_a_real_ledger_ends_with_nothing_left_to_plan(conducted, clock):
    """Replayed as a whole, a run has every step of its plan, and its report renders."""
    folder, experiment = conducted
    progress = Progress(planned_items(experiment), 8)
    run = open_run(folder)
    with Ledger(folder / "ledger.jsonl") as book:
        feed(progress, book.past, replayed=True)

    assert progress.step == "test"
    assert progress.left == float("inf")
    assert vars(progress.run) == vars(run)
    assert "all baselines together" in shown(render_report(run))

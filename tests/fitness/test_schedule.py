"""Schedules: who is asked what, when an answer is complete, and how seldom a race stops the wrong ones."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evomerge.errors import ExperimentError
from evomerge.fitness.race import Climb, Rival, balanced, doubt, prefixes
from evomerge.fitness.schedule import SCHEDULES, Given, Items, Race, Schedule, Shared, Warmup

FEW = {"left": (2, 5), "right": (0, 1)}


def answer(items: Items, values: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Return what a candidate gives to items, by the values of all of them."""
    return {task: {place: float(values[task][place]) for place in places} for task, places in items.items()}


def climb_up(schedule: Schedule, values: dict[str, Any], candidate: int = 0) -> list[Items]:
    """Return what a candidate with these responses is asked, question by question."""
    asked: list[Items] = []
    found: dict[str, dict[int, float]] = {task: {} for task in values}
    while (items := schedule.next(candidate, found)) is not None:
        asked.append(items)
        for task, own in answer(items, values).items():
            assert not own.keys() & found[task].keys()
            found[task].update(own)
    return asked


def race(order: Items, rivals: list[Rival], alpha: float = 0.1, first: int = 16, **properties: Any) -> Climb:
    """Return a race in which responses are gains."""
    sizes = {task: len(places) for task, places in order.items()}
    return Climb(
        order=order,
        prefixes=prefixes(sizes, first, 2.0),
        signs=dict.fromkeys(order, -1.0),
        rivals=tuple(rivals),
        alpha=alpha,
        properties=lambda number: properties.get("properties", {}).get(number, ()),
    )


def test_everybody_is_asked_the_same_items_once() -> None:
    """Whatever the candidate, it is asked these items, only those that it has not answered, and then nothing."""
    schedule = Shared(items=FEW)

    assert [schedule.next(candidate, {}) for candidate in (0, 7)] == [FEW, FEW]
    assert schedule.next(0, {"left": {5: 1.0}, "right": {0: 0.0, 1: 1.0}}) == {"left": (2,)}
    assert schedule.next(0, answer(FEW, {"left": [0] * 6, "right": [1, 1]})) is None


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("fixed", {"items": 0}, "'items' must be at least 1, got 0"),
        ("warmup", {"items": 1}, "'items' must be at least 2"),
        ("warmup", {"every": 0}, "'every' must be at least 1"),
        ("warmup", {"elites": -1}, "'elites' must be at least 0"),
        ("warmup", {"weight": 1.0}, "'weight' must lie between 0 and 1, got 1.0"),
        ("race", {"eta": 1.0}, "'eta' must be at least 1.1"),
        ("race", {"alpha": 0.0}, "'alpha' must lie between 0 and 1"),
        ("race", {"rivals": 0}, "'rivals' must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    """The setting and its bound are named."""
    with pytest.raises(ExperimentError, match=message):
        SCHEDULES[name](**given)


def test_one_generation_in_so_many_promotes() -> None:
    """Of G generations, floor(G / every) promote, the last of each such group; none if nobody is to be."""
    for every in (1, 2, 5):
        assert sum(Warmup(every=every).promotes(step) for step in range(23)) == 23 // every
    assert not any(Warmup(promote=0, honest=0).promotes(step) for step in range(9))
    assert [Warmup(every=3).promotes(step) for step in range(3)] == [False, False, True]


def test_a_line_says_what_each_schedule_asks() -> None:
    """With its own numbers."""
    assert "24 random genomes" in Warmup().headline
    assert "16 items a task" in Race().headline
    assert SCHEDULES["fixed"]().headline.startswith("all items")


def test_prefixes_grow_by_their_factor_up_to_all() -> None:
    """16, 32, 64 and then all 100; a smaller task is asked all of its items earlier."""
    found = prefixes({"a": 100, "b": 20}, first=16, eta=2.0)

    assert [step["a"] for step in found] == [16, 32, 64, 100]
    assert [step["b"] for step in found] == [16, 20, 20, 20]
    assert [step["a"] for step in prefixes({"a": 9}, first=16, eta=2.0)] == [9]
    assert [step["a"] for step in prefixes({"a": 6}, first=2, eta=1.1)] == [2, 3, 4, 5, 6]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_beginning_of_an_order_is_balanced(strata: list[int], seed: int) -> None:
    """All places come once, and the first n hold of each stratum its share of n, give or take one and a bit."""
    order = balanced(strata, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(strata)))
    kinds, sizes = np.unique(strata, return_counts=True)
    for n in range(1, len(order) + 1):
        seen = np.array([sum(strata[i] == kind for i in order[:n]) for kind in kinds])
        # counts are within 1 of m t for one t, so that n is within the number of strata of N t
        assert (np.abs(seen - sizes * n / len(order)) <= 1 + len(kinds) * sizes / len(order) + 1e-9).all()


def test_other_seeds_give_other_orders() -> None:
    """The order is a function of the seed."""
    orders = {balanced([0] * 30, np.random.default_rng(seed)) for seed in (0, 0, 1)}
    assert len(orders) == 2


@pytest.mark.parametrize(("better", "worse", "equal"), [(0, 5, 3), (2, 9, 0), (7, 7, 10), (9, 1, 2), (0, 1, 0)])
def test_the_doubt_of_right_and_wrong_is_the_sign_test(better: int, worse: int, equal: int) -> None:
    """As another library computes it."""
    excess = np.array([-1.0] * better + [1.0] * worse + [0.0] * equal)
    expected = stats.binomtest(worse, better + worse, 0.5, alternative="greater").pvalue

    assert doubt(excess, total=1000) == pytest.approx(expected)


def test_the_doubt_of_fractions_is_students() -> None:
    """With half of the greatest difference on either side, as another library computes it."""
    excess = np.random.default_rng(0).normal(0.2, 0.5, 30)
    padded = [*excess, 0.5 * np.abs(excess).max(), -0.5 * np.abs(excess).max()]

    assert doubt(excess, 99) == pytest.approx(stats.ttest_1samp(padded, 0.0, alternative="greater").pvalue)
    assert doubt(np.full(30, 0.25), 99) < 1e-9
    assert doubt(np.full(2, 0.25), 99) > 0.05


def test_there_is_no_doubt_where_all_is_known() -> None:
    """Nothing differs: nobody is worse. All items asked: the sum decides."""
    assert doubt(np.zeros(20), 40) == 1.0
    assert doubt(np.array([1.0, -1.0, 1.0]), 3) == 0.0
    assert doubt(np.array([1.0, -1.0, -1.0]), 3) == 1.0


def test_without_rivals_everyone_climbs_to_the_top() -> None:
    """Whatever is answered, all prefixes are asked, rung by rung."""
    order = {"a": balanced([0] * 100, np.random.default_rng(0)), "b": tuple(range(20))}
    asked = climb_up(race(order, []), {"a": [0.0] * 100, "b": [0.0] * 20})

    assert [len(items.get("a", ())) for items in asked] == [16, 16, 32, 36]
    assert [len(items.get("b", ())) for items in asked] == [16, 4, 0, 0]


def test_who_is_worse_in_everything_stops_early() -> None:
    """All wrong against all right: sixteen of sixteen are enough; if it is right in one of two tasks they are not."""
    order = {task: balanced([0] * 200, np.random.default_rng(1)) for task in ("a", "b")}
    rival = Rival(responses={"a": (1.0,) * 200, "b": (1.0,) * 200})
    wrong, right = [0.0] * 200, [1.0] * 200

    assert len(climb_up(race(order, [rival]), {"a": wrong, "b": wrong})) == 1
    assert len(climb_up(race(order, [rival]), {"a": wrong, "b": right})) == 5
    assert len(climb_up(race(order, [rival]), {"a": right, "b": right})) == 5


def test_a_better_property_keeps_a_candidate_in_the_race() -> None:
    """Worse in all tasks and smaller than the rival: it may belong to the front; as large: not."""
    order = {"a": tuple(range(64))}
    rival = Rival(responses={"a": (1.0,) * 64}, properties=(5.0,))
    runner = race(order, [rival], properties={0: (4.0,), 1: (5.0,), 2: (6.0,)})
    wrong = {"a": [0.0] * 64}

    assert [len(climb_up(runner, wrong, candidate)) for candidate in range(3)] == [3, 1, 1]


def test_what_is_a_loss_is_better_when_small() -> None:
    """With the sign turned, all ones are the worst there is."""
    order = {"a": tuple(range(64))}
    runner = Climb(
        order=order,
        prefixes=prefixes({"a": 64}, 16, 2.0),
        signs={"a": 1.0},
        rivals=(Rival(responses={"a": (0.0,) * 64}),),
        alpha=0.1,
        properties=lambda number: (),
    )
    assert len(climb_up(runner, {"a": [1.0] * 64})) == 1


def simulated(rng: np.random.Generator, gaps: tuple[float, ...], soft: bool = False, total: int = 256) -> bool:
    """Race a candidate against a rival that is better by `gaps`, task by task; tell whether it was stopped."""
    tasks = [f"t{k}" for k in range(len(gaps))]
    mine, theirs = {}, {}
    for task, gap in zip(tasks, gaps, strict=True):
        hard_N = rng.random(total)
        own_N, rival_N = rng.random(total) * 0.5 + hard_N < 0.9, rng.random(total) * 0.5 + hard_N < 0.9
        mine[task], theirs[task] = own_N.astype(float), rival_N.astype(float)
        # exactly as good as the rival on all items, or worse by the gap
        lack = round((mine[task].sum() - theirs[task].sum()) + gap * total)
        frm, to = (theirs[task], 1.0) if lack > 0 else (theirs[task], 0.0)
        chosen = rng.permutation(np.flatnonzero(frm != to))[: abs(lack)]
        frm[chosen] = to
        if soft:
            both = rng.normal(0.0, 0.3, total)
            mine[task], theirs[task] = mine[task] + both - both.mean(), theirs[task]
    order = {task: balanced([0] * total, rng) for task in tasks}
    rival = Rival(responses={task: tuple(own.tolist()) for task, own in theirs.items()})
    asked = climb_up(race(order, [rival]), mine)
    return sum(len(items[tasks[0]]) for items in asked) < total


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gaps", [(0.0,), (0.0, 0.4), (0.0, 0.0)])
def test_a_member_of_the_front_is_seldom_stopped(gaps: tuple[float, ...], soft: bool) -> None:
    """A candidate exactly as good as its rival in one objective is stopped less often than alpha allows."""
    rng = np.random.default_rng(7)
    stopped = sum(simulated(rng, gaps, soft) for _ in range(300))

    assert stopped <= 0.1 * 300


def test_the_inferior_are_stopped_early() -> None:
    """Behind by 30 points in both objectives, nine in ten are not asked everything."""
    rng = np.random.default_rng(8)
    stopped = sum(simulated(rng, (0.3, 0.3)) for _ in range(60))

    assert stopped >= 0.9 * 60


def test_what_others_answer_does_not_matter() -> None:
    """The same answers lead to the same question, whoever was asked before, and the schedule keeps nothing."""
    order = {"a": tuple(range(64))}
    runner = race(order, [Rival(responses={"a": (1.0,) * 64})])
    mixed: Given = {"a": {place: float(place % 2) for place in range(16)}}
    before = runner.next(0, mixed)
    climb_up(runner, {"a": [0.0] * 64}, candidate=1)

    assert runner.next(0, mixed) == before

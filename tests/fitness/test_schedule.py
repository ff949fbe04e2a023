"""Schedules: who is asked what, and when an answer is complete."""

from evomerge.fitness.schedule import Fixed, Warmup

FULL = {"left": (0, 1, 2, 3), "right": (0, 1)}
FEW = {"left": (2,), "right": (0, 1)}


def test_a_fixed_schedule_asks_everyone_the_same_once():
    """Whatever the candidate, it is asked these items, and nothing after it has answered."""
    schedule = Fixed(items=FEW)

    assert [schedule.next(candidate, answered=False) for candidate in (0, 7)] == [FEW, FEW]
    assert schedule.next(0, answered=True) is None


def test_a_warm_up_asks_the_first_everything_and_the_others_the_anchors():
    """The rows of the fit are candidates 0 to rows - 1; from then on only the chosen items are asked."""
    schedule = Warmup(rows=2, full=FULL, anchors=FEW)

    assert [schedule.next(candidate, answered=False) for candidate in range(4)] == [FULL, FULL, FEW, FEW]
    assert {schedule.next(candidate, answered=True) for candidate in range(4)} == {None}


def test_without_rows_everyone_gets_the_anchors():
    """A fit from elsewhere needs no candidate of this run."""
    assert Warmup(rows=0, full=FULL, anchors=FEW).next(0, answered=False) == FEW

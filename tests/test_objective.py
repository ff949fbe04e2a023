"""Scores and objectives: intervals against the normal distribution, and the sign of losses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from evomerge.errors import ExperimentError
from evomerge.objective import Objective, Score, losses

REALS = st.floats(-1e12, 1e12)


def test_the_interval_holds_95_percent_of_a_normal_distribution():
    """Its ends are the quantiles 0.025 and 0.975 around the value."""
    low, high = Score(value=0.5, error=0.1, items=20).interval

    assert low == pytest.approx(norm(0.5, 0.1).ppf(0.025))
    assert high == pytest.approx(norm(0.5, 0.1).ppf(0.975))


def test_the_interval_stays_within_the_range_of_scores():
    """It is cut to [0, 1] where the score is, and has no width without error."""
    assert Score(value=0.02, error=0.1, items=20).interval[0] == 0.0
    assert Score(value=0.98, error=0.1, items=20).interval[1] == 1.0
    assert Score(value=0.3, error=0.0, items=20).interval == (0.3, 0.3)
    assert Score(value=7.0, error=1.0, items=20, bounded=False).interval == pytest.approx(norm(7, 1).interval(0.95))


@given(REALS, REALS)
def test_a_better_value_is_a_smaller_loss(one, other):
    """Losses fall where the objective says maximize and rise where it says minimize."""
    up, down = Objective(name="a"), Objective(name="a", direction="minimize")

    assert (up.loss(one) < up.loss(other)) == (one > other)
    assert (down.loss(one) < down.loss(other)) == (one < other)


@given(REALS, st.sampled_from(["maximize", "minimize"]))
def test_the_loss_of_a_loss_is_the_value(amount, direction):
    """The sign is its own inverse, which reports rely on."""
    objective = Objective(name="a", direction=direction)

    assert objective.loss(objective.loss(amount)) == amount


def test_losses_stand_in_the_order_of_the_objectives():
    """One loss per objective, whatever else the values hold and in whatever order."""
    objectives = (Objective(name="b"), Objective(name="size", kind="property", direction="minimize"))

    assert losses(objectives, {"size": 7.0, "other": 1.0, "b": 0.25}) == (-0.25, 7.0)


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_refused(amount):
    """No driver is told NaN."""
    with pytest.raises(ValueError, match="losses must be finite"):
        losses((Objective(name="a"),), {"a": amount})


def test_a_missing_value_is_named():
    """What no task and no property gave is said."""
    with pytest.raises(ValueError, match="no value of b, c among"):
        losses(tuple(Objective(name=name) for name in "abc"), {"a": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tasks"}, "objective 'a': kind must be task or property, got 'tasks'"),
        ({"direction": "max"}, "objective 'a': direction must be maximize or minimize, got 'max'"),
    ],
)
def test_unknown_kinds_and_directions_are_refused(settings, message):
    """The objective, the choice and what was given are named."""
    with pytest.raises(ExperimentError, match=message):
        Objective(name="a", **settings)

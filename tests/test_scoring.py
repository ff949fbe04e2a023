"""Blocks, answers and estimates between ledger and estimators: against numbers worked out by hand."""

import numpy as np
import pytest

from evomerge.errors import LedgerError
from evomerge.fitness.sampling import Mean, Stratified
from evomerge.ledger import Answered, Promoted
from evomerge.search.asking import Answers
from evomerge.search.blocks import Block, blocks_of
from evomerge.search.deviations import deviations
from evomerge.search.scoring import Model
from tests.toy import LENGTH, TASKS, toy

EVERYTHING = {"a": (0, 1, 2), "b": (0, 1)}
BLOCK = Block(sizes={"a": 3, "b": 2}, labels=(0, 0, 1, 2, 2), bounded=True)


def answers(**values: list[float]) -> Answers:
    """Return what a candidate answered to the first items of each task."""
    own = Answers()
    own.values = {task: dict(enumerate(found)) for task, found in values.items()}
    return own


def answered(items: dict[str, tuple[int, ...]], responses: dict[str, tuple[float, ...]], **more: object) -> Answered:
    """Return an event of candidate 3."""
    given = {"split": "search", "margins": {}} | more
    return Answered(candidate=3, items=items, responses=responses, **given)  # type: ignore[arg-type]  # by name


def test_answers_add_up_until_they_are_complete() -> None:
    """Bit by bit, with margins; what is not named is everything, if it has responses."""
    own = Answers()
    own.add(answered({"a": (2,)}, {"a": (1.0,)}, margins={"a": (0.5,)}), EVERYTHING)
    assert not own.complete(EVERYTHING)
    own.add(answered({"a": (0, 1)}, {"a": (0.0, 1.0), "b": (1.0, 0.0)}), EVERYTHING)

    assert own.values == {"a": {2: 1.0, 0: 0.0, 1: 1.0}, "b": {0: 1.0, 1: 0.0}}
    assert own.margins == {"a": {2: 0.5}}
    assert own.complete(EVERYTHING)
    own.add(answered({}, {}, error="gone"), EVERYTHING)
    assert own.error == "gone"
    assert not own.complete(EVERYTHING)


@pytest.mark.parametrize(
    ("items", "responses"),
    [({"a": (3,)}, {"a": (1.0,)}), ({"a": (0, 1)}, {"a": (1.0,)}), ({}, {"a": (1.0,)}), ({"c": (0,)}, {"c": (1.0,)})],
)
def test_answers_to_what_is_no_item_are_refused(
    items: dict[str, tuple[int, ...]], responses: dict[str, tuple[float, ...]]
) -> None:
    """A place outside the split, another number of responses, an unknown task."""
    with pytest.raises(LedgerError, match="an answer of candidate 3 that fits no items"):
        Answers().add(answered(items, responses), EVERYTHING)


def test_a_block_puts_tasks_side_by_side() -> None:
    """Places and items are each other's inverse, shares add up to 1 by task, and what is missing is NaN."""
    items = {"a": (0, 2), "b": (1,)}

    assert BLOCK.places(items) == (0, 2, 4)
    assert BLOCK.items([4, 2, 0]) == items
    assert BLOCK.items([3]) == {"b": (0,)}
    assert BLOCK.targets() == pytest.approx(np.array([[1 / 3] * 3 + [0] * 2, [0] * 3 + [1 / 2] * 2]))
    np.testing.assert_array_equal(BLOCK.row({"a": {1: 0.5}, "c": {0: 1.0}}), [np.nan, 0.5, np.nan, np.nan, np.nan])


def test_strata_are_task_subtask_and_who_is_right() -> None:
    """Without sources the labels; with them two items share a stratum if the same sources are right on both."""
    sources = [answers(a=[1, 0, 1], b=[1, 1]), answers(a=[1, 0, 1], b=[0, 0])]

    assert BLOCK.strata([]).tolist() == [0, 0, 1, 2, 2]
    found = BLOCK.strata(sources).tolist()
    assert len(set(found[:3])) == 3
    assert found[3] == found[4]
    assert found[3] not in found[:3]


def test_responses_are_rows_of_candidates() -> None:
    """With their margins where there are any, and with the places of the sources among them."""
    rows = [answers(a=[1, 0, 1], b=[1, 1]), answers(a=[0, 0, 1], b=[1, 0])]
    rows[0].margins = {"a": {0: 0.5}}
    found = BLOCK.responses(rows, [rows[1]])

    assert found.values_MN.tolist() == [[1, 0, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert found.margins_MN is not None
    assert found.margins_MN[0, 0] == 0.5
    assert np.isnan(found.margins_MN).sum() == 9
    assert found.sources == (1,)
    assert BLOCK.responses([], []).values_MN.shape == (0, 5)


def test_tasks_without_bounds_are_blocks_of_their_own() -> None:
    """Two bounded tasks in one block with four subtasks, the other by itself."""
    joint, alone = blocks_of(toy(tasks=(*TASKS, LENGTH)).tasks, "search")

    assert list(joint.sizes) == ["left", "right"]
    assert (joint.total, sorted(set(joint.labels)), joint.bounded) == (120, [0, 1, 2, 3], True)
    assert (list(alone.sizes), alone.total, alone.bounded) == ([LENGTH], 60, False)
    assert len(blocks_of(toy(tasks=(LENGTH,)).tasks, "test")) == 1


def test_a_model_chooses_by_task_and_leaves_out_what_is_taken() -> None:
    """So many items a task on average, and of a task without bounds exactly as many; none of those that rest."""
    experiment = toy(tasks=(*TASKS, LENGTH))
    model = Model(blocks_of(experiment.tasks, "search"), Stratified(), seed=1)
    first = model.choose(10, {})
    second = model.choose(10, first)

    for found in (first, second):
        assert {task: len(places) for task, places in found.items()} == {"left": 10, "right": 10, LENGTH: 10}
    assert all(not set(first[task]) & set(second[task]) for task in first)


def test_scores_of_all_items_are_their_means() -> None:
    """Equal shares of right answers are equal to the last bit, whichever items they are made of."""
    model = Model([BLOCK], Mean())
    scores = [model.scores(answers(a=list(row), b=[1, 0]), {}) for row in ([1, 1, 0], [1, 0, 1], [0, 1, 1])]

    assert {found["a"].value for found in scores} == {round(2 / 3, 12)}
    assert scores[0]["b"].value == 0.5
    assert scores[0]["a"].items == 3
    assert model.scores(answers(a=[1, 1, 1], b=[1, 1]), {})["a"].value == 1.0


def test_spread_multiplies_the_errors_of_a_part() -> None:
    """The error of a part grows with its task's spread; that of all items does not know of it."""
    block = blocks_of(toy().tasks, "search")[0]
    model = Model([block], Mean())
    part = answers(left=[1.0, 0.0] * 5, right=[1.0, 0.0] * 5)
    whole = answers(left=[1.0, 0.0] * 30, right=[1.0, 0.0] * 30)
    once, twice = (model.scores(part, {"left": factor}) for factor in (1.0, 2.0))
    raw = model.estimates(part)["left"][1]

    assert twice["left"].error ** 2 - once["left"].error ** 2 == pytest.approx(3 * raw**2)
    assert twice["right"] == once["right"]
    assert model.scores(whole, {"left": 9.0}) == model.scores(whole, {})


def test_deviations_are_in_units_of_the_errors() -> None:
    """Truth minus estimate over spread times raw error, as the root mean square over tasks; failures are left out."""
    known = {3: answers(a=[1, 1, 0, 0], b=[1, 1]), 4: answers(a=[1, 1, 1, 1], b=[1, 1]), 5: answers(a=[1])}
    known[5].error = "no"
    event = Promoted(
        split="search",
        candidates=(3, 4, 5),
        estimates=({"a": (0.4, 0.1), "b": (1.0, 0.1)}, {"a": (1.0, 0.0), "b": (0.7, 0.1)}, {"a": (0.0, 0.1)}),
    )

    assert deviations([event], known, {"a": 2.0}) == pytest.approx([np.sqrt((0.5**2 + 0.0) / 2), 3.0])
    assert deviations([Promoted(split="search", candidates=(3,))], known, {}) == []

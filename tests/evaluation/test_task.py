"""Tasks: what every one promises to search, worker and engine, on the one whose items are rows."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation import SPLITS, Response, Task
from evomerge.evaluation.graders import Contains, Exact, Joined, LastNumber, Regex
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from evomerge.evaluation.request import Outcome
from evomerge.evaluation.texts import Divergence, Loss
from evomerge.evaluation.unlabelled import Agreement, ChoiceAgreement, ChoiceEntropy, Entropy, Length

MEASURES = [
    Generate(),
    Generate(grader=Regex(regex="x")),
    Generate(grader=Joined(how="all", graders=(Contains(), LastNumber()))),
    Choose(),
    Choose(by_length=True),
    Loss(),
    Divergence(reference="math"),
    Length(),
    Entropy(),
    ChoiceEntropy(),
    Agreement(reference="math"),
    ChoiceAgreement(reference="math"),
]


def question(number: int, **changes) -> Item:
    """Return an item that any measure takes."""
    form = {"id": f"q{number}", "prompt": f"{number}+1=", "answers": ("2",), "choices": ("2", "33")}
    return Item(**{**form, **changes})


def task(measure=None, **changes) -> JsonlTask:
    """Return a small task with some fields changed."""
    splits = {"search": tuple(map(question, range(3))), "test": (question(7, stratum="late"),)}
    return JsonlTask(**{"name": "sums", "splits": splits, "measure": measure or Generate(), **changes})


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_every_measure_keeps_the_contract_of_a_task(measure):
    """A task is a value that other processes can have, names its items, and asks a candidate after its reference."""
    made: Task = task(measure)
    said = (Outcome(tokens=1, ids=((0,),), logp=((-0.5,),)),) * 2
    asked = made.requests("search", 0)

    assert pickle.loads(pickle.dumps(made)) == made
    assert pickle.loads(pickle.dumps(made)).fingerprint == made.fingerprint
    assert [made.count(split) for split in SPLITS] == [3, 0, 1]
    assert (made.ids("search"), made.strata("test")) == (("q0", "q1", "q2"), ("late",))
    assert made.direction in ("maximize", "minimize")
    assert len(asked) == len(made.requests("search", 0, said)) == (2 if asked[0].continuation in ("2", "33") else 1)
    assert made.reference == ("math" if "math" in str(measure) else None)
    value = made.grade("search", 0, said[: len(asked)], said[: len(asked)]).value
    assert isinstance(value, float)
    assert not made.bounded or 0.0 <= value <= 1.0


def test_the_fingerprint_is_of_items_prompts_and_grading():
    """Another name leaves the fingerprint as it is; another item, prompt, measure or grader does not."""
    items = task().splits["search"]
    others = [
        *(task(measure) for measure in MEASURES[1:]),
        task(Generate(max_new_tokens=5)),
        task(Generate(stop=("\n",))),
        task(Generate(grader=Contains())),
        task(Generate(grader=Regex(regex="y"))),
        task(Generate(grader=Joined(how="any", graders=(Contains(), LastNumber())))),
        task(preamble="Be brief. "),
        task(splits={"search": items}),
        task(splits={"validation": items, "test": task().splits["test"]}),
        task(splits={"search": items[::-1], "test": task().splits["test"]}),
        task(splits={"search": (question(0, row={"a": 1}), *items[1:]), "test": task().splits["test"]}),
    ]

    assert task(name="other").fingerprint == task().fingerprint
    assert len({task().fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_what_is_asked_and_graded_is_the_items_own():
    """The place names the item, the preamble stands before its prompt, and blanks around an answer do not count."""
    made = task(Generate(max_new_tokens=4, stop=("\n",)), preamble="0+1=1\n")
    [request] = made.requests("search", 2)

    assert (request.kind, request.context, request.most, request.stop) == ("generate", "0+1=1\n2+1=", 4, ("\n",))
    assert made.grade("search", 2, (Outcome(tokens=2, text=" 2\n"),)) == Response(value=1.0)
    assert made.grade("search", 2, (Outcome(tokens=2, text="3"),)) == Response(value=0.0)


def test_choices_are_asked_one_by_one():
    """Each choice is a continuation of the prompt, in the item's order."""
    asked = task(Choose()).requests("test", 0)

    assert [(one.kind, one.context, one.continuation) for one in asked] == [
        ("loglikelihood", "7+1=", "2"),
        ("loglikelihood", "7+1=", "33"),
    ]


@given(st.dictionaries(st.sampled_from(SPLITS), st.integers(0, 9)))
def test_a_cut_keeps_the_first_items(sizes):
    """Each named split keeps so many of its first items, the others all; uncut it is the same task."""
    whole = task()

    part = whole.cut(sizes)

    for split in SPLITS:
        ids = whole.ids(split) if whole.count(split) else ()
        kept = ids[: sizes[split]] if split in sizes else ids
        assert (part.ids(split) if part.count(split) else ()) == kept
    assert whole.cut({}).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("measure", "items", "message"),
    [
        (Generate(), [question(1), question(1, prompt="x")], "two items have the id 'q1'"),
        (Generate(), [question(1, answers=())], "item 'q1': has no answer"),
        (Generate(grader=LastNumber()), [question(1, answers=("x",))], "holds no number"),
        (Generate(grader=Contains()), [question(1, answers=(" ",))], "every text contains it"),
        (Choose(), [question(1, choices=())], "two or more distinct choices"),
        (Choose(), [question(1, choices=("2", "2"))], "distinct"),
        (Choose(), [question(1, choices=("2", ""))], "a choice is empty"),
        (Choose(), [question(1, answers=("4",))], "'4' is none of its choices"),
        (Choose(), [question(1, answers=("2", "33"))], "one right choice"),
        (ChoiceEntropy(), [question(1, choices=("2",))], "distinct choices"),
        (Loss(), [question(1, prompt="")], "the text is empty"),
    ],
)
def test_items_that_cannot_be_asked_or_graded_are_refused(measure, items, message):
    """Each mistake is one line that names the task and what is wrong."""
    with pytest.raises(TaskError) as problem:
        task(measure, splits={"search": tuple(items)})

    assert message in str(problem.value)
    assert "'sums'" in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generate(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda: Generate(stop=("\n", "")), "empty stop text"),
        (lambda: Regex(regex="("), "not a regular expression"),
        (lambda: Loss(unit="bits"), "unit 'bits' is not known"),
        (lambda: Divergence(reference="a", top=0), "top must be at least 1"),
    ],
)
def test_a_measure_that_makes_no_sense_is_refused(make, message):
    """What no item could be measured by is found when it is made."""
    with pytest.raises(TaskError, match=message):
        make()


def test_splits_are_known_and_disjoint():
    """A split has one of three names, and no question stands in two; other choices make another question."""
    with pytest.raises(TaskError, match="did you mean 'search'"):
        task(splits={"serch": ()})
    with pytest.raises(TaskError, match=r"'q1' \(search\) and 'b' \(test\)"):
        task(splits={"search": (question(1),), "test": (question(1, id="b"),)})
    with pytest.raises(TaskError, match="did you mean 'search'"):
        task().ids("serch")

    other = question(1, id="b", choices=("2", "5"))
    assert task(splits={"search": (question(1),), "test": (other,)}).count("test") == 1


def test_a_grader_compares_by_default_exactly():
    """Greedy answers are graded by `exact` unless something else is said."""
    assert Generate().grader == Exact()

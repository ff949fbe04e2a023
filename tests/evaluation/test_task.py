"""Tasks and items: grading, and what makes a set of items unusable."""

import pytest

from evomerge.errors import TaskError
from evomerge.evaluation.task import Item, Task, cut, grade


def task(**changes):
    """Return a small generate task with some fields changed."""
    items = (Item(id="a", prompt="1+1=", answer="2"), Item(id="b", prompt="2+2=", answer="4"))
    return Task(**{"name": "sums", "kind": "generate", "splits": {"search": items}, **changes})


def choice(**changes):
    """Return a multiple choice item with some fields changed."""
    return Item(**{"id": "a", "prompt": "1+1=", "answer": "2", "choices": ("2", "3"), **changes})


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("4", (), "4"),
        (" 4 \n", (), "4"),
        ("4\n5", ("\n",), "4"),
        ("4;5\n6", ("\n", ";"), "4"),
        ("4 end 5", (" end",), "4"),
        ("\n4", ("\n",), ""),
        ("4\n5", (), "4\n5"),
    ],
)
def test_an_answer_ends_at_its_first_stop_text(text, stop, expected):
    """Whichever stop text comes first cuts the answer, and blanks around it do not count."""
    assert cut(text, stop) == expected


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (None, "4", 1.0),
        (None, " 4\n", 1.0),
        (None, "44", 0.0),
        (None, "", 0.0),
        (r"#### (\d+)", "so #### 4 it is", 1.0),
        (r"#### (\d+)", "so 4 it is", 0.0),
        (r"\d+", "it is 4", 1.0),
        (r"\d+", "it is 5, not 4", 0.0),
        (r"x(\d)?", "x", 0.0),
    ],
)
def test_grading_compares_what_was_asked_for(pattern, text, expected):
    """Exact grading compares the whole text, a pattern its first group or its whole match."""
    asked = task(pattern=pattern)

    assert expected == grade(asked, asked.splits["search"][1], text)


def test_the_fingerprint_is_of_items_and_grading():
    """Another name leaves the fingerprint as it is; another item, answer, limit, stop or pattern does not."""
    others = [
        task(max_new_tokens=5),
        task(stop=("\n",)),
        task(pattern="x"),
        task(splits={"search": (Item(id="a", prompt="1+1=", answer="3"),)}),
        task(splits={"validation": task().splits["search"]}),
    ]

    assert task(name="other").fingerprint == task().fingerprint
    assert len({task().fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "generat"}, "did you mean 'generate'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"stop": ("\n", "")}, "empty stop text"),
        ({"pattern": "("}, "not a regular expression"),
        ({"splits": {"serch": ()}}, "did you mean 'search'"),
        ({"splits": {"search": (choice(), choice(prompt="x"))}}, "two items have the id 'a'"),
        ({"splits": {"search": (choice(),), "test": (choice(id="b"),)}}, "'a' (search) and 'b' (test)"),
        ({"kind": "multiple_choice"}, "two or more distinct choices"),
        ({"kind": "multiple_choice", "splits": {"search": (choice(choices=("2", "2")),)}}, "distinct"),
        ({"kind": "multiple_choice", "splits": {"search": (choice(answer="4"),)}}, "'4' is none of its choices"),
        ({"kind": "multiple_choice", "splits": {"search": (choice(choices=("2", "")),)}}, "a choice is empty"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(changes, message):
    """Each mistake is one line that names the task and what is wrong."""
    with pytest.raises(TaskError) as problem:
        task(**changes)

    assert message in str(problem.value)
    assert "'sums'" in str(problem.value)
    assert "\n" not in str(problem.value)


def test_the_same_question_may_be_asked_with_other_choices_elsewhere():
    """Only prompt and choices together make a question."""
    splits = {"search": (choice(),), "test": (choice(id="b", choices=("2", "5")),)}

    assert len(task(kind="multiple_choice", splits=splits).items("test")) == 1


def test_an_unknown_split_is_refused():
    """Asking for a split that the task lacks names the nearest that it has."""
    with pytest.raises(TaskError, match="did you mean 'search'"):
        task().items("serch")

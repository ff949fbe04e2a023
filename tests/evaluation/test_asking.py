"""Asking: items in, responses out, with plans that are kept and failures that have a name."""

from dataclasses import replace

import pytest
import torch

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.asking import asked, outcomes, undecided
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.texts import Divergence
from tests.evaluation.tiny import SIZE, make_model, save

CHOICES = ("12", "13", "4")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Return a model and an engine that has its weights."""
    model = make_model("llama")
    engine = Engine(save(tmp_path_factory.mktemp("live"), model), "float32", batch=16)
    engine.load(model.state_dict().items())
    return model, engine


def sums(count: int = 6, **changes) -> JsonlTask:
    """Return a task of multiple choice."""
    items = tuple(
        Item(id=f"i{i}", prompt=f"{i}+{i}=", answers=(CHOICES[i % 3],), choices=CHOICES) for i in range(count)
    )
    return JsonlTask(**{"name": "sums", "splits": {"search": items}, "measure": Choose(), **changes})


def margins(model, tokenizer, item: Item) -> float:
    """Return the margin of the right choice, from one forward pass per choice."""
    prompt = tokenizer(item.prompt)["input_ids"]
    found = {}
    for choice in item.choices:
        ids = prompt + tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found[choice] = sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
    return found.pop(item.answers[0]) - max(found.values())


def test_responses_are_graded_in_the_order_of_the_items(live):
    """Values and margins are those of plain forward passes, whatever order and however many times items are asked."""
    model, engine = live
    task = sums()

    for places in (range(6), (5, 2, 2, 0), (3,), ()):
        found = asked(engine, task, "search", places)
        expected = [margins(model, engine.tokenizer, task.splits["search"][place]) for place in places]
        assert [response.margin for response in found] == pytest.approx(expected, abs=2e-4)
        assert [response.value for response in found] == [float(margin > 0) for margin in expected]


def test_requests_are_made_once(live, monkeypatch):
    """The plan of task, split and items is kept, also under another name; other content is another plan."""
    _, engine = live
    monkeypatch.setattr(engine, "_plans", {})
    made = []
    requests = Choose.requests
    monkeypatch.setattr(Choose, "requests", lambda *given: made.append(1) or requests(*given))

    asked(engine, sums(), "search", (0, 1))
    asked(engine, sums(name="other"), "search", (0, 1))
    assert len(made) == 2
    asked(engine, sums(preamble="x"), "search", (0, 1))
    asked(engine, sums(), "search", (1, 0))
    assert len(made) == 6


def test_references_go_into_requests_and_grades(live):
    """A task with a reference is asked first what the reference is asked, then with its outcomes; each has its plan."""
    _, engine = live
    task = sums(measure=Divergence(reference="left", top=5))

    known = outcomes(engine, task, "search", range(6))
    near = asked(engine, task, "search", (4, 1), [known[4], known[1]])
    swapped = [(replace(known[place][0], ids=tuple(ids[::-1] for ids in known[place][0].ids)),) for place in (4, 1)]
    far = asked(engine, task, "search", (4, 1), swapped)

    assert [len(own[0].ids[0]) for own in known] == [5] * 6
    assert [response.value for response in near] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert all(response.value > 0.01 for response in far)


@pytest.mark.parametrize(
    ("task", "split", "places", "message"),
    [
        (sums(), "search", (0, 6), "task 'sums': split 'search' has 6 items, none at place 6"),
        (sums(), "search", (-1,), "none at place -1"),
        (sums(), "test", (0,), "split 'test' has 0 items"),
        (sums(), "sarch", (0,), "no split 'sarch'; did you mean 'search'?"),
        (sums(preamble="a" * 70), "search", (3, 4), r"task 'sums', item 'i3': \d+ tokens, but the model has room for"),
        (
            JsonlTask(
                name="go",
                measure=Generate(max_new_tokens=60),
                splits={"search": tuple(Item(id=text, prompt=text, answers=("c",)) for text in ("b", "bcdef"))},
            ),
            "search",
            (0, 1),
            "task 'go', item 'bcdef': 6 tokens",
        ),
    ],
)
def test_items_that_cannot_be_asked_are_named(live, task, split, places, message):
    """Task, item and reason are in one line."""
    with pytest.raises(TaskError, match=message):
        asked(live[1], task, split, places)


def test_a_model_that_does_not_prefer_fails(live):
    """Equal likelihoods of all choices of all items are a broken model, not chance."""
    model, engine = live
    engine.load({**model.state_dict(), "lm_head.weight": torch.zeros(SIZE, 32)}.items())
    try:
        with pytest.raises(CandidateError, match="task 'sums': all choices of every item have one log-likelihood"):
            asked(engine, sums(), "search", range(6))
        assert len(asked(engine, sums(), "search", range(3))) == 3  # so few may be equal by chance
    finally:
        engine.load(model.state_dict().items())


def test_log_likelihoods_that_are_not_finite_fail_with_the_task(live):
    """The reason names the task."""
    model, engine = live
    engine.load({**model.state_dict(), "model.norm.weight": torch.full((32,), float("nan"))}.items())
    try:
        with pytest.raises(CandidateError, match="task 'sums': a log-likelihood is not finite"):
            asked(engine, sums(), "search", range(6))
    finally:
        engine.load(model.state_dict().items())


def test_what_counts_as_undecided():
    """One preference in any item is enough; items without choices say nothing."""
    two = [Request(kind="loglikelihood", context="a", continuation=text) for text in ("b", "cd")]
    same = (Outcome(tokens=1, loglikelihood=-2.0), Outcome(tokens=2, loglikelihood=-4.0))
    other = (Outcome(tokens=1, loglikelihood=-2.0), Outcome(tokens=2, loglikelihood=-4.1))

    assert undecided([two] * 5, [same] * 5)
    assert not undecided([two] * 5, [same] * 4 + [other])
    assert not undecided([two[:1]] * 5, [same[:1]] * 5)
    assert not undecided([], [])

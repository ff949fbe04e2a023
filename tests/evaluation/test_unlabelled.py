"""Measures without labels, against direct computation on a model that is a table."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import read_task
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask, Measure
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.texts import Divergence, Loss, coarse_divergence
from evomerge.evaluation.unlabelled import Agreement, ChoiceAgreement, ChoiceEntropy, Entropy, Length

LETTERS = "abcde "
TEXT = "a bad cab\n"
odds = st.floats(-5.0, 5.0)  # no token is less likely than what single precision tells from none
log_odds = st.lists(odds, min_size=2, max_size=8)


@dataclass
class Bigrams:
    """A language model of letters: the log-probability of each given the one before; row 0 begins a text."""

    table: np.ndarray

    @classmethod
    def of(cls, seed: int) -> "Bigrams":
        """Return a random one."""
        odds = np.random.default_rng(seed).normal(size=(len(LETTERS), len(LETTERS)))
        return cls(special.log_softmax(odds, axis=1))

    def rows(self, text: str) -> np.ndarray:
        """Return the distribution before each letter of a text."""
        return self.table[[0, *(LETTERS.index(letter) for letter in text[:-1])]]

    def answer(self, request: Request) -> Outcome:
        """Read a whole text."""
        assert (request.kind, request.context) == ("loglikelihood", "")
        rows = self.rows(request.continuation)
        told = sum(row[LETTERS.index(letter)] for row, letter in zip(rows, request.continuation, strict=True))
        ids = tuple(tuple(map(int, np.argsort(-row)[: request.top])) for row in rows) if request.top else ()
        read = request.at or ids
        logp = tuple(tuple(map(float, row[list(tokens)])) for row, tokens in zip(rows, read, strict=False))
        return Outcome(tokens=len(rows), loglikelihood=float(told), ids=ids, logp=logp)


def made(measure: Measure, **changes: object) -> JsonlTask:
    """Return a task of one item."""
    item = Item(**{"id": "a", "prompt": "bad cab", "choices": ("x", "yy", "z"), **changes})
    return JsonlTask(name="t", splits={"search": (item,)}, measure=measure)


def ask(task: JsonlTask, model: Bigrams, reference: Bigrams | None = None) -> float:
    """Return the value of the task's only item, asked as a worker does."""
    theirs = () if reference is None else tuple(map(reference.answer, task.requests("search", 0)))
    ours = tuple(map(model.answer, task.requests("search", 0, theirs)))
    return task.grade("search", 0, ours, theirs).value


@given(st.text(LETTERS, min_size=1, max_size=30), st.integers(0, 9))
def test_loss_is_the_mean_negative_log_likelihood(text, seed):
    """In nats per token, and in bits per byte, the texts' letters being bytes and tokens here."""
    model = Bigrams.of(seed)
    chances = np.exp(model.rows(text))[range(len(text)), [LETTERS.index(letter) for letter in text]]
    perplexity = 1.0 / stats.gmean(chances)

    assert math.exp(ask(made(Loss(), prompt=text), model)) == pytest.approx(perplexity)
    assert 2 ** ask(made(Loss(unit="bits_per_byte"), prompt=text), model) == pytest.approx(perplexity)


def test_bits_are_counted_by_bytes_of_the_text():
    """A letter of two bytes halves the bits per byte; tokens do not matter."""
    outcome = Outcome(tokens=7, loglikelihood=-8.0 * math.log(2.0))

    for text, bits in (("abcd", 2.0), ("äöüß", 1.0)):
        assert made(Loss(unit="bits_per_byte"), prompt=text).grade("search", 0, (outcome,)).value == bits


@given(st.text(LETTERS, min_size=1, max_size=20), st.integers(0, 9), st.integers(10, 19))
def test_divergence_of_all_tokens_is_the_whole_one(text, one, two):
    """With every token apart it is the mean of KL(source || candidate) over the positions."""
    source, model = Bigrams.of(one), Bigrams.of(two)
    whole = special.rel_entr(np.exp(source.rows(text)), np.exp(model.rows(text))).sum(axis=1).mean()

    found = ask(made(Divergence(reference="s", top=len(LETTERS)), prompt=text), model, source)

    assert found == pytest.approx(whole, abs=1e-5)


@given(log_odds, st.data())
def test_divergence_of_some_tokens_is_a_lower_bound(first, data):
    """It grows with the tokens kept apart, from 0 to the whole, and merges the rest as one token."""
    p = special.log_softmax(first)
    q = special.log_softmax(data.draw(st.lists(odds, min_size=len(first), max_size=len(first))))
    order = np.argsort(-p)
    bounds = [coarse_divergence(p[order[:top]], q[order[:top]]) for top in range(len(first) + 1)]
    merged = [np.append(np.exp(x[order[:1]]), np.exp(x[order[1:]]).sum()) for x in (p, q)]

    assert bounds[0] == 0.0
    assert all(less <= more + 1e-9 for less, more in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(special.rel_entr(np.exp(p), np.exp(q)).sum(), abs=1e-9)
    assert bounds[1] == pytest.approx(special.rel_entr(*merged).sum(), abs=1e-9)


def test_the_source_is_at_no_distance_from_itself():
    """And single precision that sums to a little more than one makes it no less than 0."""
    model = Bigrams.of(1)

    assert ask(made(Divergence(reference="s", top=3)), model, model) == 0.0
    assert coarse_divergence([math.log(0.7), math.log(0.3) + 1e-7], [math.log(0.7), math.log(0.3) + 2e-7]) == 0.0
    assert coarse_divergence([0.0, -math.inf], [math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))


@given(st.integers(0, 99), st.integers(1, 8))
def test_tokens_next_to_impossible_keep_the_bound_a_lower_one(seed, top):
    """Whatever single precision makes of a rest, the value stays below the whole divergence."""
    p, q = special.log_softmax(np.random.default_rng(seed).normal(scale=12.0, size=(2, 9)), axis=1)
    order = np.argsort(-p)[:top]

    assert coarse_divergence(p[order], q[order]) <= special.rel_entr(np.exp(p), np.exp(q)).sum() + 1e-4


@pytest.mark.parametrize("logp", [-math.inf, math.nan])
def test_an_infinite_divergence_is_the_candidates_failure(logp):
    """A token without any likelihood has no finite divergence, and NaN is not 0."""
    task = made(Divergence(reference="s", top=1))
    theirs = Outcome(tokens=1, ids=((3,),), logp=((-0.1,),))

    with pytest.raises(CandidateError, match="divergence from 's'"):
        task.grade("search", 0, (Outcome(tokens=1, logp=((logp,),)),), (theirs,))


def test_a_candidate_is_asked_for_the_sources_tokens():
    """First the source for its likeliest tokens, then the candidate for their likelihood."""
    task = made(Divergence(reference="s", top=2))
    [first] = task.requests("search", 0)
    [second] = task.requests("search", 0, (Outcome(tokens=1, ids=((3, 1),), logp=((-0.1, -3.0),)),))

    assert (first.kind, first.continuation, first.top, first.at) == ("loglikelihood", "bad cab", 2, ())
    assert (second.kind, second.continuation, second.top, second.at) == ("loglikelihood", "bad cab", 0, ((3, 1),))


def test_length_is_a_share_of_the_longest():
    """Half of the tokens that were allowed are half, and the longest answer is 1."""
    task = made(Length(max_new_tokens=8, stop=("\n",)))
    [request] = task.requests("search", 0)

    assert (request.kind, request.most, request.stop) == ("generate", 8, ("\n",))
    assert [task.grade("search", 0, (Outcome(tokens=n),)).value for n in (0, 4, 8, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_entropy_is_what_the_engine_read():
    """It is asked for, and given in nats per token."""
    task = made(Entropy(max_new_tokens=8))
    [request] = task.requests("search", 0)

    assert (request.kind, request.entropy) == ("generate", True)
    assert task.grade("search", 0, (Outcome(tokens=3, entropy=1.25),)).value == 1.25


@given(st.lists(st.floats(-60.0, 0.0), min_size=3, max_size=3))
def test_the_entropy_of_a_choice_is_that_of_its_shares(scores):
    """By another library's entropy, over its greatest; equal choices have 1, one beyond doubt 0."""
    task = made(ChoiceEntropy())

    def value(*told: float) -> float:
        return task.grade("search", 0, tuple(Outcome(tokens=1, loglikelihood=one) for one in told)).value

    assert value(*scores) == pytest.approx(stats.entropy(special.softmax(scores), base=3), abs=1e-12)
    assert value(-1.0, -1.0, -1.0) == pytest.approx(1.0)
    assert value(0.0, -900.0, -math.inf) == 0.0


def test_agreement_is_with_the_sources_answer():
    """Blanks at the ends do not count, case does."""
    task = made(Agreement(reference="s"))
    theirs = (Outcome(tokens=1, text=" four\n"),)

    assert task.requests("search", 0) == task.requests("search", 0, theirs)
    for text, value in (("four", 1.0), ("Four", 0.0), ("", 0.0)):
        assert task.grade("search", 0, (Outcome(tokens=1, text=text),), theirs).value == value


def test_agreement_of_choices_is_with_the_sources_likeliest():
    """The candidate agrees if that one is its own likeliest, by the margin that it has."""
    task = made(ChoiceAgreement(reference="s"))

    def said(*told: float) -> tuple[Outcome, ...]:
        return tuple(Outcome(tokens=1, loglikelihood=one) for one in told)

    right = task.grade("search", 0, said(-5.0, -1.0, -3.0), said(-9.0, -8.0, -8.5))
    wrong = task.grade("search", 0, said(-5.0, -1.0, -3.0), said(-7.0, -8.0, -8.5))
    assert (right.value, right.margin) == (1.0, 2.0)
    assert (wrong.value, wrong.margin) == (0.0, -4.0)


PROMPTS = {"data": "rows.jsonl", "prompt": "{q}?", "split": "split"}
FILES = {
    "loss": {"data": "texts.txt"},
    "kl": {"data": "texts.txt", "reference": "math"},
    "length": PROMPTS,
    "entropy": PROMPTS,
    "agreement": {**PROMPTS, "reference": "math"},
}


@pytest.fixture
def desk(tmp_path) -> Path:
    """Return a folder with texts and rows."""
    (tmp_path / "texts.txt").write_text("one text\n\nanother text\n" * 20, encoding="utf-8")
    first = '{"id": "a", "q": "one", "c": ["x", "y"], "split": "search"}\n'
    second = '{"q": "two", "c": ["x", "z"], "split": "test"}\n'
    (tmp_path / "rows.jsonl").write_text(first + second, encoding="utf-8")
    return tmp_path


def read(desk: Path, measure: str, **changes: object) -> JsonlTask:
    """Write a task file with some keys changed and read it; a change to None removes the key."""
    keys = {"measure": measure, **FILES.get(measure, {}), **changes}
    (desk / "t.yaml").write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    task = read_task(desk / "t.yaml")
    assert isinstance(task, JsonlTask)
    return task


@pytest.mark.parametrize(
    ("measure", "changes", "expected"),
    [
        ("loss", {"unit": "bits_per_byte"}, Loss(unit="bits_per_byte")),
        ("kl", {"top": 5}, Divergence(reference="math", top=5)),
        ("length", {"max_new_tokens": 5, "stop": ["\n"]}, Length(max_new_tokens=5, stop=("\n",))),
        ("entropy", {"max_new_tokens": 5}, Entropy(max_new_tokens=5)),
        ("entropy", {"choices": "c"}, ChoiceEntropy()),
        ("agreement", {"max_new_tokens": 5}, Agreement(reference="math", max_new_tokens=5)),
        ("agreement", {"choices": "c"}, ChoiceAgreement(reference="math")),
    ],
)
def test_files_name_measures_and_their_settings(desk, measure, changes, expected):
    """Each measure takes its own keys beside those of the items."""
    task = read(desk, measure, **changes)

    assert task.measure == expected
    assert task.reference == getattr(expected, "reference", None)


def test_prompts_are_read_as_with_labels(desk):
    """Template, preamble, splits, choices and strata are those of labelled tasks."""
    task = read(desk, "entropy", choices="c", preamble="Hello. ", stratum="q")

    assert [request.context for request in task.requests("test", 0)] == ["Hello. two?"] * 2
    assert [request.continuation for request in task.requests("test", 0)] == ["x", "z"]
    assert (task.ids("search"), task.ids("test"), task.strata("test")) == (("a",), ("row-2",), ("two",))


def test_texts_are_lines_or_windows(desk):
    """Without a window each line is an item; with one the whole file is cut, and nothing of it is lost."""
    (desk / "texts.txt").write_text("".join(f"line {i}\n\n" for i in range(100)), encoding="utf-8")
    lines, windows = read(desk, "loss"), read(desk, "loss", window=90, split={"search": 1.0})

    assert sum(len(lines.splits[split]) for split in lines.splits) == 100
    assert {"line-1", "line-3"} <= {name for split in lines.splits for name in lines.ids(split)}
    found = [item.prompt for item in windows.splits["search"]]
    assert "".join(found) == (desk / "texts.txt").read_text()
    assert max(map(len, found)) < 90 * 1.3
    assert all(text.endswith("\n") for text in found)
    assert windows.ids("search")[:2] == ("text-1", "text-2")


def test_texts_may_be_a_field_of_rows(desk):
    """A row has its own id and split, its windows too."""
    task = read(desk, "loss", data="rows.jsonl", text="q", split="split", window=2)

    assert [item.prompt for item in task.splits["search"]] == ["on", "e"]
    assert task.ids("search") == ("a-1", "a-2")


def test_texts_may_be_a_template_of_fields(desk):
    """What is read is question and answer as one text."""
    task = read(desk, "loss", data="rows.jsonl", text="{q}={split}", split="split")

    assert [item.prompt for item in task.splits["search"]] == ["one=search"]


@pytest.mark.parametrize(
    ("measure", "changes", "message"),
    [
        ("los", {}, "t.yaml.measure: 'los' is not known; did you mean 'loss'?"),
        ("loss", {"prompt": "{text}"}, "t.yaml.prompt: unknown key"),
        ("loss", {"windov": 4}, "did you mean 'window'?"),
        ("loss", {"window": 0}, "window: must be at least 1"),
        ("loss", {"text": "a b"}, "'a b' is not the name of a field"),
        ("loss", {"text": "{qq}"}, "no field 'qq'"),
        ("loss", {"unit": "bits"}, "unit 'bits' is not known"),
        ("loss", {"reference": "math"}, "reference: unknown key"),
        ("kl", {"reference": None}, "reference: missing"),
        ("kl", {"top": 0}, "top must be at least 1"),
        ("length", {"choices": "c"}, "length has none; choices go with entropy and agreement"),
        ("length", {"kind": "generate"}, "kind: unknown key"),
        ("length", {"answer": "q"}, "answer: unknown key"),
        ("entropy", {"choices": "c", "max_new_tokens": 4}, "max_new_tokens: unknown key"),
        ("entropy", {"choices": "q"}, "must be a list of choices"),
        ("entropy", {"data": "texts.txt"}, "no field 'q'"),
        ("agreement", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("loss", {"data": "rows.txt"}, "no file"),
    ],
)
def test_a_wrong_file_is_one_line(desk, measure, changes, message):
    """Each mistake names the file and says what to do, on one line."""
    with pytest.raises(TaskError) as problem:
        read(desk, measure, **changes)

    assert message in str(problem.value)
    assert str(desk) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_live_model_is_measured_by_its_own_logits(desk, tmp_path):
    """Loss and divergence through the engine are those that transformers' logits give, token by token."""
    import torch
    from transformers import AutoTokenizer

    from evomerge.evaluation.asking import asked, outcomes
    from evomerge.evaluation.engine import Engine
    from tests.evaluation.tiny import SIZE, make_model, save

    models = [make_model(seed=seed) for seed in (0, 1)]
    engines = [Engine(save(tmp_path / f"m{i}", model), "float32", pretrained=True) for i, model in enumerate(models)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m0")
    texts = [item.prompt for item in read(desk, "loss", split={"search": 1.0}).splits["search"]][:3]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # begins with a token of its own
        with torch.no_grad():
            p, q = (torch.log_softmax(model(ids).logits[0, :-1], dim=-1) for model in models)
        loss = -q[range(len(q)), ids[0, 1:]].mean().item()
        expected.append((loss, (p.exp() * (p - q)).sum(dim=-1).mean().item()))

    loss, kl = read(desk, "loss", split={"search": 1.0}), read(desk, "kl", top=8, split={"search": 1.0})
    losses = asked(engines[1], loss, "search", range(3))
    whole = read(desk, "kl", top=SIZE, split={"search": 1.0})
    wholes = asked(engines[1], whole, "search", range(3), outcomes(engines[0], whole, "search", range(3)))
    bounds = asked(engines[1], kl, "search", range(3), outcomes(engines[0], kl, "search", range(3)))

    assert [one.value for one in losses] == pytest.approx([one for one, _ in expected], abs=1e-5)
    assert [one.value for one in wholes] == pytest.approx([one for _, one in expected], abs=1e-5)
    assert all(less.value <= more.value + 1e-5 for less, more in zip(bounds, wholes, strict=True))


def test_an_item_that_cannot_be_asked_is_named_with_its_file(desk):
    """Choices that are the same are found when the file is read."""
    (desk / "rows.jsonl").write_text('{"id": "a", "q": "one", "c": ["x", "x"], "split": "search"}\n')

    with pytest.raises(TaskError, match=r"t\.yaml: task 't', item 'a': needs two or more distinct choices"):
        read(desk, "entropy", choices="c")

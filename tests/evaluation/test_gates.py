"""Gates: broken models fail before their first item, and sound ones pass."""

import itertools

import pytest
import torch

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.gates import Gates, failures, pass_gates, repeats
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from tests.evaluation.tiny import SIZE, VOCABULARY, make_model, save


def task(measure, count: int = 6) -> JsonlTask:
    """Return a task over some prompts."""
    items = tuple(Item(id=f"i{i}", prompt=f"word {i} of", answers=("1",), choices=("1", "2")) for i in range(count))
    return JsonlTask(name=type(measure).__name__, splits={"search": items}, measure=measure)


BOTH = {"choose": task(Choose()), "go": task(Generate())}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Return a model and an engine for weights like its."""
    model = make_model("llama")
    return model, Engine(save(tmp_path_factory.mktemp("live"), model), "float32", batch=16)


def loaded(live, **changes: torch.Tensor) -> Engine:
    """Return the engine with the model's weights, but for some."""
    model, engine = live
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.load((tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}).items())
    return engine


def saying(model, texts: list[str]) -> dict[str, torch.Tensor]:
    """Return weights with which a model says what comes next in some texts, whatever it was asked.

    Nothing but the last token counts, so that each token has one that follows.
    """
    changes = {
        name.replace(".", "__"): torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
        if "o_proj" in name or "down_proj" in name
    }
    embed, head = torch.zeros(SIZE, 32), torch.zeros(SIZE, 32)
    follows = {VOCABULARY[one]: VOCABULARY[two] for text in texts for one, two in itertools.pairwise(text)}
    places = {token: i for i, token in enumerate(follows)}
    for token in range(SIZE):
        embed[token, places.get(token, 0)] = 1.0
    for token, after in follows.items():
        head[after, places[token]] = 5.0
    return {**changes, "model__embed_tokens__weight": embed, "lm_head__weight": head}


def test_a_sound_model_passes(live):
    """Nothing is said against random weights of usual size, with or without tasks of each kind."""
    engine = loaded(live)

    for tasks in (BOTH, {"go": BOTH["go"]}, {"choose": BOTH["choose"]}, {}):
        assert failures(engine, Gates(), tasks) == {}
        pass_gates(engine, Gates(), tasks)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_weights_must_be_finite(live, poison):
    """One bad value anywhere is enough."""
    weight = live[0].state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    weight[3, 4] = poison
    engine = loaded(live, model__layers__1__mlp__up_proj__weight=weight)

    with pytest.raises(CandidateError, match="gate: weights are not finite"):
        pass_gates(engine, Gates(), BOTH)


def test_log_likelihoods_must_be_finite(live):
    """Weights that are finite may still overflow."""
    engine = loaded(live, model__norm__weight=torch.full((32,), 1e38))

    with pytest.raises(CandidateError, match=r"gate: .*not finite"):
        pass_gates(engine, Gates(repetition=0), BOTH)


def test_log_likelihoods_must_differ(live):
    """A model for which all tokens are equally likely fails; of one prompt nothing can be said."""
    engine = loaded(live, lm_head__weight=torch.zeros(SIZE, 32))

    assert list(failures(engine, Gates(repetition=0), BOTH)) == ["equal"]
    assert failures(engine, Gates(repetition=0), {"one": task(Choose(), 1)}) == {}
    assert failures(engine, Gates(repetition=0, finite=False), BOTH) == {}


@pytest.mark.parametrize(
    ("text", "stop", "loops"),
    [
        ("ff", (), True),
        ("fabcdf", (), False),
        ("fabcf", (), True),
        ("ff", ("fffff",), False),
        ("fghijklmnpqrstuvwxyz0123456789", (), False),
    ],
)
def test_answers_must_not_repeat_themselves_for_ever(live, text, stop, loops):
    """Cycles of up to four tokens fail, longer ones and those that a stop text ends do not; nor without the gate."""
    engine = loaded(live, **saying(live[0], [text]))
    gates, tasks = Gates(finite=False), {"go": task(Generate(stop=stop))}

    assert list(failures(engine, gates, tasks)) == (["repetition"] if loops else [])
    assert failures(engine, Gates(finite=False, repetition=0), tasks) == {}
    assert failures(engine, gates, {"choose": BOTH["choose"]}) == {}
    if loops:
        with pytest.raises(CandidateError, match="gate: all 4 answers to prompts are endless repetition"):
            pass_gates(engine, gates, tasks)
        pass_gates(engine, gates, tasks, excused={"repetition": "the template does so too"})


def test_a_single_answer_that_goes_on_is_enough(live):
    """Only if all answers repeat themselves has the candidate failed."""
    engine = loaded(live, **saying(live[0], ["ff", "0fx", "123456789abcdeghijklmn"]))
    items = [Item(id=str(i), prompt=prompt, answers=("a",)) for i, prompt in enumerate(["f", "ff", "af", "1"])]
    looping = JsonlTask(name="go", splits={"search": tuple(items[:3])}, measure=Generate())
    mixed = JsonlTask(name="go", splits={"search": tuple(items)}, measure=Generate())

    assert list(failures(engine, Gates(finite=False), {"go": looping})) == ["repetition"]
    assert failures(engine, Gates(finite=False, repetition=16), {"go": mixed}) == {}


def test_what_repeats():
    """A cycle may begin within the first quarter; one other token later on is no cycle."""
    assert repeats([5] * 24)
    assert repeats([9, 8, 7, 6, 5, 4, *[1, 2, 3, 4] * 5][:24])
    assert not repeats([5] * 20 + [6] + [5] * 3)
    assert not repeats([1, 2, 3, 4, 5] * 5)
    assert not repeats([])


def test_answers_must_be_in_the_language_that_is_asked_for(live, monkeypatch):
    """Most of the letters must be in it; so few that nothing can be told pass."""
    pytest.importorskip("py3langid")
    engine = loaded(live)
    texts = iter(
        ["das ist ein satz in deutscher sprache, und er ist lang genug"] * 4
        + ["this is a sentence in the english language, and it is long enough"] * 4
        + ["hm"] * 4
    )
    monkeypatch.setattr(engine, "_text", lambda ids: next(texts))
    gates = Gates(finite=False, repetition=0, language="de")

    found = [failures(engine, gates, BOTH) for _ in range(3)]

    assert found == [{}, {"language": "only 0% of the answers is in the language 'de'"}, {}]


def test_a_gate_that_could_not_tell_is_refused():
    """Fewer tokens than four cycles prove nothing."""
    with pytest.raises(TaskError, match="repetition must be 0 or at least 16 tokens, got 8"):
        Gates(repetition=8)

"""The engine: outcomes as plain transformers and lm-eval's HFLM give them, one at a time, whatever the batch."""

import json
import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateError, ModelError
from evomerge.evaluation import plan as planning
from evomerge.evaluation.batches import Texts
from evomerge.evaluation.decoding import make_stops
from evomerge.evaluation.encoding import Encoder, Refused
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.prefixes import shared_beginnings
from evomerge.evaluation.request import Request
from tests.evaluation.tiny import BOS, CHARACTERS, END, EOS, SIZE, VOCABULARY, make_model, make_tokenizer, save

KINDS = ("llama", "gpt2", "gpt_neox", "qwen2", "gemma2", "mistral", "modernbert_decoder", "mamba")
EVERYWHERE = pytest.mark.parametrize("kind", KINDS)
LONGEST = 8

#: What most prompts begin with: longer than a sliding window, and than what is worth sharing.
EXAMPLES = "1+1=2, 2+2=4, 3+3=6, "


def draw(rng: random.Random, low: int, high: int) -> str:
    """Return random characters, none of which is a blank at an end."""
    return "a" + "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(low, high) - 2)) + rng.choice("xyz")


def prompts(count: int, seed: int = 0) -> list[str]:
    """Return random prompts; three of four have worked examples before them."""
    rng = random.Random(seed)
    return [(EXAMPLES if i % 4 else "") + draw(rng, 2, 14) for i in range(count)]


def choices(count: int, seed: int = 0) -> list[Request]:
    """Return what multiple choice asks: some choices are one token, some have beginnings in common."""
    rng = random.Random(seed + 1)
    kinds = [("1", "2", "3"), ("12", "13", "123", "4"), ("abc", "b"), (" x y", " x z", " x", " y x y")]
    return [
        Request(kind="loglikelihood", context=prompt, continuation=choice + extra)
        for i, prompt in enumerate(prompts(count, seed))
        for extra in [draw(rng, 2, 6) if i % 5 == 0 else ""]
        for choice in kinds[i % len(kinds)]
    ]


def answers(count: int, seed: int = 0, **changes) -> list[Request]:
    """Return requests of greedy generation."""
    form = {"kind": "generate", "most": LONGEST, **changes}
    return [Request(**form, context=prompt) for prompt in prompts(count, seed)]


def texts(count: int, seed: int = 0, **changes) -> list[Request]:
    """Return requests to read whole texts, some longer than the model takes at once."""
    rng = random.Random(seed)
    return [Request(kind="rolling", continuation=draw(rng, 3, 200), **changes) for _ in range(count)]


def plainly(model, tokenizer, prompt: str, longest: int = LONGEST) -> str:
    """Return transformers' own greedy answer to one prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def distributions(model, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities after each token, from one unpadded forward pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def ask(engine: Engine, requests: list[Request]) -> list:
    """Plan and answer."""
    return engine.answer(engine.plan(requests))


def close(one: list, two: list) -> bool:
    """Tell whether outcomes are the same up to rounding."""
    exact = [[(o.tokens, o.greedy, o.text, o.ids) for o in own] for own in (one, two)]
    numbers = [np.array([(o.loglikelihood, o.entropy) for o in own]) for own in (one, two)]
    return exact[0] == exact[1] and np.allclose(*numbers, atol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of each architecture, its folder, and an engine with its weights; made when asked for."""
    made = {}

    def get(kind: str):
        if kind not in made:
            model = make_model(kind)
            folder = save(tmp_path_factory.mktemp(kind), model)
            engine = Engine(folder, "float32", batch=16)
            engine.load(model.state_dict().items())
            made[kind] = model, folder, engine
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_tensors_of_a_file_are_a_candidate(models, kind):
    """Whatever files call the head (GPT-NeoX's `embed_out`), the answers are those of the model that was saved."""
    model, folder, _ = models(kind)
    engine = Engine(folder, "float32", batch=16)
    engine.load(load_file(folder / "model.safetensors").items())
    requests = answers(6)

    expected = [plainly(model, engine.tokenizer, request.context) for request in requests]
    assert [outcome.text for outcome in ask(engine, requests)] == expected


@EVERYWHERE
def test_answers_equal_those_of_transformers_one_prompt_at_a_time(models, kind):
    """Batches, padding, caches and shared examples change no greedy answer."""
    model, _, engine = models(kind)
    requests = answers(40)

    found = ask(engine, requests)

    expected = [plainly(model, engine.tokenizer, request.context) for request in requests]
    assert len(set(expected)) > 25
    assert [outcome.text for outcome in found] == expected


@EVERYWHERE
def test_likelihoods_equal_plain_forward_passes(models, kind):
    """Log-likelihood, greedy flag and entropy are those that an unpadded pass of the whole text gives."""
    model, _, engine = models(kind)
    first = [o.text[:3] or "a" for o in ask(engine, answers(6))]
    likely = [Request(kind="loglikelihood", context=c, continuation=a) for c, a in zip(prompts(6), first, strict=True)]
    requests = [replace(request, entropy=True) for request in choices(24) + likely]

    found = ask(engine, requests)

    for request, outcome in zip(requests, found, strict=True):
        context = engine.tokenizer(request.context)["input_ids"]
        ids = context + engine.tokenizer(request.continuation, add_special_tokens=False)["input_ids"]
        log_p = distributions(model, ids)[len(context) - 1 : -1]
        own = ids[len(context) :]
        assert outcome.tokens == len(own)
        assert outcome.loglikelihood == pytest.approx(float(log_p[range(len(own)), own].sum()), abs=2e-4)
        assert outcome.greedy == (log_p.argmax(-1).tolist() == own)
        assert outcome.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), abs=1e-4)
    assert any(outcome.greedy for outcome in found[-len(likely) :])


@EVERYWHERE
def test_outcomes_equal_those_of_the_harness(models, kind):
    """lm-eval's HFLM says the same to the same requests: also where texts are empty, too long, or end in blanks."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, _, engine = models(kind)
    lm = HFLM(pretrained=model, tokenizer=engine.tokenizer, batch_size=7, max_length=64)
    odd = [("", "fgh"), ("", "<bos>xy"), ("ab ", "c d"), ("ab \n ", " c"), ("<bos>ad", "c"), ("a" * 80, "xyz")]
    reading = [Request(kind="loglikelihood", context=a, continuation=b, cut=True) for a, b in odd] + choices(12)
    rolling = texts(6, seed=1)
    going = answers(10, seed=5, stop=("t", "ab")) + answers(1, stop=("t", "ab"), cut=True)
    going[-1] = replace(going[-1], context=draw(random.Random(3), 90, 90))
    engine_room = engine._room
    engine._room = 64  # mamba has no limit; HFLM was given one

    def theirs(kind: str, arguments: list[tuple]) -> list:
        given = [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]
        return getattr(lm, kind)(given, disable_tqdm=True)

    found = ask(engine, reading + rolling + going)
    engine._room = engine_room

    expected = theirs("loglikelihood", [(request.context, request.continuation) for request in reading])
    assert [o.greedy for o in found[: len(reading)]] == [greedy for _, greedy in expected]
    assert [o.loglikelihood for o in found[: len(reading)]] == pytest.approx([logp for logp, _ in expected], abs=2e-4)
    expected = theirs("loglikelihood_rolling", [(request.continuation,) for request in rolling])
    assert [o.loglikelihood for o in found[len(reading) : -len(going)]] == pytest.approx(expected, abs=1e-3)
    settings = {"until": ["t", "ab"], "max_gen_toks": LONGEST, "do_sample": False}
    assert [o.text for o in found[-len(going) :]] == theirs("generate_until", [(r.context, settings) for r in going])


@EVERYWHERE
def test_sharing_and_batches_change_no_outcome(models, kind):
    """Fed once or again and again, alone or in company, in any order: outcomes are the same up to rounding."""
    model, folder, engine = models(kind)
    requests = choices(16) + texts(3) + answers(12, entropy=True, top=2)
    requests = [requests[i] for i in random.Random(1).sample(range(len(requests)), len(requests))]
    whole = ask(engine, requests)

    for changes in ({"sharing": False}, {"batch": 1}, {"batch": 5, "tokens": 150}, {"sharing": False, "tokens": 1}):
        other = Engine(folder, "float32", **{"batch": 16, **changes})
        other.load(model.state_dict().items())
        assert close(ask(other, requests), whole), changes
    alone = [ask(engine, [requests[i]])[0] for i in range(0, len(requests), 9)]
    assert close(alone, whole[::9])


def test_what_is_alike_is_fed_once(models, monkeypatch):
    """Examples are fed once per candidate, and a context once for all of its choices."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32", batch=16)
    engine.load(model.state_dict().items())
    requests = [
        Request(kind="loglikelihood", context=EXAMPLES + prompt, continuation=choice)
        for prompt in ("a" * 9, "b" * 9, "c" * 9, "d" * 9, "e" * 9, "f" * 9, "g" * 9, "h" * 9)
        for choice in ("123", "124", "5", "5678")
    ]
    fed = []
    forward = engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda **given: fed.append(given["input_ids"].numel()) or forward(**given)
    )
    engine._accepts = frozenset({"input_ids", "past_key_values", "use_cache", "attention_mask", "position_ids"})

    ask(engine, requests)
    once = list(fed)
    ask(engine, requests)

    # the beginning with <bos>; the contexts; of each the choices 12 and 567, for 5 stands at the context's end
    assert once == [1 + len(EXAMPLES), 8 * 9, 2 * 8 * 3]
    assert fed[len(once) :] == once[1:]
    engine.load(model.state_dict().items())
    fed.clear()
    ask(engine, requests)
    assert fed == once


def test_beginnings_are_found_where_they_save_most():
    """Texts are grouped by what they begin with, also where groups have something in common; the rest is left alone."""
    common, one, two = range(20), range(100, 160), range(200, 260)
    texts = [(*common, *rest, i) for rest in (one, two) for i in range(6)] + [(7, 7, i) for i in (1, 2)]
    order = random.Random(0).sample(range(14), 14)
    shuffled = [texts[i] for i in order]

    found = shared_beginnings(shuffled, [len(text) - 1 for text in shuffled])

    assert [prefix for prefix, _ in found] == [(*common, *one), (*common, *two), ()]
    assert [sorted(order[place] for place in places) for _, places in found] == [
        list(range(6)), list(range(6, 12)), [12, 13]
    ]  # fmt: skip
    assert shared_beginnings(shuffled, [10] * 14) == [((), list(range(14)))]
    assert shared_beginnings([], []) == []
    nested = [tuple(range(i)) for i in range(1, 400)]
    assert sorted(place for _, places in shared_beginnings(nested, list(map(len, nested))) for place in places) == list(
        range(399)
    )


def test_the_likeliest_tokens_and_those_that_were_named(models):
    """`top` gives the likeliest tokens of each position, `at` the log-probabilities of others there."""
    model, _, engine = models("llama")
    [request] = texts(1)
    request = replace(request, continuation=request.continuation[:30])
    ids = [BOS, *engine.tokenizer(request.continuation)["input_ids"]]
    log_p = distributions(model, ids)[:-1]
    best = log_p.topk(3, dim=-1)

    [top] = ask(engine, [replace(request, top=3)])
    named = tuple((i % SIZE, (i + 7) % SIZE)[: i % 3] for i in range(len(ids) - 1))
    [at] = ask(engine, [replace(request, at=named)])

    assert top.ids == tuple(map(tuple, best.indices.tolist()))
    assert np.allclose(top.logp, best.values, atol=1e-4)
    assert list(map(len, at.logp)) == list(map(len, named))
    assert all(
        np.allclose(own, log_p[place, list(tokens)], atol=1e-4)
        for place, (own, tokens) in enumerate(zip(at.logp, named, strict=True))
    )
    with pytest.raises(Refused, match="named at 2 positions, but 31 are read"):
        engine.plan([replace(request, at=named[:2])])


def test_answers_tell_their_tokens_and_how_sure_they_were(models):
    """With `top` an answer's likeliest tokens are its own, and its entropy is the mean over the steps taken."""
    model, _, engine = models("llama")
    requests = answers(12, top=1, entropy=True)

    for request, outcome in zip(requests, ask(engine, requests), strict=True):
        ids = engine.tokenizer(request.context)["input_ids"]
        own = [step[0] for step in outcome.ids]
        log_p = distributions(model, ids + own)[len(ids) - 1 : -1]
        assert own == log_p.argmax(-1).tolist()
        assert engine.tokenizer.decode(own[: outcome.tokens], skip_special_tokens=True) == outcome.text
        assert outcome.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), abs=1e-4)


def test_a_cut_text_is_its_end(models):
    """A text that is to be cut is read from its last tokens; others are read whole, in windows."""
    model, _, engine = models("llama")
    text = draw(random.Random(0), 150, 150)
    ids = engine.tokenizer(text)["input_ids"]
    log_p = distributions(model, [BOS, *ids[-64:-1]])

    cut, whole = ask(engine, [Request(kind="rolling", continuation=text, cut=cut) for cut in (True, False)])

    assert (cut.tokens, whole.tokens) == (64, 151)
    assert cut.loglikelihood == pytest.approx(float(log_p[range(64), ids[-64:]].sum()), abs=2e-4)


def test_a_model_that_computes_no_head_by_itself_gives_the_same(models, monkeypatch):
    """Where the head is not a module, the wanted positions are taken from all logits."""
    _, _, engine = models("llama")
    requests = choices(10) + answers(5)
    expected = ask(engine, requests)
    monkeypatch.setattr(engine._head, "_pick", lambda *_: None)
    hooks = engine.model.get_output_embeddings()._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()

    found = ask(engine, requests)
    hooks.update(kept)

    assert close(found, expected)


def test_a_model_with_a_state_of_its_own_goes_on_with_it(models):
    """Where keys and values cannot be gone on from, answers go on with what the model itself keeps."""
    _, _, engine = models("qwen2")
    requests = answers(20, stop=("t",))
    expected = ask(engine, requests)
    abilities = engine._abilities
    engine._abilities = replace(abilities, caches=False)

    found = ask(engine, requests)
    engine._abilities = abilities

    assert close(found, expected)


def test_forgetting_texts_changes_no_outcome(models, monkeypatch):
    """The memory of decoded answers is only that: with room for one it gives the same outcomes."""
    _, _, engine = models("llama")
    expected = ask(engine, answers(10))
    monkeypatch.setattr("evomerge.evaluation.engine.TEXTS", 1)
    monkeypatch.setattr(engine, "_texts", {})

    assert ask(engine, answers(10)) == expected
    assert len(engine._texts) == 1


def test_an_answer_ends_at_the_end_of_sequence(models):
    """Tokens after any of the end tokens that config, tokenizer or generation config name do not count."""
    model, folder, _ = models("llama")
    requests = answers(30, seed=3)
    tokenizer = make_tokenizer()
    config = json.loads((folder / "generation_config.json").read_text())
    ends = [EOS, VOCABULARY["t"], VOCABULARY["6"]]
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    try:
        engine = Engine(folder, "float32", batch=16)
    finally:
        (folder / "generation_config.json").write_text(json.dumps(config))
    engine.load(model.state_dict().items())
    whole = [plainly(model, tokenizer, request.context) for request in requests]
    expected = [text.replace("6", "t").split("t")[0] for text in whole]

    found = ask(engine, requests)

    assert sum("t" in text for text in whole) > 5
    assert [outcome.text for outcome in found] == expected
    assert [outcome.tokens for outcome in found] == [len(text) for text in expected]


@pytest.mark.parametrize("stop", [("t",), ("6t", "k"), ("tt",), ("", "t")])
def test_stop_texts_end_answers_and_rows_that_ended_are_dropped(models, stop, monkeypatch):
    """An answer is what stands before the first stop text, and no more is fed than the rows that still go on need."""
    model, _, engine = models("llama")
    requests = answers(32, seed=4, stop=stop, most=24)
    whole = [plainly(model, engine.tokenizer, request.context, 24) for request in requests]
    marks = [mark for mark in stop if mark]
    places = [min((text.find(mark) for mark in marks if mark in text), default=len(text)) for text in whole]
    plan = engine.plan(requests)
    rows = []
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda **given: rows.append(len(given["input_ids"])) or step(**given))

    found = engine.answer(plan)

    assert sum(any(mark in text for mark in marks) for text in whole) > 2
    assert [outcome.text for outcome in found] == [text[:place] for text, place in zip(whole, places, strict=True)]
    needed = sum(place + max(map(len, marks)) for place in places)
    assert sum(rows) <= 4 / 3 * needed + len(requests)


def test_only_tokens_that_may_complete_a_stop_text_are_decoded():
    """The suspects are the tokens with the last character of a stop text; special tokens end by themselves."""
    stops = make_stops(make_tokenizer(), {EOS}, ("ab", "<end>", " ", ""), SIZE + 4, "cpu")

    assert {i for i in range(SIZE + 4) if stops.ends_V[i]} == {EOS, END}
    assert {i for i in range(SIZE + 4) if stops.suspects_V[i]} == {VOCABULARY["b"], VOCABULARY[" "]}


def test_the_same_plan_gives_the_same_bits(models):
    """Asked twice, also with another candidate in between, a model gives equal outcomes."""
    model, _, engine = models("llama")
    other = make_model("llama", seed=1)
    plan = engine.plan(choices(20) + answers(10))

    first = engine.answer(plan)
    engine.load(other.state_dict().items())
    between = engine.answer(plan)
    engine.load(model.state_dict().items())

    assert engine.answer(plan) == first
    assert between != first


class Scarce:
    """Memory for so many tokens at once (rows times length of what is fed); for more there is none."""

    def __init__(self, engine: Engine, tokens: int, lack=None) -> None:
        """Watch a model; `lack` is what happens where there is no memory."""
        self.forward, self.tokens, self.fed = engine.model.forward, tokens, []
        self.lack = lack or raising(torch.OutOfMemoryError("CUDA out of memory"))
        engine.model.forward = self
        engine._accepts = frozenset({"input_ids", "past_key_values", "use_cache", "attention_mask", "position_ids"})

    def __call__(self, **given):
        """Run the model, or run out of memory."""
        self.fed.append(given["input_ids"].numel())
        if self.fed[-1] > self.tokens:
            self.lack()
        return self.forward(**given)


def raising(problem):
    """Return a function that raises."""

    def lack():
        raise problem

    return lack


#: How memory runs out: as torch says it of a GPU; for real, in torch and in numpy; and as a library of CUDA's says it.
LACKS = {
    "gpu": raising(torch.OutOfMemoryError("CUDA out of memory")),
    "torch": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "numpy": lambda: np.empty(1 << 60, dtype=np.uint8),
    "cublas": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
}


@pytest.mark.parametrize("asked", [choices(20), answers(30), texts(8), choices(1, seed=3)[:3]])
def test_a_batch_that_does_not_fit_is_halved(models, asked):
    """Out of memory, the engine goes on with less, gives the same outcomes, and does not try so much again."""
    model, folder, engine = models("llama")
    expected = ask(engine, asked)
    small = Engine(folder, "float32", batch=16)
    small.load(model.state_dict().items())
    memory = Scarce(small, max(len(prompt.continuation) for prompt in asked) + 60)

    found = ask(small, asked)
    tried = max(memory.fed)
    memory.fed.clear()
    again = ask(small, asked)

    assert close(found, expected)
    assert close(again, expected)
    assert tried > memory.tokens or len(asked) == 3
    assert max(memory.fed) <= memory.tokens


@pytest.mark.parametrize("lack", LACKS)
def test_however_memory_runs_out_the_answers_are_those_of_small_batches(models, lack):
    """An engine whose batches were small from the start says the same, and the user is told once what to set."""
    model, folder, _ = models("llama")
    asked, said = choices(20) + answers(30), []
    small = Engine(folder, "float32", batch=16, tokens=70)
    large = Engine(folder, "float32", batch=16, say=said.append)
    for engine in (small, large):
        engine.load(model.state_dict().items())
    memory = Scarce(large, 70, LACKS[lack])

    found = [ask(large, asked), ask(large, asked)]

    assert all(close(one, ask(small, asked)) for one in found)
    assert max(memory.fed) > 70
    assert len(said) == 1
    assert "not enough memory on cpu for a batch of" in said[0]
    assert said[0].endswith("to spare the tries, set `tokens` of `workers`")
    assert large.tokens <= 2 * 70


def test_what_is_no_lack_of_memory_is_not_tried_again(models):
    """Another error of torch's is the candidate's, at once."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32", batch=16)
    engine.load(model.state_dict().items())
    memory = Scarce(engine, 0, raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ask(engine, choices(4))
    assert len(memory.fed) == 1


@pytest.mark.parametrize("asked", [choices(4), answers(4)])
def test_no_memory_for_one_row_fails_the_candidate(models, asked):
    """Where not even a single row fits, the candidate has failed."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32", batch=16)
    engine.load(model.state_dict().items())
    Scarce(engine, 0)

    with pytest.raises(CandidateError, match="not enough memory on cpu for a single row"):
        ask(engine, asked)


def test_batches_keep_their_bounds(models):
    """No batch has more rows or tokens than allowed but single rows, and all logits of a batch fit their bound."""
    _, _, engine = models("llama")
    plan = engine.plan(choices(30) + texts(5) + answers(30))

    for tokens in (64, 200, 1000):
        for batch in plan.batches(tokens):
            rows = len(batch.texts if isinstance(batch, Texts) else batch.prompts)
            assert rows <= 16
            assert batch.size <= tokens or batch.alone or rows == 1
    assert plan.batches(200) is plan.batches(200)


def test_few_logits_are_asked_for_at_once(models, monkeypatch):
    """Where many positions are read of each row, batches are smaller."""
    _, _, engine = models("llama")
    monkeypatch.setattr(planning, "LOGITS", 130 * SIZE)

    batches = engine.plan(texts(8)).batches(10**6)

    assert max(len(batch.first.row_U) for batch in batches) <= 130
    assert len(batches) > 4


def test_a_plan_is_kept_by_its_key(models, monkeypatch):
    """The same key asks once for requests; the oldest plan goes when there are too many."""
    _, _, engine = models("llama")
    monkeypatch.setattr("evomerge.evaluation.engine.PLANS", 2)
    monkeypatch.setattr(engine, "_plans", {})
    made = []

    def make() -> list[list[Request]]:
        made.append(1)
        return [choices(1), []]

    plan, sizes = engine.kept("one", make)

    assert sizes == (3, 0)
    assert engine.kept("one", make)[0] is plan
    engine.kept("two", make)
    engine.kept("three", make)
    assert engine.kept("one", make)[0] is not plan
    assert len(made) == 4


def test_the_engine_is_the_model_that_was_loaded(models):
    """After a load, weights and logits equal those of the model, and nothing was allocated anew."""
    _, folder, _ = models("llama")
    engine = Engine(folder, "float32")
    other = make_model("llama", seed=5)
    places = {name: weight.data_ptr() for name, weight in engine.model.named_parameters()}

    engine.load((name, tensor.clone()) for name, tensor in other.state_dict().items())

    ids = torch.arange(12)[None]
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in engine.model.named_parameters())
    assert {name: weight.data_ptr() for name, weight in engine.model.named_parameters()} == places
    assert torch.equal(engine.model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_needs_one_tensor(tmp_path, name):
    """Either name of tied weights fills both ends."""
    model = make_model("llama", tied=True)
    folder = save(tmp_path / "tied", model)
    engine = Engine(folder, "float32")
    tensors = {key: tensor for key, tensor in model.state_dict().items() if "embed" not in key and "lm_head" not in key}

    engine.load({**tensors, name: model.state_dict()["lm_head.weight"]}.items())

    ids = torch.arange(12)[None]
    assert torch.equal(engine.model(ids).logits, model(ids).logits)


def test_names_of_a_bare_model_fit(models):
    """Files saved without the prefix of the causal model load, and buffers of old files are ignored."""
    model, folder, _ = models("gpt2")
    engine = Engine(folder, "float32")
    whole = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}

    engine.load({**bare, "h.0.attn.bias": torch.ones(1), "h.1.attn.masked_bias": torch.ones(1)}.items())

    ids = torch.arange(12)[None]
    assert torch.equal(engine.model(ids).logits, model(ids).logits)


def test_a_lower_precision_is_what_computes(models):
    """In bfloat16 the live model gives the logits of the plain model loaded in bfloat16."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "bfloat16")
    engine.load(model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    ids = torch.arange(12)[None]
    assert engine.model.dtype == torch.bfloat16
    assert torch.equal(engine.model(ids).logits, plain(ids).logits)


def test_building_an_engine_leaves_the_global_random_stream(models):
    """Nothing random is drawn from, or set in, torch's global generator."""
    _, folder, _ = models("llama")
    before = torch.get_rng_state()

    Engine(folder, "float32")

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "1 parameters .* got no tensor, the first is 'lm_head.weight'"),
        (lambda t: t.update({"model.extra.weight": torch.ones(1)}), "'model.extra.weight' is not in the llama model"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}), r"has shape \[2, 2\], the live model's has"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(models, change, message):
    """A missing, an unknown and a misshapen tensor are named."""
    model, folder, _ = models("llama")
    tensors = dict(model.state_dict())
    change(tensors)

    with pytest.raises(ModelError, match=message):
        Engine(folder, "float32").load(tensors.items())


@pytest.mark.parametrize("asked", [choices(3), texts(2), answers(3)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_candidate(models, asked, poison):
    """Not a number anywhere in the model is a failure and never a wrong answer."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.norm.weight"][3] = poison
    engine.load(tensors.items())

    assert not engine.finite
    with pytest.raises(CandidateError, match="not finite"):
        ask(engine, asked)


def test_weights_are_finite_where_all_are(models):
    """A sound model's weights count as finite, whatever their size."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "bfloat16")
    engine.load({name: tensor * 1e30 for name, tensor in model.state_dict().items()}.items())

    assert engine.finite


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(kind="generate", context="a" * 56, most=LONGEST), "57 tokens, but the model has room for 56 beside"),
        (Request(kind="loglikelihood", context="a" * 60, continuation="b" * 5), "65 tokens, .* room for 64 beside"),
        (Request(kind="loglikelihood", context="a", continuation="b" * 65, cut=True), "65 tokens, .* room for 64"),
        (Request(kind="loglikelihood", context="a", continuation=""), "the continuation '' has no tokens"),
        (Request(kind="generate", context="a"), "an answer needs room for a token or more, got 0"),
        (Request(kind="generate", context="a", most=2, at=((1,),)), "`at` is for what is read"),
        (Request(kind="guess", context="a"), "kind 'guess' is none of loglikelihood, rolling, generate"),
    ],
)
def test_requests_that_the_model_cannot_be_asked_are_refused(models, request_, message):
    """The place of the request and the reason are named; the 64 positions must hold <bos>, prompt and answer."""
    _, _, engine = models("llama")

    with pytest.raises(Refused, match=rf"request 1: {message}") as caught:
        engine.plan([Request(kind="generate", context="b", most=2), request_])
    assert caught.value.request == 1


def test_an_empty_prompt_starts_with_the_first_token_there_is(tmp_path):
    """Without <bos> of its own an empty prompt gets one, for a model must be fed something."""
    folder = save(tmp_path / "m", model := make_model("llama"), bos=False)
    engine = Engine(folder, "float32")
    engine.load(model.state_dict().items())
    answer = engine.tokenizer.decode(
        model.generate(torch.tensor([[BOS]]), max_new_tokens=LONGEST, do_sample=False)[0, 1:], skip_special_tokens=True
    )
    empty = [Request(kind="generate", most=LONGEST), Request(kind="rolling"), Request(kind="loglikelihood")]

    assert ask(engine, empty[:1])[0].text == answer
    with pytest.raises(Refused, match="the text has no tokens"):
        engine.plan(empty[1:2])
    engine.tokenizer.bos_token = engine.tokenizer.eos_token = None
    for request in (empty[0], replace(empty[1], continuation="a"), replace(empty[2], continuation="a")):
        with pytest.raises(Refused, match="no first token"):
            engine.plan([request])


def test_windows_have_the_length_that_model_or_tokenizer_names():
    """Where the model has no limit the tokenizer's counts, and else lm-eval's 2048 tokens."""
    tokenizer = make_tokenizer()

    assert (Encoder(tokenizer, 64).window, Encoder(tokenizer, None).window) == (64, 2048)
    tokenizer.model_max_length = 100
    assert Encoder(tokenizer, None).window == 100


def test_no_requests_are_no_outcomes(models):
    """An empty plan is answered with nothing."""
    _, _, engine = models("llama")

    assert ask(engine, []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json; give the folder of a transformers model"),
        (lambda folder: (folder / "config.json").write_text("{}"), "transformers cannot build it"),
        (lambda folder: None, "loads as torch.float32, but torch.bfloat16 is declared"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, change, message):
    """What is missing, broken, or not what was declared is named."""
    folder = save(tmp_path / "m", make_model("llama"))
    change(folder)

    with pytest.raises(ModelError, match=message):
        Engine(folder, "bfloat16", pretrained=True)

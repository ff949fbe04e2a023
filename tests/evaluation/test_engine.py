"""The engine: answers as plain transformers gives them, one prompt at a time, whatever the batch."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateError, ModelError, TaskError
from evomerge.evaluation.decoding import make_stops
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.plan import cut_batches
from evomerge.evaluation.task import Item, Task
from tests.evaluation.tiny import BOS, CHARACTERS, END, EOS, SIZE, VOCABULARY, make_model, make_tokenizer, save

KINDS = ("llama", "gpt2", "gpt_neox", "mamba")
EVERYWHERE = pytest.mark.parametrize("kind", KINDS)
LONGEST = 8


def prompts(count: int, seed: int = 0) -> list[str]:
    """Return random prompts of 1 to 14 characters."""
    rng = random.Random(seed)
    return ["".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 14))) for _ in range(count)]


def generating(answers: list[str], asked: list[str], **changes) -> Task:
    """Return a task of greedy generation."""
    items = tuple(
        Item(id=f"i{i}", prompt=prompt, answer=answer)
        for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
    )
    return Task(**{"name": "t", "kind": "generate", "splits": {"search": items}, "max_new_tokens": LONGEST, **changes})


def choosing(count: int, choices: list[tuple[str, ...]], seed: int = 0) -> Task:
    """Return a multiple choice task over random prompts; the right choice moves from place to place."""
    items = tuple(
        Item(id=f"i{i}", prompt=prompt, answer=own[i % len(own)], choices=own)
        for i, prompt in enumerate(prompts(count, seed))
        for own in [choices[i % len(choices)]]
    )
    return Task(name="t", kind="multiple_choice", splits={"search": items})


def plainly(model, tokenizer, prompt: str, longest: int = LONGEST) -> str:
    """Return transformers' own greedy answer to one prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def likelihoods(model, tokenizer, item: Item) -> list[float]:
    """Return log p(choice | prompt) from one forward pass per choice, without padding."""
    prompt = tokenizer(item.prompt)["input_ids"]
    found = []
    for choice in item.choices:
        ids = prompt + tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
    return found


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


@EVERYWHERE
def test_generation_equals_transformers_one_prompt_at_a_time(models, kind):
    """Batches, padding and caching change no greedy answer: each response is right, and wrong for another answer."""
    model, _, engine = models(kind)
    asked = prompts(50)
    answers = [plainly(model, engine.tokenizer, prompt) for prompt in asked]
    task = generating(answers, asked)

    plan = engine.plan(task, "search", range(50))
    found = [response.value for response in engine.answer(plan)]
    swapped = engine.answer(engine.plan(generating(answers[1:] + answers[:1], asked), "search", range(50)))

    assert len(set(answers)) > 30
    assert found == [1.0] * 50
    assert sum(response.value for response in swapped) == sum(
        a.strip() == b.strip() for a, b in zip(answers, answers[1:] + answers[:1], strict=True)
    )
    assert any(batch.mask_BT is not None for batch in plan.prompts) == (kind != "mamba")


@EVERYWHERE
def test_margins_equal_plain_forward_passes(models, kind):
    """Margins are the differences of log-likelihoods that unpadded single passes give, shared prefixes or not."""
    model, _, engine = models(kind)
    task = choosing(30, [("1", "2", "3"), ("12", "13", "123", "4"), ("abc", "b"), ("x y", "x z", "x", "y x y")])

    found = engine.answer(engine.plan(task, "search", range(30)))

    for item, response in zip(task.splits["search"], found, strict=True):
        of = dict(zip(item.choices, likelihoods(model, engine.tokenizer, item), strict=True))
        margin = of.pop(item.answer) - max(of.values())
        assert response.margin == pytest.approx(margin, abs=2e-4)
        assert response.value == float(margin > 0)
    assert 0 < sum(response.value for response in found) < 30


def test_a_model_that_keeps_all_logits_gives_the_same_margins(models, monkeypatch):
    """Where a model cannot be told which logits are needed, they are picked from all."""
    _, _, engine = models("llama")
    plan = engine.plan(choosing(20, [("12", "13", "4"), ("5", "abcdef")]), "search", range(20))
    expected = [response.margin for response in engine.answer(plan)]
    monkeypatch.setattr(engine, "_accepts", engine._accepts - {"logits_to_keep"})

    assert [response.margin for response in engine.answer(plan)] == pytest.approx(expected, abs=1e-4)


def test_forgetting_texts_changes_no_response(models, monkeypatch):
    """The memory of decoded answers is only that: with room for one it gives the same responses."""
    model, _, engine = models("llama")
    asked = prompts(10)
    task = generating([plainly(model, engine.tokenizer, prompt) for prompt in asked], asked)
    monkeypatch.setattr("evomerge.evaluation.engine.TEXTS", 1)
    monkeypatch.setattr(engine, "_texts", {})

    assert [response.value for response in engine.answer(engine.plan(task, "search", range(10)))] == [1.0] * 10
    assert len(engine._texts) == 1


def test_an_answer_ends_at_the_end_of_sequence(models):
    """Tokens after any of the end tokens that config, tokenizer or generation config name do not count."""
    model, folder, _ = models("llama")
    asked = prompts(30, seed=3)
    tokenizer = make_tokenizer()
    config = json.loads((folder / "generation_config.json").read_text())
    ends = [EOS, VOCABULARY["t"], VOCABULARY["6"]]
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    try:
        engine = Engine(folder, "float32", batch=16)
    finally:
        (folder / "generation_config.json").write_text(json.dumps(config))
    engine.load(model.state_dict().items())
    whole = [plainly(model, tokenizer, prompt) for prompt in asked]
    answers = [text.replace("6", "t").split("t")[0] for text in whole]

    found = engine.answer(engine.plan(generating(answers, asked), "search", range(30)))

    assert sum("t" in text for text in whole) > 5
    assert [response.value for response in found] == [1.0] * 30


@pytest.fixture(scope="module")
def texts(models) -> dict[str, str]:
    """Return what the plain Llama model writes after each of 80 prompts."""
    model, _, engine = models("llama")
    return {prompt: plainly(model, engine.tokenizer, prompt) for prompt in prompts(80, seed=4)}


@pytest.mark.parametrize("stop", [("t",), ("6t", "k"), ("tt",)])
def test_stop_texts_end_answers_and_save_steps(models, texts, stop, monkeypatch):
    """An answer is what stands before the first stop text, and a batch ends when all its rows have one."""
    _, _, engine = models("llama")
    asked = [prompt for prompt, text in texts.items() if any(mark in text for mark in stop)]
    whole = [texts[prompt] for prompt in asked]
    ends = [min(text.find(mark) for mark in stop if mark in text) for text in whole]
    answers = [text[:end].strip() for text, end in zip(whole, ends, strict=True)]
    calls = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda **given: calls.append(1) or forward(**given))
    task = generating(answers, asked, stop=stop, max_new_tokens=40)
    plan = engine.plan(task, "search", range(len(asked)))

    found = engine.answer(plan)

    assert len(asked) > 5
    assert [response.value for response in found] == [1.0] * len(asked)
    # as many steps as the slowest row of a batch needs to write its stop text
    assert len(calls) <= len(plan.prompts) * (max(ends) + max(map(len, stop)))


def test_only_tokens_that_may_complete_a_stop_text_are_decoded():
    """The suspects are the tokens with the last character of a stop text; special tokens end by themselves."""
    stops = make_stops(make_tokenizer(), {EOS}, ("ab", "<end>", " "), SIZE + 4, "cpu")

    assert {i for i in range(SIZE + 4) if stops.ends_V[i]} == {EOS, END}
    assert {i for i in range(SIZE + 4) if stops.suspects_V[i]} == {VOCABULARY["b"], VOCABULARY[" "]}


def test_the_same_plan_gives_the_same_bits(models):
    """Asked twice, also with another candidate in between, a model gives equal responses and margins."""
    model, _, engine = models("llama")
    other = make_model("llama", seed=1)
    task = choosing(20, [("12", "13", "4")])
    plan = engine.plan(task, "search", range(20))

    first = engine.answer(plan)
    engine.load(other.state_dict().items())
    between = engine.answer(plan)
    engine.load(model.state_dict().items())

    assert engine.answer(plan) == first
    assert between != first


def test_company_changes_no_response(models):
    """An item's margin is the same alone, among others, and in another order, up to rounding."""
    _, _, engine = models("llama")
    task = choosing(40, [("12", "13", "4"), ("5", "abcdef")])
    whole = engine.answer(engine.plan(task, "search", range(40)))
    order = random.Random(1).sample(range(40), 40)

    mixed = engine.answer(engine.plan(task, "search", order))
    alone = [engine.answer(engine.plan(task, "search", [i]))[0] for i in range(0, 40, 7)]

    assert [mixed[order.index(i)].margin for i in range(40)] == pytest.approx([r.margin for r in whole], abs=1e-4)
    assert [r.margin for r in alone] == pytest.approx([r.margin for r in whole[::7]], abs=1e-4)


def test_plans_are_made_once(models, monkeypatch):
    """The same items of the same task are tokenised once; the oldest plan goes when there are too many."""
    _, _, engine = models("llama")
    monkeypatch.setattr("evomerge.evaluation.engine.PLANS", 2)
    monkeypatch.setattr(engine, "_plans", {})
    task = choosing(6, [("1", "2")])

    first = engine.plan(task, "search", (0, 1))

    assert engine.plan(task, "search", [0, 1]) is first
    assert engine.plan(task, "search", [1, 0]) is not first
    engine.plan(task, "search", [2])
    assert engine.plan(task, "search", [0, 1]) is not first


def test_the_engine_is_the_model_that_was_loaded(tmp_path, models):
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


@pytest.mark.parametrize("kind", ["generate", "multiple_choice"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_candidate(models, kind, poison):
    """Not a number anywhere in the model is a failure and never a wrong answer."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.norm.weight"][3] = poison
    engine.load(tensors.items())
    task = choosing(5, [("1", "2")]) if kind == "multiple_choice" else generating(["x"] * 5, prompts(5))

    with pytest.raises(CandidateError, match=r"task 't': .*not finite"):
        engine.answer(engine.plan(task, "search", range(5)))


def test_a_model_that_does_not_prefer_fails(models):
    """Equal likelihoods of all choices of all items are a broken model, not chance."""
    model, folder, _ = models("llama")
    engine = Engine(folder, "float32")
    engine.load({**model.state_dict(), "lm_head.weight": torch.zeros(SIZE, 32)}.items())

    with pytest.raises(CandidateError, match="all choices of every item have one log-likelihood"):
        engine.answer(engine.plan(choosing(5, [("1", "2", "3")]), "search", range(5)))


def test_items_that_do_not_exist_are_refused(models):
    """A place beyond the split and a negative one name task, split and size."""
    _, _, engine = models("llama")

    for place in (5, -1):
        with pytest.raises(TaskError, match=f"'search' has 5 items, none at place {place}"):
            engine.plan(choosing(5, [("1", "2")]), "search", [place])


@pytest.mark.parametrize(
    ("task", "room"),
    [
        (generating(["x"], ["a" * 56]), 64 - LONGEST),
        (Task(name="t", kind="multiple_choice", splits={"search": (
            Item(id="i0", prompt="a" * 60, answer="1", choices=("1", "b" * 5)),)}), 64),
    ],
)  # fmt: skip
def test_items_that_are_too_long_for_the_model_are_refused(models, task, room):
    """The 64 positions of the model must hold <bos>, the prompt and the answer."""
    _, _, engine = models("llama")

    with pytest.raises(TaskError, match=rf"item 'i0': \d+ tokens, but the model has room for {room}"):
        engine.plan(task, "search", [0])


def test_a_choice_without_tokens_is_refused(models, monkeypatch):
    """A choice that the tokenizer drops has no likelihood."""
    _, _, engine = models("llama")
    monkeypatch.setattr(engine, "tokenizer", Dropping())

    with pytest.raises(TaskError, match="choice '2' has no tokens"):
        engine.plan(choosing(1, [("1", "2")]), "search", [0])


class Dropping:
    """A tokenizer that knows no 2."""

    bos_token_id = BOS
    eos_token_id = None

    def __call__(self, texts, add_special_tokens=True):
        """Return no tokens for 2, one for others."""
        return {"input_ids": [[] if text == "2" else [5] for text in texts]}


def test_an_empty_prompt_starts_with_the_first_token_there_is(tmp_path):
    """Without <bos> of its own an empty prompt gets one, for a model must be fed something."""
    folder = save(tmp_path / "m", model := make_model("llama"), bos=False)
    engine = Engine(folder, "float32")
    engine.load(model.state_dict().items())
    answer = engine.tokenizer.decode(
        model.generate(torch.tensor([[BOS]]), max_new_tokens=LONGEST, do_sample=False)[0, 1:], skip_special_tokens=True
    )

    assert engine.answer(engine.plan(generating([answer], [""]), "search", [0]))[0].value == 1.0
    engine.tokenizer.bos_token = engine.tokenizer.eos_token = None
    engine._plans.clear()
    with pytest.raises(TaskError, match="the prompt has no tokens"):
        engine.plan(generating([answer], [""]), "search", [0])


def test_no_items_are_no_responses(models):
    """An empty job is answered with nothing."""
    _, _, engine = models("llama")

    assert engine.answer(engine.plan(choosing(5, [("1", "2")]), "search", [])) == []
    assert engine.answer(engine.plan(generating(["x"], ["y"]), "search", [])) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "transformers cannot build it"),
        ({"config.json": '{"model_type": "none-such"}'}, "transformers cannot build it"),
        ({"config.json": '{"model_type": "llama"}'}, "transformers cannot build it"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, files, message):
    """Missing and broken files are one line with the folder."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(ModelError, match=message) as problem:
        Engine(tmp_path, "float32")

    assert str(tmp_path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_batches_hold_each_row_once_and_mix_only_what_is_left_over():
    """Batches are within their size, cover all rows, and rows of one length stay together where they are many."""
    rng = random.Random(0)
    lengths = [rng.choice([3, 3, 3, 3, 5, 6, 7, 8, 9]) for _ in range(200)]

    mixed = list(cut_batches(lengths, 16, padding=True))
    pure = list(cut_batches(lengths, 16, padding=False))

    for batches in (mixed, pure):
        assert sorted(row for rows in batches for row in rows) == list(range(200))
        assert max(map(len, batches)) <= 16
    assert all(len({lengths[row] for row in rows}) == 1 for rows in pure)
    assert len(mixed) <= len(pure)
    assert sum(len({lengths[row] for row in rows}) > 1 for rows in mixed) <= 2


def test_a_pretrained_engine_answers_with_the_folders_own_weights(models):
    """Read back as a user would, a saved model gives the responses that it gave while live, bit for bit."""
    _, folder, engine = models("llama")
    task = choosing(20, [("12", "13", "4")])
    live = engine.answer(engine.plan(task, "search", range(20)))

    saved = Engine(folder, "float32", batch=16, pretrained=True)

    assert saved.answer(saved.plan(task, "search", range(20))) == live


def test_a_saved_model_of_another_dtype_is_refused(models):
    """A folder whose config loads as float32 is not the bfloat16 model that was declared."""
    _, folder, _ = models("llama")

    with pytest.raises(ModelError, match=r"loads as torch\.float32, but torch\.bfloat16 is declared"):
        Engine(folder, "bfloat16", pretrained=True)

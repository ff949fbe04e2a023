"""What asking takes of memory, against what torch allocates and what transformers' own caches hold."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from evomerge.evaluation.engine import Engine
from evomerge.evaluation.footprint import asking, plans, shape_of, sketch
from evomerge.evaluation.gates import Gates
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from evomerge.evaluation.request import Request
from tests.evaluation.tiny import SIZE, make_model, save

KINDS = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "mistral", "mamba")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return what gives the folder of a tiny model of a kind."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save(tmp_path_factory.mktemp(kind), make_model(kind))
        return made[kind]

    return folder


def choices(count, length=30):
    """Return requests of four continuations of each context."""
    contexts = [f"{k:02}" + "ab" * (length // 2) for k in range(count)]
    return [Request(kind="loglikelihood", context=c, continuation=f"{x}+{x}={x}") for c in contexts for x in range(4)]


def answers(count, length=30, most=8):
    """Return requests to go on."""
    return [Request(kind="generate", context=f"{k:02}" + "ab" * (length // 2), most=most) for k in range(count)]


def texts(count, length=50):
    """Return texts to be read from their first token on."""
    return [Request(kind="rolling", continuation=f"{k:02}" + "ab" * (length // 2)) for k in range(count)]


ASKED = {"choices": choices(40), "answers": answers(40), "texts": texts(40)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ASKED)
def test_a_sketch_plans_what_the_engine_feeds(folder_of, kind, asked):
    """Without weights the batches are the same, row by row and position by position."""
    real, drawn = Engine(folder_of(kind), "float32", batch=16), sketch(folder_of(kind), "float32", 16, 1 << 14)
    one, two = (engine.plan(ASKED[asked]).batches(600) for engine in (real, drawn))

    assert [batch.size for batch in one] == [batch.size for batch in two]
    assert next(drawn.model.parameters()).device.type == "meta"
    for batch, other in zip(one, two, strict=True):
        if asked == "answers":
            assert batch.ids_BT.shape == other.ids_BT.shape
        else:
            passes = zip((batch.first, *batch.after), (other.first, *other.after), strict=True)
            assert all(a.ids_BT.shape == b.ids_BT.shape and len(a.row_U) == len(b.row_U) for a, b in passes)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "mistral"])
def test_keys_and_values_are_counted_as_transformers_keeps_them(folder_of, kind):
    """The cache of a forward pass over so many tokens has the bytes that the shape says."""
    engine = Engine(folder_of(kind), "float32")
    cache = DynamicCache(config=engine.model.config) if kind not in ("gemma2", "mistral") else DynamicCache()
    with torch.no_grad():
        engine.model(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    shape = shape_of(engine)

    assert held == 3 * 7 * shape.keys * shape.layers * shape.itemsize


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_shape_is_that_of_the_weights(folder_of, kind):
    """The widest module of these models is the one of the feed-forward part, three or four times the hidden size."""
    shape = shape_of(sketch(folder_of(kind), "bfloat16", 8, 100))
    # GPT-NeoX's queries, keys and values are of one weight
    inner = {"llama": 48, "qwen2": 48, "gpt2": 4 * 32, "gpt_neox": 3 * 32}[kind]

    assert (shape.hidden, shape.widest, shape.vocabulary, shape.itemsize) == (32, inner, SIZE, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_answer_allocates_more_than_is_foreseen(folder_of, kind, asked, dtype):
    """Torch's own account of its allocations stays within it, and is no fifth of it either."""
    engine = Engine(folder_of(kind), dtype, batch=64)
    engine.load(make_model(kind).state_dict().items())
    plan = engine.plan(ASKED[asked])
    foreseen = asking(plan, shape_of(engine), engine.tokens)
    engine.answer(plan)  # what is made once is there before it is counted

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.answer(plan)
    peak = most_at_once(seen)

    assert foreseen / 5 < peak <= foreseen


def most_at_once(seen):
    """Return the most bytes that were allocated at once, above those at the beginning."""
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_half_the_tokens_take_no_more_and_one_row_the_least(folder_of):
    """The user's way out of too large a plan is a way out."""
    engine = sketch(folder_of("llama"), "float32", 64, 1 << 14)
    plan, shape = engine.plan(choices(60) + answers(60) + texts(60)), shape_of(engine)
    taken = [asking(plan, shape, tokens) for tokens in (4000, 2000, 1000, 500, 1)]

    assert taken == sorted(taken, reverse=True)
    assert taken[0] > 4 * taken[-1]


def test_longer_answers_take_room_for_their_keys_and_values(folder_of):
    """So many tokens more for each row take what those keep in all layers, and nothing else."""
    engine = sketch(folder_of("llama"), "float32", 16, 1 << 14)
    shape = shape_of(engine)
    short, long = (asking(engine.plan(answers(16, most=most)), shape, 1 << 14) for most in (8, 24))

    assert long - short == 16 * 16 * shape.keys * shape.layers * shape.itemsize


@pytest.mark.parametrize(("itemsize", "copies"), [(4, 3), (2, 7)])
def test_logits_are_counted_with_what_is_made_of_them(folder_of, itemsize, copies):
    """With many tokens in the vocabulary nothing else counts: the logits themselves, in float32, and exponentials."""
    engine = sketch(folder_of("llama"), "float32", 16, 1 << 14)
    plan = engine.plan(texts(3))
    (batch,) = plan.batches(1 << 14)
    shape = replace(shape_of(engine), vocabulary=10**5, itemsize=itemsize)
    logits = len(batch.first.row_U) * shape.vocabulary * itemsize

    assert len(batch.first.row_U) == batch.first.ids_BT.numel()  # all of a text is read
    assert asking(plan, shape, 1 << 14) == pytest.approx(copies * logits, rel=0.01)


def test_the_longest_items_of_every_split_are_planned(folder_of):
    """Wherever in a task the longest item stands, and in whichever split, a plan has it; gates have theirs."""

    def items(count, long=None):
        lengths = [40 if k == long else 2 for k in range(count)]
        prompts = [f"{k:03}".ljust(length, "a") for k, length in enumerate(lengths, start=10 * (long or 0))]
        return tuple(Item(id=prompt, prompt=prompt, answers=("a",), choices=("a", "b")) for prompt in prompts)

    tasks = {
        "one": JsonlTask(name="one", measure=Choose(), splits={"search": items(30, long=25)}),
        "two": JsonlTask(
            name="two", measure=Generate(max_new_tokens=4), splits={"search": items(10), "test": items(20, long=15)}
        ),
    }
    engine = sketch(folder_of("llama"), "float32", 4, 1 << 14)
    gate, *made = plans(engine, tasks, Gates(repetition=0))
    longest = [max(len(request.context) for request in plan.requests) for plan in made]

    assert longest == [40, 3, 40]
    assert [len(plan.requests) for plan in made] == [2 * 4 * 2, 2 * 4, 2 * 4]  # two choices, and two for each row
    assert all(request.kind == "rolling" for request in gate.requests)
    assert len(list(plans(engine, tasks, Gates(finite=False, repetition=0)))) == 3

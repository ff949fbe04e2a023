"""Kept hidden states: outcomes to the last bit those without any, within their budget, and layer passes spared."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateError
from evomerge.evaluation.caches import Branch, Room, Rooms, Trunk
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.gates import Gates
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from evomerge.evaluation.plan import Plan
from evomerge.evaluation.prefix import ROOM, Counts, Course, Entry, Prefixes
from evomerge.evaluation.request import Outcome, Request
from evomerge.hops import Hop, Stack, copy_blend, path_of, recipe_of
from evomerge.ledger import Answered
from evomerge.models.resident import Resident
from evomerge.models.stack import Stacks
from evomerge.pool import Answer, Job, WorkerStatus
from evomerge.recipe import Blend, Recipe, Route, Source, copy_of
from evomerge.search import asking
from evomerge.search.asking import Asking
from evomerge.worker import WorkerSetup
from tests.evaluation.test_engine import EXAMPLES, Scarce, answers, choices, texts
from tests.evaluation.tiny import BOS, SIZE, VOCABULARY, make_model, save

KINDS = ("llama", "gemma2", "gpt2", "gpt_neox", "qwen2")
EVERYWHERE = pytest.mark.parametrize("kind", KINDS)
DEPTH = 4
MUCH = 1 << 30
SOURCES = tuple(Source(name=name, path=name) for name in ("a", "b", "bad"))


def deep(kind: str, seed: int) -> Any:
    """Return a random model of four layers, of both kinds by turns where an architecture has two; norms differ too."""
    config = make_model(kind).config
    config.num_hidden_layers = DEPTH
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * 2
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=stream)
            if weight.ndim == 2:
                weight.copy_(0.35 * noise)
            else:
                weight.add_(0.1 * noise)
    return model.eval()


@dataclass
class Bench:
    """An engine, the stacks that it asks, and the models that they are made of."""

    stacks: Stacks
    engine: Engine
    models: Mapping[str, Any]

    def show(
        self, stack: Stack, prefixes: Prefixes, counts: Counts, branches: Collection[int] = ()
    ) -> Course:
        """Have a stack live."""
        live = self.stacks.build(written(stack))
        live.watch = course = Course(prefixes, live.path, counts)
        course.branches = branches
        self.engine.show(live.model, course)
        return course

    def ask(
        self,
        stack: Stack,
        plans: Sequence[Plan],
        prefixes: Prefixes,
        counts: Counts,
        branches: Collection[int] = (),
        memory: int | None = None,
    ) -> list[list[Outcome]]:
        """Have a stack live and ask it some plans."""
        self.show(stack, prefixes, counts, branches)
        if memory is not None:
            Scarce(self.engine, memory)
        return [self.engine.answer(plan) for plan in plans]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """Return what makes a fresh bench of a kind: sources a and b, and one without a number where `z` is embedded."""
    made: dict[str, tuple[dict[str, Any], dict[str, Path]]] = {}

    def get(kind: str = "llama", batch: int = 16, **more: Any) -> Bench:
        if kind not in made:
            models = {"a": deep(kind, 1), "b": deep(kind, 2), "bad": deep(kind, 1)}
            with torch.no_grad():
                models["bad"].get_input_embeddings().weight[VOCABULARY["z"]] = float("nan")
            root = tmp_path_factory.mktemp(kind)
            made[kind] = models, {name: save(root / name, model) for name, model in models.items()}
        models, folders = made[kind]
        stacks = Stacks(folders["a"], Resident(folders), "float32")
        engine = Engine(folders["a"], "float32", batch=batch, prepare=stacks.adopt, **more)
        return Bench(stacks, engine, models)

    return get


def stack_of(text: str, embedding: str = "a", head: str = "a") -> Stack:
    """Return the stack that is written as `a0 b1*0.5`: layer 0 of a, then layer 1 of b with its input halved."""
    hops = []
    for word in text.split():
        name, _, scale = word.partition("*")
        hops.append(Hop(source=name[:-1], layer=int(name[-1]), scale=float(scale or 1)))
    return Stack(embedding=embedding, hops=tuple(hops), head=head)


def written(stack: Stack) -> Recipe:
    """Return the recipe of a stack, whose ends may be of two sources."""
    recipe = recipe_of(stack, SOURCES, "float32")
    embedding = Route(blend=copy_blend(stack.embedding), groups=("embedding",))
    return replace(recipe, sources=SOURCES, routes=(embedding, *recipe.routes))


def journey(seed: int, count: int) -> list[Stack]:
    """Return stacks each of which is an earlier one, edited once or twice: other layers, scales, lengths, ends."""
    rng = random.Random(seed)
    found = [stack_of("a0 a1 a2 a3"), stack_of("b0 b1 b2 b3", embedding="b", head="b")]
    while len(found) < count:
        old = rng.choice(found[:1] + found[-3:])
        hops = list(old.hops)
        for _ in range(rng.randint(1, 2)):
            at = min(rng.randrange(len(hops) + 2), len(hops) - 1)  # more often at the end
            change = rng.choice(("drop", "repeat", "swap", "scale", "insert"))
            if change == "drop" and len(hops) > 2:
                del hops[at]
            elif change == "repeat" and len(hops) < 8:
                hops[at:at] = hops[max(at - 1, 0) : at + 1]
            elif change == "swap":
                hops[at] = replace(hops[at], source="b" if hops[at].source == "a" else "a")
            elif change == "scale":
                hops[at] = replace(hops[at], scale=rng.choice((0.5, 0.75, 1.25)))
            else:
                hops.insert(at + 1, Hop(source=rng.choice("ab"), layer=rng.randrange(DEPTH)))
        embedding, head = (rng.choice("ab") if rng.random() < 0.2 else end for end in (old.embedding, old.head))
        found.append(Stack(embedding=embedding, hops=tuple(hops), head=head))
    return found


def mixed() -> list[list[Request]]:
    """Return three lists of requests: all kinds together, only what is read, only what is answered."""
    return [
        choices(12) + texts(2) + answers(12, entropy=True, top=1, most=3),
        choices(12, seed=2) + texts(1, seed=2),
        answers(12, seed=3, stop=("t",), most=3),
    ]


#: What stacks say to some plans, stack by stack and plan by plan; what was counted; and what is kept at the end.
Said = tuple[list[list[list[Outcome]]], Counts, Prefixes]


def run(
    own: Bench,
    stacks: Sequence[Stack],
    budget: int,
    branches: Sequence[Collection[int]] | None = None,
    memory: Sequence[int | None] | None = None,
    requests: Sequence[Sequence[Request]] | None = None,
) -> Said:
    """Ask stacks requests under a budget, with memory for so many tokens."""
    plans = [own.engine.plan(each) for each in requests or mixed()]
    prefixes, counts, found = Prefixes(budget), Counts(), []
    for k, stack in enumerate(stacks):
        own_branches, own_memory = branches[k] if branches else (), memory[k] if memory else None
        found.append(own.ask(stack, plans, prefixes, counts, own_branches, own_memory))
        assert prefixes.bytes <= budget
        assert prefixes.bytes == sum(stored(tensors_of(prefixes)).values())
    return found, counts, prefixes


def common(one: Sequence[object], two: Sequence[object]) -> int:
    """Return the length of the longest beginning that is one of both."""
    return max(k for k in range(min(len(one), len(two)) + 1) if one[:k] == two[:k])


def ahead_of(stacks: Sequence[Stack]) -> list[set[int]]:
    """Return for each stack how much later ones begin with alike."""
    paths = [path_of(written(stack)) for stack in stacks]
    return [{common(one, two) for two in paths[k + 1 :]} - {0} for k, one in enumerate(paths)]


def entries_of(prefixes: Prefixes) -> Iterator[Entry]:
    """Yield all that is kept."""
    nodes = [prefixes._root]
    while nodes:
        node = nodes.pop()
        nodes += node.after.values()
        yield from node.kept.values()


def tensors_of(prefixes: Prefixes) -> Iterator[Tensor]:
    """Yield the tensors of all that is kept."""
    return (tensor for entry in entries_of(prefixes) for tensor in entry.tensors())


def stored(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the memory that tensors keep, by where it is; some are views of one projection."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# The law.

STACKS = journey(seed=3, count=8)
#: The last but for its embedding: the same layers, and nothing in common.
STACKS.append(replace(STACKS[-1], embedding="b" if STACKS[-1].embedding == "a" else "a"))


@pytest.fixture(scope="module")
def told(bench: Callable[..., Bench]) -> Callable[..., Said]:
    """Return what tells what the stacks say: with nothing kept, or with much and all branches known ahead."""
    made: dict[tuple[str, int], Said] = {}

    def get(kind: str, budget: int) -> Said:
        if (kind, budget) not in made:
            made[kind, budget] = run(bench(kind), STACKS, budget, ahead_of(STACKS))
        return made[kind, budget]

    return get


@EVERYWHERE
@pytest.mark.parametrize("ahead", ["nothing", "anything", "what comes"])
def test_outcomes_are_those_of_stacks_that_are_run_as_a_whole(
    bench: Callable[..., Bench], told: Callable[..., Said], kind: str, ahead: str
) -> None:
    """To the last bit, for stacks that are edits of one another, whatever is known of where others branch off."""
    rng = random.Random(5)
    anything = [rng.sample(range(1, len(stack.hops) + 1), min(2, len(stack.hops))) for stack in STACKS]
    expected, whole, nothing = told(kind, 0)
    found, counts, kept = (
        told(kind, MUCH)
        if ahead == "what comes"
        else run(bench(kind), STACKS, MUCH, anything if ahead == "anything" else None)
    )

    assert found == expected
    assert len({str(own) for own in expected}) == len(set(STACKS))
    assert counts.spared > 0 == whole.spared
    assert nothing.bytes == 0 < kept.bytes
    assert (counts.run + counts.spared, counts.run_tokens + counts.spared_tokens) == (whole.run, whole.run_tokens)


@EVERYWHERE
def test_outcomes_are_the_same_where_little_may_be_kept(
    bench: Callable[..., Bench], told: Callable[..., Said], kind: str
) -> None:
    """Entries that come and go change nothing, and what is kept never exceeds the budget."""
    _, most, much = told(kind, MUCH)
    for share in (10, 100):
        found, counts, kept = run(bench(kind), STACKS, much.most // share, ahead_of(STACKS))
        assert found == told(kind, 0)[0]
        assert 0 < kept.most <= much.most // share
        assert counts.run + counts.spared == most.run + most.spared
        assert counts.spared < most.spared
        assert share > 10 or counts.spared > 0


@EVERYWHERE
@pytest.mark.parametrize("first", [0, 3])
def test_outcomes_are_the_same_where_memory_runs_out(bench: Callable[..., Bench], kind: str, first: int) -> None:
    """After a batch was halved, at the first stack or later, all is as where nothing is kept, and sparing goes on."""
    stacks = [stack_of(f"a0 a1 {rest}") for rest in ("a2 a3", "b2", "b2 b3", "b2 a3", "b2 b3 b3", "a2 b3")]
    requests = [choices(12) + answers(12, most=3)]
    # with a window rows must often be of one length, so batches are smaller
    memory = [None] * first + [50 if kind == "gemma2" else 100] * (6 - first)
    expected, whole, _ = run(bench(kind), stacks, 0, memory=memory, requests=requests)
    own = bench(kind)
    found, counts, kept = run(own, stacks, MUCH, ahead_of(stacks), memory, requests)

    assert own.engine.tokens < 1 << 14
    assert found == expected
    assert counts.spared > 0 < kept.bytes
    assert counts.run + counts.spared == whole.run


@EVERYWHERE
def test_the_same_stack_asked_again_says_the_same(bench: Callable[..., Bench], kind: str) -> None:
    """Also where all of its hops are kept, so that only its end is run; and plans do not get into each other's way."""
    own, stack = bench(kind), stack_of("a0 b1 a2*0.5 b3", head="b")
    prefixes, counts = Prefixes(MUCH), Counts()
    plans = [own.engine.plan(requests) for requests in mixed()]
    first = own.ask(stack, plans, prefixes, counts, branches=(2, 4))
    before = replace(counts)

    for turn in (plans, plans[::-1]):
        again = own.ask(stack, turn, prefixes, counts)
        assert again == (first if turn is plans else first[::-1])
    # of what was only read, nothing is run again
    counts_before = replace(counts)
    own.ask(stack, plans[1:2], prefixes, counts)
    assert counts.run == counts_before.run
    assert before.spared == 0 < counts.spared


def test_what_was_kept_for_other_batches_is_not_used(bench: Callable[..., Bench]) -> None:
    """Where a plan is cut into other batches than before, its passes are others, and begin anew."""
    own, prefixes = bench(), Prefixes(MUCH)
    plan, stack = own.engine.plan(choices(12)), stack_of("a0 a1 a2 a3")
    own.ask(stack, [plan], prefixes, Counts(), branches=(2,))
    own.engine.tokens = 150
    expected = own.ask(stack, [plan], Prefixes(0), Counts())

    for spared in (False, True):
        counts = Counts()
        assert own.ask(stack, [plan], prefixes, counts, branches=(3,)) == expected
        assert (counts.spared > 0) == spared


@EVERYWHERE
def test_live_stacks_are_models_of_these_layers(bench: Callable[..., Bench], kind: str) -> None:
    """Likelihoods equal those of a plain transformers model that has these layers, whose inputs are scaled by hooks."""
    own = bench(kind)
    requests = choices(6) + texts(2)
    plan = own.engine.plan(requests)
    prefixes, counts = Prefixes(MUCH), Counts()
    for text, embedding, head in (
        ("a0 a1 a2 a3", "a", "a"),
        ("a0 a1 a1 b2*0.5 a1*1.25 a3", "a", "a"),
        ("a0 a1 a1 b2*0.5", "a", "b"),
        ("b3 a0", "b", "a"),
    ):
        stack = stack_of(text, embedding, head)
        if kind == "gpt2" and embedding != head:
            stack = replace(stack, head=embedding)  # the head is the embedding; there is no model with two
        [found] = own.ask(stack, [plan], prefixes, counts)
        model = plainly(own, stack)
        for request, outcome in zip(requests, found, strict=True):
            if request.kind == "loglikelihood":
                assert outcome.loglikelihood == pytest.approx(likelihood(model, own, request), abs=2e-3, rel=1e-4)
    assert counts.spared > 0


def plainly(own: Bench, stack: Stack) -> Any:
    """Return a transformers model whose layers were copied one by one."""
    config = type(own.models["a"].config).from_dict(own.models["a"].config.to_dict())
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[hop.layer] for hop in stack.hops]
    config.num_hidden_layers = len(stack.hops)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = {}
    for name, tensor in own.models["a"].state_dict().items():
        parts = name.split(".")
        if not any(part.isdigit() for part in parts):
            ending = "norm" in name or "ln_f" in name or name in ("lm_head.weight", "embed_out.weight")
            tied = own.models["a"].config.tie_word_embeddings and name == "lm_head.weight"
            source = stack.head if ending and not tied else stack.embedding
            tensors[name] = own.models[source].state_dict()[name]
            continue
        at = next(k for k, part in enumerate(parts) if part.isdigit())
        if parts[at] == "0":
            for place, hop in enumerate(stack.hops):
                old, new = (".".join([*parts[:at], str(n), *parts[at + 1 :]]) for n in (hop.layer, place))
                tensors[new] = own.models[hop.source].state_dict()[old]
        del tensor
    model.load_state_dict(tensors)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer, hop in zip(layers, stack.hops, strict=True):
        layer.register_forward_pre_hook(
            lambda _, given, named, scale=hop.scale: (
                (given[0] * scale, *given[1:]) if given else given,
                named if given else {**named, "hidden_states": named["hidden_states"] * scale},
            ),
            with_kwargs=True,
        )
    return model


def likelihood(model: Any, own: Bench, request: Request) -> float:
    """Return the log-likelihood of a continuation, from one unpadded forward pass."""
    context = own.engine.tokenizer(request.context)["input_ids"]
    rest = own.engine.tokenizer(request.continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
    return float(log_p[range(len(context) - 1, len(context) + len(rest) - 1), rest].sum())


# What is counted.


def short(count: int) -> list[Request]:
    """Return requests that are one pass of so many rows of four tokens: <bos> and three characters."""
    return [Request(kind="loglikelihood", context=f"{k}bc", continuation="1") for k in range(count)]


#: Stacks in their order, with how many hops are spared where all hops of earlier ones are kept, and where only those
#: are that stacks were known to branch off from: the first was told of a branch after 2 hops.
COURSE = [
    ("a0 a1 a2 a3", 0, 0),
    ("a0 a1 b2 b3 b3", 2, 2),
    ("b0 b1", 0, 0),
    ("a0 a1 b2 a3", 3, 2),  # three hops were met before, so these are kept from here on
    ("a0 a1 b2 b1", 3, 3),
    ("a0 a1 b2*0.5 b1", 2, 2),
    ("a0 a1 b2 b1 a0", 4, 3),  # four were met before
    ("a0 a1 b2 b1", 4, 4),
    ("a0 a1", 2, 2),
    ("a0", 1, 0),  # nobody was known to branch off so early
    ("a1 a2", 0, 0),
]


@pytest.mark.parametrize("room", [True, False])
def test_layer_passes_worked_by_hand(
    bench: Callable[..., Bench], room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stack runs what comes after the deepest beginning that is kept."""
    if not room:
        monkeypatch.setattr("evomerge.evaluation.prefix.ROOM", 0.0)
    own = bench()
    plan, prefixes = own.engine.plan(short(3)), Prefixes(MUCH)

    def spared_of(stack: Stack, plan: Plan = plan, branches: Collection[int] = ()) -> int:
        counts = Counts()
        own.ask(stack, [plan], prefixes, counts, branches)
        left = len(stack.hops) - counts.spared
        # three rows of four tokens
        assert counts == Counts(
            run=left, spared=counts.spared, run_tokens=left * 12, spared_tokens=counts.spared * 12
        )
        return counts.spared

    for k, (text, all_kept, few_kept) in enumerate(COURSE):
        found = spared_of(stack_of(text), branches=() if k else (2,))
        assert found == (all_kept if room else few_kept), text
    assert spared_of(stack_of("a0 a1 a2 a3", embedding="b")) == 0
    assert spared_of(stack_of("a0 a1 a2 a3", head="b")) == (4 if room else 2)
    assert spared_of(stack_of("a0 a1 a2 a3"), own.engine.plan(short(3))) == 0


def test_where_there_is_room_each_stack_is_spared_what_it_shares_with_any_earlier_one(
    bench: Callable[..., Bench],
) -> None:
    """The longest beginning in common with any stack before it, whatever was known of branches."""
    own = bench()
    plan, prefixes = own.engine.plan(short(3)), Prefixes(MUCH)
    paths: list[Sequence[object]] = []
    for stack in journey(seed=9, count=40):
        path, counts = path_of(written(stack)), Counts()
        own.ask(stack, [plan], prefixes, counts)
        assert counts.spared == max((common(path, other) for other in paths), default=0)
        assert counts.run == len(path) - counts.spared
        paths.append(path)


def test_where_stacks_branch_off_outlives_what_else_is_kept(bench: Callable[..., Bench]) -> None:
    """With memory for one beginning, three rows of four tokens, it is the one that a later stack is known to have."""
    own = bench()
    plan, prefixes = own.engine.plan(short(3)), Prefixes(2 * 3 * 4 * 32 * 4 - 1)
    for text, branches, spared in (("a0 a1 a2 a3", (2,), 0), ("a0 a1 a2 b3", (), 2), ("a0 a1 a2 b2", (), 3)):
        counts, stack = Counts(), stack_of(text)
        own.ask(stack, [plan], prefixes, counts, branches)
        assert (counts.spared, prefixes.bytes) == (spared, 3 * 4 * 32 * 4)


def test_passes_of_beginnings_and_branches_are_spared_too(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples once, contexts once and their choices once: three passes, of each of which a beginning is spared."""
    monkeypatch.setattr("evomerge.evaluation.prefix.ROOM", 0.0)
    own = bench(batch=32)
    requests = [
        Request(kind="loglikelihood", context=EXAMPLES + prompt * 9, continuation=choice)
        for prompt in "abcdefgh"
        for choice in ("123", "124", "5", "5678")
    ]
    plan, prefixes = own.engine.plan(requests), Prefixes(MUCH)
    # <bos> and the examples; eight contexts of nine; of each the choices 12 and 567
    fed = 1 + len(EXAMPLES) + 8 * 9 + 2 * 8 * 3

    for text, branches, spared in (("a0 a1 a2 a3", (3,), 0), ("a0 a1 a2 b3 b3", (), 3)):
        counts, stack = Counts(), stack_of(text)
        own.ask(stack, [plan], prefixes, counts, branches)
        left = len(stack.hops) - spared
        assert counts == Counts(
            run=3 * left, spared=3 * spared, run_tokens=fed * left, spared_tokens=fed * spared
        )
    [entry] = entries_of(prefixes)
    assert [state.shape for state in entry.states] == [(1, 1 + len(EXAMPLES), 32), (8, 9, 32), (16, 3, 32)]
    # nobody generates, so nobody will need keys and values of what is left out
    assert entry.pairs == ()


def test_steps_of_an_answer_are_run_after_its_prompt(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer only the prompt is spared; keys and values of what is left out there are kept for the next steps."""
    monkeypatch.setattr("evomerge.evaluation.prefix.ROOM", 0.0)
    own, prefixes = bench(), Prefixes(MUCH)
    stacks = [stack_of("a0 a1 a2 a3"), stack_of("a0 a1 a2 b3 b3")]
    prompts = [Request(kind="generate", context="abc" + "xyz"[k % 3] * k, most=4) for k in range(8)]
    # one that all of the stacks answer in full
    said = [own.ask(stack, [own.engine.plan(prompts)], Prefixes(0), Counts())[0] for stack in stacks]
    at = next(k for k, outcomes in enumerate(zip(*said, strict=True)) if all(o.tokens == 4 for o in outcomes))
    plan, fed = own.engine.plan([prompts[at]]), 1 + 3 + at

    counts = Counts()
    own.ask(stacks[0], [plan], prefixes, counts, branches=(3,))
    assert counts == Counts(run=4 * 4, spared=0, run_tokens=4 * (fed + 3), spared_tokens=0)
    counts = Counts()
    own.ask(stacks[1], [plan], prefixes, counts)
    assert counts == Counts(run=2 + 3 * 5, spared=3, run_tokens=2 * fed + 3 * 5, spared_tokens=3 * fed)
    [entry] = entries_of(prefixes)
    assert [len(own_pairs) for own_pairs in entry.pairs] == [3]
    assert {pair.shape for own_pairs in entry.pairs for both in own_pairs for pair in both} == {(1, 2, fed, 8)}


@EVERYWHERE
def test_bytes_are_those_of_memory(told: Callable[..., Said], kind: str) -> None:
    """What is kept holds no more memory than its bytes say, so that a budget is one."""
    _, _, prefixes = told(kind, MUCH)
    assert prefixes.bytes > 0
    assert sum(stored(tensors_of(prefixes)).values()) == prefixes.bytes


class Watching:
    """Follows a course, and does something more after each hop."""

    def __init__(self, course: Course, then: Callable[[int], None]) -> None:
        self.course, self.then = course, then

    def skips(self, hop: int, hidden: Tensor) -> Tensor | None:
        """Pass on."""
        return self.course.skips(hop, hidden)

    def leaves(self, hop: int, hidden: Tensor) -> None:
        """Pass on."""
        self.course.leaves(hop, hidden)
        self.then(hop)


@pytest.mark.parametrize("room", [True, False])
def test_what_is_gathered_on_the_way_keeps_the_budget_too(
    bench: Callable[..., Bench], room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a plan is asked, what is kept and what is gathered to be kept are together within the budget."""
    if not room:
        monkeypatch.setattr("evomerge.evaluation.prefix.ROOM", 0.0)
    own, prefixes, held = bench(), Prefixes(100_000), []
    plan = own.engine.plan(mixed()[0])

    def weigh(_: int) -> None:
        visit = course._visit
        assert visit is not None
        gathered = [state for states in visit.states.values() for state in states]
        gathered += [tensor for pairs in visit.pairs for both in pairs for tensor in both]
        held.append(sum(stored([*gathered, *tensors_of(prefixes)]).values()))

    for text in ("a0 a1 a2 a3", "a0 a1 a2 b3"):
        live = own.stacks.build(written(stack_of(text)))
        course = Course(prefixes, live.path, Counts())
        course.branches = (2,)
        live.watch = Watching(course, weigh)
        own.engine.show(live.model, course)
        own.engine.answer(plan)
    assert max(held) <= 100_000


# What goes wrong.


def test_nothing_half_made_is_kept_where_memory_runs_out_on_the_way(bench: Callable[..., Bench]) -> None:
    """Where the last hop finds no memory after others were run, nothing is kept, nor what was kept before used."""
    stacks = [stack_of("a0 a1 a2 a3"), stack_of("a0 a1 b2 a3"), stack_of("a0 a1 b2 b3"), stack_of("a0 a1 b2 b3 b3")]
    fresh, requests = bench(batch=4), choices(6) + answers(6)
    plan = fresh.engine.plan(requests)
    expected = [fresh.ask(stack, [plan], Prefixes(0), Counts())[0] for stack in stacks]

    raised = []

    def tight(hop: int) -> None:
        # not the first pass: something has been gathered by then
        if hop == 3 and not raised and course._visit and course._visit.passes > 0:
            raised.append(hop)
            raise torch.OutOfMemoryError("CUDA out of memory")

    own = bench(batch=4)
    plan, prefixes, counts = own.engine.plan(requests), Prefixes(MUCH), Counts()
    own.ask(stacks[0], [plan], prefixes, counts, branches=(2,))
    assert prefixes.bytes > 0
    live = own.stacks.build(written(stacks[1]))
    course = Course(prefixes, live.path, counts)
    course.branches = (2, 3)
    live.watch = Watching(course, tight)
    own.engine.show(live.model, course)
    found = own.engine.answer(plan)

    # the halves are other batches, so they are the same up to rounding
    assert len(raised) == 1
    assert [o.text for o in found] == [o.text for o in expected[1]]
    assert [o.loglikelihood for o in found] == pytest.approx([o.loglikelihood for o in expected[1]], abs=1e-3)
    assert prefixes.bytes == 0 == len(list(entries_of(prefixes)))
    same = bench(batch=4)
    same.engine.tokens = own.engine.tokens
    theirs = same.engine.plan(requests)
    for stack in stacks[2:]:
        assert own.ask(stack, [plan], prefixes, counts) == same.ask(stack, [theirs], Prefixes(0), Counts())
    assert counts.spared > 0


def test_nothing_half_made_is_kept_of_a_candidate_that_fails(bench: Callable[..., Bench]) -> None:
    """A text that is not finite after others that are: what was gathered is dropped, and later stacks are as ever."""
    own, prefixes, counts = bench(batch=2), Prefixes(MUCH), Counts()
    good = [Request(kind="loglikelihood", context="abc" * (1 + k), continuation="12") for k in range(6)]
    poisoned = [*good, Request(kind="loglikelihood", context="abc" * 12 + "z", continuation="12")]
    plans = [own.engine.plan(requests) for requests in (poisoned, good)]
    stack, other = (stack_of(text, embedding="bad") for text in ("a0 a1 a2 a3", "a0 a1 b2 b3"))

    with pytest.raises(CandidateError, match="not finite"):
        own.ask(stack, plans[:1], prefixes, counts, branches=(2, 3))
    assert counts.run > 4  # it failed on the way
    assert list(entries_of(prefixes)) == []
    with pytest.raises(CandidateError, match="not finite"):
        own.ask(other, plans[:1], prefixes, counts)
    assert counts.spared == 0
    assert list(entries_of(prefixes)) == []

    for each, branches in ((stack, (2,)), (other, ())):
        assert own.ask(each, plans[1:], prefixes, counts, branches) == own.ask(each, plans[1:], Prefixes(0), Counts())
    assert counts.spared > 0
    for text in ("a0 a1 a2 a3", "a0 a1 b2 b3", "a0 a1 b2 a3"):
        each = stack_of(text)
        assert own.ask(each, plans, prefixes, counts) == own.ask(each, plans, Prefixes(0), Counts())


def test_a_live_stack_that_failed_can_be_asked_again(bench: Callable[..., Bench]) -> None:
    """A plan that failed leaves the live model as it was: the next plan begins anew, also with shared examples."""
    own = bench()
    good = [Request(kind="generate", context=EXAMPLES + "ab" * k, most=4) for k in range(1, 9)]
    plans = [own.engine.plan(requests) for requests in ([*good, replace(good[0], context="z")], good)]
    stack = stack_of("a0 a1 a2 a3", embedding="bad")
    [expected] = own.ask(stack, plans[1:], Prefixes(0), Counts())

    own.show(stack, Prefixes(MUCH), Counts(), branches=(2,))
    with pytest.raises(CandidateError, match="not finite"):
        own.engine.answer(plans[0])
    assert [own.engine.answer(plans[1]) for _ in range(2)] == [expected] * 2


# The trie.


PLAN = Plan(requests=(), first=(0,), groups=(), batch=1, vocabulary=1, device="cpu")
PATHS = [
    [(word[0], int(word[1]), 1.0) for word in text.split()]
    for text in ("a0 a1 a2 a3", "a0 a1 b2 a3 a3", "a0 b1", "b0 a1 a2 a3", "a0 a1")
]
ASKED = ((1, 64), (2, 64), (1, 32))


def entry(depth: int, *states: Tensor, pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> Entry:
    """Return an entry of some states, and of keys and values of one pass."""
    return Entry(plan=PLAN, depth=depth, states=states, pairs=(tuple(pairs),) if pairs else ())


def sized(count: int) -> Tensor:
    """Return a tensor of so many bytes."""
    return torch.zeros(count, dtype=torch.uint8)


steps = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, len(PATHS) - 1),
        st.integers(1, 5),
        st.sampled_from(ASKED),
        st.integers(0, 60),
        st.sets(st.integers(0, 3)),
        st.booleans(),
    ),
    max_size=40,
)


@given(st.integers(1, 120), steps)
@settings(max_examples=150, deadline=None)
def test_a_trie_keeps_what_was_used_last_within_its_budget(budget: int, steps: Sequence[Any]) -> None:
    """It agrees with a plain list of entries in the order of their use, the first of which go until the rest fits."""
    prefixes = Prefixes(budget)
    shared = [sized(4 * (k + 1)) for k in range(4)]
    kept: list[tuple[tuple[Any, ...], Any, Entry]] = []
    met: set[tuple[Any, ...]] = set()

    def held() -> int:
        return sum({id(tensor): tensor.nbytes for _, _, own in kept for tensor in own.tensors()}.values())

    for keeps, at, depth, asked, size, pairs, wanted in steps:
        path = PATHS[at]
        if keeps:
            own = entry(min(depth, len(path)), sized(size), pairs=[(shared[k], shared[k]) for k in sorted(pairs)])
            place = tuple(path[: own.depth])
            kept = [one for one in kept if one[:2] != (place, asked)]
            kept.insert(len(kept) if wanted else 0, (place, asked, own))
            met |= {place[: k + 1] for k in range(len(place))}
            while held() > budget:
                kept.pop(0)
            prefixes.keep(path, asked, own, wanted)
        else:
            on_path = [one for one in kept if one[1] == asked and one[0] == tuple(path[: len(one[0])])]
            best = max(on_path, key=lambda one: len(one[0]), default=None)
            known = next((k for k in range(len(path)) if tuple(path[: k + 1]) not in met), len(path))
            met |= {tuple(path[: k + 1]) for k in range(len(path))}
            if best is not None:
                kept = [one for one in kept if one is not best] + [best]
            assert prefixes.meet(path, asked) == (None if best is None else best[2], known)
        assert prefixes.bytes == held() <= budget
        assert prefixes.roomy == (held() < ROOM * budget)
        assert {id(own) for own in entries_of(prefixes)} == {id(own) for _, _, own in kept}
    assert prefixes.most <= budget


def test_the_least_recently_used_goes_first() -> None:
    """What was met again stays before what was kept later."""
    prefixes, asked = Prefixes(30), ASKED[0]
    first, second, third, fourth = (entry(2, sized(10)) for _ in range(4))
    for path, own in zip(PATHS, (first, second), strict=False):
        prefixes.keep(path[:1] + path[2:] if own is second else path, asked, own)
    prefixes.keep(PATHS[3], asked, third)

    assert prefixes.meet(PATHS[0], asked)[0] is first
    prefixes.keep(PATHS[2], asked, fourth)
    assert {id(own) for own in entries_of(prefixes)} == {id(own) for own in (first, third, fourth)}
    assert prefixes.bytes == prefixes.most == 30


def test_what_nobody_is_known_to_want_goes_before_all_else() -> None:
    """The newest of it first, unless it was of use since; what is wanted makes room by it."""
    prefixes, asked = Prefixes(30), ASKED[0]
    wanted, used, spare, newer = (entry(2, sized(10)) for _ in range(4))
    for path, own in zip((PATHS[0], PATHS[2], PATHS[3]), (wanted, used, spare), strict=True):
        prefixes.keep(path, asked, own, wanted=own is wanted)
    prefixes.meet(PATHS[2], asked)

    prefixes.keep(PATHS[1][1:], asked, newer, wanted=False)
    assert {id(own) for own in entries_of(prefixes)} == {id(own) for own in (wanted, used, spare)}
    prefixes.keep(PATHS[1][1:], asked, newer)
    assert {id(own) for own in entries_of(prefixes)} == {id(own) for own in (wanted, used, newer)}


def test_there_is_room_up_to_nine_tenths_of_the_budget() -> None:
    """That is where keeping what nobody is known to want ends."""
    for size, roomy in ((0, True), (89, True), (90, False), (99, False)):
        prefixes = Prefixes(100)
        prefixes.keep(PATHS[0], ASKED[0], entry(2, sized(size)))
        assert prefixes.roomy == roomy


def test_the_deepest_entry_of_the_plan_is_met() -> None:
    """Of several on a path the deepest is given, for this plan and these batches, and how far the path is known."""
    prefixes = Prefixes(1000)
    shallow, deep_one, other = entry(1, sized(1)), entry(3, sized(1)), entry(4, sized(1))
    prefixes.keep(PATHS[0], ASKED[0], shallow)
    prefixes.keep(PATHS[0], ASKED[0], deep_one)
    prefixes.keep(PATHS[0], ASKED[1], other)

    assert prefixes.meet(PATHS[0], ASKED[0]) == (deep_one, 4)
    assert prefixes.meet(PATHS[0], ASKED[1]) == (other, 4)
    assert prefixes.meet(PATHS[0], ASKED[2]) == (None, 4)
    assert prefixes.meet(PATHS[1], ASKED[0]) == (shallow, 2)
    assert prefixes.meet(PATHS[1], ASKED[0]) == (shallow, 5)
    assert prefixes.meet(PATHS[3], ASKED[0]) == (None, 0)


def test_tensors_that_entries_share_are_counted_once() -> None:
    """Keys and values of a deeper entry are those of the shallower one and more; the last to hold them frees them."""
    prefixes, asked = Prefixes(100), ASKED[0]
    keys, values = sized(20), sized(20)
    prefixes.keep(PATHS[0], asked, entry(1, sized(10), pairs=[(keys, values)]))
    assert prefixes.bytes == 50
    prefixes.keep(PATHS[0], asked, entry(2, sized(10), pairs=[(keys, values), (sized(15), sized(15))]))
    assert prefixes.bytes == 90
    # the first goes, but not the tensors that the second holds too
    prefixes.keep(PATHS[0], asked, entry(3, sized(20)))
    assert prefixes.bytes == 100
    prefixes.keep(PATHS[0], asked, entry(4, sized(1)))
    assert prefixes.bytes == 21


def test_an_entry_takes_the_place_of_an_older_one() -> None:
    """For one plan there is one entry at a node."""
    prefixes = Prefixes(100)
    for size in (60, 70, 30):
        own = entry(2, sized(size))
        prefixes.keep(PATHS[0], ASKED[0], own)
        assert (prefixes.bytes, list(entries_of(prefixes))) == (size, [own])


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    """Nothing at all is with a budget of nothing, which also says so."""
    for budget in (0, 9):
        prefixes = Prefixes(budget)
        prefixes.keep(PATHS[0], ASKED[0], entry(2, sized(10)))
        assert (prefixes.bytes, prefixes.most, list(entries_of(prefixes))) == (0, 0, [])
        assert prefixes.on == bool(budget)


def test_everything_can_be_forgotten() -> None:
    """After that no path is known, nothing is held, and it can be filled anew."""
    prefixes = Prefixes(100)
    for _ in range(2):
        prefixes.keep(PATHS[0], ASKED[0], own := entry(2, sized(60)))
        assert prefixes.meet(PATHS[0], ASKED[0]) == (own, 2)
        prefixes.clear()
        assert prefixes.bytes == 0
        assert prefixes.meet(PATHS[0], ASKED[0]) == (None, 0)
        prefixes.clear()


def test_the_number_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stacks are met, there are no more nodes than the bound and one path; then all begins anew."""
    monkeypatch.setattr("evomerge.evaluation.prefix.NODES", 50)
    prefixes, rng = Prefixes(1000), random.Random(0)
    for _ in range(300):
        path = [(rng.choice("ab"), rng.randrange(4), 1.0) for _ in range(rng.randint(1, 9))]
        prefixes.meet(path, ASKED[0])
        prefixes.keep(path, ASKED[0], entry(len(path), sized(3)))
        nodes, found = [prefixes._root], 0
        while nodes:
            nodes += (node := nodes.pop()).after.values()
            found += 1 + 0 * len(node.kept)
        assert found <= 50 + 9
        assert prefixes.bytes == 3 * len(list(entries_of(prefixes)))


# Caches.


def pair(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random keys and values of two heads of three entries."""
    stream = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, tokens, 3, generator=stream)
    return keys, values


def test_a_branch_tells_its_own_keys_and_values() -> None:
    """Those of its own tokens, without what it goes on from."""
    trunk, before, after = Trunk.root(), pair(1, 4, 0), pair(3, 2, 1)
    trunk.update(*before, 0)
    branch = trunk.branch()
    whole = branch.update(*after, 0)

    assert all(map(torch.equal, trunk.layers[0].own(), before))
    assert all(map(torch.equal, branch.layers[0].own(), after))
    assert whole[0].shape == (3, 2, 6, 3)


def test_layers_that_are_left_out_count_their_tokens() -> None:
    """A layer that stands in has the length of what it stands for, so do those that go on from it; others are fed."""
    trunk, fed = Trunk.root(), pair(1, 5, 0)
    for layer in range(2):
        trunk.stand_in(layer, 5)
    found = trunk.update(*fed, 2)

    assert all(map(torch.equal, found, fed))
    assert [layer.get_seq_length() for layer in trunk.layers] == [5, 5, 5]
    assert trunk.layers[0].get_mask_sizes(3) == (8, 0)
    branch = trunk.branch(torch.tensor([0, 0]))
    assert branch.get_seq_length() == 5
    branch.stand_in(0, 3)
    whole = branch.update(*pair(2, 3, 1), 2)
    assert [layer.get_seq_length() for layer in branch.layers] == [8, 5, 8]
    assert whole[0].shape == (2, 2, 8, 3)
    assert isinstance(trunk.layers[0], Branch)


def test_a_room_tells_copies_of_what_was_written_last() -> None:
    """Neither the steps that follow nor the dropping of rows change what it told."""
    trunk, before = Trunk.root(), pair(1, 4, 0)
    trunk.update(*before, 0)
    for rooms, start in ((Rooms.root(9), 0), (trunk.room(9), 4)):
        prompt, step = pair(3, 2, 1), pair(3, 1, 2)
        rooms.update(*prompt, 0)
        [room] = rooms.layers
        assert isinstance(room, Room)
        told = room.own()
        assert all(map(torch.equal, told, prompt))
        rooms.update(*step, 0)
        rooms.keep(torch.tensor([0, 2]))
        assert all(map(torch.equal, told, prompt))
        assert all(torch.equal(own, new[[0, 2]]) for own, new in zip(room.own(), step, strict=True))
        assert room.get_seq_length() == start + 3


# The order in which a search asks.


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        (["abc"], [()]),
        (["abc", "xyz"], [(), ()]),
        (["abc", "abd"], [(2,), ()]),
        (["abc", "abd", "aef", "x"], [(1, 2), (1,), (), ()]),
        (["ab", "abc", "abcd"], [(2,), (3,), ()]),
        (["abc", "abc", "abd"], [(2, 3), (2,), ()]),
        (["abcde", "abcdf", "abx", "aby", "z"], [(2, 4), (2,), (2,), (), ()]),
        (["", "", "a"], [(), (), ()]),
    ],
)
def test_where_later_stacks_branch_off_worked_by_hand(paths: list[str], expected: list[tuple[int, ...]]) -> None:
    """For each of some sorted stacks, after how many hops a later one goes another way."""
    assert asking._branches(paths) == expected


@given(st.lists(st.text("ab", max_size=6), max_size=12))
@settings(deadline=None)
def test_where_later_stacks_branch_off_is_what_each_shares_with_later_ones(paths: list[str]) -> None:
    """These are the lengths of all beginnings that a stack shares with any later one in the order."""
    paths = sorted(paths)

    assert asking._branches(paths) == [
        tuple(sorted({common(one, two) for two in paths[k + 1 :]} - {0})) for k, one in enumerate(paths)
    ]


class Tape:
    """A ledger that has nothing, and takes all."""

    ended = True

    def answers(self, most: int | None = None) -> list[Answered]:
        """Return nothing."""
        return []

    def sync(self) -> None:
        """Nothing: there is no disk."""

    def write(self, event: Answered) -> Answered:
        """Take an event."""
        return event


class OneByOne:
    """A pool of one worker that writes down its jobs and answers 1 to everything."""

    workers: tuple[WorkerStatus, ...] = ()

    def __init__(self) -> None:
        """Begin without a job."""
        self.jobs: list[Job] = []
        self.room = True

    def drain(self) -> list[Answer]:
        """Return nothing: a job is answered when it is waited for."""
        return []

    def submit(self, job: Job) -> None:
        """Take a job."""
        self.jobs.append(job)
        self.room = False

    def wait(self) -> Answer:
        """Answer the job."""
        job, self.room = self.jobs[-1], True
        responses = {task: (1.0,) * len(own) for task, own in job.items.items()}
        return Answer(
            candidate=job.candidate, split=job.split, responses=responses, margins={}, error=None, seconds=0.0
        )


class Twice:
    """A schedule of two rounds: one item, then another."""

    def next(self, candidate: int, given: Mapping[str, Mapping[int, float]]) -> dict[str, tuple[int, ...]] | None:
        """Return the item that is next."""
        count = len(given.get("task", {}))
        return {"task": (count,)} if count < 2 else None


@pytest.mark.parametrize("stacked", [False, True])
def test_stacks_that_begin_alike_are_asked_one_after_the_other(stacked: bool) -> None:
    """Sorted by their hops, with their branches, and each until nothing more is asked of it; else as they came."""
    named = {0: "b0 b1", 1: "a0 a1 b2", 2: "a0 b1", 3: "a0 a1 a2", 4: "a0 a1 b2 b3"}
    recipes = {number: written(stack_of(text)) for number, text in named.items()}
    pool = OneByOne()
    own = Asking(Tape(), pool, {"search": {"task": (0, 1, 2)}}, stacked)  # type: ignore[arg-type]  # as much as is used

    own.phase("search", Twice, recipes)

    order = [3, 1, 4, 2, 0] if stacked else [0, 1, 2, 3, 4]
    assert [(job.candidate, job.items["task"]) for job in pool.jobs] == [(n, (k,)) for n in order for k in (0, 1)]
    branches = {3: (1, 2), 1: (1, 3), 4: (1,), 2: (), 0: ()}
    assert all(job.branches == (branches[job.candidate] if stacked else ()) for job in pool.jobs)
    assert {number: found.values for number, found in own.found["search"].items()} == {
        number: {"task": {0: 1.0, 1: 1.0}} for number in named
    }


# The worker.


def task(name: str) -> JsonlTask:
    """Return a task of ten items with examples before them, chosen or answered."""
    items = tuple(
        Item(id=str(k), prompt=f"{EXAMPLES}{k}+{k}=", answers=(str(k % 4),), choices=("0", "1", "2", "3", "12", "13"))
        for k in range(10)
    )
    measure = Choose() if name == "sums" else Generate(max_new_tokens=5)
    return JsonlTask(name=name, measure=measure, splits={"search": items})


def candidates() -> list[Recipe]:
    """Return stacks, a blend of all layers, and stacks of blends; sorted as a search asks them."""
    blend = Route(blend=Blend(method="linear", weights={"a": 0.75, "b": 0.25}))
    blended = Recipe(sources=SOURCES[:2], routes=(blend,), layers=tuple(range(DEPTH)), dtype="float32")
    made = Source(name="blend", recipe=blended)
    over = [
        stack_of(text.replace("m", "blend"), "blend", "blend") for text in ("m0 m1 m2", "m0 m1 b2 m3*0.75", "m0 m1 m1")
    ]
    found = [written(stack) for stack in journey(seed=7, count=10)]
    found += [blended, copy_of(SOURCES[1], DEPTH, "float32")]
    found += [recipe_of(stack, (made, *SOURCES[:2]), "float32") for stack in over]
    return sorted(found, key=path_of)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> WorkerSetup:
    """Return what a worker for sources a and b needs to know, and for one whose third layer has no numbers."""
    root = tmp_path_factory.mktemp("worker")
    folders = {name: save(root / name, deep("llama", seed)) for name, seed in (("a", 1), ("b", 2), ("bad", 1))}
    tensors = load_file(folders["bad"] / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folders["bad"] / "model.safetensors", metadata={"format": "pt"})
    return WorkerSetup(
        template=folders["a"],
        sources=folders,
        tasks={name: task(name) for name in ("sums", "words")},
        batch=8,
        gates=Gates(repetition=0),
        stacked=True,
    )


def through(setup: WorkerSetup, recipes: Sequence[Recipe]) -> list[Answer]:
    """Return what a fresh worker answers of some candidates, in two jobs each."""
    worker = setup.make()
    paths = [path_of(recipe) for recipe in recipes]
    items = {"sums": tuple(range(10)), "words": tuple(range(10))}
    return [
        worker.answer(Job(candidate=k, recipe=recipe, split="search", items=own, branches=branches))
        for k, (recipe, branches) in enumerate(zip(recipes, asking._branches(paths), strict=True))
        for own in (items, {"sums": (3, 1, 2)})
    ]


def said(found: Sequence[Answer]) -> list[tuple[Any, ...]]:
    """Return what answers say of candidates."""
    return [(answer.candidate, answer.responses, answer.margins, answer.error) for answer in found]


def test_a_worker_answers_the_same_whatever_it_keeps(setup: WorkerSetup) -> None:
    """Responses and margins are equal to the last bit; what was run and spared adds up, and bytes keep the budget."""
    recipes = candidates()
    plain = through(setup, recipes)
    total = [sum(answer.layers["run"] for answer in plain), sum(answer.layers["run_tokens"] for answer in plain)]

    assert all(answer.error is None for answer in plain)
    assert all(answer.layers["spared"] == answer.layers["bytes"] == 0 for answer in plain)
    for budget in (MUCH, 60_000):
        found = through(replace(setup, prefixes=budget), recipes)
        counted = [sum(answer.layers[name] for answer in found) for name in ("spared", "spared_tokens")]
        assert said(found) == said(plain)
        assert all(answer.layers["bytes"] <= budget for answer in found)
        assert min(counted) > 0
        assert total == [
            sum(answer.layers["run" + of] + answer.layers["spared" + of] for answer in found) for of in ("", "_tokens")
        ]


def test_a_worker_of_stacks_answers_what_a_worker_of_merges_does(setup: WorkerSetup) -> None:
    """Written as weights, scales folded in, a candidate has the same margins up to rounding; it counts no layers."""
    recipes = [recipe for recipe in candidates() if not any(source.recipe for source in recipe.sources)]
    recipes = [recipe for recipe in recipes if len(recipe.layers) == DEPTH and not recipe.scaled]
    stacked, merged = (through(replace(setup, stacked=on, prefixes=MUCH), recipes) for on in (True, False))

    assert len(recipes) > 2
    for one, other in zip(stacked, merged, strict=True):
        assert other.layers == {}
        assert one.responses == other.responses
        assert one.margins["sums"] == pytest.approx(other.margins["sums"], abs=2e-3)


def test_a_failed_candidate_leaves_a_worker_as_it_was(setup: WorkerSetup) -> None:
    """Stacks with a layer that is not finite fail, where they begin like others too, and those answer as ever."""
    texts_of = ("a0 a1 a2 a3", "a0 a1 a3", "a0 a1 bad2 a3", "a0 a1 bad2 b3", "a0 a1 b2 a3", "a0 a1 b2 bad2")
    recipes = [written(stack_of(text)) for text in texts_of]
    for gates in (Gates(repetition=0), Gates(finite=False, repetition=0)):
        own = replace(setup, gates=gates)
        plain, found = (through(replace(own, prefixes=budget), recipes) for budget in (0, MUCH))

        assert said(found) == said(plain)
        assert [answer.error is None for answer in found[::2]] == ["bad" not in text for text in texts_of]
        assert sum(answer.layers["spared"] for answer in found if answer.error is None) > 0


def test_what_the_law_is_about(bench: Callable[..., Bench]) -> None:
    """Random stacks repeat layers, and have scales and other ends; plans have shared examples, and choices."""
    plans = [bench().engine.plan(requests) for requests in mixed()]
    assert {(group.way is None, bool(group.prefix)) for plan in plans for group in plan.groups} == {
        (reads, begun) for reads in (True, False) for begun in (True, False)
    }
    assert all(
        any(getattr(row, "branches", ()) for group in plan.groups if group.prefix for row in group.rows)
        for plan in plans[:2]
    )
    stacks = [*STACKS, *journey(seed=7, count=10)]

    assert {hop.source for stack in stacks for hop in stack.hops} == {"a", "b"}
    assert any(len(set(stack.hops)) < len(stack.hops) for stack in stacks)
    assert any(hop.scale != 1 for stack in stacks for hop in stack.hops)
    assert {stack.embedding == stack.head for stack in stacks} == {True, False}
    assert sum(map(bool, ahead_of(STACKS))) > 5
    assert (BOS, len(EXAMPLES), SIZE) == (1, 21, len(VOCABULARY))

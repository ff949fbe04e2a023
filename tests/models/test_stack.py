"""Live stacks of resident layers against plain transformers: models put together by hand, and what is exported."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

from evomerge.errors import CandidateError, ModelError, RecipeError
from evomerge.hops import Hop, Stack, copy_blend, path_of, recipe_of
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize
from evomerge.models.resident import OnDisk, Resident
from evomerge.models.save import save
from evomerge.models.stack import LiveStack, Stacks
from evomerge.recipe import Blend, Recipe, Route, Source, copy_of
from tests.models.folders import edit_config

DEPTH, SIZE, NEW = 4, 48, 12
FULL, SLIDING = "full_attention", "sliding_attention"

_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "max_position_embeddings": 64, **_ENDS,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_LATE = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

#: A window is of 8 tokens, shorter than the texts; layers of two kinds are mixed where the architecture has them.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED, **_LATE),
    "qwen3": Qwen3Config(**_GROUPED, **_LATE, head_dim=8),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=8, layer_types=[SLIDING, FULL, FULL, SLIDING]
    ),
    "gpt_neox": GPTNeoXConfig(**_SHAPE),
    "gpt2": GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=64, **_ENDS),
    "olmo2": Olmo2Config(**_GROUPED),
}  # fmt: skip
KINDS = [kind for kind in CONFIGS if kind != "olmo2"]
TIED = ("gemma2", "gemma3", "gpt2")

#: Layers of each kind, in which order by their number among the layers of the source.
KINDS_OF_LAYERS = {
    "qwen2": (FULL, FULL, SLIDING, SLIDING), "qwen3": (FULL, FULL, SLIDING, SLIDING),
    "gemma2": (SLIDING, FULL, SLIDING, FULL), "gemma3": (SLIDING, FULL, FULL, SLIDING),
}  # fmt: skip

_LAYER = re.compile(r"\.(\d+)\.")


def hops(*given: tuple[str, int, float]) -> Stack:
    """Return a stack of source, layer and scale of each hop, whose ends are of a."""
    return Stack(embedding="a", hops=tuple(Hop(source=s, layer=k, scale=by) for s, k, by in given), head="a")


#: Layers of both sources out of order, two of them twice, by scales that multiply to about 2.6.
SCALED = hops(
    ("a", 0, 1.0), ("b", 1, 1.25), ("b", 1, 0.8125), ("a", 3, 1.0625), ("a", 2, 1.0), ("a", 2, 1.5), ("b", 3, 1.625)
)
PLAIN = replace(SCALED, hops=tuple(replace(hop, scale=1.0) for hop in SCALED.hops))


@dataclass(frozen=True)
class World:
    """Two sources of one kind: their folders, their models in plain transformers, and the stacks of them."""

    kind: str
    folder: Path
    models: dict[str, Any]
    resident: Resident
    stacks: Stacks

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each source."""
        return {name: self.folder / name for name in self.models}

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of recipes."""
        return tuple(Source(name=name, path=str(path)) for name, path in self.folders.items())

    def recipe(self, stack: Stack) -> Recipe:
        """Return the recipe of a stack."""
        return recipe_of(stack, self.sources, "float32")

    def live(self, stack: Stack) -> LiveStack:
        """Return the live model of a stack."""
        return self.stacks.build(self.recipe(stack))

    def export(self, recipe: Recipe, folder: Path, depths: list[int] | None) -> Any:
        """Write a recipe's model, and load it with plain transformers."""
        stream = materialize(recipe, OnDisk(self.folders), additions=self.stacks.anatomy.additions)
        save(stream, Checkpoint(self.folders["a"]), folder, dtype="float32", depths=depths)
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def random(config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose parameters are all random, norms and biases too."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=stream)
            if weight.ndim == 2:
                # an embedding that is the head, too, is small: else each token is followed by itself
                ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
                weight.copy_((0.1 if all(weight is end for end in ends) else 0.35) * noise)
            else:
                weight.copy_((weight if "norm" in name or "ln_" in name else 0) + 0.1 * noise)
    return model.to(dtype).eval()


def world_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> World:
    """Write two sources, change their configs, and get ready for stacks of them in float32."""
    models = {name: random(CONFIGS[kind], seed, dtype) for seed, name in enumerate("ab")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        edit_config(folder / name, **changes)
    resident = Resident({name: folder / name for name in models})
    stacks = Stacks(folder / "a", resident, "float32")
    config = AutoConfig.from_pretrained(folder / "a")
    stacks.adopt(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return World(kind, folder, models, resident, stacks)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from telling of generation settings."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(before)


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return two sources of each kind in turn."""
    return world_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return two Llamas."""
    return world_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return two Gemmas 2, whose layers are of two kinds in turn."""
    return world_of("gemma2", tmp_path_factory.mktemp("gemma"))


def texts() -> dict[str, Tensor]:
    """Return two texts of 14 and 11 tokens, padded on the left, longer than a window."""
    ids_BT = torch.randint(3, SIZE, (2, 14), generator=torch.Generator().manual_seed(5))
    ids_BT[1, :3] = 0
    return {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long()}


def logits(model: Any) -> Tensor:
    """Return what a model gives for the tokens of the texts that are no padding."""
    given = texts()
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found[given["attention_mask"].bool()]


def generated(model: Any, *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Return greedy continuations of the texts, and the logits that each token was the greatest of."""
    found = model.generate(
        **texts(), use_cache=use_cache, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences[:, -NEW:], torch.stack(found.logits, dim=1)


def by_hand(world: World, stack: Stack) -> Any:
    """Return the model that a stack is, made by transformers alone: tensors copied, inputs of layers multiplied."""
    first = world.models[stack.head]
    config = copy.deepcopy(first.config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(stack.hops)
    if kinds:
        config.layer_types = [kinds[hop.layer] for hop in stack.hops]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {}
    for name in model.state_dict():
        found = _LAYER.search(name)
        if found is None:
            embeds = any(part in name for part in ("embed_tokens", "embed_in", "wte", "wpe"))
            tensors[name] = world.models[stack.embedding if embeds else stack.head].state_dict()[name]
        else:
            hop = stack.hops[int(found[1])]
            tensors[name] = world.models[hop.source].state_dict()[_LAYER.sub(f".{hop.layer}.", name, count=1)]
    model.load_state_dict(tensors)
    for layer, hop in zip(layers_of(model), stack.hops, strict=True):
        layer.register_forward_pre_hook(multiplied(hop.scale), with_kwargs=True)
    return model.eval()


def multiplied(scale: float) -> Any:
    """Return a hook that multiplies the hidden states that a layer is given."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (arguments[0] * scale, *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"] * scale}

    return hook


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers of a model."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def parameters(model: Any) -> dict[str, Tensor]:
    """Return all parameters by their name in files, those of a layer at each place; a tied head as the embedding."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    head = found.pop("lm_head.weight")
    if head is model.get_input_embeddings().weight:
        return found
    return found | {"embed_out.weight" if model.config.model_type == "gpt_neox" else "lm_head.weight": head}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Tell whether two models have the same parameters, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Refuse numbers that are apart by more than a share of the greatest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Refuse what is apart by more than a kernel may round otherwise where a tensor's memory begins elsewhere."""
    assert_near(found, expected, 1e-6)


def blend(weights: dict[str, float], *layers: int, **more: Any) -> Recipe:
    """Return the recipe of one mean everywhere."""
    sources = tuple(Source(name=name, path=name) for name in weights)
    route = Route(blend=Blend(method="linear", weights=weights))
    return Recipe(sources=sources, routes=(route,), layers=layers, dtype="float32", **more)


# --- logits


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_stack_that_is_one_source_gives_its_bits(world: World, name: str) -> None:
    """All layers of one source, in order and not scaled, are the plain model of its folder."""
    source = next(source for source in world.sources if source.name == name)
    plain = AutoModelForCausalLM.from_pretrained(world.folders[name]).eval()

    assert torch.equal(logits(world.stacks.build(copy_of(source, DEPTH, "float32")).model), logits(plain))


@pytest.mark.parametrize("stack", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_a_stack_gives_the_logits_of_the_model_put_together_by_hand(world: World, stack: Stack) -> None:
    """Layers twice, of two sources, of two kinds out of order, and scaled: as copies in plain transformers give."""
    assert_same(logits(world.live(stack).model), logits(by_hand(world, stack)))


def test_a_short_stack(world: World) -> None:
    """One hop is a model, too."""
    stack = hops(("b", 2, 3.0))

    assert_same(logits(world.live(stack).model), logits(by_hand(world, stack)))


@pytest.mark.parametrize("stack", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_what_is_exported_gives_the_logits_of_the_live_stack(world: World, stack: Stack, tmp_path: Path) -> None:
    """Scales are in the weights of a folder that plain transformers loads: to 1e-5; without scales no bit changes."""
    model = world.live(stack).model
    back = world.export(world.recipe(stack), tmp_path / "out", [hop.layer for hop in stack.hops])
    live, found = logits(model), logits(back)

    assert_near(found, live)
    assert equal(parameters(back), parameters(model)) == (stack is PLAIN)
    assert not torch.allclose(live, logits(world.live(PLAIN if stack is SCALED else SCALED).model), atol=1e-2)


def test_what_is_exported_is_a_plain_folder(world: World, tmp_path: Path) -> None:
    """Its config says how many layers there are and of which kinds; tied ends stay tied; no code goes with it."""
    depths = [hop.layer for hop in SCALED.hops]
    back = world.export(world.recipe(SCALED), tmp_path / "out", depths)
    kinds = KINDS_OF_LAYERS.get(world.kind)
    text = (tmp_path / "out/config.json").read_text()
    config = json.loads(text)

    assert config.get("num_hidden_layers", config.get("n_layer")) == len(depths) == len(layers_of(back))
    assert config.get("layer_types") == (kinds and [kinds[depth] for depth in depths])
    assert config["model_type"] == CONFIGS[world.kind].model_type
    tied = back.get_output_embeddings().weight is back.get_input_embeddings().weight
    assert tied == (world.kind in TIED)
    assert "auto_map" not in text
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert not list((tmp_path / "out").rglob("*.py"))


def test_the_config_of_a_live_stack_is_its_own(world: World) -> None:
    """Number and kinds of layers are those of the stack, those of others and of the shell stay as they are."""
    first, second = world.live(SCALED).model, world.live(hops(("a", 3, 1.0), ("b", 0, 1.0))).model
    kinds = KINDS_OF_LAYERS.get(world.kind)
    for model, depths in ((first, [hop.layer for hop in SCALED.hops]), (second, [3, 0])):
        assert model.config.num_hidden_layers == len(depths) == len(layers_of(model))
        if kinds:
            assert list(model.config.layer_types) == [kinds[depth] for depth in depths]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (world.kind in TIED)


def test_ends_may_be_of_different_sources(llama: World) -> None:
    """One source embeds, the other has the last norm and the head."""
    stack = Stack(embedding="b", hops=SCALED.hops, head="a")
    recipe = llama.recipe(SCALED)
    ends = replace(recipe, routes=(Route(blend=copy_blend("b"), groups=("embedding",)), *recipe.routes))

    assert_same(logits(llama.stacks.build(ends).model), logits(by_hand(llama, stack)))


def test_layers_that_cannot_be_scaled_in_weights_can_be_live(tmp_path: Path) -> None:
    """OLMo 2 has no norm before its branches: a scaled stack is what it says, but it cannot be written."""
    world = world_of("olmo2", tmp_path)

    assert world.stacks.anatomy.unscalable
    assert_same(logits(world.live(SCALED).model), logits(by_hand(world, SCALED)))
    back = world.export(world.recipe(PLAIN), tmp_path / "plain", [hop.layer for hop in PLAIN.hops])
    assert_same(logits(back), logits(world.live(PLAIN).model))
    with pytest.raises(RecipeError, match="what its layers add to the stream is not known, or cannot be scaled"):
        world.export(world.recipe(SCALED), tmp_path / "scaled", [hop.layer for hop in SCALED.hops])
    assert not (tmp_path / "scaled").exists()


# --- generation


def test_generation_with_keys_and_values_kept_is_generation_without(world: World, tmp_path: Path) -> None:
    """Token for token, beyond a window, with layers twice: live, exported, and in the model put together by hand."""
    live = world.live(SCALED).model
    back = world.export(world.recipe(SCALED), tmp_path / "out", [hop.layer for hop in SCALED.hops])
    tokens_BN, expected_BNV = generated(by_hand(world, SCALED), use_cache=False)

    for model in (live, back):
        for use_cache in (True, False):
            found_BN, found_BNV = generated(model, use_cache=use_cache)
            assert torch.equal(found_BN, tokens_BN)
            assert_near(found_BNV, expected_BNV)
    assert tokens_BN.shape == (2, NEW)
    assert len(set(tokens_BN.flatten().tolist())) > 2


def test_stacks_of_the_same_layers_do_not_disturb_each_other(world: World) -> None:
    """A layer stands at another place in each of them, with keys and values of its own; they take turns."""
    other = replace(SCALED, hops=SCALED.hops[::-1])
    first, second = world.live(SCALED).model, world.live(other).model
    one, two = (generated(model, use_cache=True) for model in (first, second))

    again = generated(first, use_cache=True)
    for found, expected in (
        (one, again), (one, generated(by_hand(world, SCALED), use_cache=True)),
        (two, generated(by_hand(world, other), use_cache=True)),
    ):  # fmt: skip
        assert torch.equal(found[0], expected[0])
        assert_near(found[1], expected[1])


# --- memory


def pointers(model: Any) -> dict[str, int]:
    """Return where the bytes of each parameter are."""
    return {name: parameter.data_ptr() for name, parameter in parameters(model).items()}


def origin(name: str, stack: Stack) -> tuple[str, str]:
    """Return the source and the tensor that a parameter of a stack's model is."""
    found = _LAYER.search(name)
    if found is None:
        return stack.head, name
    hop = stack.hops[int(found[1])]
    return hop.source, _LAYER.sub(f".{hop.layer}.", name, count=1)


def test_no_parameter_is_copied(world: World) -> None:
    """Each of a live stack is the very bytes of its source, and nothing trains them."""
    model = world.live(SCALED).model
    found = pointers(model)
    storages = {
        world.resident.tensor(source, name).untyped_storage().data_ptr()
        for source in world.models
        for name in world.resident.names
    }

    assert len(found) > 7 * DEPTH
    for name, pointer in found.items():
        assert pointer == world.resident.tensor(*origin(name, SCALED)).data_ptr(), name
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} <= storages
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_stacks_share_copies_where_the_dtype_is_another(tmp_path: Path) -> None:
    """Sources in bfloat16 that compute in float32 are copied once, for all stacks and all places."""
    world = world_of("llama", tmp_path, torch.bfloat16)
    model = world.live(SCALED).model
    first, second = pointers(model), pointers(world.live(replace(SCALED, hops=SCALED.hops[::-1])).model)
    last = len(SCALED.hops) - 1

    for name, pointer in first.items():
        assert pointer == second[_LAYER.sub(lambda found: f".{last - int(found[1])}.", name, count=1)]
        assert pointer != world.resident.tensor(*origin(name, SCALED)).data_ptr()
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, world.resident.tensor(*origin(name, SCALED)).float())


def test_what_stacks_are_put_into_needs_no_memory_for_layers(llama: World) -> None:
    """Its layers are taken out of it, and the memory of their parameters away; stacks do not put it back."""
    shell = random(CONFIGS["llama"], seed=3)
    layers = list(layers_of(shell))
    stacks = Stacks(llama.folders["a"], llama.resident, "float32")
    stacks.adopt(shell)
    assert_same(logits(stacks.build(llama.recipe(SCALED)).model), logits(by_hand(llama, SCALED)))

    assert len(layers) == DEPTH
    assert len(layers_of(shell)) == 0
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


class Made(TorchDispatchMode):
    """Notes the storage of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returned."""
        out = func(*args, **(kwargs or {}))
        self.storages |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


def test_a_stack_of_32_layers_needs_no_memory_for_them(world: World) -> None:
    """Building it makes nothing that is not in the files' memory: its structure alone is new."""
    long = hops(*(("ab"[k % 2], k % DEPTH, 1.0 + k % 3 / 8) for k in range(32)))
    known = {
        world.resident.tensor(source, name).untyped_storage().data_ptr()
        for source in world.models
        for name in world.resident.names
    }
    recipe = world.recipe(long)
    with Made() as control:
        torch.ones(2).clone()
    with Made() as made:
        model = world.stacks.build(recipe).model

    assert control.storages - known
    assert made.storages <= known
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} <= known
    assert len({parameter.data_ptr() for parameter in layers_of(model).parameters()}) == len(
        {origin(name, long) for name in pointers(model) if _LAYER.search(name)}
    )
    assert len(layers_of(model)) == 32


# --- merges among the sources


def average(world: World) -> Any:
    """Return a plain model of the mean of both sources."""
    model = copy.deepcopy(world.models["a"])
    with torch.no_grad():
        for (_, one), (_, two) in zip(model.named_parameters(), world.models["b"].named_parameters(), strict=True):
            one.copy_((one.double() + two.double()) / 2)
    return model


def test_layers_of_a_source_that_is_a_recipe(world: World, tmp_path: Path) -> None:
    """They are bit for bit those that materialize makes, and the export of such a stack gives its logits."""
    winner = replace(blend({"a": 0.75, "b": 0.25}, *range(DEPTH)), sources=world.sources)
    sources = (*world.sources, Source(name="winner", recipe=winner))
    stack = hops(("a", 0, 1.0), ("winner", 2, 1.25), ("winner", 2, 1.0), ("b", 3, 1.0), ("winner", 0, 0.875))
    stack = replace(stack, embedding="winner", head="winner")
    recipe = recipe_of(stack, sources, "float32")
    model = world.stacks.build(recipe).model
    built = dict(materialize(winner, world.resident))
    for name, parameter in parameters(model).items():
        source, tensor = origin(name, stack)
        expected = built[tensor] if source == "winner" else world.resident.tensor(source, tensor)
        assert torch.equal(parameter, expected), name

    assert_near(logits(world.export(recipe, tmp_path / "out", [hop.layer for hop in stack.hops])), logits(model))


def test_a_source_that_is_a_scaled_stack(llama: World) -> None:
    """Its scales are in its weights, as they would be in its files."""
    inner = hops(("a", 0, 2.0), ("b", 1, 0.75), ("b", 1, 1.0), ("a", 3, 1.5))
    recipe = copy_of(Source(name="winner", recipe=llama.recipe(inner)), DEPTH, "float32")

    assert_near(logits(llama.stacks.build(recipe).model), logits(by_hand(llama, inner)))


def test_layers_of_merges_are_built_once(llama: World) -> None:
    """Two names of one recipe share their layers, in one stack and in the next."""
    winner = replace(blend({"a": 0.5, "b": 0.5}, *range(DEPTH)), sources=llama.sources)
    stack = hops(("winner", 1, 1.0), ("champion", 1, 1.0))
    sources = (*llama.sources, *(Source(name=name, recipe=winner) for name in ("winner", "champion")))
    recipe = recipe_of(replace(stack, embedding="winner", head="winner"), sources, "float32")
    first, second = (pointers(llama.stacks.build(recipe).model) for _ in range(2))

    assert first == second
    assert all(pointer == first[name.replace(".0.", ".1.")] for name, pointer in first.items())


def test_a_name_that_stands_for_another_recipe_gives_other_layers(llama: World) -> None:
    """What was built for one winner does not stand in for the next."""
    found = []
    for weight in (0.25, 0.75):
        winner = replace(blend({"a": weight, "b": 1 - weight}, *range(DEPTH)), sources=llama.sources)
        recipe = copy_of(Source(name="winner", recipe=winner), DEPTH, "float32")
        found.append(parameters(llama.stacks.build(recipe).model))
    one, two = found

    assert not any(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for name, tensor in one.items():
        a, b = (llama.resident.tensor(source, name).double() for source in "ab")
        torch.testing.assert_close(tensor, (a / 4 + 3 * b / 4).float())


@pytest.mark.parametrize("layers", [(), (0, 1, 2, 3)], ids=["without layers", "with layers"])
def test_a_recipe_that_is_no_stack_is_the_model_that_it_makes(
    world: World, layers: tuple[int, ...], tmp_path: Path
) -> None:
    """A uniform average gives the logits of the average taken by hand, and has the bits of its export."""
    recipe = replace(blend({"a": 0.5, "b": 0.5}, *layers), sources=world.sources)
    live, back = world.stacks.build(recipe).model, world.export(recipe, tmp_path / "out", None)

    assert_near(logits(live), logits(average(world)))
    assert_same(logits(live), logits(back))
    assert equal(parameters(live), parameters(back))


def test_kinds_of_layers_follow_a_recipe_that_is_no_stack(gemma: World, tmp_path: Path) -> None:
    """Where an average turns layers round, each is of the kind of the layer that it was made of, as in the export."""
    recipe = replace(blend({"a": 0.5, "b": 0.5}, 1, 0, 2, 3), sources=gemma.sources)
    live = gemma.stacks.build(recipe).model
    back = gemma.export(recipe, tmp_path / "out", [1, 0, 2, 3])

    assert list(back.config.layer_types) == [FULL, SLIDING, SLIDING, FULL]
    assert list(live.config.layer_types) == list(back.config.layer_types)
    assert_same(logits(live), logits(back))


# --- watching


class Notes:
    """A watch that keeps what hops take and return, and may answer for some of them."""

    def __init__(self, known: dict[int, Tensor] | None = None) -> None:
        self.known = known or {}
        self.taken: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}

    def skips(self, hop: int, hidden: Tensor) -> Tensor | None:
        """Keep what a hop takes, and return what is known of it."""
        self.taken[hop] = hidden
        return self.known.get(hop)

    def leaves(self, hop: int, hidden: Tensor) -> None:
        """Keep what a hop returned."""
        self.left[hop] = hidden


def test_a_watch_sees_the_stream_between_hops(world: World) -> None:
    """What a hop takes before its scale is what the one before it left, and both are those of plain transformers."""
    live, plain = world.live(SCALED), by_hand(world, SCALED)
    expected: dict[int, Tensor] = {}
    for k, layer in enumerate(layers_of(plain)):
        layer.register_forward_hook(lambda _, arguments, out, k=k: expected.__setitem__(k, out))
    logits(plain)
    live.watch = notes = Notes()
    logits(live.model)

    assert list(notes.taken) == list(notes.left) == list(range(len(SCALED.hops)))
    for k, out in expected.items():
        assert_same(notes.left[k], out)
        if k + 1 in notes.taken:
            assert torch.equal(notes.taken[k + 1], notes.left[k])


def test_what_a_watch_knows_is_not_computed(world: World) -> None:
    """Hidden states that were kept stand in for the hops before them: the same bits, and those hops are not run."""
    live = world.live(SCALED)
    whole = logits(live.model)
    live.watch = notes = Notes()
    logits(live.model)
    live.watch = again = Notes({k: notes.left[k] for k in range(4)})

    assert torch.equal(logits(live.model), whole)
    assert list(again.left) == list(range(4, len(SCALED.hops)))
    live.watch = None
    assert torch.equal(logits(live.model), whole)


def test_a_live_stack_says_what_its_hops_do(llama: World) -> None:
    """Its hops are the stack's and its path the recipe's; a model that is no stack is copies of itself."""
    live = llama.live(SCALED)
    mean = replace(blend({"a": 0.5, "b": 0.5}, *range(DEPTH)), sources=llama.sources)
    single = llama.stacks.build(mean)

    assert (live.hops, live.path) == (SCALED.hops, path_of(llama.recipe(SCALED)))
    assert [hop.layer for hop in single.hops] == list(range(DEPTH))
    assert [source for source, _, _ in single.path[1:]] == [mean.digest] * (DEPTH - 1)


# --- what does not fit


@pytest.mark.parametrize("layer", [-1, DEPTH])
def test_layers_that_no_source_has_are_refused(llama: World, layer: int, tmp_path: Path) -> None:
    """A stack that takes one is a candidate that failed, live, and is refused before it is written."""
    stack = hops(("a", 0, 1.0), ("b", layer, 1.0))

    with pytest.raises(CandidateError, match=f"hop 1 takes layer {layer} of b, which has 4 layers"):
        llama.live(stack)
    with pytest.raises(RecipeError, match=f"recipe layer 1 takes from layer {layer}, but the sources have 4 layers"):
        llama.export(llama.recipe(stack), tmp_path / "out", [0, layer])


def test_scales_of_a_recipe_that_is_no_stack_are_refused(llama: World) -> None:
    """Its layers are no copies, so there is nothing to fold them into."""
    recipe = replace(blend({"a": 0.5, "b": 0.5}, 0, 1, scales=(1.0, 2.0)), sources=llama.sources)

    with pytest.raises((CandidateError, RecipeError), match="scales"):
        llama.stacks.build(recipe)
    ones = replace(recipe, scales=(1.0, 1.0))
    assert torch.equal(
        logits(llama.stacks.build(ones).model), logits(llama.stacks.build(replace(recipe, scales=())).model)
    )


def test_sources_that_do_not_fit_the_shell_are_refused(llama: World, tmp_path: Path) -> None:
    """A live model of another width is told in one line, with the tensor."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_size = 16
    stacks = Stacks(llama.folders["a"], llama.resident, "float32")
    stacks.adopt(AutoModelForCausalLM.from_config(config, dtype=torch.float32))

    with pytest.raises(ModelError, match=r"has shape \[\d+, \d+\], the live model's has .* must fit the sources"):
        stacks.build(llama.recipe(SCALED))


def test_kinds_that_a_config_leaves_out_are_written(tmp_path: Path) -> None:
    """Transformers derives them from the layers' numbers; once these change, the export names the kinds itself."""
    world = world_of("gemma2", tmp_path, layer_types=None)
    assert "layer_types" not in json.loads((tmp_path / "a/config.json").read_text())
    for stack in (SCALED, hops(("a", 1, 1.0), ("a", 1, 1.0), ("b", 0, 1.0))):
        depths = [hop.layer for hop in stack.hops]
        out = tmp_path / f"out{len(depths)}"
        back = world.export(world.recipe(stack), out, depths)

        kinds = [(SLIDING, FULL)[depth % 2] for depth in depths]
        assert json.loads((out / "config.json").read_text())["layer_types"] == kinds == list(back.config.layer_types)
        assert_near(logits(back), logits(by_hand(world, stack)))
        assert_same(logits(world.live(stack).model), logits(by_hand(world, stack)))

"""What is found out about layers by running small models, against what the papers and the code of transformers say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    XLMConfig,
)

from evomerge.errors import ModelError
from evomerge.models.anatomy import Anatomy, additions_of, anatomy_of, list_of_layers
from evomerge.recipe import Blend, Recipe, Route, Source, copy_of
from tests.models.folders import edit_config

SHAPE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
LATE = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

FULL, SLIDING = "full_attention", "sliding_attention"
ALTERNATING = (SLIDING, FULL, SLIDING, FULL)

#: Where a layer's two branches end: h + Attention(norm(h)), then h + MLP(norm(h)), with or without biases.
LLAMA = {"self_attn.o_proj.weight": 0.0, "mlp.down_proj.weight": 0.0}
LLAMA_BIASES = LLAMA | {"self_attn.o_proj.bias": 0.0, "mlp.down_proj.bias": 0.0}
NEOX = {
    "attention.dense.weight": 0.0, "attention.dense.bias": 0.0,
    "mlp.dense_4h_to_h.weight": 0.0, "mlp.dense_4h_to_h.bias": 0.0,
}  # fmt: skip
GPT2 = {f"{part}.c_proj.{kind}": 0.0 for part in ("attn", "mlp") for kind in ("weight", "bias")}
OPT = {f"{part}.{kind}": 0.0 for part in ("self_attn.out_proj", "fc2") for kind in ("weight", "bias")}
#: A norm of its own ends each branch; Gemma's multiplies by 1 + weight, GLM's by the weight.
GEMMA = {"post_attention_layernorm.weight": 1.0, "post_feedforward_layernorm.weight": 1.0}
GLM4 = {"post_self_attn_layernorm.weight": 0.0, "post_mlp_layernorm.weight": 0.0}

#: Configs, with the list of layers of the live model, what layers add, and their kinds.
SCALABLE: dict[str, tuple[PretrainedConfig, str, dict[str, float], tuple[str, ...]]] = {
    "llama": (LlamaConfig(**GROUPED), "model.layers", LLAMA, ()),
    "llama with biases": (
        LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True), "model.layers", LLAMA_BIASES, (),
    ),
    "qwen2": (Qwen2Config(**GROUPED, **LATE), "model.layers", LLAMA, (FULL, FULL, SLIDING, SLIDING)),
    "qwen3": (Qwen3Config(**HEADED, **LATE), "model.layers", LLAMA, (FULL, FULL, SLIDING, SLIDING)),
    "mistral": (MistralConfig(**GROUPED, sliding_window=8), "model.layers", LLAMA, ()),
    "gemma2": (Gemma2Config(**HEADED, sliding_window=8), "model.layers", GEMMA, ALTERNATING),
    "gemma3": (
        Gemma3TextConfig(**HEADED, sliding_window=8, layer_types=[FULL, SLIDING, SLIDING, FULL]),
        "model.layers", GEMMA, (FULL, SLIDING, SLIDING, FULL),
    ),
    "gpt_neox": (GPTNeoXConfig(**SHAPE), "gpt_neox.layers", NEOX, ()),
    "gpt_neox in sequence": (GPTNeoXConfig(**SHAPE, use_parallel_residual=False), "gpt_neox.layers", NEOX, ()),
    "gpt2": (GPT2Config(vocab_size=48, n_embd=32, n_layer=4, n_head=4, n_positions=64), "transformer.h", GPT2, ()),
    "granite, which halves what it adds": (
        GraniteConfig(**GROUPED, residual_multiplier=0.5), "model.layers", LLAMA, (),
    ),
    "cohere, with both branches at once": (CohereConfig(**GROUPED), "model.layers", LLAMA, ()),
    "glm4": (Glm4Config(**HEADED), "model.layers", GLM4, ()),
    "opt": (
        OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32), "model.decoder.layers", OPT, (),
    ),
}  # fmt: skip

#: Configs whose layers may be stacked but not scaled, with a part of the reason.
UNSCALABLE = {
    # norm(F(h)): what F is given has no norm before it
    "olmo2": (Olmo2Config(**GROUPED), "its layers take notice of the size of their input"),
    # a mixture of experts is no one projection
    "mixtral": (MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), "'mlp.experts' is not propor"),
    # norm(h + F(h)): nothing is added to the stream
    "opt with norms at the end": (
        OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False), "comes from no modules",
    ),
}  # fmt: skip


def look(config: PretrainedConfig, folder: Path, **changes: object) -> Anatomy:
    """Write a config alone as a model folder, change it, and look at its layers."""
    config.save_pretrained(folder)
    edit_config(folder, **changes)
    return anatomy_of(folder)


@pytest.mark.parametrize("kind", SCALABLE)
def test_what_layers_add_is_found(kind: str, tmp_path: Path) -> None:
    """The last parameters of each branch, and of them those that are stored without 1; where layers lie, and kinds."""
    config, layers, additions, kinds = SCALABLE[kind]
    found = look(config, tmp_path)

    assert dict(found.additions) == additions
    assert (found.layers, found.kinds, found.unscalable) == (layers, kinds, "")


@pytest.mark.parametrize("kind", UNSCALABLE)
def test_layers_that_may_be_stacked_but_not_scaled(kind: str, tmp_path: Path) -> None:
    """There are no additions, with the reason, where a factor of the stream cannot be undone in weights."""
    config, why = UNSCALABLE[kind]
    found = look(config, tmp_path)

    assert not found.additions
    assert why in found.unscalable
    assert found.layers.endswith("layers")


def test_a_text_model_within_another_config(tmp_path: Path) -> None:
    """Where the config nests that of the text, as with images, its layers are those of the text model."""
    text = Gemma3TextConfig(**HEADED, sliding_window=8, layer_types=list(ALTERNATING))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    found = look(Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4), tmp_path)

    assert dict(found.additions) == GEMMA
    assert found.kinds == ALTERNATING
    assert found.layers.endswith("layers")


def test_kinds_are_those_that_transformers_derives(tmp_path: Path) -> None:
    """A config.json without kinds of layers is read as transformers reads it: Gemma 2 begins with a window."""
    assert look(Gemma2Config(**HEADED, sliding_window=8), tmp_path, layer_types=None).kinds == ALTERNATING


def test_layers_that_share_keys_and_values_are_refused_by_name(tmp_path: Path) -> None:
    """A layer that reads another's keys and values cannot stand elsewhere; folder and architecture are named."""
    shared = Gemma3nTextConfig(
        **HEADED, num_kv_shared_layers=2, vocab_size_per_layer_input=48, hidden_size_per_layer_input=8,
        layer_types=[FULL] * 4, laurel_rank=4,
    )  # fmt: skip

    with pytest.raises(ModelError, match=f"^{tmp_path}/n: layers of gemma3n_text share keys and values across depth"):
        look(shared, tmp_path / "n")
    with pytest.raises(ModelError, match=f"^{tmp_path}/l: layers of llama share keys and values across depth"):
        look(LlamaConfig(**GROUPED), tmp_path / "l", num_kv_shared_layers=1)


def test_models_without_a_list_of_layers_are_refused(tmp_path: Path) -> None:
    """XLM keeps attentions, norms and projections in lists of their own; a layer is in none of them."""
    config = XLMConfig(vocab_size=48, emb_dim=32, n_layers=4, n_heads=4)

    with pytest.raises(ModelError, match=f"^{tmp_path}: xlm has no one list of layers, so they cannot be stacked$"):
        look(config, tmp_path)


def test_lists_within_layers_are_no_lists_of_layers() -> None:
    """As many experts in each layer as there are layers do not hide where the layers are."""
    model = nn.Module()
    model.config = LlamaConfig(**SHAPE)
    model.decoder = nn.Module()
    model.decoder.blocks = nn.ModuleList(nn.Module() for _ in range(4))
    for block in model.decoder.blocks:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    assert list_of_layers(model) == "decoder.blocks"
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert list_of_layers(model) == "decoder.blocks"
    model.others.append(nn.Linear(2, 2))
    assert list_of_layers(model) == ""


def test_models_that_cannot_be_made_are_refused_in_one_line(tmp_path: Path) -> None:
    """Heads that do not divide what they are cut from: the error says what was tried."""
    with pytest.raises(ModelError, match=r"no small gpt2 can be built to look at its layers \(ValueError: ") as caught:
        look(GPT2Config(vocab_size=48, n_embd=32, n_layer=4, n_head=5), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_state_space_layer_is_no_sum_of_projections(tmp_path: Path) -> None:
    """Whatever is told of Mamba, no parameters are named whose halving would not halve what a layer adds."""
    found = look(MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=4), tmp_path)

    assert bool(found.unscalable) != bool(found.additions)
    assert set(found.additions) <= {"mixer.out_proj.weight"}


def test_looking_leaves_random_numbers_and_files_alone(tmp_path: Path) -> None:
    """The global generator goes on as if nothing had been, and the folder holds what it held."""
    LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    anatomy_of(tmp_path)

    assert torch.equal(torch.rand(3), expected)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_additions_are_asked_for_where_a_recipe_has_scales(tmp_path: Path) -> None:
    """Its own scales or those of a recipe within it; without any nothing is looked at, and no folder is needed."""
    source = Source(name="a", path="a")
    plain = copy_of(source, 2, "float32")
    ones = Recipe(sources=(source,), routes=plain.routes, layers=(0, 1), scales=(1.0, 1.0), dtype="float32")
    scaled = Recipe(sources=(source,), routes=plain.routes, layers=(0, 1), scales=(1.0, 2.0), dtype="float32")
    within = copy_of(Source(name="w", recipe=scaled), 2, "float32")
    below = Recipe(
        sources=(source,), base=Source(name="w", recipe=within), dtype="float32",
        routes=(Route(blend=Blend(method="task_arithmetic", weights={"a": 1.0})),),
    )  # fmt: skip
    for name, kind in (("good", SCALABLE["gemma2"][0]), ("bad", UNSCALABLE["olmo2"][0])):
        kind.save_pretrained(tmp_path / name)

    for recipe in (plain, ones):
        assert additions_of(recipe, tmp_path / "nowhere") == {}
    for recipe in (scaled, within, below):
        assert dict(additions_of(recipe, tmp_path / "good")) == GEMMA
        with pytest.raises(ModelError, match="the recipe has scales, which cannot be written: its layers take notice"):
            additions_of(recipe, tmp_path / "bad")

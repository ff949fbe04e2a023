"""Places of tensors from names, and configs of reshaped models, for architectures as transformers names them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from evomerge.errors import ModelError
from evomerge.models.architecture import Place, place, read_config, renamed, reshaped, split

TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}

#: (model class, config class, config): families that name their tensors in different ways.
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "LlamaConfig", TINY),
    ("Qwen2ForCausalLM", "Qwen2Config", TINY | {"num_key_value_heads": 2}),
    ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", TINY),
    ("OPTForCausalLM", "OPTConfig", TINY | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    ("MixtralForCausalLM", "MixtralConfig", TINY | {"num_key_value_heads": 2, "num_local_experts": 2}),
]


@pytest.mark.parametrize(("model", "config", "options"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_places_agree_with_the_modules_of_transformers(model: str, config: str, options: dict[str, Any]) -> None:
    """Layer and group of every tensor are those of the module that holds it in the live model."""
    made: PretrainedConfig = getattr(transformers, config)(**options)
    with torch.device("meta"):
        live: PreTrainedModel = getattr(transformers, model)(made)
    layers = next(module for module in live.modules() if isinstance(module, torch.nn.ModuleList))
    prefix = next(name for name, module in live.named_modules() if module is layers)
    assert len(layers) == 3
    for name in live.state_dict():
        found = place(name, 3)
        if not name.startswith(prefix + "."):
            is_embedding = isinstance(live.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding)
            assert found == Place(layer=None, group="other", end="embedding" if is_embedding else "head"), name
            continue
        index, part = name.removeprefix(prefix + ".").split(".")[:2]
        module = type(getattr(layers[int(index)], part)).__name__.lower()
        group = "attention" if "attention" in module else "other" if "norm" in module else "mlp"
        assert found == Place(layer=int(index), group=group), name


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("embed_out.weight", "head"), ("gpt_neox.embed_in.weight", "embedding"), ("model.norm.weight", "head"),
        ("transformer.wpe.weight", "embedding"), ("tok_embeddings.weight", "embedding"), ("lm_head.bias", "head"),
        ("transformer.word_embeddings_layernorm.weight", "embedding"), ("transformer.ln_f.bias", "head"),
    ],
)  # fmt: skip
def test_ends_of_older_names(name: str, end: str) -> None:
    """Names that stand in files, though transformers may have renamed the modules since."""
    assert place(name, 3) == Place(layer=None, group="other", end=end)


def test_a_layer_beyond_the_depth_is_an_error() -> None:
    """A tensor that the config has no layer for is not lost in silence."""
    with pytest.raises(ModelError, match=r"'model\.layers\.3\.mlp\.w' is of layer 3, .* there are 3 layers"):
        place("model.layers.3.mlp.w", 3)


def test_renaming_moves_a_tensor_to_another_layer() -> None:
    """Only the index changes; a tensor outside layers cannot be moved."""
    assert renamed("transformer.h.1.attn.c_proj.2.weight", 7) == "transformer.h.7.attn.c_proj.2.weight"
    assert split("lm_head.weight") is None
    with pytest.raises(ValueError, match="not of a layer"):
        renamed("lm_head.weight", 1)


def test_read_config_gives_the_architecture(family: dict[str, Path], tied: dict[str, Path]) -> None:
    """Numbers are those that the models were made with, under both families' key names."""
    found = read_config(family["a"])[0]
    gpt = read_config(tied["gpt0"])[0]

    assert (found.model_type, found.depth, found.hidden, found.tied, found.vocabulary) == ("llama", 3, 16, False, 20)
    assert (gpt.model_type, gpt.depth, gpt.hidden, gpt.tied, gpt.vocabulary) == ("gpt2", 2, 16, True, 20)


def test_reshaping_follows_every_list_of_layers() -> None:
    """Per-layer lists, index lists and nested configs follow the layers; the original stays as it was."""
    config = {
        "num_hidden_layers": 4, "layer_types": ["full", "slide", "full", "slide"], "no_rope_layers": [1, 1, 0, 1],
        "mlp_only_layers": [0, 3], "torch_dtype": "float32", "vocab_size": 4, "eos_token_id": [1, 2, 3, 4],
    }  # fmt: skip
    before = repr(config)

    found = reshaped(config, [0, 3, 3, 1, 2], "bfloat16")

    assert repr(config) == before
    assert found == {
        "num_hidden_layers": 5, "layer_types": ["full", "slide", "slide", "slide", "full"],
        "no_rope_layers": [1, 1, 1, 1, 0], "mlp_only_layers": [0, 1, 2], "torch_dtype": "bfloat16",
        "dtype": "bfloat16", "vocab_size": 4, "eos_token_id": [1, 2, 3, 4],
    }  # fmt: skip


def test_a_nested_text_config_counts() -> None:
    """The language part of a model with images is found, and reshaped in its place."""
    config = {"model_type": "both", "text_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]}}
    before = repr(config)

    assert reshaped(config, [1], "float16") == {
        "model_type": "both", "text_config": {"num_hidden_layers": 1, "layer_types": ["y"]}, "dtype": "float16",
    }  # fmt: skip
    assert repr(config) == before

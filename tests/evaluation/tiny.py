"""Tiny random models of several architectures, with a tokenizer of one token per character."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-=?,. \n"
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<end>", *CHARACTERS])}
SIZE = len(VOCABULARY)
PAD, BOS, EOS, END = range(4)


def make_tokenizer(*, bos: bool = True) -> Any:
    """Return a tokenizer of one token per character, which puts <bos> first or not."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<end>"],
        clean_up_tokenization_spaces=False,
    )


def make_model(kind: str = "llama", seed: int = 0, *, tied: bool = False) -> Any:
    """Return a random model, in float32, whose greedy answers vary with the prompt.

    `gemma2` and `mistral` have a sliding window of 8 tokens, shorter than most prompts.
    """
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    shape: dict[str, Any] = {
        "vocab_size": SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **ends,
    }
    grouped = {**shape, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    make: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**grouped, "num_hidden_layers": 3})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**grouped, sliding_window=8)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**grouped, head_dim=8, sliding_window=8)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)
        ),
        "modernbert_decoder": lambda: ModernBertDecoderForCausalLM(
            ModernBertDecoderConfig(**shape, cls_token_id=BOS, sep_token_id=EOS, local_attention=8)
        ),
        "mamba": lambda: MambaForCausalLM(
            MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, **ends)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        model = make[kind]()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                weight.normal_(0.0, 0.35, generator=stream)
    return model.eval()


def save(folder: Path, model: Any, *, bos: bool = True) -> Path:
    """Write model and tokenizer as a model folder."""
    model.save_pretrained(folder)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return folder

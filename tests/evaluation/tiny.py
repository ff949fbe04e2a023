"""Tiny random models of several architectures, with a tokenizer of one token per character."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
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
    """Return a random model, in float32, whose greedy answers vary with the prompt."""
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "llama":
        config: Any = LlamaConfig(
            vocab_size=SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            **ends,
        )
        model: Any = LlamaForCausalLM(config)
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends))
    elif kind == "gpt_neox":
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=SIZE,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                **ends,
            )
        )
    else:
        model = MambaForCausalLM(MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, **ends))
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

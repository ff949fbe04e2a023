"""Measures the engine against lm-eval's HFLM: the same requests of the same model, in one run, answers compared.

A Llama of 100 M parameters with random weights answers 200 multiple-choice items, with four choices of several tokens
and a context of worked examples that all share, and 50 prompts by generation; and the same without shared examples.
HFLM gets the best of some batch sizes, found on a part of the items. The engine has its defaults.

    python experiments/benchmarks/engine.py [--threads 2] [--items 200] [--prompts 50] [--json]
"""

import argparse
import itertools
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.evaluation.engine import Engine
from evomerge.evaluation.request import Outcome, Request

#: Tokens of the vocabulary; of the worked examples; the longest question, choice and answer.
VOCABULARY, SHARED, QUESTION, CHOICE, ANSWER = 32000, 128, 24, 5, 32

#: Batch sizes that HFLM may choose from.
BATCHES = (4, 16, 64)

#: What is aimed at: how many times as fast as HFLM.
AIMS = {"multiple choice, shared": 3.0, "generation, shared": 1.0}

#: How far log-likelihoods of the two may be apart, in nats.
CLOSE = 1e-3


def main() -> int:
    """Print the table of ratios; return 1 where answers differ or an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        count = _write_model(Path(folder))
        engine = Engine(Path(folder), options.dtype, options.device, pretrained=True)
    print(f"{count / 1e6:.0f} M parameters, {options.dtype}, {options.device}, {options.threads} threads")
    print(f"{'requests':28} {'HFLM s':>8} {'batch':>6} {'engine s':>9} {'ratio':>6} {'aim':>5}  answers")
    rows = []
    for name, requests in _workloads(options.items, options.prompts):
        rows.append(_measure(name, requests, engine))
        print(_line(rows[-1]), flush=True)
    holds = all(row["equal"] and row["ratio"] >= AIMS.get(row["name"], 0.0) for row in rows)
    if options.json:
        print(json.dumps({"parameters": count, "threads": options.threads, "device": options.device, "rows": rows,
                          "holds": holds}))  # fmt: skip
    return 0 if holds else 1


def _write_model(folder: Path) -> int:
    """Write a random model and a tokenizer of one token a word; return the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                         num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # a blank between words
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                            clean_up_tokenization_spaces=False).save_pretrained(folder)  # fmt: skip
    return sum(weight.numel() for weight in model.parameters())


def _workloads(items: int, prompts: int) -> Iterator[tuple[str, list[Request]]]:
    """Yield what is asked, with its name."""
    for kind, shared in (("shared", True), ("alone", False)):
        draw = random.Random(f"{kind} 0")
        examples = _words(draw, SHARED) + " " if shared else ""
        contexts = [examples + _words(draw, draw.randint(QUESTION // 2, QUESTION)) for _ in range(max(items, prompts))]
        yield f"multiple choice, {kind}", [
            Request(kind="loglikelihood", context=context, continuation=" " + _words(draw, draw.randint(2, CHOICE)))
            for context in contexts[:items]
            for _ in range(4)
        ]
        yield f"generation, {kind}", [
            Request(kind="generate", context=context, stop=("w7 w7",), most=ANSWER) for context in contexts[:prompts]
        ]


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(count))


def _measure(name: str, requests: Sequence[Request], engine: Engine) -> dict[str, Any]:
    part = requests[: len(requests) // 8]
    batch = min(BATCHES, key=lambda size: _timed(lambda: _hflm(engine, part, size))[0])
    theirs, expected = _timed(lambda: _hflm(engine, requests, batch))
    engine.answer(engine.plan(part))
    engine.forget()
    ours, found = _timed(lambda: engine.answer(engine.plan(requests)))
    return {"name": name, "requests": len(requests), "hflm": theirs, "batch": batch, "engine": ours,
            "ratio": theirs / ours, "equal": _equal(found, expected)}  # fmt: skip


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def _hflm(engine: Engine, requests: Sequence[Request], batch: int) -> list[Any]:
    """Return what HFLM says to the same requests of the same live model."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=batch)
    generates = requests[0].kind == "generate"
    asked = [
        (request.context, {"until": list(request.stop), "max_gen_toks": request.most, "do_sample": False})
        if generates
        else (request.context, request.continuation)
        for request in requests
    ]
    kind = "generate_until" if generates else "loglikelihood"
    instances = [Instance(kind, {}, given, place) for place, given in enumerate(asked)]
    answers: list[Any] = getattr(lm, kind)(instances, disable_tqdm=True)
    return answers


def _equal(found: Sequence[Outcome], expected: Sequence[Any]) -> bool:
    """Tell whether texts, or log-likelihoods and greedy flags, are the same item by item."""
    return all(
        one.text == other
        if isinstance(other, str)
        else abs(one.loglikelihood - other[0]) < CLOSE and one.greedy == other[1]
        for one, other in itertools.zip_longest(found, expected)
    )


def _line(row: dict[str, Any]) -> str:
    aim = AIMS.get(row["name"])
    return (
        f"{row['name']:28} {row['hflm']:8.1f} {row['batch']:6} {row['engine']:9.2f} {row['ratio']:6.1f} "
        f"{'' if aim is None else aim:>5}  {'equal' if row['equal'] else 'DIFFER'}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Compares the predicted peak of a worker's resident memory with the measured one, each in a process of its own.

The models are those of the quickstart, of both depths, and Llamas with random weights of 20, 100 and 400 M parameters
that are made in a temporary folder. The worker answers all items for the base and the sources, as in every run, and for
two merges or stacks, and the system tells how much memory it had at its peak (ru_maxrss).

    python experiments/benchmarks/memory.py [--only WORD …] [--json]
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "experiments/zoo"

#: Of the models that are made: hidden size, inner size, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "20M": (384, 1024, 6, 6, 2, 16000),
    "100M": (768, 2048, 12, 12, 4, 32000),
    "400M": (1280, 3584, 20, 20, 5, 32000),
}
NAMES = ("base", "one", "two", "three")

#: Merges, or stacks, that a worker answers after the base and the sources as they are.
_MERGES = 2

#: The greatest difference between prediction and measurement that is aimed at.
AIM = 0.15

#: What is measured: models, dtype, sources, kind of task, items, characters of each, method, dtype of the live model;
#: and settings of the worker that are not the defaults. A character is a token.
CASES: tuple[tuple[Any, ...], ...] = (
    ("zoo", "bfloat16", 3, "quickstart", 0, 0, "task_arithmetic", "float32", {}),
    ("zoo", "bfloat16", 3, "quickstart", 0, 0, "ties", "float32", {}),
    ("zoo/deep", "bfloat16", 2, "quickstart", 0, 0, "stack", "float32", {}),
    ("20M", "float32", 2, "choose", 128, 100, "linear", "float32", {}),
    ("100M", "float32", 2, "choose", 40, 120, "task_arithmetic", "float32", {}),
    ("100M", "bfloat16", 3, "choose", 60, 60, "ties", "bfloat16", {}),
    ("100M", "bfloat16", 2, "generate", 32, 120, "dare_ties", "bfloat16", {}),
    ("100M", "bfloat16", 2, "choose", 40, 120, "linear", "float32", {}),
    ("100M", "bfloat16", 2, "choose", 40, 120, "stack", "bfloat16", {"prefixes": 100_000_000}),
    ("100M", "bfloat16", 2, "generate", 16, 100, "stack", "float32", {"prefixes": 50_000_000}),
    ("100M", "float32", 2, "read", 24, 200, "slerp", "float32", {"tokens": 2048}),
    ("400M", "bfloat16", 3, "choose", 12, 120, "task_arithmetic", "bfloat16", {"batch": 8}),
    ("400M", "bfloat16", 2, "generate", 8, 100, "linear", "bfloat16", {}),
    ("400M", "float32", 1, "choose", 8, 100, "task_arithmetic", "float32", {}),
    ("400M", "bfloat16", 2, "choose", 8, 100, "stack", "bfloat16", {"prefixes": 50_000_000}),
)


def main() -> int:
    """Print the table; the exit code is the number of cases beyond the aim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="only cases whose name has one of these words")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # one case: predict or work, its number, a folder
    options = parser.parse_args()
    if options.part:
        part, number, folder = options.part
        print(json.dumps((_predict if part == "predict" else _work)(CASES[int(number)], Path(folder))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, case in enumerate(CASES):
            name = _name(case)
            if options.only and not any(word in name for word in options.only):
                continue
            folder = _models(case, Path(place))
            predicted, measured = (_apart(part, number, folder) for part in ("predict", "work"))
            ratio = sum(predicted.values()) / measured["peak"]
            rows.append({"case": name, "predicted": predicted, "measured": measured["peak"], "ratio": ratio})
            shares = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in predicted.items() if size)
            shares += f" of which {measured['prefixes'] / 1e6:.0f} were used" * (predicted["prefixes"] > 0)
            print(
                f"{ratio:.3f}: predicted {sum(predicted.values()) / 1e6:.0f} MB ({shares}), "
                f"measured {measured['peak'] / 1e6:.0f} MB: {name}",
                flush=True,
            )
            if not any(case[:2] == other[:2] for other in CASES[number + 1 :]) and case[0] in SHAPES:
                shutil.rmtree(folder)
    beyond = [row for row in rows if abs(row["ratio"] - 1) > AIM]
    print(f"{len(rows) - len(beyond)} of {len(rows)} within {AIM:.0%}")
    if options.json:
        print(json.dumps({"aim": AIM, "rows": rows}))
    return len(beyond)


def _name(case: tuple[Any, ...]) -> str:
    models, stored, sources, kind, count, length, method, dtype, settings = case
    items = f"{count} items of {length} tokens to {kind}" if count else "the quickstart's items"
    told = "".join(f", {key} {number}" for key, number in settings.items())
    return f"{models} {stored}, {sources} sources, {method} in {dtype}, {items}{told}"


def _apart(part: str, number: int, folder: Path) -> dict[str, int]:
    """Do a part of a case in a process of its own."""
    command = [sys.executable, __file__, "--part", part, str(number), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{_name(CASES[number])}: {part} failed: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _predict(case: tuple[Any, ...], folder: Path) -> dict[str, int]:
    """Return the parts of the predicted peak."""
    from evomerge.search.memory import memory_of

    memory = memory_of(_setup(case, folder), _recipes(case), where="apart")
    parts = ("program", "sources", "model", "candidate", "prefixes")
    assert sum(getattr(memory, part) for part in parts) == memory.resident
    return {part: getattr(memory, part) for part in parts}


def _work(case: tuple[Any, ...], folder: Path) -> dict[str, int]:
    """Answer candidates and return the peak of this process's memory in bytes."""
    import resource

    from evomerge.pool import Job

    setup = _setup(case, folder)
    worker = setup.make()
    for number, recipe in enumerate(_recipes(case)):
        for split in ("search", "validation"):
            items = {name: tuple(range(task.count(split))) for name, task in setup.tasks.items() if task.count(split)}
            if items:
                answer = worker.answer(
                    Job(candidate=number, recipe=recipe, split=split, items=items, branches=(2, 4))
                )
                if answer.error:
                    raise SystemExit(answer.error)
    kept = worker._prefixes.most  # a private count: how far the budget of prefixes was used
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "prefixes": kept}


def _setup(case: tuple[Any, ...], folder: Path) -> Any:
    from evomerge.evaluation import read_task
    from evomerge.evaluation.gates import Gates
    from evomerge.worker import WorkerSetup

    models, _, sources, kind, count, length, method, dtype, settings = case
    names = _names(models)[: sources + 1]
    if kind == "quickstart":
        asked = ("arithmetic", "cipher")
        tasks = {name: read_task(ROOT / f"fitness/{name}.yaml", name, folder / "base") for name in asked}
    else:
        tasks = {kind: _task(kind, count, length)}
    return WorkerSetup(
        template=folder / names[0], sources={name: folder / name for name in names}, tasks=tasks, dtype=dtype,
        gates=Gates(repetition=0), stacked=method == "stack", **settings,
    )  # fmt: skip


def _names(models: str) -> tuple[str, ...]:
    if models == "zoo":
        return ("base", "arithmetic", "strings", "cipher")
    return ("base", "arithmetic", "cipher") if models == "zoo/deep" else NAMES


def _task(kind: str, count: int, length: int) -> Any:
    """Return a task whose items are random letters."""
    from evomerge.evaluation.items import Item
    from evomerge.evaluation.jsonl import JsonlTask
    from evomerge.evaluation.labelled import Choose, Generate
    from evomerge.evaluation.texts import Loss

    draw = random.Random(0)
    prompts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length - 8)) for _ in range(count)]
    choices = ("a" * 8, "b" * 8, "c" * 8, "d" * 8) if kind == "choose" else ()
    items = tuple(Item(id=str(k), prompt=text, answers=("a" * 8,), choices=choices) for k, text in enumerate(prompts))
    measure = {"choose": Choose(), "generate": Generate(max_new_tokens=32), "read": Loss()}[kind]
    return JsonlTask(name=kind, measure=measure, splits={"search": items})


def _recipes(case: tuple[Any, ...]) -> list[Any]:
    """Return candidates as in every run: base and sources as they are, then what a search would propose."""
    from evomerge.recipe import Source, copy_of

    names = _names(case[0])[: case[2] + 1]
    copies = [copy_of(Source(name=name, path=name), _depth(case[0]), case[7]) for name in names]
    return [*copies, *(_recipe(case, draw) for draw in range(1, _MERGES + 1))]


def _recipe(case: tuple[Any, ...], draw: int) -> Any:
    """Return a merge, or a stack."""
    from evomerge.hops import Hop, Stack, recipe_of
    from evomerge.recipe import Blend, Recipe, Route, Source

    models, _, count, _, _, _, method, dtype, _ = case
    names = _names(models)[: count + 1]
    sources = tuple(Source(name=name, path=name) for name in names[1:])
    depth = _depth(models)
    if method == "stack":
        hops = tuple(Hop(source=names[1 + (k + (k > depth // 2 + draw)) % count], layer=k) for k in range(depth))
        return recipe_of(Stack(hops=hops, embedding=names[1], head=names[1]), sources, dtype)
    shares = dict.fromkeys(names[1:], 0.3 + 0.1 * draw)
    blend = Blend(method=method, weights=shares, parameters={"density": shares} if "ties" in method else {})
    base = None if method in ("linear", "slerp") else Source(name="base", path="base")
    return Recipe(sources=sources, base=base, routes=(Route(blend=blend),), layers=tuple(range(depth)), dtype=dtype,
                  seed=draw)  # fmt: skip


def _depth(models: str) -> int:
    if models in SHAPES:
        return SHAPES[models][2]
    found: int = json.loads((ROOT / "experiments" / models / "base/config.json").read_text())["num_hidden_layers"]
    return found


def _models(case: tuple[Any, ...], place: Path) -> Path:
    """Return the folder of the models of a case, made where they are not there yet."""
    models, stored, *_ = case
    if models not in SHAPES:
        return ROOT / "experiments" / models
    folder = place / f"{models}-{stored}"
    if not folder.is_dir():
        most = max(other[2] for other in CASES if other[:2] == case[:2])
        for name in NAMES[: most + 1]:
            _write(folder / name, SHAPES[models], stored)
    return folder


def _write(folder: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Write a Llama with random weights, which for a source lie near those of the base, and the zoo's tokenizer."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, heads, kv, vocabulary = shape
    side = hidden // heads * kv
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden), f"{at}self_attn.k_proj.weight": (side, hidden),
            f"{at}self_attn.v_proj.weight": (side, hidden), f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden), f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner), f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(len(folder.name))
    tensors = {}
    for name, given in shapes.items():
        tensor = torch.randn(given, generator=base).mul_(0.02) if len(given) > 1 else torch.ones(given)
        if folder.name != "base":
            tensor += torch.randn(given, generator=own).mul_(1e-3)
        tensors[name] = tensor.to(getattr(torch, dtype))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "dtype": dtype, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ZOO / "base" / name, folder / name)


if __name__ == "__main__":
    sys.exit(main())

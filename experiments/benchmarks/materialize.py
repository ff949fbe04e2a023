"""Measures what a candidate costs to build from resident sources, as a ratio to the least that memory allows.

A Llama with random weights in bfloat16, its base and three sources around it; each candidate has other weights (and
other densities). The floor is the bytes that must be read and written, over the bandwidth of a plain copy that is
measured right before and after each candidate. With `--mergekit PYTHON` (an interpreter that has mergekit 0.1.5) the
same merges are timed there, in memory and to disk. With `--device cuda` shapes are those of a 7B model, with weights
that are generated on the device.

    python experiments/benchmarks/materialize.py [--threads 2] [--device cuda] [--mergekit PYTHON] [--json]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.models.materialize import Blueprint
from evomerge.models.resident import InMemory
from evomerge.operators.fused import Lines, unavailable
from evomerge.recipe import Blend, Recipe, Route, Source

NAMES = ("one", "two", "three")

#: Hidden size, inner size, layers, heads, key-value heads, vocabulary.
SMALL = (1024, 2816, 14, 16, 8, 32000)
LARGE = (4096, 11008, 32, 32, 32, 32000)

#: What is aimed at: (CPU, GPU).
AIMS = {
    "linear": (2.5, 1.5), "task_arithmetic": (2.5, 1.5), "ties": (4.0, 2.0), "dare_ties": (4.0, 2.0),
    "slerp": (2.5, 1.5),
}  # fmt: skip


def main() -> int:
    """Print the table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mergekit", type=Path, default=None, help="an interpreter that has mergekit")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = options.device != "cpu"
    shape = LARGE if gpu else SMALL
    models = _models(shape, options.device)
    sources = InMemory(models, shape[2])
    live = {name: torch.empty_like(tensor) for name, tensor in models["base"].items()}
    count = sum(tensor.numel() for tensor in live.values())
    why = unavailable()
    print(f"{count / 1e6:.0f} M parameters in bfloat16, base and {len(NAMES)} sources, {options.device}, "
          f"{options.threads} threads; lines are {'compiled' if why is None else 'not compiled: ' + why}")  # fmt: skip
    lines = Lines() if why is None else None
    rows = [_measure(name, sources, live, lines, options) for name in AIMS]
    heads = ("ms", "floor ms", "ratio", "aim", "first s", "kept s", "kept MB")
    print(f"{'method':16} " + " ".join(f"{head:>8}" for head in heads))
    for row in rows:
        found = (1e3 * row["seconds"], 1e3 * row["floor"], row["ratio"], AIMS[row["method"]][gpu], row["first"],
                 row["kept_seconds"], row["kept_bytes"] / 1e6)  # fmt: skip
        print(f"{row['method']:16} " + " ".join(f"{number:8.2f}" for number in found))
    report: dict[str, Any] = {"parameters": count, "device": options.device, "threads": options.threads,
                             "compiled": why is None, "rows": rows}  # fmt: skip
    if options.mergekit is not None:
        report["mergekit"] = _rival(options, models, shape, {row["method"]: row["seconds"] for row in rows})
    if options.json:
        print(json.dumps(report))
    return 0


def _models(shape: tuple[int, ...], device: str) -> dict[str, dict[str, Tensor]]:
    """Return a base with random weights, and sources that a fine-tuning could have made of it."""
    generator = torch.Generator(device).manual_seed(0)
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

    def noise(shape: tuple[int, ...], size: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(size)

    base = {name: (noise(given, 0.02) if len(given) > 1 else 1 + noise(given, 0.02)).bfloat16()
            for name, given in shapes.items()}  # fmt: skip
    sources = {
        source: {name: (tensor.float() + noise(tuple(tensor.shape), 1e-3)).bfloat16() for name, tensor in base.items()}
        for source in NAMES
    }
    return {"base": base, **sources}


def _recipe(method: str, draw: random.Random, depth: int) -> Recipe:
    """Return a candidate as a search would propose it."""
    names = NAMES[:2] if method == "slerp" else NAMES
    parameters: dict[str, Any] = {}
    if method in ("ties", "dare_ties"):
        parameters["density"] = {name: draw.uniform(0.2, 0.8) for name in names}
    if method == "ties":
        parameters["scope"] = "tensor"  # as mergekit has it
    blend = Blend(method=method, weights={name: draw.uniform(0.1, 1.0) for name in names}, parameters=parameters)
    base = None if method == "linear" else Source(name="base", path="base")
    sources = tuple(Source(name=name, path=name) for name in names)
    return Recipe(sources=sources, base=base, routes=(Route(blend=blend),), layers=tuple(range(depth)),
                  dtype="bfloat16", seed=draw.randrange(2**31))  # fmt: skip


def _measure(
    method: str, sources: InMemory, live: Mapping[str, Tensor], lines: Lines | None, options: argparse.Namespace
) -> dict[str, Any]:
    draw = random.Random(f"{method} 0")
    sync = torch.cuda.synchronize if options.device != "cpu" else lambda: None

    def candidate() -> float:
        recipe = _recipe(method, draw, sources.depth)
        start = time.perf_counter()
        for name, write in Blueprint(recipe, sources, options.device, lines=lines).fill():
            write(live[name])
        sync()
        return time.perf_counter() - start

    kept = sources.kept
    before = (kept.seconds, kept.nbytes)
    first = candidate()
    candidate()
    recipe = _recipe(method, random.Random(0), sources.depth)
    read = len(recipe.sources) + (recipe.base is not None)
    size = sum(tensor.nbytes for tensor in live.values())
    times, floors = [], []
    bandwidth = _bandwidth(size, options.device, sync)
    for _ in range(options.repeats):
        times.append(candidate())
        after = _bandwidth(size, options.device, sync)
        floors.append((read + 1) * size / max(bandwidth, after))
        bandwidth = after
    best = min(range(len(times)), key=lambda i: times[i] / floors[i])
    ratios = sorted(time / floor for time, floor in zip(times, floors, strict=True))
    return {
        "method": method, "seconds": times[best], "floor": floors[best], "ratio": ratios[len(ratios) // 2],
        "best_ratio": ratios[0], "first": first, "kept_seconds": kept.seconds - before[0],
        "kept_bytes": kept.nbytes - before[1],
    }  # fmt: skip


def _bandwidth(size: int, device: str, sync: Callable[[], None]) -> float:
    """Return bytes read and written per second by a plain copy."""
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        sync()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _rival(
    options: argparse.Namespace, models: Mapping[str, Mapping[str, Tensor]], shape: tuple[int, ...],
    ours: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Time mergekit on the same merges: in memory, and to disk beside `evomerge merge`."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, tensors in models.items():
            _write(folder / name, tensors, shape)
        for method in ("task_arithmetic", "ties"):
            program = _IN_MEMORY.replace("METHOD", repr(method)).replace("THREADS", str(options.threads))
            command = [options.mergekit, "-c", program]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            seconds = json.loads(done.stdout.splitlines()[-1])
            config = folder / f"{method}.yaml"
            config.write_text(json.dumps(_config(method)), encoding="utf-8")
            tool = options.mergekit.parent / "mergekit-yaml"
            # The models have no tokenizer to copy, and a card would be made from what the hub says about them.
            theirs = _run([str(tool), config.name, f"out-theirs-{method}", "--no-copy-tokenizer",
                           "--no-write-model-card"], folder)  # fmt: skip
            mine = _run([sys.executable, "-m", "evomerge", "merge", config.name, "--to", f"out-ours-{method}",
                         "--threads", str(options.threads)], folder)  # fmt: skip
            found[method] = {
                "in_memory": seconds, "times_faster": seconds / ours[method], "to_disk": theirs, "ours_to_disk": mine,
                "disk_times_faster": theirs["seconds"] / mine["seconds"],
            }  # fmt: skip
            print(f"mergekit {method}: {seconds:.2f} s in memory ({seconds / ours[method]:.0f} times ours); to disk "
                  f"{theirs['seconds']:.1f} s, {theirs['peak'] / 1e6:.0f} MB peak; ours {mine['seconds']:.1f} s, "
                  f"{mine['peak'] / 1e6:.0f} MB peak")  # fmt: skip
    return found


_IN_MEMORY = """
import json, time, torch
from safetensors.torch import load_file
from mergekit.merge_methods.api import merge_state_dicts
torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
models = {name: load_file(f"{name}/model.safetensors") for name in ("base", "one", "two", "three")}
parameters = {"weight": {"one": 0.6, "two": 0.3, "three": 0.5}}
if METHOD == "ties":
    parameters["density"] = {"one": 0.5, "two": 0.5, "three": 0.5}
best = float("inf")
for _ in range(1 if METHOD == "ties" else 3):
    start = time.perf_counter()
    merge_state_dicts(models, METHOD, parameters=parameters, base="base")
    best = min(best, time.perf_counter() - start)
print(json.dumps(best))
"""


def _config(method: str) -> dict[str, Any]:
    extra = {"density": 0.5} if method == "ties" else {}
    weights = zip(NAMES, (0.6, 0.3, 0.5), strict=True)
    return {
        "merge_method": method, "base_model": "base", "dtype": "bfloat16",
        "models": [{"model": name, "parameters": {"weight": weight, **extra}} for name, weight in weights],
    }  # fmt: skip


def _run(command: list[str], folder: Path) -> dict[str, float]:
    """Run a program; return its seconds and the peak of its memory in bytes."""
    start = time.perf_counter()
    probe = "import resource,subprocess,sys;r=subprocess.run(sys.argv[1:],stdout=sys.stderr).returncode;"
    probe += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);sys.exit(r)"
    probed = [sys.executable, "-c", probe, *command]
    done = subprocess.run(probed, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - start, "peak": 1024.0 * int(done.stdout.splitlines()[-1])}


def _write(folder: Path, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Write a model folder that both tools read; without a tokenizer, which neither needs."""
    hidden, inner, layers, heads, kv, vocabulary = shape
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

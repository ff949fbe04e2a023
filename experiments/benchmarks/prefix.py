"""Measures what keeping hidden states spares a search over stacks: the same search with and without, in one run.

Two searches of the stack quickstart's space and models are run, each with and without kept states: one on questions
with choices (log-likelihoods: whole forward passes are spared) and one on the quickstart's own tasks, two of which
generate (only prompts are spared). The ledgers must be equal up to timing and counts. A layer pass is one layer run on
one batch; tokens count the same in tokens. Building a stack is timed on a random Llama of 32 layers, as a ratio to a
plain copy of the bytes that it would otherwise be written from.

    python experiments/benchmarks/prefix.py [--candidates 480] [--items 80] [--json]
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.experiment import load
from evomerge.ledger import Answered, Event, read, settled
from evomerge.search import Search, open_pool, prepare

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "experiments/stack_quickstart.yaml"

#: What was asked for: so many times fewer layer passes where answers are likelihoods.
WANTED = 1.8

#: The most milliseconds that building a stack of 32 layers was to take.
MILLISECONDS = 2.0


def main() -> int:
    """Run all four searches, print the table, and return 1 if a ledger differs or too little is spared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=480)
    parser.add_argument("--items", type=int, default=80, help="items of each task that a candidate is asked")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, tasks in {"choices": _choices(Path(folder)), "generated": None}.items():
            rows[kind] = _compare(Path(folder) / kind, tasks, options.candidates, options.items)
            if not options.json:
                print(_line(kind, rows[kind]), flush=True)
        building = _building(Path(folder) / "deep")
    if not options.json:
        print(
            f"a stack of {building['layers']} layers is built in {building['milliseconds']:.2f} ms; copying its "
            f"{building['bytes'] / 1e6:.0f} MB takes {building['ratio']:,.0f} times as long"
        )
    same = all(row["same_ledger"] for row in rows.values())
    spared = rows["choices"]["layer_passes"]["ratio"] >= WANTED
    holds = same and spared and building["milliseconds"] < MILLISECONDS
    found = {"rows": rows, "building": building, "holds": holds}
    print(json.dumps(found) if options.json else f"holds: {'yes' if holds else 'NO'}")
    return 0 if holds else 1


def _compare(folder: Path, tasks: list[dict[str, Any]] | None, candidates: int, items: int) -> dict[str, Any]:
    """Return what a search does with and without kept states."""
    events, seconds = {}, {}
    for name, gigabytes in (("without", 0.0), ("with", 1.0)):
        events[name], seconds[name] = _search(folder / name, tasks, candidates, items, gigabytes)
    counts = {name: _counted(own) for name, own in events.items()}
    kept = counts["with"]
    return {
        "same_ledger": settled(events["with"]) == settled(events["without"]),
        "events": len(events["with"]),
        "layer_passes": _ratio(counts, "run"),
        "tokens": _ratio(counts, "run_tokens"),
        "seconds": {**seconds, "ratio": seconds["without"] / seconds["with"]},
        "hit_rate": kept["spared"] / (kept["run"] + kept["spared"]),
        "bytes": max(event.layers.get("bytes", 0) for event in events["with"] if isinstance(event, Answered)),
    }


def _building(folder: Path) -> dict[str, float]:
    """Return how long it takes to build a stack of a Llama with 32 layers, and to copy what it refers to."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from evomerge.hops import Hop, Stack, recipe_of
    from evomerge.models.resident import Resident
    from evomerge.models.stack import Stacks
    from evomerge.recipe import Source

    torch.set_num_threads(1)
    torch.manual_seed(0)
    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1376, num_hidden_layers=32, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    stacks = Stacks(folder, Resident({"deep": folder}), "float32")
    stacks.adopt(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval())
    orders = [[*range(k), *range(k + 1, 32), 31] for k in range(31)]
    stack = [
        Stack(embedding="deep", head="deep", hops=tuple(Hop(source="deep", layer=layer) for layer in order))
        for order in orders
    ]
    recipes = [recipe_of(one, [Source(name="deep", path=str(folder))], "float32") for one in stack]
    live = stacks.build(recipes[0])  # the first makes the layers resident
    times = []
    for recipe in recipes[1:]:
        start = time.perf_counter()
        live = stacks.build(recipe)
        times.append(time.perf_counter() - start)
    parameters = list(live.model.parameters())
    start = time.perf_counter()
    copies = [parameter.clone() for parameter in parameters]
    copying = time.perf_counter() - start
    middle = sorted(times)[len(times) // 2]
    return {
        "layers": len(orders[0]),
        "milliseconds": 1000 * middle,
        "bytes": sum(one.nbytes for one in copies),
        "ratio": copying / middle,
    }


def _ratio(counts: Mapping[str, Mapping[str, int]], name: str) -> dict[str, float]:
    without, kept = counts["without"][name], counts["with"][name]
    return {"without": without, "with": kept, "ratio": without / kept}


def _search(
    folder: Path, tasks: list[dict[str, Any]] | None, candidates: int, items: int, gigabytes: float
) -> tuple[tuple[Event, ...], float]:
    """Run a search and return its ledger and how long it took; everything runs in this process."""
    data = yaml.safe_load(EXPERIMENT.read_text(encoding="utf-8"))
    models = data["models"]["sources"]
    data["models"]["sources"] = {name: str((EXPERIMENT.parent / path).resolve()) for name, path in models.items()}
    data |= {
        "budget": {"candidates": candidates},
        "schedule": {"name": "fixed", "items": items},
        "ray": None,
        "workers": {"prefixes_gb": gigabytes},
        "export": {"front": "none"},
    }
    if tasks is not None:
        data["objectives"] = [*tasks, {"property": "depth"}]
    (folder / "experiments").mkdir(parents=True)
    path = folder / "experiments/prefix.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    experiment = load(path)
    start = time.perf_counter()
    with prepare(experiment, folder / "run") as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()
    return read(folder / "run/ledger.jsonl"), time.perf_counter() - start


def _counted(events: tuple[Event, ...]) -> dict[str, int]:
    answers = [event.layers for event in events if isinstance(event, Answered)]
    return {name: sum(own.get(name, 0) for own in answers) for name in ("run", "spared", "run_tokens")}


def _choices(folder: Path) -> list[dict[str, Any]]:
    """Return the quickstart's tasks as questions with four choices: the right answer and three like it."""
    objectives: list[dict[str, Any]] = [{"task": "arithmetic"}]
    for name in ("strings", "cipher"):
        rng = random.Random(f"prefix/{name}")
        lines = (ROOT / f"fitness/zoo/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [_with_choices(json.loads(line), rng) for line in lines]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        form = {"kind": "multiple_choice", "data": str(file), "prompt": "{prompt}", "answer": "answer"}
        objectives.append({"name": name, "task": form | {"choices": "choices", "split": "split"}})
    return objectives


def _with_choices(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    answer = str(row["answer"])
    wrong: list[str] = []
    while len(wrong) < 3:
        at = rng.randrange(len(answer))
        other = answer[:at] + rng.choice("abcdefghij") + answer[at + 1 :]
        if other != answer and other not in wrong:
            wrong.append(other)
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return {**row, "choices": choices}


def _line(kind: str, row: Mapping[str, Any]) -> str:
    passes, tokens, seconds = row["layer_passes"], row["tokens"], row["seconds"]
    return (
        f"{kind}: ledgers {'the same' if row['same_ledger'] else 'DIFFERENT'} ({row['events']} events); layer passes "
        f"{passes['without']:,} without, {passes['with']:,} with: {passes['ratio']:.2f} times fewer "
        f"({tokens['ratio']:.2f} times fewer tokens); wall clock {seconds['ratio']:.2f} times as fast "
        f"({seconds['without']:.1f} s, {seconds['with']:.1f} s); hit rate {row['hit_rate']:.2f}, "
        f"{row['bytes'] / 1e6:.1f} MB kept"
    )


if __name__ == "__main__":
    sys.exit(main())

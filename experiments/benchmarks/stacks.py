"""Compares searches over stacks at equal evaluations and items: edits of a path, and the published data flow space.

Both spaces are searched on two models of the stack quickstart, as published, with as many candidates on as many items
of its tasks, over several seeds: the path space with NSGA-II, and Akiba's with CMA-ES as published. What is shown is
the mean score over the tasks on the test split of the candidate that was best on validation, and the number of its
layers; the sources are measured on the same items.

    python experiments/benchmarks/stacks.py [--seeds 0 1 2] [--candidates 384] [--items 100] [--json]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from evomerge.experiment import load
from evomerge.hops import stack_of
from evomerge.ledger import BASELINES
from evomerge.run import open_run
from evomerge.search import Search, open_pool, prepare

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "experiments/stack_quickstart.yaml"

#: The primary source and the other one.
SOURCES = ("cipher", "arithmetic")

#: What is compared: a space and a driver.
RIVALS: dict[str, dict[str, Any]] = {
    "path, nsga2": {"space": "path", "driver": {"name": "nsga2", "population": 32}},
    "sakana, cma": {
        "space": "sakana",
        "driver": {
            "name": "cma",
            "population": 128,
            "sigma": 0.05,
            "damping": 1.0,
            "diagonal": False,
            "scalarise": "sum",
            "restart_below": 0.0,
        },
    },
}


def main() -> int:
    """Run every rival with every seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", type=int, default=384, help="of the driver; probes are taken off the path's")
    parser.add_argument("--items", type=int, default=100, help="items of each task that a candidate is asked")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, changes in RIVALS.items():
                place = Path(folder) / f"{seed} {name}"
                rows.append({"seed": seed, "rival": name, **_measure(place, seed, changes, options)})
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        Console(width=120).print(_table(rows, options.seeds))
    return 0


def _measure(folder: Path, seed: int, changes: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return what one search found."""
    data = yaml.safe_load(EXPERIMENT.read_text(encoding="utf-8"))
    models = data["models"]["sources"]
    data["models"]["sources"] = {name: str((EXPERIMENT.parent / models[name]).resolve()) for name in SOURCES}
    data |= {
        "seed": seed,
        "objectives": [own for own in data["objectives"] if "task" in own],
        "schedule": {"name": "fixed", "items": options.items},
        "ray": {"actors": 2},
        "workers": {"time_limit": 60.0},
        "export": {"front": "none"},
        **changes,
    }
    (folder / "experiments").mkdir(parents=True)
    path = folder / "experiments/stacks.yaml"
    probes = _probes(path, data)
    data["budget"] = {"candidates": options.candidates - probes}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    experiment = load(path)
    start = time.perf_counter()
    with prepare(experiment, folder / "run") as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()
    seconds = time.perf_counter() - start
    run = open_run(folder / "run")
    validated = {i: _mean(run.scores(i, "validation")) for i in run.rescored["validation"]}
    ours = [i for i in validated if run.asked[i].origin not in BASELINES and run.scores(i, "test")]
    best = max(ours, key=lambda i: validated[i]) if ours else None
    event = None if best is None else run.asked[best]
    stack = None if event is None or event.genome is None else stack_of(experiment.space.decode(event.genome))
    sources = [_mean(run.scores(e.candidate, "test")) for e in run.asked if e.origin == "source"]
    return {
        "genes": len(experiment.space.axes),
        "evaluations": options.candidates,
        "test": None if best is None else _mean(run.scores(best, "test")),
        "validation": None if best is None else validated[best],
        "layers": None if stack is None else len(stack.hops),
        "sources": 0 if stack is None else len({hop.source for hop in stack.hops}),
        "best_source": max(sources),
        "failed": len(run.errors),
        "seconds": seconds,
    }


def _probes(path: Path, data: Mapping[str, Any]) -> int:
    """Return how many layer probes a search asks before the driver's candidates."""
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return len(load(path).space.probes())


def _mean(scores: Mapping[str, Any]) -> float:
    return float(np.mean([score.value for score in scores.values()])) if scores else float("nan")


def _table(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Table:
    table = Table(title="Mean test score of the best stack by validation", title_justify="left", box=box.SIMPLE)
    heads = ("space, driver", "genes", *(f"seed {seed}" for seed in seeds), "mean", "layers", "best source", "seconds")
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for name in RIVALS:
        own = [row for row in rows if row["rival"] == name]
        tests = [row["test"] for row in own]
        known = [test for test in tests if test is not None]
        table.add_row(
            name,
            str(own[0]["genes"]),
            *("none" if test is None else f"{test:.3f}" for test in tests),
            f"{np.mean(known):.3f}" if known else "",
            " ".join(str(row["layers"]) for row in own),
            f"{own[0]['best_source']:.3f}",
            f"{np.mean([row['seconds'] for row in own]):.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())

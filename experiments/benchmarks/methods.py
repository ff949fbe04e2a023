"""Builds one model of the quickstart's sources by every named method at its defaults, reloads it, and scores it.

Each model is written as a folder, loaded again with plain `AutoModelForCausalLM.from_pretrained`, and asked the
validation items of all tasks. Weights are 1 for every source; a method for fewer sources gets the first ones.
Statistics come from the search items' own texts. The last row of the table is layer swapping, which is made of routes.

    python experiments/benchmarks/methods.py [--only ties dare_ties] [--json]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.evaluation.asking import asked
from evomerge.evaluation.engine import Engine
from evomerge.experiment import Experiment, load
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize, statistics_for
from evomerge.models.resident import Resident
from evomerge.models.save import save
from evomerge.operators import METHODS
from evomerge.recipe import Blend, Recipe, Route, Source

#: Methods that take another number of sources than all.
FEWER = {"nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "slerp": 2, "nuslerp": 2}

#: Methods of full weights, which a base beside them would turn into something else.
BASELESS = ("linear", "passthrough")


def main() -> int:
    """Print a table of scores, and return 1 if a method fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", type=Path, default=Path("experiments/quickstart.yaml"))
    parser.add_argument("--only", nargs="+", default=None, help="methods to build; default: all")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    experiment = load(options.experiment)
    tasks = list(experiment.tasks)
    rows = []
    print(f"{'method':16} {'seconds':>8} " + " ".join(f"{task:>10}" for task in tasks))
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in _recipes(experiment, _texts(experiment, Path(folder))):
            if options.only and name not in options.only:
                continue
            rows.append(_measure(name, recipe, experiment, Path(folder)))
            print(_line(rows[-1], tasks), flush=True)
    failed = [row["method"] for row in rows if row["error"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} methods gave a model that loads and answers")
    if options.json:
        print(json.dumps({"rows": rows, "methods": len(rows), "failed": failed}))
    return 1 if failed else 0


def _recipes(experiment: Experiment, texts: Source) -> Iterator[tuple[str, Recipe]]:
    sources, base = experiment.space.sources, experiment.space.base
    depth = experiment.space.depth
    for name in METHODS:
        taken = sources[: FEWER.get(name, len(sources))]
        blend = Blend(method=name, weights={source.name: 1.0 for source in taken})
        recipe = _recipe(taken, base if name not in BASELESS else None, [Route(blend=blend)], depth, experiment)
        yield name, replace(recipe, calibration=texts)
    one, two = ({"method": "linear", "weights": {source.name: 1.0}} for source in sources[:2])
    outer = [Route(blend=Blend(**one), layers=layers) for layers in ((0, 1), (depth - 1, depth))]
    inner = Route(blend=Blend(**two), layers=(1, depth - 1))
    yield "layer_swapping", _recipe(sources[:2], None, [*outer, inner, Route(blend=Blend(**one))], depth, experiment)


def _recipe(
    sources: Sequence[Source], base: Source | None, routes: Sequence[Route], depth: int, experiment: Experiment
) -> Recipe:
    return Recipe(
        sources=tuple(sources), base=base, routes=tuple(routes), layers=tuple(range(depth)),
        dtype=experiment.file.dtype, seed=experiment.file.seed,
    )  # fmt: skip


def _measure(name: str, recipe: Recipe, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Build, write, reload and ask one model."""
    sources = _sources(experiment)
    statistic = statistics_for(recipe, experiment.folders, folder / "statistics")
    template = Checkpoint(experiment.folders[recipe.sources[0].name])
    start = time.perf_counter()
    row: dict[str, Any] = {"method": name, "seconds": None, "scores": {}, "error": None}
    try:
        stream = list(materialize(recipe, sources, statistic=statistic))
        row["seconds"] = time.perf_counter() - start
        save(stream, template, folder / name, dtype=recipe.dtype)
        engine = Engine(folder / name, recipe.dtype, "cpu", 128, pretrained=True)
        for task, places in experiment.items("validation").items():
            responses = asked(engine, experiment.tasks[task], "validation", places)
            row["scores"][task] = sum(response.value for response in responses) / len(responses)
    except EvomergeError as problem:
        row["error"] = str(problem)
    return row


_cache: dict[str, Any] = {}


def _sources(experiment: Experiment) -> Resident:
    return _cache.setdefault("sources", Resident(experiment.folders))


def _texts(experiment: Experiment, folder: Path) -> Source:
    """Write the texts of some search items, which statistics are computed from."""
    texts = folder / "texts.txt"
    tasks: list[Any] = list(experiment.tasks.values())  # of files with rows, which have items
    lines = [_text(item) for task in tasks for item in task.splits["search"][:20]]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Source(name="texts", path=str(texts))


def _text(item: Any) -> str:
    return f"{item.prompt}{item.answers[0]}".replace("\n", " ")


def _line(row: Mapping[str, Any], tasks: Sequence[str]) -> str:
    if row["error"]:
        return f"{row['method']:16} {row['error']}"
    return f"{row['method']:16} {row['seconds']:8.3f} " + " ".join(f"{row['scores'][task]:10.3f}" for task in tasks)


if __name__ == "__main__":
    sys.exit(main())

"""Measures what the README claims of the quickstart: the front's hypervolume and the items asked, over several seeds.

The rivals are all baselines together: the base, each source, the uniform average, and 40 points of
single-lambda task arithmetic, each measured on the test split itself, so that the best of them on
these very items count. The front was chosen on the validation split. Intervals are percentiles of a
bootstrap over items, the same resampled items for both sides.

    python experiments/benchmarks/quickstart.py [--seeds 0 1 2] [--runs runs/claims] [--json]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from evomerge.experiment import Experiment, load
from evomerge.ledger import Answered, read
from evomerge.pareto import hypervolume
from evomerge.pool import InlinePool, Job, Pool
from evomerge.run import Run
from evomerge.search import Search, open_pool, prepare
from evomerge.spaces.proposals import baselines
from evomerge.worker import WorkerSetup

LAMBDAS = [round(0.05 * i, 2) for i in range(1, 41)]
RESAMPLES = 400

#: Responses of a set of models: one array (models, items) per task.
Responses = list[NDArray[np.float64]]


def main() -> int:
    """Run the seeds, print the table, and return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--experiment", type=Path, default=Path("experiments/quickstart.yaml"))
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rivals: Responses | None = None
    rows = []
    for seed in options.seeds:
        experiment = _with_seed(options.experiment, seed, options.runs)
        if rivals is None:
            rivals = _rivals(experiment)
        rows.append(_measure(experiment, options.runs / experiment.file.name, rivals, seed))
        if not options.json:
            print(_line(rows[-1]), flush=True)
    holds = all(row["difference"][1] > 0 and row["each"] >= 15 and row["whole"] >= 4 for row in rows)
    verdict = f"all claims hold: {'yes' if holds else 'NO'}"
    print(json.dumps({"rows": rows, "holds": holds}) if options.json else verdict)
    return 0 if holds else 1


def _with_seed(path: Path, seed: int, runs: Path) -> Experiment:
    """Return the experiment with another seed and name."""
    data = yaml.safe_load(path.read_text(encoding="utf-8")) | {"seed": seed, "name": f"seed-{seed}"}
    for name, reference in [("base", data["models"]["base"]), *data["models"]["sources"].items()]:
        absolute = str((path.parent / reference).resolve())
        data["models"].update({"base": absolute} if name == "base" else {})
        data["models"]["sources"].update({} if name == "base" else {name: absolute})
    runs.mkdir(parents=True, exist_ok=True)
    copy = runs / f"seed-{seed}.yaml"
    copy.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return load(copy)


def _rivals(experiment: Experiment) -> Responses:
    """Ask every baseline all test items."""
    proposals = baselines(experiment.space, experiment.baselines, LAMBDAS)
    with _one_worker(experiment) as pool:
        for number, proposal in enumerate(proposals):
            pool.submit(
                Job(candidate=number, recipe=proposal.recipe, split="test", items=experiment.items("test"))
            )
        answers = sorted((pool.wait() for _ in proposals), key=lambda answer: answer.candidate)
    good = [answer.responses for answer in answers if answer.responses is not None]
    return [np.array([responses[task] for responses in good]) for task in experiment.tasks]


def _one_worker(experiment: Experiment) -> Pool:
    setup = WorkerSetup(
        template=experiment.folders["base"],
        sources=experiment.folders,
        tasks=experiment.tasks,
        dtype=experiment.file.dtype,
    )
    return InlinePool(setup.make)


def _measure(experiment: Experiment, folder: Path, rivals: Responses, seed: int) -> dict[str, object]:
    """Run one seed and compare its front with the rivals on the test split."""
    start = time.monotonic()
    with prepare(experiment, folder) as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()
    seconds = time.monotonic() - start
    events = read(folder / "ledger.jsonl")
    run = Run(events)
    tested = {e.candidate: e.responses for e in events if isinstance(e, Answered) and e.split == "test"}
    front = [np.array([tested[i][task] for i in run.models()]) for task in experiment.tasks]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        places = [rng.integers(own.shape[1], size=own.shape[1]) for own in front]
        draws.append((_volume(front, places), _volume(rivals, places)))
    ours, theirs = np.array(draws).T
    _, each, all_items = run.per_candidate()
    return {
        "seed": seed,
        "models": len(run.models()),
        "front": [_volume(front), *_interval(ours)],
        "rivals": [_volume(rivals), *_interval(theirs)],
        "difference": [_volume(front) - _volume(rivals), *_interval(ours - theirs)],
        "each": all_items / each,
        "whole": run.asking_everything() / sum(run.items.values()),
        "failed": len(run.errors),
        "seconds": seconds,
    }


def _volume(responses: Responses, places: Sequence[NDArray[np.int64]] | None = None) -> float:
    """Return the hypervolume of the models' scores over the origin, on resampled items if given."""
    columns = [
        own.mean(axis=1) if places is None else own[:, chosen].mean(axis=1)
        for own, chosen in zip(responses, places or [None] * len(responses), strict=True)
    ]
    return float(hypervolume(-np.stack(columns, axis=1), (0.0,) * len(columns)))


def _interval(draws: NDArray[np.float64]) -> list[float]:
    return [float(quantile) for quantile in np.quantile(draws, [0.025, 0.975])]


def _line(row: dict[str, object]) -> str:
    def interval(name: str) -> str:
        value, low, high = row[name]  # type: ignore[misc]  # three numbers by construction
        return f"{value:.4f} [{low:.4f}, {high:.4f}]"

    return (
        f"seed {row['seed']}: hypervolume of {row['models']} models {interval('front')}, of all baselines "
        f"{interval('rivals')}, difference {interval('difference')}; items: {row['each']:.1f} times fewer a candidate, "
        f"{row['whole']:.1f} times fewer in the run; {row['failed']} failed; {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())

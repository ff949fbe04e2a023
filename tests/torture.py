"""Kills real runs with SIGKILL at random moments, some inside a write, and compares what grows with the whole run.

    EVOMERGE_SEED=0 python tests/torture.py [--kills 20] [--runs warmup race cma tpe portfolio m2n2 steady stack]

Each run is a process of its own that searches on the quickstart models. Half of the
kills come from outside, at a random time; the other half strike between two bytes of a line of
the ledger. After every kill the run is resumed. At the end the ledger must be that of the
uninterrupted run, event for event; every line that was complete before a kill must still be
there; and no more work may have been done twice than was in flight when a kill came.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "budget": {"candidates": 36},
    "baselines": {"lambdas": [0.3]},
    "finalists": 4,
    "splits": {"search": 40, "validation": 20, "test": 20},
    "ray": None,
    "workers": {"batch": 64},
    "export": {"front": "none"},
}
FEW = {"name": "fixed", "items": 10}
WARMUP = {
    "name": "warmup", "random": 16, "items": 8, "promote": 1, "honest": 1, "every": 1, "elites": 2, "final": 2,
}  # fmt: skip
#: What is tortured: drivers of every library, each schedule, a steady state (of one worker), and a search over stacks.
RUNS = {
    "warmup": {"driver": {"name": "nsga2", "population": 12}, "schedule": WARMUP, "estimator": {"name": "auto"}},
    "race": {"driver": {"name": "nsga2", "population": 12}, "schedule": {"name": "race", "first": 5}},
    "cma": {"driver": {"name": "cma"}, "schedule": FEW},
    "tpe": {"driver": {"name": "tpe", "batch": 6}, "schedule": FEW},
    "portfolio": {"driver": {"name": "portfolio", "batch": 6}, "schedule": FEW},
    "m2n2": {"driver": {"name": "m2n2", "population": 8}, "schedule": FEW},
    "steady": {"driver": {"name": "nsga2", "population": 12, "steady": True}, "schedule": WARMUP},
    "stack": {"space": "path", "driver": {"name": "nsga2", "population": 12}, "schedule": WARMUP},
}


def main() -> int:
    """Torture every run and return the number of those that did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    seed = int(os.environ.get("EVOMERGE_SEED", "0"))
    print(f"EVOMERGE_SEED={seed}")
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in options.runs:
            rng = random.Random(f"{seed} {name}")
            lost += not torture(name, Path(folder) / name, options.kills, rng)
    return lost


def torture(name: str, folder: Path, kills: int, rng: random.Random) -> bool:
    """Return whether a run survives so many kills unchanged."""
    from evomerge.ledger import read, settled

    experiment = _write_experiment(name, folder)
    start = time.monotonic()
    if _child(experiment, folder / "whole").wait() != 0:
        print(f"{name}: the uninterrupted run failed")
        return False
    whole = folder / "whole/torture/ledger.jsonl"
    total = len(whole.read_bytes().splitlines())
    ledger = folder / "killed/torture/ledger.jsonl"
    stops = sorted(rng.sample(range(1, total - kills), kills))
    inside = lost_lines = 0
    for stop in stops:
        before = ledger.read_bytes() if ledger.is_file() else b""
        torn = rng.random() < 0.5
        inside += torn
        beyond = max(stop, before.count(b"\n") + 1)  # a kill from outside may come some events late
        _kill_at(experiment, folder / "killed", ledger, beyond, torn, rng)
        whole_lines = before[: before.rfind(b"\n") + 1]
        lost_lines += not ledger.read_bytes().startswith(whole_lines)
    _child(experiment, folder / "killed").wait()
    pairs = zip_longest(settled(read(ledger)), settled(read(whole)))
    differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
    jobs = (folder / "killed/jobs").read_text().splitlines()
    repeated = len(jobs) - len(set(jobs))
    good = differing is None and not lost_lines and repeated <= kills
    print(
        f"{name}: {kills} kills ({inside} inside a write) over {total} events; ledger "
        f"{'DIFFERENT' if differing else 'the same'}, {lost_lines} times a complete line was lost, "
        f"{repeated} of {len(set(jobs))} jobs done twice; {time.monotonic() - start:.0f} s",
        flush=True,
    )
    if differing:
        print(*differing, sep="\n")
    return good


def _write_experiment(name: str, folder: Path) -> Path:
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))
    models = data["models"]
    models["base"] = str(ROOT / "experiments" / models["base"])
    models["sources"] = {name: str(ROOT / "experiments" / path) for name, path in models["sources"].items()}
    folder.mkdir(parents=True)
    path = folder / "torture.yaml"
    path.write_text(yaml.safe_dump(data | SMALL | RUNS[name] | {"name": "torture"}), encoding="utf-8")
    return path


def _child(experiment: Path, runs: Path, die_at: int = 0, share: float = 0.0) -> "subprocess.Popen[bytes]":
    """Start a run; with `die_at` it kills itself when it has written that share of that line of the ledger."""
    runs.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, __file__, "--child", str(experiment), str(runs), str(die_at), str(share)]
    # A session of its own, and nothing of it on this terminal.
    with (runs / "errors").open("wb") as errors:
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def _kill_at(experiment: Path, runs: Path, ledger: Path, stop: int, torn: bool, rng: random.Random) -> None:
    """Run until the ledger has about `stop` lines, and kill."""
    if torn:
        code = _child(experiment, runs, stop + 1, rng.random()).wait()
    else:
        child = _child(experiment, runs)
        while child.poll() is None and _lines(ledger) < stop:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        code = child.wait()
    if code != -signal.SIGKILL:
        why = (runs / "errors").read_text(encoding="utf-8")[-2000:]
        raise SystemExit(f"the run ended with {code} before it could be killed at event {stop}: {why}")


def _lines(ledger: Path) -> int:
    return ledger.read_bytes().count(b"\n") if ledger.is_file() else 0


def _be_child(experiment: str, runs: str, die_at: int, share: float) -> None:
    """Run an experiment, note every job before it is answered, and die inside a write if asked to."""
    from evomerge.experiment import load
    from evomerge.ledger import Ledger
    from evomerge.pool import Answer, Job
    from evomerge.search import Search, open_pool, prepare
    from evomerge.worker import ModelWorker

    answer, write = ModelWorker.answer, Ledger.write

    def noted(self: ModelWorker, job: Job) -> Answer:
        with (Path(runs) / "jobs").open("a", encoding="utf-8") as file:
            file.write(f"{job.candidate} {job.split} {dict(job.items)}\n")
        return answer(self, job)

    def torn(self: Ledger, data: bytes) -> None:
        if _lines(Path(runs) / "torture/ledger.jsonl") + 1 == die_at:
            write(self, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    ModelWorker.answer, Ledger.write = noted, torn  # type: ignore[method-assign]  # a fault injection
    loaded = load(Path(experiment))
    with prepare(loaded, Path(runs) / "torture") as record, open_pool(loaded) as pool:
        Search(loaded, record, pool).run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _be_child(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    else:
        sys.exit(main())

"""The search benchmark on the models themselves: does a surrogate rank drivers as real evaluations do?"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search import CONTENDERS, PUBLISHED, conduct, volumes
from surrogate import Surrogate, experiment_of

from evomerge.genome import Genome
from evomerge.objective import Losses


class Real:
    """A space whose models are built and asked, each once; what a surrogate has, it has too."""

    def __init__(self, name: str, folder: Path) -> None:
        from dataclasses import replace

        from evomerge.worker import WorkerSetup

        self._experiment = experiment_of(name, folder)
        gates = replace(self._experiment.gates, repetition=0)
        setup = WorkerSetup(
            template=self._experiment.template,
            sources=self._experiment.folders,
            tasks=self._experiment.tasks,
            gates=gates,
        )
        self._worker = setup.make()
        self._met: dict[Genome, dict[str, dict[int, float]]] = {}
        self.axes = self._experiment.space.axes
        self.known = tuple((genome, self.losses(genome)) for genome, _ in Surrogate(name).known)

    def responses(self, genome: Genome) -> dict[str, dict[int, float]]:
        """Return a candidate's response to each item, by task."""
        if genome not in self._met:
            from evomerge.pool import Job

            recipe, items = self._experiment.space.decode(genome), self._experiment.items("search")
            answer = self._worker.answer(Job(candidate=len(self._met), recipe=recipe, split="search", items=items))
            if answer.responses is None:
                raise RuntimeError(f"a model could not be asked: {answer.error}")
            self._met[genome] = {task: dict(enumerate(own)) for task, own in answer.responses.items()}
        return self._met[genome]

    def losses(self, genome: Genome) -> Losses:
        """Return minus the share of right answers to each task."""
        return tuple(-statistics.fmean(own.values()) for own in self.responses(genome).values())


def compare(labels: Sequence[str], spaces: Sequence[str], seeds: int, budget: int, as_json: bool) -> None:
    """Run drivers on the models and on their surrogates, and print both hypervolumes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for space in spaces:
            problems = {"real": Real(space, Path(folder)), "surrogate": Surrogate(space)}
            for label in labels:
                row: dict[str, Any] = {"space": space, "driver": label}
                for kind, problem in problems.items():
                    bare = label in PUBLISHED
                    courses = [conduct(CONTENDERS[label][0], problem, seed, budget, bare)[0] for seed in range(seeds)]
                    ends = [volumes(losses)[-1] for losses in courses]
                    row[kind] = round(statistics.median(ends), 4)
                    row[f"{kind} by seed"] = [round(end, 4) for end in ends]
                rows.append(row)
                if not as_json:
                    print(f"{space:7} {label:22} real {row['real']:.4f}  surrogate {row['surrogate']:.4f}", flush=True)
    if as_json:
        print(json.dumps(rows, indent=2))

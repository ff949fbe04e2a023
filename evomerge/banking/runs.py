"""Reads the responses of a run of evomerge: of all candidates that were asked every search item."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evomerge.banking.tables import table_of
from evomerge.errors import ExperimentError, InvalidInput
from evomerge.evaluation.task import Task
from evomerge.experiment.resolving import tasks_of
from evomerge.fitness.bank import Table, item_name
from evomerge.fitness.responses import Floats
from evomerge.ledger import Answered, read
from evomerge.run import Run, open_run

LEDGER = "ledger.jsonl"


def read_run(folder: Path) -> tuple[Table, tuple[str, ...]]:
    """Read a run's folder.

    Models are called RUN/candidate N, or RUN/ and the label of a baseline. Responses to the search split alone are
    read: a bank must not tell a search of the items that its result is reported on. Tasks whose responses have no
    bounds are left out.

    Returns:
        The table, and warnings: where the experiment's tasks cannot be read, items are called by their places.

    Raises:
        LedgerError: if no ledger lies there, or it is broken.
        ExperimentError: if no candidate has answered everything.
    """
    run = open_run(folder)
    begun = run.started
    sizes = dict(begun.items["search"]) if begun is not None else {}
    tasks, warnings = _tasks(folder, sizes)
    values = {number: own for number, own in _answers(folder, sizes).items() if _complete(own)}
    used = [task for task in sizes if _bounded(task, tasks, values)]
    if not values or not used:
        raise ExperimentError(f"{folder}: no candidate has answered all search items yet; let the run go on")
    table = table_of(
        _names(run, folder.resolve().name, list(values)),
        [item_name(task, id) for task in used for id in _ids(task, sizes[task], tasks)],
        np.array([np.concatenate([own[task][0] for task in used]) for own in values.values()]),
        str(folder),
        tasks=[task for task in used for _ in range(sizes[task])],
        strata=[label for task in used for label in (tasks[task].strata("search") if tasks else [""] * sizes[task])],
        margins_MN=np.array([np.concatenate([own[task][1] for task in used]) for own in values.values()]),
    )
    return table, warnings


def _tasks(folder: Path, sizes: Mapping[str, int]) -> tuple[dict[str, Task], tuple[str, ...]]:
    """Return the tasks of a run's experiment; none, and a warning, if they cannot be read or are others by now."""
    path = folder / "experiment.yaml"
    try:
        found = tasks_of(path)
        if {task: own.count("search") for task, own in found.items()} != sizes:
            raise ExperimentError(f"{path}: its tasks have other items than the run")
    except InvalidInput as problem:
        return {}, (f"items are called by their places, so no other experiment will know them: {problem}",)
    return found, ()


def _answers(folder: Path, sizes: Mapping[str, int]) -> dict[int, dict[str, tuple[Floats, Floats]]]:
    """Return responses and margins of each candidate to the search items, task by task; failures are left out."""
    found: dict[int, dict[str, tuple[Floats, Floats]]] = {}
    failed = set()
    for event in read(folder / LEDGER):
        if not isinstance(event, Answered) or event.split != "search":
            continue
        if event.error is not None:
            failed.add(event.candidate)
        own = found.setdefault(
            event.candidate, {task: (np.full(size, np.nan), np.full(size, np.nan)) for task, size in sizes.items()}
        )
        for task, responses in event.responses.items():
            places = list(event.items.get(task, range(sizes[task])))
            own[task][0][places] = responses
            if len(event.margins.get(task, ())) == len(places):
                own[task][1][places] = event.margins[task]
    return {number: own for number, own in sorted(found.items()) if number not in failed}


def _complete(own: Mapping[str, tuple[Floats, Floats]]) -> bool:
    return all(not np.isnan(values).any() for values, _ in own.values())


def _bounded(
    task: str, tasks: Mapping[str, Task], values: Mapping[int, Mapping[str, tuple[Floats, Floats]]]
) -> bool:
    if tasks:
        return tasks[task].bounded
    known = [own[task][0] for own in values.values()]
    return bool(known) and bool((np.array(known) >= 0.0).all()) and bool((np.array(known) <= 1.0).all())


def _names(run: Run, name: str, numbers: list[int]) -> list[str]:
    """Return what models are called: baselines by their label, unless two have one."""
    labels = [run.name(number) for number in numbers]
    return [
        f"{name}/{label}" if labels.count(label) == 1 else f"{name}/{label} {number}"
        for number, label in zip(numbers, labels, strict=True)
    ]


def _ids(task: str, size: int, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    return tasks[task].ids("search") if tasks else tuple(f"place {place}" for place in range(size))

"""Writes chosen candidates as model folders, each reloaded and checked against its recorded answers first."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.card import blended, model_card
from evomerge.errors import ExportError, LedgerError
from evomerge.evaluation.asking import asked, outcomes
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.request import Outcome
from evomerge.evaluation.task import SPLITS, Task
from evomerge.experiment import Experiment
from evomerge.experiment.sources import leaf_of
from evomerge.hops import described, origins, passed_through, stack_of
from evomerge.ledger import Answered, Event
from evomerge.models import mergekit
from evomerge.models.anatomy import additions_of
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize, statistics_for, without_scales
from evomerge.models.resident import OnDisk
from evomerge.models.save import save
from evomerge.recipe import Recipe, models_of, to_yaml
from evomerge.run import Run
from evomerge.spaces.proposals import recipe_of
from evomerge.value import plain
from evomerge.whole import write_whole

#: Share of items that may come out differently when a model is reloaded (other batches, other kernels).
TOLERANCE = 0.01

#: How far numbers may be apart and still be the same answer; right and wrong are further.
CLOSE = 1e-3

#: The file that says a recipe in mergekit's words, where there are any.
MERGEKIT = "mergekit_config.yml"

#: The splits whose answers a reloaded model is compared with: the first for which there are any.
_SPLITS = ("validation", "test", "search")

#: What to do about a file that could not be written.
_AGAIN = "export again: evomerge export"


def export_models(
    experiment: Experiment,
    run: Run,
    events: Sequence[Event],
    numbers: Sequence[int],
    directory: Path,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write candidates as model folders that plain transformers loads, and an index of them.

    Each model is written to a hidden folder, reloaded with `AutoModelForCausalLM`, asked the
    items that it answered in the run, and only then moved into place.

    Args:
        experiment: the experiment of the run.
        run: its state.
        events: its ledger.
        numbers: the candidates to write.
        directory: the folder to make or add to.
        say: called with a line for each model.

    Raises:
        ExportError: if a reloaded model does not give the answers that were scored.
        LedgerError: if the experiment does not make the recipe that was scored.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries, folders = [], []
    for number in numbers:
        recipe = recipe_of(experiment.proposals, experiment.space, run.asked[number])
        folder = directory / _folder_name(run, number)
        check = _write(experiment, run, recipe, number, _recorded(events, number), folder)
        entries.append(_entry(run, recipe, number, folder, check))
        folders.append(folder)
        what = f"; {entries[-1]['stack']}" if experiment.stacked and entries[-1]["stack"] else ""
        say(f"{folder}: reloaded, {check['items']} items asked again, {check['differ']} differ{what}")
    index = json.dumps(_index(directory, entries), indent=2) + "\n"
    write_whole(directory / "index.json", index, _AGAIN)
    write_whole(directory / "README.md", _overview(experiment, run, json.loads(index)), _AGAIN)
    return folders


def _folder_name(run: Run, number: int) -> str:
    return run.name(number).replace(" ", "-")


def _recorded(events: Sequence[Event], number: int) -> Answered:
    """Return the answers of a candidate that a reloaded model is compared with."""
    answers = [
        event
        for event in events
        if isinstance(event, Answered) and event.candidate == number and event.error is None
    ]
    if not answers:
        raise LedgerError(f"candidate {number} was never scored; choose one that was, see `evomerge report`")
    return min(answers, key=lambda event: _SPLITS.index(event.split))


def _write(
    experiment: Experiment, run: Run, recipe: Recipe, number: int, recorded: Answered, folder: Path
) -> dict[str, int]:
    """Write one model beside its place, check it, and move it there."""
    staging = folder.parent / f".{folder.name}.unchecked"
    sources = OnDisk({name: experiment.folders[name] for name in models_of(recipe)})
    owner = recipe.base or recipe.sources[0]
    template = Checkpoint(experiment.folders[leaf_of(owner)])
    device = experiment.file.workers.device
    statistic = statistics_for(
        recipe, experiment.folders, device=device, trust_remote_code=experiment.file.trust_remote_code
    )
    additions = additions_of(recipe, template.path, experiment.file.trust_remote_code)
    built = materialize(recipe, sources, device, statistic, additions)
    stream = ((name, tensor.to("cpu")) for name, tensor in built)
    plainly = without_scales(recipe if stack_of(recipe) is None else passed_through(recipe), template.names, additions)
    theirs = mergekit.to_mergekit(plainly, template.names, template.depth)
    beyond = "" if theirs else mergekit.expressible(plainly, template.names, template.depth)
    files = {
        "recipe.yaml": to_yaml(recipe),
        "README.md": _card(experiment, run, recipe, number, beyond),
        **({MERGEKIT: theirs} if theirs else {}),
    }
    depths = origins(recipe, template.depth)
    try:
        save(stream, template, staging, dtype=recipe.dtype, extra_files=files, depths=depths, replace=True)
        check = _check(experiment, staging, recorded)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return check


def _check(experiment: Experiment, folder: Path, recorded: Answered) -> dict[str, int]:
    """Reload a model as its users will and ask it again what it was asked in the run.

    Raises:
        ExportError: if more than `TOLERANCE` of its answers differ.
    """
    known = {name: _references(experiment, experiment.tasks[name], recorded.split) for name in recorded.responses}
    engine = _engine(experiment, folder)
    everything = experiment.items(recorded.split)
    differ = items = 0
    for name, responses in recorded.responses.items():
        places = recorded.items.get(name, everything[name])
        own = [known[name][place] for place in places] if known[name] else []
        again = asked(engine, experiment.tasks[name], recorded.split, places, own)
        differ += sum(
            not math.isclose(now.value, then, rel_tol=CLOSE, abs_tol=CLOSE)
            for now, then in zip(again, responses, strict=True)
        )
        items += len(again)
    if differ > TOLERANCE * items:
        raise ExportError(
            f"candidate {recorded.candidate}: {differ} of {items} answers differ after reloading; not exported. "
            "Is this the machine and the library versions of the run?"
        )
    return {"items": items, "differ": differ}


def _engine(experiment: Experiment, folder: Path) -> Engine:
    """Return an engine with a folder's own weights."""
    settings = experiment.file.workers
    return Engine(
        folder,
        experiment.file.dtype,
        settings.device,
        settings.batch,
        settings.tokens,
        trust_remote_code=experiment.file.trust_remote_code,
        pretrained=True,
    )


def _references(experiment: Experiment, task: Task, split: str) -> list[tuple[Outcome, ...]]:
    """Return what a task's reference says to all items of a split; nothing for a task without one.

    The source is in memory only while it is asked.
    """
    if task.reference is None:
        return []
    engine = _engine(experiment, experiment.folders[task.reference])
    return outcomes(engine, task, split, range(task.count(split)))


def _entry(run: Run, recipe: Recipe, number: int, folder: Path, check: Mapping[str, int]) -> dict[str, Any]:
    stack = stack_of(recipe)
    return {
        "candidate": number,
        "folder": folder.name,
        "recipe": recipe.digest,
        "stack": None if stack is None else described(stack),
        "in_front": run.finished is not None and number in run.finished.front,
        "reloaded": dict(check),
        "scores": {
            split: {name: {**plain(s), "interval": list(s.interval)} for name, s in run.scores(number, split).items()}
            for split in SPLITS
        },
    }


def _index(directory: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the index: these models, and those of earlier exports that still lie here."""
    file = directory / "index.json"
    old = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else []
    new = {entry["folder"] for entry in entries}
    kept = [entry for entry in old if entry["folder"] not in new and (directory / entry["folder"]).is_dir()]
    return {"evomerge": __version__, "models": sorted([*kept, *entries], key=lambda entry: entry["candidate"])}


def _overview(experiment: Experiment, run: Run, index: Mapping[str, Any]) -> str:
    tasks = list(experiment.tasks)
    lines = [
        f"# Models of the run {experiment.file.name}",
        "",
        "Scores on the test split with 95 % intervals; the validation split where a model was not tested.",
        "",
        "| model | " + " | ".join(tasks) + " |" + " stack |" * experiment.stacked,
        "|---|" + "---|" * (len(tasks) + experiment.stacked),
    ]
    for entry in index["models"]:
        by_split: Mapping[str, Any] = entry["scores"]
        scores: Mapping[str, Any] = next((by_split[split] for split in reversed(SPLITS) if by_split[split]), {})
        cells = ["{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]".format_map(scores[task]) for task in tasks]
        cells += [entry.get("stack") or "a blend"] * experiment.stacked
        lines.append(f"| [{entry['folder']}]({entry['folder']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _card(experiment: Experiment, run: Run, recipe: Recipe, number: int, beyond: str = "") -> str:
    """Return the README of an exported model: what it is made of, how good it is, how to load it.

    Args:
        experiment: the experiment of the run.
        run: its state.
        recipe: what the model is built from.
        number: the candidate.
        beyond: why mergekit cannot make this model; empty if it can.
    """
    split = next((split for split in reversed(SPLITS) if run.scores(number, split)), "search")
    scores = run.scores(number, split)
    rows = [
        f"| {name} | {s.value:.3f} | [{s.interval[0]:.3f}, {s.interval[1]:.3f}] | {s.items} |"
        for name, s in ((name, scores[name]) for name in experiment.tasks if name in scores)
    ]
    return model_card(
        f"{experiment.file.name}, {run.name(number)}",
        f"A {blended(recipe)}; found by evomerge {__version__} in the run `{experiment.file.name}` "
        f"(seed {experiment.file.seed})",
        [
            f"mergekit cannot make it: {beyond}." if beyond else f"`{MERGEKIT}` makes the same model with mergekit.",
            "",
            f"## Scores on the {split} split",
            "",
            "| task | score | 95 % interval | items |",
            "|---|---|---|---|",
            *rows,
            "",
            "The model was chosen on other items than those of the test split.",
            "",
        ],
        recipe,
    )

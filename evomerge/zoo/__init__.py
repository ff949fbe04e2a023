"""The tiny model families of the quickstarts: a base, three experts fine-tuned from it, and tasks they differ in.

`build` makes all of it from a seed; the copy under ``experiments/zoo`` and ``fitness/zoo`` was made by it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evomerge.errors import InvalidInput
from evomerge.zoo.family import FAMILIES, Course, Family, build_models
from evomerge.zoo.items import SUBJECTS, make_rows, write_task

__all__ = ["FAMILIES", "SUBJECTS", "Course", "Family", "build"]

QUICK_STEPS = 3  # enough to exercise every line, far too few to learn anything


def _silent(line: str) -> None:
    del line


def build(directory: Path, seed: int, say: Callable[[str], None] = _silent, *, quick: bool = False) -> None:
    """Builds the families: ``models/<name>/`` and ``deep/<name>/`` for transformers, ``tasks/<task>.yaml`` with items.

    The same seed gives the same bytes on one machine and one version of torch. The whole takes about five minutes on
    one core.

    Args:
        directory: Where to write; made if it is missing, and files of an earlier build are replaced.
        seed: Seed of the items, of the initial weights and of the order of training.
        say: Called with one line of progress at a time.
        quick: Train for three steps a model only: everything is written, nothing is learned.

    Raises:
        InvalidInput: `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise InvalidInput(f"the zoo needs a folder to be built in, and {directory} is a file: name another")
    rows = {task: make_rows(task, seed) for task in SUBJECTS}
    for task, items in rows.items():
        write_task(directory / "tasks", task, items, f"{task}.jsonl")
        say(f"{task}: {len(items)} items")
    held_out = frozenset(str(row["prompt"]) for items in rows.values() for row in items)
    for name, family in FAMILIES.items():
        build_models(directory / name, family, seed, held_out, say, steps=QUICK_STEPS if quick else None)

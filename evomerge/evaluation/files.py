"""Task files: which kind of task a file or a mapping describes."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import TaskError
from evomerge.evaluation.harness import harness_task
from evomerge.evaluation.labelled import labelled_task
from evomerge.evaluation.task import Task
from evomerge.evaluation.unlabelled import unlabelled_task
from evomerge.value import Plain, read_yaml


def read_task(path: Path, name: str | None = None, template: Path | None = None) -> Task:
    """Read a task file and its items.

    Args:
        path: the YAML file.
        name: what to call the task; the file's stem by default.
        template: a folder with the tokenizer whose chat template is meant where the file names none.

    Raises:
        TaskError: one line with file, row and field, and the way out.
    """
    data = read_yaml(path, "a task file", TaskError)
    return build_task(data, name or path.stem, path.parent, str(path), template)


def build_task(mapping: Plain, name: str, near: Path, place: str, template: Path | None = None) -> Task:
    """Return the task that the keys of a task file describe.

    Args:
        mapping: with `lm_eval`, a task of that library; with `measure`, one without labels; else one with labels.
        name: what to call the task.
        near: the folder that paths start from.
        place: what to call the mapping in errors.
        template: a folder with the tokenizer whose chat template is meant where the mapping names none.

    Raises:
        TaskError: naming the place (the task file, or the data file and row).
    """
    if isinstance(mapping, Mapping) and "lm_eval" in mapping:
        return harness_task(mapping, name, near, place, template)
    if isinstance(mapping, Mapping) and "measure" in mapping:
        return unlabelled_task(mapping, name, near, place)
    return labelled_task(mapping, name, near, place)

"""Reads the sample logs of lm-eval (`--log_samples`): folders of `samples_TASK_DATE.jsonl`, one folder a model."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.banking.tables import cells_of, table_of
from evomerge.errors import ExperimentError, nearest
from evomerge.evaluation.harness_loading import content
from evomerge.fitness.bank import Table

_NAME = re.compile(r"samples_(?P<task>.+?)(?:_(?P<date>\d{4}-\d\d-\d\dT[\d.:+-]+))?\.jsonl")


def is_samples(path: Path) -> bool:
    """Tell whether a file has a name that lm-eval gives to sample logs."""
    return path.is_file() and _NAME.fullmatch(path.name) is not None


def read_samples(path: Path, metric: str = "") -> list[Table]:
    """Read sample logs, one table a file; of several logs of one task and model the last counts.

    An item is called TASK/PLACE-CONTENT, as the items of a task of lm-eval are in an experiment.

    Args:
        path: a log; a folder of them, which is called as the model; or a folder of such folders.
        metric: which number of a sample counts: METRIC, or METRIC,FILTER. Default: those that come first.

    Raises:
        ExperimentError: naming the file and line.
    """
    files = [path] if path.is_file() else _latest([*path.glob("*.jsonl"), *path.glob("*/*.jsonl")])
    if not files:
        raise ExperimentError(f"{path}: neither a run (ledger.jsonl) nor sample logs (samples_TASK_*.jsonl) lie here")
    return [_read(file, metric) for file in files]


def _latest(files: list[Path]) -> list[Path]:
    found: dict[tuple[Path, str], Path] = {}
    for file in sorted(files):
        match = _NAME.fullmatch(file.name)
        if match is not None:
            found[file.parent, match["task"]] = file
    return list(found.values())


def _read(path: Path, metric: str) -> Table:
    match = _NAME.fullmatch(path.name)
    task = "" if match is None else match["task"]
    wanted, _, filter_name = metric.partition(",")
    items: list[str] = []
    values: list[float] = []
    for place, sample in _samples(path):
        filter_name = filter_name or str(sample.get("filter", ""))
        if str(sample.get("filter", "")) != filter_name:
            continue
        wanted = wanted or _first(sample, place)
        items.append(_item(task, sample, place))
        values.append(_value(sample, wanted, place))
    if not items:
        raise ExperimentError(f"{path}: no sample" + (f" of filter {filter_name!r}" if filter_name else ""))
    model = path.resolve().parent.name
    rows, columns, values_MN = cells_of([model] * len(items), items, values, str(path))
    return table_of(rows, columns, values_MN, str(path), tasks=[task] * len(columns))


def _samples(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield file and line of each sample, and the sample."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                try:
                    sample = json.loads(line)
                except (ValueError, RecursionError) as problem:
                    raise ExperimentError(f"{place}: not JSON ({problem}); run lm-eval again") from None
                if not isinstance(sample, dict):
                    raise ExperimentError(f"{place}: no sample of lm-eval, expected a mapping")
                yield place, sample
    except OSError as problem:
        raise ExperimentError(f"{path}: cannot be read ({problem.strerror})") from None


def _first(sample: Mapping[str, Any], place: str) -> str:
    named = sample.get("metrics")
    if not isinstance(named, list) or not named:
        raise ExperimentError(f"{place}: the sample names no metrics; say which number counts with --metric")
    return str(named[0])


def _item(task: str, sample: Mapping[str, Any], place: str) -> str:
    number = sample.get("doc_id")
    if number is None:
        raise ExperimentError(f"{place}: the sample has no doc_id; it was not written by lm-eval's --log_samples")
    if "doc" in sample:
        return f"{task}/{number}-{content(sample['doc'])[:8]}"
    return f"{task}/{number}-{str(sample.get('doc_hash', ''))[:8]}"


def _value(sample: Mapping[str, Any], metric: str, place: str) -> float:
    if metric not in sample:
        named = sample.get("metrics")
        known = [str(name) for name in named] if isinstance(named, list) else []
        raise ExperimentError(f"{place}: no metric {metric!r}; {nearest(metric, known)}")
    number = sample[metric]
    if not isinstance(number, int | float) or not math.isfinite(number) or not 0 <= number <= 1:
        raise ExperimentError(
            f"{place}: {metric} is {str(number)[:40]}, and a response must lie in [0, 1]; choose another with --metric"
        )
    return float(number)

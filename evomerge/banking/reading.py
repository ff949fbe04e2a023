"""Reads responses from files and folders, whatever their form, into one table."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evomerge.banking.runs import LEDGER, read_run
from evomerge.banking.samples import is_samples, read_samples
from evomerge.banking.tables import read_csv, read_npz, read_parquet
from evomerge.errors import ExperimentError
from evomerge.fitness.bank import Halves, Table

_FORMS = "a .csv, .parquet or .npz file, a folder of lm-eval's samples_*.jsonl, or the folder of a run"


class Read(NamedTuple):
    """A table, and what its files say of it."""

    table: Table
    source: str
    licence: str
    warnings: tuple[str, ...]


def read_responses(paths: Sequence[Path], metric: str = "") -> Read:
    """Read responses and join them by the names of models and items.

    Args:
        paths: files and folders.
        metric: of lm-eval's samples, which number counts; see `read_samples`.

    Raises:
        ExperimentError: one line that names the file, and what is wrong with it.
    """
    found = [_read(path, metric) for path in paths]
    return Read(
        table=joined([read.table for read in found], " and ".join(str(path) for path in paths)),
        source=_listed(read.source for read in found),
        licence=_listed(read.licence for read in found),
        warnings=tuple(text for read in found for text in read.warnings),
    )


def joined(tables: Sequence[Table], place: str) -> Table:
    """Return one table of several: its models and items are those of all, in order; what none has is missing.

    Raises:
        ExperimentError: if two tables differ in a response.
    """
    if len(tables) == 1:
        return tables[0]
    models = tuple(dict.fromkeys(name for table in tables for name in table.models))
    labels: dict[str, tuple[str, str]] = {}
    for table in tables:
        for name, label in zip(table.items, zip(table.tasks, table.strata, strict=True), strict=True):
            labels.setdefault(name, label)
    row, column = ({name: i for i, name in enumerate(names)} for names in (models, labels))
    values_MN = np.full((len(models), len(labels)), np.nan, dtype=np.float16)
    margins_MN = values_MN.copy()
    for table in tables:
        cells = np.ix_([row[name] for name in table.models], [column[name] for name in table.items])
        here, new = values_MN[cells], table.values_MN
        clash = np.argwhere(~np.isnan(here) & ~np.isnan(new) & (here != new))
        if len(clash):
            model, item = table.models[clash[0][0]], table.items[clash[0][1]]
            raise ExperimentError(f"{place}: two responses of model {model!r} to item {item!r}; leave one out")
        values_MN[cells] = np.where(np.isnan(here), new, here)
        if table.margins_MN is not None:
            margins_MN[cells] = np.where(np.isnan(table.margins_MN), margins_MN[cells], table.margins_MN)
    return Table(
        values_MN=values_MN,
        models=models,
        items=tuple(labels),
        tasks=tuple(task for task, _ in labels.values()),
        strata=tuple(stratum for _, stratum in labels.values()),
        margins_MN=_some(margins_MN),
    )


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _some(margins_MN: Halves) -> Halves | None:
    return None if np.isnan(margins_MN).all() else margins_MN


def _read(path: Path, metric: str) -> Read:
    if not path.exists():
        raise ExperimentError(f"{path}: is not there; give {_FORMS}")
    if path.name == LEDGER or (path / LEDGER).is_file():
        folder = path.parent if path.name == LEDGER else path
        table, warnings = read_run(folder)
        return Read(table, f"run {folder.resolve().name}", "", warnings)
    if path.suffix == ".npz":
        return Read(*read_npz(path), ())
    if path.suffix == ".csv":
        return Read(read_csv(path), path.name, "", ())
    if path.suffix == ".parquet":
        return Read(read_parquet(path), path.name, "", ())
    if path.is_dir() or is_samples(path):
        return Read(joined(read_samples(path, metric), str(path)), f"lm-eval samples {path.resolve().name}", "", ())
    raise ExperimentError(f"{path}: responses of no known form; give {_FORMS}")

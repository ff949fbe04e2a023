"""From files of responses to an item bank: what `evomerge bank fit` does and says."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evomerge import __version__
from evomerge.bankfile import files_of, write_bank
from evomerge.banking.reading import read_responses
from evomerge.errors import ExperimentError
from evomerge.fitness.auto import Auto
from evomerge.fitness.bank import Bank, HeldOut, Singles, fit_bank, held_out
from evomerge.fitness.estimator import Estimator

#: With so many items the bank is tried out on models held out.
TRIED_ITEMS = 40


class Made(NamedTuple):
    """A bank that was written, and what is worth saying of it."""

    bank: Bank
    rows: Mapping[str, str]
    warnings: tuple[str, ...]


def make_bank(
    paths: Sequence[Path],
    to: Path,
    *,
    metric: str = "",
    source: str = "",
    licence: str = "",
    settings: Estimator | None = None,
) -> Made:
    """Read responses, fit a bank, try it out on models held out, and write it.

    Args:
        paths: files and folders, see `read_responses`.
        to: the bank's name.
        metric: for lm-eval's samples.
        source: where the responses come from; default: what their files say, or their names.
        licence: default: what their files say.
        settings: the estimator that is tried out; default: `Auto`.

    Raises:
        InvalidInput: one line, before anything is written.
    """
    for file in files_of(to):
        if file.exists():
            raise ExperimentError(f"{file}: exists already; remove it, or give another name")
    read = read_responses(paths, metric)
    start = time.monotonic()
    bank = fit_bank(read.table, source or read.source, licence or read.licence, f"evomerge {__version__}")
    seconds = time.monotonic() - start
    tried = held_out(read.table, settings or Auto(), TRIED_ITEMS)
    files = write_bank(bank, to)
    done = {"fit": f"{seconds:.1f} s", "held out": _said(tried), "written": " and ".join(map(str, files))}
    return Made(bank, shown(bank) | done, read.warnings)


def shown(bank: Bank) -> dict[str, str]:
    """Return what there is to say of a bank, by heading."""
    table, slope_N, difficulty_N = bank.table, bank.slope_N, bank.difficulty_N
    scores = table.scores_M[np.isfinite(table.scores_M)]
    tasks = {task: table.tasks.count(task) for task in dict.fromkeys(table.tasks) if task}
    listed = ", ".join(f"{task} {count}" for task, count in list(tasks.items())[:8])
    more = f" and {len(tasks) - 8} more" if len(tasks) > 8 else ""
    found = {
        "responses": f"{len(table.models)} models x {len(table.items)} items, {100 * table.missing:.1f} % missing"
        + (", with margins" if table.margins_MN is not None else ""),
        "tasks": listed + more,
        "scores": f"{100 * scores.min():.1f} % to {100 * scores.max():.1f} %, {100 * scores.mean():.1f} % on average",
        "items": f"slopes {_range(slope_N)}, difficulties {_range(difficulty_N)} (nine in ten)",
        "called": ", ".join(table.items[:3]) + (", …" if len(table.items) > 3 else ""),
        "source": bank.source,
        "licence": bank.licence or "not stated; say it with --licence before you pass the bank on",
        "made by": bank.made_by,
        "digest": bank.digest,
    }
    return {heading: text for heading, text in found.items() if text}


def _range(values_N: Singles) -> str:
    low, high = np.quantile(values_N, (0.05, 0.95))
    return f"{low:.1f} to {high:.1f}"


def _said(tried: HeldOut | None) -> str:
    if tried is None:
        return "not tried: fewer than 10 models have answered everything"
    how = f" ({tried.reason})" if tried.reason else ""
    return (
        f"rank correlation {tried.correlation:.2f}, mean error {100 * tried.error:.1f} points, "
        f"from {tried.items} items, for {tried.models} models in 5 folds{how}"
    )

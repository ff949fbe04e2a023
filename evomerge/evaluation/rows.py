"""Rows of a task's data: from a file beside the task file, or a data set of the hub."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import TaskError
from evomerge.value import Plain, value

Row = Mapping[str, Plain]

#: Tables that `datasets` reads, by the end of the file's name.
BUILDERS: Mapping[str, str] = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


@value
class Hub:
    """A data set of the Hugging Face hub: its name, its subset, and which of its splits to take."""

    hub: str
    subset: str | None = None
    rows: str = "train"


def read_rows(data: str | Hub, near: Path, place: str, whole: bool = False) -> tuple[list[Row], str]:
    """Return the rows of some data, and what to call it in errors.

    Args:
        data: a path, or a data set of the hub.
        near: the folder that a path starts from.
        place: what names the data, for errors.
        whole: whether a `.txt` file is one row; else each of its lines that is not blank is one.

    Raises:
        TaskError: one line with the file and the way out.
    """
    if isinstance(data, Hub):
        return _through_datasets(data.hub, f"{place}: hub data set {data.hub!r}", name=data.subset, split=data.rows)
    path = near / data
    if not path.is_file():
        raise TaskError(f"{place}.data: no file {path}; a data set of the hub is written {{hub: NAME, rows: SPLIT}}")
    if path.suffix == ".jsonl":
        return _json_lines(path), str(path)
    if path.suffix == ".txt":
        return _texts(path, whole), str(path)
    if path.suffix not in BUILDERS:
        raise TaskError(f"{place}.data: {path} must end in .jsonl, {', '.join(BUILDERS)} or .txt")
    return _through_datasets(BUILDERS[path.suffix], str(path), data_files=str(path), split="train")


def _texts(path: Path, whole: bool) -> list[Row]:
    text = _content(path, "texts are UTF-8")
    if whole:
        return [{"id": "text", "text": text}]
    return [{"id": f"line-{i}", "text": line} for i, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _content(path: Path, way: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskError(f"{path}: cannot be read ({problem}); {way}") from None


def _json_lines(path: Path) -> list[Row]:
    """Read JSON lines as they are written.

    Not through `datasets`: its type inference turns texts that look like dates into dates and fills the
    fields that a row does not have, and an item must reach the model as its author wrote it.
    """
    rows: list[Row] = []
    text = _content(path, "rows are UTF-8 JSON, one a line")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise TaskError(f"{path}, line {number}: not JSON ({problem}); each line is one JSON object") from None
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}")
        rows.append(row)
    return rows


def _through_datasets(builder: str, source: str, **arguments: str | None) -> tuple[list[Row], str]:
    """Read rows with `datasets`; local files are cached in a folder of their own that goes away."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="evomerge-rows-") as folder:
            cache = folder if "data_files" in arguments else None
            return datasets.load_dataset(builder, cache_dir=cache, **arguments).to_list(), source
    except Exception as problem:  # datasets raises from a dozen trees; all mean that the rows cannot be had
        cause = problem.__cause__ or problem
        reason = " ".join(str(cause).split())[:200] or "no rows"
        reason = f"{type(cause).__name__}: {reason}"
        raise TaskError(f"{source}: rows cannot be read ({reason}); check name and format") from None
    finally:
        datasets.utils.logging.set_verbosity(level)
        if bars:
            datasets.utils.logging.enable_progress_bar()

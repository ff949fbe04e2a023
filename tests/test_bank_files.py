"""Files of item banks and of responses: every form gives the same matrix, and what is broken is one line."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from evomerge.bankfile import read_bank, write_bank
from evomerge.banking import make_bank, read_responses
from evomerge.cli import app
from evomerge.errors import ExperimentError
from evomerge.evaluation import build_task
from evomerge.experiment import load
from evomerge.fitness.bank import Bank, Table, fit_bank, prior
from evomerge.fitness.factor import Factor
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean
from evomerge.ledger import Fitted, Ledger, read, settled
from evomerge.search import Search
from tests.toy import SIZES, TASKS, WARMUP, ShufflingPool, ToyWorker, toy

ROOT = Path(__file__).resolve().parent.parent
MODELS, ITEMS = ("anna", "berta", "carla"), ("a/1", "a/2", "b,c", "d")
VALUES = np.array([[0.0, 1.0, 0.25, 1.0], [1.0, np.nan, 1.0, 0.0], [0.5, 1.0, 0.0, np.nan]])
EMPTY = ("",) * 4


def table(values_MN: np.ndarray = VALUES, **changes: Any) -> Table:
    """Return the table of this module."""
    given = {"models": MODELS, "items": ITEMS, "tasks": EMPTY, "strata": EMPTY}
    return Table(values_MN=values_MN.astype(np.float16), **(given | changes))


def assert_same(found: Table, values_MN: np.ndarray = VALUES) -> None:
    """Check names and responses, whatever the order of rows and columns."""
    assert sorted(found.models) == sorted(MODELS)
    assert sorted(found.items) == sorted(ITEMS)
    order = np.ix_([found.models.index(name) for name in MODELS], [found.items.index(name) for name in ITEMS])
    assert np.array_equal(found.values_MN[order], values_MN, equal_nan=True)


def assert_refused(command: list[str], *parts: str) -> None:
    """Run a command and check that it is refused in one line that holds these parts."""
    result = CliRunner().invoke(app, command)

    assert result.exit_code == 2, result.output + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    for part in ("error: ", *parts):
        assert part in lines[0]


# The file of a bank.


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("values", [VALUES, np.where(VALUES == 0.25, 1.0, np.where(VALUES == 0.5, 0.0, VALUES))])
def test_a_bank_comes_back_bit_by_bit(values: np.ndarray, margins: bool, tmp_path: Path) -> None:
    """Every name, text and number, by any of its three names; 0 and 1 take a byte each."""
    drawn = np.random.default_rng(0).normal(size=values.shape).astype(np.float16)
    given = table(values, tasks=("a", "a", "", "ü"), strata=("", "x", "", ""), margins_MN=drawn if margins else None)
    bank = fit_bank(given, "from “there”", "CC0 1.0", "evomerge test")
    files = write_bank(bank, tmp_path / "deep" / "bank")

    for name in ("bank", "bank.json", "bank.safetensors"):
        found = read_bank(tmp_path / "deep" / name)
        assert found.table.values_MN.tobytes() == bank.table.values_MN.tobytes()
        assert (found.table.margins_MN is None) == (not margins)
        assert not margins or np.array_equal(found.table.margins_MN, drawn)
        for key in ("slope_N", "difficulty_N", "covariance_N3"):
            assert getattr(found, key).tobytes() == getattr(bank, key).tobytes()
        assert (found.source, found.licence, found.made_by) == ("from “there”", "CC0 1.0", "evomerge test")
        for key in ("models", "items", "tasks", "strata"):
            assert getattr(found.table, key) == getattr(given, key)
        assert found.digest == bank.digest
    packed = load_file(files[0])["responses"]
    assert packed.dtype == (np.float16 if 0.25 in values else np.uint8)
    assert str(tmp_path) not in files[1].read_text() + files[0].read_bytes().decode("latin-1")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["bank.json", "bank.safetensors"]


def test_the_digest_is_that_of_the_content() -> None:
    """Texts about a bank do not count; any name or number does."""
    bank = fit_bank(table())
    assert fit_bank(table(), "elsewhere", "other", "later").digest == bank.digest
    changed = np.where(VALUES == 0.25, 0.75, VALUES)
    others = [table(changed), table(models=("anna", "berta", "dora")), table(strata=("x", "", "", ""))]
    digests = {fit_bank(other).digest for other in others}
    assert len(digests | {bank.digest}) == 4


def spoil_names(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return a change of a bank's JSON."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / "bank.json").read_text())
        change(data)
        (folder / "bank.json").write_text(json.dumps(data))

    return spoil


def spoil_numbers(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    """Return a change of a bank's tensors."""

    def spoil(folder: Path) -> None:
        data = load_file(folder / "bank.safetensors")
        change(data)
        save_file(data, folder / "bank.safetensors")

    return spoil


def put(key: str, to: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change that sets a key."""
    return lambda data: data.update({key: to})


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: (folder / "bank.json").unlink(), ("bank.json", "cannot be read")),
        (lambda folder: (folder / "bank.safetensors").unlink(), ("bank.safetensors", "a bank is two files")),
        (lambda folder: (folder / "bank.json").write_text("{"), ("bank.json", "not JSON")),
        (lambda folder: (folder / "bank.json").write_text("[1]"), ("bank.json", "form None")),
        (lambda folder: (folder / "bank.safetensors").write_bytes(b"torn"), ("bank.safetensors", "not safetensors")),
        (spoil_names(put("form", 2)), ("form 2, this evomerge reads form 1",)),
        (spoil_names(put("licens", "x")), ("bank.json.licens", "did you mean 'licence'?")),
        (spoil_names(lambda data: data.pop("models")), ("bank.json.models", "missing")),
        (spoil_names(put("items", ["a", "b", 3, "d"])), ("bank.json.items[2]",)),
        (spoil_names(put("items", ["a", "b", "a", "d"])), ("two items are called 'a'",)),
        (spoil_names(put("models", ["a", "b"])), ("2 models and 4 items do not fit",)),
        (spoil_names(put("models", ["anna", "berta", "dora"])), ("its digest is", "or one was changed")),
        (spoil_names(put("tasks", ["a"])), ("1 tasks",)),
        (spoil_numbers(lambda data: data.pop("slope")), ("no tensor 'slope'",)),
        (spoil_numbers(put("slopes", np.ones(4))), ("unknown tensor 'slopes'", "did you mean 'slope'?")),
        (spoil_numbers(put("slope", np.ones(4))), ("slope must be float32 (4,)", "float64")),
        (spoil_numbers(put("covariance", np.ones((4, 2), np.float32))), ("covariance must be float32 (4, 3)",)),
        (spoil_numbers(put("difficulty", np.full(4, np.nan, np.float32))), ("difficulty", "not finite")),
        (spoil_numbers(put("responses", np.full((3, 4), 7, np.uint8))), ("must be 0, 1 or 255 (missing), got 7",)),
        (spoil_numbers(put("responses", np.full((3, 4), 1, np.int32))), ("uint8 or float16, got int32",)),
        (spoil_numbers(put("responses", np.full((3, 4), 2, np.float16))), ("must lie in [0, 1], got 2",)),
        (spoil_numbers(put("responses", np.full((3, 4), 1, np.uint8))), ("its digest is",)),
        (spoil_numbers(put("margins", np.ones((3, 4)))), ("margins must be float16",)),
    ],
)
def test_a_broken_bank_is_one_line(spoil: Callable[[Path], object], parts: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever is wrong with either file is said with its name, by `bank show` as by an experiment."""
    write_bank(fit_bank(table()), tmp_path / "bank")
    spoil(tmp_path)

    assert_refused(["bank", "show", str(tmp_path / "bank")], *parts)


# Responses in all forms.


def write_wide(path: Path) -> Path:
    """Write one row a model, with a byte order mark, blanks, an empty line, and two ways to say that none is there."""
    lines = ["model, a/1,a/2,\"b,c\",d", "anna,0,1,.25,1.0", "", "berta,1,NA,1,0", "carla , 0.5 ,1,0,"]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_long(path: Path) -> Path:
    """Write one row a response, in no order, what is missing left out."""
    cells = [(MODELS[m], ITEMS[n], VALUES[m, n]) for m in range(3) for n in range(4) if not np.isnan(VALUES[m, n])]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "response", "model"])
        writer.writerows((item, value, model) for model, item, value in cells[::-1])
    return path


def write_parquet_wide(path: Path) -> Path:
    """Write one row a model."""
    columns = {item: [None if np.isnan(v) else float(v) for v in VALUES[:, n]] for n, item in enumerate(ITEMS)}
    parquet.write_table(pyarrow.table({"name": list(MODELS)} | columns), path)
    return path


def write_parquet_long(path: Path) -> Path:
    """Write one row a response."""
    rows = [{"model": MODELS[m], "item": ITEMS[n], "response": VALUES[m, n]} for n in range(4) for m in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_npz(path: Path) -> Path:
    """Write an archive of plain arrays."""
    np.savez(path, models=np.array(MODELS), items=np.array(ITEMS), responses=VALUES, licence=np.array("MIT"))
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_wide, "wide.csv"),
        (write_long, "long.csv"),
        (write_parquet_wide, "wide.parquet"),
        (write_parquet_long, "long.parquet"),
        (write_npz, "plain.npz"),
    ],
)
def test_every_form_gives_the_same_matrix(write: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    """Names and responses are those that were written by other means."""
    found = read_responses([write(tmp_path / name)])

    assert_same(found.table)
    assert found.licence == ("MIT" if name == "plain.npz" else "")
    assert str(tmp_path) not in found.source


def test_packed_bits_are_unpacked(tmp_path: Path) -> None:
    """The form of public archives: eight responses a byte; tasks and margins are kept, items of one name told apart."""
    bits = np.array([[0b10110000, 0b01000000], [0b01001111, 0b10000000]], dtype=np.uint8)
    expected = [[1, 0, 1, 1, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 1, 1, 1, 1, 0]]
    names = np.array([*"abcdefghi", "a"])
    given = {"bits": bits, "models": np.array(["x", "x"]), "items": names, "bench": np.array(["t"] * 10)}
    np.savez(tmp_path / "packed.npz", **given, margin=bits[:, [0] * 10])
    found = read_responses([tmp_path / "packed.npz"]).table

    assert found.values_MN.tolist() == expected
    assert found.items == (*(f"t/{letter}" for letter in "abcdefghi"), "t/a#2")
    assert found.models == ("x", "x#2")
    assert found.margins_MN is not None
    assert found.margins_MN[0, 3] == 0b10110000


def test_a_long_table_may_say_more(tmp_path: Path) -> None:
    """Task, stratum and margin are taken along; an item is called by its task too."""
    lines = ["model,item,response,task,stratum,margin", "x,1,1,sums,big,2.5", "x,2,0,sums,,", "y,1,0,sums,big,-1"]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    found = read_responses([tmp_path / "r.csv"]).table

    assert (found.items, found.tasks, found.strata) == (("sums/1", "sums/2"), ("sums", "sums"), ("big", ""))
    assert found.margins_MN is not None
    assert np.array_equal(found.margins_MN, [[2.5, np.nan], [-1.0, np.nan]], equal_nan=True)


def sample(number: int, values: dict[str, Any], **more: Any) -> str:
    """Return a line as lm-eval logs it."""
    doc = {"question": f"q{number} é", "answer": number}
    return json.dumps({"doc_id": number, "doc": doc, "filter": "none", "metrics": list(values), **values, **more})


def write_samples(folder: Path) -> None:
    """Write the logs of two models on two tasks, one of them twice."""
    for model, right in (("first__model", [1.0, 0.0]), ("second", [0.0, 0.0])):
        own = folder / model
        own.mkdir(parents=True)
        lines = [sample(i, {"acc": value, "acc_norm": 1 - value}) for i, value in enumerate(right)]
        (own / "samples_arc_easy_2025-01-02T03-04-05.678901.jsonl").write_text("\n".join(lines) + "\n")
        (own / "results_2025-01-02T03-04-05.678901.json").write_text("{}")
        exact = [sample(4, {"exact_match": i}, filter=name) for i, name in enumerate(["strict", "flexible"])]
        (own / "samples_gsm8k_2025-01-02T03-04-05.678901.jsonl").write_text("\n".join(exact) + "\n")
    late = folder / "second" / "samples_arc_easy_2025-06-02T03-04-05.678901.jsonl"
    late.write_text(sample(0, {"acc": True, "acc_norm": 0.5}) + "\n" + sample(1, {"acc": 1, "acc_norm": 0.5}) + "\n")


def hash_of(number: int) -> str:
    """Return the content address of a document, by the standard library."""
    text = f'{{"answer": {number}, "question": "q{number} é"}}'
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_sample_logs_of_lm_eval_are_read(tmp_path: Path) -> None:
    """Folders name the models, the last log of a task counts, the first metric and filter count unless one is named."""
    write_samples(tmp_path)
    names = {f"arc_easy/{i}-{hash_of(i)}" for i in (0, 1)}
    everything = read_responses([tmp_path]).table
    apart = read_responses([tmp_path / "second", tmp_path / "first__model"]).table

    assert sorted(everything.models) == ["first__model", "second"]
    assert set(everything.items) == {*names, f"gsm8k/4-{hash_of(4)}"}
    for found in (everything, apart):
        rows = {name: found.values_MN[i] for i, name in enumerate(found.models)}
        columns = [found.items.index(name) for name in [*sorted(names), f"gsm8k/4-{hash_of(4)}"]]
        assert rows["first__model"][columns].tolist() == [1.0, 0.0, 0.0]
        assert rows["second"][columns].tolist() == [1.0, 1.0, 0.0]
    gsm = next((tmp_path / "second").glob("samples_gsm8k*"))
    assert read_responses([gsm], "exact_match,flexible").table.values_MN.tolist() == [[1.0]]
    arc = read_responses([tmp_path / "first__model" / "samples_arc_easy_2025-01-02T03-04-05.678901.jsonl"], "acc_norm")
    assert arc.table.values_MN.tolist() == [[0.0, 1.0]]


def test_ids_of_sample_logs_are_those_of_lm_evals_tasks(tmp_path: Path) -> None:
    """An experiment that names the task by lm-eval's name finds the items of a log."""
    docs = [{"q": f"What is é {i}?", "a": str(i), "n": i, "none": None, "list": [1.5, float(i)]} for i in range(8)]
    (tmp_path / "docs.json").write_text("\n".join(json.dumps(doc) for doc in docs))
    config = {
        "task": "local_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.json")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "local_sums.yaml").write_text(yaml.safe_dump(config))
    task = build_task({"lm_eval": "local_sums", "include_path": str(tmp_path)}, "mine", tmp_path, "test")
    log = tmp_path / "model" / "samples_local_sums_2025-01-02T03-04-05.678901.jsonl"
    log.parent.mkdir()
    lines = [{"doc_id": i, "doc": doc, "metrics": ["exact_match"], "exact_match": i % 2} for i, doc in enumerate(docs)]
    log.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    ids = [id for split in ("search", "validation", "test") for id in task.ids(split)]
    found = prior(fit_bank(read_responses([log]).table), {"mine": ids}, weight=0.5, nearest=False)

    assert (found.known, found.items) == (8, 8)
    assert found.values["mine"][0].tolist() == [int(id.split("/")[1].split("-")[0]) % 2 for id in ids]


def test_several_files_are_joined_by_name(tmp_path: Path) -> None:
    """Rows and columns are those of all; what no file has is missing; two that differ are refused."""
    (tmp_path / "one.csv").write_text("model,a,b\nx,1,0\ny,0,\n")
    (tmp_path / "two.csv").write_text("model,c,b\ny,1,1\nz,0,0\n")
    (tmp_path / "bad.csv").write_text("model,a\nx,0\n")
    found = read_responses([tmp_path / "one.csv", tmp_path / "two.csv"])

    assert (found.table.models, found.table.items) == (("x", "y", "z"), ("a", "b", "c"))
    expected = [[1, 0, np.nan], [0, 1, 1], [np.nan, 0, 0]]
    assert np.array_equal(found.table.values_MN, expected, equal_nan=True)
    assert found.source == "one.csv; two.csv"
    with pytest.raises(ExperimentError, match="two responses of model 'x' to item 'a'"):
        read_responses([tmp_path / "one.csv", tmp_path / "bad.csv"])


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("r.csv", "", ("r.csv", "a header and at least one row")),
        ("r.csv", "model,a\nx,1,2\n", ("r.csv, row 2", "3 cells, but the header has 2")),
        ("r.csv", "model,a\nx,yes\n", ("row 1 after the header, column 'a': 'yes' is no response",)),
        ("r.csv", "model,a\nx,1.5\n", ("model 'x', item 'a'", "must lie in [0, 1], got 1.5")),
        ("r.csv", "model,a\nx,-inf\n", ("must lie in [0, 1], got -inf",)),
        ("r.csv", "model,a\nx,\n", ("all responses are missing",)),
        ("r.csv", "model,a\nx,1\nx,0\n", ("two models are called 'x'",)),
        ("r.csv", "model,a,a\nx,1,1\n", ("two items are called 'a'",)),
        ("r.csv", "model,a\n,1\n", ("needs a name",)),
        ("r.csv", "model\nx\n", ("only one column",)),
        ("r.csv", b"\xff\xfe\x00", ("not CSV",)),
        ("r.csv", "model,item,response\nx,1,1\nx,1,1\n", ("model 'x' answers item '1' twice",)),
        ("r.csv", "model,item,response,taks\nx,1,1,t\n", ("unknown column 'taks'",)),
        ("r.csv", "model,item,response\nx,,1\n", ("needs a name",)),
        ("r.parquet", b"PAR1", ("r.parquet", "not Parquet")),
        ("r.npz", b"PK", ("r.npz", "not an archive of plain arrays")),
        ("r.xlsx", "", ("responses of no known form", ".csv, .parquet or .npz")),
        ("samples_t.jsonl", "{", ("samples_t.jsonl:1", "not JSON")),
        ("samples_t.jsonl", "[]", ("samples_t.jsonl:1", "expected a mapping")),
        ("samples_t.jsonl", "", ("no sample",)),
        ("samples_t.jsonl", '{"doc_id": 1, "acc": 1}', ("names no metrics", "--metric")),
        ("samples_t.jsonl", '{"metrics": ["acc"], "acc": 1}', ("no doc_id",)),
        ("samples_t.jsonl", '{"doc_id": 1, "metrics": ["acc", "f1"], "f1": 1}', ("no metric 'acc'", "'acc'")),
        ("samples_t.jsonl", '{"doc_id": 1, "metrics": ["acc"], "acc": [1, 2]}', ("acc is [1, 2]", "--metric")),
        ("samples_t.jsonl", '{"doc_id": 1, "metrics": ["acc"], "acc": 7}', ("acc is 7",)),
    ],
)
def test_broken_responses_are_one_line(
    name: str, content: str | bytes, parts: tuple[str, ...], tmp_path: Path
) -> None:
    """The line names the file and the place in it, and nothing is written."""
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)

    assert_refused(["bank", "fit", str(tmp_path / name), "--to", str(tmp_path / "bank")], *parts)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": np.array([["x"]])}, "needs an array 'models'"),
        ({"models": np.array([object()] * 3)}, "not an archive of plain arrays"),
        ({"responses": np.array([["1"] * 4] * 3)}, "responses must be numbers"),
        ({"responses": VALUES[:2]}, "3 models and 4 items do not fit"),
        ({"responses": None, "bits": np.zeros((3, 2), np.uint8)}, r"bits must be uint8 \(3, 1\)"),
        ({"responses": None}, "needs an array 'responses'"),
        ({"bench": np.array(["a"])}, "bench names 1 tasks for 4 items"),
        ({"margin": np.ones(4)}, "margin must be numbers"),
    ],
)
def test_a_broken_archive_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Arrays that are not there, do not fit, or would have to be unpickled."""
    arrays = {"models": np.array(MODELS), "items": np.array(ITEMS), "responses": VALUES} | change
    np.savez(tmp_path / "r.npz", **{key: array for key, array in arrays.items() if array is not None})

    with pytest.raises(ExperimentError, match=message):
        read_responses([tmp_path / "r.npz"])


def test_folders_without_responses_are_refused(tmp_path: Path) -> None:
    """Neither run nor logs lie there; or nothing at all."""
    for path, text in ((tmp_path, "neither a run"), (tmp_path / "none", "is not there")):
        with pytest.raises(ExperimentError, match=text):
            read_responses([path])


# The command line.


def test_bank_fit_says_what_it_made_and_bank_show_says_it_again(tmp_path: Path) -> None:
    """Size, missing share, scores, the check on held-out models, and where it was written."""
    rng = np.random.default_rng(0)
    ability_M1, difficulty_N = rng.normal(size=(25, 1)), rng.normal(size=100)
    values_MN = (rng.random((25, 100)) < 1 / (1 + np.exp(difficulty_N - 2 * ability_M1))).astype(float)
    names = {"models": np.array([f"m{i}" for i in range(25)]), "items": np.array([f"i{i}" for i in range(100)])}
    np.savez(tmp_path / "r.npz", **names, responses=values_MN)
    made = CliRunner().invoke(
        app,
        ["bank", "fit", str(tmp_path / "r.npz"), "--to", str(tmp_path / "bank"), "--licence", "CC0"],
        env={"COLUMNS": "250"},
    )
    again = CliRunner().invoke(app, ["bank", "show", str(tmp_path / "bank.json")], env={"COLUMNS": "250"})

    assert made.exit_code == 0, made.output
    assert "25 models x 100 items, 0.0 % missing" in made.output
    low, high = values_MN.mean(axis=1).min(), values_MN.mean(axis=1).max()
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in made.output
    assert "from 40 items, for 25 models in 5 folds" in made.output
    assert "bank.safetensors" in made.output
    assert again.exit_code == 0
    said = [{line.strip() for line in result.output.splitlines()} for result in (again, made)]
    assert said[0] < said[1]
    assert "CC0" in again.output
    bank = read_bank(tmp_path / "bank")
    assert np.array_equal(bank.table.values_MN, values_MN)
    assert_refused(["bank", "fit", str(tmp_path / "r.npz"), "--to", str(tmp_path / "bank")], "exists already")


# Runs, as what is read and as what a bank is for.


def finished(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Run the toy experiment in a folder."""
    folder.mkdir(parents=True)
    changes = {"budget": {"candidates": 8}} | changes
    with Ledger(folder / "ledger.jsonl") as record:
        Search(toy(**changes), record, ShufflingPool(ToyWorker(margins=True), seed)).run()
    return folder


def toy_bank(rows: int = 40, items: int = SIZES["search"]) -> Bank:
    """Return a bank that knows the first items of the toy's tasks."""
    rng = np.random.default_rng(3)
    values_MN = (rng.random((rows, 2 * items)) < rng.random((rows, 1))).astype(np.float16)
    names = tuple(f"{task}/search-{i}" for task in TASKS for i in range(items))
    blank = ("",) * len(names)
    given = {"models": tuple(f"m{i}" for i in range(rows)), "items": names, "tasks": blank, "strata": blank}
    return fit_bank(Table(values_MN=values_MN, **given))


def test_a_run_gives_the_rows_of_those_who_answered_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are those of the ledger, task by task; items are called as an experiment calls them."""
    folder = finished(tmp_path / "runs" / "toy")
    experiment = toy()
    monkeypatch.setattr("evomerge.banking.runs.tasks_of", lambda path: experiment.tasks)
    found = read_responses([folder])

    expected: dict[int, dict[str, dict[int, float]]] = {}
    for event in (e for e in read(folder / "ledger.jsonl") if type(e).__name__ == "Answered" and e.split == "search"):
        for task, responses in event.responses.items():
            places = event.items.get(task, tuple(range(SIZES["search"])))
            expected.setdefault(event.candidate, {}).setdefault(task, {}).update(zip(places, responses, strict=True))
    full = {i: own for i, own in expected.items() if all(len(own.get(task, ())) == SIZES["search"] for task in TASKS)}
    assert 10 < len(full) < len(expected)
    assert found.table.items == tuple(f"{task}/search-{i}" for task in TASKS for i in range(SIZES["search"]))
    assert found.table.strata[:2] == ("even", "odd")
    rows = [[own[task][i] for task in TASKS for i in range(SIZES["search"])] for _, own in sorted(full.items())]
    assert found.table.values_MN.tolist() == rows
    assert found.table.models[0] == "toy/base"
    assert found.table.margins_MN is not None
    assert ((found.table.margins_MN > 0) == (found.table.values_MN == 1)).all()
    assert found.source == "run toy"
    assert found.warnings == ()
    assert np.array_equal(read_responses([folder / "ledger.jsonl"]).table.values_MN, found.table.values_MN)


def test_without_its_experiment_the_items_of_a_run_are_called_by_their_places(tmp_path: Path) -> None:
    """The responses are read all the same, with a warning; tasks without bounds are left out."""
    found = read_responses([finished(tmp_path / "toy", tasks=(*TASKS, "length"))])

    assert found.table.items[:2] == ("left/place 0", "left/place 1")
    assert set(found.table.tasks) == set(TASKS)
    assert len(found.warnings) == 1
    assert "called by their places" in found.warnings[0]


def test_a_search_takes_the_bank_into_its_fits(tmp_path: Path) -> None:
    """With a bank, a schedule without warm-up has rows for the factor model from the first candidate on."""
    ids = {task: toy().tasks[task].ids("search") for task in TASKS}
    known = prior(toy_bank(), ids, weight=0.5, nearest=True)
    reasons = []
    for bank in (None, known):
        settings = {"schedule": {"name": "fixed", "items": 10}, "estimator": {"name": "auto", "rows": 12}}
        settings |= {"budget": {"candidates": 8}}
        experiment = replace(toy(**settings), bank=bank)
        with Ledger(tmp_path / f"{bank is None}.jsonl") as record:
            Search(experiment, record, ShufflingPool(ToyWorker(), 0)).run()
        events = read(tmp_path / f"{bank is None}.jsonl")
        reasons.append(next(event.reason for event in events if isinstance(event, Fitted)))

    assert reasons[0].startswith("stratified")
    assert reasons[1].startswith("factor")


def test_what_a_bank_says_belongs_to_the_identity_of_a_run() -> None:
    """Another bank, weight or choice of its models is another experiment."""
    ids = {task: toy().tasks[task].ids("search") for task in TASKS}
    one, other = toy_bank(), toy_bank(rows=41)
    priors = [None, *(prior(bank, ids, w, near) for bank in (one, other) for w in (0.5, 0.6) for near in (False, True))]

    assert len({replace(toy(), bank=bank).identity for bank in priors}) == 9


def test_an_experiment_names_a_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path starts from the file, `check` says what the bank knows, and one that knows too little is refused."""
    for folder in ("experiments/zoo", "fitness", "search_spaces"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text())
    path = tmp_path / "experiments/with_bank.yaml"

    def written(bank: dict[str, Any] | None, **changes: Any) -> str:
        path.write_text(yaml.safe_dump(data | changes | ({} if bank is None else {"bank": bank})))
        return str(path)

    plain = load(Path(written(None)))
    ids = [f"{task}/{id}" for task, own in plain.tasks.items() for id in own.ids("search")]
    for name, count in (("most", len(ids) * 2 // 3), ("few", len(ids) // 3)):
        values = (np.random.default_rng(0).random((30, count)) < 0.5).astype(np.float16)
        blank = ("",) * count
        names = {"models": tuple(f"m{i}" for i in range(30)), "items": tuple(ids[:count])}
        write_bank(fit_bank(Table(values_MN=values, tasks=blank, strata=blank, **names)), tmp_path / "banks" / name)
    found = load(Path(written({"path": "../banks/most", "weight": 0.4})))

    assert found.bank is not None
    assert (found.bank.known, found.bank.items, found.bank.weight) == (len(ids) * 2 // 3, len(ids), 0.4)
    assert found.identity != plain.identity
    assert found.file.bank is not None
    assert found.file.bank.path == str(tmp_path / "banks" / "most.json")
    shown = CliRunner().invoke(app, ["check", written({"path": "../banks/most.json"})], env={"COLUMNS": "200"})
    assert f"30 models, {len(ids) * 2 // 3} of {len(ids)} items, 50 % of a fit's weight" in shown.output
    few = {"path": "../banks/few.safetensors"}
    assert_refused(["check", written(few)], "bank.path", f"knows {len(ids) // 3} of the {len(ids)} search items")
    assert_refused(["check", written({"path": "../banks/none"})], "bank.path", "cannot be read")
    assert_refused(["check", written({"path": "x", "weight": 1.0})], "bank.weight")
    fixed = {"schedule": {"name": "fixed", "items": 20}, "estimator": {"name": "factor"}}
    assert_refused(["check", written(None, **fixed)], "or a bank")
    assert load(Path(written({"path": "../banks/most"}, **fixed))).bank is not None


def test_the_check_on_held_out_models_needs_models(tmp_path: Path) -> None:
    """With fewer than ten the bank is made, and says that it was not tried."""
    made = make_bank([write_wide(tmp_path / "r.csv")], tmp_path / "bank", settings=Mean(), source="here")

    assert made.rows["held out"] == "not tried: fewer than 10 models have answered everything"
    assert made.bank.source == "here"
    assert made.rows["scores"].endswith("on average")


def test_the_factor_model_takes_a_bank_with_missing_items() -> None:
    """A bank that knows two thirds of the items still gives finite estimates."""
    ids = {task: toy().tasks[task].ids("search") for task in TASKS}
    known = prior(toy_bank(items=SIZES["search"] * 2 // 3), ids, weight=0.5, nearest=False)
    rng = np.random.default_rng(0)
    own = Responses.of((rng.random((25, 2 * SIZES["search"])) < 0.5).astype(float))
    fit = Factor().fit(known.beside(own, TASKS), seed=0)
    items = fit.choose(12).items

    assert np.isfinite(fit.estimate(items, own.values_MN[:3][:, items]).value_CK).all()


def test_the_settings_of_a_warm_up_run_with_a_bank(tmp_path: Path) -> None:
    """A killed and resumed run with a bank has the ledger of the uninterrupted one."""
    ids = {task: toy().tasks[task].ids("search") for task in TASKS}
    bank = prior(toy_bank(), ids, weight=0.5, nearest=True)
    experiment = replace(toy(schedule=WARMUP, budget={"candidates": 16}), bank=bank)
    for name in ("whole", "torn"):
        with Ledger(tmp_path / name) as record:
            Search(experiment, record, ShufflingPool(ToyWorker(), 0)).run()
    lines = (tmp_path / "torn").read_bytes().splitlines(keepends=True)
    (tmp_path / "torn").write_bytes(b"".join(lines[: len(lines) // 2]))
    with Ledger(tmp_path / "torn") as record:
        Search(experiment, record, ShufflingPool(ToyWorker(), 1)).run()

    assert settled(read(tmp_path / "torn")) == settled(read(tmp_path / "whole"))

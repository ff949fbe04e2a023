"""Task files: what is read, how rows are dealt to splits, and what is refused with its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.evaluation.jsonl import TaskFile, build_task, read_task

ROWS = [
    {"id": f"r{i}", "split": split, "prompt": f"{i}+1=", "answer": str(i + 1), "level": i}
    for i, split in enumerate(["search", "search", "validation", "test"])
]
FILE = {"kind": "generate", "data": "rows.jsonl", "prompt": "{prompt}", "answer": "answer", "split": "split"}


def write(folder: Path, rows=None, text=None, **changes) -> Path:
    """Write a task file and its rows; a change to None removes the key."""
    lines = text if text is not None else "".join(json.dumps(row) + "\n" for row in rows or ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "sums.yaml"
    file = {key: thing for key, thing in {**FILE, **changes}.items() if thing is not None}
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    return path


def test_a_task_file_becomes_a_task(tmp_path):
    """Rows go to their splits in the order of the file, templates and settings come through."""
    path = write(tmp_path, prompt="Q: {prompt} {{{level}}}", max_new_tokens=3, stop=["\n"], grade={"regex": "x(.)"})

    task = read_task(path)

    assert (task.name, task.kind) == ("sums", "generate")
    assert (task.max_new_tokens, task.stop, task.pattern) == (3, ("\n",), "x(.)")
    assert [item.id for item in task.items("search")] == ["r0", "r1"]
    assert task.items("test")[0].prompt == "Q: 3+1= {3}"
    assert task.items("test")[0].answer == "4"
    assert read_task(path, "other").name == "other"


def test_choices_and_numbers_become_text(tmp_path):
    """Numbers in prompts, answers and choices are written as JSON writes them."""
    rows = [{"prompt": 7, "answer": 2, "choices": [1, 2, "x"], "split": "search"}]

    item = read_task(write(tmp_path, rows, kind="multiple_choice", choices="choices")).items("search")[0]

    assert (item.id, item.prompt, item.answer, item.choices) == ("row-1", "7", "2", ("1", "2", "x"))


def test_texts_reach_the_item_as_they_are_written(tmp_path):
    """What looks like a date, a number or a line end inside a text stays that text."""
    odd = ["2020-01-01", "2020-01-01 10:00:00", "007", "1e3", "a\u2028b", "null", "ä\t"]
    rows = [{"id": f"r{i}", "split": "search", "prompt": text, "answer": text} for i, text in enumerate(odd)]

    assert [item.prompt for item in read_task(write(tmp_path, rows)).items("search")] == odd


def test_shares_deal_by_the_question_alone(tmp_path):
    """Without a split field half of the items go to the search, and neither order nor company moves one."""
    rows = [{"id": f"r{i}", "prompt": f"{i}", "answer": "x"} for i in range(2000)]

    task = read_task(write(tmp_path, rows, split=None))
    nameless = [{**row, "id": row["id"] + "x"} for row in rows[::-3]]
    part = read_task(write(tmp_path, nameless, split=None))

    # three standard errors of a share of 2000
    assert len(task.items("search")) == pytest.approx(1000, abs=3 * (2000 * 0.25) ** 0.5)
    assert len(task.items("test")) == pytest.approx(500, abs=3 * (2000 * 0.1875) ** 0.5)
    for split in ("search", "validation", "test"):
        assert {item.prompt for item in part.items(split)} <= {item.prompt for item in task.items(split)}


def test_shares_may_leave_a_split_out(tmp_path):
    """A share of 0 or none makes no split."""
    task = read_task(write(tmp_path, split={"search": 1.0, "test": 0.0}))

    assert list(task.splits) == ["search"]
    assert len(task.items("search")) == 4


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_other_formats_come_through_datasets(tmp_path, suffix, monkeypatch):
    """What `datasets` reads from a table gives the same task as its JSON lines, and leaves no cache."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    table = datasets.Dataset.from_list(ROWS)
    getattr(table, f"to_{suffix}")(str(tmp_path / f"rows.{suffix}"))
    expected = read_task(write(tmp_path))

    found = read_task(write(tmp_path, data=f"rows.{suffix}"))

    assert found.fingerprint == expected.fingerprint
    assert not cache.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "promt: unknown key; did you mean 'prompt'?"),
        ({"kind": None}, "kind: missing"),
        ({"kind": "choice"}, "is not known"),
        ({"data": "row.jsonl"}, "no file"),
        ({"data": "sums.yaml"}, "must end in .jsonl, .json, .csv or .parquet"),
        ({"prompt": "{promt}"}, "row 1: no field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "{prompt"}, "double braces that are text"),
        ({"prompt": "{prompt.upper}"}, "not the name of a field"),
        ({"answer": "anser"}, "row 1: no field 'anser'; did you mean 'answer'?"),
        ({"split": "level"}, "row 1: field 'level' names the split '0'"),
        ({"split": {"serch": 1.0}}, "did you mean 'search'?"),
        ({"split": {"search": 0.5}}, "shares must add up to 1, got 0.5"),
        ({"split": {"search": 2.0, "test": -1.0}}, "must not be negative"),
        ({"choices": "answer"}, "only for multiple_choice"),
        ({"kind": "multiple_choice"}, "name the field with the list of choices"),
        ({"kind": "multiple_choice", "choices": "answer"}, "must be a list of choices, got str '1'"),
        ({"grade": "exakt"}, "expected exact or a mapping with regex"),
        ({"grade": {"regex": "("}}, "not a regular expression"),
        ({"max_new_tokens": "8"}, "expected int"),
        ({"stop": "x"}, "expected a list"),
        ({"text": ""}, "has no rows"),
        ({"text": '{"prompt": 1}\n{"prompt"\n'}, "line 2: not JSON"),
        ({"text": "[1]\n"}, "line 1: expected a JSON object"),
        ({"rows": [*ROWS, ROWS[0]]}, "two items have the id 'r0'"),
        ({"rows": [*ROWS, {**ROWS[0], "id": "r9", "split": "test"}]}, "splits must be disjoint"),
        ({"rows": [{**ROWS[0], "answer": True}]}, "must be a text or a number, got bool True"),
        ({"rows": [{**ROWS[0], "answer": None}]}, "row 1: no field 'answer'"),
    ],
)
def test_a_wrong_task_file_is_one_line(tmp_path, changes, message):
    """Each mistake names the file and says what to do, on one line."""
    with pytest.raises(TaskError) as problem:
        read_task(write(tmp_path, **changes))

    assert message in str(problem.value)
    assert str(tmp_path) in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"a: [", "not YAML"), (b"\xff", "not YAML")]
)
def test_a_task_file_that_cannot_be_read_is_one_line(tmp_path, content, message):
    """A missing file, broken YAML and bytes that are not UTF-8 are told apart from wrong content."""
    path = tmp_path / "sums.yaml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(TaskError, match=message):
        read_task(path)


def test_rows_that_are_not_utf8_are_refused(tmp_path):
    """Bytes of another encoding are an error of the file of rows."""
    path = write(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}\n')

    with pytest.raises(TaskError, match=r"rows\.jsonl: cannot be read"):
        read_task(path)


def test_rows_that_datasets_cannot_read_are_one_line(tmp_path):
    """What `datasets` raises becomes one line with the cause."""
    path = write(tmp_path, data="rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"no table")

    with pytest.raises(TaskError, match=r"rows\.parquet: rows cannot be read \(.*check name and format"):
        read_task(path)


def test_a_hub_data_set_that_is_out_of_reach_is_one_line(tmp_path):
    """Without network and cache, a data set of the hub is an error that names it."""
    path = write(tmp_path, data={"hub": "someone/none-such", "rows": "test"})

    with pytest.raises(TaskError, match=r"hub data set 'someone/none-such': rows cannot be read"):
        read_task(path)


def test_a_task_may_be_given_as_the_thing_itself(tmp_path):
    """A task file's content builds the same task as the file."""
    path = write(tmp_path)

    task = build_task(TaskFile(**FILE), "sums", tmp_path, "experiment.yaml: tasks.sums")

    assert task == read_task(path)


def test_tasks_load_without_heavy_libraries(tmp_path):
    """Reading JSON lines imports neither torch nor transformers nor datasets."""
    code = (
        "import sys; from pathlib import Path; from evomerge.evaluation import read_task; "
        f"read_task(Path({str(write(tmp_path))!r})); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'ray') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())

    assert done.stdout.strip() == "[]"

"""Task files: what is read, how rows are dealt to splits, and what is refused with its place."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation import build_task, entrypoint, files, language, read_task
from evomerge.evaluation.graders import KEYS, PLAIN, Exact, Regex
from evomerge.evaluation.items import Item, windows
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import CHOICES, KINDS, Choose, Generate, TaskFile
from evomerge.evaluation.request import Outcome
from evomerge.evaluation.unlabelled import MEASURES

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


def read(path: Path, name: str | None = None) -> JsonlTask:
    """Read a task file whose items are rows."""
    task = read_task(path, name)
    assert isinstance(task, JsonlTask)
    return task


def test_a_task_file_becomes_a_task(tmp_path):
    """Rows go to their splits in the order of the file, templates and settings come through."""
    path = write(tmp_path, prompt="Q: {prompt} {{{level}}}", max_new_tokens=3, stop=["\n"], grade={"regex": "x(.)"})

    task = read(path)

    assert task.name == "sums"
    assert task.measure == Generate(grader=Regex(regex="x(.)"), max_new_tokens=3, stop=("\n",))
    assert task.ids("search") == ("r0", "r1")
    assert task.splits["test"][0].prompt == "Q: 3+1= {3}"
    assert task.splits["test"][0].answers == ("4",)
    assert read_task(path, "other").name == "other"


def test_answers_strata_and_preamble_come_through(tmp_path):
    """A list of answers is kept whole, the stratum is a field's text, and a preamble is taken as it is."""
    rows = [{**ROWS[0], "answer": ["1", 1.5]}, *ROWS[1:]]

    task = read(write(tmp_path, rows, stratum="level", preamble="{0}+1=1\n"))

    assert task.splits["search"][0].answers == ("1", "1.5")
    assert task.strata("search") == ("0", "1")
    assert task.requests("search", 1)[0].context == "{0}+1=1\n1+1="


def test_a_preamble_moves_no_item(tmp_path):
    """Items are dealt by their question, whatever stands before it."""
    rows = [{"id": f"r{i}", "prompt": f"{i}", "answer": "x"} for i in range(50)]

    plain, late = read(write(tmp_path, rows, split=None)), read(write(tmp_path, rows, split=None, preamble="0"))

    assert plain.splits == late.splits
    assert plain.fingerprint != late.fingerprint


def test_the_grade_of_choices_is_one_of_two(tmp_path):
    """Log-likelihood is the default, length-normalised is the other one."""
    rows = [{**row, "choices": [row["answer"], "x"]} for row in ROWS]
    changes = {"kind": "multiple_choice", "choices": "choices"}

    found = [read(write(tmp_path, rows, **changes, grade=grade)).measure for grade in (None, *CHOICES)]

    assert found == [Choose(), Choose(), Choose(by_length=True)]


def test_graders_that_compare_with_nothing_need_no_answer(tmp_path):
    """A function gets the row as it is, and its content is the task's; dates of tables come as texts."""
    (tmp_path / "g.py").write_text("def f(text, row):\n    return float(text == row['more'][0])\n")
    rows = [{**row, "more": [str(i)]} for i, row in enumerate(ROWS)]

    task = read(write(tmp_path, rows, answer=None, grade={"python": "g.py:f"}))
    other = read(write(tmp_path, [{**row, "level": 9} for row in rows], answer=None, grade={"python": "g.py:f"}))

    assert task.splits["search"][1].row == rows[1]
    assert [task.grade("search", 1, (Outcome(tokens=1, text=text),)).value for text in "01"] == [0.0, 1.0]
    assert task.fingerprint != other.fingerprint
    assert read(write(tmp_path, rows)).splits["search"][1].row == {}


def test_the_content_of_an_item_is_its_own_prompt_answers_and_grading(tmp_path):
    """Neither other items nor the task's name change it; the preamble, the grader or the item's own text do."""
    task = read(write(tmp_path))
    whole = [*task.contents("search"), *task.contents("validation")]
    assert len(set(whole)) == 3
    assert read(write(tmp_path, rows=ROWS[1:]), "other").contents("search") == (whole[1],)
    assert task.cut({"search": 1}).contents("search") == (whole[0],)
    assert task.cut({"search": 0}).contents("search") == ()

    changes = ({"preamble": "x"}, {"grade": {"regex": "(.)"}}, {"max_new_tokens": 3}, {"prompt": "{prompt} "})
    others = [read(write(tmp_path, **change)).contents("search")[0] for change in changes]
    others.append(read(write(tmp_path, rows=[{**ROWS[0], "answer": "7"}, *ROWS[1:]])).contents("search")[0])
    assert len({whole[0], *others}) == 6


def test_a_row_that_has_no_content_address_is_refused(tmp_path):
    """A row that is kept for a function must not hold NaN, which no JSON has."""
    (tmp_path / "g.py").write_text("def f(text, row):\n    return 1\n")

    with pytest.raises(TaskError, match=r"rows\.jsonl, row 1: holds a number that is not finite"):
        read(write(tmp_path, [{**ROWS[0], "level": float("nan")}], answer=None, grade={"python": "g.py:f"}))


def test_what_goes_wrong_in_a_users_function_names_the_item(tmp_path):
    """The line holds task, item, file and function."""
    (tmp_path / "g.py").write_text("def f(text, row):\n    return row['none']\n")
    task = read(write(tmp_path, grade={"python": "g.py:f"}))

    with pytest.raises(TaskError, match=r"task 'sums', item 'r1': function 'f' of .*g\.py failed \(KeyError"):
        task.grade("search", 1, (Outcome(tokens=1),))


@given(st.text(alphabet="abc \n", min_size=1, max_size=300), st.integers(1, 80))
def test_windows_are_the_text_in_nearly_equal_parts(text, size):
    """Put together they are the text, but for windows of blanks; none is much longer than asked for, or than others."""
    found = windows(text, size)
    rest = text
    for window in found:
        skipped, _, rest = rest.partition(window)
        assert not skipped.strip()

    assert not rest.strip()
    assert all(window.strip() and len(window) <= size + size // 4 + 1 for window in found)
    assert len(found) <= -(-len(text) // size)


def test_windows_end_where_lines_or_words_end():
    """A line's end goes before a blank, and both before the middle of a word."""
    assert windows("one two\nthree four", 9) == ["one two\n", "three four"]
    assert windows("one two three four", 9) == ["one two ", "three four"]
    assert windows("abcdefghij", 5) == ["abcde", "fghij"]


def test_choices_and_numbers_become_text(tmp_path):
    """Numbers in prompts, answers and choices are written as JSON writes them."""
    rows = [{"prompt": 7, "answer": 2, "choices": [1, 2, "x"], "split": "search"}]

    item = read(write(tmp_path, rows, kind="multiple_choice", choices="choices")).splits["search"][0]

    assert (item.id, item.prompt, item.answers, item.choices) == ("row-1", "7", ("2",), ("1", "2", "x"))


def test_texts_reach_the_item_as_they_are_written(tmp_path):
    """What looks like a date, a number or a line end inside a text stays that text."""
    odd = ["2020-01-01", "2020-01-01 10:00:00", "007", "1e3", "a\u2028b", "null", "ä\t"]
    rows = [{"id": f"r{i}", "split": "search", "prompt": text, "answer": text} for i, text in enumerate(odd)]

    assert [item.prompt for item in read(write(tmp_path, rows)).splits["search"]] == odd


def test_shares_deal_by_the_question_alone(tmp_path):
    """Without a split field half of the items go to the search, and neither order nor company moves one."""
    rows = [{"id": f"r{i}", "prompt": f"{i}", "answer": "x"} for i in range(2000)]

    task = read(write(tmp_path, rows, split=None))
    nameless = [{**row, "id": row["id"] + "x"} for row in rows[::-3]]
    part = read(write(tmp_path, nameless, split=None))

    # three standard errors of a share of 2000
    assert task.count("search") == pytest.approx(1000, abs=3 * (2000 * 0.25) ** 0.5)
    assert task.count("test") == pytest.approx(500, abs=3 * (2000 * 0.1875) ** 0.5)
    for split in ("search", "validation", "test"):
        assert {item.prompt for item in part.splits[split]} <= {item.prompt for item in task.splits[split]}


def test_shares_may_leave_a_split_out(tmp_path):
    """A share of 0 or none makes no split."""
    task = read(write(tmp_path, split={"search": 1.0, "test": 0.0}))

    assert list(task.splits) == ["search"]
    assert task.count("search") == 4


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
        ({"data": "sums.yaml"}, "must end in .jsonl, .json, .csv, .parquet or .txt"),
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
        ({"answer": None}, "answer: missing; name the field with the right answer"),
        ({"rows": [{**ROWS[0], "answer": []}]}, "is an empty list"),
        ({"grade": "exakt"}, "grade: 'exakt' is not known; did you mean 'exact'?"),
        ({"grade": "choice"}, "grade: 'choice' is not known"),
        ({"kind": "multiple_choice", "choices": "c", "grade": "exact"}, "'exact' does not grade choices; known"),
        ({"kind": "multiple_choice", "choices": "c", "grade": "choice_by_lenght"}, "did you mean 'choice_by_length'?"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"stop": [""]}, "empty stop text"),
        ({"stratum": "levle"}, "no field 'levle'; did you mean 'level'?"),
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

    task = build_task(FILE, "sums", tmp_path, "experiment.yaml: tasks.sums")

    assert task == read_task(path)
    with pytest.raises(TaskError, match=r"experiment\.yaml: tasks\.sums: expected a mapping"):
        build_task("sums.yaml", "sums", tmp_path, "experiment.yaml: tasks.sums")


def test_the_keys_tell_which_kind_of_task_it_is(tmp_path, monkeypatch):
    """With `lm_eval` a mapping goes to the tasks of that library as it is, whatever else it holds."""
    came = []
    monkeypatch.setattr(files, "harness_task", lambda *given: came.append(given) or "task")
    keys = {"lm_eval": "arc_easy", "measure": "acc"}

    assert build_task(keys, "arc", tmp_path, "here", tmp_path / "template") == "task"
    assert came == [(keys, "arc", tmp_path, "here", tmp_path / "template")]


def test_tasks_load_without_heavy_libraries(tmp_path):
    """Reading JSON lines imports neither torch nor transformers nor datasets."""
    code = (
        "import sys; from pathlib import Path; from evomerge.evaluation import read_task; "
        f"read_task(Path({str(write(tmp_path))!r})); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'ray') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())

    assert done.stdout.strip() == "[]"


PAGE = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
ASKED = [{"question": f"{i} + 1?", "answer": str(i + 1), "choices": [str(i), str(i + 1)]} for i in range(40)]


def blocks(kind: str) -> list[str]:
    """Return the code blocks of a language on the page on tasks."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """Return a folder with the files that the page speaks of; languages are told without their library."""

    class Identifier:
        labels = ("de", "ja")

        def classify(self, text: str) -> tuple[str, float]:
            return "ja", 1.0

    monkeypatch.setattr(language, "_identifier", Identifier)
    monkeypatch.setattr(language.importlib.metadata, "version", lambda name: "1")
    rows = [json.loads(line) for line in blocks("json")[0].splitlines()]
    many = [{**row, "id": f"{row['id']}-{i}", "question": f"{i}: {row['question']}"} for i in range(9) for row in rows]
    numbers = [{"question": f"{i}?", "answer": i} for i in range(40)]
    for name, some in (("rows", many), ("choices", ASKED), ("numbers", numbers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "texts.txt").write_text("".join(f"text number {i}\n" for i in range(300)))
    (tmp_path / "graders.py").write_text(blocks("python")[0])
    return tmp_path


def test_every_task_of_the_page_can_be_asked_and_graded(desk):
    """All files that are shown are read, have items in every split, and grade an answer."""
    said = (Outcome(tokens=1, loglikelihood=-1.0, text="1234", ids=((0,),), logp=((-1.0,),)),) * 2
    kinds = set()
    for block in blocks("yaml"):
        keys = yaml.safe_load(block)
        task = build_task(keys, "shown", desk, "docs/tasks.md")
        kinds.add(keys.get("kind", keys.get("measure")))
        for split in ("search", "validation", "test"):
            asked = task.requests(split, 0)
            assert task.grade(split, task.count(split) - 1, said[: len(asked)], said[: len(asked)]).value < 2.0

    assert kinds == {*KINDS, *MEASURES}


def test_the_page_names_every_key_and_grader():
    """Whatever a labelled file may hold stands in a table of the page, with its default."""
    first = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    told = {name for cell in first for name in re.findall(r"\w+", cell)}

    assert told >= {field.name for field in fields(TaskFile)} | {*KEYS, *PLAIN, *CHOICES, *MEASURES}


def test_the_pages_function_grades_by_nearness(desk):
    """Its comment is true: the right number is 1, others are less the further away they are."""
    made = entrypoint.find_entry("graders.py:close", desk)
    item = Item(id="a", prompt="", row={"answer": 4})

    values = [made.grade(text, item) for text in ("4", "5", "7", "four")]

    assert values[0] == 1.0
    assert all(more > less for more, less in itertools.pairwise(values))


def test_the_default_grader_is_exact(tmp_path):
    """As the page says."""
    measure = read(write(tmp_path)).measure

    assert isinstance(measure, Generate)
    assert measure.grader == Exact()

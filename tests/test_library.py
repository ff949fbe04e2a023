"""The library: files found by path or by name, the user's before those that ship; lists of methods and stages."""

import re
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from evomerge import library
from evomerge.cli import app
from evomerge.errors import ExperimentError
from evomerge.library import KINDS, find, headline, names, shipped, values_of, workspace
from evomerge.methods import Parameter, method
from evomerge.stages import METHODS, STAGES


@pytest.fixture
def ships(tmp_path, monkeypatch):
    """Let a folder of the test stand for what ships."""
    root = tmp_path / "shipped"
    monkeypatch.setattr(library, "shipped", lambda: root)
    return root


def put(path, text=""):
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_path_is_relative_to_the_file_that_refers_to_it(tmp_path):
    """What ends like a YAML file is a path; an absolute one is taken as it is."""
    near = put(tmp_path / "work/experiments/mine.yaml")
    other, above = put(tmp_path / "work/experiments/tasks/own.yml"), put(tmp_path / "work/space.yaml")

    assert find("fitness", "tasks/own.yml", near, "place") == other
    assert find("search_spaces", "../space.yaml", near, "place") == above
    assert find("search_spaces", str(above), near, "place") == above


def test_a_missing_path_is_named_with_its_place(tmp_path, ships):
    """A file of that name in the library is not meant by a path."""
    put(ships / "fitness/own.yaml")

    with pytest.raises(ExperimentError, match=rf"^here: no file {tmp_path}/own.yaml; give a path relative to .*mine"):
        find("fitness", "own.yaml", tmp_path / "mine.yaml", "here")


def test_a_name_is_looked_up_in_the_workspace_first(tmp_path, ships):
    """The user's entry hides the shipped one of the same name; both suffixes and folders are found."""
    near = put(tmp_path / "work/experiments/deep/mine.yaml")
    own = put(tmp_path / "work/fitness/task.yml")
    theirs = put(ships / "fitness/task.yaml")
    deep = put(ships / "fitness/zoo/cipher.yaml")

    assert find("fitness", "task", near, "place") == own
    assert find("fitness", "task", tmp_path / "elsewhere.yaml", "place") == theirs
    assert find("fitness", "zoo/cipher", near, "place") == deep


def test_an_unknown_name_gets_the_nearest_of_both_roots(tmp_path, ships):
    """The way out names what the workspace and the library have, of this kind only."""
    near = put(tmp_path / "work/experiments/mine.yaml")
    put(tmp_path / "work/fitness/mine_own.yaml")
    put(ships / "fitness/arithmetic.yaml")
    put(ships / "search_spaces/arithmetics.yaml")

    with pytest.raises(ExperimentError, match=r"^x.task: no fitness entry 'aritmetic'; did you mean 'arithmetic'\?$"):
        find("fitness", "aritmetic", near, "x.task")
    with pytest.raises(ExperimentError, match=r"'zzz'; known: arithmetic, mine_own$"):
        find("fitness", "zzz", near, "x.task")


def test_the_workspace_holds_the_nearest_experiments_folder(tmp_path):
    """A file outside any `experiments/` has no workspace."""
    near = put(tmp_path / "experiments/a/experiments/b/mine.yaml")

    assert workspace(near) == tmp_path / "experiments/a"
    assert workspace(tmp_path / "experiments/mine.yaml") == tmp_path
    assert workspace(put(tmp_path / "mine.yaml")) is None


def test_names_are_sorted_paths_without_their_suffix(tmp_path):
    """Only YAML files count; what is hidden within the workspace does not, whatever lies above it."""
    root = tmp_path / ".venv/lib"
    for name in ("b.yaml", "a.yml", "zoo/c.yaml", "v1.5.yaml", "README.md", ".hidden.yaml", ".git/d.yaml"):
        put(root / "fitness" / name)
    (root / "fitness/folder.yaml").mkdir()

    assert [name for name, _ in names("fitness", root)] == ["a", "b", "v1.5", "zoo/c"]
    assert all(path.is_file() for _, path in names("fitness", root))
    assert list(names("experiments", root)) == []


def test_the_headline_is_the_first_comment(tmp_path):
    """By custom the first line says what a file is for; a file without one has none."""
    assert headline(put(tmp_path / "a.yaml", "#  What it is for. \n# More.\nkey: 1\n")) == "What it is for."
    assert headline(put(tmp_path / "b.yaml", "key: 1  # not this\n")) == ""


def test_an_installed_package_carries_its_own_library(tmp_path, monkeypatch):
    """Inside a wheel the three folders lie in `_library`; in a checkout beside the package."""
    module = put(tmp_path / "site/evomerge/library.py")
    monkeypatch.setattr(library, "__file__", str(module))

    assert shipped() == tmp_path / "site"
    (tmp_path / "site/evomerge/_library").mkdir()
    assert shipped() == tmp_path / "site/evomerge/_library"


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_ships_is_found_and_read(kind):
    """Each entry is found by its own name and reads as YAML; spaces and experiments say what they are for."""
    found = dict(names(kind))

    assert found
    for name, path in found.items():
        assert find(kind, name, path, "place") == path
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
        assert headline(path)


def printed(*arguments, code=0):
    """Return what a command prints where there is no terminal."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def joined(text):
    """Return a text without what wrapping does to it."""
    return "".join(text.split())


def entry(page, name):
    """Return the part of a list that is about one name: up to the next empty line."""
    return re.search(rf"^{name}\n(.*?)^ *$", page, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize(("kind", "table"), [("methods", METHODS), ("stages", STAGES)])
def test_the_list_has_all_that_the_table_says_of_each(kind, table):
    """Formula, each parameter with default and range or options, needs and reference stand in every entry."""
    page = printed("ls", kind)

    for name, found in table.items():
        told = joined(entry(page, name))
        formulas = [step.stage.formula for step in found.steps] if kind == "methods" else [found.formula]
        assert all(joined(formula) in told for formula in formulas), name
        assert joined(found.reference) in told
        assert "needs" in told
        assert kind == "stages" or joined(found.line) in told
        for own, parameter in found.parameters.items():
            default = parameter.default if isinstance(parameter.default, str) else f"{parameter.default:g}"
            assert f"{own}={default}({joined(values_of(parameter))})" in told, (name, own)


def test_needs_are_those_of_the_methods():
    """A base, statistics and masks are named where a method takes them, and only there."""
    page = printed("ls", "methods")

    assert "needs       a base " in entry(page, "ties")
    assert "needs       nothing else" in entry(page, "linear")
    assert "a base, if its task vectors are meant" in entry(page, "slerp")
    for name, found in METHODS.items():
        told = entry(page, name)
        assert ("random masks" in told.split("needs")[-1]) == found.random
        for kind in found.statistics:
            assert kind in told.split("needs")[-1]


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (Parameter(default=0.5, low=0.0, high=1.0, per_source=True), "[0, 1], per source"),
        (Parameter(default=0.5, low=0.0), "[0, inf)"),
        (Parameter(default=-3.0, high=0.0), "(-inf, 0]"),
        (Parameter(default=1.0), "any number"),
        (Parameter(default=1.0, low=0.0, high=1.0, whole=True), "0 or 1"),
        (Parameter(default=4.0, low=1.0, whole=True), "whole, in [1, inf)"),
        (Parameter(default="a", options=("a", "b")), "a | b"),
        (Parameter(default="*head*", text=True), "a pattern of tensor names"),
    ],
)
def test_a_range_is_told_in_few_words(parameter, text):
    """Bounds that a value may reach stand in square brackets."""
    assert values_of(parameter) == text


def test_show_prints_one_method_in_full():
    """Line, formula and reference of each stage, every parameter; the short name and the long one are the same."""
    page = printed("show", "ties")

    assert page == printed("show", "methods/ties")
    assert METHODS["ties"].line in page
    for step in METHODS["ties"].steps:
        assert joined(step.stage.formula) in joined(page)
        assert joined(step.stage.reference) in joined(page)
    for own in METHODS["ties"].parameters:
        assert re.search(rf"^{own} ", page, re.MULTILINE)
    assert re.search(r"^density +0.2 +\[0, 1\], per source", page, re.MULTILINE)
    assert "winsor.scope" in printed("show", "pcb")


def test_show_prints_a_stage_and_a_line():
    """A stage by `stages/NAME`; a line is read with its own defaults, and has no name."""
    page = printed("show", "base | drop(0.3) | sum | lines")

    assert re.search(r"^density +0.3 ", page, re.MULTILINE)
    assert "random masks" in page
    assert "method " not in page
    assert "drops out   at density = 1" in printed("show", "stages/trim")
    assert "drops out   with one source" in printed("show", "stages/elect")
    assert "parameter" not in printed("show", "zero | wma | sum")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "methods/tiez"], "unknown method 'tiez'; did you mean 'ties'?"),
        (["show", "stages/trimm"], "no stage 'trimm'; did you mean 'trim'?"),
        (["show", "base | sum | trimm"], "unknown stage 'trimm'; did you mean 'trim'?"),
        (["show", "tiez"], "methods/…"),
        (["ls", "method"], "did you mean 'methods'?"),
    ],
)
def test_what_is_not_there_is_one_line_with_the_way_out(arguments, says):
    """Exit code 2, and the nearest name."""
    text = printed(*arguments, code=2)

    assert says in text
    assert text.count("\n") == 1


def test_the_lists_are_plain_text_of_100_columns_where_there_is_no_terminal():
    """No control characters, no line that is longer, and the plain `ls` says where to look."""
    for page in (printed("ls", "methods"), printed("ls", "stages"), printed("show", "wudi")):
        assert "\x1b" not in page
        assert max(map(len, page.splitlines())) <= 100
    assert f"{len(METHODS)} methods and {len(STAGES)} stages" in printed("ls")
    assert "quickstart" in printed("ls", "experiments")
    assert "search_spaces" not in printed("ls", "experiments")


@pytest.mark.parametrize("arguments", [["ls", "methods"], ["ls", "stages"], ["show", "ties"]])
def test_methods_are_listed_without_torch(arguments):
    """What only reads tables loads nothing that is slow to start."""
    code = f"""
import sys
from evomerge.cli import app
try:
    app({arguments!r})
finally:
    print([name for name in ("torch", "transformers", "ray", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=shipped(), capture_output=True, text=True, check=False)

    assert done.stdout.strip().endswith("[]"), done.stdout[-200:] + done.stderr


def test_the_tables_are_those_of_the_methods():
    """What `show` reads as a method is what a recipe reads."""
    assert library.TABLES["methods"] is METHODS
    assert method("ties") is METHODS["ties"]

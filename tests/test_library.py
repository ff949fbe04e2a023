"""The library: files found by path or by name, the user's before those that ship."""

import pytest
import yaml

from evomerge import library
from evomerge.errors import ExperimentError
from evomerge.library import KINDS, find, headline, names, shipped, workspace


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

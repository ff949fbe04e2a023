"""From references to folders: paths first, then the hub, whose client is replaced by a fake."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from evomerge.errors import ModelError
from evomerge.models.locate import called, locate


def test_paths_come_first(tmp_path: Path) -> None:
    """A relative path starts at the file that names it, an absolute one stands for itself."""
    folder = tmp_path / "zoo" / "base"
    folder.mkdir(parents=True)

    assert locate("zoo/base", tmp_path) == folder.resolve()
    assert locate("../zoo/base", tmp_path / "zoo") == folder.resolve()
    assert locate(str(folder), Path("/")) == folder.resolve()


@pytest.mark.parametrize("online", [False, True])
def test_a_hub_id_is_taken_from_the_cache_or_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, online: bool
) -> None:
    """The cache is asked before the network, never for pickles or code, with the revision that is named."""
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if online and options["local_files_only"]:
            raise FileNotFoundError(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    assert locate("owner/model@v2", tmp_path) == tmp_path
    assert [call["local_files_only"] for call in asked] == ([True, False] if online else [True])
    assert {(call["name"], call["revision"]) for call in asked} == {("owner/model", "v2")}
    assert not {"*.bin", "*.py", "*"} & set(asked[0]["allow_patterns"])


def test_what_is_nowhere_gives_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing folder, a file, and an id that the hub does not have name the way out."""

    def snapshot(name: str, **options: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for reference, says in (
        ("./models/bose", r"no folder .*bose; did you mean 'base'"),
        ("models/bose", r"not to be had from the hub \(ConnectionError\); did you mean 'base'"),
        ("nowhere/at/all", r"no folder .*; give the path of a model folder or a hub id"),
        ("file", "is a file; give the folder"),
    ):
        with pytest.raises(ModelError, match=says) as caught:
            locate(reference, tmp_path)

        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/home/me/.cache/huggingface/hub/models--org--a-7b/snapshots/0f1e2d", "org/a-7b@0f1e2d"),
        ("/cache/models--gpt2/snapshots/abc", "gpt2@abc"),
        ("/models/snapshots/a-7b", "a-7b"),
        ("zoo/base", "base"),
    ],
)
def test_a_model_is_called_by_its_hub_name_or_its_folder(folder: str, name: str) -> None:
    """The hub's cache has the name two folders up; anywhere else it is the folder's own."""
    assert called(Path(folder)) == name

"""Models with different tokenizers brought to one vocabulary: whose row each token gets, and what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from evomerge.errors import ModelError
from evomerge.models.vocabulary import Aligned, tokens_of, union
from tests.models.folders import edit_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def variant(model: Path, folder: Path, tokens: list[str], padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Write a copy of a model with another vocabulary, tokens in this order, and random rows; return its tensors."""
    shutil.copytree(model, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    data["model"]["unk_token"] = tokens[0]
    data["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(data))
    rows = len(tokens) + padding
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        tensors[name] = torch.randn(rows, 16, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, vocab_size=rows)
    return tensors


@pytest.fixture
def three(family: dict[str, Path], tmp_path: Path) -> tuple[dict[str, Path], dict[str, dict[str, Tensor]]]:
    """Return a base and two sources: `x` and `n` in both sources, `z` in one, `y` in the base, `w` in base and one."""
    vocabularies = {"base": ["u", "a", "y", "w"], "one": ["u", "n", "x", "a", "z", "w"], "two": ["u", "x", "n", "a"]}
    tensors = {
        name: variant(family["a"], tmp_path / name, tokens, seed=i)
        for i, (name, tokens) in enumerate(vocabularies.items())
    }
    return {name: tmp_path / name for name in vocabularies}, tensors


def test_every_token_gets_its_row(three: tuple[dict[str, Path], dict[str, dict[str, Tensor]]]) -> None:
    """Its own; else the base's; else that of the one model that has it; else the mean of those that have it."""
    paths, stored = three
    aligned = Aligned(paths, "union", "base")
    assert aligned.tokens == {"u": 0, "a": 1, "y": 2, "w": 3, "n": 4, "x": 5, "z": 6}
    for name in (EMBEDDING, HEAD):
        base, one, two = (stored[model][name].float() for model in ("base", "one", "two"))
        mean = {"n": (one[1] + two[2]) / 2, "x": (one[2] + two[1]) / 2}
        expected = {
            "base": [base[0], base[1], base[2], base[3], mean["n"], mean["x"], one[4]],
            "one": [one[0], one[3], base[2], one[5], one[1], one[2], one[4]],
            "two": [two[0], two[3], base[2], base[3], two[2], two[1], one[4]],
        }
        for model, rows in expected.items():
            found = aligned.tensor(model, name)
            assert found.dtype == torch.bfloat16
            assert aligned.shape(model, name) == tuple(found.shape) == (7, 16)
            assert torch.equal(found, torch.stack(rows).bfloat16())
    assert aligned.taken == {"base": 3, "one": 1, "two": 3}
    assert aligned.dtype("one", EMBEDDING) == torch.bfloat16


def test_other_tensors_are_as_stored(three: tuple[dict[str, Path], dict[str, dict[str, Tensor]]]) -> None:
    """Only what has a row per token is touched; an unknown source is named."""
    paths, stored = three
    aligned = Aligned(paths, "two")
    name = "model.layers.1.mlp.up_proj.weight"

    assert torch.equal(aligned.tensor("one", name), stored["one"][name])
    assert aligned.shape("one", name) == tuple(stored["one"][name].shape)
    with pytest.raises(ModelError, match="source 'none' is not among"):
        aligned.tensor("none", name)


def test_a_chosen_vocabulary_is_kept_as_it_is(three: tuple[dict[str, Path], dict[str, dict[str, Tensor]]]) -> None:
    """The chosen model's own tensors come back unchanged; the others lose what it lacks."""
    paths, stored = three
    aligned = Aligned(paths, "two", "base")

    assert torch.equal(aligned.tensor("two", EMBEDDING), stored["two"][EMBEDDING])
    assert torch.equal(aligned.tensor("one", HEAD), stored["one"][HEAD][[0, 2, 1, 3]])
    assert aligned.files == {}
    assert aligned.template.path == paths["two"]
    assert aligned.template.config["vocab_size"] == 4
    assert aligned.template.shape(HEAD) == (4, 16)


def test_the_tokenizer_of_a_union_knows_every_token(
    three: tuple[dict[str, Path], dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """The saved file loads, and gives each token the number of its row."""
    aligned = Aligned(three[0], "union", "base")
    file = tmp_path / "tokenizer.json"
    file.write_text(aligned.files["tokenizer.json"])
    tokenizer = Tokenizer.from_file(str(file))

    assert {token: tokenizer.token_to_id(token) for token in aligned.tokens} == aligned.tokens
    assert tokens_of(tmp_path) == aligned.tokens


@pytest.mark.parametrize(("extra", "rows"), [([], 8), (["d"], 8), (["d", "e"], 8)])
def test_padding_stays_where_all_agree(extra: list[str], rows: int, family: dict[str, Path], tmp_path: Path) -> None:
    """As many rows in every model: the target has as many, padding in its place; new tokens take it."""
    one = variant(family["a"], tmp_path / "one", ["u", "a", "b"], padding=5, seed=1)
    two = variant(family["a"], tmp_path / "two", ["u", "b", "a", *extra], padding=5 - len(extra), seed=2)
    aligned = Aligned({"one": tmp_path / "one", "two": tmp_path / "two"}, "union")
    found = aligned.tensor("one", EMBEDDING)

    assert found.shape[0] == rows
    assert torch.equal(found[3 + len(extra) :], one[EMBEDDING][3 + len(extra) :])
    assert torch.equal(aligned.tensor("two", EMBEDDING)[:3], two[EMBEDDING][[0, 2, 1]])


def test_padding_goes_where_models_disagree(family: dict[str, Path], tmp_path: Path) -> None:
    """Another number of rows: one row per token is left."""
    variant(family["a"], tmp_path / "one", ["u", "a"], padding=2)
    variant(family["a"], tmp_path / "two", ["u", "a"], padding=1)

    assert Aligned({"one": tmp_path / "one", "two": tmp_path / "two"}, "one").shape("two", HEAD) == (2, 16)


def test_a_union_is_in_the_stated_order() -> None:
    """First vocabulary first, then each one's own new tokens by their numbers."""
    assert union([{"b": 4, "a": 0}, {"z": 1, "y": 0}, {"y": 0, "x": 7}]) == {"b": 4, "a": 0, "y": 5, "z": 6, "x": 7}


def test_lists_of_pieces_and_added_tokens_are_read(tmp_path: Path) -> None:
    """Unigram vocabularies are lists; added tokens have numbers of their own."""
    data = {"model": {"vocab": [["u", 0.0], ["a", -1.0]]}, "added_tokens": [{"id": 9, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))

    assert tokens_of(tmp_path) == {"u": 0, "a": 1, "<x>": 9}


def test_what_differs_in_more_is_refused(family: dict[str, Path], tied: dict[str, Path], tmp_path: Path) -> None:
    """Another architecture, other shapes, no tokenizer.json: named with the source."""
    with pytest.raises(ModelError, match=r"source 'gpt' .*: model_type is gpt2 but llama in 'a'"):
        Aligned({"a": family["a"], "gpt": tied["gpt0"]}, "union")
    shutil.copytree(family["a"], tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Aligned({"a": family["a"], "bare": tmp_path / "bare"}, "union")
    for given, says in (({}, "is not in both"), ({"model.norm.weight": torch.ones(3).bfloat16()}, "has shape")):
        folder = tmp_path / says.replace(" ", "-")
        shutil.copytree(family["a"], folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        tensors |= given
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=says):
            Aligned({"a": family["a"], "other": folder}, "union")

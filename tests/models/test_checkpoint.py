"""Reading model folders: whole ones as transformers does, broken ones with one clear line."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import ModelError
from evomerge.models.checkpoint import Checkpoint, check_compatible
from evomerge.models.resident import OnDisk, Resident
from tests.models.folders import edit_config, make_llama

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder's one file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Cut a folder's one file into two shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: f for f, part in parts.items() for name in part}}))
    (folder / WEIGHTS).unlink()


def reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Cut into shards and change the index."""
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def cut(folder: Path, keep: int) -> None:
    """Keep so many bytes of the weights (from the end if negative)."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])


# --- whole folders


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_transformers_reads(copy: Path, sharded: bool) -> None:
    """Names, shapes, dtypes and values are those of the live model, from one file or from shards."""
    live = AutoModelForCausalLM.from_pretrained(copy, dtype="auto").state_dict()
    if sharded:
        shard(copy)

    found = Checkpoint(copy)

    assert found.names == tuple(sorted(live))
    assert found.parameters == sum(tensor.numel() for tensor in live.values())
    assert found.depth == 3
    for name, tensor in live.items():
        assert found.shape(name) == tuple(tensor.shape)
        assert found.dtype(name) == tensor.dtype == torch.bfloat16
        assert torch.equal(found.tensor(name), tensor)


def test_tied_models_have_no_head_of_their_own(tied: dict[str, Path], tmp_path: Path) -> None:
    """A tied head is no tensor, stored or not; a different one under a config that ties is refused."""
    plain = Checkpoint(tied["llama0"])
    assert "lm_head.weight" not in plain.names
    twice = shutil.copytree(tied["llama0"], tmp_path / "twice")
    rewrite(twice, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))

    assert Checkpoint(twice).names == plain.names
    check_compatible(plain, {"twice": Checkpoint(twice)})

    rewrite(twice, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"ties the head to the embedding, but 'lm_head\.weight' is another tensor"):
        Checkpoint(twice)


def test_where_the_config_is_silent_a_stored_head_is_its_own(copy: Path) -> None:
    """Without tie_word_embeddings the tensors decide."""
    edit_config(copy, tie_word_embeddings=None)

    assert not Checkpoint(copy).architecture.tied
    assert "lm_head.weight" in Checkpoint(copy).names


def test_the_config_is_a_copy(copy: Path) -> None:
    """What a caller does to the config changes nothing."""
    found = Checkpoint(copy)
    found.config["rope_parameters"]["rope_theta"] = 5
    found.config["num_hidden_layers"] = 9

    assert found.config == json.loads((copy / "config.json").read_text())


def test_the_fingerprint_is_of_the_content(copy: Path, family: dict[str, Path], tmp_path: Path) -> None:
    """A copy elsewhere has the same fingerprint; another config, tensor or source has another."""
    first = Checkpoint(copy).fingerprint
    moved = shutil.copytree(copy, tmp_path / "elsewhere")
    assert Checkpoint(moved).fingerprint == first == Checkpoint(family["a"]).fingerprint
    assert len(first) == 16

    found = {first, Checkpoint(family["b"]).fingerprint}
    rewrite(copy, lambda t: t["model.norm.weight"].mul_(2))
    found.add(Checkpoint(copy).fingerprint)
    edit_config(moved, rms_norm_eps=1e-3)
    found.add(Checkpoint(moved).fingerprint)
    assert len(found) == 4


def test_the_fingerprint_samples_great_files(copy: Path) -> None:
    """Of a file beyond 1 MiB, a change throughout and a change of the last tensor are both seen."""

    def fingerprint(change: Callable[[torch.Tensor], object]) -> str:
        tensor = torch.zeros(600_000)
        change(tensor)
        rewrite(copy, lambda t: t.update({"model.embed_tokens.weight": tensor}))
        return Checkpoint(copy).fingerprint

    changes: list[Callable[[torch.Tensor], object]] = [
        lambda t: t, lambda t: t.add_(1), lambda t: t[-1].add_(1), lambda t: t[:4].add_(1),
    ]  # fmt: skip
    assert len({fingerprint(change) for change in changes}) >= 3


def test_tokenizer_files_are_listed(family: dict[str, Path], tied: dict[str, Path]) -> None:
    """The tokenizer's files and a digest of its vocabulary; a folder without any has neither."""
    names = [file.name for file in Checkpoint(family["a"]).tokenizer_files]

    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert Checkpoint(family["a"]).vocabulary == Checkpoint(family["b"]).vocabulary is not None
    assert Checkpoint(tied["gpt0"]).vocabulary is None
    assert repr(Checkpoint(family["a"])) == f"Checkpoint({str(family['a'])!r})"


def test_a_slow_tokenizer_has_a_vocabulary(copy: Path) -> None:
    """Without tokenizer.json the vocabulary files themselves are compared."""
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text("{}")
    first = Checkpoint(copy).vocabulary
    (copy / "merges.txt").write_text("a b")

    assert first is not None
    assert Checkpoint(copy).vocabulary != first


# --- broken folders


def no_config(folder: Path) -> None:  # noqa: D103  # the name says it, as for the table's lambdas
    (folder / "config.json").unlink()


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, r"a: no such folder; give the path of a model folder"),
    "no config": (no_config, r"has no config\.json"),
    "broken config": (lambda p: (p / "config.json").write_text('{"a": 1,'), r"config\.json: broken JSON at line 1"),
    "config not utf-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{}"), r"config\.json: cannot be read"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), r"expected a JSON object, got list"),
    "no depth": (lambda p: edit_config(p, num_hidden_layers=None), r"lacks num_hidden_layers"),
    "silly depth": (lambda p: edit_config(p, num_hidden_layers="three"), r"num_hidden_layers must be .* got 'three'"),
    "no vocabulary": (lambda p: edit_config(p, vocab_size=None), r"lacks vocab_size"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), r"has no model\.safetensors and no"),
    "a pickle": (
        lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"),
        r"has pytorch_model\.bin but no safetensors; pickles are never loaded, convert it",
    ),
    "empty weights": (lambda p: cut(p, 0), r"model\.safetensors: not a safetensors file, or cut off in its header"),
    "cut header": (lambda p: cut(p, 100), r"not a safetensors file, or cut off in its header"),
    "cut tensors": (lambda p: cut(p, -10), r"model\.safetensors: has \d+ bytes where its header says \d+; copy it"),
    "surplus bytes": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"x"),
        r"has \d+ bytes where its header says \d+",
    ),
    "giant header": (lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"), r"not a safetensors file"),
    "header not a map": (lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]"), r"not a safetensors"),
    "header entry odd": (
        lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 7) + b'{"a":1}'), r"not a safetensors",
    ),
    "a git pointer": (
        lambda p: (p / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        r"not a safetensors file",
    ),
    "odd dtype": (
        lambda p: (p / WEIGHTS).write_bytes(
            struct.pack("<Q", 52) + b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'[:52].ljust(52) + b"x"
        ),
        r"not a safetensors|has dtype F4",
    ),
    "missing shard": (
        lambda p: (shard(p), (p / "model-2.safetensors").unlink()),
        r"index\.json: names the shard 'model-2\.safetensors', which is not in the folder",
    ),
    "shard elsewhere": (
        lambda p: reindex(p, lambda m: m.update(dict.fromkeys(m, "../x.safetensors"))), r"names the shard '\.\./x",
    ),
    "tensor not in shard": (
        lambda p: reindex(p, lambda m: m.update({"lm_head.weight": "model-2.safetensors"})),
        r"model-2\.safetensors: lacks tensor 'lm_head\.weight' that the index places there",
    ),
    "tensor not in index": (
        lambda p: reindex(p, lambda m: m.pop("lm_head.weight")),
        r"has tensor 'lm_head\.weight' that the index does not",
    ),
    "index without map": (lambda p: (p / INDEX).write_text("{}"), r"weight_map must map tensor names to files"),
    "broken index": (lambda p: (p / INDEX).write_text("{"), r"index\.json: broken JSON"),
    "layer without tensors": (
        lambda p: edit_config(p, num_hidden_layers=4), r"there are 4 layers, but layer 3 has no tensor",
    ),
    "layer beyond config": (lambda p: edit_config(p, num_hidden_layers=2), r"is of layer 2, .* there are 2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_broken_folder_gives_one_line(copy: Path, kind: str) -> None:
    """Every way in which a model folder can be wrong is one line with the file and the way out."""
    damage, says = MALFORMED[kind]
    damage(copy)

    with pytest.raises(ModelError, match=says) as caught:
        check_compatible(None, {"a": Checkpoint(copy)})

    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_unknown_tensors_and_sources_are_named(family: dict[str, Path]) -> None:
    """Asking for what is not there gives the nearest name."""
    with pytest.raises(ModelError, match=r"no tensor 'model\.norm\.wieght'; did you mean 'model\.norm\.weight'"):
        Checkpoint(family["a"]).shape("model.norm.wieght")
    for sources in (OnDisk(family), Resident(family)):
        with pytest.raises(ModelError, match=r"source 'bsae' is not .*; did you mean 'base'"):
            sources.tensor("bsae", "model.norm.weight")
        with pytest.raises(ModelError, match="no tensor 'x'"):
            sources.tensor("base", "x")


def test_a_shard_that_vanishes_is_an_error(copy: Path) -> None:
    """A file that is lost or overwritten after the folder was opened is named."""
    found = Checkpoint(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"cannot read 'lm_head\.weight'"):
        found.tensor("lm_head.weight")


# --- models that do not fit each other


def other_tokenizer(folder: Path) -> None:
    """Exchange two characters of a folder's vocabulary."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def other_depth(folder: Path) -> None:
    """Make a model of two layers."""
    shutil.rmtree(folder)
    make_llama(folder, 0, layers=2)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "depth": (other_depth, "the number of layers is 2 but 3 in 'base'"),
    "type": (lambda p: edit_config(p, model_type="mistral"), "model_type is mistral but llama"),
    "tied": (
        lambda p: (rewrite(p, lambda t: t.pop("lm_head.weight")), edit_config(p, tie_word_embeddings=True)),
        "tie_word_embeddings is True but False",
    ),
    "vocabulary size": (lambda p: edit_config(p, vocab_size=21), "vocab_size is 21 but 20"),
    "hidden": (lambda p: edit_config(p, hidden_size=32), "hidden size is 32 but 16"),
    "missing tensor": (
        lambda p: rewrite(p, lambda t: t.pop("model.norm.weight")), r"lacks tensor 'model\.norm\.weight'",
    ),
    "extra tensor": (
        lambda p: rewrite(p, lambda t: t.update({"model.extra": torch.zeros(2)})), r"has tensor 'model\.extra' that",
    ),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({"model.norm.weight": torch.zeros(8)})),
        r"tensor 'model\.norm\.weight' has shape \(8,\) but \(16,\) in 'base'",
    ),
    "tokenizer": (other_tokenizer, "its tokenizer has another vocabulary than 'base'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_models_that_do_not_fit_are_refused(copy: Path, family: dict[str, Path], kind: str) -> None:
    """The source, what differs and from which model stand in one line."""
    change, says = UNFIT[kind]
    change(copy)

    with pytest.raises(ModelError, match=says) as caught:
        check_compatible(Checkpoint(family["base"]), {"b": Checkpoint(family["b"]), "a": Checkpoint(copy)})

    assert str(caught.value).startswith(f"source 'a' ({copy})")
    with pytest.raises(ModelError, match=says):
        OnDisk({"base": family["base"], "a": copy})


def test_models_that_fit_are_accepted(family: dict[str, Path], copy: Path) -> None:
    """One architecture, one tokenizer; a source without tokenizer is taken at its word."""
    (copy / "tokenizer.json").unlink()
    checkpoints = {name: Checkpoint(path) for name, path in family.items()}
    check_compatible(checkpoints.pop("base"), {**checkpoints, "bare": Checkpoint(copy)})

    with pytest.raises(ModelError, match="no model is given"):
        check_compatible(None, {})

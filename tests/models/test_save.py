"""Writing model folders: what transformers loads again, whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import CandidateError, EvomergeError, ModelError
from evomerge.models import save as save_module
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize
from evomerge.models.resident import OnDisk, Resident
from evomerge.models.save import save
from evomerge.recipe import Blend, Recipe, Route, Source
from tests.full import full_beyond


def recipe(names: tuple[str, ...], depths: tuple[int, ...], dtype: str = "bfloat16", method: str = "linear") -> Recipe:
    """Return a recipe with equal weights everywhere; the first name is the base."""
    given = Blend(method=method, weights=dict.fromkeys(names[1:], 0.5), parameters={})
    return Recipe(
        sources=tuple(Source(name=name, path=name) for name in names[1:]), base=Source(name=names[0], path=names[0]),
        routes=(Route(blend=given),), layers=depths, dtype=dtype,
    )  # fmt: skip


LLAMA = recipe(("base", "a", "b"), (0, 1, 2))


def logits(folder: Path) -> Tensor:
    """Return a plain transformers model's logits for a fixed prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


def live(template: Path, stream: Iterator[tuple[str, Tensor]]) -> Tensor:
    """Return the logits of a model that the stream was copied into, without any file."""
    model = AutoModelForCausalLM.from_pretrained(template, dtype="auto").eval()
    missing = model.load_state_dict(dict(stream), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_a_saved_model_answers_like_the_live_one(family: dict[str, Path], tmp_path: Path, shard_bytes: int) -> None:
    """From one file or from many shards transformers gives the logits of the stream itself, bit for bit."""
    sources = Resident(family)
    save(
        materialize(LLAMA, sources), Checkpoint(family["base"]), tmp_path / "out",
        dtype="bfloat16", shard_bytes=shard_bytes,
    )  # fmt: skip

    assert torch.equal(logits(tmp_path / "out"), live(family["base"], materialize(LLAMA, sources)))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 3) == (shard_bytes == 4000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(shards) > 1)
    if len(shards) > 1:
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        assert all(shard.stat().st_size < 4000 + 2000 for shard in shards)
    found = Checkpoint(tmp_path / "out")
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in materialize(LLAMA, sources))


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_tied_models_stay_tied(tied: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The head is not written, and the loaded model's head is its embedding."""
    paths = {name: tied[name] for name in (f"{kind}0", f"{kind}1")}
    template = Checkpoint(tied[f"{kind}0"])
    made = recipe((f"{kind}0", f"{kind}1"), tuple(range(template.depth)), "float32", "task_arithmetic")

    save(materialize(made, OnDisk(paths)), template, tmp_path / "out", dtype="float32")

    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_another_depth_is_another_config(family: dict[str, Path], tmp_path: Path) -> None:
    """A model with repeated layers loads with the depth that it has, and its layers are the source's."""
    depths = (0, 2, 2, 1, 1)
    save(
        materialize(recipe(("base", "a", "b"), depths), Resident(family)), Checkpoint(family["base"]),
        tmp_path / "out", dtype="bfloat16", depths=depths,
    )  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == model.config.num_hidden_layers == 5
    one = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(one, model.model.layers[2].mlp.up_proj.weight)
    assert not torch.equal(one, model.model.layers[3].mlp.up_proj.weight)


def test_the_folder_holds_what_a_user_needs(family: dict[str, Path], tmp_path: Path) -> None:
    """Config with the declared dtype, generation config, a tokenizer that works, further files, nothing else."""
    made = recipe(("base", "a", "b"), (0, 1, 2), "float16")
    save(
        materialize(made, Resident(family)), Checkpoint(family["base"]), tmp_path / "deep" / "out",
        dtype="float16", extra_files={"README.md": "# täxt\n", "recipe.yaml": "a: 1\n"},
    )  # fmt: skip
    out = tmp_path / "deep" / "out"

    before, after = (json.loads((folder / "config.json").read_text()) for folder in (family["base"], out))
    assert after == before | {"dtype": "float16"}
    assert (out / "README.md").read_text(encoding="utf-8") == "# täxt\n"
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"] == [2]
    assert {file.name for file in out.iterdir()} == {
        "README.md", "recipe.yaml", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def broken(stream: Iterator[tuple[str, Tensor]], problem: BaseException) -> Iterator[tuple[str, Tensor]]:
    """Yield five tensors and fail."""
    for _ in range(5):
        yield next(stream)
    raise problem


@pytest.mark.parametrize("problem", [CandidateError("x"), KeyboardInterrupt(), OSError("disk full")])
def test_an_interruption_leaves_nothing(family: dict[str, Path], tmp_path: Path, problem: BaseException) -> None:
    """Whatever ends the stream, no folder is left, neither half nor hidden."""
    stream = broken(materialize(LLAMA, Resident(family)), problem)

    with pytest.raises(type(problem)):
        save(stream, Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16", shard_bytes=2000)

    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_folder_that_looks_complete(family: dict[str, Path], tmp_path: Path) -> None:
    """A process that dies in the middle leaves only a hidden folder without config, and the next try succeeds."""
    pid = os.fork()
    if pid == 0:
        save_module._flush = lambda folder: os._exit(9)
        save(materialize(LLAMA, Resident(family)), Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9

    assert [entry.name for entry in tmp_path.iterdir()] == [f".out.partial-{pid}"]
    save(materialize(LLAMA, Resident(family)), Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16")
    assert Checkpoint(tmp_path / "out").depth == 3


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_one_line_and_leaves_nothing(family: dict[str, Path], tmp_path: Path, size: int) -> None:
    """Whether it is a header, a config or a tensor that no longer fits, the line says how much room is needed."""
    stream = materialize(LLAMA, Resident(family))

    with full_beyond(size), pytest.raises(EvomergeError) as caught:
        save(stream, Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: cannot be written (File too large); free space, then write the model again: "
        "it needs 0.0 MB"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_or_replaced_whole(family: dict[str, Path], tmp_path: Path) -> None:
    """Without `replace` nothing is touched; with it the old folder goes, but only when the new one is ready."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    template, sources = Checkpoint(family["base"]), Resident(family)

    with pytest.raises(ModelError, match="out: exists already; remove it or choose another folder"):
        save(materialize(LLAMA, sources), template, out, dtype="bfloat16")
    with pytest.raises(CandidateError):
        save(broken(materialize(LLAMA, sources), CandidateError("x")), template, out, dtype="bfloat16", replace=True)
    assert (out / "mine.txt").read_text() == "keep"

    save(materialize(LLAMA, sources), template, out, dtype="bfloat16", replace=True)
    assert not (out / "mine.txt").exists()
    assert Checkpoint(out).depth == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_keeps_the_old_folder(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that was to give way comes back if the new one cannot take its place."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        if "partial" in Path(source).name:
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(save_module.os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save(materialize(LLAMA, Resident(family)), Checkpoint(family["base"]), out, dtype="bfloat16", replace=True)

    assert (out / "mine.txt").read_text() == "keep"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_stream_that_does_not_fit_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Missing, unknown, doubled, misshapen and wrongly typed tensors are named, and nothing is written."""
    tensors = dict(materialize(LLAMA, Resident(family)))
    norm = "model.norm.weight"
    short = {name: tensor for name, tensor in tensors.items() if name != norm}
    streams = {
        "lacks 1 tensors, the first is 'model.norm.weight'": short.items(),
        "'model.extra' has no place": (*tensors.items(), ("model.extra", torch.zeros(1))),
        "'model.norm.weight' comes twice": (*tensors.items(), (norm, tensors[norm])),
        "'model.norm.weight' has shape": {**tensors, norm: torch.zeros(3)}.items(),
        "is torch.float32, but bfloat16 is declared": {**tensors, norm: tensors[norm].float()}.items(),
    }
    for says, stream in streams.items():
        with pytest.raises(ModelError, match=says):
            save(stream, Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16")

        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def odd(family: dict[str, Path], tmp_path: Path) -> Path:
    """Return a model folder with tensors that are not floating point, have no dimension, or no entry."""
    folder = tmp_path / "odd"
    shutil.copytree(family["base"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.ids"] = torch.arange(3)
    tensors["model.layers.1.mlp.flag"] = torch.tensor(True)
    tensors["model.layers.2.mlp.none"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    tensors["model.layers.2.mlp.byte"] = torch.tensor([7, 8, 9], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_order_of_the_stream_changes_no_byte(odd: Path, tmp_path: Path, shard_bytes: int, dtype: str) -> None:
    """Backwards or forwards, the files are the same, and safetensors reads exactly the tensors that were given."""
    template = Checkpoint(odd)
    given = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(odd / "model.safetensors").items()
    }
    for folder, names in (("one", list(given)), ("two", list(given)[::-1])):
        stream = ((name, given[name]) for name in names)
        save(stream, template, tmp_path / folder, dtype=dtype, shard_bytes=shard_bytes)

    files = sorted((tmp_path / "one").glob("*.safetensors*"))
    assert (len(files) > 4) == (shard_bytes == 3000)
    found: dict[str, Tensor] = {}
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                assert shard.metadata() == {"format": "pt"}
                found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  # it is no mapping
    assert set(found) == set(given)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_every_tensor_is_aligned(odd: Path, tmp_path: Path) -> None:
    """Headers are multiples of 8 bytes, and each tensor begins at a multiple of its entry's size."""
    save(load_file(odd / "model.safetensors").items(), Checkpoint(odd), tmp_path / "out", dtype="bfloat16")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    sizes = {"I64": 8, "BF16": 2, "U8": 1, "BOOL": 1, "F32": 4}
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]

    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - length


def test_numbers_that_are_no_floats_keep_their_dtype(odd: Path, tmp_path: Path) -> None:
    """A tensor of another one than the template stores is refused."""
    tensors = load_file(odd / "model.safetensors")
    tensors["model.layers.0.mlp.ids"] = tensors["model.layers.0.mlp.ids"].int()

    with pytest.raises(ModelError, match=r"mlp.ids' is torch.int32, but int64 is declared"):
        save(tensors.items(), Checkpoint(odd), tmp_path / "out", dtype="bfloat16")


def test_a_tensor_is_on_the_disk_before_the_next_one_comes(family: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is kept of what has been written: the caller may use its memory again."""
    tensors = dict(materialize(LLAMA, Resident(family)))
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()), dtype=torch.bfloat16)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, buffer[: tensor.numel()].copy_(tensor.flatten()).view(tensor.shape)

    save(stream(), Checkpoint(family["base"]), tmp_path / "out", dtype="bfloat16")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

"""Resident sources: views of the files that processes share, and what is computed about them once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.errors import ModelError
from evomerge.models import resident
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.resident import InMemory, Kept, Knowledge, OnDisk, Resident
from evomerge.operators.tables import Magnitudes
from tests.models.folders import edit_config

KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def of_kind(kind: torch.dtype, *shape: int) -> Tensor:
    """Return random values of a dtype."""
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randn(*shape, generator=generator) * 3
    return values.abs().to(kind) if kind in (torch.uint8, torch.bool) else values.to(kind)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)


def rewritten(folder: Path, to: Path, tensors: dict[str, Tensor]) -> Path:
    """Return a copy of a model folder with other tensors, of one layer."""
    shutil.copytree(folder, to)
    edit_config(to, num_hidden_layers=1, tie_word_embeddings=True)
    for file in to.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_mapped_tensors_are_those_of_the_files(family: dict[str, Path]) -> None:
    """Every tensor of every source has the bits, shape and dtype that safetensors reads."""
    sources = Resident(family)

    for name, folder in family.items():
        stored = load_file(folder / "model.safetensors")
        assert sources.names == tuple(sorted(stored))
        for key, tensor in stored.items():
            found = sources.tensor(name, key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(found), bits(tensor))
            assert sources.shape(name, key) == tuple(tensor.shape)
            assert sources.dtype(name, key) == tensor.dtype


@pytest.mark.parametrize("odd", [0, 1, 3, 5, 7])
def test_every_dtype_at_every_offset(odd: int, family: dict[str, Path], tmp_path: Path) -> None:
    """Files whose data start anywhere are read right, views or not."""
    tensors = {f"model.layers.0.{str(kind)[6:]}.weight": of_kind(kind, 3, 5) for kind in KINDS}
    folder = rewritten(family["base"], tmp_path / "odd", tensors)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size] + b" " * odd
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])

    found = Checkpoint(folder)

    for name, tensor in load_file(file).items():
        mapped = found.mapped(name)
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(mapped), bits(tensor)), name


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_tensors_after_odd_bytes(shift: int, family: dict[str, Path], tmp_path: Path) -> None:
    """A tensor whose first byte stands where its dtype allows no view is copied, and has the same bits."""
    few, wide = of_kind(torch.int8, shift), of_kind(torch.float32, 4, 2)
    data = bytes(few.view(torch.uint8).tolist()) + bytes(bits(wide).tolist())
    header = {
        "model.layers.0.a.weight": {"dtype": "I8", "shape": [shift], "data_offsets": [0, shift]},
        "model.layers.0.b.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [shift, shift + 32]},
    }
    folder = rewritten(family["base"], tmp_path / "odd", {"x": wide})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    found = Checkpoint(folder)

    assert torch.equal(found.mapped("model.layers.0.a.weight"), few)
    assert torch.equal(found.mapped("model.layers.0.b.weight"), wide)


def test_scalars_and_tensors_without_entries(family: dict[str, Path], tmp_path: Path) -> None:
    """A tensor of no dimension and one of no entries are views too."""
    tensors = {"model.layers.0.one": torch.tensor(2.5), "model.layers.0.none": torch.zeros(0, 3)}
    found = Checkpoint(rewritten(family["base"], tmp_path / "odd", tensors))

    assert found.mapped("model.layers.0.one").item() == 2.5
    assert found.mapped("model.layers.0.none").shape == (0, 3)


MEASURE = """
import sys, torch
from pathlib import Path
from evomerge.models.resident import Resident

def memory(kind, file="/proc/self/status"):
    return sum(int(line.split()[1]) for line in open(file) if line.startswith(kind + ":"))

paths = {str(i): Path(path) for i, path in enumerate(sys.argv[1:])}
Resident({"0": paths["0"]})
before = memory("RssAnon")
sources = Resident(paths)
opened = memory("RssAnon") - before
for source in paths:
    total = sum(float(sources.tensor(source, name).view(torch.int16)[::64].sum()) for name in sources.names)
touched = memory("RssAnon") - before
print("read", flush=True)
sys.stdin.readline()
mapped, inside = {}, False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        inside = line.strip().endswith(".safetensors")
    elif inside and first in ("Rss:", "Pss:", "Private_Dirty:"):
        mapped[first] = mapped.get(first, 0) + int(line.split()[1])
print(opened, touched, mapped["Rss:"], mapped["Pss:"], mapped["Private_Dirty:"])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is measured in /proc")
def test_sources_take_no_memory_of_their_own(family: dict[str, Path], tmp_path: Path) -> None:
    """Opening and reading 120 MB takes none of a process's own memory, and two processes share the pages."""
    paths = []
    for i in range(3):
        zeros = torch.zeros(10_000_000, dtype=torch.bfloat16)
        tensors = {f"model.layers.0.{k}.weight": zeros + k + i for k in range(2)}
        paths.append(str(rewritten(family["base"], tmp_path / str(i), tensors)))
    command = [sys.executable, "-c", MEASURE, *paths]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen(command, **pipes, text=True, cwd=Path.cwd()) for _ in range(2)]
    assert all(each.stdout is not None and each.stdout.readline() == "read\n" for each in started)
    # Measured while both are there: the last to be told is still waiting while the first looks.
    first = started[0].stdin
    assert first is not None
    first.write("\n")
    first.flush()
    assert started[0].stdout is not None
    opened, touched, resident_kb, shared_kb, dirty = map(int, started[0].stdout.readline().split())
    for each in started:
        each.communicate("\n")

    assert opened < 10_000
    assert touched < 10_000
    assert resident_kb > 100_000
    assert shared_kb < 0.7 * resident_kb
    assert dirty == 0


def test_models_that_do_not_fit_and_names_that_are_not_there(family: dict[str, Path], tmp_path: Path) -> None:
    """A source of other tensors is refused; a source or a tensor that is not there is told, with the nearest name."""
    stored = load_file(family["a"] / "model.safetensors")
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in stored.items()}
    with pytest.raises(ModelError):
        Resident({"base": family["base"], "odd": rewritten(family["a"], tmp_path / "odd", wide)})
    for sources in (Resident(family), OnDisk(family)):
        with pytest.raises(ModelError, match="did you mean 'base'"):
            sources.tensor("bases", sources.names[0])
    with pytest.raises(ModelError, match="has no tensor"):
        Resident(family).tensor("a", "model.norm.wight")


def test_tensors_go_to_a_device_while_the_budget_allows(family: dict[str, Path]) -> None:
    """A tensor of all sources is moved or none is, in the order of names, and never beyond the budget."""
    whole = Resident(family, "meta")
    size = {name: 3 * Resident(family).tensor("a", name).nbytes for name in whole.names}
    assert whole.bytes_moved == sum(size.values())
    assert {whole.tensor(source, name).device.type for source in family for name in whole.names} == {"meta"}

    for budget in (0, size[whole.names[0]], sum(size.values()) // 2, sum(size.values())):
        part, room = Resident(family, "meta", budget), budget
        for name in part.names:
            fits = size[name] <= room
            room -= size[name] * fits
            assert {part.tensor(source, name).device.type for source in family} == {"meta" if fits else "cpu"}
        assert part.bytes_moved == budget - room <= budget


def test_the_size_of_sources(family: dict[str, Path]) -> None:
    """`bytes` counts every tensor of every source once."""
    expected = sum(t.nbytes for path in family.values() for t in load_file(path / "model.safetensors").values())

    assert Resident(family).bytes == expected


# --- knowledge


def models(entries: int = 5000) -> InMemory:
    """Return a base and two sources of two tensors, in memory."""
    generator = torch.Generator().manual_seed(0)
    base = {"x": torch.randn(entries, generator=generator), "y": torch.randn(20, 30, generator=generator)}
    return InMemory(
        {
            "base": base,
            **{n: {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in base.items()} for n in "ab"},
        },
        depth=1,
    )


@pytest.mark.parametrize("piece", [1 << 20, 999])
def test_knowledge_is_what_a_direct_computation_gives(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Magnitudes of task vectors and inner products, with and without a base, for other pieces too."""
    monkeypatch.setattr(resident, "_PIECE", piece)
    sources = models()
    known = Knowledge(sources)
    for name in sources.names:
        base, a, b = (sources.tensor(source, name).flatten() for source in ("base", "a", "b"))
        ordered = (a - base).abs().sort(descending=True).values
        for count in (1, 10, 599):
            assert known.magnitudes(((("a", name), ("base", name)),)).kth(count) == float(ordered[count - 1])
        full = torch.stack([a, b]).double()
        delta = torch.stack([a - base, b - base]).double()
        torch.testing.assert_close(known.gram((("a", name), ("b", name)), None), full @ full.T, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            known.gram((("a", name), ("b", name)), ("base", name)), delta @ delta.T, rtol=1e-12, atol=0
        )


def test_knowledge_may_be_about_tensors_of_different_names() -> None:
    """A source's tensor of one layer may meet that of another layer of another source."""
    first, second = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 5.0]), "z": torch.ones(2)}
    sources = InMemory({"a": first, "b": second}, 1)

    assert Knowledge(sources).magnitudes(((("a", "x"), ("b", "z")),)).kth(1) == 1.0
    assert Knowledge(sources).gram((("a", "x"), ("b", "z")), ("b", "x")).tolist() == [[13.0, 16.0], [16.0, 20.0]]


def test_what_is_known_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question reads no tensor; size and time are told, and grow with what is asked."""
    sources = models()
    known = Knowledge(sources)
    reads: list[tuple[str, str]] = []
    tensor = sources.tensor
    monkeypatch.setattr(sources, "tensor", lambda source, name: reads.append((source, name)) or tensor(source, name))
    assert (known.nbytes, known.seconds) == (0, 0.0)

    table = known.magnitudes(((("a", "y"), ("base", "y")),))
    after, seconds = len(reads), known.seconds
    assert table is known.magnitudes(((("a", "y"), ("base", "y")),))
    assert len(reads) == after > 0
    assert known.nbytes == table.nbytes > 0
    assert known.seconds == seconds > 0
    pair = (("a", "y"), ("b", "y"))
    first = known.gram(pair, None)
    after = len(reads)
    assert known.gram(pair, None) is first
    assert len(reads) == after
    assert known.gram(pair, ("base", "y")) is not first
    assert known.nbytes == table.nbytes + 2 * 4 * 8
    assert known.seconds > seconds


def test_sources_that_are_kept_in_memory_know_and_those_on_disk_do_not(family: dict[str, Path]) -> None:
    """A one-off merge from disk keeps nothing; resident sources keep what they are asked."""
    assert OnDisk(family).kept is None
    kept = Resident(family).kept
    assert kept is not None
    name = Resident(family).names[0]
    assert isinstance(kept.magnitudes(((("a", name), ("base", name)),)), Magnitudes)


def test_magnitudes_of_several_tensors_together() -> None:
    """Pairs asked together are one table, of all their entries, and each is computed once."""
    sources = models()
    known = Knowledge(sources)
    pairs = tuple((("a", name), ("base", name)) for name in sources.names)

    together = known.magnitudes(pairs)

    ordered = torch.cat([(sources.tensor("a", n) - sources.tensor("base", n)).flatten().abs() for n in sources.names])
    ordered = ordered.sort(descending=True).values
    assert together.entries == len(ordered)
    assert [together.kth(count) for count in (1, 500, 5599)] == [float(ordered[i]) for i in (0, 499, 5598)]
    assert known.magnitudes(pairs) is together
    assert known.magnitudes(pairs[:1]) is known.magnitudes(pairs[:1])


def test_unions_are_forgotten_and_right_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many unions are kept; one that was dropped is made anew, the same."""
    monkeypatch.setattr(resident, "_UNIONS", 1)
    known = Knowledge(models())
    one = tuple((("a", name), ("base", name)) for name in ("x", "y"))
    two = tuple((("b", name), ("base", name)) for name in ("x", "y"))

    first = known.magnitudes(one)
    assert known.magnitudes(two).kth(7) != first.kth(7)
    again = known.magnitudes(one)

    assert again is not first
    assert [again.kth(count) for count in (1, 77, 5000)] == [first.kth(count) for count in (1, 77, 5000)]


def stored(folders: dict[str, Path], cache: Path, say: Callable[[str], None] = lambda text: None) -> Kept:
    """Return what is kept about sources, with tables in a folder."""
    sources = Resident(folders)
    sources.store(cache, say)
    assert sources.kept is not None
    return sources.kept


def test_tables_outlive_the_process(family: dict[str, Path], tmp_path: Path) -> None:
    """Stored tables are not built again, answer alike, and go by what is in the models, not by their names."""
    said: list[list[str]] = [[], [], [], []]
    names = [name for name in Resident(family).names if Resident(family).dtype("a", name).is_floating_point]

    def answers(turn: int, **change: Path) -> list[float]:
        kept = stored(family | change, tmp_path / "kept", said[turn].append)
        return [kept.magnitudes(((("a", name), ("base", name)),)).kth(9) for name in names]

    plain = Resident(family).kept
    assert plain is not None
    expected = [plain.magnitudes(((("a", name), ("base", name)),)).kth(9) for name in names]
    assert answers(0) == answers(1) == expected
    assert len(said[0]) == 1
    assert said[0][0].startswith(f"magnitude tables of a: {len(names)} tensors")
    assert said[1] == []

    assert answers(2, a=family["b"]) != expected
    assert len(said[2]) == 1

    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert answers(3) == expected
    assert len(said[3]) == 1


def test_binned_tables_outlive_the_process_too(family: dict[str, Path], tmp_path: Path) -> None:
    """A stored table of bins still tells the entries of one bin apart, by the entries themselves."""
    name, generator = "model.layers.0.x.weight", torch.Generator().manual_seed(0)
    made = {who: {name: torch.randn(300, 200, generator=generator)} for who in "ab"}
    folders = {who: rewritten(family["base"], tmp_path / who, tensors) for who, tensors in made.items()}
    ordered = (made["a"][name] - made["b"][name]).abs().flatten().sort(descending=True).values

    for _ in range(2):
        kept = stored(folders, tmp_path / "kept")
        table = kept.magnitudes(((("a", name), ("b", name)),))
        assert not table.exact
        assert [table.kth(count) for count in (1, 1234, 59_999)] == [float(ordered[i]) for i in (0, 1233, 59_998)]


def test_a_folder_that_cannot_be_written_to_keeps_no_tables(family: dict[str, Path], tmp_path: Path) -> None:
    """Tables are then built for this process alone."""
    (tmp_path / "file").write_text("in the way")
    kept = stored(family, tmp_path / "file")

    assert kept.magnitudes(((("a", "lm_head.weight"), ("base", "lm_head.weight")),)).entries > 0
    assert (tmp_path / "file").read_text() == "in the way"

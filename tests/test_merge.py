"""One merge from the command line: mergekit's own outputs, hand-written recipes, what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.models.statistics import digest_of
from evomerge.oneoff import OneOff
from evomerge.recipe import Source, read
from tests.models.folders import make_llama

PACK = Path(os.environ.get("EVOMERGE_ORACLES") or Path(__file__).parent / "data" / "oracles").resolve()
CASES = json.loads((PACK / "manifest.json").read_text(encoding="utf-8"))["checkpoint_cases"]


def run(*arguments: object, code: int = 0) -> str:
    """Run the command line and return what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models base, math and code."""
    root = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("base", "math", "code")):
        make_llama(root / name, seed)
    (root / "texts.txt").write_text("some text\n")
    return root


def recipe(zoo: Path, text: str, name: str = "recipe.yaml") -> Path:
    """Write a recipe into a folder beside the models."""
    (zoo / "recipes").mkdir(exist_ok=True)
    path = zoo / "recipes" / name
    path.write_text(text)
    return path


SHORT = """
sources: [{name: math, path: ../math}, {name: code, path: ../code}]
base: {name: base, path: ../base}
routes: [{blend: {method: ties, weights: {math: 1.0, code: 0.7}, parameters: {density: 0.3}}}]
dtype: bfloat16
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_file_of_mergekit_gives_its_tensors(
    case: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every recorded checkpoint comes out within its tolerance, with its names, dtypes and config."""
    monkeypatch.chdir(PACK)
    run("merge", case["yaml_file"], "--to", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(Path(case["output"]) / "model.safetensors")

    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert ours[name].shape == expected.shape
        allowed = case["tolerance"]["atol"] + case["tolerance"]["rtol"] * expected.double().abs()
        assert bool(((ours[name].double() - expected.double()).abs() <= allowed).all()), name
    config, recorded = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", Path(case["output"])))
    for key in ("num_hidden_layers", "vocab_size"):
        assert config[key] == recorded[key]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == config["vocab_size"]


def test_a_short_recipe_is_enough(zoo: Path) -> None:
    """Paths start at the file; the written recipe has fingerprints, and building from it gives the same bits."""
    path = recipe(zoo, SHORT)
    printed = run("merge", path, "--to", zoo / "short", "--threads", "1")
    again = zoo / "short" / "recipe.yaml"
    run("merge", again, "--to", zoo / "again")
    first, second = (load_file(zoo / name / "model.safetensors") for name in ("short", "again"))

    assert "math, code over base" in printed
    assert "thresholds" in printed
    assert "written in" in printed
    assert all(source.fingerprint for source in read(again).sources)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert f"digest `{read(again).digest}`" in (zoo / "short" / "README.md").read_text()
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert "digest" in run("check", path)


def test_the_arithmetic_is_the_one_of_the_recipe(zoo: Path) -> None:
    """W_0 + 0.5 D_1 in float32, as worked out by hand, where another dtype is asked for."""
    path = recipe(zoo, SHORT.replace("ties", "task_arithmetic").replace(", parameters: {density: 0.3}", "")
                  .replace("math: 1.0, code: 0.7", "math: 0.5"))  # fmt: skip
    run("merge", path, "--to", zoo / "plain", "--dtype", "float32")
    found, base, math = (load_file(zoo / name / "model.safetensors") for name in ("plain", "base", "math"))

    for name, tensor in found.items():
        expected = base[name].double() + 0.5 * (math[name].double() - base[name].double())
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)


def test_a_recipe_can_be_a_source(zoo: Path) -> None:
    """The result of an inner recipe is merged like a model that lies in a folder."""
    inner = "{routes: [{blend: {method: linear, weights: {math: 1.0, code: 1.0}}}], dtype: float32, version: 2, " \
            "sources: [{name: math, path: ../math}, {name: code, path: ../code}]}"  # fmt: skip
    path = recipe(zoo, f"""
sources: [{{name: mean, recipe: {inner}}}, {{name: base, path: ../base}}]
routes: [{{blend: {{method: linear, weights: {{mean: 1.0, base: 3.0}}}}}}]
dtype: float32
""")  # fmt: skip
    run("merge", path, "--to", zoo / "nested")
    found, base, math, code = (load_file(zoo / n / "model.safetensors") for n in ("nested", "base", "math", "code"))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (math[name].double() + code[name].double()) / 8 + base[name].double() * 0.75

    torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_layers_may_be_stacked(zoo: Path) -> None:
    """A model of more layers loads with as many in its config."""
    text = SHORT.replace("ties", "task_arithmetic").replace(", parameters: {density: 0.3}", "")
    run("merge", recipe(zoo, text + "layers: [0, 1, 1, 2]"), "--to", zoo / "deep")

    assert AutoModelForCausalLM.from_pretrained(zoo / "deep").config.num_hidden_layers == 4


def test_the_plan_counts_what_is_built(zoo: Path) -> None:
    """Entries, bytes, and one question about the whole, whose threshold takes two passes."""
    path = recipe(zoo, SHORT)
    job = OneOff(path)

    assert job.entries == sum(torch.Size(job.sources.shape("math", name)).numel() for name in job.sources.names)
    assert job.bytes == 2 * job.entries
    assert job.passes == 1
    assert "up to 2 for thresholds" in run("merge", path, "--to", zoo / "planned")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("ties", 3),
        ("iso_c", 1),  # whole tensors
        ("base | trim(0.5, scope=row) | mean", 1),  # whole rows
    ],
)
def test_only_lines_without_a_shape_are_built_side_by_side(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, line: str, count: int
) -> None:
    """As many tensors at once as there are threads, with the bits of one after the other."""
    text = SHORT.replace("method: ties", f"method: '{line}'").replace(", parameters: {density: 0.3}", "")
    path = recipe(zoo, text)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("evomerge.oneoff.fitting", lambda threads=threads: threads)
        job = OneOff(path)
        job.write(zoo / f"{count} {line[:5]} {threads}")
        found.append(load_file(zoo / f"{count} {line[:5]} {threads}" / "model.safetensors"))

    assert job.together == count
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three models of 100 MB."""
    root = tmp_path_factory.mktemp("large")
    hidden, inner, layers, rows = 512, 1536, 14, 12000
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, inner)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": rows,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    for seed, name in enumerate(("base", "math", "code")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.rand(shape, generator=generator).sub_(0.5).bfloat16() for n, shape in shapes.items()}
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))
    return root


PEAK = """
import re, sys
from pathlib import Path
import torch
from evomerge.oneoff import OneOff

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
torch.ones(1 << 20).bfloat16().float().sum()  # loads what torch loads late
job = OneOff(Path(sys.argv[1]))
before = memory("VmRSS")
job.write(Path(sys.argv[2]))
print(before, memory("VmHWM"), job.peak, job.bytes, *[name for name in sys.modules if name == "transformers"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "line",
    ["task_arithmetic", "base | trim(0.2, scope=tensor) | elect | mean", "base | trim(0.5, scope=row) | mean"],
    ids=["pieces", "questions", "whole"],
)
def test_the_stated_memory_is_enough(large: Path, line: str) -> None:
    """The process grows by no more than the plan says (and 16 MB), and never loads transformers."""
    text = SHORT.replace("method: ties", f"method: '{line}'").replace(", parameters: {density: 0.3}", "")
    command = [sys.executable, "-c", PEAK, recipe(large, text, f"{line[:8]}.yaml"), large / line[:20]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, stated, size = map(int, done.stdout.split())

    assert size > 90 * 10**6
    assert after - before <= stated + 16 * 10**6
    if "row" not in line:  # in pieces: about a few tensors as stored
        assert stated < 2 * size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("ties", "tiess"), "unknown method 'tiess'"),
        (("../math", "../maths"), "did you mean 'math'"),
        (("path: ../code", "path: ../code, fingerprint: abc"), "not the one that the recipe was made with"),
        (("dtype: bfloat16", "dtype: int8"), "dtype 'int8' is not known"),
        (("base: {name: base, path: ../base}", ""), "needs a base"),
        (("routes", "ruotes"), "did you mean 'routes'"),
        (("routes: [{", "routes: [{groups: [mlp], "), "fits no route"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(change: tuple[str, str], says: str, zoo: Path) -> None:
    """One line with the file, exit code 2, no folder."""
    path = recipe(zoo, SHORT.replace(*change), "wrong.yaml")
    printed = run("merge", path, "--to", zoo / "wrong", code=2)

    assert says in printed
    assert "wrong.yaml" in printed
    assert printed.count("\n") == 1
    assert not (zoo / "wrong").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("ties, weights: {math: 1.0, code: 0.7}, parameters: {density: 0.3}", "regmean, weights: {math: 1.0}"),
         "regmean takes statistics (gram); name a file of texts as `calibration"),
        (("dtype", "calibration: {name: texts, path: nowhere.txt}\ndtype"), "nowhere.txt: texts cannot be read"),
        (("dtype", "calibration: {name: texts, path: ../texts.txt, fingerprint: abc}\ndtype"),
         "calibration 'texts' in ../texts.txt is not the one that the recipe was made with"),
        (("{name: math, path: ../math}", "{name: math, recipe: {sources: [{name: m, path: ../math}], dtype: float32, "
          "routes: [{blend: {method: fisher, weights: {m: 1.0}}}]}}"),
         "source 'math': recipe.routes[0].blend.method: fisher takes statistics (fisher)"),
    ],
)  # fmt: skip
def test_statistics_are_of_known_texts(change: tuple[str, str], says: str, zoo: Path) -> None:
    """Without texts, without their file, or with others nothing is merged; `check` says so in the same line."""
    path = recipe(zoo, SHORT.replace(*change), "wrong.yaml")
    printed = run("merge", path, "--to", zoo / "wrong", code=2)

    assert says in printed
    assert "wrong.yaml" in printed
    assert printed.count("\n") == 1
    assert run("check", path, code=2) == printed
    assert not (zoo / "wrong").exists()


def test_a_recipe_keeps_its_texts(zoo: Path) -> None:
    """The written recipe has the fingerprint of the texts, at the outer and the inner level; then no others will do."""
    texts = zoo / "own.txt"
    texts.write_text("one\n")
    inner = "{sources: [{name: math, path: ../math}], calibration: {name: same, path: ../own.txt}, dtype: float32, " \
            "routes: [{blend: {method: linear, weights: {math: 1.0}}}]}"  # fmt: skip
    text = SHORT.replace("path: ../math", f"recipe: {inner}").replace("{name: math, recipe", "{name: inner, recipe")
    text = text.replace("math: 1.0, code", "inner: 1.0, code") + "calibration: {name: texts, path: ../own.txt}"
    run("merge", recipe(zoo, text), "--to", zoo / "texted")
    written = read(zoo / "texted" / "recipe.yaml")
    inside = written.sources[0].recipe

    assert written.calibration == Source(name="texts", path=str(texts), fingerprint=digest_of(texts))
    assert inside is not None
    assert inside.calibration == Source(name="same", path=str(texts), fingerprint=digest_of(texts))
    texts.write_text("two\n")
    assert "is not the one that the recipe was made with" in run("check", zoo / "texted" / "recipe.yaml", code=2)


def test_a_folder_that_exists_is_kept(zoo: Path) -> None:
    """Nothing is overwritten."""
    printed = run("merge", recipe(zoo, SHORT), "--to", zoo / "base", code=2)

    assert "exists already" in printed


def test_files_of_mergekit_are_checked_too(zoo: Path) -> None:
    """`check` says what a file would build, or what is wrong with it."""
    text = "{merge_method: linear, models: [{model: ../math, parameters: {weight: 1}}]}"

    assert "3 layers, bfloat16, of math" in run("check", recipe(zoo, text, "theirs.yaml"))
    assert "no recipe can say it" in run("check", recipe(zoo, text[:-1] + ", modules: {a: 1}}"), code=2)

"""The documentation is true: what it shows is run here, block by block."""

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from evomerge import stages
from evomerge.cli import app
from evomerge.evaluation.harness import HarnessFile
from evomerge.evaluation.labelled import TaskFile
from evomerge.evaluation.unlabelled import MEASURES
from evomerge.experiment import ExperimentFile, load
from evomerge.fitness.registry import ESTIMATORS
from evomerge.fitness.schedule import SCHEDULES
from evomerge.genome import from_unit
from evomerge.methods import canonical, method
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import plan
from evomerge.models.mergekit import is_mergekit
from evomerge.models.mergekit import read as read_mergekit
from evomerge.oneoff import OneOff
from evomerge.operators import merge
from evomerge.recipe import Recipe
from evomerge.recipe import read as read_recipe
from evomerge.value import parse
from tests.models.folders import make_llama

ROOT = Path(__file__).resolve().parent.parent
METHODS = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
SCORES = (ROOT / "docs/fitness.md").read_text(encoding="utf-8")
HARNESS = (ROOT / "docs/lm-eval.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the command lines that stand in indented blocks, without their comments."""
    return [line.split("#")[0].strip() for line in re.findall(r"^    (evomerge .*)$", text, re.MULTILINE)]


def of_kind(kind: str, text: str = METHODS) -> list[str]:
    """Return the YAML blocks of a kind: recipe, mergekit, space, experiment, part of one, or task."""
    return [block for block in blocks(text, "yaml") if kind_of(block) == kind]


def kind_of(block: str) -> str:
    """Return what a YAML block is, told by its keys."""
    data = yaml.safe_load(block)
    told = {"routes": "recipe", "merge_method": "mergekit", "slots": "space", "budget": "experiment"}
    told |= dict.fromkeys(("prompt", "measure", "lm_eval"), "task")
    told |= dict.fromkeys(("objectives", "estimator", "schedule", "bank", "gates", "workers"), "part")
    return next(kind for key, kind in told.items() if key in data)


def run(command: list[str]) -> str:
    """Run a command line that must succeed and return what it prints."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the models and texts that the documentation speaks of; statistics are kept there too."""
    folder = tmp_path_factory.mktemp("desk")
    letters = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqr")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for seed, name in enumerate(("base", "math", "code", "german")):
        make_llama(folder / "models" / name, seed, layers=6)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "models" / name)
    (folder / "texts.txt").write_text("a b c d e f\nq r q p o n m\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def built(desk: Path, block: str, name: str) -> dict[str, torch.Tensor]:
    """Merge by a block as `evomerge merge` does, load the model, and return its tensors."""
    (desk / f"{name}.yaml").write_text(block)
    run(["check", f"{name}.yaml"])
    run(["merge", f"{name}.yaml", "--to", name])
    AutoModelForCausalLM.from_pretrained(desk / name)
    return load_file(desk / name / "model.safetensors")


def given(desk: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a model."""
    return load_file(desk / "models" / name / "model.safetensors")


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """No block of the page on methods is left out, and each kind is there."""
    assert {kind_of(block) for block in blocks(METHODS, "yaml")} == {"recipe", "mergekit", "space"}
    assert set(re.findall(r"^```(\w+)$", METHODS, re.MULTILINE)) == {"text", "python", "yaml"}
    assert METHODS.count("```") == 2 * sum(len(blocks(METHODS, name)) for name in ("text", "python", "yaml"))


def test_the_examples_in_python_give_what_they_show() -> None:
    """All of them in order, as one session."""
    session = "\n".join(block for block in blocks(METHODS, "python") if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(session, {}, "methods.md", None, None)
    found = doctest.DocTestRunner(verbose=False).run(test)

    assert found.attempted > 5
    assert found.failed == 0


def test_the_first_line_shown_is_that_of_its_method() -> None:
    """The page opens with TIES as it is in the table."""
    assert blocks(METHODS, "text") == [stages.METHODS["ties"].line + "\n"]


@pytest.mark.parametrize("line", commands(METHODS))
def test_the_commands_of_the_page_on_methods_run(line: str, desk: Path) -> None:
    """Each prints something and exits with 0."""
    assert run(line.split()[1:])


@pytest.mark.parametrize("place", range(len(of_kind("recipe")) + len(of_kind("mergekit"))))
def test_every_recipe_shown_builds_a_model_that_loads(place: int, desk: Path) -> None:
    """Ours and mergekit's, by the same command; all values are finite."""
    block = [*of_kind("recipe"), *of_kind("mergekit")][place]
    found = built(desk, block, f"shown-{place}")

    assert found.keys() == given(desk, "math").keys()
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_layer_swapping_takes_each_layer_from_where_it_says(desk: Path) -> None:
    """Both ends and the outer layers are German's, the middle is math's, what lies between is the average."""
    block = next(block for block in of_kind("recipe") if "german" in block)
    found, german, math = built(desk, block, "swapped"), given(desk, "german"), given(desk, "math")

    for name, tensor in found.items():
        layer = re.search(r"\.(\d)\.", name)
        if layer is None or layer[1] in "05":
            assert torch.equal(tensor, german[name])
        elif layer[1] in "23":
            assert torch.equal(tensor, math[name])
        else:
            torch.testing.assert_close(tensor, ((german[name].double() + math[name]) / 2).bfloat16())


def test_a_nested_recipe_is_one_merge_after_the_other(desk: Path) -> None:
    """It gives what two merges by the public entry give."""
    block = next(block for block in of_kind("recipe") if "recipe:" in block)
    found = built(desk, block, "nested")
    base, math, code = ({n: t.float() for n, t in given(desk, name).items()} for name in ("base", "math", "code"))
    expected = merge("lines", [merge("ties", [math, code], base)], base)

    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=1e-2, atol=1e-3)


def experiment(desk: Path, space: Any) -> Path:
    """Write an experiment on the models of the desk."""
    data = {
        "name": "shown", "seed": 0, "dtype": "float32", "space": space, "driver": {"name": "random"},
        "models": {"base": "models/base", "sources": {"math": "models/math", "code": "models/code"}},
        "objectives": [{"task": "arithmetic"}], "budget": {"candidates": 4},
    }  # fmt: skip
    (desk / "experiment.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return desk / "experiment.yaml"


@pytest.mark.parametrize("block", of_kind("space"))
def test_every_search_space_shown_makes_recipes(block: str, desk: Path) -> None:
    """Its corners and its middle decode to recipes whose every tensor has a way to be built."""
    space = load(experiment(desk, yaml.safe_load(block))).space
    checkpoint = Checkpoint(desk / "models/base")

    assert {"edit", "gate", "combine", "density.math", "trim.scope"} <= {axis.name for axis in space.axes}
    for at in (0.0, 0.5, 0.999):
        recipe = space.decode(from_unit(space.axes, [at] * len(space.axes)))
        assert len(plan(recipe, checkpoint.names, checkpoint.depth)) == len(checkpoint.names)


def test_a_line_of_ones_own_goes_wherever_a_name_goes(desk: Path) -> None:
    """The line of the first recipe shown is good for `merge`, a recipe and a search space alike, with equal results."""
    block = of_kind("recipe")[0]
    blend = read_recipe(_written(desk, block)).routes[0].blend
    base, math, code = ({n: t.float() for n, t in given(desk, name).items()} for name in ("base", "math", "code"))
    direct = merge(blend.method, [math, code], base, [1.0, 0.7], {"density": [0.2, 0.4]})
    space = load(experiment(desk, {"methods": [blend.method]})).space

    assert "|" in blend.method
    for name, tensor in built(desk, block, "own").items():
        torch.testing.assert_close(tensor, direct[name].bfloat16(), rtol=1e-2, atol=1e-3)
    assert space.decode((1.0, 0.7)).routes[0].blend.method == blend.method


def _written(desk: Path, block: str) -> Path:
    (desk / "block.yaml").write_text(block)
    return desk / "block.yaml"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let no method be remembered from one table to another."""
    method.cache_clear()
    yield
    method.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_adding_a_method_is_the_one_line_shown(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With that line in the table the method is there, listed, checked, and merges as its stages do."""
    [line] = [block for block in blocks(METHODS, "python") if ">>>" not in block]
    assert line.count("\n") == 1
    table = Path(stages.__file__).read_text(encoding="utf-8").replace("_LINES = (\n", f"_LINES = (\n{line}")
    space: dict[str, Any] = {"__name__": "stages_with_one_more"}
    exec(compile(table, "stages.py", "exec"), space)
    [name] = space["METHODS"].keys() - stages.METHODS.keys()
    monkeypatch.setitem(stages.METHODS, name, space["METHODS"][name])  # type: ignore[arg-type]  # a dict underneath
    base = {"w": torch.zeros(4)}
    math, code = {"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}, {"w": torch.tensor([1.0, -2.0, -4.0, 0.5])}

    # Half of 8 entries of the model each: math keeps 3 and 2, code -2 and -4; the greater sum is elected.
    merged = merge(name, [math, code], base, parameters={"density": 0.5})["w"]
    assert merged.tolist() == [3.0, -2.0, -4.0, 0.0]
    assert f"\n{name}\n" in run(["ls", "methods"])
    assert stages.METHODS[name].line in run(["show", name])
    assert load(experiment(desk, {"methods": ["ties", name]})).space.axes[0].name == "method"


def conventions() -> list[tuple[str, str, dict[str, Any]]]:
    """Return the rows of the table on mergekit: its method, the method here, parameters."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| `(.+?)` with `(.+?)` \|$", METHODS, re.MULTILINE)
    return [(theirs, ours.replace("\\|", "|"), yaml.safe_load(given)) for theirs, ours, given in rows]


@pytest.mark.parametrize(("theirs", "ours", "parameters"), conventions())
def test_mergekits_defaults_are_those_of_the_table(
    theirs: str, ours: str, parameters: dict[str, Any], desk: Path
) -> None:
    """A file of mergekit's that gives no more than it must is read as the method and parameters of its row."""
    must = {"slerp": ", parameters: {t: 0.5}"}.get(theirs, "")
    listed = ["math", "code"] if theirs != "slerp" else ["code", "base"]
    models = ", ".join(f"{{model: models/{name}, parameters: {{weight: 1}}}}" for name in listed)
    path = _written(
        desk, f"{{merge_method: {theirs}, base_model: models/base, dtype: float32, models: [{models}]{must}}}"
    )
    recipe = read_mergekit(path)
    blend = next(iter(recipe.blends()))
    weights = dict.fromkeys(blend.weights, 1.0)

    assert is_mergekit(path)
    assert canonical(blend.method, weights, blend.parameters) == canonical(ours, weights, parameters)


def test_the_table_on_mergekit_is_read_whole() -> None:
    """Every row of it is a case of the test above."""
    start = METHODS.index("| method of mergekit's")
    assert len(conventions()) == METHODS[start : METHODS.index("\n\n", start)].count("\n") - 1


def test_the_settings_of_the_page_on_scores_are_read(desk: Path) -> None:
    """Each block is part of an experiment; the bank is made by the command that the page shows."""
    data = yaml.safe_load(experiment(desk, "task_vectors").read_text(encoding="utf-8"))
    data["models"] = {"base": str(desk / "models/base"), "sources": {"math": str(desk / "models/math")}}
    (desk / "lower").mkdir()
    path = desk / "lower" / "experiment.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    known = [f"arithmetic/{name}" for name in load(path).tasks["arithmetic"].ids("search")]
    rows = [[f"model-{i}", *(str(int(j < 5 * (i + 1))) for j in range(len(known)))] for i in range(9)]
    (desk / "leaderboard.csv").write_text("\n".join(",".join(row) for row in [["model", *known], *rows]) + "\n")
    for line in commands(SCORES):
        assert run(shlex.split(line)[1:])

    for block in blocks(SCORES, "yaml"):
        keys = yaml.safe_load(block)
        path.write_text(yaml.safe_dump(data | keys), encoding="utf-8")
        found = load(path)
        assert found.bank is None or found.bank.known == len(known)
        assert {*keys} <= {"estimator", "schedule", "bank"}


def test_the_page_on_scores_names_every_estimator_and_schedule() -> None:
    """Each is the first cell of a row of a table."""
    assert {*ESTIMATORS, *SCHEDULES} <= {*re.findall(r"^\| `(\w+)`", SCORES, re.MULTILINE)}


def test_the_page_on_lm_eval_names_every_key() -> None:
    """What is shown has known keys, and each key that there is stands in the table."""
    for block in blocks(HARNESS, "yaml"):
        parse(HarnessFile, yaml.safe_load(block), "lm-eval.md", AssertionError)
    told = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|[^|]*\|", HARNESS, re.MULTILINE)))
    assert {*told} == {field.name for field in fields(HarnessFile)}


def test_the_files_of_the_readme_are_what_it_says(desk: Path) -> None:
    """Experiment and tasks have known keys and values, the recipe builds a model, and the listed names exist."""
    wholes = [yaml.safe_load(block) for block in of_kind("experiment", README)]
    files = [wholes[0] | yaml.safe_load(block) for block in of_kind("part", README)] + wholes
    tasks = [yaml.safe_load(block) for block in of_kind("task", README)]
    for file in files:
        read = ExperimentFile.model_validate(file)
        tasks += [entry.task for entry in read.objectives if isinstance(entry.task, dict)]
    for keys in tasks:
        if "measure" in keys:
            assert keys["measure"] in MEASURES
            continue
        parse(HarnessFile if "lm_eval" in keys else TaskFile, keys, "README", AssertionError)
    recipes = of_kind("recipe", README)
    for i, block in enumerate(recipes):
        built(desk, block, f"readme-{i}")

    assert len(recipes) == 1
    assert blocks(README, "yaml") == [b for b in blocks(README, "yaml") if kind_of(b) in
                                      ("experiment", "part", "task", "recipe")]  # fmt: skip
    for line in commands(README):
        if line.split()[1] in ("ls", "show"):
            assert run(line.split()[1:])


def test_pages_link_to_files_that_exist() -> None:
    """Relative links of all pages at the top and in docs/."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_of_the_architecture_names_every_module() -> None:
    """Each module of the package stands there by its file name, and no file name there is without its file."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = blocks(text, "")[0].split("search_spaces/ ")[0]
    files = {path.name for path in (ROOT / "evomerge").rglob("*.py") if path.name != "__init__.py"}

    assert files <= set(re.findall(r"\w+\.py", tree))
    assert set(re.findall(r"\w+\.py", tree)) <= files


def test_a_recipe_shown_reads_as_a_recipe(desk: Path) -> None:
    """What is written beside a merged model is the recipe that was shown, found models and all."""
    job = OneOff(_written(desk, of_kind("recipe")[0]))

    assert isinstance(job.recipe, Recipe)
    assert [source.name for source in job.recipe.sources] == ["math", "code"]

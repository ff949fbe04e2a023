"""Searches over stacks on real models: run, kill in either stage, resume, export, merge again, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.experiment import load, read_stages
from evomerge.experiment.entries import PathEntry
from evomerge.hops import described, stack_of
from evomerge.ledger import Answered, Event, read, settled
from evomerge.models.anatomy import anatomy_of
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize
from evomerge.models.mergekit import read as read_mergekit
from evomerge.models.resident import OnDisk
from evomerge.pool import InlinePool, Job
from evomerge.recipe import Recipe, models_of
from evomerge.recipe import read as read_recipe
from evomerge.run import gains_of, open_run
from evomerge.search import Search, open_pool, prepare, reference
from evomerge.worker import ModelWorker, WorkerSetup

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "experiments/zoo"
SOURCES = {name: str(ZOO / name) for name in ("base", "strings", "cipher")}
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 0,
    "models": {"sources": {f"the-{name}": path for name, path in SOURCES.items()}},
    "space": "path",
    "objectives": [{"task": "arithmetic"}, {"task": "cipher"}, {"property": "depth"}],
    "driver": {"name": "nsga2", "population": 12},
    "budget": {"candidates": 12},
    "schedule": {"name": "fixed", "items": 12},
    "splits": {"search": 40, "validation": 30, "test": 30},
    "finalists": 6,
    "dtype": "float32",
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a small search over stacks and return its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False), encoding="utf-8")
    return path


def cli(*arguments: str | Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """Run a command whose input must be refused, and return the one line that it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    return line


def events_of(run: Path) -> list[Event]:
    """Return the ledger of a run."""
    return list(read(run / "ledger.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small run that went through, and what was printed."""
    folder = tmp_path_factory.mktemp("stacks")
    printed = cli("run", write(folder), "--runs", folder)
    return folder / "small", printed


def test_a_run_says_what_stacks_it_searches_and_what_the_probes_found(whole: tuple[Path, str]) -> None:
    """The plan has operations and bounds, the report a row for each layer of the primary source."""
    run, printed = whole
    state = open_run(run)
    probes = [event for event in state.asked if event.origin == "probe"]

    assert "3 edits (drop, repeat, insert, swap, move) of the-base's 4 layers, 1 to 6 layers" in printed
    assert [event.label for event in probes] == [f"{kind} {at}" for kind in ("drop", "repeat") for at in range(4)]
    assert "Layer probes" in printed
    gains = gains_of(state.objectives, state.asked, state.told)
    primary = {task: score.value for task, score in state.scores(0, "search").items()}
    for event in probes:
        kind, at = event.label.split()
        own = {task: score.value for task, score in state.scores(event.candidate, "search").items()}
        assert gains[kind][int(at)] == pytest.approx(sum(own[task] - primary[task] for task in primary) / len(primary))
        assert f"{gains[kind][int(at)]:+.3f}" in printed


def test_the_reference_lies_beyond_every_stack(whole: tuple[Path, str]) -> None:
    """A stack of the most layers still counts: the corner of depth is one layer more."""
    run, _ = whole

    assert reference(load(run / "experiment.yaml"))[2] == 6 + 1


def test_answers_count_layer_passes_and_the_comparison_of_ledgers_leaves_them_out(whole: tuple[Path, str]) -> None:
    """Each has what was run and spared; by tokens, what was spared is there too."""
    run, _ = whole
    answers = [event for event in events_of(run) if isinstance(event, Answered)]

    assert all(event.layers["run"] > 0 for event in answers)
    spared, made = (sum(event.layers[name] for event in answers) for name in ("spared", "run"))
    assert spared > 0
    assert f"{made:,} run, {spared:,} spared by kept hidden states ({spared / (spared + made):.0%}, by" in whole[1]
    assert all(not event.layers for event in settled(answers) if isinstance(event, Answered))


def test_without_kept_states_the_ledger_is_the_same(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Bit for bit, margins included; and nothing is spared."""
    run, _ = whole
    cli("run", write(tmp_path, workers={"prefixes_gb": 0.0}), "--runs", tmp_path)
    events = events_of(tmp_path / "small")

    assert settled(events) == settled(events_of(run))
    assert not any(event.layers["spared"] for event in events if isinstance(event, Answered))


def exported(run: Path) -> list[Path]:
    """Return the folders of the exported models."""
    return sorted(path for path in (run / "pareto").iterdir() if path.is_dir())


def test_an_exported_stack_is_plain_and_of_its_own_depth(whole: tuple[Path, str]) -> None:
    """Plain transformers loads it, its config has as many layers as the recipe, and it holds no code."""
    run, _ = whole
    assert exported(run)

    for folder in exported(run):
        recipe = read_recipe(folder / "recipe.yaml")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == len(recipe.layers) == len(model.model.layers)
        stack = stack_of(recipe)
        assert stack is not None
        assert f"A stack of {len(stack.hops)} layers ({described(stack)})" in (folder / "README.md").read_text()
        assert described(stack) in (run / "pareto/README.md").read_text()
        assert not list(folder.glob("*.py"))
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_a_scaled_stack_is_merged_again_and_by_mergekits_file(whole: tuple[Path, str], tmp_path: Path) -> None:
    """`export` of a scaled candidate, `merge` of its recipe, and its mergekit file read back: all the same tensors."""
    run, _ = whole
    experiment = load(run / "experiment.yaml")
    searched = [event for event in open_run(run).asked if event.genome is not None]
    number = next(e.candidate for e in searched if experiment.space.decode(e.genome or ()).scaled)
    cli("export", run, "--front", str(number), "--to", tmp_path / "out")
    folder = tmp_path / "out" / f"candidate-{number}"
    cli("merge", folder / "recipe.yaml", "--to", tmp_path / "again")
    theirs = read_mergekit(folder / "mergekit_config.yml")
    built = dict(materialize(theirs, OnDisk({n: Path(s.path) for n, s in models_of(theirs).items()})))

    first, again = Checkpoint(folder), Checkpoint(tmp_path / "again")
    assert theirs.scales == ()
    assert first.names == again.names == tuple(sorted(built))
    for name in first.names:
        assert torch.equal(first.tensor(name), again.tensor(name))
        torch.testing.assert_close(first.tensor(name), built[name], rtol=1e-6, atol=1e-7)
    plain = read_recipe(folder / "recipe.yaml")
    assert "merge_method: passthrough" in (folder / "mergekit_config.yml").read_text()
    assert plain.scaled


def test_a_resolved_experiment_is_the_same_experiment(tmp_path: Path) -> None:
    """What a run writes down has its identity: scales left out, sizes measured, an incumbent, a run as a source."""
    for space in (
        {"kind": "path", "scale": False},
        {"kind": "path", "matching": True},
        {"kind": "path", "stack": ["the-base:0-2", "the-cipher:2-3"], "depth": {"low": 4, "high": 6}},
        {"kind": "sakana", "primary": "the-cipher", "repetitions": 1},
    ):
        experiment = load(write(tmp_path, space=space))
        text = yaml.safe_dump(experiment.file.model_dump(mode="json", exclude_none=True), sort_keys=False)
        (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
        assert load(tmp_path / "resolved.yaml").identity == experiment.identity


def test_matching_measures_what_layers_take_and_return(tmp_path: Path) -> None:
    """Each layer takes what the one before it returns; the first takes the embedding, as plain transformers has it."""
    experiment = load(write(tmp_path, space={"kind": "path", "matching": True, "primary": "the-base"}))
    sizes: Mapping[str, Any] = experiment.file.space.sizes  # type: ignore[union-attr]  # a path entry
    model = AutoModelForCausalLM.from_pretrained(ZOO / "base").float()

    assert set(sizes) == {"the-base", "the-strings", "the-cipher"}
    for returned, taken in sizes.values():
        assert len(returned) == len(taken) == 4
        assert taken[1:] == returned[:-1]
    weight = model.get_input_embeddings().weight
    assert weight.square().mean(-1).sqrt().min() <= sizes["the-base"][1][0] <= weight.square().mean(-1).sqrt().max()
    hop = experiment.space.decode(_swap(experiment, 2, "the-strings"))
    stack = stack_of(hop)
    assert stack is not None
    step = 2.0**-4
    expected = sizes["the-strings"][1][2] / sizes["the-base"][0][1]
    assert stack.hops[2].scale == round(expected / step) * step


def _swap(experiment: Any, at: int, source: str) -> Any:
    return experiment.space.edits.edit({"op": "swap", "at": at, "source": source})


# Stages.

STAGES = [
    {"name": "blend", "space": "task_vectors_uniform", "budget": {"candidates": 10}},
    {
        "name": "stack",
        "models": {"sources": {"winner": "run:blend", "the-cipher": SOURCES["cipher"]}},
        "space": {"kind": "path", "edits": 2},
        "budget": {"candidates": 10},
    },
]
STAGED: dict[str, Any] = {
    key: given for key, given in SMALL.items() if key not in ("name", "space", "budget", "models", "objectives")
} | {
    "name": "staged",
    "models": {
        "base": SOURCES["base"],
        "sources": {"the-strings": SOURCES["strings"], "the-cipher": SOURCES["cipher"]},
    },
    "objectives": [{"task": "arithmetic"}, {"task": "cipher"}],
    "baselines": {"lambdas": [0.3]},
    "driver": {"name": "nsga2", "population": 10},
    "stages": STAGES,
}


def staged(folder: Path, **changes: Any) -> Path:
    """Write a small experiment in stages and return its path."""
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(STAGED | changes, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a staged run that went through, and what was printed."""
    folder = tmp_path_factory.mktemp("staged")
    printed = cli("run", staged(folder), "--runs", folder)
    return folder / "staged", printed


def test_the_winner_of_a_stage_is_the_primary_source_of_the_next(both: tuple[Path, str]) -> None:
    """It is the merge with the best mean on validation, as a recipe, and was not exported."""
    folder, printed = both
    first, second = open_run(folder / "blend"), load(folder / "stack/experiment.yaml")
    winner = second.space.sources[0]
    merges = [i for i in first.front() if first.asked[i].origin != "source"]
    best = max(merges, key=lambda i: sum(s.value for s in first.scores(i, "validation").values()))

    assert "stage 1 of 2: blend" in printed
    assert "stage 2 of 2: stack" in printed
    assert winner.name == "winner"
    assert winner.recipe is not None
    assert winner.recipe.digest == first.asked[best].recipe
    assert not (folder / "blend/pareto").exists()
    assert "2 of 2 stages have begun" in cli("status", folder)
    assert "Layer probes" in cli("report", folder)
    own = open_run(folder / "stack").scores(0, "validation")
    for task, score in first.scores(best, "validation").items():
        assert own[task].value == pytest.approx(score.value, abs=0.07)  # two of thirty: other batches, other last bits


def test_models_of_the_second_stage_are_exported_from_both_recipes(both: tuple[Path, str]) -> None:
    """A stack of a merge's layers is a plain folder, and `merge` makes it again from its recipe alone."""
    folder, _ = both
    number = next(e.candidate for e in open_run(folder / "stack").asked if e.origin == "probe")
    cli("export", folder / "stack", "--front", str(number), "--to", folder / "out")
    model = folder / "out" / f"candidate-{number}"
    cli("merge", model / "recipe.yaml", "--to", folder / "again")
    one, two = Checkpoint(model), Checkpoint(folder / "again")

    assert AutoModelForCausalLM.from_pretrained(model).config.num_hidden_layers == 3
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)
    assert "is a recipe itself" in (model / "README.md").read_text()


@pytest.mark.parametrize("stage", ["blend", "stack"])
def test_a_staged_run_that_is_killed_in_a_stage_goes_on(both: tuple[Path, str], tmp_path: Path, stage: str) -> None:
    """SIGKILL in the middle of the stage; `resume` on the whole ends with the ledgers of the uninterrupted run."""
    whole, _ = both
    ledger = tmp_path / "staged" / stage / "ledger.jsonl"
    command = [sys.executable, "-m", "evomerge", "run", str(staged(tmp_path)), "--runs", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while (not ledger.is_file() or ledger.read_bytes().count(b"\n") < 12) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=60) == -signal.SIGKILL
    assert len(events_of(ledger.parent)) < len(events_of(whole / stage))

    cli("resume", tmp_path / "staged")

    for name in ("blend", "stack"):
        mine, theirs = (settled(events_of(folder / name)) for folder in (tmp_path / "staged", whole))
        assert mine == theirs


def test_stages_are_checked_before_the_first_begins(tmp_path: Path) -> None:
    """A later stage is checked with a stand-in for what is not found yet; what is wrong names stage and key."""
    assert "good" in cli("check", staged(tmp_path))
    wrong = [dict(STAGES[0]), {**STAGES[1], "models": {"sources": {"winner": "run:blnd"}}}]
    assert "stages.1.models.sources.winner: no stage 'blnd' before it; did you mean 'blend'?" in refused(
        "check", staged(tmp_path, stages=wrong)
    )
    assert "stages.1: budgt: unknown key; did you mean 'budget'?" in refused(
        "check", staged(tmp_path, stages=[STAGES[0], {**STAGES[1], "budgt": {}}])
    )
    assert "each needs a name of its own" in refused("check", staged(tmp_path, stages=[STAGES[0], STAGES[0]]))
    assert read_stages(write(tmp_path)) is None


def test_a_run_as_a_source_is_found_by_number_knee_and_best(both: tuple[Path, str], tmp_path: Path) -> None:
    """`run:FOLDER@17` is that candidate; what is not there is one line with the way out."""
    folder, _ = both
    run = open_run(folder / "blend")
    number = next(event.candidate for event in run.asked if event.origin == "search")
    for which, expected in ((f"@{number}", {number}), ("@knee", set(run.front())), ("", set(run.front()))):
        models = {"sources": {"winner": f"run:{folder}/blend{which}"}}
        source = load(write(tmp_path, models=models)).space.sources[0]
        assert source.recipe is not None
        assert source.recipe.digest in {run.asked[i].recipe for i in expected}
    for which, line in (("@999", "has no candidate 999"), ("@first", "give a candidate's number, best or knee")):
        models = {"sources": {"winner": f"run:{folder}/blend{which}"}}
        assert line in refused("check", write(tmp_path, models=models))
    assert "no run lies here" in refused("check", write(tmp_path, models={"sources": {"winner": "run:nowhere"}}))


def test_a_source_run_whose_models_changed_is_refused(both: tuple[Path, str], tmp_path: Path) -> None:
    """The recipe was made with other files: said with both fingerprints."""
    folder, _ = both
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(ZOO / "strings", tmp_path / "strings")
    kept = yaml.safe_load((tmp_path / "moved/blend/experiment.yaml").read_text(encoding="utf-8"))
    kept["models"]["sources"]["the-strings"] = str(tmp_path / "strings")
    (tmp_path / "moved/blend/experiment.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    config = tmp_path / "strings/config.json"
    config.write_text(config.read_text() + "\n", encoding="utf-8")

    line = refused("check", write(tmp_path, models={"sources": {"winner": f"run:{tmp_path}/moved/blend"}}))

    assert "the recipe that was scored is" in line


# What cannot run.


def test_a_space_that_models_do_not_fit_is_refused_by_check(tmp_path: Path) -> None:
    """Width, heads, vocabulary, rotary base, keys and sources: one line each, before anything is built."""

    def changed(**keys: Any) -> Path:
        folder = tmp_path / "-".join(keys)
        if not folder.exists():
            shutil.copytree(ZOO / "strings", folder)
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    for keys, words in (
        ({"hidden_size": 32}, "hidden size is 32 but 64"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8 but 4"),
        ({"vocab_size": 99}, "vocab_size is 99"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1"),
    ):
        models = {"sources": {"one": str(ZOO / "base"), "other": str(changed(**keys))}}
        assert words in refused("check", write(tmp_path, models=models))
    for space, words in (
        ({"kind": "path", "primary": "the-bas"}, "primary: 'the-bas' is no source; did you mean 'the-base'?"),
        ({"kind": "path", "depth": {"low": 5}}, "depth: the incumbent has 4 layers, which is not within [5, 6]"),
        ({"kind": "path", "parameters": 10}, "more than 10"),
        ({"kind": "path", "stack": ["the-base:0-9"]}, "no source has layer 4 of 'the-base'"),
        ({"kind": "path", "stack": ["base:0"]}, "stack: 'base' is no source"),
        ({"kind": "path", "stack": ["0-3"]}, "must be SOURCE:FIRST-LAST"),
        ({"kind": "path", "scale": {"low": 0.7, "high": 1.3}}, "whole multiples of the step"),
        ({"kind": "path", "edit": 3}, "space.edit: unknown key; did you mean 'edits'?"),
        ({"kind": "hybrid", "blend": {"methods": ["ties"]}}, "takes task vectors; give models.base"),
        ({"kind": "hybrid", "blend": {"methods": ["linear"], "knot": 1}}, "space.blend.knot: unknown key"),
        ({"kind": "pth"}, "kind: unknown value 'pth'"),
    ):
        assert words in refused("check", write(tmp_path, space=space))


def test_layers_that_cannot_be_stacked_or_scaled_are_refused_by_name(tmp_path: Path) -> None:
    """OLMo2's layers take notice of their input's size: no scales; stacks without scales are good."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        config = Olmo2Config(
            vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        Olmo2ForCausalLM(config).save_pretrained(tmp_path / "olmo")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ZOO / "base" / name, tmp_path / "olmo" / name)
    models = {"sources": {"one": str(tmp_path / "olmo")}}

    assert "its layers take notice of the size of their input; give scale: false" in refused(
        "check", write(tmp_path, models=models)
    )
    assert "good" in cli("check", write(tmp_path, models=models, space={"kind": "path", "scale": False}))
    assert "sakana scales every hop" in refused("check", write(tmp_path, models=models, space="sakana"))
    assert anatomy_of(tmp_path / "olmo").additions == {}


def test_a_stack_whose_activations_are_not_finite_is_a_recorded_failure(tmp_path: Path) -> None:
    """Scales that overflow: the candidate fails with its reason, others do not, and the run completes."""
    experiment = load(write(tmp_path, budget={"candidates": 4}))
    setup = WorkerSetup(
        template=experiment.template,
        sources=experiment.folders,
        tasks=experiment.tasks,
        stacked=True,
        prefixes=10**8,
    )

    class Overflowing(ModelWorker):
        def ask(self, job: Job) -> Any:
            if job.candidate == 13:
                layers = len(job.recipe.layers)
                job = replace(job, recipe=replace(job.recipe, scales=(1e30,) * layers))
            if job.candidate == 14:
                job = replace(job, recipe=replace(job.recipe, layers=(*job.recipe.layers[:-1], 99)))
            return super().ask(job)

    with prepare(experiment, tmp_path / "run") as record, InlinePool(lambda: Overflowing(setup)) as pool:
        Search(experiment, record, pool).run()
    run = open_run(tmp_path / "run")

    assert run.finished is not None
    assert run.errors.keys() == {13, 14}
    assert "finite" in run.errors[13]
    assert "takes layer 99 of the-" in run.errors[14]


@pytest.mark.ray
def test_two_ray_workers_leave_the_ledger_of_one(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Who keeps which hidden states, and in which order stacks are asked, changes nothing."""
    run, _ = whole
    experiment = load(write(tmp_path, ray={"actors": 2}))
    with prepare(experiment, tmp_path / "run") as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()

    assert settled(events_of(tmp_path / "run")) == settled(events_of(run))


def test_a_hybrid_search_exports_stacks_of_blended_layers(tmp_path: Path) -> None:
    """Blended layers in another order, or beside a source's own, are exported, reloaded and merged again."""
    space = {"kind": "hybrid", "blend": {"methods": ["ties"], "knots": 2}, "edits": {"edits": 2}}
    path = write(tmp_path, models=STAGED["models"], space=space, baselines={"lambdas": [0.5]})
    cli("run", path, "--runs", tmp_path)
    run, experiment = open_run(tmp_path / "small"), load(path)
    recipes = {e.candidate: experiment.space.decode(e.genome) for e in run.asked if e.genome and e.origin != "source"}
    number = next(i for i, recipe in recipes.items() if _nested(recipe) and len(recipe.layers) != 4 and run.told[i])
    cli("export", tmp_path / "small", "--front", str(number), "--to", tmp_path / "out")
    folder = tmp_path / "out" / f"candidate-{number}"
    cli("merge", folder / "recipe.yaml", "--to", tmp_path / "again")
    one, two = Checkpoint(folder), Checkpoint(tmp_path / "again")

    assert len(recipes[number].layers) == one.depth
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == one.depth


def _nested(recipe: Recipe) -> bool:
    return any(source.recipe is not None for source in recipe.sources)



def test_the_page_on_stacking_shows_what_can_be_run(tmp_path: Path) -> None:
    """Every block of YAML is an experiment, or part of one, that `check` finds good on the quickstart's models."""
    text = (ROOT / "docs/stacking.md").read_text(encoding="utf-8")
    found = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    names = {"general": "base", "math": "strings", "german": "cipher"}

    assert len(found) == 3
    for form in found:
        data = {key: given for key, given in SMALL.items() if key not in ("space", "budget")} | form
        data["objectives"], data["schedule"], data["driver"] = SMALL["objectives"], SMALL["schedule"], SMALL["driver"]
        data["models"] = {"base": str(ZOO / "base"), "sources": {n: str(ZOO / path) for n, path in names.items()}}
        data["dtype"] = "float32"
        for stage in data.get("stages", []):
            if "models" in stage:
                stage["models"]["sources"]["math"] = str(ZOO / "strings")
        data.setdefault("budget", {"candidates": 5})
        path = tmp_path / "shown.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        assert "good" in cli("check", path)
    keys = set(PathEntry.model_fields) - {"kind", "sizes"}
    table = text.partition("### path")[2].partition("### Layer")[0]
    assert keys == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml")))
def test_every_experiment_that_ships_is_good(name: str) -> None:
    """`check` reads it and all that it refers to; of several stages each."""
    assert "good" in cli("check", name)


def test_the_published_search_has_its_published_settings() -> None:
    """Akiba 2024, 3.2 and 4.1: T + M^2 genes, r = 3, population 128 for 100 generations, 200 items, EvoJAX's 0.1."""
    experiment = load(ROOT / "experiments/sakana_dfs.yaml")
    layers = 2 * 6
    driver: Any = experiment.driver
    axes: Any = experiment.space.axes

    assert len(axes) == 3 * layers + layers**2
    assert driver.population == 128
    assert experiment.file.budget.candidates == 128 * 100
    assert all(driver.sigma * (axis.high - axis.low) == pytest.approx(0.1) for axis in axes)
    assert experiment.space.start == (0.2,) * 6 + (0.0,) * 30 + (0.0,) * layers**2
    assert experiment.file.schedule == {"name": "fixed", "items": 200}
    assert experiment.file.splits.validation == 200


def test_a_winner_whose_method_takes_statistics_is_stacked_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts go with its recipe: a later stage that names none builds the merge, and exports its stacks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts.txt").write_text("3+4\nabc>2=\nrev:abc=\n", encoding="utf-8")
    few = {"budget": {"candidates": 2}, "driver": {"name": "random", "batch": 2}}
    first = {**STAGES[0], **few, "space": {"methods": ["fisher"]}, "calibration": str(tmp_path / "texts.txt")}
    folder = tmp_path / "staged"
    cli("run", staged(tmp_path, stages=[first]), "--runs", tmp_path)
    searched = next(e.candidate for e in open_run(folder / "blend").asked if e.origin == "search")
    second = {**SMALL, **few, "name": "upon", "models": {"sources": {"winner": f"run:{folder}/blend@{searched}"}}}
    path = tmp_path / "upon.yaml"
    path.write_text(yaml.safe_dump(second, sort_keys=False), encoding="utf-8")
    cli("run", path, "--runs", tmp_path)
    run = open_run(tmp_path / "upon")
    probe = next(e.candidate for e in run.asked if e.origin == "probe")
    cli("export", tmp_path / "upon", "--front", str(probe), "--to", tmp_path / "out")

    assert not run.errors
    assert read_recipe(tmp_path / "out" / f"candidate-{probe}" / "recipe.yaml").calibration is not None

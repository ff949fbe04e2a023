"""Warm starts: what a run begins with beside the baselines, where it comes from, and that it is found again."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.drivers import Problem, Random
from evomerge.errors import ExperimentError, LedgerError
from evomerge.experiment import Experiment, load, read_stages
from evomerge.export import export_models
from evomerge.ledger import BASELINES, Asked, Event, Promoted, read, settled
from evomerge.models import mergekit
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize
from evomerge.models.resident import OnDisk
from evomerge.pool import InlinePool
from evomerge.recipe import Blend, Recipe, Route, Source, models_of, to_yaml
from evomerge.report import render_report
from evomerge.run import Run, open_run
from evomerge.search import Search, open_pool, planned, prepare
from evomerge.spaces.proposals import METHOD, WARM, Proposal, applicable, named_methods
from tests.toy import ToyWorker, toy

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "experiments" / "zoo"

SMALL: dict[str, Any] = {
    "seed": 0,
    "models": {"base": str(ZOO / "base"), "sources": {name: str(ZOO / name) for name in ("arithmetic", "cipher")}},
    "space": "task_vectors",
    "objectives": [{"task": "arithmetic"}, {"task": "cipher"}],
    "driver": {"name": "random", "batch": 3},
    "budget": {"candidates": 3},
    "baselines": {"lambdas": [0.5]},
    "splits": {"search": 12, "validation": 8, "test": 8},
    "finalists": 20,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the ledger's wait for the disk."""
    monkeypatch.setattr("evomerge.ledger.os.fsync", lambda handle: None)


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write a small experiment and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"name": name} | changes, sort_keys=False), encoding="utf-8")
    return path


def ran(experiment: Experiment, folder: Path) -> list[Event]:
    """Run an experiment of real models."""
    with prepare(experiment, folder) as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()
    return list(read(folder / "ledger.jsonl"))


def played(experiment: Experiment, folder: Path, worker: ToyWorker | None = None) -> list[Event]:
    """Run a toy experiment."""
    with prepare(experiment, folder) as record, InlinePool(lambda: worker or ToyWorker()) as pool:
        Search(experiment, record, pool).run()
    return list(read(folder / "ledger.jsonl"))


def asked_of(events: Sequence[Event], *origins: str) -> list[Asked]:
    """Return the candidates of some origins."""
    return [event for event in events if isinstance(event, Asked) and event.origin in origins]


# In a run, without models.


#: Weights of the toy's sources.
MIXED, LEFT = {"a": 0.6, "b": 0.4}, {"a": 0.9, "b": 0.05}


def warm_toy(**changes: Any) -> Experiment:
    """Return a toy experiment that begins with three merges, two of which its space can express."""
    plain = toy(**changes)
    good = plain.space.constant("task_arithmetic", {"a": 0.45, "b": 0.4})
    genome = plain.space.genome_of_constant("task_arithmetic", {"a": 0.45, "b": 0.4})
    return replace(
        plain,
        warm=(
            Proposal(origin="earlier", label="run first 7", genome=genome, recipe=good),
            Proposal(origin="file", label="mix.yml", genome=None, recipe=plain.space.constant("ties", MIXED)),
            Proposal(origin="method", label="lambda 0.2", genome=None, recipe=plain.space.constant("karcher", LEFT)),
        ),
    )


@pytest.mark.parametrize("schedule", [{"name": "fixed"}, {"name": "race", "first": 4, "alpha": 0.5}, None])
def test_warm_starts_run_after_the_baselines_and_count_as_merges(
    schedule: dict[str, Any] | None, tmp_path: Path
) -> None:
    """They have numbers, answers and losses, may be finalists, and are worth a file of their own, unlike baselines."""
    experiment = warm_toy(schedule=schedule)
    events = played(experiment, tmp_path)
    run = Run(events)
    own = asked_of(events, *WARM)
    baselines = asked_of(events, *BASELINES)

    assert [(event.origin, event.label) for event in own] == [(p.origin, p.label) for p in experiment.warm]
    assert [event.candidate for event in own] == [len(baselines) + i for i in range(3)]
    assert [event.recipe for event in own] == [p.recipe.digest for p in experiment.warm]
    assert all(run.told[event.candidate].losses is not None for event in own)
    validated = next(event for event in events if isinstance(event, Promoted) and event.split == "validation")
    assert {event.candidate for event in baselines} <= set(validated.candidates)
    assert set(validated.candidates) & {event.candidate for event in own}
    best = own[1].candidate  # by the toy's formula better at one task than all that are as good at the other
    assert best in run.front()
    assert best in run.models()
    assert best in run.front_so_far()
    assert run.title(best) == f"candidate {best} (mix.yml)"
    assert planned(experiment)["warm-up"][0] == planned(replace(experiment, warm=()))["warm-up"][0] + 3


def test_drivers_start_from_those_that_the_space_can_express(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver knows at its start are baselines and warm starts with a genome."""
    problems: list[Problem] = []
    start = Random.start
    monkeypatch.setattr(Random, "start", lambda self, problem: problems.append(problem) or start(self, problem))
    experiment = warm_toy(driver="random", schedule={"name": "fixed"})
    played(experiment, tmp_path)

    known = [genome for genome, _ in problems[0].known]
    assert experiment.warm[0].genome in known
    assert len(known) == sum(p.genome is not None for p in experiment.proposals)


def test_a_run_with_warm_starts_goes_on_from_every_cut(tmp_path: Path) -> None:
    """The ledger is that of the run that went through, and no candidate is answered a second time."""
    experiment = warm_toy(budget={"candidates": 8})
    whole = played(experiment, tmp_path / "whole")
    lines = (tmp_path / "whole" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines), 7):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        assert settled(played(experiment, folder)) == settled(whole)


def test_other_warm_starts_are_another_run(tmp_path: Path) -> None:
    """The identity covers their recipes, and where they come from; without any it is what it was."""
    experiment = warm_toy()
    one, two, three = experiment.warm
    others = [
        experiment,
        replace(experiment, warm=()),
        replace(experiment, warm=(one, two)),
        replace(experiment, warm=(one, two, replace(three, recipe=two.recipe))),
        replace(experiment, warm=(one, two, replace(three, label="other"))),
        replace(experiment, warm=(replace(one, genome=None), two, three)),
    ]
    assert len({other.identity for other in others}) == len(others)
    played(experiment, tmp_path)
    with pytest.raises(LedgerError, match="another experiment"):
        played(others[2], tmp_path)


def test_a_warm_start_with_the_recipe_of_a_baseline_is_not_asked_again(tmp_path: Path) -> None:
    """It names the earlier candidate, whose answers count for both."""
    plain = toy()
    worker = ToyWorker()
    warm = named_methods(plain.space, ["task_arithmetic"])  # which is lambda 1
    events = played(replace(plain, warm=tuple(warm), file=plain.file.model_copy(
        update={"baselines": plain.file.baselines.model_copy(update={"lambdas": [1.0]})}
    )), tmp_path, worker)  # fmt: skip

    [event] = asked_of(events, METHOD)
    assert event.same_as == asked_of(events, "arithmetic")[0].candidate
    assert event.candidate not in {job.candidate for job in worker.jobs}


# Read from an experiment's file.


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("warm")
    ran(load(write(folder, "first", budget={"candidates": 15})), folder / "runs" / "first")
    return folder / "runs" / "first"


def merges_of(run: Path) -> list[int]:
    """Return the merges of a run's front."""
    return open_run(run).models()


def test_a_run_begins_with_the_front_of_an_earlier_one(first: Path, tmp_path: Path) -> None:
    """In the same space with its genomes; in another one, in another dtype too, by what they build."""
    numbers = merges_of(first)
    earlier = {event.candidate: event for event in open_run(first).asked}
    assert numbers
    same = load(write(tmp_path, "same", warm={"runs": [f"run:{first}"]}, seed=4))
    other = load(write(tmp_path, "other", warm={"runs": [f"run:{first}"]}, space="blend_ties", dtype="bfloat16"))
    parts: dict[str, Any] = {"methods": ["task_arithmetic"], "knots": 2, "weight": {"low": -0.1, "high": 1.2}}
    parts["modules"] = [["mlp"], ["attention", "other"]]  # the same axes, which stand for other tensors
    turned = load(write(tmp_path, "turned", warm={"runs": [f"run:{first}"]}, space=parts))
    one = load(write(tmp_path, "one", warm={"runs": [f"run:{first}@{numbers[0]}", f"run:{first}@best"]}))

    assert [(p.origin, p.label) for p in same.warm] == [("earlier", f"run first {i}") for i in numbers]
    assert [p.genome for p in same.warm] == [earlier[i].genome for i in numbers]
    assert [p.recipe.digest for p in same.warm] == [earlier[i].recipe for i in numbers]
    assert [p.genome for p in other.warm] == [None] * len(numbers)
    assert [replace(p.recipe, dtype="float32").digest for p in other.warm] == [earlier[i].recipe for i in numbers]
    assert turned.space.axes == same.space.axes
    assert [(p.genome, p.recipe.digest) for p in turned.warm] == [(None, earlier[i].recipe) for i in numbers]
    assert one.warm[0].label == f"run first {numbers[0]}"
    assert {p.label for p in one.warm} <= {p.label for p in same.warm}


def test_what_a_run_began_with_is_found_again_when_the_earlier_one_is_gone(first: Path, tmp_path: Path) -> None:
    """Its own file holds the recipes: it goes on, exports and lends its candidates without the other folder."""
    gone = tmp_path / "gone"
    shutil.copytree(first, gone)
    (tmp_path / "mix.yml").write_text(MIX, encoding="utf-8")
    given = {"runs": [f"run:{gone}"], "methods": ["karcher", "ties"], "files": ["mix.yml"]}
    experiment = load(write(tmp_path, "next", warm=given))
    events = ran(experiment, tmp_path / "next")
    shutil.rmtree(gone)
    (tmp_path / "mix.yml").unlink()
    again = load(tmp_path / "next" / "experiment.yaml")

    assert again.warm == experiment.warm
    assert again.identity == experiment.identity
    assert [p.label for p in again.warm] == ["karcher", "ties", *(f"run gone {i}" for i in merges_of(first)), "mix.yml"]
    assert ran(again, tmp_path / "next") == events
    number = asked_of(events, "file")[0].candidate
    third = load(write(tmp_path, "third", warm={"runs": [f"run:{tmp_path / 'next'}@{number}"]}))
    assert third.warm[0].recipe == again.warm[-1].recipe
    assert third.warm[0].label == f"run next {number}"
    # as a source, and exported: reloaded and asked again by the export itself
    lent = {"sources": {"it": f"run:{tmp_path / 'next'}@{number}"}}
    assert load(write(tmp_path, "fourth", models=lent, space="path")).baselines[0].recipe == again.warm[-1].recipe
    [folder] = export_models(again, Run(events), events, [number], tmp_path / "out")
    assert (folder / "model.safetensors").is_file()


MIX = f"""
merge_method: dare_ties
base_model: {ZOO / "base"}
models:
  - {{model: {ZOO / "cipher"}, parameters: {{weight: 0.5, density: 0.5}}}}
  - {{model: {ZOO / "arithmetic"}, parameters: {{weight: [0.2, 0.6], density: 0.7}}}}
dtype: float32
"""


def tensors_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe builds."""
    sources = OnDisk({name: Path(source.path) for name, source in models_of(recipe).items()})
    return dict(materialize(recipe, sources))


def test_a_file_of_mergekits_builds_the_same_of_models_with_other_names(tmp_path: Path) -> None:
    """But for the masks, which no name of the file's decides; without them bit for bit."""
    plain = MIX.replace("dare_ties", "ties")
    (tmp_path / "mix.yml").write_text(plain, encoding="utf-8")
    (tmp_path / "masks.yml").write_text(MIX, encoding="utf-8")
    sources = {f"my-{name}": str(ZOO / name) for name in ("arithmetic", "cipher")}
    models = {"base": str(ZOO / "base"), "sources": sources}
    experiment = load(write(tmp_path, "named", models=models, warm={"files": ["mix.yml", "masks.yml"]}))
    mix, masks = experiment.warm

    assert [(p.origin, p.label, p.genome) for p in experiment.warm] == [
        ("file", "mix.yml", None), ("file", "masks.yml", None),
    ]  # fmt: skip
    assert {source.name for source in mix.recipe.sources} == set(sources)
    assert mix.recipe.base is not None
    assert mix.recipe.base.name == "base"
    theirs, ours = tensors_of(mergekit.read(tmp_path / "mix.yml")), tensors_of(mix.recipe)
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    assert mix.recipe.digest != masks.recipe.digest


def test_a_recipe_may_lie_beside_the_experiment_or_stand_in_it(tmp_path: Path) -> None:
    """Models are known by their content: the path of a recipe that has fingerprints need not be there any more."""
    base, arithmetic = (
        Source(name=name, path=f"/gone/{name}", fingerprint=Checkpoint(ZOO / name).fingerprint)
        for name in ("base", "arithmetic")
    )
    blend = Blend(method="base | trim | sum", weights={"arithmetic": 0.7}, parameters={"density": {"arithmetic": 0.4}})
    recipe = Recipe(sources=(arithmetic,), base=base, routes=(Route(blend=blend),), dtype="float32")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    stands = {"label": "ours", "recipe": yaml.safe_load(to_yaml(replace(recipe, dtype="bfloat16")))}
    given = {"files": ["recipe.yaml"], "recipes": [stands]}
    one = load(write(tmp_path, "one", warm=given))

    assert [(p.origin, p.label) for p in one.warm] == [("file", "ours")]  # the file holds the same again
    made = one.warm[0].recipe
    assert made.sources[0].path == str(ZOO / "arithmetic")
    assert made.layers == (0, 1, 2, 3)
    assert made.dtype == "float32"
    models = {"base": str(ZOO / "base"), "sources": {"words": str(ZOO / "arithmetic")}}
    two = load(write(tmp_path, "two", models=models, warm={"files": ["recipe.yaml"]})).warm[0].recipe
    assert two.routes[0].blend == replace(blend, weights={"words": 0.7}, parameters={"density": {"words": 0.4}})


@pytest.mark.slow
def test_every_named_method_that_fits_can_be_asked(tmp_path: Path) -> None:
    """All are built and scored on real models; the list is written into the run's file."""
    experiment = load(write(tmp_path, "all", warm={"methods": True}))
    names = applicable(experiment.space)
    events = ran(experiment, tmp_path / "all")
    run = Run(events)

    assert [event.label for event in asked_of(events, METHOD)] == names
    assert experiment.file.warm.methods == names
    assert not run.errors
    assert len(names) > 40
    assert render_report(run)


def test_a_search_of_stacks_takes_stacks_and_blends(tmp_path: Path, first: Path) -> None:
    """Also a file that stacks layers of two models, which no search of blends can take."""
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {ZOO / name}, layer_range: {given}}}]\n"
        for name, given in (("base", [0, 3]), ("arithmetic", [1, 4]))
    )
    (tmp_path / "stack.yml").write_text(text + "dtype: float32\n", encoding="utf-8")
    given = {"files": ["stack.yml"], "runs": [f"run:{first}"], "methods": ["karcher"]}
    stacks = {"sources": {f"the-{name}": str(ZOO / name) for name in ("base", "arithmetic", "cipher")}}
    edits = {"kind": "path", "probes": False, "depth": {"low": 3, "high": 6}}
    experiment = load(write(tmp_path, "stacks", models=stacks, space=edits, warm=given))
    run = Run(ran(experiment, tmp_path / "stacks"))

    assert not run.errors
    assert [len(p.recipe.layers) for p in experiment.warm if p.origin == "file"] == [6]
    with pytest.raises(ExperimentError, match=r"warm\.files\.0: is a stack of 6 layers, .* the 4 of their sources"):
        load(write(tmp_path, "blends", warm={"files": ["stack.yml"]}))


def test_a_stage_begins_with_the_front_of_the_one_before_it(tmp_path: Path) -> None:
    """By its name; while it has not run, a check passes it over."""
    keys = SMALL | {"stages": [{"name": "one"}, {"name": "two", "seed": 1, "warm": {"runs": ["run:one"]}}]}
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(keys | {"name": "staged"}), encoding="utf-8")
    stages = read_stages(path)
    assert stages is not None
    assert stages.check(1).warm == ()
    ran(stages.load(0, tmp_path / "runs"), tmp_path / "runs" / "one")

    found = stages.load(1, tmp_path / "runs").warm
    assert [p.label for p in found] == [f"run one {i}" for i in merges_of(tmp_path / "runs" / "one")]


def masked(folder: Path) -> str:
    """Write a recipe that draws masks by names that its models have elsewhere."""
    base, theirs = (
        Source(name=name, path=str(ZOO / at), fingerprint=Checkpoint(ZOO / at).fingerprint)
        for name, at in (("base", "base"), ("theirs", "arithmetic"))
    )
    route = Route(blend=Blend(method="dare_linear", weights={"theirs": 1.0}))
    recipe = Recipe(sources=(theirs,), base=base, routes=(route,), dtype="float32")
    (folder / "masked.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    return "masked.yaml"


def foreign(folder: Path) -> str:
    """Write a recipe of a model that the experiment has not."""
    route = Route(blend=Blend(method="linear", weights={"other": 1.0}))
    recipe = Recipe(sources=(Source(name="other", path=str(ZOO / "strings")),), routes=(route,), dtype="float32")
    (folder / "foreign.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    return "foreign.yaml"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"methods": ["tiess"]}, r"warm\.methods\.0: unknown method 'tiess'; did you mean 'ties"),
    "no texts": ({"methods": ["ties", "fisher"]}, r"warm\.methods\.1: fisher takes statistics \(fisher\); give"),
    "twice": ({"methods": ["ties", "ties"]}, r"warm\.methods\.1: ties stands twice"),
    "no run": ({"runs": ["run:nowhere"]}, r"warm\.runs\.0: .*no run lies here"),
    "no reference": ({"runs": ["runs/first"]}, r"warm\.runs\.0: 'runs/first' is no run; write run:FOLDER"),
    "no file": ({"files": ["nowhere.yaml"]}, r"warm\.files\.0: .*nowhere.yaml: cannot be read"),
    "no recipe": ({"recipes": [{"label": "x", "recipe": {}}]}, r"warm\.recipes\.0: recipe\.sources: missing"),
    "no key": ({"method": True}, r"warm\.method: unknown key; did you mean 'methods'"),
    "foreign": ({"files": ["foreign.yaml"]}, r"warm\.files\.0: its model 'other' .* is none of this experiment's"),
    "masked": ({"files": ["masked.yaml"]}, r"warm\.files\.0: draws masks by the names of its models; call the source"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_begun_with_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    """With the key and the way out."""
    masked(tmp_path), foreign(tmp_path)
    given, line = REFUSED[case]
    with pytest.raises(ExperimentError, match=line) as caught:
        load(write(tmp_path, "wrong", warm=given))
    assert "\n" not in str(caught.value)


def test_a_run_without_a_front_is_refused(first: Path, tmp_path: Path) -> None:
    """It is to be finished first, or a candidate named."""
    open_ = tmp_path / "open"
    shutil.copytree(first, open_)
    lines = (open_ / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (open_ / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))

    with pytest.raises(ExperimentError, match=r"warm\.runs\.0: .*no front yet; finish it, or name a candidate"):
        load(write(tmp_path, "late", warm={"runs": [f"run:{open_}"]}))
    assert len(load(write(tmp_path, "named", warm={"runs": [f"run:{open_}@{merges_of(first)[0]}"]})).warm) == 1

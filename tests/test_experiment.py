"""Experiment files: what is written becomes what is meant, and every point of a space is a recipe."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.drivers import DRIVERS, Nsga2, Screened, plain_driver
from evomerge.evaluation import Task, read_task
from evomerge.evaluation.engine import TOKENS
from evomerge.evaluation.gates import Gates
from evomerge.experiment import Experiment, load, schema
from evomerge.experiment.resolving import tasks_of
from evomerge.fitness.auto import Auto
from evomerge.fitness.registry import ESTIMATORS
from evomerge.fitness.schedule import SCHEDULES, Fixed, Race
from evomerge.genome import Choice, Real, Whole, active, from_unit
from evomerge.methods import check
from evomerge.models.architecture import renamed
from evomerge.models.materialize import plan
from evomerge.models.resident import OnDisk
from evomerge.recipe import Blend, Route
from evomerge.search import open_pool, reference
from evomerge.spaces.blend import NONE, BlendSpace, ParameterRange, Slot

ROOT = Path(__file__).resolve().parent.parent
SPACES = sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml"))


def experiment(folder: Path, space: str | dict[str, Any]) -> Experiment:
    """Return the quickstart with another space."""
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))
    zoo = ROOT / "experiments/zoo"
    data["models"] = {
        "base": str(zoo / "base"),
        "sources": {n: str(zoo / n) for n in ("arithmetic", "strings", "cipher")},
    }
    data["space"] = space
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return load(path)


SLOTS = {
    "origin": ["base"],
    "edit": ["none", "trim(scope=model)", "drop"],
    "gate": ["none", "elect", "exclusive"],
    "combine": ["sum", "mean"],
    "shape": ["scale"],
}


def test_a_space_of_slots_is_read(tmp_path: Path) -> None:
    """Ranges, lists, constants and whole numbers, each under the slot and the options that have it."""
    space = experiment(
        tmp_path,
        {
            "slots": SLOTS,
            "parameters": {
                "density": {"low": 0.1, "high": 0.9, "per_source": True},
                "count": ["floor", "above"],
                "zero": "minus",
                "n": {"low": 2, "high": 8},
                "m": 16,
                "scale": {"low": 0.5, "high": 2.0, "log": True},
            },
        },
    ).space

    assert space.slots == tuple(Slot(name=name, options=tuple(options)) for name, options in SLOTS.items())
    assert space.methods == ()
    edits = ("trim(scope=model)", "drop")
    assert space.parameters == {
        "density": ParameterRange(low=0.1, high=0.9, per_source=True, slot="edit", methods=edits),
        "count": ParameterRange(options=("floor", "above"), slot="edit", methods=edits[:1]),
        "zero": ParameterRange(options=("minus",), slot="gate", methods=("elect",)),
        "n": ParameterRange(low=2.0, high=8.0, whole=True, slot="gate", methods=("exclusive",)),
        "m": ParameterRange(low=16.0, high=16.0, slot="gate", methods=("exclusive",)),
        # A slot with one option decides nothing, and yet it is there that the parameter counts.
        "scale": ParameterRange(low=0.5, high=2.0, log=True, slot="origin", methods=("base",)),
    }
    kinds = {axis.name: type(axis) for axis in space.axes if not axis.name.startswith("weight.")}
    assert kinds == {
        **dict.fromkeys(("edit", "gate", "combine", "count"), Choice),
        **dict.fromkeys(("density.arithmetic", "density.strings", "density.cipher", "scale"), Real),
        "n": Whole,
    }


def test_lines_stand_beside_methods(tmp_path: Path) -> None:
    """Both are options of one gene; a parameter is active under those that have it, by either of its names."""
    line = "base | trim | drop | sum"
    space = experiment(
        tmp_path,
        {
            "methods": ["ties", line, "task_arithmetic"],
            "parameters": {"trim.density": {"low": 0.1, "high": 0.9}, "scale": {"low": 0.5, "high": 1.0}},
        },
    ).space
    axes = {axis.name: axis for axis in space.axes}

    assert axes["method"].options == ("ties", line, "task_arithmetic")  # type: ignore[union-attr]  # a choice
    assert axes["trim.density"].active_if.options == ("ties", line)  # type: ignore[union-attr]  # it has a condition
    assert axes["scale"].active_if.options == ("ties", "task_arithmetic")  # type: ignore[union-attr]  # the same


def test_fixed_routes_are_read(tmp_path: Path) -> None:
    """They go before the routes of every recipe of the run, baselines too."""
    blend = {"method": "linear", "weights": {"cipher": 1.0}}
    found = experiment(tmp_path, {"methods": ["ties"], "routes": [{"groups": ["embedding"], "blend": blend}]})
    route = Route(blend=Blend(method="linear", weights={"cipher": 1.0}), groups=("embedding",))

    assert found.space.routes == (route,)
    assert found.space.decode(from_unit(found.space.axes, [0.5] * len(found.space.axes))).routes[0] == route
    plain = experiment(tmp_path, {"methods": ["ties"]})
    assert found.identity != plain.identity


@pytest.mark.parametrize("name", SPACES)
def test_every_shipped_space_decodes_to_recipes(name: str, tmp_path: Path) -> None:
    """Random points are recipes whose blends are right and whose routes reach every tensor."""
    found = experiment(tmp_path, name)
    sources = OnDisk(found.folders)
    rng = np.random.default_rng(0)
    methods = set()
    for point in rng.random((60, len(found.space.axes))):
        recipe = found.space.decode(from_unit(found.space.axes, point))
        for blend in recipe.blends():
            check(blend.method, blend.weights, blend.parameters, "here", recipe.base is not None)
            methods.add(blend.method)
    steps = plan(recipe, sources.names, sources.depth)

    ends = {name for name in sources.names if ".layers." not in name}
    first = [name for name in sources.names if ".layers.0." in name]
    layers = {renamed(name, k) for k in range(len(recipe.layers)) for name in first}
    assert {step.name for step in steps} == ends | layers
    if isinstance(found.space, BlendSpace):  # a stack copies, and blends in a source of its own if at all
        assert (len(methods) > 1) == (len(found.space.methods) != 1)


def test_the_space_of_stages_counts_what_was_chosen(tmp_path: Path) -> None:
    """Its genes are active under their stages alone; without edit and gate it is task arithmetic or an average."""
    space = experiment(tmp_path, "stages").space
    names = [axis.name for axis in space.axes]
    genome = list(from_unit(space.axes, [0.5] * len(names)))

    def counting(**chosen: str) -> set[str]:
        for name, option in chosen.items():
            genome[names.index(name)] = option
        counts = active(space.axes, tuple(genome))
        return {n.split(".")[0] for n, counting in zip(names, counts, strict=True) if counting} - {"weight", *chosen}

    assert counting(edit=NONE, gate=NONE, combine="sum") == {"scale"}
    assert space.decode(tuple(genome)).routes[0].blend.method == "base | sum | scale"
    assert counting(edit="trim", gate=NONE, combine="sum") == {"scale", "density"}
    assert counting(edit="band", gate="elect", combine="mean") == {"scale", "density", "gamma", "vote"}
    assert counting(edit=NONE, gate="argmax", combine="mean") == {"scale"}


def changed(folder: Path, **changes: Any) -> Experiment:
    """Return the quickstart with some keys changed; `splits` keeps it small."""
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))
    zoo = ROOT / "experiments/zoo"
    data["models"] = {"base": str(zoo / "base"), "sources": {"arithmetic": str(zoo / "arithmetic")}}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(data | changes, sort_keys=False), encoding="utf-8")
    return load(path)


def test_estimator_schedule_and_gates_are_read(tmp_path: Path) -> None:
    """Settings that are given count, those that are left out have their defaults, and all are part of the identity."""
    found = changed(
        tmp_path,
        estimator={"name": "auto", "rows": 30},
        schedule={"name": "race", "first": 8},
        gates={"finite": False, "repetition": 0},
    )

    assert found.estimator == Auto(rows=30)
    assert found.schedule == Race(first=8)
    assert found.gates == Gates(finite=False, repetition=0)
    plain = changed(tmp_path, estimator={"name": "auto"}, schedule={"name": "fixed"})
    assert (plain.estimator, plain.schedule, plain.gates) == (Auto(), Fixed(), Gates())
    assert plain.identity != found.identity
    defaults = yaml.safe_load((tmp_path / "experiment.yaml").read_text(encoding="utf-8"))
    (tmp_path / "experiment.yaml").write_text(
        yaml.safe_dump({key: item for key, item in defaults.items() if key not in ("estimator", "schedule")})
    )
    assert load(tmp_path / "experiment.yaml").identity == plain.identity


def test_the_size_of_batches_is_part_of_the_identity(tmp_path: Path) -> None:
    """Rows and tokens alike, since the last bits may depend on them; how many tokens is the engine's own default."""
    found = [changed(tmp_path, workers=given).identity for given in ({}, {"batch": 64}, {"tokens": 4096})]

    assert len({*found}) == 3
    assert changed(tmp_path, workers={}, ray={"actors": 3}).identity == found[0]
    assert changed(tmp_path, workers={}).file.workers.tokens == TOKENS


def test_workers_are_set_up_as_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Template, dtype and sizes reach the worker."""
    monkeypatch.setattr("evomerge.search.beginning.InlinePool", lambda make, limit: (make.__self__, limit))
    given = {"batch": 7, "tokens": 99, "threads": 3, "time_limit": 5.0}
    setup, limit = open_pool(changed(tmp_path, workers=given, ray=None, dtype="bfloat16"))

    assert (setup.template, setup.dtype) == (ROOT / "experiments/zoo/base", "bfloat16")
    assert (setup.batch, setup.tokens, setup.threads, limit) == (7, 99, 3, 5.0)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (
            {"actors": 3},
            {"count": 3, "gpus": 0.0, "cpus": 2, "attempts": 3, "max_failures": None, "address": "local"},
        ),
        (
            {
                "actors": "per_gpu",
                "gpus_per_worker": 0.5,
                "cpus_per_worker": 1,
                "max_attempts": 2,
                "max_failures": 9,
                "address": "head.example:6379",
            },
            {
                "count": "per_gpu",
                "gpus": 0.5,
                "cpus": 1,
                "attempts": 2,
                "max_failures": 9,
                "address": "head.example:6379",
            },
        ),
    ],
)
def test_rays_workers_are_as_many_and_as_the_file_says(
    given: dict[str, Any], called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key of `ray` reaches the pool; processors are those of the threads unless said otherwise."""
    monkeypatch.setattr(
        "evomerge.search.beginning.RayPool", lambda make, count, limit, **more: {"count": count, "limit": limit, **more}
    )
    found = open_pool(changed(tmp_path, workers={"threads": 2, "time_limit": 5.0}, ray=given))

    assert found == called | {"limit": 5.0, "threads": 2}


def test_a_task_of_lm_eval_is_given_the_template_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, whose chat template is meant where the task names none; the first source's without a base."""
    came: list[Path] = []

    def harness(keys: object, name: str, near: Path, place: str, template: Path) -> Task:
        came.append(template)
        return read_task(ROOT / "fitness/cipher.yaml", name)

    monkeypatch.setattr("evomerge.evaluation.files.harness_task", harness)
    objectives = [{"name": "asked", "task": {"lm_eval": "arc_easy", "chat_template": True}}]
    changed(tmp_path, objectives=objectives)
    tasks_of(tmp_path / "experiment.yaml")
    models = {"sources": {"cipher": str(ROOT / "experiments/zoo/cipher")}}
    path = tmp_path / "baseless.yaml"
    keys = yaml.safe_load((tmp_path / "experiment.yaml").read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(keys | {"models": models, "space": {"methods": ["linear"]}}), encoding="utf-8")
    load(path)

    zoo = ROOT / "experiments/zoo"
    assert [folder.resolve() for folder in came] == [zoo / "base", zoo / "base", zoo / "cipher"]


def test_a_direction_is_the_tasks_unless_said_otherwise(tmp_path: Path) -> None:
    """A loss is minimised, right answers are maximised, and the file may turn either round."""
    loss = {"measure": "loss", "data": str(ROOT / "fitness/zoo/cipher.jsonl"), "text": "prompt"}
    found = changed(
        tmp_path,
        objectives=[
            {"name": "loss", "task": loss},
            {"task": "cipher"},
            {"task": "strings", "direction": "minimize"},
            {"property": "depth"},
        ],
    )

    assert [o.direction for o in found.objectives] == ["minimize", "maximize", "minimize", "minimize"]
    assert not found.tasks["loss"].bounded
    assert reference(found)[:3] == (None, 0.0, 1.0)


def test_the_schema_knows_every_name() -> None:
    """Of drivers, estimators and schedules, each with its own settings and no others."""
    properties = schema()["properties"]
    for key, known in {"driver": DRIVERS, "estimator": ESTIMATORS, "schedule": SCHEDULES}.items():
        options = {option["properties"]["name"]["const"]: option for option in properties[key]["oneOf"]}
        assert list(options) == list(known)
        for name, option in options.items():
            assert set(option["properties"]) == {"name", *(field.name for field in fields(known[name]))}
            assert option["additionalProperties"] is False


def test_a_driver_that_is_left_out_is_chosen_by_the_space_and_written_down(tmp_path: Path) -> None:
    """Blends get the screened portfolio, stacks evolution; what a run keeps names it, and means the same experiment."""
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))
    zoo = ROOT / "experiments/zoo"
    data["models"] = {"base": str(zoo / "base"), "sources": {n: str(zoo / n) for n in ("arithmetic", "strings")}}
    del data["driver"]
    for space, kind in (("task_vectors", Screened), ("any_method", Screened), ("path", Nsga2)):
        path = tmp_path / f"{space}.yaml"
        path.write_text(yaml.safe_dump(data | {"space": space}), encoding="utf-8")
        found = load(path)
        assert type(found.driver) is kind
        assert found.file.driver == plain_driver(found.driver)

        again = tmp_path / f"{space} again.yaml"
        again.write_text(yaml.safe_dump(found.file.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        assert load(again).driver == found.driver
        assert load(again).identity == found.identity

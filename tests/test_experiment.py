"""Spaces of experiment files: what is written becomes the space that is meant, and every point of it is a recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.experiment import Experiment, load
from evomerge.genome import Choice, Real, Whole, active, from_unit
from evomerge.methods import check
from evomerge.models.materialize import plan
from evomerge.models.resident import OnDisk
from evomerge.recipe import Blend, Route
from evomerge.spaces.blend import NONE, ParameterRange, Slot

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

    assert {step.name for step in steps} == set(sources.names)
    several = len(found.space.methods) != 1
    assert (len(methods) > 1) == several


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

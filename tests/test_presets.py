"""Presets of published systems: their axes, decoding and settings are the published ones, and each of them runs."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import Tensor
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.experiment import Experiment, load
from evomerge.genome import Gene, Genome
from evomerge.models.materialize import materialize
from evomerge.models.resident import OnDisk
from evomerge.recipe import ENDS, GROUPS, Blend, Recipe
from evomerge.run import open_run

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = ("arithmetic", "strings", "cipher")
QUERY = "model.layers.{}.self_attn.q_proj.weight"
GATE = "model.layers.{}.mlp.gate_proj.weight"
NORM = "model.layers.{}.input_layernorm.weight"

#: What makes a preset small enough for a test: few items, candidates and finalists, one worker in this process.
SMALL: dict[str, Any] = {
    "ray": None,
    "baselines": {"lambdas": [0.4]},
    "splits": {"search": 24, "validation": 8, "test": 8},
    "finalists": 2,
    "gates": {"repetition": 0},
    "export": {"front": "none"},
}


@cache
def preset(name: str) -> Experiment:
    """Return a preset as it ships."""
    return load(ROOT / f"experiments/{name}.yaml")


def genome(name: str, **genes: Gene) -> Genome:
    """Return a genome of a preset's space: some genes, by axis with `_` for `.`, and the middle of all other axes."""
    axes = preset(name).space.axes
    known = {axis.name.replace(".", "_"): axis for axis in axes}
    assert genes.keys() <= known.keys()
    return tuple(genes.get(key, axis.from_unit(0.5)) for key, axis in known.items())


def blend(recipe: Recipe, group: str, layer: int | None) -> Blend:
    """Return how the tensors of a module group are blended in a layer."""
    return recipe.route("any.weight", group, layer).blend


def everywhere(recipe: Recipe) -> list[Blend]:
    """Return how all tensors are blended: of every group in every layer, and at both ends."""
    inside = [blend(recipe, group, layer) for group in GROUPS for layer in range(len(recipe.layers))]
    return inside + [blend(recipe, end, None) for end in ENDS]


def built(name: str, recipe: Recipe) -> dict[str, Tensor]:
    """Return the tensors of the model that a recipe of a preset makes."""
    return dict(materialize(recipe, OnDisk(preset(name).folders)))


def source(name: str, model: str, tensor: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a tensor of one of a preset's models."""
    return OnDisk(preset(name).folders).tensor(model, tensor).double().numpy()


def axes_of(name: str) -> dict[str, tuple[float, float]]:
    """Return the bounds of a preset's axes by their names."""
    return {axis.name: (axis.low, axis.high) for axis in preset(name).space.axes}  # type: ignore[union-attr]  # numbers


def setting(name: str) -> Any:
    """Return the driver's settings of a preset."""
    return preset(name).driver


def slerp(t: float, a: Any, b: Any) -> Any:
    """Spherical interpolation of two tensors as mergekit has it: one angle for all entries, lengths not touched."""
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def as_optuna(name: str, axes: int) -> None:
    """Assert that CMA-ES is as Optuna has it by default: sigma a sixth of the range, 4 + floor(3 ln n), no restarts."""
    driver = setting(name)

    assert type(driver).__name__ == "Cma"
    assert driver.sigma == pytest.approx(1 / 6)
    assert driver.generation(axes) == 4 + math.floor(3 * math.log(axes))
    assert (driver.scalarise, driver.damping, driver.diagonal) == ("sum", 1.0, False)
    assert (driver.restart_below, driver.steady) == (0.0, False)


def test_sakana_ps_has_the_published_space_and_search() -> None:
    """Akiba 2024: two genes in [0, 1] for each of three models, mean 0.5, step 1/6, 9 candidates, 1,000 trials."""
    experiment = preset("sakana_ps")

    assert axes_of("sakana_ps") == {
        **{f"weight.{name}.0.0": (0.0, 1.0) for name in EXPERTS},
        **{f"density.{name}": (0.0, 1.0) for name in EXPERTS},
    }
    assert experiment.space.start == (0.5,) * 6
    as_optuna("sakana_ps", 6)
    assert setting("sakana_ps").generation(6) == 9
    assert experiment.file.budget.candidates == 1000
    assert experiment.file.schedule == {"name": "fixed"}


def test_sakana_dfs_is_ranked_by_one_number_with_the_published_step_control() -> None:
    """Akiba 2024, 4.1, by EvoJAX's CMA-ES: as Hansen 2016, no restarts; the rest is tested with stacks."""
    driver = setting("sakana_dfs")

    assert (driver.scalarise, driver.damping, driver.diagonal, driver.restart_below) == ("sum", 1.0, False, 0.0)


def test_sakana_ps_decodes_to_dare_ties_without_normalisation() -> None:
    """Weights and densities are those of the genes everywhere, ends too; at density 1 it is elected and summed."""
    weights = dict(zip(EXPERTS, (0.9, 0.7, 0.4), strict=True))
    densities = dict(zip(EXPERTS, (0.2, 0.5, 1.0), strict=True))
    genes = {f"weight_{name}_0_0": w for name, w in weights.items()}
    recipe = preset("sakana_ps").space.decode(
        genome("sakana_ps", **genes, **{f"density_{name}": p for name, p in densities.items()})
    )
    whole = preset("sakana_ps").space.decode(genome("sakana_ps", **genes, **{f"density_{n}": 1.0 for n in EXPERTS}))

    expected = Blend(method="dare_ties", weights=weights, parameters={"density": densities})
    assert all(each == expected for each in everywhere(recipe))
    tensors = built("sakana_ps", whole)
    for name in (QUERY.format(2), GATE.format(0), "lm_head.weight"):
        base = source("sakana_ps", "base", name)
        parts = np.array([w * (source("sakana_ps", model, name) - base) for model, w in weights.items()])
        votes = parts.sum(axis=0)
        kept = np.where(np.sign(parts) == np.sign(votes), parts, 0.0)
        sure = np.abs(votes) > 1e-6  # the rest hangs on rounding
        assert sure.mean() > 0.95
        np.testing.assert_allclose(tensors[name].numpy()[sure], (base + kept.sum(axis=0))[sure], atol=2e-6)


def test_mergenetic_has_the_published_space_and_search() -> None:
    """Minut 2025, multilang-arc: n weights, then n densities in [0, 1]; pymoo's NSGA-II, 10 x 10; gmp-IRT, 10 items."""
    experiment, driver = preset("mergenetic"), setting("mergenetic")
    estimator: Any = experiment.estimator
    axes = axes_of("mergenetic")

    assert list(axes) == [*(f"weight.{name}.0.0" for name in EXPERTS), *(f"density.{name}" for name in EXPERTS)]
    assert set(axes.values()) == {(0.0, 1.0)}
    assert (driver.population, driver.generation(6)) == (10, 10)
    assert (driver.crossover_rate, driver.crossover_eta) == (0.9, 15)
    assert (driver.mutation_rate, driver.mutation_eta) == (None, 20)
    # The first of ten populations is the warm-up's.
    assert experiment.file.schedule["random"] + experiment.file.budget.candidates == 10 * 10
    assert experiment.file.schedule["items"] == 10
    assert (type(estimator).__name__, estimator.ability) == ("GmpIrt", "ml")
    recipe = experiment.space.decode((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    expected = {"density": dict(zip(EXPERTS, (0.4, 0.5, 0.6), strict=True))}
    weights = dict(zip(EXPERTS, (0.1, 0.2, 0.3), strict=True))
    assert all(each == Blend(method="dare_ties", weights=weights, parameters=expected) for each in everywhere(recipe))


def test_merge3_has_the_published_space_and_search() -> None:
    """Mencattini 2025: 11 genes in [0, 1], SBX, polynomial mutation, 25 x 7, gmp-IRT by maximum likelihood on 20."""
    experiment, driver = preset("merge3"), setting("merge3")
    estimator: Any = experiment.estimator

    assert axes_of("merge3") == {
        **{f"t.{m}.{k}": (0.0, 1.0) for m in (0, 1) for k in range(5)},
        "t.2.0": (0.0, 1.0),
    }
    assert len(experiment.objectives) == 1
    assert (driver.population, driver.crossover_rate, driver.crossover_eta, driver.mutation_eta) == (25, 0.9, 15, 20)
    assert experiment.file.schedule["random"] + experiment.file.budget.candidates == 25 * 7
    assert experiment.file.schedule["items"] == 20
    assert (type(estimator).__name__, estimator.ability) == ("GmpIrt", "ml")


def test_merge3_decodes_to_gradients_of_slerp() -> None:
    """For self_attn and mlp t lies on the line through five values; all else, both ends too, has the last gene."""
    attention, mlp, other = [0.0, 0.2, 1.0, 0.4, 0.6], [1.0, 0.5, 0.3, 0.9, 0.1], 0.7
    tensors = built("merge3", preset("merge3").space.decode((*attention, *mlp, other)))

    for layer in range(6):
        place = 4 * layer / 5  # five values, evenly from the first of six layers to the last
        low, rest = min(int(place), 3), place - min(int(place), 3)
        expected = {
            QUERY.format(layer): attention[low] + rest * (attention[low + 1] - attention[low]),
            GATE.format(layer): mlp[low] + rest * (mlp[low + 1] - mlp[low]),
            NORM.format(layer): other,
            "model.embed_tokens.weight": other,
            "lm_head.weight": other,
        }
        for name, t in expected.items():
            a, b = source("merge3", "cipher", name), source("merge3", "arithmetic", name)
            np.testing.assert_allclose(tensors[name].numpy(), slerp(t, a, b), atol=2e-5, err_msg=name)


def test_mergekit_evolve_has_the_published_space_and_search() -> None:
    """Weights and densities for groups, models, filters + 1 from 1 / models and 1; 1/6, 16 candidates, 100 in all."""
    experiment = preset("mergekit_evolve")
    axes = axes_of("mergekit_evolve")
    places = [f"{name}.{m}.{k}" for name in EXPERTS for m in range(3) for k in range(4)]

    assert list(axes) == [*(f"weight.{place}" for place in places), *(f"density.{place}" for place in places)]
    assert len(axes) == 4 * 3 * 3 * 2
    # Equal widths, so that one share of an axis is one step: weights and densities have the same there.
    assert set(axes.values()) == {(0.0, 1.0)}
    assert experiment.space.start == (pytest.approx(1 / 3),) * 36 + (1.0,) * 36
    as_optuna("mergekit_evolve", 72)
    assert setting("mergekit_evolve").generation(72) == 16
    assert experiment.file.budget.candidates == 100


def test_mergekit_evolve_decodes_to_a_slice_per_group_and_filter() -> None:
    """Group g of one layer, model and filter read their own weight and density, normalised, with the l1 norm kept."""
    rng = np.random.default_rng(0)
    genotype = rng.random((4, 3, 3, 2))  # groups, models, parameter sets (self_attn, mlp, rest), parameters
    genes = {
        f"{word}_{name}_{s}_{g}": float(genotype[g, i, s, p])
        for p, word in enumerate(("weight", "density"))
        for g in range(4)
        for i, name in enumerate(EXPERTS)
        for s in range(3)
    }
    recipe = preset("mergekit_evolve").space.decode(genome("mergekit_evolve", **genes))

    groups = {"attention": 0, "mlp": 1, "other": 2}
    for group, s in groups.items():
        for g in range(4):
            found = blend(recipe, group, g)
            assert found.method == "dare_ties"
            assert found.weights == {name: genotype[g, i, s, 0] for i, name in enumerate(EXPERTS)}
            assert found.parameters == {
                "density": {name: genotype[g, i, s, 1] for i, name in enumerate(EXPERTS)},
                "normalize": 1.0,
                "rescale": "l1",
            }
    assert blend(recipe, "embedding", None) == blend(recipe, "other", 0)
    assert blend(recipe, "head", None) == blend(recipe, "other", 3)


def test_recycle_is_a_mean_whose_weights_are_divided_by_their_sum() -> None:
    """Khalifa 2024: theta = sum_i alpha_i theta_i, sum_i alpha_i = 1; CMA-ES begins at the uniform average."""
    experiment = preset("recycle")
    names = ("first", *EXPERTS)
    genes = (0.2, 0.8, 0.4, 0.6)
    tensors = built("recycle", experiment.space.decode(genes))

    assert axes_of("recycle") == {f"weight.{name}.0.0": (0.0, 1.0) for name in names}
    assert experiment.space.start == (0.5,) * 4
    assert {objective.weight for objective in experiment.objectives} == {1.0}
    as_optuna("recycle", 4)
    for name in (QUERY.format(1), NORM.format(3), "lm_head.weight"):
        expected = sum(alpha / 2.0 * source("recycle", model, name) for alpha, model in zip(genes, names, strict=True))
        np.testing.assert_allclose(tensors[name].numpy(), expected, atol=2e-6)


def test_bomf_searches_the_simplex_for_score_and_loss_together() -> None:
    """Jang 2024: x / sum(x) for x in [0, 1]^n; n points and 49, one at a time; accuracy up, loss down."""
    experiment, driver = preset("bomf"), setting("bomf")
    names = ("first", *EXPERTS)
    genes = (0.9, 0.3, 0.0, 0.6)
    tensors = built("bomf", experiment.space.decode(genes))
    known = [one for one in experiment.proposals if one.genome is not None]

    assert axes_of("bomf") == {f"weight.{name}.0.0": (0.0, 1.0) for name in names}
    assert type(driver).__name__ == "Gp"
    assert (driver.batch, driver.startup - len(known), driver.steady) == (1, len(names), False)
    assert experiment.file.budget.candidates == len(names) + 49
    assert [(one.name, one.direction) for one in experiment.objectives] == [
        ("arithmetic", "maximize"),
        ("loss", "minimize"),
    ]
    assert all(experiment.tasks["loss"].ids(s) == experiment.tasks["arithmetic"].ids(s) for s in ("search", "test"))
    for name in (QUERY.format(3), "model.embed_tokens.weight"):
        expected = sum(x / 1.8 * source("bomf", model, name) for x, model in zip(genes, names, strict=True))
        np.testing.assert_allclose(tensors[name].numpy(), expected, atol=2e-6)


def test_automerge_lfs_has_the_published_space_and_search() -> None:
    """Su 2025: 4 groups, a choice of 4 methods each; numbers in [0, 1], mask rate to 0.99; 500 trials, 100, eta 3."""
    experiment = preset("automerge_lfs")
    axes: dict[str, Any] = {axis.name: axis for axis in experiment.space.axes}
    numbers = {name: axis for name, axis in axes.items() if not name.startswith("method")}

    assert [name for name in axes if name not in numbers] == [f"method.{g}" for g in range(4)]
    assert axes["method.3"].options == ("linear", "task_arithmetic", "ties", "zero | slerp")
    assert len(numbers) == 4 * 3 * (3 + 1 + 1)  # groups, parameter sets; weights, a scale and a density
    for name, axis in numbers.items():
        assert (axis.low, axis.high) == ((0.01, 1.0) if name.startswith("density") else (0.0, 1.0))
        assert axis.active_if.axis == f"method.{name.rpartition('.')[2]}"
    conditions = {name.partition(".")[0]: axis.active_if.options for name, axis in numbers.items()}
    assert conditions == {
        "weight": ("linear", "zero | slerp"),
        "scale": ("task_arithmetic", "ties"),
        "density": ("ties",),
    }
    assert experiment.file.budget.candidates == 500
    assert experiment.file.schedule == {"name": "race", "first": 100, "eta": 3.0}


def test_automerge_lfs_decodes_to_a_method_for_each_group() -> None:
    """A weighted mean, base plus a scaled sum, TIES by tensor with equal votes, slerp of the two heaviest."""
    methods = ("linear", "task_arithmetic", "ties", "zero | slerp")
    genes: dict[str, Gene] = {f"method_{g}": method for g, method in enumerate(methods)}
    for name, w in zip(EXPERTS, (0.2, 0.8, 0.6), strict=True):
        genes |= {f"weight_{name}_{m}_{g}": w for m in range(3) for g in range(4)}
    genes |= {"scale_0_1": 0.3, "scale_1_1": 0.6, "scale_0_2": 0.5, "density_0_2": 0.3}
    tensors = built("automerge_lfs", preset("automerge_lfs").space.decode(genome("automerge_lfs", **genes)))

    def taus(name: str) -> Any:
        return np.array([source("automerge_lfs", m, name) - base(name) for m in EXPERTS])

    def base(name: str) -> Any:
        return source("automerge_lfs", "base", name)

    def experts(name: str) -> Any:
        return [source("automerge_lfs", m, name) for m in EXPERTS]

    a, s, c = experts(GATE.format(0))
    np.testing.assert_allclose(tensors[GATE.format(0)].numpy(), (0.2 * a + 0.8 * s + 0.6 * c) / 1.6, atol=2e-6)
    for name, scale in {QUERY.format(1): 0.3, GATE.format(1): 0.6}.items():
        np.testing.assert_allclose(tensors[name].numpy(), base(name) + scale * taus(name).sum(axis=0), atol=2e-6)
    _, s, c = experts(QUERY.format(3))
    np.testing.assert_allclose(tensors[QUERY.format(3)].numpy(), slerp(0.6 / 1.4, s, c), atol=2e-5)

    name = QUERY.format(2)
    flat = taus(name).reshape(3, -1)
    kept = math.floor(0.3 * flat.shape[1])
    cut = np.sort(np.abs(flat), axis=1)[:, -kept][:, None]
    trimmed = np.where(np.abs(flat) >= cut, flat, 0.0)
    signs = np.sign(trimmed.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agreeing = np.where(np.sign(trimmed) == signs, trimmed, 0.0)
    mean = agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)
    np.testing.assert_allclose(tensors[name].numpy().ravel(), base(name).ravel() + 0.5 * mean, atol=2e-6)


def test_cycleqd_has_the_published_search() -> None:
    """Kuroki 2025: 15 bins, elite sampling from 0.5 to 0.8, w ~ N(1, 0.01), mutation up to 0.1, 1,200 candidates."""
    experiment, driver = preset("cycleqd"), setting("cycleqd")

    assert axes_of("cycleqd") == {f"weight.{name}.0.0": (0.0, 2.0) for name in EXPERTS}
    assert type(driver).__name__ == "MapElites"
    assert (driver.bins, driver.sampling, driver.least, driver.most) == (15, "elite", 0.5, 0.8)
    assert (driver.crossover, driver.crossover_sigma) == ("mixture", 0.01)
    assert (driver.growth, driver.mutation_rate, driver.steady) == (0.1, 0.0, True)
    assert driver.ranges == ((-1.0, 0.0),) * 3
    assert experiment.file.budget.candidates == 1200


def test_cycleqds_crossover_of_models_is_that_of_their_genomes() -> None:
    """The base and sum_i w_i tau_i / sum_i w_i, tau_i of the parents, is the model of their genes' weighted mean."""
    w, one, two = (1.02, 0.97), np.array([1.0, 0.1, 0.0]), np.array([0.3, 0.2, 0.9])
    decode = preset("cycleqd").space.decode
    parents = [built("cycleqd", decode(tuple(genes.tolist()))) for genes in (one, two)]
    child = built("cycleqd", decode(tuple(((w[0] * one + w[1] * two) / sum(w)).tolist())))

    for name in (QUERY.format(0), NORM.format(2), "lm_head.weight"):
        base = source("cycleqd", "base", name)
        taus = [parent[name].double().numpy() - base for parent in parents]
        expected = base + (w[0] * taus[0] + w[1] * taus[1]) / sum(w)
        np.testing.assert_allclose(child[name].numpy(), expected, atol=2e-6)


def test_m2n2_has_the_published_search() -> None:
    """Abrantes 2025, pretrained: an archive of 20, alpha 1, no mutation, one child at a time; a gene a layer."""
    driver = setting("m2n2")

    assert axes_of("m2n2") == {f"t.0.{k}": (0.0, 1.0) for k in range(6)}
    assert type(driver).__name__ == "M2n2"
    assert (driver.population, driver.alpha, driver.mutation_rate, driver.steady) == (20, 1.0, 0.0, True)
    assert [one.genome for one in preset("m2n2").proposals[:2]] == [(0.0,) * 6, (1.0,) * 6]


def test_m2n2s_first_child_is_a_slerp_with_a_split_point() -> None:
    """Before the split w of the way, behind it 1 - w; as in its code, lengths are not touched."""
    w, split = 0.3, 4
    genes = tuple(w if k < split else 1 - w for k in range(6))
    tensors = built("m2n2", preset("m2n2").space.decode(genes))

    for k in (0, 3, 4, 5):
        inside = [name for name in tensors if f".layers.{k}." in name]
        a, b = (np.concatenate([source("m2n2", m, n).ravel() for n in inside]) for m in ("cipher", "arithmetic"))
        angle = math.acos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        t = w if k < split else 1 - w
        expected = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        found = np.concatenate([tensors[name].double().numpy().ravel() for name in inside])
        np.testing.assert_allclose(found, expected, atol=2e-5)


#: What is smaller in the test than in the preset, beside `SMALL`: a few candidates of each.
RUNS: Mapping[str, dict[str, Any]] = {
    "sakana_ps": {"driver": {"population": 4}},
    "sakana_dfs": {"driver": {"population": 5}, "schedule": {"items": 12}},
    "merge3": {"driver": {"population": 6}, "schedule": {"random": 6, "items": 4}},
    "mergenetic": {"driver": {"population": 6}, "schedule": {"random": 6, "items": 4}},
    "mergekit_evolve": {"driver": {"population": 4}},
    "automerge_lfs": {"schedule": {"first": 4}},
    "recycle": {"driver": {"population": 4}},
    "bomf": {"driver": {"startup": 7}},
    "cycleqd": {},
    "m2n2": {"driver": {"population": 3}},
}


def small(name: str, folder: Path) -> Path:
    """Write a preset with 5 candidates and few items into a folder, and return its path."""
    where = ROOT / "experiments"
    data = yaml.safe_load((where / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, changes in RUNS[name].items():
        data[key] |= changes
    data |= SMALL | {"budget": {"candidates": 5}}
    models = data["models"]
    models["sources"] = {key: str(where / path) for key, path in models["sources"].items()}
    if "base" in models:
        models["base"] = str(where / models["base"])
    for objective in data["objectives"]:
        if isinstance(objective["task"], dict):
            objective["task"]["data"] = str(where / objective["task"]["data"])
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_preset_runs_on_the_tiny_models(name: str, tmp_path: Path) -> None:
    """A few candidates of its driver are built, asked and told, and the front is drawn."""
    path = small(name, tmp_path)
    result = CliRunner().invoke(app, ["run", str(path), "--runs", str(tmp_path)], env={"COLUMNS": "200"})

    assert result.exit_code == 0, result.output
    run = open_run(tmp_path / name)
    searched = [event.candidate for event in run.asked if event.origin == "search"]
    assert len(searched) == 5
    # a sum of weights that are all 0 cannot be divided by their sum, and is a failed candidate
    assert all(set(run.asked[number].genome or ()) == {0.0} for number in run.errors)
    assert all(run.told[number] is not None for number in searched)
    assert run.finished is not None

"""mergekit's YAML: what is read, what is refused, and what is written so that it is read back as the same model."""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.errors import ModelError, RecipeError
from evomerge.models.architecture import place
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import plan
from evomerge.models.mergekit import expressible, is_mergekit, read, to_mergekit
from evomerge.models.mergekit.conventions import LINES, Says, Values
from evomerge.models.mergekit.routes import compressed
from evomerge.models.mergekit.settings import Spot, resolved
from evomerge.operators import merge
from evomerge.recipe import Blend, Recipe, Route, Source

PACK = Path(os.environ.get("EVOMERGE_ORACLES") or Path(__file__).parents[1] / "data" / "oracles")
CASES = [
    case
    for case in json.loads((PACK / "manifest.json").read_text(encoding="utf-8"))["cases"]
    if case["source"]["project"] == "mergekit" and "mask" not in (case["inputs"].get("stats") or {})
]

LAYER = "model.layers.{}.mlp.up_proj.weight"


def file(folder: Path, text: str) -> Path:
    """Write a YAML file beside the models of the family."""
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def near(family: dict[str, Path], text: str) -> Path:
    """Write a YAML file where the models are found by their names."""
    return file(family["base"].parent, text)


def blends(recipe: Recipe, model: Path) -> dict[str, Blend]:
    """Return the blend of every tensor of a recipe."""
    checkpoint = Checkpoint(model)
    return {step.name: step.blend for step in plan(recipe, checkpoint.names, checkpoint.depth)}


@pytest.fixture(scope="module")
def recorded() -> Any:
    """Return the tensors of the pack."""
    return load_file(PACK / json.loads((PACK / "manifest.json").read_text(encoding="utf-8"))["tensor_file"])


def settled(name: str, native: Mapping[str, Any], models: list[str]) -> Values:
    """Return the native parameters of a case as the reader settles them for one tensor."""
    found: Values = {}
    for parameter, says in next(line for line in LINES if line.name == name).parameters.items():
        given = native.get(parameter, says.default)
        each = given if isinstance(given, list) else [given] * len(models)
        found[parameter] = dict(zip(models, each, strict=True)) if says.each else {"": given}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_table_says_what_mergekit_does(case: Mapping[str, Any], recorded: dict[str, torch.Tensor]) -> None:
    """With mergekit's own parameter names and values, each line of the table gives the numbers of its code."""

    def model(reference: str | None) -> dict[str, torch.Tensor] | None:
        if reference is None or not reference.endswith("/"):
            return None if reference is None else {"tensor": recorded[reference]}
        return {name.removeprefix(reference): each for name, each in recorded.items() if name.startswith(reference)}

    sources = [model(reference) for reference in case["inputs"]["models"]]
    names = [str(i) for i in range(len(sources))]
    values = settled(case["method"], case["source"].get("native_parameters") or {}, names)
    line = next(
        line
        for line in LINES
        if line.name == case["method"] and all(values[name][""] == flag for name, flag in line.when.items())
    )
    blend = line.blend(values, names)
    given = {
        name: [each[source] for source in names] if isinstance(each, Mapping) else each
        for name, each in blend.parameters.items()
    }
    weights = [blend.weights[source] for source in names]
    found = merge(blend.method, sources, base=model(case["inputs"]["base"]), weights=weights, parameters=given)

    for name, theirs in model(case["output"]).items():
        allowed = case["tolerance"]["atol"] + case["tolerance"]["rtol"] * theirs.double().abs()
        assert bool(((found[name].double() - theirs.double()).abs() <= allowed).all()), name
    assert line.values(blend, names, case["inputs"]["base"] is not None) is not None


@pytest.mark.parametrize(
    ("given", "t", "expected"),
    [
        (3, 0.5, 3.0),
        ("2.5", 0.5, 2.5),
        ([1, 2, 5], 0.0, 1.0),
        ([1, 2, 5], 1 / 3, 1 + 2 / 3),
        ([1, 2, 5], 0.75, 3.5),
        ([1, 2, 5], 1.0, 5.0),
        ([4], 0.3, 4.0),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 9}], 0.25, 0.25),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 2}, {"value": 3}], 0.0, 2.0),
        ([{"filter": "attn", "value": 1}], 0.0, 7.0),
        ({"filter": "layers.0.", "value": 6}, 0.0, 6.0),
        (None, 0.0, 7.0),
    ],
)
def test_a_setting_means_what_it_does_in_mergekit(given: Any, t: float, expected: float) -> None:
    """Scalars, gradients and filters as worked out by hand; what fits no filter falls to the next level."""
    found = resolved([given, None, 7], Says(default=8.0), Spot(tensor=LAYER.format(0), t=t), "here")

    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "gradient is empty"),
        ("much", "must be a number"),
        (float("nan"), "must be a number"),
        ([{"filter": "x"}], "entries of value and filter"),
        ([{"value": 1, "fliter": "x"}], "entries of value and filter"),
        ([0, [1]], "must be a number"),
    ],
)
def test_a_setting_of_no_use_is_refused(given: Any, says: str) -> None:
    """Not a number, not a filter: named."""
    with pytest.raises(RecipeError, match=says):
        resolved([given], Says(default=8.0), Spot(tensor="lm_head.weight", t=0.0), "here")


def test_gradients_begin_anew_in_each_slice(family: dict[str, Path]) -> None:
    """The embedding takes the first value of the first slice, the head the first of the last; one layer the last."""
    path = near(family, """
merge_method: task_arithmetic
base_model: base
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}
  - {model: base, layer_range: [0, 2]}
- sources:
  - {model: b, layer_range: [2, 3], parameters: {weight: [0.2, 0.3]}}
  - {model: base, layer_range: [2, 3]}
  parameters: {lambda: 0.5}
dtype: float32
""")  # fmt: skip
    recipe = read(path)
    found = blends(recipe, family["a"])

    assert recipe.base is not None
    assert recipe.base.name == "base"
    assert [source.name for source in recipe.sources] == ["a", "b"]
    assert found["model.embed_tokens.weight"].weights == {"a": 0.1}
    assert found[LAYER.format(0)].weights == {"a": 0.1}
    assert found[LAYER.format(1)].weights == {"a": 0.9}
    assert found[LAYER.format(2)].weights == {"b": 0.3}
    for name in ("model.norm.weight", "lm_head.weight"):
        assert found[name].weights == {"b": 0.2}
        assert found[name].parameters == {"scale": 0.5}
    assert recipe.layers == ()


def test_the_nearest_level_counts(family: dict[str, Path]) -> None:
    """The model's own, then the slice's, then the file's; a filter that fits nothing lets the next level speak."""
    path = near(family, """
merge_method: passthrough
parameters: {scale: [{filter: o_proj, value: 7}, {value: 8}]}
slices:
- sources: [{model: a, layer_range: [0, 1], parameters: {scale: [{filter: q_proj, value: 0.5}]}}]
  parameters: {scale: [{filter: k_proj, value: 3}, {filter: q_proj, value: 4}]}
- sources: [{model: a, layer_range: [0, 1]}]
  parameters: {scale: [{filter: layers.1., value: 2}, {value: 5}]}
dtype: float32
""")  # fmt: skip
    recipe = read(path)
    found = {name: blend.parameters.get("scale", 1.0) for name, blend in blends(recipe, family["a"]).items()}

    attention = "model.layers.0.self_attn.{}.weight"
    assert [found[attention.format(p)] for p in ("q_proj", "k_proj", "o_proj", "v_proj")] == [0.5, 3, 7, 8]
    assert found["model.embed_tokens.weight"] == 8
    assert {scale for name, scale in found.items() if ".1." in name} == {2.0}  # filters see the name that is built
    assert found["lm_head.weight"] == 5
    assert recipe.layers == (0, 0)


def test_the_base_is_a_source_where_the_method_takes_it_as_one(family: dict[str, Path]) -> None:
    """Slerp goes from the base to the other model, whatever their order; linear and karcher count an unlisted base."""
    slerp = read(near(family, "{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.2}}"))
    karcher = read(near(family, "{merge_method: karcher, base_model: base, models: [{model: a}, {model: b}]}"))

    assert [source.name for source in slerp.sources] == ["a", "b"]
    assert slerp.base is None
    assert next(slerp.blends()).parameters["t"] == 0.2
    assert sorted(source.name for source in karcher.sources) == ["a", "b", "base"]


def test_files_are_short_where_the_recipe_is(family: dict[str, Path]) -> None:
    """One blend is one route; stored dtype, out_dtype before dtype; the same folder name twice gets a number."""
    weighed = "{{model: {}, parameters: {{weight: 1}}}}"
    plain = read(near(family, f"{{merge_method: linear, models: [{weighed.format('a')}]}}"))
    other = family["a"].parent / "other" / "a"
    if not other.exists():
        other.parent.mkdir()
        other.symlink_to(family["b"])
    models = ", ".join(weighed.format(model) for model in ("a", "./other/a", "b"))
    both = read(near(family, f"{{merge_method: linear, dtype: float32, out_dtype: float16, models: [{models}]}}"))

    assert len(plain.routes) == 1
    assert plain.dtype == "bfloat16"
    assert both.dtype == "float16"
    assert [source.name for source in both.sources] == ["a", "a-2", "b"]


MODELS = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
REFUSED = [
    ("[1]", "expected a mapping"),
    ("{merge_method: [", "not YAML"),
    (f"merge_method: tiess\n{MODELS}", "merge_method: 'tiess' is not known; did you mean 'ties'"),
    (f"merge_method: linear\nfoo: 1\n{MODELS}", "foo: unknown key"),
    (f"merge_method: linear\nmodules: {{x: 1}}\n{MODELS}", "modules: no recipe can say it"),
    (f"merge_method: linear\nchat_template: auto\n{MODELS}", "chat_template: no recipe can say it"),
    ("merge_method: linear", "either models or slices"),
    ("merge_method: linear\nmodels: []", "either models or slices"),
    (f"merge_method: linear\n{MODELS}\nslices: [1]", "either models or slices"),
    (f"merge_method: ties\n{MODELS}", "base_model: missing; ties needs one"),
    (f"merge_method: linear\ndtype: float8\n{MODELS}", "dtype: 'float8' is not known"),
    (f"merge_method: linear\nparameters: {{wieght: 1}}\n{MODELS}", "wieght: linear has no such parameter"),
    (f"merge_method: linear\nparameters: [1]\n{MODELS}", "parameters: must be a mapping"),
    (f"merge_method: linear\nparameters: {{normalize: [0, 1]}}\n{MODELS}", "normalize: must be true or false"),
    ("merge_method: linear\nmodels: [{model: a}]", "parameter weight of a: nothing is given for tensor"),
    ("merge_method: linear\nmodels: [{model: a+lora}]", "adds a LoRA"),
    ("merge_method: linear\nmodels: [{model: {model: {path: a}, lora: {path: b}}}]", "lora: no recipe can say it"),
    ("merge_method: linear\nmodels: [{model: [a]}]", "must be a folder or a hub id"),
    ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "model: missing"),
    ("merge_method: linear\nmodels: [{model: a, layer_range: [0, 1]}]", "layer_range: unknown key"),
    ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "passthrough merges 1 models, got 2"),
    ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "a stands there twice"),
    ("merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]", "at least 2 models besides the base, got 1"),
    ("merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, lambda: 2}}]",
     "lambda: all models share it"),
    ("merge_method: passthrough\nslices: [{sources: []}]", "must be a list of models"),
    ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]", "layer_range: must be two whole numbers"),
    ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 9]}]}]", "not within the 3 layers"),
    ("merge_method: passthrough\nslices: [{residual_weight: 1, sources: []}]", "residual_weight: unknown key"),
    ("merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]",
     "of one length"),
    ("merge_method: ties\nbase_model: base\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
     "base is not among its sources"),
    ("merge_method: ram\nslices: [{base_model: a, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: "
     "[0, 1]}]}, {base_model: b, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]",
     "several base models"),
    (f"merge_method: linear\ntokenizer_source: base\ntokenizer: {{source: base}}\n{MODELS}", "both tokenizer and"),
    (f"merge_method: linear\ntokenizer: {{tokens: {{x: 1}}}}\n{MODELS}", "tokenizer.tokens: no recipe can say it"),
    (f"merge_method: linear\ntokenizer: {{pad_to_multiple_of: 8}}\n{MODELS}", "pad_to_multiple_of: no recipe"),
    (f"merge_method: linear\ntokenizer_source: base2\n{MODELS}", "base2 is none of the merged models"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(text: str, says: str, family: dict[str, Path]) -> None:
    """One line that names what is wrong; nothing is ignored that mergekit heeds."""
    with pytest.raises(RecipeError, match=says.replace("[", r"\[").replace("(", r"\(")) as caught:
        read(near(family, text))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_are_named(family: dict[str, Path], tmp_path: Path) -> None:
    """A missing file, a missing model, and what is no file of mergekit's."""
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ModelError, match="no folder"):
        read(near(family, "{merge_method: passthrough, models: [{model: ./nowhere}]}"))
    assert not is_mergekit(tmp_path / "none.yaml")
    assert not is_mergekit(file(tmp_path, "routes: []"))
    assert is_mergekit(file(tmp_path, "merge_method: linear"))


@pytest.mark.parametrize("tokenizer", ["union", "base", "b"])
def test_a_tokenizer_is_named_as_a_source(tokenizer: str, family: dict[str, Path]) -> None:
    """`base` is the base's name; where the method takes the base as a model, a base stays for its tokens."""
    text = f"merge_method: linear\nbase_model: b\ntokenizer_source: {tokenizer}\n{MODELS}"
    recipe = read(near(family, text))

    assert recipe.tokenizer == ("union" if tokenizer == "union" else "b")
    assert recipe.base is not None
    assert recipe.base.path == str(family["b"].resolve())


@pytest.mark.parametrize("seed", range(8))
def test_routes_give_every_tensor_its_blend(seed: int, family: dict[str, Path]) -> None:
    """However blends are scattered, the first route that fits a tensor has its own."""
    names = Checkpoint(family["a"]).names
    draw = random.Random(seed)
    kinds = [Blend(method="linear", weights={"a": float(i)}) for i in range(2 + seed // 4)]
    by = [lambda name, at: name, lambda name, at: at.layer, lambda name, at: at.group + str(at.end),
          lambda name, at: "norm" in name][seed % 4]  # fmt: skip
    chosen: dict[object, Blend] = {}
    wanted = {name: chosen.setdefault(by(name, place(name, 3)), draw.choice(kinds)) for name in names}
    routes = compressed(wanted, 3, ["norm", "*", "up_proj", "["])
    recipe = Recipe(sources=(Source(name="a", path="a"),), routes=routes, dtype="float32")

    assert {step.name: step.blend for step in plan(recipe, names, 3)} == wanted


def two(blend: Blend, *more: Route, base: bool = True, **rest: Any) -> Recipe:
    """Return a recipe of two sources that merges most tensors by one blend."""
    return Recipe(
        sources=(Source(name="a", path="a"), Source(name="b", path="b")),
        base=Source(name="base", path="base") if base else None,
        routes=(*more, Route(blend=blend)), dtype="bfloat16", **rest,
    )  # fmt: skip


def of(method: str, a: float = 0.5, b: float = 0.25, **parameters: Any) -> Blend:
    """Return a blend of a and b."""
    return Blend(method=method, weights={"a": a, "b": b}, parameters=parameters)


TIES = of("ties", scope="tensor", density={"a": 0.3})
WRITTEN = [
    two(of("linear"), base=False),
    two(of("linear", normalize=0.0), Route(blend=of("linear", 1.0, 0.0), groups=("mlp",)), base=False),
    two(of("slerp", t=0.25, zero="right_angle"), base=False),
    two(of("slerp", 0.2, 0.6, zero="right_angle"), base=False),
    two(of("nuslerp", axis="rows", zero="right_angle")),
    two(of("karcher", 1.0, 1.0), base=False),
    two(of("base | mean | scale", scale=0.5)),
    two(TIES, Route(blend=of("ties", 1.0, -1.0, scope="tensor"), layers=(1, 2)),
        Route(blend=of("ties", 0.0, 0.0, scope="tensor"), groups=("head",))),
    two(of("ties", scope="tensor", rescale="l1", scale=0.7), layers=(0, 2, 1, 2)),
    two(of("task_arithmetic"), layers=(0, {"a": 1, "b": 2, "base": 1}, {"a": 2, "b": 1, "base": 2})),
    two(Blend(method="passthrough", weights={"a": 1.0}),
        Route(blend=Blend(method="passthrough", weights={"b": 1.0}, parameters={"scale": 0.5}), layers=(2, 4)),
        Route(blend=Blend(method="passthrough", weights={"b": 1.0}), groups=("head",)),
        base=False, layers=(0, 1, 1, 2)),
    two(of("model_stock", 1.0, 1.0, scope="row", clamp=0.0, floor=1e-6)),
    two(of("linear"), base=False, tokenizer="union"),
    two(of("linear"), base=False, tokenizer="b"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", WRITTEN, ids=range(len(WRITTEN)))
def test_what_is_written_is_read_as_the_same_model(recipe: Recipe, family: dict[str, Path]) -> None:
    """Every tensor comes from the same tensors by a blend that merges alike."""
    checkpoint = Checkpoint(family["a"])
    text = to_mergekit(recipe, checkpoint.names, checkpoint.depth)
    assert text is not None
    assert expressible(recipe, checkpoint.names, checkpoint.depth) == ""
    again = read(near(family, text))

    def steps(given: Recipe) -> dict[str, object]:
        based = given.base is not None
        found = {}
        for step in plan(given, checkpoint.names, checkpoint.depth):
            alone = len(step.blend.weights) == 1
            models = [s.name for s in given.sources if not alone or s.name in step.blend.weights]
            form = next(filter(None, (line.values(step.blend, models, based) for line in LINES)))
            found[step.name] = (form, {name: step.of(name) for name, w in step.blend.weights.items() if w})
        return found

    assert steps(again) == steps(recipe)
    assert again.dtype == recipe.dtype
    assert again.tokenizer == recipe.tokenizer


BEYOND = [
    (two(of("ties")), "no method of mergekit does what ties"),
    (two(of("base | sign1bit | sum")), "no method of mergekit does what base"),
    (two(of("dare_ties", rescale="l1")), "random masks"),
    (two(of("slerp")), "no method of mergekit does what slerp"),
    (two(of("linear"), Route(blend=of("task_arithmetic"), groups=("mlp",))), "no single method"),
    (two(of("fisher"), base=False), "takes statistics"),
    (two(of("linear", 0.0, 0.0), base=True), "no method of mergekit"),
    (two(of("linear"), tokenizer="union"), "gives tokens"),
    (two(Blend(method="passthrough", weights={"a": 1.0}),
         Route(blend=Blend(method="passthrough", weights={"b": 1.0}), groups=("mlp",)), base=False), "several models"),
    (two(Blend(method="passthrough", weights={"a": 1.0}),
         Route(blend=Blend(method="passthrough", weights={"b": 1.0}), groups=("head",)), base=False), "another model"),
    (Recipe(sources=(Source(name="a", recipe=two(TIES)), Source(name="b", path="b")),
            routes=(Route(blend=of("linear")),), dtype="float32"), "is a recipe itself"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "says"), BEYOND)
def test_what_mergekit_cannot_say_is_not_written(recipe: Recipe, says: str, family: dict[str, Path]) -> None:
    """A reason in one line, and no text that would make another model."""
    checkpoint = Checkpoint(family["a"])

    assert to_mergekit(recipe, checkpoint.names, checkpoint.depth) is None
    assert says in expressible(recipe, checkpoint.names, checkpoint.depth)


def test_the_text_is_plain_yaml(family: dict[str, Path]) -> None:
    """Layers that differ have a filter each, and no gradient that would round a value."""
    checkpoint = Checkpoint(family["a"])
    special = Route(blend=of("ties", 0.1, scope="tensor", density={"a": 0.3}), layers=(1, 2))
    data = yaml.safe_load(str(to_mergekit(two(TIES, special), checkpoint.names, 3)))

    assert data["base_model"] == "base"
    assert [each["model"] for each in data["models"]] == ["a", "b", "base"]
    assert data["models"][0]["parameters"]["weight"] == [{"filter": "model.layers.1.", "value": 0.1}, {"value": 0.5}]
    assert data["models"][0]["parameters"]["density"] == 0.3
    assert data["models"][1]["parameters"]["density"] == 0.2
    assert data["out_dtype"] == "bfloat16"

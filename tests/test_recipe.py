"""Recipes: routes, round trips through YAML, and a digest that counts what is built and not how it is written."""

import copy
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import (
    DTYPES,
    ENDS,
    GROUPS,
    Blend,
    Recipe,
    Route,
    Source,
    copy_of,
    depths_of,
    from_plain,
    models_of,
    read,
    to_yaml,
)
from evomerge.value import plain

REALS = st.floats(allow_nan=False, allow_infinity=False)
#: Names that YAML 1.1 would read as something else, beside any text.
NAMES = st.text(min_size=1, max_size=8) | st.sampled_from(["yes", "null", "1", "1e3", "2020-01-01", "a: b", "- x", "~"])


@st.composite
def recipes(draw, nested=True):
    """Draw a recipe over a few sources, one of them a recipe too, with parameters and routes of every kind."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    folders = st.builds(Source, name=st.none(), path=NAMES, fingerprint=st.text(max_size=4))
    inner = st.builds(Source, name=st.none(), recipe=recipes(nested=False)) if nested else folders
    sources = tuple(replace(draw(folders | inner), name=name) for name in names)
    base = draw(st.none() | st.builds(Source, name=NAMES.filter(lambda name: name not in names), path=NAMES))
    blends = st.builds(
        Blend,
        method=NAMES,
        weights=st.dictionaries(st.sampled_from(names), REALS),
        parameters=st.dictionaries(NAMES, REALS | st.text(max_size=3) | st.dictionaries(st.sampled_from(names), REALS)),
    )
    ranges = st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair)))
    routes = st.builds(
        Route,
        blend=blends,
        tensors=NAMES,
        groups=st.lists(st.sampled_from(GROUPS + ENDS), max_size=2).map(tuple),
        layers=st.none() | ranges,
    )
    everyone = [*names, *([base.name] if base else [])]
    each = st.fixed_dictionaries(dict.fromkeys(everyone, st.integers(0, 9)))
    return Recipe(
        sources=sources,
        base=base,
        routes=tuple(draw(st.lists(routes, min_size=1, max_size=3))),
        layers=tuple(draw(st.lists(st.integers(0, 99) | each, max_size=3))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers()),
        calibration=draw(st.none() | st.builds(Source, name=NAMES, path=NAMES)),
        tokenizer=draw(st.sampled_from(["", "union", *everyone])),
    )


BLEND = Blend(
    method="dare_ties", weights={"a": 0.5, "b": 0.25}, parameters={"density": {"a": 0.5, "b": 0.75}, "scale": 2.0}
)
INNER = Recipe(
    sources=(Source(name="c", path="models/c", fingerprint="4"),),
    routes=(Route(blend=Blend(method="linear", weights={"c": 0.5})),),
    dtype="float32",
)
RECIPE = Recipe(
    sources=(
        Source(name="a", path="models/a", fingerprint="1"),
        Source(name="b", path="models/b", fingerprint="2"),
        Source(name="d", recipe=INNER),
    ),
    base=Source(name="base", path="models/base", fingerprint="3"),
    routes=(
        Route(blend=replace(BLEND, method="linear", parameters={}), tensors="*.q_proj.*", groups=("attention",)),
        Route(blend=BLEND, layers=(0, 2)),
        Route(blend=BLEND),
    ),
    layers=(0, {"a": 1, "b": 0, "d": 1, "base": 2}),
    dtype="bfloat16",
    seed=7,
    calibration=Source(name="texts", path="texts.jsonl", fingerprint="5"),
    tokenizer="union",
)


def only(method="task_arithmetic", weights=None, seed=0, names=("a", "b"), **parameters):
    """Return a recipe with one blend everywhere."""
    blend = Blend(method=method, weights=weights or {"a": 0.5, "b": 0.25}, parameters=parameters)
    sources = tuple(Source(name=name, path=name, fingerprint=name) for name in names)
    base = Source(name="base", path="base", fingerprint="0")
    return Recipe(sources=sources, base=base, routes=(Route(blend=blend),), dtype="float32", seed=seed)


def leaves(form, path=()):
    """Yield the path and value of every scalar of a plain form."""
    pairs = form.items() if isinstance(form, dict) else enumerate(form) if isinstance(form, list) else None
    if pairs is None:
        yield path, form
        return
    for key, item in pairs:
        yield from leaves(item, (*path, key))


def rename(form, old, new):
    """Let the weights, parameters and layers of a recipe's plain form follow the new name of a source."""
    blends = [route["blend"] for route in form["routes"]]
    given = [blend["parameters"].get("density", {}) for blend in blends]
    for names in [*(blend["weights"] for blend in blends), *given, *form["layers"]]:
        if isinstance(names, dict) and old in names:
            names[new] = names.pop(old)


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_yaml_gives_the_recipe_back(recipe):
    """Text and back is the same recipe with the same digest, whatever its names look like and what it is nested in."""
    back = from_plain(yaml.safe_load(to_yaml(recipe)), "here")

    assert back == recipe
    assert back.digest == recipe.digest


def test_a_file_gives_the_recipe_back(tmp_path):
    """What was written to a file is read from it."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(RECIPE), encoding="utf-8")

    assert read(tmp_path / "recipe.yaml") == RECIPE


def test_equal_blends_are_written_once_and_defaults_never():
    """The text of a recipe holds each blend once, its version, and no key that says what goes without saying."""
    simple = replace(RECIPE, sources=RECIPE.sources[:2], layers=())

    assert to_yaml(simple).count("method: dare_ties") == 1
    assert to_yaml(simple).count("method: ") == 2
    assert yaml.safe_load(to_yaml(only())) == {
        "sources": [{"name": name, "path": name, "fingerprint": name} for name in "ab"],
        "base": {"name": "base", "path": "base", "fingerprint": "0"},
        "routes": [{"blend": {"method": "task_arithmetic", "weights": {"a": 0.5, "b": 0.25}}}],
        "dtype": "float32",
        "version": 2,
    }


@given(recipes(), st.text(min_size=1, max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_digest_does_not_depend_on_paths_or_the_order_of_keys(recipe, path, rng):
    """The same models elsewhere, and mappings filled in another order, are the same recipe."""

    def shuffled(form):
        if isinstance(form, dict):
            keys = list(form)
            rng.shuffle(keys)
            return {key: shuffled(form[key]) for key in keys}
        return [shuffled(item) for item in form] if isinstance(form, list) else form

    def moved(source):
        if source is None or source.recipe is None:
            return source and replace(source, path=path)
        inner = source.recipe
        return replace(source, recipe=replace(inner, sources=tuple(map(moved, inner.sources)), base=moved(inner.base)))

    elsewhere = replace(
        recipe,
        sources=tuple(map(moved, recipe.sources)),
        base=moved(recipe.base),
        calibration=moved(recipe.calibration),
    )

    assert elsewhere.digest == recipe.digest
    assert from_plain(shuffled(plain(recipe)), "here").digest == recipe.digest


PATHS = [
    path
    for path, item in leaves(plain(RECIPE))
    if path[-1] not in ("path", "version") and item is not None and path != ("sources", 2, "fingerprint")
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_the_digest_counts_every_field(path):
    """Any other number or text, anywhere but in a path or in the seed of a recipe without masks, is another recipe."""
    form = copy.deepcopy(plain(RECIPE))
    holder = form
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    other = {"bfloat16": "float16", "float32": "float16", "union": "a", "attention": "mlp", "linear": "slerp"}
    other |= {"dare_ties": "ties"} | ({"": "union"} if path[-1] == "tokenizer" else {})
    holder[path[-1]] = other.get(old, f"{old}x") if isinstance(old, str) else old + 1
    if path[-1] == "name":
        rename(form if len(path) < 4 else form["sources"][2]["recipe"], old, f"{old}x")

    same = path[-1] == "seed" and len(path) > 1
    assert (from_plain(form, "here").digest == RECIPE.digest) == same


def test_the_digest_counts_what_is_there():
    """A base, calibration or layer less, sources, routes or layers in another order, a weight less: another recipe."""
    others = [
        replace(RECIPE, base=None, layers=RECIPE.layers[:1]),
        replace(RECIPE, layers=RECIPE.layers[:1]),
        replace(RECIPE, layers=RECIPE.layers[::-1]),
        replace(RECIPE, layers=()),
        replace(RECIPE, sources=RECIPE.sources[::-1]),
        replace(RECIPE, routes=RECIPE.routes[::-1]),
        replace(RECIPE, routes=RECIPE.routes[1:]),
        replace(RECIPE, routes=(Route(blend=replace(BLEND, weights={"a": 0.5})), *RECIPE.routes[1:])),
        replace(RECIPE, calibration=None),
        replace(RECIPE, tokenizer=""),
    ]

    assert len({recipe.digest for recipe in [RECIPE, *others]}) == 11


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (only("task_arithmetic"), only("base | sum")),
        (only("ties", density=0.3), only("base | trim(0.3, scope=model) | elect | mean")),
        (only("ties", density=0.3), only("ties", **{"trim.density": 0.3})),
        (only("ties", density={"a": 0.3, "b": 0.3}), only("ties", density=0.3)),
        (only("ties", density={"a": 0.3}), only("ties", density={"a": 0.3, "b": 0.2})),
        (only("ties", density=1.0, scale=1), only("base | elect | mean")),
        (only("ties", weights={"a": 1}), only("base | trim(0.2, scope=model) | mean", weights={"a": 1.0})),
        (only(weights={"a": 1.0, "b": 0.0}), only(weights={"a": 1.0})),
        (only(weights={"a": 1.0, "b": -0.0}), only(weights={"a": 1.0})),
        (
            only("ties", weights={"a": 1.0, "b": 0.0}, density={"a": 0.5, "b": 0.9}),
            only("ties", weights={"a": 1.0}, density=0.5),
        ),
        (only(weights={"b": 2, "a": 1}), only(weights={"a": 1.0, "b": 2.0})),
        (only(seed=1), only(seed=2)),
        (only("base | drop(1) | sum", seed=1), only("base | sum", seed=2)),
        (only("dare_linear", density={"a": 1.0, "b": 1.0}, seed=1), only("base | mean(normalize=0)", seed=2)),
    ],
)
def test_what_builds_the_same_by_the_same_arithmetic_has_one_digest(one, other):
    """Named methods are their lines; stages and sources that do nothing, unread seeds and spellings do not count."""
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (only("dare_linear", seed=1), only("dare_linear", seed=2)),
        (only("ties", density=0.3), only("ties", density=0.4)),
        (only("ties", density={"a": 0.3}), only("ties", density=0.3)),
        (only("base | trim | elect | sum"), only("base | elect | sum")),
        (only("base | elect(plus) | sum"), only("base | elect(minus) | sum")),
        (only(names=("a", "b")), only(names=("b", "a"))),
        (only(names=("a", "b")), only(names=("a", "b", "c"))),
        (only("linear"), only("task_arithmetic")),
    ],
)
def test_what_builds_something_else_has_another_digest(one, other):
    """Masks of another seed, another value, a stage more, another order or number of sources."""
    assert one.digest != other.digest


def test_the_digest_counts_an_inner_recipe_by_its_own():
    """A source that is a recipe counts as what that recipe builds: by value, not by how or where it is written."""
    outer = replace(only(), sources=(*only().sources, Source(name="d", recipe=only("ties", density=0.5))))

    def with_inner(inner):
        return replace(outer, sources=(*outer.sources[:2], Source(name="d", recipe=inner))).digest

    assert with_inner(only("base | trim(0.5, scope=model) | elect | mean")) == outer.digest
    assert with_inner(only("ties", density=0.6)) != outer.digest
    assert with_inner(only("dare_ties", seed=1)) != with_inner(only("dare_ties", seed=2))


def test_a_copy_takes_every_layer_from_one_source():
    """The recipe of a source as it is: weight one, no base, layer i from layer i."""
    source = Source(name="a", path="p")
    recipe = copy_of(source, 3, "float32")

    assert recipe.layers == (0, 1, 2)
    assert recipe.routes == (Route(blend=Blend(method="linear", weights={"a": 1.0}, parameters={})),)
    assert (recipe.sources, recipe.base, recipe.dtype) == ((source,), None, "float32")


def test_the_first_route_that_fits_takes_a_tensor():
    """Pattern, groups and layers must all fit; a range of layers never takes the ends."""
    several = [Blend(method=str(i), weights={}) for i in range(5)]
    routes = (
        Route(blend=several[0], tensors="*.q_proj.*", layers=(1, 3)),
        Route(blend=several[1], groups=("mlp", "embedding")),
        Route(blend=several[2], layers=(0, 2)),
        Route(blend=several[3], tensors="lm_[a-z]*", groups=("head",)),
        Route(blend=several[4]),
    )
    recipe = Recipe(sources=(Source(name="a", path="a"),), routes=routes, dtype="float32")
    found = {
        ("model.layers.1.self_attn.q_proj.weight", "attention", 1): 0,
        ("model.layers.2.self_attn.q_proj.weight", "attention", 2): 0,
        ("model.layers.3.self_attn.q_proj.weight", "attention", 3): 4,
        ("model.layers.0.self_attn.q_proj.weight", "attention", 0): 2,
        ("model.layers.1.self_attn.q_PROJ.weight", "attention", 1): 2,
        ("model.layers.2.mlp.up_proj.weight", "mlp", 2): 1,
        ("model.embed_tokens.weight", "embedding", None): 1,
        ("lm_head.weight", "head", None): 3,
        ("model.norm.weight", "head", None): 4,
        ("odd.q_proj.weight", "other", None): 4,
    }

    assert list(recipe.blends()) == several
    for (tensor, group, layer), number in found.items():
        assert recipe.route(tensor, group, layer) == routes[number], tensor


@pytest.mark.parametrize(("layer", "where"), [(None, r"group head"), (4, "group head, layer 4")])
def test_a_tensor_that_fits_no_route_is_named(layer, where):
    """The error says which tensor, where it stands, and the way out."""
    recipe = replace(RECIPE, routes=(Route(blend=BLEND, groups=("mlp",)),))

    with pytest.raises(RecipeError, match=rf"^tensor 'x' \({where}\) fits no route; add one without conditions"):
        recipe.route("x", "head", layer)


def test_the_depths_of_a_source_are_its_own():
    """One number is everybody's, a mapping gives each its own."""
    assert depths_of(RECIPE, "a") == [0, 1]
    assert depths_of(RECIPE, "b") == [0, 0]
    assert depths_of(RECIPE, "base") == [0, 2]
    assert depths_of(replace(RECIPE, layers=()), "a") == []


def test_models_are_all_that_lie_in_folders():
    """Those of inner recipes too, each once; one name for two models is an error."""
    a, b, _ = RECIPE.sources

    assert models_of(RECIPE) == {"a": a, "b": b, "c": INNER.sources[0], "base": RECIPE.base}
    again = Source(name="d", recipe=replace(INNER, sources=(a,), routes=(Route(blend=replace(BLEND, weights={})),)))
    assert models_of(replace(RECIPE, sources=(a, b, again))) == {"a": a, "b": b, "base": RECIPE.base}
    other = Source(name="d", recipe=replace(INNER, base=replace(a, path="elsewhere")))
    with pytest.raises(RecipeError, match="'a' names two models, models/a and elsewhere; rename one"):
        models_of(replace(RECIPE, sources=(a, b, other)))


FIRST = plain(RECIPE.routes[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "recipe version 1 is not known; this evomerge reads version 2"),
        ({"dtype": "float64"}, "recipe dtype 'float64' is not known; use one of float32, bfloat16, float16"),
        (
            {"sources": [{"name": "a", "path": "1"}] * 2},
            r"recipe sources and base must have distinct names, got \['a', 'a', 'base'\]",
        ),
        ({"base": {"name": "a", "path": "1"}}, r"recipe sources and base must have distinct names"),
        ({"sources": [{"name": "a", "path": "1"}], "layers": []}, "a blend of the recipe weighs 'b'"),
        (
            {"routes": [{"blend": plain(BLEND) | {"weights": {"base": 1}}}]},
            "a blend of the recipe weighs 'base'; known: a",
        ),
        ({"sources": [{"name": "a"}]}, r".*sources\[0\]: source 'a' must have either a path or a recipe"),
        ({"sources": [{"name": "a", "path": "x", "recipe": plain(INNER)}]}, ".*must have either a path or a recipe"),
        (
            {"sources": [{"name": "a", "recipe": plain(INNER) | {"dtype": "f"}}]},
            r".*sources\[0\].recipe: recipe dtype 'f' is not known",
        ),
        ({"sed": 1}, r".*sed: unknown key; did you mean 'seed'\?"),
        ({"routes": []}, "recipe has no route; give at least one, with a blend"),
        ({"routes": [{"tensors": "x"}]}, r".*routes\[0\].blend: missing"),
        ({"routes": [FIRST | {"groups": ["mpl"]}]}, r".*routes\[0\]: group 'mpl' is not known; did you mean 'mlp'\?"),
        ({"routes": [FIRST | {"layers": [2, 2]}]}, r".*routes\[0\]: layers must be the first layer and the one after"),
        ({"routes": [FIRST | {"layers": [1]}]}, r".*routes\[0\]: layers must be .*, got \[1\]"),
        ({"routes": [FIRST | {"layers": 1}]}, r".*routes\[0\].layers: expected a list, got int 1"),
        (
            {"routes": [{"blend": plain(BLEND) | {"weights": {"a": float("nan")}}}]},
            ".*blend.weights.a: expected a finite number",
        ),
        (
            {"routes": [{"blend": plain(BLEND) | {"parameters": {"p": float("inf")}}}]},
            ".*blend.parameters.p: expected a finite number",
        ),
        ({"layers": [{"a": 0, "b": 1}]}, r"recipe layer 0: give one layer for all, or each of \['a', 'b', 'd', "),
        ({"layers": [0, "1"]}, r".*layers\[1\]: expected a mapping, got str '1'"),
        ({"tokenizer": "bse"}, r"recipe tokenizer 'bse' is no source; did you mean 'base'\?"),
        (
            {"calibration": {"name": "texts", "recipe": plain(INNER)}},
            "recipe calibration must be a file of texts; give its path",
        ),
    ],
)
def test_wrong_recipes_are_refused_with_their_place(change, message):
    """The error names the file, the key path and what does not fit."""
    with pytest.raises(RecipeError, match=rf"^here(: |\.){message}"):
        from_plain(plain(RECIPE) | change, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xfa", "not YAML"),
        (b"seed: 2020-13-45", "not YAML"),
        (b"", "expected a mapping for Recipe, got NoneType None"),
        (b"- 1", r"expected a mapping for Recipe, got list \[1\]"),
        (b"a: &a [*a]", "unknown key"),
    ],
)
def test_files_that_are_no_recipe_are_refused_in_one_line(content, message, tmp_path):
    """Whatever is in a file, the error is one line that names it."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)

    with pytest.raises(RecipeError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """A path with no file, or a folder, says so with the way out."""
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read \(No such file.*give the path of a recipe.yaml"):
        read(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path)

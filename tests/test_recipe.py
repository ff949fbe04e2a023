"""Recipes: round trips through YAML, and a digest that counts everything but where the models lie."""

import copy
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import DTYPES, GROUPS, Blend, Layer, Recipe, Source, copy_of, from_plain, read, to_yaml
from evomerge.value import plain

REALS = st.floats(allow_nan=False, allow_infinity=False)
#: Names that YAML 1.1 would read as something else, beside any text.
NAMES = st.text(min_size=1, max_size=8) | st.sampled_from(["yes", "null", "1", "1e3", "2020-01-01", "a: b", "- x", "~"])


@st.composite
def recipes(draw):
    """Draw a recipe over a few sources, with parameters of every kind."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    sources = tuple(Source(name=name, path=draw(NAMES), fingerprint=draw(st.text(max_size=4))) for name in names)
    blends = st.builds(
        Blend,
        method=NAMES,
        weights=st.dictionaries(st.sampled_from(names), REALS),
        parameters=st.dictionaries(NAMES, REALS | st.text(max_size=3) | st.dictionaries(st.sampled_from(names), REALS)),
    )
    layers = st.builds(Layer, depth=st.integers(0, 99), attention=blends, mlp=blends, other=blends)
    return Recipe(
        sources=sources,
        base=draw(st.none() | st.builds(Source, name=NAMES, path=NAMES)),
        embedding=draw(blends),
        layers=tuple(draw(st.lists(layers, max_size=3))),
        head=draw(blends),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers()),
    )


BLEND = Blend(method="ties", weights={"a": 0.5, "b": 0.25}, parameters={"density": {"a": 0.5, "b": 0.75}, "scale": 1.0})
RECIPE = Recipe(
    sources=(Source(name="a", path="models/a", fingerprint="1"), Source(name="b", path="models/b", fingerprint="2")),
    base=Source(name="base", path="models/base", fingerprint="3"),
    embedding=BLEND,
    layers=tuple(Layer(depth=i, attention=BLEND, mlp=BLEND, other=BLEND) for i in range(2)),
    head=BLEND,
    dtype="bfloat16",
    seed=7,
)


def leaves(form, path=()):
    """Yield the path and value of every scalar of a plain form."""
    pairs = form.items() if isinstance(form, dict) else enumerate(form) if isinstance(form, list) else None
    if pairs is None:
        yield path, form
        return
    for key, item in pairs:
        yield from leaves(item, (*path, key))


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_yaml_gives_the_recipe_back(recipe):
    """Text and back is the same recipe with the same digest, whatever its names look like."""
    back = from_plain(yaml.safe_load(to_yaml(recipe)), "here")

    assert back == recipe
    assert back.digest == recipe.digest


def test_a_file_gives_the_recipe_back(tmp_path):
    """What was written to a file is read from it."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(RECIPE), encoding="utf-8")

    assert read(tmp_path / "recipe.yaml") == RECIPE


def test_equal_blends_are_written_once():
    """The text of a recipe with one blend everywhere holds its method once."""
    assert to_yaml(RECIPE).count("method: ties") == 1
    assert to_yaml(replace(RECIPE, head=replace(BLEND, method="linear"))).count("method: ") == 2


@given(recipes(), st.text(max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_digest_does_not_depend_on_paths_or_the_order_of_keys(recipe, path, rng):
    """The same models elsewhere, and mappings filled in another order, are the same recipe."""

    def shuffled(form):
        if isinstance(form, dict):
            keys = list(form)
            rng.shuffle(keys)
            return {key: shuffled(form[key]) for key in keys}
        return [shuffled(item) for item in form] if isinstance(form, list) else form

    moved = replace(recipe, sources=tuple(replace(source, path=path) for source in recipe.sources))
    if moved.base is not None:
        moved = replace(moved, base=replace(moved.base, path=path))

    assert moved.digest == recipe.digest
    assert from_plain(shuffled(plain(recipe)), "here").digest == recipe.digest


PATHS = [path for path, _ in leaves(plain(RECIPE)) if path[-1] not in ("path", "version")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_the_digest_counts_every_field(path):
    """Any other number or text, anywhere but in a path, is another recipe."""
    form = copy.deepcopy(plain(RECIPE))
    holder = form
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    holder[path[-1]] = "float16" if path[-1] == "dtype" else old + "x" if isinstance(old, str) else old + 1
    if path[-1] == "name" and path[0] == "sources":  # the weights must follow
        text = yaml.safe_dump(form).replace(f" {old}: ", f" {old}x: ")
        form = yaml.safe_load(text)

    assert from_plain(form, "here").digest != RECIPE.digest


def test_the_digest_counts_what_is_there():
    """A recipe without base, with a layer less, or with sources in another order is another one."""
    others = [
        replace(RECIPE, base=None),
        replace(RECIPE, layers=RECIPE.layers[:1]),
        replace(RECIPE, layers=RECIPE.layers[::-1]),
        replace(RECIPE, sources=RECIPE.sources[::-1]),
        replace(RECIPE, embedding=replace(BLEND, weights={"a": 0.5})),
    ]

    assert len({recipe.digest for recipe in [RECIPE, *others]}) == 6


def test_a_copy_takes_every_layer_from_one_source():
    """The recipe of a source as it is: weight one, no base, layer i from layer i."""
    source = Source(name="a", path="p")
    recipe = copy_of(source, 3, "float32")

    assert [layer.depth for layer in recipe.layers] == [0, 1, 2]
    assert list(recipe.blends()) == [Blend(method="linear", weights={"a": 1.0}, parameters={})] * 11
    assert (recipe.sources, recipe.base, recipe.dtype) == ((source,), None, "float32")


def test_blends_are_found_by_their_group():
    """`group` and `blends` see each blend of a layer, ends first and last."""
    several = [replace(BLEND, method=str(i)) for i in range(5)]
    layer = Layer(depth=0, attention=several[1], mlp=several[2], other=several[3])
    recipe = replace(RECIPE, embedding=several[0], layers=(layer,), head=several[4])

    assert list(recipe.blends()) == several
    assert [layer.group(group) for group in GROUPS] == several[1:4]
    with pytest.raises(KeyError):
        layer.group("norm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "recipe version 2 is not known; this evomerge reads version 1"),
        ({"dtype": "float64"}, "recipe dtype 'float64' is not known; use one of float32, bfloat16, float16"),
        ({"sources": [{"name": "a", "path": "1"}] * 2}, r"recipe sources must have distinct names, got \['a', 'a'\]"),
        ({"sources": [{"name": "a", "path": "1"}]}, "a blend of the recipe weighs 'b', which is not a source"),
        ({"sed": 1}, r".*sed: unknown key; did you mean 'seed'\?"),
        ({"layers": [{"depth": 0}]}, r".*layers\[0\].attention: missing"),
        ({"head": plain(BLEND) | {"weights": {"a": float("nan")}}}, ".*head.weights.a: expected a finite number"),
        ({"head": plain(BLEND) | {"parameters": {"p": float("inf")}}}, ".*head.parameters.p: expected a finite number"),
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

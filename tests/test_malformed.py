"""Malformed inputs: each gives one line with file, place and way out, exit code 2, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.models.checkpoint import Checkpoint
from evomerge.recipe import Source, copy_of, to_yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder with the quickstart in it, to be spoilt, and the current folder."""
    shutil.copytree(ROOT / "experiments/zoo", tmp_path / "experiments/zoo")
    shutil.copytree(ROOT / "fitness", tmp_path / "fitness")
    shutil.copytree(ROOT / "search_spaces", tmp_path / "search_spaces")
    shutil.copy(ROOT / "experiments/quickstart.yaml", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(command: list[str], *parts: str) -> None:
    """Run a command and check that it is refused in one line that holds these parts."""
    before = _files()
    result = CliRunner().invoke(app, command)

    assert result.exit_code == 2, result.output + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert _files() == before


def _files() -> dict[str, bytes]:
    """Return every file below the current folder with its content."""
    return {str(path): path.read_bytes() for path in sorted(Path.cwd().rglob("*")) if path.is_file()}


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a YAML or JSON file in place."""
    path = Path(file)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(data)
    text = json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")


QUICKSTART = "experiments/quickstart.yaml"
PROMPTS = "../fitness/zoo/cipher.jsonl"
TENSOR = "model.layers.0.mlp.up_proj.weight"


def set_key(*keys: str, to: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change that sets a key of a nested mapping."""

    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


#: Name, change of the experiment file, and what the line must say: where, what, and the way out.
EXPERIMENTS: list[tuple[str, Callable[[dict[str, Any]], object], tuple[str, ...]]] = [
    ("unknown key", set_key("buget", to={"candidates": 3}), ("buget", "unknown key", "did you mean 'budget'?")),
    (
        "unknown nested key",
        set_key("workers", "thread", to=2),
        ("workers.thread", "unknown key", "did you mean 'threads'?"),
    ),
    (
        "a key that is elsewhere now",
        set_key("workers", to={"pool": "ray", "count": 2}),
        ("workers", "pool is not a key of workers", "ray: {actors: N}"),
    ),
    (
        "unknown key of ray",
        set_key("ray", "actor", to=2),
        ("ray.actor", "unknown key", "did you mean 'actors'?"),
    ),
    (
        "no number of workers",
        set_key("ray", to={"actors": "per_node"}),
        ("ray.actors", "expected a number of workers, 1 or more, or per_gpu", "'per_node'"),
    ),
    ("no worker", set_key("ray", to={"actors": 0}), ("ray.actors", "1 or more", "got 0")),
    (
        "workers per GPU without a share of one",
        set_key("ray", to={"actors": "per_gpu"}),
        ("ray", "per_gpu needs a gpus_per_worker above 0"),
    ),
    (
        "no address",
        set_key("ray", to={"address": "head"}),
        ("ray.address", "expected local, auto or HOST:PORT", "'head'"),
    ),
    ("missing key", lambda data: data.pop("models"), ("models", "missing", "evomerge schema")),
    ("wrong type", set_key("budget", "candidates", to="many"), ("budget.candidates", "integer", "'many'")),
    ("number too small", set_key("budget", "candidates", to=0), ("budget.candidates", "greater than or equal to 1")),
    ("unknown value", set_key("dtype", to="float23"), ("dtype", "'float23'", "did you mean 'float32'?")),
    ("unknown driver", set_key("driver", "name", to="nsg2"), ("driver.name", "'nsg2'", "did you mean 'nsga2'?")),
    (
        "unknown driver setting",
        set_key("driver", to={"name": "nsga2", "populaton": 8}),
        ("driver.populaton", "unknown key", "did you mean 'population'?"),
    ),
    ("unknown estimator", set_key("estimator", "name", to="fator"), ("estimator.name", "did you mean 'factor'?")),
    ("an estimator without a name", set_key("estimator", to={"rows": 8}), ("estimator", "key name")),
    (
        "unknown estimator setting",
        set_key("estimator", to={"name": "auto", "row": 8}),
        ("estimator.row", "unknown key", "did you mean 'rows'?"),
    ),
    (
        "estimator setting too small",
        set_key("estimator", to={"name": "auto", "rows": 1}),
        ("estimator", "rows must be at least 2, got 1"),
    ),
    ("unknown schedule", set_key("schedule", "name", to="warm-up"), ("schedule.name", "did you mean 'warmup'?")),
    ("a schedule without a name", set_key("schedule", to={"items": 8}), ("schedule.name", "missing", "race")),
    (
        "unknown schedule setting",
        set_key("schedule", to={"name": "warmup", "promotes": 8}),
        ("schedule.promotes", "unknown key", "did you mean 'promote'?"),
    ),
    (
        "schedule setting out of range",
        set_key("schedule", to={"name": "race", "alpha": 1.5}),
        ("schedule", "'alpha' must lie between 0 and 1, got 1.5"),
    ),
    (
        "schedule setting of another type",
        set_key("schedule", to={"name": "warmup", "items": 8.5}),
        ("schedule.items", "expected int, got float 8.5"),
    ),
    (
        "a model of the items without rows to fit",
        lambda data: data.update(estimator={"name": "factor"}, schedule={"name": "fixed", "items": 8}),
        ("estimator.name", "'factor' is fitted to candidates", "auto, mean, stratified", "schedule warmup"),
    ),
    (
        "the schedule of an estimator",
        set_key("estimator", to={"name": "mean", "items": 12}),
        ("estimator.items", "unknown key"),
    ),
    ("unknown gate", set_key("gates", to={"repetitions": 8}), ("gates.repetitions", "did you mean 'repetition'?")),
    ("a gate out of range", set_key("gates", to={"repetition": 3}), ("gates", "0 or at least 16 tokens, got 3")),
    ("a gate of another type", set_key("gates", to={"finite": "yes"}), ("gates.finite", "boolean", "'yes'")),
    (
        "a reference to no source",
        set_key(
            "objectives",
            to=[{"name": "x", "task": {"measure": "kl", "data": PROMPTS, "text": "prompt", "reference": "cifer"}}],
        ),
        ("objectives.0", "task 'x' refers to no source 'cifer'", "did you mean 'cipher'?"),
    ),
    (
        "driver setting too small",
        set_key("driver", to={"name": "nsga2", "population": 1}),
        ("driver", "'population' must be at least 2, got 1"),
    ),
    ("unknown space", set_key("space", to="task_vector"), ("space", "'task_vector'", "did you mean 'task_vectors'?")),
    (
        "unknown method",
        set_key("space", to={"methods": ["tie"]}),
        ("space.methods[0]", "'tie'", "did you mean 'ties'?"),
    ),
    (
        "parameter of no method",
        set_key("space", to={"methods": ["ties"], "parameters": {"denstiy": {"low": 0.1, "high": 0.9}}}),
        ("space.parameters.denstiy", "did you mean 'density'?"),
    ),
    (
        "bounds upside down",
        set_key("space", to={"methods": ["ties"], "weight": {"low": 1.0, "high": 0.0}}),
        ("space", "low <= high", "[1.0, 0.0]"),
    ),
    (
        "too many knots",
        set_key("space", to={"methods": ["ties"], "knots": 99}),
        ("space", "knots must lie in [1, ", "got 99"),
    ),
    (
        "a module left out",
        set_key("space", to={"methods": ["ties"], "modules": [["attention"], ["mlp"]]}),
        ("space", "modules must hold each of attention, mlp, other once"),
    ),
    (
        "task vectors without a base",
        lambda data: data["models"].pop("base"),
        ("space.methods[0]", "task_arithmetic", "give models.base"),
    ),
    (
        "unknown task",
        set_key("objectives", to=[{"task": "arithmetics"}]),
        ("objectives.0.task", "'arithmetics'", "did you mean 'arithmetic'?"),
    ),
    (
        "neither task nor property",
        set_key("objectives", to=[{"direction": "maximize"}]),
        ("objectives.0", "give either task or property"),
    ),
    (
        "a task twice",
        set_key("objectives", to=[{"task": "cipher"}, {"task": "cipher"}]),
        ("objectives.1", "second objective 'cipher'", "another name"),
    ),
    (
        "a name for a property",
        set_key("objectives", to=[{"task": "cipher"}, {"property": "depth", "name": "layers"}]),
        ("objectives.1.name", "'depth'", "leave it out"),
    ),
    (
        "no task at all",
        set_key("objectives", to=[{"property": "depth"}]),
        ("objectives", "at least one must be a task"),
    ),
    (
        "a task in place without a name",
        set_key("objectives", to=[{"task": {"kind": "generate", "data": "x", "prompt": "{p}", "answer": "a"}}]),
        ("objectives.0.name", "missing", "needs a name"),
    ),
    (
        "an unknown key of a task in place",
        set_key("objectives", to=[{"name": "x", "task": {"kind": "generate", "dat": "x", "prompt": "p"}}]),
        ("objectives.0.task.dat", "unknown key", "did you mean 'data'?"),
    ),
    (
        "a parameter out of range",
        set_key("space", to={"methods": ["ties"], "parameters": {"density": {"low": 0.5, "high": 1.5}}}),
        ("space.parameters.density", "must lie in [0, 1] for ties", "[0.5, 1.5]"),
    ),
    (
        "a parameter that is no number",
        set_key("space", to={"methods": ["ties"], "parameters": {"rescale": {"low": 0.0, "high": 1.0}}}),
        ("space.parameters.rescale", "is a word in ties", "give one, or a list", "l1"),
    ),
    (
        "one value for all sources",
        set_key(
            "space", to={"methods": ["ties"], "parameters": {"scale": {"low": 0.5, "high": 1.0, "per_source": True}}}
        ),
        ("space.parameters.scale.per_source", "ties has one value for all sources", "leave it out"),
    ),
    (
        "weights for a method that is none",
        set_key("space", to={"methods": ["ties"], "weight": {"low": 0.0, "high": 1.0, "methods": ["linaer"]}}),
        ("space.weight.methods", "'linaer' is no method of the space", "known: ties"),
    ),
    (
        "a start that names no axis",
        set_key("space", to={"methods": ["ties"], "start": {"wieght": 0.5}}),
        ("space: start", "no axis is called 'wieght'"),
    ),
    (
        "knots for other modules",
        set_key("space", to={"methods": ["ties"], "knots": [2, 1]}),
        ("space: knots", "one for each of the 1 module sets"),
    ),
    (
        "methods between knots",
        set_key("space", to={"methods": ["ties", "linear"], "per_knot": True, "profile": "linear", "knots": 2}),
        ("space: methods per knot need a constant profile",),
    ),
    (
        "a list that is empty",
        set_key("space", to={"methods": ["ties"], "parameters": {"zero": []}}),
        ("space.parameters.zero", "the list is empty"),
    ),
    (
        "an unknown option of a parameter",
        set_key("space", to={"methods": ["ties"], "parameters": {"zero": ["plus", "pluss"]}}),
        ("space.parameters.zero", "must be one of plus, minus", "'pluss'"),
    ),
    (
        "a word for a number",
        set_key("space", to={"methods": ["ties"], "parameters": {"density": "half"}}),
        ("space.parameters.density", "must be a number", "'half'"),
    ),
    (
        "a value out of range",
        set_key("space", to={"methods": ["ties"], "parameters": {"density": 2}}),
        ("space.parameters.density", "must be finite and lie in [0, 1]", "2"),
    ),
    (
        "half of a whole number",
        set_key("space", to={"methods": ["cabs"], "parameters": {"n": {"low": 1.5, "high": 8}}}),
        ("space.parameters.n", "is a whole number in cabs", "[1.5, 8]"),
    ),
    (
        "an unknown key of a range",
        set_key("space", to={"methods": ["ties"], "parameters": {"density": {"low": 0.5, "hihg": 0.6}}}),
        ("space.parameters.density.hihg", "unknown key", "did you mean 'high'?"),
    ),
    (
        "a parameter of another kind",
        set_key("space", to={"methods": ["ties"], "parameters": {"density": [0.5, 0.6]}}),
        ("space.parameters.density.0", "should be a valid string, got 0.5"),
    ),
    (
        "a line that is none",
        set_key("space", to={"methods": ["linear", "base | sum | elect"]}),
        ("space.methods[1]", "combine 'sum' stands before gate 'elect'"),
    ),
    (
        "an unknown stage",
        set_key("space", to={"slots": {"origin": ["base"], "edit": ["none", "trin"], "combine": ["sum"]}}),
        ("space.slots", "unknown stage 'trin'", "did you mean 'trim'?"),
    ),
    (
        "slots that make no line",
        set_key("space", to={"slots": {"origin": ["base"], "combine": ["none", "sum"]}}),
        ("space.slots", "unknown method 'base'"),
    ),
    (
        "a slot without options",
        set_key("space", to={"slots": {"origin": ["base"], "combine": []}}),
        ("space.slots", "0 lines can be made", "every slot needs an option"),
    ),
    (
        "too many lines",
        set_key("space", to={"slots": {f"s{i}": ["none", "trim", "elect", "sum"] for i in range(7)}}),
        ("space.slots", "16384 lines can be made", "at most 4096"),
    ),
    (
        "methods and slots",
        set_key("space", to={"methods": ["ties"], "slots": {"origin": ["base"], "combine": ["sum"]}}),
        ("space", "give either methods or slots"),
    ),
    ("neither methods nor slots", set_key("space", to={"knots": 2}), ("space", "give either methods or slots")),
    (
        "a parameter of two slots",
        set_key(
            "space",
            to={
                "slots": {"origin": ["base"], "a": ["none", "trim"], "b": ["none", "drop"], "combine": ["sum"]},
                "parameters": {"density": {"low": 0.1, "high": 0.9}},
            },
        ),
        ("space.parameters.density", "hangs on more than one slot", "name it as stage.parameter"),
    ),
    (
        "a route with an unknown key",
        set_key("space", to={"methods": ["ties"], "routes": [{"tensor": "*norm*", "blend": {}}]}),
        ("space.routes[0].tensor", "unknown key", "did you mean 'tensors'?"),
    ),
    (
        "a route of an unknown source",
        set_key(
            "space", to={"methods": ["ties"], "routes": [{"blend": {"method": "linear", "weights": {"cifer": 1}}}]}
        ),
        ("space.routes[0].blend.weights.cifer", "did you mean 'cipher'?"),
    ),
    (
        "a route of an unknown method",
        set_key(
            "space", to={"methods": ["ties"], "routes": [{"blend": {"method": "liner", "weights": {"cipher": 1}}}]}
        ),
        ("space.routes[0].blend.method", "'liner'", "did you mean 'linear'?"),
    ),
    (
        "a route that takes statistics without texts",
        set_key(
            "space", to={"methods": ["ties"], "routes": [{"blend": {"method": "fisher", "weights": {"cipher": 1}}}]}
        ),
        ("space: fisher takes statistics (fisher)", "give `calibration`, a file of texts"),
    ),
    (
        "a route of an unknown group",
        set_key(
            "space",
            to={"methods": ["ties"], "routes": [{"groups": ["mpl"], "blend": {"method": "linear", "weights": {}}}]},
        ),
        ("space.routes[0]", "group 'mpl' is not known", "did you mean 'mlp'?"),
    ),
    (
        "an unknown key of a space in place",
        set_key("space", to={"methods": ["ties"], "wieght": {"low": 0.0, "high": 1.0}}),
        ("space.wieght", "unknown key", "did you mean 'weight'?"),
    ),
    (
        "a lambda twice",
        set_key("baselines", to={"lambdas": [0.1, 0.1]}),
        ("baselines.lambdas", "two are equal", "leave one out"),
    ),
    (
        "a source that is called base",
        set_key("models", "sources", to={"base": "zoo/cipher"}),
        ("models.sources.base", "rename the source"),
    ),
    ("a driver without a name", set_key("driver", to={"population": 8}), ("driver.name", "missing", "nsga2")),
    (
        "more items than there are",
        set_key("splits", to={"test": 5000}),
        ("objectives.0", "test items", "splits.test wants 5000"),
    ),
    (
        "missing model folder",
        set_key("models", "sources", "cipher", to="zoo/cypher"),
        ("models.sources.cipher", "zoo/cypher", "did you mean 'cipher'?"),
    ),
]


@pytest.mark.parametrize(("change", "parts"), [row[1:] for row in EXPERIMENTS], ids=[row[0] for row in EXPERIMENTS])
@pytest.mark.usefixtures("workspace")
def test_a_malformed_experiment_is_refused(change: Callable[[dict[str, Any]], object], parts: tuple[str, ...]) -> None:
    """`run` says file, key path and the way out, and makes no run folder."""
    edit(QUICKSTART, change)

    assert_refused(["run", QUICKSTART], QUICKSTART, *parts)


def _no_yaml(_: Path) -> tuple[str, ...]:
    Path(QUICKSTART).write_text("name: [quickstart\nseed: 0\n", encoding="utf-8")
    return QUICKSTART, "not YAML"


def _key_twice(_: Path) -> tuple[str, ...]:
    with Path(QUICKSTART).open("a", encoding="utf-8") as file:
        file.write("seed: 1\n")
    return QUICKSTART, "'seed' is given twice"


def _key_that_is_a_list(_: Path) -> tuple[str, ...]:
    with Path(QUICKSTART).open("a", encoding="utf-8") as file:
        file.write("? [a, b]\n: c\n")
    return QUICKSTART, "not YAML", "unhashable"


def _python_in_an_experiment(_: Path) -> tuple[str, ...]:
    _add_python(QUICKSTART)
    return QUICKSTART, "not YAML", "python/object"


def _python_in_a_task(_: Path) -> tuple[str, ...]:
    _add_python("fitness/cipher.yaml")
    return "fitness/cipher.yaml", "not YAML", "python/object"


def _add_python(file: str) -> None:
    """Add what an unsafe loader would execute: it would make a file."""
    with Path(file).open("a", encoding="utf-8") as text:
        text.write("extra: !!python/object/apply:os.mkdir [executed]\n")


def _binary(_: Path) -> tuple[str, ...]:
    Path(QUICKSTART).write_bytes(b"\xff\xfe\x00")
    return QUICKSTART, "not a text file"


def _no_file(_: Path) -> tuple[str, ...]:
    Path(QUICKSTART).unlink()
    return QUICKSTART, "cannot be read", "evomerge ls"


def _data_missing(_: Path) -> tuple[str, ...]:
    Path("fitness/zoo/cipher.jsonl").unlink()
    return ("cipher.jsonl",)


def _row_without_answer(_: Path) -> tuple[str, ...]:
    path = Path("fitness/zoo/cipher.jsonl")
    rows = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(rows[4])
    row["anwser"] = row.pop("answer")
    rows[4] = json.dumps(row)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return "cipher.jsonl", "row 5", "'answer'"


def _unknown_split(_: Path) -> tuple[str, ...]:
    path = Path("fitness/zoo/cipher.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace('"search"', '"serach"', 1), encoding="utf-8")
    return "cipher.jsonl", "row ", "'serach'", "did you mean 'search'?"


def _task_key(_: Path) -> tuple[str, ...]:
    edit("fitness/cipher.yaml", lambda data: data.update(max_tokens=3))
    return "cipher.yaml", "max_tokens", "did you mean 'max_new_tokens'?"


def _grader(_: Path) -> tuple[str, ...]:
    edit("fitness/cipher.yaml", lambda data: data.update(grade={"all": ["exact", "contain"]}))
    return "cipher.yaml.grade.all[1]", "'contain'", "did you mean 'contains'?"


def _python_grader(_: Path) -> tuple[str, ...]:
    edit("fitness/cipher.yaml", lambda data: data.update(grade={"python": "graders.py:near"}))
    return "cipher.yaml.grade.python", "graders.py: cannot be read"


def _measure(_: Path) -> tuple[str, ...]:
    edit("fitness/cipher.yaml", lambda data: data.update(measure="lenght"))
    return "cipher.yaml.measure", "'lenght'", "did you mean 'length'?"


def _measure_key(_: Path) -> tuple[str, ...]:
    edit("fitness/cipher.yaml", lambda data: data.update(measure="length"))
    return "cipher.yaml.kind", "unknown key"


def _reference(_: Path) -> tuple[str, ...]:
    keys = ("data", "prompt", "split")
    keep = {key: yaml.safe_load(Path("fitness/cipher.yaml").read_text(encoding="utf-8"))[key] for key in keys}
    Path("fitness/cipher.yaml").write_text(yaml.safe_dump({**keep, "measure": "agreement", "reference": "cypher"}))
    return "objectives", "'cypher'", "did you mean 'cipher'?"


def _no_config(zoo: Path) -> tuple[str, ...]:
    (zoo / "cipher/config.json").unlink()
    return "models.sources.cipher", "config.json"


def _no_tensors(zoo: Path) -> tuple[str, ...]:
    (zoo / "cipher/model.safetensors").unlink()
    return "cipher", "safetensors"


def _pickle(zoo: Path) -> tuple[str, ...]:
    (zoo / "cipher/model.safetensors").rename(zoo / "cipher/pytorch_model.bin")
    return "cipher", "safetensors", "convert"


def _truncated(zoo: Path) -> tuple[str, ...]:
    path = zoo / "cipher/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "cipher/model.safetensors", "bytes where its header says", "copy it again"


def _shard_missing(zoo: Path) -> tuple[str, ...]:
    names = list(load_file(zoo / "cipher/model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (zoo / "cipher/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (zoo / "cipher/model.safetensors").unlink()
    return "cipher", "model-00001-of-00002.safetensors"


def _other_shape(zoo: Path) -> tuple[str, ...]:
    _rewrite(zoo, lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:-1].contiguous()}))
    return "cipher", TENSOR, "shape"


def _tensor_missing(zoo: Path) -> tuple[str, ...]:
    _rewrite(zoo, lambda tensors: tensors.pop(TENSOR))
    return "cipher", TENSOR


def _other_depth(zoo: Path) -> tuple[str, ...]:
    edit(str(zoo / "cipher/config.json"), lambda data: data.update(num_hidden_layers=2))
    return "cipher", "layers"


def _other_tokenizer(zoo: Path) -> tuple[str, ...]:
    path = zoo / "cipher/tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data), encoding="utf-8")
    return "cipher", "tokenizer"


def _rewrite(zoo: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = zoo / "cipher/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


SPOILT_FILES = [
    _no_yaml, _key_twice, _key_that_is_a_list, _python_in_an_experiment, _python_in_a_task, _binary, _no_file,
    _data_missing, _row_without_answer, _unknown_split, _task_key, _grader, _python_grader, _measure, _measure_key,
    _reference, _no_config, _no_tensors, _pickle, _truncated,
    _shard_missing, _other_shape, _tensor_missing, _other_depth, _other_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT_FILES, ids=[spoil.__name__.strip("_") for spoil in SPOILT_FILES])
def test_a_spoilt_file_is_refused(spoil: Callable[[Path], tuple[str, ...]], workspace: Path) -> None:
    """Broken YAML, tasks and model folders are found before a run folder is made."""
    assert_refused(["run", QUICKSTART], *spoil(workspace / "experiments/zoo"))
    assert not (workspace / "executed").exists()


def _recipe(workspace: Path) -> dict[str, Any]:
    folder = workspace / "experiments/zoo/cipher"
    checkpoint = Checkpoint(folder)
    source = Source(name="cipher", path=str(folder), fingerprint=checkpoint.fingerprint)
    data: dict[str, Any] = yaml.safe_load(to_yaml(copy_of(source, checkpoint.depth, "float32")))
    return data


def _copied(data: dict[str, Any]) -> dict[str, Any]:
    """Undo the sharing of equal blends, so that one can be changed alone."""
    copy: dict[str, Any] = json.loads(json.dumps(data))
    return copy


def set_blend(*keys: str, to: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of the only blend of a recipe."""
    return lambda data: set_key(*keys, to=to)(data["routes"][0]["blend"])


RECIPES: list[tuple[str, Callable[[dict[str, Any]], object], tuple[str, ...]]] = [
    ("unknown key", set_key("sede", to=1), ("sede", "unknown key", "did you mean 'seed'?")),
    ("missing key", lambda data: data.pop("sources"), ("sources", "missing")),
    ("no route", set_key("routes", to=[]), ("no route", "give at least one")),
    ("unknown method", set_blend("method", to="liner"), ("'liner'", "did you mean 'linear'?")),
    ("unknown stage", set_blend("method", to="zero | meen"), ("'meen'", "did you mean 'mean'?")),
    ("unknown parameter", set_blend("parameters", to={"normalise": 1.0}), ("normalise", "'normalize'")),
    ("a source that is not there", set_blend("weights", to={"cypher": 1.0}), ("'cypher'", "did you mean 'cipher'?")),
    ("a later version", set_key("version", to=7), ("version 7", "reads version 2")),
    ("unknown dtype", set_key("dtype", to="float8"), ("'float8'", "use one of")),
    ("a layer that no source has", lambda data: data["layers"].append(99), ("layer 99", "layers")),
    ("a layer for some", lambda data: data["layers"].append({"base": 0}), ("layer 4", "each of ['cipher']")),
    ("another model", lambda data: data["sources"][0].update(fingerprint="0" * 16), ("cipher", "is not the one")),
    ("a number that is none", set_blend("weights", to={"cipher": "1,0"}), ("blend.weights.cipher", "'1,0'")),
    ("a route of no layer", lambda data: data["routes"][0].update(layers=[2, 1]), ("routes[0]", "layers must be")),
    ("a tensor without a route", lambda data: data["routes"][0].update(groups=["mlp"]), ("fits no route", "add one")),
    ("a source of nothing", lambda data: data["sources"][0].pop("path"), ("'cipher'", "either a path or a recipe")),
    ("an unknown tokenizer", set_key("tokenizer", to="cifer"), ("'cifer'", "did you mean 'cipher'?")),
    (
        "a wrong inner recipe",
        lambda data: data.update(sources=[{"name": "cipher", "recipe": {**_copied(data), "dtype": "float8"}}]),
        ("sources[0].recipe", "'float8'"),
    ),
]


def test_the_recipe_that_is_spoilt_below_is_good(workspace: Path) -> None:
    """Without a change `check` accepts the recipe."""
    Path("recipe.yaml").write_text(yaml.safe_dump(_recipe(workspace)), encoding="utf-8")

    result = CliRunner().invoke(app, ["check", "recipe.yaml"])

    assert result.exit_code == 0
    assert "good" in result.output


@pytest.mark.parametrize(("change", "parts"), [row[1:] for row in RECIPES], ids=[row[0] for row in RECIPES])
def test_a_malformed_recipe_is_refused(
    change: Callable[[dict[str, Any]], object], parts: tuple[str, ...], workspace: Path
) -> None:
    """`check` says file, key path and the way out."""
    data = _copied(_recipe(workspace))
    change(data)
    Path("recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")

    assert_refused(["check", "recipe.yaml"], "recipe.yaml", *parts)


@pytest.mark.usefixtures("workspace")
def test_merge_keys_of_yaml_are_understood() -> None:
    """`<<` brings keys of another mapping, and one of them may be given again."""
    text = Path(QUICKSTART).read_text(encoding="utf-8")
    text += "splits: {<<: &sizes {search: 50, test: 30}, search: 40}\n"
    Path(QUICKSTART).write_text(text, encoding="utf-8")

    result = CliRunner().invoke(app, ["check", QUICKSTART], env={"COLUMNS": "200"})

    assert "search split: arithmetic 40, strings 40, cipher 40" in result.output


STARTED = (
    '{"event":"started","form":2,"identity":"0","items":{},"objectives":[],"reference":[],"seed":0,"time":0.0,'
    '"versions":{}}\n'
)
LEDGERS: list[tuple[str, str | None, tuple[str, ...]]] = [
    ("no run", None, ("no run lies here", "give a run's folder")),
    ("empty", "", ("the run has not begun", "evomerge run")),
    ("a broken line in the middle", STARTED + '{"event":"told"\n' + STARTED, ("ledger.jsonl:2", "broken line")),
    ("an unknown event", STARTED + '{"event":"aked"}\n', ("ledger.jsonl:2", "'aked'", "did you mean 'asked'?")),
    ("an unknown key", STARTED + '{"event":"warned","txt":""}\n', ("ledger.jsonl:2", "txt", "'text'")),
    ("another form", STARTED.replace('"form":2', '"form":9'), ("ledger.jsonl:1", "form 9", "form 2")),
    ("no ledger at all", "[1, 2]\n", ("ledger.jsonl:1", "unknown event")),
]


@pytest.mark.parametrize("command", ["status", "report", "resume", "export"])
@pytest.mark.parametrize(("text", "parts"), [row[1:] for row in LEDGERS], ids=[row[0] for row in LEDGERS])
def test_a_malformed_ledger_is_refused(
    text: str | None, parts: tuple[str, ...], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb that reads a run says file, line and the way out."""
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/ledger.jsonl").write_text(text, encoding="utf-8")

    assert_refused([command, "broken"], *parts)


def test_there_are_at_least_thirty_malformed_inputs() -> None:
    """The tables above hold experiments, recipes, ledgers and model folders, thirty in all or more."""
    assert len(EXPERIMENTS) + len(SPOILT_FILES) + len(RECIPES) + len(LEDGERS) >= 30

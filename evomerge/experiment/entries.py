"""The keys of an experiment file, their types, bounds and defaults, and their JSON schema."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from evomerge.drivers import DRIVERS, nested, plain_driver
from evomerge.fitness.registry import ESTIMATORS
from evomerge.fitness.schedule import SCHEDULES


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelsEntry(_Strict):
    """The models that go into the merge: folders (relative to the file) or names on the hub."""

    base: str | None = Field(default=None, description="The model that task vectors are taken from.")
    sources: dict[str, str] = Field(
        min_length=1,
        description="The models to blend or stack, by the name that reports use; run:FOLDER is the best of a run, "
        "run:FOLDER@17 a candidate of it.",
    )


class RangeEntry(_Strict):
    """Bounds of a gene."""

    low: float
    high: float
    log: bool = False


class WeightEntry(RangeEntry):
    """Bounds of the weights; where low and high are equal, that is every weight."""

    methods: list[str] = Field(
        default=[], description="The methods that weights are searched for, others take 1 for each source; empty: all."
    )


class ParameterEntry(RangeEntry):
    """Bounds of a method's parameter."""

    per_source: bool = False
    per_knot: bool = Field(default=False, description="Whether each module set has its own at each knot over depth.")


class BlendEntry(_Strict):
    """A parameter space; see evomerge.spaces.blend.BlendSpace."""

    kind: Literal["blend"] = "blend"
    methods: list[str] = Field(default=[], description="Methods or lines of stages: one, or several to choose from.")
    slots: dict[str, list[str]] = Field(
        default={}, description="In place of methods: the parts of a line, in order, and what may stand in each."
    )
    per_knot: bool = Field(default=False, description="Whether each group of layers has a method of its own.")
    knots: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = Field(
        default=1, description="Values over depth: of all module sets, or one number for each."
    )
    profile: Literal["constant", "linear"] = "constant"
    modules: list[list[Literal["attention", "mlp", "other"]]] = [["attention", "mlp", "other"]]
    weight: WeightEntry = WeightEntry(low=0.0, high=1.0)
    parameters: dict[str, ParameterEntry | float | str | list[str]] = Field(
        default={}, description="Bounds of a parameter's genes, a list of options, or one value."
    )
    routes: list[dict[str, Any]] = Field(
        default=[], description="Routes of a recipe that go before the search: their tensors are not searched."
    )
    start: dict[str, float | str] = Field(
        default={},
        description="Where a search begins: genes by axis, or by what its name begins with before a dot, such as "
        "weight; others in the middle. Empty: at the best that is known.",
    )


class StepsEntry(_Strict):
    """Bounds of scales at seams, and the step between two of them."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    step: float = Field(default=2.0**-4, gt=0)


class DepthEntry(_Strict):
    """Bounds on the number of layers."""

    low: int = Field(default=1, ge=1)
    high: int | None = Field(default=None, ge=1, description="Default: half as many again as the incumbent has.")


class EditsEntry(_Strict):
    """What may be done to a stack; see evomerge.spaces.edits.Edits."""

    operations: list[Literal["drop", "repeat", "insert", "swap", "move"]] = Field(
        default=["drop", "repeat", "insert", "swap", "move"], min_length=1, description="What an edit may be."
    )
    edits: int = Field(default=3, ge=1, description="The most edits.")
    block: int = Field(default=2, ge=1, description="The longest block of layers that an edit is about.")
    reach: int = Field(default=2, ge=0, description="How far from its own depth a layer may go.")
    depth: DepthEntry = DepthEntry()
    parameters: int | None = Field(default=None, ge=1, description="The most parameters; default: any number.")
    scale: StepsEntry | Literal[False] = Field(
        default=StepsEntry(low=0.75, high=1.25), description="Scales at seams; false: there are none."
    )
    stack: list[str] = Field(
        default=[], description="The incumbent, as SOURCE:FIRST-LAST, layers from 0; default: the primary source."
    )
    probes: bool = Field(default=True, description="Ask single drops and repeats first, as a prior over edits.")


class PathEntry(EditsEntry):
    """A space of layer stacks: edits of an incumbent; see evomerge.spaces.stack.PathSpace."""

    kind: Literal["path"]
    primary: str = Field(default="", description="The source that lends embedding and head; default: the first.")
    matching: bool = Field(
        default=False, description="Begin scales where a seam's layer gets the size of input that it is used to."
    )
    sizes: dict[str, list[list[float]]] = Field(
        default={}, description="What matching goes by, measured when it is not given: see docs/stacking.md."
    )


class SakanaEntry(_Strict):
    """The data flow space as Akiba 2024 published it; see evomerge.spaces.stack.SakanaSpace."""

    kind: Literal["sakana"]
    primary: str = Field(default="", description="The source that begins and ends every stack; default: the first.")
    repetitions: int = Field(default=3, ge=1, description="How often the layers of all sources are gone through.")
    favour: float = Field(
        default=0.2, ge=0, le=1, description="The first mean of the primary source's indicators; that of others is 0."
    )


class HybridEntry(_Strict):
    """A space of stacks whose layers are blends; see evomerge.spaces.hybrid.HybridSpace."""

    kind: Literal["hybrid"]
    blend: BlendEntry
    edits: EditsEntry = EditsEntry()


#: The kinds of search spaces; what says no kind is a blend.
SPACES: Mapping[str, type[BlendEntry] | type[PathEntry] | type[SakanaEntry] | type[HybridEntry]] = {
    "blend": BlendEntry,
    "path": PathEntry,
    "sakana": SakanaEntry,
    "hybrid": HybridEntry,
}


def _kind_of(given: Any) -> str:
    """Return which kind of space something is, for pydantic."""
    if isinstance(given, str):
        return "a name"
    kind = given.get("kind", "blend") if isinstance(given, dict) else getattr(given, "kind", "blend")
    return f"{kind if kind in SPACES else 'blend'} space"


SpaceEntry = BlendEntry | PathEntry | SakanaEntry | HybridEntry
_AnySpace = Annotated[
    Annotated[str, Tag("a name")]
    | Annotated[BlendEntry, Tag("blend space")]
    | Annotated[PathEntry, Tag("path space")]
    | Annotated[SakanaEntry, Tag("sakana space")]
    | Annotated[HybridEntry, Tag("hybrid space")],
    Discriminator(_kind_of),
]


class ObjectiveEntry(_Strict):
    """One objective: a task (name, file, or the task itself), or a property of the model."""

    task: str | dict[str, Any] | None = None
    property: Literal["parameters", "depth"] | None = None
    name: str | None = Field(default=None, description="Its name in reports; default: the task's or property's.")
    direction: Literal["maximize", "minimize"] | None = None
    weight: float = Field(default=1.0, gt=0, description="Its weight where objectives are summed.")


class BudgetEntry(_Strict):
    """When the search ends."""

    candidates: int = Field(ge=1, description="Candidates that the driver may propose.")


class GatesEntry(_Strict):
    """What a candidate must pass before its first item; see evomerge.evaluation.gates."""

    finite: bool = Field(default=True, description="Weights and log-likelihoods must be finite, and not all equal.")
    repetition: int = Field(default=24, ge=0, description="Tokens to go on for, without endless repetition; 0: none.")
    language: str = Field(default="", description="The language that the candidate must go on in; empty: any.")


class BankEntry(_Strict):
    """What other models answered to the same items, as a prior of the estimator; see `evomerge bank fit`."""

    path: str = Field(description="The bank: NAME, NAME.json or NAME.safetensors, relative to the file.")
    weight: float = Field(default=0.5, gt=0, lt=1, description="The share of the bank's models in a fit.")
    nearest: bool = Field(
        default=True, description="Take only the third of its models whose scores are nearest to the run's own."
    )


class SplitsEntry(_Strict):
    """Items per task to use of each split (the first ones); default: all."""

    search: int | None = Field(default=None, ge=1)
    validation: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class BaselinesEntry(_Strict):
    """What is always run first, besides each source."""

    lambdas: list[float] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        min_length=1,
        description="Totals of single-lambda task arithmetic; the best one is the tuned baseline.",
    )


class WarmRecipeEntry(_Strict):
    """A recipe to begin with, in place."""

    label: str = Field(description="What the ledger calls it.")
    origin: Literal["file", "earlier"] = "file"
    genome: list[float | int | str] | None = Field(default=None, description="Its genome, where the space has one.")
    recipe: dict[str, Any] = Field(description="As in a recipe.yaml.")


class WarmEntry(_Strict):
    """What is asked beside the baselines before the search begins, and what drivers may start from."""

    methods: bool | list[str] = Field(
        default=False, description="Named methods at their defaults, on all sources; true: every one that fits."
    )
    runs: list[str] = Field(
        default=[], description="The front of an earlier run: run:FOLDER; or one of its candidates: run:FOLDER@17."
    )
    files: list[str] = Field(default=[], description="Recipes, and YAML files of mergekit's, relative to the file.")
    recipes: list[WarmRecipeEntry] = Field(
        default=[], description="Recipes in place; a run keeps here what its runs and files held."
    )


#: Keys that the workers had up to version 0.4, and what says the same.
_MOVED = {
    "pool": "ray: {actors: N} for workers by Ray, nothing for one in this process",
    "count": "ray: {actors: N}",
    "gpus": "ray: {gpus_per_worker: X}",
}


class WorkersEntry(_Strict):
    """What each worker that builds and scores candidates is like."""

    threads: int = Field(default=1, ge=1, description="Threads of torch in each worker.")
    device: str = "cpu"
    resident_gb: float | None = Field(default=None, ge=0, description="GB of sources to keep on a GPU; default: all.")
    batch: int = Field(default=128, ge=1, description="The most rows of a batch.")
    tokens: int = Field(default=1 << 14, ge=1, description="The most tokens of a batch, rows times length.")
    prefixes_gb: float = Field(
        default=1.0, ge=0, description="GB of hidden states that a worker keeps for stacks that begin alike; 0: none."
    )
    time_limit: float = Field(default=600.0, gt=0, description="Seconds after which a candidate has failed.")

    @model_validator(mode="before")
    @classmethod
    def _elsewhere(cls, given: object) -> object:
        for old, new in _MOVED.items():
            if isinstance(given, dict) and old in given:
                raise PydanticCustomError("moved", f"{old} is not a key of workers; write {new}")
        return given


class RayEntry(_Strict):
    """Workers in processes of their own, by Ray, here or in a cluster; see docs/cluster.md."""

    address: str = Field(
        default="local",
        description="local: start Ray on this machine; auto: the one that runs, by RAY_ADDRESS or `ray start`; or "
        "HOST:PORT.",
    )
    actors: int | Literal["per_gpu"] = Field(
        default=1, description="Workers; per_gpu: as many as fit the cluster's GPUs, while nodes join and leave."
    )
    gpus_per_worker: float = Field(default=0.0, ge=0, description="GPUs of each worker; a fraction shares one.")
    cpus_per_worker: float | None = Field(
        default=None, ge=0, description="Processors that Ray books for each; default: as many as it has threads."
    )
    max_failures: int | None = Field(
        default=None, ge=1, description="Stop when so many candidates failed because workers died or hung."
    )
    max_attempts: int = Field(
        default=3, ge=1, description="How many workers may die over one candidate before it has failed."
    )

    @field_validator("actors", mode="before")
    @classmethod
    def _some(cls, actors: object) -> object:
        if actors != "per_gpu" and (isinstance(actors, bool) or not isinstance(actors, int) or actors < 1):
            raise PydanticCustomError("actors", "expected a number of workers, 1 or more, or per_gpu")
        return actors

    @field_validator("address")
    @classmethod
    def _somewhere(cls, address: str) -> str:
        if address not in ("local", "auto") and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
            raise PydanticCustomError("address", "expected local, auto or HOST:PORT")
        return address

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.actors == "per_gpu" and not self.gpus_per_worker:
            raise PydanticCustomError("actors", "actors: per_gpu needs a gpus_per_worker above 0")
        return self


class ExportEntry(_Strict):
    """Which models of the front to write at the end."""

    front: Literal["all", "knee", "extremes", "none"] = "all"


class ExperimentFile(_Strict):
    """An experiment: what is merged, what is searched, what is asked, and what is kept."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs/.")
    seed: int = Field(ge=0)
    models: ModelsEntry
    space: _AnySpace
    objectives: list[ObjectiveEntry] = Field(min_length=1)
    driver: dict[str, Any] | None = Field(
        default=None, description="name: one of the drivers; and its settings. Default: by the kind of space."
    )
    budget: BudgetEntry
    estimator: dict[str, Any] = Field(
        default={"name": "auto"}, description="name: how responses become scores; and its settings."
    )
    schedule: dict[str, Any] = Field(
        default={"name": "fixed"}, description="name: who is asked how many items, and when; and its settings."
    )
    bank: BankEntry | None = None
    gates: GatesEntry = GatesEntry()
    splits: SplitsEntry = SplitsEntry()
    baselines: BaselinesEntry = BaselinesEntry()
    warm: WarmEntry = WarmEntry()
    finalists: int = Field(default=16, ge=1, description="Candidates re-scored on all validation items.")
    workers: WorkersEntry = WorkersEntry()
    ray: RayEntry | None = Field(default=None, description="Workers by Ray; without it there is one, in this process.")
    calibration: str | None = Field(
        default=None, description="A file of texts, for methods that take statistics: one a line, or JSONL with `text`."
    )
    store: str | None = Field(
        default=None,
        description="A file that keeps every response, so that no run that shares it asks for one again; relative to "
        "the file. On a shared folder its file system must lock for all machines.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Dtype of the models built and shipped.")
    export: ExportEntry = ExportEntry()
    trust_remote_code: bool = False


def schema() -> dict[str, Any]:
    """Return the JSON schema of experiment files."""
    found = ExperimentFile.model_json_schema()
    kinds: Mapping[str, Mapping[str, Any]] = {"driver": DRIVERS, "estimator": ESTIMATORS, "schedule": SCHEDULES}
    for key, known in kinds.items():
        given = found["properties"][key]
        kept = {word: given[word] for word in ("default", "description") if word in given}
        options = [_named(name, settings) for name, settings in known.items()]
        found["properties"][key] = {"oneOf": options, "title": key.capitalize(), **kept}
    shared = {key: form for key, form in found["properties"].items() if key != "name"}
    name = {"type": "string", "description": "The stage's folder under the run's, and what run:NAME means later."}
    found["properties"]["stages"] = {
        "type": "array",
        "description": "Searches in turn, each with the keys that differ; run:NAME is what an earlier one found.",
        "items": {"type": "object", "properties": {"name": name, **shared}, "required": ["name"]},
    }
    required = found.pop("required")
    return found | {"anyOf": [{"required": required}, {"required": ["name", "stages"]}]}


def _named(name: str, settings: Any) -> dict[str, Any]:
    """Return the schema of a value whose class is given by its name."""
    inner = nested(settings)
    form = TypeAdapter(_without(settings, inner) if inner else settings).json_schema()
    form["properties"] = {"name": {"const": name}, **form.get("properties", {}), **_drivers(settings, inner)}
    required = {field.name for field in dataclasses.fields(settings) if _required(field)}
    form["required"] = ["name", *form.get("required", []), *(key for key in inner if key in required)]
    return form | {"additionalProperties": False}


def _without(settings: Any, inner: Mapping[str, bool]) -> Any:
    """Return a class of settings without those that are drivers."""
    kept = [(each.name, each.type, each) for each in dataclasses.fields(settings) if each.name not in inner]
    outer = dataclasses.make_dataclass(settings.__name__, kept, kw_only=True)
    outer.__doc__ = settings.__doc__
    return outer


def _drivers(settings: Any, inner: Mapping[str, bool]) -> dict[str, Any]:
    """Return the schemas of those settings of a driver that are drivers: what a driver may be, or a list of that."""
    fields: Mapping[str, Any] = {each.name: each for each in dataclasses.fields(settings)}
    found: dict[str, Any] = {}
    for name, several in inner.items():
        found[name] = {"$ref": "#/properties/driver"}
        if several:
            found[name] = {"type": "array", "items": found[name]}
            if not _required(fields[name]):
                found[name]["default"] = [plain_driver(own) for own in fields[name].default]
    return found


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING

"""The keys of an experiment file, their types, bounds and defaults, and their JSON schema."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from evomerge.drivers import DRIVERS
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


class ParameterEntry(RangeEntry):
    """Bounds of a method's parameter."""

    per_source: bool = False


class BlendEntry(_Strict):
    """A parameter space; see evomerge.spaces.blend.BlendSpace."""

    kind: Literal["blend"] = "blend"
    methods: list[str] = Field(default=[], description="Methods or lines of stages: one, or several to choose from.")
    slots: dict[str, list[str]] = Field(
        default={}, description="In place of methods: the parts of a line, in order, and what may stand in each."
    )
    knots: int = Field(default=1, ge=1, description="Values over depth.")
    profile: Literal["constant", "linear"] = "constant"
    modules: list[list[Literal["attention", "mlp", "other"]]] = [["attention", "mlp", "other"]]
    weight: RangeEntry = RangeEntry(low=0.0, high=1.0)
    parameters: dict[str, ParameterEntry | float | str | list[str]] = Field(
        default={}, description="Bounds of a parameter's genes, a list of options, or one value."
    )
    routes: list[dict[str, Any]] = Field(
        default=[], description="Routes of a recipe that go before the search: their tensors are not searched."
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


class WorkersEntry(_Strict):
    """Who builds and scores the candidates."""

    pool: Literal["inline", "ray"] = "inline"
    count: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1, description="Threads of torch in each worker.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs per worker; a fraction shares one.")
    device: str = "cpu"
    resident_gb: float | None = Field(default=None, ge=0, description="GB of sources to keep on a GPU; default: all.")
    batch: int = Field(default=128, ge=1, description="The most rows of a batch.")
    tokens: int = Field(default=1 << 14, ge=1, description="The most tokens of a batch, rows times length.")
    prefixes_gb: float = Field(
        default=1.0, ge=0, description="GB of hidden states that a worker keeps for stacks that begin alike; 0: none."
    )
    time_limit: float = Field(default=600.0, gt=0, description="Seconds after which a candidate has failed.")


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
    driver: dict[str, Any] = Field(description="name: one of the drivers; and its settings.")
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
    finalists: int = Field(default=16, ge=1, description="Candidates re-scored on all validation items.")
    workers: WorkersEntry = WorkersEntry()
    calibration: str | None = Field(
        default=None, description="A file of texts, for methods that take statistics: one a line, or JSONL with `text`."
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
    form = TypeAdapter(settings).json_schema()
    form["properties"] = {"name": {"const": name}, **form.get("properties", {})}
    form["required"] = ["name", *form.get("required", [])]
    return form | {"additionalProperties": False}

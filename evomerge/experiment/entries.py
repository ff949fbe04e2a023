"""The keys of an experiment file, their types, bounds and defaults, and their JSON schema."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from evomerge.drivers import DRIVERS
from evomerge.fitness.registry import ESTIMATORS
from evomerge.fitness.schedule import SCHEDULES


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelsEntry(_Strict):
    """The models that go into the merge: folders (relative to the file) or names on the hub."""

    base: str | None = Field(default=None, description="The model that task vectors are taken from.")
    sources: dict[str, str] = Field(min_length=1, description="The models to blend, by the name that reports use.")


class RangeEntry(_Strict):
    """Bounds of a gene."""

    low: float
    high: float
    log: bool = False


class ParameterEntry(RangeEntry):
    """Bounds of a method's parameter."""

    per_source: bool = False


class SpaceEntry(_Strict):
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
    time_limit: float = Field(default=600.0, gt=0, description="Seconds after which a candidate has failed.")


class ExportEntry(_Strict):
    """Which models of the front to write at the end."""

    front: Literal["all", "knee", "extremes", "none"] = "all"


class ExperimentFile(_Strict):
    """An experiment: what is merged, what is searched, what is asked, and what is kept."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs/.")
    seed: int = Field(ge=0)
    models: ModelsEntry
    space: str | SpaceEntry
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
    return found


def _named(name: str, settings: Any) -> dict[str, Any]:
    """Return the schema of a value whose class is given by its name."""
    form = TypeAdapter(settings).json_schema()
    form["properties"] = {"name": {"const": name}, **form.get("properties", {})}
    form["required"] = ["name", *form.get("required", [])]
    return form | {"additionalProperties": False}

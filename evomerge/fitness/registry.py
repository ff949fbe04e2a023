"""The estimators by name, as an experiment file gives them."""

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.audit import Aipw
from evomerge.fitness.auto import Auto
from evomerge.fitness.clusters import Anchors
from evomerge.fitness.estimator import Estimator
from evomerge.fitness.factor import Factor
from evomerge.fitness.forecast import GmpIrt, GpIrt, MpIrt, PIrt
from evomerge.fitness.sampling import Mean, Stratified
from evomerge.value import Plain, parse, plain

#: The class of settings of each name.
ESTIMATORS: Mapping[str, type[Estimator]] = MappingProxyType(
    {
        "mean": Mean,
        "stratified": Stratified,
        "anchors": Anchors,
        "p_irt": PIrt,
        "gp_irt": GpIrt,
        "mp_irt": MpIrt,
        "gmp_irt": GmpIrt,
        "factor": Factor,
        "aipw": Aipw,
        "auto": Auto,
    }
)

#: The settings with which estimators do what their papers say, by name; others follow them or have no paper.
PUBLISHED: Mapping[str, Estimator] = MappingProxyType(
    {
        "anchors": Anchors(embedding="irt"),
        "p_irt": PIrt.as_published(),
        "gp_irt": GpIrt.as_published(),
        "mp_irt": MpIrt.as_published(),
        "gmp_irt": GmpIrt.as_published(),
    }
)


def read_estimator(data: Plain, place: str) -> Estimator:
    """Return the estimator of a plain form: its name, or a mapping with the key `name` and its settings.

    Example::

        read_estimator({"name": "gp_irt", "ability": "ml", "anchors": "irt"}, "experiment.estimator")

    Args:
        data: as read from JSON or YAML.
        place: file and key path, named in errors.

    Raises:
        ExperimentError: if the name is unknown or missing, or a setting is refused.
    """
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ExperimentError(f"{place}: give the name of an estimator, or a mapping with the key name, got {data!r}")
    name = data["name"]
    if name not in ESTIMATORS:
        raise ExperimentError(f"{place}.name: unknown estimator {name!r}; {nearest(name, ESTIMATORS)}")
    settings = {key: item for key, item in data.items() if key != "name"}
    return parse(ESTIMATORS[name], settings, place, ExperimentError)


def plain_estimator(estimator: Estimator) -> Plain:
    """Return the plain form of an estimator, which `read_estimator` reads back."""
    name = next(name for name, kind in ESTIMATORS.items() if type(estimator) is kind)
    return {"name": name, **plain(estimator)}

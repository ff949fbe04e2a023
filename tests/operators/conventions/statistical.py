"""Conventions of peers for methods that take statistics."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.operators.conventions import Call


def _fisher(case: Mapping[str, Any]) -> Call:
    """Every peer floors the raw Fisher values; only the official code may spare all sources but the first."""
    theirs = case["parameters"]
    parameters = {
        "floor": theirs["floor"],
        "rule": theirs["floor_kind"],
        "floored": theirs.get("floor_models", "all"),
        "norm": {"param": "tensor"}.get(theirs["normalize_fisher"], theirs["normalize_fisher"]),
    }
    return Call(method="fisher", weights=theirs["weights"], parameters=parameters)


def _regmean(case: Mapping[str, Any]) -> Call:
    """No peer has a ridge; weights multiply the Gram matrices and the plain mean."""
    theirs = case["parameters"]
    return Call(method="regmean", weights=theirs["weights"], parameters={"alpha": theirs["alpha"]})


def _mats(case: Mapping[str, Any]) -> Call:
    """The metric is the method; all sources weigh 1."""
    theirs = case["parameters"]
    init = {"pretrained": "base"}.get(theirs["init"], theirs["init"])
    parameters = {"iterations": theirs["iterations"], "init": init}
    if theirs["metric"] == "diagonal_fisher":
        return Call(method="mats_fisher", parameters=parameters)
    method = "mats" if "gram_out" in theirs["metric"] else "mats_gram"
    return Call(method=method, parameters={**parameters, "alpha": theirs.get("alpha", 1.0)})


TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any]], Call]] = {
    "fisher": _fisher,
    "regmean": _regmean,
    "mats": _mats,
}

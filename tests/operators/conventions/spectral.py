"""Conventions of peers for methods of the family `spectral`."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.operators.conventions import Call


def star(case: Mapping[str, Any]) -> Call:
    """STAR: the mean of the edited task vectors."""
    given = case["parameters"]
    return Call(method="star", parameters={"eta": given["eta"], "scale": given.get("lam", 1.0)})


def scaled(method: str) -> Callable[[Mapping[str, Any]], Call]:
    """Methods whose alpha multiplies the merged task vector."""
    return lambda case: Call(method=method, parameters={"scale": case["parameters"]["alpha"]})


def iso_cts(case: Mapping[str, Any]) -> Call:
    """Iso-CTS: the common space is a fraction of the rank."""
    given = case["parameters"]
    return Call(method="iso_cts", parameters={"scale": given["alpha"], "common": given["common_space_fraction"]})


def svc(case: Mapping[str, Any]) -> Call:
    """SVC on top of the sum or mean of task vectors."""
    given = case["parameters"]
    return Call(method=f"base | {given['applied_to']} | svc", parameters={"alpha": given["alpha"]})


def wudi(case: Mapping[str, Any]) -> Call:
    """SWUDI keeps a ratio of the eigenvalues, ASWUDI chooses how many by a rule."""
    given = case["parameters"]
    rule, rank = given.get("rank_rule"), given.get("rank_ratio")
    if rule and rule.startswith("cumvar_"):
        rule, rank = "energy", float(rule.removeprefix("cumvar_"))
    wanted = {
        "filter": given["filter"],
        "time": given.get("exp_time"),
        "rank": rank,
        "rule": {"stable_rank": "stable"}.get(rule, rule),
        "init": given["init"],
        "scale": given["scale"],
        "floor": given["min_eigenvalue"],
    }
    return Call(method="wudi", parameters={name: value for name, value in wanted.items() if value is not None})


def wudi_adam(case: Mapping[str, Any]) -> Call:
    """The published descent; the peer names the tensors that it leaves out."""
    given = case["parameters"]
    return Call(
        method="wudi_adam",
        parameters={
            "iterations": given["iterations"],
            "rate": given["lr"],
            "exclude": " ".join(given.get("exclude") or ()),
        },
    )


def knots_ties(case: Mapping[str, Any]) -> Call:
    """KnOTS with TIES: official TIES in the shared space, the mean or sum of agreeing entries."""
    given = case["parameters"]
    normalize = float(given["aggregate"] == "mean")
    return Call(
        method="knots_ties",
        parameters={"density": given["density"], "normalize": normalize, "scale": given["lam"]},
    )


def knots_mean(case: Mapping[str, Any]) -> Call:
    """KnOTS with plain aggregation in the shared space."""
    given = case["parameters"]
    normalize = float(given["aggregate"] == "mean")
    return Call(method="knots_mean", parameters={"normalize": normalize, "scale": given["lam"]})


def opcm(case: Mapping[str, Any]) -> Call:
    """OPCM: models are folded in the order in which the case lists them."""
    return Call(method="opcm", parameters={"alpha": case["parameters"]["alpha"]})


TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any]], Call]] = {
    "star": star,
    "iso_c": scaled("iso_c"),
    "iso_cts": iso_cts,
    "tsv_m": scaled("tsv_m"),
    "svc": svc,
    "wudi_closed_form": wudi,
    "wudi_adam": wudi_adam,
    "knots_ties": knots_ties,
    "knots_mean": knots_mean,
    "opcm": opcm,
}

"""Conventions of peers for methods of gates and of geometry."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.operators.conventions import Call, project


def pcb(case: Mapping[str, Any]) -> Call:
    """A share for each source multiplies the numerator alone, as weights do; one for all is the scale."""
    given = case["parameters"]
    per_source = isinstance(given["lam"], list)
    parameters = {"ratio": given["pcb_ratio"], "q": given["winsor"], "inter": given.get("inter", "raw")}
    parameters["scale"] = 1.0 if per_source else given["lam"]
    return Call(method="pcb", weights=given["lam"] if per_source else None, parameters=parameters)


def sce(case: Mapping[str, Any]) -> Call:
    """The official code measures the selected entries; mergekit drops all others, and has a floor."""
    share = case["parameters"]["select_topk"]
    if case["parameters"].get("select_applies_to") == "weights":
        return Call(method="sce", parameters={"select": share})
    line = "base | variance | elect | energy(floor=0.000001) | mean"
    return Call(method=line, parameters={"share": share, "select": share})


def widen(case: Mapping[str, Any]) -> Call:
    """Only the names of the parameters differ."""
    given = case["parameters"]
    return Call(method="widen", parameters={"threshold": given["t"], "score": given["s"]})


def slerp(case: Mapping[str, Any]) -> Call:
    """Both peers take full weights, and the angle to a zero tensor as a right one."""
    parameters = {"t": case["parameters"]["t"], "zero": "right_angle"}
    return Call(method="zero | slerp", parameters=parameters)


def nuslerp(case: Mapping[str, Any]) -> Call:
    """The peer says the axis as a dimension."""
    given = case["parameters"]
    axis = "flatten" if given["flatten"] else "columns" if given["axis"] == 0 else "rows"
    return Call(method="nuslerp", weights=given["weights"], parameters={"axis": axis, "zero": "right_angle"})


def multislerp(case: Mapping[str, Any]) -> Call:
    """Only the names of the parameters differ."""
    given = case["parameters"]
    return Call(method="multislerp", weights=given["weights"], parameters={"normalize": float(given["normalize"])})


def karcher(case: Mapping[str, Any]) -> Call:
    """The peer has no weights."""
    given = case["parameters"]
    return Call(method="karcher", parameters={"max_iter": given["max_iter"], "tol": given["tol"]})


def model_stock(case: Mapping[str, Any]) -> Call:
    """No peer clamps; fusion-bench averages angles; mergekit's product of lengths has a floor."""
    given = case["parameters"]
    scope = "row" if given["filter_wise"] else "tensor"
    floor = 1e-6 if project(case) == "mergekit" else 1e-8
    average = given.get("average", "cosines")
    return Call(method="model_stock", parameters={"scope": scope, "average": average, "clamp": 0.0, "floor": floor})


def same(method: str, **names: str) -> Callable[[Mapping[str, Any]], Call]:
    """Return the translation of a case that has our parameters, some by another name."""
    return lambda case: Call(
        method=method, parameters={names.get(name, name): given for name, given in case["parameters"].items()}
    )


TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any]], Call]] = {
    "pcb": pcb,
    "sce": sce,
    "widen": widen,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "metagpt_weights": same("metagpt"),
    "ram": same("ram"),
    "ramplus_tl": same("ramplus_tl"),
    "nearswap": same("nearswap"),
    "arcee_fusion": same("arcee_fusion", iqr_multiplier="multiplier"),
}

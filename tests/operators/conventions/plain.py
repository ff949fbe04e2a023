"""Conventions of peers for methods of the family `plain`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.operators.conventions import Call, project

#: How the peers count the entries that a density keeps, and what an elected zero is: mergekit's way, and the others'.
COUNTS = {"mergekit": "floor", "declare-lab/della": "floor", "IBM/STAR": "floor", "yule-BUAA/MergeLLM": "below"}
ZEROS = {"mergekit": "plus", "declare-lab/della": "plus", "IBM/STAR": "none", "yule-BUAA/MergeLLM": "tensor_majority"}
VOTES = {"mass": "sum", "sum": "sum", "count": "count", "frequency": "count", "normmass": "share"}


def weights(case: Mapping[str, Any]) -> list[float] | None:
    """Return the weights of a case, one per source, or None: all 1."""
    given = case["parameters"].get("weights")
    return each(case, given) if given is not None else None


def each(case: Mapping[str, Any], given: Any) -> list[float]:
    """Return a parameter as one value per source."""
    return list(given) if isinstance(given, list) else [given] * len(case["inputs"]["models"])


def scale(case: Mapping[str, Any]) -> float:
    """Return what the merged task vector is multiplied by."""
    given = case["parameters"]
    found = given.get("lam", given.get("alpha"))
    return 1.0 if found is None else float(found)


def linear(case: Mapping[str, Any]) -> Call:
    """Average, or with normalize false the sum."""
    normalize = float(case["parameters"].get("normalize", True))
    return Call(method="linear", weights=weights(case), parameters={"normalize": normalize})


def task_arithmetic(case: Mapping[str, Any]) -> Call:
    """Sum, or normalised the mean, of task vectors."""
    if case["parameters"].get("normalize"):
        return Call(method="base | mean | scale", weights=weights(case), parameters={"scale": scale(case)})
    return Call(method="task_arithmetic", weights=weights(case), parameters={"scale": scale(case)})


def passthrough(case: Mapping[str, Any]) -> Call:
    """Copy, scaled."""
    given = case["parameters"].get("scale")
    return Call(method="passthrough", parameters={"scale": 1.0 if given is None else float(given)})


def trimmed(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `trim` and `elect`."""
    given = case["parameters"]
    density = 1 - given["mask_rate"] if "mask_rate" in given else given["density"]
    return {
        "density": each(case, density),
        "scope": given.get("threshold_scope", "tensor"),
        "rescale": given.get("rescale", "none"),
        "count": COUNTS.get(project(case), "above"),
        **elected(case),
    }


def elected(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `elect`."""
    given = case["parameters"]
    vote = given.get("sign_vote", given.get("consensus", "sum"))
    return {"zero": ZEROS.get(project(case), "majority"), "vote": VOTES[vote]}


def ties(case: Mapping[str, Any]) -> Call:
    """Trim, elect and aggregate."""
    given = case["parameters"]
    parameters = {**trimmed(case), "scale": scale(case)}
    aggregate = given.get("aggregate", "mean" if given.get("normalize", True) else "sum")
    if aggregate == "mean":
        return Call(method="ties", weights=weights(case), parameters=parameters)
    combine = {"sum": "sum", "max": "argmax | sum"}[aggregate]
    return Call(method=f"base | trim | elect | {combine} | scale", weights=weights(case), parameters=parameters)


def sparsified(name: str) -> Callable[[Mapping[str, Any]], Call]:
    """Return the translation for a named method of one edit, with or without an election."""

    def translate(case: Mapping[str, Any]) -> Call:
        given = case["parameters"]
        elects = given.get("consensus", "none") != "none"
        parameters = {"normalize": float(given.get("normalize", False)), "scale": scale(case), **EDITS[name](case)}
        if elects:
            parameters |= elected(case)
        if given.get("lambda_type") == "ada_row":
            del parameters["normalize"]
            line = "base | magprune | elect | restored | scale" if elects else "base | magprune | restored | scale"
            return Call(method=line, weights=weights(case), parameters=parameters)
        return Call(method=NAMES[name][elects], weights=weights(case), parameters=parameters)

    return translate


def dropped(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `drop`."""
    given = case["parameters"]
    return {"density": each(case, given["density"]), "rescale": given.get("rescale", "1/p")}


def magpruned(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `magprune`."""
    given = case["parameters"]
    rescale = given.get("rescale", "1/p")
    return {
        "density": each(case, given["density"]),
        "epsilon": each(case, given["epsilon"]),
        "rescale": "1/p" if rescale == "1/p_ij" else rescale,
        "rank": {"row_magnitude": "magnitude"}.get(given.get("rank_scope", "row"), given.get("rank_scope", "row")),
    }


def banded(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `band`."""
    given = case["parameters"]
    found = {"scope": given.get("threshold_scope", "tensor"), "rescale": given.get("rescale", "none")}
    if "beta_keep" in given:
        count = "after" if given.get("remove_first", True) else "within"
        share, gamma = given["beta_keep"], given["gamma_remove"]
    elif "small_mask_rate" in given:
        count, share, gamma = "bottom", given["density"], given["small_mask_rate"]
    else:
        count, share, gamma = "full", given["density"], given["gamma"]
    return {**found, "count": count, "density": each(case, share), "gamma": each(case, gamma)}


EDITS = {"dare": dropped, "della": magpruned, "breadcrumbs": banded}

#: The named methods without and with an election.
NAMES = {
    "dare": ("dare_linear", "dare_ties"),
    "della": ("della_linear", "della"),
    "breadcrumbs": ("breadcrumbs", "breadcrumbs_ties"),
}


def emr(case: Mapping[str, Any]) -> Call:
    """The unified task vector."""
    return Call(method="emr", parameters={"scale": scale(case)})


def magmax(case: Mapping[str, Any]) -> Call:
    """The greatest entry of all."""
    return Call(method="magmax", parameters={"scale": scale(case)})


def cabs(case: Mapping[str, Any]) -> Call:
    """Disjoint n:m masks in the order of the models; the weights are the lambdas."""
    given = case["parameters"]
    parameters = {
        "n": given["n"],
        "m": given["m"],
        "reuse": float(given.get("second_may_reuse", False)),
        "scale": 1.0,
    }
    return Call(method="cabs", weights=each(case, given["lams"]), parameters=parameters)


def consensus(case: Mapping[str, Any]) -> Call:
    """Keep what k sources claim; the claims are on the sum, the scaled sum, or a TIES vector."""
    given = case["parameters"]
    parameters = {"mask_scale": each(case, given["tall_lambda"]), "k": given["k"], "scale": scale(case)}
    density = re.search(r"ties_dis_(\w+)_([\d.]+)", str(given.get("multi_task_vector", "")))
    scaled_first = given.get("mask_from") == "scaled_sum"
    if density is None:
        line = "base | sum | scale | consensus" if scaled_first else "consensus_ta"
        return Call(method=line, parameters=parameters)
    share = {"density": float(density[2]), "scope": "model", "count": "above", "zero": "majority"}
    combine = {"sum": "sum", "mean": "mean", "max": "argmax | sum"}[density[1]]
    tail = "scale | consensus" if scaled_first else "consensus | scale"
    line = "consensus_ties" if density[1] == "sum" and not scaled_first else f"base | trim | elect | {combine} | {tail}"
    return Call(method=line, parameters={**parameters, **share})


def tall_mask(case: Mapping[str, Any]) -> Call:
    """What one task claims of the sum."""
    given = case["parameters"]
    return Call(
        method="tall_mask", parameters={"mask_scale": each(case, given["tall_lambda"]), "source": given["task"]}
    )


def lines(case: Mapping[str, Any]) -> Call:
    """A line over depth on the sum, on one task vector, or on a TIES vector as its authors' copy makes it."""
    given = case["parameters"]
    start = given["a"]
    parameters: dict[str, Any] = {"b": given["b"]}
    parameters |= {"mode": "auto"} if isinstance(start, str) else {"mode": "given", "a": start}
    if given["merge"] == "ties":
        parameters |= {"density": given.get("density", 0.2), "scope": "model", "count": "above", "zero": "majority"}
        return Call(method="base | trim | elect | mean | lines", parameters=parameters)
    return Call(method="lines", parameters=parameters)


TRANSLATIONS: Mapping[str, Callable[[Mapping[str, Any]], Call]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "passthrough": passthrough,
    "ties": ties,
    "dare_linear": sparsified("dare"),
    "dare_ties": sparsified("dare"),
    "della": sparsified("della"),
    "della_linear": sparsified("della"),
    "breadcrumbs": sparsified("breadcrumbs"),
    "breadcrumbs_ties": sparsified("breadcrumbs"),
    "emr": emr,
    "magmax": magmax,
    "cabs": cabs,
    "consensus_ta": consensus,
    "consensus_ties": consensus,
    "tall_mask": tall_mask,
    "lines": lines,
}

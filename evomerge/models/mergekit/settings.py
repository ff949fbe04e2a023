"""What a value in mergekit's file means for one tensor: filters, gradients over depth, precedence."""

import math
from collections.abc import Iterator, Mapping, Sequence

from evomerge.errors import RecipeError
from evomerge.models.mergekit.conventions import Says, Scalar
from evomerge.value import Plain, value


@value
class Spot:
    """The tensor that is built and where it stands in its slice: 0 at the first layer, 1 at the last."""

    tensor: str
    t: float


def where(layer: int, layers: int) -> float:
    """Return the position of a layer in a slice; the only layer of a slice stands at its end."""
    return layer / (layers - 1) if layers > 1 else 1.0


def resolved(levels: Sequence[Plain], says: Says, spot: Spot, place: str) -> Scalar:
    """Return the value of a parameter for a tensor.

    Args:
        levels: what is given for it, the nearest first; None where nothing is.
        says: what the parameter is.
        spot: the tensor.
        place: file and parameter, named in errors.

    Raises:
        RecipeError: if nothing is given that fits the tensor, and there is no default; if a value is of no use.
    """
    for given in levels:
        found = None if given is None else _fitting(given, spot, place)
        if found is not None:
            return _scalar(found, says, spot, place)
    if says.default is None:
        raise RecipeError(f"{place}: nothing is given for tensor {spot.tensor!r}; add a value without a filter")
    return says.default


def filters(given: Plain) -> Iterator[str]:
    """Yield the filters that stand anywhere in a file."""
    if isinstance(given, Mapping):
        if isinstance(given.get("filter"), str) and given["filter"] != "*":
            yield given["filter"]
        for each in given.values():
            yield from filters(each)
    elif isinstance(given, list):
        for each in given:
            yield from filters(each)


def _fitting(given: Plain, spot: Spot, place: str) -> Plain:
    """Return what is given for a tensor: the value of the first filter that its name contains; None if none fits."""
    conditions = [given] if isinstance(given, Mapping) else given
    if not (isinstance(conditions, list) and any(isinstance(each, Mapping) for each in conditions)):
        return given
    for each in conditions:
        if not isinstance(each, Mapping) or set(each) - {"filter", "value"} or "value" not in each:
            raise RecipeError(f"{place}: expected entries of value and filter, got {each!r}")
        name = each.get("filter")
        if name in (None, "*") or str(name) in spot.tensor:
            return each["value"]
    return None


def _scalar(given: Plain, says: Says, spot: Spot, place: str) -> Scalar:
    if says.flag:
        if not isinstance(given, bool) and given not in (0, 1):
            raise RecipeError(f"{place}: must be true or false, one for all layers, got {given!r}")
        return bool(given)
    values = [_number(each, place) for each in (given if isinstance(given, list) else [given])]
    if not values:
        raise RecipeError(f"{place}: the gradient is empty; give at least one value")
    at = spot.t * (len(values) - 1)
    low = min(int(at), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low]) if at > low else values[low]


def _number(given: Plain, place: str) -> float:
    try:
        found = float(given) if isinstance(given, str | int | float) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise RecipeError(f"{place}: must be a number or a list of numbers over depth, got {given!r}")
    return found

"""Operators: merge the tensors of several sources, by methods that are lines of small pure stages.

`methods` (names, parameters, bounds) imports no torch; `merge` and `merge_tensor` load it
when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from evomerge.operators.methods import METHODS, Method, Parameter, Stage, check_blend, method

if TYPE_CHECKING:
    from evomerge.operators.merging import merge, merge_tensor

__all__ = ["METHODS", "Method", "Parameter", "Stage", "check_blend", "merge", "merge_tensor", "method"]


def __getattr__(name: str) -> Any:
    if name in ("merge", "merge_tensor"):
        from evomerge.operators import merging

        return getattr(merging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

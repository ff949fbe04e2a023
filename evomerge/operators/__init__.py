"""Operators: merge the tensors of several sources, by methods that are lines of small pure stages.

`METHODS` and `STAGES` are plain data; `merge` and `merge_tensor` load torch when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from evomerge.methods import Method, Parameter, Stage, method
from evomerge.stages import METHODS, STAGES

if TYPE_CHECKING:
    from evomerge.operators.merging import merge, merge_tensor

__all__ = ["METHODS", "STAGES", "Method", "Parameter", "Stage", "merge", "merge_tensor", "method"]


def __getattr__(name: str) -> Any:
    if name in ("merge", "merge_tensor"):
        from evomerge.operators import merging

        return getattr(merging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

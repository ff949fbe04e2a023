"""How the peers' parameters and conventions are said in those of `merge`: one module per family of methods.

Each module has a dictionary from a case's method to a function that takes the case and returns a `Call`. It may look at
the method, the source (project and function), the parameters and the shapes, and never at a case's id.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of `merge` for a case, besides sources, base and the statistics that the case records.

    `statistics` maps the case's kinds of statistics to those of `merge`, where the names differ; None leaves one out.
    `unified`: the case's output is the merged task vector, without the base.
    """

    method: str
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def project(case: Mapping[str, Any]) -> str:
    """Return the project whose code produced a case."""
    return str(case["source"]["project"])


def function(case: Mapping[str, Any]) -> str:
    """Return the function of the project that produced a case."""
    return str(case["source"]["function"])

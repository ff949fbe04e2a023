"""The search: how a run begins, its loop, and how long it takes."""

from evomerge.search.beginning import open_pool, prepare, reference
from evomerge.search.loop import Search
from evomerge.search.pace import Pace, measure_pace, planned, planned_items
from evomerge.search.resources import needs_of
from evomerge.search.tape import Watch
from evomerge.search.watching import Watching

__all__ = [
    "Pace",
    "Search",
    "Watch",
    "Watching",
    "measure_pace",
    "needs_of",
    "open_pool",
    "planned",
    "planned_items",
    "prepare",
    "reference",
]

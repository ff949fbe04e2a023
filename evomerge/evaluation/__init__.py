"""Tasks, and the live model that answers what they ask; heavy libraries load with `engine` only."""

from evomerge.evaluation.files import build_task, read_task
from evomerge.evaluation.task import SPLITS, Response, Task

__all__ = ["SPLITS", "Response", "Task", "build_task", "read_task"]

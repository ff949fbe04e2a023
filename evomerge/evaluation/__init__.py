"""Tasks, and the live model that answers their items; heavy libraries load with `engine` only."""

from evomerge.evaluation.jsonl import TaskFile, build_task, read_task
from evomerge.evaluation.task import Item, Response, Task, grade

__all__ = ["Item", "Response", "Task", "TaskFile", "build_task", "grade", "read_task"]

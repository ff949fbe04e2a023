"""Pools: where jobs go to be answered, in this process or in Ray actors; a failure is an answer."""

from evomerge.pool.contract import Answer, Job, Pool, Worker, answer_safely, failure
from evomerge.pool.crew import Crew, WorkerStatus, idle_share, read_crew, write_crew
from evomerge.pool.inline import InlinePool
from evomerge.pool.ray import RayPool
from evomerge.pool.session import memories

__all__ = [
    "Answer",
    "Crew",
    "InlinePool",
    "Job",
    "Pool",
    "RayPool",
    "Worker",
    "WorkerStatus",
    "answer_safely",
    "failure",
    "idle_share",
    "memories",
    "read_crew",
    "write_crew",
]

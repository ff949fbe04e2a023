"""Runs a line of stages on one tensor (or a piece of it): the one interpreter of methods."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.methods import Step
from evomerge.operators import facts
from evomerge.operators.state import Ask, State
from evomerge.stages import STAGES

#: Where the functions of the stages are; each has the name of its stage.
MODULES = ("elementwise", "gates", "geometry", "spectral", "statistical")

#: Answers a question, given the name of its stage and its number within the stage. (Where a stage stands in the line
#: would not do: a stage drops out where it does nothing, and so at some tensors only.)
Answer = Callable[[tuple[str, int], Ask], Tensor]


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Return the function of every stage."""
    modules = [importlib.import_module(f"evomerge.operators.{name}") for name in MODULES]
    return {name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in STAGES}


def at_once(number: tuple[str, int], ask: Ask) -> Tensor:
    """Answer every question from the values that it comes with: the whole scope is one tensor."""
    return facts.answer(ask)


def run(steps: Sequence[Step], s: State, answer: Answer = at_once) -> Tensor:
    """Run a line.

    Args:
        steps: from `Method.bound`.
        s: the sources' tensors as X, shape (N, ...), float32, with weights and the base.
        answer: returns the answers to what stages ask.

    Returns:
        The merged tensor, shape (...), float32.
    """
    added: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    for step in steps:
        found = _settled(functions()[step.stage.name](s, **step.values), step.stage.name, answer, s.border)
        match step.stage.kind:
            case "origin":
                X, added = found
                s = dataclasses.replace(s, X=X, D=X)
            case "basis":
                X, decode = found
                s = dataclasses.replace(s, X=X)
            case "edit":
                s = dataclasses.replace(s, X=found)
            case "gate":
                s = dataclasses.replace(s, G=found if s.G is None else s.G * found)
            case "weigh":
                s = dataclasses.replace(s, w=found)
            case "combine":
                s = dataclasses.replace(s, y=found)
                if decode is not None:  # shapes see the tensor's own coordinates
                    s = dataclasses.replace(s, X=torch.stack([decode(x) for x in s.X]), y=decode(found))
            case _:
                s = dataclasses.replace(s, y=found)
    return s.merged if added is None else added + s.merged


def _settled(found: Any, stage: str, answer: Answer, border: Callable[[Tensor], Tensor]) -> Any:
    """Return the result of a stage, answering what it asks on the way."""
    if not isinstance(found, Generator):
        return found
    number = 0
    try:
        ask = next(found)
        while True:
            reply = answer((stage, number), ask)
            ask = found.send(reply if ask.how == "gram" else border(reply))
            number += 1
    except StopIteration as end:
        return end.value

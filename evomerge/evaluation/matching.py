"""How large the hidden states are that each layer takes and returns, by which scales at seams can be matched."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from evomerge.evaluation.engine import Engine
from evomerge.evaluation.prefix import Counts, Course, Prefixes
from evomerge.evaluation.request import Request


class Followed(Protocol):
    """A live stack."""

    model: Any
    watch: Any


class _Sizes:
    """Adds up squares of what hops take and return; a watch of a live stack."""

    def __init__(self) -> None:
        self.taken: dict[int, list[float]] = {}
        self.returned: dict[int, list[float]] = {}

    def skips(self, hop: int, hidden: Tensor) -> Tensor | None:
        """Note what a hop takes."""
        self.taken.setdefault(hop, []).append(_mean_square(hidden))
        return None

    def leaves(self, hop: int, hidden: Tensor) -> None:
        """Note what it returns."""
        self.returned.setdefault(hop, []).append(_mean_square(hidden))


def sizes(engine: Engine, live: Followed, texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return the root mean square of what each hop of a live stack returns, and of what it takes, on some texts.

    Args:
        engine: asks the stack.
        live: the stack; its watch is replaced.
        texts: what it reads; each counts alike.
    """
    found = _Sizes()
    live.watch = found
    engine.show(live.model, Course(Prefixes(0), (), Counts()))
    for text in texts:
        engine.answer(engine.plan([Request(kind="rolling", continuation=text, cut=True)]))
    return _roots(found.returned), _roots(found.taken)


def _mean_square(hidden: Tensor) -> float:
    return float(hidden.double().square().mean())


def _roots(squares: dict[int, list[float]]) -> list[float]:
    return [(sum(own) / len(own)) ** 0.5 for _, own in sorted(squares.items())]

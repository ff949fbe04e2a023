"""What the stages of a line hand on to each other, and what they may ask about more than the entries before them.

Shapes: N sources, `...` the shape of the tensor (or of the piece of it that is being merged).
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.operators import masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where a tensor stands, which is all that a stage may know besides numbers.

    Attributes:
        tensor: the name of the tensor that is built; it keys random masks.
        names: the sources that take part, in the order of the recipe.
        layer: the layer that it stands in, or None at the ends of the model.
        depth: the number of layers of the model that is built.
        seed: the recipe's; it keys random masks.
        statistic: returns the statistic of a kind for a source (None: the base), or None where it has none.
    """

    tensor: str
    names: tuple[str, ...]
    layer: int | None = None
    depth: int = 1
    seed: int = 0
    statistic: Callable[[str, str | None], Tensor | None] = lambda kind, source: None

    def statistics(self, kind: str) -> list[Tensor] | None:
        """Return the statistic of every source, or None where no source has it for this tensor.

        Raises:
            RecipeError: if some sources have it and others lack it.
        """
        found = {name: self.statistic(kind, name) for name in self.names}
        given = [each for each in found.values() if each is not None]
        if given and len(given) < len(found):
            lacking = next(name for name, each in found.items() if each is None)
            raise RecipeError(f"tensor {self.tensor!r}: source {lacking!r} has no statistic {kind!r}, others have")
        return given or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A tensor on its way through a line.

    Attributes:
        X: contributions, shape (N, ...), float32.
        w: weights, shape (N,), float64.
        site: where the tensor stands.
        D: contributions as the origin gave them, shape (N, ...), float32; None before it.
        W0: the base's tensor, shape (...), float32, or None.
        G: gates >= 0, shape (N, ...), or None: every entry counts.
        y: the merged contribution, shape (...), once a combine has been.
        start: index of the first entry in the whole tensor, as flat memory, where X is a piece of it.
        keys: keys of the random masks, one per source, shape (N, 2), int32; None: made from the site.
        border: takes every small tensor that is about to meet X or y, and returns what does instead (see `fused`).
    """

    X: Tensor
    w: Tensor
    site: Site
    D: Tensor | None = None
    W0: Tensor | None = None
    G: Tensor | None = None
    y: Tensor | None = None
    start: Tensor | int = 0
    keys: Tensor | None = None
    border: Callable[[Tensor], Tensor] = lambda values: values

    def column(self, values: Tensor) -> Tensor:
        """Return one value per source so that it multiplies X source by source: shape (N, 1, ..., 1), X's dtype."""
        return self.border(values.to(self.X.dtype).view(-1, *[1] * (self.X.dim() - 1)))

    def number(self, given: float) -> Tensor:
        """Return a number of a parameter as what multiplies X or y, so that a compiled line takes it as an input."""
        return self.border(torch.tensor(0.0 if _is_opaque(given) else given, dtype=self.X.dtype, device=self.X.device))

    @property
    def merged(self) -> Tensor:
        """The merged contribution, in a stage after the combine."""
        if self.y is None:
            raise RecipeError("a shape stands before the combine of its line")
        return self.y

    def draw(self) -> Tensor:
        """Return numbers uniform in [0, 1) for every entry of X, a function of seed, source, tensor and entry."""
        return masks.uniform(self._keys, self.start, self.X[0].numel()).view_as(self.X)

    def chosen(self, p: "float | str | Mapping[str, float]") -> Tensor:
        """Return the mask of `draw() < p` for one p per source, in fewer operations; p = 0 is taken for the least p."""
        words = masks.words(self._keys, self.start, self.X[0].numel()).view_as(self.X)
        given = [1.0] * len(self.site.names) if _is_opaque(p) else each(self.site, p)
        limits = torch.tensor([masks.limit(max(one, 2.0**-24)) for one in given], dtype=torch.int32)
        return (words ^ -(1 << 31)) <= self.border(limits.to(self.X.device).view(-1, *[1] * (self.X.dim() - 1)))

    @property
    def _keys(self) -> Tensor:
        if self.keys is not None:
            return self.keys
        return masks.keys(self.site.seed, self.site.names, self.site.tensor).to(self.X.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A question of a stage about its whole scope; the answer comes back from `yield`.

    Attributes:
        how: "rank": the value of a given rank, shape (K, 1, ..., 1), float32;
            "sum" or "max": over all entries, shape (K, 1, ..., 1), float64 or float32;
            "gram": the inner products of the K rows, shape (K, K), float64.
        values: what it is about, shape (K, ...); with K = N the rows belong to the sources.
        scope: "row" (the last dimension), "tensor", "layer" or "model".
        rank: for "rank": from the number of entries in the scope to how many of them, for each row, should be at
            least as great as the answer; none: infinity, all: minus infinity. Values must not be negative.
        common: whether the rows are about all sources together, which matters where there are as many as sources.
        about: "magnitude" where the values are |X|, "X" where they are X: what is known of the contributions of the
            origin need not be computed again.
    """

    how: str
    values: Tensor
    scope: str = "tensor"
    rank: Callable[[int], Sequence[int]] = lambda entries: [entries]
    about: str = ""
    common: bool = False


#: What a stage function returns: its result, or a generator that asks and then returns it.
Stage: TypeAlias = Generator[Ask, Tensor, Any]


class Opaque:
    """A number that a traced line must not look at: it may only become a column or a `State.number`."""

    def _refused(self, *_: object) -> Any:
        raise TypeError("Opaque: a stage looks at a number")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refused
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = __neg__ = __abs__ = _refused
    __hash__ = None  # type: ignore[assignment]  # it equals nothing


def _is_opaque(given: object) -> bool:
    return isinstance(given, Opaque)


def added(rows: Tensor) -> Tensor:
    """Return the sum over the sources, one after the other, so that it has the same bits compiled and not."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def each(site: Site, given: float | str | Mapping[str, float]) -> list[float]:
    """Return one number per source."""
    if _is_opaque(given):
        return [given] * len(site.names)  # type: ignore[list-item]  # whoever looks at one is told
    if isinstance(given, Mapping):
        return [float(given[name]) for name in site.names]
    return [float(given)] * len(site.names)


def per_source(
    s: State, given: float | str | Mapping[str, float], form: Callable[[float], float] = lambda value: value
) -> Tensor:
    """Return one number per source (or a function of it) as a column, shape (N, 1, ..., 1), float32."""
    values = [0.0] * len(s.site.names) if _is_opaque(given) else [form(value) for value in each(s.site, given)]
    return s.column(torch.tensor(values, dtype=torch.float64, device=s.X.device))

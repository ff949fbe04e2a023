"""The parts of a model that is merged: answers what their lines ask about layer or model, then runs them one by one.

Arithmetic is float32 whatever the storage dtype. Memory is needed for one tensor of each source at a time, however
many passes a line of wide scope takes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError, nearest
from evomerge.methods import Method, Step, method
from evomerge.operators import masks
from evomerge.operators.elementwise import TINY
from evomerge.operators.facts import Facts, Unanswered, answer, labels
from evomerge.operators.fused import Lines, columns_of
from evomerge.operators.line import Answer, run
from evomerge.operators.state import Ask, Site, State
from evomerge.operators.tables import Magnitudes
from evomerge.recipe import Blend
from evomerge.value import canonical

#: The basis that takes a bias as one more column of its weight.
_JOINING = "knots"

#: Entries that an elementwise line is run on at a time: its intermediate results stay in the processor's cache, and
#: memory is needed for the tensors as they are stored, and one in float32. A multiple of `facts.BLOCK`, so that sums
#: have the same bits whatever it is.
PIECE = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor to build: its name, how to blend it, its shape, and the layer that it stands in.

    `bias` is the part of a bias that is merged as one more column of this one.
    """

    tensor: str
    blend: Blend
    shape: tuple[int, ...]
    layer: int | None = None
    bias: "Part | None" = None

    @property
    def entries(self) -> int:
        """How many entries it has, without those of the bias."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what is built: the tensor, and the bias that goes with it."""
        return (self.tensor,) if self.bias is None else (self.tensor, self.bias.tensor)


#: Reads what goes into a part: the tensor of a source, or of the base (None).
Read = Callable[[Part, str | None], Tensor]

#: Kinds of statistics that only `merge` is given: recorded random draws, in place of those that are made.
DRAWS = ("mask", "keep_prob")

#: Returns a statistic by kind, source (None: the base) and tensor; None where there is none.
Statistic = Callable[[str, str | None, str], Tensor | None]


class Known(Protocol):
    """What is kept about the sources, because it does not depend on the genome."""

    def magnitudes(self, parts: Sequence[Part], source: str) -> Magnitudes | None:
        """Return the magnitudes of a source's task vector in some parts together."""
        ...

    def gram(self, part: Part, names: tuple[str, ...], task_vectors: bool) -> Tensor | None:
        """Return the inner products of the sources' task vectors (or full weights) in a part, (N, N), float64."""
        ...


def no_statistics(kind: str, source: str | None, tensor: str) -> Tensor | None:
    """Have no statistics."""
    return None


class Merge:
    """The merge of one model: its parts, and the facts about groups of them that their lines ask for.

    A question of scope "model" is about all parts of the same line and parameters, however written and whatever their
    weights; one of scope "layer" about those of them in the same layer (or at the ends).

    Args:
        parts: what to build.
        read: reads the tensors.
        names: the sources, in the order of the recipe.
        has_base: whether `read` knows the base.
        depth: number of layers of the model that is built.
        seed: keys the random masks.
        statistic: returns statistics.
        known: what is kept about the sources, if anything.
        lines: where compiled lines are kept; None: nothing is compiled.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        read: Read,
        names: Sequence[str],
        *,
        has_base: bool,
        depth: int = 1,
        seed: int = 0,
        statistic: Statistic = no_statistics,
        known: Known | None = None,
        lines: Lines | None = None,
    ) -> None:
        """Answer the questions of wide scope."""
        self._known, self._lines = known, lines
        self._probed: dict[str, Tensor] = {}
        self._bound: dict[tuple[int, tuple[str, ...]], tuple[Step, ...]] = {}
        self._columns: dict[tuple[int, tuple[str, ...], int | None], Sequence[Tensor]] = {}
        self._unions: dict[tuple[str, int | None, str], Magnitudes | None] = {}
        self._all: dict[tuple[str, int | None, str], tuple[str, ...]] = {}
        self._names_of_groups: dict[int, str] = {}
        self.wide: set[str] = set()
        self.parts = _joined(parts)
        self._read, self._names, self._has_base = read, tuple(names), has_base
        self._depth, self._seed, self._statistic = depth, seed, statistic
        self._facts = Facts()
        self._groups: dict[str, list[Part]] = {}
        for part in self.parts:
            self._groups.setdefault(self._group(part), []).append(part)
        for group in self._groups.values():
            self._gather(group)

    def build(self, part: Part, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Yield name and merged tensor of a part, and of the bias that goes with it; cast to `dtype` at the end."""
        merged = self._run(part, dtype)
        if part.bias is None:
            yield part.tensor, merged
        else:
            yield part.tensor, merged[:, :-1].contiguous()
            yield part.bias.tensor, merged[:, -1].contiguous()

    def _gather(self, parts: Sequence[Part]) -> None:
        """Pass over the parts of a group until none has an open question.

        What is open depends on the sources that take part and on the layer: the smallest part of each kind tells.
        One question is answered at a time, the earliest, because a stage that does nothing to some parts lets them
        reach later questions before the others.
        """
        probes: dict[object, Part] = {}
        for part in sorted(parts, key=lambda part: part.entries):
            probes.setdefault((self._taking(part), part.layer), part)
        stages = [step.stage.name for step in method(parts[0].blend.method).steps]

        def order(problem: Unanswered) -> tuple[int, int]:
            _, (stage, number), _ = problem.number
            return stages.index(stage), number

        while waiting := [order(problem) for probe in probes.values() if (problem := self._open(probe)) is not None]:
            first = min(waiting)
            for part in parts:
                for _, found in self._attempts(part):
                    if isinstance(found, Unanswered) and order(found) == first:
                        self._facts.add(found, labels(found.ask, self._taking(part)))
            self._facts.close()

    def _open(self, part: Part) -> Unanswered | None:
        """Return the first question of a part that has no answer yet; without any, keep what was merged of it."""
        for piece, found in self._attempts(part):
            if isinstance(found, Unanswered):
                return found
            if piece is None:
                self._probed[part.tensor] = found
        return None

    def _run(self, part: Part, dtype: torch.dtype) -> Tensor:
        """Return a merged part."""
        if part.tensor in self._probed:
            return self._probed.pop(part.tensor).to(dtype)
        merged: Tensor | None = None
        for piece, found in self._attempts(part):
            if isinstance(found, Unanswered):
                raise found
            if piece is None:
                return found.to(dtype)
            merged = found.new_empty(part.entries, dtype=dtype) if merged is None else merged
            merged[piece] = found
        if merged is None:
            raise RecipeError(f"tensor {part.tensor!r} has no entries")
        return merged.view(part.shape)

    def _attempts(self, part: Part) -> Iterator[tuple[slice | None, Tensor | Unanswered]]:
        """Run a part, piece by piece where its line allows; yield what is merged, or a question about other parts."""
        found = method(part.blend.method)
        names = self._taking(part)
        if not names:
            yield None, self._base_alone(part)
            return
        steps = self._steps(part, names)
        _check_average(steps, part, names)
        self._check_sources(part, found, names)
        if part.entries > PIECE and self._divisible(part, steps):
            yield from self._by_pieces(part, found, names, steps)
            return
        try:
            yield None, run(steps, self._state(part, found, names), self._reply(part, names, steps))
        except Unanswered as problem:
            yield None, problem.with_traceback(None)  # whose frames hold tensors

    def _by_pieces(
        self, part: Part, found: Method, names: tuple[str, ...], steps: Sequence[Step]
    ) -> Iterator[tuple[slice | None, Tensor | Unanswered]]:
        """Run a part piece by piece, with one pass more for each question about the whole of it."""
        sources = [self._read(part, name).flatten() for name in names]
        base = self._read(part, None).flatten() if self._has_base and reads_base(found) else None
        weights = torch.tensor([part.blend.weights[n] for n in names], dtype=torch.float64, device=sources[0].device)
        own = Facts()
        reply = self._reply(part, names, steps, own)
        asked = True
        while asked:
            asked = False
            for start in range(0, part.entries, PIECE):
                piece = slice(start, start + PIECE)
                state = State(
                    X=torch.stack([source[piece].float() for source in sources]), w=weights, start=start,
                    W0=None if base is None else base[piece].float(), site=self._site(part, names),
                )  # fmt: skip
                try:
                    yield piece, run(steps, state, reply)
                except Unanswered as problem:
                    if problem.ask.scope != "tensor":
                        yield piece, problem.with_traceback(None)
                        continue
                    own.add(problem, labels(problem.ask, names))
                    asked = True
            own.close()

    def is_wide(self, part: Part) -> bool:
        """Tell whether a part depends on others than itself."""
        return self._group(part) in self.wide

    def write(self, part: Part, out: Tensor) -> bool:
        """Merge a part in one compiled pass into a tensor of any floating dtype.

        Returns:
            Whether it could be: otherwise `out` is as it was, and `build` makes the part.

        Raises:
            CandidateError: if a value of the result is not finite.
        """
        names = self._taking(part)
        if self._lines is None or not names:
            return False
        found = method(part.blend.method)
        steps = self._steps(part, names)
        if not self._divisible(part, steps):
            return False
        _check_average(steps, part, names)
        self._check_sources(part, found, names)
        sources = [self._read(part, name) for name in names]
        base = self._read(part, None) if self._has_base and reads_base(found) else None
        tensors = [out, *sources, *([base] if base is not None else [])]
        if not all(tensor.is_contiguous() and tensor.is_floating_point() for tensor in tensors):
            return False
        keys = masks.keys(self._seed, names, part.tensor).to(out.device) if found.random else None
        try:
            columns = self._columns_of(part, names, steps, base is not None, keys, out.device)
        except Unanswered:
            return False
        flat = [source.view(-1) for source in sources]
        worst = self._lines.run(steps, columns, flat, None if base is None else base.view(-1), keys, out.view(-1))
        if worst is None:
            return False
        if not math.isfinite(worst):
            raise CandidateError(f"tensor {part.tensor!r}: values are not finite in {out.dtype}".replace("torch.", ""))
        return True

    def _columns_of(
        self, part: Part, names: tuple[str, ...], steps: Sequence[Step], has_base: bool, keys: Tensor | None,
        device: torch.device,
    ) -> Sequence[Tensor]:  # fmt: skip
        """Return the columns of a compiled line; those of a blend that asks nothing are the same within a layer."""
        key = (id(part.blend), names, part.layer)
        if key in self._columns:
            return self._columns[key]
        weights = torch.tensor([part.blend.weights[name] for name in names], dtype=torch.float64, device=device)
        reply, asked = self._reply(part, names, steps, Facts()), False

        def listen(number: tuple[str, int], ask: Ask) -> Tensor:
            nonlocal asked
            asked = True
            return reply(number, ask)

        found = columns_of(steps, self._site(part, names), has_base, weights, keys, listen)
        if not asked:
            self._columns[key] = found
        return found

    def _reply(
        self, part: Part, names: tuple[str, ...], steps: Sequence[Step], own: Facts | None = None
    ) -> Answer:
        """Return what answers the questions about a part: at once, or where it comes in pieces from `own` facts."""

        def reply(number: tuple[str, int], ask: Ask) -> Tensor:
            everyone = names
            if ask.scope in ("layer", "model"):
                self.wide.add(self._group(part))
                everyone = self._everyone(part, ask.scope)
            found = None
            if number[0] in self._untouched(part, everyone):
                found = self._known_answer(ask, part, names, everyone, steps)
            if found is not None:
                return found.to(ask.values.device)
            if ask.scope in ("row", "tensor"):
                return answer(ask) if own is None else own.answer(ask, ("", number, None), labels(ask, names))
            key = (self._group(part), number, part.layer if ask.scope == "layer" else None)
            return self._facts.answer(ask, key, labels(ask, names))

        return reply

    def _known_answer(
        self, ask: Ask, part: Part, names: tuple[str, ...], everyone: tuple[str, ...], steps: Sequence[Step]
    ) -> Tensor | None:
        """Answer a question about the origin's contributions from what is kept, or return None.

        That is done for all parts that the question is about or for none: `everyone` takes part in one of them.
        """
        task_vectors = self._has_base and steps[0].stage.name in ("base", "base_if_any")
        if self._known is None or part.bias is not None or ask.scope == "row":
            return None
        if ask.how == "gram" and ask.about == "X" and ask.scope == "tensor":
            if not task_vectors and steps[0].stage.name not in ("zero", "base_if_any"):
                return None
            return self._known.gram(part, names, task_vectors)
        if ask.how != "rank" or ask.about != "magnitude" or not task_vectors:
            return None
        tables = {name: self._table(ask.scope, part, name) for name in everyone}
        if None in tables.values():
            return None
        found = []
        for i, name in enumerate(names):
            table = tables[name]
            if table is not None:
                found.append(table.kth(ask.rank(table.entries)[i]))
        return torch.tensor(found, dtype=torch.float32).view(-1, *[1] * (ask.values.dim() - 1))

    def _table(self, scope: str, part: Part, source: str) -> Magnitudes | None:
        """Return the magnitudes of a source over a scope, from those of each part that it takes part in."""
        if self._known is None:
            return None
        if scope == "tensor":
            return self._known.magnitudes([part], source)
        layer = part.layer if scope == "layer" else None
        key = (self._group(part), layer, source)
        if key not in self._unions:
            parts = [each for each in self._groups[self._group(part)] if scope == "model" or each.layer == layer]
            taking = [each for each in parts if source in self._taking(each)]
            self._unions[key] = self._known.magnitudes(taking, source)
        return self._unions[key]

    def _everyone(self, part: Part, scope: str) -> tuple[str, ...]:
        """Return the sources that take part in any of the parts that a question of wide scope is about."""
        key = (self._group(part), part.layer if scope == "layer" else None, scope)
        if key not in self._all:
            parts = [each for each in self._groups[key[0]] if scope == "model" or each.layer == part.layer]
            taking = {name for each in parts for name in self._taking(each)}
            self._all[key] = tuple(name for name in self._names if name in taking)
        return self._all[key]

    def _divisible(self, part: Part, steps: Sequence[Step]) -> bool:
        """Tell whether a line may be run on pieces of a flat tensor."""
        recorded = (self._statistic(kind, name, part.tensor) for kind in DRAWS for name in self._names[:1])
        return part.bias is None and all(draws is None for draws in recorded) and flat(steps)

    def _check_sources(self, part: Part, found: Method, names: tuple[str, ...]) -> None:
        missing = next((name for name in names if name not in self._names), None)
        if missing is not None:
            raise RecipeError(
                f"tensor {part.tensor!r}: the blend weighs {missing!r}; {nearest(missing, self._names)}"
            )
        if found.needs_base and not self._has_base:
            raise RecipeError(
                f"tensor {part.tensor!r}: {found.name} works on task vectors and needs a base; name one as `base`"
            )

    def _state(self, part: Part, found: Method, names: tuple[str, ...]) -> State:
        wanted = self._has_base and reads_base(found)
        weights = torch.tensor([part.blend.weights[name] for name in names], dtype=torch.float64)
        X = torch.stack([self._full(part, name) for name in names])
        base = self._full(part, None) if wanted else None
        return State(X=X, w=weights.to(X.device), site=self._site(part, names), W0=base)

    def _site(self, part: Part, names: tuple[str, ...]) -> Site:
        return Site(
            tensor=part.tensor, names=names, layer=part.layer, depth=self._depth, seed=self._seed,
            statistic=lambda kind, source: self._statistic(kind, source, part.tensor),
        )  # fmt: skip

    def _full(self, part: Part, source: str | None) -> Tensor:
        """Read what goes into a part, float32, the bias as last column."""
        weight = self._read(part, source).float()
        return weight if part.bias is None else torch.cat([weight, self._read(part.bias, source).float()[:, None]], 1)

    def _steps(self, part: Part, names: tuple[str, ...]) -> tuple[Step, ...]:
        """Return the steps of a part's line, with its parameters, where these sources take part."""
        key = (id(part.blend), names)
        if key not in self._bound:
            self._bound[key] = method(part.blend.method).bound(part.blend.parameters, names)
        return self._bound[key]

    def _group(self, part: Part) -> str:
        """Return what the parts have in common that a question of scope "model" is about: what is run on them."""
        key = id(part.blend)
        if key not in self._names_of_groups:
            steps = method(part.blend.method).bound(part.blend.parameters, self._names)
            self._names_of_groups[key] = canonical([[step.stage.name, step.values] for step in steps])
        return self._names_of_groups[key]

    def _untouched(self, part: Part, names: tuple[str, ...]) -> set[str]:
        """Return the stages that see the contributions as the origin made them, where these sources take part."""
        found = set()
        for step in self._steps(part, names):
            found.add(step.stage.name)
            if step.stage.kind in ("basis", "edit"):
                break
        return found

    def _taking(self, part: Part) -> tuple[str, ...]:
        """Return the sources that take part: those of a weight, in the order of the recipe."""
        given = {name for name, weight in part.blend.weights.items() if weight != 0}
        return tuple(name for name in self._names if name in given) + tuple(sorted(given - set(self._names)))

    def _base_alone(self, part: Part) -> Tensor:
        if not self._has_base:
            raise CandidateError(f"tensor {part.tensor!r}: no source has a weight that counts, and there is no base")
        return self._full(part, None).clone()  # the caller may write to what it gets


def flat(steps: Sequence[Step]) -> bool:
    """Tell whether a line may be run on flat pieces of a tensor; one that takes statistics or looks at rows may not."""
    return all(
        step.stage.elementwise and not step.stage.statistics and "row" not in step.values.values() for step in steps
    )


def reads_base(found: Method) -> bool:
    """Tell whether a method reads the base's tensors where there is a base."""
    return found.steps[0].stage.name in ("base", "base_if_any")


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts with each bias inside its weight's part, where the method takes them together.

    A bias goes with a matrix of as many rows; others (of convolutions, of matrices stored in x out) stand alone.
    """
    weights = {part.tensor: part for part in parts if part.tensor.endswith("weight") and _joins(part.blend)}
    found = {part.tensor: part for part in parts}
    for part in parts:
        weight = weights.get(part.tensor.removesuffix("bias") + "weight")
        if weight and weight.blend == part.blend and weight.shape[:-1] == part.shape:
            found[weight.tensor] = dataclasses.replace(weight, bias=part)
            del found[part.tensor]
    return tuple(found.values())


def _joins(blend: Blend) -> bool:
    return any(step.stage.name == _JOINING for step in method(blend.method).steps)


def _check_average(steps: Sequence[Step], part: Part, names: Sequence[str]) -> None:
    """Refuse weights that are to be normalised and add up to nothing."""
    weights = [part.blend.weights[name] for name in names]
    plain = not any(step.stage.kind in ("gate", "weigh") for step in steps)
    normalized = any(step.stage.name == "mean" and step.values["normalize"] for step in steps)
    if plain and normalized and abs(math.fsum(weights)) < TINY * math.fsum(abs(w) for w in weights):
        shown = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))
        raise CandidateError(f"tensor {part.tensor!r}: weights cancel and have no average ({shown})")

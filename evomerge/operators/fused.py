"""Runs an elementwise line as one compiled pass over flat tensors, straight into the tensor that is built.

The line's own stage functions are traced, once for each structure of a line, with everything that meets the
contributions as a small tensor (weights, thresholds, scales) for an input; so a search compiles each line once, and the
plain run of the same functions is the oracle of the compiled one. Where torch cannot compile, `unavailable` says why.
"""

import contextlib
import functools
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from evomerge.methods import Step
from evomerge.operators.line import Answer, run
from evomerge.operators.state import Opaque, Site, State

#: Options of the compiler: without contraction into multiply-adds the bits are those of the plain run, one kernel
#: serves any number of threads, and no graph is read from a cache, where graphs are pickles; object code is.
_OPTIONS = {
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.dynamic_threads": True,
}

#: Entries of the tensors that a line is traced with; no round number, which could be taken for a fixed size.
_EXAMPLE = 4099

#: Most entries of one pass: the generator of masks counts them in 31 bits.
_MOST = 1 << 30


@functools.cache
def unavailable() -> str | None:
    """Return why lines cannot be compiled here, or None if they can."""
    try:
        from torch._inductor import standalone_compile  # noqa: F401  # its absence is what is asked
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch.fx.experimental.proxy_tensor import make_fx  # noqa: F401  # the same
    except ImportError as problem:
        return f"this torch ({torch.__version__}) has no standalone compiler ({problem})"
    try:
        compiler = get_cpp_compiler()
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "probe.cpp"
            program.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n", encoding="utf-8")
            subprocess.run(
                [compiler, str(program), "-o", str(program.with_suffix(".out"))], check=True, capture_output=True
            )
    except Exception as problem:  # whatever keeps torch from a compiler
        return f"no working C++ compiler ({' '.join(str(problem).split())[:120]})"
    return None


class Lines:
    """The compiled lines of one process.

    Attributes:
        problem: why a line could not be compiled, if one could not.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.problem: str | None = None
        self._compiled: dict[Any, Callable[..., Any] | None] = {}
        self._static: set[Any] = set()

    def run(
        self, steps: Sequence[Step], columns: Sequence[Tensor], sources: Sequence[Tensor], base: Tensor | None,
        keys: Tensor | None, out: Tensor,
    ) -> float | None:  # fmt: skip
        """Merge one tensor into `out`.

        Args:
            steps: an elementwise line.
            columns: what meets the contributions, from `columns_of`.
            sources: the sources' tensors, flat and contiguous, as stored.
            base: the base's, or None.
            keys: of the random masks, where the line draws any.
            out: the tensor that is built, flat and contiguous, of any floating dtype.

        Returns:
            0.0, or NaN if an entry of the result is not finite; None where the line could not be compiled.
        """
        function = self._function(steps, sources, base, columns, keys, out)
        if function is None:
            return None
        worst = 0.0
        keys = torch.zeros(1, dtype=torch.int32, device=out.device) if keys is None else keys
        for start in range(0, out.numel(), _MOST):
            piece = slice(start, start + _MOST)
            inside = base[piece] if base is not None else out[:0]
            at = torch.tensor(start, dtype=torch.int64, device=out.device)
            found = function(out[piece], inside, keys, at, *columns, *(source[piece] for source in sources))
            worst += float(found[-1])
        return worst

    def _function(
        self, steps: Sequence[Step], sources: Sequence[Tensor], base: Tensor | None, columns: Sequence[Tensor],
        keys: Tensor | None, out: Tensor,
    ) -> Callable[..., Any] | None:  # fmt: skip
        """Return the compiled line for tensors of these kinds, or None."""
        dtypes = (out.dtype, None if base is None else base.dtype, *(source.dtype for source in sources))
        kinds = (dtypes, keys is None, out.device.type, len(columns))
        structure = (tuple((step.stage.name, _words(step)) for step in steps), kinds)
        values = (structure, tuple(str(dict(step.values)) for step in steps))
        key = values if structure in self._static else structure
        if key in self._compiled:
            return self._compiled[key]
        body = functools.partial(_body, steps, base is not None, keys is not None, len(columns))
        example = _examples(sources, base, columns, keys, out)
        try:
            try:
                self._compiled[key] = _compiled(body(), example)
            except _Burnt:  # a number that goes past the columns is part of the program
                self._static.add(structure)
                key = values
                self._compiled[key] = _compiled(body(numbers=True), example)
        except Exception as problem:  # whatever the compiler cannot do: the plain run gives the same bits
            self.problem = " ".join(str(problem).split())[:120]
            self._compiled[key] = None
        return self._compiled[key]


class _Burnt(Exception):  # it is how a trace says that a number would become part of it
    """A stage computes with a number without making a column of it."""


def _words(step: Step) -> tuple[tuple[str, object], ...]:
    """Return the values of a step that are part of its program: words, whole numbers, and those left at default."""
    return tuple(
        (name, value)
        for name, value in sorted(step.values.items())
        if isinstance(value, str) or step.stage.parameters[name].whole or value == step.stage.parameters[name].default
    )


def _opaque(step: Step) -> dict[str, Any]:
    words = {name for name, _ in _words(step)}
    return {name: value if name in words else Opaque() for name, value in step.values.items()}


def columns_of(
    steps: Sequence[Step], site: Site, has_base: bool, weights: Tensor, keys: Tensor | None, answer: Answer
) -> list[Tensor]:
    """Run a line on no entries at all, and return every small tensor that would have met the contributions.

    Args:
        steps: an elementwise line.
        site: where the tensor stands.
        has_base: whether there is a base.
        weights: shape (N,), float64.
        keys: of the random masks, where the line draws any.
        answer: answers what stages ask, about values that it is not given.
    """
    found: list[Tensor] = []

    def record(values: Tensor) -> Tensor:
        found.append(values)
        return values

    nothing = weights.new_zeros(len(weights), 0, dtype=torch.float32)
    state = State(X=nothing, w=weights, site=site, W0=nothing[0] if has_base else None, keys=keys, border=record)
    run(steps, state, answer)
    return found


def _body(
    steps: Sequence[Step], has_base: bool, draws: bool, count: int, numbers: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that is traced: (out, base, keys, start, columns, sources) -> (out, 0 or NaN)."""

    def body(out: Tensor, base: Tensor, keys: Tensor, start: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        columns, sources = iter(rest[:count]), rest[count:]
        names = tuple(str(i) for i in range(len(sources)))
        state = State(
            X=torch.stack([source.float() for source in sources]),
            w=torch.ones(len(sources), dtype=torch.float64, device=out.device),
            site=Site(tensor="", names=names),
            W0=base.float() if has_base else None,
            start=start,
            keys=keys if draws else None,
            border=lambda values: next(columns),
        )
        blind = steps if numbers else [Step(stage=step.stage, values=_opaque(step)) for step in steps]
        merged = run(blind, state, lambda number, ask: torch.zeros(len(sources), 1)).to(out.dtype)
        return out.copy_(merged), (merged.float() * 0).sum()

    return body


def _examples(
    sources: Sequence[Tensor], base: Tensor | None, columns: Sequence[Tensor], keys: Tensor | None, out: Tensor
) -> list[Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.zeros(_EXAMPLE, dtype=tensor.dtype, device=out.device)

    return [
        like(out),
        like(base) if base is not None else out[:0],
        torch.zeros(1, dtype=torch.int32, device=out.device) if keys is None else keys,
        torch.tensor(0, dtype=torch.int64, device=out.device),
        *columns,
        *(like(source) for source in sources),
    ]


def _compiled(body: Callable[..., Any], example: list[Tensor]) -> Callable[..., Any]:
    from torch._functorch import config
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        traced = make_fx(body, tracing_mode="symbolic")(*example)
    except TypeError as problem:
        if "Opaque" in str(problem):
            raise _Burnt from None
        raise
    unstacked = make_fx(_Unstacked(traced).run, tracing_mode="symbolic")(*example)
    with config.patch(enable_autograd_cache=False), _quietly("torch._inductor.standalone_compile"):
        return standalone_compile(
            unstacked, [*example], dynamic_shapes="from_graph", options={"config_patches": _OPTIONS}
        )


@contextlib.contextmanager
def _quietly(name: str) -> Iterator[None]:
    """Keep a logger silent: it warns that what was compiled cannot be saved as a pickle, which nobody asked for."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Rows(list[Tensor]):
    """The rows of a stack, each a tensor of its own, so that no stack is ever made."""


class _Unstacked(fx.Interpreter):
    """Runs a traced line with stacks as lists of rows; what has no rule for rows gets the stack."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        if target is torch.ops.aten.stack.default and (len(args) == 1 or args[1] == 0):
            return _Rows(args[0])
        rows = next((arg for arg in args if isinstance(arg, _Rows)), None)
        if target is torch.ops.aten.cat.default and all(isinstance(arg, _Rows) for arg in args[0]):
            return _Rows(row for arg in args[0] for row in arg)
        if rows is None:
            return super().call_function(target, _whole(args), kwargs)
        if torch.Tag.pointwise in target.tags or target in _COPIES:
            count = max(len(arg) for arg in args if isinstance(arg, _Rows))
            return _Rows(target(*(_row(arg, i, count) for arg in args), **kwargs) for i in range(count))
        first = args[1] if len(args) > 1 else None
        if target is torch.ops.aten.select.int and first == 0:
            return rows[args[2]]
        if target is torch.ops.aten.unbind.int and first in (None, 0):
            return list(rows)
        if target is torch.ops.aten.slice.Tensor and first == 0:
            return _Rows(rows[slice(*args[2:4])])
        if target in _REDUCTIONS and first in (0, [0]) and not kwargs and len(args) == 2:
            wide = [row.long() if row.dtype is torch.bool else row for row in rows]  # as a sum of truths counts them
            return functools.reduce(_REDUCTIONS[target], wide)
        return super().call_function(target, _whole(args), kwargs)


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)

_REDUCTIONS: Mapping[Any, Callable[[Tensor, Tensor], Tensor]] = {
    torch.ops.aten.sum.dim_IntList: torch.add,
    torch.ops.aten.amax.default: torch.maximum,
    torch.ops.aten.amin.default: torch.minimum,
}


def _row(arg: Any, i: int, count: int) -> Any:
    """Return what an operation on row i takes in place of an argument of the operation on all rows."""
    if isinstance(arg, _Rows):
        return arg[i] if len(arg) > 1 else arg[0]
    return arg[i] if isinstance(arg, Tensor) and arg.dim() == 2 and arg.shape[0] == count else arg


def _whole(args: Iterable[Any]) -> tuple[Any, ...]:
    """Return arguments with stacks in place of rows."""

    def one(arg: Any) -> Any:
        if isinstance(arg, _Rows):
            return torch.stack(list(arg))
        return [one(each) for each in arg] if isinstance(arg, list) else arg

    return tuple(one(arg) for arg in args)

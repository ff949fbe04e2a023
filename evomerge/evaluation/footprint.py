"""How much memory asking takes, from the very batches that will be fed and the shapes of the model; no weights needed.

Legend of shapes: B rows, T tokens of a row, S tokens of a row and of all before it, U positions that are read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from evomerge.evaluation.batches import Prompts, Read, Texts
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.gates import Gates, prompts_of
from evomerge.evaluation.plan import Plan
from evomerge.evaluation.reading import CHUNK
from evomerge.evaluation.request import Request
from evomerge.evaluation.task import SPLITS, Task
from evomerge.value import value

#: Tensors that a layer holds at once: of the widest module (what its gate says, what it is multiplied with, and the
#: product), and of the hidden size (residual, norm, queries and what is made of them); of these as many again where
#: they are of low precision, as norms compute in float32. Fitted to peaks of single passes of Llamas of 20 and 100 M
#: parameters; how far they carry is measured by experiments/benchmarks/memory.py.
_WIDE, _STREAM = 3, 6

#: Numbers in float32 that a logit takes while its logarithm of a sum of exponentials is computed.
_EXPONENTIALS = 2

#: Below so many bytes the allocator of the C library keeps what is freed for later, in pieces that do not always fit.
#: What a pass takes in such tensors counts twice.
KEPT = 32 * 2**20

#: What the names of weights within a layer have.
_LAYER = re.compile(r"\.\d+\.")

#: Items of a split that are looked at, and of these the longest that are planned for each row of a batch.
_ITEMS, _LONGEST = 4096, 2


@value
class Shape:
    """What of a model's shape decides how much memory a pass takes.

    Attributes:
        hidden: the hidden size.
        widest: the greatest side of a weight within a layer.
        heads: entries of all queries of a token in one layer.
        keys: entries of keys and values of a token in one layer.
        layers: how many there are.
        vocabulary: logits of a position.
        itemsize: bytes of a number.
    """

    hidden: int
    widest: int
    heads: int
    keys: int
    layers: int
    vocabulary: int
    itemsize: int


def sketch(folder: Path, dtype: str, batch: int, tokens: int, trust_remote_code: bool = False) -> Engine:
    """Return an engine whose model has shapes and no memory; it plans as the real one does, and cannot answer.

    Raises:
        ModelError: if the model cannot be built.
    """
    with torch.device("meta"):
        return Engine(folder, dtype, "meta", batch, tokens, trust_remote_code)


def shape_of(engine: Engine, most: int | None = None) -> Shape:
    """Return the shape of an engine's model.

    Args:
        engine: real, or a sketch.
        most: the most layers that a candidate may have, where it is not the model's number.
    """
    config = engine.model.config.get_text_config()
    heads: int = getattr(config, "num_attention_heads", None) or 0  # none where nothing attends
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    named = engine.model.named_parameters()
    sides = [max(weight.shape[-2:]) for name, weight in named if weight.ndim > 1 and _LAYER.search(name)]
    return Shape(
        hidden=config.hidden_size,
        widest=max(sides, default=config.hidden_size),
        heads=heads * size,
        keys=2 * (getattr(config, "num_key_value_heads", None) or heads) * size,
        layers=most or config.num_hidden_layers,
        vocabulary=config.vocab_size,
        itemsize=engine.model.dtype.itemsize,
    )


def plans(engine: Engine, tasks: Mapping[str, Task], gates: Gates) -> Iterator[Plan]:
    """Yield plans whose batches are as large as any of a search: of the longest items of each split, and of the gates.

    Args:
        engine: real, or a sketch.
        tasks: what is asked.
        gates: what candidates must pass before.
    """
    if prompts := prompts_of(engine, gates, tasks):
        yield engine.plan(prompts)
    for task in tasks.values():
        for split in SPLITS:
            if asked := _longest(task, split, _LONGEST * engine.batch):
                yield engine.plan(asked)


def asking(plan: Plan, shape: Shape, tokens: int) -> int:
    """Return the most bytes that a plan takes at once beside the model: activations, keys and values, logits.

    Args:
        plan: what is asked.
        shape: of the model.
        tokens: the most tokens of a batch.
    """
    beginnings = {group.prefix for group in plan.groups}
    begun = min(sum(map(len, beginnings)), max(tokens, *map(len, beginnings), 0)) * _pair(shape)
    return begun + max((_batch(batch, shape) for batch in plan.batches(tokens)), default=0)


def _longest(task: Task, split: str, most: int) -> list[Request]:
    """Return the requests of a split's longest items, by characters."""
    count = task.count(split)
    places = range(0, count, max(1, count // _ITEMS))
    asked = [task.requests(split, place) for place in places]
    asked.sort(key=lambda own: -max((len(one.context) + len(one.continuation) for one in own), default=0))
    return [request for own in asked[:most] for request in own]


def _batch(batch: Texts | Prompts, shape: Shape) -> int:
    before = len(batch.prefix)
    if isinstance(batch, Prompts):
        rows, length = len(batch.prompts), int(batch.ids_BT.shape[1])
        room = rows * (before + length + batch.way.most) * _pair(shape)
        return room + _pass(rows, length, before + length, rows, shape)
    first = _read(batch.first, before, shape)
    if not (batch.after or batch.prefix):
        return first
    context = before + int(batch.first.ids_BT.shape[1])
    after = (_kept(read, shape) + _read(read, context, shape) for read in batch.after)
    return _kept(batch.first, shape) + max(first, *after, 0)


def _kept(read: Read, shape: Shape) -> int:
    """Return the keys and values that a pass adds."""
    return int(read.ids_BT.numel()) * _pair(shape)


def _read(read: Read, before: int, shape: Shape) -> int:
    rows, length = map(int, read.ids_BT.shape)
    return _pass(rows, length, before + length, len(read.row_U), shape)


def _pass(rows: int, length: int, seen: int, read: int, shape: Shape) -> int:
    """Return what a forward pass holds at once, whichever is most: a layer's tensors, or logits.

    Args:
        rows, length: of what is fed, B and T.
        seen: tokens that each row sees, S.
        read: positions whose logits are wanted, U.
        shape: of the model.
    """
    stream = rows * length * shape.hidden * shape.itemsize
    wide = rows * length * shape.widest * shape.itemsize
    joined = rows * seen * (2 * shape.keys + 2 * shape.heads) * shape.itemsize if seen > length else 0
    streams = _STREAM * (2 * stream if shape.itemsize < 4 else _held(stream))
    layer = _WIDE * _held(wide) + streams + joined
    logits = read * shape.vocabulary
    copies = 4 * (_EXPONENTIALS + int(shape.itemsize < 4))
    head = logits * shape.itemsize + min(logits, max(CHUNK, shape.vocabulary)) * copies + 2 * _held(stream)
    return max(layer, head)


def _held(size: int) -> int:
    """Return what a tensor takes, with what the allocator keeps of those before it."""
    return 2 * size if size < KEPT else size


def _pair(shape: Shape) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    return shape.keys * shape.layers * shape.itemsize

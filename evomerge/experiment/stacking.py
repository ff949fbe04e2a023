"""Spaces of layer stacks: what an experiment file says of them, checked against what the models are."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import ExperimentError, ModelError, nearest
from evomerge.evaluation import Task
from evomerge.experiment.entries import EditsEntry, ExperimentFile, HybridEntry, PathEntry, SakanaEntry
from evomerge.experiment.sources import Models
from evomerge.hops import Hop
from evomerge.models.architecture import place, split
from evomerge.models.checkpoint import check_stackable
from evomerge.recipe import Source, copy_of
from evomerge.spaces.blend import BlendSpace
from evomerge.spaces.edits import Edits, Steps
from evomerge.spaces.hybrid import BLEND, HybridSpace
from evomerge.spaces.stack import PathSpace, SakanaSpace

if TYPE_CHECKING:
    from evomerge.models.anatomy import Anatomy

#: SOURCE:FIRST-LAST, or SOURCE:LAYER.
_RUN = re.compile(r"^(?P<source>[^:]+):(?P<first>\d+)(?:-(?P<last>\d+))?$", re.ASCII)

#: Items of each task by which the sizes of hidden states are measured, and the digits that are kept.
_ITEMS, _DIGITS = 16, 4


def stackable(models: Models, trust_remote_code: bool) -> "Anatomy":
    """Return what the models' layers are.

    Raises:
        ModelError: if layers of this architecture, or of these models together, cannot be stacked.
    """
    from evomerge.models.anatomy import anatomy_of  # transformers behind it is slow to start

    check_stackable(models.checkpoints)
    found = anatomy_of(models.template, trust_remote_code)
    inside = {parts[2] for name in models.checkpoint.names if (parts := split(name)) is not None}
    missing = min(found.parameters - inside, default=None)
    if missing is not None:
        why = "transformers makes it of others when it loads them, so layers cannot be taken from the files as they are"
        raise ModelError(f"{models.template}: its files have no tensor for {missing!r} of a layer: {why}")
    return found


def path_space(entry: PathEntry, models: Models, anatomy: "Anatomy", dtype: str) -> PathSpace:
    """Return the space of an entry.

    Raises:
        InvalidInput: naming the key and the way out.
    """
    sources = _primary_first(models.sources, entry.primary)
    matches = {name: (tuple(own[0]), tuple(own[1])) for name, own in entry.sizes.items()}
    edits = _edits(entry, tuple(source.name for source in sources), models, anatomy, matches)
    base = models.named.get("base")
    return PathSpace(sources=sources, edits=edits, dtype=dtype, base=base, probed=entry.probes)


def sakana_space(entry: SakanaEntry, models: Models, anatomy: "Anatomy", dtype: str) -> SakanaSpace:
    """Return the space of an entry.

    Raises:
        InvalidInput: naming the key and the way out.
    """
    if anatomy.unscalable:
        raise ExperimentError(f"kind: sakana scales every hop, which cannot be written: {anatomy.unscalable}")
    return SakanaSpace(
        sources=_primary_first(models.sources, entry.primary),
        depth=models.checkpoint.depth,
        dtype=dtype,
        repetitions=entry.repetitions,
        favour=entry.favour,
        base=models.named.get("base"),
    )


def hybrid_space(entry: HybridEntry, blend: BlendSpace, models: Models, anatomy: "Anatomy") -> HybridSpace:
    """Return the space of an entry.

    Raises:
        InvalidInput: naming the key and the way out.
    """
    names = (BLEND, *(source.name for source in blend.sources))
    return HybridSpace(
        blend=blend, edits=_edits(entry.edits, names, models, anatomy, {}), probed=entry.edits.probes
    )


def measured(models: Models, tasks: Mapping[str, Task], file: ExperimentFile) -> dict[str, list[list[float]]]:
    """Return the root mean square of what each layer of each source returns, and of what it takes.

    Measured once on the prompts of the first search items; see `evomerge.evaluation.matching`.
    """
    from evomerge.evaluation.engine import Engine
    from evomerge.evaluation.matching import sizes
    from evomerge.models.resident import Resident
    from evomerge.models.stack import Stacks

    depth = models.checkpoint.depth
    stacks = Stacks(models.template, Resident(models.folders), "float32", trust_remote_code=file.trust_remote_code)
    engine = Engine(
        models.template, "float32", trust_remote_code=file.trust_remote_code, prepare=stacks.adopt
    )
    texts = [
        request.context + request.continuation
        for task in tasks.values()
        for at in range(min(_ITEMS, task.count("search")))
        for request in task.requests("search", at)[:1]
    ]
    found = {}
    for source in models.sources:
        live = stacks.build(copy_of(source, depth, "float32"))
        found[source.name] = [_short(own) for own in sizes(engine, live, texts)]
    return found


def _edits(
    entry: EditsEntry,
    names: tuple[str, ...],
    models: Models,
    anatomy: "Anatomy",
    matches: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]],
) -> Edits:
    checkpoint = models.checkpoint
    sizes, ends = [0] * checkpoint.depth, 0
    for name in checkpoint.names:
        layer, count = place(name, checkpoint.depth).layer, _count(checkpoint.shape(name))
        if layer is None:
            ends += count
        else:
            sizes[layer] += count
    scales = Steps(**entry.scale.model_dump()) if entry.scale else None
    if (scales or matches) and anatomy.unscalable:
        why = anatomy.unscalable
        raise ExperimentError(f"scale: scales of these models cannot be written: {why}; give scale: false")
    incumbent = tuple(hop for text in entry.stack for hop in _run(text, names))
    long = len(incumbent) or checkpoint.depth
    return Edits(
        names=names,
        primary=names[0],
        sizes=tuple(sizes),
        ends=ends,
        operations=tuple(entry.operations),
        edits=entry.edits,
        block=entry.block,
        reach=entry.reach,
        least=entry.depth.low,
        most=entry.depth.high or long + (long + 1) // 2,
        parameters=entry.parameters,
        scales=scales,
        matches=matches,
        incumbent=incumbent,
    )


def _run(text: str, names: tuple[str, ...]) -> list[Hop]:
    """Return the hops of SOURCE:FIRST-LAST."""
    found = _RUN.match(text)
    if not found:
        raise ExperimentError(f"stack: {text!r} must be SOURCE:FIRST-LAST or SOURCE:LAYER")
    if found["source"] not in names:
        raise ExperimentError(f"stack: {found['source']!r} is no source; {nearest(found['source'], names)}")
    first = int(found["first"])
    last = first if found["last"] is None else int(found["last"])
    return [Hop(source=found["source"], layer=layer) for layer in range(first, last + 1)]


def _primary_first(sources: tuple[Source, ...], primary: str) -> tuple[Source, ...]:
    """Return the sources in the order of the file, but for the primary, which goes first."""
    names = [source.name for source in sources]
    if primary and primary not in names:
        raise ExperimentError(f"primary: {primary!r} is no source; {nearest(primary, names)}")
    return tuple(sorted(sources, key=lambda source: bool(primary) and source.name != primary))


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _short(numbers: list[float]) -> list[float]:
    """Return numbers with few digits, so that they are the same wherever they are measured, but for bad luck."""
    return [float(f"{number:.{_DIGITS}g}") for number in numbers]

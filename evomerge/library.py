"""Finds what can be named: search spaces, tasks and experiments in files, methods and stages in their tables."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evomerge.errors import ExperimentError, nearest
from evomerge.methods import KINDS as STAGE_KINDS
from evomerge.methods import Given, Method, Parameter, Stage, method
from evomerge.stages import METHODS, STAGES

#: The three folders of nouns, as they are called in a workspace.
KINDS = ("search_spaces", "fitness", "experiments")

#: The two tables, as they are called beside the folders.
TABLES: Mapping[str, Mapping[str, Method] | Mapping[str, Stage]] = {"methods": METHODS, "stages": STAGES}

#: What the formulas mean by their letters.
SYMBOLS = (
    "W_i source i of N, W_0 the base, D_i = W_i - W_0; X_i contributions, G_i gates, w_i weights, y the merged "
    "contribution; m x n a matrix (out x in); * is elementwise, ' the transpose, |.| a magnitude or length."
)

#: What each kind of stage does.
_DUTIES = {
    "origin": "makes contributions X_i of sources and base; exactly one",
    "basis": "gives the X_i other coordinates until they are combined",
    "edit": "changes each X_i by itself",
    "gate": "compares the X_i and says how much each entry of each counts",
    "weigh": "sets the weights w_i",
    "combine": "makes one y of all X_i; exactly one",
    "shape": "changes y; what the origin took away is then added back",
}

_SUFFIXES = (".yaml", ".yml")


def shipped() -> Path:
    """Return the workspace that comes with evomerge: inside an installed package, or the checkout."""
    package = Path(__file__).resolve().parent
    carried = package / "_library"
    return carried if carried.is_dir() else package.parent


def workspace(file: Path) -> Path | None:
    """Return the workspace of a file: the nearest folder above it that holds its `experiments/`."""
    for folder in file.resolve().parents:
        if folder.name == "experiments":
            return folder.parent
    return None


def find(kind: str, reference: str, near: Path, place: str) -> Path:
    """Return the file that a reference names: a path (relative to `near`'s folder), or a name.

    A name is looked up in the workspace of `near`, then among what ships.

    Args:
        kind: one of `KINDS`.
        reference: what the user wrote.
        near: the file that holds the reference.
        place: file and key path, named in errors.

    Raises:
        ExperimentError: naming the place and the nearest known name.
    """
    if reference.endswith(_SUFFIXES):
        path = (near.resolve().parent / reference).resolve()
        if path.is_file():
            return path
        raise ExperimentError(f"{place}: no file {path}; give a path relative to {near}, or a name")
    roots = [root for root in (workspace(near), shipped()) if root is not None]
    for root in roots:
        for suffix in _SUFFIXES:
            path = root / kind / f"{reference}{suffix}"
            if path.is_file():
                return path
    known = sorted({name for root in roots for name, _ in names(kind, root)})
    raise ExperimentError(f"{place}: no {kind} entry {reference!r}; {nearest(reference, known)}")


def names(kind: str, root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Yield name and file of everything of a kind in a workspace (default: what ships), sorted."""
    folder = (root or shipped()) / kind
    for path in sorted(folder.rglob("*")):
        # Hidden within the workspace, not above it: evomerge may be installed below a `.venv`.
        inside = path.relative_to(folder)
        if path.suffix in _SUFFIXES and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield inside.with_suffix("").as_posix(), path


def headline(path: Path) -> str:
    """Return the first comment line of a file: by custom, the sentence on what it is for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


def needs(found: Method | Stage) -> str:
    """Return what a method or stage takes beside sources and weights; "nothing else" if that is all."""
    origin = found.steps[0].stage.name if isinstance(found, Method) else found.name
    wanted = [{"base": "a base", "base_if_any": "a base, if its task vectors are meant"}.get(origin, "")]
    wanted.append(f"calibration texts for statistics: {', '.join(found.statistics)}" if found.statistics else "")
    wanted.append("the seed, for random masks" if found.random else "")
    return "; ".join(filter(None, wanted)) or "nothing else"


def values_of(parameter: Parameter) -> str:
    """Return what a parameter may be."""
    if parameter.options:
        return " | ".join(parameter.options)
    if parameter.text:
        return "a pattern of tensor names"
    low, high = parameter.low, parameter.high
    bounds = f"[{low:g}, " if low is not None else "(-inf, "
    bounds += f"{high:g}]" if high is not None else "inf)"
    number = "any number" if low is None and high is None else "whole, in " * parameter.whole + bounds
    return ("0 or 1" if parameter.whole and (low, high) == (0, 1) else number) + ", per source" * parameter.per_source


def render_table(kind: str) -> RenderableType:
    """Return the list of all methods, or of all stages by their kind, each with all that its table says."""
    if kind == "methods":
        entries: list[RenderableType] = [_entry(name, found) for name, found in METHODS.items()]
    else:
        entries = []
        for stage_kind in STAGE_KINDS:
            entries += [_entry(name, found) for name, found in STAGES.items() if found.kind == stage_kind]
    return Group(Text(SYMBOLS), Text(), *entries)


def render(name: str) -> RenderableType:
    """Return all about one method, one stage (`stages/NAME`), or a line of stages.

    Raises:
        RecipeError: if there is none, with the nearest known name; if the line is wrong.
        ExperimentError: if there is no such stage.
    """
    kind, _, rest = name.partition("/")
    if kind == "stages":
        if rest not in STAGES:
            raise ExperimentError(f"show {name}: no stage {rest!r}; {nearest(rest, STAGES)}")
        return Group(_entry(rest, STAGES[rest]), Text(SYMBOLS))
    found = method(name.removeprefix("methods/"), f"show {name}")
    head = {"method": found.name} if found.name != found.line else {}
    facts = {**head, "line": found.line, "needs": needs(found), "reference": found.reference}
    pages: list[RenderableType] = [_facts(facts, indent=0), _stages_of(found)]
    pages += [_parameters_of(found)] if found.parameters else []
    return Group(*(part for page in pages for part in (page, Text())), Text(SYMBOLS))


def _entry(name: str, found: Method | Stage) -> RenderableType:
    """Return one entry of a list."""
    listed = "; ".join(f"{own} = {_said(p.default)} ({values_of(p)})" for own, p in found.parameters.items())
    if isinstance(found, Method):
        formulas = "\n".join(step.stage.formula for step in found.steps)
        facts = {"line": found.line, "formula": formulas}
    else:
        kind = f"{found.kind}: {_DUTIES[found.kind]}"
        facts = {"kind": kind, "formula": found.formula, "drops out": _idle(found)}
    facts |= {"parameters": listed, "needs": needs(found), "reference": found.reference}
    return Group(Text(name, style="bold"), _facts(facts), Text())


def _stages_of(found: Method) -> Table:
    table = Table("stage", "kind", "formula", box=None, padding=(0, 2, 0, 0))
    for step in found.steps:
        stage = step.stage
        notes = [stage.formula, stage.reference, f"drops out {_idle(stage)}" if _idle(stage) else ""]
        table.add_row(Text(stage.name, style="bold"), Text(stage.kind), Text("\n".join(filter(None, notes))))
    return table


def _parameters_of(found: Method) -> Table:
    table = Table("parameter", "default", "values", box=None, padding=(0, 2, 0, 0))
    for name, parameter in found.parameters.items():
        table.add_row(Text(name, style="bold"), Text(_said(parameter.default)), Text(values_of(parameter)))
    return table


def _idle(stage: Stage) -> str:
    """Return when a stage does nothing, so that it drops out of its line."""
    at = ", ".join(f"{name} = {_said(given)}" for name, given in (stage.neutral or {}).items())
    return " or ".join(filter(None, [at and f"at {at}", "with one source" if stage.alone else ""]))


def _said(given: Given) -> str:
    """Return a default as one would write it."""
    return f"{given:g}" if isinstance(given, float) else str(given)


def _facts(facts: Mapping[str, str], indent: int = 2) -> RenderableType:
    """Return labels and texts in two columns, without those that are empty."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=10)
    for label, text in facts.items():
        if text:
            grid.add_row(Text(label), Text(text))
    return Padding(grid, (0, 0, 0, indent))

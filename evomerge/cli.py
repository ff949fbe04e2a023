"""The command line: parses, calls, prints; whatever is slow to import is imported by the command that needs it."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.live import Live
from rich.progress import Progress as Merging
from rich.table import Table
from rich.text import Text

from evomerge import __version__, library
from evomerge.errors import EvomergeError, ExperimentError, InvalidInput, LedgerError, nearest
from evomerge.whole import write_whole

if TYPE_CHECKING:
    from evomerge.experiment import Experiment, Stages
    from evomerge.experiment.entries import RayEntry
    from evomerge.ledger import Event
    from evomerge.oneoff import OneOff
    from evomerge.pool import Pool
    from evomerge.report import Progress
    from evomerge.run import Run
    from evomerge.search import Watching

app = typer.Typer(
    help="Search for the best single models that can be merged from several fine-tuned ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank = typer.Typer(help="Item banks: what other models answered, as a prior.", no_args_is_help=True)
app.add_typer(bank, name="bank")
zoo = typer.Typer(help="The tiny models and tasks of the quickstart.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: What a run in stages has in its folder; see `evomerge.experiment.staging`.
STAGES = "stages.yaml"

#: What is noted of a run's workers in its folder; see `evomerge.search.watching`.
WORKERS = "workers.json"

#: Seconds between two lines of progress where there is no terminal to redraw.
_EVERY = 10.0

ExperimentArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of one that `evomerge ls` shows.")]
RunArgument = Annotated[Path, typer.Argument(help="The folder of a run, like runs/quickstart.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where the folders of runs lie.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="evomerge")


def _safely(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error as one line; exit with 2 for bad input, 1 for the rest, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EvomergeError as problem:
            err.print(Text(f"error: {problem}"), soft_wrap=True)
            raise typer.Exit(2 if isinstance(problem, InvalidInput) else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(f"evomerge {__version__}")
        raise typer.Exit


@app.command()
@_safely
def run(experiment: ExperimentArgument, runs: RunsOption = Path("runs")) -> None:
    """Run an experiment, or go on with it where it stopped."""
    from evomerge.experiment import load, read_stages

    path = _file(experiment)
    stages = read_stages(path)
    if stages is not None:
        _conduct_stages(stages, runs / stages.name)
        return
    loaded = load(path)
    _conduct(loaded, runs / loaded.file.name)


@app.command()
@_safely
def resume(folder: RunArgument) -> None:
    """Go on with a run where it stopped."""
    if (folder / STAGES).is_file():
        from evomerge.experiment import read_stages

        stages = read_stages(folder / STAGES)
        if stages is not None:
            _conduct_stages(stages, folder)
            return
    _conduct(_experiment_of(folder), folder)


@app.command()
@_safely
def status(folder: RunArgument) -> None:
    """Say how far a run is."""
    from evomerge.pool import read_crew
    from evomerge.report import render_status
    from evomerge.run import open_run

    for each in _runs_in(folder):
        out.print(render_status(open_run(each), read_crew(each / WORKERS)))


@app.command()
@_safely
def report(folder: RunArgument) -> None:
    """Show the front of a run beside sources and baselines, and what it cost."""
    from evomerge.report import render_report
    from evomerge.run import open_run

    for each in _runs_in(folder):
        out.print(render_report(open_run(each)))


@app.command()
@_safely
def export(
    folder: RunArgument,
    front: Annotated[str, typer.Option(help="all, knee, extremes, or candidate numbers (3,17).")] = "all",
    to: Annotated[Path | None, typer.Option(help="Where to write; default: the run's pareto folder.")] = None,
) -> None:
    """Write models of the front as plain folders in the sources' own architecture, as transformers loads them."""
    from evomerge.run import open_run

    open_run(folder).select(front)  # refuses what is wrong before anything slow is imported
    _export(_experiment_of(folder), folder, front, to or folder / "pareto")


@app.command()
@_safely
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe.yaml, or a YAML file of mergekit's.")],
    to: Annotated[Path, typer.Option(help="The folder to make.")],
    device: Annotated[str, typer.Option(help="Where to merge: cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of the arithmetic; 0: as many as there are cores.")] = 0,
    dtype: Annotated[str, typer.Option(help="In place of the recipe's: float32, bfloat16 or float16.")] = "",
) -> None:
    """Merge once, without a search: a recipe, ours or mergekit's, becomes a model folder."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads else ():
        os.environ[name] = str(threads)  # libraries read them when they are first imported
    from evomerge.oneoff import OneOff

    start = time.monotonic()
    job = OneOff(recipe, dtype)
    out.print(_merge_plan(job))
    with Merging(*Merging.get_default_columns(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("merging", total=job.entries)
        job.write(to, device, lambda entries: bar.advance(task, entries))
    out.print(f"{to}: written in {_duration(time.monotonic() - start)}", soft_wrap=True)


@app.command()
@_safely
def check(experiment: ExperimentArgument) -> None:
    """Check an experiment file, or a recipe, and all that it refers to; nothing is built."""
    path = _file(experiment)
    if _is_recipe(path):
        _check_recipe(path)
    else:
        from evomerge.experiment import load, read_stages
        from evomerge.search import needs_of

        stages = read_stages(path)
        for k in range(len(stages.names) if stages else 1):
            loaded = stages.check(k) if stages else load(path)
            needs = needs_of(loaded, Path("runs"))
            out.print(_plan(loaded, needs.rows))
            needs.check()
    out.print(f"{path}: good", soft_wrap=True)


@app.command(name="ls")
@_safely
def list_library(
    kind: Annotated[str, typer.Argument(help="methods or stages: with formulas, parameters and references.")] = "",
) -> None:
    """List the search spaces, tasks and experiments that can be named; or all methods, or all stages."""
    if kind in library.TABLES:
        _page().print(library.render_table(kind))
        return
    if kind and kind not in library.KINDS:
        raise ExperimentError(f"ls {kind}: no such kind; {nearest(kind, [*library.KINDS, *library.TABLES])}")
    table = Table("kind", "name", "what it is", box=None, padding=(0, 2, 0, 0))
    roots = [library.shipped()]
    if (here := Path.cwd()) != roots[0] and any((here / kind).is_dir() for kind in library.KINDS):
        roots.insert(0, here)
    for each in [kind] if kind else library.KINDS:
        # Of two with one name the workspace's own counts, as it does for `find`.
        found = {name: path for root in reversed(roots) for name, path in library.names(each, root)}
        for name, path in sorted(found.items()):
            table.add_row(each, name, library.headline(path))
    out.print(table)
    if not kind:
        counts = " and ".join(f"{len(table)} {name}" for name, table in library.TABLES.items())
        out.print(f"and {counts}: see `evomerge ls methods`, `evomerge ls stages`")


@app.command()
@_safely
def show(
    name: Annotated[str, typer.Argument(help="kind/name, like search_spaces/task_vectors; a method; a line.")],
) -> None:
    """Print a search space, task or experiment that can be named; or all about a method, a stage or a line."""
    kind, _, rest = name.partition("/")
    if kind in library.TABLES or name in library.TABLES["methods"] or "|" in name:
        _page().print(library.render(name))
        return
    if kind not in library.KINDS:
        found = [(k, path) for k in library.KINDS for known, path in library.names(k) if known == name]
        if len(found) != 1:
            kinds = ", ".join(f"{k}/{name}" for k, _ in found) or ", ".join(
                f"{k}/…" for k in (*library.KINDS, *library.TABLES)
            )
            raise ExperimentError(f"show {name}: give one of {kinds}; see `evomerge ls`")
        path = found[0][1]
    else:
        path = library.find(kind, rest, Path.cwd() / "experiments" / "_", f"show {name}")
    sys.stdout.write(path.read_text(encoding="utf-8"))


@app.command()
@_safely
def schema() -> None:
    """Print the JSON schema of experiment files."""
    from evomerge.experiment import schema as make

    sys.stdout.write(json.dumps(make(), indent=2) + "\n")


@bank.command(name="fit")
@_safely
def fit_responses(
    responses: Annotated[
        list[Path],
        typer.Argument(help=".csv, .parquet, .npz, folders of lm-eval's samples_*.jsonl, or folders of runs."),
    ],
    to: Annotated[Path, typer.Option(help="The bank's name: NAME.safetensors and NAME.json are written.")],
    metric: Annotated[str, typer.Option(help="Of lm-eval's samples: METRIC or METRIC,FILTER; else the first.")] = "",
    source: Annotated[str, typer.Option(help="Where the responses come from; default: what their files say.")] = "",
    licence: Annotated[str, typer.Option(help="Under which the bank may be passed on.")] = "",
) -> None:
    """Make an item bank of what models answered, for searches on the same items."""
    from evomerge.banking import make_bank

    made = make_bank(responses, to, metric=metric, source=source, licence=licence)
    for warning in made.warnings:
        err.print(Text(f"warning: {warning}"), soft_wrap=True)
    out.print(_rows(made.rows))


@bank.command(name="show")
@_safely
def show_bank(path: Annotated[Path, typer.Argument(help="A bank: NAME, NAME.json or NAME.safetensors.")]) -> None:
    """Say what is in an item bank; it is read in full, so a broken one is refused."""
    from evomerge.bankfile import read_bank
    from evomerge.banking import shown

    out.print(_rows(shown(read_bank(path))))


@zoo.command()
@_safely
def build(
    directory: Annotated[Path, typer.Argument(help="A new folder for models and tasks.")],
    seed: Annotated[int, typer.Option(help="The seed of data and training.")] = 0,
) -> None:
    """Train the tiny models of the quickstart and write their tasks."""
    from evomerge.zoo import build as make

    make(directory, seed, out.print)


def _page() -> Console:
    """Return a console of the width of a page: a terminal's, up to 100 columns; 100 elsewhere."""
    return Console(highlight=False, width=min(out.width, 100) if out.is_terminal else 100)


def _file(reference: str) -> Path:
    """Return the experiment file of a path or a name."""
    if reference.endswith((".yaml", ".yml")) or Path(reference).is_file():
        return Path(reference)
    return library.find("experiments", reference, Path.cwd() / "experiments" / "_", f"experiment {reference}")


def _is_recipe(path: Path) -> bool:
    """Tell a recipe from an experiment; what cannot be read is taken for an experiment, which says why."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return False
    return isinstance(data, dict) and ("routes" in data or "merge_method" in data)


def _check_recipe(path: Path) -> None:
    """Check a recipe against the headers of its models.

    Raises:
        InvalidInput: one line with the file and what does not fit.
    """
    from evomerge.oneoff import OneOff

    job = OneOff(path)
    layers = len(job.recipe.layers) or job.sources.depth
    out.print(f"{layers} layers, {job.recipe.dtype}, of {', '.join(job.folders)}; digest {job.recipe.digest}")


def _merge_plan(job: "OneOff") -> Table:
    """Return the table of what a merge is about to do."""
    recipe = job.recipe
    names = ", ".join(source.name for source in recipe.sources)
    taken = {name: count for name, count in getattr(job.sources, "taken", {}).items() if count}
    rows = {
        "models": names + (f" over {recipe.base.name}" if recipe.base else ""),
        "methods": ", ".join(dict.fromkeys(blend.method for blend in recipe.blends())),
        "model": f"{len(job.steps)} tensors, {job.entries:,} parameters, {recipe.dtype}, {_size(job.bytes)}",
        "memory": f"at most {_size(job.peak)} beside the program",
        "passes": "1 over the models" + f", and before it up to {2 * job.passes} for thresholds" * bool(job.passes),
        "digest": recipe.digest,
    }
    if taken:
        rows["tokens"] = "taken from others: " + ", ".join(f"{count:,} by {name}" for name, count in taken.items())
    return _rows(rows)


def _rows(rows: Mapping[str, str]) -> Table:
    """Return a table of two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def _size(count: int) -> str:
    """Return a number of bytes in the unit that people would use."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{count / 10**6:.1f} MB"


def _experiment_of(folder: Path) -> "Experiment":
    from evomerge.run import open_run

    open_run(folder)
    from evomerge.experiment import load

    return load(folder / "experiment.yaml")


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder of a run, or the folders of its stages that have begun, each announced."""
    if not (folder / STAGES).is_file():
        return [folder]
    names = [each["name"] for each in yaml.safe_load((folder / STAGES).read_text(encoding="utf-8"))["stages"]]
    found = [folder / name for name in names if (folder / name / "ledger.jsonl").is_file()]
    out.print(f"{folder}: {len(found)} of {len(names)} stages have begun: {', '.join(path.name for path in found)}")
    return found


def _conduct_stages(stages: "Stages", folder: Path) -> None:
    """Run or go on with stages, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(stages.data), sort_keys=False)
    write_whole(folder / STAGES, text, "give the same command again", LedgerError)
    for k, name in enumerate(stages.names):
        out.print(Text(f"stage {k + 1} of {len(stages.names)}: {name}", style="bold"))
        try:
            _conduct(stages.load(k, folder), folder / name)
        except KeyboardInterrupt:
            out.print(f"the stages go on with: evomerge resume {folder}")
            raise


def _conduct(experiment: "Experiment", folder: Path) -> None:
    """Run or go on with an experiment in a folder, export its front, and report."""
    from evomerge.pool import memories
    from evomerge.report import Progress, render_report
    from evomerge.run import Run, open_run
    from evomerge.search import Search, Watching, needs_of, open_pool, planned_items, prepare

    record = prepare(experiment, folder)
    with record:
        before = Run(record.past)
        if before.finished is not None:
            out.print(_plan(experiment, {}))
        else:
            needs = needs_of(experiment, folder)
            out.print(_plan(experiment, needs.rows))
            needs.check()
            progress = Progress(planned_items(experiment), experiment.file.budget.candidates)
            if before.asked:
                out.print(f"going on with {folder}: {len(before.told)} candidates are scored already")
            try:
                with (
                    open_pool(experiment) as pool,
                    Watching(pool, folder / WORKERS) as watching,
                    _Display(progress, watching) as display,
                ):
                    if needs.actors is not None:
                        needs.check_cluster(memories())
                    _estimate(experiment, pool, before)
                    display.begin()
                    Search(experiment, record, pool, display.add).run()
            except KeyboardInterrupt:
                out.print(f"stopped; nothing finished is lost. Go on with: evomerge resume {folder}")
                raise
    models = folder / "pareto"
    if not (models / "index.json").is_file():
        _export(experiment, folder, experiment.file.export.front, models)
    out.print(render_report(open_run(folder)))
    if models.is_dir():
        out.print(f"models: {models}", soft_wrap=True)


class _Display:
    """Shows progress: redrawn in place on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: "Progress", watching: "Watching") -> None:
        self._progress = progress
        self._watching = watching
        progress.crew = watching.crew
        live = Live(console=out, refresh_per_second=4, get_renderable=progress.render)
        self._live = live if out.is_terminal else None
        self._last = 0.0

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def begin(self) -> None:
        """Start drawing."""
        self._progress.start()
        self._last = time.monotonic()
        if self._live is not None:
            self._live.start()

    def add(self, event: "Event", replayed: bool) -> None:
        """Take in an event and show it if it is time."""
        self._progress.add(event, replayed)
        self._watching.add(event, replayed)
        if self._live is None and not replayed and time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            out.print(Text(self._progress.line()), soft_wrap=True)


def _estimate(experiment: "Experiment", pool: "Pool", before: "Run") -> None:
    """Time a few answers and say how long the rest will take."""
    from evomerge.search import measure_pace

    workers = max(1, len(pool.workers))
    with out.status("starting the workers …"):
        pace = measure_pace(experiment, pool, workers)
    workers = max(1, sum(worker.state in ("starting", "idle", "busy") for worker in pool.workers))
    left = pace.seconds(experiment, before.items) / workers
    out.print(
        f"estimate: at most {_duration(left)} with {workers} worker{'s' if workers > 1 else ''} "
        f"({1000 * pace.candidate:.1f} ms a candidate and {1000 * pace.item:.2f} ms an item, measured just now)",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _export(experiment: "Experiment", folder: Path, which: str, to: Path) -> None:
    from evomerge.export import export_models
    from evomerge.ledger import read
    from evomerge.run import Run

    events = read(folder / "ledger.jsonl")
    run = Run(events)
    numbers = run.select(which)
    if not numbers:
        out.print("no model to export: " + ("none was wanted" if which == "none" else "no merge is in the front"))
        return
    export_models(experiment, run, events, numbers, to, lambda text: out.print(f"exported {text}", soft_wrap=True))


def _plan(experiment: "Experiment", needs: Mapping[str, str]) -> Table:
    """Return the table of what a run of this experiment is about to do, and of what it needs for that."""
    from evomerge.drivers import plain_driver
    from evomerge.search import planned_items

    file, space = experiment.file, experiment.space
    base = f" over {Path(space.base.path).name or space.base.name}" if space.base else ""
    items = ", ".join(f"{name} {task.count('search')}" for name, task in experiment.tasks.items())
    workers = file.workers
    plan = planned_items(experiment)
    rows = {
        "experiment": f"{file.name}, seed {file.seed}",
        "models": f"{', '.join(source.name for source in space.sources)}{base}; {space.depth} layers, {file.dtype}",
        "space": f"{len(space.axes)} genes; {space.headline}",
        "objectives": ", ".join(f"{o.direction} {o.name}" for o in experiment.objectives),
        "items": f"search split: {items}",
        "scoring": f"{experiment.schedule.headline}; estimator {file.estimator['name']}",
        "driver": f"{plain_driver(experiment.driver)['name']}, {file.budget.candidates} candidates",
        "workers": f"{_where(file.ray)}, {workers.threads} thread{'s' if workers.threads > 1 else ''} each, "
        f"{workers.device}",
        **needs,
        "bank": "" if experiment.bank is None else experiment.bank.headline,
        "items to ask": f"at most {sum(plan.values()):,} ({', '.join(f'{k} {v:,}' for k, v in plan.items())})",
    }
    return _rows({heading: text for heading, text in rows.items() if text})


def _where(ray: "RayEntry | None") -> str:
    """Return how many workers there are, and where."""
    if ray is None:
        return "inline"
    many = "Ray, as many as fit the GPUs" if ray.actors == "per_gpu" else f"{ray.actors} Ray"
    share = f", {ray.gpus_per_worker:g} GPU each" if ray.gpus_per_worker else ""
    return many + share + ("" if ray.address == "local" else f", at {ray.address}")

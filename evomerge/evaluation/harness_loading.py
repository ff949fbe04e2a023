"""Tasks of lm-eval as they are loaded by name: where they come from, and what they are known by."""

import contextlib
import hashlib
import inspect
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, nearest
from evomerge.value import Plain, digest, encoded, value

#: Parts of a task's configuration that the requests and documents show, or that name places of one machine.
SHOWN = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "custom_dataset",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "metadata",
    "task_alias",
    "tag",
    "should_decontaminate",
    "doc_to_decontamination_query",
)


@value
class Source:
    """Which task of lm-eval, and how it asks: what a worker needs to load it again.

    Attributes:
        task: the name of a task, a group or a tag.
        include_path: a folder of YAML files that is searched first.
        catalogue: whether lm-eval's own tasks are searched too, which takes it ten seconds and more.
        num_fewshot: the examples in a prompt; None: what the task says.
        gen_kwargs: arguments of generation that replace the task's own.
        system_instruction: a text that goes before all.
        tokenizer: the folder of the tokenizer whose chat template the prompts are set in; None: plain text.
        unsafe: whether a task may run code that the model wrote.
    """

    task: str
    include_path: str | None = None
    catalogue: bool = True
    num_fewshot: int | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_instruction: str | None = None
    tokenizer: str | None = None
    unsafe: bool = False


@dataclass(frozen=True)
class Loaded:
    """Live tasks of lm-eval; for one thread only, they change while they work.

    Attributes:
        source: how to load them again.
        tasks: the tasks by name; for a group all its leaves, in lm-eval's order.
        group: the group, if the name is one.
        config: the content address of what grades: settings, the files of their functions, lm-eval's version.
    """

    source: Source
    tasks: Mapping[str, Any]
    group: Any
    config: str
    _parts: dict[tuple[str, str], Sequence[Any]] = field(default_factory=dict)

    def part(self, leaf: str, part: str) -> Sequence[Any]:
        """Return the documents of a leaf; `part` is one of its own splits, or "" for what lm-eval evaluates.

        Raises:
            TaskError: if the leaf has no such split.
        """
        if (leaf, part) not in self._parts:
            self._parts[leaf, part] = _part(leaf, self.tasks[leaf], part)
        return self._parts[leaf, part]

    def document(self, leaf: str, part: str, place: int, address: str) -> Any:
        """Return the fields of a document.

        Raises:
            TaskError: if their content address is no longer the one that was known when its requests were made.
        """
        docs = self.part(leaf, part)
        found = docs[place] if place < len(docs) else None
        if found is None or content(found) != address:
            raise TaskError(
                f"task {leaf!r} of lm-eval: document {place} is not what it was when the prompts were made; put its "
                "data back, or start a new run"
            )
        return found


def load(source: Source, place: str) -> Loaded:
    """Load a task, a group or a tag; a folder of the user's own is tried first, and without the catalogue.

    Raises:
        TaskError: if lm-eval knows no such name or cannot load it, or if the task asks for what cannot be answered.
    """
    with quiet():
        manager, source = _manager(source, place)
        try:
            found = manager.load([source.task])
        except Exception as problem:  # lm-eval and datasets raise from many trees; all mean that it cannot be had
            raise TaskError(f"{place}: lm-eval cannot load {source.task!r} ({reason(problem)})") from None
    tasks = found["tasks"]
    if not tasks:
        raise TaskError(f"{place}: {source.task!r} of lm-eval has no tasks")
    for name, task in tasks.items():
        _settle(name, task, source, place)
    config = digest({"lm_eval": _version(), "tasks": {name: _settings(task) for name, task in tasks.items()}})
    loaded = Loaded(source, tasks, found.get("groups", {}).get(source.task), config)
    _kept()[digest(source), config] = loaded
    return loaded


def live(source: Source, config: str) -> Loaded:
    """Return the tasks of a source as this thread holds them, loaded when first wanted.

    Raises:
        TaskError: if they cannot be loaded, or are not those of the content address `config`.
    """
    kept, key = _kept(), (digest(source), config)
    if key not in kept and load(source, "lm-eval").config != config:
        raise TaskError(
            f"task {source.task!r} of lm-eval: its settings, its code or lm-eval's version ({_version()}) are not "
            "those that the prompts were made with; use the same everywhere, or start a new run"
        )
    return kept[key]


def reason(problem: BaseException) -> str:
    """Return an error of another library in one short line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the progress bars, log lines and warnings of lm-eval and of what it loads."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def evaluating(task: Any, part: str) -> Iterator[None]:
    """Let lm-eval evaluate this split of a task instead of the one that it would; "" changes nothing."""
    before = task.get_config("test_split")
    try:
        if part:
            task.set_config("test_split", part)
        yield
    finally:
        task.set_config("test_split", before)


def content(doc: Any) -> str:
    """Return the content address of a document's fields."""
    text = json.dumps(doc, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(encoded(text)).hexdigest()[:16]


_HELD = threading.local()


def _kept() -> dict[tuple[str, str], Loaded]:
    """Return this thread's live tasks."""
    kept: dict[tuple[str, str], Loaded] = _HELD.__dict__.setdefault("tasks", {})
    return kept


def _version() -> str:
    import lm_eval

    return str(lm_eval.__version__)


def _manager(source: Source, place: str) -> tuple[Any, Source]:
    """Return lm-eval's index of tasks that holds the name, and the source that says which one it was."""
    from lm_eval.tasks import TaskManager

    if source.include_path is not None:
        manager = TaskManager(include_path=source.include_path, include_defaults=False)
        if source.task in manager.task_index and _complete(manager, source.task):
            return manager, replace(source, catalogue=False)
    if not source.catalogue:
        raise TaskError(f"{place}: no task {source.task!r} of lm-eval in {source.include_path}")
    manager = TaskManager(include_path=source.include_path)
    if source.task not in manager.task_index:
        raise TaskError(f"{place}.lm_eval: unknown task {source.task!r}; {_near(source.task, manager.all_tasks)}")
    return manager, source


def _near(name: str, known: Sequence[str]) -> str:
    """Return the nearest names; the whole catalogue would be no help."""
    found = nearest(name, known)
    return found if found.startswith("did you mean") else "`lm-eval ls tasks` lists the known ones"


def _complete(manager: Any, name: str) -> bool:
    """Return whether all that a group names by name alone lies in the index; else it is in the catalogue."""
    members = (manager.task_index[name].cfg or {}).get("task")
    if name not in manager.all_groups or not isinstance(members, list):
        return True
    named = [member for member in members if isinstance(member, str)]
    return all(member in manager.task_index and _complete(manager, member) for member in named)


def _settle(name: str, task: Any, source: Source, place: str) -> None:
    """Set a task's few-shot examples and arguments as `simple_evaluate` does, and refuse what cannot be answered."""
    where = f"{place}: task {name!r} of lm-eval"
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"{where}: asks about images or sound, which a language model cannot read; choose another")
    if getattr(task, "UNSAFE_CODE", False) and not source.unsafe:
        raise TaskError(f"{where}: runs code that the model wrote; allow it with confirm_run_unsafe_code: true")
    shots = task.get_config("num_fewshot")
    if source.num_fewshot and shots == 0:
        raise TaskError(f"{where}: sets num_fewshot: 0, which lm-eval never changes; leave num_fewshot out")
    task.set_config("num_fewshot", (shots or 0) if source.num_fewshot is None else source.num_fewshot)
    if source.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", dict(source.gen_kwargs), update=True)


def _part(leaf: str, task: Any, part: str) -> Sequence[Any]:
    if part:
        _check_part(leaf, task, part)
    with quiet(), evaluating(task, part):
        docs = task.eval_docs
    return docs if hasattr(docs, "__getitem__") else list(docs)


def _check_part(leaf: str, task: Any, part: str) -> None:
    from lm_eval.api.task import ConfigurableTask

    named = (
        getattr(type(task), name, None) is getattr(ConfigurableTask, name) for name in ("has_test_docs", "test_docs")
    )
    if not all(named):
        raise TaskError(f"task {leaf!r} of lm-eval: chooses its documents by code; give splits as shares")
    known = list(task.dataset)
    if part not in known:
        raise TaskError(f"task {leaf!r} of lm-eval: no split {part!r}; {nearest(part, known)}")


def _settings(task: Any) -> Plain:
    """Return a task's configuration as plain data; functions by name and the content of their file."""
    config = {key: found for key, found in vars(task.config).items() if key not in SHOWN}
    return {"class": _code(type(task)), "config": _plain(config)}


def _plain(thing: Any) -> Plain:
    if thing is None or isinstance(thing, str | bool | int):
        return thing
    if isinstance(thing, float):
        return repr(thing)
    if isinstance(thing, Mapping):
        return {str(key): _plain(found) for key, found in thing.items()}
    if isinstance(thing, list | tuple):
        return [_plain(found) for found in thing]
    if is_dataclass(thing) and not isinstance(thing, type):
        return _plain(vars(thing))
    return _code(thing)


def _code(thing: Any) -> Plain:
    """Return what identifies a function or class: its name and the content of the file that it stands in."""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    try:
        file = inspect.getsourcefile(inspect.unwrap(thing))
    except TypeError:
        file = None
    text = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    return {"name": name, "file": hashlib.sha256(text).hexdigest()[:16]}

"""Answers jobs from a store of responses where it has them, so that nothing is evaluated twice, across runs too."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evomerge import __version__
from evomerge.evaluation.gates import PROMPTS
from evomerge.evaluation.task import SPLITS
from evomerge.experiment import Experiment
from evomerge.models.checkpoint import TOKENIZER_FILES
from evomerge.pool import Answer, Job, Pool, WorkerStatus
from evomerge.pool.contract import Closing
from evomerge.store import Numbers, Store
from evomerge.value import digest, plain, value

#: Libraries whose version may change what a model says, or what that is worth.
_LIBRARIES = ("torch", "transformers", "tokenizers", "py3langid")

#: Files of a model folder that decide how texts are fed, beside its tokenizer.
_CONFIGS = ("config.json", "generation_config.json")

#: Bytes of a key.
_KEY = 16


@value
class Addresses:
    """The content addresses of the answers of a run: what a response depends on, but for the recipe.

    Attributes:
        tasks: all that the responses to a task's items have in common: precision, device, batches, libraries, what
            reads texts, and the model that candidates are compared with.
        items: the content of each item, by task and split.
        gates: what gates ask, and of what; empty where there are none.
    """

    tasks: Mapping[str, str]
    items: Mapping[str, Mapping[str, tuple[str, ...]]]
    gates: str

    def of(self, job: Job) -> "Keys":
        """Return the keys of what a job asks."""
        recipe = job.recipe.digest
        found: dict[str, dict[int, bytes]] = {}
        for task, places in job.items.items():
            own = self.items[task][job.split]
            found[task] = {place: _key("response", recipe, self.tasks[task], own[place]) for place in places}
        return Keys(items=found, gates=_key("gates", recipe, self.gates) if self.gates else None)


@value
class Keys:
    """The keys of a job: of each item, by task and place, and of having passed the gates, if there are any."""

    items: Mapping[str, Mapping[int, bytes]]
    gates: bytes | None

    @property
    def all(self) -> list[bytes]:
        """All of them."""
        found = [key for own in self.items.values() for key in own.values()]
        return found if self.gates is None else [*found, self.gates]


def addresses_of(experiment: Experiment) -> Addresses:
    """Return the content addresses of an experiment's answers.

    The number and place of workers is not in them, and neither are sizes of splits and other tasks. The last bits of
    an answer may also depend on the processor and on what else was asked at the same time; these count as the same.
    """
    settings = experiment.file.workers
    shared = {
        "versions": {"evomerge": __version__} | {name: _version(name) for name in _LIBRARIES},
        "arithmetic": [experiment.file.dtype, settings.device.partition(":")[0], settings.threads],
        "batches": [settings.batch, settings.tokens, experiment.stacked],
        "template": [_file_digest(experiment.template / name) for name in (*_CONFIGS, *TOKENIZER_FILES)],
        "trust_remote_code": experiment.file.trust_remote_code,
    }
    models = {model.name: model.recipe.digest if model.recipe else model.fingerprint for model in experiment.baselines}
    items = {
        name: {split: task.contents(split) for split in SPLITS if task.count(split)}
        for name, task in experiment.tasks.items()
    }
    gates = experiment.gates
    first = {name: own["search"][:PROMPTS] for name, own in items.items() if "search" in own}
    return Addresses(
        tasks={
            name: digest([shared, models[task.reference] if task.reference else ""])
            for name, task in experiment.tasks.items()
        },
        items=items,
        gates=digest([shared, plain(gates), list(first.values())])
        if gates.finite or gates.repetition or gates.language
        else "",
    )


def behind_store(experiment: Experiment, workers: Callable[[], Pool]) -> Pool:
    """Return a pool, behind the store of an experiment if it names one.

    Args:
        experiment: what is run.
        workers: opens the pool.

    Raises:
        ExperimentError: if the store cannot be opened; no worker is then started.
    """
    if experiment.store is None:
        return workers()
    store = Store(experiment.store)
    try:
        return StoredPool(workers(), store, addresses_of(experiment))
    except BaseException:
        store.close()
        raise


@dataclass(frozen=True)
class _Waiting:
    """A job on its way to a worker: its keys, and what was known of its items."""

    job: Job
    keys: Keys
    known: Mapping[bytes, Numbers]


class StoredPool(Closing):
    """A pool that asks its workers only what a store does not have; keeps the contract of `Pool`.

    A job all of whose answers are known is answered at once, in no time by the clock of answers. Of another one the
    rest is asked; where only the gates are unknown, the candidate is built and asked nothing. What comes back is put
    together in the order of the job, and what is new is stored. Failures are not stored, and neither are the answers to
    a task of which some items have margins and others not, since they do not say which. Jobs with negative numbers, by
    which workers are timed, pass by the store.

    Args:
        pool: who is asked.
        store: what is known; closed with the pool.
        addresses: of the run's answers.
    """

    def __init__(self, pool: Pool, store: Store, addresses: Addresses) -> None:
        self.pool = pool
        self._store = store
        self._addresses = addresses
        self._ready: deque[Answer] = deque()
        self._waiting: dict[tuple[int, str], _Waiting] = {}

    @property
    def room(self) -> int:
        """How many jobs the workers can start at once."""
        return self.pool.room

    @property
    def pending(self) -> int:
        """How many jobs were submitted and not yet answered."""
        return len(self._ready) + self.pool.pending

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """How each worker is doing."""
        return self.pool.workers

    def submit(self, job: Job) -> None:
        """Take a job; ValueError if one of the same candidate and split is on its way."""
        if job.candidate < 0:
            self.pool.submit(job)
            return
        if (job.candidate, job.split) in self._waiting:
            raise ValueError(f"candidate {job.candidate} is being asked items of {job.split} already")
        keys = self._addresses.of(job)
        known = self._store.get(keys.all)
        passed = keys.gates is None or known.pop(keys.gates, None) is not None
        rest = {
            task: left
            for task, own in keys.items.items()
            if (left := tuple(place for place, key in own.items() if key not in known))
        }
        waiting = _Waiting(job=job, keys=keys, known=known)
        if not rest and passed:
            self._ready.append(_answer(waiting, known, 0.0, {}))
            return
        self._waiting[job.candidate, job.split] = waiting
        self.pool.submit(replace(job, items=rest))

    def wait(self) -> Answer:
        """Return the next answer; ValueError if no job is pending."""
        return self._ready.popleft() if self._ready else self._taken(self.pool.wait())

    def drain(self) -> list[Answer]:
        """Return the answers that are there already, without waiting."""
        found = [*self._ready, *map(self._taken, self.pool.drain())]
        self._ready.clear()
        return found

    def close(self) -> None:
        """Stop the workers, forget the jobs, and close the store; may be called twice."""
        self._ready.clear()
        self._waiting.clear()
        try:
            self.pool.close()
        finally:
            self._store.close()

    def _taken(self, answer: Answer) -> Answer:
        """Return a worker's answer as that to the whole job, and store what is new."""
        if answer.candidate < 0:
            return answer
        waiting = self._waiting.pop((answer.candidate, answer.split))
        if answer.error is not None or answer.responses is None:
            return answer
        new: dict[bytes, Numbers] = {}
        kept: dict[bytes, Numbers] = {}
        for task, responses in answer.responses.items():
            margins = answer.margins.get(task, ())
            keys = [key for key in waiting.keys.items[task].values() if key not in waiting.known]
            each = zip(responses, margins, strict=True) if len(margins) == len(responses) else ((x,) for x in responses)
            own: dict[bytes, Numbers] = dict(zip(keys, each, strict=True))
            new |= own
            if len(margins) in (0, len(responses)):
                kept |= {key: numbers for key, numbers in own.items() if all(map(math.isfinite, numbers))}
        if waiting.keys.gates is not None:
            kept[waiting.keys.gates] = ()
        self._store.put(kept)
        if not waiting.known:
            return answer
        return _answer(waiting, {**waiting.known, **new}, answer.seconds, answer.layers)


def _answer(waiting: _Waiting, found: Mapping[bytes, Numbers], seconds: float, layers: Mapping[str, int]) -> Answer:
    """Return the answer to a job out of records."""
    records = {task: [found[key] for key in own.values()] for task, own in waiting.keys.items.items()}
    margins = {task: tuple(numbers[1] for numbers in own if len(numbers) > 1) for task, own in records.items()}
    return Answer(
        candidate=waiting.job.candidate,
        split=waiting.job.split,
        responses={task: tuple(numbers[0] for numbers in own) for task, own in records.items()},
        margins={task: own for task, own in margins.items() if own},
        error=None,
        seconds=seconds,
        layers=dict(layers),
    )


def _key(*parts: str) -> bytes:
    return hashlib.sha256(" ".join(parts).encode()).digest()[:_KEY]


def _version(name: str) -> str:
    """Return the version of a library; empty where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _file_digest(path: Path) -> str:
    """Return the digest of a file's content; empty where it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

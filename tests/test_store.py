"""The store of responses: what it keeps, who may share it, and that a search does not notice it."""

import math
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import ExperimentError
from evomerge.experiment import Experiment, load
from evomerge.ledger import Answered, Event, read, settled
from evomerge.pool import Answer, InlinePool, Job, Pool
from evomerge.run import Run
from evomerge.search import Search, measure_pace, open_pool, prepare
from evomerge.search.storing import StoredPool, addresses_of
from evomerge.store import Store
from evomerge.worker import ModelWorker, WorkerSetup
from tests.toy import SIZES, TASKS, WARMUP, ShufflingPool, ToyWorker, toy

#: Numbers that are easily lost: zeros with a sign, the least and the greatest, fractions.
ODD = (0.0, -0.0, 5e-324, -1.7976931348623157e308, 1 / 3, 0.1, 1.0, -12.5)

SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed": {"name": "fixed", "items": 12},
    "warmup": WARMUP,
    "race": {"name": "race", "first": 4, "alpha": 0.5},
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the ledger's wait for the disk."""
    monkeypatch.setattr("evomerge.ledger.os.fsync", lambda handle: None)


def bits(numbers: Sequence[float]) -> bytes:
    """Return numbers bit for bit: -0.0 is not 0.0."""
    return struct.pack(f"{len(numbers)}d", *numbers)


def key(number: int) -> bytes:
    """Return a key."""
    return number.to_bytes(16, "big")


# The file.


def test_numbers_come_back_bit_for_bit_from_a_file_that_was_closed(tmp_path: Path) -> None:
    """One, two or none in a record; a key without a record is left out."""
    records = {key(i): (number, -number) for i, number in enumerate(ODD)} | {key(90): (), key(91): (0.1,)}
    store = Store(tmp_path / "new" / "folder" / "store.db")
    store.put(records)
    before = store.get([*records, key(99)])
    store.close()

    again = Store(tmp_path / "new" / "folder" / "store.db")
    found = again.get([*records, key(99)])
    again.close()

    assert {k: bits(numbers) for k, numbers in found.items()} == {k: bits(numbers) for k, numbers in records.items()}
    assert before == found


def test_a_record_is_never_changed(tmp_path: Path) -> None:
    """The first one stays, whoever adds the second: the same process, or another that has the file open."""
    one, two = Store(tmp_path / "store.db"), Store(tmp_path / "store.db")
    one.put({key(1): (1.0,)})
    one.put({key(1): (2.0,)})
    one.write()
    two.put({key(1): (3.0,), key(2): (4.0,)})
    two.write()
    one.close()
    two.close()

    store = Store(tmp_path / "store.db")
    assert store.get([key(1), key(2)]) == {key(1): (1.0,), key(2): (4.0,)}
    store.close()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(number: float, tmp_path: Path) -> None:
    """Neither as a response nor as a margin."""
    store = Store(tmp_path / "store.db")
    for numbers in ((number,), (0.5, number)):
        with pytest.raises(ValueError, match="finite"):
            store.put({key(1): numbers})
    assert store.get([key(1)]) == {}
    store.close()


#: Adds records of its own, in many writes, for as long as it lives.
WRITER = """
import sys
from pathlib import Path
from evomerge.store import Store
store, first = Store(Path(sys.argv[1])), int(sys.argv[2])
print("open", flush=True)
for number in range(first, first + int(sys.argv[3])):
    store.put({(1000 * number + k).to_bytes(16, "big"): (float(number), float(k)) for k in range(20)})
    store.write()
    print(number, flush=True)
store.close()
"""


def start_writer(path: Path, first: int, count: int) -> "subprocess.Popen[str]":
    """Start a process that writes."""
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_may_write_at_the_same_time(tmp_path: Path) -> None:
    """None waits for ever, and nothing is lost."""
    writers = [start_writer(tmp_path / "store.db", 100 * i, 40) for i in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()

    store = Store(tmp_path / "store.db")
    wanted = {
        key(1000 * number + k): (float(number), float(k))
        for i in range(3)
        for number in range(100 * i, 100 * i + 40)
        for k in range(20)
    }
    assert store.get(list(wanted)) == wanted
    store.close()


def test_a_killed_writer_loses_nothing_that_was_written_and_leaves_whole_records(tmp_path: Path) -> None:
    """Ten kills at random moments: what was reported as written is there, and each write is there as a whole."""
    rng = random.Random(1)
    done: list[int] = []
    for i in range(10):
        writer = start_writer(tmp_path / "store.db", 10_000 * i, 5_000)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.06))
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split("\n")
        done += [int(line) for line in lines[:-1]]
        writer.stdout.close()
        writer.wait()

    store = Store(tmp_path / "store.db")
    assert done
    for number in [*done, *(number + 1 for number in done)]:
        own = store.get([key(1000 * number + k) for k in range(20)])
        assert own in ({}, {key(1000 * number + k): (float(number), float(k)) for k in range(20)})
        assert number not in done or own
    store.close()


def test_a_file_that_is_no_store_is_refused_in_a_line_with_the_way_out(tmp_path: Path) -> None:
    """A text, a store that lost its first bytes, another program's data base, a folder: none is changed."""
    text, torn, other, folder = (tmp_path / name for name in ("text", "torn", "other", "folder"))
    text.write_text("no store, but long enough to be taken for a page of one. " * 20, encoding="utf-8")
    Store(torn).close()
    torn.write_bytes(b"\0" * 100 + torn.read_bytes()[100:])
    with sqlite3.connect(other) as file:
        file.execute("create table theirs (x)")
    file.close()
    folder.mkdir()
    before = {path: path.read_bytes() for path in (text, torn, other)}

    for path, way in ((text, "delete it"), (torn, "delete it"), (other, "another program's"), (folder, "give another")):
        with pytest.raises(ExperimentError, match=way) as caught:
            Store(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_store_of_another_form_is_refused(tmp_path: Path) -> None:
    """What a later version wrote is not guessed at."""
    Store(tmp_path / "store.db").close()
    with sqlite3.connect(tmp_path / "store.db") as file:
        file.execute("pragma user_version = 9")
    file.close()

    with pytest.raises(ExperimentError, match="form 9"):
        Store(tmp_path / "store.db")


# Around a pool.


def conduct(
    experiment: Experiment, folder: Path, worker: ToyWorker, store: Path | Store | None = None, pool: Pool | None = None
) -> list[Event]:
    """Run an experiment with a store, or without, and return its ledger."""
    inner: Pool = pool or InlinePool(lambda: worker)
    if store is not None:
        opened = store if isinstance(store, Store) else Store(store)
        inner = StoredPool(inner, opened, addresses_of(experiment))
    with prepare(experiment, folder) as record, inner as pool:
        Search(experiment, record, pool).run()
    return list(read(folder / "ledger.jsonl"))


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_search_does_not_notice_a_store_and_a_warm_one_asks_no_worker(
    schedule: str, margins: bool, tmp_path: Path
) -> None:
    """The ledger is the same without, with an empty and with a full one; and with the full one nobody is asked."""
    experiment = toy(schedule=SCHEDULES[schedule])
    plain, cold, warm = (ToyWorker(margins=margins) for _ in range(3))
    store = tmp_path / "store.db"

    wanted = settled(conduct(experiment, tmp_path / "plain", plain))
    assert settled(conduct(experiment, tmp_path / "cold", cold, store)) == wanted
    assert settled(conduct(experiment, tmp_path / "warm", warm, store)) == wanted

    assert [(job.candidate, job.split, job.items) for job in cold.jobs] == [
        (job.candidate, job.split, job.items) for job in plain.jobs
    ]
    assert warm.jobs == []


def test_answers_may_come_in_any_order(tmp_path: Path) -> None:
    """Three workers: each answer is put together for its own job."""
    experiment, store = toy(), tmp_path / "store.db"
    wanted = settled(conduct(experiment, tmp_path / "plain", ToyWorker()))
    half = replace(experiment, tasks={**experiment.tasks, "left": experiment.tasks["left"].cut({"search": 25})})
    conduct(half, tmp_path / "half", ToyWorker(), store)

    worker = ToyWorker()
    pool: Any = ShufflingPool(worker, 1)
    assert settled(conduct(experiment, tmp_path / "warm", worker, store, pool)) == wanted


def test_a_search_in_steady_state_takes_from_a_store_too(tmp_path: Path) -> None:
    """What is known arrives at once, so that the order differs, but all of it is told; the run replays."""
    experiment, store = toy(driver="random steady", schedule={"name": "fixed"}), tmp_path / "store.db"
    plain = Run(conduct(experiment, tmp_path / "plain", ToyWorker(), store))
    worker = ToyWorker()
    events = conduct(experiment, tmp_path / "warm", worker, store)

    assert worker.jobs == []
    assert {event.recipe for event in Run(events).asked} == {event.recipe for event in plain.asked}
    assert len(Run(events).told) == len(plain.told)
    assert conduct(experiment, tmp_path / "warm", worker, store) == events


def test_a_run_takes_from_a_store_what_a_smaller_one_has_put_there(tmp_path: Path) -> None:
    """The first items of a split are the same items whatever comes after them: only the others are asked."""
    large = toy(schedule={"name": "fixed"})
    small = replace(large, tasks={name: task.cut({"search": 20}) for name, task in large.tasks.items()})
    wanted = settled(conduct(large, tmp_path / "plain", ToyWorker()))
    conduct(small, tmp_path / "small", ToyWorker(), tmp_path / "store.db")

    worker = ToyWorker()
    assert settled(conduct(large, tmp_path / "large", worker, tmp_path / "store.db")) == wanted
    first = next(job for job in worker.jobs if job.candidate == 0)
    assert first.items == {task: tuple(range(20, SIZES["search"])) for task in TASKS}


def test_failures_are_asked_again(tmp_path: Path) -> None:
    """What failed in one run may do in the next, on another machine perhaps."""
    experiment, store = toy(schedule={"name": "fixed"}), tmp_path / "store.db"

    def broken(job: Job) -> str | None:
        return "no memory" if job.candidate % 3 == 1 else None

    events = conduct(experiment, tmp_path / "one", ToyWorker(broken), store)
    failed = {event.recipe for event in Run(events).asked if event.candidate % 3 == 1}
    worker = ToyWorker()
    again = conduct(experiment, tmp_path / "two", worker, store)

    assert {job.recipe.digest for job in worker.jobs if job.candidate < 6} == failed & {
        event.recipe for event in Run(again).asked if event.candidate < 6
    }
    assert all(job.items == experiment.items(job.split) for job in worker.jobs if job.candidate < 6)
    assert not Run(again).errors


class Pieces:
    """A worker that answers as it is told, and remembers its jobs."""

    def __init__(self, answer: Callable[[Job], Answer]) -> None:
        self.jobs: list[Job] = []
        self._answer = answer

    def answer(self, job: Job) -> Answer:
        """Answer as told."""
        self.jobs.append(job)
        return self._answer(job)


def answered(job: Job, **changes: Any) -> Answer:
    """Return an answer of a half to every item."""
    plain = Answer(
        candidate=job.candidate, split=job.split, error=None, seconds=1.0, margins={}, layers={"run": 3},
        responses={task: tuple(0.5 for _ in places) for task, places in job.items.items()},
    )  # fmt: skip
    return replace(plain, **changes)


def a_job(items: dict[str, tuple[int, ...]], candidate: int = 0, experiment: Experiment | None = None) -> Job:
    """Return a job about the source a."""
    recipe = (experiment or toy()).space.constant("linear", {"a": 1.0, "b": 0.0})
    return Job(candidate=candidate, recipe=recipe, split="search", items=items)


def pool_of(worker: Any, path: Path, experiment: Experiment | None = None) -> StoredPool:
    """Return a pool with a store."""
    return StoredPool(InlinePool(lambda: worker), Store(path), addresses_of(experiment or toy()))


def ask(pool: Pool, job: Job) -> Answer:
    """Have one job answered."""
    pool.submit(job)
    return pool.wait()


def test_what_is_not_finite_is_passed_on_and_not_stored(tmp_path: Path) -> None:
    """Whatever a worker says, the store has no NaN, and the item is asked again."""
    worker = Pieces(lambda job: answered(job, responses={"left": (0.25, math.nan)[: len(job.items["left"])]}))
    with pool_of(worker, tmp_path / "store.db") as pool:
        first = ask(pool, a_job({"left": (4, 7)}))
        second = ask(pool, a_job({"left": (4, 7)}))

    assert first.responses is not None
    assert math.isnan(first.responses["left"][1])
    assert worker.jobs[1].items == {"left": (7,)}
    assert second.responses == {"left": (0.25, 0.25)}


def test_an_answer_is_put_together_in_the_order_of_its_job(tmp_path: Path) -> None:
    """Known and new items lie among each other; time and layers are those of the worker."""

    def told(job: Job) -> Answer:
        values = {task: tuple(place / 10 for place in places) for task, places in job.items.items()}
        return answered(job, responses=values, margins={"left": tuple(-place for place in job.items.get("left", ()))})

    worker = Pieces(told)
    with pool_of(worker, tmp_path / "store.db") as pool:
        ask(pool, a_job({"left": (3, 1)}))
        found = ask(pool, a_job({"left": (5, 3, 2, 1), "right": (8,)}))
        again = ask(pool, a_job({"right": (8,), "left": (1, 2, 3)}))

    assert worker.jobs[1].items == {"left": (5, 2), "right": (8,)}
    assert found.responses == {"left": (0.5, 0.3, 0.2, 0.1), "right": (0.8,)}
    assert found.margins == {"left": (-5, -3, -2, -1)}
    assert (found.seconds, found.layers) == (1.0, {"run": 3})
    assert again.responses == {"left": (0.1, 0.2, 0.3), "right": (0.8,)}
    assert again.margins == {"left": (-1, -2, -3)}
    assert (again.seconds, again.layers, len(worker.jobs)) == (0.0, {}, 2)


def test_margins_of_some_items_only_are_passed_on_and_not_stored(tmp_path: Path) -> None:
    """They do not say whose they are, so the task is asked again."""
    worker = Pieces(lambda job: answered(job, margins={"left": (1.5,)}))
    with pool_of(worker, tmp_path / "store.db") as pool:
        found = [ask(pool, a_job({"left": (3, 1)})) for _ in range(2)]

    assert [answer.margins for answer in found] == [{"left": (1.5,)}, {"left": (1.5,)}]
    assert [job.items for job in worker.jobs] == [{"left": (3, 1)}] * 2


def test_other_gates_are_passed_before_a_known_response_counts(tmp_path: Path) -> None:
    """The candidate is built and asked nothing; if it does not pass, that is the answer."""
    strict = toy(gates={"repetition": 48})
    fails = Pieces(lambda job: answered(job, responses=None, error="gate: endless repetition"))
    passes = Pieces(answered)
    with pool_of(Pieces(answered), tmp_path / "store.db") as pool:
        ask(pool, a_job({"left": (3, 1)}))
    with pool_of(fails, tmp_path / "store.db", strict) as pool:
        failed = ask(pool, a_job({"left": (3, 1)}))
    with pool_of(passes, tmp_path / "store.db", strict) as pool:
        found = [ask(pool, a_job({"left": (3, 1)})) for _ in range(2)]

    assert (failed.error, failed.responses) == ("gate: endless repetition", None)
    assert [answer.responses for answer in found] == [{"left": (0.5, 0.5)}] * 2
    assert [job.items for job in (*fails.jobs, *passes.jobs)] == [{}, {}]


def test_jobs_by_which_workers_are_timed_pass_by(tmp_path: Path) -> None:
    """The pace of a run with a full store is still that of its workers."""
    experiment, store = toy(), tmp_path / "store.db"
    conduct(experiment, tmp_path / "run", ToyWorker(), store)
    worker = ToyWorker()

    with pool_of(worker, store) as pool:
        pace = measure_pace(experiment, pool, workers=1)
        measure_pace(experiment, pool, workers=1)

    assert pace.candidate + pace.item > 0
    assert len(worker.jobs) > 2
    assert {job.candidate < 0 for job in worker.jobs} == {True}


def test_the_pools_contract_is_kept(tmp_path: Path) -> None:
    """What is known is pending until it is taken, waits for nobody, and is forgotten when the pool is closed."""
    worker = Pieces(answered)
    pool = pool_of(worker, tmp_path / "store.db")
    ask(pool, a_job({"left": (1,)}))
    assert (pool.room, pool.pending) == (1, 0)

    pool.submit(a_job({"left": (1,)}))
    pool.submit(a_job({"left": (1,)}, candidate=1))
    pool.submit(a_job({"left": (2,)}, candidate=2))
    assert (pool.room, pool.pending) == (0, 3)
    with pytest.raises(ValueError, match="candidate 2"):
        pool.submit(a_job({"left": (1,)}, candidate=2))
    assert [pool.wait().candidate, *(answer.candidate for answer in pool.drain())] == [0, 1]
    assert pool.wait().candidate == 2
    with pytest.raises(ValueError, match="no job"):
        pool.wait()
    pool.submit(a_job({"left": (1,)}))
    pool.close()
    pool.close()
    assert pool.pending == 0


# What goes wrong with the file.


def test_a_full_disk_is_said_once_and_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger is that of a run without a store."""
    monkeypatch.setattr("evomerge.store._BETWEEN", 0.0)
    experiment = toy()
    wanted = settled(conduct(experiment, tmp_path / "plain", ToyWorker()))
    store = Store(tmp_path / "store.db")
    store._file.execute("pragma max_page_count = 3")  # what SQLite then says is what it says of a full disk

    assert settled(conduct(experiment, tmp_path / "full", ToyWorker(), store)) == wanted

    [line] = [line for line in capsys.readouterr().err.splitlines() if "store" in line]
    assert "full" in line
    assert "goes on without" in line


def test_a_store_that_breaks_on_the_way_is_said_once_and_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pages were overwritten while it was open; the ledger is that of a run without a store."""
    experiment = toy()
    wanted = settled(conduct(experiment, tmp_path / "plain", ToyWorker()))
    conduct(experiment, tmp_path / "first", ToyWorker(), tmp_path / "store.db")
    store = Store(tmp_path / "store.db")
    size = (tmp_path / "store.db").stat().st_size
    with (tmp_path / "store.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))

    assert settled(conduct(experiment, tmp_path / "broken", ToyWorker(), store)) == wanted

    [line] = [line for line in capsys.readouterr().err.splitlines() if "store" in line]
    assert "delete it" in line


# What an answer depends on.


def keys_of(experiment: Experiment) -> Mapping[str, Mapping[int, bytes]]:
    """Return the keys of some items of a source."""
    return addresses_of(experiment).of(a_job({"left": (0, 1)}, experiment=experiment)).items


def test_keys_differ_where_answers_may() -> None:
    """Each in what stands for it: precision, device, threads, batches, the item, the recipe, the task's reference."""
    plain = toy()
    settings: list[dict[str, Any]] = [
        {"device": "cuda:1"}, {"threads": 2}, {"batch": 64}, {"tokens": 1024},
    ]  # fmt: skip
    others = [toy(workers=given) for given in settings] + [
        toy(dtype="bfloat16"),
        toy(trust_remote_code=True),
        replace(plain, tasks={**plain.tasks, "left": replace(plain.tasks["left"], name="other")}),  # type: ignore[type-var]  # a toy's tasks are values
        replace(plain, tasks={**plain.tasks, "left": replace(plain.tasks["left"], reference="b")}),  # type: ignore[type-var]
    ]
    recipe = replace(a_job({"left": (0, 1)}).recipe, dtype="float16")
    found = [keys_of(other)["left"] for other in (plain, *others)]
    found.append(addresses_of(plain).of(replace(a_job({"left": (0, 1)}), recipe=recipe)).items["left"])

    assert len({key for own in found for key in own.values()}) == 2 * len(found)
    assert {len(key) for own in found for key in own.values()} == {16}


def test_keys_are_the_same_wherever_and_beside_whatever_items_are_asked() -> None:
    """Names of runs, workers, time limits, sizes of splits, other tasks, other sources: all that changes no answer."""
    plain = toy()
    others = [
        toy(name="other", seed=8, budget={"candidates": 3}, finalists=1),
        toy(workers={"time_limit": 5.0, "prefixes_gb": 0.0}, ray={"actors": 3}),
        toy(driver="random", schedule={"name": "fixed"}),
        toy(gates={"repetition": 48}),
        toy(tasks=("left",)),
        replace(plain, tasks={name: task.cut({"search": 9, "test": 1}) for name, task in plain.tasks.items()}),
    ]
    assert toy(workers={"device": "cuda:0"}) != toy(workers={"device": "cuda:1"})
    assert keys_of(toy(workers={"device": "cuda:0"})) == keys_of(toy(workers={"device": "cuda:1"}))

    assert [keys_of(other) for other in others] == [keys_of(plain)] * len(others)


def test_a_key_says_which_gates_were_passed_with_which_prompts() -> None:
    """Other gates and other first items are other gates; items behind the first four are not asked by them."""
    plain = toy()
    job = a_job({"left": (0, 1)})
    few, fewer = (
        replace(plain, tasks={name: task.cut({"search": count}) for name, task in plain.tasks.items()})
        for count in (4, 3)
    )
    none = toy(gates={"finite": False, "repetition": 0})

    assert addresses_of(few).of(job).gates == addresses_of(plain).of(job).gates
    assert len({addresses_of(one).of(job).gates for one in (plain, fewer, toy(gates={"repetition": 48}), none)}) == 4
    assert addresses_of(none).of(job).gates is None


ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "experiments" / "zoo"

#: A small search on real models: one task is graded, one compares with a source.
SMALL: dict[str, Any] = {
    "seed": 0,
    "models": {"base": str(ZOO / "base"), "sources": {name: str(ZOO / name) for name in ("strings", "cipher")}},
    "space": "task_vectors",
    "objectives": [
        {"task": "arithmetic"},
        {"name": "near", "task": {"measure": "kl", "reference": "base", "data": "texts.txt", "text": "text", "top": 4}},
    ],
    "driver": {"name": "random", "batch": 3},
    "budget": {"candidates": 3},
    "baselines": {"lambdas": [0.5]},
    "finalists": 2,
    "dtype": "float32",
    "store": "kept/store.db",
}


def small(folder: Path, name: str, **changes: Any) -> Experiment:
    """Write and read a small experiment."""
    (folder / "texts.txt").write_text("".join(f"{i}+{i}={2 * i} and so on\n" for i in range(60)), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"name": name} | changes, sort_keys=False), encoding="utf-8")
    return load(path)


def ran(experiment: Experiment, runs: Path) -> list[Event]:
    """Run it."""
    folder = runs / experiment.file.name
    with prepare(experiment, folder) as record, open_pool(experiment) as pool:
        Search(experiment, record, pool).run()
    return list(read(folder / "ledger.jsonl"))


def test_a_search_of_real_models_takes_from_a_store_what_another_one_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many items: half of them come from the store. The same ones again: no worker is made."""
    sizes = {split: {"search": count, "validation": 6, "test": 6} for split, count in (("few", 8), ("many", 16))}
    plain = ran(small(tmp_path, "plain", store=None, splits=sizes["many"]), tmp_path / "runs")
    ran(small(tmp_path, "few", splits=sizes["few"]), tmp_path / "runs")
    jobs: list[Job] = []
    ask = ModelWorker.answer
    monkeypatch.setattr(ModelWorker, "answer", lambda self, job: jobs.append(job) or ask(self, job))
    many = ran(small(tmp_path, "many", splits=sizes["many"]), tmp_path / "runs")

    first = next(job for job in jobs if job.split == "search")
    assert first.items == {task: tuple(range(8, 16)) for task in ("arithmetic", "near")}
    for one, two in zip(settled(plain), settled(many), strict=True):
        assert type(one) is type(two)
        if isinstance(one, Answered) and isinstance(two, Answered):
            assert one.responses["arithmetic"] == two.responses["arithmetic"]
            # of a likelihood the last bits may depend on what else is in its batch
            assert one.responses["near"] == pytest.approx(two.responses["near"], rel=1e-4, abs=1e-6)

    monkeypatch.setattr(WorkerSetup, "make", lambda self: pytest.fail("nobody should be asked"))
    assert settled(ran(small(tmp_path, "again", splits=sizes["many"]), tmp_path / "runs")) == settled(many)


def test_the_file_of_a_run_names_the_store_wherever_it_is_read_from(tmp_path: Path) -> None:
    """Relative to the experiment's file; the identity of a run does not know of it."""
    given, without = small(tmp_path, "given"), small(tmp_path, "without", store=None)

    assert given.store == tmp_path / "kept" / "store.db"
    assert given.file.store == str(given.store)
    assert without.store is None
    assert given.identity == without.identity


def test_a_run_with_a_broken_store_is_refused_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, which says what to delete."""
    experiment = small(tmp_path, "broken")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "store.db").write_text("nonsense " * 1000, encoding="utf-8")
    monkeypatch.setattr("evomerge.search.beginning.InlinePool", lambda *_: pytest.fail("a worker was started"))

    with pytest.raises(ExperimentError, match=r"store\.db: .*delete it"):
        open_pool(experiment)


def test_a_run_says_how_many_responses_the_store_gave(tmp_path: Path) -> None:
    """All of them in a run that repeats another, none in the first."""
    experiment, store = toy(), tmp_path / "store.db"
    first = Run(conduct(experiment, tmp_path / "one", ToyWorker(), store))
    second = conduct(experiment, tmp_path / "two", ToyWorker(), store)
    count = sum(len(own) for event in second if isinstance(event, Answered) for own in event.responses.values())

    assert (first.stored, Run(second).stored) == (0, count)

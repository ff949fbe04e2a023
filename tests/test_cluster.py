"""A cluster that loses anything but the ledger: whoever dies, the run is what it would have been.

The cluster is simulated by Ray on this machine: a head and three nodes with one GPU each that is none. The driver is a
process of its own, `python tests/test_cluster.py ADDRESS FOLDER PAUSE`, which searches the toy experiment.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.drivers import read_driver
from evomerge.experiment import Experiment, ExperimentFile
from evomerge.experiment.entries import RayEntry
from evomerge.ledger import Answered, Asked, Event, Finished, Told, read, settled
from evomerge.pool import Answer, InlinePool, Job, RayPool, failure, read_crew
from evomerge.pool.session import living
from evomerge.search import Search, Watching, prepare
from tests.toy import ToyWorker, toy

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 5.0
#: Candidates over which every worker hangs, and over which the first worker dies.
HANGS, DIES = 30, 40
CANDIDATES = 240


def experiment() -> Experiment:
    """Return what is searched: generations of eight, each candidate asked ten items of a task once."""
    schedule = {"name": "fixed", "items": 10}
    return toy(schedule=schedule, budget={"candidates": CANDIDATES}, name="cluster", workers={"time_limit": LIMIT})


class Fated(ToyWorker):
    """A worker that hangs and dies where it is fated to."""

    def __init__(self, folder: str, pause: float) -> None:
        super().__init__(pause=pause)
        self._folder = Path(folder)

    def answer(self, job: Job) -> Answer:
        """Answer, hang, or die when nobody has died here before."""
        if job.candidate == HANGS:
            time.sleep(600)
        if job.candidate == DIES:
            with contextlib.suppress(FileExistsError):
                (self._folder / "died").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(job)


def drive(address: str, folder: str, pause: str) -> None:
    """Run the search, or go on with it, on the cluster's GPUs."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[ToyWorker.__module__])  # the nodes' processes cannot import it
    pool = RayPool(
        lambda: Fated(folder, float(pause)), "per_gpu", LIMIT, gpus=1.0, cpus=0, startup_limit=60, address=address
    )
    run = Path(folder) / "run"
    with prepare(experiment(), run) as record, pool, Watching(pool, run / "workers.json", 0.2) as watching:
        Search(experiment(), record, pool, watching.add).run()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and three nodes with a GPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **SMALL})
    for _ in range(3):
        join(cluster)
    yield cluster
    cluster.shutdown()


SMALL = {"include_dashboard": False, "object_store_memory": 80 * 2**20}


def join(cluster: Any) -> Any:
    """Add a node and return it."""
    return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)


def leave(cluster: Any) -> None:
    """Kill the newest node that is not the head, with all that runs on it."""
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)


def until(condition: Callable[[], object], patience: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def begin(cluster: Any, folder: Path, pause: float) -> "subprocess.Popen[bytes]":
    """Start the driver."""
    with (folder / "errors").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, __file__, cluster.address, str(folder), str(pause)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def lines(folder: Path) -> int:
    """Return how many events the ledger has."""
    ledger = folder / "run/ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.is_file() else 0


def at_work(folder: Path, state: tuple[str, ...] = ("busy",)) -> list[int]:
    """Return the processes of the workers in a state, as the driver noted it last."""
    crew = read_crew(folder / "run/workers.json")
    return [worker.pid for worker in crew.workers if worker.state in state and worker.pid] if crew else []


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def undisturbed(folder: Path) -> tuple[Event, ...]:
    """Return the ledger of the same search in one process, where nothing happens to anybody."""

    def late(job: Job) -> str | None:
        return f"time limit of {LIMIT:g} s exceeded" if job.candidate == HANGS else None

    with prepare(experiment(), folder) as record, InlinePool(lambda: ToyWorker(late)) as pool:
        Search(experiment(), record, pool).run()
    return read(folder / "ledger.jsonl")


def test_what_the_page_on_clusters_shows_is_valid() -> None:
    """Each experiment, or part of one, has keys and values as they are read; the manifest runs what the page runs."""
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]
    part, whole, manifest = blocks
    file = ExperimentFile.model_validate(whole)
    read_driver(file.driver, "driver")
    ExperimentFile.model_validate(whole | part)
    cluster = manifest["spec"]["rayClusterSpec"]
    head, group = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    limits = [each["template"]["spec"]["containers"][0]["resources"]["limits"] for each in (head, *group)]

    assert part["ray"].keys() == RayEntry.model_fields.keys()
    assert manifest["spec"]["entrypoint"] in page.replace("    ", "")
    assert "nvidia.com/gpu" not in limits[0]
    workers = int(limits[1]["nvidia.com/gpu"]) / file.ray.gpus_per_worker
    assert (group[0]["replicas"] * workers, int(limits[1]["cpu"])) == (16, workers * file.ray.cpus_per_worker)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_survives_the_loss_of_nodes_workers_and_its_driver(
    cluster: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The ledger is that of an undisturbed run: everybody is told once, and nothing that was written is lost."""
    ready = ("busy", "idle")
    driver = begin(cluster, tmp_path, 0.4)
    request.addfinalizer(driver.kill)
    until(lambda: lines(tmp_path) > 40 and len(at_work(tmp_path, ready)) == 3)

    leave(cluster)
    here = lines(tmp_path)
    until(lambda: len(at_work(tmp_path, ready)) == 2 and lines(tmp_path) > here + 5)
    join(cluster)
    until(lambda: len(at_work(tmp_path, ready)) == 3)
    until(lambda: at_work(tmp_path))
    os.kill(at_work(tmp_path)[0], signal.SIGKILL)
    here = lines(tmp_path)
    until(lambda: lines(tmp_path) > here + 10 and (tmp_path / "died").exists())
    workers = at_work(tmp_path, ready)
    assert driver.poll() is None, (tmp_path / "errors").read_text()
    driver.kill()
    driver.wait()
    before = (tmp_path / "run/ledger.jsonl").read_bytes()
    until(lambda: not any(map(alive, workers)), 15)

    assert begin(cluster, tmp_path, 0.0).wait(60) == 0, (tmp_path / "errors").read_text()

    after = (tmp_path / "run/ledger.jsonl").read_bytes()
    events = read(tmp_path / "run/ledger.jsonl")
    asked = [event.candidate for event in events if isinstance(event, Asked)]
    told = [event.candidate for event in events if isinstance(event, Told)]
    answered = [(event.candidate, event.split) for event in events if isinstance(event, Answered)]
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Asked) and event.origin == "search" for event in events) == CANDIDATES
    assert sorted(asked) == sorted(told) == list(range(len(asked)))
    assert len(answered) == len({*answered})
    assert [event.candidate for event in events if isinstance(event, Told) and event.losses is None] == [HANGS]
    assert settled(events) == settled(undisturbed(tmp_path / "alone"))


class Quick:
    """A worker that takes a moment."""

    def answer(self, job: Job) -> Answer:
        """Answer with the node that it is on."""
        time.sleep(0.1)
        return failure(job, os.environ.get("CUDA_VISIBLE_DEVICES", "none"), 0.1)


def jobs(pool: RayPool, count: int) -> list[str | None]:
    """Have so many jobs answered and return what was said."""
    from evomerge.recipe import Source, copy_of

    recipe = copy_of(Source(name="a", path="a"), 1, "float32")
    for number in range(count):
        pool.submit(Job(candidate=number, recipe=recipe, split="search", items={}))
    answers = [pool.wait() for _ in range(count)]
    assert sorted(answer.candidate for answer in answers) == list(range(count))
    return [answer.error for answer in answers]


@pytest.mark.ray
@pytest.mark.slow
def test_workers_follow_the_nodes(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of half a GPU each on every node; a node that is lost while nobody works costs no job an attempt."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    nodes = len(cluster.list_all_nodes()) - 1
    with RayPool(Quick, "per_gpu", gpus=0.5, cpus=0, attempts=1, address="auto") as pool:
        until(lambda: jobs(pool, 4) and len(pool.workers) == len(pool.pids) == 2 * nodes)
        before = {*pool.pids}
        leave(cluster)
        until(lambda: sum(map(alive, before)) == 2 * nodes - 2 and len(living()) == nodes)
        time.sleep(2.1)  # the pool looks every two seconds

        assert jobs(pool, 20) == ["0"] * 20
        until(lambda: jobs(pool, 4) and len(pool.workers) == 2 * nodes - 2)
        join(cluster)
        until(lambda: jobs(pool, 4) and len(pool.pids) == 2 * nodes)
        assert len({*pool.pids} & before) == 2 * nodes - 2
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
@pytest.mark.slow
def test_a_seat_without_a_place_waits_for_a_node(cluster: Any) -> None:
    """Of more workers than there are GPUs one waits, and comes when a node joins."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    nodes = len(cluster.list_all_nodes()) - 1
    with RayPool(Quick, nodes + 1, gpus=1.0, cpus=0, address=cluster.address) as pool:
        until(lambda: jobs(pool, 4) and len(pool.pids) == nodes)

        assert [worker.state for worker in pool.workers].count("waiting") == 1
        join(cluster)
        until(lambda: jobs(pool, 4) and len(pool.pids) == nodes + 1)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


if __name__ == "__main__":
    drive(*sys.argv[1:])

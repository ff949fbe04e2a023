"""What a run needs against what there is: said in a few rows, refused with a way out that is one."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import ExperimentError
from evomerge.experiment import Experiment, load
from evomerge.models.checkpoint import Checkpoint
from evomerge.pool import memories
from evomerge.search import Search, open_pool, prepare
from evomerge.search.memory import Memory, program
from evomerge.search.resources import Disk, Machine, Resources, disk_of, here, needs_of, size

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
SMALL = Memory(program=400 * MB, sources=2000 * MB, model=500 * MB, candidate=100 * MB)
NOTHING = Disk(ledger=MB, model=500 * MB, models=0)


def needs(
    memory: Memory | None = SMALL,
    workers: int | None = 1,
    writes: Disk = NOTHING,
    gpus: tuple[int, ...] = (),
    disk: int | None = 10_000 * MB,
) -> Resources:
    """Return what a run needs on a machine with 8 GB of memory."""
    machine = Machine(memory=8000 * MB, gpus=gpus, disk=disk)
    return Resources(memory=memory, unknown="why", workers=workers, sharing=2, disk=writes, machine=machine)


def experiment(tmp_path: Path, **changes: object) -> Experiment:
    """Return the quickstart with other settings."""
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))
    data["models"]["base"] = str(ROOT / "experiments" / data["models"]["base"])
    found = data["models"]["sources"]
    data["models"]["sources"] = {name: str(ROOT / "experiments" / path) for name, path in found.items()}
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(data | changes), encoding="utf-8")
    return load(tmp_path / "it.yaml")


def test_sources_count_once_for_a_machine_and_in_each_process() -> None:
    """Both are said: what the system shows for a worker, and what all of them take."""
    row = needs(workers=3).rows["memory"]

    assert SMALL.own == 1000 * MB
    assert SMALL.resident == 3000 * MB
    assert row == (
        "a worker's process grows to 3.0 GB: 1.0 GB of its own, 2.0 GB of sources, which the workers of a machine "
        "share; here 3 take 5.0 GB, of 8.0 GB"
    )
    cluster = needs(workers=None).rows["memory"]
    assert cluster.endswith("so a machine needs 2.0 GB and 1.0 GB for each of its workers")


def test_more_workers_than_fit_are_refused_with_the_number_that_does() -> None:
    """As many as the way out names pass, and one more does not."""
    with pytest.raises(ExperimentError, match=r"9 workers need 9.0 GB for themselves, .* has 8.0 GB") as caught:
        needs(workers=9).check()
    found = re.search(r"set ray: \{actors: (\d+)\}, or lower batch or tokens of workers", str(caught.value))
    assert found is not None
    fit = int(found[1])

    needs(workers=fit).check()
    with pytest.raises(ExperimentError):
        needs(workers=fit + 1).check()


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"candidate": 9000 * MB}, "lower batch or tokens of workers"),
        ({"prefixes": 9000 * MB}, "lower prefixes_gb of workers"),
        ({"prefixes": 9000 * MB, "candidate": 9000 * MB}, "lower prefixes_gb of workers, or lower batch or tokens"),
        ({"model": 90_000 * MB}, "merge smaller models, or in dtype bfloat16"),
    ],
)
def test_a_worker_that_cannot_fit_is_refused_with_what_takes_most(changes: dict[str, int], way: str) -> None:
    """Only settings that matter are named; no number of workers would help."""
    memory = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ExperimentError, match=f"a worker needs .* for itself, and this machine has 8.0 GB; {way}"):
        needs(memory).check()


def test_sources_that_do_not_fit_beside_are_slow_and_not_refused() -> None:
    """Mapped files are read again where memory is short; whether that is wanted is the user's choice."""
    memory = dataclasses.replace(SMALL, sources=7500 * MB)
    needs(memory).check()

    assert needs(memory).rows["memory"].endswith("of 8.0 GB, so sources are read from the disk again and again")


def test_a_gpu_is_shared_by_those_that_ray_puts_there() -> None:
    """Its memory has a row of its own; what does not fit is refused, with what keeps sources off it."""
    memory = dataclasses.replace(SMALL, device="cuda", model=4000 * MB)
    assert memory.own == 400 * MB
    row = needs(memory, 2, gpus=(9000 * MB, 80_000 * MB)).rows["GPU memory"]
    assert row == "4.1 GB a worker, 2 share one, of 9.0 GB"
    needs(memory, 2, gpus=(9000 * MB,)).check()

    with pytest.raises(ExperimentError, match=r"2 workers that share a GPU need 8.2 GB, .* 8.0 GB; set resident_gb"):
        needs(memory, 2, gpus=(8000 * MB,)).check()
    needs(memory, None, gpus=(8000 * MB,)).check()  # those of a cluster are elsewhere
    assert "GPU memory" not in needs().rows


def test_a_cluster_is_checked_machine_by_machine() -> None:
    """Half a machine and half of another hold no worker together; the number that is named passes."""
    nodes = [("one", 2500 * MB), ("two", 1999 * MB), ("two", 900 * MB)]  # a worker takes 1,000 for itself
    cluster = dataclasses.replace(needs(workers=None), actors=4)
    with pytest.raises(ExperimentError, match=r"room for 3 \(one for 2, two for 0, two for 1\); set ray: .actors: 3"):
        cluster.check_cluster(nodes)
    dataclasses.replace(cluster, actors=3).check_cluster(nodes)

    with pytest.raises(ExperimentError, match=r"room for 0 .*; lower batch or tokens of workers$"):
        cluster.check_cluster(nodes[-1:])
    dataclasses.replace(cluster, actors=None).check_cluster([])  # they follow the GPUs


@pytest.mark.usefixtures("ray_session")
def test_ray_tells_the_memory_of_its_machines() -> None:
    """Of this one less than all, as Ray and its store need some."""
    ((_, found),) = memories()

    assert 0 < found < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_disk_that_cannot_take_ledger_and_a_model_is_refused() -> None:
    """Of several models some may fit; none of them is an error."""
    disk = Disk(ledger=100 * MB, model=500 * MB, models=4)
    row = "at most 100 MB for the ledger, 4 models of 500 MB, of 10.0 GB that are free"
    assert needs(writes=disk).rows["disk"] == row
    some = needs(writes=disk, disk=2000 * MB)
    some.check()

    assert some.rows["disk"].endswith("of 2.0 GB that are free; not all of them may fit")
    with pytest.raises(ExperimentError, match=r"at least 600 MB, and 599 MB are free; .*or set export: .front: none.$"):
        needs(writes=disk, disk=599 * MB).check()
    needs(writes=disk, disk=600 * MB).check()
    needs(writes=dataclasses.replace(disk, models=0), disk=599 * MB).check()
    with pytest.raises(ExperimentError, match=r"at least 100 MB, and 99 MB are free; free space, or .* --runs$"):
        needs(writes=dataclasses.replace(disk, models=0), disk=99 * MB).check()


def test_what_is_not_known_stops_nobody() -> None:
    """Where the plan cannot be made, or the machine does not tell, the row says so."""
    unknown = needs(None)
    unknown.check()
    assert unknown.rows["memory"] == "not known (why)"
    silent = needs(memory=SMALL)
    silent = dataclasses.replace(silent, machine=Machine(memory=None, gpus=(), disk=None), workers=99)
    silent.check()
    assert silent.rows["memory"].endswith("here 99 take 101.0 GB")
    assert silent.rows["disk"] == "at most 1 MB for the ledger"


def test_the_ledger_of_a_run_stays_within_what_was_foreseen(tmp_path: Path) -> None:
    """A real one, with margins, of a few candidates."""
    few = experiment(
        tmp_path, name="few", budget={"candidates": 24}, driver={"name": "nsga2", "population": 12}, finalists=4,
        schedule={"name": "fixed", "items": 20}, splits={"search": 40, "validation": 20, "test": 20},
        baselines={"lambdas": [0.3]}, export={"front": "none"}, ray=None,
    )  # fmt: skip
    with prepare(few, tmp_path / "run") as record, open_pool(few) as pool:
        Search(few, record, pool).run()
    written = (tmp_path / "run/ledger.jsonl").stat().st_size

    assert disk_of(few).ledger / 8 < written <= disk_of(few).ledger
    assert disk_of(few).models == 0
    assert disk_of(experiment(tmp_path, export={"front": "knee"})).models == 1
    assert disk_of(experiment(tmp_path, export={"front": "extremes"})).models == 3
    assert disk_of(experiment(tmp_path, export={"front": "all"})).models == 20
    assert disk_of(few).model == 4 * Checkpoint(ROOT / "experiments/zoo/base").parameters


def test_workers_share_this_machine_or_others(tmp_path: Path) -> None:
    """Inline one, Ray's here so many, in a cluster it is not known yet."""
    assert needs_of(experiment(tmp_path, ray=None), tmp_path).workers == 1
    assert needs_of(experiment(tmp_path, ray={"actors": 5}), tmp_path).workers == 5
    cluster = needs_of(experiment(tmp_path, ray={"actors": 5, "address": "auto"}), tmp_path)
    assert (cluster.workers, cluster.actors) == (None, 5)
    shared = needs_of(experiment(tmp_path, ray={"actors": "per_gpu", "gpus_per_worker": 0.25}), tmp_path)
    assert shared.sharing == 4
    assert shared.workers == 4 * len(shared.machine.gpus)


def test_a_run_that_does_not_fit_is_refused_by_check_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 2, after the table that shows why; nothing is started."""
    experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny = Machine(memory=100 * MB, gpus=(), disk=10**12)
    monkeypatch.setattr("evomerge.search.resources.here", lambda folder: tiny)
    for command in ("check", "run"):
        done = CliRunner().invoke(app, [command, "it.yaml"])

        assert done.exit_code == 2, done.output
        assert "memory  " in done.output
        assert re.search(r"error: memory: a worker needs .* for itself, and this machine has 100 MB", done.output)
    assert not (tmp_path / "runs/quickstart/workers.json").exists()


def test_this_machine_tells_what_it_has(tmp_path: Path) -> None:
    """The free disk is that of the nearest folder that is there; memory is no more than the system's."""
    machine = here(tmp_path / "not/there/yet")
    stat = os.statvfs(tmp_path)

    assert machine.disk == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)
    assert machine.memory is not None
    assert 0 < machine.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_program_knows_its_size() -> None:
    """A process that allocates so much more, and touches it, is larger by that."""
    code = (
        "from evomerge.search.memory import program; before = program(); held = bytearray(b'x' * 200_000_000); "
        "print(program() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert grown == pytest.approx(200 * MB, rel=0.05)
    assert program() > 50 * MB


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MB"), (999 * MB, "999 MB"), (10**9, "1.0 GB"), (12_340 * MB, "12.3 GB")]
)
def test_sizes_are_said_in_units_of_people(count: int, text: str) -> None:
    """Whole megabytes, and tenths of gigabytes from one on."""
    assert size(count) == text

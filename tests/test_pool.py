"""Pools: one contract for both, and workers that raise, hang and die."""

import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from evomerge.errors import CandidateError, EvomergeError, ModelError
from evomerge.pool import Answer, InlinePool, Job, Pool, RayPool, WorkerStatus, failure, idle_share
from evomerge.pool.session import capacity, connect
from evomerge.recipe import Source, copy_of

RECIPE = copy_of(Source(name="a", path="a"), 1, "float32")
LIMIT = 1.5


def job(candidate: int, **items: tuple[int, ...]) -> Job:
    """Return a job; the names of its items are what the worker of these tests does."""
    return Job(candidate=candidate, recipe=RECIPE, split="search", items=items or {"sums": (0, 1)})


class Faulty:
    """A worker that does what the names of a job's items say."""

    def __init__(self, folder: str = "") -> None:
        self.folder = Path(folder)
        self.asked = 0

    def answer(self, job: Job) -> Answer:
        """Fail in the way that is asked for, or answer with the items."""
        self.asked += 1
        if "wrong" in job.items:
            raise CandidateError("tensor 'x' is\nnot finite")
        if "exit" in job.items:
            sys.exit("leaving")
        if "nap" in job.items:
            time.sleep(60)
        if "die" in job.items:
            os._exit(1)
        if "die_once" in job.items and self.first_time():
            os._exit(1)
        if "slow" in job.items:
            time.sleep(job.items["slow"][0] / 1000)
        if "nap_once" in job.items and self.first_time():
            time.sleep(60)
        return Answer(
            candidate=job.candidate,
            split=job.split,
            responses={name: tuple(i / 10 for i in items) for name, items in job.items.items()},
            margins={},
            error=None,
            seconds=float(self.asked),
        )

    def first_time(self) -> bool:
        """Tell whether no worker has been here before."""
        try:
            (self.folder / "been").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def broken() -> Faulty:
    """Fail to make a worker."""
    raise ModelError("folder x: no config.json")


def failing_once(folder: str) -> Faulty:
    """Fail to make the first worker."""
    worker = Faulty(folder)
    if worker.first_time():
        raise ModelError("folder x: no config.json")
    return worker


def dying() -> Faulty:
    """Die while making a worker."""
    os._exit(1)


def drain(pool: Pool) -> dict[int, Answer]:
    """Return all pending answers by candidate."""
    answers = {}
    while pool.pending:
        answer = pool.wait()
        answers[answer.candidate] = answer
    return answers


def all_but(idle: float, seconds: float) -> WorkerStatus:
    """Return a worker that was idle for so long of its seconds."""
    return WorkerStatus(node="n", pid=1, state="idle", done=1, failures=0, busy=seconds - idle, seconds=seconds)


def warm(pool: RayPool) -> None:
    """Wait until all workers have started."""
    while pool.room:
        pool.submit(job(0, slow=(100,)))
    count = pool.pending
    while len(pool.pids) < count:
        pool.wait()
        pool.submit(job(0, slow=(100,)))
    drain(pool)


class PoolContract:
    """What every pool does; subclasses give the pool."""

    @pytest.fixture
    def pool(self) -> Pool:
        """Return a pool of workers of this file, with a time limit."""
        raise NotImplementedError

    def test_every_job_is_answered_once(self, pool):
        """More jobs than workers wait in the pool, and each answer belongs to its job."""
        for i in range(7):
            pool.submit(job(i, sums=(i, 3)))

        assert pool.pending == 7
        answers = drain(pool)

        assert sorted(answers) == list(range(7))
        assert all(answers[i].responses == {"sums": (i / 10, 0.3)} for i in range(7))
        assert all(answer.error is None and answer.split == "search" for answer in answers.values())
        assert pool.pending == 0

    def test_room_is_what_can_start_at_once(self, pool):
        """Room goes down with each job, not below 0, and comes back with the answers."""
        room = pool.room
        for i in range(room + 2):
            assert pool.room == max(0, room - i)
            pool.submit(job(i))
        drain(pool)

        assert pool.room == room

    def test_a_candidate_that_raises_is_an_answer(self, pool):
        """The error is one line with class and message, there are no responses, and the worker goes on."""
        pool.submit(job(0, wrong=()))
        pool.submit(job(1))
        answers = drain(pool)

        assert answers[0].error == "CandidateError: tensor 'x' is not finite"
        assert answers[0].responses is None
        assert answers[0].margins == {}
        assert answers[1].error is None

    def test_a_candidate_that_leaves_is_an_answer(self, pool):
        """SystemExit from within a job does not end the program."""
        pool.submit(job(0, exit=()))

        assert pool.wait().error == "SystemExit: leaving"

    def test_a_job_past_its_limit_is_an_answer(self, pool):
        """A job that hangs is ended at its limit, and the next one is answered by a new worker."""
        start = time.monotonic()
        pool.submit(job(0, nap=()))
        late = pool.wait()
        took = time.monotonic() - start
        pool.submit(job(1))
        after = pool.wait()

        assert late.error == f"time limit of {LIMIT} s exceeded"
        assert LIMIT <= late.seconds < LIMIT + 3
        assert took < 50
        assert after.error is None
        assert after.seconds == 1.0

    def test_waiting_for_nothing_is_refused(self, pool):
        """Without a pending job there is no answer to wait for."""
        with pytest.raises(ValueError, match="no job is pending"):
            pool.wait()

    def test_what_is_there_is_drained_and_nothing_twice(self, pool):
        """Draining never waits; between them, waiting and draining give every answer once."""
        for i in range(6):
            pool.submit(job(i, slow=(50,)))
        found = []
        while pool.pending:
            found.append(pool.wait().candidate)
            time.sleep(0.1)
            start = time.monotonic()
            found += [answer.candidate for answer in pool.drain()]
            assert time.monotonic() - start < 0.05

        assert sorted(found) == list(range(6))
        assert pool.drain() == []

    def test_workers_say_what_they_did(self, pool):
        """Jobs, failures and time are counted where they were; time at work is within time at hand."""
        for i in range(4):
            pool.submit(job(i, **({"wrong": ()} if i == 2 else {"slow": (100,)})))
        drain(pool)
        workers = pool.workers

        assert sum(worker.done for worker in workers) == 4
        assert sum(worker.failures for worker in workers) == 1
        assert 0.3 <= sum(worker.busy for worker in workers) <= sum(worker.seconds for worker in workers)
        assert all(worker.state in ("idle", "starting", "waiting") for worker in workers)
        assert all(alive(worker.pid) for worker in workers if worker.done)

    def test_closing_twice_is_allowed(self, pool):
        """A closed pool has no jobs and can be closed again."""
        pool.submit(job(0))
        pool.close()
        pool.close()

        assert pool.pending == 0


class TestInline(PoolContract):
    @pytest.fixture
    def pool(self):
        """Return an inline pool."""
        with InlinePool(Faulty, LIMIT) as pool:
            yield pool

    def test_answers_come_in_the_order_of_the_jobs(self, pool):
        """One job runs at each wait."""
        for i in (3, 1, 2):
            pool.submit(job(i))

        assert [pool.wait().candidate for _ in range(3)] == [3, 1, 2]

    def test_the_worker_is_made_at_the_first_job_and_only_once(self):
        """Making a pool costs nothing; the worker stays between jobs."""
        made = []
        with InlinePool(lambda: made.append(1) or Faulty()) as pool:
            pool.submit(job(0))
            assert made == []
            pool.wait()
            pool.submit(job(1))
            pool.wait()

        assert made == [1]

    def test_making_the_worker_does_not_count_against_the_limit(self):
        """Only the job itself is timed."""

        def slowly() -> Faulty:
            time.sleep(0.3)
            return Faulty()

        with InlinePool(slowly, 0.2) as pool:
            pool.submit(job(0))

            assert pool.wait().error is None

    def test_a_worker_that_cannot_be_made_is_an_error(self):
        """What the making raised comes out of wait."""
        with InlinePool(broken) as pool:
            pool.submit(job(0))

            with pytest.raises(ModelError, match=r"no config\.json"):
                pool.wait()

    def test_an_interrupt_gets_through(self):
        """Ctrl-C during a job is the user's, and the job stays pending."""

        class Interrupted:
            def answer(self, job: Job) -> Answer:
                raise KeyboardInterrupt

        with InlinePool(Interrupted, LIMIT) as pool:
            pool.submit(job(0))

            with pytest.raises(KeyboardInterrupt):
                pool.wait()
            assert pool.pending == 1

    def test_the_alarm_is_put_back(self, pool):
        """After a job the alarm is off, and its handler is the one from before."""
        before = signal.getsignal(signal.SIGALRM)
        pool.submit(job(0))
        pool.wait()

        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def test_outside_the_main_thread_there_is_no_limit(self, pool):
        """Python delivers alarms to the main thread only, so a pool elsewhere does without."""
        pool.submit(job(0, slow=(round(LIMIT * 1000) + 200,)))
        answers = []
        thread = threading.Thread(target=lambda: answers.append(pool.wait()))
        thread.start()
        thread.join()

        assert answers[0].error is None

    @pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
    def test_a_limit_that_is_no_time_is_refused(self, limit):
        """Limits are positive numbers of seconds."""
        with pytest.raises(ValueError, match="must be positive"):
            InlinePool(Faulty, limit)


def test_the_idle_share_is_of_all_time_at_hand():
    """Two workers of 10 and 30 s, of which 1 and 7 were idle: 8 of 40 s; without any time there is no share."""
    assert idle_share([all_but(1, 10), all_but(7, 30)]) == pytest.approx(0.2)
    assert idle_share([all_but(0, 0)]) is None
    assert idle_share([]) is None


@pytest.mark.parametrize(
    ("share", "workers"), [(0.5, 12), (0.3, 18), (0.4, 12), (0.1, 60), (1.0, 6), (2.0, 3), (3.0, 1), (5.0, 0)]
)
def test_as_many_workers_fit_as_ray_would_place(share, workers, monkeypatch):
    """On nodes with 4, 2 and no GPUs: shares of one GPU lie within it, whole ones within a node."""
    monkeypatch.setattr("evomerge.pool.session.living", lambda: {"a": 4.0, "b": 2.0, "c": 0.0})

    assert capacity(share) == workers


def test_an_address_where_nobody_is_is_refused_at_once(monkeypatch):
    """One line with the address, the reason and the way out, and no minutes of trying."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(EvomergeError, match=r"ray\.address 127\.0\.0\.1:1: no Ray .*refused.*ray start --head"):
        connect("127.0.0.1:1", None, gpus=False)

    assert time.monotonic() - start < 5


def test_a_failure_is_one_line():
    """Line ends and runs of blanks in a reason become single blanks."""
    assert failure(job(3), "a\n  b\tc", 2.0) == Answer(
        candidate=3, split="search", responses=None, margins={}, error="a b c", seconds=2.0
    )


@pytest.fixture(scope="module")
def by_value(ray_session):
    """Let this module travel to Ray's workers by value: they cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
@pytest.mark.usefixtures("by_value")
class TestRay(PoolContract):
    @pytest.fixture
    def pool(self, tmp_path):
        """Return two Ray workers."""
        folder = str(tmp_path)
        with RayPool(lambda: Faulty(folder), 2, LIMIT) as pool:
            yield pool

    def test_a_fast_job_overtakes_a_slow_one(self, pool):
        """Two workers answer side by side; the first to finish comes first."""
        warm(pool)
        pool.submit(job(0, slow=(1000,)))
        pool.submit(job(1))

        assert [pool.wait().candidate, pool.wait().candidate] == [1, 0]

    def test_a_dead_worker_is_replaced_and_its_job_done(self, pool):
        """A process that dies once costs nothing but time."""
        pool.submit(job(0, die_once=(1,)))
        for i in range(1, 4):
            pool.submit(job(i))
        answers = drain(pool)

        assert answers[0].responses == {"die_once": (0.1,)}
        assert all(answers[i].error is None for i in range(4))

    def test_a_killed_worker_is_replaced_and_its_job_done(self, pool):
        """SIGKILL of a worker during a job, as from the system, is the same."""
        warm(pool)
        before = pool.pids
        for i in range(2):
            pool.submit(job(i, slow=(500,)))
        os.kill(before[0], signal.SIGKILL)
        answers = drain(pool)

        assert all(answers[i].responses == {"slow": (50.0,)} for i in range(2))
        warm(pool)
        assert before[0] not in pool.pids
        assert before[1] in pool.pids

    def test_a_job_that_kills_every_worker_is_given_up(self, tmp_path):
        """After as many deaths as attempts the job is a failure, and the others are answered."""
        with RayPool(Faulty, 1, attempts=2) as pool:
            pool.submit(job(0, die=()))
            pool.submit(job(1))
            answers = drain(pool)

        assert answers[0].error == "the worker process died 2 times at this candidate"
        assert answers[0].responses is None
        assert answers[1].error is None

    def test_a_job_that_one_worker_hangs_over_is_given_to_another(self, tmp_path):
        """Nothing else is left, so an idle worker takes it too; the first answer counts, and who hangs is replaced."""
        folder = str(tmp_path)
        with RayPool(lambda: Faulty(folder), 2) as pool:
            warm(pool)
            before = pool.pids
            start = time.monotonic()
            pool.submit(job(9, nap_once=(4,)))
            answer = pool.wait()
            took = time.monotonic() - start

            assert answer.responses == {"nap_once": (0.4,)}
            assert 1 < took < 20
            warm(pool)
            assert len({*before} & {*pool.pids}) == 1
            assert gone({*before} - {*pool.pids})
            assert sum(worker.failures for worker in pool.workers) == 1

    def test_a_job_that_all_hang_over_is_given_to_two_at_most(self):
        """Else it would go round for ever: it has failed when the second is past the limit too."""
        with RayPool(Faulty, 3, LIMIT) as pool:
            warm(pool)
            start = time.monotonic()
            pool.submit(job(9, nap=()))

            assert pool.wait().error == f"time limit of {LIMIT} s exceeded"
            assert time.monotonic() - start < 3 * LIMIT
            assert sum(worker.failures for worker in pool.workers) == 2
            assert pool.pending == 0

    def test_a_job_that_two_work_on_is_answered_once(self, pool):
        """A job that is just long is answered by who began; the other's answer is nobody's."""
        warm(pool)
        before = pool.pids
        pool.submit(job(9, slow=(1400,)))  # short of the pool's limit
        first = pool.wait()
        assert pool.pending == 0
        for i in range(4):
            pool.submit(job(i, slow=(500,)))  # the other is done before these are
        answers = [pool.wait().candidate for _ in range(4)]

        assert first.candidate == 9
        assert sorted(answers) == [0, 1, 2, 3]
        assert pool.pending == 0
        assert {*pool.pids} == {*before}

    def test_many_jobs_that_kill_workers_stop_the_run(self):
        """Own errors of candidates do not count; what was answered comes out first, and the line says the way out."""
        with RayPool(Faulty, 1, attempts=1, max_failures=2) as pool:
            for i, kind in enumerate(["wrong", "die", "wrong", "die", "sums"]):
                pool.submit(job(i, **{kind: ()}))
            answers = [pool.wait() for _ in range(4)]
            with pytest.raises(EvomergeError, match=r"2 candidates failed because workers died .*candidate 3.*resume"):
                pool.wait()

        assert [answer.candidate for answer in answers] == [0, 1, 2, 3]

    def test_a_worker_that_cannot_be_made_does_not_stop_the_others(self, tmp_path):
        """As on a node that lacks a file: others answer, the seat rests with its reason, and is tried again."""
        folder = str(tmp_path)
        notes = set()
        with RayPool(lambda: failing_once(folder), 2) as pool:
            end = time.monotonic() + 30
            while len(pool.pids) < 2 and time.monotonic() < end:
                pool.submit(job(0, slow=(100,)))
                assert pool.wait().error is None
                notes |= {worker.note for worker in pool.workers if worker.state == "resting"}

            assert len(pool.pids) == 2
        assert notes == {f"worker on node {platform.node()}: folder x: no config.json"}

    def test_a_small_job_costs_little(self, pool):
        """Submitting and waiting take few milliseconds of the driver's time a job."""
        warm(pool)
        start = time.process_time()
        for i in range(200):
            pool.submit(job(i))
        drain(pool)

        assert (time.process_time() - start) / 200 < 0.010

    def test_a_worker_that_cannot_be_made_is_an_error(self):
        """What the making raised in the other process comes out of wait as itself, with its node."""
        with RayPool(broken, 1) as pool:
            pool.submit(job(0))

            with pytest.raises(ModelError, match=rf"worker on node {platform.node()}: folder x: no config\.json"):
                pool.wait()

    def test_workers_that_die_at_their_start_are_an_error(self):
        """A pool does not start workers for ever."""
        with RayPool(dying, 1, attempts=2) as pool:
            pool.submit(job(0))

            with pytest.raises(EvomergeError, match="2 workers in a row died while starting"):
                pool.wait()

    def test_a_worker_that_has_no_place_is_an_error(self):
        """Actors that Ray cannot place within the limit are reported with what they ask for."""
        with RayPool(Faulty, 1, cpus=1000, startup_limit=1.0) as pool:
            pool.submit(job(0))

            with pytest.raises(EvomergeError, match=r"no worker started within 1 s.*'num_cpus': 1000"):
                pool.wait()

    def test_a_worker_that_has_no_place_is_no_error_while_others_live(self):
        """Two of three fit; the third waits for ever, and when it has waited long it is no room any more."""
        with RayPool(Faulty, 3, cpus=2, startup_limit=6.0) as pool:
            assert pool.room == 3
            end = time.monotonic() + 6.5
            while time.monotonic() < end:
                pool.submit(job(0, slow=(100,)))
                assert pool.wait().error is None

            assert pool.room == 2
            assert [worker.state for worker in pool.workers].count("waiting") == 1

    def test_an_answer_that_cannot_travel_is_a_failure(self):
        """What a worker returns must pass between processes; if not, that is the job's answer."""

        class Odd:
            def answer(self, job: Job) -> object:
                return threading.Lock()

        with RayPool(Odd, 1) as pool:
            pool.submit(job(0))

            assert "TypeError" in (pool.wait().error or "")

    def test_threads_are_set_before_libraries_load(self):
        """The worker's process sees the number of threads in its environment."""

        class Looking:
            def answer(self, job: Job) -> Answer:
                return failure(job, os.environ["OMP_NUM_THREADS"], 0.0)

        with RayPool(Looking, 1, threads=3) as pool:
            pool.submit(job(0))

            assert pool.wait().error == "3"

    def test_closing_ends_the_processes_and_leaves_a_foreign_ray(self, pool):
        """Workers in the middle of a job die with their pool; a Ray that was there before stays."""
        import ray

        warm(pool)
        pids = pool.pids
        pool.submit(job(0, nap=()))
        pool.close()

        assert len(pids) == 2
        assert gone(pids)
        assert ray.is_initialized()

    def test_a_worker_that_hangs_while_it_starts_is_an_error(self):
        """A pool does not wait for ever for its only worker."""
        with RayPool(lambda: time.sleep(600), 1, startup_limit=2.0) as pool:
            pool.submit(job(0))

            with pytest.raises(EvomergeError, match=r"worker on node .*: not ready within 2 s"):
                pool.wait()

    def test_a_worker_is_idle_while_its_answer_waits_for_the_driver(self, pool):
        """Time at work ends with the work, not when somebody looks."""
        warm(pool)
        before = sum(worker.busy for worker in pool.workers)
        pool.submit(job(0, slow=(100,)))
        time.sleep(1)
        pool.wait()

        assert 0.1 <= sum(worker.busy for worker in pool.workers) - before < 0.6

    def test_workers_per_gpu_need_a_share(self):
        """Without a share of a GPU nobody knows how many fit."""
        with pytest.raises(ValueError, match="need a share of one, got 0"):
            RayPool(Faulty, "per_gpu")

    @pytest.mark.parametrize(("count", "attempts"), [(0, 3), (1, 0)])
    def test_a_pool_of_nobody_is_refused(self, count, attempts):
        """At least one worker and one attempt."""
        with pytest.raises(ValueError, match="at least one worker and one attempt"):
            RayPool(Faulty, count, attempts=attempts)


@pytest.mark.ray
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_end_leaves_no_process(end, tmp_path):
    """Whether a program that waits for its own Ray gets Ctrl-C or is killed, workers and Ray end with it.

    After a kill, two agents of Ray's own that nobody waits for take about a minute more.
    """
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
            import time
            from pathlib import Path
            from evomerge.pool import Job, RayPool
            from evomerge.recipe import Source, copy_of

            class Napping:
                def answer(self, job):
                    Path(__file__).with_name("napping").touch()
                    time.sleep(600)

            recipe = copy_of(Source(name="a", path="a"), 1, "float32")
            with RayPool(Napping, 1) as pool:
                pool.submit(Job(candidate=0, recipe=recipe, split="search", items={}))
                pool.wait()
            """),
        encoding="utf-8",
    )
    root = Path(__file__).parents[1]
    program = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the signal reaches its whole group, as from a terminal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to Ctrl-C
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    until = time.monotonic() + 120
    while not (tmp_path / "napping").exists() and time.monotonic() < until:
        time.sleep(0.1)
    family = descendants(program.pid)
    if end == signal.SIGINT:
        os.killpg(program.pid, end)
    else:
        family = [pid for pid in family if b"Agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        program.kill()  # it alone, as the system does that is out of memory
    _, errors = program.communicate(timeout=60)

    assert len(family) >= 2
    assert end == signal.SIGKILL or "KeyboardInterrupt" in errors
    assert gone(family)


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children of a process, and of theirs."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in table.splitlines():
        own, parent = map(int, line.split())
        children.setdefault(parent, []).append(own)
    found, todo = [], [pid]
    while todo:
        todo.extend(more := children.get(todo.pop(), []))
        found.extend(more)
    return found


def gone(pids, patience: float = 15) -> bool:
    """Tell whether all processes end within a while; a zombie has ended."""
    end = time.monotonic() + patience
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def alive(pid: int) -> bool:
    """Tell whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

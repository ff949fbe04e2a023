"""Searches on stand-ins, one course a run: driver, space and seed in, the hypervolume as it grew out."""

import os

# Set before numpy is loaded: processes that count on one core each must not start threads.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# ruff: noqa: E402  the imports below must see the variables above
import hashlib
import importlib
import json
import math
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ranking import Volume
from surrogate import ITEMS, Surrogate

from evomerge.drivers import Detail, Problem, nested, read_driver
from evomerge.genome import Genome, from_unit
from evomerge.objective import Losses

#: What comes of a genome: its losses, and what is known beside them.
Answer = tuple[Losses, Detail]

#: Genomes of a driver in steady state that are scored at the same time.
WORKERS = 8


@dataclass(frozen=True)
class Contender:
    """A driver as it is compared.

    Attributes:
        name: in tables.
        driver: as an experiment gives it.
        budget: the most evaluations of a run, baselines included. What is cheap and slow to arrive goes on for long, so
            that it is known when it does.
        told: whether it is given the baselines' scores, as in a real run; one with published settings begins as
            published, in the middle or at random.
        seconds: about what it takes for an evaluation, so that the long ones begin first.
        seeds: with how many seeds it runs at most, where it takes too long for all.
    """

    name: str
    driver: Mapping[str, Any]
    budget: int = 3000
    told: bool = True
    seconds: float = 0.001
    seeds: int | None = None


@dataclass(frozen=True)
class Course:
    """What came of a run.

    Attributes:
        contender: its name.
        space: where it searched.
        seed: of its problem.
        budget: how many evaluations it had, baselines included.
        done: how many it used; fewer where the driver had nothing more to propose.
        curve: after which evaluations the hypervolume had grown, and to what.
        front: scores that nothing dominates, as numbers of right answers.
        seconds: of `ask` and `tell`, in all.
        versions: of the libraries that decide what the driver proposes.
        error: why it broke off, if it did.
    """

    contender: str
    space: str
    seed: int
    budget: int
    done: int
    curve: tuple[tuple[int, float], ...]
    front: tuple[tuple[int, ...], ...]
    seconds: float
    versions: Mapping[str, str]
    error: str | None = None


@cache
def stand_in(space: str) -> Surrogate:
    """Return the stand-in of a space; it is read once in a process."""
    return Surrogate(space)


def detail_of(losses: Losses, responses: Mapping[str, Mapping[int, float]]) -> Detail:
    """Return what a run would know beside the losses: responses, and each score's error over the population of items.

    A score of 0 or 1 has an error too, so two answers of either kind are added (Agresti, Coull 1998).
    """
    shares = [(-loss * ITEMS + 2) / (ITEMS + 4) for loss in losses]
    return Detail(errors=tuple(math.sqrt(p * (1 - p) / (ITEMS + 4)) for p in shares), responses=responses)


def problem_of(there: Surrogate, seed: int, told: bool) -> Problem:
    """Return what a driver is asked to solve: as in a real run, or with nothing known and a start in the middle."""
    if not told:
        middle = from_unit(there.axes, [0.5] * len(there.axes))
        return Problem(axes=there.axes, objectives=3, seed=seed, start=middle, reference=(0.0, 0.0, 0.0))
    answers = there.answers([genome for genome, _ in there.known]) if there.known else []
    return Problem(
        axes=there.axes,
        objectives=3,
        seed=seed,
        known=there.known,
        details=tuple(detail_of(*answer) for answer in answers),
        reference=(0.0, 0.0, 0.0),
    )


def run(contender: Contender, space: str, seed: int, budget: int) -> Course:
    """Return the course of one search on a stand-in; a driver that fails has its reason in place of the rest."""
    there = stand_in(space)

    def answer(genomes: Sequence[Genome]) -> list[Answer | None]:
        return [(losses, detail_of(losses, responses)) for losses, responses in there.answers(genomes)]

    return follow(contender, problem_of(there, seed, contender.told), there.baselines, answer, (space, seed, budget))


def follow(
    contender: Contender,
    problem: Problem,
    baselines: Sequence[Losses],
    answer: Callable[[Sequence[Genome]], list[Answer | None]],
    place: tuple[str, int, int],
) -> Course:
    """Run a driver to the end of its budget and watch the hypervolume.

    A driver in batches is asked until it has no more and told everything in order; one in steady state has `WORKERS`
    genomes in flight, of which the first asked is the first told.

    Args:
        contender: what is run.
        problem: what it is asked to solve.
        baselines: losses of what was evaluated before, which count as evaluations.
        answer: scores genomes; None for one that failed.
        place: space, seed and budget.
    """
    space, seed, budget = place
    volume, curve, scores = Volume(ITEMS), [], set()
    done = 0

    def count(losses: Losses | None) -> None:
        nonlocal done
        done += 1
        if losses is None:
            return
        before = volume.value
        if volume.add(losses) > before:
            curve.append((done, volume.value))
            scores.add(tuple(round(-loss * ITEMS) for loss in losses))

    for losses in baselines:
        count(losses)
    settings = read_driver(dict(contender.driver), contender.name)
    room = WORKERS if settings.steady else budget
    seconds, error = 0.0, None
    try:
        start = time.perf_counter()
        driver = settings.start(problem)
        flying: deque[tuple[int, Genome]] = deque()
        asked = 0
        while done < budget:
            while len(flying) < min(room, budget - done) and (genome := driver.ask()) is not None:
                flying.append((asked, genome))
                asked += 1
            if not flying:
                break
            seconds += time.perf_counter() - start
            scored = [flying.popleft() for _ in range(1 if settings.steady else len(flying))]
            answers = answer([genome for _, genome in scored])
            for found in answers:
                count(None if found is None else found[0])
            start = time.perf_counter()
            for (index, genome), found in zip(scored, answers, strict=True):
                driver.tell(index, genome, *(found or (None,)))
        seconds += time.perf_counter() - start
    except Exception as problem_found:  # a driver that breaks off is a result of the comparison, not its end
        error = f"{type(problem_found).__name__}: {problem_found}"[:300]
    return Course(
        contender=contender.name,
        space=space,
        seed=seed,
        budget=budget,
        done=done,
        curve=tuple(curve),
        front=undominated(scores),
        seconds=seconds,
        versions={name: version(name) for name in sorted({"numpy", *settings.libraries})},
        error=error,
    )


def undominated(scores: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Return the scores that no other one covers, in order."""
    return tuple(
        sorted(s for s in scores if not any(o != s and all(a >= b for a, b in zip(o, s, strict=True)) for o in scores))
    )


def courses(
    contenders: Sequence[Contender],
    spaces: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    processes: int,
    budget: int | None = None,
) -> Iterator[Course]:
    """Yield the course of every run, those that lie in the folder first; new ones are kept there as they end.

    A course is known by the driver's settings and code, the stand-in, seed and budget; so a comparison that was broken
    off goes on, and one after a change runs anew what the change may matter to. Courses say with which versions of
    libraries they were run; others are not run again for that.

    Args:
        contenders: what is compared.
        spaces: names of stand-ins.
        seeds: of the problems.
        folder: where courses are kept.
        processes: how many run at a time.
        budget: cuts all budgets to this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = []
    for contender in contenders:
        for space in spaces:
            for seed in seeds[: contender.seeds]:
                own = contender.budget if budget is None else min(budget, contender.budget)
                path = folder / f"{contender.name}-{space}-{seed}-{_key(contender, space, own)}.json"
                if path.exists():
                    yield _read(path)
                else:
                    wanted.append((contender, space, seed, own, path))
    wanted.sort(key=lambda each: -each[0].seconds * each[3])
    with ProcessPoolExecutor(processes) as pool:
        pending = {pool.submit(_measure, *each[:4]): each[4] for each in wanted}
        for future in as_completed(pending):
            course = future.result()
            _write(pending[future], course)
            yield course


def kept(folder: Path, contenders: Sequence[Contender], spaces: Sequence[str]) -> Iterator[Course]:
    """Yield the latest course of each contender, space and seed that lies in a folder, whatever the code has become."""
    names = {contender.name for contender in contenders}
    latest: dict[tuple[str, str, int], Course] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        course = _read(path)
        if course.contender in names and course.space in spaces:
            latest[course.contender, course.space, course.seed] = course
    yield from latest.values()


def _measure(contender: Contender, space: str, seed: int, budget: int) -> Course:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of what a comparison does on purpose, thousands of times
        return run(contender, space, seed, budget)


def _key(contender: Contender, space: str, budget: int) -> str:
    """Return a digest of all that decides a course but the seed."""
    settings = read_driver(dict(contender.driver), contender.name)
    facts = {
        "driver": repr(settings),
        "code": {name: _code(name) for name in sorted(_modules(settings))},
        "told": contender.told,
        "budget": budget,
        "stand-in": stand_in(space).digest,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _modules(settings: Any) -> set[str]:
    """Return the modules of a driver and of those that it is made of, with all of drivers that they import."""
    found: set[str] = set()
    left = [type(settings).__module__]
    for name in nested(type(settings)):
        own = getattr(settings, name)
        left += [type(one).__module__ for one in (own if isinstance(own, tuple) else (own,))]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += re.findall(r"^from (evomerge\.drivers\.\w+) import", _source(name), re.MULTILINE)
    return found


@cache
def _source(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")


@cache
def _code(module: str) -> str:
    """Return a digest of a module without its empty lines and comments."""
    lines = (line.rstrip() for line in _source(module).splitlines())
    return hashlib.sha256("\n".join(x for x in lines if x and not x.lstrip().startswith("#")).encode()).hexdigest()


def _write(path: Path, course: Course) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(course.__dict__), encoding="utf-8")
    draft.replace(path)


def _read(path: Path) -> Course:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["curve"] = tuple((int(done), float(volume)) for done, volume in data["curve"])
    data["front"] = tuple(tuple(scores) for scores in data["front"])
    return Course(**data)

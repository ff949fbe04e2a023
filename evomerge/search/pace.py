"""How long a run takes: what it asks at most, and how fast its workers answer."""

import math
from collections.abc import Mapping
from dataclasses import replace

from evomerge.evaluation.task import SPLITS
from evomerge.experiment import Experiment
from evomerge.fitness.schedule import Fixed, Race, Warmup
from evomerge.pool import Job, Pool
from evomerge.search.beginning import baselines_of, probes_of, warmup_of
from evomerge.value import value

#: Items per task to time, and the seconds of an answer beyond which no greater number is tried.
_SIZES = (4, 16, 64, 256)
_ENOUGH = 1.0

#: Generations beyond those that the budget fills: a driver's first may be smaller.
_MORE = 1


def planned(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Return for each step of a run how many candidates it asks at most, and how many items of each on average."""
    sizes = {s: sum(len(i) for i in experiment.items(s).values()) for s in SPLITS}
    known, probed, random = (len(own(experiment)) for own in (baselines_of, probes_of, warmup_of))
    begun = len(experiment.warm)
    schedule, candidates = experiment.schedule, experiment.file.budget.candidates
    few = None if isinstance(schedule, Race) else schedule.items
    each = sizes["search"] if few is None else sum(min(few, len(i)) for i in experiment.items("search").values())
    finalists = min(experiment.file.finalists, candidates)
    promoted, again, more = 0, 0, 0
    if isinstance(schedule, Warmup):
        generations = math.ceil(candidates / experiment.driver.generation(len(experiment.space.axes))) + _MORE
        again = schedule.elites * generations
        promoted = (schedule.promote + schedule.honest) * (generations // schedule.every) + schedule.final
        promoted = min(promoted, candidates)
        closing = min(schedule.closing, candidates)
        drawn = sum(min(schedule.closing_items, len(i)) for i in experiment.items("search").values())
        more = promoted * (sizes["search"] - each) + closing * drawn
        promoted += closing
    return {
        "warm-up": (known + begun + probed + random, each if isinstance(schedule, Fixed) else sizes["search"]),
        "search": (candidates + again, each),
        "promotion": (promoted, math.ceil(more / max(1, promoted))),
        "validation": (known + finalists, sizes["validation"]),
        "test": (known + finalists, sizes["test"]),  # if nobody dominates anybody
    }


def planned_items(experiment: Experiment) -> dict[str, int]:
    """Return how many items a run will ask at most, step by step."""
    return {step: candidates * items for step, (candidates, items) in planned(experiment).items()}


@value
class Pace:
    """How fast one worker is: seconds per candidate, whatever it is asked, and seconds per item."""

    candidate: float
    item: float

    def seconds(self, experiment: Experiment, done: Mapping[str, int]) -> float:
        """Return the time that is left of a run for one worker, when so many items were asked at each step."""
        left = 0.0
        for step, (candidates, items) in planned(experiment).items():
            share = max(0.0, 1 - done[step] / max(1, candidates * items))
            left += share * candidates * (self.candidate + items * self.item)
        return left


def measure_pace(experiment: Experiment, pool: Pool, workers: int) -> Pace:
    """Time a few answers of the first source, on more and more items until a second has passed; nothing is recorded.

    Args:
        experiment: what will be run.
        pool: who will answer; all its workers are started first, and that is not counted.
        workers: how many they are.
    """
    recipe = baselines_of(experiment)[0].recipe
    number = 0

    def ask(count: int, jobs: int) -> tuple[int, float]:
        nonlocal number
        few = {task: places[:count] for task, places in experiment.items("search").items()}
        for _ in range(jobs):
            number -= 1  # no number of a candidate; another seed, so that each is built anew
            again = replace(recipe, seed=-number)
            pool.submit(Job(candidate=number, recipe=again, split="search", items=few))
        # Twice as many jobs as workers, and the least counts: the first time items are tokenized.
        return sum(len(places) for places in few.values()), min(pool.wait().seconds for _ in range(jobs))

    ask(_SIZES[0], workers)
    timed: list[tuple[int, float]] = []
    for count in _SIZES:
        timed.append(ask(count, 2 * workers))
        if timed[-1][1] > _ENOUGH:
            break
    (few, short), (many, long) = timed[0], timed[-1]
    item = max(long - short, 0.0) / (many - few) if many > few else short / few
    return Pace(candidate=max(short - item * few, 0.0), item=item)

"""Sets up the race of a generation: the order of the items, and the front that candidates are compared with."""

from collections.abc import Sequence

import numpy as np

from evomerge.experiment import Experiment
from evomerge.fitness.race import Climb, Rival, balanced, prefixes
from evomerge.fitness.schedule import Items, Race
from evomerge.search.blocks import Block
from evomerge.search.book import Book

#: Stream of random numbers; others have their own.
_STREAM = 5


def order_of(experiment: Experiment, book: Book, blocks: Sequence[Block]) -> Items:
    """Return the order in which a run's candidates are asked the items of each task, balanced over strata.

    Strata are those of the estimators: subtask, and which sources are right. So the sources must have answered.
    """
    sources = [book.answers[i] for i in book.sources]
    found = {}
    for block in blocks:
        strata_N = block.strata(sources)
        for task, begin in block.begins.items():
            own = strata_N[begin : begin + block.sizes[task]]
            rng = np.random.default_rng([experiment.file.seed, _STREAM, list(experiment.tasks).index(task)])
            found[task] = balanced(own, rng)
    return found


def climb(experiment: Experiment, settings: Race, book: Book, order: Items, corner: Sequence[float]) -> Climb:
    """Return the race of a generation against those of the front that have answered everything by now."""
    full = set(book.full)
    front = book.front_of([i for i in book.scored if i in full])
    rivals = book.best(front, settings.rivals, corner)
    signs = {o.name: o.loss(1.0) for o in experiment.objectives if o.kind == "task"}
    return Climb(
        order=order,
        prefixes=prefixes({task: len(places) for task, places in order.items()}, settings.first, settings.eta),
        signs=signs,
        rivals=tuple(_rival(experiment, book, i) for i in rivals),
        alpha=settings.alpha,
        properties=lambda number: _properties(experiment, book, number),
    )


def _rival(experiment: Experiment, book: Book, number: int) -> Rival:
    values = book.answers[number].values
    responses = {task: tuple(values[task][place] for place in range(len(values[task]))) for task in experiment.tasks}
    return Rival(responses=responses, properties=_properties(experiment, book, number))


def _properties(experiment: Experiment, book: Book, number: int) -> tuple[float, ...]:
    """Return what a candidate loses by its properties, where these are objectives."""
    wanted = [objective for objective in experiment.objectives if objective.kind == "property"]
    return tuple(o.loss(book.properties_of(number)[o.name]) for o in wanted)

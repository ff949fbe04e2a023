"""One generation: what the estimator chooses, who is asked again, who is promoted, and what is told of everybody."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from evomerge.experiment import Experiment
from evomerge.fitness.calibration import monitor
from evomerge.fitness.estimator import Estimator
from evomerge.fitness.sampling import Mean
from evomerge.fitness.schedule import Fixed, Items, Race, Schedule, Shared, Warmup
from evomerge.ledger import Fitted, Promoted, Told
from evomerge.objective import Losses, Score, losses
from evomerge.run import corner_of
from evomerge.search.asking import Asking
from evomerge.search.beginning import reference
from evomerge.search.blocks import blocks_of
from evomerge.search.book import Book, best_of
from evomerge.search.deviations import deviations
from evomerge.search.racing import climb, order_of
from evomerge.search.scoring import Model
from evomerge.search.tape import Tape

#: Stream of random numbers; others have their own.
_STREAM_HONEST = 4

#: How often spreads are computed anew, in generations: each time the estimator is fitted several times.
_CALIBRATE = 5

#: So many promoted candidates, the last ones, say whether errors are true.
_WATCHED = 8

#: The share of the items that may rest, because generations since the last fit were asked them.
_RESTING = 0.5


class Generations:
    """Asks and scores the candidates of a run, generation by generation, by the experiment's schedule.

    Everything that decides something is an event. The estimator is fitted only where an event has to be made, so a
    replay costs nothing.

    Args:
        experiment: what is run.
        tape: the ledger.
        book: the candidates.
        asking: who asks them.
    """

    def __init__(self, experiment: Experiment, tape: Tape, book: Book, asking: Asking) -> None:
        self._experiment = experiment
        self._schedule = experiment.schedule
        self._tape = tape
        self._book = book
        self._asking = asking
        self._blocks = blocks_of(experiment.tasks, "search")
        #: Asks the rest of all search items.
        self.everything = Shared(items=experiment.items("search"))
        self._fitted: list[Fitted] = []
        self._promoted: list[Promoted] = []
        self._model: tuple[int, Model] | None = None
        self._order: Items | None = None
        #: In steady state, so many of those that answered everything count until the next fit; None: all.
        self._rows: int | None = None

    # What a run does, step by step.

    def first(self, batch: Sequence[int]) -> list[Told]:
        """Ask the baselines and the genomes of a warm-up, and score them."""
        if isinstance(self._schedule, Fixed) and self._schedule.items is not None:
            self._fitted.append(self._tape.take(Fitted, lambda: self._make_fitted(0)))
        self._ask(self._new(batch), lambda: self._shared() if isinstance(self._schedule, Fixed) else self.everything)
        return [self.tell(i) for i in batch]

    def next(self, step: int, batch: Sequence[int]) -> tuple[list[Told], list[Told]]:
        """Ask and score a generation.

        Args:
            step: its number, from 0.
            batch: its candidates.

        Returns:
            What is told again of candidates of earlier generations, and what is told of this one's.
        """
        again = self.begin(step)
        asked = [*self._new(batch), *again]
        self._ask(asked, self.plan)
        if self.promotes(step):
            self._ask(self.promote(step, asked), lambda: self.everything)
        return [self.tell(i) for i in again], [self.tell(i) for i in batch]

    def begin(self, step: int, busy: Collection[int] = ()) -> list[int]:
        """Decide what is asked of a generation; return who of earlier ones is asked that too, none who is busy."""
        if isinstance(self._schedule, Fixed):
            return []
        self._rows = None
        event = self._tape.take(Fitted, lambda: self._make_fitted(step, busy))
        self._fitted.append(event)
        self._rows = event.rows if self._experiment.driver.steady else None
        return list(event.again)

    def plan(self) -> Schedule:
        """Return what the generation that was begun last is asked."""
        if not isinstance(self._schedule, Race):
            return self._shared()
        self._order = self._order or order_of(self._experiment, self._book, self._blocks)
        return climb(self._experiment, self._schedule, self._book, self._order, self.corner)

    def tell(self, number: int) -> Told:
        """Score a candidate."""
        event = self._tape.take(Told, lambda: self._make_told(number), number)
        self._book.told[number] = event
        return event

    def promotes(self, step: int) -> bool:
        """Tell whether some of the generation of this number are asked everything."""
        return isinstance(self._schedule, Warmup) and self._schedule.promotes(step)

    def promote(self, step: int, asked: Sequence[int]) -> tuple[int, ...]:
        """Choose some of a generation that are to be asked the rest of the items, and return them."""
        settings = self._schedule
        if not isinstance(settings, Warmup):
            return ()
        return self._promotion(lambda: self._chosen(asked, step, settings))

    def last(self) -> Sequence[int]:
        """Ask the best by estimate more items, and score them again; return of whom finalists are to be chosen."""
        book, settings = self._book, self._schedule
        self._rows = None
        if not isinstance(settings, Warmup):
            return book.merges
        if settings.final:
            final = self._promotion(lambda: book.best(book.open(book.merges), settings.final, self.corner))
            self._ask(final, lambda: self.everything)
            for number in final:
                self.tell(number)
        return self._close(settings)

    def _close(self, settings: Warmup) -> Sequence[int]:
        """Compare the best on items that no fit has chosen, and return them; all merges where that is left out."""
        if not settings.closing:
            return self._book.merges
        event = self._tape.take(Promoted, lambda: self._drawn(settings))
        self._ask(event.candidates, lambda: Shared(items=event.items))
        for number in event.candidates:
            make = partial(self._make_told, number, event.items)
            self._book.told[number] = self._tape.take(Told, make, number)
        return event.candidates

    def _drawn(self, settings: Warmup) -> Promoted:
        """Choose who is compared at the end, and on a balanced sample of each task's items."""
        self._order = self._order or order_of(self._experiment, self._book, self._blocks)
        chosen = sorted(self._book.best(self._book.merges, settings.closing, self.corner))
        items = {task: tuple(sorted(order[: settings.closing_items])) for task, order in self._order.items()}
        return Promoted(split="search", candidates=tuple(chosen), items=items)

    @property
    def corner(self) -> Losses:
        """The reference point of the hypervolume; it is known once the sources were scored."""
        sources = [e.candidate for e in self._book.asked if e.origin == "source"]
        found = [found for i in sources if (found := self._book.losses(i)) is not None]
        return corner_of(reference(self._experiment), found)

    # What the steps are made of.

    def _new(self, batch: Sequence[int]) -> list[int]:
        return [i for i in batch if self._book.asked[i].same_as is None]

    def _ask(self, candidates: Sequence[int], plan: Callable[[], Schedule]) -> None:
        self._asking.phase("search", plan, {i: self._book.recipes[i] for i in candidates})
        self._book.note_full(sorted(candidates))

    def _shared(self) -> Shared:
        return Shared(items=self._fitted[-1].items) if self._fitted else self.everything

    def _make_fitted(self, step: int, busy: Collection[int] = ()) -> Fitted:
        model, each = self._current(), self._each()
        shared = not isinstance(self._schedule, Race)
        spread = dict(self._fitted[-1].spread) if self._fitted else {}
        if not spread or step % _CALIBRATE == 0:
            spread = model.spread(each)
        again: list[int] = []
        if isinstance(self._schedule, Warmup):
            again = self._elites(self._schedule.elites, busy)
        return Fitted(
            step=step,
            items=model.choose(each, self._resting(each)) if shared else {},
            again=tuple(again),
            spread=spread,
            inflation=self._inflation(spread),
            rows=len(self._book.full),
            reason=model.reason,
        )

    def _each(self) -> int:
        """Return how many items of each task a candidate is asked, on average, before anything is known of it."""
        if isinstance(self._schedule, Race):
            return self._schedule.first
        return self._schedule.items or max(task.count("search") for task in self._experiment.tasks.values())

    def _current(self) -> Model:
        """Return the model of all that is known by now; fitted only when more is known than last time."""
        settings = self._schedule
        full = self._book.full[: self._rows] if not isinstance(settings, Fixed) else []
        if self._model is None or self._model[0] != len(full):
            rows = [self._book.answers[i] for i in full]
            sources = [self._book.answers[i] for i in self._book.sources] if full else []
            searched = [k for k, i in enumerate(full) if self._book.asked[i].origin == "search"]
            recent, share = (0, 0.0) if isinstance(settings, Fixed) else (settings.recent, settings.weight)
            model = Model(
                self._blocks,
                self._estimator(),
                rows,
                sources,
                recent=searched[max(0, len(searched) - recent) :],
                share=share,
                seed=self._experiment.file.seed,
                bank=self._experiment.bank,
            )
            self._model = len(full), model
            for text in model.warnings:
                self._tape.warn(text)
        return self._model[1]

    def _estimator(self) -> Estimator:
        everything = isinstance(self._schedule, Fixed) and self._schedule.items is None
        return Mean() if everything else self._experiment.estimator

    def _resting(self, each: int) -> Items:
        """Return the items that generations since the last fit were asked: the same fit would choose them again."""
        found: dict[str, set[int]] = {task: set() for task in self._experiment.tasks}
        most = {t: int(_RESTING * len(own)) - each for t, own in self.everything.items.items()}
        for event in reversed(self._fitted):
            grown = {task: found[task] | set(event.items.get(task, ())) for task in found}
            if event.rows != len(self._book.full) or any(len(grown[task]) > most[task] for task in grown):
                break
            found = grown
        return {task: tuple(sorted(own)) for task, own in found.items()}

    def _elites(self, count: int, busy: Collection[int]) -> list[int]:
        """Return the best of those of the front that have not answered everything, and are not busy."""
        front = [i for i in self._book.front_of(self._book.scored) if i not in busy] if count else []
        return sorted(self._book.best(self._book.open(front), count, self.corner))

    def _promotion(self, choose: Callable[[], Iterable[int]]) -> tuple[int, ...]:
        """Choose who is asked the rest of the items, with what is thought of them before."""

        def make() -> Promoted:
            chosen = tuple(sorted(choose()))
            return Promoted(split="search", candidates=chosen, estimates=tuple(self._guess(i) for i in chosen))

        event = self._tape.take(Promoted, make)
        self._promoted.append(event)
        return event.candidates

    def _guess(self, number: int) -> dict[str, tuple[float, ...]]:
        """Return what is thought of a candidate: by bounded task, the value and its raw error."""
        found = self._current().estimates(self._book.answers[number])
        return {task: (round(value, 6), round(error, 6)) for task, (value, error) in found.items()}

    def _chosen(self, asked: Sequence[int], step: int, settings: Warmup) -> list[int]:
        """Return the best of a generation by estimate, and some by chance."""
        pool = self._book.open(asked)
        found = {i: self._losses(i, self._score(i)) for i in pool}
        best = best_of(found, settings.promote, self.corner)
        others = [i for i in pool if i not in best]
        rng = np.random.default_rng([self._experiment.file.seed, _STREAM_HONEST, step])
        return best + [others[k] for k in rng.permutation(len(others))[: settings.honest]]

    def _inflation(self, spread: Mapping[str, float]) -> float:
        """Return by how much estimates of those promoted last were further off than their errors said; 1 if not."""
        found = monitor(deviations(self._promoted, self._book.answers, spread)[-_WATCHED:])
        if found.message and (not self._fitted or self._fitted[-1].inflation == 1.0):
            self._tape.warn(f"generation {len(self._fitted)}: {found.message}")
        return round(found.inflate, 4)

    # Telling.

    def _make_told(self, number: int, drawn: Items | None = None) -> Told:
        twin = self._book.asked[number].same_as
        if twin is not None:
            return replace(self._book.told[twin], candidate=number)
        if self._book.answers[number].error is not None:
            return Told(candidate=number, losses=None, scores={})
        found = self._score(number) if drawn is None or number in self._book.full else self._plain(number, drawn)
        return Told(candidate=number, losses=self._losses(number, found), scores=recorded(found))

    def _score(self, number: int) -> dict[str, Score]:
        last = self._fitted[-1] if self._fitted else None
        spreads = {} if last is None else {task: factor * last.inflation for task, factor in last.spread.items()}
        return self._current().scores(self._book.answers[number], spreads)

    def _plain(self, number: int, drawn: Items) -> dict[str, Score]:
        """Return the plain means of what a candidate answered of items that were drawn at random."""
        return Model(self._blocks, Mean()).scores(self._book.answers[number].only(drawn), {})

    def _losses(self, number: int, found: Mapping[str, Score]) -> Losses:
        values = {task: score.value for task, score in found.items()} | self._book.properties_of(number)
        return losses(self._experiment.objectives, values)


def recorded(found: Mapping[str, Score]) -> dict[str, tuple[float, ...]]:
    """Return scores as the ledger has them."""
    return {task: (score.value, score.error, float(score.items)) for task, score in found.items()}

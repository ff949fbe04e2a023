"""The search loop: proposes, asks, scores and tells, one ledger event at a time, and replays them to resume."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from evomerge.drivers import Driver, Problem
from evomerge.errors import EvomergeError
from evomerge.evaluation.task import SPLITS
from evomerge.experiment import Experiment
from evomerge.fitness.sampling import Mean
from evomerge.fitness.schedule import Shared
from evomerge.ledger import BASELINES, Asked, Finished, Ledger, Promoted, Rescored, Started, genome_of
from evomerge.objective import losses
from evomerge.pareto import front
from evomerge.pool import Pool
from evomerge.run import gains_of
from evomerge.search.asking import Asking
from evomerge.search.beginning import check_started, now, probes_of, started, warmup_of
from evomerge.search.blocks import blocks_of
from evomerge.search.book import Book
from evomerge.search.generation import Generations, recorded
from evomerge.search.scoring import Model
from evomerge.search.steady import SteadySearch
from evomerge.search.tape import Tape, Watch
from evomerge.spaces.edits import Prior, prior_of
from evomerge.spaces.proposals import Proposal


class Search:
    """One run of an experiment over a ledger and a pool.

    A run is a fixed sequence of events. Those that the ledger already has are taken from it
    (the genome and the answers always are), and only what is missing is computed; so a run
    that was killed at any moment goes on as if it had not been.

    Args:
        experiment: what to run.
        record: the open ledger.
        pool: who answers.
        watch: called with every event.
    """

    def __init__(
        self,
        experiment: Experiment,
        record: Ledger,
        pool: Pool,
        watch: Watch = lambda event, replayed: None,
    ) -> None:
        self._experiment = experiment
        self._tape = Tape(record, watch)
        splits = {split: experiment.items(split) for split in SPLITS}
        self._asking = Asking(self._tape, pool, splits, experiment.stacked)
        self._book = Book(experiment, self._tape, self._asking.found["search"])
        self._generations = Generations(experiment, self._tape, self._book, self._asking)
        self._prior: Prior | None = None

    def run(self) -> Finished:
        """Run, or go on, to the end.

        Raises:
            LedgerError: if the ledger belongs to another experiment.
            EvomergeError: if no candidate of the warm-up could be scored.
        """
        self._start()
        self._warm_up()
        self._search()
        found = self._finish(self._generations.last())
        finished = self._tape.take(Finished, lambda: Finished(front=found, time=now()))
        self._tape.sync()
        return finished

    # Steps, in the order in which they run.

    def _start(self) -> None:
        ours = started(self._experiment)
        if self._tape.first is not None:
            check_started(self._tape.first, ours)
        self._tape.take(Started, lambda: ours)

    def _warm_up(self) -> None:
        known, probes = self._experiment.proposals, probes_of(self._experiment)
        random = [] if probes else warmup_of(self._experiment)
        told = self._generations.first([self._book.ask(proposal).candidate for proposal in [*known, *probes, *random]])
        if all(event.losses is None for event in told):
            reason = next(own.error for own in self._book.answers.values() if own.error)
            raise EvomergeError(
                f"no model could be scored, not even the sources; the first reason: {reason}; "
                "mend that, remove the run's folder and start anew"
            )
        if probes:
            self._prior = prior_of(gains_of(self._experiment.objectives, self._book.asked, self._book.told))
            if more := warmup_of(self._experiment, self._prior):
                self._generations.first([self._book.ask(proposal).candidate for proposal in more])

    def _search(self) -> None:
        driver = self._experiment.driver.start(self._problem())
        if self._experiment.driver.steady:
            parts = self._tape, self._book, self._asking, self._generations
            SteadySearch(self._experiment, *parts, driver).run()
            return
        first = len(self._book.asked)
        step = 0
        while batch := self._proposed(driver, first):
            again, told = self._generations.next(step, [event.candidate for event in batch])
            for event in again:
                if event.candidate >= first:
                    driver.revise(event.candidate - first, event.losses, self._book.detail(event.candidate))
            for event in told:
                number = event.candidate
                genome, detail = genome_of(self._book.asked[number]), self._book.detail(number)
                driver.tell(number - first, genome, event.losses, detail)
            step += 1

    def _problem(self) -> Problem:
        """Return what the driver is asked to solve."""
        experiment, known = self._experiment, self._book.known
        return Problem(
            axes=experiment.space.axes,
            objectives=len(experiment.objectives),
            seed=experiment.file.seed,
            known=tuple((genome, found) for genome, found, _ in known),
            details=tuple(detail for _, _, detail in known),
            weights=tuple(objective.weight for objective in experiment.objectives),
            start=experiment.space.start,
            draw=partial(experiment.space.sample, prior=self._prior) if experiment.stacked else None,
            same=(lambda genome: experiment.space.decode(genome).digest) if experiment.stacked else None,
            reference=self._generations.corner,
        )

    def _proposed(self, driver: Driver, first: int) -> list[Asked]:
        """Ask the driver until it has no more for now, or the budget is spent."""
        experiment = self._experiment
        end = first + experiment.file.budget.candidates
        batch: list[Asked] = []
        while len(self._book.asked) < end and (genome := driver.ask()) is not None:
            recipe = experiment.space.decode(genome)
            batch.append(self._book.ask(Proposal(origin="search", label="", genome=genome, recipe=recipe)))
        done = len(self._book.asked)
        if not batch and done < end:
            self._tape.warn(f"the driver has nothing more to propose after {done - first} candidates")
        return batch

    def _finish(self, rivals: Sequence[int]) -> tuple[int, ...]:
        """Re-score the best of these candidates on held-out items and return the front, by the validation split."""
        asked, book = self._book.asked, self._book
        known = [event.candidate for event in asked if event.origin in BASELINES]
        finalists = self._experiment.file.finalists
        validated = self._rescore(
            "validation", lambda: [*known, *sorted(book.best(rivals, finalists, self._generations.corner))]
        )
        good = {i: event.losses for i, event in validated.items() if event.losses is not None}
        if not good:
            return ()
        chosen = [i for i, best in zip(good, front(np.array(list(good.values()))), strict=True) if best]
        shown = [i for i in known if asked[i].origin != "arithmetic"] + self._tuned()
        tested = self._rescore("test", lambda: sorted({*chosen, *shown}))
        return tuple(i for i in chosen if tested[i].losses is not None)

    # What the steps are made of.

    def _rescore(self, split: str, choose: Callable[[], Iterable[int]]) -> dict[int, Rescored]:
        """Ask candidates all items of a held-out split."""
        promoted = self._tape.take(Promoted, lambda: Promoted(split=split, candidates=tuple(choose())))
        everything = Shared(items=self._experiment.items(split))
        self._asking.phase(split, lambda: everything, {i: self._book.recipes[i] for i in promoted.candidates})
        model = Model(blocks_of(self._experiment.tasks, split), Mean())
        return {i: self._rescored(split, i, model) for i in promoted.candidates}

    def _rescored(self, split: str, number: int, model: Model) -> Rescored:
        def make() -> Rescored:
            own = self._asking.found[split][number]
            if own.error is not None:
                return Rescored(candidate=number, split=split, losses=None, scores={})
            scores = model.scores(own, {})
            values = {task: score.value for task, score in scores.items()} | self._book.properties_of(number)
            amount = losses(self._experiment.objectives, values)
            return Rescored(candidate=number, split=split, losses=amount, scores=recorded(scores))

        return self._tape.take(Rescored, make, number)

    def _tuned(self) -> list[int]:
        """Return the best single-lambda task arithmetic by the weighted sum of its search scores."""
        weights = [objective.weight for objective in self._experiment.objectives]
        totals = {
            event.candidate: sum(w * loss for w, loss in zip(weights, found, strict=True))
            for event in self._book.asked
            if event.origin == "arithmetic" and (found := self._book.losses(event.candidate)) is not None
        }
        return [min(totals, key=lambda number: totals[number])] if totals else []

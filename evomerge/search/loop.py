"""The search loop: proposes, asks, scores and tells, one ledger event at a time, and replays them to resume."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from evomerge.drivers import Problem
from evomerge.errors import EvomergeError, LedgerError
from evomerge.experiment import Experiment
from evomerge.fitness.bank import ItemBank, fit_bank
from evomerge.fitness.estimators import Estimator, Mean, PIrt
from evomerge.fitness.schedule import Fixed, Items, Warmup
from evomerge.genome import Genome
from evomerge.ledger import (
    BASELINES,
    Answered,
    Asked,
    Event,
    Finished,
    Fitted,
    Ledger,
    Promoted,
    Rescored,
    Told,
    Warned,
    genome_of,
)
from evomerge.objective import Losses, Score, losses
from evomerge.pareto import front, spread
from evomerge.pool import Answer, Job, Pool
from evomerge.recipe import Recipe, depths_of
from evomerge.search.beginning import baselines_of, check_started, now, properties, reference, started, warmup_of
from evomerge.spaces.proposals import Proposal, recipe_of
from evomerge.value import plain

#: Called with every event, and whether it was replayed from the ledger.
Watch = Callable[[Event, bool], None]

#: Streams of random numbers; drivers have their own.
_STREAM_ITEMS, _STREAM_BANK = 2, 3

E = TypeVar("E", bound=Event)


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
        self._record = record
        self._pool = pool
        self._watch = watch
        self._past = deque(event for event in record.past if not isinstance(event, Warned))
        self._warnings: list[str] = []
        self._asked: list[Asked] = []
        self._recipes: list[Recipe] = []
        self._told: dict[int, Told] = {}
        self._first_of: dict[str, int] = {}
        self._properties: dict[tuple[int, ...], dict[str, float]] = {}
        full = experiment.items("search")
        self._schedule: Fixed | Warmup = Fixed(items=full)
        self._estimators: Mapping[str, Estimator] = {task: Mean(total=len(full[task])) for task in full}

    def run(self) -> Finished:
        """Run, or go on, to the end.

        Raises:
            LedgerError: if the ledger belongs to another experiment.
            EvomergeError: if no candidate of the warm-up could be scored.
        """
        self._start()
        self._warm_up()
        self._search()
        found = self._finish()
        return self._emit(Finished(front=found, time=now()))

    # Steps, in the order in which they run.

    def _start(self) -> None:
        ours = started(self._experiment)
        if self._past:
            check_started(self._past[0], ours)
        self._emit(ours)

    def _warm_up(self) -> None:
        experiment = self._experiment
        proposals = baselines_of(experiment) + warmup_of(experiment)
        if experiment.file.estimator.name == "mean" and experiment.file.estimator.items is not None:
            self._schedule = Fixed(items=_sample(experiment, experiment.file.estimator.items))
        batch = [self._ask(proposal) for proposal in proposals]
        told, answers = self._score_batch(batch)
        if all(event.losses is None for event in told):
            reason = next(answer.error for answer in answers.values() if answer.error)
            raise EvomergeError(
                f"no model could be scored, not even the sources; the first reason: {reason}; "
                "mend that, remove the run's folder and start anew"
            )
        if experiment.file.estimator.name == "p_irt":
            self._fit(answers, rows=len(batch))

    def _fit(self, answers: Mapping[int, Answered], rows: int) -> None:
        """Fit one item bank per task on the candidates that answered everything, and ask few items from now on."""
        experiment = self._experiment
        good = [answers[i] for i in sorted(answers) if answers[i].error is None]
        banks = {}
        if not self._past:
            for t, task in enumerate(experiment.tasks):
                matrix = np.array([answer.responses[task] for answer in good], dtype=np.float64)
                seed = int(np.random.SeedSequence([experiment.file.seed, _STREAM_BANK, t]).generate_state(1)[0])
                banks[task] = fit_bank(matrix, experiment.file.estimator.anchors, seed).to_plain()
        fitted = self._emit(Fitted(banks=banks))
        found = {task: ItemBank.from_plain(form) for task, form in fitted.banks.items()}
        self._estimators = {task: PIrt(bank) for task, bank in found.items()}
        anchors = {task: tuple(bank.anchors) for task, bank in found.items()}
        self._schedule = Warmup(rows=rows, full=experiment.items("search"), anchors=anchors)

    def _search(self) -> None:
        experiment = self._experiment
        driver = experiment.driver.start(
            Problem(
                axes=experiment.space.axes,
                objectives=len(experiment.objectives),
                seed=experiment.file.seed,
                known=tuple(self._known()),
                weights=tuple(objective.weight for objective in experiment.objectives),
            )
        )
        first = len(self._asked)
        end = first + experiment.file.budget.candidates
        while len(self._asked) < end:
            batch: list[Asked] = []
            while len(self._asked) < end and (genome := driver.ask()) is not None:
                recipe = experiment.space.decode(genome)
                batch.append(self._ask(Proposal(origin="search", label="", genome=genome, recipe=recipe)))
            if not batch:
                self._warn(f"the driver has nothing more to propose after {len(self._asked) - first} candidates")
                break
            for told in self._score_batch(batch)[0]:
                driver.tell(told.candidate - first, genome_of(self._asked[told.candidate]), told.losses)

    def _finish(self) -> tuple[int, ...]:
        """Re-score the finalists on held-out items and return the front, by the validation split."""
        rivals = [event.candidate for event in self._asked if event.origin in BASELINES]
        validated = self._rescore("validation", [*rivals, *self._finalists()])
        good = {i: event.losses for i, event in validated.items() if event.losses is not None}
        if not good:
            return ()
        chosen = [i for i, best in zip(good, front(np.array(list(good.values()))), strict=True) if best]
        shown = [i for i in rivals if self._asked[i].origin != "arithmetic"] + self._tuned()
        tested = self._rescore("test", sorted({*chosen, *shown}))
        return tuple(i for i in chosen if tested[i].losses is not None)

    # What the steps are made of.

    def _ask(self, proposal: Proposal) -> Asked:
        """Give a proposal the next number; a candidate's genome is always taken from the ledger, if it is there."""
        number = len(self._asked)
        event = self._emit(
            Asked(
                candidate=number,
                origin=proposal.origin,
                label=proposal.label,
                genome=proposal.genome,
                recipe=proposal.recipe.digest,
                same_as=self._first_of.get(proposal.recipe.digest),
            )
        )
        recipe = proposal.recipe
        if event.recipe != recipe.digest:
            self._warn(f"candidate {number} was proposed differently than in the ledger; the ledger's genome is used")
            recipe = recipe_of(baselines_of(self._experiment), self._experiment.space, event)
        self._first_of.setdefault(event.recipe, number)
        self._asked.append(event)
        self._recipes.append(recipe)
        return event

    def _score_batch(self, batch: Sequence[Asked]) -> tuple[list[Told], dict[int, Answered]]:
        """Ask the pool what the schedule wants of each candidate; score and tell them in order."""
        new = [event.candidate for event in batch if event.same_as is None]
        answers = self._collect("search", {i: self._schedule.next(i, answered=False) or {} for i in new})
        return [self._tell(event, answers) for event in batch], answers

    def _tell(self, asked: Asked, answers: Mapping[int, Answered]) -> Told:
        number = asked.candidate
        if asked.same_as is not None:
            twin = self._told[asked.same_as]
            event = self._emit(Told(candidate=number, losses=twin.losses, scores=twin.scores))
        else:
            found, scores = self._values(number, answers[number], self._estimators)
            event = self._emit(Told(candidate=number, losses=found, scores=scores))
        self._told[number] = event
        return event

    def _values(
        self, number: int, answer: Answered, estimators: Mapping[str, Estimator]
    ) -> tuple[Losses | None, dict[str, tuple[float, ...]]]:
        """Return losses and scores of an answer; None and nothing for a failure."""
        if answer.error is not None:
            return None, {}
        everything = self._experiment.items(answer.split)
        scores: dict[str, Score] = {
            task: estimators[task].score(answer.items.get(task, everything[task]), responses)
            for task, responses in answer.responses.items()
        }
        values = {task: score.value for task, score in scores.items()} | self._properties_of(number)
        return losses(self._experiment.objectives, values), {
            task: (score.value, score.error, float(score.items)) for task, score in scores.items()
        }

    def _properties_of(self, number: int) -> dict[str, float]:
        if all(objective.kind == "task" for objective in self._experiment.objectives):
            return {}
        recipe = self._recipes[number]
        depths = tuple(depths_of(recipe, recipe.sources[0].name))
        if depths not in self._properties:
            self._properties[depths] = properties(self._experiment, self._recipes[number])
        return self._properties[depths]

    def _rescore(self, split: str, candidates: Iterable[int]) -> dict[int, Rescored]:
        """Ask candidates all items of a held-out split."""
        promoted = self._emit(Promoted(split=split, candidates=tuple(candidates)))
        items = self._experiment.items(split)
        answers = self._collect(split, dict.fromkeys(promoted.candidates, items))
        estimators = {task: Mean(total=len(items[task])) for task in items}
        found = {}
        for number in promoted.candidates:
            amount, scores = self._values(number, answers[number], estimators)
            found[number] = self._emit(Rescored(candidate=number, split=split, losses=amount, scores=scores))
        return found

    def _collect(self, split: str, wanted: Mapping[int, Items]) -> dict[int, Answered]:
        """Return the answers of candidates: those of the ledger, and the pool's for all others."""
        found: dict[int, Answered] = {}
        while self._past and isinstance(self._past[0], Answered):
            event = self._emit(self._past[0])
            if event.candidate not in wanted or event.split != split:
                raise LedgerError(f"the ledger has an answer of candidate {event.candidate} that was not asked for")
            found[event.candidate] = event
        everything = self._experiment.items(split)
        missing = [number for number in wanted if number not in found]
        for number in missing:
            items = dict(wanted[number])
            self._pool.submit(Job(candidate=number, recipe=self._recipes[number], split=split, items=items))
        for _ in missing:
            answer = self._pool.wait()
            asked = wanted[answer.candidate]
            items = {task: places for task, places in asked.items() if places != everything[task]}
            found[answer.candidate] = self._emit(_answered(answer, items))
        return found

    def _known(self) -> Iterable[tuple[Genome, Losses]]:
        for event in self._asked:
            found = self._told[event.candidate].losses
            if event.genome is not None and found is not None and event.same_as is None:
                yield event.genome, found

    def _finalists(self) -> list[int]:
        """Return those that dominate the greatest volume together, by the search's own estimates."""
        scored = [
            (event.candidate, found)
            for event in self._asked
            if event.origin not in BASELINES
            and event.same_as is None
            and (found := self._told[event.candidate].losses) is not None
        ]
        if not scored:
            return []
        matrix = np.array([found for _, found in scored])
        best = spread(matrix, reference(self._experiment), self._experiment.file.finalists)
        return sorted(scored[i][0] for i in best)

    def _tuned(self) -> list[int]:
        """Return the best single-lambda task arithmetic by the weighted sum of its search scores."""
        weights = [objective.weight for objective in self._experiment.objectives]
        totals = {
            event.candidate: sum(w * loss for w, loss in zip(weights, found, strict=True))
            for event in self._asked
            if event.origin == "arithmetic" and (found := self._told[event.candidate].losses) is not None
        }
        return [min(totals, key=lambda number: totals[number])] if totals else []

    def _emit(self, event: E) -> E:
        """Return the ledger's own event at this place; past its end, append ours."""
        if not self._past:
            self._flush_warnings()
            self._record.append(event)
            self._watch(event, False)
            return event
        recorded = self._past.popleft()
        if not isinstance(recorded, type(event)) or getattr(recorded, "candidate", 0) != getattr(event, "candidate", 0):
            raise LedgerError(
                f"the ledger has {type(recorded).__name__.lower()} where this run comes to {_brief(event)}; "
                "it was written by another version or has been edited: start the run anew"
            )
        self._watch(recorded, True)
        return recorded

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        if not self._past:
            self._flush_warnings()

    def _flush_warnings(self) -> None:
        if not self._warnings:
            return
        warned = {event.text for event in self._record.past if isinstance(event, Warned)}
        for text in self._warnings:
            if text not in warned:
                self._record.append(Warned(text=text))
                self._watch(Warned(text=text), False)
        self._warnings.clear()


def _sample(experiment: Experiment, count: int) -> dict[str, tuple[int, ...]]:
    """Return a random subset of each task's search items, the same for every candidate."""
    found = {}
    for t, (task, places) in enumerate(experiment.items("search").items()):
        rng = np.random.default_rng([experiment.file.seed, _STREAM_ITEMS, t])
        found[task] = tuple(sorted(int(i) for i in rng.permutation(len(places))[:count]))
    return found


def _answered(answer: Answer, items: Mapping[str, tuple[int, ...]]) -> Answered:
    return Answered(
        candidate=answer.candidate,
        split=answer.split,
        items=items,
        responses=answer.responses or {},
        margins={task: tuple(round(margin, 4) for margin in own) for task, own in answer.margins.items()},
        error=answer.error,
        seconds=round(answer.seconds, 4),
    )


def _brief(event: Event) -> str:
    form = plain(event)
    number = f" of candidate {form['candidate']}" if "candidate" in form else ""
    return f"{type(event).__name__.lower()}{number}"

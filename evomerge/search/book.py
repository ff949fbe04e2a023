"""The candidates of a run: their recipes, what they answered and what was told of them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from evomerge.drivers import Detail
from evomerge.experiment import Experiment
from evomerge.genome import Genome
from evomerge.ledger import BASELINES, Asked, Told
from evomerge.objective import Losses
from evomerge.pareto import front, spread
from evomerge.recipe import Recipe
from evomerge.search.asking import Answers
from evomerge.search.beginning import properties
from evomerge.search.tape import Tape
from evomerge.spaces.proposals import Proposal, recipe_of


class Book:
    """All candidates of a run, by number.

    Args:
        experiment: what is run.
        tape: the ledger.
        answers: what every candidate answered of the search split; others fill it.
    """

    def __init__(self, experiment: Experiment, tape: Tape, answers: dict[int, Answers]) -> None:
        self._experiment = experiment
        self._tape = tape
        self.answers = answers
        self.asked: list[Asked] = []
        self.recipes: list[Recipe] = []
        self.told: dict[int, Told] = {}
        #: Those that answered all search items, in the order in which that became known.
        self.full: list[int] = []
        self._full: set[int] = set()
        self._first_of: dict[str, int] = {}
        self._properties: dict[int, dict[str, float]] = {}

    def ask(self, proposal: Proposal) -> Asked:
        """Give a proposal the next number; a candidate's genome is always taken from the ledger, if it is there."""
        number, digest = len(self.asked), proposal.recipe.digest
        event = self._tape.take(
            Asked,
            lambda: Asked(
                candidate=number,
                origin=proposal.origin,
                label=proposal.label,
                genome=proposal.genome,
                recipe=digest,
                same_as=self._first_of.get(digest),
            ),
            number,
        )
        recipe = proposal.recipe
        if event.recipe != digest:
            self._tape.warn(
                f"candidate {number} was proposed differently than in the ledger; the ledger's genome is used"
            )
            recipe = recipe_of(self._experiment.proposals, self._experiment.space, event)
        self._first_of.setdefault(event.recipe, number)
        self.asked.append(event)
        self.recipes.append(recipe)
        return event

    def note_full(self, candidates: Iterable[int]) -> None:
        """Remember which of these have answered everything by now."""
        everything = self._experiment.items("search")
        new = [i for i in candidates if i not in self._full and self.answers[i].complete(everything)]
        self.full += new
        self._full.update(new)

    def open(self, candidates: Iterable[int]) -> list[int]:
        """Return those that did not fail and have not answered everything."""
        return [i for i in candidates if i not in self._full and self.answers[i].error is None]

    @property
    def sources(self) -> list[int]:
        """Base and sources as they are, of those that answered everything."""
        return [i for i in self.full if self.asked[i].origin == "source"]

    @property
    def known(self) -> list[tuple[Genome, Losses, Detail]]:
        """Genomes, losses and details of all that was scored and is new, for a driver to start from."""
        return [
            (event.genome, found, self.detail(event.candidate))
            for event in self.asked
            if event.genome is not None and event.same_as is None and (found := self.losses(event.candidate))
        ]

    def detail(self, number: int) -> Detail:
        """Return what a driver may want to know of a candidate that was told, beside its losses."""
        scores, twin = self.told[number].scores, self.asked[number].same_as
        own = self.answers.get(number if twin is None else twin)
        return Detail(
            errors=tuple(scores[o.name][1] if o.name in scores else 0.0 for o in self._experiment.objectives),
            responses={} if own is None else {task: dict(found) for task, found in own.values.items()},
        )

    def losses(self, number: int) -> Losses | None:
        """Return what was told of a candidate last; None for a failure."""
        return self.told[number].losses if number in self.told else None

    def best(self, candidates: Sequence[int], count: int, corner: Sequence[float]) -> list[int]:
        """Return those that dominate the greatest volume together by what was told of them, failures left out.

        Args:
            candidates: whom to choose from.
            count: at most so many.
            corner: the reference point.
        """
        return best_of({i: self.losses(i) for i in candidates}, count, corner)

    def front_of(self, candidates: Sequence[int]) -> list[int]:
        """Return those that none of the others dominates by what was told of them, failures left out."""
        good = {i: found for i in candidates if (found := self.losses(i)) is not None}
        mask = front(np.array(list(good.values())))
        return [i for i, best in zip(good, mask, strict=True) if best]

    @property
    def scored(self) -> list[int]:
        """Everybody with a recipe of its own of whom something was told, failures too."""
        return [e.candidate for e in self.asked if e.same_as is None and e.candidate in self.told]

    @property
    def merges(self) -> list[int]:
        """Those of the scored that are no baselines."""
        return [i for i in self.scored if self.asked[i].origin not in BASELINES]

    def properties_of(self, number: int) -> dict[str, float]:
        """Return the properties of a candidate, if any is an objective."""
        if all(objective.kind == "task" for objective in self._experiment.objectives):
            return {}
        if number not in self._properties:
            self._properties[number] = properties(self._experiment, self.recipes[number])
        return self._properties[number]


def best_of(losses: Mapping[int, Losses | None], count: int, corner: Sequence[float]) -> list[int]:
    """Return those that dominate the greatest volume together, the best first; None is a failure."""
    good = [(i, found) for i, found in losses.items() if found is not None]
    return [good[i][0] for i in spread(np.array([found for _, found in good]), corner, count)] if good else []

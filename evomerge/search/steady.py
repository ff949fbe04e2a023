"""The search in steady state: no worker waits for a generation, and the recorded order of events is what replays."""

from collections import deque

from evomerge.drivers import Driver
from evomerge.experiment import Experiment
from evomerge.fitness.schedule import Schedule, Shared
from evomerge.ledger import Answered, Asked, Told, genome_of
from evomerge.search.asking import Answers, Asking
from evomerge.search.book import Book
from evomerge.search.generation import Generations
from evomerge.search.tape import Tape
from evomerge.spaces.proposals import Proposal


class SteadySearch:
    """Asks the driver whenever a worker is free, and tells it of each candidate as soon as its score is final.

    Candidates are counted off in chapters, as many as the driver may have in flight. What a generation is to a search
    in batches, a chapter is here: with its first candidate the estimator is fitted and says what is asked of it, and
    when its last is told, some of it are promoted. They go on beside the chapters that follow.

    What happens next is a function of what was recorded, but for two things: which answer comes next, and how many are
    asked before it. Both are what the ledger keeps.

    Args:
        experiment: what is run.
        tape: the ledger.
        book: the candidates.
        asking: who asks them.
        generations: what decides about a chapter.
        driver: who proposes.
    """

    def __init__(
        self, experiment: Experiment, tape: Tape, book: Book, asking: Asking, generations: Generations, driver: Driver
    ) -> None:
        self._experiment = experiment
        self._tape = tape
        self._book = book
        self._asking = asking
        self._generations = generations
        self._driver = driver
        self._first = len(book.asked)
        self._size = experiment.driver.generation(len(experiment.space.axes))
        self._plan: Schedule = Shared(items={})
        #: What is still wanted of those that are being asked.
        self._open: dict[int, Schedule] = {}
        self._waiting: deque[int] = deque()  # of these, the ones with no job
        self._ready: deque[int] = deque()  # those whose score is final, and not told yet
        self._twins: dict[int, list[int]] = {}  # those with the recipe of one that is not told yet
        self._chapters: dict[int, list[int]] = {}
        self._untold: dict[int, set[int]] = {}
    def run(self) -> None:
        """Search until the budget is spent and everybody is told."""
        while True:
            self._settle()
            if not self._tape.ended:
                if not self._follow():
                    break
                continue
            self._fill()
            if not self._asking.flying:
                break
            for number in self._asking.receive():
                self._heard(number)
                self._settle()
        done = len(self._book.asked) - self._first
        if done < self._experiment.file.budget.candidates:
            self._tape.warn(f"the driver has nothing more to propose after {done} candidates")

    # What happens next: as it was recorded, or as workers are free.

    def _follow(self) -> bool:
        """Do what the ledger has next; tell whether that is part of the search."""
        event = self._tape.first
        if isinstance(event, Answered) and event.split == "search":
            self._asking.recorded("search", self._waiting, 1)
            self._waiting.remove(event.candidate)
            self._heard(event.candidate)
            return True
        return self._propose()

    def _fill(self) -> None:
        """Ask those who wait, and new ones, as long as a worker is free."""
        while self._asking.room:
            while self._waiting and self._asking.room:
                number = self._waiting.popleft()
                items = self._asking.wanted("search", number, self._open[number])
                if items is not None:
                    self._asking.submit("search", number, self._book.recipes[number], items)
            if not self._asking.room or not self._propose():
                return
            self._settle()

    def _propose(self) -> bool:
        """Have the driver propose a candidate, if it will and the budget has room; tell whether it did."""
        position = len(self._book.asked) - self._first
        genome = self._driver.ask() if position < self._experiment.file.budget.candidates else None
        if genome is None:
            return False
        step = position // self._size
        if position % self._size == 0:
            self._begin(step)
        recipe = self._experiment.space.decode(genome)
        event = self._book.ask(Proposal(origin="search", label="", genome=genome, recipe=recipe))
        self._chapters[step].append(event.candidate)
        self._untold[step].add(event.candidate)
        if event.same_as is None:
            self._ask(event.candidate, self._plan)
        elif event.same_as in self._book.told:
            self._ready.append(event.candidate)
        else:
            self._twins.setdefault(event.same_as, []).append(event.candidate)
        return True

    def _begin(self, step: int) -> None:
        again = self._generations.begin(step, self._open)
        self._plan = self._generations.plan()
        self._chapters[step], self._untold[step] = list(again), set(again)
        for number in again:
            self._ask(number, self._plan)

    def _ask(self, number: int, plan: Schedule) -> None:
        self._asking.found["search"].setdefault(number, Answers())
        self._open[number] = plan
        if not self._final(number):
            self._waiting.append(number)

    def _heard(self, number: int) -> None:
        if not self._final(number):
            self._waiting.appendleft(number)  # next in turn: its worker still holds the model

    def _final(self, number: int) -> bool:
        """Find out whether a candidate can be told, because nothing more is asked of it."""
        if self._asking.wanted("search", number, self._open[number]) is not None:
            return False
        del self._open[number]
        self._book.note_full([number])
        self._ready.append(number)
        return True

    # Telling.

    def _settle(self) -> None:
        while self._ready:
            self._tell(self._ready.popleft())

    def _tell(self, number: int) -> None:
        again = number in self._book.told
        event = self._generations.tell(number)
        if number >= self._first:
            self._inform(self._book.asked[number], event, again)
        self._ready.extend(self._twins.pop(number, ()))
        for step in [step for step, own in self._untold.items() if number in own]:
            self._untold[step].discard(number)
            if self._complete(step):
                self._close(step)

    def _inform(self, asked: Asked, told: Told, again: bool) -> None:
        """Tell the driver, or tell it again."""
        detail = self._book.detail(asked.candidate)
        index = asked.candidate - self._first
        if again:
            self._driver.revise(index, told.losses, detail)
        else:
            self._driver.tell(index, genome_of(asked), told.losses, detail)

    def _complete(self, step: int) -> bool:
        """Tell whether everybody of a chapter was proposed and told."""
        end = min((step + 1) * self._size, self._experiment.file.budget.candidates)
        return not self._untold[step] and len(self._book.asked) - self._first >= end

    def _close(self, step: int) -> None:
        """End a chapter: some of it are asked the rest."""
        del self._untold[step]
        asked = [i for i in self._chapters.pop(step) if self._book.asked[i].same_as is None and i not in self._open]
        if self._generations.promotes(step):
            for number in self._generations.promote(step, asked):
                self._ask(number, self._generations.everything)


"""Gates: what is asked of a candidate before its first item, so that none is spent on a model that is broken."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import Task
from evomerge.value import value

if TYPE_CHECKING:
    from evomerge.evaluation.engine import Engine

#: How many prompts a gate asks, and how much of a prompt's text is read.
PROMPTS, CHARACTERS = 4, 400

#: The longest cycle of tokens that is taken for endless repetition, and the share of the answer that it must fill.
CYCLE, FILLED = 4, 0.75

#: Tokens of the answers whose language is told, and the share of them that must be in it.
ANSWER, SHARE = 64, 0.5

#: How far log-likelihoods by token may be apart, relative to their size, and still count as equal.
_ALIKE = 1e-6


@value
class Gates:
    """What a candidate must pass.

    Attributes:
        finite: whether all weights must be finite, and the log-likelihoods of a few prompts finite and not all equal.
        repetition: how many tokens greedy answers must have before they may count as endless repetition; a candidate
            all of whose answers are fails. 0: nothing is asked.
        language: an ISO 639-1 code: most of the answers' text must be in this language. Empty: in any.

    Raises:
        TaskError: if `repetition` is too small for a cycle to be seen.
    """

    finite: bool = True
    repetition: int = 24
    language: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not tell a cycle from an answer."""
        if self.repetition != 0 and self.repetition < 4 * CYCLE:
            raise TaskError(f"repetition must be 0 or at least {4 * CYCLE} tokens, got {self.repetition}")


def pass_gates(
    engine: "Engine", gates: Gates, tasks: Mapping[str, Task], excused: Mapping[str, str] | None = None
) -> None:
    """Refuse a live model that does not pass.

    Args:
        engine: the live model.
        gates: what it must pass.
        tasks: where prompts are taken from: the first items of the search split.
        excused: gates that are left open, by name; see `failures`.

    Raises:
        CandidateError: beginning with `gate: `.
    """
    for name, reason in failures(engine, gates, tasks).items():
        if name not in (excused or {}):
            raise CandidateError(f"gate: {reason}")


def failures(engine: "Engine", gates: Gates, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return which gates the live model does not pass, and why not: `finite`, `equal`, `repetition`, `language`."""
    if gates.finite and not engine.finite:
        return {"finite": "weights are not finite"}
    try:
        return {
            **(_likelihoods(engine, tasks) if gates.finite else {}),
            **(_answers(engine, gates, tasks) if gates.repetition or gates.language else {}),
        }
    except CandidateError as problem:
        return {"finite": str(problem)}


def prompts_of(engine: "Engine", gates: Gates, tasks: Mapping[str, Task]) -> list[Request]:
    """Return the requests that the gates ask of a candidate."""
    read = list(itertools.islice(_texts(tasks), PROMPTS)) if gates.finite else []
    if not (gates.repetition or gates.language):
        return read
    return read + list(itertools.islice(_questions(tasks, _most(engine, gates)), PROMPTS))


def repeats(ids: Sequence[int]) -> bool:
    """Tell whether a cycle of at most `CYCLE` tokens fills the last `FILLED` of an answer.

    >>> repeats([9, 8, 7, 6] + [1, 2, 3] * 4)
    True
    """
    end = ids[round(len(ids) * (1 - FILLED)) :]
    return any(
        len(end) > size and all(one == two for one, two in zip(end, end[size:], strict=False))
        for size in range(1, CYCLE + 1)
    )


def _likelihoods(engine: "Engine", tasks: Mapping[str, Task]) -> dict[str, str]:
    """Read a few prompts; the engine itself refuses what is not finite."""
    found = _ask(engine, "likelihoods", tasks, _texts)
    by_token = [outcome.loglikelihood / outcome.tokens for outcome in found]
    if len(by_token) > 1 and max(by_token) - min(by_token) <= _ALIKE * abs(min(by_token)):
        return {"equal": f"the log-likelihoods of {len(by_token)} prompts are all equal"}
    return {}


def _answers(engine: "Engine", gates: Gates, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Let the model answer a few prompts of a task that wants answers; without one there is nothing to say."""
    most = _most(engine, gates)
    found = _ask(engine, f"answers of {most}", tasks, lambda given: _questions(given, most))
    failed = {}
    endless = [gates.repetition and answer.tokens >= gates.repetition and repeats(_tokens(answer)) for answer in found]
    if found and all(endless):
        failed["repetition"] = f"all {len(found)} answers to prompts are endless repetition, like {found[0].text!r:.60}"
    if found and gates.language:
        failed |= _language(gates.language, "\n".join(answer.text for answer in found))
    return failed


def _most(engine: "Engine", gates: Gates) -> int:
    """Return how long the answers are that gates want; a prompt needs room too, if the model has little of it."""
    return min(max(gates.repetition, ANSWER if gates.language else 0), engine.window // 2)


def _language(code: str, text: str) -> dict[str, str]:
    from evomerge.evaluation.items import Item
    from evomerge.evaluation.language import PIECE, find_language

    if sum(map(str.isalpha, text)) < PIECE:
        return {}  # too little to tell
    share = find_language(code).grade(text, Item(id="gate", prompt="", answers=()))
    return {"language": f"only {share:.0%} of the answers is in the language {code!r}"} if share < SHARE else {}


def _ask(
    engine: "Engine", kind: str, tasks: Mapping[str, Task], make: Callable[[Mapping[str, Task]], Iterator[Request]]
) -> list[Outcome]:
    key = ("gate", kind, *(task.fingerprint for task in tasks.values()))
    plan, _ = engine.kept(key, lambda: [(request,) for request in itertools.islice(make(tasks), PROMPTS)])
    return engine.answer(plan)


def _texts(tasks: Mapping[str, Task]) -> Iterator[Request]:
    """Yield a request to read the beginning of each of the first items' texts that differ."""
    texts = (request.context + request.continuation for _, request in _requests(tasks))
    for text in dict.fromkeys(text[:CHARACTERS] for text in texts if text.strip()):
        yield Request(kind="rolling", continuation=text, cut=True)


def _questions(tasks: Mapping[str, Task], most: int) -> Iterator[Request]:
    """Yield requests to go on from the prompts of the first task that wants answers, with its stop texts."""
    first = ""
    for name, request in _requests(tasks):
        if request.kind == "generate" and first in ("", name):
            first = name
            yield Request(kind="generate", context=request.context, stop=request.stop, most=most, top=1, cut=True)


def _requests(tasks: Mapping[str, Task]) -> Iterator[tuple[str, Request]]:
    """Yield what is asked of the first items of each task's search split; of each item only the first request."""
    for name, task in tasks.items():
        for place in range(min(PROMPTS, task.count("search"))):
            yield from ((name, request) for request in task.requests("search", place)[:1])


def _tokens(answer: Outcome) -> tuple[int, ...]:
    """Return the tokens of a greedy answer: the likeliest of each step."""
    return tuple(ids[0] for ids in answer.ids[: answer.tokens])

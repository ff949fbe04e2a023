"""Measures with labels: answers that are generated or chosen, compared with the right ones."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.graders import Exact, Grader, chosen, read_grader
from evomerge.evaluation.items import SHARES, Form, Item, read_items
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.rows import Hub
from evomerge.evaluation.task import Response
from evomerge.value import Plain, parse, value

#: How a task asks: free text by greedy decoding, or the likeliest of given choices.
KINDS = ("generate", "multiple_choice")

#: How choices are compared: by log-likelihood, or by log-likelihood over length in characters.
CHOICES = ("choice", "choice_by_length")


@value
class TaskFile:
    """What a task file with labels says.

    Attributes:
        kind: `generate` or `multiple_choice`.
        data: a file of rows beside the task file (`.jsonl`, or what `datasets` reads: `.json`, `.csv`,
            `.parquet`), or a data set of the hub.
        prompt: a template over the fields of a row; braces that are text are doubled.
        answer: the field with the answer, or with the list of acceptable answers; for multiple choice it holds the
            text of the right choice. Graders that compare with nothing do without.
        preamble: a text that stands before every prompt, as it is: worked examples, a system prompt.
        choices: the field with the list of choices.
        split: the field that names each row's split, or the share of each split.
        stratum: the field that names each row's subtask or language.
        max_new_tokens: the longest generated answer, in tokens.
        stop: texts that end a generated answer; the end-of-sequence token always does.
        grade: a grader, see `read_grader`; for multiple choice one of `CHOICES`.
    """

    kind: str
    data: str | Hub
    prompt: str
    answer: str | None = None
    preamble: str = ""
    choices: str | None = None
    split: str | Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    stratum: str | None = None
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    grade: Plain = None


def labelled_task(mapping: Mapping[str, Plain], name: str, near: Path, place: str) -> JsonlTask:
    """Return the task that a mapping of the keys of `TaskFile` describes.

    Args:
        mapping: the keys.
        name: what to call the task.
        near: the folder that paths start from.
        place: what to call the mapping in errors.

    Raises:
        TaskError: naming the place (the task file, or the data file and row).
    """
    file = parse(TaskFile, mapping, place, TaskError)
    measure = _measure(file, near, place)
    wants = isinstance(measure, Choose) or measure.grader.compares
    if wants and file.answer is None:
        raise TaskError(f"{place}.answer: missing; name the field with the right answer")
    form = Form(
        data=file.data,
        prompt=file.prompt,
        answer=file.answer if wants else None,
        choices=file.choices,
        split=file.split,
        stratum=file.stratum,
        keep=isinstance(measure, Generate) and measure.grader.wants_row,
    )
    splits = read_items(form, near, place)
    try:
        return JsonlTask(name=name, splits=splits, measure=measure, preamble=file.preamble)
    except TaskError as problem:
        raise TaskError(f"{place}: {problem}") from None


def _measure(file: TaskFile, near: Path, place: str) -> "Generate | Choose":
    if file.kind not in KINDS:
        raise TaskError(f"{place}.kind: {file.kind!r} is not known; {nearest(file.kind, KINDS)}")
    if (file.kind == "multiple_choice") != (file.choices is not None):
        way = "missing; name the field with the list of choices" if file.choices is None else "only for multiple_choice"
        raise TaskError(f"{place}.choices: {way} (kind is {file.kind!r})")
    if file.kind == "multiple_choice":
        grade = "choice" if file.grade is None else file.grade
        if grade not in CHOICES:
            raise TaskError(f"{place}.grade: {grade!r} does not grade choices; {nearest(str(grade), CHOICES)}")
        return Choose(by_length=grade == "choice_by_length")
    grader = Exact() if file.grade is None else read_grader(file.grade, near, f"{place}.grade")
    try:
        return Generate(grader=grader, max_new_tokens=file.max_new_tokens, stop=file.stop)
    except TaskError as problem:
        raise TaskError(f"{place}: {problem}") from None


@value
class Generate:
    """Greedy decoding after the prompt; a grader compares the text with the answers.

    Attributes:
        grader: what makes a value in [0, 1] of the text.
        max_new_tokens: the longest answer, in tokens.
        stop: texts that end an answer and do not belong to it; the end-of-sequence tokens always do.
    """

    grader: Grader = field(default_factory=Exact)
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    bounded = True
    direction = "maximize"
    reference = None

    def __post_init__(self) -> None:
        check_generation(self.max_new_tokens, self.stop)

    def check(self, item: Item) -> None:
        """Refuse an item whose answers the grader cannot compare with."""
        self.grader.check(item)

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask to go on after the prompt."""
        return (Request(kind="generate", context=item.prompt, stop=self.stop, most=self.max_new_tokens),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Grade the text."""
        return Response(value=self.grader.grade(outcomes[0].text.strip(), item))


@value
class Choose:
    """The likeliest of given choices after the prompt.

    Attributes:
        by_length: whether log-likelihoods are divided by the choices' lengths in characters, as lm-eval's `acc_norm`
            does; characters, since the number of tokens would depend on the tokenizer.
    """

    by_length: bool = False

    bounded = True
    direction = "maximize"
    reference = None

    def check(self, item: Item) -> None:
        """Refuse an item without distinct choices, or whose answer is none of them."""
        check_choices(item)
        if len(item.answers) != 1:
            raise TaskError(f"needs the text of one right choice as its answer, got {list(item.answers)}")
        if item.answers[0] not in item.choices:
            raise TaskError(f"the answer {item.answers[0]!r} is none of its choices")

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask how likely each choice is."""
        return ask_choices(item)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return 1 if the right choice is likelier than any other one."""
        lengths = [len(choice) if self.by_length else 1 for choice in item.choices]
        return chosen([one.loglikelihood for one in outcomes], item.choices.index(item.answers[0]), lengths)


def ask_choices(item: Item) -> tuple[Request, ...]:
    """Return one request for the likelihood of each choice."""
    return tuple(Request(kind="loglikelihood", context=item.prompt, continuation=choice) for choice in item.choices)


def check_choices(item: Item) -> None:
    """Refuse an item without two or more distinct choices that have a text."""
    if len(item.choices) < 2 or len(set(item.choices)) != len(item.choices):
        raise TaskError(f"needs two or more distinct choices, got {list(item.choices)}")
    if "" in item.choices:
        raise TaskError("a choice is empty, so it has no likelihood; give it a text")


def check_generation(max_new_tokens: int, stop: tuple[str, ...]) -> None:
    """Refuse limits under which no answer could be generated."""
    if max_new_tokens < 1:
        raise TaskError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if "" in stop:
        raise TaskError("an empty stop text would end every answer at once; remove it")

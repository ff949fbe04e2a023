"""Measures without labels, and the task files that ask for them: what answers are like, whether right or not."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.graders import chosen
from evomerge.evaluation.items import SHARES, Form, Item, read_items
from evomerge.evaluation.jsonl import JsonlTask, Measure
from evomerge.evaluation.labelled import ask_choices, check_choices, check_generation
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.rows import Hub
from evomerge.evaluation.task import Response
from evomerge.evaluation.texts import Divergence, Loss
from evomerge.value import Plain, parse, value


@value
class Length:
    """The length of the generated answer, as a share of the longest that is allowed.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        stop: texts that end an answer.
    """

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    bounded = True
    direction = "minimize"
    reference = None

    def __post_init__(self) -> None:
        check_generation(self.max_new_tokens, self.stop)

    def check(self, item: Item) -> None:
        """Take any item."""

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask to go on after the prompt."""
        return (_go_on(item, self.max_new_tokens, self.stop),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return the share, in [0, 1]."""
        return Response(value=min(1.0, outcomes[0].tokens / self.max_new_tokens))


@value
class Entropy:
    """How unsure the greedy answer is: the mean entropy of the distributions its tokens were taken from, in nats.

    Minimised without labels, as Yang et al. 2024 do to find merging coefficients ("AdaMerging", section 3.2). A model
    that is sure of the same wrong answer everywhere has none: use it beside another objective.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        stop: texts that end an answer.
    """

    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    bounded = False
    direction = "minimize"
    reference = None

    def __post_init__(self) -> None:
        check_generation(self.max_new_tokens, self.stop)

    def check(self, item: Item) -> None:
        """Take any item."""

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask to go on after the prompt, and how sure each token was."""
        return (_go_on(item, self.max_new_tokens, self.stop, entropy=True),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return nats per token."""
        return Response(value=outcomes[0].entropy)


@value
class ChoiceEntropy:
    """How unsure the choice is: the entropy of the choices' shares of likelihood, over the logarithm of their number.

    It is 0 for a choice beyond doubt and 1 where all choices are equally likely.
    """

    bounded = True
    direction = "minimize"
    reference = None

    def check(self, item: Item) -> None:
        """Refuse an item without distinct choices."""
        check_choices(item)

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask how likely each choice is."""
        return ask_choices(item)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return the entropy, in [0, 1]."""
        best = max(one.loglikelihood for one in outcomes)
        odds = [math.exp(one.loglikelihood - best) for one in outcomes]
        whole = math.fsum(odds)
        entropy = -math.fsum(one / whole * math.log(one / whole) for one in odds if one > 0.0)
        return Response(value=min(1.0, max(0.0, entropy / math.log(len(odds)))))


@value
class Agreement:
    """Whether the greedy answer is the reference source's own, but for blanks at the ends.

    Attributes:
        reference: the source.
        max_new_tokens: the longest answer, in tokens.
        stop: texts that end an answer.
    """

    reference: str
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    bounded = True
    direction = "maximize"

    def __post_init__(self) -> None:
        check_generation(self.max_new_tokens, self.stop)

    def check(self, item: Item) -> None:
        """Take any item."""

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask to go on after the prompt."""
        return (_go_on(item, self.max_new_tokens, self.stop),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return 1 or 0."""
        return Response(value=float(outcomes[0].text.strip() == reference[0].text.strip()))


@value
class ChoiceAgreement:
    """Whether the likeliest choice is the reference source's own; its likeliest is the first of these.

    Attributes:
        reference: the source.
    """

    reference: str

    bounded = True
    direction = "maximize"

    def check(self, item: Item) -> None:
        """Refuse an item without distinct choices."""
        check_choices(item)

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask how likely each choice is."""
        return ask_choices(item)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return 1 or 0, and the margin of the source's choice."""
        theirs = [one.loglikelihood for one in reference]
        return chosen([one.loglikelihood for one in outcomes], theirs.index(max(theirs)))


@value
class TextsFile:
    """The keys of a file that measures texts, beside the measure's own.

    Attributes:
        measure: `loss` or `kl`.
        data: a file of texts (`.txt`: one a line), or of rows, or a data set of the hub, as in `TaskFile`.
        text: the field of a row that holds its text, or a template over fields, as a prompt is.
        window: cut each text (a whole `.txt` file is one) in windows of about so many characters.
        split, stratum: as in `TaskFile`.
    """

    measure: str
    data: str | Hub
    text: str = "text"
    window: int | None = None
    split: str | Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    stratum: str | None = None


@value
class PromptsFile:
    """The keys of a file that measures answers, beside the measure's own.

    Attributes:
        measure: `length`, `entropy` or `agreement`.
        data, prompt, preamble, split, stratum: as in `TaskFile`.
        choices: the field with the list of choices, for `entropy` and `agreement` of choices.
    """

    measure: str
    data: str | Hub
    prompt: str
    preamble: str = ""
    choices: str | None = None
    split: str | Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    stratum: str | None = None


#: Measures by the name that files give them; for choices, there may be another one.
MEASURES: Mapping[str, type[Measure]] = {
    "loss": Loss,
    "kl": Divergence,
    "length": Length,
    "entropy": Entropy,
    "agreement": Agreement,
}
OF_CHOICES: Mapping[str, type[Measure]] = {"entropy": ChoiceEntropy, "agreement": ChoiceAgreement}


def unlabelled_task(mapping: Mapping[str, Plain], name: str, near: Path, place: str) -> JsonlTask:
    """Return the task without labels that a mapping describes.

    Args:
        mapping: `measure`, the keys of `TextsFile` or `PromptsFile`, and the attributes of the measure.
        name: what to call the task.
        near: the folder that paths start from.
        place: what to call the mapping in errors.

    Raises:
        TaskError: naming the place (the task file, or the data file and row).
    """
    measured = mapping["measure"]
    if measured not in MEASURES:
        raise TaskError(f"{place}.measure: {measured!r} is not known; {nearest(str(measured), MEASURES)}")
    kind = MEASURES[measured]
    if mapping.get("choices") is not None:
        if measured not in OF_CHOICES:
            raise TaskError(f"{place}.choices: {measured} has none; choices go with {' and '.join(OF_CHOICES)}")
        kind = OF_CHOICES[measured]
    shape: type[TextsFile] | type[PromptsFile] = TextsFile if measured in ("loss", "kl") else PromptsFile
    general, own = _names(shape), _names(kind)
    for key in mapping:
        if key not in (*general, *own):
            raise TaskError(f"{place}.{key}: unknown key; {nearest(str(key), [*general, *own])}")
    file = parse(shape, {key: mapping[key] for key in general if key in mapping}, place, TaskError)
    measure = parse(kind, {key: mapping[key] for key in own if key in mapping}, place, TaskError)
    preamble = file.preamble if isinstance(file, PromptsFile) else ""
    splits = read_items(_form(file, place), near, place)
    try:
        return JsonlTask(name=name, splits=splits, measure=measure, preamble=preamble)
    except TaskError as problem:
        raise TaskError(f"{place}: {problem}") from None


def _form(file: TextsFile | PromptsFile, place: str) -> Form:
    if isinstance(file, PromptsFile):
        return Form(
            data=file.data, prompt=file.prompt, choices=file.choices, split=file.split, stratum=file.stratum
        )
    if file.window is not None and file.window < 1:
        raise TaskError(f"{place}.window: must be at least 1 character, got {file.window}")
    template = "{" in file.text
    if not template and not file.text.isidentifier():
        raise TaskError(f"{place}.text: {file.text!r} is not the name of a field")
    prompt = file.text if template else f"{{{file.text}}}"
    return Form(data=file.data, prompt=prompt, split=file.split, stratum=file.stratum, window=file.window)


def _names(cls: type[object]) -> list[str]:
    return [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]  # values are dataclasses


def _go_on(item: Item, most: int, stop: tuple[str, ...], entropy: bool = False) -> Request:
    return Request(kind="generate", context=item.prompt, stop=stop, most=most, entropy=entropy)

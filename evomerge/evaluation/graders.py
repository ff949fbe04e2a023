"""Graders: what a generated text or a choice is worth, as a number in [0, 1]."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.entrypoint import find_entry
from evomerge.evaluation.items import Item
from evomerge.evaluation.language import find_language
from evomerge.evaluation.task import Response
from evomerge.value import Plain, parse, value

#: A number: digits (with commas by thousands or not), decimals after a point, and an exponent or the lower part of a
#: fraction. A sign belongs to it unless something that it is subtracted from stands right before. The exponent is
#: bounded, since numbers are read exactly.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?![\d.])|\s?/\s?\d+(?![\d.,]*\d))?"
)

#: Other ways to write what `NUMBER` reads.
SIGNS = str.maketrans({"−": "-", "⁄": "/", "，": ",", "．": "."})


class Grader(Protocol):
    """What a generated text is worth; a frozen value."""

    @property
    def compares(self) -> bool:
        """Whether items need answers."""
        ...

    @property
    def wants_row(self) -> bool:
        """Whether items must keep their rows."""
        ...

    def check(self, item: Item) -> None:
        """Refuse an item whose answers it cannot compare with, by a `TaskError` that says why."""
        ...

    def grade(self, text: str, item: Item) -> float:
        """Return the worth, in [0, 1], of a text without blanks at its ends."""
        ...


@value
class Exact:
    """The text is one of the answers, but for blanks at the ends."""

    compares = True
    wants_row = False

    def check(self, item: Item) -> None:
        """Refuse an item without answers."""
        _need_answers(item)

    def grade(self, text: str, item: Item) -> float:
        """Return 1 or 0."""
        return float(text in {answer.strip() for answer in item.answers})


@value
class Regex:
    """What a regular expression finds first (its first group, or the whole match without groups) is an answer."""

    regex: str

    compares = True
    wants_row = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex)
        except re.error as problem:
            raise TaskError(f"{self.regex!r} is not a regular expression ({problem})") from None

    def check(self, item: Item) -> None:
        """Refuse an item without answers."""
        _need_answers(item)

    def grade(self, text: str, item: Item) -> float:
        """Return 1 or 0."""
        match = re.search(self.regex, text)
        if match is None:
            return 0.0
        found = match.group(1) if match.re.groups else match.group()
        return Exact().grade((found or "").strip(), item)


@value
class LastNumber:
    """The last number in the text equals that of an answer: 1,000 is 1000.0, and 1/2 is .5."""

    compares = True
    wants_row = False

    def check(self, item: Item) -> None:
        """Refuse an item with an answer that holds no number."""
        _need_answers(item)
        for answer in item.answers:
            if last_number(answer) is None:
                raise TaskError(f"the answer {answer!r} holds no number; grade by exact or contains")

    def grade(self, text: str, item: Item) -> float:
        """Return 1 or 0."""
        found = last_number(text)
        return float(found is not None and found in {last_number(answer) for answer in item.answers})


@value
class Contains:
    """The text holds one of the answers, whatever the case and the blanks."""

    compares = True
    wants_row = False

    def check(self, item: Item) -> None:
        """Refuse an item without answers, or with one that every text holds."""
        _need_answers(item)
        if any(not answer.strip() for answer in item.answers):
            raise TaskError("an answer is empty, and every text contains it; give it a text")

    def grade(self, text: str, item: Item) -> float:
        """Return 1 or 0."""
        return float(any(_normal(answer) in _normal(text) for answer in item.answers))


@value
class Joined:
    """Several graders as one.

    Attributes:
        how: `all` (the least of their values: "and"), `any` (the greatest: "or") or `mean`.
        graders: the graders.
        weights: for `mean`, how much each counts, not negative; as many as graders.
    """

    how: str
    graders: tuple[Grader, ...]
    weights: tuple[float, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether one of them needs answers."""
        return any(grader.compares for grader in self.graders)

    @property
    def wants_row(self) -> bool:
        """Whether one of them needs rows."""
        return any(grader.wants_row for grader in self.graders)

    def check(self, item: Item) -> None:
        """Refuse an item that one of them refuses."""
        for grader in self.graders:
            grader.check(item)

    def grade(self, text: str, item: Item) -> float:
        """Return the least, greatest or mean value."""
        values = [grader.grade(text, item) for grader in self.graders]
        if self.how != "mean":
            return min(values) if self.how == "all" else max(values)
        return sum(w * v for w, v in zip(self.weights, values, strict=True)) / sum(self.weights)


@value
class _Mean:
    """The keys of a weighted mean of graders."""

    mean: tuple[Plain, ...]
    weights: tuple[float, ...] | None = None


#: Graders without settings, by name.
PLAIN: Mapping[str, Grader] = {"exact": Exact(), "last_number": LastNumber(), "contains": Contains()}

#: Graders with settings, by their first key.
KEYS = ("regex", "python", "language", "all", "any", "mean")


def read_grader(data: Plain, near: Path, place: str) -> Grader:
    """Return the grader that a task file describes.

    Args:
        data: a name of `PLAIN`, or a mapping with one key of `KEYS` (and `weights` beside `mean`).
        near: the folder that paths start from.
        place: what to call it in errors.

    Raises:
        TaskError: naming the place and the nearest known name.
    """
    if isinstance(data, str):
        if data not in PLAIN:
            raise TaskError(f"{place}: {data!r} is not known; {nearest(data, [*PLAIN, *KEYS])}")
        return PLAIN[data]
    key = next((key for key in KEYS if isinstance(data, Mapping) and key in data), None)
    if key is None:
        first = str(next(iter(data), "")) if isinstance(data, Mapping) else str(data)
        raise TaskError(f"{place}: {data!r} is no grader; {nearest(first, [*PLAIN, *KEYS])}")
    more = [str(other) for other in data if other != key and (key, other) != ("mean", "weights")]
    if more:
        raise TaskError(f"{place}.{more[0]}: unknown key beside {key!r}; join graders by all, any or mean")
    try:
        return _with_settings(key, data, near, place)
    except TaskError as problem:
        raise (problem if str(problem).startswith(place) else TaskError(f"{place}.{key}: {problem}")) from None


def _with_settings(key: str, data: Mapping[str, Plain], near: Path, place: str) -> Grader:
    if key == "regex":
        return parse(Regex, data, place, TaskError)
    if key == "python":
        return find_entry(data["python"], near)
    if key == "language":
        return find_language(data["language"])
    if not isinstance(data[key], list) or not data[key]:
        raise TaskError(f"expected a list of graders, got {data[key]!r}")
    graders = tuple(read_grader(one, near, f"{place}.{key}[{i}]") for i, one in enumerate(data[key]))
    if key != "mean":
        return Joined(how=key, graders=graders)
    weights = parse(_Mean, data, place, TaskError).weights or (1.0,) * len(graders)
    if len(weights) != len(graders) or min(weights) < 0 or sum(weights) <= 0:
        raise TaskError(f"needs one weight for each of {len(graders)} graders, not negative, got {list(weights)}")
    return Joined(how="mean", graders=graders, weights=weights)


def chosen(loglikelihoods: Sequence[float], right: int, lengths: Sequence[int] | None = None) -> Response:
    """Return what a choice is worth: 1 if the right one is likelier than any other one, which no tie is.

    Args:
        loglikelihoods: of all choices, in nats.
        right: the place of the right one.
        lengths: what to divide them by.
    """
    scaled = [one / length for one, length in zip(loglikelihoods, lengths or [1] * len(loglikelihoods), strict=True)]
    margin = scaled[right] - max(one for place, one in enumerate(scaled) if place != right)
    return Response(value=float(margin > 0), margin=margin)


def last_number(text: str) -> Fraction | None:
    r"""Return the last number in a text, exactly, or None.

    >>> last_number("so it is 1,000.50 $, not 3")
    Fraction(3, 1)
    >>> last_number("-3/4"), last_number("7-3"), last_number("\\frac{1}{2}")
    (Fraction(-3, 4), Fraction(3, 1), Fraction(1, 2))
    """
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text.translate(SIGNS))
    found = [match.group() for match in NUMBER.finditer(text)]
    try:
        upper, _, lower = re.sub(r"[,\s]", "", found[-1]).partition("/") if found else ("", "", "")
        return Fraction(upper) / Fraction(lower or 1)
    except (ValueError, ZeroDivisionError):  # nothing, more digits than Python reads, or a fraction of zero
        return None


def _need_answers(item: Item) -> None:
    if not item.answers:
        raise TaskError("has no answer to compare with")


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())

"""Measures of texts, without labels: how well a model predicts them, and how near its predictions are to a source's."""

import math
from collections.abc import Sequence

from evomerge.errors import CandidateError, TaskError, nearest
from evomerge.evaluation.items import Item
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import Response
from evomerge.value import value

#: Likelihood of a rest that single precision does not tell from none; a smaller one counts as so much, which keeps the
#: bound a lower one.
ROUNDING = 1e-6

#: In what `Loss` is given; bits per byte can be compared across tokenizers.
UNITS = ("nats_per_token", "bits_per_byte")


@value
class Loss:
    """The negative log-likelihood of each item's text, from its first token on.

    The score is the mean over the items, so texts count alike, whatever their length; cut in windows they are of about
    equal length, and the score is close to that of all texts as one.

    Attributes:
        unit: one of `UNITS`.
    """

    unit: str = "nats_per_token"

    bounded = False
    direction = "minimize"
    reference = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise TaskError(f"unit {self.unit!r} is not known; {nearest(self.unit, UNITS)}")

    def check(self, item: Item) -> None:
        """Refuse an empty text."""
        _check_text(item)

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask how likely the text is."""
        return (_read(item),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return nats per token or bits per byte."""
        [outcome] = outcomes
        if self.unit == "bits_per_byte":
            return Response(value=-outcome.loglikelihood / math.log(2.0) / len(item.prompt.encode()))
        return Response(value=-outcome.loglikelihood / max(1, outcome.tokens))


@value
class Divergence:
    """The Kullback-Leibler divergence KL(source || candidate) of the next-token distributions, in nats per token.

    The distributions are those over the source's `top` likeliest tokens and all others as one, so this is a lower
    bound of the whole divergence (data-processing inequality: Cover and Thomas 2006, section 2.8), and close to it
    where the source is sure.

    Attributes:
        reference: the source.
        top: how many tokens of each distribution are kept apart.
    """

    reference: str
    top: int = 64

    bounded = False
    direction = "minimize"

    def __post_init__(self) -> None:
        if self.top < 1:
            raise TaskError(f"top must be at least 1, got {self.top}")

    def check(self, item: Item) -> None:
        """Refuse an empty text."""
        _check_text(item)

    def requests(self, item: Item, reference: tuple[Outcome, ...]) -> tuple[Request, ...]:
        """Ask the source for its likeliest tokens, and a candidate for the likelihood of these."""
        if not reference:
            return (_read(item, top=self.top),)
        return (_read(item, at=reference[0].ids),)

    def grade(self, item: Item, outcomes: tuple[Outcome, ...], reference: tuple[Outcome, ...]) -> Response:
        """Return the mean over the text's positions.

        Raises:
            CandidateError: if the candidate gives a token no likelihood at all, so that the divergence is infinite.
        """
        theirs, ours = reference[0].logp, outcomes[0].logp
        mean = math.fsum(coarse_divergence(p, q) for p, q in zip(theirs, ours, strict=True)) / max(1, len(theirs))
        if not math.isfinite(mean):
            raise CandidateError(f"item {item.id!r}: its divergence from {self.reference!r} is {mean}")
        return Response(value=mean)


def coarse_divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Return the divergence of two distributions over some tokens and the rest as one, in nats.

    Args:
        p: log-probabilities of the tokens in one distribution.
        q: log-probabilities of the same tokens in the other.
    """
    told = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a != -math.inf)
    rest_p = 1.0 - math.fsum(map(math.exp, p))
    rest_q = 1.0 - math.fsum(map(math.exp, q))
    if rest_p > ROUNDING:
        told += rest_p * math.log(rest_p / max(rest_q, ROUNDING))
    return 0.0 if told < 0.0 else told


def _read(item: Item, top: int = 0, at: tuple[tuple[int, ...], ...] = ()) -> Request:
    """Return the request to read a whole text.

    It is a continuation of nothing, not a `rolling` text: there some tokenizers put a second first token, whose own
    likelihood would count.
    """
    return Request(kind="loglikelihood", continuation=item.prompt, top=top, at=at)


def _check_text(item: Item) -> None:
    if not item.prompt:
        raise TaskError("the text is empty; remove it")

"""Requests and outcomes: what is asked of a live model, and what it said; all that tasks and the engine share."""

from evomerge.value import value

#: What can be asked: how likely a continuation is after a context, how likely a whole text is, or to go on.
KINDS = ("loglikelihood", "rolling", "generate")


@value
class Request:
    """One thing to ask of a live model.

    Attributes:
        kind: one of `KINDS`.
        context: the text before; empty for `rolling`.
        continuation: the text whose likelihood is read; empty for `generate`.
        stop: for `generate`, texts that end an answer and do not belong to it; the end-of-sequence tokens always do.
        most: for `generate`, the longest answer in tokens.
        entropy: whether the mean entropy of the next-token distributions is wanted.
        top: how many of the likeliest next tokens are wanted at each position that is read.
        at: instead of `top`: at each position that is read, the tokens whose log-probabilities are wanted.
        cut: whether a text that is too long for the model loses its beginning; otherwise it is refused.
    """

    kind: str
    context: str = ""
    continuation: str = ""
    stop: tuple[str, ...] = ()
    most: int = 0
    entropy: bool = False
    top: int = 0
    at: tuple[tuple[int, ...], ...] = ()
    cut: bool = False


@value
class Outcome:
    """What a live model said to a request; log-likelihoods and entropies are in nats.

    Attributes:
        tokens: how many tokens were read, or generated (without the one that ended the answer).
        loglikelihood: of the continuation or the whole text; 0 for `generate`.
        greedy: whether greedy decoding would give the continuation; False for `generate`.
        text: for `generate`, the answer before its first stop text.
        entropy: mean entropy of the next-token distributions, where it was asked for.
        ids: where `top` was asked for, the likeliest tokens of each position, likeliest first.
        logp: the log-probabilities of `ids`, or of the tokens that `at` named; one tuple a position.
    """

    tokens: int
    loglikelihood: float = 0.0
    greedy: bool = False
    text: str = ""
    entropy: float = 0.0
    ids: tuple[tuple[int, ...], ...] = ()
    logp: tuple[tuple[float, ...], ...] = ()

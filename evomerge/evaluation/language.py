"""Language of a text: how much of it is in the language that is wanted."""

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

from evomerge.errors import TaskError
from evomerge.evaluation.items import Item
from evomerge.value import Plain, value

#: Least size of a piece whose language is told, in bytes of UTF-8: about 40 Latin letters, or 13 kana.
PIECE = 40

#: Where pieces may end: after a line, or a mark that ends a sentence.
ENDS = re.compile(r"(?<=[\n。！？])|(?<=[.!?])(?=\s)")


@value
class Language:
    """The share of the text's letters that stand in pieces of a language; 0 without letters.

    A text is cut in sentences, short ones joined with the next, and each piece is in the language that is likeliest
    for it (py3langid, after Lui and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool").

    Attributes:
        language: an ISO 639-1 code.
        version: of the library that tells languages.
    """

    language: str
    version: str

    compares = False
    wants_row = False

    def check(self, item: Item) -> None:
        """Take any item."""

    def grade(self, text: str, item: Item) -> float:
        """Return the share, in [0, 1]."""
        letters = [(piece, count) for piece in pieces(text) if (count := sum(map(str.isalpha, piece)))]
        wanted = sum(count for piece, count in letters if _tell(piece) == self.language)
        return wanted / max(1, sum(count for _, count in letters))


def find_language(code: Plain) -> Language:
    """Return the grader for a language.

    Raises:
        TaskError: if the library is missing or does not know the language.
    """
    if code not in _identifier().labels:
        raise TaskError(f"language {code!r} is not known; give an ISO 639-1 code, like de, en or ja")
    return Language(language=code, version=importlib.metadata.version("py3langid"))


def pieces(text: str) -> Iterator[str]:
    """Yield the sentences of a text, short ones joined until they are `PIECE` bytes long; a short rest joins the last.

    >>> list(pieces("Ja. Das ist so, und es wird auch so bleiben. Nein."))
    ['Ja. Das ist so, und es wird auch so bleiben. Nein.']
    """
    held: list[str] = []
    for part in ENDS.split(text):
        if held and len(held[-1].encode(errors="replace")) >= PIECE:
            held.append(part)
        else:
            held = [*held[:-1], "".join([*held[-1:], part])]
    if len(held) > 1 and len(held[-1].encode(errors="replace")) < PIECE:
        held[-2:] = ["".join(held[-2:])]
    yield from held


def _tell(piece: str) -> str:
    return str(_identifier().classify(piece)[0])


@functools.cache
def _identifier() -> Any:
    """Return an identifier of our own: the library's shared one can be told to know fewer languages."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise TaskError(
            "telling languages needs py3langid; install it with: pip install 'evomerge[language]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)

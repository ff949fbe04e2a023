"""Every error that evomerge raises on purpose, as one tree.

::

    EvomergeError               one line: what, where, and the way out
    ├── InvalidInput            what the user gave cannot be used; the command line exits with 2
    │   ├── ExperimentError     an experiment file, or what it refers to
    │   ├── RecipeError         a recipe, or a method and its parameters
    │   ├── TaskError           a task file or its items
    │   ├── ModelError          a model folder: config, tensors, tokenizer
    │   └── LedgerError         a run folder or its ledger
    ├── CandidateError          one candidate cannot be built or scored; recorded, never ends a search
    └── ExportError             a model was written but does not answer as it was scored
"""

import difflib
from collections.abc import Iterable


class EvomergeError(Exception):
    """Base of all errors raised on purpose; its text is one line for the user."""


class InvalidInput(EvomergeError):
    """Something that the user gave cannot be used; nothing was written."""


class ExperimentError(InvalidInput):
    """An experiment file, or a file that it refers to, is wrong."""


class RecipeError(InvalidInput):
    """A recipe, a method or one of its parameters is wrong."""


class TaskError(InvalidInput):
    """A task file or its items are wrong."""


class ModelError(InvalidInput):
    """A model folder is incomplete, broken, or does not fit the other sources."""


class LedgerError(InvalidInput):
    """A run folder or its ledger is broken or belongs to another experiment."""


class CandidateError(EvomergeError):
    """One candidate cannot be built or scored; the search records it and goes on."""


class ExportError(EvomergeError):
    """An exported model does not give the answers that were scored."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the way out for an unknown name: the nearest known one, or the whole list.

    >>> nearest("tiess", ["ties", "slerp"])
    "did you mean 'ties'?"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known here"

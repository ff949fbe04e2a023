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
import errno
from collections.abc import Iterable
from pathlib import Path

#: What the operating system says where there is no room: on the disk, in a quota, or under a limit of file sizes.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


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


def unwritten(path: Path, problem: OSError, then: str) -> str:
    """Return the line for a file that could not be written.

    Args:
        path: the file, or the folder.
        problem: what the operating system said.
        then: what to do when there is room again, or when the cause is mended.
    """
    first = "free space" if problem.errno in FULL else "mend that"
    return f"{path}: cannot be written ({problem.strerror}); {first}, then {then}"


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

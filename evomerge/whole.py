"""Writes a small file whole or not at all, and says in one line why it could not."""

import os
from pathlib import Path

from evomerge.errors import EvomergeError, unwritten


def write_whole(file: Path, text: str, then: str, error: type[EvomergeError] = EvomergeError) -> None:
    """Write a text file that is whole at any moment; what was there before stays if that fails.

    Args:
        file: the file; its folder exists.
        text: what it holds.
        then: what the user does when there is room again, for the error.
        error: the class of the error to raise.

    Raises:
        EvomergeError: (of the class `error`) if the disk is full, or the file cannot be written otherwise.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as problem:
        raise error(unwritten(file, problem, then)) from None

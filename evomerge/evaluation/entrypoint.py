"""Python entry points: a user's own function as a grader."""

import ast
import functools
import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.items import Item
from evomerge.value import Plain, value

Function = Callable[[str, Mapping[str, Plain]], object]


@value
class Entry:
    """A function of the generated text and the item's row.

    Attributes:
        function: its name.
        digest: SHA-256 of the file that defines it; what that file imports is not part of it.
        module: the module to import it from; None for a file.
        file: where the file lies; it may move, so it is no part of what the grader is.
    """

    function: str
    digest: str
    module: str | None = None
    file: str = field(compare=False)

    compares = False
    wants_row = True

    def check(self, item: Item) -> None:
        """Take any item."""

    def grade(self, text: str, item: Item) -> float:
        """Return what the function returns.

        Raises:
            TaskError: if it fails, or returns anything but a number in [0, 1] or a bool.
        """
        function = _load(self.file, self.function, self.module, self.digest)
        where = f"function {self.function!r} of {self.file}"
        try:
            found = function(text, item.row)
        except Exception as problem:  # whatever a user's function raises is theirs to mend
            reason = " ".join(str(problem).split())[:200]
            raise TaskError(f"{where} failed ({type(problem).__name__}: {reason}); mend it") from None
        number = _number(found)
        if not 0.0 <= number <= 1.0:  # so for NaN
            raise TaskError(f"{where} returned {repr(found)[:80]}; it must return a number in [0, 1]")
        return number


def _number(found: object) -> float:
    """Return a result as a number; NaN if it is none."""
    try:
        return math.nan if isinstance(found, str | bytes) else float(found)  # type: ignore[arg-type]  # anything may come
    except (TypeError, ValueError, OverflowError):
        return math.nan


def find_entry(text: Plain, near: Path) -> Entry:
    """Find a function without running the file that defines it.

    Args:
        text: `FILE.py:FUNCTION`, or `MODULE:FUNCTION` for a module that Python can import.
        near: the folder that a path starts from.

    Raises:
        TaskError: if there is no such file, module or function.
    """
    source, colon, function = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not function.isidentifier():
        raise TaskError(f"expected FILE.py:FUNCTION or MODULE:FUNCTION, got {text!r}")
    module = None if source.endswith(".py") else source
    file = near / source if module is None else _origin(module)
    try:
        content = file.read_bytes()
        names = _defined(ast.parse(content))
    except OSError as problem:
        raise TaskError(f"{file}: cannot be read ({problem.strerror})") from None
    except (SyntaxError, ValueError) as problem:  # ValueError: bytes of 0 in it
        raise TaskError(f"{file}: not Python ({' '.join(str(problem).split())})") from None
    if function not in names:
        raise TaskError(f"{file} defines no {function!r}; {nearest(function, names)}")
    digest = hashlib.sha256(content).hexdigest()
    return Entry(function=function, digest=digest, module=module, file=str(file.resolve()))


def _origin(module: str) -> Path:
    """Return the file of a module; the packages that it lies in are imported, itself is not."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as problem:
        raise TaskError(f"module {module!r} cannot be found ({problem}); give FILE.py:FUNCTION") from None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise TaskError(f"module {module!r} cannot be found as a file of Python; give FILE.py:FUNCTION")
    return Path(found.origin)


def _defined(tree: ast.Module) -> list[str]:
    """Return the names that a module defines or imports at its top, in order."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.extend((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.extend(target.id for target in targets if isinstance(target, ast.Name))
    return names


@functools.cache
def _load(file: str, name: str, module: str | None, digest: str) -> Function:
    """Return the function, from the file that the fingerprint speaks of."""
    try:
        if hashlib.sha256(Path(file).read_bytes()).hexdigest() != digest:
            raise TaskError(f"{file} has changed since the task was read; start again")
        if module is not None:
            loaded = importlib.import_module(module)
        else:
            found = importlib.util.spec_from_file_location(f"evomerge_grader_{digest[:16]}", file)
            if found is None or found.loader is None:
                raise TaskError(f"{file}: cannot be loaded; its name must end in .py")
            loaded = importlib.util.module_from_spec(found)
            found.loader.exec_module(loaded)
        function: Function = getattr(loaded, name)
    except TaskError:
        raise
    except Exception as problem:  # whatever a user's module raises while it loads
        reason = " ".join(str(problem).split())[:200]
        raise TaskError(f"{file}: cannot be loaded ({type(problem).__name__}: {reason})") from None
    return function

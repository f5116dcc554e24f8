"""Permission to run code that a configuration references as `python:package.module:Name`.

References are checked before any code is imported. Checks take place when a configuration, a run
directory or the file of a deployment site is loaded, and on the command line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from hetero_fl.utils.errors import UserError

CODE_PREFIX = "python:"
# Key in pydantic's validation context that permits importing user-defined models.
ALLOW_CODE = "own_code_is_allowed"
REFERENCE = re.compile(r"python:[\w.]+:\w+")

AllowCode = bool | Collection[str]
"""The code that may run: all code, only code that the caller passes, or the given references."""
# The file that contains a reference, or a function that maps a key to this file.
Where = str | Callable[[str], str]


def iterate_strings(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the value of each string in a tree, including the keys of dictionaries.

    A tree consists of nested dictionaries, lists and tuples. The path of a string consists of the
    keys and indices that lead to the string, joined with periods.
    """
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from iterate_strings(str(key), path)
            yield from iterate_strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from iterate_strings(value, f"{path}.{index}" if path else str(index))


def find_references(tree: object) -> dict[str, str]:
    """Find the references to code in a tree, and the path at which each reference occurs first.

    The paths are keyed by reference.

    Example:
        >>> from hetero_fl.utils.code_permission import find_references
        >>> find_references({"algorithm": {"name": "python:median:MedianTeacher"}})
        {'python:median:MedianTeacher': 'algorithm.name'}
    """
    found: dict[str, str] = {}
    for key, value in iterate_strings(tree):
        if value.startswith(CODE_PREFIX):
            found.setdefault(value, key)
    return found


def code_reference(value: object) -> str:
    """Return the reference to a class or function, or to the class of another object.

    Example:
        >>> from fractions import Fraction
        >>> from hetero_fl.utils.code_permission import code_reference
        >>> code_reference(Fraction), code_reference(Fraction(1, 2))
        ('python:fractions:Fraction', 'python:fractions:Fraction')
    """
    named: object = value if hasattr(value, "__qualname__") else type(value)
    return f"{CODE_PREFIX}{getattr(named, '__module__', '')}:{getattr(named, '__qualname__', '')}"


def hash_modules(references: Iterable[str]) -> dict[str, str]:
    """Return SHA-256 hashes of the files of referenced modules, keyed by module name.

    Modules without a file, such as those of notebooks, are left out.

    Args:
        references: References to code, which have been imported before.
    """
    hashes = {}
    for name in sorted({reference.split(":")[1] for reference in references}):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path and Path(path).is_file():
            hashes[name] = sha256(Path(path).read_bytes()).hexdigest()
    return hashes


class CodeRefusedError(UserError):
    """Raised for code that may not run.

    Args:
        refused: The references, mapped to their places.
    """

    def __init__(self, refused: Mapping[str, str]) -> None:
        self.refused = dict(refused)
        reference, place = next(iter(refused.items()))
        prefix = f"{place}: " if place else ""
        super().__init__(f"{prefix}'{reference}' names code; pass allow_code=True to run it")


def check_code(found: Mapping[str, str], where: Where, allow_code: AllowCode) -> None:
    """Check that the code that references name may run.

    Args:
        found: References and the keys at which they occur, see `find_references`.
        where: The file that contains the references, or a function from a key to the file.
        allow_code: The code that may run.

    Raises:
        CodeRefusedError: If a reference is not permitted.
    """
    refused = {}
    for reference, key in refused_code(found, allow_code).items():
        place = where(key) if callable(where) else where
        refused[reference] = ": ".join(filter(None, [place, key]))
    if refused:
        raise CodeRefusedError(refused)


def refused_code(found: Mapping[str, str], allow_code: AllowCode) -> dict[str, str]:
    """Return the references that are not permitted, and the keys at which they occur."""
    if allow_code is True:
        return {}
    permitted = allow_code or ()
    return {reference: key for reference, key in found.items() if reference not in permitted}


def also_allow(allow_code: AllowCode, references: Iterable[str]) -> AllowCode:
    """Return a permission that includes further references."""
    return True if allow_code is True else frozenset(references).union(allow_code or ())


def code_of_caller(
    allow_code: AllowCode, source: object = None, overrides: Iterable[str] = ()
) -> AllowCode:
    """Return the code that the caller of a function permits.

    If `allow_code` is False, these are the references that the caller passes, which are part of its
    program: those in overrides and in a dictionary, but not those in a file.

    Args:
        allow_code: The argument of the function.
        source: The configuration: a path, or an object that the caller wrote.
        overrides: Overrides of the configuration.
    """
    if allow_code is not False:
        return allow_code
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        return frozenset(name for text in overrides for name in REFERENCE.findall(text))
    return True

"""Permission to run code that a configuration references as `python:package.module:Name`.

References are checked before any code is imported. Checks take place when a configuration, a run
directory or the file of a deployment site is loaded, and on the command line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from hetero_fl.utils.errors import UserError

CODE_PREFIX = "python:"
# Key in pydantic's validation context that permits importing user-defined models.
ALLOW_CODE = "own_code_is_allowed"
_REFERENCE = re.compile(r"python:[\w.]+:\w+")

# Function of a file, a key and a reference that asks the user whether the code may run. A key is
# the path of a value in a configuration, such as `algorithm.name`.
Ask = Callable[[str, str, str], bool]
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


def reference_to(value: object) -> str:
    """Return the reference to a class or function, or to the class of another object.

    Example:
        >>> from fractions import Fraction
        >>> from hetero_fl.utils.code_permission import reference_to
        >>> reference_to(Fraction), reference_to(Fraction(1, 2))
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


class CodePermission:
    """Permission to import code that configurations reference.

    Args:
        everything: Whether all references are permitted.
        granted: References that are permitted without asking.
        ask: Function that asks the user for permission, called once for each other reference. If
            None, all other references are refused.
        trusts_caller: Whether references that the caller passes as dictionaries or overrides are
            permitted. In Python, such references are part of the caller's program. On the command
            line, they need permission.

    Attributes:
        everything: Whether all references are permitted.
        granted: References that are permitted, including the references that the user has permitted
            when asked.
        trusts_caller: Whether references that the caller passes are permitted.
    """

    def __init__(
        self,
        everything: bool = False,
        granted: Iterable[str] = (),
        ask: Ask | None = None,
        trusts_caller: bool = False,
    ) -> None:
        self.everything = everything
        self.granted = frozenset(granted)
        self.trusts_caller = trusts_caller
        self._ask = ask
        flag = "allow_code=True" if trusts_caller else "--allow-code"
        self._advice = f"pass {flag} to run it"

    @classmethod
    def from_argument(cls, allow_code: bool | CodePermission, example: str = "") -> CodePermission:
        """Convert the argument `allow_code` of a public function to a permission.

        True permits all references, and False only the references that the caller passes. A
        `CodePermission` is returned unchanged.

        Args:
            allow_code: The argument.
            example: A call with `allow_code=True`, for the error message.
        """
        if isinstance(allow_code, CodePermission):
            return allow_code
        permission = cls(everything=allow_code, trusts_caller=True)
        if example:
            permission._advice += f", as in {example}"
        return permission

    def with_caller_references(
        self, source: object, overrides: Iterable[str] = ()
    ) -> CodePermission:
        """Return this permission, extended to the references that the caller passed.

        The permission is returned unchanged if the caller is not trusted.

        Args:
            source: The configuration. A path extends the permission only to the overrides. A
                dictionary, which the caller wrote, permits all references.
            overrides: Overrides of the configuration.
        """
        if self.everything or not self.trusts_caller:
            return self
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            return self.with_granted(
                {name for text in overrides for name in _REFERENCE.findall(text)}
            )
        return CodePermission(everything=True)

    def with_granted(self, granted: Iterable[str]) -> CodePermission:
        """Return a copy of this permission that also grants the given references."""
        extended = CodePermission(self.everything, self.granted.union(granted), self._ask)
        extended._advice = self._advice
        return extended

    def check_caller_references(self, found: Mapping[str, str]) -> None:
        """Check references among the arguments of the caller, unless the caller is trusted.

        Raises:
            UserError: If a reference is not permitted.
        """
        if not self.trusts_caller:
            self.check(found, "")

    def __getstate__(self) -> dict[str, object]:
        # Other processes have no terminal and cannot ask.
        return {**self.__dict__, "_ask": None}

    def find_refused(self, found: Mapping[str, str], where: Where) -> Iterator[tuple[str, str]]:
        """Yield each reference that is not permitted, with its key, after asking the user.

        Args:
            found: References and the keys at which they occur, see `find_references`.
            where: The file that contains the references, or a function from a key to the file.
        """
        for reference, key in found.items():
            if self.everything or reference in self.granted:
                continue
            place = where(key) if callable(where) else where
            if (
                self._ask is not None
                and _REFERENCE.fullmatch(reference)
                and self._ask(place, key, reference)
            ):
                self.granted |= {reference}
            else:
                yield reference, key

    def check(self, found: Mapping[str, str], where: Where) -> None:
        """Check that all references are permitted.

        Args:
            found: References and the keys at which they occur, see `find_references`.
            where: The file that contains the references, or a function from a key to the file.

        Raises:
            UserError: If a reference is not permitted.
        """
        for reference, key in self.find_refused(found, where):
            place = where(key) if callable(where) else where
            prefix = ": ".join(filter(None, [place, key]))
            raise UserError(f"{prefix}: '{reference}' names code; {self._advice}")

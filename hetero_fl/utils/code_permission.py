"""Permission to run code that a configuration names as `python:package.module:Name`.

References are checked where they enter the process, before anything is imported: when a configuration, a run directory or a
site's file is read, and on the command line. What is in memory after that has been checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from hetero_fl.utils.errors import UserError

OWN = "python:"
# Key of pydantic's validation context: users' own models may be imported, to check their options.
CONTEXT = "own_code_is_allowed"
_REFERENCE = re.compile(r"python:[\w.]+:\w+")

Ask = Callable[[str, str, str], bool]
"""(where, key, reference) to whether the user wants this code to run."""
Where = str | Callable[[str], str]


def iterate_strings(tree: object, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings of a tree, keys included, each after the path of its place."""
    if isinstance(tree, str):
        yield at, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from iterate_strings(str(key), at)
            yield from iterate_strings(value, f"{at}.{key}" if at else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from iterate_strings(value, f"{at}.{number}" if at else str(number))


def find_references(tree: object) -> dict[str, str]:
    """Return the references to code in a tree, each with the path of its first place."""
    found: dict[str, str] = {}
    for key, value in iterate_strings(tree):
        if value.startswith(OWN):
            found.setdefault(value, key)
    return found


class CodePermission:
    """Which references to code may be imported: all of them, or those that are listed.

    Args:
        everything: Whether all references are allowed.
        granted: References that are allowed in any case.
        ask: Asked once about each other reference; without it the answer is no.
        trusts_caller: Whether names that the caller of a function wrote itself, in a dictionary or in overrides, are
            allowed: in Python they are the caller's own program, on the command line they need permission.
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
        self._advice = "pass allow_code=True" if trusts_caller else "pass --allow-code"

    @classmethod
    def from_argument(cls, allow_code: bool | CodePermission) -> CodePermission:
        """Return the permission that the argument `allow_code` of a function stands for."""
        if isinstance(allow_code, CodePermission):
            return allow_code
        return cls(everything=allow_code, trusts_caller=True)

    def with_written(self, source: object, overrides: Iterable[str] = ()) -> CodePermission:
        """Return this permission extended to what the caller wrote: a `source` that is no file, and `overrides`."""
        if self.everything or not self.trusts_caller:
            return self
        if isinstance(source, str) or hasattr(source, "__fspath__"):
            return self.with_granted(
                {name for text in overrides for name in _REFERENCE.findall(text)}
            )
        return CodePermission(everything=True)

    def with_granted(self, granted: Iterable[str]) -> CodePermission:
        """Return this permission with more references granted, no matter where they are written."""
        made = CodePermission(self.everything, self.granted.union(granted), self._ask)
        made._advice = self._advice
        return made

    def check_written(self, found: Mapping[str, str]) -> None:
        """Raise UserError, as `check`, for names among a caller's arguments; in Python these are always allowed."""
        if not self.trusts_caller:
            self.check(found, "")

    def __getstate__(self) -> dict[str, object]:
        """Leave the question behind: other processes have no terminal."""
        return {**self.__dict__, "_ask": None}

    def find_refused(self, found: Mapping[str, str], where: Where) -> Iterator[tuple[str, str]]:
        """Yield reference and key of code that may not run, after asking about it.

        Args:
            found: References with their keys (see `references`).
            where: The file that has them, or a function from a key to its place.
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
        """Raise UserError, in one line with key and reference, for code that may not run; arguments as `refused`."""
        for reference, key in self.find_refused(found, where):
            place = where(key) if callable(where) else where
            prefix = ": ".join(filter(None, [place, key]))
            raise UserError(
                f"{prefix}: found '{reference}', which names code; {self._advice} to run it"
            )

"""Names for things that users choose: a registry per kind, and `python:package.module:Name` for one's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from hetero_fl.errors import UserError, nearest

T = TypeVar("T")
OWN = "python:"


class Registry(Generic[T]):
    """Names to objects of one kind; `registry("name")` is a decorator that adds one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, T] = {}

    def __call__(self, name: str) -> Callable[[T], T]:
        def add(thing: T) -> T:
            self._known[name] = thing
            return thing

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> T:
        """The thing of that name. Raises UserError with the nearest name."""
        if name.startswith(OWN):
            return import_own(name)
        if name not in self._known:
            raise UserError(f"found {self.kind} '{name}'{nearest(name, self._known)}")
        return self._known[name]


def import_own(reference: str) -> Any:
    """What `python:package.module:Name` names; the working folder may hold the module. Raises UserError."""
    module, _, name = reference.removeprefix(OWN).partition(":")
    if not module or not name:
        raise UserError(f"found '{reference}'; write python:package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except ImportError as error:
        raise UserError(f"'{reference}': {error}") from None
    except AttributeError:
        raise UserError(
            f"'{reference}': {module} has no {name}{nearest(name, vars(importlib.import_module(module)))}"
        ) from None

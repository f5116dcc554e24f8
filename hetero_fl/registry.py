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
    """Names to objects of one kind; `registry("name")` is a decorator that adds one. `all_of`: what lists them all."""

    def __init__(self, kind: str, all_of: str = "") -> None:
        self.kind, self._all_of = kind, all_of
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
            return imported(name, self.kind)
        if name not in self._known:
            raise UserError(f"found {self.kind} '{name}'{nearest(name, self._known, self._all_of)}")
        return self._known[name]


def imported(reference: str, where: str) -> Any:
    """What `python:package.module:Name` names; the working folder may hold the module.

    Raises UserError, which begins with `where`, if it is malformed, the module does not import, or has no such name.
    """
    module_name, _, name = reference.removeprefix(OWN).partition(":")
    if not module_name or not name:
        raise UserError(f"{where}: found '{reference}'; write python:package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may fail in any way; the reason goes into the one line
        raise UserError(f"{where}: cannot import '{module_name}': {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{where}: module '{module_name}' has no '{name}'{nearest(name, names)}")
    return getattr(module, name)


def called(reference: str, where: str, takes: str, arguments: tuple[Any, ...]) -> Any:
    """What the function that `reference` names returns; `takes` says what it is given, for the line that refuses another thing.

    Raises UserError, which begins with `where`, if it cannot be imported or called, and for whatever it raises.
    """
    function = imported(reference, where)
    if not callable(function):
        raise UserError(f"{where}: {reference} is not a function of ({takes})")
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {reference}: {error}") from error
    except Exception as error:  # a user's function may fail in any way; the reason goes into the one line
        raise UserError(f"{where}: {reference} raised {type(error).__name__}: {error}") from error

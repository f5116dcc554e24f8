"""Names for things that users choose: a registry per kind, and `python:package.module:Name` for one's own."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.version import describe_new_name, describe_renamed_hooks

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes of one kind; `registry("name")` is a decorator that adds one.

    Args:
        kind: What they are called in error messages.
        base: Returns the class that a user's own class has to be derived from.
        all_of: What lists all names, for error messages.
    """

    def __init__(self, kind: str, base: Callable[[], type], all_of: str = "") -> None:
        self.kind = kind
        self._base = base
        self._all_of = all_of
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
        """Return the class of that name; a reference, which has to be permitted already, is imported.

        Raises UserError with the nearest name.
        """
        if name.startswith(OWN):
            found: T = import_reference(name, self.kind, self._base())
            return found
        if name not in self._known:
            raise UserError(
                f"found {self.kind} '{name}'{suggest_or_list(name, self._known, self._all_of)}"
            )
        _check_hook_names(self._known[name], f"{self.kind} '{name}'")
        return self._known[name]

    def get_loaded(self, name: str) -> T | None:
        """Return the class of that name, or None; unlike `registry[name]` this imports nothing.

        A user's own class is found if its module has been imported before.
        """
        if not name.startswith(OWN):
            return self._known.get(name)
        module_name, _, attribute = name.removeprefix(OWN).partition(":")
        found: Any = getattr(sys.modules.get(module_name), attribute, None) if attribute else None
        if not (isinstance(found, type) and issubclass(found, self._base())):
            return None
        return cast("T", found)


def import_reference(
    reference: str, where: str, base: type | None = None, takes: str | None = None
) -> Any:
    """Import what `python:package.module:Name` names; the working folder may hold the module.

    The caller has made sure that this code may run (see `hetero_fl.utils.code_permission`).

    Args:
        reference: The name.
        where: Begins error messages.
        base: Subclasses of this class are accepted.
        takes: The arguments of a function; functions are accepted if this is given and the named module defines them.

    Raises:
        UserError: The reference is malformed, the module does not import or has no such name, or it names anything else.
    """
    module_name, _, name = reference.removeprefix(OWN).partition(":")
    if not module_name or not name:
        raise UserError(f"{where}: found '{reference}'; write python:package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (
        Exception
    ) as error:  # a module of the user's may fail in any way; the reason goes into the one line
        reason = f"{type(error).__name__}: {error}{describe_new_name(error)}"
        raise UserError(f"{where}: cannot import '{module_name}': {reason}") from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(
            f"{where}: module '{module_name}' has no '{name}'{suggest_or_list(name, names)}"
        )
    found = getattr(module, name)
    if base is not None and isinstance(found, type) and issubclass(found, base):
        _check_hook_names(found, f"{where}: {reference}")
        return found
    if takes is not None and isinstance(found, types.FunctionType):
        if found.__module__ == module_name:
            return found
        raise UserError(
            f"{where}: '{reference}' is not defined in '{module_name}'; write {OWN}{found.__module__}:{found.__name__}"
        )
    accepted = [] if takes is None else [f"a function of ({takes}) that '{module_name}' defines"]
    accepted += [f"a subclass of {base.__module__}.{base.__qualname__}"] if base is not None else []
    raise UserError(f"{where}: '{reference}' is not {' or '.join(accepted)}")


def call_reference(
    reference: str, where: str, takes: str, arguments: tuple[Any, ...], base: type | None = None
) -> Any:
    """Return what the function that a reference names returns.

    Args:
        reference: The name, which has to be permitted already.
        where: Begins error messages.
        takes: The names of the arguments, for error messages.
        arguments: The arguments.
        base: Subclasses of this class are accepted in place of a function.

    Raises:
        UserError: It cannot be imported or called, or raises anything.
    """
    function = import_reference(reference, where, base, takes)
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {reference}: {error}") from error
    except (
        Exception
    ) as error:  # a user's function may fail in any way; the reason goes into the one line
        reason = f"{type(error).__name__}: {error}{describe_new_name(error)}"
        raise UserError(f"{where}: {reference} raised {reason}") from error


def _check_hook_names(found: object, where: str) -> None:
    """Raise UserError if a user's class defines a hook by its name in the previous release."""
    renamed = describe_renamed_hooks(found) if isinstance(found, type) else ""
    if renamed:
        raise UserError(f"{where}: {renamed}")

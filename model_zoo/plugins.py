"""Registries of named objects, which programs register and installed packages provide.

A package declares its objects in `pyproject.toml`, one table for each group of entry points:

    [project.entry-points."hetero_fl.models"]
    tiny_net = "my_package.models:TinyNet"

Packages are imported when a name is looked up or all names are listed, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from model_zoo.errors import one_line

T = TypeVar("T")
Entry = TypeVar("Entry")


class PluginWarning(UserWarning):
    """Issued for a plug-in that is ignored because it is broken or its name is already in use."""


class PluginError(Exception):
    """Raised if a plug-in cannot be loaded. The message is one line that names the package."""


class Plugins:
    """The plug-ins of one group of entry points.

    Args:
        group: Name of the group, such as `hetero_fl.models`. If empty, there are no plug-ins.
        kind: Noun for the objects of the group in messages, such as "model".
        built_in: Function that returns the built-in names, which plug-ins must not use.
        check: Function that returns why a loaded object is not valid, or an empty string.
        convert: Function that returns what is kept of a loaded object.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        built_in: Callable[[], Collection[str]],
        check: Callable[[Any], str],
        convert: Callable[[Any], Any],
    ) -> None:
        self.group = group
        self.kind = kind
        self._built_in = built_in
        self._check = check
        self._convert = convert
        # The object of each name that was looked up, or the error that it raised.
        self._loaded: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        """Return whether a package provides a name. The package is not imported."""
        return name in self._entry_points

    def origin(self, name: str) -> str:
        """Return the name and version of the package that provides a name."""
        return _describe_origin(self._entry_points[name])

    def load(self, name: str) -> Any:
        """Import the package that provides a name, and return the object.

        Args:
            name: A name for which `name in plugins` is true.

        Raises:
            PluginError: If the object cannot be imported or is not valid. The next call raises the
                same error without importing the package again.
        """
        if name not in self._loaded:
            try:
                self._loaded[name] = self._import(self._entry_points[name])
            except PluginError as error:
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, PluginError):
            raise found
        return found

    def get_loaded(self, name: str) -> Any:
        """Return the object with a name, or None if its package has not been imported."""
        found = self._loaded.get(name)
        return None if isinstance(found, PluginError) else found

    def load_all(self) -> dict[str, Any]:
        """Return all objects by name. A `PluginWarning` is issued once for each broken plug-in."""
        found = {}
        for name in self._entry_points:
            is_new = name not in self._loaded
            try:
                found[name] = self.load(name)
            except PluginError as error:
                if is_new:
                    warnings.warn(f"{error}; it is ignored", PluginWarning, stacklevel=1)
        return found

    def refresh(self) -> None:
        """Search the installed packages again, for example after an installation in a notebook."""
        self._loaded.clear()
        self.__dict__.pop("_entry_points", None)

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """The usable entry points of the group by name, in alphabetical order."""
        built_in = self._built_in()
        found: dict[str, EntryPoint] = {}
        entries = entry_points(group=self.group) if self.group else ()
        for entry in sorted(entries, key=lambda e: (e.name, e.value)):
            reason = ""
            if entry.name in built_in:
                reason = f"'{entry.name}' is a built-in {self.kind}"
            elif entry.name in found:
                reason = f"{_describe_origin(found[entry.name])} also provides this {self.kind}"
            if reason:
                line = f"{self._title(entry)}: {reason}; the plug-in is ignored"
                warnings.warn(line, PluginWarning, stacklevel=1)
            else:
                found[entry.name] = entry
        return found

    def _import(self, entry: EntryPoint) -> Any:
        title = self._title(entry)
        if ":" not in entry.value:
            raise PluginError(f"{title} is not valid: expected module:object, got {entry.value}")
        try:
            loaded = entry.load()
        # The module of a plug-in may raise any exception, or exit.
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{title} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from error
        if reason := self._check(loaded):
            raise PluginError(f"{title} is not valid: {reason}, got {entry.value}")
        return self._convert(loaded)

    def _title(self, entry: EntryPoint) -> str:
        return f"{self.kind} '{entry.name}' of {_describe_origin(entry)}"


class Registry(Generic[T]):
    """Objects by name: those of a package, those that a program registers, and plug-ins.

    `registry("name")` is a decorator that registers an object.

    Args:
        kind: Noun for the objects in messages, such as "model".
        package: Name of the package whose own objects are built in.
        check: Function that returns why an object of a plug-in is not valid, or an empty string.
        group: Group of entry points of the plug-ins. If empty, there are no plug-ins.

    Attributes:
        kind: Noun for the objects in messages.
        plugins: The plug-ins, of which there are none without a group.
    """

    def __init__(self, kind: str, package: str, check: Callable[[Any], str], group: str) -> None:
        self.kind = kind
        self._package = package
        self._known: dict[str, T] = {}
        self.plugins = Plugins(group, kind, self.built_in_names, check, self._convert)

    def __call__(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers an object under a name.

        An object replaces another object that was registered under the same name, unless the other
        object is built in.

        Raises:
            ValueError: If the object is not built in, but the name is.
        """

        def register(entry: Entry) -> Entry:
            if name in self.built_in_names() and not self._is_built_in(entry):
                raise ValueError(f"'{name}' is a built-in {self.kind}; choose another name")
            self._known[name] = self._convert(entry)
            return entry

        return register

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self.plugins.load_all()})

    def __contains__(self, name: object) -> bool:
        """Return whether there is an object of a name. Plug-ins are not imported."""
        return name in self._known or name in self.plugins

    def built_in_names(self) -> set[str]:
        """Return the names of the built-in objects."""
        return self._known.keys() - self.registered().keys()

    def registered(self) -> dict[str, T]:
        """Return the objects that the program has registered, keyed by name."""
        return {name: entry for name, entry in self._known.items() if not self._is_built_in(entry)}

    def find(self, name: str) -> T | None:
        """Return the object with a name, or None if there is no such object.

        Raises:
            PluginError: If the plug-in that provides the name cannot be loaded.
        """
        if name not in self._known and name in self.plugins:
            return self.plugins.load(name)
        return self._known.get(name)

    def origin(self, name: str) -> str:
        """Return the package that provides a name, or the module that registered the object."""
        if name not in self._known:
            return self.plugins.origin(name)
        return str(getattr(self._known[name], "__module__", ""))

    def _convert(self, entry: Any) -> T:
        """Return what is kept of an object that is registered."""
        return entry

    def _is_built_in(self, entry: object) -> bool:
        return str(getattr(entry, "__module__", "")).startswith(f"{self._package}.")


def _describe_origin(entry: EntryPoint) -> str:
    distribution = entry.dist
    if distribution is None:
        return entry.value
    return f"{distribution.metadata['Name']} {distribution.version}"

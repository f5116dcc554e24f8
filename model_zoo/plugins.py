"""Plug-ins: objects that installed packages provide through entry points.

A package declares its objects in `pyproject.toml`, one table for each group:

    [project.entry-points."hetero_fl.models"]
    tiny_net = "my_package.models:TinyNet"

Packages are imported when a name is looked up or all names are listed, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from model_zoo.errors import one_line


class PluginWarning(UserWarning):
    """Issued for a plug-in that is ignored because it is broken or its name is already in use."""


class PluginError(Exception):
    """Raised if a plug-in cannot be loaded. The message is one line that names the package."""


class Plugins:
    """The plug-ins of one group of entry points.

    Args:
        group: Name of the group, such as `hetero_fl.models`.
        kind: Noun for the objects of the group in messages, such as "model".
        built_in: Function that returns the built-in names, which plug-ins must not use.
        check: Function that returns why a loaded object is not valid, or an empty string.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        built_in: Callable[[], Collection[str]],
        check: Callable[[Any], str] = lambda _: "",
    ) -> None:
        self.group = group
        self.kind = kind
        self._built_in = built_in
        self._check = check
        self._loaded: dict[str, Any] = {}
        self._broken: dict[str, str] = {}

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
        if name in self._broken:
            raise PluginError(self._broken[name])
        if name not in self._loaded:
            try:
                self._loaded[name] = self._import(name)
            except PluginError as error:
                self._broken[name] = str(error)
                raise
        return self._loaded[name]

    def load_all(self) -> dict[str, Any]:
        """Return all objects by name. A `PluginWarning` is issued once for each broken plug-in."""
        found = {}
        for name in self._entry_points:
            is_new = name not in self._broken
            try:
                found[name] = self.load(name)
            except PluginError as error:
                if is_new:
                    warnings.warn(f"{error}; it is ignored", PluginWarning, stacklevel=1)
        return found

    def refresh(self) -> None:
        """Search the installed packages again, for example after an installation in a notebook."""
        self._loaded.clear()
        self._broken.clear()
        self.__dict__.pop("_entry_points", None)

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """The usable entry points of the group by name, in alphabetical order."""
        built_in = self._built_in()
        found: dict[str, EntryPoint] = {}
        for entry in sorted(entry_points(group=self.group), key=lambda e: (e.name, e.value)):
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

    def _import(self, name: str) -> Any:
        entry = self._entry_points[name]
        if ":" not in entry.value:
            raise PluginError(
                f"{self._title(entry)} is not valid: expected module:object, got {entry.value}"
            )
        try:
            loaded = entry.load()
        # The module of a plug-in may raise any exception, or exit.
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self._title(entry)} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from error
        reason = self._check(loaded)
        if reason:
            raise PluginError(f"{self._title(entry)} is not valid: {reason}, got {entry.value}")
        return loaded

    def _title(self, entry: EntryPoint) -> str:
        return f"{self.kind} '{entry.name}' of {_describe_origin(entry)}"


def _describe_origin(entry: EntryPoint) -> str:
    distribution = entry.dist
    if distribution is None:
        return entry.value
    return f"{distribution.metadata['Name']} {distribution.version}"

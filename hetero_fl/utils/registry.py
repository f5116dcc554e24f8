"""Registries of named classes, and references to user code.

A reference is `python:package.module:Name`, or `object:NAME` for an object of the program, which
`pack_objects` sends to other processes.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast

import cloudpickle

from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, one_line, suggest_or_list
from hetero_fl.utils.objects import (
    OBJECT_PREFIX,
    find_object,
    get_object,
    iterate_objects,
    name_object,
    restore_object,
)
from hetero_fl.utils.text import split_top_level
from model_zoo import register_model
from model_zoo.plugins import PluginError, Registry as BaseRegistry

T = TypeVar("T")
Entry = TypeVar("Entry")

# Objects received from another process, kept alive until this process ends.
_kept: list[Any] = []


class Registry(BaseRegistry[T]):
    """A registry of named classes.

    `registry("name")` is a decorator that registers a class, and `registry["name"]` is the class.

    Args:
        kind: Noun for the classes in error messages, such as "algorithm".
        base: Function that returns the base class that user-defined classes must have.
        all_of: Command that lists all names. If empty, error messages mention no command.
        plugins: Group of entry points with which packages provide further classes. If empty, there
            are no plug-ins.
        adapter: Function that makes a class of a function. If None, functions are not accepted.
        takes: Arguments of these functions, for error messages.
        names: Set to which names are added that are not built in, for a configuration to accept.
    """

    def __init__(
        self,
        kind: str,
        base: Callable[[], type],
        all_of: str = "",
        plugins: str = "",
        *,
        adapter: Callable[[Any], T] | None = None,
        takes: str | None = None,
        names: set[str] | None = None,
    ) -> None:
        super().__init__(kind, "hetero_fl", self._check_plugin, plugins)
        self._base = base
        self._all_of = all_of
        self._adapter = adapter
        self._takes = takes
        self._names = names if names is not None else set()
        self._names.update(entry_points(group=plugins).names if names is not None else ())

    def __call__(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers a class, or a function, under a name.

        Raises:
            ValueError: If the class is not built in, but the name is.
            TypeError: If functions are accepted, and it is neither a function nor a subclass of the
                base class.
        """
        decorate = super().__call__(name)

        def register(entry: Entry) -> Entry:
            decorate(entry)
            if not self._is_built_in(entry):
                self._names.add(name)
            return entry

        return register

    def find(self, name: str) -> T | None:
        """Return the class with a name, or None if there is no such class.

        Raises:
            PluginError: If the plug-in that provides the name cannot be loaded.
        """
        found = super().find(name)
        # The module of a plug-in may register the name with options.
        return self._known.get(name, found)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.find(name) is not None
        except PluginError:
            return False

    def __getitem__(self, name: str) -> T:
        """Return the registered class with a name, or import the class that a reference names.

        The caller must check that the code of a reference may run.

        Raises:
            UserError: If the name is unknown, or the reference or the plug-in that provides the
                name cannot be imported.
        """
        if name.startswith((CODE_PREFIX, OBJECT_PREFIX)):
            return self._convert(import_reference(name, self.kind, self._base(), self._takes))
        try:
            found = self.find(name)
        except PluginError as error:
            raise UserError(error) from error
        if found is None:
            raise UserError(
                f"unknown {self.kind} '{name}'{suggest_or_list(name, self, self._all_of)}"
            )
        return found

    def get_loaded(self, name: str) -> T | None:
        """Return the class that a name or a reference denotes, without importing anything.

        The result is None if the name is unknown, or the module of a user-defined class has not
        been imported.
        """
        if name.startswith(OBJECT_PREFIX):
            return cast("T | None", get_object(name))
        if not name.startswith(CODE_PREFIX):
            return self._known.get(name, self.plugins.get_loaded(name))
        module_name, _, attribute = name.removeprefix(CODE_PREFIX).partition(":")
        found: Any = getattr(sys.modules.get(module_name), attribute, None) if attribute else None
        if not (isinstance(found, type) and issubclass(found, self._base())):
            return None
        return cast("T", found)

    def _convert(self, entry: Any) -> T:
        """Return a class, which the adapter makes of a function.

        Raises:
            TypeError: If functions are accepted, and it is neither a function nor a subclass of the
                base class.
        """
        if self._adapter is None:
            return cast("T", entry)
        if problem := self._check_plugin(entry):
            raise TypeError(f"{self.kind}: {problem}, got {entry!r}")
        return cast("T", entry) if isinstance(entry, type) else self._adapter(entry)

    def _check_plugin(self, found: object) -> str:
        base = self._base()
        if isinstance(found, type) and issubclass(found, base):
            return ""
        if self._adapter is not None and callable(found) and not isinstance(found, type):
            return ""
        function = "" if self._takes is None else f"a function of ({self._takes}) or "
        return f"expected {function}a subclass of {base.__module__}.{base.__qualname__}"


def split_label(label: str) -> tuple[str, list[str]]:
    """Split a label such as `NAME:KEY=VALUE` into the name of a method and a list of settings.

    Example:
        >>> from hetero_fl.utils.registry import split_label
        >>> split_label("hybrid:teacher=mean:heads=keep")
        ('hybrid', ['teacher=mean', 'heads=keep'])
        >>> split_label("python:package.module:Name:mu=0.1")
        ('python:package.module:Name', ['mu=0.1'])
    """
    parts = split_top_level(label, ":")
    length = {"python": 3, "object": 2}.get(parts[0], 1)
    return ":".join(parts[:length]), parts[length:]


def _describe_import_error(module_name: str, error: BaseException) -> str:
    packages = [module_name.rsplit(".", n)[0] for n in range(module_name.count(".") + 1)]
    if isinstance(error, ModuleNotFoundError) and error.name in packages:
        return (
            f"module '{error.name}' not found in the working directory {os.getcwd()} or among the "
            "installed packages"
        )
    return f"cannot import '{module_name}': {type(error).__name__}: {error}"


def import_reference(
    reference: str, where: str, base: type | None = None, takes: str | None = None
) -> Any:
    """Return the class or function that a reference names.

    For `python:package.module:Name`, the module is imported, also from the working directory. The
    caller must check that the code may run (see `hetero_fl.utils.code_permission`). `object:NAME`
    is an object of this program (see `hetero_fl.utils.objects`).

    Args:
        reference: The reference.
        where: Prefix of error messages.
        base: Base class whose subclasses are accepted. If None, no classes are accepted.
        takes: Arguments of a function, for error messages. If given, functions that the module
            defines are accepted. If None, no functions are accepted.

    Raises:
        UserError: If the reference is malformed, cannot be imported, or is neither an accepted
            class nor an accepted function.
    """
    if reference.startswith(OBJECT_PREFIX):
        return find_object(reference, where)
    module_name, _, name = reference.removeprefix(CODE_PREFIX).partition(":")
    if not module_name or not name:
        raise UserError(f"{where}: expected python:package.module:Name, got '{reference}'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    # A user's module may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_describe_import_error(module_name, error)}") from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(
            f"{where}: module '{module_name}' has no '{name}'{suggest_or_list(name, names)}"
        )
    found = getattr(module, name)
    if base is not None and isinstance(found, type) and issubclass(found, base):
        return found
    if takes is not None and isinstance(found, types.FunctionType):
        if found.__module__ == module_name:
            return found
        raise UserError(
            f"{where}: '{reference}' is not defined in '{module_name}'; "
            f"write {CODE_PREFIX}{found.__module__}:{found.__name__}"
        )
    accepted = [] if takes is None else [f"a function of ({takes}) that '{module_name}' defines"]
    accepted += [f"a subclass of {base.__module__}.{base.__qualname__}"] if base is not None else []
    if takes is not None and hasattr(found, "forward"):
        accepted += [f"an object; pass an object of the class, {name}(...)"]
    raise UserError(f"{where}: '{reference}' is not {' or '.join(accepted)}")


def importable_reference(value: Any) -> str | None:
    """Return the reference `python:package.module:Name` of a class or function.

    The result is None for objects that cannot be imported under this name, such as local functions
    and objects of the main script.

    Example:
        >>> import torch
        >>> from hetero_fl.utils.registry import importable_reference
        >>> importable_reference(torch.optim.RMSprop)
        'python:torch.optim.rmsprop:RMSprop'
    """
    if not isinstance(value, type | types.FunctionType):
        return None
    module = value.__module__
    name = value.__qualname__
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not value:
        return None
    return f"{CODE_PREFIX}{module}:{name}"


def reference_to(value: Any) -> str:
    """Return a reference to a class, a function or another callable.

    The reference is `python:package.module:Name` if the object can be imported. Otherwise, the
    reference is `object:NAME`, which is valid as long as the caller keeps the object.

    Raises:
        UserError: If the object cannot be referenced.
    """
    reference = importable_reference(value)
    if reference is not None:
        return reference
    title = getattr(value, "__name__", type(value).__name__)
    try:
        return name_object(title, value)
    except TypeError:
        raise UserError(f"{title}: cannot be referenced; wrap it in a function") from None


def call_reference(
    reference: str, where: str, takes: str, arguments: tuple[Any, ...], base: type | None = None
) -> Any:
    """Import the function that a reference names, call the function and return the result.

    Args:
        reference: The reference, which must be permitted.
        where: Prefix of error messages.
        takes: Names of the arguments, for error messages.
        arguments: The arguments.
        base: Base class whose subclasses are accepted instead of a function.

    Raises:
        UserError: If the function cannot be imported or raises an exception.
    """
    function = import_reference(reference, where, base, takes)
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {reference}: {error}") from error
    # A user's function may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {reference} raised {type(error).__name__}: {error}") from error


def pack_objects(*trees: Any) -> bytes:
    """Serialize the objects that configurations name, and the models that this program registered.

    Classes and functions that are defined in a notebook or a script are serialized by value.
    Classes and functions of modules are serialized by reference.

    Args:
        *trees: Configurations, or parts of configurations.

    Returns:
        The serialized objects, or empty bytes if there are none.

    Raises:
        UserError: If an object cannot be serialized.
    """
    names = {name for tree in trees for _, name in iterate_objects(tree)}
    found = {name: find_object(name, "configuration") for name in sorted(names)}
    models = register_model.registered()
    try:
        return cloudpickle.dumps((found, models)) if found or models else b""
    # Any object may refuse, such as a module with parametrizations.
    except Exception as error:
        named = {**found, **models}
        name = next((name for name in named if not _can_pickle(named[name])), ", ".join(named))
        raise UserError(
            f"{name}: cannot be sent to another process ({one_line(error)}); pass a "
            "class or function that creates the object, or set runtime.executor=serial"
        ) from error


def unpack_objects(packed: bytes) -> None:
    """Deserialize the objects that `pack_objects` serialized in another process.

    The objects are available under the same names as in the other process. Empty bytes are ignored.
    """
    if not packed:
        return
    objects, models = cloudpickle.loads(packed)
    for name, value in objects.items():
        restore_object(name, value)
        _kept.append(value)
    for name, model in models.items():
        register_model(name)(model)


def _can_pickle(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    # See `pack_objects`.
    except Exception:
        return False
    return True

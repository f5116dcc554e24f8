"""Objects of the running program that a configuration names as `object:NAME`.

A program may pass arrays, classes and functions instead of names. A configuration is plain text and
therefore contains generated names of these objects. A name is valid as long as the program keeps a
reference to the object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import ReferenceType, ref

from hetero_fl.utils.code_permission import iterate_strings
from hetero_fl.utils.errors import UserError

OBJECT_PREFIX = "object:"

# References to the objects of each name, of which the last one that exists is used.
_objects: dict[str, list[ReferenceType[Any]]] = {}


def name_object(title: str, value: object) -> str:
    """Make an object available under a generated name and return the name.

    The name is `object:TITLE`, or `object:TITLE~2` if another object already has this name.

    Args:
        title: Readable part of the name.
        value: The object, to which the caller must keep a reference.

    Example:
        >>> from hetero_fl.utils.objects import find_object, name_object
        >>> class Momentum:
        ...     pass
        >>> name_object("Momentum", Momentum)
        'object:Momentum'
        >>> find_object("object:Momentum", "algorithm.name") is Momentum
        True
    """
    number = 1
    name = f"{OBJECT_PREFIX}{title}"
    while (other := get_object(name)) is not None and other is not value:
        number += 1
        name = f"{OBJECT_PREFIX}{title}~{number}"
    restore_object(name, value)
    return name


def restore_object(name: str, value: object) -> None:
    """Make an object available under the name that the object has in another process.

    Args:
        name: The name, `object:TITLE`.
        value: The object, to which the caller must keep a reference.
    """
    _objects.setdefault(name, []).append(ref(value))


def iterate_objects(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the name `object:TITLE` of each object that a configuration refers to.

    Args:
        tree: A configuration, or a part of a configuration.
        path: Path of `tree` in the configuration, the keys joined with periods.
    """
    for place, value in iterate_strings(tree, path):
        if value.startswith(OBJECT_PREFIX) and value != OBJECT_PREFIX:
            yield place, value


def get_object(name: str) -> Any:
    """Return the object with a name, or None if there is no such object in this program."""
    for reference in reversed(_objects.get(name, ())):
        if (value := reference()) is not None:
            return value
    return None


def find_object(name: str, where: str) -> Any:
    """Return the object with a name.

    Args:
        name: The name, `object:TITLE`.
        where: Prefix of error messages.

    Raises:
        UserError: If this program has no such object.
    """
    found = get_object(name)
    if found is None:
        raise UserError(
            f"{where}: '{name}' was an object of a Python program, which this program does not "
            "have; create the federation from objects again"
        )
    return found


def resolve_object(name: str, where: str) -> Any:
    """Return the object if `name` is `object:TITLE`, and other names unchanged.

    Args:
        name: The name.
        where: Prefix of error messages.

    Raises:
        UserError: If this program has no such object.
    """
    return find_object(name, where) if name.startswith(OBJECT_PREFIX) else name

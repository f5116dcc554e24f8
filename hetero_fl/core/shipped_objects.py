"""Serialization of the objects that a configuration names, for other processes."""

from __future__ import annotations

from typing import Any

import cloudpickle

from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.objects import find_object, iterate_objects, restore_object
from model_zoo import ModelError
from model_zoo.given_models import find_given

_kept: list[Any] = []
"""Objects received from another process, kept alive until this process ends."""


def pack_objects(*trees: Any) -> bytes:
    """Serialize the objects that configurations name.

    Classes and functions that are defined in a notebook or a script are serialized by value.
    Classes and functions of modules are serialized by reference.

    Args:
        *trees: Configurations, or parts of configurations.

    Returns:
        The serialized objects, or empty bytes if the configurations name no object.

    Raises:
        UserError: If an object cannot be serialized.
    """
    names = {name for tree in trees for _, name in iterate_objects(tree)}
    found = {name: _find(name) for name in sorted(names)}
    try:
        return cloudpickle.dumps(found) if found else b""
    # Any object may refuse, such as a module with parametrizations.
    except Exception as error:
        name = next((name for name in found if not _can_pickle(found[name])), ", ".join(found))
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
    for name, value in cloudpickle.loads(packed).items():
        restore_object(name, value)
        _kept.append(value)


def _can_pickle(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    # See `pack_objects`.
    except Exception:
        return False
    return True


def _find(name: str) -> Any:
    try:
        return find_given(name)
    except ModelError:
        return find_object(name, "configuration")

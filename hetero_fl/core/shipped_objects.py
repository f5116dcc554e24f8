"""Serialization of the objects that a configuration names, for other processes."""

from __future__ import annotations

from typing import Any

import cloudpickle

from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.objects import find_object, iterate_objects, restore_object
from model_zoo import register_model

_kept: list[Any] = []
"""Objects received from another process, kept alive until this process ends."""


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

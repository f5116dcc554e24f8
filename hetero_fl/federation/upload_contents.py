"""Description of the tensors that clients upload, for `--check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.core.payload import Item
from hetero_fl.engine.driver import translate_user_errors
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec


@dataclass(frozen=True)
class UploadedPart:
    """A tensor of an upload, or several tensors of a layer or of a larger part of a model.

    Attributes:
        item: Name of the item that contains the tensors.
        name: Name of the tensor, or the prefix of the names of several tensors, which ends in a
            dot. Empty if the item is a single tensor, or if the prefix is empty.
        shapes: Shapes of the tensors.
        num_values: Number of values of all tensors.
        num_bytes: Size of the values in bytes, before compression and encryption.
    """

    item: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    num_values: int
    num_bytes: int


@dataclass(frozen=True)
class UploadContent:
    """The content of the uploads of clients that upload tensors of the same names and shapes.

    Attributes:
        clients: Ids of the first clients of each profile with this content.
        num_clients: Number of clients with this content.
        parts: Parts of the upload. Empty if these clients upload nothing in the first round.
    """

    clients: tuple[str, ...]
    num_clients: int
    parts: tuple[UploadedPart, ...]


@translate_user_errors()
def upload_contents(
    algorithm: Algorithm, federation: FederationSpec, max_parts: int = 10
) -> list[UploadContent]:
    """Return what clients upload in the first round, without training.

    Args:
        algorithm: The method.
        federation: The federation.
        max_parts: Maximum number of parts of all uploads together, if each upload has a part for
            each item. Tensors are grouped by layers, or by larger parts of the model.

    Example:
        >>> from hetero_fl.experiment import prepare
        >>> from hetero_fl.federation.upload_contents import upload_contents
        >>> linear = {"defaults": {"model": "linear"}}
        >>> run = prepare({"data": {"name": "digits"}, "clients": linear})
        >>> for part in upload_contents(run.method, run.federation)[0].parts:
        ...     print(part.name, part.shapes, part.num_bytes)
        head.weight ((10, 64),) 2560
        head.bias ((10,),) 40
    """
    expectations = ExpectedUploads(algorithm, federation)
    server = federation.server()
    algorithm.setup(server)
    clients: dict[object, list[str]] = {}
    num_clients: Counter[object] = Counter()
    items: dict[object, Mapping[str, Item]] = {}
    for profile in federation.client_infos.profiles:
        client_info = federation.client_infos[profile.first]
        broadcast = call_broadcast(algorithm, server, client_info)
        found = expectations.expected_items(client_info, broadcast, 0)
        key = tuple(
            (name, tuple((n, tuple(t.shape), t.dtype) for n, t in item.tensors.items()))
            for name, item in found.items()
        )
        clients.setdefault(key, []).append(profile.first)
        num_clients[key] += profile.count
        items[key] = found
    share = max(1, max_parts // len(clients))
    return [
        UploadContent(tuple(names), num_clients[key], _group_tensors(items[key], share))
        for key, names in clients.items()
    ]


def _group_tensors(items: Mapping[str, Item], max_parts: int) -> tuple[UploadedPart, ...]:
    """Return the parts of an upload, with as many levels of names as `max_parts` permits."""
    names = [name for item in items.values() for name in item.tensors]
    deepest = max((name.count(".") for name in names), default=0) + 1
    for depth in range(deepest, -1, -1):
        parts = [part for name, item in items.items() for part in _parts(name, item, depth)]
        if len(parts) <= max_parts:
            break
    return tuple(parts)


def _parts(item_name: str, item: Item, depth: int) -> list[UploadedPart]:
    """Group the tensors of an item by the first `depth` levels of their names."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in item.tensors.items():
        levels = name.split(".")
        prefix = name if len(levels) <= depth else "".join(f"{n}." for n in levels[:depth])
        grouped.setdefault(prefix, {})[name] = tensor
    return [
        UploadedPart(
            item_name,
            _part_name(prefix, tensors) if isinstance(item.values, Mapping) else "",
            tuple(tuple(tensor.shape) for tensor in tensors.values()),
            sum(tensor.numel() for tensor in tensors.values()),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        )
        for prefix, tensors in grouped.items()
    ]


def _part_name(prefix: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the only tensor of a part, or the common prefix of several."""
    return prefix if len(tensors) > 1 else next(iter(tensors))

"""Partitions of the rows among clients, one class for each value of `partition.kind`."""

from __future__ import annotations

from typing import ClassVar, Literal

from hetero_fl.config.data import PARTITION_KINDS, PartitionConfig


def _unused_by(kind: str) -> frozenset[str]:
    return frozenset(PartitionConfig.model_fields) - {"kind", "min_size", *PARTITION_KINDS[kind]}


class IID(PartitionConfig):
    """Random rows for each client, without skew.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.IID().kind
        'iid'
    """

    _unused: ClassVar[frozenset[str]] = _unused_by("iid")

    kind: Literal["iid"] = "iid"


class Dirichlet(PartitionConfig):
    """Label skew, with shares of each class from a Dirichlet distribution (Yurochkin et al. 2019).

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Dirichlet(alpha=0.3).alpha
        0.3
    """

    _unused: ClassVar[frozenset[str]] = _unused_by("dirichlet")

    kind: Literal["dirichlet"] = "dirichlet"


class Classes(PartitionConfig):
    """A few classes for each client (McMahan et al. 2017).

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Classes(classes=2).kind
        'classes'
    """

    _unused: ClassVar[frozenset[str]] = _unused_by("classes")

    kind: Literal["classes"] = "classes"


class Quantity(PartitionConfig):
    """Different numbers of rows per client, with similar class frequencies.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Quantity(alpha=1.0).kind
        'quantity'
    """

    _unused: ClassVar[frozenset[str]] = _unused_by("quantity")

    kind: Literal["quantity"] = "quantity"


class Natural(PartitionConfig):
    """One client for each group of the data, for example for each hospital.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Natural().kind
        'natural'
    """

    _unused: ClassVar[frozenset[str]] = _unused_by("natural")

    kind: Literal["natural"] = "natural"


class Partition(PartitionConfig):
    """Any kind of partition by name, with its settings as arguments.

    The kind may be your own (`python:module:Name`) or a name of `register_partition`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Partition(kind="python:shards:deal_shards", per_client=2).arguments
        {'per_client': 2}
    """

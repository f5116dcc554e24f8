"""Partitions of the rows among clients, one class for each value of `partition.kind`."""

from __future__ import annotations

from typing import Literal

from hetero_fl.config.data import PartitionConfig


class IID(PartitionConfig):
    """Random rows for each client, without skew.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.IID().kind
        'iid'
    """

    kind: Literal["iid"] = "iid"


class Dirichlet(PartitionConfig):
    """Label skew, with shares of each class from a Dirichlet distribution (Yurochkin et al. 2019).

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Dirichlet(alpha=0.3).alpha
        0.3
    """

    kind: Literal["dirichlet"] = "dirichlet"


class Classes(PartitionConfig):
    """A few classes for each client (McMahan et al. 2017).

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Classes(classes=2).kind
        'classes'
    """

    kind: Literal["classes"] = "classes"


class Quantity(PartitionConfig):
    """Different numbers of rows per client, with similar class frequencies.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Quantity(alpha=1.0).kind
        'quantity'
    """

    kind: Literal["quantity"] = "quantity"


class Natural(PartitionConfig):
    """One client for each group of the data, for example for each hospital.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Natural().kind
        'natural'
    """

    kind: Literal["natural"] = "natural"

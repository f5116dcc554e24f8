"""Partition training rows among clients: label skew, quantity skew, groups, code of users.

`partition_rows` looks up the partition kind in a registry. If the data identifies patients, all
rows of a patient go to the same client. Partitions depend only on the rows, the sizes of the
clients in order, the configuration and the seed.
"""

from hetero_fl.data.partition import kinds
from hetero_fl.data.partition.apportion import (
    apportion,
    apportion_nonzero,
    assign_classes,
    cut_below,
    cut_proportions,
)
from hetero_fl.data.partition.assignment import assign_rows
from hetero_fl.data.partition.context import (
    PartitionColumns,
    PartitionContext,
    Partitioner,
    row_strata,
)
from hetero_fl.data.partition.registry import (
    PartitionFunction,
    partition_rows,
    register_partition,
)

__all__ = [
    "PartitionColumns",
    "PartitionContext",
    "PartitionFunction",
    "Partitioner",
    "apportion",
    "apportion_nonzero",
    "assign_classes",
    "assign_rows",
    "cut_below",
    "cut_proportions",
    "kinds",
    "partition_rows",
    "register_partition",
    "row_strata",
]

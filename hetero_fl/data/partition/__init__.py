"""Partition training rows among clients: label skew, quantity skew, groups, code of users."""

from hetero_fl.data.partition.apportion import apportion, apportion_nonzero
from hetero_fl.data.partition.assignment import assign_rows, partition_rows
from hetero_fl.data.partition.kinds import Partitioner, register_partition
from hetero_fl.data.partition.units import Units, row_strata

__all__ = [
    "Partitioner",
    "Units",
    "apportion",
    "apportion_nonzero",
    "assign_rows",
    "partition_rows",
    "register_partition",
    "row_strata",
]

"""Data of a federation: sources, partitions, splits and preprocessing.

`load_source` loads a data set by name, and `federate` partitions a data set among clients. The
resulting `FederatedData` returns the preprocessed examples of each participant.
"""

from hetero_fl.core.image_transforms import apply_scanner, augment
from hetero_fl.data import sources
from hetero_fl.data.checks import ExampleNames, check_examples
from hetero_fl.data.dataset import Block, ColumnLayout, Columns, Dataset, Examples, Vocabulary
from hetero_fl.data.division import federate
from hetero_fl.data.federated_data import FederatedData
from hetero_fl.data.partition import (
    Partitioner,
    Units,
    partition_rows,
    register_partition,
    row_strata,
)
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.data.registry import (
    Source,
    check_source,
    list_sources,
    load_source,
    register_source,
)
from hetero_fl.data.sources.multimodal import join_images_and_table
from hetero_fl.data.sources.synthetic import make_images, make_table
from hetero_fl.data.splits import with_test
from hetero_fl.data.table import from_arrays

__all__ = [
    "Block",
    "ColumnLayout",
    "Columns",
    "Dataset",
    "ExampleNames",
    "Examples",
    "FederatedData",
    "Partitioner",
    "Preprocess",
    "Source",
    "Units",
    "Vocabulary",
    "apply_scanner",
    "augment",
    "check_examples",
    "check_source",
    "federate",
    "from_arrays",
    "join_images_and_table",
    "list_sources",
    "load_source",
    "make_images",
    "make_table",
    "partition_rows",
    "register_partition",
    "register_source",
    "row_strata",
    "sources",
    "with_test",
]

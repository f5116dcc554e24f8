"""Data of a federation: sources, partitions, preprocessing, and the split among clients.

`load_source` gets a data set by name, `federate` deals it out, and the `FederatedData` that it returns serves every
participant's columns through that participant's own preprocessing.
"""

from hetero_fl.data import sources  # importing it registers them
from hetero_fl.data.apart import with_test
from hetero_fl.data.arrays import from_arrays
from hetero_fl.data.augment import augment
from hetero_fl.data.base import Columns, Dataset, Examples, check_examples
from hetero_fl.data.federate import federate
from hetero_fl.data.federated import FederatedData
from hetero_fl.data.joined import join
from hetero_fl.data.layout import Block, Layout
from hetero_fl.data.partition import deal, partition, strata
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.data.registry import check_source, list_sources, load_source, source
from hetero_fl.data.scanner import apply_scanner
from hetero_fl.data.sources.synthetic import make_images, make_table
from hetero_fl.data.tokens import Vocabulary

__all__ = [
    "Block",
    "Columns",
    "Dataset",
    "Examples",
    "FederatedData",
    "Layout",
    "Preprocess",
    "Vocabulary",
    "apply_scanner",
    "augment",
    "check_examples",
    "check_source",
    "deal",
    "federate",
    "from_arrays",
    "join",
    "list_sources",
    "load_source",
    "make_images",
    "make_table",
    "partition",
    "source",
    "sources",
    "strata",
    "with_test",
]

"""Find files and rows that occur in several parts of a federation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.stored_rows import Column, split_rows
from hetero_fl.data.splits import RowSelection, Splits
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import format_list

HASHED_ROWS = 256
"""Number of rows hashed at a time."""
COPIED_ROWS = 8192
"""Number of rows copied at a time to be hashed."""
PUBLIC_SETS = {
    "proxy": "proxy set",
    "common_validation": "global validation set",
    "common_test": "global test set",
}
"""Description of each public set."""


def check_paths(config: DataConfig, sources: Mapping[SourceConfig, Sequence[str]]) -> None:
    """Check that no file or folder is read for clients and for a common or public set, too.

    Sources of different names may have the same path, as they read different rows of it.

    Args:
        config: Data configuration.
        sources: Ids of the clients with their own sources, keyed by source.

    Raises:
        UserError: If the path of the proxy set or of a client is also that of the main data set, or
            the path of a client that of the proxy set, or if one of them lies in the other.
    """
    common: list[tuple[str, SourceConfig]] = [("data", config)]
    if config.proxy.source is not None:
        _compare_paths("data.proxy.source", config.proxy.source, common)
        common.append(("data.proxy.source", config.proxy.source))
    for source, owners in sources.items():
        _compare_paths(f"clients: '{owners[0]}': data", source, common)


def _compare_paths(
    where: str, source: SourceConfig, others: Sequence[tuple[str, SourceConfig]]
) -> None:
    if source.path is None:
        return
    path = Path(source.path).expanduser().resolve()
    for key, other in others:
        if other.path is None or other.name != source.name:
            continue
        found = Path(other.path).expanduser().resolve()
        if path == found:
            relation = "is also"
        elif path.is_relative_to(found):
            relation = "lies in"
        elif found.is_relative_to(path):
            relation = "contains"
        else:
            continue
        raise UserError(
            f"{where}.path: '{source.path}' {relation} {key}.path='{other.path}', so that rows "
            "would be in both; move them apart"
        )


def notes_on_shared_rows(
    config: DataConfig,
    owned: Mapping[str, Splits],
    divided: Mapping[str, Splits],
    public: Mapping[str, RowSelection],
) -> list[str]:
    """Return a note for each public set of which rows also occur elsewhere.

    Clients with their own files are compared with all public sets. A proxy set from a file is also
    compared with the other clients and with the global sets. Rows that are read from files when
    they are used are not compared.

    Args:
        config: Data configuration.
        owned: Rows of the clients with their own files, keyed by client id.
        divided: Rows of the other clients, keyed by client id.
        public: Public sets, keyed by name.
    """
    proxy = config.proxy.source
    notes = []
    for name, rows in public.items():
        others = {f"client '{client}'": tuple(splits.values()) for client, splits in owned.items()}
        if name == "proxy" and proxy is not None and proxy.path is not None:
            others |= {f"client '{client}'": tuple(own.values()) for client, own in divided.items()}
            others |= {
                f"the {title}": (public[other],)
                for other, title in PUBLIC_SETS.items()
                if other in public and other != name
            }
        counts = _count_shared_rows(rows, others)
        if counts:
            found = format_list(f"{count:,} of {other}" for other, count in counts.items())
            notes.append(
                f"the {PUBLIC_SETS[name]} contains rows that are elsewhere, too: {found}; remove "
                "their files from one of the folders"
            )
    return notes


def _count_shared_rows(
    public: RowSelection, others: Mapping[str, Sequence[RowSelection]]
) -> dict[str, int]:
    """Return the number of rows of each other set that a public set contains, if positive.

    Columns without any value in the public set are not compared.
    """
    x = public.examples.x
    if not others or not isinstance(x, Tensor) or not len(public.rows):
        return {}
    is_table = x.ndim == 2 and x.is_floating_point()
    kept = ~x[public.rows].isnan().all(0) if is_table else slice(None)
    known = set(row_hashes(x[public.rows][:, kept]))
    counts: Counter[str] = Counter()
    for name, parts in others.items():
        for part in parts:
            values = part.examples.x
            if isinstance(values, Tensor) and values.shape[1:] == x.shape[1:]:
                for rows in part.rows.split(COPIED_ROWS):
                    counts[name] += sum(row in known for row in row_hashes(values[rows][:, kept]))
    return {name: count for name, count in counts.items() if count}


def row_hashes(x: Column) -> list[bytes]:
    """Return a hash of each row of a column, which is equal for equal rows."""
    hashes: list[bytes] = []
    for batch in split_rows(x, HASHED_ROWS):
        flat = np.ascontiguousarray(batch.flatten(1).numpy())
        hashes += [hashlib.blake2b(row, digest_size=16).digest() for row in flat]
    return hashes

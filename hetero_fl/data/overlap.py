"""Find files and rows that occur in several parts of a federation, such as training and test."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.images import to_floats
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.splits import RowSelection, Splits
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import Caution, format_list, pluralize

HASHED_BYTES = 2**20
"""Approximate number of bytes that are hashed at a time."""
EQUAL_SHARE = 0.01
"""Share of the rows of a set from which equal rows of one source are reported."""
FEW_VALUES = 10
"""Number of values of each column up to which a table is like a questionnaire."""
COPIED_SHARE = 0.9
"""Share of the rows of a set from which equal rows of a questionnaire are reported."""
CHANCE = 0.01
"""Expected number of copies of a row from which rows of a table are equal by chance."""
MIN_TOKENS = 5
"""Number of different tokens below which equal texts are expected."""
SAMPLED_ROWS = 4096
"""Number of rows from which the frequencies of the values of a table are estimated."""
MAX_LISTED = 5
"""Maximum number of sets that a note lists."""
NO_HASHES = np.zeros(0, np.uint64)
POOL = ""
"""Key of the rows that clients sample, among the ids of clients."""
PUBLIC_SETS = {
    "proxy": "proxy set",
    "common_validation": "global validation set",
    "common_test": "global test set",
}
"""Description of each public set."""


def resolve_path(source: SourceConfig) -> Path | None:
    """Return the absolute path of a source without links, or None if it reads no file."""
    return None if source.path is None else Path(source.path).expanduser().resolve()


def check_paths(config: DataConfig, sources: Mapping[SourceConfig, Sequence[str]]) -> None:
    """Check that no file or folder is read for clients and for a common or public set, too.

    Sources of different names may have the same path, as they read different rows of it.

    Args:
        config: Data configuration.
        sources: Ids of the clients with their own sources, keyed by source.

    Raises:
        UserError: If the paths of two of the main data set, the proxy set and a client are equal,
            or one lies in the other. The paths of two clients are not compared.
    """
    common: list[tuple[str, SourceConfig]] = [("data", config)]
    if config.proxy.source is not None:
        common.append(("data.proxy.source", config.proxy.source))
    own = [(f"clients: '{owners[0]}': data", source) for source, owners in sources.items()]
    for (key, first), (where, second) in (*combinations(common, 2), *product(common, own)):
        path = resolve_path(first)
        other = resolve_path(second)
        if path is None or other is None or first.name != second.name:
            continue
        if path.is_relative_to(other) or other.is_relative_to(path):
            raise UserError(
                f"{where}.path: '{second.path}' overlaps {key}.path='{first.path}', so that rows "
                "would be in both; move them apart"
            )


def notes_on_equal_rows(
    dataset: Dataset,
    private: Mapping[str, Splits],
    public: Mapping[str, RowSelection],
    *,
    owners: Collection[str],
    advice: str,
) -> list[str]:
    """Return a warning about validation, test and public rows that are elsewhere, too, and copies.

    At least two rows, and a hundredth of a set, must be equal. Texts of which the next word or item
    is predicted are not compared (see also `EqualRows`).

    Args:
        dataset: Main data set.
        private: Rows of the clients, keyed by client id, and those that clients sample (`POOL`).
        public: Public sets, keyed by name.
        owners: Clients whose rows no partition has put together, so that they are not those of
            another client.
        advice: What to do about equal rows.
    """
    if dataset.predicts_items:
        return []
    selections = [part for own in private.values() for part in own.values()]
    selections += public.values()
    equal = EqualRows(selections, dataset.pixel_range)
    trained = equal.of(own["train"] for own in private.values())
    # Validation and test sets that are given are not data of the client.
    data = {
        client: [part for part in own.values() if part.examples is own["train"].examples]
        for client, own in private.items()
    }
    private_rows = equal.of(part for parts in data.values() for part in parts)
    counts = _count_public_rows(dataset, equal, selections, public)
    # Rounds and settings may be selected by validation sets, which therefore hold no test rows.
    validation = [own["validation"] for own in private.values() if "validation" in own]
    validation += [public[name] for name in ("common_validation",) if name in public]
    for name, rows in public.items():
        if name != "proxy":
            known = private_rows | equal.of(validation if name == "common_test" else ())
            counts |= equal.count(f"the {PUBLIC_SETS[name]}", [rows], known)
    for client, own in private.items():
        held_out = [part for split, part in own.items() if split != "train"]
        counts |= equal.count(f"validation and test of client '{client}'", held_out, trained)
    known = equal.of(part for name in data if name not in owners for part in data[name])
    for client in owners:
        counts |= equal.count(f"client '{client}'", data[client], known)
        known |= equal.of(data[client])
    if not counts:
        return []
    listed = format_list((f"{count} of {title}" for title, count in counts.items()), MAX_LISTED)
    return [Caution(f"rows are in several sets, so scores may be too high: {listed}; {advice}")]


def notes_on_shared_patients(
    owned: Mapping[str, Splits], common: Mapping[str, RowSelection]
) -> list[str]:
    """Return a warning about patients of clients with their own sources that are elsewhere, too.

    This is no error, because the same number may be another patient of another site. For the same
    reason, two clients with their own sources are not compared.

    Args:
        owned: Rows of the clients with their own sources, keyed by client id.
        common: Other sets of rows, keyed by description.
    """
    found = []
    for client, own in owned.items():
        names = set().union(*map(_patient_names, own.values()))
        for title, part in common.items():
            if shared := natural_order(names & _patient_names(part)):
                noun = part.examples.patient_term.noun
                count = pluralize(len(shared), noun)
                found.append(f"{count} of client '{client}' in {title}, such as '{shared[0]}'")
    if not found:
        return []
    return [
        Caution(
            f"patients are in several sets, so scores may be too high: "
            f"{format_list(found, MAX_LISTED)}; remove their rows from one of the sets, or, if "
            "each site numbers its patients, prefix the numbers with the site"
        )
    ]


def _patient_names(part: RowSelection) -> set[str]:
    has_names = bool(part.examples.patient_names)
    return part.examples.names_of("patient", part.rows) if has_names else set()


def _count_public_rows(
    dataset: Dataset,
    equal: EqualRows,
    selections: Sequence[RowSelection],
    public: Mapping[str, RowSelection],
) -> dict[str, str]:
    """Return the number of rows of the proxy set that are in other sets (see `EqualRows.count`)."""
    if "proxy" not in public:
        return {}
    proxy = public["proxy"]
    x = proxy.examples.x
    if isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() and len(proxy.rows):
        # Columns without any value in the public set are not compared.
        kept = ~x[proxy.rows].isnan().all(0)
        if not bool(kept.all()):
            equal = EqualRows(selections, dataset.pixel_range, kept)
    known = equal.of(part for part in selections if part is not proxy)
    return equal.count("the proxy set", [proxy], known)


class EqualRows:
    """The rows of a federation whose inputs occur at least twice.

    Images and series of a single value, texts of few words, and rows of a table that may be equal
    by chance do not count. Answers of a questionnaire count only if nearly all rows are equal.

    Args:
        selections: Rows to compare. Each row is hashed once.
        pixel_range: Value of integer pixels that becomes 1, to compare images of several types. If
            None, 255.
        kept: Columns of tables to compare, bool `[F]`. If None, all columns are compared.
    """

    def __init__(
        self,
        selections: Iterable[RowSelection],
        pixel_range: float | None = None,
        kept: Tensor | None = None,
    ) -> None:
        inputs = {
            id(x): x
            for x in (selection.examples.x for selection in selections)
            if isinstance(x, Tensor) and (kept is None or x.shape[1:] == kept.shape)
        }
        has_types = len({x.dtype for x in inputs.values() if x.ndim == 4}) > 1
        self._hashes: dict[int, np.ndarray] = {}
        self._share = EQUAL_SHARE
        for key, x in inputs.items():
            values = to_floats(x, pixel_range) if has_types else x
            values = values if kept is None else values[:, kept]
            hashed = row_hashes(values)
            first = torch.from_numpy(np.unique(hashed, return_index=True)[1])
            self._share = max(self._share, _reported_share(values, first))
            self._hashes[key] = np.where(_is_meaningful(values), hashed, 0)
        hashes = np.concatenate([NO_HASHES, *self._hashes.values()])
        distinct, counts = np.unique(hashes, return_counts=True)
        repeated = distinct[counts > 1]
        for own in self._hashes.values():
            own[~np.isin(own, repeated)] = 0

    def of(self, parts: Iterable[RowSelection]) -> set[int]:
        """Return the hashes of those rows that occur at least twice."""
        return {value for part in parts for value in self._repeated_hashes(part)}

    def count(self, title: str, parts: Sequence[RowSelection], known: Set[int]) -> dict[str, str]:
        """Return "N of M" rows of `parts` that have a known hash, keyed by title, unless few do."""
        found = sum(value in known for part in parts for value in self._repeated_hashes(part))
        total = sum(len(part.rows) for part in parts)
        return {title: f"{found:,} of {total:,}"} if found >= max(2, self._share * total) else {}

    def _repeated_hashes(self, part: RowSelection) -> list[int]:
        hashes = self._hashes.get(id(part.examples.x))
        if hashes is None:
            return []
        own = hashes[part.rows.numpy()]
        return own[own != 0].tolist()


def _is_meaningful(x: Tensor) -> np.ndarray:
    """Return whether it means anything that a row occurs twice, bool `[N]`."""
    if x.dtype == torch.int64:
        tokens = x.sort(1).values
        return ((tokens[:, 1:] != tokens[:, :-1]).sum(1) + 1 >= MIN_TOKENS).numpy()
    if x.ndim == 2:
        return np.ones(len(x), dtype=bool)
    found = np.empty(len(x), dtype=bool)
    for rows in _parts(x):
        flat = x[rows].flatten(1)
        found[rows] = (flat != flat[:, :1]).any(1).numpy()
    return found


def _reported_share(x: Tensor, distinct: Tensor) -> float:
    """Return the share of the rows of a set from which equal rows are reported.

    Rows of a table are not reported if they may be equal by chance, if the columns are independent.
    Dependent answers of a questionnaire are equal more often.

    Args:
        x: Examples.
        distinct: Indices of the distinct rows.
    """
    if x.ndim != 2 or not x.is_floating_point() or len(distinct) < 2:
        return EQUAL_SHARE
    expected = float(len(distinct))
    most = 0
    for column in x[distinct[:SAMPLED_ROWS]].numpy().T:
        counts = np.unique(column, return_counts=True)[1]
        expected *= (counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1))
        most = max(most, len(counts))
    if expected >= CHANCE:
        return math.inf
    return COPIED_SHARE if most <= FEW_VALUES else EQUAL_SHARE


def row_hashes(x: Tensor) -> np.ndarray:
    """Return a hash of each row of a column, uint64 `[N]`, which is equal for equal rows."""
    row_bytes = _row_bytes(x)
    keys = np.random.default_rng(0).integers(2**63, size=(2, -(-row_bytes // 8)), dtype=np.uint64)
    hashes = np.empty(len(x), dtype=np.uint64)
    for rows in _parts(x):
        # The sum with 0 turns -0.0 into 0.0.
        flat = np.ascontiguousarray(x[rows].flatten(1).numpy() + 0)
        content = flat.view(np.uint8).reshape(len(flat), row_bytes)
        words = np.pad(content, ((0, 0), (0, -row_bytes % 8))).view(np.uint64)
        # The key of each position makes the hash depend on the order of the words.
        mixed = (words ^ keys[0]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        hashes[rows] = (mixed * (2 * keys[1] + np.uint64(1))).sum(1, dtype=np.uint64)
    return hashes


def _row_bytes(x: Tensor) -> int:
    return max(1, x.dtype.itemsize * math.prod(x.shape[1:]))


def _parts(x: Tensor) -> list[slice]:
    """Return the rows in parts.

    Results of the parts belong into an array that exists before: small arrays between the large
    ones of the parts would keep their memory from being used again.
    """
    size = max(1, HASHED_BYTES // _row_bytes(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]

"""Find files and rows that occur in several parts of a federation, such as training and test."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.images import to_floats
from hetero_fl.core.stored_rows import Column, split_rows
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.partition.groups import patient_names
from hetero_fl.data.splits import RowSelection, Splits
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import Caution, format_list

HASHED_BYTES = 2**20
"""Approximate number of bytes that are hashed at a time."""
EQUAL_SHARE = 0.01
"""Share of the rows of a set from which equal rows of one source are reported."""
FEW_VALUES = 10
"""Number of values of each column up to which a table is like a questionnaire."""
COPIED_SHARE = 0.9
"""Share of the rows of a set from which equal rows of a questionnaire are reported."""
CHANCE = 0.01
"""Expected number of equal rows from which rows of a table are taken to be equal by chance."""
MIN_TOKENS = 5
"""Number of different tokens below which equal texts are expected."""
SAMPLED_ROWS = 4096
"""Number of rows from which the frequencies of the values of a table are estimated."""
MAX_LISTED = 5
"""Maximum number of sets that a note lists."""
POOL = ""
"""Key of the rows that clients sample, among the ids of clients."""
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


def notes_on_equal_rows(
    dataset: Dataset,
    config: DataConfig,
    private: Mapping[str, Splits],
    public: Mapping[str, RowSelection],
    *,
    sources: Mapping[str, object],
    advice: str,
) -> list[str]:
    """Return warnings about equal inputs on both sides of a cut, and about copied rows.

    The training rows of each client are compared with its validation and test rows and with the
    public sets, and the rows of clients with those of other clients, unless a partition has divided
    them. Of the rows of one source, at least two, and a hundredth of a set, must be equal. Rows
    that are read from files when they are used are not compared, and neither are texts of which the
    next word or item is predicted (see also `EqualRows`).

    Args:
        dataset: Main data set.
        config: Data configuration.
        private: Rows of the clients, keyed by client id, and those that clients sample (`POOL`).
        public: Public sets, keyed by name.
        sources: Separate source of each client that has one, keyed by client id.
        advice: What to change if a source contains equal rows.
    """
    if dataset.predicts_items:
        return []
    everything = [part for own in private.values() for part in own.values()]
    selections = [*everything, *public.values()]
    equal = EqualRows(selections, dataset.pixel_range)
    notes = _notes_on_clients(equal, config, private, sources, advice)
    for name, rows in public.items():
        compared = equal
        x = rows.examples.x
        if name == "proxy" and isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point():
            # Columns without any value in the public set are not compared.
            empty = x[rows.rows].isnan().all(0)
            if len(rows.rows) and bool(empty.any()):
                compared = EqualRows(selections, kept=~empty)
        separate = set(sources)
        if name == "proxy" and config.proxy.source is not None:
            separate |= {*private, *public}
        notes += _notes_on_patients(name, rows, private, separate)
        found = _equal_to_public(compared, name, private, public, separate)
        if found:
            listed = format_list((f"{count:,} of {t}" for t, count in found.items()), MAX_LISTED)
            is_separate = any(_title(other) in found for other in separate)
            notes.append(
                Caution(
                    f"the {PUBLIC_SETS[name]} contains rows that are elsewhere, too: {listed}; "
                    f"{'remove them from one of the two' if is_separate else advice}"
                )
            )
    return notes


def _equal_to_public(
    equal: EqualRows,
    name: str,
    private: Mapping[str, Splits],
    public: Mapping[str, RowSelection],
    separate: Set[str],
) -> dict[str, int]:
    """Return the number of rows of each other set that are in a public set, if positive.

    Args:
        equal: Equal rows.
        name: Name of the public set.
        private: Rows of the clients, keyed by client id.
        public: Public sets, keyed by name.
        separate: Clients and public sets whose source is not that of the public set. Of the others,
            only training rows are compared with test rows.
    """
    found: dict[str, int] = {}
    # A client and the federation may be given the same validation or test set.
    given = {"proxy": ("validation", "test"), "common_test": ("validation",)}.get(name, ())
    for client, own in private.items():
        compared = [
            part
            for split, part in own.items()
            if split == "train"
            or (client in separate and (split in given or part.examples is own["train"].examples))
        ]
        found[_title(client)] = equal.count(compared, [public[name]], client in separate)
    for other in list(PUBLIC_SETS)[list(PUBLIC_SETS).index(name) + 1 :]:
        if other in public:
            found[_title(other)] = equal.count([public[other]], [public[name]], other in separate)
    return {title: count for title, count in found.items() if count}


def _notes_on_patients(
    name: str, rows: RowSelection, private: Mapping[str, Splits], separate: Set[str]
) -> list[str]:
    """Return a warning for each separate client with patients of the names in a public set."""
    public = patient_names(rows.examples, rows.rows)
    notes: list[str] = []
    for client in natural_order(separate & private.keys() if public else ()):
        train = private[client]["train"]
        if shared := natural_order(public & patient_names(train.examples, train.rows)):
            names = format_list(shared, MAX_LISTED, quote=True)
            notes.append(
                Caution(
                    f"{_title(client)} and the {PUBLIC_SETS[name]} have patients of the same "
                    f"name: {names}; remove their rows from one of the two or, if each site "
                    "numbers its patients, prefix the numbers with the site"
                )
            )
    return notes


def _notes_on_clients(
    equal: EqualRows,
    config: DataConfig,
    private: Mapping[str, Splits],
    sources: Mapping[str, object],
    advice: str,
) -> list[str]:
    """Return warnings about equal rows within a client and in two clients."""
    within: list[str] = []
    for client, own in private.items():
        held_out = [part for split, part in own.items() if split != "train"]
        if count := equal.count(held_out, [own["train"]], separate=False):
            size = sum(len(part.rows) for part in held_out)
            within.append(f"{count:,} of {size:,} of client '{client}'")
    notes: list[str] = []
    if within:
        notes.append(
            Caution(
                "rows of the local validation and test sets equal training rows, so scores may be "
                f"too high: {format_list(within, MAX_LISTED)}; {advice}"
            )
        )
    between = [
        f"{count:,} of client '{first}' and client '{second}'"
        for (first, second), count in equal.shared(private).items()
        if POOL not in (first, second)
        and (
            sources.get(first) != sources.get(second)
            or (first not in sources and config.partition.kind == "natural")
        )
    ]
    if between:
        listed = format_list(between, MAX_LISTED)
        notes.append(Caution(f"rows of two clients are equal: {listed}; remove them from one"))
    return notes


def _title(name: str) -> str:
    """Return the title of a client or public set in messages."""
    if name == POOL:
        return "the rows that clients sample"
    return f"the {PUBLIC_SETS[name]}" if name in PUBLIC_SETS else f"client '{name}'"


class EqualRows:
    """The rows of a federation whose inputs occur at least twice.

    Not included are images and series of a single value, texts of few words, and rows of tables
    that are equal by chance, which are those of which more than `CHANCE` copies are expected if the
    columns are independent.

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
        used: dict[int, tuple[Tensor, Tensor]] = {}
        for selection in selections:
            x = selection.examples.x
            if isinstance(x, Tensor) and (kept is None or x.shape[1:] == kept.shape):
                _, mask = used.setdefault(id(x), (x, torch.zeros(len(x), dtype=torch.bool)))
                mask[selection.rows] = True
        image_types = {x.dtype for x, _ in used.values() if x.ndim == 4}
        self._hashes: dict[int, np.ndarray] = {}
        inputs: list[Tensor] = []
        for key, (x, mask) in used.items():
            rows = mask.nonzero().squeeze(1)
            values = x if len(rows) == len(x) else x[rows]
            if len(image_types) > 1:
                values = to_floats(values, pixel_range)
            inputs.append(values if kept is None else values[:, kept])
            self._hashes[key] = np.zeros(len(x), dtype=np.uint64)
            self._hashes[key][rows.numpy()] = row_hashes(inputs[-1])
        hashes = [self._hashes[key][mask.numpy()] for key, (_, mask) in used.items()]
        distinct, first, counts = np.unique(
            np.concatenate([np.zeros(0, np.uint64), *hashes]),
            return_index=True,
            return_counts=True,
        )
        repeated = []
        start = 0
        for values in inputs:
            here = (start <= first) & (first < start + len(values))
            several = here & (counts > 1)
            others = torch.from_numpy(first[here & ~several][:: len(first) // SAMPLED_ROWS + 1])
            x = values[torch.from_numpy(first[several] - start)]
            meaningful = _is_meaningful(x, values[others - start])
            repeated.append(distinct[several][meaningful])
            start += len(values)
        # Dependent answers are equal more often than `CHANCE` says.
        self._is_questionnaire = all(map(_has_few_values, inputs))
        self._repeated = np.concatenate([np.zeros(0, np.uint64), *repeated])

    def _of(self, parts: Iterable[RowSelection]) -> np.ndarray:
        """Return the hashes of those rows that occur at least twice."""
        found = [np.zeros(0, np.uint64)]
        for part in parts:
            hashes = self._hashes.get(id(part.examples.x))
            if hashes is not None and len(self._repeated):
                own = hashes[part.rows.numpy()]
                found.append(own[np.isin(own, self._repeated)])
        return np.concatenate(found)

    def count(
        self, parts: Collection[RowSelection], others: Collection[RowSelection], separate: bool
    ) -> int:
        """Return the number of rows of `parts` that equal a row of `others`.

        Args:
            parts: Rows to count.
            others: Rows to compare with.
            separate: Whether the rows come from separate sources. If False, the result is 0 unless
                at least two rows, and the share `EQUAL_SHARE` of one side, are equal. The share of
                a questionnaire is `COPIED_SHARE` in both cases.
        """
        own = self._of(parts)
        other = self._of(others)
        count = int(np.isin(own, other).sum())
        smaller = min(sum(len(part.rows) for part in side) for side in (parts, others))
        is_reported = separate and not self._is_questionnaire
        return count if is_reported or count >= self._least(smaller) else 0

    def _least(self, rows: int) -> float:
        """Return the number of equal rows from which those of a set of so many are reported."""
        return max(2, (COPIED_SHARE if self._is_questionnaire else EQUAL_SHARE) * rows)

    def shared(self, private: Mapping[str, Splits]) -> dict[tuple[str, str], int]:
        """Return the number of distinct rows that two clients share, keyed by their ids.

        A row of several clients is counted for the first client and each other client, if the data
        of one of the two, without a given validation or test set, contains it.
        """
        clients = list(private)
        own = [np.unique(self._of(private[client].values())) for client in clients]
        hashes = np.concatenate([np.zeros(0, np.uint64), *own])
        owner = np.repeat(np.arange(len(own)), [len(each) for each in own])
        data = [
            self._of(part for part in splits.values() if part.examples is splits["train"].examples)
            for splits in private.values()
        ]
        in_data = np.concatenate([np.zeros(0, bool), *map(np.isin, own, data)])
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        is_counted = (owner[first][group] != owner) & (in_data[first][group] | in_data)
        pairs = np.stack([owner[first][group], owner], 1)[is_counted]
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        sizes = [sum(len(part.rows) for part in private[client].values()) for client in clients]
        return {
            (clients[a], clients[b]): int(count)
            for (a, b), count in zip(found.tolist(), counts, strict=True)
            if count >= self._least(min(sizes[a], sizes[b]))
        }


def _is_meaningful(x: Tensor, others: Tensor) -> np.ndarray:
    """Return whether it means anything that each row of `x` occurs twice, bool `[N]`.

    Args:
        x: Distinct rows that occur at least twice, shape `[N, ...]`.
        others: Some of the other rows.
    """
    if x.dtype == torch.int64:
        tokens = x.sort(1).values
        return ((tokens[:, 1:] != tokens[:, :-1]).sum(1) + 1 >= MIN_TOKENS).numpy()
    if x.ndim > 2:
        flat = x.flatten(1)
        return (flat != flat[:, :1]).any(1).numpy()
    rows = np.nan_to_num(torch.cat([x, others]).numpy(), nan=np.finfo(np.float32).min)
    expected = np.full(len(x), np.log(max(1, len(rows))))
    for column in rows.T if len(x) else ():
        _, value, counts = np.unique(column, return_inverse=True, return_counts=True)
        with np.errstate(divide="ignore"):
            expected += np.log((counts[value[: len(x)]] - 1) / max(1, len(rows) - 1))
    return expected < np.log(CHANCE)


def _has_few_values(x: Tensor) -> bool:
    """Return whether examples are a table of which each column has at most `FEW_VALUES` values."""
    if x.ndim != 2 or not x.is_floating_point():
        return False
    return all(len(np.unique(column)) <= FEW_VALUES for column in x[:SAMPLED_ROWS].numpy().T)


def row_hashes(x: Column) -> np.ndarray:
    """Return a hash of each row of a column, uint64 `[N]`, which is equal for equal rows."""
    row_bytes = max(1, x.dtype.itemsize * math.prod(x.shape[1:]))
    keys = np.random.default_rng(0).integers(2**63, size=(2, -(-row_bytes // 8)), dtype=np.uint64)
    hashes = []
    for batch in split_rows(x, max(1, HASHED_BYTES // row_bytes)):
        # The sum with 0 turns -0.0 into 0.0.
        flat = np.ascontiguousarray(batch.flatten(1).numpy() + 0)
        content = flat.view(np.uint8).reshape(len(flat), row_bytes)
        words = np.pad(content, ((0, 0), (0, -row_bytes % 8))).view(np.uint64)
        # The key of each position makes the hash depend on the order of the words.
        mixed = (words ^ keys[0]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        hashes.append((mixed * (2 * keys[1] + np.uint64(1))).sum(1, dtype=np.uint64))
    return np.concatenate(hashes)

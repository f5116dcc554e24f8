"""The rows of each client: assigned before the run, or sampled on demand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from cachetools import cachedmethod

from hetero_fl.config.data import PartitionConfig, SplitConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import PATIENTS
from hetero_fl.data.partition import apportion_nonzero, row_strata
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.data.splits import RowSelection, enough_rows, split_counts
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_numpy_generator

HASH_ROWS = 8192
"""Number of rows of which all columns are hashed, one after the other."""
HASH_BATCH = 256
"""Number of rows hashed at a time. Does not affect the hash."""
MAX_CACHED_CLIENTS = 1024
"""Maximum number of clients whose sampled rows are cached."""


@dataclass(frozen=True)
class LazyPartition:
    """The partition `drawn`, in which each client samples rows from a pool without replacement.

    Several clients may get the same rows. The rows of a client depend on the id and the `size` of
    the client, the pool, the configuration and the seed, but not on other clients, so the cost does
    not grow with the number of clients.

    If `alpha` is set, the label distribution of a client is sampled from Dirichlet(alpha * C * q),
    where q is the label distribution of the pool with C classes. This is the distribution of Hsu et
    al. (arXiv:1909.06335, section 3), whose concentration is `alpha * C`. If a class has too few
    rows, the missing rows are taken from the other classes.

    Args:
        pool: Rows to sample from.
        task: Learning task.
        config: Partition settings.
        split: Shares of validation and test rows.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.

    Example:
        >>> from hetero_fl.config.data import DataConfig
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.data import federate, make_table
        >>> config = DataConfig(partition={"kind": "drawn", "rows": 40})
        >>> clients = {f"client_{i}": ClientSettings() for i in range(100)}
        >>> data = federate(make_table(), config, clients, seed=0)
        >>> data.n_rows("client_7", "train") + data.n_rows("client_7", "test") < 40
        True
    """

    pool: RowSelection
    task: Task
    config: PartitionConfig
    split: SplitConfig
    clients: Population
    seed: int
    _cached_splits: BoundedCache[dict[str, RowSelection]] = field(
        default_factory=lambda: BoundedCache(MAX_CACHED_CLIENTS), compare=False
    )

    def check(self) -> None:
        """Check that every client can get the rows that its settings require.

        Raises:
            UserError: If a client would get too few rows or more rows than the pool contains, or
                the data identifies patients.
        """
        where = "data.partition"
        pool_size = len(self.pool.rows)
        if self.pool.examples.patient is not None:
            term = self.pool.examples.patient_term
            if term == PATIENTS:
                raise UserError(
                    f"{where}.kind=drawn cannot be combined with data.patient; remove data.patient"
                )
            raise UserError(
                f"{where}.kind=drawn divides {term.noun}s, but {term.rule}; choose another kind"
            )
        # Larger counts leave at least two training rows in spite of rounding.
        largest = int(3 / (1 - self.split.validation - self.split.test)) + 1
        for profile in self.clients.profiles:
            if profile.settings.data is not None:
                continue
            size = profile.settings.size
            rows = round(self.config.rows * size)
            # The number of rows of the client is `rows` times its size.
            found = f"for client '{profile.first}' of size {size:g}, got {self.config.rows}"
            if rows > pool_size:
                raise UserError(
                    f"{where}.rows: must be <= {math.floor(pool_size / size)}, as there are "
                    f"{pool_size} rows to sample from, {found}"
                )
            has_spread = self.config.spread > 0
            counts = range(self.config.min_size, largest + 1) if has_spread else [rows]
            short = [count for count in counts if enough_rows(count, self.split) > count]
            least = enough_rows(short[-1], self.split) if short else self.config.min_size
            if has_spread and short:
                raise UserError(
                    f"{where}.min_size: must be >= {least} to be split by data.split, got "
                    f"{self.config.min_size}"
                )
            least = max(least, self.config.min_size)
            if rows < least:
                raise UserError(
                    f"{where}.rows: must be >= {math.ceil(least / size)} for min_size="
                    f"{self.config.min_size} and data.split, {found}"
                )

    def num_rows(self, client: str) -> int:
        """Return the number of rows of a client without sampling the rows.

        The number is `config.rows` times the client size and, if `config.spread` is set, times a
        log-normal random number. The result is limited to `config.min_size` and the pool size.
        """
        rows = self.config.rows * self.clients[client].size
        if self.config.spread:
            rows *= keyed_numpy_generator("data", self.seed, "rows", client).lognormal(
                0, self.config.spread
            )
        return min(max(round(rows), self.config.min_size), len(self.pool.rows))

    @cachedmethod(attrgetter("_cached_splits"))
    def splits(self, client: str) -> dict[str, RowSelection]:
        """Sample the rows of a client and return the rows of each split.

        The result is cached.
        """
        count = self.num_rows(client)
        rng = keyed_numpy_generator("data", self.seed, "drawn", client)
        if self.config.alpha is None:
            indices = _sample_rows(rng, len(self.pool.rows), count)
        else:
            sizes = np.array([len(c) for c in self._class_indices])
            proportions = rng.dirichlet(self.config.alpha * len(sizes) * sizes / sizes.sum())
            class_counts = _fill_counts(count, proportions, sizes)
            nonempty = [(c, n) for c, n in zip(self._class_indices, class_counts, strict=True) if n]
            indices = np.concatenate([c[_sample_rows(rng, len(c), n)] for c, n in nonempty])
        # The rows are sorted by class, so they are shuffled before they are split.
        rows = rng.permutation(self.pool.rows.numpy()[indices])
        split_sizes = split_counts(count, self.split)
        parts = np.split(rows, np.cumsum(list(split_sizes.values()))[:-1])
        return {
            name: RowSelection(self.pool.examples, torch.from_numpy(np.sort(part)))
            for name, part in zip(split_sizes, parts, strict=True)
        }

    @cached_property
    def _class_indices(self) -> list[np.ndarray]:
        """Indices into the rows of the pool for each class."""
        labels = self.pool.examples.labels[self.pool.rows]
        strata = row_strata(labels, self.task).numpy()
        return [np.flatnonzero(strata == c) for c in np.unique(strata)]


def _sample_rows(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    return rng.choice(total, count, replace=False, shuffle=False)


def _fill_counts(count: int, proportions: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Divide `count` rows among classes in proportion, without exceeding any capacity.

    Excess rows are divided in proportion among the classes with free capacity or, if the
    proportions of these classes are 0, in proportion to the free capacities.
    """
    counts = np.zeros_like(capacity)
    while (left := count - counts.sum()) > 0:
        free = capacity - counts
        share = np.where(free > 0, proportions, 0.0)
        counts += np.minimum(
            apportion_nonzero(left, share if share.sum() > 0 else free.astype(float)), free
        )
    return counts


@dataclass(frozen=True)
class AssignedRows:
    """The rows of a client on this machine, keyed by split."""

    rows: Mapping[str, RowSelection]

    def count(self, split: str) -> int:
        """Return the number of rows of a split."""
        return len(self.rows[split].rows)


@dataclass(frozen=True)
class DrawnRows:
    """The rows of a client that are sampled from a pool when they are used."""

    partition: LazyPartition
    client: str

    @property
    def rows(self) -> Mapping[str, RowSelection]:
        """Rows, keyed by split."""
        return self.partition.splits(self.client)

    def count(self, split: str) -> int:
        """Return the number of rows of a split without sampling the rows."""
        return split_counts(self.partition.num_rows(self.client), self.partition.split)[split]


@dataclass(frozen=True)
class RemoteDataInfo:
    """Information about the rows of a client on another machine.

    Attributes:
        counts: Number of rows of each split.
        content_hash: SHA-256 hash of the rows.
        view: Preprocessing of the client. If None, the configuration defines the preprocessing.
        labels: Label counts of the training rows. If None, the client does not reveal the counts.
    """

    counts: Mapping[str, int]
    content_hash: str
    view: Preprocess | None = None
    labels: tuple[float, ...] | None = None
    rows: ClassVar[Mapping[str, RowSelection]] = {}

    def count(self, split: str) -> int:
        """Return the number of rows of a split."""
        return self.counts[split]


class ClientRows(Mapping[str, Mapping[str, RowSelection]]):
    """A mapping from client ids to the train, validation and test rows of the clients.

    Clients on other machines have no rows in the mapping. The arguments are available as
    attributes.

    Args:
        assigned: Rows of the clients that do not sample from a pool, keyed by client id and split.
        lazy_partition: Partition in which the other clients sample their rows. If None, there is no
            pool.
        remote_info: Information about clients on other machines, keyed by client id.
    """

    def __init__(
        self,
        assigned: Mapping[str, Mapping[str, RowSelection]],
        lazy_partition: LazyPartition | None = None,
        remote_info: Mapping[str, RemoteDataInfo] | None = None,
    ) -> None:
        self.assigned = assigned
        self.lazy_partition = lazy_partition
        self.remote_info = remote_info or {}
        self._known: dict[str, AssignedRows | RemoteDataInfo] = {
            **{client: AssignedRows(rows) for client, rows in assigned.items()},
            **self.remote_info,
        }

    def of(self, client: str) -> AssignedRows | DrawnRows | RemoteDataInfo:
        """Return what is known of the rows of a client.

        Raises:
            KeyError: If there is no such client.
        """
        if client in self._known:
            return self._known[client]
        if self.lazy_partition is None or client not in self.lazy_partition.clients:
            raise KeyError(client)
        return DrawnRows(self.lazy_partition, client)

    @property
    def n_train(self) -> int:
        """Number of training rows of all clients.

        For clients that sample from a pool (partition `drawn`), the rows of the pool count once.
        """
        pool = len(self.lazy_partition.pool.rows) if self.lazy_partition else 0
        return pool + sum(known.count("train") for known in self._known.values())

    def clients_with_one_row(self) -> list[str]:
        """Return the ids of the clients with a single training row.

        Clients that sample their rows from a pool always have more than one training row.
        """
        return [client for client, known in self._known.items() if known.count("train") == 1]

    def rows_by_location(self) -> list[tuple[tuple[str, str], RowSelection]]:
        """Return pairs of a location and the rows at this location, for all rows on this machine.

        The location is `(client, split)` or, for the pool, `("", "pool")`.
        """
        located = [
            ((client, name), share)
            for client, known in self._known.items()
            for name, share in known.rows.items()
        ]
        if self.lazy_partition is not None:
            located.append((("", "pool"), self.lazy_partition.pool))
        return located

    def __getitem__(self, client: str) -> Mapping[str, RowSelection]:
        return self.of(client).rows

    def __contains__(self, client: object) -> bool:
        return client in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def _ids(self) -> Mapping[str, object]:
        return self.assigned if self.lazy_partition is None else self.lazy_partition.clients


def fingerprint(about: object, rows_by_location: Iterable[tuple[Any, RowSelection]]) -> str:
    """Return the SHA-256 hash of sets of rows.

    The hash includes the inputs, targets, times, units and excluded classes, but not
    the groups and patients.

    Args:
        about: Description that is included in the hash.
        rows_by_location: Pairs of a location, which is included in the hash, and a set of rows.
    """
    digest = hashlib.sha256(repr(about).encode())
    for place, share in rows_by_location:
        each = share.examples
        optional = (each.y, each.time, each.unit, each.excluded)
        columns = [each.x, *(t for t in optional if t is not None)]
        types = [(column.dtype, tuple(column.shape[1:])) for column in columns]
        digest.update(repr((place, len(share.rows), types)).encode())
        for rows in share.rows.split(HASH_ROWS):
            for column in columns:
                for part in rows.split(HASH_BATCH):
                    digest.update(column[part].contiguous().numpy().data)
    return digest.hexdigest()

"""The rows of each client: assigned before the run, or drawn when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from cachetools import cachedmethod

from hetero_fl.config.data import PartitionConfig, SplitConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import RowSelection
from hetero_fl.data.partition import apportion_nonzero, row_strata
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.data.splits import FEWEST_TO_TRAIN, split_counts
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_numpy_generator

HASH_ROWS = 8192
SPLITS_KEPT = 1024  # clients whose drawn rows are kept


@dataclass(frozen=True)
class LazyPartition:
    """The partition `drawn`: each client draws rows of a pool without replacement.

    Clients may share rows. A client's rows depend on its id, its `size`, the pool, the
    configuration and the seed, and not on the other clients. With `alpha`, its mix of labels is
    Dirichlet(alpha · C · q), q the shares of the C classes in the pool (as in Hsu et al.,
    arXiv:1909.06335, whose q is uniform); where a class has too few rows, the other classes fill
    up. The cost is that of the client's rows, whatever the population.
    """

    pool: RowSelection
    task: Task
    config: PartitionConfig
    split: SplitConfig
    clients: Population
    seed: int
    _cached_splits: BoundedCache[dict[str, RowSelection]] = field(
        default_factory=lambda: BoundedCache(SPLITS_KEPT), compare=False
    )

    def check(self) -> None:
        """Check that every client can have the rows that its settings ask for.

        Raises:
            UserError: If a client could have too few rows, or more than there are.
        """
        where = "data.partition"
        pool = len(self.pool.rows)
        if self.pool.examples.patient is not None:
            raise UserError(
                f"{where}.kind: found drawn, which takes rows one by one; leave data.patient out"
            )
        to_train = 1 - self.split.validation - self.split.test
        for kind in self.clients.profiles:
            if kind.settings.data is not None:
                continue
            rows = round(self.config.rows * kind.settings.size)
            owner = f"for client '{kind.first}', by its size"
            if rows < self.config.min_size:
                raise UserError(
                    f"{where}.rows: found {rows} {owner}; min_size is {self.config.min_size}"
                )
            if rows > pool:
                raise UserError(
                    f"{where}.rows: found {rows} {owner}, but there are {pool} to draw from; take fewer"
                )
            counts = [rows]
            if self.config.spread:
                # With more rows, rounding cannot take the last two away from training.
                counts = list(range(self.config.min_size, min(pool, int(3 / to_train) + 1) + 1))
            for count in counts:
                if split_counts(count, self.split)["train"] < FEWEST_TO_TRAIN:
                    key = "min_size" if self.config.spread else "rows"
                    raise UserError(
                        f"{where}.{key}: {count} rows are too few to split by data.split; raise it"
                    )

    def num_rows(self, client: str) -> int:
        """Return the number of a client's rows without drawing them."""
        rows = self.config.rows * self.clients[client].size
        if self.config.spread:
            rows *= keyed_numpy_generator("data", self.seed, "rows", client).lognormal(
                0, self.config.spread
            )
        return min(max(round(rows), self.config.min_size), len(self.pool.rows))

    def split_counts(self, client: str) -> Mapping[str, int]:
        """Return the number of rows of each split."""
        return split_counts(self.num_rows(client), self.split)

    @cachedmethod(attrgetter("_cached_splits"))
    def splits(self, client: str) -> dict[str, RowSelection]:
        """Return the rows of each split."""
        count = self.num_rows(client)
        draws = keyed_numpy_generator("data", self.seed, "drawn", client)
        if self.config.alpha is None:
            places = _sample_rows(draws, len(self.pool.rows), count)
        else:
            sizes = np.array([len(c) for c in self._classes])
            mix = draws.dirichlet(self.config.alpha * len(sizes) * sizes / sizes.sum())
            wanted = _fill_counts(count, mix, sizes)
            held = [(c, n) for c, n in zip(self._classes, wanted, strict=True) if n]
            places = np.concatenate([c[_sample_rows(draws, len(c), n)] for c, n in held])
        # so that classes are in no order where they are cut
        rows = draws.permutation(self.pool.rows.numpy()[places])
        sizes_of = split_counts(count, self.split)
        parts = np.split(rows, np.cumsum(list(sizes_of.values()))[:-1])
        return {
            n: RowSelection(self.pool.examples, torch.from_numpy(np.sort(p)))
            for n, p in zip(sizes_of, parts, strict=True)
        }

    @cached_property
    def _classes(self) -> list[np.ndarray]:
        """Places in the pool by class."""
        labels = self.pool.examples.labels[self.pool.rows]
        strata = row_strata(labels, self.task).numpy()
        return [np.flatnonzero(strata == c) for c in np.unique(strata)]


def _sample_rows(draws: np.random.Generator, total: int, count: int) -> np.ndarray:
    return draws.choice(total, count, replace=False, shuffle=False)


def _fill_counts(count: int, mix: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return whole numbers that sum to `count` and follow the mix, none above its room.

    What does not fit goes to the others, by the mix, or by their room where they have no share.
    """
    found = np.zeros_like(room)
    while (left := count - found.sum()) > 0:
        free = room - found
        share = np.where(free > 0, mix, 0.0)
        found += np.minimum(
            apportion_nonzero(left, share if share.sum() > 0 else free.astype(float)), free
        )
    return found


@dataclass(frozen=True)
class RemoteDataInfo:
    """What is known of the rows of a client on another machine.

    Args:
        rows: Number of rows of each split.
        content_hash: SHA-256 over the rows.
        view: The client's preprocessing, where it depends on its rows.
        labels: Label counts of its training rows, if it reveals them.
    """

    rows: Mapping[str, int]
    content_hash: str
    view: Preprocess | None = None
    labels: tuple[float, ...] | None = None


class ClientRows(Mapping[str, Mapping[str, RowSelection]]):
    """Each client's train, validation and test rows, or what is known of rows on other machines."""

    def __init__(
        self,
        assigned: Mapping[str, Mapping[str, RowSelection]],
        lazy_partition: LazyPartition | None = None,
        remote_info: Mapping[str, RemoteDataInfo] | None = None,
    ) -> None:
        self.assigned = assigned
        self.lazy_partition = lazy_partition
        self.remote_info = remote_info or {}

    def count(self, client: str, split: str) -> int:
        """Return the number of rows of one split without drawing them."""
        if client in self.remote_info:
            return self.remote_info[client].rows[split]
        if client in self.assigned or self.lazy_partition is None:
            return len(self.assigned[client][split].rows)
        return self.lazy_partition.split_counts(client)[split]

    @property
    def n_train(self) -> int:
        """Number of rows of all training splits; where clients draw, of the pool."""
        pool = len(self.lazy_partition.pool.rows) if self.lazy_partition else 0
        return pool + sum(self._known_counts().values())

    def clients_with_one_row(self) -> list[str]:
        """Return the clients with a single row to train on; clients that draw have more."""
        return [client for client, rows in self._known_counts().items() if rows == 1]

    def _known_counts(self) -> dict[str, int]:
        """Return the training rows of each client that does not draw."""
        counts = {client: len(splits["train"].rows) for client, splits in self.assigned.items()}
        return counts | {client: info.rows["train"] for client, info in self.remote_info.items()}

    def rows_by_location(self) -> list[tuple[tuple[str, str], RowSelection]]:
        """Return the rows of every client and split, and the pool where clients draw."""
        dealt = [
            ((client, name), share)
            for client, splits in self.assigned.items()
            for name, share in splits.items()
        ]
        return dealt + ([(("", "pool"), self.lazy_partition.pool)] if self.lazy_partition else [])

    def __getitem__(self, client: str) -> Mapping[str, RowSelection]:
        if client in self.assigned or self.lazy_partition is None:
            return self.assigned[client]
        if client not in self.lazy_partition.clients:
            raise KeyError(client)
        return self.lazy_partition.splits(client)

    def __contains__(self, client: object) -> bool:
        return client in self.assigned or (
            self.lazy_partition is not None and client in self.lazy_partition.clients
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.assigned if self.lazy_partition is None else self.lazy_partition.clients)

    def __len__(self) -> int:
        return len(self.assigned if self.lazy_partition is None else self.lazy_partition.clients)


def fingerprint(about: object, rows_by_location: Iterable[tuple[Any, RowSelection]]) -> str:
    """Return the SHA-256 over sets of rows with their places: examples, labels, times, units."""
    digest = hashlib.sha256(repr(about).encode())
    for place, share in rows_by_location:
        each = share.examples
        tensors = [t for t in (each.x, each.y, each.time, each.unit) if t is not None]
        digest.update(
            repr(
                (place, len(share.rows), [(t.dtype, tuple(t.shape[1:])) for t in tensors])
            ).encode()
        )
        for rows in share.rows.split(HASH_ROWS):
            for tensor in tensors:
                digest.update(tensor[rows].contiguous().numpy().data)
    return digest.hexdigest()

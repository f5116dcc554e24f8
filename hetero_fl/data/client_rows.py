"""Which rows are whose: dealt out before the run, or drawn by each client for itself when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hetero_fl.config.data import PartitionConfig, SplitConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import RowSelection
from hetero_fl.data.partition import apportion_nonzero, row_strata
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.data.splits import FEWEST_TO_TRAIN, split_counts
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import stream_key

HASH_ROWS = 8192
SPLITS_KEPT = 1024  # clients whose drawn rows are kept


@dataclass(frozen=True)
class LazyPartition:
    """The partition `drawn`: each client draws rows of a pool for itself, a row at most once; others may have it, too.

    A client's rows depend on its id, its `size`, the pool, the configuration and the seed, and not on who else takes part.
    With `alpha`, its mix of labels is Dirichlet(alpha · C · q), q the shares of the C classes in the pool (as in Hsu et al.,
    arXiv:1909.06335, whose q is uniform); where a class has too few rows for it, the others stand in. Costs about the
    client's rows, whatever the population.
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
        """Raises UserError where a client could have fewer rows than it may, or than it can split, or more than there are."""
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
            least, most = (
                (self.config.min_size, min(pool, int(3 / to_train) + 1))
                if self.config.spread
                else (rows, rows)
            )
            # with more, rounding cannot take the last two away from training
            for count in range(least, most + 1):
                if split_counts(count, self.split)["train"] < FEWEST_TO_TRAIN:
                    key = "min_size" if self.config.spread else "rows"
                    raise UserError(
                        f"{where}.{key}: {count} rows are too few to split by data.split; raise it"
                    )

    def num_rows(self, client: str) -> int:
        """How many rows the client has, known without drawing them."""
        rows = self.config.rows * self.clients[client].size
        if self.config.spread:
            rows *= self._draws("rows", client).lognormal(0, self.config.spread)
        return min(max(round(rows), self.config.min_size), len(self.pool.rows))

    def split_counts(self, client: str) -> Mapping[str, int]:
        """Rows of each split."""
        return split_counts(self.num_rows(client), self.split)

    def splits(self, client: str) -> dict[str, RowSelection]:
        """Train, validation and test."""
        return self._cached_splits.get_or_make(client, lambda: self._splits(client))

    def _splits(self, client: str) -> dict[str, RowSelection]:
        count = self.num_rows(client)
        draws = self._draws("drawn", client)
        if self.config.alpha is None:
            places = _sample_rows(draws, len(self.pool.rows), count)
        else:
            sizes = np.array([len(c) for c in self._classes])
            mix = draws.dirichlet(self.config.alpha * len(sizes) * sizes / sizes.sum())
            wanted = _fill_counts(count, mix, sizes)
            held = [(c, n) for c, n in zip(self._classes, wanted, strict=True) if n]
            places = np.concatenate([c[_sample_rows(draws, len(c), n)] for c, n in held])
        # so that classes are in no order where they are cut
        rows = draws.permutation(self._client_numbers[places])
        sizes_of = split_counts(count, self.split)
        parts = np.split(rows, np.cumsum(list(sizes_of.values()))[:-1])
        return {
            n: RowSelection(self.pool.examples, torch.from_numpy(np.sort(p)))
            for n, p in zip(sizes_of, parts, strict=True)
        }

    def _draws(self, *use: str) -> np.random.Generator:
        return np.random.default_rng(stream_key("data", self.seed, *use))

    @cached_property
    def _client_numbers(self) -> np.ndarray:
        return self.pool.rows.numpy()

    @cached_property
    def _classes(self) -> list[np.ndarray]:
        """Places in the pool by class."""
        labels = self.pool.examples.labels[self.pool.rows]
        strata = row_strata(labels, self.task).numpy()
        return [np.flatnonzero(strata == c) for c in np.unique(strata)]


def _sample_rows(draws: np.random.Generator, total: int, count: int) -> np.ndarray:
    return draws.choice(total, count, replace=False, shuffle=False)


def _fill_counts(count: int, mix: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to `count`, by the mix, none above its room; what does not fit goes by the mix to the others,
    and by their room where the mix has nothing for them."""
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
    """What a client whose rows lie on another machine says of them.

    Args:
        rows: how many each split has.
        content_hash: SHA-256 over them: the same rows, the same hash.
        view: its own preprocessing, where that depends on its rows.
        labels: label counts of its training rows, if it tells them.
    """

    rows: Mapping[str, int]
    content_hash: str
    view: Preprocess | None = None
    labels: tuple[float, ...] | None = None


class ClientRows(Mapping[str, Mapping[str, RowSelection]]):
    """Each client's train, validation and test rows; of those whose rows lie elsewhere, what they told."""

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
        """Rows of one split, without drawing them."""
        if client in self.remote_info:
            return self.remote_info[client].rows[split]
        if client in self.assigned or self.lazy_partition is None:
            return len(self.assigned[client][split].rows)
        return self.lazy_partition.split_counts(client)[split]

    @property
    def n_train(self) -> int:
        """Rows of all training splits; where clients draw for themselves, of the pool that they draw from."""
        dealt = sum(len(splits["train"].rows) for splits in self.assigned.values())
        return (
            dealt
            + self._remote_counts("train")
            + (len(self.lazy_partition.pool.rows) if self.lazy_partition else 0)
        )

    def _remote_counts(self, split: str) -> int:
        return sum(told.rows[split] for told in self.remote_info.values())

    def clients_with_one_row(self) -> list[str]:
        """Clients with a single row to train on: whoever draws has more."""
        counts = {client: len(splits["train"].rows) for client, splits in self.assigned.items()}
        return [
            c
            for c, n in (counts | {c: t.rows["train"] for c, t in self.remote_info.items()}).items()
            if n == 1
        ]

    def rows_by_location(self) -> list[tuple[tuple[str, str], RowSelection]]:
        """All rows that anybody has, and where."""
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
    """SHA-256 over sets of rows and where they belong: examples, labels, times and units."""
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

"""The data of a federation: rows of clients, proxy set, and global validation and test sets.

A `FederatedData` preprocesses the examples of each participant. A `PublicPack` has the public sets,
for participants on other machines.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from cachetools import cachedmethod
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, PreprocessConfig, ScannerConfig
from hetero_fl.config.data import DataConfig
from hetero_fl.config.population import Population
from hetero_fl.core.image_transforms import apply_scanner
from hetero_fl.core.images import MAX_BYTE
from hetero_fl.core.mapped_tensors import join_rows, map_rows, mapped_file, shareable
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows, RemoteDataInfo, fingerprint
from hetero_fl.data.client_sources import load_client_sources
from hetero_fl.data.dataset import (
    Block,
    ColumnLayout,
    Columns,
    Dataset,
    Examples,
    Vocabulary,
    concatenate_examples,
)
from hetero_fl.data.pixels import choose_range
from hetero_fl.data.preprocessing import (
    NOTHING,
    Preprocess,
    check_missing_values,
    is_all_missing,
    usable_rows,
)
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.serialization import decode, encode

PACK_FORM = "public sets 1"
"""Form of a serialized `PublicPack`."""
PRIVATE = ("train", "validation", "test")
PUBLIC = ("proxy", "common_test", "common_validation")
CACHE_BYTES = 512 * 2**20
CACHED_CLIENTS = 4096
MAPPED_COST = 16
"""Number of bytes of a mapped tensor that count as one in a cache."""


def column_cache(max_bytes: float) -> BoundedCache[Columns]:
    """Return an empty cache that stores at most `max_bytes` of preprocessed examples."""
    return BoundedCache(max_bytes, _num_bytes)


def _num_bytes(columns: Columns) -> int:
    return sum(
        column.nbytes if mapped_file(column) is None else column.nbytes // MAPPED_COST
        for column in columns.values()
    )


class FederatedData:
    """The rows of all participants of a federation, preprocessed on demand.

    Raw arrays are shared by all participants and copied only for preprocessing. With the partition
    `drawn`, rows are sampled on first use. Use `federate` to create an instance.

    Args:
        task: Learning task.
        name: Name of the data set.
        clients: Client settings, keyed by client id.
        private: Rows of the clients.
        public: Public sets, keyed by "common_validation", "common_test" and, if there is a proxy
            set, "proxy".
        seed: Seed of the run.
        simulated: Whether the data is simulated.
        about: Short description.
        cache_bytes: Maximum size in bytes of each of the two caches of preprocessed examples.
        notes: Remarks on how the data was read and partitioned.
        layout: Names of the columns or blocks along the last axis of the examples.
        vocabulary: Vocabulary if the examples are tokens, otherwise None.

    Attributes:
        task: Learning task.
        name: Name of the data set.
        simulated: Whether the data is simulated.
        about: Short description.
        notes: Remarks on how the data was read and partitioned, shown to the user before the run.
        input_shape: Shape of a raw example of the global test set, without the batch dimension.
        layout: Names of the columns or blocks along the last axis of the examples.
        vocabulary: Vocabulary of all models if the examples are tokens, otherwise None.
        client_rows: Rows of each client.
        public_sets: Public sets, keyed by "common_validation", "common_test" and, if there is a
            proxy set, "proxy".

    Example:
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.config.data import DataConfig
        >>> from hetero_fl.data import federate, make_table
        >>> clients = {"north": ClientSettings(), "south": ClientSettings()}
        >>> data = federate(make_table(), DataConfig(), clients, seed=0)
        >>> data.client_ids, data.n_test
        (['north', 'south'], 400)
        >>> columns = data.columns("north", "validation", data.preprocess("north"))
        >>> columns["x"].shape[1:], len(columns["y"]) == data.n_rows("north", "validation")
        (torch.Size([10]), True)
    """

    def __init__(
        self,
        task: Task,
        name: str,
        clients: Population,
        private: ClientRows,
        public: Mapping[str, RowSelection],
        *,
        seed: int,
        simulated: bool = False,
        about: str = "",
        cache_bytes: float = CACHE_BYTES,
        notes: Sequence[str] = (),
        layout: ColumnLayout = NOTHING,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.task = task
        self.name = name
        self.simulated = simulated
        self.about = about
        self.notes = list(notes)
        self.input_shape = tuple(public["common_test"].examples.x.shape[1:])
        self.layout = layout
        self.vocabulary = vocabulary
        self._settings = clients
        self.client_rows = private
        self.public_sets = public
        self._seed = seed
        self._unscanned: frozenset[str] = frozenset()
        self._views: BoundedCache[Preprocess] = BoundedCache(CACHED_CLIENTS)
        self._label_counts: BoundedCache[Tensor] = BoundedCache(CACHED_CLIENTS)
        self._has_proxy_values: dict[Hashable, bool] = {}
        self._public_columns = column_cache(cache_bytes)
        self._private_columns = column_cache(cache_bytes)

    def __repr__(self) -> str:
        return (
            f"FederatedData({self.name!r}: {self.task.kind} with {self.task.outputs} outputs, "
            f"{len(self._settings):,} clients; "
            f"rows: train {self.n_train:,}, proxy {self.n_proxy:,}, test {self.n_test:,})"
        )

    @property
    def client_ids(self) -> list[str]:
        """Sorted ids of all clients, as a new list on each access."""
        return sorted(self._settings)

    @property
    def n_train(self) -> int:
        """Number of training rows of all clients.

        For clients that sample from a pool (partition `drawn`), the rows of the pool count once.
        """
        return self.client_rows.n_train

    @property
    def n_proxy(self) -> int:
        """Number of rows of the proxy set, or 0 if there is no proxy set."""
        return len(self.public_sets["proxy"].rows) if "proxy" in self.public_sets else 0

    @property
    def has_proxy_labels(self) -> bool:
        """Whether there is a labeled proxy set."""
        return "proxy" in self.public_sets and self.public_sets["proxy"].examples.y is not None

    @property
    def n_test(self) -> int:
        """Number of rows of the global test set."""
        return len(self.public_sets["common_test"].rows)

    def n_rows(self, client: str, split: str) -> int:
        """Return the number of rows in the split "train", "validation" or "test" of a client."""
        return self.client_rows.of(client).count(split)

    def label_counts(self, client: str) -> Tensor:
        """Count the labels of the training rows of a client.

        For multilabel tasks, the count of a label is the number of rows in which the label is 1.
        For regression tasks, each count is the number of all rows.

        Args:
            client: Client id.

        Returns:
            Counts, float `[outputs]`.

        Raises:
            ValueError: If the client, on another machine, keeps the counts private (see
                `reveals_labels`).
        """
        if not self.reveals_labels(client):
            raise ValueError(f"label_counts: {client} keeps its label counts private")
        return self._count_labels(client, torch.get_default_dtype())

    @cachedmethod(attrgetter("_label_counts"))
    def _count_labels(self, client: str, dtype: torch.dtype) -> Tensor:
        if client in self.client_rows.remote_info:
            return torch.tensor(self.client_rows.remote_info[client].labels, dtype=dtype)
        share = self.client_rows[client]["train"]
        y = share.examples.labels[share.rows]
        if self.task.kind == "multiclass":
            counts = torch.bincount(y, minlength=self.task.outputs)
        elif self.task.kind == "multilabel":
            counts = y.sum(0)
        else:
            counts = torch.full((self.task.outputs,), len(y))
        return counts.to(dtype)

    @property
    def is_distributed(self) -> bool:
        """Whether the rows of some clients are on other machines."""
        return bool(self.client_rows.remote_info)

    def reveals_labels(self, client: str) -> bool:
        """Return whether the label counts of a client are available.

        Clients on other machines may keep the counts private.
        """
        remote = self.client_rows.remote_info.get(client)
        return remote is None or remote.labels is not None

    def preprocess(self, client: str) -> Preprocess:
        """Return the preprocessing of a client.

        With `normalize: own`, the preprocessing uses the statistics of the client's training rows.
        A client on another machine reports these statistics.

        Raises:
            UserError: If the settings do not apply to the examples.
        """
        remote = self.client_rows.remote_info.get(client)
        if remote is not None and remote.view is not None:
            return remote.view
        config = self._settings[client].preprocess
        where = f"client '{client}': preprocess"
        if config.normalize != "own":
            return Preprocess.resolve(config, None, where, self.layout, self.input_shape)
        return self._view_of_own_rows(client, where)

    @cachedmethod(attrgetter("_views"))
    def _view_of_own_rows(self, client: str, where: str) -> Preprocess:
        config = self._settings[client].preprocess
        rows = self._raw_rows(client, "train").x
        return Preprocess.resolve(config, rows, where, self.layout, self.input_shape)

    def unnormalized_view(self, config: PreprocessConfig, where: str) -> Preprocess:
        """Return the preprocessing that a configuration defines, without normalization.

        Args:
            config: Preprocessing configuration.
            where: Configuration section, for error messages.

        Raises:
            UserError: If a column or block is unknown.
        """
        return Preprocess.without_normalization(config, self.layout, self.input_shape, where)

    def own_view(self, client: str) -> Preprocess | None:
        """Return the preprocessing of a client with `normalize: own`, without normalization.

        For a client with another value of `normalize`, None is returned.
        """
        config = self._settings[client].preprocess
        if config.normalize != "own":
            return None
        return self.unnormalized_view(config, f"client '{client}': preprocess")

    def has_proxy(self, preprocess: Preprocess) -> bool:
        """Return whether there is a proxy set with values in the selected columns.

        Args:
            preprocess: Preprocessing that selects the columns.
        """
        if "proxy" not in self.public_sets:
            return False
        if preprocess.raw is None:
            # The client uses all columns, in which no value may be missing.
            return True
        key = (preprocess.spans, preprocess.blocks)
        if key not in self._has_proxy_values:
            has_values = not is_all_missing(self.public_sets["proxy"], preprocess)
            self._has_proxy_values[key] = has_values
        return self._has_proxy_values[key]

    def server_preprocess(self, config: PreprocessConfig) -> Preprocess:
        """Return the preprocessing of the server.

        With `normalize: own`, the preprocessing uses the statistics of the proxy set or, if there
        is none, of the global validation set.

        Raises:
            UserError: If the settings do not apply to the examples.
        """
        if config.normalize is not None and self.vocabulary is not None:
            raise UserError("server.preprocess.normalize: does not apply to tokens; remove it")
        public = self.public_sets.get("proxy", self.public_sets["common_validation"])
        return Preprocess.resolve(
            config, public.copy_rows().x, "server.preprocess", self.layout, self.input_shape
        )

    def columns(self, owner: str, name: str, preprocess: Preprocess) -> Columns:
        """Return the preprocessed examples of a set.

        The tensors are cached and must not be modified in place. Public and private sets have
        separate caches of `cache_bytes` each, so public sets usually stay cached.

        Args:
            owner: Client id, or "server" for the pooled set. Ignored for public sets.
            name: Name of the set. A split of a client is "train", "validation" or "test". A public
                set is "proxy", "common_test" or "common_validation". The set "pooled" contains the
                training rows of all clients in the order of the client ids, without rows that
                `preprocess` cannot use.
            preprocess: Preprocessing of the examples.

        Returns:
            Inputs "x" and, unless the set is unlabeled, targets "y". Numbers have the default dtype
            of torch. Tokens and classes are int64.

        Raises:
            UserError: If there is no proxy set, or the rows of the clients differ in shape and
                cannot be pooled.
            KeyError: If there is no such client or set.
        """
        # The default dtype is a part of the cache keys.
        dtype = torch.get_default_dtype()
        if name in PUBLIC:
            return self._make_public_columns(name, preprocess, dtype)
        return self._make_private_columns(owner, name, preprocess, dtype)

    @cachedmethod(attrgetter("_public_columns"))
    def _make_public_columns(self, name: str, preprocess: Preprocess, _: torch.dtype) -> Columns:
        if name not in self.public_sets:
            raise UserError(
                f"data.proxy.size: must be > 0 or data.proxy.source set for the {name} set, got 0"
            )
        return self._preprocess(self.public_sets[name].copy_rows(), preprocess)

    @cachedmethod(attrgetter("_private_columns"))
    def _make_private_columns(
        self, owner: str, name: str, preprocess: Preprocess, _: torch.dtype
    ) -> Columns:
        if (owner, name) == ("server", "pooled"):
            return self._pool(preprocess)
        if owner not in self.client_rows or name not in PRIVATE:
            known = [*PUBLIC, *PRIVATE, "pooled"]
            hint = suggest_or_list(name, known) if name not in known else ""
            raise KeyError(f"unknown set '{name}' of '{owner}'{hint}")
        return self._preprocess(self._raw_rows(owner, name), preprocess)

    def extra_columns(self, owner: str, name: str) -> Examples:
        """Return all columns of a set except x, such as times and units.

        Args:
            owner: Client id. Ignored for public sets.
            name: Name of a public set or of a split of the client.

        Returns:
            The rows of the set, with x replaced by an empty tensor of shape `[N, 0]`.
        """
        share = self.public_sets[name] if name in PUBLIC else self.client_rows[owner][name]
        return replace(share.examples, x=torch.empty(len(share.examples), 0)).select_rows(
            share.rows
        )

    def raw_examples(self, name: str) -> Tensor:
        """Return the raw inputs x of a public set, shape `[N, ...]`."""
        return self.public_sets[name].copy_rows().x

    def private_rows(self) -> Iterator[Tensor]:
        """Yield the raw inputs of each client's training rows, and of the pool if there is one."""
        for (_, split), share in self.client_rows.rows_by_location():
            if split in ("train", "pool"):
                yield share.copy_rows().x

    def public_hash(self) -> str:
        """Return the SHA-256 hash of the public sets."""
        return fingerprint((self.task.kind, self.task.outputs), sorted(self.public_sets.items()))

    def with_rows(self, rows: ClientRows, unscanned: Collection[str] = ()) -> FederatedData:
        """Return a copy with different client rows and empty caches.

        Args:
            rows: Rows of each client.
            unscanned: Clients whose training rows have already passed through the simulated scanner
                (see `unprocessed_rows`). The scanner is not applied to these rows again.
        """
        # `copy.copy` would also copy the cached methods of cachetools, which are bound to `self`.
        data = FederatedData(
            self.task,
            self.name,
            self._settings,
            rows,
            self.public_sets,
            seed=self._seed,
            simulated=self.simulated,
            about=self.about,
            cache_bytes=self._private_columns.maxsize,
            notes=self.notes,
            layout=self.layout,
            vocabulary=self.vocabulary,
        )
        data._unscanned = frozenset(unscanned)
        return data

    def share_memory(self) -> None:
        """Move the raw inputs and targets of all rows to shared memory, unless they are mapped."""
        shares = [
            *self.public_sets.values(),
            *(share for _, share in self.client_rows.rows_by_location()),
        ]
        for examples in {id(s.examples): s.examples for s in shares}.values():
            examples.x = shareable(examples.x)
            if examples.y is not None:
                examples.y.share_memory_()

    def content_hash(self) -> str:
        """Return the SHA-256 hash of all examples and labels with their owners.

        For rows on another machine, the hash that the client reports is included. Two runs with the
        same hash and configuration have the same data.
        """
        located = [(("", name), share) for name, share in self.public_sets.items()]
        located += self.client_rows.rows_by_location()
        remote = [
            (client, info.content_hash)
            for client, info in sorted(self.client_rows.remote_info.items())
        ]
        return fingerprint(
            (self.task.kind, self.task.outputs, *remote), sorted(located, key=lambda pair: pair[0])
        )

    def _raw_rows(self, client: str, split: str) -> Examples:
        """Return x and y of a client's split with the scanner applied, before preprocessing."""
        rows = self.client_rows[client][split].copy_rows()
        if split == "train" and client in self._unscanned:
            return rows
        generator = keyed_generator("data", self._seed, "scanner", client, split)
        scanner = self._settings[client].scanner
        if scanner == ScannerConfig():
            return Examples(rows.x, rows.y)
        pixel_range = self.layout.pixel_range
        scan = partial(apply_scanner, config=scanner, generator=generator, pixel_range=pixel_range)
        # Noise is drawn for all rows at once.
        return Examples(scan(rows.x) if scanner.noise else map_rows(rows.x, scan), rows.y)

    def _preprocess(self, examples: Examples, preprocess: Preprocess) -> Columns:
        columns: dict[str, Tensor] = {"x": map_rows(examples.x, preprocess)}
        if examples.y is not None:
            columns["y"] = (
                examples.y.to(torch.get_default_dtype())
                if examples.y.is_floating_point()
                else examples.y
            )
        return columns

    def _pool(self, preprocess: Preprocess) -> Columns:
        client_ids = self.client_ids
        parts = [
            self._preprocess(
                _select_usable(self._raw_rows(client, "train"), preprocess), preprocess
            )
            for client in client_ids
        ]
        shapes = {
            client: tuple(part["x"].shape[1:])
            for client, part in zip(client_ids, parts, strict=True)
        }
        if len(set(shapes.values())) > 1:
            owner = next((c for c in client_ids if self.preprocess(c) == preprocess), None)
            where = "server.preprocess" if owner is None else f"clients: '{owner}': preprocess"
            raise UserError(
                f"{where}: the rows of all clients are pooled and must have one shape, got "
                f"{shapes}; set resize and channels"
            )
        return {name: join_rows([part[name] for part in parts]) for name in ("x", "y")}


def _select_usable(examples: Examples, view: Preprocess) -> Examples:
    rows = usable_rows(examples.x, view)
    return examples if bool(rows.all()) else examples.select_rows(rows.nonzero().squeeze(1))


def unprocessed_rows(data: FederatedData, client: str, splits: Sequence[str]) -> Examples:
    """Return the rows of a client with the simulated scanner applied, before preprocessing.

    Args:
        data: Data of the federation.
        client: Client id.
        splits: Names of the splits to concatenate.
    """
    rows = data.client_rows[client]
    return concatenate_examples(
        [replace(rows[split].copy_rows(), x=data._raw_rows(client, split).x) for split in splits]
    )


def describe_client_rows(
    data: FederatedData, client: str, send_view: bool, labels: bool
) -> RemoteDataInfo:
    """Return the information about a client's rows that is sent to the other participants.

    Args:
        data: Data of the federation.
        client: Client id.
        send_view: Whether to include the preprocessing of the client. Other participants cannot
            compute the preprocessing if it depends on the rows (`normalize: own`).
        labels: Whether to include the label counts of the training rows.
    """
    splits = data.client_rows[client]
    counts = tuple(data.label_counts(client).tolist()) if labels else None
    return RemoteDataInfo(
        {name: len(splits[name].rows) for name in PRIVATE},
        fingerprint("rows of a client", [(name, splits[name]) for name in PRIVATE]),
        data.preprocess(client) if send_view else None,
        counts,
    )


def restrict_to_holder(
    data: FederatedData, client: str | None, remote_info: Mapping[str, RemoteDataInfo]
) -> FederatedData:
    """Return a copy of the data that contains the rows of one participant only.

    Args:
        data: Data of the federation.
        client: Client whose rows are kept. If None, no rows are kept, as for the server.
        remote_info: Information about the rows of the other clients.

    Raises:
        KeyError: If `remote_info` lacks a client.
    """
    own = {client: data.client_rows[client]} if client is not None else {}
    others = {other: remote_info[other] for other in data.client_ids if other not in own}
    return data.with_rows(ClientRows(own, remote_info=others))


@dataclass(frozen=True)
class PublicPack:
    """The public sets of a federation, to be sent to participants that do not have the data set.

    Attributes:
        name: Name of the data set.
        about: Short description.
        simulated: Whether the data is simulated.
        task: Learning task.
        layout: Names of the columns or blocks along the last axis of the examples.
        vocabulary: Vocabulary if the examples are tokens, otherwise None.
        public: Public sets, keyed by "common_validation", "common_test" and, if there is a proxy
            set, "proxy".
    """

    name: str
    about: str
    simulated: bool
    task: Task
    layout: ColumnLayout
    vocabulary: Vocabulary | None
    public: Mapping[str, Examples]

    @classmethod
    def from_data(cls, data: FederatedData) -> PublicPack:
        """Create a pack from the public sets of a federation."""
        public = {name: share.copy_rows() for name, share in data.public_sets.items()}
        return cls(
            data.name, data.about, data.simulated, data.task, data.layout, data.vocabulary, public
        )

    def encode(self) -> bytes:
        """Serialize the pack to bytes, without pickle.

        The groups and patients of the rows are not included.
        """
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = {"words": self.vocabulary.words, "buckets": self.vocabulary.buckets}
        content = {
            "name": self.name,
            "about": self.about,
            "simulated": self.simulated,
            "task": vars(self.task),
            "columns": self.layout.columns,
            "categories": self.layout.categories,
            "pixel_range": self.layout.pixel_range,
            "blocks": [[block.name, block.shape] for block in self.layout.blocks],
            "vocabulary": vocabulary,
            "public": {name: _public_columns(examples) for name, examples in self.public.items()},
        }
        return encode(content, PACK_FORM)

    @classmethod
    def decode(cls, data: bytes) -> PublicPack:
        """Create a pack from bytes that were returned by `encode`.

        Raises:
            CodecError: If the bytes are malformed.
        """
        content = decode(data, PACK_FORM)
        blocks = tuple(Block(name, tuple(shape)) for name, shape in content["blocks"])
        categories = tuple((c, tuple(v)) for c, v in content.get("categories", ()))
        vocabulary = content["vocabulary"]
        return cls(
            content["name"],
            content["about"],
            content["simulated"],
            Task(**{**content["task"], "names": tuple(content["task"]["names"])}),
            ColumnLayout(tuple(content["columns"]), blocks, categories, content.get("pixel_range")),
            None
            if vocabulary is None
            else Vocabulary(tuple(vocabulary["words"]), vocabulary["buckets"]),
            {name: Examples(**columns) for name, columns in content["public"].items()},
        )

    def content_hash(self) -> str:
        """Return the SHA-256 hash of the public sets, which equals `FederatedData.public_hash`."""
        shares = [
            (name, RowSelection.all_rows(examples))
            for name, examples in sorted(self.public.items())
        ]
        return fingerprint((self.task.kind, self.task.outputs), shares)

    def data_of_client(
        self, client: str, config: DataConfig, clients: Mapping[str, ClientSettings], seed: int
    ) -> FederatedData:
        """Load the rows of a client from the client's source, and add the public sets.

        Args:
            client: Client id.
            config: Data configuration.
            clients: Client settings, keyed by client id.
            seed: Seed of the run.

        Returns:
            The data of the federation, in which only this client has rows.

        Raises:
            UserError: If the client has no source, or the source does not match the public sets.
        """
        source = clients[client].data
        if source is None:
            raise UserError("data: missing; set the data file of this site")
        population = Population.from_settings(clients)
        common = Dataset(
            self.name,
            self.task,
            self.public["common_test"],
            columns=self.layout.columns,
            blocks=self.layout.blocks,
            vocabulary=self.vocabulary,
            categories=self.layout.categories,
            pixel_range=self.layout.pixel_range or MAX_BYTE,
        )
        owned = load_client_sources({source: [client]}, common, config, population, seed)
        private = ClientRows(owned.private)
        public = {name: RowSelection.all_rows(examples) for name, examples in self.public.items()}
        notes = check_missing_values(
            [population.profile(client)], population, private, public, layout=self.layout
        )
        pixels = choose_range(common, config, private, public)
        return FederatedData(
            self.task,
            self.name,
            population,
            private,
            public,
            seed=seed,
            simulated=self.simulated or owned.simulated,
            about=self.about,
            notes=[*owned.notes, *notes, *pixels.notes],
            layout=replace(self.layout, pixel_range=pixels.value),
            vocabulary=self.vocabulary,
        )


def _public_columns(examples: Examples) -> dict[str, Any]:
    """Return all columns of public examples except groups and patients."""
    columns = {
        "x": examples.x,
        "y": examples.y,
        "time": examples.time,
        "unit": examples.unit,
        "excluded": examples.excluded,
    }
    return {n: c for n, c in columns.items() if c is not None} | {
        "baselines": dict(examples.baselines)
    }

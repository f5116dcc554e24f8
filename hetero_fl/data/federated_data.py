"""The data of a federation: client rows, the proxy set and the common sets, as seen by each model.

`federate` builds it from a data set and a configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

import torch
from cachetools import cachedmethod
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows, LazyPartition, fingerprint
from hetero_fl.data.dataset import (
    ColumnLayout,
    Columns,
    Dataset,
    Examples,
    RowSelection,
    Vocabulary,
    concatenate_examples,
)
from hetero_fl.data.external import clients_by_source, load_client_sources, proxy_set
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.preprocessing import (
    NOTHING,
    Preprocess,
    apply_scanner,
    check_missing_values,
    check_settings,
    check_view,
    is_all_missing,
    raw_shape,
    usable_rows,
)
from hetero_fl.data.splits import (
    Splits,
    check_categories,
    check_classes,
    common_sets,
    draw_rows,
    holdout_strategy,
    mark_rare_class,
    with_test,
)
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_key
from hetero_fl.utils.seeding import keyed_generator

# Data as a federation holds it: each client's own rows, a public proxy set, as a rule without
# labels, the common sets.

PRIVATE = ("train", "validation", "test")
PUBLIC = ("proxy", "common_test", "common_validation")
CACHE_BYTES = 512 * 2**20
CACHED_CLIENTS = 4096


def column_cache(max_bytes: float) -> BoundedCache[Columns]:
    """Return an empty cache of columns."""
    return BoundedCache(max_bytes, _num_bytes)


def _num_bytes(columns: Columns) -> int:
    return sum(column.nbytes for column in columns.values())


class FederatedData:
    """The rows of all participants, served as columns through their own preprocessing.

    Raw arrays are shared; a client's rows are copied when they are asked for, and drawn then where
    the partition is `drawn`. `federate` returns an instance.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        clients: Population,
        private: ClientRows,
        public: Mapping[str, RowSelection],
        seed: int,
        simulated: bool = False,
        about: str = "",
        cache_bytes: int = CACHE_BYTES,
        notes: Sequence[str] = (),
        layout: ColumnLayout = NOTHING,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.task = task
        self.name = name
        self.simulated = simulated
        self.about = about
        self.notes = list(notes)
        """Lines on how the data was read and partitioned that a user has to see before the run."""
        self.input_shape = tuple(public["common_test"].examples.x.shape[1:])
        """Shape of a raw example of the common set, without the batch."""
        self.layout = layout
        """The names of its columns, or of its blocks."""
        self.vocabulary = vocabulary
        """Meaning of the tokens, the same for all models; None where examples are no tokens."""
        self._settings = clients
        self.client_rows = private
        """Which rows each client has."""
        self.public_sets = public
        """The proxy set, if there is one, and the common sets."""
        self._seed = seed
        self._unscanned: frozenset[str] = frozenset()
        self._views: BoundedCache[Preprocess] = BoundedCache(CACHED_CLIENTS)
        self._label_counts: BoundedCache[Tensor] = BoundedCache(CACHED_CLIENTS)
        # Whether a view has anything of the proxy set.
        self._sees: dict[Hashable, bool] = {}
        self._public_columns = column_cache(cache_bytes)
        self._private_columns = column_cache(cache_bytes)

    def __repr__(self) -> str:
        return (
            f"FederatedData({self.name!r}: {self.task.kind} with {self.task.outputs} outputs, {len(self._settings):,} clients; "
            f"rows: train {self.n_train:,}, proxy {self.n_proxy:,}, test {self.n_test:,})"
        )

    @property
    def client_ids(self) -> list[str]:
        """All clients, sorted; a new list."""
        return sorted(self._settings)

    @property
    def n_train(self) -> int:
        """Rows of all clients' training splits; where clients draw, of the pool."""
        return self.client_rows.n_train

    @property
    def n_proxy(self) -> int:
        """Rows of the proxy set; 0 without one."""
        return len(self.public_sets["proxy"].rows) if "proxy" in self.public_sets else 0

    @property
    def has_proxy_labels(self) -> bool:
        """Whether there is a proxy set whose labels may be read."""
        return "proxy" in self.public_sets and self.public_sets["proxy"].examples.y is not None

    @property
    def n_test(self) -> int:
        """Rows of the common test set."""
        return len(self.public_sets["common_test"].rows)

    def n_rows(self, client: str, split: str) -> int:
        """Return the number of rows of a client's train, validation or test split."""
        return self.client_rows.count(client, split)

    def label_counts(self, client: str) -> Tensor:
        """Return how often each label occurs in a client's training split, float `[outputs]`.

        Multilabel: rows where the label is 1. Regression: all rows, for each target. Of clients on
        other machines: see `reveals_labels`.
        """
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
        """Return whether a client's label counts are known here.

        Only clients on other machines may keep theirs.
        """
        return (
            client not in self.client_rows.remote_info
            or self.client_rows.remote_info[client].labels is not None
        )

    def preprocess(self, client: str) -> Preprocess:
        """Return a client's view; with `normalize: own`, the statistics of its training rows."""
        config = self._settings[client].preprocess
        where = f"client '{client}': preprocess"
        if (
            client in self.client_rows.remote_info
            and (view := self.client_rows.remote_info[client].view) is not None
        ):
            return view
        if config.normalize != "own":
            return Preprocess.resolve(config, None, where, self.layout, self.input_shape)
        return self._view_of_own_rows(client, where)

    @cachedmethod(attrgetter("_views"))
    def _view_of_own_rows(self, client: str, where: str) -> Preprocess:
        config = self._settings[client].preprocess
        rows = self._raw_rows(client, "train").x
        return Preprocess.resolve(config, rows, where, self.layout, self.input_shape)

    def unnormalized_view(self, config: PreprocessConfig, where: str) -> Preprocess:
        """Return the view that a configuration asks for, without normalization."""
        return Preprocess.without_normalization(config, self.layout, self.input_shape, where)

    def own_view(self, client: str) -> Preprocess | None:
        """Return a client's view without normalization where that is `own`; else None."""
        config = self._settings[client].preprocess
        return (
            self.unnormalized_view(config, f"client '{client}': preprocess")
            if config.normalize == "own"
            else None
        )

    def has_proxy(self, preprocess: Preprocess) -> bool:
        """Return whether there is a proxy set and a view sees anything of it."""
        if preprocess.raw is None or "proxy" not in self.public_sets:
            return "proxy" in self.public_sets
        key = (preprocess.spans, preprocess.blocks)
        if key not in self._sees:
            self._sees[key] = not is_all_missing(self.public_sets["proxy"], preprocess)
        return self._sees[key]

    def server_preprocess(self, config: PreprocessConfig) -> Preprocess:
        """Return the server's view; with `normalize: own`, the statistics of the public set."""
        if config.normalize is not None and self.vocabulary is not None:
            raise UserError(
                "server.preprocess.normalize: is for numbers, but the examples are tokens; leave it out"
            )
        public = self.public_sets.get("proxy", self.public_sets["common_validation"])
        return Preprocess.resolve(
            config, public.copy_rows().x, "server.preprocess", self.layout, self.input_shape
        )

    def columns(self, owner: str, name: str, preprocess: Preprocess) -> Columns:
        """Return examples as seen through a preprocessing.

        The tensors are shared with later callers and must not be changed. They are cached as long
        as there is room, public and private ones separately (`cache_bytes` each), so that public
        sets usually stay for the whole run.

        Args:
            owner: The client's id; "server" for "pooled"; not used for a public set.
            name: train, validation, test; proxy, common_test, common_validation; or pooled: all
                clients' training rows in the order of sorted ids, each as its client's scanner made
                it, without rows that the view cannot use.
            preprocess: The view.

        Returns:
            "x" in torch's default float type and "y"; of the proxy set only where its labels are
            kept.
        """
        dtype = torch.get_default_dtype()
        if name in PUBLIC:
            return self._make_public_columns(name, preprocess, dtype)
        return self._make_private_columns(owner, name, preprocess, dtype)

    # The default dtype is an argument only to be a part of the caches' keys.
    @cachedmethod(attrgetter("_public_columns"))
    def _make_public_columns(self, name: str, preprocess: Preprocess, _: torch.dtype) -> Columns:
        if name not in self.public_sets:
            raise UserError(
                f"data.proxy.size: found 0, but a {name} set is asked for; hold some rows out"
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
            raise KeyError(
                f"no set '{name}' of '{owner}'{suggest_or_list(name, known) if name not in known else ''}"
            )
        return self._preprocess(self._raw_rows(owner, name), preprocess)

    def extra_columns(self, owner: str, name: str) -> Examples:
        """Return times, units and baselines of the rows of a set, without x."""
        share = self.public_sets[name] if name in PUBLIC else self.client_rows[owner][name]
        return replace(share.examples, x=torch.empty(len(share.examples), 0)).select_rows(
            share.rows
        )

    def raw_examples(self, name: str) -> Tensor:
        """Return the examples of a public set as they lie in memory, `[N, ...]`."""
        return self.public_sets[name].copy_rows().x

    def private_rows(self) -> Iterator[Tensor]:
        """Yield each client's training rows as they lie in memory; where clients draw, the pool."""
        for (_, split), share in self.client_rows.rows_by_location():
            if split in ("train", "pool"):
                yield share.copy_rows().x

    def public_hash(self) -> str:
        """Return the SHA-256 over the public sets."""
        return fingerprint((self.task.kind, self.task.outputs), sorted(self.public_sets.items()))

    def with_rows(self, rows: ClientRows, unscanned: Collection[str] = ()) -> FederatedData:
        """Return the same data with other client rows, and caches of its own.

        Args:
            rows: Which rows each client has, or what is known of them.
            unscanned: Clients whose training rows are as their devices made them, as
                `unprocessed_rows` returns them; their scanners are not applied again.
        """
        data = copy.copy(self)
        data.client_rows = rows
        data._unscanned = frozenset(unscanned)
        data._views = BoundedCache(CACHED_CLIENTS)
        data._label_counts = BoundedCache(CACHED_CLIENTS)
        data._sees = {}
        data._public_columns = column_cache(self._public_columns.maxsize)
        data._private_columns = column_cache(self._private_columns.maxsize)
        return data

    def share_memory(self) -> None:
        """Move the raw arrays to memory that other processes can read without a copy."""
        shares = [
            *self.public_sets.values(),
            *(share for _, share in self.client_rows.rows_by_location()),
        ]
        for examples in {id(s.examples): s.examples for s in shares}.values():
            for tensor in (examples.x, examples.y):
                if tensor is not None:
                    tensor.share_memory_()

    def content_hash(self) -> str:
        """Return the SHA-256 over all examples and labels that are known here, and their owners.

        Two runs with the same hash (and configuration) have the same data.
        """
        places = [
            (("", name), share) for name, share in self.public_sets.items()
        ] + self.client_rows.rows_by_location()
        remote = [
            (client, info.content_hash)
            for client, info in sorted(self.client_rows.remote_info.items())
        ]
        return fingerprint(
            (self.task.kind, self.task.outputs, *remote), sorted(places, key=lambda p: p[0])
        )

    def _raw_rows(self, client: str, split: str) -> Examples:
        """Return a client's rows as its own device made them."""
        found = self.client_rows[client][split].copy_rows()
        if split == "train" and client in self._unscanned:
            return found
        draws = keyed_generator("data", self._seed, "scanner", client, split)
        return Examples(apply_scanner(found.x, self._settings[client].scanner, draws), found.y)

    def _preprocess(self, examples: Examples, preprocess: Preprocess) -> Columns:
        columns = {"x": preprocess(examples.x)}
        if examples.y is not None:
            columns["y"] = (
                examples.y.to(torch.get_default_dtype())
                if examples.y.is_floating_point()
                else examples.y
            )
        return columns

    def _pool(self, preprocess: Preprocess) -> Columns:
        ids = self.client_ids
        parts = [
            self._preprocess(_usable(self._raw_rows(client, "train"), preprocess), preprocess)
            for client in ids
        ]
        shapes = {client: tuple(p["x"].shape[1:]) for client, p in zip(ids, parts, strict=True)}
        if len(set(shapes.values())) > 1:
            owner = next((c for c in ids if self.preprocess(c) == preprocess), None)
            where = "server.preprocess" if owner is None else f"clients: '{owner}': preprocess"
            raise UserError(
                f"{where}: all clients' rows are pooled through this view, and differ in shape then ({shapes}); "
                "set its resize and channels"
            )
        return {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}


def _usable(examples: Examples, through: Preprocess) -> Examples:
    rows = usable_rows(examples.x, through)
    return examples if bool(rows.all()) else examples.select_rows(rows.nonzero().squeeze(1))


def unprocessed_rows(data: FederatedData, client: str, splits: Sequence[str]) -> Examples:
    """Return a client's rows of some splits as its own device made them, before preprocessing.

    Args:
        data: The data of the federation.
        client: The client.
        splits: Names of its splits; their rows follow one another.
    """
    parts = []
    for split in splits:
        rows = data.client_rows[client][split].copy_rows()
        parts.append(replace(rows, x=data._raw_rows(client, split).x))
    return concatenate_examples(parts)


# From a data set to a federation: what is kept, what is public, who gets which rows.


def federate(
    dataset: Dataset,
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    server: PreprocessConfig | None = None,
    absent: Collection[str] = (),
) -> FederatedData:
    """Partition a data set among clients. The order of `clients` changes nothing.

    In this order: `train_limit` rows are kept; the proxy set is held out of them, or loaded from
    its own source, and loses its labels; the common validation set is held out if the data set has
    none; what is left is partitioned among the clients without a source of their own. A source that
    clients name as their own is partitioned among them (its own test and validation sets are not
    used). Each client's rows are then split into train, validation and test.

    Where the data names patients, no patient is in two of these places; numbers of rows are then
    near those asked for. Clients whose partition is `drawn` get no rows here; they draw when they
    are asked for theirs.

    Validation and test rows of a dated set are cut by date (`train_limit` and a held-out proxy set
    are drawn from what is before). In a natural partition a client's are its groups' rows of the
    common sets, and a client's own dated source keeps its cuts.

    Args:
        dataset: The data set.
        config: The data's configuration.
        clients: Settings by client.
        seed: The run's seed.
        cache_bytes: Size of each of the two caches of columns.
        server: How the server sees examples, if it has a model of its own; a proxy set from its own
            source has to fit it, too.
        absent: Clients that get no rows here: theirs are on other machines.

    Raises:
        UserError: Too few rows for what is asked; classes, columns or shapes that do not match;
            settings for images where there are none; a missing value that a participant sees
            without `missing: indicate`.
    """
    check_classes(dataset, config)
    check_categories(dataset, config)
    dataset = mark_rare_class(with_test(dataset))
    how = holdout_strategy(dataset)
    how.check(config)
    population = Population.from_settings(clients)
    kinds = sorted(population.profiles, key=lambda kind: natural_key(kind.first))
    check_settings(kinds, dataset)

    rows = _limit_rows(dataset, config, seed)
    proxy, rows = proxy_set(dataset, config, rows, kinds, server, seed)
    common, rows = common_sets(dataset, config, rows, how, seed)
    public = proxy | common

    notes = list(dataset.notes)
    everywhere = clients_by_source(config, population)
    holders_of = {
        source: held
        for source, who in everywhere.items()
        if (held := [c for c in who if c not in absent])
    }
    owners = {name for holders in everywhere.values() for name in holders}
    lazy_partition: LazyPartition | None = None
    private: dict[str, Splits] = {}
    if config.partition.kind == "drawn" and not absent:
        lazy_partition = LazyPartition(
            RowSelection(dataset.train, rows),
            dataset.task,
            config.partition,
            config.split,
            population,
            seed,
        )
        lazy_partition.check()
    elif names := [name for name in population.ids if name not in owners and name not in absent]:
        shares = assign_rows(dataset, rows, names, config, population, seed, notes)
        assert dataset.test is not None
        # All test rows: `test_limit` is for the common score alone.
        later = {
            "validation": public["common_validation"],
            "test": RowSelection.all_rows(dataset.test),
        }
        private = how.split_clients(shares, later, config, seed)
    owned = load_client_sources(holders_of, dataset, config, population, seed)
    client_rows = ClientRows(private | owned.private, lazy_partition)

    notes += owned.notes + check_missing_values(
        kinds, population, client_rows, public, dataset.layout, dataset.min_gap
    )
    if server is not None:
        view = Preprocess.without_normalization(
            server, dataset.layout, raw_shape(dataset), "server.preprocess"
        )
        if view.missing is None:
            check_view(public, view, dataset.layout, "server.preprocess", dataset.min_gap)
    return FederatedData(
        dataset.task, dataset.name, population, client_rows, public, seed, dataset.simulated or owned.simulated,
        dataset.about, cache_bytes, notes, dataset.layout, dataset.vocabulary,
    )  # fmt: skip


def _limit_rows(dataset: Dataset, config: DataConfig, seed: int) -> Tensor:
    """Return the training rows that are kept, int64 `[M]`."""
    rows = torch.arange(len(dataset.train))
    patient = dataset.train.patient
    if config.train_limit is None or config.train_limit >= len(rows):
        return rows
    return draw_rows(
        rows, config.train_limit, keyed_generator("data", seed, "train_limit"), patient, leave=0
    )[0]

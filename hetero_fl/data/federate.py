"""From a data set to a federation: what is kept, what is public, who gets which rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.population import Population
from hetero_fl.config.source import DataConfig
from hetero_fl.data.apart import Splits, apart, with_test
from hetero_fl.data.base import Dataset
from hetero_fl.data.federated import CACHE_BYTES, FederatedData
from hetero_fl.data.gaps import check_gaps, check_view
from hetero_fl.data.groups import deal_out
from hetero_fl.data.own_sources import from_own_sources, own_sources
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.data.private import Drawing, Private, Share
from hetero_fl.data.public import common_sets, proxy_set
from hetero_fl.data.split import check_categories, check_classes, draw, with_rare
from hetero_fl.data.views_of import check_settings, raw_shape
from hetero_fl.order import natural
from hetero_fl.seeding import generator


def federate(
    dataset: Dataset,
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    server: PreprocessConfig | None = None,
    absent: Collection[str] = (),
) -> FederatedData:
    """Split a data set among clients. The order of `clients` changes nothing.

    In this order: `train_limit` rows are kept; the proxy set is held out of them, or loaded from its own source, and
    loses its labels; the common validation set is carved if the data set has none; what is left is dealt out among the
    clients without a source of their own. A source that clients name as their own is dealt out among those that name it
    (its own test and validation sets stay unused). Each client's rows are then split into train, validation and test.
    Where the data says of whom each row is, no patient is in two of these places; numbers of rows are then near those
    asked for. Clients whose partition is `drawn` get no rows here; they draw when they are asked for theirs. Validation and
    test of a dated set are cut by date (`train_limit` and a held-out proxy set are drawn from what is before); in a natural
    partition a client's are its groups' rows of the common sets, and a client's own dated source keeps the cuts that it has.

    Args:
        server: how the server sees examples, if it has a model of its own; a proxy set from elsewhere has to fit it, too.
        absent: clients that get no rows here: theirs lie on machines of their own.

    Raises:
        UserError: too few rows for what is asked; classes, columns or shapes that do not match; settings for images
            where there are none; a missing value that somebody sees without `missing: indicate`.
    """
    check_classes(dataset, config)
    check_categories(dataset, config)
    dataset = with_rare(with_test(dataset))
    how = apart(dataset)
    how.check(config)
    population = Population.of(clients)
    kinds = sorted(population.kinds, key=lambda kind: natural(kind.first))
    check_settings(kinds, dataset)

    rows = _limited(dataset, config, seed)
    proxy, rows = proxy_set(dataset, config, rows, kinds, server, seed)
    common, rows = common_sets(dataset, config, rows, how, seed)
    public = proxy | common

    notes = list(dataset.notes)
    everywhere = own_sources(config, population)
    holders_of = {source: held for source, who in everywhere.items() if (held := [c for c in who if c not in absent])}
    owners = {name for holders in everywhere.values() for name in holders}
    drawing: Drawing | None = None
    private: dict[str, Splits] = {}
    if config.partition.kind == "drawn" and not absent:
        drawing = Drawing(Share(dataset.train, rows), dataset.task, config.partition, config.split, population, seed)
        drawing.check()
    elif names := [name for name in population.ids if name not in owners and name not in absent]:
        shares = deal_out(dataset, rows, names, config, population, seed, notes)
        private = how.clients(shares, _later(dataset, public), config, seed)
    owned = from_own_sources(holders_of, dataset, config, population, seed)
    everybody = Private(private | owned.private, drawing)

    notes += owned.notes + check_gaps(kinds, population, everybody, public, dataset.layout, dataset.gap)
    if server is not None:
        view = Preprocess.plain(server, dataset.layout, raw_shape(dataset), "server.preprocess")
        if view.missing is None:
            check_view(public, view, dataset.layout, "server.preprocess", {}, dataset.gap)
    return FederatedData(
        dataset.task, dataset.name, population, everybody, public, seed, dataset.simulated or owned.simulated,
        dataset.about, cache_bytes, notes, dataset.layout, dataset.vocabulary,
    )  # fmt: skip


def _limited(dataset: Dataset, config: DataConfig, seed: int) -> Tensor:
    """The training rows that are kept, int64 `[M]`."""
    rows, patient = torch.arange(len(dataset.train)), dataset.train.patient
    if config.train_limit is None or config.train_limit >= len(rows):
        return rows
    return draw(rows, config.train_limit, generator("data", seed, "train_limit"), patient, leave=0)[0]


def _later(dataset: Dataset, public: Mapping[str, Share]) -> Splits:
    """The common validation and test rows that are there for clients: `test_limit` is for the common score alone."""
    assert dataset.test is not None
    return {"validation": public["common_validation"], "test": Share.whole(dataset.test)}

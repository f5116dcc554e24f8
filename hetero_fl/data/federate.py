"""From a data set to a federation: what is kept, what is public, who gets which rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.clients import AugmentConfig, ClientSettings, PreprocessConfig, ScannerConfig
from hetero_fl.config.population import Kind, Population
from hetero_fl.config.source import DataConfig, SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.dated import cut_by_date, cut_rows, rows_of_groups
from hetero_fl.data.federated import CACHE_BYTES, FederatedData
from hetero_fl.data.gaps import check_gaps, check_view
from hetero_fl.data.layout import Layout
from hetero_fl.data.outside import (
    adopt,
    limited,
    load_unlabelled,
    match_blocks,
    match_columns,
    match_groups,
    one_group_each,
    read_as,
)
from hetero_fl.data.partition import deal
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.data.private import Drawing, Private, Share
from hetero_fl.data.registry import load_source
from hetero_fl.data.split import check_classes, draw, split_client, with_rare, with_test
from hetero_fl.errors import UserError
from hetero_fl.order import natural
from hetero_fl.seeding import generator, key


def federate(
    dataset: Dataset,
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    server: PreprocessConfig | None = None,
) -> FederatedData:
    """Split a data set among clients. The order of `clients` changes nothing.

    In this order: `train_limit` rows are kept; the proxy set is held out of them, or loaded from its own source, and
    loses its labels; the common validation set is carved if the data set has none; what is left is dealt out among the
    clients without a source of their own. A source that clients name as their own is dealt out among those that name it
    (its own test and validation sets stay unused). Each client's rows are then split into train, validation and test.
    Where the data says of whom each row is, no patient is in two of these places; numbers of rows are then near those
    asked for. Clients whose partition is `drawn` get no rows here; they draw when they are asked for theirs. A dated set is
    cut by date wherever another is drawn from; in a natural partition a client's validation and test rows are its groups' rows
    of the common sets, and a client's own dated source keeps the cuts that it has.

    Args:
        server: how the server sees examples, if it has a model of its own; a proxy set from elsewhere has to fit it, too.

    Raises:
        UserError: too few rows for what is asked; classes, columns or shapes that do not match; settings for images
            where there are none; a missing value that somebody sees without `missing: indicate`.
    """
    check_classes(dataset, config)
    dataset = with_rare(with_test(dataset))
    assert dataset.test is not None
    if dataset.train.time is not None:
        _check_dated(dataset, config)
    population = Population.of(clients)
    kinds = sorted(population.kinds, key=lambda kind: natural(kind.first))
    shape = tuple(dataset.train.x.shape[1:])
    for kind in kinds:
        _seen_shape(kind.first, kind.settings, shape, dataset.layout)
        if dataset.vocabulary is not None:
            _check_tokens(kind.first, kind.settings.preprocess)
    rows = torch.arange(len(dataset.train))
    if config.train_limit is not None and config.train_limit < len(rows):
        rows, _ = draw(rows, config.train_limit, generator("data", seed, "train_limit"), dataset.train.patient, leave=0)
    public, rows = _proxy(dataset, config, rows, kinds, server, seed)
    if dataset.validation is None and dataset.train.time is not None and config.validation:
        after, before = cut_by_date(dataset.train.time[rows], config.validation, dataset.span)
        validation, rows = rows[after], rows[before]
        if not len(validation) or not len(rows):
            raise UserError(
                f"data.validation: found {config.validation:g}, for which {dataset.name} has too few rows to cut by date"
            )
        public["common_validation"] = Share(dataset.train, validation)
    elif dataset.validation is None:
        validation = torch.zeros(0, dtype=torch.int64)
        if config.validation:
            count = max(1, round(config.validation * len(rows)))
            validation, rows = draw(rows, count, generator("data", seed, "common_validation"), dataset.train.patient)
        public["common_validation"] = Share(dataset.train, validation)
    else:
        public["common_validation"] = Share(dataset.validation, torch.arange(len(dataset.validation)))
    test = torch.arange(len(dataset.test))
    if config.test_limit is not None and config.test_limit < len(test):  # the same rows for all seeds
        test, _ = draw(test, config.test_limit, generator("data", dataset.name, "test_limit"))
    public["common_test"] = Share(dataset.test, test)

    notes = list(dataset.notes)
    holders_of = _own_sources(config, population)
    drawing, shares = None, {}
    if config.partition.kind == "drawn":
        drawing = Drawing(Share(dataset.train, rows), dataset.task, config.partition, config.split, population, seed)
        drawing.check()
    else:
        own_rows = {name for holders in holders_of.values() for name in holders}
        shares = _deal(dataset, rows, [n for n in population.ids if n not in own_rows], config, population, seed, notes)
    simulated = dataset.simulated
    cut: dict[str, dict[str, Share]] = {}  # splits that are there already
    if dataset.train.time is not None and config.partition.kind == "natural":
        later = {
            "validation": public["common_validation"],
            "test": Share(dataset.test, torch.arange(len(dataset.test))),
        }
        cut = {name: {n: _of_groups(s, share) for n, s in later.items()} for name, share in shares.items()}
    for source, holders in holders_of.items():
        where = f"clients: '{holders[0]}': data"
        own = load_source(
            read_as(source, dataset.task, config.text), Path(config.root).expanduser(), where, missing=True
        )
        simulated |= own.simulated
        notes += [f"{where}: {note}" for note in own.notes]
        seen = {column for name in holders for column in _needed(population[name].preprocess, dataset.layout)}
        adopted = Dataset(own.name, dataset.task, adopt(own, dataset, where, seen))
        for name in holders:
            found = _seen_shape(name, population[name], tuple(adopted.train.x.shape[1:]), dataset.layout)
            expected = _seen_shape(name, population[name], shape, dataset.layout)
            if found != expected:
                raise UserError(
                    f"clients: '{name}': data: examples of {own.name} have shape {found}, those of the common set "
                    f"{dataset.name} {expected}, as this client sees them; set preprocess.resize or channels"
                )
        # keys of its own: holders of two sources would else get the same mix of classes
        own_seed = key("data", seed, "own source", source.name, source.path or "")
        every = torch.arange(len(adopted.train))
        if len(holders) == 1:  # its own file is its own, whatever groups are in it
            shares[holders[0]] = Share(adopted.train, every)
            if own.train.time is not None and own.validation is not None and own.test is not None:
                cuts = {"validation": own.validation, "test": own.test}
                own_cut = {n: adopt(replace(own, train=part), dataset, where) for n, part in cuts.items()}
                cut[holders[0]] = {n: Share(part, torch.arange(len(part))) for n, part in own_cut.items()}
        else:
            if drawing is not None:
                raise UserError(
                    f"data.partition.kind: drawn draws from the common set, and {source.name} is the own source of "
                    f"{len(holders)} clients; give it to one of them, or take another kind"
                )
            shares |= _deal(adopted, every, holders, config, population, own_seed, notes)

    private = {}
    for name, share in shares.items():
        if name in cut:
            private[name] = {"train": share, **cut[name]}
            continue
        if share.examples.time is not None:
            both = (config.split.validation, config.split.test)
            parts = cut_rows(share.rows, share.examples.time, both, dataset.span, f"data.split: client '{name}'")
        else:
            parts = split_client(
                share.rows, config.split, name, config.partition.min_size, seed, share.examples.patient
            )
        private[name] = {split: Share(share.examples, part) for split, part in parts.items()}
    everybody = Private(private, drawing)
    notes += check_gaps(kinds, population, everybody, public, dataset.layout, dataset.gap)
    if server is not None:
        view = Preprocess.plain(server, dataset.layout, shape, "server.preprocess")
        if view.missing is None:
            check_view(public, view, dataset.layout, "server.preprocess", {}, dataset.gap)
    return FederatedData(
        dataset.task, dataset.name, population, everybody, public, seed, simulated, dataset.about,
        cache_bytes, notes, dataset.layout, dataset.vocabulary,
    )  # fmt: skip


def _check_dated(dataset: Dataset, config: DataConfig) -> None:
    """Refuse (UserError) what would draw rows of a dated set, or tear it by other bounds."""
    if config.partition.kind == "drawn":
        raise UserError(
            f"data.partition.kind: found drawn, but {dataset.name} is dated: its rows are cut by date, not drawn"
        )
    if dataset.train.patient is not None:
        raise UserError(f"data.patient: {dataset.name} is dated: its rows are cut by date, patients cannot stay whole")
    for name, part in dataset.splits().items():
        if part.time is None:
            raise UserError(f"data.name: {dataset.name}: train is dated, {name} is not")


def _of_groups(later: Share, share: Share) -> Share:
    """The rows of a common set that are of the groups which a client's rows are of."""
    if later.examples.group is None:
        raise UserError("data.partition.kind: natural needs the groups of validation and test rows of a dated set")
    mine = rows_of_groups(later.examples, share.examples, share.rows)
    return Share(later.examples, mine[torch.isin(mine, later.rows)])


def _proxy(
    dataset: Dataset, config: DataConfig, rows: Tensor, kinds: list[Kind], server: PreprocessConfig | None, seed: int,
) -> tuple[dict[str, Share], Tensor]:  # fmt: skip
    """The proxy set, if there is one, and the rows that are left. Which rows it takes depends on no label."""
    size, draws = config.proxy.size, generator("data", seed, "proxy")
    if config.proxy.source is None:
        if size == 0:
            return {}, rows
        names, having = config.proxy.columns, rows
        if names is not None:
            having = rows[_with(dataset.train.x[rows], names, dataset.layout)]
        if size >= len(having):
            what = "" if names is None else f" with {' and '.join(names)}"
            raise UserError(
                f"data.proxy.size: found {size}, but {dataset.name} has {len(having)} training rows{what}; take fewer"
            )
        held, rest = draw(having, size, draws, dataset.train.patient)
        if names is None:
            return {"proxy": Share(Examples(dataset.train.x), held)}, rest
        rows = rows[~torch.isin(rows, held)]
        if dataset.train.patient is not None:
            rows = rows[~torch.isin(dataset.train.patient[rows], dataset.train.patient[held])]
        public = limited(dataset.train.x[held], names, dataset.layout, "data.proxy.columns")
        return {"proxy": Share(Examples(public), torch.arange(len(held)))}, rows
    where = "data.proxy.source"
    source, root = read_as(config.proxy.source, dataset.task, config.text), Path(config.root).expanduser()
    x, columns, blocks = load_unlabelled(source, root, where, dataset.vocabulary)
    needed = {column for k in kinds for column in _needed(k.settings.preprocess, dataset.layout)}
    name = f"{where}: {config.proxy.source.name}"
    if blocks or dataset.blocks:
        x = match_blocks(x, blocks, dataset, name, ())  # who sees nothing of it has no part in it
    else:
        x, _ = match_columns(x, columns, dataset, name, needed)
    if config.proxy.columns is not None:
        x = limited(x, config.proxy.columns, dataset.layout, "data.proxy.columns")
    raw, common = tuple(x.shape[1:]), tuple(dataset.train.x.shape[1:])
    views = [
        (
            f"client '{k.first}'",
            *(_seen_shape(k.first, k.settings, s, dataset.layout) for s in (raw, common)),
            "its preprocess",
        )
        for k in kinds
    ]
    if server is not None:
        place = "server.preprocess"
        view = Preprocess.plain(server, dataset.layout, common, place)
        views.append(("the server", view.shape(raw, place), view.shape(common, place), place))
    for who, found, expected, section in views:
        if found != expected:
            raise UserError(
                f"{where}: examples of {config.proxy.source.name} have shape {found}, those of {dataset.name} "
                f"{expected}, as {who} sees them; set {section}.resize or channels"
            )
    held = torch.arange(len(x))
    if 0 < size < len(x):
        held, _ = draw(held, size, draws)
    return {"proxy": Share(Examples(x), held)}, rows


def _with(x: Tensor, names: list[str], layout: Layout) -> Tensor:
    """bool `[N]`: rows of which something is there of each of these columns or blocks."""
    found = torch.ones(len(x), dtype=torch.bool)
    for name in names:
        for start, stop in layout.spans([name], "data.proxy.columns"):
            found &= ~x[..., start:stop].isnan().flatten(1).all(1)
    return found


def _deal(
    dataset: Dataset,
    rows: Tensor,
    names: list[str],
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    notes: list[str],
) -> dict[str, Share]:
    """The rows of each of these clients. One alone gets them all, unless groups go by name and others have some.

    A note is added where groups go to clients of other names.
    """
    train = dataset.train
    patient = None if train.patient is None else train.patient[rows]
    group = None if train.group is None else train.group[rows]
    if group is not None and train.group_names:
        found = [train.group_names[g] for g in group.unique().tolist()]
        if config.partition.kind == "natural":
            notes += match_groups(found, names, dataset.name)
            one_group_each(train.take(rows), dataset.name)
        if set(found) == set(names):  # groups that bear the clients' names go to them by name
            group = torch.tensor([names.index(n) if n in names else -1 for n in train.group_names])[group]
    if len(names) < 2:
        return {name: Share(train, rows) for name in names}
    assert train.y is not None
    sizes = [clients[name].size for name in names]
    parts = deal(train.y[rows], group, config.partition, sizes, dataset.task, seed, patient)
    return {name: Share(train, rows[part]) for name, part in zip(names, parts, strict=True)}


def _own_sources(config: DataConfig, clients: Population) -> dict[SourceConfig, list[str]]:
    """Clients by the source that they name as their own. They are looked for only where there are any."""
    holders: dict[SourceConfig, list[str]] = {}
    named = any(kind.settings.data is not None for kind in clients.kinds)
    for name in clients.ids if named else ():
        source = clients[name].data
        if source is not None:
            if (source.name, source.path) == (config.name, config.path):
                raise UserError(f"clients: '{name}': data: found the common source; leave it out to get a part of that")
            holders.setdefault(source, []).append(name)
    return holders


def _needed(config: PreprocessConfig, layout: Layout) -> Collection[str]:
    """The columns or blocks that may not be missing: those that this view sees, unless it says what becomes of them then."""
    if config.missing is not None:
        return ()
    return layout.names if config.columns is None else config.columns


def _check_tokens(name: str, view: PreprocessConfig) -> None:
    for name_of in ("normalize", "missing"):
        if getattr(view, name_of) is not None:
            where = f"clients: '{name}': preprocess.{name_of}"
            raise UserError(f"{where}: is for numbers, but the examples are tokens; leave it out")


def _seen_shape(name: str, settings: ClientSettings, raw_shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Shape of an example as a client sees it; refuses what its settings ask of examples that are no images."""
    where = f"clients: '{name}': preprocess"
    seen = Preprocess.resolve(_fixed(settings.preprocess), None, where, layout, raw_shape).shape(raw_shape, where)
    image = len(seen) == 3
    for setting, value, plain, given in (
        ("scanner", settings.scanner, ScannerConfig(), raw_shape),
        ("augment", settings.augment, AugmentConfig(), seen),
    ):
        if value != plain and len(given) != 3:
            raise UserError(
                f"clients: '{name}': {setting}: is for images, but the examples have shape {given}; leave it out"
            )
    if image and settings.augment.crop >= min(seen[1:]):
        raise UserError(
            f"clients: '{name}': augment.crop: found {settings.augment.crop}; images have {min(seen[1:])} pixels"
        )
    return seen


def _fixed(config: PreprocessConfig) -> PreprocessConfig:
    """The same view as far as it is known before anybody has rows."""
    return config.model_copy(update={"normalize": None}) if config.normalize == "own" else config

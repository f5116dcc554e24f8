"""Clients with a source of their own: who they are, and which of its rows each has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hetero_fl.config.population import Population
from hetero_fl.config.source import DataConfig, SourceConfig
from hetero_fl.data.apart import Splits, apart
from hetero_fl.data.base import Dataset
from hetero_fl.data.groups import deal_out
from hetero_fl.data.outside import adopt, read_as
from hetero_fl.data.private import Share
from hetero_fl.data.registry import load_source
from hetero_fl.data.views_of import check_alike, needed, raw_shape
from hetero_fl.errors import UserError
from hetero_fl.seeding import key


@dataclass
class Owned:
    """The rows of clients with own sources, lines on how these were read, and whether one of them is generated."""

    private: dict[str, Splits]
    notes: list[str]
    simulated: bool


def own_sources(config: DataConfig, clients: Population) -> dict[SourceConfig, list[str]]:
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


def from_own_sources(
    holders_of: Mapping[SourceConfig, list[str]], common: Dataset, config: DataConfig, clients: Population, seed: int
) -> Owned:
    """Load each source, match it to the common set, and deal it out among those that name it.

    Raises:
        UserError: a source that does not match the common set, or that several share in a partition in which nobody is dealt
            any rows.
    """
    found = Owned({}, [], False)
    for source, holders in holders_of.items():
        where = f"clients: '{holders[0]}': data"
        read = read_as(source, common.task, config.text, common.categories)
        root = Path(config.root).expanduser()
        own = load_source(read, root, where, missing=True)
        found.simulated |= own.simulated
        found.notes += [f"{where}: {note}" for note in own.notes]
        seen = needed((clients[name] for name in holders), common.layout)
        adopted = Dataset(own.name, common.task, adopt(own, common, where, seen), span=own.span)
        for name in holders:
            check_alike(raw_shape(adopted), f"clients: '{name}': data", own.name, {name: clients[name]}, common)
        if len(holders) > 1:
            if config.partition.kind == "drawn":
                raise UserError(
                    f"data.partition.kind: drawn draws from the common set, and {source.name} is the own source of "
                    f"{len(holders)} clients; give it to one of them, or take another kind"
                )
            # keys of its own: holders of two sources would else get the same mix of classes
            own_seed = key("data", seed, "own source", source.name, source.path or "")
            everything = Share.whole(adopted.train)
            shares = deal_out(adopted, everything.rows, holders, config, clients, own_seed, found.notes)
            found.private |= apart(adopted).clients(shares, {}, config, seed)
            continue
        # its own file is its own, whatever groups are in it
        share = Share.whole(adopted.train)
        kept = {
            name: Share.whole(adopt(replace(own, train=part), common, where, seen))
            for name, part in apart(own).kept().items()
        }
        if kept:
            found.private[holders[0]] = {"train": share, **kept}
        else:
            found.private |= apart(adopted).clients({holders[0]: share}, {}, config, seed)
    return found

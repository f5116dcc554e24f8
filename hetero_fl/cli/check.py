"""`--check`: the resolved configuration, and what a run of it will cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_fl.architecture import Architecture
from hetero_fl.codec import nbytes
from hetero_fl.config import Config, dump, expand
from hetero_fl.experiment import Prepared
from hetero_fl.reporting.wording import plural
from hetero_fl.runtime.choose import choose
from hetero_fl.runtime.conditions import Conditions
from hetero_fl.runtime.federation import SOME
from hetero_fl.runtime.price import DryRun, price
from hetero_fl.runtime.rehearsal import price_of_queue

UNKNOWN = "unknown"


def print_check(prepared: Prepared) -> None:
    """Print it; nothing is trained or written."""
    print(dump(prepared.config))
    federation = prepared.federation
    table = Table("client", "model", "rows", "parameters", "down", "up", title=f"cost of {prepared.name}")
    config, parameters = prepared.config, {}
    archs = {kind.arch: [kind.arch, *prepared.method.extras(kind.arch).values()] for kind in federation.cards.kinds}
    for arch in archs:
        parameters[arch] = _parameters(arch)
    held = Conditions.of(federation, config)
    waits = config.runtime.mode == "sync"
    if waits:
        cost = price(prepared.method, federation, config.rounds, held.invited, config.evaluation.every)
    else:
        cost = price_of_queue(prepared.method, federation, config)
    for id in federation.some:
        card = federation.cards[id]
        sizes = (_size(cost.down[id] + cost.reading[id]), _size(cost.up[id]))
        table.add_row(id, prepared.method.called(card), str(card.n), f"{parameters[card.arch]:,}", *sizes)
    if others := len(federation.cards) - len(federation.some):
        table.add_row(f"and {others:,} more", "", "", "", "", "")
    console = Console()
    console.print(table)
    up, down, reading = cost.up.total(), cost.down.total(), cost.reading.total()
    at_most = config.evaluation.patience or cost.at_most
    about = "about " if (waits and held.simulated) or not (at_most or cost.exact) else "at most " if at_most else ""
    console.print(
        f"{about}{_size(up + down + reading)} in {plural(config.rounds, 'round')}: {_size(up)} up, {_size(down + reading)} down, "
        f"{_size(reading)} of it to evaluate"
    )
    largest = max(sum(map(_parameters, models)) for models in archs.values()) * 4  # with those that the method adds
    groups = nbytes(list(DryRun(prepared.method, federation).server.models.values()))
    console.print(
        f"memory for models, about: {_size(groups)} at the server, {_size(4 * largest)} for the client being trained"
    )
    for note in prepared.notes:
        console.print(f"note: {note}")
    for reason in choose(config, federation).reasons:  # engines that are to be reached or launched are not tried here
        console.print(f"computed by: {reason}")


def print_draft(config: Config, refused: Mapping[str, str]) -> None:
    """Print a configuration that names code which may not run: nothing is built, so no size is known.

    Args:
        config: The configuration.
        refused: The references to code, each with its key.
    """
    print(dump(config))
    clients = expand(config.clients)
    title = Text(f"cost of {config.algorithm.get('name')}")
    table = Table("client", "model", "rows", "parameters", "down", "up", title=title)
    for client in islice(clients, SOME):
        table.add_row(client, Text(clients[client].model[0].name), *[UNKNOWN] * 4)
    if len(clients) > SOME:
        table.add_row(f"and {len(clients) - SOME:,} more", *[""] * 5)
    console = Console()
    console.print(table)
    for reference, key in refused.items():
        note = f"note: {key} names code, {reference}; sizes are unknown without --allow-code"
        console.print(Text(note), soft_wrap=True)


def _parameters(arch: Architecture) -> int:
    return sum(math.prod(arch.shapes[name]) for name in arch.parameter_names)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"

"""Print the output of `--check` and of `hetero-fl methods`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.algorithms.requirements import in_words, needs, sends, summary, tasks
from hetero_fl.config import Config, dump, expand
from hetero_fl.config.describe import default, meaning, values
from hetero_fl.core.model_spec import Architecture
from hetero_fl.experiment import Prepared
from hetero_fl.federation.cost import DryRun, price, price_of_queue
from hetero_fl.federation.executors.choose import choose
from hetero_fl.federation.federation import SOME
from hetero_fl.federation.simulation.schedule import Conditions
from hetero_fl.utils.serialization import nbytes
from hetero_fl.utils.text import plural

# `--check`: the resolved configuration, and what a run of it will cost.

UNKNOWN = "unknown"


def print_check(prepared: Prepared) -> None:
    """Print it; nothing is trained or written."""
    print(dump(prepared.config))
    federation = prepared.federation
    table = Table(
        "client", "model", "rows", "parameters", "down", "up", title=f"cost of {prepared.name}"
    )
    config, parameters = prepared.config, {}
    archs = {
        kind.arch: [kind.arch, *prepared.method.extras(kind.arch).values()]
        for kind in federation.cards.kinds
    }
    for arch in archs:
        parameters[arch] = _parameters(arch)
    held = Conditions.of(federation, config)
    waits = config.runtime.mode == "sync"
    if waits:
        cost = price(
            prepared.method, federation, config.rounds, held.invited, config.evaluation.every
        )
    else:
        cost = price_of_queue(prepared.method, federation, config)
    for id in federation.some:
        card = federation.cards[id]
        sizes = (_size(cost.down[id] + cost.reading[id]), _size(cost.up[id]))
        table.add_row(
            id, prepared.method.called(card), str(card.n), f"{parameters[card.arch]:,}", *sizes
        )
    if others := len(federation.cards) - len(federation.some):
        table.add_row(f"and {others:,} more", "", "", "", "", "")
    console = Console()
    console.print(table)
    up, down, reading = cost.up.total(), cost.down.total(), cost.reading.total()
    at_most = config.evaluation.patience or cost.at_most
    about = (
        "about "
        if (waits and held.simulated) or not (at_most or cost.exact)
        else "at most "
        if at_most
        else ""
    )
    console.print(
        f"{about}{_size(up + down + reading)} in {plural(config.rounds, 'round')}: {_size(up)} up, {_size(down + reading)} down, "
        f"{_size(reading)} of it to evaluate"
    )
    # with those that the method adds
    largest = max(sum(map(_parameters, models)) for models in archs.values()) * 4
    groups = nbytes(list(DryRun(prepared.method, federation).server.models.values()))
    console.print(
        f"memory for models, about: {_size(groups)} at the server, {_size(4 * largest)} for the client being trained"
    )
    for note in prepared.notes:
        console.print(f"note: {note}")
    # engines that are to be reached or launched are not tried here
    for reason in choose(config, federation).reasons:
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


# `hetero-fl methods`: what methods there are, in the words of their docstrings, and what their
# classes declare.


def print_methods(console: Console) -> None:
    """A line a method; below it what it sends, what it needs, and the kinds of target that it is for."""
    table = Table.grid("name", "told", padding=(0, 2))
    table.columns[0].no_wrap = True
    for name in sorted(algorithm):
        kind = algorithm[name]
        table.add_row(Text(name, style="bold"), Text(summary(kind)))
        table.add_row("", Text("; ".join(declared(kind)), style="dim"))
    console.print(table)
    console.print("\n`hetero-fl methods NAME` explains a method and its settings.", highlight=False)


def declared(kind: type[Algorithm]) -> Iterator[str]:
    """What follows from the class: `sends parameters`, `needs one architecture`, `for multi-class`."""
    try:
        method = kind()
    except ValidationError:  # a setting without a default
        method = kind.model_construct()
    yield f"sends {', '.join(sends(method)) or 'nothing'}"
    if needed := needs(method):
        yield f"needs {in_words(needed)}"
    if kinds := tasks(method):
        yield f"for {' or '.join(kinds)}"


def print_explained(names: Sequence[str], console: Console) -> None:
    """These methods: the whole docstring and a table of settings. Raises UserError for a name that there is not."""
    for name, kind in [(name, algorithm[name]) for name in names]:
        console.print(Text(name, style="bold"))
        for paragraph in (kind.__doc__ or "").strip().split("\n\n"):
            console.print(Text(" ".join(paragraph.split())))
        console.print(Text("; ".join(declared(kind)), style="dim"))
        console.print(Text(f"read: {kind.reads}", style="dim"))
        table = Table("setting", "values", "default", "meaning")
        for key, field in kind.model_fields.items():
            given = "" if field.is_required() else default(field)
            told = (values(field.annotation, field.metadata), given, meaning(kind, key))
            table.add_row(key, *(Text(words.replace("`", "")) for words in told))
        console.print(table)

"""Print the output of `--check` and of `hetero-fl methods`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.requirements import (
    describe_needs,
    format_needs,
    method_summary,
    shared_kinds,
    supported_tasks,
)
from hetero_fl.config import Config, dump, expand_population
from hetero_fl.config.describe import describe_key, describe_values, format_default
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.device_memory import MemoryPlan
from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.cost import DryRun, communication_cost
from hetero_fl.federation.executors.choose import choose_executor, plan_memory
from hetero_fl.federation.federation import SOME
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.reporting.formatting import format_bytes
from hetero_fl.reporting.rendering import render
from hetero_fl.utils.serialization import num_tensor_bytes
from hetero_fl.utils.text import pluralize

# `--check`: the resolved configuration, and what a run of it will cost.

TOGETHER = (1, 8, 32)  # numbers of clients for which the memory is shown

UNKNOWN = "unknown"


def print_check(prepared: PreparedRun) -> None:
    """Print it; nothing is trained or written."""
    print(dump(prepared.config))
    print(prepared.headline)
    federation = prepared.federation
    table = Table(
        "client", "model", "rows", "parameters", "down", "up", title=f"cost of {prepared.name}"
    )
    config = prepared.config
    archs = {kind.arch: list(kind.models.values()) for kind in federation.client_infos.profiles}
    parameters = {arch: _parameters(arch) for arch in archs}
    environment = SimulationEnvironment.from_config(federation, config)
    is_async = config.runtime.mode == "async"
    cost = communication_cost(
        prepared.method,
        federation,
        config.rounds,
        config.clients.per_round if is_async else environment.num_sampled,
        config.evaluation.every,
    )
    for id in federation.representative_clients:
        client_info = federation.client_infos[id]
        table.add_row(
            id,
            client_info.arch.display_name,
            str(client_info.num_rows),
            f"{parameters[client_info.arch]:,}",
            format_bytes(cost.down[id] + cost.evaluation[id]),
            format_bytes(cost.up[id]),
        )
    if others := len(federation.client_infos) - len(federation.representative_clients):
        table.add_row(f"and {others:,} more", "", "", "", "", "")
    console = Console()
    console.print(table)
    console.print(_memory_table(prepared))
    at_most = config.evaluation.patience or cost.is_upper_bound
    server = DryRun(prepared.method, federation).server
    text = render(
        "expected_cost.txt",
        # A simulation repeats failed tasks, and second copies count.
        is_bound=at_most and not is_async and not environment.simulated,
        is_async=is_async,
        rounds=config.rounds,
        up=cost.up.total(),
        down=cost.down.total(),
        evaluation=cost.evaluation.total(),
        server_memory=num_tensor_bytes(list(server.models.values())),
        notes=prepared.notes,
        # engines that are to be reached or launched are not tried here
        reasons=choose_executor(config, federation).reasons,
    )
    console.print(text, end="")


def _memory_table(prepared: PreparedRun) -> Table:
    """Return a table of the memory of local training by clients computed together.

    The optimizer column includes gradients, "forward" is what a batch's forward pass keeps for them.
    """
    table = Table(
        "model",
        "weights",
        "optimizer",
        "forward",
        *(pluralize(n, "client") for n in TOGETHER),
        title="approximate memory by clients trained together",
    )
    client_infos = prepared.federation.client_infos
    rows: dict[str, MemoryPlan] = {}
    for profile in client_infos.profiles:
        client_info = client_infos[profile.first]
        names = " + ".join(arch.display_name for arch in client_info.models.values())
        plan = plan_memory(client_info)
        if names not in rows or rows[names].total < plan.total:
            rows[names] = plan
    for names, plan in islice(rows.items(), SOME):
        parts = [plan.weights, plan.gradients + plan.optimizer, plan.activations]
        sums = [n * plan.total for n in TOGETHER]
        table.add_row(names, *map(format_bytes, [*parts, *sums]))
    return table


def print_draft(config: Config, refused: Mapping[str, str]) -> None:
    """Print a configuration that names code which may not run: nothing is built, so no size is known.

    Args:
        config: The configuration.
        refused: The references to code, each with its key.
    """
    print(dump(config))
    clients = expand_population(config.clients)
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


def _parameters(arch: ModelSpec) -> int:
    return sum(math.prod(arch.shapes[name]) for name in arch.parameter_names)


# `hetero-fl methods`: what methods there are, in the words of their docstrings, and what their
# classes declare.


def print_methods(console: Console) -> None:
    """A line a method; below it what it sends, what it needs, and the kinds of target that it is for."""
    table = Table.grid("name", "told", padding=(0, 2))
    table.columns[0].no_wrap = True
    for name in sorted(register_algorithm):
        kind = register_algorithm[name]
        table.add_row(Text(name, style="bold"), Text(method_summary(kind)))
        table.add_row("", Text("; ".join(declared_properties(kind)), style="dim"))
    console.print(table)
    console.print("\n`hetero-fl methods NAME` explains a method and its settings.", highlight=False)


def declared_properties(kind: type[Algorithm]) -> Iterator[str]:
    """What follows from the class: `sends parameters`, `needs one architecture`, `for multi-class`."""
    method = kind.model_construct()
    yield f"sends {', '.join(shared_kinds(method)) or 'nothing'}"
    if needed := describe_needs(method):
        yield f"needs {format_needs(needed)}"
    if kinds := supported_tasks(method):
        yield f"for {' or '.join(kinds)}"


def print_method_details(names: Sequence[str], console: Console) -> None:
    """These methods: the whole docstring and a table of settings. Raises UserError for a name that there is not."""
    for name, kind in [(name, register_algorithm[name]) for name in names]:
        console.print(Text(name, style="bold"))
        for paragraph in (kind.__doc__ or "").strip().split("\n\n"):
            console.print(Text(" ".join(paragraph.split())))
        console.print(Text("; ".join(declared_properties(kind)), style="dim"))
        console.print(Text(f"read: {kind.evaluated_when}", style="dim"))
        table = Table("setting", "values", "default", "meaning")
        for key, field in kind.model_fields.items():
            given = "" if field.is_required() else format_default(field)
            told = (
                describe_values(field.annotation, field.metadata),
                given,
                describe_key(kind, key),
            )
            table.add_row(key, *(Text(words.replace("`", "")) for words in told))
        console.print(table)


def print_scores(
    results: Mapping[str, Mapping[str, float | None]], title: str, console: Console
) -> None:
    """Print a row for each model; in a terminal too narrow for that, a row for each figure. Nothing is clipped."""
    names = list(next(iter(results.values())))
    wide = Table("model", *(n.replace("_", " ") for n in names), title=title)
    long = Table("model", "figure", "value", title=title)
    for column in [*wide.columns, *long.columns]:
        column.overflow = "fold"
    for model, scores in results.items():
        told = ["–" if scores[n] is None else f"{scores[n]:.3f}" for n in names]
        wide.add_row(model, *told)
        for name, value in zip(names, told, strict=True):
            long.add_row(model, name.replace("_", " "), value)
    # measured there, a table is as wide as its longest words need
    unbounded = console.options.update(width=10_000)
    fits = Measurement.get(console, unbounded, wide).minimum <= console.width
    console.print(wide if fits else long)

"""Terminal output of `--check`, `hetero-fl methods` and `hetero-fl evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.algorithms.requirements import (
    declared_properties,
    method_paragraphs,
    method_references,
    method_summary,
)
from hetero_fl.config import Config, dump, expand_population
from hetero_fl.config.describe import describe_keys
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.cost import expected_cost, upload_contents
from hetero_fl.federation.executors.choose import choose_executor
from hetero_fl.federation.simulation.conditions import is_simulated
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.formatting import format_bytes
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.terminal import Terminal
from hetero_fl.utils.errors import echo
from hetero_fl.utils.ordering import ClientIds
from hetero_fl.utils.serialization import num_tensor_bytes
from hetero_fl.utils.text import format_list

# Of more than MAX_LISTED clients, the first and the last NUM_EDGE are listed.
MAX_LISTED = 20
NUM_EDGE = 5

# Number of lines for the tensors of uploads, and of the clients that a line names.
MAX_PARTS = 10
MAX_NAMES = 3
# Number of shapes that a line lists.
MAX_SHAPES = 2

UNKNOWN = "unknown"


def print_check(prepared: PreparedRun) -> None:
    """Print the configuration of a run, with expected communication cost and memory."""
    echo(dump(prepared.config))
    echo(prepared.headline)
    federation = prepared.federation
    config = prepared.config
    parameters = {
        profile.arch: _num_parameters(profile.arch) for profile in federation.client_infos.profiles
    }
    is_async = config.runtime.mode == "async"
    cost = expected_cost(
        prepared.method,
        federation,
        config.rounds,
        config.clients.per_round if is_async else federation.cohort,
        config.evaluation.every,
    )

    def describe(client_id: str) -> tuple[str, ...]:
        client_info = federation.client_infos[client_id]
        return (
            client_info.arch.display_name,
            str(client_info.num_rows),
            f"{parameters[client_info.arch]:,}",
            format_bytes(cost.down[client_id] + cost.evaluation[client_id]),
            format_bytes(cost.up[client_id]),
        )

    console = Terminal()
    title = f"cost of {prepared.name}"
    ids = federation.representative_clients
    console.print(_cost_table(title, ids, len(federation.client_infos), describe))
    console.print(_upload_table(prepared))
    is_upper_bound = config.evaluation.patience or cost.is_upper_bound
    server = federation.server()
    prepared.method.setup(server)
    text = render(
        "expected_cost.txt",
        # A simulation repeats failed tasks and counts duplicate uploads.
        is_bound=is_upper_bound and not is_simulated(federation, config),
        is_async=is_async,
        rounds=config.rounds,
        up=cost.up.total(),
        down=cost.down.total(),
        evaluation=cost.evaluation.total(),
        server_memory=num_tensor_bytes(list(server.models.values())),
        notes=prepared.notes,
        # Executors that need a cluster or a launcher are not started here.
        reasons=choose_executor(config, federation).reasons,
    )
    console.print(text, end="")


def _cost_table(
    title: str | Text,
    client_ids: Sequence[str] | ClientIds,
    num_clients: int,
    describe: Callable[[str], tuple[str | Text, ...]],
) -> Table:
    """Create a table with a row for each client, or for the first and the last clients of many.

    Args:
        title: Title of the table.
        client_ids: Ids of the clients, or of a sample of them.
        num_clients: Number of all clients.
        describe: Function that returns the other cells of the row of a client.
    """
    table = Table("client", "model", "training rows", "parameters", "down", "up", title=title)
    count = len(client_ids)
    head = count if num_clients <= MAX_LISTED else min(NUM_EDGE, count)
    tail = max(head, count - NUM_EDGE)
    for i in range(head):
        table.add_row(client_ids[i], *describe(client_ids[i]))
    if (others := num_clients - head - (count - tail)) > 0:
        table.add_row(f"… {others:,} more")
    for i in range(tail, count):
        table.add_row(client_ids[i], *describe(client_ids[i]))
    return table


def _upload_table(prepared: PreparedRun) -> Table:
    """Create a table of the tensors that clients upload in the first round."""
    title = "content of an upload, before compression and encryption"
    table = Table("upload of", "tensors (number)", "shapes", "values", "size", title=title)
    table.columns[1].overflow = "fold"
    contents = upload_contents(prepared.method, prepared.federation, MAX_PARTS)
    for content in contents[:NUM_EDGE]:
        clients = format_list(content.clients, MAX_NAMES)
        if content.num_clients > len(content.clients):
            clients += f" ({content.num_clients:,} clients)"
        for part in content.parts:
            name = part.name or part.item
            count = len(part.shapes)
            shapes = dict.fromkeys("×".join(map(str, shape)) for shape in part.shapes)
            table.add_row(
                clients,
                f"{name.removesuffix('.')} ({count:,})" if count > 1 else name,
                ", ".join(shapes) if len(shapes) <= MAX_SHAPES else "",
                f"{part.num_values:,}",
                format_bytes(part.num_bytes),
            )
            clients = ""
        if len(content.parts) != 1:
            total = format_bytes(sum(part.num_bytes for part in content.parts))
            table.add_row(clients, "sum" if content.parts else "nothing", "", "", total)
    if len(contents) > NUM_EDGE:
        table.add_row(f"… {len(contents) - NUM_EDGE:,} more kinds")
    return table


def print_draft(config: Config, refused: Mapping[str, str]) -> None:
    """Print a configuration that refers to code without permission to run.

    Because the code is not executed, the sizes of models and data are unknown.

    Args:
        config: The configuration.
        refused: References to code without permission, mapped to the keys that contain the
            references.
    """
    echo(dump(config))
    clients = expand_population(config.clients)
    title = Text(f"cost of {config.algorithm.get('name')}")
    console = Terminal()
    console.print(
        _cost_table(
            title,
            clients.ids,
            len(clients),
            lambda client_id: (Text(clients[client_id].model[0].name), *[UNKNOWN] * 4),
        )
    )
    for reference, key in refused.items():
        note = f"note: {key} names code, {reference}; sizes are unknown without --allow-code"
        console.print(Text(note), soft_wrap=True)


def _num_parameters(arch: ModelSpec) -> int:
    return sum(math.prod(arch.shapes[name]) for name in arch.parameter_names)


def _properties(name: str, kind: type[Algorithm]) -> str:
    """Return the declared properties of a method, and the package of a plug-in."""
    properties = list(declared_properties(kind))
    if name in register_algorithm.plugins:
        properties.append(f"from {register_algorithm.plugins.origin(name)}")
    return "; ".join(properties)


def print_methods(console: Console) -> None:
    """Print a summary of each method, with its uploads, requirements and supported tasks."""
    table = Table.grid("name", "summary", padding=(0, 2))
    table.columns[0].no_wrap = True
    for name in sorted(register_algorithm):
        kind = register_algorithm[name]
        table.add_row(Text(name, style="bold"), Text(method_summary(kind)))
        table.add_row("", Text(_properties(name, kind), style="dim"))
    console.print(table)
    console.print("\nRun `hetero-fl methods NAME` for a method's settings.", highlight=False)


def print_method_details(names: Sequence[str], console: Console) -> None:
    """Print the docstrings and settings of methods.

    Args:
        names: Names of the methods.
        console: Console for the output.

    Raises:
        UserError: If a method does not exist.
    """
    # An unknown name is reported before the first method is printed.
    kinds = [register_algorithm[name] for name in names]
    for name, kind in zip(names, kinds, strict=True):
        console.print(Text(name, style="bold"))
        for paragraph in method_paragraphs(kind):
            console.print(Text(paragraph))
        for reference in method_references(kind):
            console.print(Text(reference))
        console.print(Text(_properties(name, kind), style="dim"))
        console.print(Text(f"evaluated: {kind.evaluated_when}", style="dim"))
        table = Table("setting", "values", "default", "meaning")
        for key in describe_keys(kind):
            table.add_row(*(Text(cell.replace("`", "")) for cell in key))
        console.print(table)


def print_scores(
    results: Mapping[str, Mapping[str, float | None]], title: str, console: Console
) -> None:
    """Print a table of metrics without truncation, with a row for each model.

    Args:
        results: Values of the metrics, keyed by model and metric. A value is None if the metric is
            undefined.
        title: Title of the table.
        console: Console for the output.
    """
    names = list(next(iter(results.values())))
    table = Table("model", *(name.replace("_", " ") for name in names), title=title)
    for column in table.columns:
        column.overflow = "fold"
    for model, scores in results.items():
        values = ("–" if scores[name] is None else f"{scores[name]:.3f}" for name in names)
        table.add_row(model, *values)
    console.print(table)


def print_comparison(comparison: Comparison) -> None:
    """Print the tables of a comparison, in a terminal as wide as the terminal."""
    text = comparison.to_markdown().partition("\n## Details\n")[0]
    terminal = Terminal()
    if terminal.is_terminal:
        terminal.print(Markdown(text, hyperlinks=False))
    else:
        echo(text)

"""The list of all methods, which is printed without importing torch."""

from __future__ import annotations

from importlib.metadata import entry_points

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_fl.cli.completion import PLUGIN_GROUPS, known_names


def print_methods(console: Console) -> None:
    """Print a summary of each method, with its uploads, requirements and supported tasks."""
    rows = {
        name: (about["summary"], about["properties"])
        for name, about in known_names()["methods"].items()
    }
    rows |= _plugin_rows()
    table = Table.grid("name", "summary", padding=(0, 2))
    table.columns[0].no_wrap = True
    for name, (summary, properties) in sorted(rows.items()):
        table.add_row(Text(name, style="bold"), Text(summary))
        table.add_row("", Text(properties, style="dim"))
    console.print(table)
    console.print("\nRun `hetero-fl methods NAME` for a method's settings.", highlight=False)


def _plugin_rows() -> dict[str, tuple[str, str]]:
    if not entry_points(group=PLUGIN_GROUPS["algorithm.name"]):
        return {}
    from hetero_fl.algorithms import register_algorithm
    from hetero_fl.algorithms.requirements import declared_properties, method_summary

    plugins = register_algorithm.plugins
    assert plugins is not None
    return {
        name: (
            method_summary(kind),
            "; ".join([*declared_properties(kind), f"from {plugins.origin(name)}"]),
        )
        for name, kind in plugins.load_all().items()
    }

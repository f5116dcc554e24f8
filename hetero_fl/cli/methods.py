"""`hetero-fl methods`: what methods there are, in the words of their docstrings, and what their classes declare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.algorithms.needs import in_words, needs, sends, summary, tasks


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
    method = kind()
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
        table = Table("setting", "default", "meaning")
        for key, field in kind.model_fields.items():
            table.add_row(key, Text(default(field)), Text(field.description or ""))
        console.print(table)


def default(field: FieldInfo) -> str:
    """A setting's default as one writes it in a configuration."""
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "name", value))

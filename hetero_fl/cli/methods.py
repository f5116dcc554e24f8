"""`hetero-fl methods`: what methods there are, in the words of their docstrings, and what their classes declare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.algorithms.needs import in_words, needs, sends, summary, tasks
from hetero_fl.config.words import default, meaning, values


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

"""`--check`: the resolved configuration, and what a run of it will cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hetero_fl.config import dump
from hetero_fl.experiment import Prepared
from hetero_fl.runtime.dry import cost


def print_check(prepared: Prepared) -> None:
    """Print it; nothing is trained or written."""
    print(dump(prepared.config))
    federation = prepared.federation
    table = Table(
        "client", "model", "rows", "parameters", "down a round", "up a round", title=f"cost of {prepared.name}"
    )
    by_client = cost(prepared.method, federation)
    for id, c in by_client.items():
        model = federation.cards[id].arch.name
        table.add_row(id, model, str(c["rows"]), f"{c['parameters']:,}", _size(c["down_bytes"]), _size(c["up_bytes"]))
    console = Console()
    console.print(table)
    taking_part = min(prepared.config.clients.per_round or len(by_client), len(by_client)) / len(by_client)
    total = sum(c["down_bytes"] + c["up_bytes"] for c in by_client.values()) * taking_part
    largest = max(c["parameters"] for c in by_client.values()) * 4
    groups = (
        sum(t.numel() for a in {c.arch for c in federation.cards.values()} for t in federation.initial(a).values()) * 4
    )
    console.print(
        f"{_size(int(total))} a round, {_size(int(total * prepared.config.rounds))} in {prepared.config.rounds} rounds"
    )
    console.print(
        f"memory for models, about: {_size(groups)} at the server, {_size(4 * largest)} for the client being trained"
    )
    for note in prepared.notes:
        console.print(f"note: {note}")


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"

"""An evaluation's figures, and how they stand in a round's record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetero_fl.runtime.site import Reading, Scores
from hetero_fl.spread import spread

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass
class Readings:
    """An evaluation: each client's reading, the server's scores on the common sets if it has a model, and why clients on machines
    of their own could not be read, whose scores are in no mean."""

    clients: dict[str, Reading]
    server: dict[str, Scores] | None
    absent: dict[str, str] = field(default_factory=dict)


def record_readings(record: Record, readings: Readings) -> None:
    """Set an evaluation's figures into a round's record."""
    by_name = {
        name: spread({c: r.scores[name] for c, r in readings.clients.items() if name in r.scores})
        for name in ("personal", "global", "validation_personal", "validation_global")
        if any(name in r.scores for r in readings.clients.values())
    }
    server = readings.server or {}
    record["personal"], record["global"] = by_name.get("personal"), by_name.get("global")
    record["server"] = server.get("global")
    record["validation"] = {
        "personal": by_name.get("validation_personal"),
        "global": by_name.get("validation_global"),
        "server": server.get("validation_global"),
    }
    stamped = [r.triggered for r in readings.clients.values() if r.triggered is not None]
    if stamped:
        record["attacks"]["success"] = sum(stamped) / len(stamped)
    record["clients"] = {
        c: {name: r.scores[name] for name in ("personal", "global") if name in r.scores}
        for c, r in readings.clients.items()
    }
    if readings.absent:
        record["unread"] = readings.absent

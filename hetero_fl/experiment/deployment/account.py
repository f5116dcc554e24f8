"""What a site has done in a run, and spent and sent in all runs, as its audit log tells."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hetero_fl.experiment.deployment.audit_log import AGAIN, Entry

TRAIN = "train"
ANSWERED = ("done", "failed")  # outcomes of a task that was carried out
KNOWN = 1024  # tasks that are known by the server's name for them

Spent = tuple[tuple[float, float, int], ...]  # (noise multiplier, rate, steps), sorted


@dataclass
class Account:
    """Grows with every line of the log; holds a few bytes of each."""

    run: str
    sent: int = 0  # bytes of all answers to everybody
    answered: set[bytes] = field(default_factory=set)  # this run's tasks that were carried out, by what was asked
    trained: set[bytes] = field(default_factory=set)  # those of them that it trained for
    tasks: OrderedDict[str, bytes] = field(default_factory=OrderedDict)  # by the server's name, the newest at the end
    once: set[str] = field(default_factory=set)  # what was released for the whole of this run
    steps: dict[tuple[float, float], int] = field(default_factory=dict)  # (noise multiplier, rate) -> mechanisms

    @classmethod
    def of(cls, entries: Iterable[Entry], run: str) -> Account:
        """As a log has it."""
        made = cls(run)
        for entry in entries:
            made.take(entry)
        return made

    def take(self, entry: Entry) -> None:
        """One more line."""
        self.sent += entry["out"]
        charges = entry.get("spent", ())
        self.steps = steps_with(self.steps, charges)
        if entry.get("run") != self.run or "asked" not in entry or entry["outcome"] == AGAIN:
            return
        self.once.update(c["once"] for c in charges if c["once"])
        asked = bytes.fromhex(entry["asked"])
        self.tasks[entry["task"]] = asked
        if len(self.tasks) > KNOWN:
            self.tasks.popitem(last=False)
        if entry["outcome"] in ANSWERED:
            self.answered.add(asked)
            if entry.get("what") == TRAIN:
                self.trained.add(asked)

    def with_(self, charges: Iterable[Mapping[str, Any]]) -> Spent:
        """What will have been spent with these, too."""
        return tuple(sorted((*at, count) for at, count in steps_with(self.steps, charges).items()))


def steps_with(
    steps: Mapping[tuple[float, float], int], charges: Iterable[Mapping[str, Any]]
) -> dict[tuple[float, float], int]:
    """Mechanisms and some more."""
    made = dict(steps)
    for charge in charges:
        at = (float(charge["noise"]), float(charge["rate"]))
        made[at] = made.get(at, 0) + int(charge["steps"])
    return made

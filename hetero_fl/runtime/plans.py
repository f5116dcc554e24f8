"""Plans are carried out here: many advance in lockstep, so that whoever computes may put their equal steps together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from hetero_fl.plan import Fit, FitReport, Plan, Step
from hetero_fl.runtime.running import Running
from hetero_fl.runtime.templates import Templates
from hetero_fl.state import Participant

T = TypeVar("T")
Work = Sequence[tuple[Participant, Step]]
Watch = Callable[[str, str], None]  # (participant, label of what it begins)


class Diverged(Exception):
    """A fit whose loss or tensors are no longer finite."""


class Performer(Protocol):
    """Whoever computes steps; it may change the participants' models."""

    @property
    def templates(self) -> Templates:
        """The live modules that it works with, on its device."""
        ...

    def perform(self, work: Work) -> list[Any]:
        """The results in order; where a fit diverged, the `Diverged` stands in place of its result."""
        ...


@dataclass
class Outcome(Generic[T]):
    """What became of a plan: what it returned, or why it ended early; and the reports of its fits with their labels."""

    value: T | None = None
    failure: Diverged | None = None
    reports: list[tuple[str, FitReport]] = field(default_factory=list)

    def get(self) -> T:
        """What the plan returned. Raises Diverged if one of its fits did."""
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]


def carry_out_together(
    plans: Sequence[tuple[Participant, Plan[T]]], performer: Performer, watch: Watch | None = None
) -> list[Outcome[T]]:
    """Run plans to their ends, in lockstep: each advances by one step (or list of steps) at a time. Outcomes in order.

    Raises UserError for a slip of a method's author: something yielded that is no step, a step made and never yielded.
    """
    outcomes: list[Outcome[T]] = [Outcome() for _ in plans]
    running = [Running(plan) for _, plan in plans]
    answers: dict[int, Any] = dict.fromkeys(range(len(plans)))
    while answers:
        asked: dict[int, Any] = {}
        for i, answer in answers.items():
            try:
                asked[i] = running[i].send(answer)
            except StopIteration as stop:
                outcomes[i].value = stop.value
        work = [(i, step) for i, steps in asked.items() for step in (steps if isinstance(steps, list) else [steps])]
        if watch is not None:
            for i, step in work:
                if isinstance(step, Fit):
                    watch(plans[i][0].id, step.label)
        results: dict[int, list[Any]] = {i: [] for i in asked}
        try:
            computed = performer.perform([(plans[i][0], step) for i, step in work])
        except Exception as error:  # raised where the steps were yielded: the traceback shows which they were
            with suppress(StopIteration):
                running[work[0][0]].throw(error)
            raise
        for (i, step), result in zip(work, computed, strict=True):
            results[i].append(result)
            if isinstance(result, Diverged):
                outcomes[i].failure = result
            elif isinstance(step, Fit):
                outcomes[i].reports.append((step.label, result))
        answers = {}
        for i, steps in asked.items():
            if outcomes[i].failure is None:
                answers[i] = results[i] if isinstance(steps, list) else results[i][0]
            else:
                plans[i][1].close()
    return outcomes


def carry_out(
    plan: Plan[T], participant: Participant, performer: Performer, watch: Watch | None = None
) -> tuple[T, list[tuple[str, FitReport]]]:
    """Run one plan to its end. Returns what it returned, and the reports of its fits with their labels.

    Raises Diverged if a fit does.
    """
    (outcome,) = carry_out_together([(participant, plan)], performer, watch)
    return outcome.get(), outcome.reports


def training_loss(reports: list[tuple[str, FitReport]]) -> float | None:
    """The loss that a client reports: of its last fit on its own rows."""
    losses = [report.loss for label, report in reports if label == "train"]
    return losses[-1] if losses else None

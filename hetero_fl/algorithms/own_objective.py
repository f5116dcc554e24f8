"""The local objective of a client: the supervised loss, or a class of the user's own."""

from __future__ import annotations

from hetero_fl.errors import UserError
from hetero_fl.objectives import Objective, Supervised
from hetero_fl.registry import imported
from hetero_fl.task import Task


def own_objective(reference: str | None, task: Task) -> Objective:
    """The supervised loss, or what `python:package.module:Name` names, made with the kind of task.

    Raises UserError if there is no such class.
    """
    if reference is None:
        return Supervised(task.kind)
    kind = imported(reference, "objective")
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(f"objective: '{reference}' is no subclass of hetero_fl.objectives.Objective")
    made: Objective = kind(task.kind)  # type: ignore[call-arg]  # the user's class is a dataclass with the kind first
    return made

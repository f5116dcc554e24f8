"""What a comparison's grid tried: every candidate of every method with its validation, the chosen ones marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hetero_fl.metrics import selection_metric
from hetero_fl.reporting.comparison_tables import single
from hetero_fl.reporting.wording import MISSING, algorithm_name, metric_name
from hetero_fl.task import Task

TITLE = "The values that were tried"


@dataclass(frozen=True)
class Candidate:
    """A point of the grid for one method; `score`: its mean validation over the seeds, larger is better; None without one."""

    algorithm: str
    point: tuple[str, ...]  # key=value
    score: float | None
    chosen: bool


@dataclass(frozen=True)
class Tuning:
    """The candidates as they are printed: (method, values, validation, whether it was chosen)."""

    title: str
    header: tuple[str, str, str]
    lines: tuple[tuple[str, str, str, bool], ...]
    caption: str


def tuning(candidates: Sequence[Candidate], task: Task) -> Tuning | None:
    """The table of the candidates; None where there was nothing to choose."""
    if not candidates:
        return None
    metric, sign = selection_metric(task)
    lines = []
    for c in candidates:
        known = c.score is not None and math.isfinite(c.score)
        text = single(sign * c.score, metric) if c.score is not None and known else MISSING
        lines.append((algorithm_name(c.algorithm), ", ".join(c.point), text, c.chosen))
    name = metric_name(metric)
    caption = (
        f"{name[:1].upper()}{name[1:]} on validation rows at the end of a run, the mean of local and global ones, over "
        "the seeds. Of each method the best candidate was chosen, of equal ones the first; test rows had no part in it."
    )
    return Tuning(TITLE, ("Method", "Values", "Validation"), tuple(lines), caption)

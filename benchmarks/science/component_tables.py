"""Tables with scores of Hybrid and its components, in which each column is a comparison.

`scripts/result_tables.py` writes the tables of `tables.yaml` to docs/results/options.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from benchmarks.science.comparison_tables import SPECIFICATIONS
from hetero_fl.reporting.formatting import MISSING, algorithm_base, algorithm_name
from hetero_fl.utils.text import split_top_level

Row = dict[str, Any]
# Scores in percent, keyed by label and seed.
Scores = dict[str, dict[int, float]]

GLOBAL = "global_last_balanced_accuracy"
LOCAL = "personal_last_accuracy"


@dataclass(frozen=True)
class ComponentTable:
    """Specification of a table with a row for each method and a column for each federation.

    Args:
        columns: Names of archived comparisons, keyed by column title.
        metric: Column of the archived comparisons.
        seeds: Number of seeds to use, starting with the smallest. If None, all seeds are used.
        style: `methods` names each row's method, and `components` marks the components of Hybrid.
    """

    columns: Mapping[str, str]
    metric: str = GLOBAL
    seeds: int | None = None
    style: Literal["methods", "components"] = "methods"


TABLES = TypeAdapter(dict[str, ComponentTable]).validate_python(SPECIFICATIONS["components"])
NAMES: dict[str, str] = SPECIFICATIONS["names"]
"""Names of settings of methods, keyed by setting."""
COMPONENTS: dict[str, str] = SPECIFICATIONS["without"]
"""Settings of Hybrid that leave out a component, keyed by its name."""


def component_table(table: ComponentTable, archived: Callable[[str], Sequence[Row]]) -> str:
    """Format a table in Markdown.

    Args:
        table: Specification of the table.
        archived: Function that returns the rows of the archived comparison with a given name.
    """
    scores = {
        title: _scores(archived(name), table.metric, table.seeds)
        for title, name in table.columns.items()
    }
    labels = list(dict.fromkeys(label for found in scores.values() for label in found))
    # Methods of a single column belong to another table.
    needed = min(2, len(scores))
    labels = [x for x in labels if sum(x in found for found in scores.values()) >= needed]
    if table.metric == LOCAL:
        # Recalibration before the global test does not change local tests.
        labels = [label for label in labels if "global_test" not in label]
    if table.style == "components":
        head = [*COMPONENTS, *scores]
        align = [":---:"] * len(COMPONENTS) + ["---:"] * len(scores)
        names = [["" if off in label else "×" for off in COMPONENTS.values()] for label in labels]
    else:
        head, align = ["Method", *scores], ["---"] + ["---:"] * len(scores)
        names = [[method_name(label)] for label in labels]
    best = {
        title: _best_mean([found[label] for label in labels if label in found])
        for title, found in scores.items()
    }
    lines = [_joined(head), _joined(align)]
    for label, name in zip(labels, names, strict=True):
        cells = [_cell(scores[title].get(label), best[title]) for title in scores]
        lines.append(_joined([*name, *cells]))
    return "\n".join(lines)


def method_name(label: str) -> str:
    """Return the name of a method with its components, such as `FedAvg, LA`."""
    base = algorithm_base(label)
    text = label[len(base) + 1 :]
    settings = split_top_level(text, ":") if text else []
    return ", ".join([algorithm_name(base), *(NAMES[setting] for setting in settings)])


def _scores(rows: Sequence[Row], metric: str, seeds: int | None) -> Scores:
    kept = sorted({row["seed"] for row in rows})[:seeds]
    scores: Scores = {}
    for row in rows:
        if row["seed"] in kept:
            scores.setdefault(row["algorithm"], {})[row["seed"]] = 100 * row[metric]
    return scores


def _best_mean(rows: Sequence[Mapping[int, float]]) -> float:
    """Return the highest mean score of the methods that were run with all seeds."""
    num_seeds = max(len(values) for values in rows)
    return max(statistics.mean(values.values()) for values in rows if len(values) == num_seeds)


def _cell(values: Mapping[int, float] | None, best: float) -> str:
    if values is None:
        return MISSING
    mean = statistics.mean(values.values())
    text = f"{mean:.1f} ± {statistics.stdev(values.values()):.1f} ({min(values.values()):.1f})"
    return f"**{text}**" if mean == best else text


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

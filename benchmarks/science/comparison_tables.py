"""Tables of archived comparisons with chosen columns.

`scripts/result_tables.py` writes the tables of `tables.yaml` to the pages of scenarios and results.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.formatting import MISSING, algorithm_name, format_significant
from hetero_fl.reporting.methods import is_reference
from hetero_fl.reporting.rendering import markdown_table

Row = Mapping[str, Any]

# Settings of an archived run that name the aggregation rules, and column with the shown score.
RULE_KEYS = ("rule", "predictions")
ATTACKED_SCORE = "global_last_accuracy"


@dataclass(frozen=True)
class ComparisonTable:
    """Specification of a table with a row for each method of one or several comparisons.

    Args:
        archives: Names of the archived comparisons. The rows of all of them are in one table.
        columns: Columns of the archive, keyed by column title.
        names: Titles of rows, keyed by label. Other rows have the name of the method.
        has_traffic: Whether the table has a column with the exchanged bytes.
        first_column: Title of the first column.
    """

    archives: tuple[str, ...]
    columns: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)
    has_traffic: bool = True
    first_column: str = "Method"


SPECIFICATIONS = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
TABLES = TypeAdapter(dict[str, ComparisonTable]).validate_python(SPECIFICATIONS["comparisons"])


def comparison_table(table: ComparisonTable, archived: Callable[[str], Sequence[Row]]) -> str:
    """Format a table in Markdown, with the best method of each column in bold.

    References such as centralized training are not marked as best.

    Args:
        table: Specification of the table.
        archived: Function that returns the rows of the archived comparison with a given name.
    """
    runs = _runs_by_method(table, archived)
    columns = [_column(runs, key) for key in table.columns.values()]
    header = [table.first_column, *table.columns]
    if table.has_traffic:
        header.append("MB")
        columns.append({label: _megabytes(rows) for label, rows in runs.items()})
    alignment = ["left", *["right"] * len(columns)]
    lines = [
        [table.names.get(label) or algorithm_name(label), *(column[label] for column in columns)]
        for label in runs
    ]
    return markdown_table(header, lines, alignment)


def _runs_by_method(
    table: ComparisonTable, archived: Callable[[str], Sequence[Row]]
) -> dict[str, list[Row]]:
    """Return the archived rows of all comparisons of a table, keyed by label."""
    runs: dict[str, list[Row]] = {}
    for name in table.archives:
        found: dict[str, list[Row]] = {}
        for row in archived(name):
            found.setdefault(row["algorithm"], []).append(row)
        # A method that several comparisons contain is shown once.
        runs |= {label: rows for label, rows in found.items() if label not in runs}
    return runs


def _metric(key: str) -> str:
    """Return the metric in a column of the archive."""
    return key.partition(":")[0].partition("_last_")[2].removesuffix("_worst")


def _is_share(key: str) -> bool:
    """Return whether the metric in a column of the archive is shown in percent."""
    return _metric(key) not in SMALLER_IS_BETTER | {"r2"}


def _column(runs: Mapping[str, Sequence[Row]], key: str) -> dict[str, str]:
    """Format the mean ± standard deviation of a metric for each method.

    The best mean is bold, as are means that are printed like it. References are never bold.
    """
    is_share = _is_share(key)
    scale = 100 if is_share else 1
    values = {
        label: [scale * row[key] for row in rows if row.get(key) is not None]
        for label, rows in runs.items()
    }
    means = {label: statistics.mean(found) for label, found in values.items() if found}
    ranked = {label: mean for label, mean in means.items() if not is_reference(label)}
    choose = min if _metric(key) in SMALLER_IS_BETTER else max
    cells = {label: _cell(found, is_share) for label, found in values.items()}
    printed = {label: cells[label].partition(" ")[0] for label in ranked}
    best = printed[choose(ranked, key=lambda label: ranked[label])] if ranked else None
    return {
        label: f"**{cell}**" if printed.get(label, MISSING) == best else cell
        for label, cell in cells.items()
    }


def _cell(values: Sequence[float], is_share: bool) -> str:
    if not values:
        return MISSING
    decimals = 2 if not is_share and statistics.mean(values) < 100 else 1
    text = f"{statistics.mean(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{decimals}f}"
    return text


def _megabytes(rows: Sequence[Row]) -> str:
    if any(row["up_bytes"] is None for row in rows):
        return MISSING
    mean = statistics.mean(row["up_bytes"] + row["down_bytes"] for row in rows) / 1e6
    return format_significant(mean, 3) if mean else "0"


def attack_tables(rows: Sequence[Row]) -> str:
    """Format one Markdown table for each method, with attacks as rows and rules as columns.

    A cell contains the mean accuracy on the global test and, for backdoors, the fraction of
    triggered images that are misclassified as the target. The best rule of a row is bold.

    Args:
        rows: Archived runs. Settings in their labels name the attack and the rules.
    """
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        method, attack, rule = _attack_and_rule(row["algorithm"])
        found.setdefault(method, {}).setdefault((attack, rule), []).append(row)
    return "\n\n".join(_attack_table(method, runs) for method, runs in found.items())


def _attack_and_rule(label: str) -> tuple[str, str, str]:
    """Return the method, the attack and the aggregation rules that a label names."""
    method, *settings = label.split(":")
    values = dict(setting.split("=", 1) for setting in settings)
    rules = [values[f"aggregation.{key}"] for key in RULE_KEYS if f"aggregation.{key}" in values]
    return method, values.get("attacks.name", "none"), " and ".join(rules) or "mean"


def _attack_table(method: str, runs: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    rules = list(dict.fromkeys(rule for _, rule in runs))
    lines = []
    for attack in dict.fromkeys(attack for attack, _ in runs):
        cells = {
            rule: f"{100 * statistics.mean(row[ATTACKED_SCORE] for row in found):.1f}"
            for rule in rules
            if (found := runs.get((attack, rule)))
        }
        best = max(cells.values(), key=float)
        line = [attack]
        for rule in rules:
            text = f"**{cells[rule]}**" if cells.get(rule) == best else cells.get(rule, MISSING)
            line.append(text + _triggered_share(runs.get((attack, rule), ())))
        lines.append(line)
    alignment = ["left", *["right"] * len(rules)]
    return markdown_table([algorithm_name(method), *rules], lines, alignment)


def _triggered_share(runs: Sequence[Row]) -> str:
    shares = [row["backdoor_success"] for row in runs if row["backdoor_success"] is not None]
    return f" ({100 * statistics.mean(shares):.0f}% of triggers)" if shares else ""

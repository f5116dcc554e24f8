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

from benchmarks.common import mean_text
from hetero_fl.core.metrics import SMALLER_IS_BETTER
from hetero_fl.reporting.formatting import MISSING, algorithm_name, format_significant
from hetero_fl.reporting.methods import is_reference
from hetero_fl.reporting.rendering import markdown_table

Row = Mapping[str, Any]


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
    return mean_text(values, decimals)


def _megabytes(rows: Sequence[Row]) -> str:
    if any(row["up_bytes"] is None for row in rows):
        return MISSING
    mean = statistics.mean(row["up_bytes"] + row["down_bytes"] for row in rows) / 1e6
    return format_significant(mean, 3) if mean else "0"

"""Tables of a comparison as Markdown and LaTeX: means, best values, p-values, tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from hetero_fl.core.metrics import selection_metric
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import (
    Column,
    ComparedMethods,
    Row,
    columns_of,
    compared_methods,
)
from hetero_fl.reporting.formatting import (
    MISSING,
    algorithm_name,
    format_significant,
    is_better,
    metric_name,
)
from hetero_fl.reporting.methods import format_needs, is_bound

# What a comparison may claim: p-values of enough seeds, and the words under a table.

LEAST_SEEDS = 5
"""With fewer pairs a paired t-test has so little power, and leans so much on normality, that its p is no finding."""


def p_value(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """Two-sided paired t-test over the seeds that both have; a dash where they are too few for a finding."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < LEAST_SEEDS:
        return MISSING
    difference = np.array([a[s] - b[s] for s in seeds])
    if np.ptp(difference) <= 1e-12:  # the test statistic would be 0/0 or infinite
        return "1" if abs(difference[0]) <= 1e-12 else "<0.001"
    from scipy import stats  # takes longer to load than everything else here

    p = float(stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds]).pvalue)
    return "<0.001" if p < 0.001 else format_significant(p, 2)


def seconds_note(jobs: int | None) -> str:
    """What “Seconds” are, and whether they can be compared."""
    text = "Seconds: a run by the clock, evaluation included"
    if jobs == 1:
        return f"{text}, one run at a time."
    shared = f"{jobs} runs shared the machine" if jobs else "runs may have shared the machine"
    return f"{text}; {shared}, so they are no measure of speed."


def caption_of(
    first: str, seeds: Sequence[int], found: Sequence[str], bounds: bool, task: Task
) -> str:
    """What stands under a table; `first`: the column that p-values are about, `found`: those p-values."""
    scale = (
        f"Errors in {task.unit or 'the target’s unit'}"
        if task.kind == "regression"
        else f"Metrics in percent{', but for the perplexity' if task.has_many_classes else ''}"
    )
    if len(seeds) > 1:
        text = f"{scale}, mean ± standard deviation over seeds {', '.join(map(str, seeds))}. "
    else:
        text = f"{scale}, one seed ({seeds[0]}): differences may be chance. "
    if bounds:
        text += "Below the rule: bounds, which have all rows or all models in one place and take no part. "
    text += "Bold: best of the column. "
    if any(p not in ("", "best", MISSING) for p in found):
        text += f"p: two-sided paired t-test by seed against the best in “{first}”, uncorrected. "
    if MISSING in found:
        text += "A dash under p: fewer than five seeds, too few for a test. "
    return text + "MB: 10⁶ bytes exchanged in a run, up and down, as encoded."


# The tables of a comparison: which columns, mean and spread over seeds, the best, paired p-values.

BELOW = "↓"
"""Marks figures below the line to beat."""


@dataclass(frozen=True)
class TableCell:
    """One algorithm in one column: mean and sample standard deviation over seeds, None where there are none; `below`: worse
    than the line to beat."""

    mean: float | None
    deviation: float | None
    text: str
    best: bool = False
    below: bool = False


@dataclass(frozen=True)
class TableLine:
    """One algorithm's line: its cells, its p-value against the best, megabytes and seconds a run, what it needs."""

    algorithm: str
    name: str
    bound: bool
    cells: tuple[TableCell, ...]
    p: str
    megabytes: str
    seconds: str
    needs: str


@dataclass(frozen=True)
class ComparisonTable:
    """A table of a comparison; the first column is the one that p-values are about, the bounds come last."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[TableLine, ...]
    caption: str
    tested: bool
    jobs: int | None

    @property
    def header(self) -> list[str]:
        """Names of all columns."""
        return ["Method", *(column.title for column in self.columns), *self.others]

    @property
    def others(self) -> list[str]:
        """Names of the columns after the metrics."""
        shared = f" ({self.jobs} runs at a time)" if self.jobs is not None and self.jobs > 1 else ""
        return [*(["p"] if self.tested else []), "MB", f"Seconds{shared}", "Needs"]

    @property
    def groups(self) -> list[tuple[str, list[str]]]:
        """Test sets in the order of the columns, each with the titles of its columns."""
        by_group = groupby(self.columns, key=lambda column: column.group)
        return [(group, [column.short for column in columns]) for group, columns in by_group]


def make_table(
    rows: Sequence[Row], task: Task, moment: str, jobs: int | None = None, personal: str = ""
) -> ComparisonTable:
    """The table of the `last` round or of the one selected by validation (`best`).

    `jobs`: so many runs shared the machine (None: unknown). `personal`: a sentence on the local test rows.
    """
    columns = columns_of(rows, task, moment)
    shown = compared_methods(rows)
    algorithms = list(shown.all_labels)
    federated = list(shown.federated)
    seeds = sorted({row["seed"] for row in rows})
    several = len(seeds) > 1
    values = {
        a: {
            c.key: {
                r["seed"]: float(r[c.key])
                for r in _rows_of_algorithm(rows, a)
                if r.get(c.key) is not None
            }
            for c in columns
        }
        for a in algorithms
    }
    cells = {
        a: [_cell(list(values[a][c.key].values()), c.metric, several) for c in columns]
        for a in algorithms
    }
    for place, column in enumerate(columns):
        _mark_best(cells, federated, place, column.metric)
        _mark_below(cells, shown, place, column.metric)
    leader = _best_cell(cells, federated, columns[0].metric) if columns else None
    lines = []
    for a in algorithms:
        own = _rows_of_algorithm(rows, a)
        p = ""
        if leader is not None and several and not is_bound(a):
            first = columns[0].key
            p = "best" if a == leader else p_value(values[a][first], values[leader][first])
        short = f" ({len(own)} of {len(seeds)} seeds)" if len(own) < len(seeds) else ""
        total = [(row["up_bytes"] + row["down_bytes"]) / 1e6 for row in own]
        lines.append(
            TableLine(
                a,
                algorithm_name(a) + short,
                is_bound(a),
                tuple(cells[a]),
                p,
                _megabytes(float(np.mean(total))),
                format_significant(float(np.mean([row["seconds_total"] for row in own]))),
                format_needs(a) or MISSING,
            )
        )
    title = "Last round" if moment == "last" else "Round selected by validation"
    tested = any(line.p not in ("", "best") for line in lines)
    first = columns[0].title if columns else ""
    bounds = len(federated) < len(algorithms)
    caption = caption_of(first, seeds, [line.p for line in lines], bounds, task)
    if any(cell.below for line in lines for cell in line.cells):
        caption += f" {BELOW} worse than {algorithm_name(str(shown.baseline))}."
    if any(column.key.startswith("personal") for column in columns) and personal:
        caption += f" {personal}"
    return ComparisonTable(
        title, columns, tuple(lines), f"{caption} {seconds_note(jobs)}", tested, jobs
    )


def _rows_of_algorithm(rows: Sequence[Row], algorithm: str) -> list[Row]:
    return sorted(
        (row for row in rows if row["algorithm"] == algorithm), key=lambda row: row["seed"]
    )


def _cell(values: list[float], metric: str, several: bool) -> TableCell:
    if not values:
        return TableCell(None, None, MISSING)
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    text = _number(mean, metric)
    return TableCell(
        mean,
        deviation,
        f"{text} ± {_number(deviation, metric)}" if several and deviation is not None else text,
    )


def _megabytes(value: float) -> str:
    return format_significant(value, 3 if value >= 1 else 2) if value else "0"


def format_single(value: float | None, metric: str) -> str:
    """One run's value as the tables print it."""
    return MISSING if value is None else _number(value, metric)


def _number(value: float, metric: str) -> str:
    if metric in ("loss", "perplexity", "mae", "rmse"):
        return format_significant(value)
    return f"{value:.3f}" if metric == "r2" else f"{100 * value:.1f}"


def _mark_best(
    cells: dict[str, list[TableCell]], algorithms: list[str], place: int, metric: str
) -> None:
    """Mark the best of a column, and whatever prints the same."""
    leader = _best_cell(cells, algorithms, metric, place)
    if leader is None or len(algorithms) < 2:
        return
    top = cells[leader][place].mean
    for a in algorithms:
        cell = cells[a][place]
        if (
            cell.mean is not None
            and top is not None
            and _number(cell.mean, metric) == _number(top, metric)
        ):
            cells[a][place] = replace(cell, best=True)


def _mark_below(
    cells: dict[str, list[TableCell]], shown: ComparedMethods, place: int, metric: str
) -> None:
    """Mark in a column whatever competes and is worse, as printed, than the line to beat."""
    line = cells[shown.baseline][place].mean if shown.baseline else None
    for a in shown.federated:
        cell = cells[a][place]
        if cell.mean is None or line is None or _number(cell.mean, metric) == _number(line, metric):
            continue
        if is_better(metric, line, cell.mean):
            cells[a][place] = replace(cell, below=True)


def _best_cell(
    cells: Mapping[str, Sequence[TableCell]], algorithms: list[str], metric: str, place: int = 0
) -> str | None:
    found: str | None = None
    for a in algorithms:
        mean = cells[a][place].mean
        top = cells[found][place].mean if found is not None else None
        if mean is not None and (top is None or is_better(metric, mean, top)):
            found = a
    return found


# What a comparison's grid tried: every candidate of every method with its validation, the chosen
# ones marked.

TITLE = "The values that were tried"


@dataclass(frozen=True)
class Candidate:
    """A point of the grid for one method; `score`: its mean validation over the seeds, larger is better; None without one."""

    algorithm: str
    point: tuple[str, ...]  # key=value
    score: float | None
    chosen: bool


@dataclass(frozen=True)
class TuningTable:
    """The candidates as they are printed: (method, values, validation, whether it was chosen)."""

    title: str
    header: tuple[str, str, str]
    lines: tuple[tuple[str, str, str, bool], ...]
    caption: str


def make_tuning_table(candidates: Sequence[Candidate], task: Task) -> TuningTable | None:
    """The table of the candidates; None where there was nothing to choose."""
    if not candidates:
        return None
    metric, sign = selection_metric(task)
    lines = []
    for c in candidates:
        known = c.score is not None and math.isfinite(c.score)
        text = format_single(sign * c.score, metric) if c.score is not None and known else MISSING
        lines.append((algorithm_name(c.algorithm), ", ".join(c.point), text, c.chosen))
    name = metric_name(metric)
    caption = (
        f"{name[:1].upper()}{name[1:]} on validation rows at the end of a run, the mean of local and global ones, over "
        "the seeds. Of each method the best candidate was chosen, of equal ones the first; test rows had no part in it."
    )
    return TuningTable(TITLE, ("Method", "Values", "Validation"), tuple(lines), caption)


# The tables of a comparison as Markdown and as LaTeX.


def markdown(table: ComparisonTable) -> str:
    """The table in GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    width = len(table.header)
    lines = [line(table.header), line(["---", *["---:"] * (width - 2), "---"])]
    ruled = False
    for row in table.lines:
        if row.bound and not ruled:
            lines.append(line(["*Bounds*", *[""] * (width - 1)]))
            ruled = True
        cells = [
            f"**{cell.text}**" if cell.best else f"{cell.text} {BELOW}" if cell.below else cell.text
            for cell in row.cells
        ]
        extra = [row.p] if table.tested else []
        lines.append(
            line(
                [
                    row.name.replace("|", "\\|"),
                    *cells,
                    *extra,
                    row.megabytes,
                    row.seconds,
                    row.needs,
                ]
            )
        )
    return "\n".join(lines)


def markdown_tuning(grid: TuningTable) -> str:
    """The candidates of a grid in GitHub's Markdown."""
    lines = [f"| {' | '.join(grid.header)} |", "| --- | --- | ---: |"]
    for name, values, text, chosen in grid.lines:
        cells = [
            name.replace("|", "\\|"),
            values.replace("|", "\\|"),
            f"**{text}**" if chosen else text,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def latex(table: ComparisonTable, label: str, note: str = "") -> str:
    """The table in LaTeX, for the packages booktabs and graphicx; `note`: a sentence more in its caption."""
    width = len(table.header)
    caption = f"{table.title}. {table.caption}" + (f" {note}." if note else "")
    # How many runs shared the machine is in the caption.
    others = ["$p$" if name == "p" else _escape(name.partition(" (")[0]) for name in table.others]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escape(caption)}}}",
        f"\\label{{tab:{label}}}",
        "\\footnotesize",
        "\\setlength{\\tabcolsep}{3pt}",
        # A table that is wider than the text is scaled down to it.
        "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{l{'r' * (width - 2)}l}}",
        "\\toprule",
        *_latex_header(table, others),
        "\\midrule",
    ]
    ruled = False
    for row in table.lines:
        if row.bound and not ruled:
            lines.append("\\midrule")
            ruled = True
        cells = [_latex_cell(cell) for cell in row.cells]
        extra = [_escape(row.p)] if table.tested else []
        lines.append(
            " & ".join(
                [_escape(row.name), *cells, *extra, row.megabytes, row.seconds, _escape(row.needs)]
            )
            + " \\\\"
        )
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}}", "\\end{table}"])


def _latex_header(table: ComparisonTable, others: Sequence[str]) -> list[str]:
    """Return two lines: the test sets over their columns, then the names of all columns."""
    above = [""]
    rules = []
    names = ["Method"]
    for group, titles in table.groups:
        start = len(names) + 1
        above.append(f"\\multicolumn{{{len(titles)}}}{{c}}{{{_escape(group)}}}")
        rules.append(f"\\cmidrule(lr){{{start}-{start + len(titles) - 1}}}")
        names += [_escape(title) for title in titles]
    above += [""] * len(others)
    return [" & ".join(above) + " \\\\", " ".join(rules), " & ".join([*names, *others]) + " \\\\"]


def _latex_cell(cell: TableCell) -> str:
    text = _escape(cell.text)
    return (
        f"\\textbf{{{text}}}" if cell.best else f"{text} {_escape(BELOW)}" if cell.below else text
    )


_TEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": "$\\pm$",
    "–": "--",
    "²": "$^2$",
    "↓": "$\\downarrow$",
    "⁶": "$^6$",
    "“": "\x60\x60",
    "”": "''",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _escape(text: str) -> str:
    return re.sub("|".join(map(re.escape, _TEX)), lambda match: _TEX[match.group()], text)

"""Tables of a comparison: scores, paired differences, gains of clients and tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hetero_fl.core.metrics import selection_metric
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.result import DIFFERENCE_COLUMNS
from hetero_fl.reporting.comparison.runs import ComparedRuns, ScoreColumn
from hetero_fl.reporting.comparison.significance import MIN_SEEDS, holm, paired_difference
from hetero_fl.reporting.formatting import (
    MISSING,
    algorithm_name,
    capitalize_first,
    format_difference,
    format_p,
    format_score,
    format_significant,
    is_better,
    metric_name,
    tested_metric,
)
from hetero_fl.reporting.methods import format_needs, is_reference
from hetero_fl.reporting.rendering import escape_latex, markdown_table, render, render_line
from hetero_fl.reporting.shown_metrics import own_metrics, shown_metrics

BELOW = "↓"
"""Mark of scores that are worse than the score of the baseline."""

LOCAL_TEST_ROWS = "Local test rows"
"""Key of the fact about the number of local test rows."""

TEXT_COLUMNS = ("Method", "Client", "Values", "Needs")
"""Columns that are aligned to the left."""

UNDEFINED_WITHOUT_A_CLASS = ("auroc", "average_precision")
"""Metrics that are undefined if the test rows lack a class."""


@dataclass(frozen=True)
class Table:
    """A table whose cells are text.

    Attributes:
        title: Title of the table.
        frame: The cells.
        caption: Text below the table.
        label: Label for references in LaTeX, without the prefix `tab:`. If empty, the table is not
            written in LaTeX.
        bold: Whether cells are bold, for some of the columns. If None, none is.
    """

    title: str
    frame: pd.DataFrame
    caption: str
    label: str = ""
    bold: pd.DataFrame | None = None

    def marked(self, escape: Callable[[str], str], bold: str) -> pd.DataFrame:
        """Return the cells with escaped characters and marks for bold cells.

        Args:
            escape: Function that escapes the text of a cell.
            bold: Format of a bold cell, such as `**{}**`.
        """
        text = self.frame.map(escape)
        if self.bold is None:
            return text
        is_bold = self.bold.reindex(columns=self.frame.columns, fill_value=False)
        return text.mask(is_bold, text.map(bold.format))

    def markdown(self) -> str:
        """Return the table in GitHub Markdown."""
        columns = list(self.frame.columns)
        alignment = ["left" if name in TEXT_COLUMNS else "right" for name in columns]
        return markdown_table(columns, self.marked(str, "**{}**").to_numpy().tolist(), alignment)

    def latex(self, note: str = "") -> str:
        """Return the table in LaTeX, which requires the packages booktabs and graphicx.

        Args:
            note: An additional sentence in the caption.
        """
        text = self.marked(escape_latex, "\\textbf{{{}}}").rename(columns=escape_latex)
        alignment = "".join("l" if name in TEXT_COLUMNS else "r" for name in self.frame.columns)
        tabular = text.to_latex(index=False, column_format=alignment)
        return render("table.tex", table=self, tabular=tabular, note=note)

    def html_rows(self) -> list[list[str]]:
        """Return the cells in HTML."""
        # Imported here because only pages need it.
        from markupsafe import escape

        text = self.marked(lambda cell: str(escape(cell)), "<b>{}</b>")
        rows: list[list[str]] = text.to_numpy().tolist()
        return rows


def score_table(runs: ComparedRuns, moment: str, facts: Mapping[str, str] | None = None) -> Table:
    """Return the means and standard deviations of the scores over seeds.

    Args:
        runs: The runs.
        moment: `last`, or `best` for the round selected by validation.
        facts: Facts about the runs, of which the caption has the number of local test rows.
    """
    columns = runs.columns(moment)
    methods = runs.methods
    by_method = runs.frame.groupby("algorithm")
    exchanged = by_method["up_bytes"].mean() + by_method["down_bytes"].mean()
    seconds = "Seconds" if (runs.jobs or 1) == 1 else f"Seconds ({runs.jobs} runs at a time)"
    cells: dict[str, list[str]] = {"Method": [_method_name(runs, label) for label in methods]}
    bold = {}
    for column in columns:
        cells[column.title], bold[column.title] = _score_cells(runs, column)
    cells["MB"] = [_format_megabytes(exchanged[label] / 1e6) for label in methods]
    cells[seconds] = [
        format_significant(mean) for mean in by_method["seconds_total"].mean()[methods]
    ]
    cells["Needs"] = [format_needs(label) or MISSING for label in methods]
    caption = render_line(
        "table_caption.txt",
        task=runs.task,
        columns=columns,
        own=[metric_name(metric) for metric in own_metrics(c.metric for c in columns)],
        needs_classes=UNDEFINED_WITHOUT_A_CLASS,
        moment=moment,
        seeds=runs.seeds,
        has_references=len(runs.federated) < len(methods),
        baseline=algorithm_name(str(runs.baseline)),
        below=BELOW if any(BELOW in cell for text in cells.values() for cell in text) else "",
        undefined=_undefined_titles(runs, moment),
        local_rows=(facts or {}).get(LOCAL_TEST_ROWS, ""),
        jobs=runs.jobs,
    )
    title = "Last round" if moment == "last" else "Round selected by validation"
    label = "comparison-last" if moment == "last" else "comparison-selected"
    return Table(title, pd.DataFrame(cells), caption, label, pd.DataFrame(bold))


def _method_name(runs: ComparedRuns, label: str) -> str:
    """Return the name of a method, with a note on missing seeds and on references."""
    count = int((runs.frame["algorithm"] == label).sum())
    notes = [f"{count} of {len(runs.seeds)} seeds"] if count < len(runs.seeds) else []
    notes += ["reference"] if is_reference(label) else []
    return f"{algorithm_name(label)} ({', '.join(notes)})" if notes else algorithm_name(label)


def _score_cells(runs: ComparedRuns, column: ScoreColumn) -> tuple[list[str], list[bool]]:
    """Return the mean and deviation of each method as text, and whether it is the best.

    Means that are printed like the best one are also the best. Only methods that are no references
    are compared, and only by metrics of this package: a metric of the user may be better if it is
    smaller.
    """
    scores = runs.scores(column.key)
    means = scores.mean(axis=1)
    printed = {label: format_score(mean, column.metric) for label, mean in means.items()}
    ranked = [] if own_metrics([column.metric]) else runs.federated
    best = runs.best_method(column) if len(ranked) > 1 else None
    texts = []
    is_best = []
    for label, deviation in scores.std(axis=1).items():
        text = printed[label]
        if not math.isnan(deviation):
            text += f" ± {format_score(deviation, column.metric)}"
        if label in ranked and runs.baseline and printed[label] != printed[runs.baseline]:
            is_below = is_better(column.metric, means[runs.baseline], means[label])
            text += f" {BELOW}" if is_below else ""
        texts.append(text)
        is_best.append(label in ranked and best is not None and printed[label] == printed[best])
    return texts, is_best


def _format_megabytes(value: float) -> str:
    return format_significant(value, 3 if value >= 1 else 2) if value else "0"


def _undefined_titles(runs: ComparedRuns, moment: str) -> list[str]:
    """Return the titles of local test columns that are left out because no value is defined.

    AUROC and average precision are undefined if the test rows lack a class.
    """
    if runs.task.kind == "regression" or not runs.has_scores(f"personal_{moment}_loss"):
        return []
    return [
        tested_metric("personal", metric)
        for metric in shown_metrics(runs.task).table
        if metric in UNDEFINED_WITHOUT_A_CLASS
        and not runs.has_scores(f"personal_{moment}_{metric}")
    ]


def paired_differences(runs: ComparedRuns) -> pd.DataFrame:
    """Compare each method with the best one, in the first column of the table of the last round.

    Returns:
        One row for each other method that is no reference, with the columns of `differences.csv`.
        The numbers are NaN if the two methods share fewer than `MIN_SEEDS` seeds. The frame is
        empty if this holds for all methods.
    """
    columns = runs.columns()
    best = runs.best_method(columns[0]) if columns else None
    if best is None:
        return pd.DataFrame(columns=DIFFERENCE_COLUMNS)
    scores = runs.scores(columns[0].key)
    by_seed: dict[str, dict[Any, float]] = {
        str(label): row.dropna().to_dict() for label, row in scores.iterrows()
    }
    rows = []
    for label in runs.federated:
        found = paired_difference(by_seed[label], by_seed[best])
        if label != best:
            rows.append({"algorithm": label, **(vars(found) if found else {})})
    frame = pd.DataFrame(rows).rename(columns={"mean": "difference", "num_seeds": "seeds"})
    if "p" not in frame:
        return pd.DataFrame(columns=DIFFERENCE_COLUMNS)
    tested = frame["p"].notna()
    frame.loc[tested, "p_holm"] = holm(frame.loc[tested, "p"].tolist())
    return frame[list(DIFFERENCE_COLUMNS)]


def difference_table(differences: pd.DataFrame, runs: ComparedRuns) -> Table | None:
    """Return the result of `paired_differences` as a table, or None if it is empty."""
    if differences.empty:
        return None
    column = runs.columns()[0]
    rows = []
    for row in differences.to_dict("records"):
        cells = [MISSING] * 4
        if not pd.isna(row["p"]):
            mean, low, high = (
                format_difference(value, column.metric)
                for value in (row["difference"], row["low"], row["high"])
            )
            cells = [mean, f"{low} to {high}", format_p(row["p"]), format_p(row["p_holm"])]
        rows.append([algorithm_name(row["algorithm"]), *cells])
    num_tests = int(differences["p"].notna().sum())
    caption = render_line(
        "difference_caption.txt",
        first=column.title,
        num_tests=num_tests,
        incomplete=num_tests < len(differences),
        least=MIN_SEEDS,
    )
    header = ["Method", column.title, "95% interval", "p", "p (Holm)"]
    best = algorithm_name(str(runs.best_method(column)))
    frame = pd.DataFrame(rows, columns=header)
    return Table(f"Differences from {best}", frame, caption, "comparison-differences")


@dataclass(frozen=True)
class Candidate:
    """A point of the tuning grid of a method, or a trial of a search.

    Attributes:
        algorithm: Label of the method.
        point: Settings in the format `key=value`.
        score: Mean validation score over seeds. Larger is better. None if the candidate has not
            finished with every seed.
        chosen: Whether the candidate was chosen.
        stopped_after: Round after which a search stopped the candidate, or None.
    """

    algorithm: str
    point: tuple[str, ...]
    score: float | None
    chosen: bool
    stopped_after: int | None = None


def tuning_table(candidates: Sequence[Candidate], task: Task) -> Table | None:
    """Return the table of tuning candidates, or None if there are no candidates."""
    if not candidates:
        return None
    metric, sign = selection_metric(task)
    rows = []
    for c in candidates:
        text = MISSING
        if c.score is not None and math.isfinite(c.score):
            text = format_score(sign * c.score, metric)
        if c.stopped_after is not None:
            text += f" (stopped after round {c.stopped_after})"
        elif c.score is None:
            text = "failed with a seed"
        rows.append([algorithm_name(c.algorithm), ", ".join(c.point), text])
    caption = render_line(
        "tuning_caption.txt",
        metric=capitalize_first(metric_name(metric)),
        has_stopped=any(c.stopped_after is not None for c in candidates),
    )
    frame = pd.DataFrame(rows, columns=["Method", "Values", "Validation"])
    bold = pd.DataFrame({"Validation": [c.chosen for c in candidates]})
    return Table("Tuning candidates", frame, caption, bold=bold)

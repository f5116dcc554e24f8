"""The tables of a comparison as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hetero_fl.reporting.comparison_tables import BELOW, Cell, Table
from hetero_fl.reporting.comparison_tuning import Tuning


def markdown(table: Table) -> str:
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
        lines.append(line([row.name.replace("|", "\\|"), *cells, *extra, row.megabytes, row.seconds, row.needs]))
    return "\n".join(lines)


def markdown_tuning(grid: Tuning) -> str:
    """The candidates of a grid in GitHub's Markdown."""
    lines = [f"| {' | '.join(grid.header)} |", "| --- | --- | ---: |"]
    for name, values, text, chosen in grid.lines:
        cells = [name.replace("|", "\\|"), values.replace("|", "\\|"), f"**{text}**" if chosen else text]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def latex(table: Table, label: str, note: str = "") -> str:
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
            " & ".join([_escape(row.name), *cells, *extra, row.megabytes, row.seconds, _escape(row.needs)]) + " \\\\"
        )
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}}", "\\end{table}"])


def _latex_header(table: Table, others: Sequence[str]) -> list[str]:
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


def _latex_cell(cell: Cell) -> str:
    text = _escape(cell.text)
    return f"\\textbf{{{text}}}" if cell.best else f"{text} {_escape(BELOW)}" if cell.below else text


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

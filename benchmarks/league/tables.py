"""Tables of a benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.common import mean_text
from benchmarks.league.scores import FederationScores, PrimaryTest, RowName, row_title
from hetero_fl.reporting.formatting import MISSING, algorithm_name, format_p, format_significant
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.utils.text import pluralize

SIGNIFICANT = 0.05
"""Level of the primary family, after the correction."""


def score_table(
    federations: Sequence[FederationScores],
    rows: Sequence[RowName],
    metric: str,
    names: Mapping[str, str],
) -> str:
    """Format the mean and the standard deviation of a metric for each row and federation.

    Args:
        federations: The federations, one for each column.
        rows: The rows, in order.
        metric: Column of the archive.
        names: Title of each group of settings.
    """
    lines = []
    for row in rows:
        cells = [score_cell(federation.by_seed(row, metric), metric) for federation in federations]
        if any(cell != MISSING for cell in cells):
            lines.append([row_title(row, names), *cells])
    titles = [federation.title for federation in federations]
    return markdown_table(["Method", *titles], lines, ("left", *["right"] * len(titles)))


def score_cell(values: Mapping[int, float], metric: str) -> str:
    """Format the mean ± standard deviation of scores, in percent except for losses."""
    if not values:
        return MISSING
    is_loss = metric.endswith("_loss")
    scaled = [value if is_loss else 100 * value for value in values.values()]
    return mean_text(scaled, 2 if is_loss else 1)


def primary_table(tests: Sequence[PrimaryTest], method: str) -> str:
    """Format the tests of the primary family.

    Args:
        tests: The tests.
        method: The main method.
    """
    lines = [
        [
            test.federation,
            algorithm_name(test.other),
            format_points(test.difference.mean),
            f"[{format_points(test.difference.low)}, {format_points(test.difference.high)}]",
            format_p(test.difference.p),
            format_p(test.p_holm),
            _verdict(test),
        ]
        for test in tests
    ]
    header = ["Federation", f"{algorithm_name(method)} against", "Difference", "95% interval"]
    return markdown_table(
        [*header, "p", "p (Holm)", "Result"], lines, ("left", "left", *["right"] * 4, "left")
    )


def _verdict(test: PrimaryTest) -> str:
    if test.p_holm > SIGNIFICANT:
        return "no significant difference"
    return "ahead" if test.difference.mean > 0 else "behind"


def format_points(value: float) -> str:
    """Format a difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def cost_table(
    federations: Sequence[FederationScores], rows: Sequence[RowName], names: Mapping[str, str]
) -> str:
    """Format the computation at clients and server and the traffic of a run.

    The seconds in the archive depend on other processes and machines, so they are left out.

    Args:
        federations: The federations.
        rows: The rows, in order. Rows without runs are left out.
        names: Title of each group of settings.
    """
    lines = []
    for row in rows:
        cells = []
        for federation in federations:
            at_clients = federation.mean(row, "client_operations")
            at_server = federation.mean(row, "server_operations")
            up, down = (federation.mean(row, f"{way}_bytes") for way in ("up", "down"))
            if at_clients is None or at_server is None or up is None or down is None:
                cells.append(MISSING)
                continue
            values = ((at_clients + at_server) / 1e9, (up + down) / 1e6)
            cells.append(" / ".join(_rounded(value) for value in values))
        if any(cell != MISSING for cell in cells):
            lines.append([row_title(row, names), *cells])
    titles = [federation.title for federation in federations]
    return markdown_table(["Method", *titles], lines, ("left", *["right"] * len(titles)))


def _rounded(value: float) -> str:
    return "0" if value == 0 else format_significant(value, 2 if value < 10 else 3)


def rank_table(num_federations: int, ranks: Mapping[str, float]) -> str:
    """Format mean ranks, best first.

    Args:
        num_federations: Number of federations over which ranks are averaged.
        ranks: Mean rank of each method, keyed by name.
    """
    lines = [
        [algorithm_name(method), f"{ranks[method]:.2f}"]
        for method in sorted(ranks, key=lambda method: ranks[method])
    ]
    header = ["Method", f"Mean rank, {pluralize(num_federations, 'federation')}"]
    return markdown_table(header, lines, ("left", "right"))

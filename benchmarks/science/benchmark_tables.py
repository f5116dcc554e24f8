"""Tables of the benchmark's archive that pages of the documentation contain.

`scripts/result_tables.py` writes the tables. `docs/benchmark/results.md` contains all tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.league.protocol import MAIN_GROUP
from benchmarks.league.ranks import critical_difference
from benchmarks.league.results import METRICS, BenchmarkResults
from benchmarks.league.scores import FederationScores, RowName, row_title
from benchmarks.league.tables import (
    SIGNIFICANT,
    format_points,
    score_cell,
    score_table,
)
from hetero_fl.reporting.comparison.significance import PairedDifference, paired_difference
from hetero_fl.reporting.formatting import algorithm_name, format_significant
from hetero_fl.reporting.methods import is_reference
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.utils.text import format_list, pluralize

Differences = dict[tuple[str, str, str], PairedDifference]
"""Differences between two rows, keyed by the titles of the federation and the rows."""
GLOBAL = "global_last_balanced_accuracy"
AUROC = "global_last_auroc"
LOCAL = "personal_last_accuracy"
BALANCED_LOCAL = "personal_last_balanced_accuracy"
WORST_CLIENT = "personal_last_accuracy_worst"
NO_RUNS = "No runs yet."
HYBRID = "hybrid", "all"
DISTILLING = ("fedmd", "feddf", "ds_fl", "hybrid")
LOCAL_REFERENCES = ("local", "fedavg", "ditto")
COMMON_NETWORK = "One network for all clients"
"""Heading of the federations in which all clients train the same network."""
PRIMARY_METHODS = ("fedavg", *DISTILLING)
# Methods that are measured in all main federations, and the reference.
OVERVIEW_METHODS = ("local", "fedavg", "ditto", *DISTILLING, "centralized")
SUMMARY_COLUMNS = {
    GLOBAL: "Global test, balanced accuracy",
    AUROC: "Global test, AUROC",
    LOCAL: "Local tests, accuracy",
    WORST_CLIENT: "Worst client",
}

RANK_COLUMNS = {
    GLOBAL: "Global test, balanced accuracy",
    AUROC: "Global test, AUROC",
    LOCAL: "Local tests, accuracy",
    BALANCED_LOCAL: "Local tests, balanced accuracy",
    "validation_score": "Validation rows, local and global",
}


@dataclass(frozen=True)
class ArchiveTable:
    """Specification of a table with a row for each method and a column for each federation.

    Args:
        metric: Column of the archive.
        methods: Names of the methods.
        components: Groups of settings, in the order of the rows of each method.
        group: Heading of the federations (see `BenchmarkFederation.group`).
    """

    metric: str
    methods: Sequence[str]
    components: Sequence[str] = ("all",)
    group: str = MAIN_GROUP


TABLES = {
    "overview": ArchiveTable(GLOBAL, OVERVIEW_METHODS),
    "scores": ArchiveTable(GLOBAL, DISTILLING, ("none", "all")),
    "proxies": ArchiveTable(GLOBAL, PRIMARY_METHODS, group="Proxy sets"),
    "common network": ArchiveTable(
        GLOBAL, ("local", "fedavg", "feddf", "ds_fl", "hybrid", "centralized"), group=COMMON_NETWORK
    ),
    "compression": ArchiveTable(GLOBAL, PRIMARY_METHODS, group="Compression"),
}


def archive_table(results: BenchmarkResults, name: str) -> str:
    """Format a table of the benchmark's archive in Markdown.

    Args:
        results: The archive.
        name: Name of a table in `SPECIAL` or `TABLES`, or `summary of <federation>`.
    """
    if name in SPECIAL:
        return SPECIAL[name](results)
    if name.startswith("summary of "):
        return _summary_table(results, results.scores[name.removeprefix("summary of ")])
    table = TABLES[name]
    rows = [(method, components) for method in table.methods for components in table.components]
    federations = results.groups.get(table.group, [])
    if not any(federation.rows for federation in federations):
        return NO_RUNS
    return score_table(federations, rows, table.metric, results.names)


def _progress(results: BenchmarkResults) -> str:
    missing = results.incomplete
    if not missing:
        return ""
    num_federations = len(results.benchmark.federations)
    return (
        f"**Preliminary:** runs are missing in {len(missing)} of {num_federations} federations and "
        "variants; the results of the benchmark list them."
    )


def _verdict(results: BenchmarkResults) -> str:
    """Summarize the primary tests and the mean ranks.

    Ranks are those of the primary family's metric on the main federations.
    """
    primary = results.benchmark.protocol.primary
    tests, ranks = results.primary_tests(), results.ranks(primary.metric, primary.components)
    if not tests or len(ranks) < 2:
        return NO_RUNS
    significant = [test for test in tests if test.p_holm <= SIGNIFICANT]
    ahead = sum(test.difference.mean > 0 for test in significant)
    federations = pluralize(len(results.groups[MAIN_GROUP]), "federation")
    num_tests = len(primary.federations) * len(primary.against)
    known = f" (of {num_tests}; the others have no runs yet)" if len(tests) < num_tests else ""
    limit = critical_difference(len(ranks), len(results.groups[MAIN_GROUP]))
    counts = []
    for method in primary.against:
        against = [test for test in tests if test.other == method]
        won = sum(test.p_holm <= SIGNIFICANT and test.difference.mean > 0 for test in against)
        counts.append(f"{algorithm_name(method)} in {won} of {len(against)}")
    return (
        f"In {pluralize(len(tests), 'paired test')} with Holm's correction{known}, "
        f"{algorithm_name(primary.method)} is significantly ahead in {ahead} and behind in "
        f"{len(significant) - ahead}. By method, it is ahead of {format_list(counts)}. Of "
        f"{len(ranks)} methods with components, {_best_ranks(ranks)} have the best mean ranks "
        f"over {federations} (exploratory); mean ranks that differ by less than {limit:.2f} cannot "
        "be distinguished (Nemenyi test). By balanced accuracy on local tests, "
        f"{_best_ranks(results.ranks(BALANCED_LOCAL, primary.components))} have the best mean "
        "ranks."
    )


def _best_ranks(ranks: Mapping[str, float]) -> str:
    """Name the two methods with the best mean ranks, and the ranks."""
    best = sorted(ranks, key=lambda method: ranks[method])[:2]
    return " and ".join(f"{algorithm_name(method)} ({ranks[method]:.2f})" for method in best)


def _rank_table(results: BenchmarkResults) -> str:
    """Format the mean ranks of the methods with components by several metrics."""
    components = results.benchmark.protocol.primary.components
    ranks = {metric: results.ranks(metric, components) for metric in RANK_COLUMNS}
    if not ranks[GLOBAL]:
        return NO_RUNS
    lines = [
        [algorithm_name(method), *(f"{found[method]:.2f}" for found in ranks.values())]
        for method in sorted(ranks[GLOBAL], key=lambda method: ranks[GLOBAL][method])
    ]
    alignment = ["left", *["right"] * len(ranks)]
    return markdown_table(["Method", *RANK_COLUMNS.values()], lines, alignment)


def _better_rows(results: BenchmarkResults, metric: str, group: str = MAIN_GROUP) -> Differences:
    """Return the differences from all rows with a better mean score than Hybrid, worst first."""
    found = {}
    for federation in results.groups[group]:
        own = federation.by_seed(HYBRID, metric)
        for row in federation.rows:
            if row[0] == HYBRID[0] or is_reference(row[0]):
                continue
            difference = paired_difference(own, federation.by_seed(row, metric))
            if difference is not None and difference.mean < 0:
                titles = [row_title(each, results.names) for each in (HYBRID, row)]
                found[federation.title, titles[0], titles[1]] = difference
    return dict(sorted(found.items(), key=lambda entry: entry[1].mean))


def _largest_losses(results: BenchmarkResults) -> str:
    """Format the row that is furthest ahead of Hybrid, for each group of federations and metric."""
    lines = []
    for group in results.groups:
        for metric in (GLOBAL, LOCAL, BALANCED_LOCAL):
            if better := _better_rows(results, metric, group):
                (federation, _, row), difference = next(iter(better.items()))
                heading = "Main federations" if group == MAIN_GROUP else group
                title, _, _ = METRICS[metric].partition(" (")
                lines.append([heading, title, format_points(difference.mean), row, federation])
    header = ["Federations", "Metric", "Points", "Against", "Federation"]
    alignment = ("left", "left", "right", "left", "left")
    return markdown_table(header, lines, alignment) if lines else NO_RUNS


def _local_difference_table(results: BenchmarkResults) -> str:
    """Compare Hybrid on local tests with the best of the references, all with components."""
    found = {}
    for federation in results.groups[MAIN_GROUP]:
        rows = [(method, "all") for method in LOCAL_REFERENCES]
        means = {row: mean for row in rows if (mean := federation.mean(row, LOCAL)) is not None}
        if len(means) < len(rows):
            continue
        best = max(rows, key=lambda row: means[row])
        difference = paired_difference(
            federation.by_seed(HYBRID, LOCAL), federation.by_seed(best, LOCAL)
        )
        if difference is not None:
            titles = [row_title(row, results.names) for row in (HYBRID, best)]
            found[federation.title, titles[0], titles[1]] = difference
    if not found:
        return NO_RUNS
    lines = [
        [
            federation,
            row,
            format_points(difference.mean),
            f"[{format_points(difference.low)}, {format_points(difference.high)}]",
        ]
        for (federation, _, row), difference in found.items()
    ]
    header = ["Federation", f"{row_title(HYBRID, results.names)} against", "Difference"]
    return markdown_table([*header, "95% interval"], lines, ("left", "left", "right", "right"))


SPECIAL: dict[str, Callable[[BenchmarkResults], str]] = {
    "progress": _progress,
    "local differences": _local_difference_table,
    "verdict": _verdict,
    "ranks": _rank_table,
    "largest losses": _largest_losses,
}
"""Functions that format the tables that are not in `TABLES`, keyed by name."""


def _summary_table(results: BenchmarkResults, federation: FederationScores) -> str:
    """Format scores and costs of the rows with components in one federation."""
    rows = [row for row in federation.rows if row[1] == "all"]
    if not rows:
        return NO_RUNS
    lines = [_summary_line(results, federation, row) for row in rows if not is_reference(row[0])]
    references = [_summary_line(results, federation, row) for row in rows if is_reference(row[0])]
    header = ["Method", *SUMMARY_COLUMNS.values(), "MB", "TFLOP"]
    alignment = ("left", *["right"] * (len(header) - 1))
    return markdown_table(header, [*lines, ["*Reference*"], *references], alignment)


def _summary_line(
    results: BenchmarkResults, federation: FederationScores, row: RowName
) -> list[str]:
    mean = {
        column: federation.mean(row, column) or 0.0
        for column in ("up_bytes", "down_bytes", "client_operations", "server_operations")
    }
    return [
        row_title(row, results.names),
        *(score_cell(federation.by_seed(row, column), column) for column in SUMMARY_COLUMNS),
        format_significant((mean["up_bytes"] + mean["down_bytes"]) / 1e6, 3),
        format_significant((mean["client_operations"] + mean["server_operations"]) / 1e12, 2),
    ]

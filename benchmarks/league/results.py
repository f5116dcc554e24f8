"""Results of a benchmark: tables and plots of the archive."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from jinja2 import StrictUndefined, Template

from benchmarks.league.archive import RunArchive
from benchmarks.league.plots import draw_costs, draw_effects, draw_ranks
from benchmarks.league.protocol import MAIN_GROUP, Benchmark
from benchmarks.league.ranks import critical_difference, mean_ranks
from benchmarks.league.scores import (
    CostPoint,
    Effect,
    FederationScores,
    PrimaryTest,
    RowName,
    primary_tests,
    row_title,
)
from benchmarks.league.tables import (
    cost_table,
    primary_table,
    rank_table,
    score_cell,
    score_table,
)
from benchmarks.league.tuning import (
    FINAL_LEARNING_RATE,
    LEARNING_RATE,
    TunedKey,
    TunedSettings,
    choices_of,
)
from hetero_fl.reporting.formatting import algorithm_name, capitalize_first, format_range
from hetero_fl.reporting.methods import is_reference
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.utils.errors import UserError

TEMPLATE = Path(__file__).with_name("results.md.jinja")
METRICS = {
    "global_last_balanced_accuracy": "Global test, balanced accuracy (%)",
    "global_last_auroc": "Global test, AUROC (%)",
    "global_last_loss": "Global test, cross-entropy",
    "personal_last_accuracy": "Local tests, accuracy (%)",
    "personal_last_balanced_accuracy": "Local tests, balanced accuracy (%)",
    "personal_last_accuracy_worst": "Local tests, accuracy of the worst client (%)",
}
"""Titles of scores, keyed by column of the archive."""
TABLES = (
    "global_last_balanced_accuracy",
    "global_last_auroc",
    "personal_last_accuracy",
    "personal_last_balanced_accuracy",
)
"""Scores that have a table."""
EFFECT_METRICS = ("global_last_auroc", "global_last_balanced_accuracy")
"""Metrics of the plot of effects."""
PLAIN = "no components"
"""Title of a group of settings whose title in the protocol is empty."""
BEST = "best"
"""Name of the ranking of each method's best row, next to the groups of settings."""
COMPRESSION = "Compression"
"""Heading of the federations with compressed messages, which the plots of costs contain."""
COST_TITLE = "GFLOP at clients and server / MB of a run"
COST_COLUMNS = ("client_operations", "server_operations", "up_bytes", "down_bytes")
COSTS: dict[str, tuple[Callable[[Mapping[str, float]], float], str]] = {
    "computation": (
        lambda costs: (costs["client_operations"] + costs["server_operations"]) / 1e9,
        "Clients and server (GFLOP)",
    ),
    "bytes": (lambda costs: (costs["up_bytes"] + costs["down_bytes"]) / 1e6, "Exchanged (MB)"),
}
"""Function and label of the costs in the plots, keyed by the name of the picture."""


class BenchmarkResults:
    """The archived results of a benchmark.

    Args:
        folder: Folder of the benchmark, with `protocol.yaml`.
        archive: Folder of the archive.

    Attributes:
        benchmark: The protocol and the federations.
    """

    def __init__(self, folder: str | Path, archive: str | Path) -> None:
        self.benchmark = Benchmark.load(Path(folder))
        self.archive = Path(archive)

    @cached_property
    def scores(self) -> dict[str, FederationScores]:
        """The reported runs of each federation, keyed by name.

        Rows that lack a seed are left out, and federations that lack a row of the primary family.
        """
        protocol = self.benchmark.protocol
        primary = protocol.primary
        family = {(method, primary.components) for method in (primary.method, *primary.against)}
        found = {}
        for name, federation in self.benchmark.federations.items():
            path = self.archive / f"{name}.csv"
            scores = FederationScores.read(name, federation.title, path).with_seeds(protocol.seeds)
            rows = {(row.method, row.components) for row in self.benchmark.rows_of(name)}
            is_complete = (family & rows).issubset(scores.rows)
            found[name] = scores if is_complete else scores.without_runs()
        return found

    @cached_property
    def groups(self) -> dict[str, list[FederationScores]]:
        """The federations with runs, keyed by the heading of their tables."""
        found: dict[str, list[FederationScores]] = {MAIN_GROUP: []}
        for name, federation in self.benchmark.federations.items():
            if self.scores[name].rows:
                found.setdefault(federation.group, []).append(self.scores[name])
        return found

    @property
    def names(self) -> Mapping[str, str]:
        """Title of each group of settings."""
        return self.benchmark.protocol.components

    @property
    def rows(self) -> list[RowName]:
        """The rows of the protocol."""
        return [(row.method, row.components) for row in self.benchmark.protocol.rows]

    def primary_tests(self) -> list[PrimaryTest]:
        """Return the tests of the primary family that have enough runs."""
        primary = self.benchmark.protocol.primary
        return primary_tests(
            [self.scores[name] for name in primary.federations],
            primary.method,
            primary.against,
            primary.components,
            primary.metric,
        )

    def best_rows(self, name: str) -> dict[str, RowName]:
        """Return the row of each method that has the best validation score.

        Args:
            name: Name of the federation.

        Returns:
            The rows, keyed by method. The dictionary is empty while the tuning is incomplete.
        """
        choices = self.choices(name)
        if any(choice.remaining for choice in choices.values()):
            return {}
        return {
            method: max(
                (row for row in choices if row[0] == method), key=lambda row: choices[row].score
            )
            for method in {row[0] for row in choices}
        }

    def ranks(self, metric: str, components: str) -> dict[str, float]:
        """Return mean ranks of methods over the main federations, without references.

        Methods that are missing in a federation are left out.

        Args:
            metric: Column of the archive. Larger is better, except for losses.
            components: Group of settings of the ranked rows. With `BEST`, the row of each method
                that has the best validation score in a federation.
        """
        federations = self.groups[MAIN_GROUP]
        sign = -1 if metric.endswith("_loss") else 1
        methods = dict.fromkeys(row[0] for row in self.rows if not is_reference(row[0]))
        scores: list[dict[str, float | None]] = []
        for federation in federations:
            if components == BEST:
                rows = self.best_rows(federation.name)
            else:
                rows = {method: (method, components) for method in methods}
            scores.append({m: federation.mean(row, metric) for m, row in rows.items()})
        complete = [m for m in methods if all(each.get(m) is not None for each in scores)]
        if not federations or not complete:
            return {}
        return mean_ranks([{m: sign * (each[m] or 0.0) for m in complete} for each in scores])

    @cached_property
    def rankings(self) -> dict[str, dict[str, float]]:
        """Mean ranks by the primary metric, keyed by group of settings, and those of best rows.

        Groups of settings that do not contain all methods are left out.
        """
        methods = {method for method, _ in self.rows}
        complete = [
            group
            for group in self.names
            if {method for method, components in self.rows if components == group} == methods
        ]
        metric = self.benchmark.protocol.primary.metric
        found = {group: self.ranks(metric, group) for group in [*complete, BEST]}
        return {group: ranks for group, ranks in found.items() if len(ranks) > 1}

    def choices(self, name: str) -> dict[RowName, TunedSettings]:
        """Return the tuned settings of each row of a federation."""
        choices = choices_of(self.benchmark, name, self.archive)
        return {
            (row.method, row.components): choices[row.name] for row in self.benchmark.rows_of(name)
        }

    @property
    def incomplete(self) -> list[str]:
        """Titles of the federations that lack runs of a row and a seed."""
        num_seeds = len(self.benchmark.protocol.seeds)
        return [
            federation.title
            for name, federation in self.benchmark.federations.items()
            if len(self.scores[name].frame) < num_seeds * len(self.benchmark.rows_of(name))
        ]

    def facts(self) -> list[tuple[str, str]]:
        """Return facts about the runs of the main federations, as pairs of a name and a text."""
        protocol = self.benchmark.protocol
        main = self.groups[MAIN_GROUP]
        frames = [scores.frame for scores in main]
        trials = [RunArchive(self.archive / f"{scores.name}_tuning.csv").rows for scores in main]
        commits = sorted({commit for frame in frames for commit in frame["commit"]})
        hours = sum(frame["seconds_total"].sum() for frame in frames) / 3600
        edges, largest = self.edges(), self.largest()
        seeds = [format_range(found) for found in (protocol.seeds, protocol.tuning.seeds)]
        missing = [("Runs are missing in", "; ".join(self.incomplete))] if self.incomplete else []
        return [
            *missing,
            ("Seeds", f"{seeds[0]}; for tuning {seeds[1]}"),
            ("Runs", f"{sum(map(len, frames)):,} reported, {sum(map(len, trials)):,} for tuning"),
            ("Time of the reported runs", f"{hours:.1f} hours, with one thread each"),
            ("Commits", ", ".join(f"`{commit}`" for commit in commits)),
            *([("Chosen at the end of the values to try", "; ".join(edges))] if edges else []),
            *([("Rows with the largest value to try", "; ".join(largest))] if largest else []),
        ]

    def edges(self) -> list[str]:
        """Return the chosen values of widened settings beyond which no value was tried.

        Federations that use the settings of another federation are left out.
        """
        wider = self._wider()
        return [
            f"{title}, {row_title(row, self.names)}: {tuned.key} {tuned.chosen:g}"
            for title, row, tuned in self._tuned_keys()
            if tuned.key in wider and tuned.chosen in (wider[tuned.key][0], wider[tuned.key][-1])
        ]

    def largest(self) -> list[str]:
        """Return how many rows chose the largest value of each setting that is not widened.

        Settings whose values are not numbers, and federations that use the settings of another
        federation, are left out.
        """
        counts: dict[str, list[bool]] = {}
        wider = self._wider()
        for _, _, tuned in self._tuned_keys():
            is_number = all(type(value) in (int, float) for value in tuned.values)
            if is_number and tuned.key not in wider:
                counts.setdefault(tuned.key, []).append(tuned.chosen == max(tuned.values))
        return [f"{key}: {sum(found)} of {len(found)}" for key, found in sorted(counts.items())]

    def _wider(self) -> Mapping[str, Sequence[float]]:
        """Return the values of the settings that are widened."""
        tuning = self.benchmark.protocol.tuning
        rates = {LEARNING_RATE: tuning.wider, FINAL_LEARNING_RATE: tuning.wider}
        return {**tuning.wider_settings, **rates}

    def _tuned_keys(self) -> Iterator[tuple[str, RowName, TunedKey]]:
        """Yield the title of a main federation, the row, and each setting that was tuned for it."""
        for scores in self.groups[MAIN_GROUP]:
            if self.benchmark.federations[scores.name].tuned_as is None:
                for row, choice in self.choices(scores.name).items():
                    for tuned in choice.tuned:
                        yield scores.title, row, tuned

    @cached_property
    def highlighted(self) -> tuple[str, ...]:
        """Titles of the methods that have a color in plots of costs.

        These are the methods of the primary family and those with the best score of a federation.
        """
        primary = self.benchmark.protocol.primary
        methods = [algorithm_name(method) for method in (primary.method, *primary.against)]
        cost, _ = COSTS["computation"]
        for federation in self.groups[MAIN_GROUP]:
            if points := self.cost_points(federation.name, cost):
                methods.append(max(points, key=lambda point: point.score).method)
        return tuple(dict.fromkeys(methods))

    def write(self) -> None:
        """Write `results.md` and its pictures to the archive.

        Raises:
            UserError: If the folder of the archive does not exist.
        """
        if not self.archive.is_dir():
            raise UserError(f"{self.archive}: folder not found; choose the archive of a benchmark")
        primary = self.benchmark.protocol.primary
        pictures = {}
        with style.plot_style():
            for group, ranks in self.rankings.items():
                named = {algorithm_name(method): rank for method, rank in ranks.items()}
                limit = critical_difference(len(ranks), len(self.groups[MAIN_GROUP]))
                pictures[f"ranks_{group}"] = draw_ranks(named, limit)
            for name, (cost, label) in COSTS.items():
                panels = {
                    federation.title: self.cost_points(federation.name, cost)
                    for federation in self.groups[MAIN_GROUP]
                }
                title = METRICS.get(primary.metric, primary.metric)
                if panels:
                    pictures[name] = draw_costs(panels, self.highlighted, label, title)
            if effects := self.effects():
                found = effects.values()
                methods = list(dict.fromkeys(e.method for each in found for e in each))
                pictures["effects"] = draw_effects(
                    effects, methods, *(METRICS[metric] for metric in EFFECT_METRICS)
                )
            for name, figure in pictures.items():
                (self.archive / f"{name}.png").write_bytes(style.to_png(figure))
        (self.archive / "results.md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """Return the content of `results.md`, which contains the main federations."""
        primary = self.benchmark.protocol.primary
        tests = self.primary_tests()
        main = self.groups[MAIN_GROUP]
        template = Template(
            TEMPLATE.read_text(encoding="utf-8"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        return template.render(
            explained=(self.archive / "README.md").exists(),
            facts=self.facts(),
            primary=primary_table(tests, primary.method) if tests else "",
            num_tests=len(primary.federations) * len(primary.against),
            metric=METRICS.get(primary.metric, primary.metric),
            ranks=[
                (group, self._ranking_title(group), rank_table(len(main), ranks))
                for group, ranks in self.rankings.items()
            ],
            has_effects=bool(self.effects()),
            tables=self._tables(main) if main else [],
            left_out=[
                (federation.title, row, reason)
                for federation in self.benchmark.federations.values()
                if federation.group == MAIN_GROUP
                for row, reason in federation.left_out.items()
            ],
        )

    def _tables(self, federations: Sequence[FederationScores]) -> list[tuple[str, str]]:
        tables = [
            (METRICS[metric], score_table(federations, self.rows, metric, self.names))
            for metric in TABLES
        ]
        return [*tables, (COST_TITLE, cost_table(federations, self.rows, self.names))]

    def _ranking_title(self, group: str) -> str:
        if group == BEST:
            return "The row of each method with the best validation score"
        return capitalize_first(self.names[group] or PLAIN)

    def effects(self) -> dict[str, list[Effect]]:
        """Return the effects of components on the methods of the primary family.

        The keys are the titles of the main federations. The effect of a method is the difference
        between its rows of the first group of settings and of the primary family's group.
        """
        primary = self.benchmark.protocol.primary
        groups = next(iter(self.names), primary.components), primary.components
        if groups[0] == groups[1]:
            return {}
        found: dict[str, list[Effect]] = {}
        for federation in self.groups[MAIN_GROUP]:
            for method in (primary.method, *primary.against):
                ends = [
                    [federation.mean((method, components), metric) for metric in EFFECT_METRICS]
                    for components in groups
                ]
                if all(score is not None for end in ends for score in end):
                    before, after = ((100 * (x or 0.0), 100 * (y or 0.0)) for x, y in ends)
                    effect = Effect(algorithm_name(method), before, after)
                    found.setdefault(federation.title, []).append(effect)
        return found

    def cost_points(
        self, name: str, cost: Callable[[Mapping[str, float]], float]
    ) -> list[CostPoint]:
        """Return the points of a federation and of the same federation with compression."""
        compressed = [
            (other, f", {federation.title.rpartition(', ')[2]}")
            for other, federation in self.benchmark.federations.items()
            if federation.tuned_as == name and federation.group == COMPRESSION
        ]
        metric = self.benchmark.protocol.primary.metric
        points = []
        for name_of_points, suffix in [(name, ""), *compressed]:
            scores = self.scores[name_of_points]
            for method, components in scores.rows:
                row = method, components
                values = [100 * score for score in scores.by_seed(row, metric).values()]
                costs = {column: scores.mean(row, column) or 0.0 for column in COST_COLUMNS}
                if is_reference(method) or not values or not cost(costs):
                    continue
                points.append(
                    CostPoint(
                        algorithm_name(method),
                        (self.names.get(components, components) or PLAIN) + suffix,
                        cost(costs),
                        statistics.mean(values),
                        statistics.stdev(values) if len(values) > 1 else 0.0,
                    )
                )
        return points


def repetition_table(scores: Mapping[str, Mapping[int, tuple[float, float]]]) -> str:
    """Format means of archived and repeated scores, and the differences of single runs.

    Args:
        scores: The archived and the repeated score of each seed, keyed by column of the archive.
    """
    lines = []
    for metric, values in scores.items():
        before = {seed: pair[0] for seed, pair in values.items()}
        after = {seed: pair[1] for seed, pair in values.items()}
        factor, decimals = (1, 2) if metric.endswith("_loss") else (100, 1)
        differences = [factor * abs(after[seed] - before[seed]) for seed in values]
        sizes = [
            f"{size:.{decimals}f}" for size in (statistics.mean(differences), max(differences))
        ]
        lines.append(
            [METRICS[metric], score_cell(before, metric), score_cell(after, metric), *sizes]
        )
    header = ["Metric", "Archived", "Repeated", "Mean difference of a run", "Largest difference"]
    return markdown_table(header, lines, ("left", *["right"] * 4))

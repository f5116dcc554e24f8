"""Figures in sentences about the benchmark are those of the archived runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml

from hetero_fl.experiment.benchmark.archive import RunArchive
from hetero_fl.experiment.benchmark.results import MAIN_GROUP, BenchmarkResults

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "results" / "measurements"
PROSE = yaml.safe_load(Path(__file__).with_name("benchmark_prose.yaml").read_text("utf-8"))
GLOBAL = "global_last_balanced_accuracy"


class Archive(Formatter):
    """Fill the figures of the archived runs into sentences (see benchmark_prose.yaml)."""

    def __init__(self, results: BenchmarkResults, names: Mapping[str, str]) -> None:
        self.scores = results.scores
        self.names: dict[str, Any] = {
            "main": [scores.name for scores in results.groups[MAIN_GROUP]],
            "LOCAL": "personal_last_accuracy",
            "BALANCED": "personal_last_balanced_accuracy",
            "VALIDATION": "validation_global",
        }
        for function in (self.lead, self.percent, self.change, self.computation, self.rows):
            self.names[function.__name__] = function
        self.names |= {"measured": measured, "stdev": statistics.stdev}
        for name, expression in names.items():
            self.names[name] = eval(expression, self.names)

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Return the value of an expression in braces."""
        return eval(field_name, self.names), ""

    def percent(self, federation: str, row: str, metric: str = GLOBAL) -> float:
        """Return the mean of a row in points."""
        method, _, components = row.partition("/")
        mean = self.scores[federation].mean((method, components or "all"), metric)
        assert mean is not None
        return 100 * mean

    def lead(self, federation: str, row: str, other: str, metric: str = GLOBAL) -> float:
        """Return by how many points a row is ahead of another row."""
        return self.percent(federation, row, metric) - self.percent(federation, other, metric)

    def change(self, federation: str, original: str, method: str) -> float:
        """Return by how many points a method is better than in the original federation."""
        return self.percent(federation, method) - self.percent(original, method)

    def computation(self, federation: str, method: str) -> float:
        """Return the operations of a run at clients and server, with components."""
        means = [
            self.scores[federation].mean((method, "all"), f"{place}_operations")
            for place in ("client", "server")
        ]
        return sum(mean or 0.0 for mean in means)

    def rows(self, federation: str) -> float:
        """Return the mean number of training rows of all clients."""
        archive = RunArchive(ROOT / "docs" / "benchmark" / f"{federation}.csv")
        totals = [
            sum(client["n_train"] for client in json.loads(run["clients"]).values())
            for run in archive.rows.values()
        ]
        return statistics.fmean(totals)


def measured(name: str, *row: str) -> list[float]:
    """Return the first number of each cell of a measurement, in the row that begins with words."""
    text = (MEASUREMENTS / f"{name}.txt").read_text(encoding="utf-8").replace("−", "-")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (cells,) = (cells[len(row) :] for cells in rows if tuple(cells[: len(row)]) == row)
    return [float(cell.split()[0]) for cell in cells if cell]


@pytest.fixture(scope="module")
def archive() -> Archive:
    results = BenchmarkResults(ROOT / "configs" / "benchmark", ROOT / "docs" / "benchmark")
    return Archive(results, PROSE["names"])


def sentences(page: Path) -> str:
    """Return the text of a page without line breaks."""
    return " ".join(page.read_text(encoding="utf-8").split())


def test_sentences_have_the_figures_of_the_archive(
    archive: Archive, subtests: pytest.Subtests
) -> None:
    for page, templates in PROSE["sentences"].items():
        for template in templates:
            with subtests.test(page=page, sentence=template):
                assert archive.format(template) in sentences(ROOT / page)


def test_ratios_of_computation_at_clients_are_a_third_to_four_fifths(archive: Archive) -> None:
    ratios = [
        archive.computation(name, "hybrid") / archive.computation(name, method)
        for name in archive.names["main"]
        for method in ("fedmd", "ds_fl")
    ]

    assert min(ratios) == pytest.approx(1 / 3, abs=0.03)
    assert max(ratios) == pytest.approx(4 / 5, abs=0.03)

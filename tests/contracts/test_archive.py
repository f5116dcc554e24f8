"""Contract of the archive: the documentation shows what the archived runs give.

- Each archived run names a commit of this repository. Runs of the benchmark have its present
  configurations and the present defaults.
- Each table, and each figure in a sentence about the benchmark, is that of the archived runs.
- The cheapest run of each federation gives the archived scores again.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml

from benchmarks.league.archive import ConfigArchive, RunArchive
from benchmarks.league.league import repeat_row
from benchmarks.league.protocol import Benchmark
from benchmarks.league.results import MAIN_GROUP, BenchmarkResults
from benchmarks.record import MEASUREMENTS, archivable_commit
from hetero_fl.config.load import read_config_file
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import RunFailedError
from scripts import result_tables
from tests.support.cases import each_case

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "benchmark"
ARCHIVE = ROOT / "docs" / "benchmark"
RESULTS = ROOT / "docs" / "results"
BENCHMARK = Benchmark.load(FOLDER)
ARCHIVED = [name for name in BENCHMARK.federations if (ARCHIVE / f"{name}.csv").exists()]
MAIN = [name for name in ARCHIVED if BENCHMARK.federations[name].tuned_as is None]
PROSE = yaml.safe_load(Path(__file__).with_name("benchmark_prose.yaml").read_text("utf-8"))
GLOBAL = "global_last_balanced_accuracy"
SCORES = (GLOBAL, "personal_last_accuracy")
TOLERANCE = 0.05
"""Largest difference of a repeated score.

On the machine of the archive, repeated scores are equal. On other processors, sums are rounded
differently, and single runs of small federations differ by a few points.
"""
UNKNOWN_COMMITS = {
    *("4483d2f3", "8d0434b4", "a901627b", "bfc2d1e4", "c2c8ce17"),
    *("3f6b5dcd+", "c97f6edb+"),
}
"""Commits of older results that are not in the repository, or had changes. The set may shrink."""


def commits_of(path: Path) -> set[str]:
    """Return the commits that an archived file names."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return {row["commit"] for row in csv.DictReader(text.splitlines())}
    # The command precedes the commit and the machine.
    return {text.splitlines()[1].removeprefix("# ").partition(",")[0]}


def is_known(commit: str) -> bool:
    """Return whether results of a commit may be archived."""
    try:
        archivable_commit(commit)
    except SystemExit:
        return False
    return True


def test_results_name_commits_of_the_repository() -> None:
    shallow = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True, check=False).stdout != "false\n":
        pytest.skip("the history of the repository is missing")
    files = [*ARCHIVE.glob("*.csv"), *RESULTS.rglob("*.csv"), *MEASUREMENTS.glob("*.txt")]

    commits = set().union(*map(commits_of, files))

    assert {commit for commit in commits if not is_known(commit)} == UNKNOWN_COMMITS


@each_case("name", ARCHIVED)
def test_archived_runs_have_the_present_configurations_and_defaults(name: str) -> None:
    federation = BENCHMARK.federations[name]
    source = read_config_file(federation.config)
    overrides = BENCHMARK.federation_overrides(name)
    current = {
        row.name: load_config(source, [*overrides, *row.variant.overrides])
        for row in BENCHMARK.rows_of(name)
    }
    archive = ConfigArchive(ARCHIVE / f"{name}_configs.json")
    # Rows of the protocol that have no runs yet are listed on the page of results.
    runs = RunArchive(ARCHIVE / f"{name}.csv").rows.values()
    assert {f"{run['method']}/{run['components']}" for run in runs} <= archive.configs.keys()
    assert archive.configs.keys() <= current.keys()
    assert archive.outdated(current) == {}, "repeat the runs with `python -m benchmarks league`"


@each_case("name", MAIN)
def test_tuned_learning_rates_are_interior_optima(name: str) -> None:
    choices = BenchmarkResults(FOLDER, ARCHIVE).choices(name)

    assert choices
    for row, choice in choices.items():
        assert choice.remaining or choice.is_interior, row


def test_pages_have_the_tables_of_the_archive(subtests: pytest.Subtests) -> None:
    for page in result_tables.PAGES:
        with subtests.test(page=str(page.relative_to(ROOT))):
            text = page.read_text(encoding="utf-8")
            assert text == result_tables.written(text), "run `make tables`"
    page = (ARCHIVE / "results.md").read_text(encoding="utf-8")
    assert page == BenchmarkResults(FOLDER, ARCHIVE).page(), "run `league --tables`"


class Figures(Formatter):
    """Fill the figures of the archived runs into sentences (see benchmark_prose.yaml)."""

    def __init__(self, results: BenchmarkResults, names: Mapping[str, str]) -> None:
        self.scores = results.scores
        self.names: dict[str, Any] = {
            "main": [scores.name for scores in results.groups[MAIN_GROUP]],
            "LOCAL": "personal_last_accuracy",
            "BALANCED": "personal_last_balanced_accuracy",
            "VALIDATION": "validation_global",
            **{f.__name__: f for f in (self.lead, self.percent, self.change)},
            **{f.__name__: f for f in (self.computation, measured, statistics.stdev)},
        }
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


def measured(name: str, *row: str) -> list[float]:
    """Return the first number of each cell of a measurement, in the row that begins with words."""
    text = (MEASUREMENTS / f"{name}.txt").read_text(encoding="utf-8").replace("−", "-")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (cells,) = (cells[len(row) :] for cells in rows if tuple(cells[: len(row)]) == row)
    return [float(cell.split()[0]) for cell in cells if cell]


@pytest.fixture(scope="module")
def figures() -> Figures:
    return Figures(BenchmarkResults(FOLDER, ARCHIVE), PROSE["names"])


def test_sentences_have_the_figures_of_the_archive(
    figures: Figures, subtests: pytest.Subtests
) -> None:
    for page, templates in PROSE["sentences"].items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for template in templates:
            with subtests.test(page=page, sentence=template):
                assert figures.format(template) in text


def test_ratios_of_computation_at_clients_are_a_third_to_four_fifths(figures: Figures) -> None:
    ratios = [
        figures.computation(name, "hybrid") / figures.computation(name, method)
        for name in figures.names["main"]
        for method in ("fedmd", "ds_fl")
    ]

    assert min(ratios) == pytest.approx(1 / 3, abs=0.03)
    assert max(ratios) == pytest.approx(4 / 5, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_the_cheapest_archived_run_can_be_repeated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    frame = BenchmarkResults(FOLDER, ARCHIVE).scores[name].frame
    if frame.empty:
        pytest.skip("the federation is not complete yet")
    cheapest = frame.loc[frame["seconds_total"].idxmin()]
    row, seed = f"{cheapest['method']}/{cheapest['components']}", int(cheapest["seed"])
    try:
        scores = repeat_row(name, row, FOLDER, archive=ARCHIVE, out=tmp_path, seeds=[seed])
    except RunFailedError as error:
        if not any(reason in str(error) for reason in ("file not found", "download of")):
            raise
        pytest.skip(f"the data set is not available: {error}")
    for score in SCORES:
        archived, repeated = scores[score][seed]
        assert repeated == pytest.approx(archived, abs=TOLERANCE), score

"""The archive of the benchmark: up to date with the code, and repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.config.load import read_config_file
from hetero_fl.experiment.benchmark.archive import ConfigArchive, RowConfig, RunArchive
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.experiment.benchmark.repetition import repeat_row
from hetero_fl.experiment.benchmark.results import BenchmarkResults
from hetero_fl.utils.errors import RunFailedError
from tests.support.cases import each_case

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "benchmark"
ARCHIVE = ROOT / "docs" / "benchmark"
BENCHMARK = Benchmark.load(FOLDER)
ARCHIVED = [name for name in BENCHMARK.federations if (ARCHIVE / f"{name}.csv").exists()]
MAIN = [name for name in ARCHIVED if BENCHMARK.federations[name].tuned_as is None]
SCORES = ("global_last_balanced_accuracy", "personal_last_accuracy")
TOLERANCE = 0.05
"""Largest difference of a repeated score.

On the machine of the archive, repeated scores are equal. On other processors, sums are rounded
differently, and single runs of small federations differ by a few points.
"""


@each_case("name", ARCHIVED)
def test_archived_runs_have_the_present_configurations_and_defaults(name: str) -> None:
    federation = BENCHMARK.federations[name]
    source = read_config_file(federation.config)
    overrides = BENCHMARK.federation_overrides(name)
    current = {
        row.name: RowConfig.resolve(source, overrides, row) for row in BENCHMARK.rows_of(name)
    }
    archive = ConfigArchive(ARCHIVE / f"{name}_configs.json")
    # Rows of the protocol that have no runs yet are listed on the page of results.
    runs = RunArchive(ARCHIVE / f"{name}.csv").rows.values()
    assert {f"{run['method']}/{run['components']}" for run in runs} <= archive.configs.keys()
    assert archive.configs.keys() <= current.keys()
    assert archive.outdated(current) == {}, "repeat the runs with `hetero-fl benchmark`"


@each_case("name", MAIN)
def test_tuned_learning_rates_are_interior_optima(name: str) -> None:
    choices = BenchmarkResults(FOLDER, ARCHIVE).choices(name)

    assert choices
    for row, choice in choices.items():
        assert choice.remaining or choice.is_interior, row


def test_the_page_of_results_is_up_to_date() -> None:
    page = (ARCHIVE / "results.md").read_text(encoding="utf-8")
    assert page == BenchmarkResults(FOLDER, ARCHIVE).page(), "run `hetero-fl benchmark --tables`"


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

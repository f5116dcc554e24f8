"""The table of paired differences from the best method."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from hetero_fl.core.metrics import REGRESSION
from hetero_fl.reporting.comparison.differences import DifferenceTable, make_difference_table
from hetero_fl.reporting.comparison.report import write_comparison
from hetero_fl.reporting.comparison.result import Comparison
from tests.reporting.comparison.test_tables import BINARY, VALUES, make_rows, values
from tests.support.cases import each_case

KEY = "global_last_balanced_accuracy"


def table_of(rows: list[dict[str, object]]) -> DifferenceTable:
    table = make_difference_table(rows, BINARY)
    assert table is not None
    return table


def test_each_method_is_compared_with_the_best_but_bounds_are_not() -> None:
    rows = make_rows()
    table = table_of(rows)
    assert table.title == "Differences from Hybrid"
    assert list(table.frame["algorithm"]) == ["local", "fedavg"]
    p_values = [
        stats.ttest_rel(values(rows, name, KEY), values(rows, "hybrid", KEY)).pvalue
        for name in ("local", "fedavg")
    ]
    assert list(table.frame["p"]) == pytest.approx(p_values)
    smaller, larger = sorted(p_values)
    assert sorted(table.frame["p_holm"]) == pytest.approx([2 * smaller, max(2 * smaller, larger)])
    assert "2 tests" in table.caption


def test_differences_are_method_minus_best_in_percent() -> None:
    rows = make_rows()
    mean = sum(values(rows, "local", KEY)) - sum(values(rows, "hybrid", KEY))
    name, difference, interval, *_ = table_of(rows).lines[0]
    assert name == "Local"
    assert difference == f"−{abs(100 * mean / 5):.1f}"
    low, high = (float(end.replace("−", "-")) for end in interval.split(" to "))
    assert low < 100 * mean / 5 < high


def test_the_smallest_error_is_best() -> None:
    table = make_difference_table(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES)
    assert table is not None
    assert table.best == "fedavg"
    assert table.lines[0][1].startswith("+"), "Local has a larger error"


def test_methods_with_few_seeds_are_not_part_of_the_family() -> None:
    rows = [r for r in make_rows() if r["algorithm"] != "local" or r["seed"] < 3]
    table = table_of(rows)
    assert table.lines[0] == ("Local", "–", "–", "–", "–")
    fedavg = table.frame.iloc[1]
    assert fedavg["p_holm"] == fedavg["p"], "one test needs no correction"
    assert "fewer than 5 seeds" in table.caption
    (line,) = table.csv().splitlines()[1:]
    assert line.startswith("fedavg,")
    assert line.endswith(",5")


@each_case("rows", [make_rows(seeds=range(4)), make_rows(["hybrid", "centralized"])])
def test_no_table_without_a_test(rows: list[dict[str, object]], tmp_path: Path) -> None:
    assert make_difference_table(rows, BINARY) is None
    write_comparison(tmp_path, make_rows(), title="first", note="", task=BINARY)
    write_comparison(tmp_path, rows, title="second", note="", task=BINARY)
    assert Comparison(tmp_path).differences.empty, "no file of an earlier comparison remains"


def test_table_is_in_all_files(tmp_path: Path) -> None:
    rows = make_rows()
    write_comparison(tmp_path, rows, title="a comparison", note="", task=BINARY)
    table = table_of(rows)
    assert table.markdown() in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    tex = (tmp_path / "comparison.tex").read_text(encoding="utf-8")
    assert "\\label{tab:comparison-differences}" in tex and table.latex("x").count("\\\\") == 3
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(cell in html for line in table.lines for cell in line if "<" not in cell)
    frame = Comparison(tmp_path).differences
    assert frame["p_holm"].tolist() == pytest.approx(table.frame["p_holm"].tolist())

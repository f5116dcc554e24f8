"""Tables of a comparison: columns, best values, references, differences and tuning."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hetero_fl.core.metrics import CLASSIFICATION, REGRESSION
from hetero_fl.core.task import MANY_CLASSES, Task
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from hetero_fl.reporting.comparison.result import Comparison
from hetero_fl.reporting.comparison.runs import ComparedRuns, rank_methods
from hetero_fl.reporting.comparison.tables import (
    Candidate,
    Table,
    difference_table,
    paired_differences,
    score_table,
    tuning_table,
)
from hetero_fl.reporting.run_directory import RunDirectory
from tests.reporting.test_report import Page
from tests.support.cases import each_case

GUESSES = ("accuracy", "top3_accuracy", "perplexity")
BINARY, TEN, LABELS = Task("multiclass", 2), Task("multiclass", 10), Task("multilabel", 14)
VALUES = Task("regression", 1)
LEVELS = {"local": 0.6, "fedavg": 0.65, "hybrid": 0.8, "centralized": 0.9, "ensemble": 0.85}
MB = {"fedavg": 40e6, "hybrid": 50e6}
KEY = "global_last_balanced_accuracy"


def make_rows(
    algorithms: Sequence[str] = tuple(LEVELS),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    metrics: Sequence[str] = CLASSIFICATION,
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for algorithm in algorithms:
            row: dict[str, Any] = {"algorithm": algorithm, "seed": seed}
            for test in ("personal", "global"):
                for moment in ("last", "best"):
                    for metric in metrics:
                        level = LEVELS[algorithm.split(":")[0]] + rng.normal(0, 0.02)
                        error = metric in ("mae", "rmse", "loss")
                        row[f"{test}_{moment}_{metric}"] = 10 * (1 - level) if error else level
            total = MB.get(algorithm.split(":")[0], 0.0)
            rows.append(
                row
                | {"up_bytes": total / 4, "down_bytes": 3 * total / 4, "seconds_total": 30.0 + seed}
            )
    return rows


def make_table(
    rows: Sequence[dict[str, Any]], task: Task = BINARY, moment: str = "last", **changes: Any
) -> Table:
    return score_table(ComparedRuns(pd.DataFrame(rows), task, **changes), moment)


def differences_of(rows: Sequence[dict[str, Any]], task: Task = BINARY) -> Table | None:
    runs = ComparedRuns(pd.DataFrame(rows), task)
    return difference_table(paired_differences(runs), runs)


def values(rows: Sequence[dict[str, Any]], algorithm: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["algorithm"] == algorithm]


@each_case(
    ("task", "metrics", "title", "key", "factor"),
    [
        (BINARY, CLASSIFICATION, "balanced accuracy", KEY, 100),
        (TEN, CLASSIFICATION, "accuracy", "global_last_accuracy", 100),
        (LABELS, CLASSIFICATION, "AUROC", "global_last_auroc", 100),
        (VALUES, REGRESSION, "mean absolute error", "global_last_mae", 1),
    ],
)
def test_first_column_has_means_and_deviations(
    task: Task, metrics: Sequence[str], title: str, key: str, factor: int
) -> None:
    rows = make_rows(metrics=metrics)

    frame = make_table(rows, task).frame

    assert list(frame["Method"]) == [
        *("Local", "FedAvg", "Hybrid"),
        *("Centralized (reference)", "Ensemble (reference)"),
    ]
    assert frame.columns[1] == f"Global test {title}"
    for algorithm, cell in zip(LEVELS, frame[frame.columns[1]], strict=True):
        mean, deviation = (float(part) for part in cell.removesuffix(" ↓").split(" ± "))
        found = [factor * value for value in values(rows, algorithm, key)]
        assert mean == pytest.approx(np.mean(found), abs=0.05)
        assert deviation == pytest.approx(np.std(found, ddof=1), abs=0.05)
    assert list(frame["MB"]) == ["0", "40.0", "50.0", "0", "0"]
    assert set(frame[frame.columns[-2]]) == {"32.0"}


@each_case("task", [BINARY, TEN, VALUES])
def test_best_score_that_is_no_reference_is_bold(task: Task) -> None:
    metrics = REGRESSION if task is VALUES else CLASSIFICATION

    table = make_table(make_rows(metrics=metrics), task)

    assert table.bold is not None
    assert table.bold.to_numpy().T.tolist() == [[False, False, True, False, False]] * 6


def test_scores_that_are_printed_alike_are_all_best() -> None:
    rows = make_rows(["local", "fedavg"], seeds=[0])
    for row in rows:
        row["global_last_auroc"] = 0.91234 if row["algorithm"] == "local" else 0.91235

    table = make_table(rows)

    assert table.bold is not None
    assert table.bold["Global test AUROC"].tolist() == [True, True]
    assert "↓" not in "".join(table.frame["Global test AUROC"])


def test_scores_below_the_baseline_are_marked() -> None:
    rows = make_rows(["fedavg", "local", "hybrid", "ensemble"], seeds=[0, 1])
    levels = {"fedavg": 0.5, "local": 0.6, "hybrid": 0.59996, "ensemble": 0.1}
    for row in rows:
        row[KEY] = levels[row["algorithm"]]

    table = make_table(rows)
    errors = make_table(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES)
    without = make_table([row for row in rows if row["algorithm"] != "local"])

    assert table.frame["Global test balanced accuracy"].tolist() == [
        *("50.0 ± 0.0 ↓", "60.0 ± 0.0", "60.0 ± 0.0", "10.0 ± 0.0")
    ], "printed alike, and the references"
    assert "↓: worse than Local." in table.caption
    assert "50.0 $\\pm$ 0.0 $\\downarrow$" in table.latex()
    assert "↓" not in errors.markdown(), "FedAvg's errors are smaller"
    assert "↓" not in without.markdown() + without.caption


def test_one_seed_has_no_deviation() -> None:
    table = make_table(make_rows(seeds=[7]))

    assert "one seed (7)" in table.caption
    assert "±" not in table.markdown() and "pm" not in table.latex()


def test_missing_seeds_are_noted() -> None:
    rows = make_rows(["local", "hybrid"], seeds=range(6))
    short = [row for row in rows if (row["algorithm"], row["seed"]) != ("local", 2)]

    assert make_table(short).frame["Method"].tolist() == ["Local (5 of 6 seeds)", "Hybrid"]
    assert make_table(rows[::-1]).frame.iloc[0].equals(make_table(rows).frame.iloc[1])


@each_case(
    ("jobs", "header", "words"),
    [
        (1, "Seconds", "included, one run at a time."),
        (2, "Seconds (2 runs at a time)", "included; 2 runs shared the machine, so the times"),
        (None, "Seconds", "included; several runs may have shared the machine, so the times"),
    ],
)
def test_seconds_note_parallel_runs(jobs: int | None, header: str, words: str) -> None:
    table = make_table(make_rows(), jobs=jobs)

    assert list(table.frame.columns[-2:]) == [header, "Needs"] and words in table.caption


def test_caption_tells_what_means_and_rounds_are_shown() -> None:
    last, best = (make_table(make_rows(), moment=moment) for moment in ("last", "best"))
    errors = make_table(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES)

    assert "Local test AUROC: mean over the clients for which it is defined" in last.caption
    assert "AUROC" not in errors.caption
    assert "of the rounds with the best score" in best.caption
    assert "of the rounds with" not in last.caption


def test_columns_without_values_are_left_out() -> None:
    rows = make_rows(["local", "hybrid"])
    for row in rows:
        row["personal_last_accuracy_worst"] = None
        row["global_last_auroc"] = None
        row["personal_last_auroc"] = None
        if row["algorithm"] == "hybrid":
            row["server_last_balanced_accuracy"] = 0.5

    table = make_table(rows)

    assert list(table.frame.columns[1:-3]) == [
        "Global test balanced accuracy",
        "Global test accuracy",
        "Local test balanced accuracy",
        "Local test accuracy",
        "Server's balanced accuracy",
    ]
    assert table.frame["Server's balanced accuracy"].tolist() == ["–", "50.0 ± 0.0"]
    assert "Local test AUROC is not shown because it is undefined" in table.caption


@each_case(
    ("task", "metrics", "shown", "worst"),
    [
        (BINARY, CLASSIFICATION, ["balanced accuracy", "AUROC", "accuracy"], "accuracy"),
        (TEN, CLASSIFICATION, ["accuracy", "balanced accuracy", "AUROC"], "accuracy"),
        (LABELS, CLASSIFICATION, ["AUROC", "average precision", "balanced accuracy"], "auroc"),
        (VALUES, REGRESSION, ["mean absolute error", "root mean squared error", "R²"], "mae"),
        (Task("multiclass", 2, rare=1), CLASSIFICATION, ["AUROC", "average precision"], "auroc"),
        (
            Task("multiclass", MANY_CLASSES),
            GUESSES,
            ["accuracy", "top-3 accuracy", "perplexity"],
            "accuracy",
        ),
    ],
)
def test_columns_have_the_same_metrics_on_both_test_sets(
    task: Task, metrics: Sequence[str], shown: list[str], worst: str
) -> None:
    rows = make_rows(["local", "hybrid"], metrics=metrics)
    for row in rows:
        row[f"personal_last_{worst}_worst"] = 0.5

    *titles, last = make_table(rows, task).frame.columns[1:-3]

    assert titles == [f"{test} test {name}" for test in ("Global", "Local") for name in shown]
    assert last.startswith("Worst client's local test")


def test_metrics_of_the_user_have_columns_without_a_best_score() -> None:
    rows = make_rows(["local", "hybrid"], [0], [*CLASSIFICATION, "regret"])
    for row in rows:
        row["global_last_regret_std"] = 0.1

    table = make_table(rows)

    assert table.bold is not None
    for title in ("Global test regret", "Local test regret"):
        assert all(re.fullmatch(r"0\.\d{3}", cell) for cell in table.frame[title])
        assert not table.bold[title].any()
    assert not any("std" in name for name in table.frame)
    assert table.caption.startswith("Metrics in percent, except regret")


def test_latex_has_the_cells_of_the_table_and_is_escaped() -> None:
    rows = make_rows(["local", "hybrid:keep_heads=no&yes", "centralized"])
    table = make_table(rows)

    text = table.latex("A note")

    body = text.split("\\toprule")[1].split("\\bottomrule")[0]
    lines = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(table.frame.columns)}
    assert "Hybrid (keep\\_heads = no\\&yes)" in text
    assert re.search(r"\\textbf\{\d\d\.\d \$\\pm\$ \d\.\d\}", text) and "10$^6$" in text
    assert "A note.}" in text and "\\label{tab:comparison-last}" in text
    assert text.count("{") == text.count("}") and all(ord(c) < 128 for c in text)


def test_needs_match_classes_and_settings() -> None:
    rows = make_rows(["local", "hybrid", "ensemble"], seeds=[0])
    rows += [
        dict(rows[0], algorithm=name)
        for name in ("fedmd:initial_phase=true", "python:no.such:Thing")
    ]

    needs = make_table(rows).frame.set_index("Method")["Needs"]

    assert needs.to_dict() == {
        "Local": "–",
        "Hybrid": "proxy set or shared architectures",
        "FedMD (initial_phase = true)": "labeled proxy set",
        "Thing": "–",
        "Ensemble (reference)": "all in one place, single uploads",
    }


def test_best_method_comes_first() -> None:
    rows = make_rows(["fedavg", "centralized", "hybrid", "local"], seeds=[0, 1])
    errors = make_rows(["fedavg", "hybrid", "local"], seeds=[0], metrics=REGRESSION)
    errors[0]["global_last_mae"] = None

    ranked = [row["algorithm"] for row in rank_methods(rows, TEN)]

    assert ranked == [name for name in ("centralized", "hybrid", "fedavg", "local") for _ in "ab"]
    assert [row["algorithm"] for row in rank_methods(errors, VALUES)] == [
        *("hybrid", "local", "fedavg")
    ]


def test_each_method_is_compared_with_the_best_but_references_are_not() -> None:
    rows = make_rows()
    frame = paired_differences(ComparedRuns(pd.DataFrame(rows), BINARY))
    table = differences_of(rows)

    assert table is not None
    assert table.title == "Differences from Hybrid"
    assert list(frame["algorithm"]) == ["local", "fedavg"]
    p_values = [
        stats.ttest_rel(values(rows, name, KEY), values(rows, "hybrid", KEY)).pvalue
        for name in ("local", "fedavg")
    ]
    assert list(frame["p"]) == pytest.approx(p_values)
    smaller, larger = sorted(p_values)
    assert sorted(frame["p_holm"]) == pytest.approx([2 * smaller, max(2 * smaller, larger)])
    assert "2 tests" in table.caption
    mean = 20 * (sum(values(rows, "local", KEY)) - sum(values(rows, "hybrid", KEY)))
    name, difference, interval, *_ = table.frame.iloc[0]
    assert (name, difference) == ("Local", f"−{abs(mean):.1f}")
    low, high = (float(end.replace("−", "-")) for end in interval.split(" to "))
    assert low < mean < high


def test_the_smallest_error_is_best() -> None:
    table = differences_of(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES)

    assert table is not None
    assert table.title == "Differences from FedAvg"
    assert table.frame.iloc[0, 1].startswith("+"), "Local has a larger error"


def test_methods_with_few_seeds_are_not_part_of_the_family(tmp_path: Path) -> None:
    rows = [r for r in make_rows() if r["algorithm"] != "local" or r["seed"] < 3]

    table = differences_of(rows)
    write_comparison(tmp_path, rows, title="t", note="", task=BINARY)

    assert table is not None
    assert table.frame.iloc[0].tolist() == ["Local", "–", "–", "–", "–"]
    assert table.frame.iloc[1]["p"] == table.frame.iloc[1]["p (Holm)"], "one test"
    assert "fewer than 5 seeds" in table.caption
    (line,) = (tmp_path / "differences.csv").read_text().splitlines()[1:]
    assert line.startswith("fedavg,") and line.endswith(",5")


@each_case("rows", [make_rows(seeds=range(4)), make_rows(["hybrid", "centralized"])])
def test_no_table_without_a_test(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_comparison(tmp_path, make_rows(), title="first", note="", task=BINARY)
    before = len(Comparison(tmp_path).differences)
    write_comparison(tmp_path, rows, title="second", note="", task=BINARY)

    assert differences_of(rows) is None
    assert before == 2
    assert Comparison(tmp_path).differences.empty, "no file of an earlier comparison remains"


def test_stopped_and_failed_candidates_are_listed() -> None:
    point = ("lr=0.1",)
    tried = [
        Candidate("fedavg", point, 0.5, chosen=True),
        Candidate("fedavg", point, 0.4, chosen=False, stopped_after=2),
        Candidate("fedavg", point, None, chosen=False, stopped_after=1),
        Candidate("fedavg", point, None, chosen=False),
        Candidate("fedavg", point, float("-inf"), chosen=False),
    ]

    table = tuning_table(tried, TEN)
    only_complete = tuning_table(tried[:1], TEN)

    assert table is not None and only_complete is not None
    assert table.frame["Validation"].tolist() == [
        *("50.0", "40.0 (stopped after round 2)", "– (stopped after round 1)"),
        *("failed with a seed", "–"),
    ]
    assert "**50.0**" in table.markdown() and "**40.0" not in table.markdown()
    assert "cannot be chosen" in table.caption
    assert "stopped" not in only_complete.caption


def test_comparison_writes_its_files(tmp_path: Path) -> None:
    rows = make_rows()
    rows[0]["server_last_accuracy"] = None
    rows[0]["personal_last_accuracy_worst"] = 0.5
    why = {"FedGKT": "needs clients", "FedMD, seed 1": "failed: no proxy set"}
    out = tmp_path / "out"

    write_comparison(out, rows, title="Two & <three>", note="A note.", task=BINARY, missing=why)

    names = {f"comparison.{suffix}" for suffix in ("csv", "md", "tex", "png")}
    assert {p.name for p in out.iterdir()} == names | {"differences.csv", "report.html"}
    with open(out / "comparison.csv", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    assert reader.fieldnames == [
        "algorithm",
        "seed",
        *(
            f"{test}_{moment}_{metric}"
            for test in ("personal", "global", "server")
            for moment in ("last", "best")
            for metric in CLASSIFICATION
        ),
        "up_bytes",
        "down_bytes",
        "seconds_total",
        "personal_last_accuracy_worst",
    ]
    for written, row in zip(found, rows, strict=True):
        assert (written["algorithm"], written["seed"]) == (row["algorithm"], str(row["seed"]))
        assert float(written["global_last_auroc"]) == row["global_last_auroc"]
    assert found[0]["server_last_accuracy"] == "" and found[1]["server_best_loss"] == ""
    text = (out / "comparison.md").read_text()
    assert text.startswith("# Two & <three>\n\nA note.\n\n## Last round\n")
    assert "\n\n## Details\n\n- **Seeds:** 0, 1, 2, 3, 4\n" in text
    assert "## Round selected by validation" in text and "## Differences from Hybrid" in text
    assert (out / "comparison.tex").read_text().count("\\end{table}") == 3
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = Page((out / "report.html").read_text())
    assert "Two & <three>" in page.text and "A note." in page.text and "references" in page.text
    assert sum(tag == "b" for tag, _ in page.attributes) == 2 * 7 - 1 + 1, (
        "one best in each column, and a caption"
    )
    assert len([row for row in page.cells if row and row[0].startswith("Hybrid ")]) == 2 + 5
    lines = {row[0].strip(): row for row in page.cells}
    for name, reason in why.items():
        assert lines[f"Without {name}"][1].strip() == reason
        assert f"- **Without {name}:** {reason}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithms", "seeds", "task", "metrics"),
    [
        (["local"], [0], BINARY, CLASSIFICATION),
        (["centralized", "ensemble"], [0, 1], TEN, CLASSIFICATION),
        (["hybrid", "hybrid:a=1:b=a_very_long_value:c=other"], [0, 1], LABELS, CLASSIFICATION),
        (["local", "fedavg"], [3], VALUES, REGRESSION),
    ],
)
def test_tables_of_small_comparisons(
    tmp_path: Path, algorithms: list[str], seeds: list[int], task: Task, metrics: Sequence[str]
) -> None:
    write_comparison(tmp_path, make_rows(algorithms, seeds, metrics), title="t", note="", task=task)

    page = Page((tmp_path / "report.html").read_text())

    assert "None" not in page.text and "nan" not in page.text


def test_comparison_without_rows_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_comparison(tmp_path / "out", [], title="t", note="", task=BINARY)
    assert not (tmp_path / "out").exists()


def test_comparison_row_from_a_summary(made_run: Callable[..., RunDirectory]) -> None:
    summary = made_run(rounds=4, server=False).summary()

    row = comparison_row(summary)

    assert row["algorithm"] == "hybrid" and row["seed"] == 0
    assert row["global_best_auroc"] == summary["global"]["best_by_validation"]["auroc"]
    assert row["personal_last_accuracy_worst"] == summary["personal"]["last"]["accuracy_worst"]
    assert row["up_bytes"] + row["down_bytes"] == 2_880_000
    assert row["seconds_total"] == pytest.approx(10.8)
    assert not any(
        key.startswith("server") or key.endswith(("round", "_std", "_undefined")) for key in row
    )
    assert not any(key.startswith("global") and key.endswith("_worst") for key in row)

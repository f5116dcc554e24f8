"""Comparison tables: columns, best values and references."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetero_fl.core.metrics import CLASSIFICATION, REGRESSION
from hetero_fl.core.task import MANY_CLASSES, Task
from hetero_fl.reporting.comparison.facts import rank_methods
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from hetero_fl.reporting.comparison.tables import Candidate, make_table, make_tuning_table
from hetero_fl.reporting.run_directory import RunDirectory
from tests.reporting.test_report import Page
from tests.support.cases import each_case

GUESSES = ("accuracy", "top3_accuracy", "perplexity")
BINARY, TEN, LABELS = Task("multiclass", 2), Task("multiclass", 10), Task("multilabel", 14)
VALUES = Task("regression", 1)
LEVELS = {"local": 0.6, "fedavg": 0.65, "hybrid": 0.8, "centralized": 0.9, "ensemble": 0.85}
MB = {"fedavg": 40e6, "hybrid": 50e6}


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


def values(rows: list[dict[str, Any]], algorithm: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["algorithm"] == algorithm]


@each_case(
    ("task", "metrics", "main"),
    [
        (BINARY, CLASSIFICATION, "global_last_balanced_accuracy"),
        (TEN, CLASSIFICATION, "global_last_accuracy"),
        (LABELS, CLASSIFICATION, "global_last_auroc"),
        (VALUES, REGRESSION, "global_last_mae"),
    ],
)
def test_means_spread_and_best(task: Task, metrics: Sequence[str], main: str) -> None:
    rows = make_rows(metrics=metrics)
    table = make_table(rows, task, "last")
    assert table.columns[0].key == main
    assert [line.algorithm for line in table.lines] == [
        "local",
        "fedavg",
        "hybrid",
        "centralized",
        "ensemble",
    ]
    for line in table.lines:
        for column, cell in zip(table.columns, line.cells, strict=True):
            found = values(rows, line.algorithm, column.key)
            assert cell.mean == pytest.approx(np.mean(found)) and cell.deviation == pytest.approx(
                np.std(found, ddof=1)
            )
            assert cell.best == (line.algorithm == "hybrid"), (
                "the references are better, and never bold"
            )
    assert [line.megabytes for line in table.lines] == ["0", "40.0", "50.0", "0", "0"]
    assert {line.seconds for line in table.lines} == {"32.0"}


def test_equal_values_are_all_best() -> None:
    rows = make_rows(["local", "fedavg"], seeds=[0])
    for row in rows:
        row["global_last_auroc"] = 0.91234 if row["algorithm"] == "local" else 0.91235
    column = make_table(rows, BINARY, "last")
    assert [line.cells[1].best for line in column.lines] == [True, True]


def test_one_seed_has_no_spread() -> None:
    table = make_table(make_rows(seeds=[7]), BINARY, "last")
    assert "one seed (7)" in table.caption
    assert not any("±" in cell.text for line in table.lines for cell in line.cells)
    assert "±" not in table.markdown() and "pm" not in table.latex("x")


def test_missing_seeds_are_noted() -> None:
    rows = make_rows(["local", "hybrid"], seeds=range(6))
    full = make_table(rows, BINARY, "last")
    assert make_table(rows[::-1], BINARY, "last").lines[::-1] == full.lines
    short = [row for row in rows if (row["algorithm"], row["seed"]) != ("local", 2)]
    assert make_table(short, BINARY, "last").lines[0].name == "Local (5 of 6 seeds)"


@each_case(
    ("jobs", "header", "words"),
    [
        (1, "Seconds", "one run at a time."),
        (
            2,
            "Seconds (2 runs at a time)",
            "2 runs shared the machine, so the times do not measure speed.",
        ),
        (
            None,
            "Seconds",
            "several runs may have shared the machine, so the times do not measure speed.",
        ),
    ],
)
def test_seconds_note_parallel_runs(jobs: int | None, header: str, words: str) -> None:
    table = make_table(make_rows(), BINARY, "last", jobs)
    assert table.header[-2:] == [header, "Needs"] and table.caption.endswith(words)


def test_caption_tells_what_means_and_rounds_are_shown() -> None:
    last, best = (make_table(make_rows(), BINARY, moment) for moment in ("last", "best"))
    errors = make_table(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES, "last")

    assert "Local test AUROC: mean over the clients for which it is defined" in last.caption
    assert "AUROC" not in errors.caption
    assert "of the rounds with the best score" in best.caption
    assert "of the rounds with" not in last.caption


def test_columns_without_values_are_left_out() -> None:
    rows = make_rows(["local", "hybrid"])
    for row in rows:
        row["personal_last_accuracy_worst"] = None
        row["global_last_auroc"] = None
        if row["algorithm"] == "hybrid":
            row["server_last_balanced_accuracy"] = 0.5
    table = make_table(rows, BINARY, "last")
    assert [c.title for c in table.columns] == [
        "Global test balanced accuracy",
        "Global test accuracy",
        "Local test balanced accuracy",
        "Local test AUROC",
        "Local test accuracy",
        "Server's balanced accuracy",
    ]
    assert [line.cells[-1].text for line in table.lines] == ["–", "50.0 ± 0.0"]


@each_case(
    ("task", "metrics", "shown", "worst"),
    [
        (BINARY, CLASSIFICATION, ["balanced_accuracy", "auroc", "accuracy"], "accuracy"),
        (TEN, CLASSIFICATION, ["accuracy", "balanced_accuracy", "auroc"], "accuracy"),
        (LABELS, CLASSIFICATION, ["auroc", "average_precision", "balanced_accuracy"], "auroc"),
        (VALUES, REGRESSION, ["mae", "rmse", "r2"], "mae"),
        (Task("multiclass", 2, rare=1), CLASSIFICATION, ["auroc", "average_precision"], "auroc"),
        (Task("multiclass", MANY_CLASSES), GUESSES, list(GUESSES), "accuracy"),
    ],
)
def test_columns_have_the_same_metrics_on_both_test_sets(
    task: Task, metrics: Sequence[str], shown: list[str], worst: str
) -> None:
    rows = make_rows(["local", "hybrid"], metrics=metrics)
    for row in rows:
        row[f"personal_last_{worst}_worst"] = 0.5

    table = make_table(rows, task, "last")

    keys = [f"{test}_last_{metric}" for test in ("global", "personal") for metric in shown]
    assert [column.key for column in table.columns] == [*keys, f"personal_last_{worst}_worst"]
    (globally, first), (locally, second) = table.groups
    assert (globally, locally) == ("Global test", "Local test")
    assert second[:-1] == first and second[-1].startswith("Worst client's")


def test_markdown_and_latex_have_the_values_of_the_table() -> None:
    table = make_table(make_rows(), BINARY, "last")
    expected = [
        [
            line.name,
            *(cell.text for cell in line.cells),
            line.megabytes,
            line.seconds,
            line.needs,
        ]
        for line in table.lines
    ]

    lines = [line.strip("|").split("|") for line in table.markdown().splitlines()]
    header, _, *rows = [[cell.strip(" *↓") for cell in line] for line in lines]
    body = table.latex("x").split("\\midrule", 1)[1].split("\\bottomrule")[0]
    cells = [line.removesuffix(" \\\\").split(" & ") for line in body.splitlines() if "&" in line]
    plain = {"\\textbf{": "", "}": "", " $\\downarrow$": "", "$\\pm$": "±", "$<$": "<", "--": "–"}

    assert header == table.header
    assert [row for row in rows if row[0] != "References"] == expected
    assert [row[0] for row in rows[2:5]] == ["Hybrid", "References", "Centralized"]
    _, _, local, _, hybrid, *references = table.markdown().splitlines()
    assert re.match(r"\| Hybrid +\| +\*\*\d\d\.\d ± \d\.\d\*\* +\|", hybrid)
    assert "**" not in local + references[1] + references[2]
    for line, latex_cells in zip(expected, cells, strict=True):
        found = latex_cells
        for mark, text in plain.items():
            found = [cell.replace(mark, text) for cell in found]
        assert found == line


def test_latex_is_balanced_and_escaped() -> None:
    rows = make_rows(["local", "hybrid:keep_heads=no&yes", "centralized"], metrics=CLASSIFICATION)
    text = make_table(rows, BINARY, "last").latex("x")
    body = text.split("\\toprule")[1].split("\\bottomrule")[0]
    groups, *rows_of_table = [line for line in body.splitlines() if line.endswith("\\\\")]
    columns = re.search(r"\{tabular\}\{(lr*l)\}", text)
    assert columns is not None
    assert {len(re.split(r"(?<!\\)&", line)) for line in rows_of_table} == {len(columns[1])}
    assert "\\multicolumn{3}{c}{Global test} & \\multicolumn{3}{c}{Local test}" in groups
    assert "\\cmidrule(lr){2-4} \\cmidrule(lr){5-7}" in body
    assert "Hybrid (keep\\_heads = no\\&yes)" in text and "\\midrule" in body.split("Hybrid")[1]
    assert re.search(r"\\textbf\{\d\d\.\d \$\\pm\$ \d\.\d\}", text) and "10$^6$" in text
    assert text.count("{") == text.count("}") and all(ord(c) < 128 for c in text)


def test_comparison_writes_its_files(tmp_path: Path) -> None:
    rows = make_rows()
    rows[0]["server_last_accuracy"] = None
    rows[0]["personal_last_accuracy_worst"] = 0.5
    write_comparison(tmp_path / "out", rows, title="Two & <three>", note="A note.", task=BINARY)
    names = {f"comparison.{suffix}" for suffix in ("csv", "md", "tex", "png")}
    names |= {"differences.csv", "report.html"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    metrics = [
        f"{r}_{m}_{k}"
        for r in ("personal", "global", "server")
        for m in ("last", "best")
        for k in CLASSIFICATION
    ]
    assert reader.fieldnames == [
        "algorithm",
        "seed",
        *metrics,
        "up_bytes",
        "down_bytes",
        "seconds_total",
        "personal_last_accuracy_worst",
    ]
    assert [(r["algorithm"], r["seed"]) for r in found] == [
        (r["algorithm"], str(r["seed"])) for r in rows
    ]
    assert all(
        float(f["global_last_auroc"]) == r["global_last_auroc"]
        for f, r in zip(found, rows, strict=True)
    )
    assert found[0]["server_last_accuracy"] == "" and found[1]["server_best_loss"] == ""
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert (
        text.startswith("# Two & <three>\n\nA note.\n\n## Last round\n")
        and "\n\n## Details\n\n- **Seeds:** 0, 1, 2, 3, 4\n" in text
        and "## Round selected by validation" in text
    )
    assert (tmp_path / "out" / "comparison.tex").read_text().count("\\end{table}") == 3
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "Two & <three>" in page.text and "A note." in page.text and "references" in page.text
    assert sum(tag == "b" for tag, _ in page.attributes) == 2 * 7 - 1 + 1, (
        "one best in each column, and a caption"
    )
    assert len([row for row in page.cells if row[0].startswith("Hybrid ")]) == 2 + 5
    assert page.text.count("needs proxy set or shared architectures") == 1, (
        "said once, in the first table"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithms", "seeds", "task", "metrics"),
    [
        (["local"], [0], BINARY, CLASSIFICATION),
        (["centralized", "ensemble"], [0, 1], TEN, CLASSIFICATION),
        (
            ["hybrid", "hybrid:a=1:b=a_very_long_value:c=another_long_value"],
            [0, 1],
            LABELS,
            CLASSIFICATION,
        ),
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
    assert row["up_bytes"] + row["down_bytes"] == 2_880_000 and row[
        "seconds_total"
    ] == pytest.approx(10.8)
    assert not any(
        key.startswith("server") or key.endswith(("round", "_std", "_undefined")) for key in row
    )
    assert not any(key.startswith("global") and key.endswith("_worst") for key in row)


def test_values_below_the_baseline_are_marked() -> None:
    rows = make_rows(["fedavg", "local", "hybrid", "ensemble"], seeds=[0, 1])
    for row in rows:
        row["global_last_auroc"] = {
            "fedavg": 0.5,
            "local": 0.6,
            "hybrid": 0.60004,
            "ensemble": 0.1,
        }[row["algorithm"]]
    table = make_table(rows, BINARY, "last")
    assert [line.cells[1].below for line in table.lines] == [True, False, False, False], (
        "printed alike, and the references"
    )
    assert "↓: worse than Local." in table.caption
    assert " 50.0 ± 0.0 ↓ |" in table.markdown()
    assert "50.0 $\\pm$ 0.0 $\\downarrow$" in table.latex("x")
    errors = make_table(make_rows(["local", "fedavg"], metrics=REGRESSION), VALUES, "last")
    assert not any(cell.below for line in errors.lines for cell in line.cells), (
        "FedAvg's errors are smaller"
    )
    without = make_table([row for row in rows if row["algorithm"] != "local"], BINARY, "last")
    assert (
        not any(cell.below for line in without.lines for cell in line.cells)
        and "↓" not in without.caption
    )


def test_needs_match_classes_and_settings() -> None:
    rows = make_rows(["local", "hybrid", "ensemble"], seeds=[0])
    rows += [
        dict(rows[0], algorithm=name)
        for name in ("fedmd:initial_phase=true", "python:no.such:Thing")
    ]
    found = {line.algorithm: line.needs for line in make_table(rows, BINARY, "last").lines}
    assert found["local"] == "–" and found["hybrid"] == "proxy set or shared architectures"
    assert found["ensemble"] == "all in one place, single uploads"
    assert (
        found["fedmd:initial_phase=true"] == "labeled proxy set"
        and found["python:no.such:Thing"] == "–"
    )


def test_best_method_comes_first() -> None:
    rows = make_rows(["fedavg", "centralized", "hybrid", "local"], seeds=[0, 1])
    assert [row["algorithm"] for row in rank_methods(rows, TEN)] == [
        name for name in ("centralized", "hybrid", "fedavg", "local") for _ in (0, 1)
    ]
    errors = make_rows(["fedavg", "hybrid", "local"], seeds=[0], metrics=REGRESSION)
    errors[0]["global_last_mae"] = None
    assert [row["algorithm"] for row in rank_methods(errors, VALUES)] == [
        "hybrid",
        "local",
        "fedavg",
    ]


def test_missing_methods_are_listed_with_the_reason(tmp_path: Path) -> None:
    why = {
        "FedGKT": "needs clients that share features",
        "FedMD, seed 1": "failed: no proxy set",
    }
    write_comparison(tmp_path, make_rows(["local"], [0]), title="t", note="", task=TEN, missing=why)
    page = Page((tmp_path / "report.html").read_text())
    rows = {row[0].strip(): row for row in page.cells}
    for name, reason in why.items():
        assert rows[f"Without {name}"][1].strip() == reason
        assert f"- **Without {name}:** {reason}" in (tmp_path / "comparison.md").read_text()


def test_stopped_trials_are_listed_with_their_round() -> None:
    point = ("lr=0.1",)
    tried = [
        Candidate("fedavg", point, 0.5, chosen=True),
        Candidate("fedavg", point, 0.4, chosen=False, stopped_after=2),
        Candidate("fedavg", point, None, chosen=False, stopped_after=1),
    ]

    table = make_tuning_table(tried, TEN)
    only_complete = make_tuning_table(tried[:1], TEN)

    assert table is not None
    assert only_complete is not None
    texts = [text for _, _, text, _ in table.lines]
    assert texts == ["50.0", "40.0 (stopped after round 2)", "– (stopped after round 1)"]
    assert "cannot be chosen" in table.caption
    assert "stopped" not in only_complete.caption

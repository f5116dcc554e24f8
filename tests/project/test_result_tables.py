"""The result tables: every number is that of the archived runs, and a command writes them."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.league.protocol import Benchmark
from benchmarks.league.results import BenchmarkResults
from benchmarks.science.attack_tables import attack_tables
from benchmarks.science.benchmark_tables import archive_table
from benchmarks.science.comparison_tables import (
    ComparisonTable,
    comparison_table,
)
from benchmarks.science.published import TABLES
from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import method_title
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from scripts import result_tables
from tests.support.run_directories import Case, write_run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MEDICAL = ROOT / "docs" / "scenarios" / "medical_hetero.md"
REPLICATION = ROOT / "docs" / "results" / "replication.md"
SURVEY = ROOT / "docs" / "results" / "survey.md"
BENCHMARK = ROOT / "docs" / "benchmark"
MARKED = re.compile(
    r"<!-- (benchmark|replication): ([\w ,]+?) \(.*?-->\n(.*?)<!-- end of results -->",
    re.DOTALL,
)
GLOBAL = "global_last_balanced_accuracy"
LOCAL = "personal_last_accuracy"
COLUMNS = {
    "Global test, balanced accuracy": "global_last_balanced_accuracy",
    "Global test, AUROC": "global_last_auroc",
    "Local tests, accuracy": "personal_last_accuracy",
    "Worst client": "personal_last_accuracy_worst",
}
LABELS = {method_title(register_algorithm[name]): name for name in register_algorithm}


def marked(page: Path) -> dict[tuple[str, str], str]:
    """Text of each generated table of a page, by kind and name of the comparison."""
    found = MARKED.findall(page.read_text(encoding="utf-8"))
    return {(kind, name): text for kind, name, text in found}


def read_rows(text: str) -> list[dict[str, str]]:
    cells = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def runs_of(path: Path, key: str = "algorithm") -> dict[str, list[dict[str, str]]]:
    """Read the rows of an archive, keyed by the value of a column."""
    found: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row[key], []).append(row)
    return found


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_pages_contain_their_tables() -> None:
    assert [name for _, name in marked(README)] == ["overview", "verdict"]
    assert list(marked(REPLICATION)) == [("replication", name) for name in TABLES]


def test_summary_matches_the_archived_runs() -> None:
    runs = runs_of(BENCHMARK / "xrays_one.csv", "method")
    shown = read_rows(marked(MEDICAL)["benchmark", "summary of xrays_one"])

    rows = {LABELS[row["Method"].partition(" +")[0]]: row for row in shown if row["MB"]}
    assert rows.keys() == runs.keys()
    for method, row in rows.items():
        own = [run for run in runs[method] if run["components"] == "all"]
        for title, key in COLUMNS.items():
            values = [100 * float(run[key]) for run in own]
            assert row[title] == mean_and_deviation(values), (method, title)
        sent = statistics.mean(float(run["up_bytes"]) + float(run["down_bytes"]) for run in own)
        assert float(row["MB"]) == pytest.approx(sent / 1e6, rel=0.05)


def test_overview_matches_the_archived_runs() -> None:
    shown = read_rows(marked(README)["benchmark", "overview"])
    federations = Benchmark.load(ROOT / "configs" / "benchmark").federations
    titles = {federation.title: name for name, federation in federations.items()}

    for row in shown:
        method = LABELS[row.pop("Method").partition(" +")[0]]
        for title, cell in row.items():
            runs = runs_of(BENCHMARK / f"{titles[title]}.csv", "method")[method]
            values = [100 * float(run[GLOBAL]) for run in runs if run["components"] == "all"]
            assert cell == mean_and_deviation(values), (method, title)
    assert len(shown) == 8


@pytest.fixture
def small_archive(tmp_path: Path) -> BenchmarkResults:
    """Return results with Local and the primary methods in the federation `digits`."""
    # Scores on the global test and on local tests.
    scores = {
        "local": (0.5, 0.5),
        "fedavg": (0.8, 0.2),
        "fedmd": (0.6, 0.2),
        "feddf": (0.6, 0.2),
        "ds_fl": (0.6, 0.2),
        "hybrid": (0.7, 0.3),
    }
    with open(tmp_path / "digits.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "components", "settings", "seed", GLOBAL, LOCAL])
        for method, (common, own) in scores.items():
            for seed in range(630, 640):
                noise = 0.01 * (seed % 5) * (method == "fedavg")
                writer.writerow([method, "all", "", seed, common + noise, own])
    return BenchmarkResults(ROOT / "configs" / "benchmark", tmp_path)


def test_largest_losses_of_hybrid_are_listed(small_archive: BenchmarkResults) -> None:
    losses = read_rows(archive_table(small_archive, "largest losses"))

    assert [(row["Metric"], row["Points"], row["Against"]) for row in losses] == [
        ("Global test, balanced accuracy", "−12.0", "FedAvg + components"),
        ("Local tests, accuracy", "−20.0", "Local + components"),
    ]
    assert {(row["Federations"], row["Federation"]) for row in losses} == {
        ("Main federations", "Digits, three architectures")
    }


def test_verdict_counts_tests_in_both_directions(small_archive: BenchmarkResults) -> None:
    verdict = archive_table(small_archive, "verdict")

    assert verdict.startswith(
        "In 4 paired tests with Holm's correction (of 20; the others have no runs yet), Hybrid is "
        "significantly ahead in 3 and behind in 1. "
    )
    ranks = "FedAvg (1.00) and Hybrid (2.00)"
    assert f"Of 6 methods with components, {ranks} have the best mean ranks" in verdict
    assert (
        "ahead of FedAvg in 0 of 1, FedMD in 1 of 1, FedDF in 1 of 1, DS-FL in 1 of 1." in verdict
    )


def test_tables_without_runs_say_so(tmp_path: Path) -> None:
    results = BenchmarkResults(ROOT / "configs" / "benchmark", tmp_path)

    for name in ("verdict", "largest losses", "summary of digits", "scores"):
        assert archive_table(results, name) == "No runs yet."


def test_result_tables_check_finds_a_changed_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = {path: tmp_path / path.name for path in (SURVEY, REPLICATION)}
    for path, page in pages.items():
        page.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(result_tables, "PAGES", tuple(pages.values()))
    monkeypatch.setattr(sys, "argv", ["result_tables.py", "--check"])
    assert result_tables.main() == 0

    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        figure = re.search(r"(?<= )\d\d\.\d ?± ?\d|(?<=\| )9\d\.\d\d(?= \|)", text)
        assert figure is not None
        page.write_text(text.replace(figure[0], "99.9±0", 1), encoding="utf-8")
        assert result_tables.main() == 1
        page.write_text(text, encoding="utf-8")


def test_result_tables_archive_keeps_every_run_and_adds_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(result_tables, "ARCHIVE", tmp_path / "archive")
    out = tmp_path / "out"
    runs = [
        write_run(out / "runs" / f"{name}-seed0", Case(algorithm=name, rounds=3))
        for name in ("local", "fedavg")
    ]
    for run in runs:
        run.write_text("config.yaml", "name: medical_hetero\nruntime: {threads: 1}\n")
    rows = [{**comparison_row(run.summary()), "run": run.path.name} for run in runs]
    write_comparison(out, rows, title="t", note="", task=Task("multiclass", 2))
    planned = {"algorithms": ["local", "fedavg", "fedmd"], "seeds": [0]}
    (out / "comparison.json").write_text(json.dumps(planned))

    result_tables.archive([out], "0123abc")
    result_tables.archive([out, out], "0123abc", "two_folders")

    *kept, failed = result_tables.archived("medical_hetero")
    assert [(row["threads"], row["commit"]) for row in kept] == [(1, "0123abc")] * 2
    assert {key: value for key, value in failed.items() if value is not None} == {
        "algorithm": "fedmd",
        "seed": 0,
        "threads": 1,
        "commit": "0123abc",
    }
    assert result_tables.archived("two_folders") == [*kept, *kept, failed, failed]
    for row, result in zip(kept, rows, strict=True):
        assert {key: row.get(key) for key in result} == {**result, "clients": None, "run": None}


def test_comparison_table_marks_the_best_method_but_no_bound() -> None:
    rows = [
        {
            "algorithm": label,
            "seed": seed,
            "global_last_accuracy": score + seed / 50,
            "global_last_perplexity": 1 / score,
            "up_bytes": 1e6,
            "down_bytes": 2e6,
        }
        for label, score in (("local", 0.5), ("fedavg", 0.7), ("centralized", 0.9))
        for seed in (0, 1)
    ]
    columns = {
        "Accuracy": "global_last_accuracy",
        "Perplexity": "global_last_perplexity",
        "Of a client": "personal_last_mae:site_1",
    }

    shown = read_rows(
        comparison_table(ComparisonTable(("a",), columns, {"local": "alone"}), lambda _: rows)
    )

    assert [list(row.values()) for row in shown] == [
        ["alone", "51.0 ± 1.4", "2.00 ± 0.00", "–", "3.00"],
        ["FedAvg", "**71.0 ± 1.4**", "**1.43 ± 0.00**", "–", "3.00"],
        ["Centralized", "91.0 ± 1.4", "1.11 ± 0.00", "–", "3.00"],
    ]


def test_recorded_output_names_the_command_and_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "MEASUREMENTS", tmp_path / "measurements")
    monkeypatch.setattr(record, "archivable_commit", lambda: "0123abcd")
    split = ["htfllib_split", "--clients", "2", "--out", str(tmp_path / "digits")]
    monkeypatch.setattr(sys, "argv", ["record", "sums", *split])
    record.main()
    monkeypatch.setattr(sys, "argv", ["record", "version", "hetero-fl", "--version"])
    record.main()
    monkeypatch.setattr(sys, "argv", ["record", "failed", "no_such_benchmark"])
    with pytest.raises(SystemExit, match="nothing was archived"):
        record.main()

    files = {file.stem: file.read_text("utf-8") for file in (tmp_path / "measurements").iterdir()}
    sums, version = (files.pop(name).splitlines() for name in ("sums", "version"))
    assert not files
    assert sums[0] == "$ python -m benchmarks htfllib_split --clients 2 --out digits"
    assert re.match(r"# 0123abcd, \d+ cores, .+, Python 3", sums[1])
    assert sums[2] == f"{tmp_path / 'digits'}: 2 clients, seed 0"
    assert version[0] == "$ hetero-fl --version" and version[2].startswith("hetero-fl ")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Create a repository with one commit."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    for name in ("benchmark.py", "docs/results/sums.txt"):
        (tmp_path / name).write_text("1", encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_results_of_a_commit_without_changes_may_be_archived(repository: Path) -> None:
    (repository / "docs" / "results" / "sums.txt").write_text("2", encoding="utf-8")
    head = git(repository, "rev-parse", "HEAD")
    tree = git(repository, "rev-parse", "HEAD^{tree}")
    abandoned = git(repository, "commit-tree", tree, "-m", "abandoned")

    found = {record.archivable_commit(name, repository) for name in ("HEAD", head, head[:7])}

    assert found == {head[:8]}
    for name in (abandoned, "01234567", f"{head[:8]}+"):
        with pytest.raises(SystemExit, match="is not in the history of the repository"):
            record.archivable_commit(name, repository)
    for name in ("new.py", "benchmark.py"):
        git(repository, "clean", "--quiet", "--force")
        (repository / name).write_text("2", encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"^{name}: not committed; commit all changes first$"):
            record.archivable_commit(root=repository)


def test_archive_of_runs_of_an_unknown_commit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["--archive", f"runs={tmp_path}", "--commit", "01234567"]
    monkeypatch.setattr(sys, "argv", ["result_tables.py", *arguments])
    monkeypatch.setattr(result_tables, "ARCHIVE", tmp_path)

    with pytest.raises(SystemExit, match=r"^commit '01234567' is not in the history"):
        result_tables.main()


def test_attack_tables_have_a_row_for_each_attack_and_a_column_for_each_rule() -> None:
    def run(label: str, accuracy: float | None, success: float | None = None) -> dict[str, Any]:
        scores = {"global_last_accuracy": accuracy, "attack_success": success}
        return {"algorithm": label, **scores}

    median = "fedavg:aggregation.rule=median"
    backdoor = "attacks.name=backdoor:attacks.share=0.2"
    gaussian = "attacks.name=gaussian:attacks.share=0.4"
    rows = [
        run("fedavg", 0.8),
        run("fedavg", 0.9),
        run(median, 0.84),
        run(f"fedavg:{backdoor}", 0.8, 0.97),
        run(f"{median}:{backdoor}", 0.82, 0.06),
        run(f"{median}:{gaussian}", 0.7),
        run("hybrid:aggregation.rule=median:aggregation.predictions=agreement", 0.7),
        run(f"fedavg:{gaussian}", 0.1),
        run(f"fedavg:{gaussian}", None),
    ]

    tables = attack_tables(rows).split("\n\n")

    cells = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in tables
    ]
    assert [lines[0] for lines in cells] == [
        ["FedAvg, 20% malicious", "mean", "median"],
        ["FedAvg, 40% malicious", "mean", "median"],
    ]
    assert [lines[2:] for lines in cells] == [
        [
            ["none", "**85.0**", "84.0"],
            ["backdoor", "80.0 (97% of triggers)", "**82.0** (6% of triggers)"],
        ],
        [["none", "**85.0**", "84.0"], ["gaussian", "not finite", "**70.0**"]],
    ]

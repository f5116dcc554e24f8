"""The result tables: every number is that of the archived runs, and a command writes them."""

from __future__ import annotations

import csv
import importlib.util
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import record
from benchmarks.science.comparison_tables import ComparisonTable, comparison_table
from benchmarks.science.component_tables import (
    GLOBAL,
    TABLES as COMPONENT_TABLES,
    ComponentTable,
    component_table,
)
from benchmarks.science.published import TABLES
from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import method_title
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from tests.helpers.run_directories import Case, write_run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MEDICAL = ROOT / "docs" / "results" / "medical.md"
REPLICATION = ROOT / "docs" / "results" / "replication.md"
HYBRID = ROOT / "docs" / "results" / "hybrid.md"
LABEL_SKEW = ROOT / "docs" / "explanation" / "label_skew.md"
ARCHIVED = sorted((ROOT / "docs" / "results").glob("*.csv"))
MARKED = re.compile(
    r"<!-- (results|summary|components|replication): (\w+) .*?-->\n(.*?)<!-- end of results -->",
    re.DOTALL,
)
COLUMNS = {
    "Global test balanced accuracy": "global_last_balanced_accuracy",
    "Global test AUROC": "global_last_auroc",
    "Global test accuracy": "global_last_accuracy",
    "Local test balanced accuracy": "personal_last_balanced_accuracy",
    "Local test AUROC": "personal_last_auroc",
    "Local test accuracy": "personal_last_accuracy",
    "Worst client, local test": "personal_last_accuracy_worst",
}
LABELS = {method_title(register_algorithm[name]): name for name in register_algorithm}
SETTINGS = {"LA": "logit_adjustment=true", "contrast teacher": "teacher=contrast"}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "result_tables", ROOT / "scripts" / "result_tables.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def marked(page: Path) -> dict[tuple[str, str], str]:
    """Text of each generated table of a page, by kind and name of the comparison."""
    found = MARKED.findall(page.read_text(encoding="utf-8"))
    return {(kind, name): text for kind, name, text in found}


def table(name: str) -> list[dict[str, str]]:
    """Rows of the full table of that name, by column; group titles are left out."""
    rows = read_rows(marked(MEDICAL)["results", name])
    return [row for row in rows if not row["Method"].startswith("*")]


def read_rows(text: str) -> list[dict[str, str]]:
    cells = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def label_of(method: str) -> str:
    """Return the label under which the runs of a row are archived."""
    title, *settings = method.split(" + ")
    return ":".join([LABELS[title], *(SETTINGS[setting] for setting in settings)])


def runs_of(path: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["algorithm"], []).append(row)
    return found


def test_result_tables_have_archived_runs() -> None:
    assert list(marked(README)) == [("summary", "medical_hetero")]
    assert list(marked(MEDICAL)) == [
        ("results", "medical_hetero"),
        ("results", "medical_homogeneous"),
    ]
    assert [name for _, name in marked(MEDICAL)] == [path.stem for path in ARCHIVED]
    assert list(marked(REPLICATION)) == [("replication", name) for name in TABLES]


def test_summary_repeats_rows_of_the_full_table() -> None:
    full = {row["Method"]: row for row in table("medical_hetero")}

    shown = read_rows(marked(README)["summary", "medical_hetero"])

    assert {"Local", "FedAvg", "Hybrid"} <= {row["Method"] for row in shown}
    for row in shown:
        source = full[row["Method"].removesuffix(" (bound)")]
        assert all(row[title] == source[title] for title in row if title != "Method")


def test_summary_shows_the_best_method_of_each_column() -> None:
    shown = read_rows(marked(README)["summary", "medical_hetero"])

    for title in set(shown[0]) - {"Method", "MB"}:
        assert any(row[title].startswith("**") for row in shown), title


@pytest.mark.parametrize("path", ARCHIVED, ids=lambda p: p.stem)
def test_numbers_match_the_archived_runs(path: Path) -> None:
    runs, shown = runs_of(path), table(path.stem)

    assert sorted(label_of(row["Method"]) for row in shown) == sorted(runs)
    for row in shown:
        own = runs[label_of(row["Method"])]
        for title, key in COLUMNS.items():
            values = [100 * float(run[key]) for run in own]
            digits = 0 if key.endswith("_worst") else 1
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert row[title].strip("*") == f"{mean:.{digits}f}±{deviation:.{digits}f}", (
                row["Method"],
                title,
            )
        total = (
            statistics.mean(float(run["up_bytes"]) + float(run["down_bytes"]) for run in own) / 1e6
        )
        assert float(row["MB"]) == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("path", ARCHIVED, ids=lambda p: p.stem)
def test_table_marks_the_best_method_of_each_column(path: Path) -> None:
    methods = [
        row
        for row in table(path.stem)
        if label_of(row["Method"]).split(":")[0] not in ("centralized", "ensemble")
    ]
    for title in COLUMNS:
        best = max(float(row[title].strip("*").split("±")[0]) for row in methods)
        marked = [
            float(row[title].strip("*").split("±")[0])
            for row in methods
            if row[title].startswith("**")
        ]
        assert marked and set(marked) == {best}


@pytest.mark.parametrize("path", ARCHIVED, ids=lambda p: p.stem)
def test_archived_runs_name_their_commit_and_the_methods_of_make_compare(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$\\\n  ", "")
    requests = re.search(r"^ALGORITHMS \?= (.*)$", makefile, re.MULTILINE)
    assert requests is not None

    runs = runs_of(path)

    assert sorted(runs) == sorted(requests[1].split(","))
    assert {tuple(run["seed"] for run in own) for own in runs.values()} == {
        ("0", "1", "2", "3", "4")
    }
    assert all(
        re.fullmatch(r"[0-9a-f]{7,40}", run["commit"]) for own in runs.values() for run in own
    )


def test_result_tables_check_finds_a_changed_figure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = {path: tmp_path / path.name for path in (README, MEDICAL, REPLICATION, HYBRID)}
    for path, page in pages.items():
        page.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGES", tuple(pages.values()))
    monkeypatch.setattr(sys, "argv", ["result_tables.py", "--check"])
    assert script.main() == 0

    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        figure = re.search(r"(?<= )\d\d\.\d ?± ?\d|(?<=\| )9\d\.\d\d(?= \|)", text)
        assert figure is not None
        page.write_text(text.replace(figure[0], "99.9±0", 1), encoding="utf-8")
        assert script.main() == 1
        page.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("table", list(COMPONENT_TABLES))
def test_component_tables_match_the_archived_runs(table: str) -> None:
    page = HYBRID if table != "ablation" else LABEL_SKEW
    shown = list(read_rows(marked(page)["components", table]))
    columns = COMPONENT_TABLES[table].columns
    archived = {
        title: runs_of(HYBRID.parent / f"components/{n}.csv") for title, n in columns.items()
    }

    for title, runs in archived.items():
        spec = COMPONENT_TABLES[table]
        # The runs are in the order of their seeds.
        values = [100 * float(run[spec.metric]) for run in runs["hybrid"][: spec.seeds]]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        if table == "lead":
            (row,) = (row for row in shown if row["Federation"] == title)
            assert row["Hybrid"] == f"{mean:.1f}"
            others = {
                label: statistics.mean(100 * float(run[GLOBAL]) for run in own)
                for label, own in runs.items()
                if label != "hybrid" and not label.endswith("epochs=5")
            }
            assert row["difference of means"] == f"{mean - max(others.values()):+.1f}"
        else:
            text = f"{mean:.1f} ± {deviation:.1f} ({min(values):.1f})"
            assert text in [row[title].strip("*") for row in shown]


def test_component_table_marks_the_best_row_with_all_seeds() -> None:
    scores = {"local": (0.5, 0.7), "fedavg": (0.6, 0.9), "hybrid": (0.95,)}
    rows = [
        {"algorithm": label, "seed": seed, GLOBAL: score}
        for label, values in scores.items()
        for seed, score in enumerate([*values, *values])
    ]

    shown = component_table(ComponentTable({"A": "a", "B": "a"}), lambda _: rows)

    marked_rows = [row["Method"] for row in read_rows(shown) if row["A"].startswith("**")]
    assert marked_rows == ["FedAvg"]


def test_hybrid_is_not_behind_equal_components() -> None:
    """Check the claims of the page, per federation and per seed."""
    for title, name in COMPONENT_TABLES["lead"].columns.items():
        runs = {
            label: {int(run["seed"]): 100 * float(run[GLOBAL]) for run in own}
            for label, own in runs_of(HYBRID.parent / f"components/{name}.csv").items()
            if not label.endswith("epochs=5")
        }
        hybrid = runs.pop("hybrid")
        assert len(hybrid) == 10
        best = max(statistics.mean(scores.values()) for scores in runs.values())
        margin = 5.0 if "one" not in title.lower() else -1.0
        assert statistics.mean(hybrid.values()) - best >= margin, title
        for seed, score in hybrid.items():
            assert score >= max(scores[seed] for scores in runs.values()) - 5.0
            local = [scores[seed] for label, scores in runs.items() if label.startswith("local")]
            assert score >= max(local)


def test_result_tables_archive_keeps_every_run_and_adds_the_commit(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "ARCHIVE", tmp_path / "archive")
    out = tmp_path / "out"
    runs = [
        write_run(out / "runs" / f"{name}-seed0", Case(algorithm=name, rounds=3))
        for name in ("local", "fedavg")
    ]
    for run in runs:
        run.write_text("config.yaml", "name: medical_hetero\nruntime: {threads: 1}\n")
    rows = [comparison_row(run.summary()) for run in runs]
    write_comparison(out, rows, title="t", note="", task=Task("multiclass", 2))

    script.archive(out, "0123abc")

    kept = script.archived("medical_hetero")
    assert [(row["threads"], row["commit"]) for row in kept] == [(1, "0123abc")] * 2
    for row, result in zip(kept, rows, strict=True):
        assert {key: row[key] for key in result} == result
    assert "| Local | " in script.section(kept)


def test_comparison_table_marks_the_best_method_but_no_bound() -> None:
    rows = [
        {
            "algorithm": label,
            "seed": seed,
            "global_last_accuracy": score + seed / 50,
            "global_last_perplexity": 1 / score,
            "up_bytes": 1e6,
            "down_bytes": 2e6,
            "seconds_total": 3.0,
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
    monkeypatch.setattr(sys, "argv", ["record", "sums", "secure_sum", "--quick"])

    record.main()

    lines = (tmp_path / "measurements" / "sums.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "$ python -m benchmarks secure_sum --quick"
    assert re.match(r"# ([0-9a-f]{7,}\+?|\d\.\d.*), \d+ cores, .+, Python 3", lines[1])
    assert lines[2].startswith("| clients | numbers |") and lines[4].startswith("| 5 | 1,000 |")


def test_output_of_the_command_line_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "MEASUREMENTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["record", "version", "hetero-fl", "--version"])

    record.main()

    first, _, output = (tmp_path / "version.txt").read_text(encoding="utf-8").splitlines()
    assert first == "$ hetero-fl --version"
    assert output.startswith("hetero-fl ")


def test_output_of_a_failed_benchmark_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "MEASUREMENTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["record", "sums", "no_such_benchmark"])

    with pytest.raises(SystemExit, match="nothing was archived"):
        record.main()

    assert not list(tmp_path.iterdir())

"""The report is self-contained, shows the values of the files and escapes all texts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from hetero_fl.reporting.plots import write_plots
from hetero_fl.reporting.report import _repeat_command, write_report
from hetero_fl.reporting.run_directory import RunDirectory
from tests.support.cases import each_case

MakeRun = Callable[..., RunDirectory]
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Parser that checks nesting of elements and collects the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += " ".join(data.split()) + " "


def read(run: RunDirectory, pictures: bool = False) -> Page:
    if not pictures:  # drawing is slow
        run.plots.mkdir(exist_ok=True)
        (run.plots / "curves.png").write_bytes(b"a picture")
    return Page(write_report(run.path).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"failures": True, "simulated": True},
        {
            "clients": 2,
            "rounds": 1,
            "proxy": 0,
            "server": False,
            "exchange": False,
            "algorithm": "local",
        },
        {"kind": "regression", "server": False, "algorithm": "python:my.module:MyMethod"},
        {"kind": "multilabel", "classes": 14, "rounds": 2},
        {"kind": "multiclass", "classes": 10, "clients": 60, "rounds": 2},
        {"home": False, "clients": 3},
        {"common": False, "server": False, "clients": 14},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_report_is_self_contained(made_run: MakeRun, case: dict[str, Any]) -> None:
    run = made_run(**case)
    page = read(run, pictures=True)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    for tag, attributes in page.attributes:
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,") and attributes[
                "alt"
            ]
        assert not any(
            (value or "").startswith(("http", "//", "file")) for value in attributes.values()
        )
    assert "url(" not in text and "@import" not in text
    assert not re.search(
        r"\b(None|nan|NaN|inf|undefined in)\b", page.text.replace("per_round: null", "")
    )
    assert str(run.path) not in text, "a report tells nobody the folders of a machine"


@each_case(
    ("configured", "chosen", "option"),
    [
        ("auto", {"executor": "serial", "chunk": 1}, " runtime.executor=serial"),
        (
            "auto",
            {"executor": "processes", "chunk": 12},
            " runtime.executor=processes runtime.chunk=12",
        ),
        ("auto", {"executor": "nodes", "chunk": 1}, ""),
        ("serial", {"executor": "serial", "chunk": 1}, ""),
    ],
)
def test_report_command_names_the_chosen_executor(
    made_run: MakeRun, configured: str, chosen: dict[str, Any], option: str
) -> None:
    run = made_run(rounds=1)
    run.write_config({**run.config(), "runtime": {"executor": configured}})
    about = {**run.environment(), "choice": chosen}
    run.write_text("environment.json", json.dumps(about))

    assert _repeat_command(run).endswith(f"--out runs/again{option}")


def test_report_command_permits_the_code_of_the_run(made_run: MakeRun) -> None:
    run = made_run(rounds=1)
    run.write_config({**run.config(), "algorithm": {"name": "python:median:MedianTeacher"}})

    command = _repeat_command(run)

    assert command.startswith(f"hetero-fl train --config PATH/{run.path.name}/config.yaml ")
    assert " --allow-code" in command and "PATH is the folder" in write_report(run.path).read_text()


def test_report_values_match_the_summary(made_run: MakeRun) -> None:
    run = made_run()
    page, summary = read(run), run.summary()
    common = summary["global"]["last"]
    assert f"Global test balanced accuracy {100 * common['balanced_accuracy']:.1f}%" in page.text
    assert f"worst {100 * common['balanced_accuracy_worst']:.1f}%" in page.text
    home = summary["personal"]["last"]["balanced_accuracy"]
    assert f"Local test balanced accuracy {100 * home:.1f}%" in page.text
    assert (
        "Balanced accuracy of the server's model "
        f"{100 * summary['server']['last']['balanced_accuracy']:.1f}%"
    ) in page.text
    assert not {"AUROC", "Accuracy"} & set(page.text.partition("Results")[0].split()), (
        "one metric in headline and story"
    )
    weakest = min(summary["clients"], key=lambda c: c["global"]["balanced_accuracy"])
    assert (
        f"worst client: {weakest['id']}, {100 * weakest['global']['balanced_accuracy']:.1f}%"
        in page.text
    )
    rows = {row[0].strip(): row for row in page.cells}
    chosen = summary["server"]["best_by_validation"]
    line = rows[f"Server round {chosen['round']}, selected by validation n = 624 test rows"]
    assert line[4].strip() == f"{chosen['auroc']:.3f}"
    client = rows["hospital_3 large"]
    assert client[1].strip() == "resnet18 11,169,218"
    assert rows["hospital_2 small"][2].strip() == "parameters, predictions lr 0.0005, epochs 2"
    tested = run.details()["rows"]["hospital_3"]["test"]
    assert (
        client[5].strip()
        == f"{100 * summary['clients'][2]['personal']['balanced_accuracy']:.1f}% n = {tested}"
    )
    assert "8.64 MB" in page.text and "2.88 MB up, 5.76 MB down" in page.text
    assert "500 rows, whose labels are never used" in page.text
    assert "Random guessing among 2 classes gives 50%" in page.text


@pytest.mark.slow
def test_plots_are_reproducible_and_in_the_report(made_run: MakeRun) -> None:
    run = made_run(rounds=2)
    drawn, again = ([path.read_bytes() for path in write_plots(run.path)] for _ in range(2))
    assert drawn == again
    sources = [a["src"] or "" for tag, a in read(run, pictures=True).attributes if tag == "img"]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == drawn


def test_report_states_warnings_first_and_privacy(made_run: MakeRun) -> None:
    run = made_run(simulated=True, failures=True)
    page = read(run)
    assert "No differential privacy was used." in page.text
    assert "The data of this run is simulated, not real." in page.text
    assert (
        "Clients dropped in 1 round: round 2: hospital_2 "
        "(loss or parameters of 'model' are not finite)." in page.text
    )
    assert page.text.index("The data of this run is simulated") < page.text.index("Summary")
    run.write_json("summary.json", run.summary() | {"privacy": {"epsilon": 3.456, "delta": 1e-5}})
    assert "ε = 3.46 at δ = 1e-05" in read(run).text


def test_report_counts_undefined_values(made_run: MakeRun) -> None:
    run = made_run(kind="multiclass", classes=10, clients=12)
    missing = run.summary()["personal"]["last"]["auroc_undefined"]
    assert missing > 0
    page = read(run)
    assert (
        f"undefined for {missing} client"
        in next(row for row in page.cells if row[0].startswith("Local test"))[4]
    )


def test_report_has_no_columns_without_scores_of_clients(made_run: MakeRun) -> None:
    run = made_run(rounds=1, home=False)
    summary = run.summary()
    for client in summary["clients"]:
        client["global"]["auroc"] = None
    run.write_json("summary.json", summary)

    header = next(row for row in read(run).cells if row[0].startswith("Client"))

    assert [title.strip() for title in header[5:]] == [
        "Balanced accuracy global test",
        "Accuracy global test",
    ]


def test_report_marks_values_of_few_rows(made_run: MakeRun) -> None:
    run = made_run(rounds=1)
    details = run.details()
    for rows in details["rows"].values():
        rows["test"] = 60
    run.write_json("details.json", details)
    assert "uncertain" not in read(run).text.lower()
    details["rows"]["hospital_2"]["test"] = 19
    details["rows"]["hospital_3"]["test"] = 20
    run.write_json("details.json", details)
    page = read(run)
    rows = {row[0].strip(): row for row in page.cells}
    assert rows["hospital_2 small"][5].strip().endswith("% n = 19, uncertain")
    assert (
        rows["hospital_3 large"][5].strip().endswith("% n = 20")
        and "n =" not in rows["hospital_2 small"][8]
    )
    assert "Uncertain because of fewer than 20 local test rows: hospital_2." in page.text
    assert "n = 19 to 60 test rows per client" in page.text and "n = 624 test rows" in page.text


@pytest.mark.parametrize("server", [True, False])
def test_report_describes_the_server_model(made_run: MakeRun, server: bool) -> None:
    page = read(made_run(rounds=1, server=server))
    assert ("The server has one model" in page.text) == server
    assert ("server's model" in page.text) == server


def test_report_escapes_all_texts(made_run: MakeRun) -> None:
    run = made_run(clients=2, rounds=1)
    evil = "<script>alert(1)</script>"
    text = json.dumps(run.details()).replace("normalized", evil)
    (run.path / "details.json").write_text(text)
    summary = run.summary() | {"name": evil}
    run.write_json("summary.json", summary)
    (run.path / "config.yaml").write_text(f"name: '{evil}'\n")
    page = read(run)
    assert page.text.count(evil) >= 3
    assert "hospital_2</b>" not in (run.path / "report.html").read_text()

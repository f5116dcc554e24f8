"""The page in a headless Chromium, if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.watch.server import serve_watch

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--window-size=1300,1400",
    "--dump-dom",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


class Browser:
    """A browser that opens the page of three runs.

    Args:
        address: Address of the page.
        profile: Folder for the profile.
    """

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        self._profile = profile

    def open(self, choice: str = "") -> str:
        """Return the document after the data has been loaded and drawn."""
        assert CHROMIUM is not None
        command = [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={self._profile}",
            f"{self._address}#{choice}",
        ]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return finished.stdout


@pytest.fixture
def browser(three_runs: list[Path], tmp_path: Path) -> Iterator[Browser]:
    with serve_watch(three_runs) as address:
        yield Browser(address, tmp_path / "profile")


def figure(document: str, name: str) -> str:
    (found,) = re.findall(rf'<figure[^>]* id="{name}".*?</figure>', document, re.DOTALL)
    return found


def num_curves(document: str, name: str) -> int:
    return figure(document, name).count("<polyline")


def test_page_draws_a_curve_for_each_run(browser: Browser) -> None:
    document = browser.open()

    assert "1 running, 2 finished" in document
    assert [num_curves(document, name) for name in ("mean", "worst", "loss")] == [3, 3, 3]
    # Up and down.
    assert num_curves(document, "traffic") == 6
    # Only the run in progress has a privacy cost.
    assert num_curves(document, "epsilon") == 1
    assert num_curves(document, "clients-chart") == 6
    assert document.count('class="tag"') == 1
    assert "5 / 8" in document
    assert re.search(r'id="lost"[^>]*hidden', document)


def test_columns_name_the_test_and_put_scores_first(browser: Browser) -> None:
    document = browser.open("test=global&metric=accuracy")

    head = re.search(r'<thead id="runs-head">(.*?)</thead>', document, re.DOTALL)
    assert head is not None
    columns = re.findall(r"<th [^>]*>(.*?)</th>", head[1])
    small = "<small>global test</small>"
    assert columns[:6] == [
        "Run",
        f"Accuracy{small}",
        f"Best round{small}<small>by validation</small>",
        f"Worst client{small}",
        "Method",
        "Seed",
    ]
    rows = re.search(r'<tbody id="runs">(.*?)</tbody>', document, re.DOTALL)
    assert rows is not None
    assert re.search(r"%<small>round \d</small>", rows[1])
    clients = re.search(r'<tbody id="clients">(.*?)</tbody>', document, re.DOTALL)
    assert clients is not None
    assert re.search(r"<td>[+−±]\d+\.\d points</td>", clients[1])


def test_address_chooses_test_metric_and_axis(browser: Browser) -> None:
    document = browser.open("test=server&metric=auroc&x=bytes")

    mean = figure(document, "mean")
    # The run in progress has no server model.
    assert mean.count("<polyline") == 2
    assert "AUROC" in mean
    assert "bytes up and down" in mean
    assert re.search(r'id="worst"[^>]*hidden', document)
    assert "no scores by client" in document


def test_names_and_errors_are_shown_as_text(
    browser: Browser, three_runs: list[Path], live: RunDirectory
) -> None:
    attack = "<img src=x onerror=document.title=1>"
    for path in (live, RunDirectory(three_runs[0] / "runs" / "hybrid-seed0")):
        path.write_config({**path.config(), "name": attack, "algorithm": {"name": attack}})
    record = live.metrics()[4]
    clients = {f"{attack}{i}": scores for i, scores in enumerate(record["clients"].values())}
    live.append_metrics(record | {"round": 6, "clients": clients, "failed": {attack: attack}})
    with open(live.path / "metrics.jsonl", "ab") as file:
        file.write(f'{{"{attack}": 1}}\n'.encode())
    key = re.findall(r'<option value="(\w+)">live<', browser.open())[0]

    document = browser.open(f"run={key}")

    assert "<img" not in document
    assert attack in unescape(document)
    assert "<title>1 running" in document
    assert "line 7: expected the record of a round" in document

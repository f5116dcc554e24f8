"""Progress output: quiet lines, live display and log file."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from hetero_fl.reporting import progress as module
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.text import Caution


def play(run: RunDirectory, progress: Progress) -> None:
    records = run.metrics()
    with progress:
        progress.start(len(records), len(records[0]["cohort"]))
        for record in records:
            progress.show_task(f"{record['cohort'][0]}: training")
            progress.finish_round(record)
        progress.finish(run.summary())


def test_quiet_progress_prints_evaluated_rounds(
    made_run: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    run, shown = made_run(rounds=5, every=2, failures=True), io.StringIO()
    play(run, Progress(tmp_path / "log.txt", console=Console(file=shown, soft_wrap=True)))
    lines = shown.getvalue().splitlines()
    assert lines[0] == "6 clients, 5 rounds"
    assert lines[1].startswith(
        "warning: round 2: hospital_2 dropped (loss or parameters of 'model' are not finite)"
    )
    assert [line.split()[1] for line in lines[2:-1]] == ["2/5", "4/5", "5/5"]
    assert (
        "local test: balanced accuracy" in lines[2] and "global test: balanced accuracy" in lines[2]
    )
    assert " left)" in lines[2] and " left)" not in lines[4]
    assert lines[-1].startswith(
        "done: 5 rounds in 14 s, 1.2 MB up and 2.4 MB down; local test: balanced accuracy"
    )
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert len(logged) == len(lines)
    assert logged[-1].endswith(lines[-1]) and logged[0][:2] == "20"


def test_resumed_run_appends_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("before\n")
    with Progress(tmp_path / "log.txt", quiet=True) as progress:
        progress.start(10, 1, done=4)
    before, line = (tmp_path / "log.txt").read_text().splitlines()
    assert before == "before" and line.endswith("1 client, 10 rounds, 4 of them already completed")


def test_live_display_shows_rounds_task_and_scores(
    made_run: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    run, shown = made_run(rounds=3), io.StringIO()
    play(
        run,
        Progress(
            tmp_path / "log.txt",
            console=Console(file=shown, force_terminal=True, width=100, height=20),
        ),
    )
    text = shown.getvalue()
    assert "hospital_1: training" in text and "3/3" in text
    assert text.count("local test: balanced accuracy") == 4, "scores are printed above the bar"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, (
        "the cursor is hidden once and shown again"
    )


def test_notebook_shows_a_bar_and_the_newest_scores(
    made_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr(module.ProgressBar, "show", lambda self, html: shown.append(html))

    play(made_run(rounds=2), Progress(quiet=None))

    assert [f"{done}/2" in html for done, html in enumerate(shown[:3])] == [True] * 3
    assert "local test: balanced accuracy" in shown[2]
    assert shown[-1].startswith("<div><small>done: 2 rounds")


def test_error_restores_the_terminal(tmp_path: Path) -> None:
    shown = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(console=Console(file=shown, force_terminal=True)) as progress,
    ):
        progress.start(3, 2)
        raise KeyboardInterrupt
    assert shown.getvalue().rindex("\x1b[?25h") > shown.getvalue().rindex("\x1b[?25l")


def test_progress_does_not_write_to_stdout(
    made_run: Callable[..., RunDirectory],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the remaining text is in the lines
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    run = made_run(rounds=2)
    play(run, Progress(tmp_path / "loud.txt"))
    captured = capsys.readouterr()
    assert captured.out == "" and "round 2/2" in captured.err
    play(run, Progress(tmp_path / "quiet.txt", quiet=True))
    assert capsys.readouterr() == ("", "")
    assert len((tmp_path / "quiet.txt").read_text()) == len((tmp_path / "loud.txt").read_text())


@pytest.mark.parametrize("quiet", [True, False])
def test_warning_is_shown_once(
    quiet: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "hetero_fl"), Progress(tmp_path / "log.txt", quiet) as progress:
        progress.log(Caution("the test rows are training rows"))
        progress.log("6 clients")

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert ("warning: the test rows" in capfd.readouterr().err) is not quiet
    assert "warning: the test rows are training rows" in (tmp_path / "log.txt").read_text()


def test_warning_reaches_python_users_without_logging(tmp_path: Path) -> None:
    code = (
        "from hetero_fl.reporting.progress import Progress\n"
        "from hetero_fl.utils.text import Caution\n"
        "for quiet in (True, False):\n"
        "    with Progress(quiet=quiet) as progress:\n"
        "        progress.log(Caution('the test rows are training rows'))\n"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stderr.splitlines() == ["warning: the test rows are training rows"] * 2

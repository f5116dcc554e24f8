"""Comparisons in worker processes: refusals, main guard, interruption, remaining time."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.experiment import compare, run
from hetero_fl.experiment.comparison import jobs
from hetero_fl.experiment.comparison.jobs import Job, Variant
from hetero_fl.reporting.run_directory import RunDirectory, lock_folder
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import UNGUARDED
from tests.support.cases import each_case
from tests.support.federations import config

ROOT = Path(__file__).parents[2]
# timeout in seconds; the machine may be busy
TIMEOUT = 300.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


DENSE = "dense:synthesis_epochs=1:generator_steps=1:student_steps=1"


def small(**changes: Any) -> dict[str, Any]:
    return config("local", "linear", 2, rounds=1, **changes)


def test_unexpected_exception_fails_the_run_with_a_traceback_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "run_prepared", Mock(side_effect=ZeroDivisionError("a defect")))
    log = tmp_path / "run" / "log.txt"

    with pytest.raises(RunFailedError) as caught:
        jobs.run_job(small(), [], log.parent)

    assert str(caught.value) == f"ZeroDivisionError: a defect (see {log})"
    assert log.read_text().startswith("Traceback")


@pytest.mark.slow
@each_case(
    ("method", "changes"),
    [
        (DENSE, {}),
        ("fedasync", {}),
        ("fedavg", {"privacy": {"unit": "record", "target_epsilon": 8.0}}),
    ],
)
def test_derived_settings_do_not_differ(
    method: str, changes: dict[str, Any], tmp_path: Path, in_process: list[str]
) -> None:
    # The second comparison finds the student, mode or noise that the first derived.
    for seeds in ([0], [0, 1]):
        runs = compare(small(**changes), [method], seeds, out=tmp_path / "out").path / "runs"

    assert len(list(runs.iterdir())) == 2
    if method == DENSE:
        # As if the first run had been made with another student.
        other = f"{DENSE}:student=site_2"
        first, renamed = (
            Job.in_folder(runs, Variant.parse(each), (), 0).out for each in (DENSE, other)
        )
        first.rename(renamed)
        with pytest.raises(UserError, match=r"algorithm\.student: was 'site_1', is now 'site_2'"):
            compare(small(), [other], [0], out=tmp_path / "out")


def test_names_of_run_folders_are_unique_and_short(tmp_path: Path) -> None:
    variant = Variant.parse("hybrid:teacher=mean")

    def name_of(point: tuple[str, ...], seed: int) -> str:
        return Job.in_folder(tmp_path, variant, point, seed).out.name

    assert name_of(("seeds=[1,2]",), 3) == "hybrid_teacher=mean-seeds=_1_2_-seed3"
    points = [tuple(f"algorithm.setting_{i}={value}" for i in range(20)) for value in (1, 2)]
    long = {name_of(point, seed) for point in points for seed in (0, 1)}
    assert len(long) == 4
    assert max(map(len, long)) < 220


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_process_fails_only_its_run(tmp_path: Path) -> None:
    killed = "python:tests.support.failing_methods:Killed"
    methods = [killed, "local", "python:tests.support.failing_methods:Warns"]

    with pytest.warns(UserWarning, match="few rows"), pytest.raises(RunFailedError) as caught:
        compare(small(), methods, out=tmp_path / "out", jobs=2, overrides=["rounds=2"])

    assert str(caught.value).splitlines() == [
        "1 of 3 runs failed",
        f"{killed} seed 0: its process was killed, possibly for lack of memory; run the command "
        "again to continue",
    ]
    for name in methods[1:]:
        directory = RunDirectory(tmp_path / "out" / "runs" / f"{name.replace(':', '_')}-seed0")
        assert directory.finished
        assert "serial executor: one core" in (directory.path / "log.txt").read_text()


@pytest.mark.parametrize("call", [run, compare])
def test_worker_that_imports_the_script_exits(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as exited:
        call(small(), out=tmp_path / "a", **({"algorithms": "local"} if call is compare else {}))
    assert exited.value.code == UNGUARDED and not (tmp_path / "a").exists()


UNGUARDED_SCRIPT = f"""
import hetero_fl
hetero_fl.compare({small()!r}, 'local', [0, 1], out='out', jobs=2)
"""


@pytest.mark.slow
def test_script_without_main_guard_raises_one_error_unless_from_standard_input(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED_SCRIPT)
    other = tmp_path / "other"
    other.mkdir()

    runs = [("script.py", tmp_path, None), ("-", other, UNGUARDED_SCRIPT)]
    completed, from_input = (
        subprocess.run(
            [sys.executable, script],
            input=standard_input,
            check=False,
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        for script, folder, standard_input in runs
    )

    assert completed.returncode == 1 and completed.stderr.count("Traceback") == 1
    line = completed.stderr.splitlines()[-1]
    assert line.startswith("hetero_fl.utils.errors.UserError: worker processes import")
    assert "if __name__ == '__main__':" in line
    assert from_input.returncode == 0, from_input.stderr
    assert RunDirectory(other / "out/runs/local-seed1").finished


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals to a group of processes")
def test_interrupted_comparison_prints_its_command(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(small()))
    script = os.path.relpath(ROOT / "scripts" / "compare.py", tmp_path)
    command = [
        "--config",
        "c.yaml",
        "--algorithms",
        "local",
        "--seeds",
        "0,1",
        "--out",
        "out",
        "--jobs",
        "2",
    ]
    long = [*command, "rounds=100000"]
    # in the background, SIGINT may be ignored
    process = subprocess.Popen(
        [sys.executable, script, *long],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 (sets a handler only)
    )
    deadline = time.monotonic() + TIMEOUT
    while len(list(tmp_path.glob("out/runs/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    # like Ctrl-C in a terminal
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert (
        stderr.splitlines()[-1]
        == f"interrupted; to resume: {sys.executable} {script} {' '.join(long)}"
    )
    for folder in (tmp_path / "out" / "runs").iterdir():
        with lock_folder(folder):  # no process uses the folder any more
            pass


def compared(folder: Path, *flags: str) -> int:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(small()))
    arguments = [
        "--config",
        str(file),
        "--algorithms",
        "local,fedavg",
        "--out",
        str(folder / "out"),
        "--jobs",
        "1",
    ]
    return main([*arguments, *flags], command="compare")


def test_compare_shows_scores_and_remaining_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = r"local test: balanced accuracy \d+\.\d%.*; global test: balanced accuracy \d+\.\d%.*"

    assert compared(tmp_path) == 0
    first, last, report = capsys.readouterr().err.splitlines()[-3:]
    assert report == f"details, pictures and runs: {tmp_path / 'out' / 'report.html'}"
    assert re.fullmatch(rf"1/2 local seed 0: {figures} \(about [\d.]+ s left\)", first)
    assert re.fullmatch(rf"2/2 fedavg seed 0: {figures}", last) and "left" not in last
    logged = (tmp_path / "out" / "log.txt").read_text()
    assert first in logged and last in logged

    assert compared(tmp_path, "--algorithms", "local") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("1/1")]
    assert (
        re.fullmatch(rf"1/1 local seed 0 \(finished before\): {figures}", line)
        and "left" not in line
    )


def test_compare_ends_with_a_line_for_each_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["clients.defaults.optimizer.lr=1e30", "runtime.divergence=stop"]

    assert compared(tmp_path, *diverging) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-3] == "failed: 2 of 2 runs failed"
    assert [line.partition(": ")[0] for line in lines[-2:]] == ["local seed 0", "fedavg seed 0"]
    assert captured.out == "" and "Traceback" not in captured.err
    assert "was killed" not in captured.err
    assert [line for line in lines if line.startswith("2/2 fedavg seed 0: failed: ")]

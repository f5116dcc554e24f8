"""The GPU suite: dry form, resuming, and parts that fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import PARTS, Outcome, Setting, format_part, main, run_parts

DRY = Setting(is_dry=True, pairs=1)


def test_part_is_measured_once_in_a_folder_of_its_form(tmp_path: Path) -> None:
    assert run_parts(["vectorized_mlp"], DRY, tmp_path, minutes=9) == {}

    file = tmp_path / "vectorized_mlp.json"
    part = json.loads(file.read_text("utf-8"))
    assert set(part["seconds"]) == {"serial", "vectorized"}
    assert format_part("vectorized_mlp", part) in (tmp_path / "table.md").read_text("utf-8")
    gpu_suite.check_folder(tmp_path, is_dry=True)
    with pytest.raises(SystemExit, match="holds figures of the dry form; give another folder"):
        gpu_suite.check_folder(tmp_path, is_dry=False)

    file.write_text("measured before", encoding="utf-8")
    assert run_parts(["vectorized_mlp"], DRY, tmp_path, minutes=9) == {}
    assert file.read_text("utf-8") == "measured before"


def test_part_exceeding_the_time_limit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 0.0, 400.0, 400.0])
    monkeypatch.setattr(gpu_suite, "now", lambda: next(times))
    monkeypatch.setattr(gpu_suite, "describe_machine", lambda is_dry: {"device": "a GPU"})
    for name in ("pfl_research", "htfllib"):
        monkeypatch.setitem(PARTS, name, (lambda setting: Outcome("fine"), 4))

    missing = run_parts(["pfl_research", "htfllib"], Setting(False), tmp_path, minutes=9)

    assert missing == {"htfllib": "takes 4 minutes, 2.3 were left"}


def test_table_shows_ratios_of_turns_and_failed_tests() -> None:
    measured = Outcome(
        "rounds",
        seconds={"serial": [1.0, 2.0, 4.0], "vectorized": [0.5, 0.2, 1.0]},
        targets=[("vectorized", "serial", 0.2)],
        details={"vectorized": {"kernels": 12}},
    )
    tested = Outcome(
        "tests",
        tests={"passed": 3, "failed": 1, "failures": ["test_it[a]"]},
        failures={"torch.compile": "no compiler"},
    )
    machine = {"machine": {"device": "a GPU"}}

    table = format_part("one", {**vars(measured), **machine})
    tests = format_part("two", {**vars(tested), **machine})

    row = next(line for line in table.splitlines() if line.startswith("| vectorized"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "0.5000 (0.2000 to 1.0000)",
        "0.25 (0.10 to 0.50)",
        "0.2 / serial",
        "12",
    ]
    assert "3 passed, 1 failed\n- failed: test_it[a]\n- failed: torch.compile: no compiler" in tests


def test_failed_part_does_not_stop_the_others_and_is_run_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Mock(side_effect=[ValueError("on purpose"), SystemExit("no module named pfl")])
    parts = Mock(pfl_research=failed, htfllib=Mock(return_value=Outcome("fine")))
    for name in ("pfl_research", "htfllib"):
        monkeypatch.setitem(PARTS, name, (getattr(parts, name), 1))

    first = run_parts(["pfl_research", "htfllib"], DRY, tmp_path, minutes=9)
    (tmp_path / "htfllib.json").unlink()
    second = run_parts(["pfl_research", "htfllib"], DRY, tmp_path, minutes=9)

    assert first == {"pfl_research": "failed: on purpose"}
    assert second == {"pfl_research": "failed: no module named pfl"}
    called = [name for name, _, _ in parts.mock_calls]
    assert called == ["pfl_research", "htfllib", "htfllib", "pfl_research"]
    assert [file.name for file in tmp_path.glob("*.json")] == ["htfllib.json"]


def test_part_is_interrupted_at_its_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), gpu_suite.time_limit(0.05):
        time.sleep(5)


@pytest.mark.slow
def test_every_part_has_a_working_dry_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry", "--out", str(tmp_path)])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 0, capsys.readouterr().out
    for name in PARTS:
        part = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        assert part["seconds"] or part["tests"]["failures"] == []
        assert name in (tmp_path / "table.md").read_text("utf-8")

"""The benchmark of the speed of rounds: cases, selection, and the printed ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import hetero_fl
from benchmarks.speed import speed
from benchmarks.speed.cases import AGAINST, CASES, CPU, CUDA, Images
from benchmarks.speed.contenders import Framework
from benchmarks.speed.speed import HERE, Result, against, describe, select

BY_NAME = {case.name: case for case in CASES}


def test_configurations_of_all_cases_are_valid(tmp_path: Path, subtests: pytest.Subtests) -> None:
    assert len(BY_NAME) == len(CASES)
    file = Images(20, side=8, channels=1).write(tmp_path / "images.npz")
    for case in CASES:
        with subtests.test(case=case.name):
            assert case.runs_with
            assert {name for pair in case.targets for name in pair} <= {
                *case.contenders,
                *case.rivals,
                # Targets of `auto` also apply to executors that a case leaves out.
                *("auto", "serial", "batched", "processes"),
                "bare loop",
            }
            for config in case.configs.values():
                data = {**config["data"], **(file if case.images else {})}
                hetero_fl.load_config({**config, "data": data}, allow_code=True)


def test_tasks_have_a_round_before_and_after_the_turns(tmp_path: Path) -> None:
    case = BY_NAME["overhead"]

    (task,) = case.tasks(3, tmp_path, {"device": "cuda"})

    assert (task["turns"], task["rounds"], task["config"]["rounds"]) == (3, 2, 8)
    assert task["config"]["runtime"] == {"executor": "serial", "threads": 1, "device": "cuda"}
    (whole,) = BY_NAME["runs_mlp_long"].tasks(3, tmp_path, {})
    assert (whole["rounds"], whole["config"]["rounds"]) == (0, 40)


def test_cases_are_selected_by_pattern_or_option() -> None:
    assert [case.name for case in select(["startup", "fedavg*"], CPU)] == [
        "fedavg_cifar_serial",
        "fedavg_cifar_processes",
        "startup",
    ]
    assert "vectorized_cnn" in {case.name for case in select([], CUDA)}
    assert "vectorized_cnn" not in {case.name for case in select([], CPU)}
    assert {case.name for case in select([], AGAINST)} >= {"every_method", "population"}
    with pytest.raises(SystemExit, match="no case matches 'fast'; choose from overhead, "):
        select(["fast"], CPU)


def test_commit_runs_the_settings_of_the_configuration(tmp_path: Path) -> None:
    case = against(BY_NAME["fedavg_cifar_processes"], tmp_path)

    commit, here = case.contenders.values()

    assert list(case.contenders) == ["commit", HERE]
    assert commit == Framework(tree=tmp_path) and here == Framework()


def test_ratios_are_medians_of_turns() -> None:
    case = BY_NAME["loops"]
    labels = list(case.configs)
    seconds = {"bare loop": [1.0, 2.0, 4.0], "serial": [1.1, 2.4, 4.0]}
    by_config = dict.fromkeys(labels, seconds)

    lines = describe(case, Result(seconds, by_config)).splitlines()

    assert lines[:3] == [
        "loops",
        "  bare loop: 2.000 (1.000 to 4.000) s",
        "  serial: 2.400 (1.100 to 4.000) s",
    ]
    ratio = "1.100 (1.000 to 1.200), 95% interval 1.000 to 1.200"
    assert lines[3] == f"  serial / bare loop: {ratio}; target 1.05: missed"
    assert lines[4].split(", ")[0].strip() == f"{labels[0]} 1.100" and len(lines) == 5


@pytest.mark.slow
def test_framework_and_loop_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seconds.json"
    monkeypatch.setattr(sys, "argv", ["speed", "overhead", "--quick", "--out", str(out)])

    speed.main()

    found = json.loads(out.read_text("utf-8"))["overhead"]["seconds"]
    assert list(found) == ["bare loop", "serial"]
    assert all(len(turns) == 1 and turns[0] > 0 for turns in found.values())
    assert "serial / bare loop: " in capsys.readouterr().out

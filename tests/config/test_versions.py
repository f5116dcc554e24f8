"""Versions of the configuration, and keys with former names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl import load_config
from hetero_fl.cli import main
from hetero_fl.config import describe_difference, resolve_config, resume_relevant
from tests.support.cases import each_case
from tests.support.federations import config


@each_case("raw", [{"rounds": 3}, {"rounds": 3, "version": 1}])
def test_version_is_optional_and_saved(raw: dict[str, Any]) -> None:
    config = load_config(raw)

    assert resolve_config(config)["version"] == 1
    assert load_config(resolve_config(config)) == config


def test_run_of_an_older_version_can_be_resumed() -> None:
    now = resolve_config(load_config({"rounds": 3}))
    before = {key: value for key, value in now.items() if key != "version"}

    assert describe_difference(resume_relevant(before), resume_relevant(now)) is None


DEPRECATED = {
    "algorithm.distil_epochs": (  # style: ok (former name)
        {"algorithm": {"name": "feddf", "distil_epochs": 2}},  # style: ok (former name)
        "algorithm.distill_epochs",
    ),
}


@pytest.mark.filterwarnings("default")
@each_case("key", DEPRECATED)
def test_command_and_log_show_a_deprecated_key_once(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, new = DEPRECATED[key]
    output = {"plots": False, "report": False}
    source = {**config(models="mlp", rounds=1), **written, "output": output}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(source), encoding="utf-8")

    assert main(["train", "-c", str(file), "--out", str(tmp_path / "run")]) == 0

    line = f"warning: {key}: deprecated; use {new}"
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert shown == [line]
    assert (tmp_path / "run" / "log.txt").read_text("utf-8").count(line) == 1

"""The programs in examples/."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.experiment import run
from hetero_fl.reporting.loggers import register_logger
from tests.support.federations import config

ROOT = Path(__file__).parents[2]


def test_own_logger_writes_each_evaluated_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(register_logger, "_known", dict(register_logger._known))
    loggers = [{"kind": "python:examples.own_logger:MarkdownLogger", "file": "lines.md"}]
    source = config("fedavg", rounds=3, evaluation__every=2, output__loggers=loggers)

    finished = run(source, out=tmp_path / "run", allow_code=True)

    lines = (finished.path / "lines.md").read_text(encoding="utf-8").splitlines()
    scores = [f"{finished.metrics[i]['global']['accuracy']:.3f}" for i in (1, 2)]
    assert lines[0] == "# small"
    assert lines[2:] == [
        f"- round 2: test/global/accuracy = {scores[0]}",
        f"- round 3: test/global/accuracy = {scores[1]}",
    ]

"""TensorBoard events contain the values of `metrics.jsonl`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hetero_fl.reporting.progress import log_record, writer_callback
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError


class Writer:
    """Record the scalars in memory."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.flushed = 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def flush(self) -> None:
        self.flushed += 1


def test_every_defined_metric_is_written(made_run: Callable[..., RunDirectory]) -> None:
    records, writer = (
        made_run(rounds=4, every=2, server=False, kind="multiclass", classes=10).metrics(),
        Writer(),
    )
    records[1]["personal"]["auroc"] = None
    for record in records:
        log_record(writer, record)
    found = writer.scalars
    assert found["test/global/auroc", 2] == records[1]["global"]["auroc"]
    assert found["validation/personal/loss", 4] == records[3]["validation"]["personal"]["loss"]
    assert found["communication/up_bytes", 3] == records[2]["up_bytes"]
    assert found["train/loss", 1] == pytest.approx(sum(records[0]["train_loss"].values()) / 6)
    assert ("test/global/auroc", 1) not in found and not any("server" in tag for tag, _ in found)
    assert ("test/personal/auroc", 2) not in found and ("test/personal/auroc_std", 2) in found
    assert None not in found.values() and writer.flushed == 4


def test_missing_tensorboard_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'hetero_fl\[tensorboard\]'"):
        writer_callback(tmp_path)
    assert not list(tmp_path.iterdir())


def test_events_are_written_with_tensorboard(made_run: Callable[..., RunDirectory]) -> None:
    pytest.importorskip("tensorboard")
    run = made_run(rounds=1)
    writer_callback(run.path)(run.metrics()[0])
    assert [p.stat().st_size > 500 for p in (run.path / "tensorboard").iterdir()] == [True]

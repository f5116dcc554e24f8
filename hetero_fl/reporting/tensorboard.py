"""The same figures as `metrics.jsonl`, for TensorBoard (the extra `hetero_fl[tensorboard]`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hetero_fl.errors import UserError


def writer_callback(run_dir: str | os.PathLike[str]) -> Callable[[Mapping[str, Any]], None]:
    """A callback that writes each round's record below the run's `tensorboard/`.

    Raises UserError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "output.tensorboard: TensorBoard is not installed; pip install 'hetero_fl[tensorboard]', or set it to false"
        ) from None
    return partial(log_record, SummaryWriter(str(Path(run_dir) / "tensorboard")))


def log_record(writer: Any, record: Mapping[str, Any]) -> None:
    """Write one round's record: every defined metric, the mean training loss, bytes and seconds."""
    step = record["round"]
    for reading in ("personal", "global", "server"):
        for scores, prefix in ((record, "test"), (record.get("validation") or {}, "validation")):
            for name, value in (scores.get(reading) or {}).items():
                if value is not None:
                    writer.add_scalar(f"{prefix}/{reading}/{name}", value, step)
    losses = list(record["train_loss"].values())
    if losses:
        writer.add_scalar("train/loss", sum(losses) / len(losses), step)
    for direction in ("up_bytes", "down_bytes"):
        writer.add_scalar(f"communication/{direction}", record[direction], step)
    for part, seconds in record["seconds"].items():
        writer.add_scalar(f"seconds/{part}", seconds, step)
    writer.flush()

"""Readers for the files of loggers."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL = 1
LAST = 4


def read_finished_wandb_run(path: Path, seconds: float = 30) -> list[Any]:
    """Return the records in a `.wandb` file when the file is complete.

    The process that writes the file may end a little later than the run.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        records = read_wandb_records(path)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} is not complete")


def read_wandb_records(path: Path) -> list[Any]:
    """Return the records in a `.wandb` file, which has the format of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    if not content:
        return []
    assert content[:4] == b":W&B"
    records = []
    position = 7
    parts: list[bytes] = []
    while position + HEADER.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _checksum, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        parts.append(content[position : position + length])
        position += length
        # A record that is being written is incomplete.
        if kind in (FULL, LAST) and position <= len(content):
            record = Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records

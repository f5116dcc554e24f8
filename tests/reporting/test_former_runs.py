"""Run directories of version 0.2, whose files have other keys, are read as the current ones."""

from __future__ import annotations

import json
from pathlib import Path

from hetero_fl.reporting.run_directory import RunDirectory


def test_keys_of_former_records_are_renamed(tmp_path: Path) -> None:
    record = {"round": 1, "unread": {"unread": "lost"}, "anew": ["anew"]}  # style: ok (former name)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    (found,) = RunDirectory(tmp_path).metrics()

    # Ids of clients are kept.
    renamed = {"absent": {"unread": "lost"}, "reset": ["anew"]}  # style: ok (ids of clients)
    assert found == {"round": 1, **renamed}

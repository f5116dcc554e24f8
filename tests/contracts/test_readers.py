"""Every reader gives the rows, labels and remarks that `readers.yaml` records for its fixtures.

`python -m tests.contracts.test_readers` writes the file again. A change of it is a change of the
data of users, which the changelog names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.reader_cases import CASES, read

RECORD = Path(__file__).with_name("readers.yaml")


def test_readers_find_what_is_recorded(tmp_path: Path, subtests: pytest.Subtests) -> None:
    recorded = yaml.safe_load(RECORD.read_text())
    assert list(recorded) == list(CASES)
    for number, name in enumerate(CASES):
        if name.startswith("hub"):
            pytest.importorskip("datasets")
        folder = tmp_path / str(number)
        folder.mkdir()
        with subtests.test(name=name):
            assert read(name, folder) == recorded[name]


def write() -> None:
    """Record what the readers find."""
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = read(name, Path(folder))
    RECORD.write_text(yaml.safe_dump(found, sort_keys=False, width=100, allow_unicode=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()

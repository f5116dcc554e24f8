"""Atomic writes: complete or not at all, with the permissions of the umask."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl.utils.serialization import write_atomically


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "deep" / "a.bin", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "a.bin").stat().st_mode & 0o777 == 0o644


def test_temporary_file_of_killed_process_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.tmp").write_bytes(b"half of someth")
    write_atomically(tmp_path / "a.bin", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"new"}


def test_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.bin", b"old")

    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "a.bin", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"old"}

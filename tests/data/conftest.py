"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetero_fl.config.data import registered_partition_kinds
from hetero_fl.data import Dataset, make_images, register_partition
from tests.support.file_server import serve


@pytest.fixture
def npz(tmp_path: Path) -> Any:
    """Return a function that writes a MedMNIST file; arguments replace arrays, None omits one."""

    def write(name: str = "set.npz", **changes: Any) -> Path:
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {}
        for split, rows in (("train", 30), ("val", 6), ("test", 9)):
            arrays[f"{split}_images"] = rng.integers(0, 256, (rows, 8, 8), dtype=np.uint8)
            arrays[f"{split}_labels"] = (np.arange(rows) % 2).astype(np.uint8)[:, None]
        arrays |= changes
        np.savez(tmp_path / name, **{k: v for k, v in arrays.items() if v is not None})
        return tmp_path / name

    return write


@pytest.fixture
def images() -> Dataset:
    return make_images(400, 60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Return the address of a server and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serve(folder) as address:
        yield address, folder


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the kinds of partition that a test registers."""
    before = set(registered_partition_kinds)
    monkeypatch.setattr(register_partition, "_known", dict(register_partition._known))
    yield
    registered_partition_kinds.intersection_update(before)

"""The newcomer data set of benchmarks/science/newcomer_set.py excludes embedded images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "science" / "newcomer_set.py"
EMBEDDED = Path(__file__).parents[2] / "hetero_fl" / "data" / "embedded" / "chest_xray.npz"


@pytest.mark.slow
def test_embedded_images_are_excluded(tmp_path: Path) -> None:
    with np.load(EMBEDDED) as archive:
        embedded = dict(archive)
    draws = np.random.default_rng(0)
    new = {
        s: draws.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for s, n in (("train", 9), ("val", 4), ("test", 2))
    }
    labels = {s: draws.integers(0, 2, (len(x), 1), dtype=np.uint8) for s, x in new.items()}
    arrays = {}
    # Embedded images may be in another split.
    for s, other in (("train", "val"), ("val", "test"), ("test", "train")):
        order = draws.permutation(len(new[s]) + 20)
        known = np.flatnonzero(order < 20)
        for part, fresh in (("images", new[s]), ("labels", labels[s])):
            rows = np.empty((len(order), *fresh.shape[1:]), np.uint8)
            rows[known], rows[order >= 20] = embedded[f"{other}_{part}"][:20], fresh
            arrays[f"{s}_{part}"] = rows
    np.savez(tmp_path / "whole.npz", **arrays)
    command = [
        sys.executable,
        str(SCRIPT),
        "--data",
        str(tmp_path / "whole.npz"),
        "--out",
        str(tmp_path / "new.npz"),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with np.load(tmp_path / "new.npz") as result:
        assert set(result) == {"train_images", "train_labels"}
        assert np.array_equal(result["train_images"], np.concatenate(list(new.values())))
        assert np.array_equal(result["train_labels"], np.concatenate(list(labels.values())))
    assert "15 images" in output

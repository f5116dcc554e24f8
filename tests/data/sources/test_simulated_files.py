"""Simulated data that come with the package: their rows, their size and their description."""

from __future__ import annotations

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from hetero_fl.data import Dataset
from hetero_fl.data.sources.files import EMBEDDED
from tests.support.federated_data import read_source

REAL = ("chest_xray.npz", "digits.npz")
ROWS = {
    "activity": "26bea7119c19ccbe",
    "bank_fraud": "95026822f5d48b29",
    "driving": "af5e9f47f3005c6b",
    "driving_public": "a34c19608e23802f",
    "movies": "8e06232cad5a3ed5",
    "movies_public": "60435b7c9187e925",
    "phrases": "5a2e8f97579e0d1a",
    "phrases_public": "6830920fd46120dd",
    "speech": "99ddaf32d102f397",
    "speech_public": "515cdbcb61f93c3a",
    "traffic": "1c789db85408ef7b",
    "xray_genes": "4732de7a893e1f97",
}
"""SHA-256 hash of the inputs and targets of all sets, shortened, which results quote."""


def hash_of(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for part in (*dataset.splits().values(), *dataset.local_sets.values()):
        for column in (part.x, part.labels):
            digest.update(np.ascontiguousarray(column.numpy()).tobytes())
    return digest.hexdigest()[:16]


def test_rows_are_those_of_published_results(subtests: pytest.Subtests) -> None:
    for name, expected in ROWS.items():
        with subtests.test(name=name):
            dataset = read_source(name)
            assert dataset.simulated and hash_of(dataset) == expected


def test_bank_rows_have_the_columns_of_their_bank() -> None:
    train = read_source("bank_fraud").train
    x = train.x

    assert train.group is not None and train.group.bincount().tolist() == [
        2400,
        900,
        1800,
        700,
        2000,
        1000,
    ]
    gaps = [x[train.group == bank].isnan().double().mean(0) for bank in range(6)]
    for bank, gap in enumerate(gaps):
        own = slice(8 + 3 * (bank // 2), 11 + 3 * (bank // 2))
        # Some customers do not use the service of the bank.
        assert not gap[:8].any() and bool(((gap[own] > 0.1) & (gap[own] < 0.2)).all())
        # The bank lacks the columns of other kinds of banks.
        assert int((gap == 1).sum()) == 6


def test_files_are_small_and_described() -> None:
    readme = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(EMBEDDED.rglob("*.*")):
            if file.suffix != ".md" and file.name not in REAL:
                archive.write(file, file.relative_to(EMBEDDED))

    assert len(packed.getvalue()) <= 10_000_000
    names = {path.name for path in EMBEDDED.iterdir() if not path.name.endswith(".md")}
    assert [name for name in sorted(names) if f"`{name}" not in readme] == []


def test_package_contains_the_files() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"data/embedded/*"' in project and '"data/embedded/*/*"' in project

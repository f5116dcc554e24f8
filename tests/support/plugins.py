"""Installed packages with entry points, as folders that `importlib.metadata` finds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: Mapping[str, Mapping[str, str]],
    code: str = "",
    package: str = "other_package",
) -> None:
    """Make a package with entry points importable until the end of the test.

    Args:
        folder: Folder for the package.
        monkeypatch: Fixture that undoes the installation.
        groups: References by name, keyed by group, such as `{"hetero_fl.models": {"tiny": "m:C"}}`.
        code: Source of the module `<package>.py`.
        package: Name of the package and its module.
    """
    (folder / f"{package}.py").write_text(code, encoding="utf-8")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8"
    )
    lines = []
    for group, references in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in references.items())]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()

"""Checks of folders and the files in them."""

from __future__ import annotations

import os
from pathlib import Path

from hetero_fl.utils.errors import UserError


def check_folder(path: Path) -> None:
    """Check that a folder exists.

    Raises:
        UserError: If the folder does not exist or is a file.
    """
    if path.is_file():
        raise UserError(f"path: {path}: expected a folder, got a file; give its folder")
    if not path.is_dir():
        raise UserError(f"path: folder '{path}' not found")


def contains_file(folder: Path, name: str) -> bool:
    """Return whether a file exists. The name may be one that no file can have."""
    # `Path.is_file` raises OSError if a name is too long.
    return os.path.isfile(folder / name)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted files of a folder whose names do not start with a dot."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))

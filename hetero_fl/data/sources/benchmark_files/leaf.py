"""JSON files of LEAF (Caldas et al., arXiv:1812.01097), such as FEMNIST and Shakespeare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import FIRST, UNKNOWN, Dataset, Vocabulary
from hetero_fl.data.labels import class_numbers
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.benchmark_files.client_sets import (
    SPLITS,
    build_clients,
)
from hetero_fl.data.sources.files import check_folder, visible_files
from hetero_fl.data.table import Table
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import read_json
from hetero_fl.utils.text import format_list, pluralize

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Ends of the inputs of CelebA, which are names of files."""
SIDE = 28
"""Height and width of the images of FEMNIST, which are saved as flat lists."""
FEMNIST_CLASSES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF's Shakespeare, in the order of its classes."""
READABLE_SETS = "; of the data sets of LEAF, FEMNIST, Shakespeare and Synthetic are read"
"""End of the error messages on inputs of other data sets of LEAF."""
CHARACTERS = Vocabulary(tuple({"\n": "newline", " ": "space"}.get(c, c) for c in LETTERS))


@register_source("leaf", keys=("path",), folder_files=("train/*.json",))
def leaf(config: SourceConfig, _root: Path) -> Dataset:
    """Load a folder of LEAF's JSON files (see `read_leaf_folder`)."""
    return read_leaf_folder(Path(str(config.path)).expanduser())


def read_leaf_folder(path: Path) -> Dataset:
    """Read a folder of LEAF's JSON files.

    The folder contains `train/*.json` and, optionally, `test/*.json` with the keys `users` and
    `user_data: {USER: {x, y}}`. The inputs x of a user are one of the following:

    - Lists of numbers with class numbers y. Lists of 784 numbers are images of 28x28 pixels. If a
      label exceeds 9, the classes are the 62 of FEMNIST.
    - Texts of the same length with a character each as y, as in Shakespeare. The characters become
      tokens. Characters other than the 80 of LEAF are unknown, and never targets.

    Args:
        path: Folder to read.

    Returns:
        A data set whose groups are the users. The test rows of users who are in both folders, as
        with LEAF's option `-t sample`, are also a local set.

    Raises:
        UserError: If a file is missing or malformed.
    """
    check_folder(path)
    files = {split: visible_files(path / split, "*.json") for split in SPLITS}
    if not files["train"]:
        raise UserError(f"path: {path}: expected files train/*.json, found none")
    tables: list[Table] = []
    notes: list[str] = []
    for split in SPLITS:
        seen: set[str] = set()
        unknown: dict[str, int] = {}
        for file in files[split]:
            content = _read_users(file)
            for user in list(content):
                title = one_line(user)
                where = f"path: {file}: user '{title}'"
                if title in seen:
                    raise UserError(f"{where}: occurs twice in {split}")
                seen.add(title)
                # Removed from the content, whose lists need much more memory than arrays.
                user_rows = content.pop(user)
                x, y = _read_rows(user_rows, where)
                tables.append(Table(x, y, split, where, ExampleNames(in_config=True), user))
                if left_out := len(user_rows["x"]) - len(y):
                    unknown[one_line(user, 80)] = left_out
        if unknown:
            notes.append(
                f"{split}: {pluralize(sum(unknown.values()), 'row')} left out, whose next "
                f"character is unknown, of {format_list(unknown, quote=True)}"
            )
    is_text = any(table.x.dtype == torch.int64 for table in tables if len(table.y))
    return build_clients(
        "leaf",
        tables,
        _known_task(tables, is_text),
        path,
        noun="user",
        notes=notes,
        about=f"LEAF files of {sum(t.split == 'train' for t in tables):,} users in {path.name}",
        vocabulary=CHARACTERS if is_text else None,
    )


def _known_task(tables: Sequence[Table], is_text: bool) -> Task | None:
    """Return the task of Shakespeare or FEMNIST, or None for other data sets."""
    names = CHARACTERS.names if is_text else FEMNIST_CLASSES
    if not is_text:
        largest = max((int(table.y.max()) for table in tables if len(table.y)), default=0)
        is_image = any(table.x.ndim == 4 for table in tables)
        if not is_image or not 10 <= largest < len(FEMNIST_CLASSES):
            return None
    return Task("multiclass", len(names), names)


def _read_users(path: Path) -> dict[str, Any]:
    """Return the rows of the users in a file, keyed by user."""
    where = f"path: {path}"
    try:
        content = read_json(path.read_bytes(), bounded=False)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a readable JSON file ({one_line(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("user_data"), dict):
        raise UserError(f"{where}: expected the keys users and user_data: {{USER: {{x, y}}}}")
    user_data: dict[str, Any] = content["user_data"]
    users = content.get("users", list(user_data))
    if not isinstance(users, list) or not all(isinstance(user, str) for user in users):
        raise UserError(f"{where}: users: expected a list of names, got {one_line(users, 80)}")
    for user in users:
        if user not in user_data:
            raise UserError(f"{where}: user '{one_line(user)}' of users not found in user_data")
    return user_data


def _read_rows(user_rows: object, where: str) -> tuple[Tensor, np.ndarray]:
    """Return the inputs and class numbers of a user, who may have no rows."""
    if not isinstance(user_rows, dict):
        raise UserError(f"{where}: expected the keys x and y, got {one_line(user_rows, 80)}")
    for key in ("x", "y"):
        if not isinstance(user_rows.get(key), list):
            raise UserError(f"{where}: {key}: expected a list with an entry for each row")
    x = user_rows["x"]
    y = user_rows["y"]
    if len(x) != len(y):
        raise UserError(f"{where}: y: expected {len(x)} rows as in x, got {len(y)}")
    if not x:
        return torch.empty(0), np.empty(0, dtype=np.int64)
    if isinstance(x[0], str):
        return _read_texts(x, y, where)
    inputs = torch.from_numpy(_numbers(x, 2, f"{where}: x").astype(np.float32))
    if inputs.shape[1] == SIDE * SIDE:
        inputs = inputs.reshape(-1, 1, SIDE, SIDE)
    labels = class_numbers(_numbers(y, 1, f"{where}: y"), f"{where}: y")
    return inputs, labels.numpy()


def _numbers(values: list[Any], ndim: int, where: str) -> np.ndarray:
    """Return numbers `[N]` or lists of numbers `[N, D]` as an array."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.empty(0, dtype=object)
    if array.ndim == ndim and array.dtype.kind in "iuf" and 0 not in array.shape:
        return array
    length = len(values[0]) if isinstance(values[0], list) else 1
    expected = "a number" if ndim == 1 else f"a list of {pluralize(length, 'number')}"
    for row, value in enumerate(values):
        cells = value if ndim == 2 else [value]
        is_list = isinstance(cells, list) and len(cells) == length > 0
        if not is_list or not all(type(cell) in (int, float) for cell in cells):
            raise UserError(
                f"{where}: row {row}: expected {expected}, got {_quote(value)}{READABLE_SETS}"
            )
    raise UserError(f"{where}: expected numbers of at most 64 bits")


def _quote(value: object) -> str:
    return one_line(repr(value) if isinstance(value, str) else value, 80)


def _read_texts(texts: list[Any], targets: list[Any], where: str) -> tuple[Tensor, np.ndarray]:
    """Convert texts and their next characters to tokens and classes, without unknown targets."""
    length = len(texts[0])
    if str(texts[0]).lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"{where}: x: row 0: got the image file {_quote(texts[0])}{READABLE_SETS}")
    for row, (text, target) in enumerate(zip(texts, targets, strict=True)):
        if not isinstance(text, str) or len(text) != length or length == 0:
            raise UserError(
                f"{where}: x: row {row}: expected a text of {length or 'some'} characters as in "
                f"row 0, got {one_line(repr(text), 80)}"
            )
        if not isinstance(target, str) or len(target) != 1:
            raise UserError(
                f"{where}: y: row {row}: expected the character that follows the text, got "
                f"{one_line(repr(target), 80)}"
            )
    numbers = {character: FIRST + i for i, character in enumerate(LETTERS)}
    known = [row for row, target in enumerate(targets) if target in numbers]
    tokens = [[numbers.get(c, UNKNOWN) for c in texts[row]] for row in known]
    y = np.array([numbers[targets[row]] - FIRST for row in known], dtype=np.int64)
    return torch.tensor(tokens, dtype=torch.int64).reshape(-1, length), y

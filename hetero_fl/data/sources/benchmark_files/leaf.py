"""JSON files of LEAF (Caldas et al., arXiv:1812.01097), such as FEMNIST and Shakespeare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.stored_rows import Column
from hetero_fl.core.task import Task
from hetero_fl.data.checks import check_examples
from hetero_fl.data.dataset import FIRST, UNKNOWN, Dataset, Examples, Vocabulary
from hetero_fl.data.labels import class_numbers
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.benchmark_files.client_sets import (
    SPLITS,
    client_dataset,
    read_classes,
)
from hetero_fl.data.sources.files import check_folder, visible_files
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
    rows: dict[str, dict[str, Examples]] = {split: {} for split in SPLITS}
    places: dict[tuple[str, str], str] = {}
    notes: list[str] = []
    for split in SPLITS:
        unknown: dict[str, int] = {}
        for file in files[split]:
            content = _read_users(file)
            for user in list(content):
                where = f"path: {file}: user '{one_line(user)}'"
                if user in rows[split]:
                    raise UserError(f"{where}: occurs twice in {split}")
                # Removed from the content, whose lists need much more memory than arrays.
                user_rows = content.pop(user)
                rows[split][user] = _user_examples(user_rows, where)
                places[split, user] = where
                if left_out := len(user_rows["x"]) - len(rows[split][user]):
                    unknown[one_line(user, 80)] = left_out
        if unknown:
            notes.append(
                f"{split}: {pluralize(sum(unknown.values()), 'row')} left out, whose next "
                f"character is unknown, of {format_list(unknown, quote=True)}"
            )
    return _leaf_dataset(path, rows, places, notes)


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


def _user_examples(user_rows: object, where: str) -> Examples:
    """Convert the lists x and y of a user. A user may have no rows."""
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
        return Examples(torch.empty(0), torch.empty(0, dtype=torch.int64))
    if isinstance(x[0], str):
        return _text_examples(x, y, where)
    values = _numbers(x, 2, f"{where}: x").astype(np.float32)
    labels = class_numbers(_numbers(y, 1, f"{where}: y"), f"{where}: y")
    inputs = torch.from_numpy(values)
    if inputs.shape[1] == SIDE * SIDE:
        inputs = inputs.reshape(-1, 1, SIDE, SIDE)
    return Examples(inputs, labels)


def _numbers(values: list[Any], ndim: int, where: str) -> np.ndarray:
    """Return numbers `[N]` or lists of numbers `[N, D]` as an array."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.empty(0, dtype=object)
    if array.ndim != ndim or array.dtype.kind not in "iuf" or 0 in array.shape:
        length = len(values[0]) if isinstance(values[0], list) else 0
        for row, value in enumerate(values):
            problem = _number_problem(value) if ndim == 1 else _row_problem(value, length)
            if problem:
                raise UserError(f"{where}: row {row}: {problem}")
        raise UserError(f"{where}: expected numbers of at most 64 bits")
    return array


def _row_problem(value: object, length: int) -> str:
    """Return what is wrong with a row, which should be a list of numbers, or an empty string."""
    if not isinstance(value, list) or not value:
        return f"expected {length or 'a list of'} numbers, got {_quote(value)}"
    if len(value) != length:
        return f"expected {length} numbers, got {len(value)}"
    return next(filter(None, map(_number_problem, value)), "")


def _number_problem(value: object) -> str:
    """Return what is wrong with a number, or an empty string."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return ""
    other = READABLE_SETS if isinstance(value, str | list) else ""
    return f"expected a number, got {_quote(value)}{other}"


def _quote(value: object) -> str:
    return one_line(repr(value) if isinstance(value, str) else value, 80)


def _text_examples(texts: list[Any], targets: list[Any], where: str) -> Examples:
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
    return Examples(
        torch.tensor(tokens, dtype=torch.int64).reshape(-1, length),
        torch.tensor([numbers[targets[row]] - FIRST for row in known], dtype=torch.int64),
    )


def _leaf_dataset(
    path: Path,
    rows: Mapping[str, dict[str, Examples]],
    places: Mapping[tuple[str, str], str],
    notes: Sequence[str],
) -> Dataset:
    """Return the data set of the rows of all users.

    Args:
        path: Folder, for the description and error messages.
        rows: Rows, keyed by split and user.
        places: File and user in error messages, keyed by split and user.
        notes: Remarks on how the rows were read.
    """
    present = {
        (split, user): part for split in SPLITS for user, part in rows[split].items() if len(part)
    }
    if not any(split == "train" for split, _ in present):
        raise UserError(f"path: {path}: no user in train has rows")
    first = next(iter(present.values()))
    for key, part in present.items():
        if (part.x.shape[1:], part.x.dtype) != (first.x.shape[1:], first.x.dtype):
            raise UserError(
                f"{places[key]}: x: expected rows of {_describe_row(first.x)} as for the first "
                f"user, got {_describe_row(part.x)}"
            )
    is_text = first.x.dtype == torch.int64
    if is_text:
        task = Task("multiclass", len(CHARACTERS.names), CHARACTERS.names)
    else:
        largest = max(int(part.labels.max()) for part in present.values())
        is_femnist = first.x.ndim == 4 and 10 <= largest < len(FEMNIST_CLASSES)
        task = Task("multiclass", len(FEMNIST_CLASSES), FEMNIST_CLASSES)
        if not is_femnist:
            parts = {places[key]: part for key, part in present.items()}
            task, parts, remarks = read_classes(parts, f"path: {path}: y")
            present = {key: parts[places[key]] for key in present}
            notes = [*notes, *remarks]
    vocabulary = CHARACTERS if is_text else None
    for (split, user), part in present.items():
        check_examples(part, task, places[split, user], vocabulary=vocabulary)
        rows[split][user] = part
    return client_dataset(
        "leaf",
        task,
        rows,
        noun="user",
        notes=notes,
        about=f"LEAF files of {len(rows['train']):,} users in {path.name}",
        vocabulary=vocabulary,
    )


def _describe_row(x: Column) -> str:
    kind = "characters" if x.dtype == torch.int64 else "numbers"
    return f"{math.prod(x.shape[1:])} {kind}"

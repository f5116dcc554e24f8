"""Folders with the rows of natural clients: of PFLlib and HtFLlib, and of LEAF.

LEAF (Caldas et al., arXiv:1812.01097) has JSON files, such as those of FEMNIST and Shakespeare.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.images import as_numbers, as_pixels
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames, first_true
from hetero_fl.data.dataset import FIRST, UNKNOWN, Dataset, Vocabulary
from hetero_fl.data.labels import class_numbers
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.benchmark_files.pickled_arrays import (
    PickledArray,
    UnpicklingError,
    load_pickled_arrays,
)
from hetero_fl.data.sources.files import check_folder, visible_files
from hetero_fl.data.sources.npz_files import check_headers, read_header
from hetero_fl.data.table import Table, build
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import check_memory, read_json
from hetero_fl.utils.text import format_list, pluralize, prefix_note

SPLITS = ("train", "test")
"""Splits of the rows of each client, which are also names of folders."""
MAX_CLASSES = 10_000
"""Maximum number of classes. Larger class numbers are probably not class numbers."""
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


@register_source("htfllib", keys=("path",), folder_files=("train/*.npz",))
def htfllib(config: SourceConfig, _root: Path) -> Dataset:
    """Load a folder of client files as written by PFLlib and HtFLlib (see `read_client_folder`)."""
    return read_client_folder(Path(str(config.path)).expanduser())


def read_client_folder(path: Path) -> Dataset:
    """Read a folder of client files as written by PFLlib and HtFLlib.

    The folder contains `train/K.npz` and `test/K.npz` for each client K. A file contains a pickled
    dictionary `data` or, alternatively, arrays, with the keys `x` (images `[N, C, H, W]` or
    floats `[N, D]`) and `y` (class numbers `[N]`). The values of x are not rescaled. The number of
    classes is `num_classes` of `config.json`, if this file exists. Otherwise, the classes are the
    distinct labels. No code of the pickle is run.

    Args:
        path: Folder to read.

    Returns:
        A data set whose groups are the clients, with the test rows of each client as a local set.

    Raises:
        UserError: If a file is missing or malformed, or the files do not match.
    """
    names = _client_names(path)
    tables = [_read_client(path, split, name) for split in SPLITS for name in names]
    classes = _configured_classes(path / "config.json")
    return build_clients(
        "htfllib",
        tables,
        None if classes is None else Task("multiclass", classes),
        path,
        noun="client",
        about=f"files of {len(names)} clients in {path.name}",
    )


def _client_names(path: Path) -> list[str]:
    """Return the names of the clients in natural order, which must be the same in both folders."""
    check_folder(path)
    found = {}
    for split in SPLITS:
        if not (path / split).is_dir():
            raise UserError(
                f"path: {path}: folder '{split}' not found; expected train/K.npz and test/K.npz "
                "for each client K"
            )
        found[split] = {file.stem for file in visible_files(path / split, "*.npz")}
    if not found["train"]:
        raise UserError(f"path: {path / 'train'}: expected files K.npz, found none")
    if missing := natural_order(found["train"] ^ found["test"]):
        split = "test" if missing[0] in found["train"] else "train"
        raise UserError(
            f"path: {path}: file '{split}/{missing[0]}.npz' not found, but the client has a file "
            f"in {'train' if split == 'test' else 'test'}"
        )
    return natural_order(found["train"])


def _configured_classes(path: Path) -> int | None:
    """Return `num_classes` of a `config.json`, or None if there is no such file or key."""
    if not path.is_file():
        return None
    content = _read_json(path)
    classes = content.get("num_classes") if isinstance(content, dict) else None
    if classes is None:
        return None
    if not isinstance(classes, int) or not 2 <= classes <= MAX_CLASSES:
        raise UserError(
            f"path: {path}: num_classes: expected an integer from 2 to {MAX_CLASSES:,}, got "
            f"{one_line(repr(classes) if isinstance(classes, str) else classes, 80)}"
        )
    return classes


def _read_client(folder: Path, split: str, client: str) -> Table:
    """Read the rows of a client, of which there may be none."""
    path = folder / split / f"{client}.npz"
    where = f"path: {path}"
    if path.is_dir():
        raise UserError(f"{where}: expected a file, got a folder")
    try:
        content = _read_content(path)
    except UserError:
        raise
    except Exception as error:
        # pickle, zipfile and numpy raise many kinds of errors for a damaged file.
        readable = isinstance(error, zipfile.BadZipFile | UnpicklingError | ValueError)
        reason = one_line(error, 200) if readable else "the content is damaged"
        reason = error.strerror or reason if isinstance(error, OSError) else reason
        raise UserError(f"{where}: not a readable client file ({reason})") from error
    y = content["y"][:, 0] if content["y"].shape[1:] == (1,) else content["y"]
    if y.ndim != 1:
        raise UserError(f"{where}: y: expected class numbers of shape (N,), got {y.shape}")
    x = _inputs(content["x"], f"{where}: x")
    # Bytes of a pickle cannot be written to, which torch does not support.
    return Table(x, y.copy(), split, where, ExampleNames(in_config=True), client)


def _read_content(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays x and y of a client file."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        used = ("data",) if "data" in names else ("x", "y")
        check_headers(archive, used, [("x", "y")], f"path: {path}")
        if "data" in names:
            content = _unpickle(archive, "data")
            if not isinstance(content, dict):
                raise UserError(
                    f"path: {path}: data: expected a dictionary with the keys x and y, got "
                    f"{type(content).__name__}"
                )
        else:
            content = {name: _unpickle(archive, name) for name in names if name in ("x", "y")}
    for key in ("x", "y"):
        if key not in content:
            found = format_list(map(one_line, content or names), quote=True) or "nothing"
            raise UserError(f"path: {path}: '{key}' not found; the file has {found}")
    y = _as_array(content["y"], f"path: {path}: y")
    count = len(y) if y.ndim else None
    return {"x": _as_array(content["x"], f"path: {path}: x", count), "y": y}


def _unpickle(archive: zipfile.ZipFile, name: str) -> object:
    """Return an array of an `.npz` file, or the object if it is a single Python object."""
    with archive.open(f"{name}.npy") as file:
        if read_header(file)[1].hasobject:
            array = load_pickled_arrays(file)
            if isinstance(array, PickledArray) and array.shape == () and array.content is not None:
                return array.content[0]
            return array
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _as_array(value: object, where: str, count: int | None = None) -> np.ndarray:
    """Return an array of numbers. Lists may contain numbers or arrays of one shape.

    Args:
        value: An array or a list.
        where: Place of the value, for error messages.
        count: Number of rows that a list must have. If None, it is not checked.
    """
    content: Any = value.content if isinstance(value, PickledArray) else value
    if isinstance(content, list | tuple):
        rows: list[Any] = [row.content if isinstance(row, PickledArray) else row for row in content]
        if any(isinstance(row, list | tuple | dict | str) or row is None for row in rows):
            raise UserError(
                f"{where}: expected an array of numbers, got lists; files of texts are not read"
            )
        shapes = {np.shape(row) for row in rows}
        if len(shapes) > 1:
            raise UserError(
                f"{where}: expected rows of one shape, got "
                f"{' and '.join(map(str, sorted(shapes)[:2]))}"
            )
        if count not in (None, len(rows)):
            raise UserError(f"{where}: expected {count} rows as in y, got {len(rows)}")
        # A pickle may refer to one array many times.
        check_memory(sum(np.asarray(row).nbytes for row in rows), where)
        content = np.asarray(rows)
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "buif":
        raise UserError(f"{where}: expected an array of numbers, got {type(content).__name__}")
    return content


def _inputs(x: np.ndarray, where: str) -> Tensor:
    """Return images `[N, C, H, W]` as uint8 or float32, or floats `[N, D]`."""
    if x.shape == (0,):
        return torch.empty(0)
    if x.ndim not in (2, 4):
        raise UserError(f"{where}: expected shape (N, C, H, W) or (N, D), got {x.shape}")
    if x.ndim == 2 and x.dtype.kind != "f":
        raise UserError(
            f"{where}: expected floats for rows of shape (N, D), got {x.dtype}; files of texts are "
            "not read"
        )
    values = as_numbers(x, where)
    values = as_pixels({where: values})[where] if x.ndim == 4 else values
    return values.float() if values.is_floating_point() else values


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
                x, y = _read_user(user_rows, where)
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
    content = _read_json(path)
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


def _read_user(user_rows: object, where: str) -> tuple[Tensor, np.ndarray]:
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


def _read_json(path: Path) -> Any:
    try:
        return read_json(path.read_bytes(), bounded=False)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"path: {path}: not a readable JSON file ({one_line(error)})") from error


def build_clients(
    name: str,
    tables: Sequence[Table],
    task: Task | None,
    path: object,
    *,
    noun: str,
    notes: Sequence[str] = (),
    **options: Any,
) -> Dataset:
    """Return a data set in which clients have training and test rows of their own.

    All test rows are the global test set. The local set of a client consists of its test rows. A
    client without training rows contributes to the global test set only.

    Args:
        name: Name of the data set.
        tables: Rows and class numbers of each client and split, whose name is the group. There may
            be no rows.
        task: Learning task. If None, the classes are the distinct labels.
        path: Folder, for error messages.
        noun: What remarks call a client, such as "user".
        notes: Remarks on how the data was read. A remark on clients without rows is added.
        options: Further arguments of `build`.

    Raises:
        UserError: If a label is not a class number, or the rows do not match.
    """
    remarks = list(notes)
    for split in SPLITS:
        empty = [t.group for t in tables if t.split == split and not len(t.y)]
        if empty:
            listed = format_list((one_line(client, 80) for client in empty), quote=True)
            remarks.append(f"{split}: {pluralize(len(empty), noun)} without rows: {listed}")
    present = []
    for table in tables:
        y = class_numbers(table.y, table.y_place)
        out_of_range = (y < 0) | (y >= MAX_CLASSES)
        if task is None and (row := first_true(out_of_range)) is not None:
            raise UserError(
                f"{table.y_place}: row {row}: label {int(y[row])} is out of range 0 to "
                f"{MAX_CLASSES - 1}"
            )
        if len(y):
            table.y = y
            table.group = [table.group] * len(y)
            present.append(table)
    if not any(table.split == "train" for table in present):
        raise UserError(f"path: {path}: no {noun} in train has rows")
    return build(
        present,
        task or "multiclass",
        f"path: {path}",
        name=name,
        local=True,
        notes=[prefix_note(name, note) for note in remarks],
        **options,
    )

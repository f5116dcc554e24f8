"""Client folders of PFLlib and HtFLlib: one `.npz` file for each client and split."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.images import as_numbers, as_pixels
from hetero_fl.core.task import Task
from hetero_fl.data.checks import ExampleNames
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.benchmark_files.client_sets import (
    MAX_CLASSES,
    SPLITS,
    build_clients,
)
from hetero_fl.data.sources.benchmark_files.pickled_arrays import (
    PickledArray,
    UnpicklingError,
    load_pickled_arrays,
)
from hetero_fl.data.sources.files import check_folder, visible_files
from hetero_fl.data.sources.npz_files import check_headers, read_header
from hetero_fl.data.table import Table
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import check_memory
from hetero_fl.utils.text import format_list


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
    tables = [_read_rows(path, split, name) for split in SPLITS for name in names]
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"path: {path}: not a readable JSON file ({one_line(error)})") from error
    classes = content.get("num_classes") if isinstance(content, dict) else None
    if classes is None:
        return None
    if not isinstance(classes, int) or not 2 <= classes <= MAX_CLASSES:
        raise UserError(
            f"path: {path}: num_classes: expected an integer from 2 to {MAX_CLASSES:,}, got "
            f"{one_line(repr(classes) if isinstance(classes, str) else classes, 80)}"
        )
    return classes


def _read_rows(folder: Path, split: str, client: str) -> Table:
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

"""Score raw examples with an exported model.

    python score.py --model NAME.onnx --data FILE.csv --out scores.csv

Needs numpy and onnxruntime, nothing else. Examples are raw, as NAME.md says.
FILE.npz: an array for each input, under its name; a single input may also be called images, test_images, x or test_x, or be
the only array. FILE.csv: a row an example, with a header; columns are found by name where the model knows names, and an empty
cell is a missing value. The result is a CSV: a row an example, a column an output, and the likeliest class.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 500
NAMES = ("images", "test_images", "x", "test_x")
OVERSHOOT = 1e-3  # what round-off in scaling may add to 0..1

Arrays = dict[str, Any]


class ScoringError(Exception):
    """One line for whoever started the script."""


def load(path: Path) -> tuple[dict[str, Any], Callable[[Arrays], Any]]:
    """What a model takes and gives, and the model as a function of arrays by input name."""
    if not path.is_file():
        raise ScoringError(f"--model: {path}: no such file")
    if path.suffix == ".safetensors":
        raise ScoringError(f"--model: {path}: tensors alone, without an architecture; export onnx")
    if path.suffix != ".onnx":
        raise ScoringError(f"--model: found {path.name}; a .onnx file is needed")
    try:
        import onnxruntime
    except ImportError:
        raise ScoringError("--model: .onnx needs onnxruntime: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common type
        raise ScoringError(f"--model: {path}: {error}") from None
    text = session.get_modelmeta().custom_metadata_map.get("hetero_fl")
    if not text:
        raise ScoringError(f"--model: {path}: was not written by hetero-fl export")
    return json.loads(text), lambda x: session.run(None, x)[0]


def read(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    """The examples of a file as the model's inputs. Raises Mistake."""
    if not path.is_file():
        raise ScoringError(f"--data: {path}: no such file")
    try:
        if path.suffix == ".npz":
            found = _npz(path, inputs)
        elif path.suffix == ".csv":
            found = _csv(path, inputs)
        else:
            raise ScoringError(f"--data: found {path.name}; a .npz or .csv file is needed")
    except (OSError, ValueError) as error:
        # numpy would have it unpickled
        why = "no archive of arrays of numbers" if "pickle" in str(error) else error
        raise ScoringError(f"--data: {path}: {why}") from None
    given = {
        one["name"]: to_input(found[one["name"]], one, f"--data: {path}: {one['name']}")
        for one in inputs
    }
    if len({len(x) for x in given.values()}) > 1:
        raise ScoringError(
            f"--data: {path}: found {', '.join(f'{len(x)} rows of {n}' for n, x in given.items())}"
        )
    return given


def _npz(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        names = [one["name"] for one in inputs]
        if len(inputs) > 1:
            there = [name for name in names if name in file]
            if not there or any(
                name not in file and not one.get("gaps")
                for name, one in zip(names, inputs, strict=True)
            ):
                raise ScoringError(
                    f"--data: {path}: found {', '.join(file.files)}; arrays {', '.join(names)} are needed"
                )
            rows = len(file[there[0]])
            absent = {one["name"]: np.full((rows, *one["shape"][1:]), np.nan) for one in inputs}
            return {name: file[name] if name in file else absent[name] for name in names}
        wanted = next(
            (n for n in (*names, *NAMES) if n in file),
            file.files[0] if len(file.files) == 1 else None,
        )
        if wanted is None:
            raise ScoringError(
                f"--data: {path}: found {', '.join(file.files)}; an array {names[0]} is needed"
            )
        return {names[0]: file[wanted]}


def _csv(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    one = inputs[0]
    if len(inputs) > 1 or one["kind"] not in ("row", "tokens"):
        raise ScoringError(
            f"--data: {path}: this model takes {', '.join(i['name'] for i in inputs)}, which need a .npz file"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *lines = [row for row in csv.reader(file) if row] or [[]]
    for i, line in enumerate(lines):
        if len(line) != len(header):
            raise ScoringError(
                f"--data: {path}: row {i + 1}: found {len(line)} cells below {len(header)} names"
            )
    for name, categories in one.get("categories", {}).items():
        if name in header:
            place = header.index(name)
            header += [f"{name}={category}" for category in categories]
            for line in lines:
                line += [
                    str(float(_normalize_cell(line[place], categories) == category))
                    for category in categories
                ]
        elif not one.get("gaps"):
            raise ScoringError(f"--data: {path}: no column '{name}'; found {', '.join(header)}")
    wanted = one.get("columns") or header
    for name in wanted:
        if name not in header and not one.get("gaps"):
            raise ScoringError(f"--data: {path}: no column '{name}'; found {', '.join(header)}")
    places = [header.index(name) if name in header else None for name in wanted]
    values = np.full((len(lines), len(wanted)), np.nan)
    for i, line in enumerate(lines):
        for j, column in enumerate(places):
            cell = "" if column is None else line[column].strip()
            try:
                values[i, j] = float(cell) if cell else np.nan
            except ValueError:
                raise ScoringError(
                    f"--data: {path}: row {i + 1}, column '{wanted[j]}': found '{cell}', not a number"
                ) from None
    return {one["name"]: values}


def _normalize_cell(cell: str, categories: list[str]) -> str:
    """A cell without spaces around it; 1.0 is 1 where no category is called 1.0."""
    cell = cell.strip()
    whole = re.fullmatch(r"([+-]?\d+)\.0*", cell)
    return whole[1] if whole and cell not in categories else cell


def to_input(x: Any, one: dict[str, Any], where: str) -> Any:
    """An array as an input wants it: type, channels first, bytes divided by 255. Raises Mistake for what is no example."""
    if x.dtype.kind not in "buif" or x.ndim == 0:
        raise ScoringError(
            f"{where}: found {x.dtype} of shape {x.shape}; an array of numbers is needed"
        )
    shape = one["shape"][1:]
    if one["kind"] == "image":
        x = x[:, None] if x.ndim == 3 else x
        if (
            x.ndim == 4
            and not _shapes_match(x.shape[1:], shape)
            and _shapes_match((x.shape[3], *x.shape[1:3]), shape)
        ):
            x = np.moveaxis(x, 3, 1)
        if x.dtype.kind in "bui":
            if x.size and (x.min() < 0 or x.max() > 255):
                raise ScoringError(
                    f"{where}: found whole numbers from {x.min()} to {x.max()}; bytes, or floats from 0 to 1"
                )
            x = x.astype(np.float32) / np.float32(255)
    if not _shapes_match(x.shape[1:], shape):
        raise ScoringError(
            f"{where}: found shape {x.shape}; wanted ({', '.join(map(str, ['N', *shape]))})"
        )
    bad = _bad(x, one)
    if bad.any():
        row = int(bad.reshape(len(x), -1).any(1).argmax())
        low, high = {"tokens": (0, one.get("tokens", 0) - 1), "image": (0, 1)}.get(
            one["kind"], (None, None)
        )
        told = "no number, or infinity" if low is None else f"no number from {low} to {high}"
        raise ScoringError(f"{where}: row {row + 1}: found {told}")
    return np.ascontiguousarray(x, dtype=one["dtype"])


def _bad(x: Any, one: dict[str, Any]) -> Any:
    if one["kind"] == "tokens":
        return (x != np.floor(x)) | (x < 0) | (x >= one["tokens"]) | np.isnan(x)
    bad = np.isinf(x) if one.get("gaps") else ~np.isfinite(x)
    return bad | (x < -OVERSHOOT) | (x > 1 + OVERSHOOT) if one["kind"] == "image" else bad


def _shapes_match(found: tuple[int, ...], wanted: list[int | str]) -> bool:
    free = all(isinstance(w, str) or f == w for f, w in zip(found, wanted, strict=False))
    # else it could be any of the three
    few = "channels" not in wanted or (len(found) == 3 and found[0] in (1, 3))
    return len(found) == len(wanted) and free and few


def write(scores: Any, about: dict[str, Any], out: Path | None) -> None:
    """A row an example, numbered from 1."""
    pick = about["task"] == "multiclass"
    lines = [["row", *about["names"], *(["prediction"] if pick else [])]]
    for i, row in enumerate(scores):
        best = [about["names"][int(row.argmax())]] if pick else []
        lines.append([str(i + 1), *(f"{value:.7g}" for value in row), *best])
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        return
    try:
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    except OSError as error:
        raise ScoringError(f"--out: {out}: {error.strerror}") from None


def main() -> int:
    """0 done, 2 a mistake, in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="NAME.onnx")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".npz or .csv")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .csv file (default: print it)")
    parser.add_argument(
        "--unit",
        type=float,
        default=1.0,
        help="regression: what values are multiplied by (default: 1)",
    )
    options = parser.parse_args()
    try:
        about, model = load(options.model)
        if options.unit != 1 and about["task"] != "regression":
            raise ScoringError(
                "--unit: is for values, and this model gives probabilities; leave it out"
            )
        given = read(options.data, about["inputs"])
        rows = len(next(iter(given.values())))
        if not rows:
            raise ScoringError(f"--data: {options.data}: has no rows")
        parts = [
            model({n: x[i : i + BATCH] for n, x in given.items()}) for i in range(0, rows, BATCH)
        ]
        write(np.concatenate(parts) * np.float32(options.unit), about, options.out)
    except ScoringError as mistake:
        print("error:", " ".join(str(mistake).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

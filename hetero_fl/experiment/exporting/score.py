"""Score raw examples with an exported model.

    python score.py --model NAME.onnx --data FILE.csv --out scores.csv

Requires numpy and onnxruntime. NAME.md describes the raw examples. A .npz file contains one array
for each input, under its name; a single input may also be named images, test_images, x or test_x,
or be the only array. A .csv file has a header and one example per row; columns are matched by name
if the model has column names, and an empty cell or a question mark is a missing value. The result
is a CSV file with one row per example, one column per output, and the most likely class.
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
# Tolerance for rounding errors of pixels outside [0, 1].
OVERSHOOT = 1e-3

Arrays = dict[str, Any]


class ScoringError(Exception):
    """Invalid argument or file, which is reported to the user in one line."""


def load(path: Path) -> tuple[dict[str, Any], Callable[[Arrays], Any]]:
    """Load an exported model.

    Args:
        path: The `.onnx` file.

    Returns:
        The description of the inputs and outputs, and a function that computes the outputs from
        arrays that are keyed by input name.

    Raises:
        ScoringError: If the file is not an exported ONNX model, or if onnxruntime is not installed.
    """
    if not path.is_file():
        raise ScoringError(f"--model: file '{path}' not found")
    if path.suffix.lower() == ".safetensors":
        raise ScoringError(f"--model: {path} contains tensors only; export the model as onnx")
    if path.suffix.lower() != ".onnx":
        raise ScoringError(f"--model: expected a .onnx file, got {path.name}")
    try:
        import onnxruntime
    except ImportError:
        raise ScoringError(
            "--model: .onnx needs onnxruntime; run pip install onnxruntime"
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        # The exceptions of onnxruntime have no common type.
        raise ScoringError(f"--model: {path}: {error}") from None
    text = session.get_modelmeta().custom_metadata_map.get("hetero_fl")
    if not text:
        raise ScoringError(f"--model: {path} was not created by hetero-fl export")
    return json.loads(text), lambda x: session.run(None, x)[0]


def read(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    """Read examples from a file and convert them to inputs of the model.

    Args:
        path: A `.npz` or `.csv` file.
        inputs: Descriptions of the inputs.

    Returns:
        The input arrays, keyed by name.

    Raises:
        ScoringError: If the file does not exist or does not contain valid examples.
    """
    if not path.is_file():
        raise ScoringError(f"--data: file '{path}' not found")
    try:
        if path.suffix.lower() == ".npz":
            found = _read_npz(path, inputs)
        elif path.suffix.lower() == ".csv":
            found = _read_csv(path, inputs)
        else:
            raise ScoringError(f"--data: expected a .npz or .csv file, got {path.name}")
    except (OSError, ValueError) as error:
        # The message of numpy suggests unpickling, which is unsafe.
        reason = "expected arrays of numbers" if "pickle" in str(error) else error
        raise ScoringError(f"--data: {path}: {reason}") from None
    arrays = {
        spec["name"]: to_input(found[spec["name"]], spec, f"--data: {path}: {spec['name']}")
        for spec in inputs
    }
    if len({len(x) for x in arrays.values()}) > 1:
        counts = ", ".join(f"{len(x)} rows of {name}" for name, x in arrays.items())
        raise ScoringError(f"--data: {path}: expected the same number of rows, got {counts}")
    return arrays


def _read_npz(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        names = [spec["name"] for spec in inputs]
        if len(inputs) > 1:
            present = [name for name in names if name in file]
            if not present or any(
                name not in file and not spec.get("gaps")
                for name, spec in zip(names, inputs, strict=True)
            ):
                raise ScoringError(
                    f"--data: {path}: expected arrays {', '.join(names)}, "
                    f"got {', '.join(file.files)}"
                )
            rows = len(file[present[0]])
            missing = {spec["name"]: np.full((rows, *spec["shape"][1:]), np.nan) for spec in inputs}
            return {name: file[name] if name in file else missing[name] for name in names}
        chosen = next(
            (n for n in (*names, *NAMES) if n in file),
            file.files[0] if len(file.files) == 1 else None,
        )
        if chosen is None:
            raise ScoringError(
                f"--data: {path}: expected an array {names[0]}, got {', '.join(file.files)}"
            )
        return {names[0]: file[chosen]}


def _read_csv(path: Path, inputs: list[dict[str, Any]]) -> Arrays:
    spec = inputs[0]
    if len(inputs) > 1 or spec["kind"] not in ("row", "tokens"):
        names = ", ".join(i["name"] for i in inputs)
        raise ScoringError(f"--data: {path}: expected a .npz file for a model with inputs {names}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *lines = [row for row in csv.reader(file) if row] or [[]]
    for i, line in enumerate(lines):
        if len(line) != len(header):
            raise ScoringError(
                f"--data: {path}: row {i + 1}: expected {len(header)} cells as in the header, "
                f"got {len(line)}"
            )
    _add_indicator_columns(path, spec, header, lines)
    columns = spec.get("columns") or header
    for name in columns:
        if name not in header and not spec.get("gaps"):
            raise _missing_column(path, name, header)
    places = [header.index(name) if name in header else None for name in columns]
    values = np.full((len(lines), len(columns)), np.nan)
    for i, line in enumerate(lines):
        for j, place in enumerate(places):
            cell = "" if place is None else line[place].strip()
            try:
                values[i, j] = np.nan if cell in ("", "?") else float(cell)
            except ValueError:
                raise ScoringError(
                    f"--data: {path}: row {i + 1}, column '{columns[j]}': "
                    f"expected a number, got '{cell}'"
                ) from None
    return {spec["name"]: values}


def _add_indicator_columns(
    path: Path, spec: dict[str, Any], header: list[str], lines: list[list[str]]
) -> None:
    """Append indicator columns NAME=VALUE for each encoded text column, in place."""
    for name, categories in spec.get("categories", {}).items():
        if name in header:
            place = header.index(name)
            header += [f"{name}={category}" for category in categories]
            for line in lines:
                cell = _normalize_cell(line[place], categories)
                line += [str(float(cell == category)) for category in categories]
        elif not spec.get("gaps"):
            raise _missing_column(path, name, header)


def _missing_column(path: Path, name: str, header: list[str]) -> ScoringError:
    return ScoringError(
        f"--data: {path}: column '{name}' not found; the file has {', '.join(header)}"
    )


def _normalize_cell(cell: str, categories: list[str]) -> str:
    """Remove surrounding spaces, and replace 1.0 with 1 unless 1.0 is a category."""
    cell = cell.strip()
    whole = re.fullmatch(r"([+-]?\d+)\.0*", cell)
    return whole[1] if whole and cell not in categories else cell


def to_input(x: Any, spec: dict[str, Any], where: str) -> Any:
    """Convert an array of examples to the shape and data type of a model input.

    The channel axis of images is moved to the front, and integer pixels are divided by their range.

    Args:
        x: Array of examples, `[N, ...]`.
        spec: Description of the input.
        where: Prefix of error messages.

    Returns:
        The input array, `[N, *shape]`.

    Raises:
        ScoringError: If the array does not contain valid examples.
    """
    if x.dtype.kind not in "buif" or x.ndim == 0:
        raise ScoringError(
            f"{where}: expected an array of numbers, got {x.dtype} of shape {x.shape}"
        )
    shape = spec["shape"][1:]
    if spec["kind"] == "image":
        x = _to_image(x, shape, spec.get("range", 255), where)
    if not _shapes_match(x.shape[1:], shape):
        raise ScoringError(
            f"{where}: expected shape ({', '.join(map(str, ['N', *shape]))}), got {x.shape}"
        )
    invalid = _invalid_values(x, spec)
    if invalid.any():
        row = int(invalid.reshape(len(x), -1).any(1).argmax())
        ranges = {"tokens": (0, spec.get("tokens", 0) - 1), "image": (0, 1)}
        low, high = ranges.get(spec["kind"], (None, None))
        valid = "finite numbers" if low is None else f"numbers from {low} to {high}"
        raise ScoringError(f"{where}: row {row + 1}: expected {valid}")
    return np.ascontiguousarray(x, dtype=spec["dtype"])


def _to_image(x: Any, shape: list[int | str], pixel_range: float, where: str) -> Any:
    x = x[:, None] if x.ndim == 3 else x
    if (
        x.ndim == 4
        and not _shapes_match(x.shape[1:], shape)
        and _shapes_match((x.shape[3], *x.shape[1:3]), shape)
    ):
        x = np.moveaxis(x, 3, 1)
    if x.dtype.kind == "b" and pixel_range > 1 and x.any():
        raise ScoringError(
            f"{where}: expected integers from 0 to {pixel_range:g}, or floats from 0 to 1, got "
            "booleans"
        )
    if x.dtype.kind in "bui":
        if x.size and (x.min() < 0 or x.max() > pixel_range):
            raise ScoringError(
                f"{where}: expected integers from 0 to {pixel_range:g}, or floats from 0 to 1, "
                f"got integers from {x.min()} to {x.max()}"
            )
        x = x.astype(np.float32) / np.float32(pixel_range)
    return x


def _invalid_values(x: Any, spec: dict[str, Any]) -> Any:
    if spec["kind"] == "tokens":
        return (x != np.floor(x)) | (x < 0) | (x >= spec["tokens"]) | np.isnan(x)
    invalid = np.isinf(x) if spec.get("gaps") else ~np.isfinite(x)
    if spec["kind"] != "image":
        return invalid
    return invalid | (x < -OVERSHOOT) | (x > 1 + OVERSHOOT)


def _shapes_match(found: tuple[int, ...], expected: list[int | str]) -> bool:
    sizes_match = all(isinstance(e, str) or f == e for f, e in zip(found, expected, strict=False))
    # With dynamic sizes, only the size of the axis, 1 or 3, identifies the channel axis.
    channels_match = "channels" not in expected or (len(found) == 3 and found[0] in (1, 3))
    return len(found) == len(expected) and sizes_match and channels_match


def write(scores: Any, about: dict[str, Any], out: Path | None) -> None:
    """Write model outputs as CSV, with one row per example.

    Rows are numbered from 1. For a multiclass task, the column `prediction` contains the most
    likely class.

    Args:
        scores: Model outputs, `[N, outputs]`.
        about: Description of the model outputs.
        out: The file to write. If None, the CSV is written to standard output.

    Raises:
        ScoringError: If the file cannot be written.
    """
    is_multiclass = about["task"] == "multiclass"
    lines = [["row", *about["names"], *(["prediction"] if is_multiclass else [])]]
    for i, row in enumerate(scores):
        best = [about["names"][int(row.argmax())]] if is_multiclass else []
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
    """Run the command-line interface.

    Returns:
        The exit status: 0, or 2 for invalid arguments or files.
    """
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
        help="regression: factor for the predicted values (default: 1)",
    )
    options = parser.parse_args()
    try:
        about, model = load(options.model)
        if options.unit != 1 and about["task"] != "regression":
            raise ScoringError(
                "--unit: only applies to regression, but this model predicts probabilities"
            )
        inputs = read(options.data, about["inputs"])
        rows = len(next(iter(inputs.values())))
        if not rows:
            raise ScoringError(f"--data: {options.data} has no rows")
        parts = [
            model({n: x[i : i + BATCH] for n, x in inputs.items()}) for i in range(0, rows, BATCH)
        ]
        write(np.concatenate(parts) * np.float32(options.unit), about, options.out)
    except ScoringError as error:
        line = " ".join(str(error).split())
        print("error:", line if line.isprintable() else ascii(line), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Score raw examples with an exported model.

    python score.py --model NAME.onnx --data FILE.csv --out scores.csv

Requires numpy and onnxruntime. NAME.md describes the raw examples. A .npz file contains one array
for each input, under its name; a single input may also be named images, test_images, x or test_x,
or be the only array. A .csv file has a header and one example per row; columns are matched by name
if the model has column names, and an empty cell or a question mark is a missing value. The result
is a CSV file with one row per example, one column per output, and the most likely class. Rows of
arrays are numbered from 0, rows of tables from 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 500
NAMES = ("images", "test_images", "x", "test_x")
# Tolerance for rounding errors of pixels outside [0, 1].
OVERSHOOT = 1e-3

Spec = dict[str, Any]


def read_arrays(path: Path, inputs: list[Spec]) -> dict[str, Any]:
    """Read the array of each input from a `.npz` file.

    Args:
        path: The file.
        inputs: Descriptions of the inputs. Of several inputs, an array may be absent if the model
            supports missing values.

    Returns:
        The arrays, keyed by the names of the inputs.

    Raises:
        ValueError: If the file has no such arrays.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    names = [spec["name"] for spec in inputs]
    given = ", ".join(arrays)
    if len(inputs) == 1:
        # A single input may have another name.
        for name in NAMES if len(arrays) > 1 else list(arrays):
            if name in arrays:
                arrays.setdefault(names[0], arrays[name])
    rows = max((len(arrays[name]) for name in names if name in arrays), default=0)
    for spec in inputs:
        if rows and spec.get("gaps"):
            arrays.setdefault(spec["name"], np.full((rows, *spec["shape"][1:]), np.nan))
    if not all(name in arrays for name in names):
        raise ValueError(f"expected arrays {', '.join(names)}, got {given}")
    return {name: arrays[name] for name in names}


def read_table(path: Path, spec: Spec) -> Any:
    """Read the columns of an input from a `.csv` file.

    Args:
        path: The file.
        spec: Description of the input. Each of its text columns becomes indicator columns
            NAME=VALUE. A column may be absent if the model supports missing values.

    Returns:
        The values, `[N, columns]`, with NaN for missing values.

    Raises:
        ValueError: If a column is not in the file or a cell is not a number.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number}: expected {len(header)} cells as in the header")
    cells = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    sources: dict[str, str] = {}
    for name, values in spec.get("categories", {}).items():
        sources |= {f"{name}={value}": name for value in values}
        # 1.0 is the category 1.
        plain = [
            cell if cell in values else re.sub(r"^([+-]?\d+)\.0*$", r"\1", cell)
            for cell in cells.get(name, [])
        ]
        for value in values if name in header else ():
            cells.setdefault(f"{name}={value}", [str(int(cell == value)) for cell in plain])
    columns = spec.get("columns") or header
    absent = [sources.get(name, name) for name in columns if name not in cells]
    if absent and not spec.get("gaps"):
        raise ValueError(f"column '{absent[0]}' not found; the file has {', '.join(header)}")
    table = np.full((len(rows), len(columns)), np.nan)
    for j, name in enumerate(columns):
        for i, cell in enumerate(cells.get(name, [])):
            table[i, j] = to_number(cell, f"row {i + 1}, column '{name}'")
    return table


def to_number(cell: str, place: str) -> float:
    """Return the number in a cell, or NaN for a missing value."""
    try:
        return np.nan if cell in ("", "?") else float(cell)
    except ValueError:
        raise ValueError(f"{place}: expected a number, got '{cell}'") from None


def to_input(x: Any, spec: Spec, first_row: int = 0) -> Any:
    """Convert an array of examples to the shape and data type of a model input.

    The channel axis of images is moved to the front, and integer pixels are divided by their range.

    Args:
        x: Array of examples, `[N, ...]`.
        spec: Description of the input.
        first_row: Number of the first row, for messages.

    Returns:
        The input array, `[N, *shape]`.

    Raises:
        ValueError: If the array does not contain valid examples.
    """
    name = spec["name"]
    ranges = {"image": (0, 1), "tokens": (0, spec.get("tokens", 0) - 1)}
    low, high = ranges.get(spec["kind"], (-np.inf, np.inf))
    if x.dtype.kind not in "buif" or x.ndim == 0:
        raise ValueError(f"{name}: expected an array of numbers, got {x.dtype} of shape {x.shape}")
    if spec["kind"] == "image":
        x = to_image(x, spec)
    if not shapes_match(x.shape[1:], spec):
        shape = ", ".join(["N", *map(str, spec["shape"][1:])])
        raise ValueError(f"{name}: expected shape ({shape}), got {x.shape}")
    valid = np.isfinite(x) & (x >= low - OVERSHOOT) & (x <= high + OVERSHOOT)
    if spec["kind"] == "tokens":
        valid &= x == np.floor(x)
    if spec.get("gaps"):
        valid |= np.isnan(x)
    if not valid.all():
        row = np.argwhere(~valid)[0][0] + first_row
        expected = "finite numbers" if np.isinf(low) else f"numbers from {low} to {high}"
        raise ValueError(f"{name}: row {row}: expected {expected}")
    return np.ascontiguousarray(x, dtype=spec["dtype"])


def to_image(x: Any, spec: Spec) -> Any:
    """Convert pixels to floats from 0 to 1, and move the channel axis to the front."""
    if x.ndim == 3:
        x = x[:, None]
    if not shapes_match(x.shape[1:], spec) and shapes_match((*x.shape[3:], *x.shape[1:3]), spec):
        x = np.moveaxis(x, 3, 1)
    if x.dtype.kind == "f" or not x.size:
        return x
    top = spec.get("range", 255)
    if x.min() < 0 or x.max() > top or (x.dtype.kind == "b" and x.any() and top > 1):
        raise ValueError(
            f"{spec['name']}: expected integers from 0 to {top:g}, or floats from 0 to 1, "
            f"got {x.dtype} from {x.min()} to {x.max()}"
        )
    return x.astype(np.float32) / np.float32(top)


def shapes_match(found: tuple[int, ...], spec: Spec) -> bool:
    """Return whether an example has the shape of an input, whose dynamic sizes are names."""
    expected = spec["shape"][1:]
    # With dynamic sizes, only the size of the axis, 1 or 3, identifies the channel axis.
    return len(found) == len(expected) and all(
        size == n or size in ("height", "width") or (size == "channels" and n in (1, 3))
        for n, size in zip(found, expected, strict=True)
    )


def predict(options: argparse.Namespace) -> list[list[str]]:
    """Compute the outputs of a model as rows of a table, with a header.

    Args:
        options: The arguments of the command line.

    Raises:
        ValueError: If an argument or a file is invalid.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            str(options.model), providers=["CPUExecutionProvider"]
        )
        about = json.loads(session.get_modelmeta().custom_metadata_map["hetero_fl"])
    except Exception as error:
        # The exceptions of onnxruntime have no common type.
        raise ValueError(f"--model: expected a file of hetero-fl export: {error}") from None
    if options.unit != 1 and about["task"] != "regression":
        raise ValueError("--unit: requires a regression, but this model predicts probabilities")
    inputs = about["inputs"]
    suffix = options.data.suffix.lower()
    first_row = int(suffix == ".csv")
    if suffix == ".npz":
        arrays = read_arrays(options.data, inputs)
    elif suffix == ".csv" and len(inputs) == 1 and inputs[0]["kind"] in ("row", "tokens"):
        arrays = {inputs[0]["name"]: read_table(options.data, inputs[0])}
    else:
        raise ValueError(
            "--data: expected a .npz file, or a .csv file for a model of a single table or text"
        )
    arrays = {spec["name"]: to_input(arrays[spec["name"]], spec, first_row) for spec in inputs}
    counts = sorted({len(x) for x in arrays.values()})
    if len(counts) > 1 or counts == [0]:
        found = " and ".join(map(str, counts))
        raise ValueError(f"--data: expected rows, equally many for each input, got {found}")
    names = about["names"]
    is_multiclass = about["task"] == "multiclass"
    table = [["row", *names, *(["prediction"] if is_multiclass else [])]]
    for start in range(0, counts[0], BATCH):
        part = {name: x[start : start + BATCH] for name, x in arrays.items()}
        for scores in session.run(None, part)[0] * np.float32(options.unit):
            best = [names[int(scores.argmax())]] if is_multiclass else []
            row = str(len(table) - 1 + first_row)
            table.append([row, *(f"{score:.7g}" for score in scores), *best])
    return table


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
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(predict(options))
        if options.out is None:
            print(text.getvalue(), end="")
        else:
            options.out.write_text(text.getvalue(), encoding="utf-8")
    except (ImportError, OSError, ValueError) as error:
        line = " ".join(str(error).split())
        print("error:", line if line.isprintable() else ascii(line), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

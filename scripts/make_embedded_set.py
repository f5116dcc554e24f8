#!/usr/bin/env python3
"""Select the embedded chest X-rays from PneumoniaMNIST.

    python scripts/make_embedded_set.py pneumoniamnist.npz [hetero_fl/data/embedded/chest_xray.npz]

The input has the MedMNIST layout. The output contains 2,000 training and 200 validation images in
the original class proportions, and all test images. The selection is deterministic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hetero_fl.data.partition import apportion
from hetero_fl.utils.seeding import stream_key

KEEP = {"train": 2000, "val": 200}
OUTPUT = Path(__file__).resolve().parents[1] / "hetero_fl" / "data" / "embedded" / "chest_xray.npz"


def stratified(labels: np.ndarray, count: int, split: str) -> np.ndarray:
    """Sample rows at random, with the class proportions of all rows.

    Args:
        labels: Labels of all rows, shape `[N]`.
        count: Number of rows to sample.
        split: Name of the split, from which the random seed is derived.

    Returns:
        Row indices in ascending order, shape `[count]`.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    draws = np.random.default_rng(stream_key("embedded", "chest_xray", split))
    kept = apportion(count, sizes / sizes.sum())
    rows = [
        draws.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(classes, kept, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def select_rows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the rows of the embedded data set.

    Args:
        arrays: Images `[N, H, W]` and labels `[N, 1]` of each split, keyed by array name as in
            MedMNIST.

    Returns:
        The selected rows in the same layout.
    """
    smaller = {}
    for split in ("train", "val", "test"):
        images = arrays[f"{split}_images"]
        labels = arrays[f"{split}_labels"]
        rows = (
            stratified(labels[:, 0], KEEP[split], split)
            if split in KEEP
            else np.arange(len(labels))
        )
        smaller[f"{split}_images"] = images[rows]
        smaller[f"{split}_labels"] = labels[rows]
    return smaller


def main() -> None:
    """Read the input file, select rows and write the output file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=Path, help="PneumoniaMNIST, 28x28 pixels, as a MedMNIST .npz file"
    )
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        default=OUTPUT,
        help="file to write (default: the embedded data set)",
    )
    args = parser.parse_args()
    with np.load(args.source, allow_pickle=False) as archive:
        arrays = select_rows(dict(archive))
    np.savez_compressed(args.output, **arrays)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    for name, array in arrays.items():
        counts = np.unique(array, return_counts=True)[1].tolist()
        print(
            f"  {name}: {array.shape}"
            + (f", examples per class {counts}" if name.endswith("labels") else "")
        )


if __name__ == "__main__":
    main()

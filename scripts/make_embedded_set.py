#!/usr/bin/env python3
"""Cut the embedded chest X-rays from PneumoniaMNIST.

    python scripts/make_embedded_set.py pneumoniamnist.npz [hetero_fl/data/embedded/chest_xray.npz]

The input has the MedMNIST layout. 2,000 training and 200 validation images are drawn with a key, in the proportions of
the classes there; all test images are kept. Running it twice on the same file writes the same arrays.
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
    """`count` rows of `labels` `[N]` in the classes' proportions, sorted."""
    classes, sizes = np.unique(labels, return_counts=True)
    draws = np.random.default_rng(stream_key("embedded", "chest_xray", split))
    kept = apportion(count, sizes / sizes.sum())
    rows = [
        draws.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(classes, kept, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def cut(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the embedded set from those of the whole one."""
    smaller = {}
    for split in ("train", "val", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        rows = (
            stratified(labels[:, 0], KEEP[split], split)
            if split in KEEP
            else np.arange(len(labels))
        )
        smaller[f"{split}_images"], smaller[f"{split}_labels"] = images[rows], labels[rows]
    return smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="PneumoniaMNIST, 28x28, as an .npz file")
    parser.add_argument("output", type=Path, nargs="?", default=OUTPUT)
    args = parser.parse_args()
    with np.load(args.source, allow_pickle=False) as archive:
        arrays = cut(dict(archive))
    np.savez_compressed(args.output, **arrays)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    for name, array in arrays.items():
        counts = np.unique(array, return_counts=True)[1].tolist()
        print(
            f"  {name}: {array.shape}"
            + (f", of each class {counts}" if name.endswith("labels") else "")
        )


if __name__ == "__main__":
    main()

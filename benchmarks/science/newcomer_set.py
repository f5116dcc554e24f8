#!/usr/bin/env python3
"""Create the data of a joining client from PneumoniaMNIST images outside the embedded set.

    python -m benchmarks newcomer_set --data pneumoniamnist.npz --out newcomer.npz

The input has the MedMNIST layout. Its splits are concatenated, starting with the training split.
`join.py` uses a fifth of the images for testing. Images are compared by their pixels, so duplicates
of embedded images are also removed.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
Arrays = dict[str, np.ndarray]


def left_over(whole: Arrays, taken: Arrays) -> Arrays:
    """Return the images of `whole` that are in no split of `taken`.

    Args:
        whole: Arrays in the MedMNIST layout.
        taken: Arrays in the MedMNIST layout.

    Returns:
        The images `[N, ...]` under `train_images`, and the labels under `train_labels`.
    """
    images, labels = (
        np.concatenate([whole[f"{s}_{part}"] for s in SPLITS]) for part in ("images", "labels")
    )
    known = {image.tobytes() for s in SPLITS for image in taken[f"{s}_images"]}
    is_new = np.array([image.tobytes() not in known for image in images])
    return {"train_images": images[is_new], "train_labels": labels[is_new]}


def read(path: Path) -> Arrays:
    """Read the arrays of an `.npz` file, keyed by name."""
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def main() -> None:
    """Select the images and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="PneumoniaMNIST, 28x28, as an .npz file"
    )
    parser.add_argument("--out", type=Path, default=Path("newcomer.npz"))
    options = parser.parse_args()
    with as_file(files("hetero_fl.data") / "embedded" / "chest_xray.npz") as embedded:
        result = left_over(read(options.data), read(embedded))
    np.savez_compressed(options.out, **result)
    print(
        f"{options.out}: {len(result['train_images']):,} images, "
        f"by class {np.bincount(result['train_labels'][:, 0])}"
    )


if __name__ == "__main__":
    main()

"""Create a proxy set of chest X-rays that differ from the hospitals' images.

    python -m benchmarks proxy_sets --data pneumoniamnist.npz --out runs/proxy_sets

The command writes `scanner.npz` for `data.proxy.source`. The file contains 500 images of
PneumoniaMNIST that are not in the source `chest_xray`. They look as if taken by another scanner.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.science.newcomer_set import left_over, read

SIZE = 500
SHARE_OF_NORMAL = 0.25
CONTRAST = 0.5
BRIGHTNESS = 10.0
BLUR = 0.7

Images = NDArray[np.uint8]


def draw(labels: NDArray[Any], generator: np.random.Generator) -> list[int]:
    """Sample the row indices of `SIZE` images with the share of normal images of the source.

    Args:
        labels: Labels of all images, of which 0 is normal.
        generator: Random generator.
    """
    normal = round(SHARE_OF_NORMAL * SIZE)
    rows = [
        generator.choice(np.flatnonzero(labels == label), count, replace=False)
        for label, count in ((0, normal), (1, SIZE - normal))
    ]
    return [int(row) for row in generator.permutation(np.concatenate(rows))]


def other_scanner(images: Images) -> Images:
    """Blur images, and change their contrast and brightness."""
    blurred = np.stack([gaussian_filter(image.astype(np.float64), BLUR) for image in images])
    return np.clip(CONTRAST * blurred + BRIGHTNESS, 0, 255).astype(np.uint8)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="PneumoniaMNIST, 28x28 pixels")
    parser.add_argument("--out", type=Path, default=Path("runs/proxy_sets"), help="folder")
    options = parser.parse_args()
    with as_file(files("hetero_fl.data") / "embedded" / "chest_xray.npz") as embedded:
        unused = left_over(read(options.data), read(embedded))
    images, labels = unused["train_images"], unused["train_labels"].ravel()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = draw(labels, np.random.default_rng(0))
    path = options.out / "scanner.npz"
    np.savez_compressed(
        path, train_images=other_scanner(images[rows]), train_labels=unused["train_labels"][rows]
    )
    print(path)


if __name__ == "__main__":
    main()

"""Create proxy sets of chest X-rays that differ from the hospitals' images.

    python -m benchmarks proxy_sets --data pneumoniamnist.npz --out runs/proxy_sets

The command writes two `.npz` files for `data.proxy.source`. Each file contains 500 images of
PneumoniaMNIST that are not in the source `chest_xray`. The images in `scanner.npz` look as if taken
by another scanner. In `few_normal.npz`, one image in twenty is normal instead of one in four.
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
SHARE_OF_NORMAL = {"scanner": 0.25, "few_normal": 0.05}
CONTRAST = 0.5
BRIGHTNESS = 10.0
BLUR = 0.7

Images = NDArray[np.uint8]


def draw(labels: NDArray[Any], share: float, generator: np.random.Generator) -> list[int]:
    """Sample the row indices of `SIZE` images with a given share of normal images.

    Args:
        labels: Labels of all images, of which 0 is normal.
        share: Share of normal images.
        generator: Random generator.
    """
    normal = round(share * SIZE)
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
    """Write both files."""
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
    for name, share in SHARE_OF_NORMAL.items():
        rows = draw(labels, share, np.random.default_rng(0))
        chosen = other_scanner(images[rows]) if name == "scanner" else images[rows]
        path = options.out / f"{name}.npz"
        np.savez_compressed(path, train_images=chosen, train_labels=unused["train_labels"][rows])
        print(path)


if __name__ == "__main__":
    main()

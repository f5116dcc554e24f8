#!/usr/bin/env python3
"""Write the embedded digits as a split in the format of HtFLlib and PFLlib.

    python -m benchmarks htfllib_split --out FOLDER [--clients 10] [--alpha 0.1] [--seed 0]

Client K has the files `train/K.npz` and `test/K.npz`, and `config.json` describes the split. The
rows are divided by a Dirichlet distribution of the classes, and a quarter of the rows of each
client are test rows. The 8x8 digits are enlarged to RGB images of 16x16 with values from -1 to 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import hetero_fl as hfl
from hetero_fl.utils.seeding import keyed_generator
from tests.support.benchmark_folders import write_client_file

SIDE = 16
TEST_SHARE = 0.25
MIN_SIZE = 40
CLASSES = 10


def enlarge(images: Tensor) -> np.ndarray:
    """Return gray uint8 images `[N, 1, 8, 8]` as float32 `[N, 3, 16, 16]` from -1 to 1."""
    larger = torch.nn.functional.interpolate(
        images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False
    )
    return (larger / 127.5 - 1).expand(-1, 3, -1, -1).numpy()


def write_split(folder: Path, clients: int, alpha: float, seed: int) -> None:
    """Divide the digits among clients and write their files.

    Args:
        folder: Folder to write to.
        clients: Number of clients.
        alpha: Parameter of the Dirichlet distribution.
        seed: Seed of the partition and of the test rows.
    """
    partition = hfl.Dirichlet(alpha=alpha, cap=1.0, min_size=MIN_SIZE)
    counts = []
    for number, client in enumerate(hfl.split("digits", clients, partition, seed=seed)):
        rows = client.data.train
        order = torch.randperm(len(rows), generator=keyed_generator(seed, "htfllib_split", number))
        test = round(TEST_SHARE * len(rows))
        for part, chosen in {"test": order[:test], "train": order[test:]}.items():
            x = enlarge(rows.x[chosen])
            write_client_file(folder / part / f"{number}.npz", x=x, y=rows.labels[chosen].numpy())
        counts.append([[c, n] for c, n in enumerate(rows.labels.bincount().tolist()) if n])
    content = {
        "num_clients": clients,
        "num_classes": CLASSES,
        "non_iid": True,
        "balance": False,
        "partition": "dir",
        "alpha": alpha,
        "seed": seed,
        "Size of samples for labels in clients": counts,
    }
    (folder / "config.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    """Write the split and print the number of rows of each client."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--clients", type=int, default=10, help="number of clients (10)")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet partition (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out: {options.out} already exists; choose another folder or delete it")
    write_split(options.out, options.clients, options.alpha, options.seed)
    print(f"{options.out}: {options.clients} clients, seed {options.seed}")


if __name__ == "__main__":
    main()

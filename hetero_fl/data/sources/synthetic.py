"""Generated data sets: images, tables, and X-rays with gene profiles.

All data sets are marked as `simulated`, and are meant for tests and experiments without real data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.stored_rows import read_all
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Block, Dataset, Examples
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.images import CHEST_XRAY, chest_xray
from hetero_fl.utils.seeding import keyed_generator, stream_key

GROUPS = tuple(f"site_{i}" for i in range(1, 5))


@register_source("synthetic_images")
def synthetic_images(_config: SourceConfig, _root: Path) -> Dataset:
    """Generate 1,200 training and 400 test images (16x16 grayscale) of 4 classes."""
    return make_images()


@register_source("synthetic_table")
def synthetic_table(_config: SourceConfig, _root: Path) -> Dataset:
    """Generate 1,200 training and 400 test rows with 10 columns and 3 classes."""
    return make_table()


def make_images(
    rows: int = 1200,
    test_rows: int = 400,
    *,
    classes: int = 4,
    channels: int = 1,
    side: int = 16,
    noise: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Generate images of random patterns with noise.

    The pattern of a class is a 4x4 grid of standard normal numbers, upsampled bilinearly. Pixels
    are `0.5 + 0.12 * (pattern + noise * normal)`, clipped to 0..1 and converted to uint8. Each
    image belongs to one of four groups at random.

    Args:
        rows: Number of training images.
        test_rows: Number of test images.
        classes: Number of classes.
        channels: Number of channels.
        side: Height and width in pixels.
        noise: Standard deviation of the noise.
        seed: Random seed.

    Example:
        >>> from hetero_fl.data import make_images
        >>> make_images(rows=100, test_rows=20, classes=3, side=8)
        Dataset('synthetic_images': multiclass with 3 outputs, x uint8 [1, 8, 8]; \
rows: train 100, test 20, simulated)
    """
    generator = keyed_generator("data", "synthetic_images", seed)
    grid = torch.randn(classes, channels, 4, 4, generator=generator)
    pattern = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)

    def make(n: int) -> Examples:
        y = torch.randint(classes, (n,), generator=generator)
        normal = torch.randn(n, channels, side, side, generator=generator)
        pixels = 0.5 + 0.12 * (pattern[y] + noise * normal)
        x = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        return Examples(x, y, _sample_groups(n, generator), GROUPS)

    about = "generated: class patterns under noise"
    train = make(rows)
    test = make(test_rows)
    return Dataset(
        "synthetic_images",
        Task("multiclass", classes),
        train,
        test=test,
        simulated=True,
        about=about,
    )


def make_table(
    rows: int = 1200,
    test_rows: int = 400,
    *,
    kind: Literal["multiclass", "multilabel", "regression"] = "multiclass",
    columns: int = 10,
    outputs: int = 3,
    noise: float = 0.3,
    seed: int = 0,
) -> Dataset:
    """Generate a table whose targets depend linearly on the features.

    Features x are standard normal. Scores are `x A / sqrt(columns) + noise * normal`, where A has
    standard normal entries. Targets are the argmax of the scores (multiclass), scores > 0
    (multilabel) or the scores (regression). Each row belongs to one of four groups at random.

    Args:
        rows: Number of training rows.
        test_rows: Number of test rows.
        kind: Kind of task.
        columns: Number of features.
        outputs: Number of outputs.
        noise: Standard deviation of the noise.
        seed: Random seed.

    Example:
        >>> from hetero_fl.data import make_table
        >>> dataset = make_table(rows=100, test_rows=20, kind="regression", columns=5, outputs=1)
        >>> dataset.train
        Examples(100 rows: x float32 [5], y float32 [1], group int64)
    """
    generator = keyed_generator("data", "synthetic_table", seed)
    matrix = torch.randn(columns, outputs, generator=generator) / columns**0.5

    def make(n: int) -> Examples:
        x = torch.randn(n, columns, generator=generator)
        scores = x @ matrix + noise * torch.randn(n, outputs, generator=generator)
        y: Tensor = {
            "multiclass": scores.argmax(1),
            "multilabel": (scores > 0).float(),
            "regression": scores,
        }[kind]
        return Examples(x, y, _sample_groups(n, generator), GROUPS)

    names = tuple(f"x{i + 1}" for i in range(columns))
    about = "generated: a linear rule under noise"
    train = make(rows)
    test = make(test_rows)
    return Dataset(
        "synthetic_table",
        Task(kind, outputs),
        train,
        test=test,
        simulated=True,
        about=about,
        columns=names,
    )


def _sample_groups(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(GROUPS), (n,), generator=generator)


GENES = 60
RESPONSES = (0.7, -0.7, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0)
"""Effect of the disease on the activity of each pathway."""
BATCH = 0.5
"""Standard deviation of the batch effects of the laboratories."""
NOISE = 1.0
"""Standard deviation of the noise of a gene expression."""
WITHOUT_GENES = 0.3
"""Share of the patients at universities who have no gene profile."""
# Share of the patients at each hospital, and relative weight of healthy patients.
HOSPITALS = {
    "university_1": (0.22, 1.5),
    "university_2": (0.22, 0.6),
    "clinic_1": (0.08, 0.5),
    "clinic_2": (0.08, 1.0),
    "clinic_3": (0.08, 1.6),
    "institute_1": (0.16, 0.8),
    "institute_2": (0.16, 1.2),
}
BLOCKS = (Block("image", (1, 28, 28)), Block("genes", (GENES,)))


@register_source("xray_genes", task=CHEST_XRAY)
def xray_genes(config: SourceConfig, root: Path) -> Dataset:
    """Load the X-rays of `chest_xray` with generated gene profiles, at seven hospitals.

    Images and labels are real, and the gene profiles are generated by `make_profiles`. Universities
    have images of all patients and gene profiles of 70% of the patients. Clinics have images only,
    and institutes have gene profiles only. Validation and test patients have an image and a gene
    profile from another laboratory. The shares of patients are defined in `HOSPITALS`.
    """
    real = chest_xray(config, root)
    assert real.validation is not None and real.test is not None
    hospitals = _hospitals(real.train)
    train = _rows(real.train, "train", hospitals)
    names = tuple(HOSPITALS)
    image = slice(0, BLOCKS[0].size)
    genes = slice(BLOCKS[0].size, None)
    kinds = torch.tensor(
        [("university", "clinic", "institute").index(n.split("_")[0]) for n in names]
    )[hospitals]
    train[kinds == 2, image] = torch.nan
    without_genes = torch.from_numpy(_uniform("lacks genes", len(train), 1)[:, 0] < WITHOUT_GENES)
    train[(kinds == 1) | ((kinds == 0) & without_genes), genes] = torch.nan
    outside = {
        s: torch.full((len(e),), len(names))
        for s, e in (("validation", real.validation), ("test", real.test))
    }
    return Dataset(
        "xray_genes",
        CHEST_XRAY,
        Examples(train, real.train.y, hospitals, names),
        Examples(_rows(real.validation, "validation", outside["validation"]), real.validation.y),
        Examples(_rows(real.test, "test", outside["test"]), real.test.y),
        simulated=True,
        about=f"{real.about}; gene profiles are generated (8 pathways, 4 of which respond to the "
        "disease; a batch effect of each laboratory)",
        columns=(),
        blocks=BLOCKS,
    )


def _rows(examples: Examples, split: str, laboratory: Tensor) -> Tensor:
    """Return pixels followed by generated gene expressions, float32 `[N, 844]`."""
    profiles = make_profiles(examples.labels, laboratory, split)
    pixels = read_all(examples.x).flatten(1).float() / 255
    return torch.cat([pixels, profiles], dim=1)


def make_profiles(y: Tensor, laboratory: Tensor, split: str) -> Tensor:
    """Generate gene profiles of patients.

    The expressions of a patient with label y (0 normal, 1 pneumonia) in laboratory h are
    `g = a W + b_h + e` with pathway activities `a_p = s_p (2 y - 1) + z_p`. Here, s contains the
    `RESPONSES` of the 8 pathways, and z is standard normal. W loads each gene on one or two
    pathways with weights of magnitude 0.6 to 1.2. The batch effect of the laboratory is b_h, and
    the noise is e. The random numbers of a patient are hashes of the split and the row, and do not
    depend on the number of patients.

    Args:
        y: Labels, int64 `[N]`.
        laboratory: Laboratory of each patient, int64 `[N]`.
        split: Name of the split, on which the random numbers depend.

    Returns:
        Gene expressions, float32 `[N, 60]`.
    """
    pathways, batch = _structure()
    normal = _normal(split, len(y), len(RESPONSES) + GENES)
    activity = torch.tensor(RESPONSES) * (2 * y[:, None] - 1) + normal[:, : len(RESPONSES)]
    return activity @ pathways + batch[laboratory] + NOISE * normal[:, len(RESPONSES) :]


def _structure() -> tuple[Tensor, Tensor]:
    """Return the loadings W `[8, 60]` and the batch effects of the laboratories, `[8, 60]`."""
    generator = keyed_generator("data", "xray_genes", "structure")
    count = len(RESPONSES)
    first = torch.arange(GENES) % count
    weights = (0.6 + 0.6 * torch.rand(GENES, 2, generator=generator)) * (
        2.0 * torch.randint(2, (GENES, 2), generator=generator) - 1
    )
    # Half of the genes are loaded on a second pathway.
    weights[:, 1] *= torch.rand(GENES, generator=generator) < 0.5
    second = (first + torch.randint(1, count, (GENES,), generator=generator)) % count
    pathways = torch.zeros(count, GENES)
    genes = torch.arange(GENES)
    pathways[first, genes] = weights[:, 0]
    pathways[second, genes] += weights[:, 1]
    return pathways, BATCH * torch.randn(len(HOSPITALS) + 1, GENES, generator=generator)


def _hospitals(train: Examples) -> Tensor:
    """Return the hospital of each patient, int64 `[N]`."""
    shares = torch.tensor([share for share, _ in HOSPITALS.values()], dtype=torch.float64)
    healthy = shares * torch.tensor(
        [weight for _, weight in HOSPITALS.values()], dtype=torch.float64
    )
    edges = torch.stack([healthy / healthy.sum(), shares / shares.sum()]).cumsum(1)[train.labels]
    u = torch.from_numpy(_uniform("hospital", len(train), 1))
    return (u > edges[:, :-1]).sum(1)


def _uniform(use: str, rows: int, columns: int) -> np.ndarray:
    """Return uniform random numbers, float64 `[rows, columns]`, as hashes of (use, row, column).

    The hash is SplitMix64 (Steele et al. 2014).
    """
    start = np.uint64(stream_key("data", "xray_genes", use) & (2**64 - 1))
    with np.errstate(over="ignore"):
        place = np.arange(rows, dtype=np.uint64)[:, None] * np.uint64(2**20) + np.arange(
            columns, dtype=np.uint64
        )
        z = start + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (np.asarray(z >> np.uint64(11), dtype=np.float64) + 0.5) / 2**53


def _normal(use: str, rows: int, columns: int) -> Tensor:
    """Return standard normal random numbers, float32 `[rows, columns]`, based on `_uniform`."""
    u = torch.from_numpy(_uniform(use, rows, columns))
    return (2**0.5 * torch.erfinv(2 * u - 1)).float()

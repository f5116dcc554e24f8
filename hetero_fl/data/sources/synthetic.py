"""Generated data sets: images, tables, and X-rays with gene profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Block, Dataset, Examples
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.images import CHEST_XRAY, chest_xray
from hetero_fl.utils.seeding import keyed_generator, stream_key

# Generated sets, for tests and trials without data. They say so: `simulated` is true.
#
# *Images*: each class has a pattern, a smooth random surface (a 4x4 grid of standard normals,
# scaled up bilinearly); an image is grey 0.5 + 0.12 · (its class's pattern + noise · standard
# normals), cut to 0..1, as uint8.
#
# *Tables*: x is standard normal; a matrix A with standard normal entries, divided by √columns,
# gives scores s = A x + noise · standard normals; the target is argmax s (multiclass), s > 0
# (multilabel) or s itself (regression).
#
# In both, a row belongs to one of four groups at random, and the test set is made as the training
# set is.

GROUPS = tuple(f"site_{i}" for i in range(1, 5))


@register_source("synthetic_images")
def synthetic_images(config: SourceConfig, root: Path) -> Dataset:
    """1,200 training and 400 test images, 16x16 grey, 4 classes."""
    return make_images()


@register_source("synthetic_table")
def synthetic_table(config: SourceConfig, root: Path) -> Dataset:
    """1,200 training and 400 test rows of 10 columns, 3 classes."""
    return make_table()


def make_images(
    rows: int = 1200, test_rows: int = 400, *, classes: int = 4, channels: int = 1, side: int = 16, noise: float = 1.0,
    seed: int = 0,
) -> Dataset:  # fmt: skip
    """Generated images: uint8 `[rows, channels, side, side]`."""
    draws = keyed_generator("data", "synthetic_images", seed)
    grid = torch.randn(classes, channels, 4, 4, generator=draws)
    pattern = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)

    def make(n: int) -> Examples:
        y = torch.randint(classes, (n,), generator=draws)
        grey = 0.5 + 0.12 * (
            pattern[y] + noise * torch.randn(n, channels, side, side, generator=draws)
        )
        return Examples(
            (grey.clamp(0, 1) * 255).round().to(torch.uint8), y, _groups(n, draws), GROUPS
        )

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
    rows: int = 1200, test_rows: int = 400, *, kind: Literal["multiclass", "multilabel", "regression"] = "multiclass",
    columns: int = 10, outputs: int = 3, noise: float = 0.3, seed: int = 0,
) -> Dataset:  # fmt: skip
    """A generated table: float32 `[rows, columns]`."""
    draws = keyed_generator("data", "synthetic_table", seed)
    matrix = torch.randn(columns, outputs, generator=draws) / columns**0.5

    def make(n: int) -> Examples:
        x = torch.randn(n, columns, generator=draws)
        scores = x @ matrix + noise * torch.randn(n, outputs, generator=draws)
        y: Tensor = {
            "multiclass": scores.argmax(1),
            "multilabel": (scores > 0).float(),
            "regression": scores,
        }[kind]
        return Examples(x, y, _groups(n, draws), GROUPS)

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


def _groups(n: int, draws: torch.Generator) -> Tensor:
    return torch.randint(len(GROUPS), (n,), generator=draws)


# Hospitals with images, with gene profiles, or with both: the embedded chest X-rays, and profiles
# that are generated.
#
# The X-rays and their labels are real (`chest_xray`). The profiles are not, and every result says
# so (`simulated`). A patient with label y (0 normal, 1 pneumonia) at hospital h has expressions of
# 60 genes
#
#     g = a W + b_h + e,    a_p = s_p (2y − 1) + z_p
#
# with 8 pathways, whose activities a are standard normal around a shift: pathways 0 to 3 respond to
# the disease (s = +0.7, −0.7, +0.5, −0.5), the others do not. W `[8, 60]` loads each gene on one or
# two pathways (weights from 0.6 to 1.2, of either sign), so that profiles are of low rank; b_h is
# the batch effect of h's laboratory, a normal of σ 0.5 for each gene; e is noise of σ 1. Genes
# alone and images alone are then about equally good where a hospital has 200 patients, and each
# adds something.
#
# Whose patient it is, and what was measured: universities have both, 30% of their patients without
# genes; clinics have images, institutes genes alone. `HOSPITALS` gives the shares of patients, and
# how much likelier a healthy one is to go there. Validation and test patients come from elsewhere,
# with a laboratory of its own, and have everything.
#
# Everything is drawn patient by patient, by a hash of (split, row, draw): a patient's profile does
# not depend on how many others there are.

GENES = 60
RESPONSES = (0.7, -0.7, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0)
BATCH = 0.5
NOISE = 1.0
WITHOUT_GENES = 0.3
HOSPITALS = {  # share of the patients, weight of the healthy ones
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
    """Chest X-rays of `chest_xray` with generated gene profiles, at seven hospitals; see the module's text."""
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
    lacking = torch.from_numpy(_uniform("lacks genes", len(train), 1)[:, 0] < WITHOUT_GENES)
    train[(kinds == 1) | ((kinds == 0) & lacking), genes] = torch.nan
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
        about=f"{real.about}; gene profiles are generated (8 pathways, 4 of which respond to the disease; a batch effect of each "
        "laboratory)",
        columns=(),
        blocks=BLOCKS,
    )


def _rows(examples: Examples, split: str, laboratory: Tensor) -> Tensor:
    """Pixels and expressions side by side, float32 `[N, 844]`."""
    profiles = make_profiles(examples.labels, laboratory, split)
    return torch.cat([examples.x.flatten(1).float() / 255, profiles], dim=1)


def make_profiles(y: Tensor, laboratory: Tensor, split: str) -> Tensor:
    """Expressions float32 `[N, 60]` of patients with these labels (int64 `[N]`), measured in these laboratories (int64 `[N]`)."""
    pathways, batch = _structure()
    draws = _normal(split, len(y), len(RESPONSES) + GENES)
    activity = torch.tensor(RESPONSES) * (2 * y[:, None] - 1) + draws[:, : len(RESPONSES)]
    return activity @ pathways + batch[laboratory] + NOISE * draws[:, len(RESPONSES) :]


def _structure() -> tuple[Tensor, Tensor]:
    """Loadings W `[8, 60]` and the batch effects of all laboratories `[8, 60]`, the last that of patients from elsewhere."""
    draws = keyed_generator("data", "xray_genes", "structure")
    count = len(RESPONSES)
    first = torch.arange(GENES) % count
    weights = (0.6 + 0.6 * torch.rand(GENES, 2, generator=draws)) * (
        2.0 * torch.randint(2, (GENES, 2), generator=draws) - 1
    )
    # half of the genes are on a second pathway
    weights[:, 1] *= torch.rand(GENES, generator=draws) < 0.5
    second = (first + torch.randint(1, count, (GENES,), generator=draws)) % count
    pathways = torch.zeros(count, GENES)
    genes = torch.arange(GENES)
    pathways[first, genes] = weights[:, 0]
    pathways[second, genes] += weights[:, 1]
    return pathways, BATCH * torch.randn(len(HOSPITALS) + 1, GENES, generator=draws)


def _hospitals(train: Examples) -> Tensor:
    """Whose patient each is, int64 `[N]`."""
    shares = torch.tensor([share for share, _ in HOSPITALS.values()], dtype=torch.float64)
    healthy = shares * torch.tensor(
        [weight for _, weight in HOSPITALS.values()], dtype=torch.float64
    )
    edges = torch.stack([healthy / healthy.sum(), shares / shares.sum()]).cumsum(1)[train.labels]
    u = torch.from_numpy(_uniform("hospital", len(train), 1))
    return (u > edges[:, :-1]).sum(1)


def _uniform(use: str, rows: int, columns: int) -> np.ndarray:
    """Numbers in (0, 1), float64 `[rows, columns]`, each a hash of (use, row, column): SplitMix64 (Steele et al. 2014)."""
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
    """Standard normals float32 `[rows, columns]`, each of its own row and column."""
    u = torch.from_numpy(_uniform(use, rows, columns))
    return (2**0.5 * torch.erfinv(2 * u - 1)).float()

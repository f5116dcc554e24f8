"""The data source `two_rings`."""

from __future__ import annotations

from pathlib import Path

import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, from_arrays, register_source

NUM_ROWS = 1200


# The decorator is optional. It declares the configuration keys that the function reads.
@register_source("two_rings", keys=("size",))
def two_rings(config: SourceConfig, root: Path) -> Dataset:
    """Return a table of points on two rings, with the ring as label.

    Args:
        config: The section `data` of the configuration. `size` is the number of further columns,
            which contain noise.
        root: Folder for downloads, which this source does not use.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(NUM_ROWS) % 2
    angle = 2 * torch.pi * torch.rand(NUM_ROWS, generator=generator)
    radius = 1 + y + 0.2 * torch.randn(NUM_ROWS, generator=generator)
    noise = torch.randn(NUM_ROWS, config.size or 1, generator=generator)
    x = torch.cat([(radius * angle.cos())[:, None], (radius * angle.sin())[:, None], noise], dim=1)
    return from_arrays(x, y, name="two_rings", simulated=True)

"""The sources; importing this package registers them all. Nothing is downloaded before it is asked for."""

from hetero_fl.data.sources import (
    embedded,
    folder,
    medmnist_sets,
    synthetic,
    table,
    torchvision_sets,
    traffic,
    xray_genes,
)

__all__ = ["embedded", "folder", "medmnist_sets", "synthetic", "table", "torchvision_sets", "traffic", "xray_genes"]

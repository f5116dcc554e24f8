"""The sources; importing this package registers them all. Nothing is downloaded before it is asked for."""

from hetero_fl.data.sources import (
    activity,
    bank_fraud,
    embedded,
    folder,
    medmnist_sets,
    phrases,
    synthetic,
    table,
    text,
    torchvision_sets,
    traffic,
    xray_genes,
)

__all__ = [
    "activity",
    "bank_fraud",
    "embedded",
    "folder",
    "medmnist_sets",
    "phrases",
    "synthetic",
    "table",
    "text",
    "torchvision_sets",
    "traffic",
    "xray_genes",
]

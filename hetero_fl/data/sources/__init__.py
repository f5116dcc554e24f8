"""The sources; importing this package registers them all. Nothing is downloaded before it is asked for."""

from hetero_fl.data.sources import embedded, folder, medmnist_sets, phrases, synthetic, table, text, torchvision_sets

__all__ = ["embedded", "folder", "medmnist_sets", "phrases", "synthetic", "table", "text", "torchvision_sets"]

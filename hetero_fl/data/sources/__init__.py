"""Data sources. Importing this package registers them; data is downloaded on first use."""

from hetero_fl.data.sources import images, sensors, synthetic, tables, text, traffic

__all__ = ["images", "sensors", "synthetic", "tables", "text", "traffic"]

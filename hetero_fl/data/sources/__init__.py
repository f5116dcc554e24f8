"""Data sources, all of which are registered when this package is imported.

Data is downloaded on first use.
"""

from hetero_fl.data.sources import images, sensors, synthetic, tables, text, traffic

__all__ = ["images", "sensors", "synthetic", "tables", "text", "traffic"]

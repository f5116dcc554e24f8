"""The sources; importing this package registers them all. Nothing is downloaded before it is asked for."""

from hetero_fl.data.sources import images, sensors, synthetic, tables, text, traffic

__all__ = ["images", "sensors", "synthetic", "tables", "text", "traffic"]

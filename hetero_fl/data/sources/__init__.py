"""Data sources, all of which are registered when this package is imported.

Data is downloaded on first use.
"""

from hetero_fl.data.sources import (
    benchmark_files,
    driving,
    hugging_face,
    image_tables,
    images,
    movies,
    speech,
    synthetic,
    tables,
    text,
    traffic,
)

__all__ = [
    "benchmark_files",
    "driving",
    "hugging_face",
    "image_tables",
    "images",
    "movies",
    "speech",
    "synthetic",
    "tables",
    "text",
    "traffic",
]

"""Data sets of the Hugging Face library `datasets`: from the hub, from a folder, or in memory.

`data.name: hf:NAME` reads a data set of the hub, and `hf:FOLDER` a folder that `save_to_disk` wrote
or that `load_dataset` reads. Columns and splits are mapped by name.
"""

from hetero_fl.data.sources.hugging_face.source import hugging_face

__all__ = ["hugging_face"]

"""Tables: a CSV, TSV or Parquet file, a row per example, columns of numbers or categories, one or several of labels."""

from __future__ import annotations

from pathlib import Path

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset
from hetero_fl.data.registry import source
from hetero_fl.errors import UserError


@source("table", keys=("path", "label", "group", "patient", "task", "categories"))
def table(config: SourceConfig, root: Path) -> Dataset:
    """The rows of a file; see `read_table`. `config.label` names the labels, `config.group` whose row it is,
    `config.patient` of whom, `config.task` what is learned, `config.categories` which text columns are encoded."""
    from hetero_fl.data.sources.frames import read_frame  # pandas takes half a second to load: only where it is used
    from hetero_fl.data.sources.tabular import read_table

    path = Path(str(config.path)).expanduser()
    frame = read_frame(path, (config.group, config.patient, *(config.categories or ())))
    if config.label is None:
        columns = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"label: missing; name the column of labels; choose from {columns}")
    return read_table(frame, path, config.label, config.group, config.patient, config.task, config.categories)

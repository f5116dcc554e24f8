"""Table sources: CSV, TSV and Parquet files, and simulated payments at six banks."""

from __future__ import annotations

from pathlib import Path

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.npz_columns import read_columns
from hetero_fl.utils.errors import UserError


@register_source("table", keys=("path", "label", "group", "patient", "task", "categories", "read"))
def table(config: SourceConfig, _root: Path) -> Dataset:
    """Load a CSV, TSV or Parquet file (see `read_table`)."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.table_files import read_frame, read_table

    path = Path(str(config.path)).expanduser()
    frame = read_frame(path, (config.group, config.patient), config.categories or (), config.read)
    if config.label is None:
        columns = ", ".join(frame.columns[:20])
        raise UserError(f"label: missing; set the column of the labels, choose from {columns}")
    return read_table(
        frame,
        path,
        config.label,
        group=config.group,
        patient=config.patient,
        kind=config.task,
        categories=config.categories,
    )


@register_source("bank_fraud")
def bank_fraud(_config: SourceConfig, _root: Path) -> Dataset:
    """Read 8,800 simulated training payments at six banks (groups), about 3% of which are fraud.

    The global validation and test sets have 500 payments of each bank.
    """
    task = Task("multiclass", 2, ("honest", "fraud"))
    dataset = read_columns(EMBEDDED / "bank_fraud.npz", "bank_fraud", group="bank", task=task)
    dataset.simulated = True
    return dataset

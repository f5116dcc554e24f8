"""Table sources: CSV, TSV and Parquet files of rows or of sensor samples, and simulated data."""

from __future__ import annotations

from pathlib import Path

from hetero_fl.config.data import SourceConfig, WindowsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.npz_files import read_columns


@register_source("table", keys=("path", "label", "group", "patient", "task", "categories", "read"))
def table(config: SourceConfig, _root: Path, labeled: bool = True) -> Dataset:
    """Load a CSV, TSV or Parquet file (see `read_table`)."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import read_frame
    from hetero_fl.data.sources.tables.frames import read_table

    path = Path(str(config.path)).expanduser()
    frame = read_frame(path, (config.group, config.patient), config.categories or (), config.read)
    return read_table(
        frame,
        path,
        config.label,
        group=config.group,
        patient=config.patient,
        kind=config.task,
        categories=config.categories if labeled else config.categories or {},
        labeled=labeled,
    )


@register_source("bank_fraud", default_path=EMBEDDED / "bank_fraud.npz")
def bank_fraud(config: SourceConfig, _root: Path) -> Dataset:
    """Read 8,800 simulated training payments at six banks (groups), about 3% of which are fraud.

    The global validation and test sets have 500 payments of each bank.
    """
    task = Task("multiclass", 2, ("honest", "fraud"))
    return read_columns(Path(str(config.path)), "bank_fraud", group="bank", task=task)


@register_source(
    "activity",
    keys=("path", "label", "group", "windows", "read"),
    default_path=EMBEDDED / "activity.npz",
)
def activity(config: SourceConfig, _root: Path, labeled: bool = True) -> Dataset:
    """Read labeled windows from a `.npz` file, or samples from a table (see `read_samples`).

    The classes of a `.npz` file (see `read_columns`) are in the array `config.label` (default:
    `y`), and the groups in `config.group` (default: `person`, if it exists). The simulated file
    has windows of 27 persons, nine of them for training.
    """
    path = Path(str(config.path)).expanduser()
    if path.suffix.lower() == ".npz":
        return read_columns(
            path,
            "activity",
            config.label or "y",
            config.group or "person",
            needs_group=config.group is not None,
            labeled=labeled,
        )
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.recordings import read_samples

    windows = config.windows or WindowsConfig()
    return read_samples(path, windows, config.label, config.group, config.read)

"""Prepare a finished run again with its data, and find its training rows in other data."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hetero_fl.data import Dataset
from hetero_fl.data.overlap import row_hashes
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.federation.store import EarlierVersionError, checkpoint_files, read_checkpoint
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import CodecError


def prepare_again(run: Run, dataset: Dataset | None = None) -> PreparedRun:
    """Prepare a finished run with its data.

    The data is compared by the hash in the last checkpoint and by the numbers of rows, or without a
    readable checkpoint, such as one of an earlier version, by the numbers of rows only.

    Args:
        run: The finished run.
        dataset: The data set in memory that the run was trained on. If None, the configured data is
            loaded.

    Raises:
        UserError: If the data cannot be loaded, or differs from the data of the run.
    """
    prepared = prepare(run.config(), dataset=dataset, allow_code=run.permission)
    data = prepared.data
    known = run.summary["data"]
    sizes = {"n_train": data.n_train, "n_proxy": data.n_proxy, "n_test": data.n_test}
    content_hash = _content_hash(run)
    if any(known[key] != size for key, size in sizes.items()) or (
        content_hash is not None and content_hash != data.content_hash()
    ):
        raise UserError(
            f"{run.path}: the data differs from the data that this run was trained on; restore "
            "it, or pass it as dataset="
        )
    return prepared


def _content_hash(run: Run) -> str | None:
    """Return the hash of the data in the last checkpoint, or None if no checkpoint is readable."""
    checkpoints = checkpoint_files(run.path / "checkpoint")
    if not checkpoints:
        return None
    try:
        return read_checkpoint(checkpoints[-1])[0].get("data")
    except (CodecError, EarlierVersionError, OSError):
        return None


def num_training_rows(prepared: PreparedRun, x: Tensor) -> int:
    """Return the number of raw rows that are training rows of a run.

    Args:
        prepared: The run. The result is 0 if its rows have another shape.
        x: Raw rows, `[N, ...]`.
    """
    if tuple(x.shape[1:]) != prepared.data.input_shape:
        return 0
    given = row_hashes(x)
    seen = np.zeros(len(given), dtype=bool)
    for rows in prepared.data.private_rows():
        seen |= np.isin(given, row_hashes(rows))
    return int(seen.sum())


def note_on_training_rows(
    prepared: PreparedRun, x: Tensor, rows: str, models: str = "the models"
) -> list[str]:
    """Return a note if raw rows are training rows of a run, or an empty list.

    Args:
        prepared: The run.
        x: Raw rows, `[N, ...]`.
        rows: Description of the rows.
        models: Description of the models whose scores are too optimistic.
    """
    count = num_training_rows(prepared, x)
    if not count:
        return []
    verb = "is also in the run's" if count == 1 else "are also in the run's"
    return [f"{count} of {rows} {verb} training rows: scores are too optimistic for {models}"]

"""Prepare a finished run again with its data, and find its training rows in other data."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hetero_fl.data import Dataset
from hetero_fl.data.overlap import row_hashes
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.federation.store import checkpoint_files, read_checkpoint
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError


def prepare_again(run: Run, dataset: Dataset | None = None) -> PreparedRun:
    """Prepare a finished run with its data.

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
    is_same = all(known[key] == size for key, size in sizes.items())
    checkpoints = checkpoint_files(run.path / "checkpoint")
    if is_same and checkpoints:
        is_same = read_checkpoint(checkpoints[-1])[0]["data"] == data.content_hash()
    if not is_same:
        raise UserError(
            f"{run.path}: the data differs from the data that this run was trained on; restore "
            "it, or pass it as dataset="
        )
    return prepared


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

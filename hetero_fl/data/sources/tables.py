"""Table sources: CSV, TSV and Parquet files, and a synthetic data set of payments at six banks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.data.registry import register_source
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_numpy_generator


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


COMMON_COLUMNS = (
    "amount",
    "account_age",
    "payments_today",
    "distance",
    "night",
    "foreign",
    "new_payee",
    "balance",
)
"""Columns of all banks."""
SPECIAL = {
    "card": ("merchant_risk", "limit_used", "card_present"),
    "credit": ("debt_ratio", "late_months", "income"),
    "online": ("device_age", "failed_logins", "session_length"),
}
"""Additional columns of each kind of bank."""
BINARY = {"night": 0.25, "foreign": 0.15, "new_payee": 0.3, "card_present": 0.7}
"""Share of ones in each binary column."""
WEIGHTS = {
    "merchant_risk": 1.0,
    "limit_used": 0.6,
    "card_present": -0.8,
    "debt_ratio": 0.9,
    "late_months": 0.8,
    "income": -0.5,
    "device_age": -0.8,
    "failed_logins": 1.0,
    "session_length": -0.4,
}
"""Weights of the additional columns in the risk of a row."""
BANKS = {
    "card_1": (2400, 0.02),
    "card_2": (900, 0.05),
    "credit_1": (1800, 0.03),
    "credit_2": (700, 0.04),
    "online_1": (2000, 0.015),
    "online_2": (1000, 0.03),
}
"""Number of rows and share of fraud of each bank."""
COLUMNS = (*COMMON_COLUMNS, *(name for columns in SPECIAL.values() for name in columns))
UNUSED = 0.15
"""Share of the rows of a bank without values in its additional columns."""
HELD_OUT_ROWS = 500
"""Number of rows of each bank in each of the global validation and test sets."""
ABOUT = "generated: payments at six banks with columns, drift and a rate of fraud of their own"


@register_source("bank_fraud")
def bank_fraud(_config: SourceConfig, _root: Path) -> Dataset:
    """Generate 8,800 training payments at six banks (groups), about 3% of which are fraud."""
    sets = []
    for split, size in (("train", None), ("validation", HELD_OUT_ROWS), ("test", HELD_OUT_ROWS)):
        parts = [make_payments(bank, size or rows, split) for bank, (rows, _) in BANKS.items()]
        x, y = (torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in (0, 1))
        owners = torch.repeat_interleave(
            torch.arange(len(BANKS)), torch.tensor([len(part[1]) for part in parts])
        )
        sets.append(Examples(x, y, owners, tuple(BANKS)))
    task = Task("multiclass", 2, ("honest", "fraud"))
    train, validation, test = sets
    return Dataset(
        "bank_fraud", task, train, validation, test, simulated=True, about=ABOUT, columns=COLUMNS
    )


def make_payments(bank: str, rows: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Generate the payments of a bank.

    The risk of a row depends on interactions between the columns of all banks and on the additional
    columns of the bank. The rows with the highest risk are fraud. The columns of each bank are
    scaled and shifted differently (feature drift), which `normalize: own` partly reverses.

    Args:
        bank: Name of the bank, a key of `BANKS`.
        rows: Number of rows.
        split: Name of the split, on which the random numbers depend.

    Returns:
        Features, float32 `[rows, columns]`, NaN if missing, and labels, int64 `[rows]`, which are 1
        for fraud.
    """
    special = SPECIAL[bank.split("_", maxsplit=1)[0]]
    rng = keyed_numpy_generator("data", "bank_fraud", bank, split)
    value = {name: rng.normal(size=rows) for name in COLUMNS}
    value |= {name: (rng.random(rows) < share).astype(np.float64) for name, share in BINARY.items()}
    risk = (
        1.1 * value["amount"] * value["new_payee"]
        + 0.9 * value["foreign"] * value["night"]
        + 0.7 * (value["payments_today"] > 1)
        + 0.5 * value["amount"]
        - 0.6 * value["account_age"]
        + 0.2 * value["distance"] ** 2
    )
    unused = rng.random(rows) < UNUSED
    risk += np.where(unused, 0.0, sum(WEIGHTS[name] * value[name] for name in special))
    risk += 0.5 * rng.logistic(size=rows)
    fraud = (risk > np.quantile(risk, 1 - BANKS[bank][1])).astype(np.int64)
    drift = keyed_numpy_generator("data", "bank_fraud", bank, "drift")
    factor = np.exp(drift.normal(0, 0.3, len(COLUMNS)))
    shift = drift.normal(0, 0.5, len(COLUMNS))
    for i, name in enumerate(COLUMNS):
        if name not in BINARY:
            value[name] = factor[i] * value[name] + shift[i]
        if name not in COMMON_COLUMNS:
            value[name] = (
                np.where(unused, np.nan, value[name]) if name in special else np.full(rows, np.nan)
            )
    return np.stack([value[name] for name in COLUMNS], 1).astype(np.float32), fraud

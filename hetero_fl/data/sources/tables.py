"""Tables: CSV, TSV and Parquet files, and generated payments at six banks."""

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

# Tables: a CSV, TSV or Parquet file, a row per example, columns of numbers or categories, one or
# several of labels.


@register_source("table", keys=("path", "label", "group", "patient", "task", "categories"))
def table(config: SourceConfig, root: Path) -> Dataset:
    """The rows of a file; see `read_table`. `config.label` names the labels, `config.group` whose row it is,
    `config.patient` of whom, `config.task` what is learned, `config.categories` which text columns are encoded."""
    # pandas takes half a second to load: only where it is used
    from hetero_fl.data.sources.table_files import read_frame, read_table

    path = Path(str(config.path)).expanduser()
    frame = read_frame(path, (config.group, config.patient, *(config.categories or ())))
    if config.label is None:
        columns = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"label: missing; name the column of labels; choose from {columns}")
    return read_table(
        frame, path, config.label, config.group, config.patient, config.task, config.categories
    )


# Payments at six banks, some of them fraud: generated, very unbalanced, with different columns at
# each kind of bank.
#
# *Columns.* All banks have the eight of `COMMON`; a bank has besides the three of its kind (card,
# credit or online), which for the rows of other banks do not exist (NaN), and for 15% of its own
# rows, of customers who do not use the service, are missing.
#
# *Risk* of a row, from standard normal (or 0/1) columns, the same at all banks:
#
#     1.1 amount · new_payee + 0.9 foreign · night + 0.7 [payments_today > 1] + 0.5 amount − 0.6 account_age + 0.4 distance²/2
#     + Σ own · weight (where there are any) + logistic noise / 2
#
# so that it takes pairs of columns to see fraud, and own columns tell what the common ones do not.
# *A bank* marks the riskiest 1.5 to 5% of its rows as fraud, its own rate; and it measures in its
# own way: every column that is no mark is multiplied by a factor (log-normal, σ 0.3) and moved (σ
# 0.5) at each bank. That is its drift, which `normalize: own` undoes in part.
#
# The common validation and test sets hold 500 rows of each bank, of customers of their own.
# `simulated` is true.

COMMON = (
    "amount",
    "account_age",
    "payments_today",
    "distance",
    "night",
    "foreign",
    "new_payee",
    "balance",
)
OWN = {
    "card": ("merchant_risk", "limit_used", "card_present"),
    "credit": ("debt_ratio", "late_months", "income"),
    "online": ("device_age", "failed_logins", "session_length"),
}
MARKS = {"night": 0.25, "foreign": 0.15, "new_payee": 0.3, "card_present": 0.7}
"""Columns of 0 and 1, and how often they are 1."""
WEIGHTS = {
    "merchant_risk": 1.0, "limit_used": 0.6, "card_present": -0.8,
    "debt_ratio": 0.9, "late_months": 0.8, "income": -0.5,
    "device_age": -0.8, "failed_logins": 1.0, "session_length": -0.4,
}  # fmt: skip
BANKS = {
    "card_1": (2400, 0.02), "card_2": (900, 0.05),
    "credit_1": (1800, 0.03), "credit_2": (700, 0.04),
    "online_1": (2000, 0.015), "online_2": (1000, 0.03),
}  # fmt: skip
"""Rows, and the share of them that is fraud."""
COLUMNS = (*COMMON, *(name for own in OWN.values() for name in own))
UNUSED = 0.15
HELD_OUT_ROWS = 500
ABOUT = "generated: payments at six banks with columns, drift and a rate of fraud of their own"


@register_source("bank_fraud")
def bank_fraud(config: SourceConfig, root: Path) -> Dataset:
    """7,700 payments, about 3% fraud; groups are the banks."""
    sets = []
    for split, held in (("train", None), ("validation", HELD_OUT_ROWS), ("test", HELD_OUT_ROWS)):
        parts = [payments(bank, held or rows, split) for bank, (rows, _) in BANKS.items()]
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


def payments(bank: str, rows: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one bank as it measures them, float32 `[rows, columns]` with NaN for what it does not have, and which are fraud."""
    own = OWN[bank.split("_")[0]]
    draws = keyed_numpy_generator("data", "bank_fraud", bank, split)
    value = {name: draws.normal(size=rows) for name in COLUMNS}
    value |= {
        name: (draws.random(rows) < share).astype(np.float64) for name, share in MARKS.items()
    }
    risk = (
        1.1 * value["amount"] * value["new_payee"]
        + 0.9 * value["foreign"] * value["night"]
        + 0.7 * (value["payments_today"] > 1)
        + 0.5 * value["amount"]
        - 0.6 * value["account_age"]
        + 0.2 * value["distance"] ** 2
    )
    unused = draws.random(rows) < UNUSED
    risk += np.where(unused, 0.0, sum(WEIGHTS[name] * value[name] for name in own))
    risk += 0.5 * draws.logistic(size=rows)
    fraud = (risk > np.quantile(risk, 1 - BANKS[bank][1])).astype(np.int64)
    device = keyed_numpy_generator("data", "bank_fraud", bank, "drift")
    factor = np.exp(device.normal(0, 0.3, len(COLUMNS)))
    moved = device.normal(0, 0.5, len(COLUMNS))
    for i, name in enumerate(COLUMNS):
        if name not in MARKS:
            value[name] = factor[i] * value[name] + moved[i]
        if name not in COMMON:
            value[name] = (
                np.where(unused, np.nan, value[name]) if name in own else np.full(rows, np.nan)
            )
    return np.stack([value[name] for name in COLUMNS], 1).astype(np.float32), fraud

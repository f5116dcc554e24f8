"""Rows of each kind of partition, which a seed fixes for all versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig
from hetero_fl.data import federate, from_arrays

GOLDEN = json.loads(Path(__file__).with_name("partition_bits.json").read_text())
SIZES = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.5, "e": 3.0}
SECTIONS = {
    "iid": {"kind": "iid"},
    "in_order": {"kind": "in_order"},
    "dirichlet": {"kind": "dirichlet", "alpha": 0.3, "min_size": 10},
    # Rows, or patients, move to clients with too few.
    "skewed": {"kind": "dirichlet", "alpha": 0.02, "min_size": 40},
    "capped": {"kind": "dirichlet", "alpha": 0.2, "cap": 1.5, "min_size": 10},
    "classes": {"kind": "classes", "classes": 2, "classes_spread": 1, "min_size": 10},
    "shots": {"kind": "classes", "classes": 2, "shots": 4, "min_size": 2},
    "quantity": {"kind": "quantity", "alpha": 0.4},
    "natural": {"kind": "natural"},
    "drawn": {"kind": "drawn", "alpha": 0.5, "spread": 0.4, "rows": 60},
}


def fingerprint(name: str, has_patients: bool, seed: int) -> str:
    """Return the hash of the rows of each client and split."""
    rows = 600
    draws = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([5.0, 3, 2, 1]), rows, True, generator=draws)
    group = torch.multinomial(torch.tensor([3.0, 1, 1, 1, 2]), 200, True, generator=draws)
    patient = torch.multinomial(torch.arange(1.0, 201), rows, True, generator=draws)
    dataset = from_arrays(
        torch.arange(float(rows))[:, None],
        y,
        group=["abcde"[i] for i in group[patient].tolist()],
        patient=patient.numpy() if has_patients else None,
        test=(-torch.ones(9, 1), torch.arange(9) % 4),
    )
    # Few rows cannot be split.
    split = {"validation": 0, "test": 0} if name == "shots" else {}
    section = {"partition": SECTIONS[name], "proxy": {"size": 40}, "split": split}
    config = DataConfig.model_validate(section)
    clients = {client: ClientSettings(size=size) for client, size in SIZES.items()}
    data = federate(dataset, config, clients, seed)
    digest = hashlib.sha256()
    for client in data.client_ids:
        for split, share in data.client_rows[client].items():
            digest.update(f"{client} {split} {share.rows.tolist()}".encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("case", GOLDEN)
def test_rows_of_clients_do_not_change(case: str) -> None:
    name, unit = case.split()

    found = [fingerprint(name, unit == "patients", seed) for seed in range(3)]

    assert found == GOLDEN[case]

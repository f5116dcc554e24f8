"""Privacy, robust rules, compression and asynchronous runs, combined."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.federations import config, rounds_of, state_of

GROUPED = ["cnn_gn_small", {"name": "mlp", "hidden": [24]}]
RECORD = {"privacy": {"unit": "record", "noise_multiplier": 1.0, "clip": 1.0}}
CLIENT = {"privacy": {"unit": "client", "noise_multiplier": 0.1, "clip": 1.0}}
SECURE = {"channel__secure_sum": {}}
ROUNDED = {"channel__compress": [{"quantize": 8}]}


def models(**changes: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the server's models after two rounds."""
    return rounds_of(config("hybrid", GROUPED, 4, **changes)).server.models


def largest_difference(
    a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]
) -> float:
    return max(float((a[slot][n] - b[slot][n]).abs().max()) for slot in a for n in a[slot])


@pytest.mark.slow
@pytest.mark.parametrize(
    "protection", [{**RECORD, **ROUNDED}, CLIENT], ids=["records, rounded", "clients"]
)
def test_noise_is_equal_with_secure_aggregation(protection: dict[str, Any], float64: None) -> None:
    plain, summed = models(**protection), models(**protection, **SECURE)

    assert 0 < largest_difference(plain, summed) < 1e-7
    assert largest_difference(plain, models()) > 1e-3


@pytest.mark.slow
def test_private_run_tolerates_devices_and_faults() -> None:
    faulty = rounds_of(
        config("fedavg", GROUPED, 4, **RECORD, devices={}, faults={"lost": 0.5}), num_rounds=0
    )
    records = [faulty.run_round() for _ in range(2)]
    assert sum(record["counts"]["failed"] for record in records) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("fedavg", {"rule": "median"}),
        ("hybrid", {"rule": "median", "predictions": "median"}),
        ("fedmd", {"predictions": "median"}),
        ("fedproto", {"statistics": "median"}),
    ],
)
def test_compression_works_with_rules_and_asynchronous_runs(
    method: str, rules: dict[str, str]
) -> None:
    sparse = {
        "channel__compress": [{"topk": 0.2}, {"quantize": 8}],
        "channel__compress_down": ["half"],
    }
    source = config(
        method, "cnn_gn_small", 6, **sparse, runtime__mode="async", devices={}, clients__per_round=3
    )

    assert rounds_of(config(method, "cnn_gn_small", 6, **sparse, aggregation=rules)).completed == 2
    assert state_of(rounds_of(source)) == state_of(rounds_of(source))


def test_distributed_noise_has_the_documented_variance(float64: None) -> None:
    z, clip, clients = 0.5, 2.0, 4
    noise = {"unit": "client", "clip": clip}
    noises = [{"noise_multiplier": z, "distributed": True}, {"noise_multiplier": 1e-9}]

    runs = [
        rounds_of(
            config("fedavg", "cnn_gn_small", clients, **SECURE, privacy={**noise, **more}, rounds=1)
        )
        for more in noises
    ]

    ((_, noisy),), ((_, exact),) = (run.server.models.items() for run in runs)
    drawn = torch.cat(
        [(noisy[n] - exact[n]).flatten() for n in noisy if noisy[n].is_floating_point()]
    )
    # Three of four clients must stay, so the variance is 4/3 of the server's noise.
    expected = z * clip * (4 / 3) ** 0.5 / clients
    assert abs(float(drawn.std()) / expected - 1) < 5 / (2 * len(drawn)) ** 0.5

"""Privacy, robust rules, compression and asynchronous runs: combined or refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.support.federations import config, rounds_of

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
def test_noise_is_equal_with_secure_aggregation(protection: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        plain, summed = models(**protection), models(**protection, **SECURE)
        assert 0 < largest_difference(plain, summed) < 1e-7
        assert largest_difference(plain, models()) > 1e-3
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_private_run_tolerates_devices_and_faults() -> None:
    faulty = rounds_of(
        config("fedavg", GROUPED, 4, **RECORD, devices={}, faults={"lost": 0.5}), num_rounds=0
    )
    records = [faulty.run_round() for _ in range(2)]
    assert sum(record["counts"]["failed"] for record in records) > 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({**RECORD, "runtime__mode": "async"}, ("runtime.mode", "privacy.unit")),
        (
            {**RECORD, "cohort": {"sampling": "oort"}, "devices": {}},
            ("cohort.sampling=oort", "privacy.unit"),
        ),
        ({**RECORD, "cohort": {"too_few": "repeat"}}, ("cohort.too_few", "privacy.unit")),
        ({**CLIENT, **ROUNDED}, ("channel.compress=quantize", "privacy.unit=client")),
        (
            {**CLIENT, "aggregation__rule": "median"},
            ("aggregation.rule=median", "privacy.unit=client"),
        ),
        ({**SECURE, "runtime__mode": "async"}, ("runtime.mode", "channel.secure_sum")),
        (
            {"aggregation__rule": "median", "runtime__mode": "async"},
            ("runtime.mode", "aggregation.rule=median"),
        ),
    ],
)
def test_incompatible_features_are_refused(changes: dict[str, Any], parts: tuple[str, str]) -> None:
    with pytest.raises(UserError) as error:
        prepare(config("fedavg", "cnn_gn_small", 6, **changes))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "hybrid", "fedmd", "fedproto"])
def test_compression_works_with_rules_and_asynchronous_runs(method: str) -> None:
    sparse = {
        "channel__compress": [{"topk": 0.2}, {"quantize": 8}],
        "channel__compress_down": ["half"],
    }
    ruled = config(
        method,
        "cnn_gn_small",
        6,
        **sparse,
        aggregation={"rule": "median", "predictions": "median", "statistics": "median"},
    )
    if method in ("fedmd", "fedproto"):
        del ruled["aggregation"]["rule"]
    if method != "hybrid":
        ruled["aggregation"].pop(
            "predictions" if method in ("fedavg", "fedproto") else "rule", None
        )
    if method != "fedproto":
        ruled["aggregation"].pop("statistics")
    assert rounds_of(ruled).completed == 2
    source = config(
        method, "cnn_gn_small", 6, **sparse, runtime__mode="async", devices={}, clients__per_round=3
    )
    first_run = rounds_of(source)
    second_run = rounds_of(source)
    assert all(
        torch.equal(t, second_run.server.models[s][n])
        for s, m in first_run.server.models.items()
        for n, t in m.items()
    )


def test_distributed_noise_has_the_documented_variance() -> None:
    # three of four clients must stay, so the variance is 4/3 of the server's noise
    torch.set_default_dtype(torch.float64)
    try:
        z, clip, clients = 0.5, 2.0, 4
        noise = {"unit": "client", "clip": clip}
        runs = [
            rounds_of(
                config(
                    "fedavg", "cnn_gn_small", clients, **SECURE, privacy={**noise, **more}, rounds=1
                )
            )
            for more in ({"noise_multiplier": z, "distributed": True}, {"noise_multiplier": 1e-9})
        ]
        ((_, noisy),), ((_, exact),) = (run.server.models.items() for run in runs)
        drawn = torch.cat(
            [(noisy[n] - exact[n]).flatten() for n in noisy if noisy[n].is_floating_point()]
        )
        expected = z * clip * (4 / 3) ** 0.5 / clients
        assert abs(float(drawn.std()) / expected - 1) < 5 / (2 * len(drawn)) ** 0.5
    finally:
        torch.set_default_dtype(torch.float32)


def test_distributed_noise_requires_secure_aggregation() -> None:
    changes = {"privacy": {"unit": "client", "noise_multiplier": 1.0, "distributed": True}}
    with pytest.raises(UserError, match=r"privacy\.distributed: requires channel\.secure_sum"):
        prepare(config("fedavg", "cnn_gn_small", 4, **changes))

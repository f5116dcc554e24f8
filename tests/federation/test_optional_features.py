"""Optional features: a plain round runs none of their code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import hetero_fl
from tests.support.cases import each_case
from tests.support.federations import config, rounds_of

PACKAGE = Path(hetero_fl.__file__).parent
OPTIONAL = (
    "privacy/",
    "robustness/",
    "communication/compression.py",
    "communication/link.py",
    "communication/secure_aggregation/",
    "federation/simulation/",
    "federation/asynchronous.py",
    "federation/real_time.py",
    "deployment/",
)


def entered_modules(source: dict[str, Any]) -> set[str]:
    """Return the modules of the package that the second round of a run calls."""
    trainer = rounds_of(source, num_rounds=1)
    entered: set[str] = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(trace)
    try:
        trainer.run_round()
    finally:
        sys.setprofile(None)
    return entered


@each_case("method", ["fedavg", "fedmd", "hybrid"])
def test_plain_round_calls_no_optional_feature(method: str) -> None:
    entered = entered_modules(config(method, rounds=2))

    assert "federation/synchronous.py" in entered
    assert not [module for module in entered if module.startswith(OPTIONAL)]


@each_case(
    ("section", "module"),
    [
        (
            {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}},
            "privacy/server_side.py",
        ),
        (
            {"aggregation": {"rule": "median", "malicious": 1}},
            "robustness/robust_means.py",
        ),
        ({"channel": {"secure_sum": {}}}, "communication/secure_aggregation/server.py"),
        ({"channel": {"compress": [{"topk": 0.1}]}}, "communication/compression.py"),
        ({"devices": {"speed": 100.0}}, "federation/simulation/rounds.py"),
    ],
)
def test_enabled_feature_is_called(section: dict[str, Any], module: str) -> None:
    source = config("fedavg", {"name": "mlp", "hidden": [8]}, 4, rounds=2, **section)

    assert module in entered_modules(source)

"""Compression chains: valid forms and error messages."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

import hetero_fl as hfl
from hetero_fl.config import dump
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.experiment.configuration import load_config
from tests.support.cases import each_case
from tests.support.federations import config
from tests.support.python_federations import QUIET


@each_case(
    ("text", "names"),
    [
        ("[topk: 0.01, quantize: 8]", ["topk", "quantize"]),
        ("[randk: 500, half]", ["randk", "half"]),
        ("[top_classes: 3, quantize: 4]", ["top_classes", "quantize"]),
        ("[]", []),
    ],
)
def test_chain_survives_a_resolved_configuration(text: str, names: list[str]) -> None:
    loaded = load_config(config(), [f"channel.compress={text}"])
    assert [stage.kind for stage in loaded.channel.compress] == names
    assert load_config(yaml.safe_load(dump(loaded))).channel == loaded.channel


@pytest.mark.parametrize("stage", ["topk", "randk"])
def test_sparse_stage_reads_floats_as_shares_and_integers_as_numbers(stage: str) -> None:
    x = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    clients = [hfl.Client(f"site_{i}", "linear", (x, np.arange(60) % 2)) for i in range(2)]
    federation = hfl.Federation(clients)

    def upload_bytes(text: str) -> int:
        loaded = yaml.safe_load(f"[{{{stage}: {text}}}]")
        channel = hfl.Channel(compress=loaded)
        run = federation.train(hfl.FedAvg(), rounds=1, channel=channel, overrides=QUIET)
        return int(run.metrics[0]["up_bytes"])

    # The model has 8 * 2 weights and 2 biases in float32.
    assert upload_bytes("1.0") == upload_bytes("18") == upload_bytes("1000.0")
    # A single number is sent with its position.
    assert upload_bytes("1.0") - upload_bytes("1") >= 17 * 4


def test_threshold_of_secure_aggregation_is_a_share_or_an_integer() -> None:
    def survivors(threshold: float | None) -> int:
        loaded = load_config(config(clients=10, channel={"secure_sum": {"threshold": threshold}}))
        assert loaded.channel.secure_sum is not None
        return loaded.channel.secure_sum.min_survivors(10)

    assert [survivors(threshold) for threshold in (0.8, 1.0, 7, 7.0)] == [8, 10, 7, 7]
    assert survivors(None) == 7
    by_default = SecureAggregationConfig()
    assert [by_default.min_survivors(n) for n in (3, 4, 5, 6, 9, 200)] == [3, 3, 4, 5, 7, 134]


def test_explicit_keys_replace_those_of_a_preset() -> None:
    full = load_config(config(channel={"preset": "small"})).channel
    assert [stage.kind for stage in full.compress] == ["topk", "quantize"]
    assert [stage.kind for stage in full.compress_down] == ["quantize"]

    part = load_config(config(channel={"preset": "small", "compress": ["half"]})).channel
    assert [stage.kind for stage in part.compress] == ["half"]
    assert part.compress_down == full.compress_down

    again = load_config(config(channel=full.model_dump())).channel
    assert again == full

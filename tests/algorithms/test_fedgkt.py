"""FedGKT: the per-row items that clients send, and the logits that they receive."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.algorithms import FedGKT
from hetero_fl.core.payload import Payload
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.support.calls import record_results
from tests.support.federations import MIXED, config, rounds_of


def federation(models: Any = MIXED, clients: int = 3, **changes: Any) -> dict[str, Any]:
    large = {"name": "mlp", "hidden": [20]}
    return config("fedgkt", models, clients, algorithm__large_model=large, **changes)


def test_uploads_per_row_require_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = FedGKT.uploads
    assert set(specs) == {"features", "logits", "labels"}
    assert all(s.private and s.rows_of == "train" and s.share == "features" for s in specs.values())
    assert any("label of every training row" in note for note in prepare(federation()).notes)
    source = federation("mlp")
    source["clients"]["overrides"] = [
        # The parts that could be shared in earlier versions.
        {"match": "site_2", "shares": ["parameters", "predictions", "statistics"]}
    ]
    rounds = rounds_of(source, num_rounds=0)
    received = record_results(monkeypatch, rounds.link, "decode_upload")
    rounds.run_round()
    assert [len(payload) for payload in received] == [3, 0, 3]
    infos = rounds.federation.client_infos
    for payload, client in ((received[0], "site_1"), (received[2], "site_3")):
        assert len(payload["labels"]) == infos[client].num_rows
    assert set(rounds.server.state["logits"]) == {"site_1", "site_3"}
    source["clients"]["overrides"][0]["match"] = "*"
    with pytest.raises(UserError, match="requires clients that share features"):
        prepare(source)


def test_missing_rows_are_refused() -> None:
    rounds = rounds_of(federation("mlp"), num_rounds=0)
    receive = rounds.link.decode_upload

    def short(client: Any, data: bytes, requests: Any, index: int) -> Payload:
        if client.client_id == "site_1":
            payload = Payload.decode(data)
            data = Payload({n: payload[n][1:] for n in payload}, payload.report).encode()
        return receive(client, data, requests, index)

    rounds.link.decode_upload = short  # type: ignore[method-assign]
    assert list(rounds.run_round()["failed"]) == ["site_1"]


def test_deprecated_server_model_key_warns() -> None:
    with pytest.warns(
        FutureWarning, match="algorithm.server_model: deprecated; use algorithm.large_model"
    ):
        method = FedGKT.model_validate({"server_model": "linear"})

    assert method.large_model.name == "linear"

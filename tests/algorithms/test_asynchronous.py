"""Tensors and widths that architectures share in asynchronous runs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.asynchronous_runs import record_updates, session
from tests.support.federations import config

pytestmark = pytest.mark.usefixtures("float64")
# No two tasks end at the same time.
SECONDS = {"site_1": 1.0, "site_2": math.e, "site_3": 2 * math.pi}


def test_tensors_shared_by_architectures_stay_equal() -> None:
    for method, settings in (
        ("fedbuff", {"buffer": 1}),
        ("fedbuff", {"buffer": 3}),
        ("fedasync", {}),
    ):
        models = [
            {"name": "mlp", "hidden": [24], "feature_dim": 16},
            {"name": "mlp", "hidden": [12], "feature_dim": 16},
        ]
        algorithm = {"name": method, **settings}
        run = session(
            config(method, models, clients__common=["head."], algorithm=algorithm),
            seconds=lambda client_id, _: SECONDS[client_id],
        )
        start = [dict(model) for model in run.server.models.values()]
        run.run_round()
        one, other = run.server.models.values()
        for name in ("head.weight", "head.bias"):
            assert torch.equal(start[0][name], start[1][name]) and torch.equal(
                one[name], other[name]
            )
            assert not torch.equal(start[0][name], one[name])


def test_heterofl_weights_widths_by_rows_and_staleness(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"name": "mlp", "hidden": [hidden]} for hidden in (16, 8, 8)]
    algorithm = {"name": "heterofl", "model": models[0], "weighting": "samples"}
    wide_config = config("heterofl", models, clients=3, algorithm=algorithm)
    wide_config["runtime"] |= {
        "mode": "async",
        "buffer": 2,
        "staleness": {"kind": "polynomial", "a": 1.0},
    }
    run = session(wide_config, seconds=lambda client_id, _: SECONDS[client_id])
    combined = record_updates(run, monkeypatch)
    for _ in range(2):
        run.run_round()
    name, stale = "backbone.1.bias", 0
    for before, sent, after in combined:
        assert name in after
        total, count = torch.zeros_like(before[name]), torch.zeros_like(before[name])
        for upload in sent:
            bias = upload.payload["model"][name]
            weight = upload.client_info.num_rows * upload.staleness_weight
            assert float(upload.payload.item("model").weight) == pytest.approx(weight)
            total[: len(bias)] += weight * bias
            count[: len(bias)] += weight
            stale += upload.staleness_weight < 1 and len({u.client_info.arch for u in sent}) == 2
        expected = torch.where(count > 0, total / count.clamp(min=1e-9), before[name])
        assert float((after[name] - expected).abs().max()) < 1e-12
    assert stale

"""FML, FedKD and FedMRL: sharing settings, state of mentees, and different input shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms.mutual import MENTEE, PROJECTION
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.mutual_objectives import (
    AdaptiveMutual,
    MutualDistillation,
    NestedRepresentations,
)
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import Participant, floating_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Rows
from hetero_fl.engine.driver import run_plan
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.trainer import FederatedTrainer
from tests.references.local_training import clients, module
from tests.support.federations import (
    MIXED,
    broadcasts,
    config,
    deployed,
    rounds_of,
)

SMALL = {"name": "cnn", "width": 2, "norm": "batch"}
NARROW = {**SMALL, "feature_dim": 5}


def federation(
    method: str, models: Any = MIXED, clients: int = 3, **settings: Any
) -> dict[str, Any]:
    return config(method, models, clients, algorithm={"name": method, "mentee": SMALL, **settings})


def trained(rounds: FederatedTrainer, client_id: str) -> tuple[Participant, Payload, Payload]:
    """Return a client after the next round's training, what it received and what it sends."""
    got = Payload(
        rounds.algorithm.broadcast(rounds.server, rounds.federation.client_infos[client_id])
    )
    client = clients(rounds)[client_id]
    items, _ = run_plan(client, rounds.algorithm.train(client, got), rounds.backend)
    return client, got, Payload(items)


@pytest.mark.parametrize("objective", [MutualDistillation, AdaptiveMutual, NestedRepresentations])
def test_padding_is_ignored_and_clients_can_be_stacked(
    objective: type[MutualDistillation],
) -> None:
    torch.manual_seed(5)
    archs = {
        "model": ModelSpec.from_config("mlp", 10, (1, 8, 8)),
        MENTEE: ModelSpec.from_config("linear", 10, (1, 8, 8)),
        "hidden": ModelSpec.from_config("linear", 128, (64,)),
        PROJECTION: ModelSpec.from_config("linear", 128, (64 + 128,)),
    }
    nets = ModelViews({slot: ModelView.from_module(arch.build()) for slot, arch in archs.items()})
    loss = objective(shape=(1, 8, 8)).total_loss
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    padded = Batch(x=torch.cat([x, 9 * x[:2]]), y=torch.cat([y, y[:2]]))
    padded.weight = torch.tensor([1.0] * 6 + [0.0] * 2)

    full = loss(nets, Batch(x=x, y=y), {})
    stacked = torch.vmap(lambda a: loss(nets, Batch(x=a, y=y), {}))(torch.stack([-x, x]))

    assert torch.allclose(loss(nets, padded, {}), full, atol=1e-5)
    assert torch.allclose(stacked[1], full, atol=1e-5)


def test_fedkd_sends_less_than_fml() -> None:
    mentee = {"name": "mlp", "hidden": [64, 64]}
    fml, fedkd = (
        rounds_of(federation(m, mentee=mentee, clients=2)).traffic for m in ("fml", "fedkd")
    )
    assert fedkd.up < 0.5 * fml.up and fedkd.down < fml.down


@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_client_sharing_settings_are_respected(method: str) -> None:
    source = federation(method)
    source["clients"]["overrides"] = [
        {"match": "site_1", "shares": ["predictions", "statistics"]},
        {"match": "site_2", "shares": ["backbone"]},
    ]
    rounds = rounds_of({**source, "rounds": 3}, num_rounds=2)
    rounds.set_round(2)
    before = dict(rounds.server.models[MENTEE])
    kept = {client_id: trained(rounds, client_id) for client_id in rounds.federation.client_infos}
    sent = {client_id: set(u[MENTEE]) if u else set() for client_id, (_, _, u) in kept.items()}
    names = set(floating_tensors(before))
    assert sent["site_1"] == set() and sent["site_3"] == names and not kept["site_1"][1]
    assert sent["site_2"] == {n for n in names if n.startswith("backbone.")}
    stored = {client_id: rounds.store.get(client_id).models for client_id in kept}
    # No message replaces it.
    assert set(stored["site_1"][MENTEE]) >= names
    assert set(floating_tensors(stored["site_2"][MENTEE])) == {"head.weight", "head.bias"}
    assert MENTEE not in stored["site_3"]
    # The server accepts all of it.
    rounds.run_round()


@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_sharing_interval_of_two_rounds(method: str) -> None:
    source = {**federation(method), "rounds": 5}
    source["clients"]["defaults"]["share_every"] = 2
    rounds, sent = rounds_of(source, num_rounds=0), []
    for index in range(4):
        rounds.set_round(index)
        sent.append([list(p) for p in trained(rounds, "site_3")[1:]])
        rounds.run_round()
    later = [MENTEE] if method == "fml" else ["change"]
    assert sent == [[[MENTEE], []], [[], [MENTEE]], [later, []], [[], [MENTEE]]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_clients_with_different_input_shapes(method: str, tmp_path: Path) -> None:
    source = config(method, MIXED, algorithm={"name": method}, rounds=1)
    source["clients"]["overrides"] = [
        {
            "match": "site_1",
            "preprocess": {"resize": 12, "channels": 3},
            "augment": {"crop": 1, "flip": True},
        }
    ]
    prepared = prepare(source)
    assert (
        prepared.config.algorithm["mentee"]["name"] == "cnn_gn_small"
        and "cnn_gn_small" in prepared.notes[0]
    )
    assert prepared.config.algorithm["mentee_input"] == [1, 8, 8]
    rounds = rounds_of(source)
    client = deployed(rounds, "site_1")
    x = client.data("common_test", None)["x"]
    assert x.shape[1:] == (3, 12, 12)
    small = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False).mean(
        1, keepdim=True
    )
    mentee = module(rounds.server.arch[MENTEE], rounds.server.models[MENTEE]).eval()
    with torch.no_grad():
        assert torch.allclose(
            rounds.executor.runtime.predict(client, Rows("common_test"), False),
            mentee(small),
            atol=1e-5,
        )
        own = module(client.arch["model"], client.models["model"]).eval()(x)
    assert torch.allclose(
        rounds.executor.runtime.predict(client, Rows("common_test"), True), own, atol=1e-5
    )
    finished = run(source, out=tmp_path / "run")
    assert {client_id: m.arch.name for client_id, m in finished.models.items()} == {
        client_id: c.arch.name for client_id, c in prepared.federation.client_infos.items()
    }


@pytest.mark.parametrize("unit", ["client", "local"])
def test_private_mentee_is_sent_without_its_statistics(unit: str) -> None:
    """Statistics have no noise, so they stay at the client."""
    privacy = {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-4}
    rounds = rounds_of({**federation("fml"), "privacy": privacy}, num_rounds=1)
    info = rounds.federation.client_infos["site_1"]
    statistics = info.models[MENTEE].batch_norm_names - info.models[MENTEE].parameter_names

    sent = Payload.decode(broadcasts(rounds, ["site_1"])["site_1"])[MENTEE]

    assert statistics and sent.keys() == info.models[MENTEE].trained_names
    own = deployed(rounds, "site_1").models[MENTEE]
    assert all(
        not torch.equal(own[n], rounds.server.models[MENTEE][n])
        for n in statistics
        if own[n].is_floating_point()
    )


class Centered(torch.nn.Module):
    """A classifier of images with a buffer that is not persistent, so that clients keep it."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = torch.nn.Linear(in_channels * 64, 4)
        self.out = torch.nn.Linear(4, num_classes)
        self.register_buffer("center", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1)).tanh()
        if self.training:
            self.center = 0.5 * self.center + 0.5 * x.detach().mean(0)
        return self.out(x - self.center)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_state_of_an_own_mentee_stays_at_the_client(method: str) -> None:
    mentee = {"name": f"python:{__name__}:Centered"}
    rounds = rounds_of(federation(method, mentee=mentee), num_rounds=2)

    centers = [deployed(rounds, f"site_{i}").models[MENTEE]["backbone.center"] for i in (1, 2)]

    assert not rounds.server.models[MENTEE]["backbone.center"].any()
    assert not torch.equal(*centers)


# FedMRL


def test_predictions_use_the_client_head_on_projected_features() -> None:
    source = federation("fedmrl", mentee=NARROW)
    source["clients"]["overrides"] = [
        {"match": "site_1", "preprocess": {"resize": 12, "channels": 3}}
    ]
    rounds = rounds_of(source)
    client = deployed(rounds, "site_1")
    x = client.data("common_test", None)["x"]
    assert x.shape[1:] == (3, 12, 12)
    small = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False).mean(
        1, keepdim=True
    )
    mentee = module(rounds.server.arch[MENTEE], rounds.server.models[MENTEE]).eval()
    own = module(client.arch["model"], client.models["model"]).eval()
    p = rounds.store.get("site_1").models[PROJECTION]
    with torch.no_grad():
        r = (
            torch.cat([mentee.backbone(small), own.backbone(x)], 1) @ p["head.weight"].T
            + p["head.bias"]
        )
        expected = own.head(r)
    for home in (True, False):
        found = rounds.executor.runtime.predict(client, Rows("common_test"), home)  # type: ignore[attr-defined]
        assert torch.allclose(found, expected, atol=1e-5)


def test_mentee_is_narrower_than_every_client() -> None:
    # Widths are 32, 24 and 16; the mentee alone would have 32.
    prepared = prepare(config("fedmrl", MIXED))
    assert prepared.config.algorithm["mentee"]["feature_dim"] == 8
    assert (
        "algorithm.mentee.feature_dim is 8, half of the feature width of site_3" in prepared.notes
    )
    wide = prepare(config("fedmrl", ["mlp"], clients=2))
    assert wide.config.algorithm["mentee"]["feature_dim"] is None

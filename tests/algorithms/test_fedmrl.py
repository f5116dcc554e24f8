"""FedMRL: a round, limit cases, persistent state, predictions and derived widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.mutual import MENTEE, PROJECTION
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.mutual_objectives import NestedRepresentations
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

SMALL = {"name": "cnn", "width": 2, "norm": "batch", "feature_dim": 5}


def fedmrl(models: Any = MIXED, clients: int = 3, **settings: Any) -> dict[str, Any]:
    return config(
        "fedmrl", models, clients, algorithm={"name": "fedmrl", "mentee": SMALL, **settings}
    )


@pytest.mark.usefixtures("float64")
def test_round_matches_reference() -> None:
    rounds = rounds_of(fedmrl(own_weight=0.8, mentee_weight=0.4), num_rounds=1)
    before, shared, sent = clients(rounds), dict(rounds.server.models[MENTEE]), []
    rounds.run_round()
    for client_id, client in before.items():
        own = module(client.arch["model"], client.models["model"])
        mentee = module(rounds.server.arch[MENTEE], shared)
        # Kept from the previous round.
        start = client.models[PROJECTION]
        first = (
            rounds.federation.client_infos[client_id]
            .models[PROJECTION]
            .initial_tensors(rounds.federation.seed)
        )
        assert not torch.equal(start["head.weight"], first["head.weight"])
        w, b = (start[n].clone().requires_grad_() for n in ("head.weight", "head.bias"))

        def loss(x, y, own=own, mentee=mentee, w=w, b=b):
            r = torch.cat([mentee.backbone(x), own.backbone(x)], 1) @ w.T + b
            return 0.8 * F.cross_entropy(own.head(r), y) + 0.4 * F.cross_entropy(
                mentee.head(r[:, :5]), y
            )

        train(client, [*own.parameters(), *mentee.parameters(), w, b], loss)
        kept = rounds.store.get(client_id)
        assert largest_difference(kept.models["model"], own) < 1e-9
        assert (
            largest_difference(kept.models[PROJECTION], {"head.weight": w, "head.bias": b}) < 1e-9
        )
        # Received again each round.
        assert MENTEE not in kept.models
        sent.append((client.num_rows, floating_tensors(mentee.state_dict())))
    total = sum(n for n, _ in sent)
    mean = {name: sum(n * t[name] for n, t in sent) / total for name in sent[0][1]}
    assert largest_difference(rounds.server.models[MENTEE], mean) < 1e-9


def test_zero_loss_weight_leaves_its_head_unchanged() -> None:
    for off, own_moves, small_moves in (
        ("own_weight", False, True),
        ("mentee_weight", True, False),
    ):
        rounds = rounds_of(fedmrl(**{off: 0.0}))
        arch = rounds.server.arch[MENTEE]
        first, now = arch.initial_tensors(rounds.federation.seed), rounds.server.models[MENTEE]
        assert torch.equal(first["head.weight"], now["head.weight"]) is not small_moves
        body = min(
            n for n in arch.parameter_names if n.startswith("backbone.") and n.endswith("weight")
        )
        # Both losses have gradients for it.
        assert not torch.equal(first[body], now[body])
        for client_id, client_info in rounds.federation.client_infos.items():
            own = rounds.store.get(client_id).models["model"]["head.weight"]
            assert (
                torch.equal(own, rounds.federation.initial_tensors(client_info.arch)["head.weight"])
                is not own_moves
            )
    one = rounds_of(fedmrl(clients=1), num_rounds=1)
    seen: list[Any] = []
    receive = one.decode_upload
    one.decode_upload = lambda *a: seen.append(receive(*a)) or seen[-1]  # type: ignore[method-assign]
    one.run_round()
    assert same_bits(floating_tensors(one.server.models[MENTEE]), seen[0][MENTEE])


@pytest.mark.parametrize("home", [True, False])
def test_predictions_use_the_client_head_on_projected_features(home: bool) -> None:
    source = fedmrl()
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
    assert torch.allclose(
        rounds.executor.runtime.predict(client, Rows("common_test"), home), expected, atol=1e-5
    )


def test_padding_is_ignored_and_clients_can_be_stacked() -> None:
    torch.manual_seed(5)
    archs = {
        "model": ModelSpec.from_config("mlp", 10, (1, 8, 8)),
        MENTEE: ModelSpec.from_config("linear", 10, (1, 8, 8)),
    }
    archs[PROJECTION] = ModelSpec.from_config("linear", 128, (64 + 128,))
    nets, objective = (
        ModelViews({slot: ModelView.from_module(arch.build()) for slot, arch in archs.items()}),
        NestedRepresentations(shape=(1, 8, 8)),
    )
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    padded = Batch(x=torch.cat([x, 9 * x[:2]]), y=torch.cat([y, y[:2]]))
    padded.weight = torch.tensor([1.0] * 6 + [0.0] * 2)
    full = objective.total_loss(nets, Batch(x=x, y=y), {})
    assert torch.allclose(objective.total_loss(nets, padded, {}), full, atol=1e-5)
    stacked = torch.vmap(lambda a: objective.total_loss(nets, Batch(x=a, y=y), {}))(
        torch.stack([-x, x])
    )
    assert torch.allclose(stacked[1], full, atol=1e-5)


def test_mentee_is_narrower_than_every_client() -> None:
    # Widths are 32, 24 and 16; the mentee alone would have 32.
    prepared = prepare(config("fedmrl", MIXED))
    assert prepared.config.algorithm["mentee"]["feature_dim"] == 8
    assert (
        "algorithm.mentee.feature_dim is 8, half of the feature width of site_3" in prepared.notes
    )
    wide = prepare(config("fedmrl", ["mlp"], clients=2))
    assert wide.config.algorithm["mentee"]["feature_dim"] is None
    with pytest.raises(UserError) as error:
        prepare(fedmrl(mentee={**SMALL, "feature_dim": 16}))
    assert str(error.value).startswith(
        "algorithm.mentee.feature_dim: the mentee's feature width must be smaller "
        "than that of site_3"
    )

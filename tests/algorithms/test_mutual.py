"""FML and FedKD: a round, limit cases, sharing settings, and different input shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms.mutual import MENTEE
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.mutual_objectives import AdaptiveMutual, MutualDistillation
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import Participant, floating_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Rows
from hetero_fl.engine.driver import run_plan
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.errors import UserError
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import (
    MIXED,
    broadcasts,
    config,
    deployed,
    rounds_of,
    same_bits,
)

SMALL = {"name": "cnn", "width": 2, "norm": "batch"}


def federation(
    method: str, models: Any = MIXED, clients: int = 3, **settings: Any
) -> dict[str, Any]:
    return config(method, models, clients, algorithm={"name": method, "mentee": SMALL, **settings})


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean KL(p ‖ q) of logits over examples."""
    return (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1).mean()


def weighted_mean(sent: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    total = sum(n for n, _ in sent)
    return {
        name: sum(n * t[name] for n, t in sent) / total for name in floating_tensors(sent[0][1])
    }


@pytest.mark.usefixtures("float64")
def test_fml_round_matches_reference() -> None:
    rounds = rounds_of(federation("fml", alpha=0.6, beta=0.3), num_rounds=1)
    before, shared, sent = clients(rounds), dict(rounds.server.models[MENTEE]), []
    rounds.run_round()
    for client_id, client in before.items():
        own, mentee = (
            module(client.arch["model"], client.models["model"]),
            module(rounds.server.arch[MENTEE], shared),
        )

        def loss(x, y, own=own, mentee=mentee):
            p, m = own(x).logits, mentee(x).logits
            first = 0.6 * F.cross_entropy(p, y) + 0.4 * kl(m.detach(), p)
            return first + 0.3 * F.cross_entropy(m, y) + 0.7 * kl(p.detach(), m)

        train(client, [*own.parameters(), *mentee.parameters()], loss)
        assert largest_difference(rounds.store.get(client_id).models["model"], own) < 1e-9
        sent.append((client.num_rows, mentee.state_dict()))
    mean = weighted_mean(sent)
    assert any("running_var" in n for n in mean)
    assert largest_difference(rounds.server.models[MENTEE], mean) < 1e-9


def truncated(update: Tensor, energy: float) -> Tensor:
    """Keep the fewest singular values with that energy, or the whole matrix if it is smaller."""
    if update.ndim < 2:
        return update
    matrix = update.reshape(len(update), -1).numpy()
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    k = next(
        k
        for k in range(1, len(s) + 1)
        if k == len(s) or (s[:k] ** 2).sum() >= energy * (s**2).sum()
    )
    if k * sum(matrix.shape) >= matrix.size:
        return update
    return torch.from_numpy(u[:, :k] @ np.diag(s[:k]) @ v[:k]).reshape(update.shape)


@pytest.mark.usefixtures("float64")
def test_fedkd_round_matches_reference() -> None:
    rounds = rounds_of(
        federation("fedkd", energy_start=0.5, energy_end=0.8, hidden_weight=0.9), num_rounds=1
    )
    before, shared, sent = clients(rounds), dict(rounds.server.models[MENTEE]), []
    cut = 0.0
    rounds.run_round()
    for client_id, client in before.items():
        own, mentee = (
            module(client.arch["model"], client.models["model"]),
            module(rounds.server.arch[MENTEE], shared),
        )
        w = client.models["hidden"]["head.weight"].clone().requires_grad_()

        def loss(x, y, own=own, mentee=mentee, w=w):
            (t, h), (s, g) = own(x), mentee(x)
            ce_t, ce_s = F.cross_entropy(t, y), F.cross_entropy(s, y)
            adaptive = kl(s.detach(), t) + kl(t.detach(), s) + 0.9 * F.mse_loss(g @ w.T, h)
            return ce_t + ce_s + adaptive / (ce_t + ce_s).detach()

        train(client, [*own.parameters(), *mentee.parameters(), w], loss)
        kept = rounds.store.get(client_id)
        assert largest_difference(kept.models["model"], own) < 1e-9
        assert float((kept.models["hidden"]["head.weight"] - w.detach()).abs().max()) < 1e-9
        assert not kept.models["hidden"]["head.bias"].any()
        # The server and its clients have the same mentee.
        assert same_bits(kept.state["base"], floating_tensors(shared))
        update = {
            n: t.detach() - shared[n] for n, t in floating_tensors(mentee.state_dict()).items()
        }
        # 0.8 applies in the last of two rounds.
        sent.append((client.num_rows, {n: truncated(t, 0.8) for n, t in update.items()}))
        cut = max(cut, *(float((sent[-1][1][n] - t).abs().max()) for n, t in update.items()))
    change = {n: truncated(t, 0.8) for n, t in weighted_mean(sent).items()}
    # Some matrix was truncated.
    assert cut > 1e-4
    assert (
        largest_difference(
            rounds.server.models[MENTEE], {n: shared[n] + d for n, d in change.items()}
        )
        < 1e-9
    )


@pytest.mark.usefixtures("float64")
def test_fml_without_distillation_equals_local_and_fedavg() -> None:
    local, apart_ = (
        rounds_of(config("local", MIXED)),
        rounds_of(federation("fml", alpha=1.0, beta=1.0)),
    )
    fedavg = rounds_of(config("fedavg", SMALL))
    (group,) = fedavg.server.models
    for client_id in local.federation.client_infos:
        assert (
            largest_difference(
                apart_.store.get(client_id).models["model"],
                local.store.get(client_id).models["model"],
            )
            < 1e-10
        )
    assert (
        largest_difference(
            apart_.server.models[MENTEE], floating_tensors(fedavg.server.models[group])
        )
        < 1e-10
    )
    together = rounds_of(federation("fml"))
    assert (
        largest_difference(
            together.store.get("site_1").models["model"], local.store.get("site_1").models["model"]
        )
        > 1e-4
    )
    assert (
        largest_difference(
            together.server.models[MENTEE], floating_tensors(fedavg.server.models[group])
        )
        > 1e-4
    )


def trained(rounds: SynchronousTrainer, client_id: str) -> tuple[Participant, Payload, Payload]:
    """Return a client after the next round's training, what it received and what it sends."""
    got = Payload(
        rounds.algorithm.broadcast(rounds.server, rounds.federation.client_infos[client_id])
    )
    client = clients(rounds)[client_id]
    items, _ = run_plan(client, rounds.algorithm.train(client, got), rounds.backend)
    return client, got, Payload(items)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", [{}, {"energy_start": 1.0, "energy_end": 1.0}])
def test_single_client_mentee_equals_server_mentee(settings: dict[str, float]) -> None:
    rounds = rounds_of(
        federation("fedkd" if settings else "fml", clients=1, **settings), num_rounds=1
    )
    (client_id,) = rounds.federation.client_infos
    rounds._set_round_context(1)
    client, _, _ = trained(rounds, client_id)
    rounds.run_round()
    assert largest_difference(
        rounds.server.models[MENTEE], floating_tensors(client.models[MENTEE])
    ) < (1e-12 if settings else 1e-300)


@pytest.mark.parametrize(
    "objective", [MutualDistillation(shape=(1, 8, 8)), AdaptiveMutual(shape=(1, 8, 8))]
)
def test_padding_is_ignored_and_clients_can_be_stacked(
    objective: MutualDistillation,
) -> None:
    torch.manual_seed(5)
    archs = {
        "model": ModelSpec.from_config("mlp", 10, (1, 8, 8)),
        "mentee": ModelSpec.from_config("linear", 10, (1, 8, 8)),
    }
    archs["hidden"] = ModelSpec.from_config("linear", 128, (64,))
    nets = ModelViews({slot: ModelView.from_module(arch.build()) for slot, arch in archs.items()})
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    padded = Batch(x=torch.cat([x, 9 * x[:2]]), y=torch.cat([y, y[:2]]))
    padded.weight = torch.tensor([1.0] * 6 + [0.0] * 2)
    full = objective.total_loss(nets, Batch(x=x, y=y), {})
    assert torch.allclose(objective.total_loss(nets, padded, {}), full, atol=1e-5)
    stacked = torch.vmap(lambda a: objective.total_loss(nets, Batch(x=a, y=y), {}))(
        torch.stack([-x, x])
        # Many clients at once.
    )
    assert torch.allclose(stacked[1], full, atol=1e-5)


def test_fedkd_sends_changes_only_to_clients_with_the_last_mentee() -> None:
    source = federation("fedkd", clients=3)
    source["clients"]["per_round"] = 2
    rounds = rounds_of({**source, "rounds": 6}, num_rounds=0)
    complete = {n: t.clone() for n, t in floating_tensors(rounds.server.models[MENTEE]).items()}
    last_rounds: dict[str, int] = {}
    kinds = set()
    for index in range(6):
        rounds._set_round_context(index)
        for client_id in rounds.federation.client_infos:
            client, got, _ = trained(rounds, client_id)
            kinds.update(got)
            assert list(got) == (
                ["change"] if last_rounds.get(client_id) == index - 1 else [MENTEE]
            )
            assert same_bits(client.state["base"], floating_tensors(rounds.server.models[MENTEE]))
        last_rounds.update(dict.fromkeys(rounds.sample_cohort(index), index))
        rounds.run_round()
    assert kinds == {"change", MENTEE}
    full = sum(t.numel() for t in complete.values())
    assert sum(t.numel() for t in rounds.server.state["change"].values()) < full


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
    rounds._set_round_context(2)
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
        rounds._set_round_context(index)
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
            mentee(small).logits,
            atol=1e-5,
        )
        own = module(client.arch["model"], client.models["model"]).eval()(x).logits
    assert torch.allclose(
        rounds.executor.runtime.predict(client, Rows("common_test"), True), own, atol=1e-5
    )
    finished = run(source, out=tmp_path / "run")
    assert {client_id: m.arch.name for client_id, m in finished.models.items()} == {
        client_id: c.arch.name for client_id, c in prepared.federation.client_infos.items()
    }


def test_invalid_settings_raise_one_line() -> None:
    for settings, words in (
        ({"mentee": {"name": "cnn_gn_smal"}}, "cnn_gn_small"),
        (
            {"mentee": {"name": "lenet"}},
            "algorithm.mentee: model lenet: expected at least 12x12 pixels",
        ),
        (
            {"mentee_input": [64]},
            "algorithm.mentee_input: expected a shape to which examples of site_1, "
            "[1, 8, 8], can be converted, got [64]",
        ),
    ):
        with pytest.raises(UserError) as error:
            prepare(federation("fml", **settings))
        assert words in str(error.value) and "\n" not in str(error.value)
    batch_norm = federation("fml", [{"name": "cnn", "width": 4, "norm": "group"}])
    batch_norm["clients"]["defaults"]["batch_size"] = 1
    with pytest.raises(UserError, match="batch_size: got 1, but cnn has BatchNorm"):
        prepare(batch_norm)


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

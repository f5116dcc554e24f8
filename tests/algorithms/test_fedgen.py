"""FedGen: rounds, both losses, limit cases, and the generated features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant, floating_tensors
from hetero_fl.core.plan import Fit
from hetero_fl.engine.batches import index_batches
from hetero_fl.utils.seeding import keyed_generator
from tests.references.local_training import BATCH, clients, largest_difference, module, train
from tests.support.federations import MIXED, config, rounds_of, same_bits

SETTINGS = {
    "generator_steps": 4,
    "generator_lr": 0.01,
    "generator_hidden": 20,
    "generator_batch_size": 6,
    "noise_dim": 3,
}


def fedgen(models: Any = MIXED, **settings: Any) -> dict[str, Any]:
    return config("fedgen", models, algorithm={"name": "fedgen", **SETTINGS, **settings})


def drawn(labels: Tensor, *where: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes and noise drawn with that key, and the generator's input."""
    g = keyed_generator(*where)
    y = torch.multinomial(labels, 6, True, generator=g)
    noise = torch.randn(6, 3, generator=g)
    return y, noise, torch.cat([F.one_hot(y, 10).to(noise.dtype), noise], 1)


@pytest.mark.usefixtures("float64")
def test_generator_rounds_match_reference() -> None:
    rounds, sent = rounds_of(fedgen(diversity=0.8), num_rounds=0), {}
    receive = rounds.decode_upload
    rounds.decode_upload = lambda c, *rest: sent.setdefault(c.client_id, receive(c, *rest))  # type: ignore[method-assign]
    generator = module(rounds.server.arch["generator"], rounds.server.models["generator"])
    # One generator for the whole run.
    adam = torch.optim.Adam(generator.parameters(), lr=0.01)
    counts = torch.stack(
        [rounds.federation.label_counts(client_id) for client_id in rounds.federation.client_infos]
    )
    for index in range(2):
        sent.clear()
        rounds.run_round()
        heads = [(p["model"]["head.weight"], p["model"]["head.bias"]) for p in sent.values()]
        for step in range(4):
            y, noise, x = drawn(
                counts.sum(0), rounds.federation.seed, index, "server", "generator", 0, step
            )
            z = generator(x).logits
            loss_of_teacher = torch.zeros(())
            for k, (w, b) in enumerate(heads):
                weights = torch.tensor(
                    [float(counts[k, c] / counts[:, c].sum()) for c in y.tolist()]
                )
                loss_of_teacher = (
                    loss_of_teacher
                    + (weights * F.cross_entropy(z @ w.T + b, y, reduction="none")).mean()
                )
            similarity = torch.zeros(())
            for i in range(6):
                for j in range(6):
                    similarity = (
                        similarity
                        + (z[i] - z[j]).abs().mean() * (noise[i] - noise[j]).square().mean()
                    )
            adam.zero_grad()
            (loss_of_teacher + 0.8 * torch.exp(-similarity / 36)).backward()
            adam.step()
        assert largest_difference(rounds.server.models["generator"], generator) < 1e-9
        assert torch.equal(rounds.server.state["labels"], counts.sum(0))


def noises(client: Participant) -> list[Tensor]:
    """Return the noise of each step of β."""
    where = (
        client.round_context.seed,
        client.round_context.round_idx,
        client.participant_id,
        "train",
        0,
    )
    sizes = map(len, index_batches(client.num_rows, Fit({}, Supervised(), batch_size=BATCH), where))
    return [
        torch.randn(BATCH + 1, 3, generator=keyed_generator(*where, "noise", i))[:size]
        for i, size in enumerate(sizes)
    ]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_client_round_matches_reference(beta: float) -> None:
    rounds = rounds_of(fedgen(weight=0.6, latent_weight=beta, decay=0.5), num_rounds=2)
    before, models = clients(rounds), {g: dict(t) for g, t in rounds.server.models.items()}
    labels = rounds.server.state["labels"]
    generator = (
        module(rounds.server.arch["generator"], models["generator"]).eval().requires_grad_(False)
    )
    rounds.run_round()
    # The mean then equals each upload.
    assert len({c.arch["model"].spec_id for c in before.values()}) == 3
    for client in before.values():
        group = client.arch["model"].spec_id
        model, step, extra = (
            module(client.arch["model"], models[group]),
            iter(range(999)),
            noises(client),
        )
        where = (client.round_context.seed, 2, client.participant_id, "train", 0, "fake")

        def loss(x, y, model=model, step=step, extra=extra, where=where):
            i = next(step)
            fake, _, into = drawn(labels, *where, i)
            z = model(x).logits
            total = F.cross_entropy(z, y) + 0.25 * 0.6 * F.cross_entropy(
                model.head(generator(into).logits), fake
            )
            if beta:
                like = model.head(
                    generator(torch.cat([F.one_hot(y, 10).to(z.dtype), extra[i]], 1)).logits
                ).detach()
                total = total + 0.25 * beta * F.kl_div(
                    z.log_softmax(1), like.log_softmax(1), reduction="batchmean", log_target=True
                )
            return total

        train(client, list(model.parameters()), loss)
        assert largest_difference(floating_tensors(rounds.server.models[group]), model) < 1e-9
    # The server sends it again each round.
    assert not any("generator" in rounds.store.get(client_id).models for client_id in before)


@pytest.mark.usefixtures("float64")
def test_zero_generated_weight_equals_fedavg() -> None:
    fedavg, plain, more = (
        rounds_of(s, num_rounds=3)
        for s in (config("fedavg"), fedgen("cnn_bn_small", weight=0.0), fedgen("cnn_bn_small"))
    )
    (group,) = fedavg.server.models
    assert (
        largest_difference(
            plain.server.models[group], floating_tensors(fedavg.server.models[group])
        )
        < 1e-10
    )
    assert (
        largest_difference(more.server.models[group], floating_tensors(fedavg.server.models[group]))
        > 1e-5
    )
    assert more.algorithm.server_model(more.server) == group


def test_fedgen_without_shared_heads_equals_fedavg_of_backbones() -> None:
    kept = {"shares": ["backbone", "statistics"], "optimizer": {"name": "sgd", "lr": 0.05}}
    fedavg = rounds_of(config("fedavg", clients__defaults=kept))
    actual = rounds_of(
        {**fedgen("cnn_bn_small"), "clients": config(clients__defaults=kept)["clients"]}
    )
    (group,) = fedavg.server.models
    assert (
        same_bits(fedavg.server.models[group], actual.server.models[group])
        and "labels" not in actual.server.state
    )


def test_clients_without_counts_are_assumed_uniform() -> None:
    source = fedgen()
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters"]}]
    rounds = rounds_of(source, num_rounds=1)
    client_infos, counts = rounds.federation.client_infos, rounds.federation.label_counts
    expected = counts("site_1") + counts("site_3") + client_infos["site_2"].num_rows / 10
    assert torch.allclose(rounds.server.state["labels"], expected)


def test_generator_is_sent_for_training_only() -> None:
    rounds = rounds_of(fedgen(), num_rounds=1)
    client_info = rounds.federation.client_infos["site_1"]
    assert set(rounds.algorithm.broadcast(rounds.server, client_info)) == {
        "model",
        "generator",
        "labels",
    }
    assert set(
        rounds.algorithm.broadcast(rounds.server, replace(client_info, purpose="evaluate"))
    ) == {"model"}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_generated_features_are_diverse_and_classified_correctly() -> None:
    settings = {"generator_steps": 300, "generator_batch_size": 32, "diversity": 1.0}
    rounds = rounds_of(fedgen("cnn_bn_small", **settings), num_rounds=2)
    (group,) = [s for s in rounds.server.models if s != "generator"]
    generator = module(rounds.server.arch["generator"], rounds.server.models["generator"]).eval()
    labels = rounds.server.state["labels"]
    y, _, x = drawn(labels, "test")
    with torch.no_grad():
        z = generator(x).logits
    predictions = (
        z @ rounds.server.models[group]["head.weight"].T + rounds.server.models[group]["head.bias"]
    )
    assert (predictions.argmax(1) == y).double().mean() > 0.6
    same = generator(
        torch.cat([x[:1, :10].repeat(40, 1), torch.randn(40, 3, generator=keyed_generator("n"))], 1)
    ).logits
    assert float(same.detach().std(0).mean()) > 1e-2

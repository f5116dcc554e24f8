"""FD: a round with either teacher, and limit cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, rounds_of, same_bits

LAMBDA, T = 0.6, 2.5
# Instead of -8, which barely trained models never reach.
CLIP = -2.5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("teacher", ["mean", "contrast"])
def test_round_matches_reference(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetero_fl.algorithms.fd.MIN_LOG_PROBABILITY", CLIP)
    settings = {"name": "fd", "weight": LAMBDA, "temperature": T, "teacher": teacher}
    rounds = rounds_of(
        config("fd", MIXED, algorithm=settings, data__partition__alpha=0.2), num_rounds=1
    )
    before, (target, known) = (
        clients(rounds),
        (rounds.server.state["consensus"][n].clone() for n in ("teacher", "known")),
    )
    rounds.run_round()
    top, bottom, clipped = torch.zeros(10, 10), torch.zeros(10, 10), 0
    for client_id, client in before.items():
        model = module(client.arch["model"], client.models["model"])

        def loss(x, y, model=model):
            z = model(x).logits
            p, log_q = (target[y] / T).softmax(1), (z / T).log_softmax(1)
            kl = T**2 * (p * (p.log() - log_q)).sum(1)
            return (F.cross_entropy(z, y, reduction="none") + LAMBDA * kl * known[y]).mean()

        train(client, list(model.parameters()), loss)
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        data = client.data("train", None)
        with torch.no_grad():
            # Sums come from the model after this round's training.
            z = model.eval()(data["x"]).logits
        n = client.counts
        weights = torch.ones(10) if teacher == "mean" else (n * (1 - n / n.sum()) + 0.1) / n.sum()
        clipped += int((z.log_softmax(1) < CLIP).sum())
        spoken = z if teacher == "mean" else z.log_softmax(1).clamp(min=CLIP)
        for row, y in zip(spoken, data["y"].tolist(), strict=True):
            top[y] += weights * row
            bottom[y] += weights
    assert clipped
    consensus, seen = rounds.server.state["consensus"], bottom[:, 0] > 0
    assert torch.equal(consensus["known"].bool(), seen)
    assert torch.allclose(consensus["teacher"][seen], (top / bottom)[seen], rtol=0, atol=1e-9)


def models(rounds) -> dict[str, dict[str, Tensor]]:
    return {
        client_id: rounds.store.get(client_id).models["model"]
        for client_id in rounds.federation.client_infos
    }


@pytest.mark.usefixtures("float64")
def test_zero_distillation_weight_equals_local() -> None:
    local = models(rounds_of(config("local", MIXED)))
    free, led = (
        models(rounds_of(config("fd", MIXED, algorithm={"name": "fd", "weight": w})))
        for w in (0.0, 1.0)
    )
    for client_id, single in local.items():
        assert (
            largest_difference(free[client_id], single) < 1e-10
            and largest_difference(led[client_id], single) > 1e-4
        )


def test_fd_without_shared_statistics_equals_local() -> None:
    later = {"share_every": 9, "optimizer": {"name": "sgd", "lr": 0.05}}
    fd, local = (
        models(rounds_of(config(m, MIXED, clients__defaults=later))) for m in ("fd", "local")
    )
    assert all(same_bits(fd[client_id], local[client_id]) for client_id in local)


@pytest.mark.usefixtures("float64")
def test_teachers_agree_on_equal_counts() -> None:
    """Check that a single client's consensus is its own mean, of logits or of clipped log p."""
    plain, contrast = (
        rounds_of(config("fd", clients=1, algorithm={"name": "fd", "teacher": t}), num_rounds=1)
        for t in ("mean", "contrast")
    )
    (client,) = clients(plain).values()
    data, model = (
        client.data("train", None),
        module(client.arch["model"], client.models["model"]).eval(),
    )
    with torch.no_grad():
        z = model(data["x"]).logits
    for rounds, scores in ((plain, z), (contrast, z.log_softmax(1).clamp(min=-8))):
        for c in data["y"].unique():
            expected = scores[data["y"] == c].mean(0)
            assert torch.allclose(
                rounds.server.state["consensus"]["teacher"][c], expected, rtol=0, atol=1e-9
            )

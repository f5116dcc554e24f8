"""FedTGP and FedGH: a round, limit cases, and server training on class means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms.prototypes import largest_center_distance
from hetero_fl.core.generative_objectives import AdaptiveMargin
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, ModelView, ModelViews, Supervised
from hetero_fl.core.plan import Fit
from hetero_fl.engine.batches import index_batches
from hetero_fl.experiment import prepare
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.errors import UserError
from model_zoo import SplitModel
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

SERVER = {"server_epochs": 3, "server_lr": 0.05, "server_batch_size": 7}


def class_means(model: nn.Module, data: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Return a client's mean feature of each class that it has, after training."""
    with torch.no_grad():
        features = model.eval()(data["x"]).features
    return [
        (features[data["y"] == c].mean(0), c) for c in range(10) if bool((data["y"] == c).any())
    ]


def server_batches(
    rounds: SynchronousTrainer, label: str, sent: list[tuple[Tensor, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of the server's steps in round 2, drawn with its key."""
    x, y = torch.stack([m for m, _ in sent]), torch.tensor([c for _, c in sent])
    where = (rounds.federation.seed, 1, "server", label, 0)
    plan = Fit({}, Supervised(), epochs=3, batch_size=7)
    return [(x[rows], y[rows]) for rows in index_batches(len(y), plan, where)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tau", [100.0, 0.3])
@pytest.mark.parametrize("weight", [None, 0.7])
def test_fedtgp_round_matches_reference(tau: float, weight: float | None) -> None:
    settings = {
        "name": "fedtgp",
        "margin": tau,
        **SERVER,
        **({} if weight is None else {"weight": weight}),
    }
    # Λ in the authors' script.
    pulled = 10.0 if weight is None else weight
    rounds = rounds_of(config("fedtgp", MIXED, algorithm=settings), num_rounds=1)
    before, server = clients(rounds), {s: dict(t) for s, t in rounds.server.models.items()}
    prototypes, known = (rounds.server.state[n].clone() for n in ("prototypes", "known"))
    width = prototypes.shape[1]
    rounds.run_round()
    sent: list[tuple[Tensor, int]] = []
    for client_id, client in before.items():
        model = module(client.arch["model"], client.models["model"])

        def loss(x, y, model=model):
            z, f = model(x)
            pull = ((f - prototypes[y]) ** 2).sum(1) / width
            return (F.cross_entropy(z, y, reduction="none") + pulled * pull * known[y]).sum() / len(
                y
            )

        train(client, list(model.parameters()), loss)
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        sent += class_means(model, client.data("train", None))
    centres = [
        torch.stack([m for m, c in sent if c == k]).mean(0) for k in sorted({c for _, c in sent})
    ]
    gap = max(float((a - b).square().sum().sqrt()) for a in centres for b in centres)
    # So that the two margins differ.
    assert gap > 0.3
    # P̆ [C, d]
    rows = server["vectors"]["head.weight"].T.clone().requires_grad_()
    names = ("backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias")
    w1, b1, w2, b2 = layers = [server["prototypes"][n].clone().requires_grad_() for n in names]
    sgd = torch.optim.SGD([rows, *layers], lr=0.05)
    for x, y in server_batches(rounds, "prototypes", sent):
        p = F.relu(rows @ w1.T + b1) @ w2.T + b2
        total = torch.zeros(())
        for one, c in zip(x, y.tolist(), strict=True):
            near = [
                -((one - p[k]).square().sum().sqrt() + (min(gap, tau) if k == c else 0.0))
                for k in range(10)
            ]
            total = total - (near[c] - torch.stack(near).exp().sum().log())
        sgd.zero_grad()
        (total / len(y)).backward()
        sgd.step()
    expected = (F.relu(rows @ w1.T + b1) @ w2.T + b2).detach()
    assert torch.allclose(rounds.server.state["prototypes"], expected, rtol=0, atol=1e-9)
    assert not rounds.server.models["vectors"]["head.bias"].any()
    assert rounds.server.state["known"].bool().tolist() == [
        bool(known[k]) or k in {c for _, c in sent} for k in range(10)
    ]


@pytest.mark.usefixtures("float64")
def test_fedgh_round_matches_reference() -> None:
    rounds = rounds_of(config("fedgh", MIXED, algorithm={"name": "fedgh", **SERVER}), num_rounds=1)
    before, head = clients(rounds), dict(rounds.server.models["head"])
    rounds.run_round()
    sent: list[tuple[Tensor, int]] = []
    for client_id, client in before.items():
        model = module(client.arch["model"], {**client.models["model"], **head})
        train(
            client,
            list(model.parameters()),
            lambda x, y, model=model: F.cross_entropy(model(x).logits, y),
        )
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        sent += class_means(model, client.data("train", None))
    w, b = (head[n].clone().requires_grad_() for n in ("head.weight", "head.bias"))
    sgd = torch.optim.SGD([w, b], lr=0.05)
    for x, y in server_batches(rounds, "head", sent):
        sgd.zero_grad()
        F.cross_entropy(x @ w.T + b, y).backward()
        sgd.step()
    assert (
        largest_difference(rounds.server.models["head"], {"head.weight": w, "head.bias": b}) < 1e-9
    )
    read = deployed(rounds, "site_2").models["model"]
    # Evaluated with the common head.
    assert same_bits({n: read[n] for n in head}, rounds.server.models["head"])
    kept = rounds.store.get("site_2").models["model"]
    assert all(torch.equal(t, kept[n]) for n, t in read.items() if n.startswith("backbone."))


@pytest.mark.slow
def test_fedtgp_without_pull_trains_like_fedproto() -> None:
    runs = {
        (m, w): rounds_of(config(m, MIXED, algorithm={"name": m, "weight": w}))
        for m in ("fedproto", "fedtgp")
        for w in (0.0, 1.0)
    }
    for client_id in runs["fedtgp", 0.0].federation.client_infos:
        models = {key: r.store.get(client_id).models["model"] for key, r in runs.items()}
        assert same_bits(models["fedproto", 0.0], models["fedtgp", 0.0])
        assert not same_bits(models["fedproto", 1.0], models["fedtgp", 1.0])


@pytest.mark.parametrize("method", ["fedtgp", "fedgh"])
def test_clients_without_shared_statistics_send_nothing(
    method: str,
) -> None:
    source = config(method, MIXED)
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters", "predictions"]}]
    rounds, seen = rounds_of(source, num_rounds=0), {}
    receive = rounds.decode_upload
    rounds.decode_upload = lambda c, *rest: seen.setdefault(c.client_id, receive(c, *rest))  # type: ignore[method-assign]
    rounds.run_round()
    assert {c: list(p) for c, p in seen.items()} == {
        "site_1": ["features"],
        "site_2": [],
        "site_3": ["features"],
    }
    models = [{**m, "feature_dim": 32} if isinstance(m, dict) else m for m in MIXED]
    later = {"share_every": 9, "optimizer": {"name": "sgd", "lr": 0.05}}
    single, local = (
        rounds_of(config(m, models, clients__defaults=later)) for m in (method, "local")
    )
    for client_id in local.federation.client_infos:
        assert same_bits(
            single.store.get(client_id).models["model"], local.store.get(client_id).models["model"]
        )


def test_fedgh_sends_head_at_sharing_interval() -> None:
    source = {**config("fedgh", MIXED), "rounds": 5}
    source["clients"]["defaults"]["share_every"] = 2
    rounds, sent = rounds_of(source, num_rounds=0), []
    for index in range(5):
        rounds._set_round_context(index)
        sent.append(
            list(
                rounds.algorithm.broadcast(rounds.server, rounds.federation.client_infos["site_1"])
            )
        )
        rounds.run_round()
    assert sent == [[], [], ["head"], [], ["head"]]


def test_class_centers_weight_clients_with_the_class_equally() -> None:
    means = torch.tensor([[[0.0, 0], [4, 0], [9, 9]], [[2.0, 0], [99, 99], [9, 9]]])
    has = torch.tensor([[True, True, False], [True, False, False]])
    # Centers (1, 0) and (4, 0).
    assert float(largest_center_distance(means, has)) == 3.0
    assert float(largest_center_distance(means, has & False)) == 0.0


def test_margin_loss_has_finite_gradients_and_stacks() -> None:
    torch.manual_seed(1)
    linear: SplitModel = ModelSpec.from_config("linear", 4, (3,)).build()
    mlp: SplitModel = ModelSpec.from_config("mlp", 4, (4,), options={"hidden": [4]}).build()
    nets = ModelViews(vectors=ModelView.from_module(linear), prototypes=ModelView.from_module(mlp))
    given = {"one_hot": torch.eye(3), "margin": torch.tensor(2.0)}
    # Every prototype is at its target.
    x = mlp(linear(torch.eye(3)).logits).logits.detach()
    objective, y = AdaptiveMargin(), torch.arange(3)
    loss = objective.total_loss(nets, Batch(x=x, y=y), given)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mlp.parameters())
    both = torch.vmap(lambda x: objective.total_loss(nets, Batch(x=x, y=y), given))(
        torch.stack([x + 1, x])
    )
    assert torch.allclose(both[1], loss, atol=1e-6)


class TwoLayers(SplitModel):
    """A model whose head has two linear layers."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        input_size: tuple[int, ...],
        feature_dim: int | None,
    ) -> None:
        head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
        super().__init__(nn.Flatten(), head, 64)


@pytest.mark.parametrize("method", ["fedgh", "fedgen", "fedmrl"])
def test_incompatible_heads_are_refused(method: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(config(method, ["mlp", f"python:{__name__}:TwoLayers"], clients=2))
    assert str(error.value).startswith(
        "clients: 'site_2': model: this method needs a linear head with a bias, got head.0.bias"
    ) and "\n" not in str(error.value)

"""Losses, teachers and training compared with references of a few lines, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.teachers import proxy_predictions
from hetero_fl.algorithms import local_fit
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import (
    Batch,
    ModelView,
    ModelViews,
    Supervised,
    distillation_loss,
    log_prior,
)
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Fit
from hetero_fl.core.task import Task
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.training import index_batches
from tests.support.federations import config, rounds_of
from tests.support.means import mean_of_items

pytestmark = pytest.mark.usefixtures("float64")
DIGITS = Task("multiclass", 10)


def test_kl_loss_matches_torch_with_detached_teacher() -> None:
    for temperature in (1.0, 7.5):
        g = torch.Generator().manual_seed(1)
        student = torch.randn(9, 5, generator=g, requires_grad=True)
        teacher = torch.randn(9, 5, generator=g, requires_grad=True)
        actual = distillation_loss("multiclass", student, teacher, temperature).mean()
        reference = F.kl_div(
            F.log_softmax(student / temperature, 1),
            F.softmax(teacher.detach() / temperature, 1),
            reduction="batchmean",
        )
        assert torch.allclose(actual, reference * temperature**2, atol=1e-12)
        actual.backward()
        assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_multilabel_kl_sums_bernoulli_divergences() -> None:
    g = torch.Generator().manual_seed(2)
    s, t = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    p, q = (t / 3).sigmoid(), (s / 3).sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1) * 9
    assert torch.allclose(distillation_loss("multilabel", s, t, 3.0), expected, atol=1e-12)


def nets_of(module: nn.Module) -> ModelViews:
    return ModelViews(model=ModelView.from_module(module))  # type: ignore[arg-type]


def small_model():
    torch.manual_seed(3)
    return ModelSpec.from_config("mlp", 10, (1, 8, 8), options={"hidden": [12]}).build()


def test_logit_adjustment_adds_log_prior() -> None:
    model, g = small_model(), torch.Generator().manual_seed(5)
    counts = torch.tensor([5.0, 0, 3, 1, 0, 0, 7, 2, 2, 1])
    x, y = torch.randn(7, 1, 8, 8, generator=g), torch.tensor([0, 2, 6, 6, 7, 8, 0])
    prior = log_prior(DIGITS, counts)
    assert prior is not None
    loss = Supervised().loss(nets_of(model), Batch(x=x, y=y), {"log_prior": prior})
    z = model(x)
    for i in range(7):
        pi = [(c + 1) / (counts.sum().item() + 10) for c in counts.tolist()]
        weighted = [math.exp(z[i, c].item()) * pi[c] for c in range(10)]
        assert math.isclose(
            loss[i].item(), -math.log(weighted[int(y[i])] / sum(weighted)), abs_tol=1e-10
        )


def test_contrast_teacher_matches_reference() -> None:
    g = torch.Generator().manual_seed(6)
    counts = torch.tensor([[50.0, 0, 10], [0, 0, 30], [5, 5, 5]])
    logits = 6 * torch.randn(3, 4, 3, generator=g)
    items = [
        proxy_predictions(Task("multiclass", 3), "contrast", z, c, int(c.sum()))
        for z, c in zip(logits, counts, strict=True)
    ]
    actual = mean_of_items(items)
    for row in range(4):
        for c in range(3):
            top = bottom = 0.0
            for k in range(3):
                n, nk = counts[k, c].item(), counts[k].sum().item()
                a = n * (1 - n / nk) + 0.1
                log_p = (logits[k, row, c] - logits[k, row].exp().sum().log()).item()
                top, bottom = top + a * max(log_p, -8.0), bottom + a
            assert math.isclose(actual[row, c].item(), top / bottom, abs_tol=1e-10)


@pytest.mark.parametrize("optimizer", [
    {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    {"name": "adam", "lr": 0.01},
    {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.5},
])  # fmt: skip
def test_training_matches_plain_pytorch_loop(optimizer: dict) -> None:
    rounds = rounds_of(
        config("local", clients__defaults={"optimizer": optimizer, "epochs": 2, "batch_size": 16}),
        num_rounds=0,
    )
    client = rounds.federation.client("site_1", rounds.store.get("site_1"), 0)
    # Same memory layout as the engine: Adam amplifies round-off in gradients of zero.
    model = client.arch["model"].build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(client.models["model"])
    data = client.data("train", None)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    plain = {k: v for k, v in optimizer.items() if k not in ("name", "clip_norm")}
    opt = kinds[optimizer["name"]](model.parameters(), fused=True, **plain)
    model.train()
    for rows in index_batches(
        client.num_rows,
        Fit({}, Supervised(), epochs=2, batch_size=16),
        (0, 0, "site_1", "train", 0),
    ):
        opt.zero_grad()
        F.cross_entropy(model(data["x"][rows]), data["y"][rows]).backward()
        if "clip_norm" in optimizer:
            nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"])
        opt.step()
    SerialBackend(DeviceMemory(torch.device("cpu"))).run([(client, local_fit(client))])
    for name, tensor in model.state_dict().items():
        assert torch.allclose(client.models["model"][name], tensor, rtol=0, atol=1e-12), name


def test_class_weights_have_mean_one_over_training_rows() -> None:
    rounds = rounds_of(
        config("local", clients__defaults={"class_weights": "balanced"}), num_rounds=0
    )
    client = rounds.federation.client("site_1", rounds.store.get("site_1"), 0)
    weights = local_fit(client).context["class_weights"]
    y = client.data("train", None)["y"]
    assert math.isclose(weights[y].mean().item(), 1.0, abs_tol=1e-12)
    per_class = {c: weights[y][y == c].sum().item() for c in y.unique().tolist()}
    # Every class has the same weight.
    assert max(per_class.values()) - min(per_class.values()) < 1e-9


def test_uploads_are_summed_in_client_order() -> None:
    g = torch.Generator().manual_seed(10)
    client_infos = rounds_of(config("local", clients=3), num_rounds=0).federation.client_infos
    uploads = [
        Upload(client_infos[c], Payload({"z": Item(torch.randn(50, generator=g).float(), 1.0 + i)}))
        for i, c in enumerate(client_infos)
    ]
    means = [
        Uploads(order).mean("z") for order in (uploads, uploads[::-1], uploads[1:] + uploads[:1])
    ]
    assert means[0] is not None and all(torch.equal(means[0], m) for m in means[1:])

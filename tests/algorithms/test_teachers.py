"""Teacher weights, proxy rows sampled in each round, and logit adjustment in every method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.aggregation.means import mean_of_items
from hetero_fl.aggregation.teachers import proxy_predictions
from hetero_fl.algorithms.distillation import PROXY_INDICES, TEACHER
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import (
    METHODS,
    MIXED,
    QUICK,
    config,
    deployed,
    rounds_of,
    same_bits,
)

# Weights


@pytest.mark.usefixtures("float64")
def test_entropy_teacher_matches_reference() -> None:
    logits = 3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(6))
    actual = mean_of_items(
        [proxy_predictions(Task("multiclass", 5), "entropy", z, None, 9) for z in logits]
    )
    for row in range(4):
        weights = []
        for z in logits[:, row]:
            p = z.softmax(0).tolist()
            weights.append(math.exp(sum(q * math.log(q) for q in p)))
        expected = sum(a * z for a, z in zip(weights, logits[:, row], strict=True)) / sum(weights)
        assert torch.allclose(actual[row], expected, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_entropy_is_per_label_and_undefined_for_regression() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(7))
    actual = mean_of_items(
        [proxy_predictions(Task("multilabel", 3), "entropy", z, None, 9) for z in logits]
    )
    p = logits.sigmoid()
    weights = (p * p.log() + (1 - p) * (1 - p).log()).exp()
    assert torch.allclose(actual, (weights * logits).sum(0) / weights.sum(0), atol=1e-10)
    plain = mean_of_items(
        [
            proxy_predictions(Task("regression", 3), "entropy", z, None, n)
            for z, n in zip(logits, (2, 9), strict=True)
        ]
    )
    assert torch.allclose(plain, logits.mean(0), atol=1e-12)


def test_teacher_of_equal_members_is_the_member() -> None:
    z = 4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(8))
    for kind in ("mean", "samples", "entropy"):
        for count in (1, 3):
            teacher = mean_of_items(
                [
                    proxy_predictions(Task("multiclass", 5), kind, z, None, n + 1)
                    for n in range(count)
                ]
            )
            assert torch.allclose(teacher, z, atol=1e-6), kind


def test_certain_predictions_give_no_nan() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    item = proxy_predictions(Task("multiclass", 3), "entropy", sure, None, 1)
    assert torch.allclose(torch.as_tensor(item.weight), torch.tensor([[1.0], [1 / 3]]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "feddf", "hybrid", "ds_fl"])
@pytest.mark.parametrize("teacher", ["samples", "contrast", "entropy"])
def test_every_distillation_method_accepts_every_weighting(method: str, teacher: str) -> None:
    plain, weighted = (
        rounds_of(
            config(
                method, MIXED, algorithm={"name": method, "teacher": t}, server={"model": "linear"}
            )
        )
        for t in ("mean", teacher)
    )
    assert not same_bits(plain.server.models["student"], weighted.server.models["student"])


# Rounds on sampled rows


def public(rounds: SynchronousTrainer, client_id: str, rows: Tensor) -> Tensor:
    return clients(rounds)[client_id].data("proxy", None)["x"][rows]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("distance", ["kl", "mae"])
def test_fedmd_round_on_sampled_rows_matches_reference(distance: str) -> None:
    settings = {
        "name": "fedmd",
        "distance": distance,
        "proxy_rows": 25,
        "proxy_batch_size": 25,
        "teacher": "entropy",
    }
    rounds = rounds_of(config("fedmd", MIXED, algorithm=settings), num_rounds=1)
    before, teacher = clients(rounds), rounds.server.state[TEACHER].clone()
    site = clients(rounds)["site_1"]
    last, now = rounds.algorithm.proxy_indices(site, 0), rounds.algorithm.proxy_indices(site)
    assert teacher.shape == (25, 10) and len(set(last.tolist())) == len(set(now.tolist())) == 25
    assert not torch.equal(last, now) and rounds.server.state[PROXY_INDICES].tolist() == [0]
    rounds.run_round()
    top, bottom = torch.zeros(25, 10), torch.zeros(25, 1)
    for client_id, client in before.items():
        model = module(client.arch["model"], client.models["model"])
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x = client.data("proxy", None)["x"]
        # One batch, whose order does not matter.
        z = model(x[last]).logits
        kl = F.kl_div((z / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean") * 4
        ((z - teacher).abs().mean() if distance == "mae" else kl).backward()
        sgd.step()
        train(
            client,
            list(model.parameters()),
            lambda x, y, model=model: F.cross_entropy(model(x).logits, y),
        )
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        with torch.no_grad():
            z = model.eval()(x[now]).logits
        weights = (z.softmax(1) * z.log_softmax(1)).sum(1, keepdim=True).exp()
        top, bottom = top + weights * z, bottom + weights
    assert torch.allclose(rounds.server.state[TEACHER], top / bottom, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "feddf", "hybrid", "ds_fl", "kt_pfl"])
def test_rows_per_round_of_full_size_equals_full_set(method: str) -> None:
    uninterrupted, as_many, fewer = (
        rounds_of(
            config(
                method,
                MIXED,
                algorithm={"name": method, "proxy_rows": n},
                server={"model": "linear"},
                rounds=3,
            )
        )
        for n in (None, 99, 20)
    )
    assert same_bits(uninterrupted.server.models["student"], as_many.server.models["student"])
    assert not same_bits(uninterrupted.server.models["student"], fewer.server.models["student"])
    if method != "feddf":
        predictions = fewer.server.state["predictions" if method == "kt_pfl" else TEACHER]
        assert fewer.traffic.up < uninterrupted.traffic.up and predictions.shape[-2:] == (20, 10)


@pytest.mark.parametrize("method", ["fedmd", "hybrid", "ds_fl", "kt_pfl"])
def test_old_teacher_is_distilled_on_its_rows(method: str) -> None:
    """Upload nothing in round 4: round 5 sends the teacher of round 3 again with its rows."""
    settings = {"name": method, "proxy_rows": 20}
    source = {**config(method, MIXED, algorithm=settings), "rounds": 6}
    source["clients"]["defaults"]["share_every"] = 3
    rounds = rounds_of(source, num_rounds=4)
    rounds._set_round_context(4)
    client_info = rounds.federation.client_infos["site_1"]
    client, got = (
        clients(rounds)["site_1"],
        Payload(rounds.algorithm.broadcast(rounds.server, client_info)),
    )
    assert got[PROXY_INDICES].tolist() == [2]
    rows = rounds.algorithm.teacher_rows(client, got)
    assert torch.equal(rows, rounds.algorithm.proxy_indices(client, 2))
    seen: list[Fit] = []
    perform = rounds.backend.run
    rounds.backend.run = lambda work: (
        seen.extend(s for _, s in work if isinstance(s, Fit)) or perform(work)
    )  # type: ignore[method-assign]
    run_plan(client, rounds.algorithm.train(client, got), rounds.backend)
    if method != "hybrid":
        (digest,) = (step for step in seen if step.label == "digest")
        assert torch.equal(digest.data.rows, rows) and len(got[TEACHER]) == 20
    else:
        drawn = seen[0].extra_batches["public"].draw(torch.Generator().manual_seed(1), 8)
        pairs = {
            tuple(x.flatten().tolist()): t
            for x, t in zip(public(rounds, "site_1", rows), got[TEACHER], strict=True)
        }
        assert all(
            torch.equal(pairs[tuple(x.flatten().tolist())], t)
            for x, t in zip(drawn["x"], drawn["teacher"], strict=True)
        )


# Logit adjustment


# Unless they are configured to predict with heads.
BY_DISTANCE = ("fedproto", "fedtgp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *({"name": m} for m in METHODS if m != "fedlc"),
        *({"name": m, "inference": "head"} for m in BY_DISTANCE),
    ],
)
def test_every_method_applies_logit_adjustment(settings: dict[str, str]) -> None:
    """Check that fits on private rows and local tests add log π.

    Distances to prototypes are not logits of that training and stay unadjusted. FedLC has its own
    loss and refuses the option.
    """
    method, by_distance = (
        settings["name"],
        settings["name"] in BY_DISTANCE and "inference" not in settings,
    )
    algorithm = {**settings, **QUICK.get(method, {}), "logit_adjustment": True}
    rounds = rounds_of(config(method, MIXED, clients=4, algorithm=algorithm), num_rounds=1)
    fits: list[tuple[Any, Fit]] = []
    perform = rounds.backend.run
    rounds.backend.run = lambda work: (
        fits.extend((p, s) for p, s in work if isinstance(s, Fit)) or perform(work)
    )  # type: ignore[method-assign]
    rounds.run_round()
    private = [
        (p, f) for p, f in fits if isinstance(f.data, Rows) and f.data.name in ("train", "pooled")
    ]
    assert private
    for participant, fit in private:
        y = fit.data.columns(participant)["y"]
        expected = log_prior(participant.task, torch.bincount(y, minlength=10))
        assert expected is not None and torch.equal(fit.context["log_prior"], expected)
    for client_id in rounds.federation.client_infos:
        site, client = rounds.executor.runtime, deployed(rounds, client_id)
        settings = client.settings
        adjusted = site.predict(client, Rows("test"), True)
        client.settings = settings.model_copy(update={"logit_adjustment": False})
        plain = site.predict(client, Rows("test"), True)
        common = site.predict(client, Rows("common_test"), False)
        client.settings = settings
        assert torch.equal(site.predict(client, Rows("common_test"), False), common)
        prior = log_prior(client.task, client.counts)
        assert prior is not None
        assert torch.allclose(
            adjusted - plain, (0 * prior if by_distance else prior).expand_as(plain), atol=1e-4
        )

"""Teacher weights, proxy rows sampled in each round, and the server's student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.aggregation.teachers import proxy_predictions
from hetero_fl.algorithms.distillation import PROXY_INDICES, TEACHER
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import run_plan
from hetero_fl.engine.training import index_batches
from hetero_fl.federation.trainer import FederatedTrainer
from tests.references.local_training import clients, largest_difference, module
from tests.support.calls import record_calls
from tests.support.federations import MIXED, config, rounds_of
from tests.support.means import mean_of_items

# Weights


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


def test_certain_predictions_give_no_nan() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    item = proxy_predictions(Task("multiclass", 3), "entropy", sure, None, 1)
    assert torch.allclose(torch.as_tensor(item.weight), torch.tensor([[1.0], [1 / 3]]))


# Rounds on sampled rows


def public(rounds: FederatedTrainer, client_id: str, rows: Tensor) -> Tensor:
    return clients(rounds)[client_id].data("proxy", None)["x"][rows]


@pytest.mark.parametrize("method", ["fedmd", "hybrid", "ds_fl", "kt_pfl"])
def test_old_teacher_is_distilled_on_its_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload nothing in round 4: round 5 sends the teacher of round 3 again with its rows."""
    settings = {"name": method, "proxy_rows": 20}
    source = {**config(method, MIXED, algorithm=settings), "rounds": 6}
    source["clients"]["defaults"]["share_every"] = 3
    rounds = rounds_of(source, num_rounds=4)
    rounds.set_round(4)
    client_info = rounds.federation.client_infos["site_1"]
    client, got = (
        clients(rounds)["site_1"],
        Payload(rounds.algorithm.broadcast(rounds.server, client_info)),
    )
    assert got[PROXY_INDICES].tolist() == [2]
    rows = rounds.algorithm.teacher_rows(client, got)
    assert torch.equal(rows, rounds.algorithm.proxy_indices(client, 2))
    steps = record_calls(monkeypatch, rounds.backend, "run", lambda work: [s for _, s in work])
    run_plan(client, rounds.algorithm.train(client, got), rounds.backend)
    seen = [step for call in steps for step in call if isinstance(step, Fit)]
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


@pytest.mark.usefixtures("float64")
def test_server_student_matches_reference() -> None:
    sgd = {"name": "sgd", "lr": 0.03, "momentum": 0.9}
    source = config(
        "hybrid",
        MIXED[:2],
        4,
        algorithm={"name": "hybrid", "temperature": 2.5, "proxy_batch_size": 25},
        server={"model": MIXED[1], "optimizer": sgd},
    )
    rounds = rounds_of(source, num_rounds=0)
    student = module(rounds.server.arch["student"], rounds.server.models["student"])
    # The optimizer keeps its momentum.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9)
    x = rounds.server.data("proxy", None)["x"]
    fit = Fit({}, TeacherDistillation(), epochs=2, batch_size=25)
    for index in range(2):
        rounds.run_round()

        teacher = rounds.server.state[TEACHER]
        label = "distil student"  # style: ok (random stream)
        stream = (rounds.federation.seed, index, "server", label, 0)
        for rows in index_batches(len(x), fit, stream):
            optimizer.zero_grad()
            log_q = (student(x[rows]) / 2.5).log_softmax(1)
            p = (teacher[rows] / 2.5).softmax(1)
            (2.5**2 * F.kl_div(log_q, p, reduction="batchmean")).backward()
            optimizer.step()
        assert largest_difference(rounds.server.models["student"], student) < 1e-9

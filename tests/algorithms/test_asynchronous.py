"""FedAsync and FedBuff compared with plain event loops in float64."""

from __future__ import annotations

import heapq
import math
from typing import Any

import pytest
import torch

from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.federation.asynchronous import ClientTask
from hetero_fl.federation.state_store import PrivateState
from tests.references import local_training
from tests.support.asynchronous_runs import session
from tests.support.federations import config

pytestmark = pytest.mark.usefixtures("float64")
# No two tasks end at the same time.
SECONDS = {"site_1": 1.0, "site_2": math.e, "site_3": 2 * math.pi}
# Three rounds.
ARRIVALS = 9


def trained(
    run: Any, client_id: str, version: int, again: int, start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a client's model after one local epoch from `start`, computed by a plain loop."""
    client = run.federation.client(client_id, PrivateState(), version, again)
    net = local_training.module(client.arch["model"], start)
    local_training.train(
        client,
        list(net.parameters()),
        lambda x, y: torch.nn.functional.cross_entropy(net(x).logits, y),
    )
    return floating_tensors({n: t.detach().clone() for n, t in net.state_dict().items()})


def events(
    run: Any, start: dict[str, torch.Tensor], goal: int, mix: Any
) -> dict[str, torch.Tensor]:
    """Return the server's model after all arrivals.

    `mix(model, [(staleness, start, end)])` returns the next version.
    """
    model, version, number, buffer, requests = start, 0, 0, [], dict.fromkeys(SECONDS, 0)
    flight: list[Any] = []

    def give(client_id: str, now: float) -> None:
        nonlocal number
        heapq.heappush(
            flight,
            (now + SECONDS[client_id], number, client_id, version, requests[client_id], model),
        )
        number, requests[client_id] = number + 1, requests[client_id] + 1

    for client_id in SECONDS:
        give(client_id, 0.0)
    for _ in range(ARRIVALS):
        now, _, client_id, began, again, got = heapq.heappop(flight)
        buffer.append((version - began, got, trained(run, client_id, began, again, got)))
        if len(buffer) == goal:
            model, version, buffer = mix(model, buffer), version + 1, []
            requests = dict.fromkeys(SECONDS, 0)
        give(client_id, now)
    return model


WEIGHTS = {
    "constant": lambda t: 1.0,
    "polynomial": lambda t: 1 / math.sqrt(1 + t),
    "hinge": lambda t: 1.0 if t <= 1 else 1 / (10 * (t - 1) + 1),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fedasync_matches_mixing_formula(kind: str) -> None:
    run = session(
        config(
            "fedasync",
            rounds=3,
            algorithm={"name": "fedasync", "alpha": 0.7, "staleness": kind, "b": 1},
        ),
        seconds=lambda client_id, _: SECONDS[client_id],
    )
    (group,) = run.server.models
    start = floating_tensors(run.server.models[group])
    records = [run.run_round() for _ in range(3)]

    def mix(model: Any, buffer: Any) -> Any:
        ((stale, _, end),) = buffer
        rate = 0.7 * WEIGHTS[kind](stale)
        return {n: (1 - rate) * model[n] + rate * end[n] for n in model}

    assert (
        local_training.largest_difference(run.server.models[group], events(run, start, 1, mix))
        < 1e-10
    )
    assert run.version == ARRIVALS and max(map(int, records[-1]["staleness"])) > 1


@pytest.mark.parametrize("goal", [1, 2, 4])
def test_fedbuff_matches_buffered_mean(goal: int) -> None:
    run = session(
        config(
            "fedbuff", rounds=3, algorithm={"name": "fedbuff", "buffer": goal, "server_lr": 0.8}
        ),
        seconds=lambda client_id, _: SECONDS[client_id],
    )
    (group,) = run.server.models
    start, names = (
        floating_tensors(run.server.models[group]),
        run.server.arch[group].parameter_names,
    )
    again = 0
    for _ in range(3):
        run.run_round()
        again = max(again, *(task.attempt for task in run.queue))

    def mix(model: Any, buffer: Any) -> Any:
        s = [1 / math.sqrt(1 + stale) for stale, _, _ in buffer]
        result = {}
        for n in model:
            if n in names:
                result[n] = model[n] + 0.8 / goal * sum(
                    w * (end[n] - got[n]) for w, (_, got, end) in zip(s, buffer, strict=True)
                )
            else:
                # A variance moves toward the clients' mean by the factor Σs/K.
                mean = sum(w * end[n] for w, (_, _, end) in zip(s, buffer, strict=True)) / sum(s)
                result[n] = model[n] + sum(s) / goal * (mean - model[n])
        return result

    assert (
        local_training.largest_difference(run.server.models[group], events(run, start, goal, mix))
        < 1e-10
    )
    assert run.version == ARRIVALS // goal and (again > 0 or goal < 4)


def test_repeated_training_on_a_version_draws_other_batches() -> None:
    run = session(
        config("fedbuff", algorithm={"name": "fedbuff", "buffer": 3}),
        seconds=lambda client_id, _: SECONDS[client_id],
    )
    seen = []
    arrival = run._receive_upload

    def seeing(task: ClientTask) -> Payload:
        payload = arrival(task)
        seen.append((task, payload))
        return payload

    run._receive_upload = seeing  # type: ignore[method-assign]
    run.run_round()
    (first, one), (second, two) = [
        (task, payload) for task, payload in seen if task.client == "site_1"
    ]
    assert (first.version, first.attempt, second.version, second.attempt) == (0, 0, 0, 1)
    assert first.broadcast == second.broadcast
    assert any(not torch.equal(one["model"][n], two["model"][n]) for n in one["model"])


def test_proximal_term_pulls_toward_the_received_model() -> None:
    plain, pulled = (
        session(
            config("fedasync", algorithm={"name": "fedasync", "rho": rho}),
            seconds=lambda client_id, _: SECONDS[client_id],
        )
        for rho in (0.0, 5.0)
    )
    (group,) = plain.server.models
    start = floating_tensors(plain.server.models[group])
    names = plain.server.arch[group].parameter_names
    far = []
    for run in (plain, pulled):
        run.run_round()
        far.append(
            sum(float((run.server.models[group][n] - start[n]).square().sum()) for n in names)
        )
    assert far[1] < 0.5 * far[0]


@pytest.mark.parametrize(("method", "buffer"), [("fedbuff", 1), ("fedbuff", 3), ("fedasync", None)])
def test_tensors_shared_by_architectures_stay_equal(method: str, buffer: int | None) -> None:
    models = [
        {"name": "mlp", "hidden": [24], "feature_dim": 16},
        {"name": "mlp", "hidden": [12], "feature_dim": 16},
    ]
    algorithm = {"name": method, **({"buffer": buffer} if buffer else {})}
    run = session(
        config(method, models, clients__common=["head."], algorithm=algorithm),
        seconds=lambda client_id, _: SECONDS[client_id],
    )
    start = [dict(model) for model in run.server.models.values()]
    run.run_round()
    one, other = run.server.models.values()
    for name in ("head.weight", "head.bias"):
        assert torch.equal(start[0][name], start[1][name]) and torch.equal(one[name], other[name])
        assert not torch.equal(start[0][name], one[name])


def test_heterofl_weights_widths_by_rows_and_staleness() -> None:
    wide = {"name": "mlp", "hidden": [16]}
    algorithm = {"name": "heterofl", "model": wide, "widths": [1, 0.5, 0.5], "weighting": "samples"}
    wide_config = config("heterofl", wide, clients=3, algorithm=algorithm)
    wide_config["runtime"] |= {
        "mode": "async",
        "buffer": 2,
        "staleness": {"kind": "polynomial", "a": 1.0},
    }
    run = session(wide_config, seconds=lambda client_id, _: SECONDS[client_id])
    combined = []
    combine = run._aggregate_uploads

    def seeing(sent: list[Any]) -> None:
        before = next(iter(run.server.models.values()))
        combine(sent)
        combined.append((before, sent, next(iter(run.server.models.values()))))

    run._aggregate_uploads = seeing  # type: ignore[method-assign]
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

"""Server optimizers: each rule over several rounds, limit cases, and unchanged state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.payload import Item, Payload
from hetero_fl.engine.driver import run_plan
from tests.references.local_training import clients, largest_difference, mean, module, train
from tests.support.federations import MIXED, config, rounds_of, same_bits

SETTINGS: dict[str, dict[str, Any]] = {
    "fedavgm": {"momentum": 0.8, "server_lr": 0.7},
    "fedadam": {"beta1": 0.8, "beta2": 0.6, "tau": 0.01, "server_lr": 0.05},
    "fedyogi": {"beta1": 0.8, "beta2": 0.6, "tau": 0.01, "server_lr": 0.05},
}


class Rule:
    """The update rules of the papers for one tensor."""

    def __init__(self, method: str) -> None:
        self.method, self.s, self.m, self.v = method, SETTINGS[method], 0.0, None

    def __call__(self, x: Tensor, delta: Tensor) -> Tensor:
        s = self.s
        if self.method == "fedavgm":
            self.m = s["momentum"] * self.m + delta
            return x + s["server_lr"] * self.m
        b1, b2 = s["beta1"], s["beta2"]
        v = torch.full_like(x, s["tau"] ** 2) if self.v is None else self.v
        self.m = b1 * self.m + (1 - b1) * delta
        if self.method == "fedadam":
            self.v = b2 * v + (1 - b2) * delta**2
        else:
            self.v = v - (1 - b2) * delta**2 * torch.sign(v - delta**2)
        return x + s["server_lr"] * self.m / (torch.sqrt(self.v) + s["tau"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", SETTINGS)
def test_rounds_match_reference(method: str) -> None:
    algorithm = {"name": method, **SETTINGS[method]}
    rounds = rounds_of(config(method, MIXED[:2], 4, algorithm=algorithm), num_rounds=0)
    rules: dict[tuple[str, str], Rule] = {}
    for _ in range(3):
        before = {g: dict(m) for g, m in rounds.server.models.items()}
        sent: dict[str, list[tuple[float, dict[str, Tensor]]]] = {g: [] for g in before}
        for client in clients(rounds).values():
            group = client.arch["model"].spec_id
            model = module(client.arch["model"], before[group])
            train(
                client,
                list(model.parameters()),
                lambda x, y, m=model: F.cross_entropy(m(x).logits, y),
            )
            sent[group].append((client.num_rows, floating_tensors(model.state_dict())))
        rounds.run_round()
        for group, old in before.items():
            assert len(sent[group]) == 2
            expected, average = {}, mean(sent[group])
            for n, t in average.items():
                is_parameter = n in rounds.server.arch[group].parameter_names
                expected[n] = (
                    rules.setdefault((group, n), Rule(method))(old[n], t - old[n])
                    if is_parameter
                    else t
                )
            assert largest_difference(rounds.server.models[group], expected) < 1e-9


@pytest.mark.parametrize("momentum, equal", [(0.0, True), (0.5, False)])
def test_fedavgm_without_momentum_equals_fedavg(momentum: float, equal: bool) -> None:
    fedavg = rounds_of(config("fedavg"))
    fedavgm = rounds_of(config("fedavgm", algorithm={"name": "fedavgm", "momentum": momentum}))
    (group,) = fedavg.server.models
    assert same_bits(fedavg.server.models[group], fedavgm.server.models[group]) is equal


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fedadam", "fedyogi"])
def test_large_tau_equals_fedavg(method: str) -> None:
    """Choose τ so large that √v is negligible: the step is λ·Δ / 2τ, because v starts at τ²."""
    huge = {"tau": 1e9, "beta1": 0.0, "server_lr": 2e9}
    fedavg, actual = (
        rounds_of(config("fedavg")),
        rounds_of(config(method, algorithm={"name": method, "beta2": 0.99999999, **huge})),
    )
    (group,) = fedavg.server.models
    assert (
        largest_difference(
            floating_tensors(actual.server.models[group]),
            floating_tensors(fedavg.server.models[group]),
        )
        < 1e-6
    )


@pytest.mark.usefixtures("float64")
def test_yogi_forgets_large_updates_slower_than_adam() -> None:
    seconds = {}
    for method in ("fedadam", "fedyogi"):
        rounds = rounds_of(
            config(method, "mlp", 1, algorithm={"name": method, "beta2": 0.9}), num_rounds=0
        )
        (group, model), client_info = (
            next(iter(rounds.server.models.items())),
            rounds.federation.client_infos["site"],
        )
        for size in (1.0, 0.01):
            sent = {n: rounds.server.models[group][n] + size for n in floating_tensors(model)}
            upload = Upload(client_info, Payload({"model": Item(sent, 1.0, "params")}))
            uploads = Uploads([upload], rounds.algorithm.uploads)
            run_plan(
                rounds.server, rounds.algorithm.aggregate(rounds.server, uploads), rounds.backend
            )
        seconds[method] = float(
            rounds.server.state["optimizer"][group]["second"]["head.bias"].mean()
        )
    assert seconds["fedadam"] == pytest.approx(0.9 * (0.9e-6 + 0.1) + 0.1e-4, rel=1e-9)
    assert seconds["fedyogi"] == pytest.approx(1e-6 + 0.1 - 0.1e-4, rel=1e-9)


@pytest.mark.parametrize("method", SETTINGS)
def test_absent_architectures_keep_model_and_moments(method: str) -> None:
    rounds = rounds_of(config(method, MIXED, 4, clients__per_round=1, rounds=6), num_rounds=0)
    seen = set()
    for index in range(6):
        (client_id,) = rounds.sample_cohort(index)
        own = rounds.federation.client_infos[client_id].arch.spec_id
        models = {g: dict(m) for g, m in rounds.server.models.items()}
        memory = {
            g: {k: dict(t) for k, t in kinds.items()}
            for g, kinds in rounds.server.state.get("optimizer", {}).items()
        }
        rounds.run_round()
        seen.add(own)
        for group, before in models.items():
            assert same_bits(before, rounds.server.models[group]) is (group != own)
            for kind, tensors in memory.get(group, {}).items():
                assert same_bits(tensors, rounds.server.state["optimizer"][group][kind]) is (
                    group != own
                )
    assert len(seen) > 1 and rounds.server.state["optimizer"].keys() == seen


@pytest.mark.parametrize("method", SETTINGS)
def test_batch_norm_variance_stays_non_negative(method: str) -> None:
    rounds = rounds_of(config(method, algorithm={"name": method, "server_lr": 3.0}))
    (model,) = rounds.server.models.values()
    assert all((t > 0).all() for n, t in model.items() if n.endswith("running_var"))
    (memory,) = rounds.server.state["optimizer"].values()
    assert memory and not any("running" in n for tensors in memory.values() for n in tensors)

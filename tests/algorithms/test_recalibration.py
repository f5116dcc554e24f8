"""Recalibrated BatchNorm statistics, and priors at prediction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hetero_fl
from hetero_fl.algorithms.prediction import proxy_sample
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.plan import Predict, Recalibrate, Rows
from model_zoo import is_batch_norm
from tests.support.federations import config, deployed, rounds_of, same_bits


def reference_statistics(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return BatchNorm statistics as means over batches of 64, from inputs read by hooks."""
    module = copy.deepcopy(module).eval()
    found: dict[str, list[torch.Tensor]] = {}
    for name, layer in module.named_modules():
        if is_batch_norm(layer):
            layer.train()
            layer.register_forward_hook(
                lambda _, inputs, __, name=name: found.setdefault(name, []).append(inputs[0])
            )
    with torch.no_grad():
        for batch in x.split(64):
            if len(batch) > 1:
                module(batch)
    statistics = {}
    for name, inputs in found.items():
        columns = [v.transpose(0, 1).flatten(1) for v in inputs]
        means = [v.mean(1) for v in columns]
        variances = [v.var(1, unbiased=True) for v in columns]
        statistics[f"{name}.running_mean"] = torch.stack(means).mean(0)
        statistics[f"{name}.running_var"] = torch.stack(variances).mean(0)
    return statistics


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "model", ["cnn_bn_small", {"name": "mlp", "hidden": [16, 12], "norm": "batch", "dropout": 0.5}]
)
def test_recalibrate_matches_reference(model: Any) -> None:
    rounds = rounds_of(config("fedmd", model, data__proxy__size=129), num_rounds=1)
    client = deployed(rounds, "site_1")
    before = {n: t.clone() for n, t in client.models["model"].items()}

    (found,) = rounds.backend.run([(client, Recalibrate("model", Rows("proxy")))])

    module = client.arch["model"].build()
    module.load_state_dict({**module.state_dict(), **client.models["model"]})
    expected = reference_statistics(module, client.data("proxy", None)["x"])
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n], atol=1e-12) for n in found)
    assert same_bits(before, client.models["model"])


def test_recalibrate_restores_the_layers_of_the_template() -> None:
    rounds = rounds_of(config("fedmd"), num_rounds=0)
    client = deployed(rounds, "site_1")
    template = rounds.backend.templates(client.arch["model"])
    layers = [layer for layer in template.module.modules() if is_batch_norm(layer)]
    before = [layer.momentum for layer in layers]

    rounds.backend.run([(client, Recalibrate("model", Rows("proxy")))])

    assert layers and None not in before
    assert [layer.momentum for layer in layers] == before
    assert not any(layer.training for layer in layers)


def test_recalibrate_returns_nothing_without_batch_norm() -> None:
    rounds = rounds_of(config("fedmd", {"name": "cnn", "width": 4, "norm": "group"}), num_rounds=0)
    client = deployed(rounds, "site_1")

    assert rounds.backend.run([(client, Recalibrate("model", Rows("proxy")))]) == [{}]


# A mentee whose inputs differ from those of the clients' models.
MENTEE = {"mentee": "cnn_bn_small", "mentee_input": [1, 6, 6]}


@pytest.mark.parametrize(
    "own",
    [{"name": "fedavg"}, {"name": "ensemble"}, {"name": "ditto"}, {"name": "fml", **MENTEE}],
    ids=lambda own: own["name"],
)
def test_recalibration_of_one_test_set_leaves_the_other(own: dict[str, Any]) -> None:
    method = own["name"]
    plain = rounds_of(config(method, rounds=1, algorithm=own)).evaluate().clients
    for option, test_set, other in (
        ("global_test", "global", "personal"),
        ("local_test", "personal", "global"),
    ):
        options = {**own, "recalibrate": [option]}
        changed = rounds_of(config(method, rounds=1, algorithm=options)).evaluate().clients

        for client in plain:
            before, after = plain[client].scores, changed[client].scores
            assert before[other] == after[other], option
            assert before[test_set]["loss"] != after[test_set]["loss"], option


NORMALIZED = [{"match": "site_[23]", "preprocess": {"normalize": {"mean": 0.2, "std": 0.4}}}]


@pytest.mark.parametrize("method", ["centralized", "ensemble", "dense"])
def test_recalibrated_common_model_has_one_global_score(method: str) -> None:
    """Let the clients of a common model preprocess their rows differently."""
    source = config(method, rounds=1, clients__overrides=NORMALIZED)
    plain = rounds_of(source).evaluate()
    source["algorithm"]["recalibrate"] = ["global_test"]
    changed = rounds_of(source).evaluate()

    scores = [evaluation.scores["global"]["loss"] for evaluation in changed.clients.values()]
    assert len(scores) == 3 and len(set(scores)) == 1
    assert scores[0] != plain.clients["site_1"].scores["global"]["loss"]
    if method == "centralized":
        assert changed.server is not None
        assert changed.server["global"]["loss"] == pytest.approx(scores[0], abs=1e-5)


def test_statistics_of_the_server_model_are_recomputed() -> None:
    options = {"name": "fedavg", "recalibrate": ["global_test"]}
    rounds = rounds_of(config("fedavg", rounds=1, algorithm=options))
    client = deployed(rounds, "site_1")
    (statistics,) = rounds.backend.run([(client, Recalibrate("model", proxy_sample(client)))])
    client.models["model"] = {**client.models["model"], **statistics}

    (logits,) = rounds.backend.run([(client, Predict("model", Rows("common_test")))])

    result = rounds.evaluate()
    y = client.data("common_test", None)["y"]
    assert result.server is not None
    expected = nn.functional.cross_entropy(logits, y).item()
    assert result.server["global"]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("is_private", [False, True])
def test_saved_model_of_a_private_client_has_neither_statistics_nor_correction(
    is_private: bool, tmp_path: Path
) -> None:
    options = {"name": "fedmd", "recalibrate": ["local_test"], "prior_correction": True}
    noise = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}
    source = config("fedmd", rounds=1, algorithm=options, privacy=noise if is_private else None)

    model = hetero_fl.run(source, out=tmp_path / "run").models["site_1"]

    assert bool(model.local_tensors) is not is_private
    assert (model.correction is None) is is_private


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedavg", {"recalibrate": ["local_test"], "logit_adjustment": True}),
        ("fedavg", {"recalibrate": ["global_test", "local_test"]}),
        ("local", {"recalibrate": ["global_test"], "prior_correction": True}),
    ],
)
def test_saved_models_reproduce_the_evaluation(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = config(method, rounds=1, algorithm={"name": method, **options})

    run = hetero_fl.run(source, out=tmp_path / "run")

    trainer = rounds_of(source)
    result = trainer.evaluate()
    for client, evaluation in result.clients.items():
        participant = trainer.federation.client(client, trainer.store.get(client), 1)
        for name, rows in (("personal", "test"), ("global", "common_test")):
            columns = participant.data(rows, None)
            logits = run.models[client].logits(columns["x"], personal=name == "personal")
            loss = nn.functional.cross_entropy(logits, columns["y"]).item()
            assert abs(loss - evaluation.scores[name]["loss"]) < 1e-5
    assert (result.server is None) == (method == "local")
    if result.server is None:
        return
    columns = trainer.server.data("common_test", None)
    logits = run.models["server"].logits(columns["x"])
    loss = nn.functional.cross_entropy(logits, columns["y"]).item()
    assert abs(loss - result.server["global"]["loss"]) < 1e-5


def test_local_prior_is_independent_of_the_loss() -> None:
    source = config("fedavg", rounds=1, algorithm={"name": "fedavg", "local_prior": True})
    rounds = rounds_of(source)
    site, client = rounds.executor.runtime, deployed(rounds, "site_1")  # type: ignore[attr-defined]
    with_prior = site.predict(client, Rows("test"), True)
    client.settings = client.settings.model_copy(update={"local_prior": False})
    prior = log_prior(client.task, client.counts)
    assert prior is not None

    assert torch.allclose(with_prior - site.predict(client, Rows("test"), True), prior, atol=1e-4)

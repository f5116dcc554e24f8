"""Recalibrated BatchNorm statistics, priors at prediction and fine-tuning before evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hetero_fl
from hetero_fl.algorithms.recalibration import local_sample, proxy_sample
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.plan import Predict, Recalibrate, Rows
from hetero_fl.utils.errors import UserError
from model_zoo import is_batch_norm
from tests.algorithms.test_equalities import history
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

LABEL_SKEW = {"kind": "dirichlet", "alpha": 0.2, "min_size": 30}
PROXY = ["proxy_predictions"]


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


@pytest.mark.parametrize("method", ["fedmd", "ds_fl", "kt_pfl", "hybrid", "feddf"])
def test_proxy_predictions_use_statistics_of_proxy_set(method: str) -> None:
    off: Any = {"name": method, "recalibrate": []}
    plain = rounds_of(config(method, rounds=1, data__partition=LABEL_SKEW, algorithm=off))
    options: Any = {"name": method, "recalibrate": PROXY}
    changed = rounds_of(config(method, rounds=1, data__partition=LABEL_SKEW, algorithm=options))

    key = "predictions" if method == "kt_pfl" else "teacher"
    if method == "feddf":
        (group,) = plain.server.models
        assert not same_bits(plain.server.models[group], changed.server.models[group])
    else:
        assert not torch.equal(plain.server.state[key], changed.server.state[key])


def test_uploaded_predictions_match_reference() -> None:
    options: Any = {"name": "fedmd", "recalibrate": PROXY, "prior_correction": True}
    rounds = rounds_of(config("fedmd", clients=1, algorithm=options, rounds=1))
    # The client with the model with which it predicted, before it distills the teacher.
    client = rounds.federation.client("site", rounds.store.get("site"), 1)

    (statistics,) = rounds.backend.run([(client, Recalibrate("model", proxy_sample(client)))])
    tensors = {**client.models["model"], **statistics}
    (logits,) = rounds.backend.run([(client, Predict("model", Rows("proxy"), tensors=tensors))])
    prior = log_prior(client.task, client.counts)
    assert prior is not None
    assert torch.allclose(rounds.server.state["teacher"], logits - prior, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("align", [0.0, 0.5])
def test_recalibrated_hybrid_without_replay_equals_recalibrated_feddf(align: float) -> None:
    same = {"distill_epochs": 3, "recalibrate": [*PROXY, "local_test"], "align": align}
    hybrid = {"name": "hybrid", "replay_weight": 0.0, **same}
    feddf = {"name": "feddf", "logit_adjustment": True, "teacher": "contrast", **same}

    assert history(hybrid) == history(feddf)
    assert history({**feddf, "recalibrate": []}) != history(feddf)


def test_proxy_sample_is_one_random_order_for_all() -> None:
    rounds = rounds_of(config("fedmd"), num_rounds=0)

    samples = [proxy_sample(deployed(rounds, client)).rows for client in ("site_1", "site_2")]

    assert samples[0] is not None and samples[1] is not None
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], torch.arange(60))
    assert torch.equal(samples[0].sort().values, torch.arange(60))


def test_local_sample_is_shuffled() -> None:
    client = deployed(rounds_of(config("fedmd", data__proxy__size=20), num_rounds=0), "site_1")
    proxy = {row.numpy().tobytes() for row in client.data("proxy", None)["x"]}
    own = [row.numpy().tobytes() for row in client.data("train", None)["x"]]

    found = [row.numpy().tobytes() for row in local_sample(client).tensors["x"]]

    # Both halves contain rows of both sets, and the own rows are not the first ones.
    assert all(0 < sum(row in proxy for row in half) < 20 for half in (found[:20], found[20:]))
    assert {row for row in found if row not in proxy} != set(own[:20])


def test_local_sample_has_equal_numbers_of_own_and_proxy_rows() -> None:
    client = deployed(rounds_of(config("fedmd", data__proxy__size=20), num_rounds=0), "site_1")

    x = local_sample(client).tensors["x"]

    proxy = {row.numpy().tobytes() for row in client.data("proxy", None)["x"]}
    own = {row.numpy().tobytes() for row in client.data("train", None)["x"]}
    found = [row.numpy().tobytes() for row in x]
    assert len(found) == 40
    assert sum(row in proxy for row in found) == 20
    assert sum(row in own for row in found) == 20


# A mentee whose inputs differ from those of the clients' models.
MENTEE = {"mentee": "cnn_bn_small", "mentee_input": [1, 6, 6]}


@pytest.mark.parametrize(
    "own",
    [{"name": "fedavg"}, {"name": "ensemble"}, {"name": "ditto"}, {"name": "fml", **MENTEE}],
    ids=lambda own: own["name"],
)
@pytest.mark.parametrize("test_set", ["global", "personal"])
def test_recalibration_of_one_test_set_leaves_the_other(own: dict[str, Any], test_set: str) -> None:
    prediction = {"global": "global_test", "personal": "local_test"}[test_set]
    other = {"global": "personal", "personal": "global"}[test_set]
    options, method = {**own, "recalibrate": [prediction]}, own["name"]
    plain = rounds_of(config(method, rounds=1, algorithm=own)).evaluate().clients
    changed = rounds_of(config(method, rounds=1, algorithm=options)).evaluate().clients

    for client in plain:
        before, after = plain[client].scores, changed[client].scores
        assert before[other] == after[other]
        assert before[test_set]["loss"] != after[test_set]["loss"]


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


def test_feddf_recalibrates_with_the_preprocessing_of_clients() -> None:
    options = {"name": "feddf", "recalibrate": PROXY}
    source = config("feddf", rounds=1, algorithm=options, clients__overrides=NORMALIZED)
    rounds = rounds_of(source, num_rounds=0)
    found: list[Any] = []
    perform = rounds.backend.run
    rounds.backend.run = lambda work: (  # type: ignore[method-assign]
        found.extend(step.data.preprocess for _, step in work if isinstance(step, Recalibrate))
        or perform(work)
    )

    rounds.run_round()

    infos = rounds.federation.client_infos
    assert found == [infos[client].preprocess for client in ("site_1", "site_2", "site_3")]
    assert found[0] != found[1]


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


def test_fedavg_ft_equals_fedavg_with_fine_tuning() -> None:
    alias = rounds_of(config("fedavg_ft"))
    fedavg = rounds_of(config("fedavg", algorithm={"name": "fedavg", "fine_tune_epochs": 5}))
    plain = rounds_of(config("fedavg"))

    tuned = deployed(alias, "site_1").models["model"]

    assert same_bits(tuned, deployed(fedavg, "site_1").models["model"])
    assert not same_bits(tuned, deployed(plain, "site_1").models["model"])
    (group,) = plain.server.models
    assert same_bits(plain.server.models[group], alias.server.models[group])


def test_prior_correction_with_logit_adjustment_is_refused() -> None:
    options = {"name": "fedmd", "logit_adjustment": True, "prior_correction": True}

    with pytest.raises(UserError, match=r"prior_correction cannot be combined with logit_adj"):
        rounds_of(config("fedmd", MIXED, algorithm=options), num_rounds=0)


@pytest.mark.parametrize("algorithm", ["feddf", "hybrid"])
def test_distilled_model_has_the_statistics_of_clients(algorithm: str) -> None:
    """Compare the server's model with that of FedAvg, whose clients train equally in round 1."""

    def server_model(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        section = {"name": name, "logit_adjustment": True, **settings}
        rounds = rounds_of(config(name, ["cnn_bn_small"], algorithm=section), num_rounds=1)
        (model,) = rounds.server.models.values()
        return dict(model)

    average = server_model("fedavg")
    replay = {"replay_weight": 0.0} if algorithm == "hybrid" else {}  # style: ok (key)
    of_clients = server_model(algorithm, distilled_statistics="clients", **replay)
    of_proxy = server_model(algorithm, **replay)

    statistics = [name for name in average if "running" in name]
    assert statistics and all(torch.equal(average[n], of_clients[n]) for n in statistics)
    assert not any(torch.equal(average[n], of_proxy[n]) for n in statistics)
    weights = [name for name in average if "running" not in name and "num" not in name]
    assert all(torch.equal(of_proxy[n], of_clients[n]) for n in weights)
    assert not any(torch.equal(average[n], of_clients[n]) for n in weights)

"""Settings under which two methods must give bit-identical or equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Predict, Rows
from hetero_fl.federation.trainer import add_evaluation
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

OFF = {
    "logit_adjustment": False,
    "recalibrate": [],
    "teacher": "mean",
    "align": 0.0,
    "heads": "take",
    "distill_at": "client",
    "replay_weight": 0.0,
}


def test_hybrid_with_one_group_and_no_proxy_set_equals_fedavg() -> None:
    fedavg = rounds_of(config("fedavg", data__proxy__size=0))
    hybrid = rounds_of(config("hybrid", data__proxy__size=0, algorithm={"name": "hybrid", **OFF}))
    (group,) = fedavg.server.models
    assert same_bits(fedavg.server.models[group], hybrid.server.models[group])


def test_hybrid_with_distinct_architectures_equals_fedmd() -> None:
    fedmd = rounds_of(config("fedmd", MIXED, rounds=3))
    hybrid = rounds_of(config("hybrid", MIXED, rounds=3, algorithm={"name": "hybrid", **OFF}))
    for client_id, client_info in fedmd.federation.client_infos.items():
        # The mean over one client is its upload.
        actual = hybrid.server.models[client_info.arch.spec_id]
        assert same_bits(
            floating_tensors(fedmd.store.get(client_id).models["model"]), floating_tensors(actual)
        )
    assert torch.equal(fedmd.server.state["teacher"], hybrid.server.state["teacher"])


@pytest.mark.slow
@pytest.mark.parametrize("proxy_rows", [None, 40])
def test_hybrid_without_proxy_replay_equals_feddf(
    proxy_rows: int | None,
) -> None:
    """Compare two clients of each architecture, four of six per round."""
    same = {"distill_epochs": 3, "proxy_rows": proxy_rows}
    hybrid = {"name": "hybrid", "replay_weight": 0.0, **same}
    feddf = {
        "name": "feddf",
        "logit_adjustment": True,
        "recalibrate": ["proxy_predictions", "local_test"],
        "teacher": "contrast",
        "align": 1.0,
        **same,
    }

    actual, expected = history(hybrid), history(feddf)

    assert actual == expected
    assert history({**hybrid, "replay_weight": 0.5}) != expected
    assert history({**feddf, "logit_adjustment": False}) != expected
    assert history({**feddf, "teacher": "mean"}) != expected
    assert history({**feddf, "align": 0.0}) != expected


def history(algorithm: dict[str, Any]) -> list[Any]:
    """Return scores, losses and encoded server and client models after each of four rounds."""
    source = config(
        algorithm["name"], MIXED, clients=6, rounds=4, clients__per_round=4, algorithm=algorithm
    )
    source["data"]["train_limit"] = 500
    rounds = rounds_of(source, num_rounds=0)
    found: list[Any] = []
    for _ in range(4):
        record = rounds.run_round()
        add_evaluation(record, rounds.evaluate())
        models = dict(rounds.server.models)
        models |= {
            client_id: deployed(rounds, client_id).models["model"]
            for client_id in rounds.federation.client_infos
        }
        bits = {
            (slot, n): t.numpy().tobytes()
            for slot, tensors in models.items()
            for n, t in tensors.items()
        }
        found.append(
            [record[key] for key in ("cohort", "train_loss", "global", "personal", "clients")]
            + [bits]
        )
    return found


def test_each_setting_changes_the_result() -> None:
    """Show that the equalities above compare settings that have an effect."""
    off = {"name": "hybrid", **OFF}
    plain = rounds_of(config("hybrid", algorithm=off, rounds=3))
    (group,) = plain.server.models
    for key, value in {
        "logit_adjustment": True,
        "teacher": "contrast",
        "align": 1.0,
        "heads": "keep",
        "distill_at": "both",
        "replay_weight": 0.5,
    }.items():
        changed = rounds_of(config("hybrid", algorithm={**off, key: value}, rounds=3))
        assert not same_bits(plain.server.models[group], changed.server.models[group]), key


@pytest.mark.parametrize("mu, equal", [(0.0, True), (0.5, False)])
def test_fedprox_with_mu_zero_equals_fedavg(mu: float, equal: bool) -> None:
    fedavg = rounds_of(config("fedavg"))
    fedprox = rounds_of(config("fedprox", algorithm={"name": "fedprox", "mu": mu}))
    (group,) = fedavg.server.models
    assert same_bits(fedavg.server.models[group], fedprox.server.models[group]) is equal


def test_single_client_equals_centralized_training() -> None:
    fedavg = rounds_of(config("fedavg", clients=1))
    centralized = rounds_of(config("centralized", clients=1))
    (group,) = fedavg.server.models
    assert same_bits(
        floating_tensors(fedavg.server.models[group]),
        floating_tensors(centralized.server.models[group]),
    )


def test_server_rate_one_is_the_plain_mean() -> None:
    plain, rate = (
        rounds_of(config("fedavg")),
        rounds_of(config("fedavg", algorithm={"name": "fedavg", "server_lr": 1.0})),
    )
    (group,) = plain.server.models
    assert same_bits(plain.server.models[group], rate.server.models[group])


@pytest.mark.slow
def test_student_of_one_client_matches_its_teacher() -> None:
    source = config(
        "fedmd",
        clients=1,
        rounds=12,
        data__proxy__size=120,
        server={"model": "mlp", "optimizer": {"lr": 0.003}},
    )
    source["algorithm"] |= {"student_epochs": 80}
    rounds = rounds_of(source)
    site = rounds.executor.runtime
    teacher = deployed(rounds, "site")
    for rows, least in (("proxy", 0.98), ("common_test", 0.75)):
        predicted = site.predict(teacher, Rows(rows), personal=False).argmax(-1)
        learned = rounds.backend.run([(rounds.server, Predict("student", Rows(rows)))])[0].argmax(
            -1
        )
        assert (predicted == learned).float().mean() > least, rows
    y = teacher.data("common_test", None)["y"]
    # The teacher itself is accurate.
    assert (predicted == y).float().mean() > 0.7

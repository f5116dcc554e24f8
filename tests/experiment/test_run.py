"""Complete runs from Python: run directory, summary, saved models, init_from, callbacks."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetero_fl import Run, evaluate, run
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.metrics import score
from hetero_fl.data import load_source, with_test
from hetero_fl.experiment.starting_models import starting_tensors
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.federations import MIXED, config, rounds_of

FILES = [
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "details.json",
    "report.html",
    "log.txt",
    "environment.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    source = config(
        "hybrid",
        MIXED,
        clients=4,
        rounds=3,
        server={"model": "mlp"},
        data__test_limit=None,
        output={},
    )
    return run(source, out=tmp_path_factory.mktemp("runs") / "a")


@pytest.mark.slow
def test_run_directory_is_complete(finished: Run) -> None:
    for name in FILES:
        assert (finished.path / name).stat().st_size > 0
    assert {p.stem for p in (finished.path / "models").glob("*.safetensors")} == {
        "site_1",
        "site_2",
        "site_3",
        "site_4",
        "server",
    }
    assert len(list((finished.path / "plots").glob("*.png"))) >= 5
    best = {
        finished.summary[test]["best_by_validation"]["round"]
        for test in ("personal", "global", "server")
    }
    checkpoints = {path.stem for path in (finished.path / "checkpoint").iterdir()}
    # The former best rounds are kept, too, because an extended run may repeat the last round.
    assert checkpoints >= {f"round-{n:06}" for n in (2, 3, *best)}


def test_summary_keys_and_totals(finished: Run) -> None:
    summary = finished.summary
    assert set(summary) == {
        "name",
        "algorithm",
        "seed",
        "rounds_completed",
        "data",
        "personal",
        "global",
        "server",
        "clients",
        "communication",
        "seconds",
        "privacy",
    }
    assert (
        summary["rounds_completed"] == 3
        and summary["algorithm"] == "hybrid"
        and summary["privacy"] is None
    )
    assert (
        set(summary["data"]) == {"name", "simulated", "n_train", "n_proxy", "n_test"}
        and summary["data"]["simulated"] is False
    )
    for which in ("personal", "global", "server"):
        for when in ("last", "best_by_validation"):
            assert {
                "accuracy",
                "balanced_accuracy",
                "macro_f1",
                "auroc",
                "average_precision",
                "loss",
            } <= set(summary[which][when])
        assert 1 <= summary[which]["best_by_validation"]["round"] <= 3
    assert {"accuracy_std", "accuracy_worst"} <= set(summary["global"]["last"])
    assert [set(c) for c in summary["clients"]] == [
        {"id", "model", "parameters", "n_train", "personal", "global"}
    ] * 4
    assert summary["communication"]["up_bytes"] == sum(r["up_bytes"] for r in finished.metrics) > 0
    assert (
        summary["communication"]["down_bytes"] == sum(r["down_bytes"] for r in finished.metrics) > 0
    )
    assert "NaN" not in (finished.path / "summary.json").read_text()


def test_saved_models_reproduce_the_summary(finished: Run) -> None:
    digits = with_test(load_source(SourceConfig(name="digits"), Path("unused")))
    assert digits.test is not None and digits.test.y is not None
    for client in finished.summary["clients"]:
        predictions = finished.predict(client["id"], digits.test.x, personal=False)
        assert torch.allclose(predictions.sum(1), torch.ones(len(predictions)), atol=1e-5)
        scores = score(finished.models[client["id"]].task, predictions.log(), digits.test.y)
        assert scores["accuracy"] == pytest.approx(client["global"]["accuracy"], abs=1e-9)
    by_name = evaluate(finished, "digits")
    assert by_name["server"]["accuracy"] == pytest.approx(
        finished.summary["server"]["last"]["accuracy"], abs=1e-9
    )
    personal = finished.predict("site_1", digits.test.x, personal=True)
    # personal predictions add the log of the label frequencies
    assert not torch.allclose(personal, finished.predict("site_1", digits.test.x, personal=False))


def test_predict_suggests_the_nearest_client(finished: Run) -> None:
    with pytest.raises(UserError, match="did you mean 'site_1'"):
        finished.predict("site1", torch.zeros(1, 1, 8, 8))


def test_init_from_loads_the_models_of_a_run(finished: Run, tmp_path: Path) -> None:
    source = config(
        "local", MIXED, clients=4, rounds=1, init_from=str(finished.path), data__test_limit=None
    )
    source["clients"]["defaults"] = {"optimizer": {"name": "sgd", "lr": 1e-12}}
    after = run(source, out=tmp_path / "b")
    for client_id in ("site_1", "site_2"):
        start = finished.models[client_id].tensors["head.weight"]
        assert torch.allclose(after.models[client_id].tensors["head.weight"], start, atol=1e-6)
    fresh = rounds_of(config("local", MIXED, clients=4), num_rounds=0)
    initial = fresh.federation.initial_tensors(fresh.federation.client_infos["site_1"].arch)[
        "head.weight"
    ]
    assert not torch.allclose(finished.models["site_1"].tensors["head.weight"], initial)
    with pytest.raises(UserError, match="init_from"):
        run(config("local", "vit", init_from=str(finished.path)), out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_init_from_starts_groups_at_the_mean_of_their_members(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = rounds_of(config("fedavg", MIXED, clients=4, data__test_limit=None), num_rounds=0)
    models = finished.models
    group = models["site_1"].arch.spec_id
    first, second = (
        client_id
        for client_id in rounds.federation.client_infos
        if models[client_id].arch.spec_id == group
    )
    shifted = {n: t + 1 if t.is_floating_point() else t for n, t in models[second].tensors.items()}
    models[second] = replace(models[second], tensors=shifted)
    monkeypatch.setattr(Run, "models", models)

    start = starting_tensors(str(finished.path), rounds.federation, CodePermission())
    start.load_into(rounds)

    for name, tensor in models[first].tensors.items():
        if tensor.is_floating_point():
            mean = (tensor + shifted[name]) / 2
            torch.testing.assert_close(rounds.server.models[group][name], mean)


def test_callbacks_run_after_the_metrics_are_written(tmp_path: Path) -> None:
    seen = []

    def callback(record: dict) -> None:
        lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["round"] == record["round"] and len(lines) == record["round"]
        seen.append(record["round"])

    source = config("fedavg", rounds=3, evaluation={"every": 2})
    run(source, out=tmp_path / "a", callbacks=[callback])
    assert seen == [1, 2, 3]
    records = Run(tmp_path / "a").metrics
    # every second round and the last one
    assert [r.get("global") is not None for r in records] == [False, True, True]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_callback_that_exits_is_reported(
    is_replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_replaced:
        library: dict[str, object] = {"leave": sys.exit}
        text = "def exit(code):\n    leave(code)\n"
        exec(compile(text, sysconfig.get_path("purelib") + "/library.py", "exec"), library)
        monkeypatch.setattr(sys, "exit", library["exit"])

    def callback(record: dict) -> None:
        sys.exit(3)

    with pytest.raises(RunFailedError, match=r"test_run\.py:\d+, in callback: SystemExit: 3$"):
        run(config("fedavg", rounds=3), out=tmp_path / "a", callbacks=[callback])


def test_patience_stops_the_run(tmp_path: Path) -> None:
    source = config("local", rounds=30, evaluation={"patience": 2})
    source["clients"]["defaults"] = {"optimizer": {"name": "sgd", "lr": 1e-9}}
    stopped = run(source, out=tmp_path / "a")
    assert stopped.summary["rounds_completed"] < 8
    assert "validation has not improved" in (tmp_path / "a" / "log.txt").read_text()

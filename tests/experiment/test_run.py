"""Complete runs from Python: saved models, init_from, callbacks."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hetero_fl import Run, evaluate, run
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.metrics import score
from hetero_fl.data import load_source, with_test
from hetero_fl.experiment.preparation import starting_tensors
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.federations import MIXED, config, rounds_of


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
    )
    return run(source, out=tmp_path_factory.mktemp("runs") / "a")


def test_saved_models_reproduce_the_summary(finished: Run) -> None:
    digits = with_test(load_source(SourceConfig(name="digits"), Path("unused")))
    assert digits.test is not None and digits.test.y is not None
    for client in finished.summary["clients"]:
        predictions = finished.predict(client["id"], digits.test.x, personal=False).to_numpy()
        assert np.allclose(predictions.sum(1), 1, atol=1e-5)
        scores = score(
            finished.models[client["id"]].task, torch.tensor(predictions).log(), digits.test.y
        )
        assert scores["accuracy"] == pytest.approx(client["global"]["accuracy"], abs=1e-9)
    by_name = evaluate(finished, "digits")
    assert by_name["server"]["accuracy"] == pytest.approx(
        finished.summary["server"]["last"]["accuracy"], abs=1e-9
    )
    personal = finished.predict("site_1", digits.test.x, personal=True)
    # personal predictions add the log of the label frequencies
    assert not np.allclose(personal, finished.predict("site_1", digits.test.x, personal=False))
    with pytest.raises(UserError, match="did you mean 'site_1'"):
        finished.predict("site1", digits.test.x)


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

    start = starting_tensors(str(finished.path), rounds.federation, False)
    start.load_into(rounds)

    for name, tensor in models[first].tensors.items():
        if tensor.is_floating_point():
            mean = (tensor + shifted[name]) / 2
            torch.testing.assert_close(rounds.server.models[group][name], mean)


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

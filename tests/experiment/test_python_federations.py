"""Federations from Python objects: results as from a configuration, and one-line errors."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typing_extensions import override

import hetero_fl as hfl
from hetero_fl.algorithms import average_models
from tests.support.cases import each_case
from tests.support.python_federations import (
    DIGITS,
    QUIET,
    Digits,
    Net,
    images,
    same_models,
    table,
    without_seconds,
)

METHODS = [
    hfl.Local(),
    hfl.FedAvg(),
    hfl.Scaffold(),
    hfl.FedMD(digest_epochs=2),
    hfl.FedDF(teacher="contrast"),
    hfl.FedProto(),
    hfl.Ditto(),
    hfl.Hybrid(),
    hfl.FedProx(),
]


class Mean(hfl.FedAvg):
    """Average, in a class of this test."""

    title = "Mean"

    @override
    def aggregate(self, server: Any, uploads: Any) -> Any:
        average_models(server, uploads)
        yield from ()


def federation(*models: Any, **settings: Any) -> hfl.Federation:
    models = models or (Net(), Net(), Net(6))
    clients = [
        hfl.Client(f"site_{i}", model, images(40 + 10 * i, i)) for i, model in enumerate(models, 1)
    ]
    given = {"test": images(30, 9), "proxy": images(40, 8)[0], **settings}
    return hfl.Federation(clients, **given)


def runs_from_both(method: Any, folder: Path, overrides: list[str]) -> tuple[hfl.Run, hfl.Run]:
    """Train the same federation from objects and from a configuration."""
    data = {"name": "digits", "train_limit": 200, "test_limit": 30}
    names = [f"site_{i}" for i in range(1, 5)]
    models: list[Any] = ["cnn_bn_small", Digits]
    in_file: list[Any] = ["cnn_bn_small", DIGITS]
    objects = hfl.Federation(
        [
            hfl.Client(name, models[i % 2], optimizer=hfl.SGD(lr=0.05))
            for i, name in enumerate(names)
        ],
        data=data,
        partition=hfl.Dirichlet(alpha=0.5),
        proxy=40,
        seed=3,
    )
    first = objects.train(method, rounds=2, overrides=overrides)
    settings = method.model_dump(exclude_unset=True)
    groups = [
        {"name": name, "model": in_file[i % 2], "optimizer": {"name": "sgd", "lr": 0.05}}
        for i, name in enumerate(names)
    ]
    partition = {"kind": "dirichlet", "alpha": 0.5}
    file = {
        "name": "federation",
        "seed": 3,
        "data": {**data, "partition": partition, "proxy": {"size": 40}},
        "clients": {"groups": groups},
        "rounds": 2,
        "algorithm": {"name": first.summary["algorithm"], **settings},
    }
    return first, hfl.run(file, out=folder / "run", overrides=overrides)


@each_case("method", METHODS)
def test_objects_and_configuration_give_identical_bits(method: Any, tmp_path: Path) -> None:
    first, second = runs_from_both(method, tmp_path, QUIET)

    assert without_seconds(first) == without_seconds(second)
    assert same_models(first, second)


@pytest.mark.parametrize("method", [hfl.FedMD(), Mean()], ids=["fedmd", "own"])
def test_modules_and_own_methods_in_worker_processes(method: Any) -> None:
    own = federation()
    first, second = (
        own.train(method, rounds=2, overrides=[*QUIET, f"runtime.executor={name}"])
        for name in ("serial", "processes")
    )

    assert without_seconds(first) == without_seconds(second)
    assert same_models(first, second)


def test_resumed_training_gives_identical_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = federation().train(hfl.Hybrid(), rounds=3, overrides=QUIET)
    torch.manual_seed(0)
    own = federation()
    settings: dict[str, Any] = {"rounds": 3, "out": tmp_path / "run", "overrides": QUIET}

    with hfl.Trainer(own, hfl.Hybrid(), **settings) as first:
        start = first.model("site_1").out.weight
        assert first.completed == 0 and torch.equal(start, own.clients[0].model.out.weight)
        next(first)
        assert first.completed == 1 and set(first.server.models)
        assert isinstance(first.model("site_1"), nn.Module)
        assert first.evaluate()["global"] == whole.metrics[0]["global"]
    # The federation is created again, as in a new process. Its own weights are not used.
    with hfl.Trainer(federation(), hfl.Hybrid(), **settings, resume=True) as rest:
        assert [record["round"] for record in rest] == [2, 3]

    assert without_seconds(rest.run) == without_seconds(whole)
    assert same_models(rest.run, whole)


def test_given_weights_are_the_start_of_each_client() -> None:
    nets = [Net(), Net(), Net(6)]
    own = federation(*nets)

    prepared = own.prepare(hfl.Local())

    start = prepared.start
    for client, net in zip(("site_1", "site_2", "site_3"), nets, strict=True):
        assert torch.equal(start.clients[client]["head.weight"], net.out.weight)
        assert torch.equal(start.clients[client]["backbone.conv.weight"], net.conv.weight)
    assert len(start.server) == 2
    assert any("modules of site_2 start with other weights" in note for note in prepared.notes)


def test_training_leaves_the_module_and_the_data_unchanged() -> None:
    net = Net()
    x, y = images(40, 1)
    before = [tensor.clone() for tensor in net.state_dict().values()]
    x_before = x.copy()

    hfl.Federation([hfl.Client("a", net, (x, y))], test=images(30, 9)).train(
        hfl.Local(), rounds=1, overrides=QUIET
    )

    assert all(map(torch.equal, net.state_dict().values(), before))
    assert np.array_equal(x, x_before)


def test_run_reads_history_model_and_predictions(tmp_path: Path) -> None:
    run = federation().train(hfl.FedMD(), rounds=2, overrides=QUIET)
    x = images(5, 7)[0]

    history = run.history
    assert list(history.columns) == ["round", "client", "test", "metric", "value"]
    assert set(history["client"]) == {"site_1", "site_2", "site_3", "mean"}
    expected = run.metrics[1]["clients"]["site_1"]["global"]["accuracy"]
    row = history.query("round == 2 and client == 'site_1' and metric == 'accuracy'")
    assert row[row["test"] == "global"]["value"].item() == expected
    module = run.model("site_1")
    assert type(module) is Net and not module.training
    assert set(module.state_dict()) == set(Net().state_dict())
    inputs = torch.from_numpy(x)[:, None].float() / 255
    assert torch.allclose(
        module(inputs).softmax(1),
        torch.tensor(run.predict("site_1", x, personal=False).to_numpy()),
        atol=1e-5,
    )
    saved = run.save(tmp_path / "kept")
    assert saved.summary == run.summary


def test_temporary_directory_lives_as_long_as_the_run() -> None:
    run = federation().train(hfl.Local(), rounds=1, overrides=QUIET)
    path = run.path
    assert path.exists()

    del run

    assert not path.exists()


def test_own_validation_and_test_sets_of_a_client() -> None:
    def train(**parts: Any) -> hfl.Run:
        first = hfl.Client("a", "mlp", images(60, 1), **parts)
        second = hfl.Client("b", "mlp", images(60, 2))
        own = hfl.Federation([first, second], test=images(30, 9))
        return own.train(hfl.Local(), rounds=1, overrides=QUIET)

    run = train(test=images(33, 5), validation=images(12, 6))
    plain = train()

    rows = run.directory.details()["rows"]
    assert rows["a"] == {"train": 60, "validation": 12, "test": 33}
    assert rows["b"] == plain.directory.details()["rows"]["b"]


def test_prepared_run_outlives_its_federation() -> None:
    prepared = federation().prepare(hfl.Local(), rounds=1, overrides=QUIET)
    gc.collect()
    trainer = prepared.make_trainer()
    trainer.run_round()
    trainer.executor.close()


def test_comparison_of_methods(tmp_path: Path) -> None:
    comparison = federation().compare(
        [hfl.Local(), Mean(), "fedavg:logit_adjustment=true"],
        rounds=1,
        seeds=range(2),
        out=tmp_path / "out",
        overrides=QUIET,
    )

    assert len(comparison.frame) == 6
    assert "Mean" in comparison.to_markdown() and "tabular" in comparison.to_latex()
    assert "<table" in comparison._repr_html_() and comparison.plot().axes


def test_configuration_file_of_a_federation(tmp_path: Path) -> None:
    named = hfl.Federation(
        [hfl.Client("a", "mlp", epochs=2), hfl.Client("b", "linear")], data="digits", proxy=30
    )
    named.to_yaml(tmp_path / "federation.yaml")

    read = hfl.Federation.from_config(tmp_path / "federation.yaml")

    assert read.config["clients"]["groups"][0]["epochs"] == 2


# Ways to hand over data and models


def test_data_frames_with_a_label() -> None:
    clients = [
        hfl.Client("a", "mlp", table(60, 1)),
        hfl.Client("b", "wide_deep", table(50, 2).rename(columns={"ill": "state"}), label="state"),
    ]
    own = hfl.Federation(
        clients, test=table(40, 3), label="ill", proxy=table(30, 4)[["age", "dose"]]
    )
    assert own.train(hfl.FedMD(), rounds=1, overrides=QUIET).summary["data"]["n_proxy"] == 30


def test_public_data_frame_may_have_missing_values() -> None:
    public = table(30, 4)[["age", "dose"]]
    public.loc[0, "dose"] = np.nan
    view = hfl.Preprocess(missing="indicate")
    clients = [hfl.Client(name, "mlp", table(60, 1), preprocess=view) for name in "ab"]

    own = hfl.Federation(clients, test=table(40, 3), label="ill", proxy=public)

    assert own.prepare(hfl.FedMD()).data.n_proxy == 30


def test_test_and_public_rows_can_be_held_out_of_the_clients() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(60, i)) for i in (1, 2)]
    run = hfl.Federation(clients, proxy=20).train(hfl.FedMD(), rounds=1, overrides=QUIET)
    assert run.summary["data"]["name"] == "own data" and run.summary["data"]["n_proxy"] == 20


def test_test_set_has_the_columns_of_the_data_set() -> None:
    values = np.arange(80, dtype=float)
    data = pd.DataFrame({"age": values, "dose": -values, "ill": np.arange(80) % 2})
    test = data[["dose", "ill", "age"]].iloc[:20]
    clients = [hfl.Client("a", "mlp"), hfl.Client("b", "mlp")]

    federation = hfl.Federation(clients, data=data, test=test, label="ill")

    examples = federation.prepare(hfl.FedAvg()).data.public_sets["common_test"].copy_rows()
    assert examples.x[3].tolist() == [3.0, -3.0]

"""Settings either change a run or are refused, and advice exists in the caller's interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hetero_fl as hfl
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig, SplitConfig
from hetero_fl.data import from_arrays
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.utils.errors import UserError

X = np.random.default_rng(0).normal(size=(240, 3)).astype(np.float32)
Y = np.arange(240) % 3
FRAME = pd.DataFrame(X, columns=list("abc")).assign(y=Y)
CONFIG = {"clients": {"groups": [{"name": "c", "count": 2, "model": "mlp"}]}}


def own_data(_folder: Path, overrides: list[str]) -> PreparedRun:
    clients = [
        hfl.Client("c1", "mlp", (X[:120], Y[:120])),
        hfl.Client("c2", "mlp", (X[120:], Y[120:])),
    ]
    return hfl.Federation(clients).prepare(hfl.FedAvg(), overrides=overrides)


def own_frames(_folder: Path, overrides: list[str]) -> PreparedRun:
    clients = [hfl.Client("c1", "mlp", FRAME[:120]), hfl.Client("c2", "mlp", FRAME[120:])]
    own = hfl.Federation(clients, label="y", test=FRAME[:60])
    return own.prepare(hfl.FedAvg(), overrides=overrides)


def divided(_folder: Path, overrides: list[str]) -> PreparedRun:
    clients = [hfl.Client("c1", "mlp"), hfl.Client("c2", "mlp")]
    return hfl.Federation(clients, data=(X, Y)).prepare(hfl.FedAvg(), overrides=overrides)


def in_memory(_folder: Path, overrides: list[str]) -> PreparedRun:
    return prepare(CONFIG, overrides, dataset=from_arrays(X, Y))


def table(folder: Path, overrides: list[str]) -> PreparedRun:
    FRAME.to_csv(folder / "t.csv", index=False)
    data = {"name": "table", "path": str(folder / "t.csv"), "label": "y"}
    return prepare({**CONFIG, "data": data}, overrides)


WAYS: dict[str, Callable[[Path, list[str]], PreparedRun]] = {
    "own_data": own_data,
    "own_frames": own_frames,
    "divided": divided,
    "in_memory": in_memory,
    "table": table,
}
VALUES = {
    "path": "OTHER",
    "columns": "{input: a}",
    "label": "a",
    "group": "y",
    "patient": "b",
    "task": "regression",
    "categories": "{y: [0, 1, 2]}",
    "size": "8",
    "range": "1000",
    "stream": "{workers: 1}",
    "follow_links": "true",
    "splits": "pooled",
    "series": "{window: 3}",
    "windows": "{length: 3}",
    "speech": "{rate: 8000}",
    "movies": "{length: 3}",
    "driving": "{height: 8}",
    "text": "{length: 3}",
    "train_limit": "90",
    "test_limit": "9",
    "validation": "0.3",
    "partition.kind": "dirichlet",
    "partition.arguments": "{a: 1}",
    "partition.alpha": "0.1",
    "partition.cap": "2",
    "partition.classes": "3",
    "partition.classes_spread": "1",
    "partition.shots": "5",
    "partition.min_size": "200",
    "partition.rows": "30",
    "partition.spread": "1",
    "proxy.size": "10",
    "proxy.source": "{name: synthetic_table}",
    "proxy.columns": "[a]",
    "proxy.labels": "true",
    "split.validation": "0.3",
    "split.test": "0.1",
}
"""A value of each key of the section `data` that no way to pass data uses by default."""
ENVIRONMENT = {"name", "root"}
"""Keys that choose the source and a folder of this machine."""


def test_values_of_all_keys_are_tested() -> None:
    sections = {"partition": PartitionConfig, "proxy": ProxyConfig, "split": SplitConfig}
    keys = {key for key in DataConfig.model_fields if key not in {*sections, *ENVIRONMENT}}
    keys |= {f"{name}.{key}" for name, cls in sections.items() for key in cls.model_fields}

    assert keys == set(VALUES)


@pytest.mark.parametrize("way", WAYS)
def test_each_key_of_the_data_has_an_effect_or_is_refused(way: str, tmp_path: Path) -> None:
    FRAME.assign(a=0.0).to_csv(tmp_path / "other.csv", index=False)
    before = WAYS[way](tmp_path, []).data.content_hash()
    silent = []
    for key, value in VALUES.items():
        # The minimum applies to rows that are divided, and a file has no links.
        if (way, key) in {("own_frames", "partition.min_size"), ("table", "follow_links")}:
            continue
        override = f"data.{key}={value.replace('OTHER', str(tmp_path / 'other.csv'))}"
        try:
            if WAYS[way](tmp_path, [override]).data.content_hash() == before:
                silent.append(override)
        except UserError as error:
            assert "\n" not in str(error)

    assert silent == []


@pytest.mark.parametrize("way", ["own_data", "own_frames", "divided"])
@pytest.mark.parametrize(
    "override",
    ["clients.count=3", "clients={count: 2}", "data.name=digits", "data={name: synthetic_table}"],
)
def test_objects_of_the_program_are_not_overridden(way: str, override: str) -> None:
    with pytest.raises(UserError, match="cannot be overridden, because the program passes the"):
        WAYS[way](Path(), [override])


def test_proxy_rows_without_divided_rows_are_refused() -> None:
    with pytest.raises(UserError, match="must be 0, because no training rows are divided, got 10"):
        own_frames(Path(), ["data.proxy.size=10"])


def federation_with(**arguments: Any) -> hfl.Federation:
    client = hfl.Client("a", "mlp", FRAME[:120], label="y")
    return hfl.Federation([client, hfl.Client("b", "mlp", (X[120:], Y[120:]))], **arguments)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: hfl.split("digits", 2, label="y"), "split: label"),
        (lambda: hfl.split("digits", 2, patient="p"), "split: patient"),
        (lambda: hfl.split("digits", 2, task="regression"), "split: task"),
        (lambda: hfl.split(from_arrays(X, Y), 2, label="y"), "label: applies"),
        (lambda: hfl.split(from_arrays(X, Y), 2, task="regression"), "split: task"),
        (lambda: hfl.Client("a", "mlp", label="y"), "label: applies"),
        (
            lambda: hfl.Federation([hfl.Client("a", "mlp", from_arrays(X, Y), label="y")]),
            "label: applies",
        ),
        (lambda: federation_with(label="c"), "label: no data frame"),
        (
            lambda: hfl.evaluate(federation_with().train(hfl.Local(), rounds=1), (X, Y), label="y"),
            "label: applies",
        ),
        (
            lambda: hfl.Federation([hfl.Client("a", "mlp", (X, Y), size=2)]).prepare(),
            "size: has no effect",
        ),
        (
            lambda: federation_with(defaults=hfl.ClientSettings(size=2)).prepare(),
            "size: has no effect",
        ),
    ],
)
def test_argument_without_effect_is_refused(make: Callable[[], object], refused: str) -> None:
    with pytest.raises(UserError, match=refused):
        make()


def test_label_of_a_proxy_set_is_used_or_missing_in_one_line() -> None:
    override = ["data.proxy.labels=true"]
    labels = 2 - Y

    found = federation_with(test=(X, Y), proxy=(X, labels)).prepare("fedmd", overrides=override)

    public = found.data.public_sets["proxy"]
    assert public.examples.labels[public.rows].tolist() == labels.tolist()
    with pytest.raises(UserError, match="proxy: has no labels; pass a pair"):
        federation_with(test=(X, Y), proxy=X).prepare("fedmd", overrides=override)


@pytest.mark.parametrize("name", [4, np.int64(4)])
def test_integer_names_of_columns_are_accepted(name: Any) -> None:
    frame = pd.DataFrame(np.c_[X, Y, np.arange(240) // 2]).astype({3: int, 4: int})
    client = hfl.Client("a", "mlp", frame, label=np.int64(3), patient=name)

    own = hfl.Federation([client]).prepare()
    shared = hfl.Federation([hfl.Client("a", "mlp", frame)], label=3, patient=name).prepare()
    parts = hfl.split(frame, 2, label=3, patient=name)

    assert own.data.content_hash() == shared.data.content_hash()
    patients = [set(part.data.train.patient.tolist()) for part in parts]
    assert len(patients[0] | patients[1]) == 120 and not patients[0] & patients[1]


def test_dictionary_of_arrays_is_refused() -> None:
    with pytest.raises(TypeError, match=r"clients: 'a': data: expected a pair \(x, y\).*got dict"):
        hfl.Federation([hfl.Client("a", "mlp", {"x": X, "y": Y})])


def own_settings(**first: Any) -> hfl.Federation:
    """Return a federation whose second client sets more than its first."""
    settings = [first, {"epochs": 2, "optimizer": hfl.SGD(lr=0.1)}]
    return hfl.Federation([hfl.Client(f"c{i}", "mlp", (X, Y), **s) for i, s in enumerate(settings)])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["clients.defaults.model=linear"], "model"),
        (["clients.defaults.model={name: linear, feature_dim: 4}"], "model.name"),
        (["clients.defaults.epochs=7"], "epochs"),
        (["clients.defaults.optimizer.lr=0.5"], "optimizer.lr"),
        (["clients.defaults={batch_size: 8, epochs: 7}"], "epochs"),
        (["clients.defaults.optimizer={weight_decay:0.5,lr:0.5}"], "optimizer.lr"),
        ({"clients": {"defaults": {"optimizer": {"lr": 0.5}}}}, "optimizer.lr"),
        (["clients.defaults.optimizer={name: sgd, momentum: 0.5}"], "optimizer.name"),
    ],
)
def test_default_without_effect_is_refused(overrides: Any, key: str) -> None:
    optimizer = hfl.AdamW(lr=0.1)
    clients = [
        hfl.Client(name, "mlp", (X, Y), epochs=2, optimizer=optimizer) for name in ("a", "b")
    ]
    own = hfl.Federation(clients)

    with pytest.raises(UserError, match=rf"defaults\.{key}: has no effect, because every client"):
        own.prepare(hfl.Local(), overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "settings", "value"),
    [
        ({"clients": {"defaults": {"batch_size": 8}}}, {"epochs": 2}, "batch_size=8"),
        (["clients.defaults={epochs: 7}"], {}, "epochs=7"),
        (["clients.defaults.optimizer={lr: 0.5}"], {"epochs": 2}, "lr=0.5"),
        (
            ["clients.defaults.optimizer={name: sgd, momentum: 0.5}"],
            {"optimizer": hfl.SGD(lr=1)},
            "momentum=0.5",
        ),
    ],
)
def test_default_with_effect_is_used(overrides: Any, settings: Any, value: str) -> None:
    prepared = own_settings(**settings).prepare(hfl.Local(), overrides=overrides)

    assert value in repr(prepared.federation.client_infos.profiles[0].settings)


@pytest.mark.parametrize(
    ("defaults", "key"),
    [
        (hfl.ClientSettings(epochs=3), "epochs"),
        (hfl.ClientSettings(steps=3), "steps"),
        (hfl.ClientSettings(preprocess=hfl.Preprocess(resize=4)), "preprocess.resize"),
    ],
)
def test_default_of_a_federation_without_effect_is_refused(defaults: Any, key: str) -> None:
    preprocess = hfl.Preprocess(resize=8)
    clients = [hfl.Client(n, "mlp", (X, Y), epochs=2, preprocess=preprocess) for n in ("a", "b")]

    with pytest.raises(UserError, match=f"defaults: {key} has no effect, because every client"):
        hfl.Federation(clients, defaults=defaults)


@pytest.mark.parametrize(
    ("make", "advice", "key"),
    [
        (lambda: own_data(Path(), ["algorithm.name=fedmd"]), "proxy", "data.proxy"),
        (
            lambda: hfl.Federation(
                [
                    hfl.Client("a", "mlp", FRAME.assign(b="x")),
                    hfl.Client("b", "mlp", FRAME),
                ],
                label="y",
            ),
            "convert it to one type",
            "data.categories",
        ),
        (
            lambda: hfl.Federation(
                [hfl.Client("a", "mlp"), hfl.Client("b", "mlp")],
                data=(X, Y),
                partition=hfl.Natural(),
            ).prepare(hfl.FedAvg()),
            "from_arrays(..., group=...)",
            "data.group",
        ),
        (lambda: hfl.split((X, Y), 2, hfl.Natural()), "from_arrays(..., group=...)", "data.group"),
        (
            lambda: federation_with().compare(["fedmd"], rounds=1, quiet=True),
            "pass proxy=...",
            "data.proxy",
        ),
        (
            lambda: federation_with(test=(X, Y)).prepare(
                evaluation=hfl.Evaluation(patience=2), overrides=["data.split.validation=0"]
            ),
            "use overrides to set data.validation",
            "pass data",
        ),
        (
            lambda: hfl.Federation(
                [hfl.Client("a", "mlp", {"name": "digits"}), hfl.Client("b", "mlp", (X, Y))]
            ).prepare(),
            "pass test=...",
            "data.name",
        ),
    ],
)
def test_advice_names_arguments_to_callers_that_pass_objects(
    make: Callable[[], object], advice: str, key: str
) -> None:
    with pytest.raises(UserError) as caught:
        make()

    assert advice in str(caught.value) and key not in str(caught.value)


def test_texts_and_blocks_are_pooled_without_a_test_set() -> None:
    datasets = pytest.importorskip("datasets")
    lines = [f"word {row} of {row % 7} or {row % 5}" for row in range(80)]
    text = datasets.Dataset.from_dict({"text": lines, "label": [row % 2 for row in range(80)]})
    blocks = (("left", (2,)), ("right", (1,)))
    joined = replace(from_arrays(X, Y), blocks=blocks)

    texts = hfl.Federation([hfl.Client(name, "text_cnn", text, label="label") for name in "ab"])
    rows = hfl.Federation([hfl.Client(name, "linear", joined) for name in "ab"])

    assert texts.prepare().data.input_shape == (32,)
    assert rows.prepare().federation.data.layout.blocks == joined.blocks

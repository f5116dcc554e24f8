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
    "file": "a",
    "blocks": "{vitals: [a]}",
    "time": "b",
    "span": "5",
    "stream": "true",
    "follow_links": "true",
    "splits": "pooled",
    "series": "{window: 3}",
    "windows": "{length: 3}",
    "speech": "{rate: 8000}",
    "movies": "{length: 3}",
    "driving": "{height: 8}",
    "text": "{length: 3}",
    "arguments": "{a: 1}",
    "train_limit": "90",
    "test_limit": "9",
    "validation": "0.3",
    "partition.kind": "dirichlet",
    "read": "{decimal: ','}",
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


def federation_with(**arguments: Any) -> hfl.Federation:
    client = hfl.Client("a", "mlp", FRAME[:120], label="y")
    return hfl.Federation([client, hfl.Client("b", "mlp", (X[120:], Y[120:]))], **arguments)


def test_argument_without_effect_is_refused() -> None:
    run = federation_with().train(hfl.Local(), rounds=1)

    with pytest.raises(UserError, match="label: applies"):
        hfl.evaluate(run, (X, Y), label="y")


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


def own_settings(**first: Any) -> hfl.Federation:
    """Return a federation whose second client sets more than its first."""
    settings = [first, {"epochs": 2, "optimizer": hfl.SGD(lr=0.1)}]
    return hfl.Federation([hfl.Client(f"c{i}", "mlp", (X, Y), **s) for i, s in enumerate(settings)])


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

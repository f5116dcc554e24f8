"""Federations from objects: classes, columns and settings that parts of the federation share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import hetero_fl as hfl
from tests.support.python_federations import rows


def frame(n: int, sexes: str, label: int = 0) -> pd.DataFrame:
    age = np.random.default_rng(n).normal(size=n)
    sex = [sexes[i % len(sexes)] for i in range(n)]
    return pd.DataFrame({"age": age, "sex": sex, "ill": np.arange(n) % 2 + label})


def labels(prepared: Any, client: str) -> set[int]:
    examples = prepared.data.client_rows[client]["train"].examples
    return set(examples.labels.tolist())


def test_class_numbers_of_frames_and_arrays_are_matched_by_value() -> None:
    numbered = pd.DataFrame(rows(40)[0], columns=list("abcd")).assign(y=np.arange(40) % 2 + 1)

    own = hfl.Federation([hfl.Client("a", "mlp", numbered, label="y")], test=rows(30))

    prepared = own.prepare(hfl.Local())
    assert prepared.federation.task.outputs == 3
    assert labels(prepared, "a") == {1, 2}


def test_clients_of_split_may_have_classes_that_the_test_set_lacks() -> None:
    clients = hfl.split(rows(90, classes=3), 2, model="mlp")

    own = hfl.Federation(clients, test=rows(30, classes=2))

    assert own.prepare(hfl.Local()).federation.task.outputs == 3


def test_text_columns_of_frames_have_the_values_of_all_frames() -> None:
    clients = [hfl.Client("a", "mlp", frame(40, "fm")), hfl.Client("b", "mlp", frame(44, "m"))]
    proxy = frame(20, "fx").drop(columns="ill")

    sets: dict[str, Any] = {"test": frame(30, "f"), "proxy": proxy}
    prepared = hfl.Federation(clients, **sets, label="ill", num_classes=5).prepare(hfl.FedMD())

    data = prepared.data
    assert prepared.federation.task.outputs == 5
    assert data.layout.columns == ("age", "sex=f", "sex=m", "sex=x")
    assert data.public_sets["proxy"].copy_rows().x[1].tolist()[1:] == [0.0, 0.0, 1.0]


def test_named_data_is_divided_when_the_test_set_is_an_object() -> None:
    test = (np.zeros((40, 8, 8), dtype=np.uint8), np.arange(40) % 10)
    clients = [hfl.Client("a", "mlp"), hfl.Client("b", "mlp")]

    data = hfl.Federation(clients, data="digits", test=test).prepare(hfl.Local()).data

    assert data.n_train > 900
    assert data.n_test == 40

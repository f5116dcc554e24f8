"""Task and classes that `from_arrays` infers from labels, and messages for ambiguous labels."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, federate, from_arrays
from tests.support.mistakes import check_refused

X = np.random.default_rng(0).normal(size=(12, 3))
ONE_TO_THREE = np.array([1, 2, 3] * 4)


def made_with_warning(message: str, y: Any, **settings: Any) -> Dataset:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = from_arrays(X, y, **settings)
    assert re.search(message, str(caught[0].message)) and caught[0].category is UserWarning
    assert all("\n" not in str(w.message) and w.filename == __file__ for w in caught)
    assert [str(w.message) for w in caught] == list(dataset.notes)
    return dataset


def targets(dataset: Dataset) -> list[Any]:
    assert dataset.train.y is not None
    return dataset.train.y.tolist()


def test_from_arrays_reads_labels_as_classes_with_a_warning(subtests: pytest.Subtests) -> None:
    one_hot = np.eye(3)[ONE_TO_THREE - 1]
    one_hot_words = "every row has exactly one 1, read as 3 classes; pass task='multilabel'"
    advice = "; pass task='regression' for regression targets"
    minus = f"y: read as 2 classes: -1 as class 0, 1 as class 1{advice}$"
    five = (-2, -1, 0, 1, 2)
    cases: list[tuple[Any, str, tuple[int, ...]]] = [
        (
            ONE_TO_THREE,
            "arrays: y: read as 3 classes: 1 as class 0, 2 as class 1, 3 .* 2",
            (1, 2, 3),
        ),
        (ONE_TO_THREE, r"; pass num_classes=4 .* task='regression'", (1, 2, 3)),
        (ONE_TO_THREE * 2.0, "read as 3 classes: 2 as class 0", (2, 4, 6)),
        (np.arange(12) + 10, "10 as class 0, .* 17 as class 7 and 4 more", tuple(range(10, 22))),
        (np.resize([-1.0, 1.0], len(X)), f"read as 2 classes: .*{advice}", (-1, 1)),
        (np.resize(np.array(five) * 1.0, len(X)), f"read as 5 classes: .*{advice}", five),
        (np.where(ONE_TO_THREE > 1, 1, -1), minus, (-1, 1)),
        (torch.tensor([-1, 1, 1] * 4), minus, (-1, 1)),
        (torch.tensor(ONE_TO_THREE - 1.0), "3 distinct integers, as floats, read as cl", ()),
        (one_hot.astype(np.int64), one_hot_words, ()),
        (one_hot.astype(np.uint8), one_hot_words, ()),
        (one_hot.astype(np.float32), one_hot_words, ()),
        (one_hot.astype(bool), one_hot_words, ()),
    ]
    for y, message, numbers in cases:
        with subtests.test(y=y[:3], message=message):
            dataset = made_with_warning(message, y)

            given = y.argmax(1) if y.ndim == 2 else y
            assert dataset.task.kind == "multiclass"
            assert dataset.task.numbers == numbers
            assert dataset.task.names == tuple(map(str, numbers))
            assert [(numbers or range(3))[number] for number in targets(dataset)] == list(given)
    asked = made_with_warning("-1 as class 0", np.resize([-1.0, 1.0], len(X)), task="multiclass")
    assert asked.task.names == ("-1", "1")


def test_from_arrays_maps_gaps_over_all_splits() -> None:
    y = np.array([0, 2] * 6)

    dataset = made_with_warning("0 as class 0, 2 as class 1, 5 as class 2", y, test=(X[:1], [5]))

    assert dataset.task.names == ("0", "2", "5")
    assert dataset.test is not None and dataset.test.labels.tolist() == [2]


@pytest.mark.parametrize(
    ("y", "settings", "task"),
    [
        (ONE_TO_THREE, {"num_classes": 4}, Task("multiclass", 4)),
        (ONE_TO_THREE, {"task": Task("multiclass", 4)}, Task("multiclass", 4)),
        (ONE_TO_THREE, {"task": "regression"}, Task("regression", 1)),
        (ONE_TO_THREE - 1, {}, Task("multiclass", 3)),
        (ONE_TO_THREE - 1, {"num_classes": 5}, Task("multiclass", 5)),
        (ONE_TO_THREE > 1, {}, Task("multiclass", 2)),
        (np.eye(3)[ONE_TO_THREE - 1], {"task": "multilabel"}, Task("multilabel", 3)),
        (np.eye(3)[ONE_TO_THREE - 1], {"task": "multiclass"}, Task("multiclass", 3)),
        (1 - np.eye(3)[ONE_TO_THREE - 1], {}, Task("multilabel", 3)),
        (ONE_TO_THREE - 1.0, {"task": "multiclass"}, Task("multiclass", 3)),
        (ONE_TO_THREE - 1.0, {"num_classes": 3}, Task("multiclass", 3)),
        (ONE_TO_THREE - 1.0, {"task": "regression"}, Task("regression", 1)),
        (ONE_TO_THREE - 1.0, {"unit": np.ones(12)}, Task("regression", 1)),
        (ONE_TO_THREE - 0.5, {}, Task("regression", 1)),
        (np.arange(12.0), {}, Task("regression", 1)),
        (np.zeros(12), {}, Task("regression", 1)),
    ],
)
def test_from_arrays_does_not_warn_if_unambiguous(
    y: Any, settings: dict[str, Any], task: Task
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = from_arrays(X, y, **settings)

    assert dataset.task == task and dataset.notes == ()


@pytest.mark.parametrize(
    ("y", "kind", "other"),
    [
        (np.arange(90) % 30, "multiclass", "regression"),
        (np.arange(90) % 30 + 1, "multiclass", "regression"),
        (np.arange(90) % 30 - 10, "regression", "multiclass"),
        (np.arange(90), "regression", "multiclass"),
    ],
)
def test_from_arrays_warns_about_many_integers(y: np.ndarray, kind: str, other: str) -> None:
    with pytest.warns(UserWarning, match=f"read as .* pass task='{other}'"):
        dataset = from_arrays(np.zeros((90, 2)), y)

    assert dataset.task.kind == kind


def test_from_arrays_names_classes_after_text(subtests: pytest.Subtests) -> None:
    letters = ["b", "a", "a"] * 4
    column = np.array(letters, dtype=object)[:, None]
    for y in (np.array(letters), letters, column, pd.Series(letters)):
        with subtests.test(kind=type(y)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                dataset = from_arrays(X, y, test=(X[:2], ["c", "a"]))

            assert dataset.task == Task("multiclass", 3, ("a", "b", "c"))
            assert targets(dataset) == [1, 0, 0] * 4
            assert dataset.test is not None
            assert dataset.test.labels.tolist() == [2, 0]
    given = from_arrays(X, letters, task=Task("multiclass", 3, ("b", "c", "a")))
    assert targets(given) == [0, 2, 2] * 4


def test_from_arrays_reads_named_or_single_channels_as_series() -> None:
    x = np.random.default_rng(0).random((12, 8, 8))

    assert from_arrays(x, ONE_TO_THREE - 1, columns=tuple("abcdefgh")).train.x.shape == (12, 8, 8)
    assert from_arrays(x[:, :, :1], ONE_TO_THREE - 1).train.x.shape == (12, 8, 1)
    assert from_arrays(x[:, None], ONE_TO_THREE - 1).train.x.shape == (12, 1, 8, 8)


def test_run_keeps_class_names(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="1 as class 0"):
        data = from_arrays(x, np.array([1, 2, 3] * 40))

    run = hetero_fl.run(
        {
            "rounds": 1,
            "clients": {"groups": [{"name": "a", "model": "tabular"}]},
            "algorithm": {"name": "local"},
            "output": {"plots": False, "report": False},
        },
        dataset=data,
        out=tmp_path / "run",
        quiet=True,
    )

    assert run.models["a"].task.names == ("1", "2", "3")
    assert "1 as class 0" in (tmp_path / "run" / "log.txt").read_text()
    known = np.array([1, 2] * 20)
    np.savez(tmp_path / "new.npz", train_images=x[:40], train_labels=known + 1)
    expected = float((run.predict("a", x[:40], personal=False).argmax(1).numpy() == known).mean())
    assert hetero_fl.evaluate(run, str(tmp_path / "new.npz"))["a"]["accuracy"] == pytest.approx(
        expected
    )
    np.savez(tmp_path / "new.npz", train_images=x[:40], train_labels=known - 1)
    check_refused(
        "'0' is unknown to the models; choose from 1, 2, 3",
        hetero_fl.evaluate,
        run,
        str(tmp_path / "new.npz"),
    )


def test_client_labels_are_mapped_by_class_name(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="1 as class 0"):
        common = from_arrays(x, np.array([1, 2, 3] * 20))
    np.savez(tmp_path / "own.npz", train_images=x, train_labels=np.array([1, 2] * 30))
    own = ClientSettings(data=SourceConfig(name="npz", path=str(tmp_path / "own.npz")))

    data = federate(common, DataConfig(), {"own": own, "other": ClientSettings()}, 0)

    assert data.label_counts("own")[2] == 0 and (data.label_counts("own")[:2] > 10).all()

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
from hetero_fl.utils.errors import UserError

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


def test_from_arrays_maps_labels_that_do_not_start_at_zero() -> None:
    dataset = made_with_warning(
        (
            r"arrays: y: read as 3 classes: 1 as class 0, 2 as class 1, 3 as "
            r"class 2; pass num_classes=4 .* task='regression'"
        ),
        ONE_TO_THREE,
    )

    assert dataset.task == Task("multiclass", 3, ("1", "2", "3"))
    assert targets(dataset) == [0, 1, 2] * 4


def test_from_arrays_maps_gaps_over_all_splits() -> None:
    y = np.array([0, 2] * 6)

    dataset = made_with_warning("0 as class 0, 2 as class 1, 5 as class 2", y, test=(X[:1], [5]))

    assert dataset.task.names == ("0", "2", "5")
    assert (
        dataset.test is not None and dataset.test.y is not None and dataset.test.y.tolist() == [2]
    )


def test_from_arrays_lists_the_first_classes_of_many() -> None:
    made_with_warning(
        r"10 as class 0, .* 17 as class 7 and 4 more; pass num_classes=22", np.arange(12) + 10
    )


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


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, bool])
def test_from_arrays_reads_one_hot_rows_as_classes(dtype: type) -> None:
    rows = np.eye(3)[ONE_TO_THREE - 1].astype(dtype)

    dataset = made_with_warning(
        "every row has exactly one 1, read as 3 classes; pass task='multilabel'", rows
    )

    assert dataset.task == Task("multiclass", 3)
    assert targets(dataset) == [0, 1, 2] * 4


def test_from_arrays_reads_few_integral_floats_as_classes() -> None:
    dataset = made_with_warning(
        "3 distinct integers, as floats, read as classes; pass task='regression'",
        torch.tensor(ONE_TO_THREE - 1.0),
    )

    assert dataset.task == Task("multiclass", 3) and targets(dataset) == [0, 1, 2] * 4


@pytest.mark.parametrize("labels", [(-1.0, 1.0), (-2.0, -1.0, 0.0, 1.0, 2.0)])
def test_from_arrays_reads_negative_floats_as_classes(labels: tuple[float, ...]) -> None:
    y = np.resize(labels, len(X))

    message = f"read as {len(labels)} classes: .*; pass task='regression' for regression targets"
    dataset = made_with_warning(message, y)

    assert dataset.task.names == tuple(f"{label:g}" for label in labels)
    assert [labels[number] for number in targets(dataset)] == list(y)


def test_from_arrays_maps_float_labels() -> None:
    dataset = made_with_warning("read as 3 classes: 2 as class 0", ONE_TO_THREE * 2.0)

    assert dataset.task.names == ("2", "4", "6")


@pytest.mark.parametrize(
    ("y", "settings", "message"),
    [
        (
            [0, 1, -1] * 4,
            {"num_classes": 2},
            "y: row 2: label -1 is out of range 0 to 1",
        ),
        (ONE_TO_THREE, {"num_classes": 3}, "row 2: label 3 is out of range 0 to 2"),
        (
            ONE_TO_THREE,
            {"task": "clasification"},
            "task: unknown task 'clasification'; did you mean|choose from",
        ),
        (
            ONE_TO_THREE,
            {"num_classes": 4, "task": "regression"},
            "num_classes: cannot be combined with task='regression', got 4",
        ),
        (ONE_TO_THREE, {"num_classes": 1}, "num_classes: must be >= 2, got 1"),
        (ONE_TO_THREE - 0.5, {"task": "multiclass"}, "row 0: expected a class number, got 0.5"),
        (
            np.ones((12, 3)),
            {"task": "multiclass"},
            "a multiclass task needs one column of labels or one-hot rows, got 3 columns",
        ),
        (np.full((12, 2), 0.5), {"task": "multilabel"}, "multilabel targets must be 0 or 1"),
    ],
)
def test_from_arrays_refuses_labels_that_contradict_the_task(
    y: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_arrays(X, y, **settings)


@pytest.mark.parametrize("y", [np.where(ONE_TO_THREE > 1, 1, -1), torch.tensor([-1, 1, 1] * 4)])
def test_from_arrays_names_classes_after_negative_integers(y: Any) -> None:
    message = (
        r"y: read as 2 classes: -1 as class 0, 1 as class 1; pass "
        r"task='regression' for regression targets$"
    )

    dataset = made_with_warning(message, y)

    assert dataset.task == Task("multiclass", 2, ("-1", "1"))
    assert dataset.task.numbers == (-1, 1)
    assert targets(dataset) == [0, 1, 1] * 4


def test_from_arrays_reads_negative_floats_as_classes_on_request() -> None:
    dataset = made_with_warning("-1 as class 0", np.resize([-1.0, 1.0], len(X)), task="multiclass")

    assert dataset.task.names == ("-1", "1")


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


@pytest.mark.parametrize(
    "y",
    [
        np.array(["b", "a", "a"] * 4),
        ["b", "a", "a"] * 4,
        np.array([["b"], ["a"], ["a"]] * 4, dtype=object),
        pd.Series(["b", "a", "a"] * 4),
    ],
)
def test_from_arrays_names_classes_after_text(y: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = from_arrays(X, y, test=(X[:2], ["c", "a"]))

    assert dataset.task == Task("multiclass", 3, ("a", "b", "c"))
    assert targets(dataset) == [1, 0, 0] * 4
    assert (
        dataset.test is not None
        and dataset.test.y is not None
        and dataset.test.y.tolist() == [2, 0]
    )


def test_from_arrays_numbers_text_labels_as_the_task_does() -> None:
    dataset = from_arrays(X, ["b", "a", "a"] * 4, task=Task("multiclass", 3, ("b", "c", "a")))

    assert targets(dataset) == [0, 2, 2] * 4


@pytest.mark.parametrize(
    ("y", "settings", "message"),
    [
        (["a", "b", None] * 4, {}, "train: y: row 2: expected text as in other rows, got None"),
        (
            [["a", "b"]] * 12,
            {},
            r"train: y: expected text labels of shape \(12,\), got shape \(12, 2\)",
        ),
        (
            ["a", "b"] * 6,
            {"task": "regression"},
            "task: must be 'multiclass' for text labels, got 'regression'",
        ),
        (
            ["a", "b"] * 6,
            {"num_classes": 3},
            "num_classes: must be 2, the number of distinct text labels, got 3",
        ),
        (
            ["a", "b"] * 6,
            {"test": (X[:2], [0, 1])},
            "test: y: expected text as in arrays: train: y, got numbers",
        ),
        (
            ["ill", "il"] * 6,
            {"task": Task("multiclass", 2, ("ill", "well"))},
            "row 1: unknown class 'il'; did you mean 'ill'?",
        ),
        (
            ["a", "b"] * 6,
            {"task": Task("multiclass", 2)},
            "text labels need a multiclass task with class names",
        ),
    ],
)
def test_from_arrays_refuses_text_labels_that_do_not_fit(
    y: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_arrays(X, y, **settings)


@pytest.mark.parametrize("scale", [1 / 16, 1, 255 / 16, -1])
def test_from_arrays_refuses_floats_that_could_be_images_or_series(scale: float) -> None:
    from sklearn.datasets import load_digits

    x = load_digits().images[:12] * scale

    with pytest.raises(
        UserError,
        match=(
            r"shape \(12, 8, 8\) may be images or series; for "
            r"images pass x\[:, None\], for series of 8 steps pass "
            r"hetero_fl.data.from_arrays\(..., columns=...\) with 8 names of channels"
        ),
    ):
        from_arrays(x, ONE_TO_THREE - 1)
    with pytest.raises(UserError, match=r"columns: expected 8 names .* got 3"):
        from_arrays(x, ONE_TO_THREE - 1, columns=("a", "b", "c"))


def test_from_arrays_reads_named_or_single_channels_as_series() -> None:
    x = np.random.default_rng(0).random((12, 8, 8))

    assert from_arrays(x, ONE_TO_THREE - 1, columns=tuple("abcdefgh")).train.x.shape == (12, 8, 8)
    assert from_arrays(x[:, :, :1], ONE_TO_THREE - 1).train.x.shape == (12, 8, 1)
    assert from_arrays(x[:, None], ONE_TO_THREE - 1).train.x.shape == (12, 1, 8, 8)


def test_from_arrays_error_explains_tables() -> None:
    for dtype in (np.int64, np.uint8):
        with pytest.raises(UserError, match=r'for a table pass x\.astype\("float32"\)'):
            from_arrays(np.arange(36).reshape(12, 3).astype(dtype), ONE_TO_THREE - 1)
    frame = pd.DataFrame({"age": range(12), "ward": ["A", "B"] * 6})
    with pytest.raises(
        UserError,
        match=r"save the data frame to a file",
    ):
        from_arrays(frame, ONE_TO_THREE - 1)


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
    with pytest.raises(UserError, match="'0' is unknown to the models; choose from 1, 2, 3"):
        hetero_fl.evaluate(run, str(tmp_path / "new.npz"))


def test_client_labels_are_mapped_by_class_name(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="1 as class 0"):
        common = from_arrays(x, np.array([1, 2, 3] * 20))
    np.savez(tmp_path / "own.npz", train_images=x, train_labels=np.array([1, 2] * 30))
    own = ClientSettings(data=SourceConfig(name="npz", path=str(tmp_path / "own.npz")))

    data = federate(common, DataConfig(), {"own": own, "other": ClientSettings()}, 0)

    assert data.label_counts("own")[2] == 0 and (data.label_counts("own")[:2] > 10).all()

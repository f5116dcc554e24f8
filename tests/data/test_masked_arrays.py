"""Masked arrays and null values of pandas and pyarrow: missing values, as NaN is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.data import Vocabulary, from_arrays
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.utils.errors import UserError
from tests.support.python_federations import QUIET

X = np.random.default_rng(0).normal(size=(40, 3))
Y = np.arange(40) % 2
MASK = np.zeros((40, 3), dtype=bool)
MASK[3, 1] = MASK[7, 2] = True
MASKED = np.ma.masked_array(np.where(MASK, -999.0, X), mask=MASK)
NAN = np.where(MASK, np.nan, X)
INTEGERS = np.rint(100 * X).astype(int)
FIRST = np.arange(40) == 0
WORDS = Vocabulary(tuple("abcd"))
TOKENS = np.arange(120).reshape(40, 3) % 6
IMAGES = np.arange(40 * 64, dtype=np.uint16).reshape(40, 8, 8)
IMAGES[2, 0, 0] = 3999


class Items(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set whose items are masked arrays."""

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return MASKED[row], int(Y[row])


def inputs(data: Any) -> torch.Tensor:
    view = hfl.Preprocess(missing="indicate")
    client = hfl.Client("a", "mlp", data, preprocess=view)
    found = hfl.Federation([client], test=(X[::2], Y[::2])).prepare("local").data
    rows = found.client_rows["a"]["train"]
    return found.preprocess("a")(rows.examples.x)


@pytest.mark.parametrize(
    "x",
    [
        MASKED,
        list(MASKED),
        MASKED.astype(np.float32),
        np.where(MASK, None, X),
        np.where(MASK, pd.NA, X.astype(object)),
    ],
    ids=["masked", "rows", "float32", "None", "NA"],
)
def test_missing_entries_train_as_nan(x: Any) -> None:
    assert torch.equal(inputs((x, Y)), inputs((NAN, Y)))
    assert torch.equal(inputs(Items()), inputs((NAN, Y)))
    with pytest.raises(UserError, match=r"row 3 has no value"):
        hfl.Federation([hfl.Client("a", "mlp", (x, Y))], test=(X, Y)).prepare("local")


def test_masked_integers_become_nan() -> None:
    masked = from_arrays(np.ma.masked_array(INTEGERS, mask=MASK), Y).train.x

    assert torch.equal(masked.isnan(), torch.from_numpy(MASK))
    assert torch.equal(masked.nan_to_num(), torch.from_numpy(INTEGERS * ~MASK).float())


def test_null_values_of_frames_equal_nan() -> None:
    plain = pd.DataFrame(NAN, columns=list("abc")).assign(y=Y)

    def values(frame: pd.DataFrame) -> torch.Tensor:
        client = hfl.Client("a", "mlp", frame, preprocess=hfl.Preprocess(missing="indicate"))
        test = plain.dropna()
        data = hfl.Federation([client], label="y", test=test).prepare("local").data
        return data.preprocess("a")(data.client_rows["a"]["train"].examples.x)

    for dtype in ("Float64", "double[pyarrow]"):
        assert torch.equal(values(plain.astype(dict.fromkeys("abc", dtype))), values(plain))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"y": np.ma.masked_array(Y, mask=FIRST)}, "y: row 0: NaN or infinite value"),
        ({"y": pd.array([None, *Y[1:]], dtype="Int64")}, "y: row 0: NaN or infinite value"),
        ({"y": np.ma.masked_array(X[:, 0], mask=FIRST)}, "y: row 0: NaN or infinite value"),
        ({"y": np.ma.masked_array(Y.astype(str), mask=FIRST)}, "y: row 0: expected text"),
        ({"y": pd.array([pd.NA, *Y[1:].astype(str)])}, "y: row 0: expected text"),
        ({"group": np.ma.masked_array(Y, mask=FIRST)}, "group: row 0: missing value"),
        ({"group": [None, *Y[1:]]}, "group: row 0: missing value"),
        ({"group": pd.Series([pd.NA, *Y[1:].astype(str)])}, "group: row 0: missing value"),
        ({"patient": np.where(FIRST, np.nan, Y)}, "patient: row 0: missing value"),
        ({"patient": np.ma.masked_array(Y, mask=FIRST)}, "patient: row 0: missing value"),
        (
            {"patient": np.ma.masked_array(Y[:, None], mask=FIRST[:, None])},
            "patient: row 0: missing value",
        ),
        ({"group": Y[:5]}, "group: expected shape \\(40,\\), one entry per row"),
        (
            {"time": np.where(FIRST, np.datetime64("NaT"), np.datetime64("2024-01-01"))},
            "time: row 0: missing value",
        ),
        ({"time": np.ma.masked_array(Y, mask=FIRST)}, "time: row 0: missing value"),
        (
            {"time": np.ma.masked_array(Y.astype("datetime64[D]"), mask=FIRST)},
            "time: row 0: missing value",
        ),
        (
            {"x": np.ma.masked_array(TOKENS, mask=MASK), "vocabulary": WORDS},
            "x: expected integers; row 3 has no value",
        ),
        (
            {"x": np.ma.masked_array(IMAGES, mask=IMAGES == 3999)},
            "x: row 2: pixels are missing, as in a masked array of integers; fill them",
        ),
        (
            {"x": np.ma.masked_array(IMAGES[:, None], mask=IMAGES[:, None] == 3999)},
            "x: row 2: pixels are missing, as in a masked array of integers; fill them",
        ),
        ({"x": TOKENS / 2, "vocabulary": WORDS}, "x: expected integers; got float64"),
        ({"x": TOKENS[:, 0] / 2, "vocabulary": WORDS}, "x: expected integers; got float64"),
    ],
)
def test_missing_labels_groups_and_patients_are_one_line(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        from_arrays(**{"x": X, "y": Y, **arguments})

    assert "\n" not in str(refused.value)


def test_prediction_treats_masked_entries_as_nan() -> None:
    client = hfl.Client("a", "mlp", (NAN, Y), preprocess=hfl.Preprocess(missing="indicate"))
    run = hfl.Federation([client], test=(X, Y)).train("local", rounds=1, overrides=QUIET)

    assert np.array_equal(run.predict("a", MASKED), run.predict("a", NAN))


def test_prediction_refuses_masked_tokens() -> None:
    client = hfl.Client("a", "text_cnn", from_arrays(TOKENS, Y, vocabulary=WORDS))
    run = hfl.Federation([client]).train("local", rounds=1, overrides=QUIET)

    with pytest.raises(UserError, match="expected integers"):
        run.predict("a", np.ma.masked_array(TOKENS, mask=MASK))


@pytest.mark.parametrize("part", ["x", "y", "group", "patient"])
def test_lists_of_tensors_with_gradients_are_read_as_arrays(part: str) -> None:
    given = {"x": X, "y": X[:, 0], "group": Y.astype(float), "patient": np.arange(40.0) // 2}
    tensors = [torch.tensor(value, requires_grad=True) for value in given[part]]

    found = from_arrays(**{**given, part: tensors}).train
    expected = from_arrays(**given).train

    assert torch.equal(found.x, expected.x) and torch.equal(found.labels, expected.labels)
    assert found.group_names == expected.group_names == ("0", "1")
    assert found.patient_names == expected.patient_names


def test_items_with_gradients_are_read_as_arrays() -> None:
    class Tensors(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(Y)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.tensor(X[row], requires_grad=True)
            return x, x[0]

    found = to_dataset(Tensors(), "data").train

    assert torch.equal(found.x, torch.from_numpy(X).float())
    assert torch.equal(found.labels[:, 0], torch.from_numpy(X[:, 0]).float())


def test_groups_and_patients_may_be_columns() -> None:
    column = (Y + 0.0)[:, None]

    found = from_arrays(X, Y, group=column, patient=column).train

    assert found.group_names == found.patient_names == ("0", "1")
    assert found.group is not None and found.group.tolist() == Y.tolist()

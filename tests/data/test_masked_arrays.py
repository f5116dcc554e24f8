"""Masked arrays and null values of pandas and pyarrow: missing values, as NaN is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

import hetero_fl as hfl
from hetero_fl.data import Vocabulary, from_arrays
from hetero_fl.data.sources.objects import to_dataset
from tests.support.cases import each_case
from tests.support.mistakes import check_refused
from tests.support.python_federations import QUIET

X = np.random.default_rng(0).normal(size=(40, 3))
Y = np.arange(40) % 2
MASK = np.zeros((40, 3), dtype=bool)
MASK[3, 1] = MASK[7, 2] = True
MASKED = np.ma.masked_array(np.where(MASK, -999.0, X), mask=MASK)
NAN = np.where(MASK, np.nan, X)
INTEGERS = np.rint(100 * X).astype(int)
WORDS = Vocabulary(tuple("abcd"))
TOKENS = np.arange(120).reshape(40, 3) % 6


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


@each_case(
    "x",
    (
        MASKED,
        list(MASKED),
        MASKED.astype(np.float32),
        np.where(MASK, None, X),
        np.where(MASK, pd.NA, X.astype(object)),
    ),
)
def test_missing_entries_train_as_nan(x: Any) -> None:
    assert torch.equal(inputs((x, Y)), inputs((NAN, Y)))
    assert torch.equal(inputs(Items()), inputs((NAN, Y)))
    check_refused(
        r"row 3 has no value",
        lambda: hfl.Federation([hfl.Client("a", "mlp", (x, Y))], test=(X, Y)).prepare("local"),
    )


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


def test_prediction_treats_masked_entries_as_missing() -> None:
    client = hfl.Client("a", "mlp", (NAN, Y), preprocess=hfl.Preprocess(missing="indicate"))
    run = hfl.Federation([client], test=(X, Y)).train("local", rounds=1, overrides=QUIET)
    words = hfl.Client("a", "text_cnn", from_arrays(TOKENS, Y, vocabulary=WORDS))
    of_words = hfl.Federation([words]).train("local", rounds=1, overrides=QUIET)

    assert np.array_equal(run.predict("a", MASKED), run.predict("a", NAN))
    check_refused("expected integers", of_words.predict, "a", np.ma.masked_array(TOKENS, mask=MASK))


@each_case("part", ("x", "y", "group", "patient"))
def test_lists_of_tensors_with_gradients_are_read_as_arrays(part: str) -> None:
    given = {
        "x": X,
        "y": X[:, 0],
        "group": Y.astype(float),
        "patient": np.arange(40.0) // 2,
    }
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

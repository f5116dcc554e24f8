"""Labels of all sources and arrays: one rule for classes, one for the kind of task."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, federate, from_arrays, load_source
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import check_refused
from tests.support.python_federations import QUIET

ROWS = 60
X = np.random.default_rng(0).random((ROWS, 3), dtype=np.float32)
FRAME = pd.DataFrame(X, columns=list("abc"))


def load(folder: Path, name: str, path: str, **settings: Any) -> Dataset:
    return load_source(SourceConfig(name=name, path=str(folder / path), **settings), folder)


def read_npz(folder: Path, y: np.ndarray, **settings: Any) -> Dataset:
    np.savez(folder / "d.npz", train_images=X, train_labels=y)
    return load(folder, "npz", "d.npz", **settings)


def read_csv(folder: Path, y: np.ndarray, **settings: Any) -> Dataset:
    labels = pd.DataFrame(y.reshape(len(y), -1)).add_prefix("y")
    pd.concat([FRAME, labels], axis=1).to_csv(folder / "d.csv", index=False)
    return load(folder, "table", "d.csv", label=",".join(labels.columns), **settings)


def test_ambiguous_kind_is_a_caution_that_names_the_key(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    n = np.arange(ROWS)
    cases: list[tuple[np.ndarray, str, str]] = [
        (n % 3 + 1, "multiclass", "regression"),
        (n % 5 + 1.0, "multiclass", "regression"),
        (n % 2 * 1.0, "multiclass", "regression"),
        (n % 3 - 1, "multiclass", "regression"),
        (n * 3, "regression", "multiclass"),
        (np.stack([n % 3 - 1] * 3, 1), "regression", "regression"),
        (np.eye(3, dtype=int)[n % 3], "multiclass", "multilabel"),
    ]
    for read, (y, kind, other) in itertools.product((read_npz, read_csv), cases):
        with subtests.test(read=read, y=y[:3], kind=kind):
            dataset = read(tmp_path, y)
            given = read(tmp_path, y, task=kind)

            assert dataset.task.kind == kind
            assert any(f"set data.task={other}" in note for note in cautions(dataset.notes))
            assert given.task == dataset.task
            assert not cautions(given.notes)


def test_labels_with_one_reading_have_no_caution(tmp_path: Path) -> None:
    n = np.arange(ROWS)
    for y in (n % 3, n / 7, np.resize([-1, 1], ROWS), np.resize(["a", "b"], ROWS)):
        assert not cautions(to_dataset((X, y), "data").notes)
        assert not cautions(read_csv(tmp_path, y).notes)


def clients(*labels: Any) -> list[hfl.Client]:
    return [hfl.Client(f"c{i}", "mlp", (X + i, y)) for i, y in enumerate(labels)]


def cautions(notes: Iterable[str]) -> list[str]:
    return [note for note in notes if isinstance(note, Caution)]


def cautions_of(own: hfl.Federation) -> list[str]:
    return cautions(own.prepare(hfl.Local()).notes)


def names_of(own: hfl.Federation) -> tuple[str, ...]:
    return own.prepare(hfl.Local()).federation.task.output_names


def test_federation_has_the_labels_of_all_clients() -> None:
    first = np.resize([1, 2], ROWS)
    second = np.resize([3, 2], ROWS)

    own = hfl.Federation(clients(first, second), test=(X, np.resize([1, 3], ROWS)))

    prepared = own.prepare(hfl.Local())
    assert prepared.federation.task.names == ("1", "2", "3")
    counts = [prepared.data.label_counts(client) > 0 for client in ("c0", "c1")]
    assert [count.tolist() for count in counts] == [[True, True, False], [False, True, True]]


def test_federation_task_and_num_classes_replace_the_guess() -> None:
    ratings = np.resize([1.0, 2, 3, 4, 5], ROWS)

    guessed = hfl.Federation(clients(ratings, ratings))

    assert any("pass task='regression'" in note for note in cautions_of(guessed))
    given = hfl.Federation(clients(ratings, ratings), task="regression")
    assert given.prepare(hfl.Local()).federation.task == Task("regression", 1)
    assert not cautions_of(given)
    named = Task("multiclass", 3, ("ill", "unknown", "well"))
    text = np.resize(["well", "ill"], ROWS)
    assert names_of(hfl.Federation(clients(text, text), task=named)) == named.names
    numbers = np.resize([0, 2], ROWS)
    assert names_of(hfl.Federation(clients(numbers, numbers), num_classes=4)) == tuple("0123")
    gap = hfl.Federation(clients(numbers, numbers))
    assert names_of(gap) == ("0", "2")
    advice = "0 as class 0, 2 as class 1; pass num_classes=3"
    assert any(advice in note for note in cautions_of(gap))


@each_case("kind", ("regression", "multilabel"))
def test_task_of_several_columns_keeps_names_unit_and_outputs(kind: str) -> None:
    y = np.random.default_rng(0).integers(0, 2, (ROWS, 2))
    x = np.random.default_rng(1).random((ROWS, 3), dtype=np.float32)
    named = Task(kind, 2, ("upper", "lower"), unit="mmHg")
    frame = pd.DataFrame({"x": x[:, 0], "lower": y[:, 0], "upper": y[:, 1]})

    def read(data: Any, task: Task, label: str | None = None) -> hfl.Federation:
        return hfl.Federation([hfl.Client("a", "mlp", data, label=label)], task=task)

    for federation in (read((x, y), named), read(frame, named, "lower, upper")):
        assert federation.prepare(hfl.Local()).federation.task == named
    (part,) = hfl.split(frame, 1, label="lower, upper", task=named)
    assert part.data.task == named
    assert np.array_equal(part.data.train.y.numpy(), y[:, ::-1])
    unnamed = read(frame, Task(kind, 2), "lower, upper").prepare(hfl.Local()).federation.task
    assert unnamed.names == ("lower", "upper")


def test_similar_names_are_a_caution() -> None:
    for name, other in (
        ("yes", "Yes"),
        ("caf\u00e9", "cafe\u0301"),
        ("day in", "day\u00a0 in"),
        ("yes", "\ufeffye\u200bs"),
    ):
        first, second = (np.resize([each, "no"], ROWS) for each in (name, other))
        found = cautions_of(hfl.Federation(clients(first, second)))
        assert any("differ only in case, white space or Unicode form" in note for note in found)


def test_classes_without_training_rows_are_a_caution(subtests: pytest.Subtests) -> None:
    cases: list[tuple[list[Any], list[Any], str]] = [
        (["sick", "well"], ["krank", "well"], "'krank'"),
        ([0, 1], [1, 2], "'2'"),
    ]
    for train, test, unseen in cases:
        y = np.resize(train, ROWS)
        other = np.resize(test, ROWS)
        client = hfl.Client("a", "mlp", (X, y))
        with_test = hfl.Client("a", "mlp", (X, y), test=(X + 2, other))
        whole = from_arrays(X, y, test=(X + 1, other))
        same = (X + 1, y)
        for way, federation in {
            "test": hfl.Federation([client], test=(X + 1, other)),
            "own test": hfl.Federation([with_test], test=same),
            "divided": hfl.Federation([hfl.Client("a", "mlp")], data=whole),
            "validation": hfl.Federation([client], test=same, validation=(X + 3, other)),
        }.items():
            with subtests.test(way=way, unseen=unseen):
                found = [n for n in cautions_of(federation) if "no training rows" in n]
                assert found == [
                    "labels: validation or test rows have classes that no training rows have: "
                    f"{unseen}; use one coding of the classes"
                ]


def test_frames_with_decimal_commas_are_one_line() -> None:
    commas = np.resize(["0,05", "1,5", "2,25", "-3"], ROWS)
    names = np.resize(["1,5", "2,5"], ROWS)
    for frame, task in (
        (FRAME.assign(dose=commas, y=np.arange(ROWS) % 2), None),
        (FRAME.assign(y=names), None),
        (FRAME.assign(y=names), "regression"),
    ):
        client = hfl.Client("a", "mlp", frame)
        words = (
            r"row 1, column '(dose|y)': expected a number, got '\d,\d+'; write numbers as 1234\.5$"
        )
        check_refused(words, hfl.Federation, [client], test=frame, label="y", task=task)
    own = hfl.Federation(
        [hfl.Client("a", "mlp", FRAME.assign(y=names))], label="y", task="multiclass"
    )
    assert names_of(own) == ("1,5", "2,5")


def test_frames_with_text_among_numbers_are_told_a_cure_that_works() -> None:
    frame = FRAME.assign(ward=np.resize(["1", "2", "3a"], ROWS), y=np.arange(ROWS) % 2)
    words = r"column 'ward': expected a number, got '3a'; convert it to one type$"
    client = hfl.Client("a", "mlp", frame)

    check_refused(words, hfl.Federation, [client], test=frame, label="y")

    found = to_dataset(frame.astype({"ward": "category"}), "data", "y")
    assert found.categories == (("ward", ("1", "2", "3a")),)


def test_labels_of_every_type_are_read(subtests: pytest.Subtests) -> None:
    plain = np.arange(ROWS) % 2
    tensor = torch.tensor(plain)
    given: dict[str, Any] = {
        "bfloat16": tensor.bfloat16(),
        "requires_grad": tensor.double().requires_grad_(),
        "uint16": tensor.to(torch.uint16),
        "negative stride": plain[::-1],
        "object": plain.astype(object),
    }
    if torch.cuda.is_available():
        given["cuda"] = tensor.cuda()
    for name, task in itertools.product(given, (None, "regression")):
        with subtests.test(name=name, task=task):
            own = hfl.Federation(clients(given[name], plain), test=(X + 2, plain), task=task)
            labels = own.prepare("local").data.client_rows["c0"]["train"].examples.labels
            expected = 1 - plain if name == "negative stride" else plain
            assert labels.flatten().tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
@each_case("kind", ("complex", "sparse", "nested", "masked"))
def test_tensors_that_are_not_dense_and_real_are_refused(kind: str) -> None:
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "complex": lambda values: values.to(torch.complex64),
        "sparse": torch.Tensor.to_sparse,
        "nested": lambda values: torch.nested.nested_tensor(list(values)),
        "masked": lambda values: torch.masked.masked_tensor(values, values >= 0),
    }
    message = "expected real numbers" if kind == "complex" else "expected a dense tensor"
    y = torch.arange(ROWS) % 2

    for x, labels in (
        (change[kind](torch.tensor(X)), y),
        (torch.tensor(X), change[kind](y)),
    ):
        client = hfl.Client("a", "mlp", (x, labels))
        check_refused(message, lambda each: hfl.Federation([each]).prepare("local"), client)


@pytest.mark.filterwarnings("ignore:.*training rows")
def test_booleans_of_arrays_and_frames_are_the_same_classes() -> None:
    y = np.arange(ROWS) % 2 == 1
    frame = FRAME.assign(y=y)
    of_array = [hfl.Client("a", "mlp", (X, y)), hfl.Client("t", "mlp", (X, torch.tensor(y)))]
    of_frame = [hfl.Client("b", "mlp", frame, label="y")]

    assert names_of(hfl.Federation([*of_array, *of_frame])) == ("False", "True")
    for federation in (hfl.Federation(of_array, test=(X, y)), hfl.Federation(of_frame)):
        run = federation.train("local", rounds=1, overrides=QUIET)
        scores = [hfl.evaluate(run, (X, y)), hfl.evaluate(run, frame, label="y")]
        assert scores[0] == scores[1]


def test_label_of_the_federation_may_name_several_columns() -> None:
    frame = pd.DataFrame(X, columns=["a", "p", "q"])

    task = hfl.Federation([hfl.Client("a", "mlp", frame)], label="p, q").prepare("local").data.task

    assert task == Task("regression", 2, ("p", "q"))


def test_notes_on_all_labels_name_no_client_and_appear_once() -> None:
    ratings = np.resize([1.0, 2, 3, 4, 5], ROWS)
    frames = [pd.DataFrame(X + i, columns=list("abc")).assign(y=ratings) for i in range(2)]
    own = [hfl.Client(f"c{i}", "mlp", frame) for i, frame in enumerate(frames)]

    for test in (None, frames[0].assign(a=9.0)):
        notes = hfl.Federation(own, test=test, label="y").prepare("local").notes
        found = [note for note in notes if "read as" in note]
        assert len(found) == 1 and found[0].startswith("labels: read as 5 classes")
        assert isinstance(found[0], Caution)


def files_of_clients(folder: Path, labels: dict[str, list[Any]]) -> dict[str, Any]:
    """Write a table with the labels of each client, and return the configuration."""
    groups = []
    for name, values in labels.items():
        path = folder / f"{name}.csv"
        FRAME.assign(y=np.resize(values, ROWS)).to_csv(path, index=False)
        data = {"name": "table", "path": str(path)}
        groups.append({"name": name, "model": "mlp", "data": data})
    return {
        "data": {"name": "table", "label": "y"},
        "clients": {"groups": groups},
        "algorithm": {"name": "local"},
    }


def test_clients_without_a_common_class_are_a_caution(tmp_path: Path) -> None:
    labels = {"c0": [0, 1], "c1": [0, 1], "c2": [5, 6]}
    own = clients(*(np.resize(values, ROWS) for values in labels.values()))

    of_files = cautions(hfl.prepare(files_of_clients(tmp_path, labels)).notes)

    for found in (of_files, cautions_of(hfl.Federation(own))):
        assert [note for note in found if "no other client has a class" in note] == [
            "clients: 'c2': no other client has a class of this client: 5, 6"
        ]


def test_numbers_and_names_in_files_of_clients_are_refused(tmp_path: Path) -> None:
    config = files_of_clients(tmp_path, {"a": ["ill", "well"], "b": [0, 1]})

    message = r"^clients: 'a': data: a\.csv: expected class numbers as in .*b\.csv, got ill, well"
    check_refused(message, hfl.prepare, config)


def test_class_may_have_a_name_of_thousands_of_digits(tmp_path: Path) -> None:
    names = ("3", "9" * 5000)

    task = read_csv(tmp_path, np.array(names * 30)).task

    assert task.names == names and task.numbers == ()


TWELVE = np.random.default_rng(0).normal(size=(12, 3))
ONE_TO_THREE = np.array([1, 2, 3] * 4)


def made_with_warning(message: str, y: Any, **settings: Any) -> Dataset:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = from_arrays(TWELVE, y, **settings)
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
        (np.resize([-1.0, 1.0], len(TWELVE)), f"read as 2 classes: .*{advice}", (-1, 1)),
        (np.resize(np.array(five) * 1.0, len(TWELVE)), f"read as 5 classes: .*{advice}", five),
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
    asked = made_with_warning(
        "-1 as class 0", np.resize([-1.0, 1.0], len(TWELVE)), task="multiclass"
    )
    assert asked.task.names == ("-1", "1")


def test_from_arrays_maps_gaps_over_all_splits() -> None:
    y = np.array([0, 2] * 6)

    dataset = made_with_warning(
        "0 as class 0, 2 as class 1, 5 as class 2", y, test=(TWELVE[:1], [5])
    )

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
        dataset = from_arrays(TWELVE, y, **settings)

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


def test_run_keeps_class_names(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="1 as class 0"):
        data = from_arrays(x, np.array([1, 2, 3] * 40))

    run = hfl.run(
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
    predicted = run.predict("a", x[:40], personal=False).idxmax(axis=1).astype(int)
    expected = float((predicted == known + 1).mean())
    assert hfl.evaluate(run, str(tmp_path / "new.npz"))["a"]["accuracy"] == pytest.approx(expected)
    np.savez(tmp_path / "new.npz", train_images=x[:40], train_labels=known - 1)
    check_refused(
        "'0' is unknown to the models; choose from 1, 2, 3",
        hfl.evaluate,
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

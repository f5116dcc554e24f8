"""Labels of all sources: one rule for classes, one for the kind of task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, from_arrays, load_source
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import Caution
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


def read_hub(_folder: Path, y: np.ndarray) -> Dataset:
    datasets = pytest.importorskip("datasets")
    return to_dataset(datasets.Dataset.from_pandas(FRAME.assign(y=y)), "data", "y")


def read_htfllib(folder: Path, y: np.ndarray) -> Dataset:
    for split in ("train", "test"):
        (folder / split).mkdir()
        np.savez(folder / split / "0.npz", x=X, y=y)
    return load(folder, "htfllib", "")


def read_images(folder: Path, y: np.ndarray) -> Dataset:
    for row, label in enumerate(y):
        (folder / str(label)).mkdir(exist_ok=True)
        pixels = np.full((4, 4), row, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / f"{row:02}.png")
    return load(folder, "image_folder", "")


WAYS: dict[str, Callable[[Path, np.ndarray], Dataset]] = {
    "arrays": lambda _folder, y: to_dataset((X, y), "data"),
    "tensors": lambda _folder, y: to_dataset((torch.tensor(X), torch.tensor(y)), "data"),
    "frame": lambda _folder, y: to_dataset(FRAME.assign(y=y), "data", "y"),
    "hub": read_hub,
    "npz": read_npz,
    "csv": read_csv,
    "htfllib": read_htfllib,
    "images": read_images,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("labels", [(0, 1, 2), (1, 2, 3), (0, 2), (2, 10)])
@pytest.mark.parametrize("way", WAYS)
def test_classes_are_the_sorted_distinct_labels(
    way: str, labels: tuple[int, ...], tmp_path: Path
) -> None:
    y = np.resize(labels, ROWS)

    dataset = WAYS[way](tmp_path, y)

    values, expected = np.unique(y, return_inverse=True)
    assert dataset.task.kind == "multiclass"
    assert dataset.task.output_names == tuple(map(str, values))
    # The images of a folder are sorted by class, and the values of their pixels are their rows.
    rows = dataset.train.x[:, 0, 0, 0].long().numpy() if way == "images" else np.arange(ROWS)
    assert dataset.train.labels.tolist() == expected[rows].tolist()


@pytest.mark.parametrize("way", ["npz", "csv"])
@pytest.mark.parametrize(
    ("y", "kind", "advice"),
    [
        (np.arange(ROWS) % 3 + 1, "multiclass", "data.task=regression"),
        (np.arange(ROWS) % 5 + 1.0, "multiclass", "data.task=regression"),
        (np.arange(ROWS) % 2 * 1.0, "multiclass", "data.task=regression"),
        (np.arange(ROWS) % 3 - 1, "multiclass", "data.task=regression"),
        (np.arange(ROWS) * 3, "regression", "data.task=multiclass"),
        (np.stack([np.arange(ROWS) % 3 - 1] * 3, 1), "regression", "data.task=regression"),
        (np.eye(3, dtype=int)[np.arange(ROWS) % 3], "multiclass", "data.task=multilabel"),
    ],
)
def test_ambiguous_kind_is_a_caution_that_names_the_key(
    way: str, y: np.ndarray, kind: str, advice: str, tmp_path: Path
) -> None:
    read: Any = WAYS[way]

    dataset = read(tmp_path, y)

    assert dataset.task.kind == kind
    cautions = [note for note in dataset.notes if isinstance(note, Caution)]
    assert any(f"set {advice}" in note for note in cautions)
    given = read(tmp_path, y, task=kind)
    assert given.task == dataset.task
    assert not any(isinstance(note, Caution) for note in given.notes)


@pytest.mark.parametrize(
    "y", [np.arange(ROWS) % 3, np.arange(ROWS) / 7, np.resize([-1, 1], ROWS), ["a", "b"] * 30]
)
def test_labels_with_one_reading_have_no_caution(y: Any, tmp_path: Path) -> None:
    datasets = [to_dataset((X, y), "data"), read_csv(tmp_path, np.asarray(y))]

    assert not any(isinstance(note, Caution) for each in datasets for note in each.notes)


def clients(*labels: Any) -> list[hfl.Client]:
    return [hfl.Client(f"c{i}", "mlp", (X + i, y)) for i, y in enumerate(labels)]


def cautions(own: hfl.Federation) -> list[str]:
    return [note for note in own.prepare(hfl.Local()).notes if isinstance(note, Caution)]


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

    assert any("pass task='regression'" in note for note in cautions(guessed))
    given = hfl.Federation(clients(ratings, ratings), task="regression")
    assert given.prepare(hfl.Local()).federation.task == Task("regression", 1)
    assert not cautions(given)
    named = Task("multiclass", 3, ("ill", "unknown", "well"))
    text = np.resize(["well", "ill"], ROWS)
    assert names_of(hfl.Federation(clients(text, text), task=named)) == named.names
    numbers = np.resize([0, 2], ROWS)
    assert names_of(hfl.Federation(clients(numbers, numbers), num_classes=4)) == tuple("0123")
    with pytest.raises(
        UserError, match=r"^num_classes: cannot be combined with a Task, got 4 and 3"
    ):
        hfl.Federation(clients(numbers, numbers), task=named, num_classes=4)
    for outside in ([0, 4], [-1, 0]):
        with pytest.raises(UserError, match=r"label -?\d is out of range 0 to 3"):
            hfl.Federation(clients(numbers, np.resize(outside, ROWS)), num_classes=4)


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_task_of_several_columns_keeps_names_unit_and_outputs(kind: Any) -> None:
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
    with pytest.raises(UserError, match="expected 3 targets as in task, got 2"):
        read((x, y), Task(kind, 3))


def test_gap_in_class_numbers_is_a_caution() -> None:
    y = np.resize([0, 2], ROWS)

    own = hfl.Federation(clients(y, y))

    assert names_of(own) == ("0", "2")
    assert any("0 as class 0, 2 as class 1; pass num_classes=3" in note for note in cautions(own))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("yes", "Yes"),
        ("caf\u00e9", "cafe\u0301"),
        ("day in", "day\u00a0 in"),
        ("yes", "\ufeffye\u200bs"),
    ],
)
def test_similar_names_are_a_caution(name: str, other: str) -> None:
    first, second = (np.resize([each, "no"], ROWS) for each in (name, other))

    found = cautions(hfl.Federation(clients(first, second)))

    assert any("differ only in case, white space or Unicode form" in note for note in found)


@pytest.mark.parametrize("name", ["text", "activity"])
def test_similar_names_are_a_caution_in_every_source(name: str, tmp_path: Path) -> None:
    labels = np.repeat(["walk", "Walk"], 320)
    path = tmp_path / ("t.txt" if name == "text" else "a.csv")
    frame = pd.DataFrame({"activity": labels, "v": np.arange(640.0)})
    lines = [f"{label}\t{row} words" for row, label in enumerate(labels)]
    path.write_text("\n".join(lines) if name == "text" else frame.to_csv(index=False))
    keys = {
        "text": {"text": {"predict": "class", "tokenizer": "hashing"}},
        "activity": {"windows": {"length": 4}},
    }
    config = {
        "data": {"name": name, "path": str(path), **keys[name]},
        "clients": {"groups": [{"name": "a", "model": "text_cnn" if name == "text" else "mlp"}]},
        "algorithm": {"name": "local"},
    }

    found = [note for note in hfl.prepare(config).notes if isinstance(note, Caution)]

    assert any("classes 'Walk' and 'walk' differ only in case" in note for note in found)


@pytest.mark.parametrize(
    ("train", "test", "unseen"),
    [(["sick", "well"], ["krank", "well"], "'krank'"), ([0, 1], [1, 2], "'2'")],
)
@pytest.mark.parametrize("way", ["test", "own test", "divided", "validation"])
def test_classes_without_training_rows_are_a_caution(
    train: list[Any], test: list[Any], unseen: str, way: str
) -> None:
    y = np.resize(train, ROWS)
    other = np.resize(test, ROWS)
    own = {"test": (X + 2, other)} if way == "own test" else {}
    public = {"test": (X + 1, other if way == "test" else y)}
    if way == "validation":
        public["validation"] = (X + 3, other)
    federation = (
        hfl.Federation([hfl.Client("a", "mlp")], data=from_arrays(X, y, test=(X + 1, other)))
        if way == "divided"
        else hfl.Federation([hfl.Client("a", "mlp", (X, y), **own)], **public)
    )

    found = [note for note in cautions(federation) if "no training rows" in note]

    assert found == [
        "labels: validation or test rows have classes that no training rows have: "
        f"{unseen}; use one coding of the classes"
    ]


def test_frames_with_decimal_commas_are_read_as_files(tmp_path: Path) -> None:
    numbers = np.resize([0.05, 1.5, 2.25, -3.0], ROWS)
    commas = [f"{number:.2f}".replace(".", ",") for number in numbers]
    frame = FRAME.assign(dose=commas, y=commas)
    frame.to_csv(tmp_path / "d.csv", index=False, sep=";")
    proxy = frame.drop(columns="y").assign(a=1.0)

    own = hfl.Federation([hfl.Client("a", "mlp", frame)], test=frame, proxy=proxy, label="y")

    data = own.prepare("fedmd").data
    of_file = load(tmp_path, "table", "d.csv", label="y")
    of_frame = data.client_rows["a"]["train"].examples
    assert data.task == of_file.task == Task("regression", 1, ("y",))
    assert torch.equal(of_frame.x, of_file.train.x)
    assert torch.equal(of_frame.labels, of_file.train.labels)
    assert torch.equal(data.public_sets["proxy"].examples.x[:, 1:], of_file.train.x[:, 1:])
    names = np.resize(["1,5", "2,5"], ROWS)
    for task, expected in (("multiclass", ("1,5", "2,5")), ("regression", ("y",))):
        own = hfl.Federation([hfl.Client("a", "mlp", frame.assign(y=names))], label="y", task=task)
        assert names_of(own) == expected


@pytest.mark.parametrize(
    "y",
    [
        torch.arange(ROWS).remainder(2).bfloat16(),
        torch.arange(ROWS).remainder(2).double().requires_grad_(),
        torch.arange(ROWS).remainder(2).to(torch.uint16),
        (np.arange(ROWS) % 2)[::-1],
        (np.arange(ROWS) % 2).astype(object),
        pytest.param(
            torch.arange(ROWS).remainder(2),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
    ids=["bfloat16", "requires_grad", "uint16", "negative stride", "object", "cuda"],
)
def test_labels_of_every_type_are_read(y: Any, request: pytest.FixtureRequest) -> None:
    given = y.cuda() if "cuda" in request.node.name else y
    plain = np.arange(ROWS) % 2
    expected = 1 - plain if "stride" in request.node.name else plain

    for task in (None, "regression"):
        own = hfl.Federation(clients(given, plain), test=(X + 2, plain), task=task)
        labels = own.prepare("local").data.client_rows["c0"]["train"].examples.labels
        assert labels.flatten().tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
@pytest.mark.parametrize("kind", ["complex", "sparse", "nested", "masked"])
def test_tensors_that_are_not_dense_and_real_are_refused(kind: str) -> None:
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "complex": lambda values: values.to(torch.complex64),
        "sparse": torch.Tensor.to_sparse,
        "nested": lambda values: torch.nested.nested_tensor(list(values)),
        "masked": lambda values: torch.masked.masked_tensor(values, values >= 0),
    }
    message = "expected real numbers" if kind == "complex" else "expected a dense tensor"
    y = torch.arange(ROWS) % 2

    for x, labels in ((change[kind](torch.tensor(X)), y), (torch.tensor(X), change[kind](y))):
        with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
            hfl.Federation([hfl.Client("a", "mlp", (x, labels))]).prepare("local")


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
    with pytest.raises(UserError, match="expected text as in"):
        hfl.Federation([*of_array, hfl.Client("c", "mlp", (X, np.where(y, "ill", "well")))])


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


def test_clients_without_a_common_class_are_a_caution(tmp_path: Path) -> None:
    labels = {"a": [0, 1], "b": [0, 1], "c": [5, 6]}
    for name, values in labels.items():
        frame = pd.DataFrame(X, columns=list("xyz")).assign(y=np.resize(values, ROWS))
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    groups = [
        {
            "name": name,
            "model": "mlp",
            "data": {"name": "table", "path": str(tmp_path / f"{name}.csv")},
        }
        for name in labels
    ]
    files = {
        "data": {"name": "table", "label": "y"},
        "clients": {"groups": groups},
        "algorithm": {"name": "local"},
    }

    of_files = [note for note in hfl.prepare(files).notes if isinstance(note, Caution)]
    of_objects = cautions(hfl.Federation(clients(*(np.resize(v, ROWS) for v in labels.values()))))

    for found, client in ((of_files, "c"), (of_objects, "c2")):
        assert [note for note in found if "no other client has a class" in note] == [
            f"clients: '{client}': no other client has a class of this client: 5, 6"
        ]


def test_numbers_and_names_are_refused() -> None:
    names = np.resize(["ill", "well"], ROWS)
    numbers = np.resize([0, 1], ROWS)
    named = from_arrays(X, names)
    numbered = from_arrays(X, numbers)

    for first, second in ((names, numbers), (named, numbered)):
        parts = [hfl.Client("a", "mlp", first if first is named else (X, first))]
        parts += [hfl.Client("b", "mlp", second if second is numbered else (X, second))]
        with pytest.raises(UserError, match=r"expected (text|class numbers) as in") as caught:
            hfl.Federation(parts)
        assert "\n" not in str(caught.value)


def test_numbers_and_names_in_files_of_clients_are_refused(tmp_path: Path) -> None:
    groups = []
    for client, values in (("a", ["ill", "well"]), ("b", [0, 1])):
        path = tmp_path / f"{client}.csv"
        pd.DataFrame(X, columns=list("xyz")).assign(y=np.resize(values, ROWS)).to_csv(path)
        data = {"name": "table", "path": str(path)}
        groups.append({"name": client, "model": "mlp", "data": data})
    config = {"data": {"name": "table", "label": "y"}, "clients": {"groups": groups}}

    message = r"^clients: 'a': data: a\.csv: expected class numbers as in .*b\.csv, got ill, well"
    with pytest.raises(UserError, match=message) as caught:
        hfl.prepare(config)
    assert "\n" not in str(caught.value)


def test_class_may_have_a_name_of_thousands_of_digits(tmp_path: Path) -> None:
    names = ("3", "9" * 5000)

    task = read_csv(tmp_path, np.array(names * 30)).task

    assert task.names == names and task.numbers == ()

"""The source `hf`: folders that `datasets` wrote or reads, and data sets of the hub."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, federate, load_source
from hetero_fl.data.sources.hugging_face import source
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import PLAIN_CLIENT
from tests.support.mistakes import check_refused, refusal

datasets = pytest.importorskip("datasets", reason="pip install 'hetero_fl[datasets]'")
# Some versions of datasets do not close the CSV files that they read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NAMES = ["normal", "mild", "severe"]


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def load(path: Path | str, **keys: Any) -> Dataset:
    return load_source(SourceConfig(name=f"hf:{path}", **keys), Path(path).parent / "downloads")


def save(path: Path, content: dict[str, Any], **features: Any) -> Any:
    """Write a data set with `save_to_disk` and return it."""
    part = hub_set(content, **features)
    part.save_to_disk(str(path))
    return part


def hub_set(content: dict[str, Any], **features: Any) -> Any:
    part = datasets.Dataset.from_dict(content)
    for name, feature in features.items():
        part = part.cast_column(name, feature)
    return part


def pixels(rows: int, seed: int = 0) -> np.ndarray:
    y = np.arange(rows) % 3
    noise = np.random.default_rng(seed).integers(0, 60, (rows, 8, 8))
    return (noise + 90 * y[:, None, None]).astype(np.uint8)


def image_set(rows: int, seed: int = 0) -> Any:
    return hub_set(
        {
            "img": [Image.fromarray(each) for each in pixels(rows, seed)],
            "label": (np.arange(rows) % 3).tolist(),
            "hospital": [["north", "south"][i // 3 % 2] for i in range(rows)],
        },
        img=datasets.Image(),
        label=datasets.ClassLabel(names=NAMES),
    )


def test_images_with_three_splits(tmp_path: Path) -> None:
    parts = {"train": image_set(60), "dev": image_set(12, 1), "test": image_set(15, 2)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "scans"))

    dataset = load(tmp_path / "scans")

    assert dataset.name == "hf:scans" and dataset.task.names == tuple(NAMES)
    assert torch.equal(dataset.train.x[:, 0], torch.from_numpy(pixels(60)))
    assert torch.equal(dataset.train.labels, torch.arange(60) % 3)
    assert {name: len(part) for name, part in dataset.splits().items()} == {
        "train": 60,
        "validation": 12,
        "test": 15,
    }
    assert dataset.train.metadata["hospital"][:4].tolist() == ["north"] * 3 + ["south"]
    assert dataset.train.metadata["label"][:3].tolist() == NAMES


@each_case("names", (("image", "img"), ("img", "image"), ("mask", "img", "image")))
def test_image_column_is_chosen_by_name(names: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        name: [Image.fromarray(each) for each in pixels(6, seed)] for seed, name in enumerate(names)
    }
    save(tmp_path / "scans", {**content, "label": [0, 1, 2] * 2})

    x = load(tmp_path / "scans").train.x

    assert torch.equal(x[:, 0], torch.from_numpy(pixels(6, names.index("image"))))


def test_training_on_a_folder(tmp_path: Path) -> None:
    """Each hospital is a client by a column of the data set."""
    image_set(120).save_to_disk(str(tmp_path / "scans"))
    config = {
        "rounds": 1,
        "data": {
            "name": f"hf:{tmp_path / 'scans'}",
            "columns": {"input": "img", "label": "label", "group": "hospital"},
            "partition": {"kind": "natural"},
            "proxy": {"size": 12},
        },
        "clients": {"groups": [{"name": n, "model": "linear"} for n in ("north", "south")]},
        "algorithm": {"name": "fedmd"},
        "runtime": {"executor": "serial", "threads": 1},
    }

    run = hfl.run(config, out=tmp_path / "run", quiet=True)

    assert run.summary["data"]["name"] == "hf:scans"
    assert run.summary["global"]["last"]["accuracy"] is not None
    scores = hfl.evaluate(run, f"hf:{tmp_path / 'scans'}")
    assert set(scores) == {"north", "south"}


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    for split, rows in (("train", 40), ("test", 10)):
        image_set(rows).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.test or ())) == (40, 10)
    assert dataset.task.names == tuple(NAMES)


def table(rows: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(rows)
    return {
        "age": rng.integers(20, 90, rows).tolist(),
        "crp": rng.normal(size=rows).round(3).tolist(),
        "ward": [["A", "B"][i % 2] for i in range(rows)],
        "genes": rng.normal(size=(rows, 3)).round(3).tolist(),
        "when": [f"2024-01-{i % 28 + 1:02d}" for i in range(rows)],
        "label": [["ill", "well"][i % 2] for i in range(rows)],
    }


@each_case("kind", ("json", "parquet", "disk"))
def test_table(kind: str, tmp_path: Path) -> None:
    content = table(40)
    if kind == "json":
        rows = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        hub_set(content).to_parquet(str(tmp_path / "train.parquet"))
    else:
        save(tmp_path, content)

    dataset = load(tmp_path)

    columns = ("age", "crp", "ward=A", "ward=B", "genes_0", "genes_1", "genes_2")
    assert dataset.columns == columns
    assert dataset.categories == (("ward", ("A", "B")),)
    assert dataset.task.names == ("ill", "well")
    expected = torch.tensor(content["genes"])
    assert torch.allclose(dataset.train.x[:, 4:], expected)
    assert set(dataset.train.metadata) == {"ward", "when", "label"}
    assert any("left out: when" in note for note in dataset.notes)


def test_folder_of_csv_files(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 3 / 2},{i % 2}\n" for i in range(30))
    (tmp_path / "train.csv").write_text("a,b,target\n" + rows)
    (tmp_path / "test.csv").write_text("a,b,target\n" + rows)
    dataset = load(tmp_path, label="target")
    assert dataset.columns == ("a", "b") and dataset.task.outputs == 2
    assert dataset.test is not None and torch.equal(dataset.test.x, dataset.train.x)
    regression = load(tmp_path, label="b", task="regression")
    assert regression.task == Task("regression", 1, ("b",))
    assert regression.columns == ("a", "target")


def test_image_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, each in enumerate(pixels(12)):
            folder = tmp_path / split / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(each).save(folder / f"{number}.png")
    dataset = load(tmp_path)
    assert set(dataset.task.names) == set(NAMES)
    assert len(dataset.train) == 12 and dataset.train.x.shape[1:] == (1, 8, 8)
    assert load(tmp_path, size=4).train.x.shape[1:] == (1, 4, 4)


def test_text(tmp_path: Path) -> None:
    words = [["good news today", "bad news again", "so sad"][i % 3] for i in range(30)]
    content = {"idx": list(range(30)), "text": words, "label": [i % 2 for i in range(30)]}
    save(tmp_path / "news", content, label=datasets.ClassLabel(names=["neg", "pos"]))
    dataset = load(tmp_path / "news")
    assert dataset.vocabulary is not None and dataset.vocabulary.buckets == 1000
    assert dataset.train.x.shape == (30, 32) and dataset.task.names == ("neg", "pos")
    assert any("set data.text for other settings" in note for note in dataset.notes)
    text = {"predict": "next", "length": 4, "tokenizer": "hashing", "vocabulary": 50}
    following = load(tmp_path / "news", text=text, group="idx")
    assert following.train.x.shape[1] == 4 and following.task.outputs == 50
    assert len(following.train) == sum(len(each.split()) - 1 for each in words)
    assert following.train.group is not None


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    content = {"sentence": ["a b", "", None, "c"] * 10, "label": ["x", "y", "y", "z"] * 10}
    save(tmp_path / "news", content)
    dataset = load(tmp_path / "news")
    assert len(dataset.train) == 20 and dataset.task.names == ("x", "z")
    assert any("20 rows with fewer than 1 word left out" in note for note in dataset.notes)


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = rng.normal(size=(20, 6, 2)).astype("float32")
    labels = [i % 2 for i in range(20)]
    features = {"signal": datasets.Array2D((6, 2), "float32"), "label": datasets.Value("int64")}
    content = {"signal": series, "label": labels}
    parts = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    parts.save_to_disk(str(tmp_path / "signals"))
    dataset = load(tmp_path / "signals")
    assert torch.equal(dataset.train.x, torch.from_numpy(series))
    assert dataset.columns == ("signal_0", "signal_1")
    nested = {"scan": pixels(20).tolist(), "label": labels}
    save(tmp_path / "scans", nested)
    assert load(tmp_path / "scans").train.x.shape == (20, 1, 8, 8)


def test_multilabel(tmp_path: Path) -> None:
    classes = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
    content = {"x": [[0.0, 1.0]] * 4, "tags": [[0, 2], [], [1], [2]]}
    save(tmp_path / "tags", content, tags=classes)
    dataset = load(tmp_path / "tags", label="tags")
    assert dataset.task.kind == "multilabel" and dataset.task.names == ("a", "b", "c")
    assert dataset.train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    columns = {"x": [0.5, 1.5, 2.5], "ill": [0, 1, 1], "old": [1, 0, 1]}
    binary = datasets.ClassLabel(names=["no", "yes"])
    save(tmp_path / "numbers", columns)
    save(tmp_path / "classes", columns, ill=binary, old=binary)
    for name in ("numbers", "classes"):
        dataset = load(tmp_path / name, label="ill, old")
        assert dataset.task.kind == "multilabel" and dataset.task.names == ("ill", "old")
        assert dataset.train.labels.tolist() == [[0, 1], [1, 0], [1, 1]]


PETS = datasets.ClassLabel(names=["cat", "dog"])


def save_splits(path: Path, test: dict[str, Any], train: dict[str, Any]) -> None:
    """Write splits of two rows. A feature of classes stands for the class numbers 0 and 1."""
    parts = {}
    for split, content in (("train", train), ("test", test)):
        features = {k: v for k, v in content.items() if not isinstance(v, list)}
        numbers = {
            k: [0, 1] if isinstance(v, datasets.ClassLabel) else [[0], [1]]
            for k, v in features.items()
        }
        parts[split] = hub_set({"x": [1.0, 2.0], **content, **numbers}, **features)
    datasets.DatasetDict(parts).save_to_disk(str(path))


def test_classes_of_splits_are_matched_by_name(tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["dog", "cat"])
    cases: dict[str, tuple[Any, Any]] = {
        "text": (PETS, ["dog", "cat"]),
        "text in train": (["cat", "dog"], other),
        "integers": (datasets.ClassLabel(names=["1", "2"]), [2, 1]),
        "integers in train": ([1, 2], datasets.ClassLabel(names=["2", "1"])),
        "classes": (PETS, other),
    }
    for name, (train, test) in cases.items():
        save_splits(tmp_path / name, {"label": test}, {"label": train})
        dataset = load(tmp_path / name)
        assert dataset.test is not None and dataset.test.labels.tolist() == [1, 0], name
        assert dataset.train.labels.tolist() == [0, 1]
    lists = [datasets.Sequence(names) for names in (other, PETS)]
    save_splits(tmp_path / "lists", {"label": lists[0]}, {"label": lists[1]})
    dataset = load(tmp_path / "lists")
    assert dataset.test is not None and dataset.task.names == ("cat", "dog")
    assert dataset.test.labels.tolist() == [[0, 1], [1, 0]]


def test_remarks_on_labels_name_the_column_and_the_key(tmp_path: Path) -> None:
    sites = [1.0, 2.0, 2.0, 1.0]
    save(tmp_path / "table", {"x": [1.0] * 4, "grade": [1, 2, 4, 1], "site": sites})

    dataset = load(tmp_path / "table", label="grade", group="site")

    assert dataset.train.group_names == ("1", "2")  # not 1.0
    assert any(
        "column 'grade': read as 3 classes: 1 as class 0, 2 as class 1, 4 as class 2; set "
        "data.task=regression for regression targets" in note
        for note in dataset.notes
    )


def test_text_settings_prefer_the_text_column(tmp_path: Path) -> None:
    content = {
        "image": [Image.fromarray(each) for each in pixels(6)],
        "caption": ["one two three"] * 6,
        "label": [0, 1] * 3,
    }
    save(tmp_path / "captions", content, image=datasets.Image())
    text = {"predict": "next", "length": 4, "tokenizer": "hashing", "vocabulary": 50}

    dataset = load(tmp_path / "captions", text=text)

    assert dataset.train.x.shape == (12, 4) and dataset.task.outputs == 50


def test_split_without_labels_is_not_used(tmp_path: Path) -> None:
    unlabeled = datasets.ClassLabel(names=["dog", "cat"])
    test = hub_set({"x": [1.0] * 9, "label": [-1] * 9}, label=unlabeled)
    of_text = hub_set({"x": [1.0, 2.0] * 20, "label": ["cat", "dog"] * 20})
    for train in (of_text, of_text.cast_column("label", PETS)):
        parts = datasets.DatasetDict(train=train, test=test, unsupervised=test)
        parts.save_to_disk(str(tmp_path / "pets"))

        dataset = load(tmp_path / "pets")

        assert dataset.test is None and dataset.task.names == ("cat", "dog")
        assert any("split 'test' has no labels, not used" in note for note in dataset.notes)
        assert any("splits 'unsupervised' are not used" in note for note in dataset.notes)


def test_unlabeled_proxy_set(tmp_path: Path) -> None:
    image_set(90).save_to_disk(str(tmp_path / "scans"))
    image_set(20, 5).select_columns(["img"]).save_to_disk(str(tmp_path / "public"))
    config = DataConfig(
        name=f"hf:{tmp_path / 'scans'}", proxy={"source": {"name": f"hf:{tmp_path / 'public'}"}}
    )
    dataset = load_source(config, tmp_path)
    data = federate(dataset, config, {"a": PLAIN_CLIENT, "b": ClientSettings()}, seed=0)
    assert data.n_proxy == 20 and not data.has_proxy_labels


def test_hub_name_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def offline(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)
        try:
            raise OSError("Temporary failure in name resolution")
        except OSError as error:
            raise ConnectionError("Couldn't reach the Hub:\nretry") from error

    monkeypatch.setattr("datasets.load_dataset", offline)
    for name, expected in (
        ("imdb", ("imdb", None)),
        ("nyu-mll/glue:sst2", ("nyu-mll/glue", "sst2")),
    ):
        assert refusal(load_source, SourceConfig(name=f"hf:{name}"), tmp_path) == (
            f"data.name: download of hf:{name} failed (OSError: Temporary failure in name "
            "resolution); check the name, or give a folder that save_to_disk wrote"
        )
        assert asked.pop() == expected
    assert capfd.readouterr() == ("", "")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    check_refused(
        r"needs the package datasets; run pip install 'hetero_fl",
        load_source,
        SourceConfig(name="hf:imdb"),
        tmp_path,
    )


def damaged_image(path: Path) -> None:
    content = {"image": [{"bytes": b"\x89PNG broken", "path": None}] * 4, "label": [0, 1] * 2}
    save(path, content, image=datasets.Image())


def broken_arrow(path: Path) -> None:
    save(path, {"x": [1.0, 2.0], "label": [0, 1]})
    for file in path.glob("*.arrow"):
        file.write_bytes(b"no arrow file")


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty folder": (lambda p: p.mkdir(), {}, "datasets cannot read the folder ("),
    "broken file": (broken_arrow, {}, "datasets cannot read the folder ("),
    "no label": (
        lambda p: save(p, {"x": [1.0], "y": [1]}),
        {},
        "label: missing; name the column of the labels; choose from x, y",
    ),
    "misspelled label": (
        lambda p: save(p, {"x": [1.0], "label": [1]}),
        {"label": "lable"},
        "label: column 'lable' not found; did you mean 'label'?",
    ),
    "misspelled input": (
        lambda p: save(p, {"age": [1.0], "label": [1]}),
        {"columns": {"input": "agee"}},
        "input: column 'agee' not found; did you mean 'age'?",
    ),
    "label as input": (
        lambda p: save(p, {"age": [1.0], "label": [1]}),
        {"columns": {"input": ["age", "label"]}},
        "columns.input: 'label' is the label; remove it",
    ),
    "two labels": (
        lambda p: save(p, {"age": [1.0], "label": [1]}),
        {"columns": {"label": "label"}, "label": "age"},
        "columns.label: 'label' differs from label 'age'",
    ),
    "missing label": (
        lambda p: save(p, {"age": [1.0, 2.0], "label": [1, None]}),
        {},
        "train: column 'label': row 2 has no value",
    ),
    "one unlabeled row": (
        lambda p: save(
            p, {"a": [1.0, 2.0], "label": [1, -1]}, label=datasets.ClassLabel(names=["a", "b"])
        ),
        {},
        "train: column 'label': row 2 has no label",
    ),
    "ragged lists": (
        lambda p: save(p, {"x": [[1.0], [1.0, 2.0]], "label": [0, 1]}),
        {},
        "column 'x': row 2: expected shape (1,) as in row 1, got (2,)",
    ),
    "missing in a list": (
        lambda p: save(p, {"x": [[1.0], None], "label": [0, 1]}),
        {},
        "column 'x': row 2: expected an array of numbers without missing values",
    ),
    "damaged image": (
        damaged_image,
        {},
        "row 1: not a readable image (unknown format or damaged file)",
    ),
    "no image": (
        lambda p: save(p, {"image": [None] * 2, "label": [0, 1]}, image=datasets.Image()),
        {},
        "row 1: not a readable image (no image)",
    ),
    "several sizes": (
        lambda p: save(
            p,
            {"image": [Image.new("L", size) for size in ((4, 4), (5, 4))], "label": [0, 1]},
            image=datasets.Image(),
        ),
        {},
        "row 2: expected 4x4 pixels as in row 1 of train, got 5x4; set data.size",
    ),
    "several image columns": (
        lambda p: save(
            p,
            {**{name: [Image.new("L", (4, 4))] for name in ("left", "right")}, "label": [0]},
            left=datasets.Image(),
            right=datasets.Image(),
        ),
        {},
        "columns.input: missing; choose from 'left', 'right'",
    ),
    "nested label": (
        lambda p: save(p, {"x": [1.0], "label": [{"a": 1}]}),
        {},
        "column 'label': expected classes, text or numbers as labels",
    ),
    "missing value": (
        lambda p: save(p, {"x": [1.0, None] * 5, "label": [0, 1] * 5}),
        {},
        "fill or remove missing values, or set clients.defaults.preprocess.missing=indicate",
    ),
    "no input": (lambda p: save(p, {"label": [0, 1]}), {}, "no column other than the label"),
    "no rows": (
        lambda p: (p.mkdir(), (p / "train.csv").write_text("x,label\n")),
        {},
        "folder: datasets cannot read the folder (",
    ),
    "no training split": (
        lambda p: datasets.DatasetDict(
            test=hub_set({"x": [1.0]}), validation=hub_set({"x": [1.0]})
        ).save_to_disk(str(p)),
        {},
        "expected rows in a split 'train', got 'test', 'validation'",
    ),
    "missing in the test set": (
        lambda p: datasets.DatasetDict(
            train=hub_set({"x": [1.0], "label": [1]}), test=hub_set({"x": [1.0]})
        ).save_to_disk(str(p)),
        {},
        "test: column 'label' missing",
    ),
    "unknown class": (
        lambda p: save_splits(
            p, {"label": datasets.ClassLabel(names=["ox", "dog"])}, {"label": PETS}
        ),
        {},
        "test: column 'label': unknown class 'ox'; choose from cat, dog",
    ),
    "text settings on images": (
        lambda p: image_set(6).select_columns(["img", "label"]).save_to_disk(str(p)),
        {"text": {"predict": "next", "tokenizer": "hashing"}},
        "text: does not apply to image input 'img'; remove it, or set columns.input",
    ),
    "text settings on a table": (
        lambda p: save(p, {"x": [1.0], "z": [2.0], "label": [1]}),
        {"text": {"tokenizer": "hashing"}, "columns": {"input": ["x", "z"]}},
        "text: does not apply to table input 'x', 'z'; remove it, or set columns.input",
    ),
    "size of a table": (
        lambda p: save(p, {"x": [1.0], "label": [1]}),
        {"size": 8},
        "size: does not apply to table input 'x'; remove it",
    ),
    "size of text": (
        lambda p: save(p, {"text": ["a b"], "label": [1]}),
        {"size": 8},
        "size: does not apply to text input 'text'; remove it",
    ),
    "categories of images": (
        lambda p: image_set(6).save_to_disk(str(p)),
        {"categories": {"hospital": ["north"]}},
        "categories: does not apply to image input 'img'; remove it",
    ),
    "repeated label": (
        lambda p: save(p, {"x": [1.0], "ill": [1]}),
        {"label": "ill, ill"},
        "label: column 'ill' occurs 2 times",
    ),
    "text as one of several labels": (
        lambda p: save(p, {"x": [1.0], "ill": [1], "site": ["a"]}),
        {"label": "ill, site"},
        "train: column 'site': with several label columns, expected numbers, got Value",
    ),
    "three classes as one of several labels": (
        lambda p: save(
            p,
            {"x": [1.0], "ill": [1], "grade": [2]},
            grade=datasets.ClassLabel(names=["a", "b", "c"]),
        ),
        {"label": "ill, grade"},
        "train: column 'grade': with several label columns, expected numbers, got ClassLabel",
    ),
    "unlabeled row of several labels": (
        lambda p: save(
            p, {"x": [1.0], "ill": [1], "old": [-1]}, old=datasets.ClassLabel(names=["no", "yes"])
        ),
        {"label": "ill, old"},
        "train: column 'old': row 1 has no label",
    ),
    "cell of a table": (
        lambda p: save(p, {"x": ["1", "2", "three"], "label": [0, 1, 0]}),
        {"columns": {"input": ["x"]}, "categories": {}},
        "train: row 3, column 'x': expected a number, got 'three'",
    ),
    "fraction as a class": (
        lambda p: save(p, {"x": [1.0] * 3, "grade": [1.0, 2.0, 2.5]}),
        {"label": "grade", "task": "multiclass"},
        "train: column 'grade': row 3: expected a class number, got 2.5",
    ),
    "no indicator": (
        lambda p: save(p, {"x": [1.0] * 3, "ill": [0, 1, 3]}),
        {"label": "ill", "task": "multilabel"},
        "train: column 'ill': row 3: multilabel targets must be 0 or 1",
    ),
    "infinite regression target": (
        lambda p: save(p, {"x": [1.0] * 3, "days": [0.5, 1.5, np.inf]}),
        {"label": "days"},
        "train: column 'days': row 3: NaN or infinite value",
    ),
    "infinite value of an array": (
        lambda p: save(p, {"scan": [[[0.0, np.inf]], [[1.0, 1.0]]], "label": [0, 1]}),
        {},
        "train: column 'scan': row 1: infinite value",
    ),
    "values of images": (
        lambda p: save(p, {"scan": [[[0, 2**31]]] * 2, "label": [0, 1]}),
        {},
        "train: column 'scan': expected pixels of at most 31 bits, got 0 to 2147483648",
    ),
    "several columns as one class": (
        lambda p: save(p, {"x": [1.0] * 2, "ill": [0, 1], "old": [1, 1]}),
        {"label": "ill, old", "task": "multiclass"},
        "columns 'ill', 'old': a multiclass task needs one column of labels or one-hot rows",
    ),
    "regression of classes": (
        lambda p: image_set(6).save_to_disk(str(p)),
        {"task": "regression"},
        "task: must be multiclass for column 'label' of classes, got regression; remove data.task",
    ),
    "multilabel of classes": (
        lambda p: image_set(6).save_to_disk(str(p)),
        {"task": "multilabel"},
        "task: must be multiclass for column 'label' of classes, got multilabel",
    ),
    "multiclass of lists of classes": (
        lambda p: save_splits(p, *[{"label": datasets.Sequence(PETS)}] * 2),
        {"task": "multiclass"},
        "task: must be multilabel for column 'label' of lists of classes, got multiclass",
    ),
    "class numbers for class names": (
        lambda p: save_splits(p, {"label": [0, 1]}, {"label": PETS}),
        {},
        "test: column 'label': unknown class '0'; choose from cat, dog",
    ),
    "class names for class numbers": (
        lambda p: save_splits(p, {"label": PETS}, {"label": [0, 1]}),
        {},
        "test: column 'label': expected Value('int64') as in train, got ClassLabel(names=",
    ),
    "class names for one of several class numbers": (
        lambda p: save_splits(p, {"label": PETS, "z": [0, 1]}, {"label": [0, 1], "z": [0, 1]}),
        {"label": "label, z"},
        "test: column 'label': expected Value('int64') as in train, got ClassLabel(names=",
    ),
    "unknown text": (
        lambda p: save_splits(p, {"label": ["cat", "ox"]}, {"label": PETS}),
        {},
        "test: column 'label': unknown class 'ox'; choose from cat, dog",
    ),
    "number for text": (
        lambda p: save_splits(p, {"label": [0, 1]}, {"label": ["cat", "dog"]}),
        {},
        "test: column 'label': expected text as in ",
    ),
    "indicators for lists of classes": (
        lambda p: datasets.DatasetDict(
            train=hub_set({"x": [1.0], "label": [[0]]}, label=datasets.Sequence(PETS)),
            test=hub_set({"x": [1.0], "label": [[1, 0]]}),
        ).save_to_disk(str(p)),
        {"label": "label"},
        "test: column 'label': expected List(ClassLabel(names=['cat', 'dog'])) as in train, got "
        "List(Value('int64'))",
    ),
    "key of tables": (lambda p: save(p, {"x": [1.0]}), {"windows": {}}, "does not apply to source"),
}


def test_mistakes_are_one_line(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, (name, (write, keys, message)) in enumerate(MISTAKES.items()):
        path = tmp_path / str(number) / "folder"
        path.parent.mkdir()
        with subtests.test(name=name):
            write(path)
            caught = refusal(load, path, **keys)
            assert message in caught
            assert caught.startswith("data.")


def test_damaged_files_print_one_line(tmp_path: Path) -> None:
    names = ["json", "parquet", "csv"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"data.{name}").write_bytes(b'{"a": \x00\xff"\n1,2,3\n1')
    code = (
        "from pathlib import Path; from hetero_fl.data import load_source\n"
        "from hetero_fl.config.data import SourceConfig\n"
        f"for name in {names}:\n"
        f"    try: load_source(SourceConfig(name=f'hf:{tmp_path}/{{name}}'), Path('{tmp_path}'))\n"
        "    except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert done.stderr == "" and len(lines) == 3
    assert all("datasets cannot read the folder (" in line for line in lines)


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    check_refused("folder not found; did you mean 'scans'", load, tmp_path / "scan")
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    check_refused("expected a folder, got a file", load, tmp_path / "file.csv")


VALUES = st.one_of(
    st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=4, max_size=4),
    st.lists(st.none() | st.floats(), min_size=4, max_size=4),
    st.lists(st.none() | st.text(max_size=4), min_size=4, max_size=4),
    st.lists(st.none() | st.booleans(), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(-3, 300), max_size=3), min_size=4, max_size=4),
    st.lists(st.lists(st.lists(st.floats(0, 1), max_size=2), max_size=2), min_size=4, max_size=4),
    st.lists(st.fixed_dictionaries({"a": st.integers(0, 3)}), min_size=4, max_size=4),
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.dictionaries(st.sampled_from(["a", "image", "text", "label"]), VALUES, min_size=1),
    test=st.none() | st.dictionaries(st.sampled_from(["a", "text", "label"]), VALUES, min_size=1),
    keys=st.sampled_from([{}, {"label": "a"}, {"columns": {"input": "a"}}, {"group": "a"}]),
)
def test_malformed_data_is_one_line(
    content: dict[str, Any], test: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"train": hub_set(content)} | ({} if test is None else {"test": hub_set(test)})
    monkeypatch.setattr(source, "_load_splits", lambda *_: (parts, []))
    try:
        dataset = load_source(SourceConfig(name="hf:any", **keys), Path("downloads"))
    except UserError as error:
        assert str(error).startswith("data.") and "\n" not in str(error)
    else:
        assert len(dataset.train) <= 4


def visits(rows: int = 40) -> pd.DataFrame:
    """Return a table of visits, with four rows of each patient."""
    return pd.DataFrame(
        {
            "age": np.arange(rows) + 0.5,
            "ward": [["A", "B"][i % 2] for i in range(rows)],
            "patient": [f"p{i // 4}" for i in range(rows)],
            "hospital": [["north", "south"][i % 2] for i in range(rows)],
            "when": pd.date_range("2024-01-01", periods=rows),
            "y": [["ill", "well"][i % 2] for i in range(rows)],
        }
    )


def notes_of(frame: pd.DataFrame, folder: Path, kind: str, **keys: Any) -> list[str]:
    """Return the notes on a data frame without the name of the file."""
    if kind == "table":
        frame.to_parquet(folder / "visits.parquet")
        source = SourceConfig(name="table", path=str(folder / "visits.parquet"), **keys)
    else:
        datasets.Dataset.from_pandas(frame).save_to_disk(str(folder / "visits"))
        source = SourceConfig(name=f"hf:{folder / 'visits'}", **keys)
    return [note.partition(": ")[2] for note in load_source(source, folder).notes]


@each_case("keys", ({}, {"group": "hospital"}, {"group": "hospital", "patient": "patient"}))
def test_notes_are_those_of_a_table(keys: Any, tmp_path: Path) -> None:
    notes = {
        kind: notes_of(visits(), tmp_path, kind, label="y", **keys) for kind in ("table", "hf")
    }

    assert notes["hf"] == notes["table"]
    repeated = [note for note in notes["hf"] if "seems to identify patients" in note]
    assert len(repeated) == ("patient" not in keys)
    for key, column in keys.items():
        assert f"{key} {column}; " in notes["hf"][0]


def test_columns_are_listed_as_used_or_as_left_out(tmp_path: Path) -> None:
    frame = visits().drop(columns=["patient"])

    [note] = notes_of(frame, tmp_path, "hf", label="y", columns={"input": ["age", "when"]})

    used, left_out = note.split("; left out: ")
    assert used == "label y; columns used: age"
    assert "age" not in left_out
    assert left_out.startswith("when (datetime64")
    assert left_out.endswith("ward (not in columns.input), hospital (not in columns.input)")
    mapped = {"input": "note", "label": "y", "group": "hospital", "patient": "patient"}
    notes = notes_of(visits().assign(note="fever and cough"), tmp_path, "hf", columns=mapped)
    assert "input note; label y; group hospital; patient patient" in notes


def test_repeated_patients_of_images_are_noted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    content = {
        "image": [Image.fromarray(each) for each in pixels],
        "subject_id": [i // 3 for i in range(12)],
        "label": [i % 2 for i in range(12)],
    }
    part = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    part.save_to_disk(str(tmp_path / "images"))

    dataset = load_source(SourceConfig(name=f"hf:{tmp_path / 'images'}"), tmp_path)

    assert any("'subject_id' seems to identify patients and repeats" in n for n in dataset.notes)
    assert not any("is a feature" in note for note in dataset.notes)

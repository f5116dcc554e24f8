"""The source `hf`: folders that `datasets` wrote or reads, and data sets of the hub."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
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


def test_groups_are_needed_for_training_only(tmp_path: Path) -> None:
    content = {"label": PETS, "site": ["north", "south"]}
    save_splits(tmp_path / "pets", {**content, "site": [None, None]}, content)

    dataset = load(tmp_path / "pets", columns={"group": "site"})

    assert dataset.train.group_names == ("north", "south")
    assert dataset.test is not None and len(dataset.test) == 2


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
        r"datasets is not installed; run pip install 'hetero_fl\[datasets\]'",
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
        "train: row 2, column 'label': missing value",
    ),
    "one unlabeled row": (
        lambda p: save(
            p, {"a": [1.0, 2.0], "label": [1, -1]}, label=datasets.ClassLabel(names=["a", "b"])
        ),
        {},
        "train: row 2, column 'label': missing value",
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
        "column 'label': row 1: unknown class 'ox'; choose from cat, dog",
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
        "train: column 'site': expected numbers as multiple labels, got text",
    ),
    "three classes as one of several labels": (
        lambda p: save(
            p,
            {"x": [1.0], "ill": [1], "grade": [2]},
            grade=datasets.ClassLabel(names=["a", "b", "c"]),
        ),
        {"label": "ill, grade"},
        "train: column 'grade': expected numbers as multiple labels, got text",
    ),
    "unlabeled row of several labels": (
        lambda p: save(
            p, {"x": [1.0], "ill": [1], "old": [-1]}, old=datasets.ClassLabel(names=["no", "yes"])
        ),
        {"label": "ill, old"},
        "train: row 1, column 'old': missing value",
    ),
    "cell of a table": (
        lambda p: save(p, {"x": ["1", "2", "three"], "label": [0, 1, 0]}),
        {"columns": {"input": ["x"]}, "categories": {}},
        "train: row 3, column 'x': expected a number, got 'three'",
    ),
    "no indicator": (
        lambda p: save(p, {"x": [1.0] * 3, "ill": [0, 1, 3]}),
        {"label": "ill", "task": "multilabel"},
        "train: column 'ill': row 3: multilabel targets must be 0 or 1",
    ),
    "infinite regression target": (
        lambda p: save(p, {"x": [1.0] * 3, "days": [0.5, 1.5, np.inf]}),
        {"label": "days"},
        "train: row 3, column 'days': expected a finite number, got inf",
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
        "test: column 'label': row 1: unknown class '0'; choose from cat, dog",
    ),
    "class names for class numbers": (
        lambda p: save_splits(p, {"label": PETS}, {"label": [0, 1]}),
        {},
        "column 'label': expected text as in name: hf:",
    ),
    "class names for one of several class numbers": (
        lambda p: save_splits(p, {"label": PETS, "z": [0, 1]}, {"label": [0, 1], "z": [0, 1]}),
        {"label": "label, z"},
        "test: column 'label': expected numbers as multiple labels, got text",
    ),
    "unknown text": (
        lambda p: save_splits(p, {"label": ["cat", "ox"]}, {"label": PETS}),
        {},
        "column 'label': row 2: unknown class 'ox'; choose from cat, dog",
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
        "test: column 'label': expected classes, text or numbers as labels, got List(Value(",
    ),
    "column without values": (
        lambda p: save_splits(p, *[{"z": [z, z], "label": [0, 1]} for z in (None, 0.5)]),
        {},
        "test: column 'z': expected values as in train, got none",
    ),
    "shorter lists": (
        lambda p: save_splits(p, *[{"z": [z, z], "label": [0, 1]} for z in ([1, 2], [1, 2, 3])]),
        {},
        "test: column 'z_2': expected values as in train, got none",
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

"""Small files, folders and objects for every reader, each read to a data set."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, Examples, Vocabulary, from_arrays, load_source
from hetero_fl.data.sources.objects import to_dataset
from tests.support import benchmark_folders, movielens_folders, speech_folders

ROWS = 60
N = np.arange(ROWS)
GENERATOR = np.random.default_rng(0)
X = GENERATOR.random((ROWS, 3), dtype=np.float32)
IMAGES = GENERATOR.integers(0, 256, (ROWS, 8, 8), dtype=np.uint8)
SERIES = GENERATOR.normal(size=(ROWS, 6, 2)).astype(np.float32)
COLORS = IMAGES[..., None].repeat(3, 3)
SICK = np.resize(["ill", "well", "unknown"], ROWS)
SITES = np.resize(["north", "south"], ROWS)
FRAME = pd.DataFrame(X, columns=["age", "dose", "crp"]).assign(
    ward=np.resize(["A", "B", "C", None], ROWS),
    when="2024-01-02",
    site=SITES,
    pid=[f"p{row // 3:02}" for row in range(ROWS)],
    sick=SICK,
    grade=N % 3 + 1,
)
CONTENT = FRAME.astype(object).where(FRAME.notna(), None).to_dict("list")
OWNERS: dict[str, Any] = {"group": "site", "patient": "pid"}
NEXT = {"predict": "next", "length": 4, "tokenizer": "hashing", "vocabulary": 50}
TEXT = {"predict": "class", "length": 4, "tokenizer": "hashing", "vocabulary": 50}
TWEETS = [f"good day {row % 7} number" if row % 9 else "" for row in range(ROWS)]


def load(name: str, path: Path, **keys: Any) -> Dataset:
    """Load a source with missing values."""
    place = {"name": f"hf:{path}"} if name == "hf" else {"name": name, "path": str(path)}
    config = SourceConfig.model_validate({**place, **keys})
    return load_source(config, path.parent / "downloads", missing=True)


def saved_npz(folder: Path, source: str = "npz", /, **arrays: Any) -> Dataset:
    """Write arrays and read them."""
    np.savez(folder / "data.npz", **arrays)
    return load(source, folder / "data.npz")


def splits_of(name: str, values: Any) -> dict[str, Any]:
    """Return arrays of the three splits in the MedMNIST layout."""
    return {f"{p}_{name}": values[:end] for p, end in (("train", ROWS), ("val", 9), ("test", 12))}


def saved_table(folder: Path, name: str, frame: pd.DataFrame = FRAME, **keys: Any) -> Dataset:
    """Write a data frame and read it."""
    path = folder / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return load("table", path, **keys)


def saved_hub(folder: Path, content: Mapping[str, Any], *names: Any, **keys: Any) -> Dataset:
    """Write a training and a test split with `save_to_disk`, and read them.

    Args:
        folder: Folder to write.
        content: Columns of the training split, whose first 9 rows are the test split.
        names: Pairs of a column and its feature.
        keys: Keys of the source.
    """
    import datasets

    train = datasets.Dataset.from_dict(dict(content))
    for name, feature in names:
        train = train.cast_column(name, feature)
    parts = datasets.DatasetDict(train=train, test=train.select(range(9)))
    parts.save_to_disk(str(folder / "saved"))
    return load("hf", folder / "saved", **keys)


def hub_images(folder: Path, **keys: Any) -> Dataset:
    """Read images with classes and hospitals."""
    from datasets import ClassLabel, Image as ImageFeature

    content = {"img": [Image.fromarray(each) for each in IMAGES], "label": N % 2, "site": SITES}
    classes = ClassLabel(names=["well", "ill"])
    return saved_hub(folder, content, ("img", ImageFeature()), ("label", classes), **keys)


def hub_texts(folder: Path, **keys: Any) -> Dataset:
    """Read texts with classes, some of which are empty."""
    from datasets import ClassLabel

    content = {"text": TWEETS, "label": N % 2, "site": SITES}
    return saved_hub(folder, content, ("label", ClassLabel(names=["neg", "pos"])), **keys)


def hub_lists(folder: Path, **keys: Any) -> Dataset:
    """Read lists of numbers, and lists of classes as labels."""
    from datasets import ClassLabel, Sequence

    tags = [[0, 2] if row % 2 else [1] * (row % 4 // 2) for row in range(ROWS)]
    feature = Sequence(ClassLabel(names=["a", "b", "c"]))
    return saved_hub(
        folder, {"x": X.tolist(), "age": N / 7, "tags": tags}, ("tags", feature), **keys
    )


def hub_series(folder: Path) -> Dataset:
    """Read series with class numbers."""
    from datasets import Array2D

    content = {"signal": SERIES.tolist(), "label": N % 3 + 1}
    return saved_hub(folder, content, ("signal", Array2D((6, 2), "float32")))


def hub_parts(
    folder: Path, train: Any, test: Any, numbers: tuple[int, int] = (0, 1), **keys: Any
) -> Dataset:
    """Read a training and a test split, whose labels are values or the names of classes.

    Args:
        folder: Folder to write.
        train: Labels of the training split, or the names of the classes 0 and 1.
        test: Labels of the test split, or the names of its classes.
        numbers: Numbers of the classes of the test split.
        keys: Keys of the source.
    """
    import datasets

    parts = {}
    for split, labels, given in (("train", train, (0, 1)), ("test", test, numbers)):
        is_feature = isinstance(labels, tuple)
        content = {"x": [1.0, 2.0], "label": list(given if is_feature else labels)}
        parts[split] = datasets.Dataset.from_dict(content)
        if is_feature:
            names = datasets.ClassLabel(names=list(labels))
            parts[split] = parts[split].cast_column("label", names)
    datasets.DatasetDict({**parts, "unsupervised": parts["test"]}).save_to_disk(
        str(folder / "saved")
    )
    return load("hf", folder / "saved", **keys)


def hub_files(folder: Path, suffix: str, **keys: Any) -> Dataset:
    """Read a folder of files that `load_dataset` reads."""
    frame = FRAME[["age", "ward", "when", "sick"]]
    folder = folder / "rows"
    folder.mkdir()
    if suffix == "json":
        frame.to_json(folder / "train.jsonl", orient="records", lines=True)
    elif suffix == "parquet":
        frame.to_parquet(folder / "train-00000-of-00001.parquet")
    else:
        frame.to_csv(folder / "train.csv", index=False)
        frame[:9].to_csv(folder / "test.csv", index=False)
    return load("hf", folder, label="sick", **keys)


def hub_captions(folder: Path, **keys: Any) -> Dataset:
    """Read images with captions, or the last of several columns of images."""
    from datasets import Image as ImageFeature

    names = ("mask", "img", "image")
    content = {
        name: [Image.fromarray(each + number) for each in IMAGES]
        for number, name in enumerate(names)
    }
    content |= {"caption": ["one two three"] * ROWS, "label": (N % 2).tolist()}
    return saved_hub(folder, content, *((name, ImageFeature()) for name in names), **keys)


def client_arrays(folder: Path, classes: int | None = None) -> Dataset:
    """Read client files with arrays instead of pickled dictionaries."""
    for split, count in (("train", 12), ("test", 0)):
        (folder / split).mkdir()
        x, y = np.ones((count, 3), np.float32), np.arange(count) % 3
        np.savez(folder / split / "a.npz", x=x, y=y)
    if classes is not None:
        (folder / "config.json").write_text(f'{{"num_classes": {classes}}}')
    return load("htfllib", folder)


def movies_of_regions(folder: Path, **keys: Any) -> Dataset:
    """Read movies of users with names and regions."""
    movielens_folders.write_movielens_folder(folder, "latest")
    names = ["NA", "001", "a user of twelve", '"anna"']
    rows = [f"{name},{1 + step},{3 + step % 3}, {step // 2}" for step in range(9) for name in names]
    content = "\n".join(["userId,movieId,rating,timestamp", *rows, "", "NA,11,5,-3\r"])
    (folder / "ratings.csv").write_text(content, encoding="utf-8-sig", newline="")
    regions = "userId,region\nNA,north\n001,the south\na user of twelve,north\nanna,north\n"
    (folder / "users.csv").write_text(regions)
    return load("movies", folder, **keys)


def leaf(folder: Path, split: str, **users: Any) -> None:
    """Write the rows of LEAF users."""
    benchmark_folders.write_leaf_file(folder / split / "data.json", users)


def leaf_texts(folder: Path) -> Dataset:
    """Read texts of two users, one of whom has test rows and rows that are left out."""
    leaf(folder, "train", u=(["abc", "bc~"], ["a", "b"]), v=(["xyz", "xyz"], ["~", "n"]))
    leaf(folder, "test", u=(["abc"], ["c"]), w=([], []))
    return load("leaf", folder)


def leaf_numbers(folder: Path) -> Dataset:
    """Read numbers of two users whose class numbers have a gap."""
    leaf(folder, "train", u10=([[0.5, 1], [2, 3]], [0, 2]), u9=([[1, 1], [2, 0]], [2, 5]))
    return load("leaf", folder)


def samples(folder: Path, **keys: Any) -> Dataset:
    """Read samples of sensors of two persons."""
    frame = pd.DataFrame(
        {
            "activity": np.repeat(["walk", "sit"], 200),
            "person": np.tile(np.repeat(["p", "q"], 100), 2),
            "x": np.arange(400.0),
            "y": np.random.default_rng(2).random(400).round(3),
        }
    )
    frame.to_csv(folder / "samples.csv", index=False)
    return load("activity", folder / "samples.csv", **keys)


def hours(folder: Path, name: str, gap: bool = False, **series: Any) -> Dataset:
    """Read the hours of two junctions, one of which may be missing."""
    rng = np.random.default_rng(3)
    dates = pd.date_range("2023-01-01", periods=400, freq="h")
    frame = pd.concat(
        pd.DataFrame(
            {"DateTime": dates, "Junction": junction, "Vehicles": rng.integers(1, 50, 400)}
        )
        for junction in (10, 9)
    )
    frame = frame.iloc[np.arange(800) != 300] if gap else frame
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, **{column: frame[column].to_numpy() for column in frame})
    else:
        frame.to_csv(path, index=False)
    return load("traffic", path, series=series or None)


def texts(folder: Path, **keys: Any) -> Dataset:
    """Read two files of labeled lines."""
    folder = folder / "phones"
    folder.mkdir()
    for name in ("phone_10", "phone_9"):
        lines = [f"class {row % 3}\thello {name} {row % 5} you\n" for row in range(40)]
        (folder / f"{name}.txt").write_text("".join([*lines, "class 1\tone\n"]))
    return load("text", folder, group="file", **keys)


def columns_npz(folder: Path, source: str, **arrays: Any) -> Dataset:
    """Read a `.npz` file with an array for each column."""
    split = np.resize(["train", "train", "validation", "test"], ROWS)
    return saved_npz(folder, source, **{"x": SERIES, "y": SICK, "split": split, **arrays})


MASK = (N[:, None] + [[0, 1]]) % 7 == 3


def tensors(values: np.ndarray) -> list[torch.Tensor]:
    """Return rows as tensors of an autograd graph."""
    return [torch.tensor(row, dtype=torch.float32, requires_grad=True) for row in values]


class Items(torch.utils.data.Dataset[Any]):
    """A data set whose items are masked arrays and tensors of an autograd graph."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Any, torch.Tensor]:
        target = torch.tensor(float(X[row, 0]), requires_grad=True)
        return np.ma.masked_array(X[row], mask=[row % 7 == 0, False, False]), target


def text_table(folder: Path, text: str, **keys: Any) -> Dataset:
    """Read a CSV file with a text."""
    (folder / "text.csv").write_text(text, encoding="utf-8")
    return load("table", folder / "text.csv", **{"label": "sick", **keys})


MARKS = {"sep": ";", "decimal": ",", "thousands": "."}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "decimal comma": (
        "\ufeffcrp;dose;age;note;sick\n0,5;1.250,5;30;a;no\n-12,25;3;41;b;yes\n",
        {"read": MARKS},
    ),
    "quoted numbers": ('crp,sick\n"0,5",1\n7,0\n', {"read": {"decimal": ","}}),
    "comma in a name": ("age;dose, mg;sick\n3;4;0\n5;6;1\n", {}),
    "semicolon in a name": ("dose (mg; day),age,sick\n3,4,0\n5,6,1\n", {}),
    "one wide column": ("a,b;sick\n1;2\n3;4\n", {"read": {"sep": ";"}}),
    "pipes": ("age|sick\n3|0\n5|1\n", {}),
    "tabs": ("age\tsick\n3\t0\n5\t1\n", {}),
    "text with marks": (
        "day;kind;on;dose;site;sick\n01.02.26;a.1;True;-;1.5;0\n02.02.26;b.2;False;1.000;2.5;1\n",
        {"read": MARKS, "group": "site"},
    ),
    "numbers of owners": (
        "x,sick,site,id\n0,0,01,007\n1,1,1,7\n2,0,01,007\n3,1,1,07\n",
        {"group": "site", "patient": "id"},
    ),
    "numbers of columns": ("0,1,sick\n0.5,1,a\n1.5,2,b\n", {}),
    "markers of gaps": ("age,dose,sick\n1,?,0\n--,2,1\n3,NA,0\n n/a ,4,1\nmissing,.,1\n", {}),
    "minus as text": ("age,test,sick\n1,+,0\n2,-,1\n3,+,0\n", {}),
    "question mark in text": ("age,test,sick\n1,+,0\n2,?,1\n3,+,0\n", {}),
    "listed categories": (
        "test,grade,sick\n+,1,0\n?,NA,1\n+,1,1\n",
        {"categories": {"test": ["+", "?"], "grade": ["1", "NA"]}},
    ),
    "other categories": (
        "crp,ward,sick\n1,A,0\n2, B ,1\n3,,0\n4,C,1\n5,,1\n",
        {"categories": {"ward": ["A", "B"]}},
    ),
    "no categories": ("crp,ward,sick\n1,A,0\n2,B,1\n", {"categories": {}}),
    "numbers as categories": (
        "crp,grade,sick\n1,3,0\n2,1,1\n3,2,1\n",
        {"categories": {"grade": ["3", "1", "2"]}},
    ),
    "saved index": (",age,Unnamed: 0.1,sick\n2,30,0.5,0\n0,41,0.6,1\n1,52,0.7,1\n", {}),
    "column without a name": (",age,sick\n4,30,0\n4,41,1\n1,52,1\n", {}),
    "levels of an index": ("level_0,level_1,age,sick\n0,3,30,0\n1,3,41,1\n2,5,52,1\n", {}),
    "large names of classes": ("age,sick\n30,1e20\n41,2.0\n52,0.5\n", {"task": "multiclass"}),
}
"""Texts of CSV files, and the keys with which they are read."""


CASES: dict[str, Callable[[Path], Dataset]] = {
    "arrays": lambda _: from_arrays(X, N % 3, test=(X[:9], N[:9] % 3), group=SITES, patient=N // 2),
    "arrays of text": lambda _: from_arrays(X, SICK, metadata={"ward": FRAME["ward"]}),
    "arrays of targets": lambda _: from_arrays(X, X[:, 0], time=N, unit=N + 1.0),
    "arrays of tokens": lambda _: from_arrays(
        N[:, None] % 6 + [[0, 0]], N % 2, vocabulary=Vocabulary(tuple("abcd"))
    ),
    "arrays of images": lambda _: from_arrays(
        COLORS / 255.0, N % 3, validation=(COLORS[:9], N[:9] % 3)
    ),
    "arrays of series": lambda _: from_arrays(SERIES, N % 2, columns=("x", "y")),
    "masked integers": lambda _: from_arrays(
        np.ma.masked_array(N[:, None] * [[1, 2]], mask=MASK), N % 2
    ),
    "tensors with gradients": lambda _: from_arrays(
        tensors(X), tensors(X[:, 0]), group=tensors(N % 2.0), patient=(N // 2 + 0.0)[:, None]
    ),
    "items with gradients": lambda _: to_dataset(Items(), "data"),
    "npz of images": lambda f: saved_npz(
        f, **splits_of("images", COLORS), **splits_of("labels", N % 3)
    ),
    "npz of patients": lambda f: saved_npz(
        f, train_images=IMAGES, train_labels=SICK, patient=N // 3
    ),
    "npz of deep images": lambda f: saved_npz(
        f, train_images=16 * COLORS.astype(np.uint16), train_labels=(N % 2)[:, None]
    ),
    "npz in place of a set": lambda f: saved_npz(
        f, "chest_xray", train_images=IMAGES, train_labels=N % 2
    ),
    "npz of rows": lambda f: saved_npz(f, train_images=X, train_labels=np.eye(3)[N % 3]),
    "npz of recordings": lambda f: columns_npz(f, "activity", person=SITES),
    "npz of words": lambda f: columns_npz(
        f, "speech", device=SITES, columns=np.array(["low", "high"])
    ),
    "csv": lambda f: saved_table(f, "t.csv", label="sick", **OWNERS),
    "tsv of numbers": lambda f: saved_table(f, "t.tsv", label="grade", **OWNERS),
    "parquet": lambda f: saved_table(f, "t.parquet", label="sick", categories={"ward": ["B", "A"]}),
    "csv of targets": lambda f: saved_table(f, "t.csv", label="age, dose", patient="pid"),
    "data frame": lambda _: to_dataset(FRAME, "data", "sick", patient="pid"),
    "data frame without labels": lambda _: to_dataset(FRAME, "data", patient="pid", labeled=False),
    "hub table": lambda f: saved_hub(f, {**CONTENT, "pid": N.tolist()}, label="sick", group="site"),
    "hub table of columns": lambda f: saved_hub(
        f, CONTENT, columns={"input": ["age", "when"], "label": "grade"}
    ),
    "hub classes": partial(hub_parts, train=("cat", "dog"), test=("dog", "cat")),
    "hub classes as text": partial(hub_parts, train=["cat", "dog"], test=("dog", "cat")),
    "hub classes as integers": partial(hub_parts, train=("1", "2"), test=[2, 1]),
    "hub split without labels": partial(
        hub_parts, train=("cat", "dog"), test=("cat", "dog"), numbers=(-1, -1)
    ),
    "hub JSON": partial(hub_files, suffix="json"),
    "hub Parquet": partial(hub_files, suffix="parquet"),
    "hub CSV": partial(hub_files, suffix="csv"),
    "hub column of images": hub_captions,
    "hub captions": partial(hub_captions, text=NEXT),
    "hub images": partial(hub_images, group="site"),
    "hub small images": partial(hub_images, size=4),
    "hub texts": partial(hub_texts, group="site"),
    "hub next words": partial(hub_texts, group="site", text=NEXT),
    "hub lists": partial(hub_lists, label="tags"),
    "hub series": hub_series,
    "htfllib": lambda f: load("htfllib", benchmark_folders.write_client_folder(f)),
    "htfllib arrays": client_arrays,
    "htfllib arrays of ten classes": partial(client_arrays, classes=10),
    "femnist": lambda f: load("leaf", benchmark_folders.write_femnist(f)),
    "shakespeare": lambda f: load("leaf", benchmark_folders.write_shakespeare(f)),
    "leaf texts": leaf_texts,
    "leaf numbers": leaf_numbers,
    "movies 100k": lambda f: load("movies", movielens_folders.write_movielens_folder(f)),
    "movies 1m": lambda f: load("movies", movielens_folders.write_movielens_folder(f, "1m")),
    "movies latest": lambda f: load(
        "movies",
        movielens_folders.write_movielens_folder(f, "latest"),
        movies={"groups": 9, "min_rating": 2.0},
    ),
    "movies of regions": partial(movies_of_regions, movies={"public_users": 0.3}),
    "movies of users": partial(movies_of_regions, group="user"),
    "movies of many users": lambda f: load(
        "movies", movielens_folders.write_movielens_folder(f, users=84)
    ),
    "public movies": lambda f: load("movies_public", movielens_folders.write_movielens_folder(f)),
    "samples": partial(samples, windows={"length": 16, "step": 8}),
    "hours": partial(hours, name="hours.csv"),
    "hours with a gap": partial(hours, name="hours.csv", gap=True, gaps="skip"),
    "hours of arrays": partial(hours, name="hours.npz", target="busy", horizons=(2,), level="week"),
    "texts": partial(texts, text=TEXT),
    "next words of texts": partial(texts, text=NEXT),
    **{name: partial(text_table, text=text, **keys) for name, (text, keys) in TEXTS.items()},
    "words": lambda f: load("speech", speech_folders.write_speech_folder(f), speech={"bands": 12}),
}
"""A data set of every reader, as a function of an empty folder."""
ROUNDED = ("words",)
"""Cases whose inputs depend on the last digits of a Fourier transform."""


def digest(values: Any) -> str:
    """Return the type, shape and hash of a tensor or an array."""
    array = np.asarray(values)
    content = array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
    code = hashlib.sha256(content).hexdigest()[:12]
    return f"{array.dtype} {list(array.shape)} {code}"


def describe_rows(rows: Examples, decimals: int | None) -> dict[str, Any]:
    """Return all columns of examples."""
    x = rows.x
    found: dict[str, Any] = {"x": digest(x if decimals is None else x.round(decimals=decimals))}
    if x.ndim == 2 and x.shape[1] <= 8:
        found["first rows"] = str(x[:5].tolist())
    for name in ("y", "time", "unit", "excluded"):
        column = getattr(rows, name)
        if column is not None:
            found[name] = digest(column)
    for name in ("group", "patient"):
        index = getattr(rows, name)
        if index is not None:
            names = getattr(rows, f"{name}_names") or range(int(index.max()) + 1)
            counts = index.bincount(minlength=len(names)).tolist()
            found[name] = f"{digest(index)} {dict(zip(names, counts, strict=True))}"[:400]
    found |= {f"baseline {name}": digest(part) for name, part in rows.baselines.items()}
    found |= {f"metadata {name}": digest(part) for name, part in rows.metadata.items()}
    return found


def describe(dataset: Dataset, folder: Path, decimals: int | None = None) -> dict[str, Any]:
    """Return all that a reader has found, in which the folder is called FOLDER."""
    task = dataset.task
    found: dict[str, Any] = {
        "task": f"{task.kind} {task.outputs} {list(task.names)[:8]}",
        "columns": ", ".join(dataset.columns),
        "categories": str(dict(dataset.categories)),
        "missing": dataset.first_missing,
        "about": dataset.about,
        "notes": [f"{type(note).__name__}: {note}" for note in dataset.notes],
        **{name: describe_rows(rows, decimals) for name, rows in dataset.splits().items()},
        **{
            f"local {name}": describe_rows(rows, decimals)
            for name, rows in dataset.local_sets.items()
        },
    }
    text = yaml.safe_dump(found, sort_keys=False, width=10_000, allow_unicode=True)
    plain: dict[str, Any] = yaml.safe_load(text.replace(str(folder), "FOLDER"))
    return plain


def read(name: str, folder: Path) -> dict[str, Any]:
    """Return what the reader of a case finds in an empty folder."""
    # Descriptions contain the name of the folder.
    folder = folder / "files"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = CASES[name](folder)
    return describe(dataset, folder, 3 if name in ROUNDED else None)

"""Data files of sites with a random marker in every cell, class, column, file and folder."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROWS = 40
Data = dict[str, Any]


class Marker:
    """Source of marked texts and numbers, which nothing else contains.

    Args:
        rng: Random numbers.

    Attributes:
        word: Beginning of all marked texts.
        digits: Beginning of all marked numbers.
    """

    def __init__(self, rng: random.Random) -> None:
        self.word = "zq" + "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=12))
        self.digits = "".join(rng.choices("123456789", k=10))
        self._numbers = itertools.count(100)

    def text(self) -> str:
        return f"{self.word}{next(self._numbers)}"

    def number(self) -> str:
        return f"{self.digits}{next(self._numbers)}"


def marked_table(folder: Path, marker: Marker, rng: random.Random) -> Data:
    """Write a table, whose features and classes fit `public_table` in half of all cases."""
    fits = rng.random() < 0.5
    features = ["age", "crp"] if fits else [marker.text(), marker.text()]
    label = marker.text()
    patient = marker.text()
    classes = [rng.choice(["no", "yes"]) if fits else marker.text() for _ in range(ROWS)]
    path = folder / f"{marker.text()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*features, label, patient])
        for each in classes:
            numbers = [f"0.{marker.number()}" for _ in features]
            writer.writerow([*numbers, each, marker.text()])
    if rng.random() < 0.3:
        path.write_text(path.read_text() + f"{marker.text()},{marker.text()}\n")
    wrong = rng.random() < 0.2
    return {
        "name": "table",
        "path": str(path),
        "label": marker.text() if wrong else label,
        "patient": patient,
    }


def marked_text(folder: Path, marker: Marker, rng: random.Random) -> Data:
    """Write lines of text, some of which have a class."""
    path = folder / f"{marker.text()}.txt"
    separator = rng.choice(["\t", " "])
    lines = [f"{marker.text()}{separator}{marker.text()} {marker.text()}" for _ in range(ROWS)]
    path.write_text("\n".join(lines))
    text = {
        "predict": rng.choice(["next", "class"]),
        "tokenizer": rng.choice(["words", "hashing"]),
        "vocabulary": 50,
    }
    return {"name": "text", "path": str(path), "text": text}


def marked_images(folder: Path, marker: Marker, rng: random.Random) -> Data:
    """Write a folder of images, some of which cannot be read."""
    root = folder / marker.text()
    for name in ["0", "1"] if rng.random() < 0.3 else [marker.text(), marker.text()]:
        (root / name).mkdir(parents=True)
        for _ in range(ROWS // 2):
            pixels = np.full((8, 8), rng.randrange(256), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{marker.text()}.png")
    if rng.random() < 0.5:
        (root / name / f"{marker.text()}.png").write_text(marker.text())
    return {"name": "image_folder", "path": str(root)}


def marked_npz(folder: Path, marker: Marker, rng: random.Random) -> Data:
    """Write arrays, of which some have the names of the MedMNIST layout."""
    path = folder / f"{marker.text()}.npz"
    names = ["train_images", "train_labels"]
    if rng.random() < 0.3:
        names[rng.randrange(2)] = marker.text()
    images = np.array([int(marker.number()) for _ in range(ROWS * 64)]).reshape(ROWS, 8, 8)
    labels = np.array([int(marker.number()) for _ in range(ROWS)])
    if rng.random() < 0.5:
        images = images.astype(np.uint8)
    np.savez(path, **{names[0]: images, names[1]: labels})
    return {"name": "npz", "path": str(path)}


def no_data(folder: Path, marker: Marker, rng: random.Random) -> None:
    """Write files that the site file does not name."""
    marked_table(folder, marker, rng)
    marked_text(folder, marker, rng)


MAKERS: list[Callable[[Path, Marker, random.Random], Data | None]] = [
    marked_table,
    marked_text,
    marked_images,
    marked_npz,
    no_data,
]


def public_table(path: Path) -> Data:
    """Write the server's table and return its section `data`."""
    rng = np.random.default_rng(0)
    lines = [f"{a:.3f},{c:.3f},{'yes' if a > c else 'no'}" for a, c in rng.normal(size=(80, 2))]
    path.write_text("\n".join(["age,crp,ill", *lines]))
    return {"name": "table", "path": str(path), "label": "ill", "proxy": {"size": 10}}


def mistakes(rng: random.Random, parent: Path) -> dict[str, Any]:
    """Return one to three changes that make a configuration wrong, by key path.

    Args:
        rng: Random numbers.
        parent: Folder that contains the folder of the site, which a server could guess.
    """
    data = {"name": rng.choice(["table", "text", "image_folder", "npz"]), "path": str(parent)}
    choices: list[tuple[str, Any]] = [
        ("data__label", rng.choice(["age", "crp", "patient"])),
        ("data__path", str(parent)),
        ("data__path", "/etc/passwd"),
        ("data__name", data["name"]),
        ("data__root", str(parent)),
        ("data__task", rng.choice(["regression", "multilabel", "none"])),
        ("data__text", {"predict": "class", "public": str(parent)}),
        ("data__proxy__source", data),
        ("data__partition__min_size", 10**6),
        ("data__split", {"test": 0.99}),
        ("clients__overrides", [{"match": "site_1", "data": data}]),
        ("clients__count", 10**9),
        ("clients__defaults__epochs", -1),
        ("clients__defaults__model", rng.choice(["linear", "cnn_bn_small", "none", "python:os:x"])),
        ("clients__defaults__preprocess", {"columns": ["age"], "normalize": "own"}),
        ("clients__defaults__shares", ["everything"]),
        ("algorithm__name", rng.choice(["fedmd", "fedproto", "fedgkt", "none"])),
        ("rounds", rng.choice([0, "ten", 10**30])),
        ("privacy", {"unit": "record", "noise_multiplier": 1.0}),
        ("channel", {"secure_sum": {"threshold": 2}}),
        ("nothing", 1),
    ]
    return dict(rng.sample(choices, rng.randint(1, 3)))

"""Image sources: embedded sets, image folders, MedMNIST and torchvision.

The embedded chest X-rays and digits, and local files, need no network access.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, with_patients
from hetero_fl.data.registry import TABLE_SUFFIXES, register_source
from hetero_fl.data.sources.files import EMBEDDED, download_folder
from hetero_fl.data.sources.image_files import SUFFIXES, image_files, read_image_files
from hetero_fl.data.sources.npz_files import medmnist_file, read_npz
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import format_list

CHEST_XRAY = Task("multiclass", 2, ("normal", "pneumonia"))
DIGITS = Task("multiclass", 10)


@register_source("chest_xray", task=CHEST_XRAY)
def chest_xray(_config: SourceConfig, _root: Path) -> Dataset:
    """Load pediatric chest X-rays (28x28 grayscale) of the classes normal and pneumonia.

    The 2,000 training, 200 validation and 624 test images are a subset of PneumoniaMNIST (MedMNIST
    v2, Yang et al., Scientific Data 2023; Kermany et al., Cell 2018), licensed under CC BY 4.0.
    """
    dataset = read_npz(EMBEDDED / "chest_xray.npz", "chest_xray", CHEST_XRAY)
    dataset.about = (
        "chest X-rays, a part of PneumoniaMNIST (MedMNIST v2; Kermany et al., Cell 2018), CC BY 4.0"
    )
    return dataset


@register_source("digits", task=DIGITS)
def digits(_config: SourceConfig, _root: Path) -> Dataset:
    """Load 1,797 handwritten digits (8x8 grayscale) without validation and test sets.

    The images are the test set of "Optical Recognition of Handwritten Digits" (UCI), as in
    scikit-learn.
    """
    with np.load(EMBEDDED / "digits.npz", allow_pickle=False) as file:
        # Pixels range from 0 to 16.
        images, labels = file["images"] * (255 / 16), file["labels"]
    x = torch.from_numpy(np.rint(images).astype(np.uint8))[:, None]
    y = torch.from_numpy(labels.astype(np.int64))
    return Dataset(
        "digits",
        DIGITS,
        Examples(x, y),
        about="handwritten digits, 8x8 grayscale (scikit-learn, UCI)",
    )


@register_source("npz", keys=("path", "task", "patient", "stream"))
def npz(config: SourceConfig, root: Path, labeled: bool = True) -> Dataset:
    """Load a local `.npz` file or folder in the MedMNIST layout (see `read_npz`)."""
    return read_npz(
        Path(str(config.path)).expanduser(),
        "npz",
        kind=config.task,
        patient=config.patient,
        root=root if config.stream else None,
        labeled=labeled,
    )


FOLDER_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
"""Split of a data set, keyed by the name of a folder in lower case."""


@register_source("image_folder", keys=("path", "group", "patient", "size", "stream"))
def image_folder(config: SourceConfig, root: Path) -> Dataset:
    """Load the images in the folder `config.path` (see `read_image_folder`).

    If `config.group` is set, for example to "site", the folder must contain a subfolder for each
    group, which contains the folders of the classes. `config.patient` identifies the patient of
    each image (see `patients_of_files`).
    """
    return read_image_folder(
        Path(str(config.path)).expanduser(),
        grouped=config.group is not None,
        patient=config.patient,
        side=config.size,
        root=root if config.stream else None,
    )


def read_image_folder(
    path: Path,
    *,
    grouped: bool = False,
    patient: str | None = None,
    side: int | None = None,
    root: Path | None = None,
) -> Dataset:
    """Read a folder of images with one folder per class.

    The layout is `CLASS/*` or `{train,val,test}/CLASS/*`. With groups, the layout is
    `GROUP/CLASS/*` or `{train,val,test}/GROUP/CLASS/*`.

    Args:
        path: Folder to read.
        grouped: Whether the folders of the classes are in folders of groups.
        patient: Pattern or file that identifies the patient of each image (see
            `patients_of_files`). If None, the images have no patients.
        side: Height and width in pixels to which images are resized. If None, images keep their
            size.
        root: Folder for downloads, in which images are decoded to a file that is mapped. If None,
            they are read into memory.

    Raises:
        UserError: If the folder or its images are missing, there are folders of splits but no
            `train` or two of one split, or an image cannot be read or has a different size.
    """
    if not path.is_dir():
        raise UserError(f"path: folder '{path}' not found")
    folders = _split_folders(path)
    files = {split: _list_files(folder, grouped) for split, folder in folders.items()}
    all_files = [entry for split in files.values() for entry in split]
    classes = natural_order({c for _, c, _ in all_files})
    groups = natural_order({g for _, _, g in all_files})
    class_folders = [d for folder in folders.values() for d in _class_folders(folder, grouped)]
    empty = tuple(natural_order({d.name for d in class_folders} - set(classes)))
    pattern = "GROUP/CLASS/*" if grouped else "CLASS/*"
    for split, entries in files.items():
        if not entries:
            raise UserError(
                f"path: {folders[split]}: expected images as {pattern} with suffix "
                f"{', '.join(sorted(SUFFIXES))}, found none"
            )
    owners = None
    if patient is not None:
        owners = patients_of_files([file for file, _, _ in all_files], path, patient)
    images = read_image_files([file for file, _, _ in all_files], side, root)
    splits = {}
    begin = 0
    for split, entries in files.items():
        end = begin + len(entries)
        x = images[begin:end]
        y = torch.tensor([classes.index(c) for _, c, _ in entries])
        group = torch.tensor([groups.index(g) for _, _, g in entries]) if grouped else None
        splits[split] = Examples(x, y, group, tuple(groups) if grouped else ())
        if owners is not None:
            splits[split] = with_patients(splits[split], owners[begin:end], "patient")
        begin = end
    return Dataset(
        "image_folder",
        Task("multiclass", len(classes), tuple(classes)),
        splits["train"],
        splits.get("validation"),
        splits.get("test"),
        about=f"images of {path.name}",
        notes=_note_empty(empty),
        empty_classes=empty,
    )


def patients_of_files(files: Sequence[Path], folder: Path, patient: str) -> list[str]:
    r"""Return the patient of each file.

    Args:
        files: The files.
        folder: Folder that contains the files.
        patient: Either a table with the columns `file` (name, or path within the folder) and
            `patient`, such as `patients.csv`; or a regular expression that is found in the name of
            each file, such as `(p\d+)_`, of which the first group is the patient. If the expression
            contains `/`, it is found in the path within the folder.

    Raises:
        UserError: If the table or the expression is invalid, or a file has no patient.
    """
    paths = [file.relative_to(folder).as_posix() for file in files]
    if Path(patient).suffix.lower() in TABLE_SUFFIXES:
        # Imported here because loading pandas is slow.
        from hetero_fl.data.sources.tables.columns import check_columns, parse_names, read_frame

        names = ("file", "patient")
        try:
            frame = read_frame(Path(patient).expanduser(), names)
        except UserError as error:
            raise UserError(f"patient: {str(error).removeprefix('path: ')}") from None
        check_columns(frame, [("patient", name) for name in names], patient)
        columns = (parse_names(frame[name], f"patient: {patient}") for name in names)
        known: dict[str, str] = {}
        for file, owner in zip(*columns, strict=True):
            if known.setdefault(file, owner) != owner:
                raise UserError(
                    f"patient: {patient}: '{file}' has two patients, '{known[file]}' and "
                    f"'{owner}'; name each file once, by its path within the folder"
                )
        found = [known.get(path, known.get(Path(path).name)) for path in paths]
        reason = f"no row of {patient} names this file"
    else:
        try:
            pattern = re.compile(patient)
        except re.error as error:
            raise UserError(f"patient: '{patient}' is no regular expression ({error})") from None
        if not pattern.groups:
            raise UserError(
                f"patient: expected a pattern of file names with a group, such as '(p[0-9]+)_', or "
                f"a table such as patients.csv, got '{patient}'"
            )
        matches = [pattern.search(p if "/" in patient else Path(p).name) for p in paths]
        found = [match and match[1] for match in matches]
        reason = f"the pattern '{patient}' is not found in its name"
    if None in found:
        raise UserError(f"patient: {files[found.index(None)]}: {reason}")
    return [str(owner) for owner in found]


def is_grouped(path: Path, classes: Collection[str]) -> bool:
    """Return whether the folders of known classes are in folders of groups."""
    splits = [folder for folder in _folders(path) if folder.name in FOLDER_SPLITS] or [path]
    outer = [folder for split in splits for folder in _folders(split)]
    inner = {folder.name for each in outer for folder in _folders(each)}
    return inner.intersection(classes) != set() and not any(f.name in classes for f in outer)


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each split, keyed by "train", "validation" and "test".

    A folder without folders of splits is that of the training rows.
    """
    folders = _folders(path)
    names = [folder.name.lower() for folder in folders]
    if not any(name in FOLDER_SPLITS for name in names):
        return {"train": path}
    check_names(names, FOLDER_SPLITS, f"path: {path}: unknown split folder")
    splits: dict[str, Path] = {}
    for folder, name in zip(folders, names, strict=True):
        split = FOLDER_SPLITS[name]
        first = splits.setdefault(split, folder)
        if first != folder:
            raise UserError(
                f"path: {path}: folders '{first.name}' and '{folder.name}' are both the {split} "
                "set; remove one of them"
            )
    if "train" not in splits:
        raise UserError(f"path: {path}: folder 'train' not found, only {', '.join(names)}")
    return splits


def _note_empty(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a remark if class folders have no images."""
    names = format_list(classes, quote=True)
    return (f"found no images of {names}, which are not classes",) if classes else ()


def _folders(path: Path) -> list[Path]:
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _list_files(path: Path, grouped: bool) -> list[tuple[Path, str, str]]:
    """Return the sorted (file, class, group) tuples of all images."""
    return [
        (file, folder.name, folder.parent.name)
        for folder in _class_folders(path, grouped)
        for file in image_files(folder)
    ]


def _class_folders(path: Path, grouped: bool) -> list[Path]:
    """Return the sorted folders of the classes, of each group if the folders are grouped."""
    groups = _folders(path) if grouped else [path]
    return [folder for group in groups for folder in _folders(group)]


# Listed here so that local files can be checked without the medmnist package. ChestMNIST is
# multilabel; the grades of RetinaMNIST are treated as classes.
OUTPUTS = {
    "pathmnist": 9,
    "chestmnist": 14,
    "dermamnist": 7,
    "octmnist": 4,
    "pneumoniamnist": 2,
    "retinamnist": 5,
    "breastmnist": 2,
    "bloodmnist": 8,
    "tissuemnist": 8,
    "organamnist": 11,
    "organcmnist": 11,
    "organsmnist": 11,
}
"""Number of outputs of the 2-D sets of MedMNIST v2 (Yang et al., Scientific Data 2023)."""


SIDES = (28, 64, 128, 224)
"""Side lengths in pixels of the images of MedMNIST+, each of which is a separate file."""


def _medmnist_loader(name: str, task: Task) -> Callable[[SourceConfig, Path], Dataset]:
    def load(config: SourceConfig, root: Path) -> Dataset:
        if config.size not in (None, *SIDES):
            raise UserError(
                f"size: must be one of {', '.join(map(str, SIDES))} for {name}, got {config.size}; "
                "preprocess.resize changes the size of images"
            )
        # `load_source` reports that the package is missing.
        import medmnist

        info = medmnist.INFO[name]
        file = medmnist_file(name, config.size)
        suffix = file.removeprefix(name).removesuffix(".npz")
        from torchvision.datasets.utils import download_url

        with download_folder(name, root) as folder:
            # A file with this checksum is not downloaded again.
            download_url(info[f"url{suffix}"], str(folder), file, info[f"MD5{suffix}"])
        names = tuple(info["label"][str(i)] for i in range(task.outputs))
        dataset = read_npz(root / file, name, replace(task, names=names))
        dataset.about = f"{info['python_class']} (MedMNIST v2), {info['license']}"
        return dataset

    return load


for _name, _outputs in OUTPUTS.items():
    _task = Task("multilabel" if _name == "chestmnist" else "multiclass", _outputs)
    register_source(_name, task=_task, keys=("size",))(_medmnist_loader(_name, _task))


FASHION = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Class of torchvision, task, and description of each source.
SETS = {
    "mnist": (
        "MNIST",
        Task("multiclass", 10),
        "handwritten digits, 28x28 grayscale (LeCun et al., 1998)",
    ),
    "fashion_mnist": (
        "FashionMNIST",
        Task("multiclass", 10, FASHION),
        "clothes, 28x28 grayscale (Xiao et al., 2017)",
    ),
    "cifar10": (
        "CIFAR10",
        Task("multiclass", 10, CIFAR10),
        "photographs, 32x32 RGB (Krizhevsky, 2009)",
    ),
    "cifar100": ("CIFAR100", Task("multiclass", 100), "photographs, 32x32 RGB (Krizhevsky, 2009)"),
}


def _torchvision_loader(
    name: str, class_name: str, task: Task, about: str
) -> Callable[[SourceConfig, Path], Dataset]:
    def load(_config: SourceConfig, root: Path) -> Dataset:
        import torchvision

        with download_folder(name, root) as folder:
            make = getattr(torchvision.datasets, class_name)
            train, test = (
                _examples(make(folder, train=part, download=True)) for part in (True, False)
            )
        return Dataset(name, task, train, test=test, about=about)

    return load


def _examples(dataset: Any) -> Examples:
    """Convert a torchvision data set of shape `[N, H, W]` (MNIST) or `[N, H, W, C]` (CIFAR)."""
    x: Tensor = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.movedim(-1, 1)
    return Examples(x.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))


for _name, (_class_name, _task, _about) in SETS.items():
    register_source(_name, task=_task)(_torchvision_loader(_name, _class_name, _task, _about))

"""Folders of images: `path/CLASS/*` or `path/{train,val,test}/CLASS/*`; with `data.group`, `GROUP/CLASS` for CLASS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.registry import source
from hetero_fl.errors import UserError
from hetero_fl.state import in_order
from hetero_fl.task import Task

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@source("image_folder", keys=("path", "group", "size"))
def image_folder(config: SourceConfig, root: Path) -> Dataset:
    """The images below `config.path`, a folder for each class. Any text in `config.group` (what the level is: "site")
    says that there is a folder for each group above those of the classes; `config.size` scales every image as it is read.

    Raises:
        UserError: no folder, no images, a split without `train`, an image that cannot be read or has another size.
    """
    return read_image_folder(Path(str(config.path)).expanduser(), grouped=config.group is not None, side=config.size)


def read_image_folder(path: Path, *, grouped: bool = False, side: int | None = None) -> Dataset:
    """The same from Python; `side` scales every image to side x side pixels as it is read."""
    if not path.is_dir():
        raise UserError(f"path: {path}: no such folder")
    parts = {SPLITS[d.name]: d for d in _folders(path) if d.name in SPLITS}
    if parts and len(parts) < len(_folders(path)):
        other = next(d.name for d in _folders(path) if d.name not in SPLITS)
        raise UserError(f"path: {path}: found folder '{other}' beside those of splits; choose from {', '.join(SPLITS)}")
    if parts and "train" not in parts:
        raise UserError(f"path: {path}: no folder 'train' beside {', '.join(d.name for d in parts.values())}")
    files = {split: _by_class(d, grouped) for split, d in (parts or {"train": path}).items()}
    every = [entry for split in files.values() for entry in split]
    classes, groups = in_order({c for _, c, _ in every}), in_order({g for _, _, g in every})
    wanted = "GROUP/CLASS/image" if grouped else "CLASS/image"
    for split, entries in files.items():
        if not entries:
            raise UserError(f"path: {parts.get(split, path)}: no images as {wanted} ({' '.join(sorted(SUFFIXES))})")
    x = read_image_files([file for file, _, _ in every], side).split([len(entries) for entries in files.values()])
    splits = {}
    for (split, entries), images in zip(files.items(), x, strict=True):
        y = torch.tensor([classes.index(c) for _, c, _ in entries])
        group = torch.tensor([groups.index(g) for _, _, g in entries]) if grouped else None
        splits[split] = Examples(images, y, group, tuple(groups) if grouped else ())
    task = Task("multiclass", len(classes), tuple(classes))
    about = f"images of {path.name}"
    return Dataset("image_folder", task, splits["train"], splits.get("validation"), splits.get("test"), about=about)


def read_image_files(files: Sequence[Path], side: int | None = None) -> Tensor:
    """Images as uint8 `[N, C, H, W]`: grey if all are, else RGB.

    Raises:
        UserError: a file is no image, or its size differs from the first one's.
    """
    images = [_read(file, side) for file in files]
    colour = any(image.ndim == 3 for image in images)
    for file, image in zip(files, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            sizes = " but ".join(f"{s[1]}x{s[0]}" for s in (image.shape, images[0].shape))
            raise UserError(
                f"path: {file} has {sizes} pixels in {files[0].name}; all images must have one size: set data.size"
            )
    if colour:
        images = [image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2) for image in images]
        return torch.from_numpy(np.moveaxis(np.stack(images), -1, 1).copy())
    return torch.from_numpy(np.stack(images)[:, None])


def image_files(path: Path) -> list[Path]:
    """All images below a folder, sorted by name."""
    return sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _folders(path: Path) -> list[Path]:
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _by_class(path: Path, grouped: bool) -> list[tuple[Path, str, str]]:
    """(file, class, group) of every image, sorted."""
    groups = _folders(path) if grouped else [path]
    return [(f, d.name, group.name) for group in groups for d in _folders(group) for f in image_files(d)]


def _read(file: Path, side: int | None) -> np.ndarray:
    """uint8, `(H, W)` if grey, else `(H, W, 3)`."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16-bit scans ("I" in older Pillow): keep the upper 8 bits
                deep = np.asarray(image)
                if deep.min() < 0 or deep.max() > 0xFFFF:
                    raise ValueError(f"pixels from {deep.min()} to {deep.max()}; save it with 8 or 16 bits")
                image = Image.fromarray((deep >> 8).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("pixels of mode F have no fixed range; save it with 8 or 16 bits")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR) if side else image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"path: {file}: not a readable image ({type(error).__name__}: {error})") from error

"""The source `hf:NAME`, which reads a data set of the Hugging Face hub or a local folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetero_fl.config.data import SourceConfig
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.registry import HUB_PREFIX, register_source
from hetero_fl.data.sources.files import (
    describe_cause,
    download_folder,
    quiet_unless_terminal,
)
from hetero_fl.data.sources.images import FOLDER_SPLITS
from hetero_fl.utils.code_permission import iterate_strings
from hetero_fl.utils.errors import UserError, one_line, suggest_file
from hetero_fl.utils.serialization import read_json
from hetero_fl.utils.text import format_list

SPLIT_OF = {**FOLDER_SPLITS, "dev": "validation"}
"""Split of a data set, keyed by the name of the split in a `DatasetDict`."""


@register_source(
    "hf", keys=("columns", "label", "group", "patient", "task", "size", "text", "categories")
)
def hugging_face(config: SourceConfig, root: Path, labeled: bool = True) -> Dataset:
    """Load a data set of the Hugging Face hub (`hf:NAME`, `hf:NAME:SUBSET`) or a folder.

    A folder was written by `save_to_disk` of `datasets`, or contains Parquet, JSON, CSV or image
    files that `load_dataset` reads. The splits `train`, `validation` and `test` are used. Without
    labels, only the training rows are read.
    """
    splits, notes = _load_splits(config, root)
    if not labeled:
        splits = {"train": splits["train"]}
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.hugging_face.conversion import read_hub_splits

    dataset = read_hub_splits(splits, f"name: {config.name}", config, labeled=labeled)
    return replace(dataset, name=_title(config.name), source="", notes=(*notes, *dataset.notes))


def _title(name: str) -> str:
    reference = name.removeprefix(HUB_PREFIX)
    path = Path(reference).expanduser()
    return f"{HUB_PREFIX}{path.resolve().name}" if path.exists() else name


def _load_splits(config: SourceConfig, root: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the splits of a data set of the hub or in a folder, and remarks."""
    name = config.name
    reference = name.removeprefix(HUB_PREFIX)
    path = Path(reference).expanduser()
    if not reference or reference == name:
        raise UserError(f"name: expected hf:NAME of a data set or hf:FOLDER, got '{name}'")
    import datasets

    if path.is_file():
        raise UserError(f"name: {name}: expected a folder, got a file; give its folder")
    if path.is_dir():
        found = _load_folder(datasets, path, config, root)
    elif reference.startswith((".", "~", os.sep)) or reference.count("/") > 1:
        raise UserError(f"name: {name}: folder not found{suggest_file(path)}")
    else:
        repository, _, subset = reference.partition(":")
        advice = "check the name, or give a folder that save_to_disk wrote"
        with download_folder(name, root, advice), _silent_logs():
            found = datasets.load_dataset(repository, subset or None)
    splits, notes = _by_split(found, name)
    _check_files(_image_files(splits), path, config, root)
    return splits, notes


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Suppress the logs of the libraries, such as a line for each failed attempt."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_folder(datasets: Any, path: Path, config: SourceConfig, root: Path) -> Any:
    try:
        with quiet_unless_terminal(), _silent_logs():
            if lists := [*path.rglob("state.json"), *path.glob("dataset_dict.json")]:
                trees = ((f.parent, read_json(f.read_bytes(), bounded=False)) for f in lists)
                names = (str(f / name) for f, tree in trees for _, name in iterate_strings(tree))
                _check_files(names, path, config, root)
                return datasets.load_from_disk(str(path))
            cache = str(root / "huggingface")
            builder = datasets.load_dataset_builder(str(path), cache_dir=cache)
            # The card of a data set may name files.
            named = (builder.config.data_files or {}).values()
            _check_files((file for files in named for file in files), path, config, root)
            builder.download_and_prepare()
            return builder.as_dataset()
    except UserError:
        raise
    # The readers of the many formats have no common base class of exceptions.
    except Exception as error:
        raise UserError(
            f"name: {config.name}: datasets cannot read the folder ({describe_cause(error)})"
        ) from error


def _image_files(splits: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that data sets name in their columns of images."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.hugging_face.conversion import feature_kind

    for part in splits.values():
        images = [name for name, kind in part.features.items() if feature_kind(kind) == "image"]
        for chunk in (chunk for name in images for chunk in part.data.column(name).chunks):
            files = chunk.field("path").filter(chunk.field("bytes").is_null())
            yield from filter(None, files.to_pylist())


def _check_files(files: Iterable[str], path: Path, config: SourceConfig, root: Path) -> None:
    """Check that files are in the folder of a data set or of downloads, unless it may be left.

    Args:
        files: The files, or files in archives, as `zip://NAME::ARCHIVE`.
        path: Folder of the data set, which does not exist for a data set of the hub.
        config: Source configuration.
        root: Folder for downloads.
    """
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [path, root / "huggingface", Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    allowed = [folder.resolve() for folder in folders]
    for file in files if not config.follow_links else ():
        member, _, place = file.rpartition("::")
        # A file of a hub cache is a link, so only its folder is resolved.
        folder = Path(place).parent.resolve()
        is_inside = any(map(folder.is_relative_to, allowed))
        if not is_inside or "://" in place or "::" in member:
            raise UserError(
                f"name: {config.name}: expected files in the folder, got '{one_line(file, 80)}'"
            )


def _by_split(found: Any, name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the parts of a data set, keyed by "train", "validation" and "test", and remarks."""
    if not isinstance(found, Mapping):
        found = {"train": found}
    splits: dict[str, Any] = {}
    unused = []
    for title, part in found.items():
        split = SPLIT_OF.get(str(title).lower(), "")
        if split and split not in splits and len(part):
            splits[split] = part
        else:
            unused.append(str(title))
    notes = [f"{name}: splits {format_list(unused, quote=True)} are not used"] if unused else []
    if "train" not in splits:
        if len(found) == 1 and len(only := next(iter(found.values()))):
            return {"train": only}, [f"{name}: split '{next(iter(found))}' is read as train"]
        raise UserError(
            f"name: {name}: expected rows in a split 'train', got "
            f"{format_list(map(str, found), quote=True) or 'no splits'}"
        )
    return splits, notes

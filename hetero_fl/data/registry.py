"""Sources by name: the registry, and the one function that loads any of them and checks what it got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import TABLES, read_npz
from hetero_fl.data.dataset import Dataset, check_examples
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, suggest_file, suggest_or_list
from hetero_fl.utils.registry import call_reference

Key = Literal[
    "path", "label", "group", "patient", "task", "categories", "size", "series", "text", "windows"
]
SourceFunction = Callable[[SourceConfig, Path], Dataset]
"""(configuration, folder for downloads) to a data set. A UserError that it raises begins with the key it is about."""


@dataclass(frozen=True)
class _Source:
    load: SourceFunction
    task: Task | None
    keys: tuple[str, ...]
    generates: bool


_sources: dict[str, _Source] = {}


def register_source(
    name: str, *, task: Task | None = None, keys: tuple[Key, ...] = (), generates: bool = False
) -> Callable[[SourceFunction], SourceFunction]:
    """Register a function as the source of that name.

    Args:
        task: what is learned, where it is the same for every file in this source's place (checked when `path` is set).
        keys: the keys of `SourceConfig` besides `name` that the function reads itself; `path` is then required.
        generates: the function makes rows of its own where `path` is not set, and reads `.npz` files itself.
    """

    def register(load: SourceFunction) -> SourceFunction:
        if name in _sources:
            raise ValueError(f"there is a source '{name}' already")
        _sources[name] = _Source(load, task, keys, generates)
        return load

    return register


def list_sources() -> list[str]:
    """Names of all sources, sorted; `python:package.module:Name` and `medmnist:NAME` work besides."""
    return sorted(_sources)


def reads_key(name: object, key: Key) -> bool:
    """Whether the source of that name reads that key of the configuration itself."""
    return name in _sources and key in _sources[str(name)].keys


def needs_path(name: str) -> bool:
    """Return whether the source of that name reads a local file or folder, and has nothing without one."""
    return reads_key(name, "path") and not _sources[name].generates


def check_source(config: SourceConfig, where: str = "data") -> None:
    """Raises UserError for a name that is none, or a path at which there is nothing; nothing is read."""
    if not config.name.startswith(OWN):
        _find_source(config, where)
    if config.path is not None and not Path(config.path).expanduser().exists():
        raise UserError(
            f"{where}.path: {config.path}: no such file or folder{suggest_file(Path(config.path).expanduser())}"
        )


def load_source(
    config: SourceConfig, root: Path, where: str = "data", missing: bool = False
) -> Dataset:
    """Load a source, or the .npz file (MedMNIST layout) that `config.path` puts in its place, and check every row.

    Args:
        root: the folder for downloads.
        where: the section of the configuration that `config` is, for messages.
        missing: whether values may be missing (NaN); somebody's view then has to say what becomes of them.

    Raises:
        UserError: unknown name, missing or unfitting key, missing or malformed data, failed download.
    """
    if config.name.startswith(OWN):
        return _load_user_source(config, root, where, missing)
    name, entry = _find_source(config, where)
    npz = config.path is not None and config.path.endswith(".npz") and not entry.generates
    local = npz or (config.path is not None and "path" not in entry.keys)
    takes = {
        *entry.keys,
        *(("patient",) if local else ()),
        *(("task",) if local and entry.task is None else ()),
    }
    for key in (
        "label",
        "group",
        "patient",
        "task",
        "categories",
        "size",
        "series",
        "text",
        "windows",
    ):
        if getattr(config, key) is not None and key not in takes:
            raise UserError(
                f"{where}.{key}: found '{getattr(config, key)}', but {name} takes none; leave it out"
            )
    file = Path(config.path or "").expanduser()
    if (local or name == "npz") and file.suffix.lower() in TABLES and file.is_file():
        raise UserError(
            f"{where}.path: {config.path}: no .npz file; `{where}.name: table` reads it"
        )
    try:
        if config.path is not None and local:
            dataset = read_npz(file, name, entry.task, config.task, config.patient)
        elif config.path is None and "path" in entry.keys and not entry.generates:
            raise UserError(f"path: missing; {name} reads a local file or folder")
        else:
            dataset = entry.load(config, root)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    if dataset.min_gap and not missing:
        raise UserError(
            f"{where}.{dataset.min_gap}; fill or drop them, or set preprocess.missing: indicate"
        )
    _check(dataset, f"{where}.name: {name}", missing)
    return dataset


def _find_source(config: SourceConfig, where: str) -> tuple[str, _Source]:
    name = config.name.removeprefix("medmnist:")
    if name not in _sources:
        if reader := _reader_for_suffix(config.name):
            remedy = f"set {where}.name: {reader} and {where}.path: {config.name}"
            raise UserError(
                f"{where}.name: found '{config.name}', a {'folder' if Path(name).is_dir() else 'file'}; {remedy}"
            )
        kind = f".{name.lower().removeprefix('.')}"
        hint = f"; did you mean 'table'? It reads {kind} files" if kind in TABLES else ""
        hint = hint or suggest_or_list(name, _sources, "hetero_fl.data.list_sources()")
        raise UserError(f"{where}.name: found '{config.name}'{hint}")
    return name, _sources[name]


def _reader_for_suffix(name: str) -> str:
    """Return the source that reads a file or folder which was given as a source's name; empty if it is neither."""
    path = Path(name)
    if path.is_dir():
        return "image_folder"
    suffix = path.suffix.lower()
    return "table" if suffix in TABLES else {".npz": "npz", ".txt": "text"}.get(suffix, "")


def _load_user_source(config: SourceConfig, root: Path, where: str, missing: bool) -> Dataset:
    """A user's own function in place of a source."""
    where = f"{where}.name"
    dataset = call_reference(config.name, where, "config, root", (config, root), Dataset)
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{where}: {config.name} returned {type(dataset).__name__}, not a hetero_fl.data.Dataset"
        )
    _check(dataset, f"{where}: {config.name}", missing)
    return dataset


def _check(dataset: Dataset, where: str, missing: bool) -> None:
    for split, examples in dataset.splits().items():
        check_examples(
            examples,
            dataset.task,
            f"{where}: {split}",
            missing=missing,
            vocabulary=dataset.vocabulary,
        )
        if examples.x.shape[1:] != dataset.train.x.shape[1:]:
            found = tuple(examples.x.shape[1:])
            expected = tuple(dataset.train.x.shape[1:])
            raise UserError(
                f"{where}: {split}: examples of shape {found}, but those of train have {expected}"
            )

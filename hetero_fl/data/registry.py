"""Registry of data sources, and `load_source`, which loads and checks a data set."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from hetero_fl.config.data import (
    DataConfig,
    MoviesConfig,
    SharedSettings,
    SourceConfig,
    registered_source_names,
)
from hetero_fl.config.describe import describe_error
from hetero_fl.core.task import Task
from hetero_fl.data.checks import check_examples, check_inputs
from hetero_fl.data.dataset import Dataset
from hetero_fl.data.sources.npz_files import check_image_size, medmnist_file, read_npz
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, describe_removed, suggest_file, suggest_or_list
from hetero_fl.utils.extras import describe_missing_package
from hetero_fl.utils.objects import OBJECT_PREFIX, find_object
from hetero_fl.utils.registry import Registry
from hetero_fl.utils.serialization import check_entries
from model_zoo.generators import own_generators
from model_zoo.plugins import PluginError

Key = Literal[
    "path",
    "file",
    "blocks",
    "time",
    "span",
    "columns",
    "label",
    "group",
    "patient",
    "task",
    "categories",
    "read",
    "size",
    "stream",
    "splits",
    "series",
    "speech",
    "movies",
    "driving",
    "text",
    "windows",
    "follow_links",
]
OPTIONAL_KEYS: tuple[Key, ...] = tuple(key for key in get_args(Key) if key != "path")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "read": (".csv", ".tsv"),
    "windows": (".csv", ".tsv", ".parquet"),
}
"""Suffixes of the files to which a key applies, for keys that do not apply to all files."""
SHIPPED = (
    "activity",
    "bank_fraud",
    "chest_xray",
    "digits",
    "driving",
    "driving_public",
    "movies",
    "movies_public",
    "phrases",
    "phrases_public",
    "speech",
    "speech_public",
    "synthetic_images",
    "synthetic_table",
    "traffic",
    "xray_genes",
)
"""Sources whose rows come with the package or are generated, unless `path` is set."""
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
"""Suffixes of files that the source `table` reads."""
MEDMNIST_PREFIX = "medmnist:"
HUB_PREFIX = "hf:"
"""Prefix of the names of Hugging Face data sets, which the source `hf` reads."""
REMOVED = {
    "zarr": "npz, with a folder of .npy files such as train_images.npy as path, which are "
    "memory-mapped with stream=true"
}
"""What to use instead of the sources of earlier versions, keyed by former name."""
PUBLIC_USER_KEYS = ("min_rating", "validation_users", "test_users", "public_users", "seed")
"""Keys of the section `movies` on which the users depend whose rows are public."""
Entry = TypeVar("Entry")
SourceFunction = Callable[..., Dataset]
"""A function that takes a source configuration and the download folder and returns a data set.

If the function raises a UserError, the message begins with the configuration key, such as `path: `.
"""


class Source(BaseModel):
    """Base class of data sources, whose fields are keys of the section `data`.

    Attributes:
        documented_task: Learning task of the source, against which files in `path` are checked. If
            None, the data determine the task.
        keys: Keys of `data` that the source reads, besides its fields.
        default_path: Simulated data in a file or folder, which the source reads if `path` is not
            set. Such a source also reads `.npz` files itself.
        folder_files: Patterns of files that only the folders contain that the source reads from
            `path`, such as `train/*.npz`. If empty, the source may read files.
        is_function: Whether the class was made of a function of `SourceConfig`.

    Example:
        >>> import torch
        >>> from hetero_fl.data import Source, from_arrays, register_source
        >>> @register_source("steps")
        ... class Steps(Source):
        ...     size: int = 8
        ...
        ...     def read(self, root, labeled=True):
        ...         return from_arrays(torch.eye(self.size), torch.arange(self.size) % 2)
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    documented_task: ClassVar[Task | None] = None
    keys: ClassVar[tuple[str, ...]] = ()
    default_path: ClassVar[Path | None] = None
    folder_files: ClassVar[tuple[str, ...]] = ()
    is_function: ClassVar[bool] = False
    _config: SourceConfig = PrivateAttr(default_factory=SourceConfig)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        taken = DataConfig.model_fields.keys() - {*get_args(Key)}
        if names := taken & cls.model_fields.keys():
            name = min(names)
            raise TypeError(
                f"{cls.__name__}.{name}: data.{name} is a setting of every source; rename the field"
            )

    @classmethod
    def all_keys(cls) -> set[str]:
        """Return the keys of `data` that the source reads."""
        return {*cls.model_fields, *cls.keys}

    @classmethod
    def requires_path(cls) -> bool:
        """Return whether the source has no data unless `path` is set."""
        field = cls.model_fields.get("path")
        is_required = "path" in cls.keys if field is None else field.is_required()
        return is_required and cls.default_path is None

    @classmethod
    def from_config(cls, config: SourceConfig) -> Source:
        """Create a source with the settings of a configuration.

        Raises:
            UserError: If a setting is missing or invalid.
        """
        values = {key: getattr(config, key) for key in cls.model_fields.keys() & {*get_args(Key)}}
        settings = {key: value for key, value in values.items() if value is not None}
        settings |= config.arguments or {}
        try:
            source = cls.model_validate(settings)
        except ValidationError as error:
            model = SourceConfig if cls.is_function else cls
            raise UserError(describe_error(error, settings, model)) from None
        source._config = config
        return source

    @abstractmethod
    def read(self, root: Path, labeled: bool = True) -> Dataset:
        """Return the data set.

        Args:
            root: Folder for downloads.
            labeled: Whether the labels are used.
        """


def source_of_function(
    function: SourceFunction,
    *,
    task: Task | None = None,
    keys: tuple[Key, ...] = (),
    default_path: Path | None = None,
    folder_files: tuple[str, ...] = (),
) -> type[Source]:
    """Return the class of a source that is a function of `SourceConfig` and the download folder.

    Args:
        function: The function.
        task: See `Source.documented_task`.
        keys: Keys that the function reads.
        default_path: See `Source`.
        folder_files: See `Source`.
    """
    takes_labeled = "labeled" in inspect.signature(function).parameters

    class FunctionSource(Source):
        __module__ = str(function.__module__)

        def read(self, root: Path, labeled: bool = True) -> Dataset:
            if labeled or not takes_labeled:
                return function(self._config, root)
            return function(self._config, root, labeled=False)

    FunctionSource.is_function = True
    FunctionSource.documented_task = task
    FunctionSource.keys = keys
    FunctionSource.default_path = default_path
    FunctionSource.folder_files = folder_files
    return FunctionSource


sources: Registry[type[Source]] = Registry(
    "data source",
    lambda: Source,
    all_of="hetero_fl.data.list_sources()",
    plugins="hetero_fl.sources",
    adapter=source_of_function,
    takes="config, root",
    names=registered_source_names,
)


def register_source(
    name: str,
    *,
    task: Task | None = None,
    keys: tuple[Key, ...] = (),
    default_path: Path | None = None,
    folder_files: tuple[str, ...] = (),
) -> Callable[[Entry], Entry]:
    """Register a data source for `data.name`.

    Args:
        name: Name of the source.
        task: Learning task of a function, against which files in `path` are checked. If None, the
            data determine the task.
        keys: Keys of `SourceConfig`, besides `name`, that a function reads. The key `path` is
            required unless `default_path` is set.
        default_path: Simulated data in a file or folder, which a function reads if `path` is not
            set. Such a function also reads `.npz` files itself.
        folder_files: Patterns of files that only the folders contain that a function reads from
            `path`, such as `train/*.npz`. If empty, the function may read files.

    Returns:
        A decorator that registers the function, or the subclass of `Source`, and returns it
        unchanged.

    Raises:
        ValueError: If the name is that of a built-in source.

    Example:
        >>> import torch
        >>> from hetero_fl.data import from_arrays, list_sources, register_source
        >>> @register_source("coin_flips")
        ... def coin_flips(config, root):
        ...     return from_arrays(torch.randn(100, 3), torch.arange(100) % 2, name="coin_flips")
        >>> "coin_flips" in list_sources()
        True
    """

    def register(entry: Entry) -> Entry:
        found: Any = entry
        if not isinstance(entry, type):
            found = source_of_function(
                found, task=task, keys=keys, default_path=default_path, folder_files=folder_files
            )
        sources(name)(found)
        return entry

    return register


def list_sources() -> list[str]:
    """Return the sorted names of all registered sources.

    Sources of plug-ins are included. `data.name` also accepts `python:package.module:Name` and
    `medmnist:NAME`. The source `hf` is selected by `hf:NAME` or `hf:FOLDER`.

    Example:
        >>> from hetero_fl.data import list_sources
        >>> "chest_xray" in list_sources()
        True
    """
    return sorted(sources)


def _known(name: object) -> type[Source] | None:
    """Return the registered source that reads a data set, without importing plug-ins."""
    if str(name).startswith((CODE_PREFIX, OBJECT_PREFIX)):
        return None
    return sources.get_loaded(_registered_name(str(name)))


def reads_key(name: object, key: Key) -> bool:
    """Return whether a registered source has this name and reads a configuration key."""
    found = _known(name)
    return found is not None and key in found.all_keys()


def has_documented_classes(name: object, task: Task) -> bool:
    """Return whether the classes of a task are those that a registered source documents.

    Integers in files of the same data are then class numbers, even if the classes have names.

    Args:
        name: Name of the source of the data.
        task: Task of the data.
    """
    found = _known(name)
    known = None if found is None else found.documented_task
    return known is not None and (known.kind, known.names or task.names, known.outputs) == (
        task.kind,
        task.names,
        task.outputs,
    )


def value_for_file(config: SourceConfig, key: str, value: Any) -> Any:
    """Return a value of a key without the settings that do not apply to the file of a source.

    Args:
        config: Source configuration.
        key: Key of `SourceConfig`.
        value: Value of the key, which `config` may lack.

    Returns:
        The value, a section in which some settings have their default values, or None.
    """
    suffix = file_suffix(config)
    if suffix in (*TABLE_SUFFIXES, ".npz") and suffix not in SUFFIXES.get(key, (suffix,)):
        return None
    if suffix == ".npz" and isinstance(value, SharedSettings):
        return value.without(value.not_in_arrays)
    return value


def file_suffix(config: SourceConfig) -> str:
    """Return the suffix, in lower case, of the file that a source reads, or an empty string."""
    entry = _known(config.name)
    path = config.path or (entry and entry.default_path) or ""
    return Path(path).suffix.lower()


def is_shipped(config: SourceConfig) -> bool:
    """Return whether a source reads no files or downloads except those of the package."""
    reads_text = config.text is not None and config.text.public is not None
    return config.name in SHIPPED and config.path is None and not reads_text


def needs_path(name: str) -> bool:
    """Return whether a registered source has this name and requires a local file or folder."""
    if name not in sources and _known(name) is None:
        return False
    return (_known(name) or sources[name]).requires_path()


def reads_own_npz(name: str) -> bool:
    """Return whether a registered source has this name and its own layout of `.npz` files."""
    entry = _known(name)
    return (
        entry is not None
        and "path" in entry.all_keys()
        and (entry.default_path is not None or bool(entry.folder_files))
    )


def _registered_name(name: str) -> str:
    """Return the name of the source that reads a data set, without the name of the data set."""
    if name.startswith(HUB_PREFIX):
        return HUB_PREFIX.removesuffix(":")
    if name.startswith(MEDMNIST_PREFIX):
        # Imported here because sources import this module.
        from hetero_fl.data.sources.images import OUTPUTS

        data_set = name.removeprefix(MEDMNIST_PREFIX)
        return name if data_set in sources and data_set not in OUTPUTS else data_set
    return name


def check_source(config: SourceConfig, where: str = "data") -> None:
    """Check that a source and its path exist, without reading data.

    The function of a `python:` source is not checked.

    Args:
        config: Source configuration.
        where: Configuration section, for error messages.

    Raises:
        UserError: If the name is unknown or the path does not exist.

    Example:
        >>> from hetero_fl.config.data import SourceConfig
        >>> from hetero_fl.data import check_source
        >>> check_source(SourceConfig(name="digit"))
        Traceback (most recent call last):
        hetero_fl.utils.errors.UserError: data.name: unknown source 'digit'; did you mean 'digits'?
    """
    if config.name.startswith(OBJECT_PREFIX):
        if config.name != OBJECT_PREFIX:
            find_object(config.name, f"{where}.name")
    elif not config.name.startswith(CODE_PREFIX):
        _find_source(config, where)
    if config.path is not None:
        path = Path(config.path).expanduser()
        if not path.exists():
            raise UserError(
                f"{where}.path: file or folder '{config.path}' not found{suggest_file(path)}"
            )


@own_generators()
def load_source(
    config: SourceConfig,
    root: Path,
    where: str = "data",
    missing: bool = False,
    labeled: bool = True,
) -> Dataset:
    """Load a data set and check every row.

    If `config.path` is a `.npz` file in the MedMNIST layout, the file replaces the data of the
    source, unless the source reads such files itself. For a MedMNIST set, `config.path` may also be
    a folder with the files of several sizes, such as `pathmnist_64.npz`. A data set that the
    program has passed as an object (`object:NAME`) is returned without checks.

    Args:
        config: Source configuration.
        root: Folder for downloads.
        where: Configuration section, for error messages.
        missing: Whether values may be missing (NaN).
        labeled: Whether labels are needed. If False, sources with a parameter `labeled` read files
            without labels, as examples without targets. The files may contain labels.

    Raises:
        UserError: If the name is unknown, a key is missing or does not apply to the source, the
            data is missing or malformed, or a download fails.

    Example:
        >>> from pathlib import Path
        >>> from hetero_fl.config.data import SourceConfig
        >>> from hetero_fl.data import load_source
        >>> dataset = load_source(SourceConfig(name="synthetic_table"), Path("downloads"))
        >>> dataset.train.x.shape, dataset.task.kind
        (torch.Size([1200, 10]), 'multiclass')
    """
    if config.name.startswith(OBJECT_PREFIX):
        check_unread_keys(config, where)
        registered: Dataset = find_object(config.name, f"{where}.name")
        return registered
    if config.name.startswith(CODE_PREFIX):
        return _load_own(config, root, where, missing, labeled)
    name, entry = _find_source(config, where)
    npz = file_suffix(config) == ".npz" and not reads_own_npz(name)
    local = config.path is not None and (npz or "path" not in entry.all_keys())
    _check_keys(config, name, entry, local, where)
    file = Path(config.path or "").expanduser()
    if (local or name == "npz") and file.suffix.lower() in TABLE_SUFFIXES and file.is_file():
        raise UserError(
            f"{where}.path: expected a .npz file, got '{config.path}'; to read a table set "
            f"{where}.name=table"
        )
    try:
        check_links(config, where)
        if config.path is not None and local:
            dataset = _read_local_npz(config, root, name, entry, labeled)
        else:
            dataset = _load_registered(config, root, name, entry, labeled)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    except ModuleNotFoundError as error:
        description = describe_missing_package(error)
        if description is None:
            raise
        raise UserError(f"{where}.name: {name}: {description}") from error
    if dataset.first_missing and not missing:
        raise UserError(
            f"{where}.{dataset.first_missing}; fill or remove missing values, or set "
            "clients.defaults.preprocess.missing=indicate"
        )
    _check(dataset, f"{where}.name: {name}", missing, labeled)
    return dataset


def load_section(section: Mapping[str, Any]) -> Dataset:
    """Load the data set that a section `data` of a program describes (see `load_source`)."""
    try:
        config = SourceConfig.model_validate(section)
    except ValidationError as error:
        problem = describe_error(error, section, SourceConfig, ["data"])
        raise UserError(problem) from None
    return load_source(config, Path(DataConfig().root).expanduser())


def _load_registered(
    config: SourceConfig, root: Path, name: str, entry: type[Source], labeled: bool
) -> Dataset:
    """Read a registered source, or the simulated data that it has."""
    is_simulated = config.path is None and entry.default_path is not None
    if is_simulated:
        config = config.model_copy(update={"path": str(entry.default_path)})
    elif config.path is None and entry.requires_path():
        raise UserError(f"path: missing; {name} reads a local file or folder")
    found = entry.from_config(config).read(root, labeled)
    dataset = _require_dataset(found, f"name: {config.name}")
    dataset.simulated |= is_simulated
    return dataset


def _load_own(
    config: SourceConfig, root: Path, where: str, missing: bool, labeled: bool
) -> Dataset:
    """Load a data set by a function or class of the user that a reference names."""
    place = f"{where}.name: {config.name}"
    try:
        own = sources[config.name]
    except UserError as error:
        raise UserError(f"{where}.name: {str(error).removeprefix('data source: ')}") from error
    # The keys that a function reads are not known.
    if not own.is_function:
        _check_accepted(config, config.name, own.all_keys(), where)
    try:
        created = own.from_config(config)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    try:
        found = created.read(root, labeled)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    # A user's function may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise UserError(f"{place} raised {type(error).__name__}: {error}") from error
    dataset = _require_dataset(found, place)
    _check(dataset, place, missing, labeled)
    return dataset


def check_links(config: SourceConfig, where: str) -> None:
    """Check that the entries of a folder stay in the folder, unless `follow_links` is set.

    Args:
        config: Source configuration. A source that reads no folder is not checked.
        where: Configuration section, for the advice in error messages.

    Raises:
        UserError: If a link leaves the folder, or an entry is a pipe or a device.
    """
    folder = config.path or config.name.partition(HUB_PREFIX)[2]
    if folder and not config.follow_links and Path(folder).expanduser().is_dir():
        key = "name: " if config.path is None else "path: "
        check_entries(Path(folder).expanduser(), key, f"; set {where}.follow_links=true to read it")


def check_unread_keys(config: SourceConfig, where: str) -> None:
    """Reject all keys of a source but the name, because a program passes the data.

    Raises:
        UserError: If a key is set.
    """
    for key in get_args(Key):
        if getattr(config, key) is not None:
            raise UserError(
                f"{where}.{key}: has no effect, because the program passes the data; remove it"
            )


def _read_local_npz(
    config: SourceConfig, root: Path, name: str, entry: type[Source], labeled: bool
) -> Dataset:
    """Read the file that replaces the data of a source."""
    file = Path(config.path or "").expanduser()
    # A folder of MedMNIST has a file for each size.
    by_size = "size" in entry.all_keys()
    file = file / medmnist_file(name, config.size) if by_size and file.is_dir() else file
    dataset = read_npz(
        file,
        name,
        entry.documented_task if labeled else None,
        config.task,
        config.patient,
        root=root if config.stream else None,
        labeled=labeled,
    )
    if by_size and config.size is not None:
        check_image_size(dataset.train.x, config.size, file, name)
    return dataset


def _require_dataset(found: object, where: str) -> Dataset:
    """Return the result of a source, which must be a data set."""
    if not isinstance(found, Dataset):
        raise UserError(
            f"{where}: expected the function to return a hetero_fl.data.Dataset, got "
            f"{type(found).__name__}"
        )
    return found


def _check_keys(
    config: SourceConfig, name: str, entry: type[Source], local: bool, where: str
) -> None:
    """Reject keys that do not apply to the source or, if `local` is set, to a `.npz` file."""
    if config.path is not None and config.name.startswith(HUB_PREFIX):
        raise UserError(f"{where}.path: does not apply to source {name}; remove it")
    accepted = {
        *entry.all_keys(),
        *(("follow_links",) if {"path", "columns"} & entry.all_keys() else ()),
        *(("patient",) if local else ()),
        *(("task",) if local and entry.documented_task is None else ()),
    }
    _check_accepted(config, name, {"path", *accepted}, where)
    for key in OPTIONAL_KEYS:
        value = getattr(config, key)
        if value_for_file(config, key, value) != value:
            settings = value.not_in_arrays if isinstance(value, SharedSettings) else ()
            changed = [name for name in settings if value.without([name]) != value]
            file = "the simulated data" if config.path is None else Path(config.path).name
            raise UserError(
                f"{where}.{'.'.join([key, *changed[:1]])}: does not apply to "
                f"{file_suffix(config)} files such as {file}; remove it"
            )
    is_hub = name == HUB_PREFIX.removesuffix(":")
    if is_hub and config.path is not None and not config.path.endswith(".npz"):
        raise UserError(
            f"{where}.path: does not apply to Hugging Face data sets, got '{config.path}'; set "
            f"{where}.name={HUB_PREFIX}{config.path}"
        )


def _check_accepted(config: SourceConfig, name: str, accepted: Collection[str], where: str) -> None:
    """Raise UserError if a key is set that the source does not read."""
    for key in get_args(Key):
        if getattr(config, key) is not None and key not in accepted:
            raise UserError(f"{where}.{key}: does not apply to source {name}; remove it")


def check_roles(source: SourceConfig, main: SourceConfig, where: str) -> None:
    """Check that the main data set and a proxy set of the same files agree on the public users.

    Args:
        source: Source of the proxy set.
        main: Source of the main data set.
        where: Place of the proxy set in the configuration, for error messages.

    Raises:
        UserError: If a setting on which the public users depend has another value.
    """
    if source.path != main.path or source.movies is None:
        return
    settings = main.movies or MoviesConfig()
    for name in PUBLIC_USER_KEYS:
        found = getattr(source.movies, name)
        expected = getattr(settings, name)
        if found != expected:
            raise UserError(
                f"{where}.movies.{name}: must be {expected} as in data.movies, because the users "
                f"are the same, got {found}; remove {where}.movies"
            )


def _find_source(config: SourceConfig, where: str) -> tuple[str, type[Source]]:
    name = _registered_name(config.name)
    if name in sources:
        return name, sources[name]
    if name in sources.plugins:
        try:
            sources.plugins.load(name)
        except PluginError as error:
            raise UserError(f"{where}.name: {error}") from error
    if removed := describe_removed(name, REMOVED):
        raise UserError(f"{where}.name: {removed}")
    if reader := _reader_for_suffix(config.name):
        kind = "folder" if Path(name).is_dir() else "file"
        raise UserError(
            f"{where}.name: expected a source, got the {kind} '{config.name}'; set "
            f"{where}.name={reader} and {where}.path={config.name}"
        )
    suffix = f".{name.lower().removeprefix('.')}"
    hint = f"; did you mean 'table'? It reads {suffix} files" if suffix in TABLE_SUFFIXES else ""
    hint = hint or suggest_or_list(name, list_sources(), "hetero_fl.data.list_sources()")
    raise UserError(f"{where}.name: unknown source '{config.name}'{hint}")


def _reader_for_suffix(name: str) -> str:
    """Return the source that reads the file or folder `name`, or an empty string."""
    path = Path(name)
    if (path / "train_images.npy").is_file():
        return "npz"
    if path.is_dir():
        for source in sources:
            if any(any(path.glob(pattern)) for pattern in sources[source].folder_files):
                return source
        return "image_folder"
    suffix = path.suffix.lower()
    return "table" if suffix in TABLE_SUFFIXES else {".npz": "npz", ".txt": "text"}.get(suffix, "")


def _check(dataset: Dataset, where: str, missing: bool, labeled: bool = True) -> None:
    local = {f"local {name}": examples for name, examples in dataset.local_sets.items()}
    for split, examples in (dataset.splits() | local).items():
        place = f"{where}: {split}"
        options: dict[str, Any] = {"missing": missing, "vocabulary": dataset.vocabulary}
        if labeled or examples.y is not None:
            check_examples(examples, dataset.task, place, **options)
        else:
            check_inputs(examples.x, place, **options)
        if examples.x.shape[1:] != dataset.train.x.shape[1:]:
            found = tuple(examples.x.shape[1:])
            expected = tuple(dataset.train.x.shape[1:])
            raise UserError(
                f"{where}: {split}: expected examples of shape {expected} as in train, got {found}"
            )

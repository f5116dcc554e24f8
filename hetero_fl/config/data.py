"""Settings of the data: sources, partition among clients, proxy set and splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from hetero_fl.config.base import (
    ConfigSection,
    FilePath,
    OwnArguments,
    check_held_out,
    choice_type,
    format_value,
)
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.text import format_list

DEFAULT_ROOT = "~/.cache/hetero_fl"
"""Folder for downloads."""
WEEK = 24 * 7


class SharedSettings(ConfigSection):
    """Settings that also apply to files of clients, proxy sets and data that is evaluated.

    Attributes:
        selection: Settings that select rows of the main data set, and do not apply to others.
        not_in_arrays: Settings that do not apply to `.npz` files.
        of_files: Settings that name columns of files, and do not apply to data of the package.
    """

    selection: ClassVar[tuple[str, ...]] = ()
    of_files: ClassVar[tuple[str, ...]] = ()
    not_in_arrays: ClassVar[tuple[str, ...]] = ()

    def without(self, names: Collection[str]) -> Self:
        """Return a copy in which some settings have their default values."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in names})


class SeriesConfig(SharedSettings):
    """Windows and forecast targets of hourly time series."""

    selection = ("sites",)
    of_files = ("time", "lanes", "weather")
    not_in_arrays = ("format", "gaps")

    window: int = Field(
        24, ge=1, le=WEEK, description="input length in hours, including the current hour"
    )
    horizons: tuple[PositiveInt, ...] = Field(
        (1, 3, 6),
        min_length=1,
        description=f"hours ahead to forecast, in ascending order; at most {WEEK}",
    )
    target: choice_type("value", "busy") = Field(  # type: ignore[valid-type]
        "value",
        description="`value`: forecast the value; `busy`: classify whether it exceeds the "
        "`busy` quantile of the site's training period",
    )
    level: choice_type("training", "week") = Field(  # type: ignore[valid-type]
        "training",
        description="reference level of inputs and targets; `training`: the site's mean over the "
        "training period; `week`: its mean over the last week",
    )
    busy: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="for `target: busy`: share of the training hours below the threshold",
    )
    test: float = Field(
        0.2, gt=0, lt=1, description="share of the time range, at its end, for the global test set"
    )
    validation: float = Field(
        0.05, gt=0, lt=1, description="share of the time range before the test set, for validation"
    )
    sites: tuple[str, ...] | None = Field(
        None, min_length=1, description="sites to use; `null`: all"
    )
    time: str = Field("DateTime", description="column or array of dates")
    format: str | None = Field(
        None,
        description="tables: date format such as `%d/%m/%Y %H:%M`; `null`: ISO 8601, such as "
        "`2023-05-01 13:00`",
    )
    lanes: tuple[str, ...] = Field(
        ("lane_1", "lane_2", "lane_3"),
        description="columns of the lanes; values of absent columns are missing",
    )
    weather: tuple[str, ...] = Field(
        ("temperature", "rain"),
        description="columns of further measurements; values of absent columns are missing",
    )
    gaps: choice_type("refuse", "skip") = Field(  # type: ignore[valid-type]
        "refuse",
        description="tables: hours without a row; `refuse`: an error; `skip`: leave out the "
        "examples that need them",
    )

    @model_validator(mode="after")
    def _check_fractions(self) -> SeriesConfig:
        """Check that some time remains for training and that the horizons are ascending."""
        check_held_out(self, 0.9, "time", "validation", "test")
        horizons = list(self.horizons)
        if max(horizons) > WEEK:
            raise ValueError(f"horizons must be <= {WEEK} hours, got {horizons}")
        if horizons != sorted(set(horizons)):
            raise ValueError(f"horizons must be in ascending order, each once, got {horizons}")
        return self


REMOVED_SEED = {"seed": "the key seed outside of data, as simulated data are files of the package"}
"""What to use instead of the seed of generated data, which was 0 by default."""


SHARED_KEYS: tuple[Literal["text", "speech", "movies", "driving"], ...] = (
    "text",
    "speech",
    "movies",
    "driving",
)
"""Keys of settings whose names are also names of sources, which read files or folders of users."""


class TextConfig(SharedSettings):
    """Conversion of text to tokens. The vocabulary never depends on a client's text."""

    predict: choice_type("next", "class") = Field(  # type: ignore[valid-type]
        "next",
        description="`next`: predict the next word; `class`: classify the whole text",
    )
    length: PositiveInt = Field(
        8,
        description="words per example; longer texts keep their last words, shorter ones are "
        "padded on the left",
    )
    tokenizer: choice_type("words", "hashing") = Field(  # type: ignore[valid-type]
        "words",
        description="`words`: the most frequent words of the public text, all others are one "
        "unknown token; `hashing`: a token for each hash value, no text is needed",
    )
    vocabulary: PositiveInt = Field(
        1000, description="`words`: maximum vocabulary size; `hashing`: number of hash values"
    )
    public: FilePath | None = Field(
        None, description="file of public text that defines the vocabulary (`tokenizer: words`)"
    )


class WindowsConfig(ConfigSection):
    """Windows that are cut from a table with one sample per row."""

    length: PositiveInt = Field(64, description="samples per window")
    step: PositiveInt | None = Field(
        None, description="samples between the starts of two windows; `null`: `length`"
    )
    time: str | None = Field(
        None,
        description="column of times, which must increase; it is not an input channel; "
        "`null`: no such column",
    )


class SpeechConfig(SharedSettings):
    """Recordings of words: which words and speakers, and their log-mel features.

    The defaults of the features are those of the micro speech example of TensorFlow.
    """

    selection = ("speakers",)
    not_in_arrays = ("words", "speakers", "rate", "seconds", "window", "step", "bands")
    _removed = REMOVED_SEED
    _former_defaults = {"seed": 0}

    words: tuple[str, ...] | None = Field(
        None, min_length=2, description="words to recognize; `null`: all words"
    )
    speakers: PositiveInt | None = Field(
        None,
        description="number of speakers to train on, those with the most training recordings; "
        "`null`: all",
    )
    rate: int = Field(
        16000, ge=4000, le=48000, description="samples per second, which all files must have"
    )
    seconds: float = Field(
        1.0,
        gt=0,
        le=10,
        description="length of a recording; shorter ones are followed by silence, longer ones are "
        "an error",
    )
    window: PositiveFloat = Field(0.03, description="length of an analysis window in seconds")
    step: PositiveFloat = Field(
        0.02, description="seconds between the starts of two analysis windows"
    )
    bands: int = Field(
        40, ge=2, le=128, description="mel bands, which are the columns `mel_1`, `mel_2`, …"
    )

    @field_validator("words")
    @classmethod
    def _check_distinct(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Check that the words are distinct."""
        if words is not None and len(set(words)) < len(words):
            raise ValueError(f"list each word once, got {format_value(list(words))}")
        return words

    @model_validator(mode="after")
    def _check_window(self) -> SpeechConfig:
        """Check that a recording contains an analysis window."""
        if self.window > self.seconds:
            raise ValueError(f"window: must be <= seconds={self.seconds:g}, got {self.window:g}")
        return self


class MoviesConfig(SharedSettings):
    """Movies that users have rated: histories of movies, and which movies and users are held out.

    The last movies of each user are held out. Some users do not train at all: the public users
    provide the proxy set, others the global validation and test sets.
    """

    selection = ("groups",)
    _removed = {"sampled": "ndcg_10 and hit_rate_10, which rank among all movies"}
    _former_defaults = {"sampled": 100}

    length: PositiveInt = Field(
        10, description="movies before the next movie; shorter histories are padded on the left"
    )
    min_rating: float = Field(
        0.0,
        description="movies that a user rates below this value are neither in histories nor "
        "predicted, but count as rated",
    )
    groups: PositiveInt | None = Field(
        None, description="number of groups to train on, those with the most movies; `null`: all"
    )
    validation_movies: PositiveInt = Field(
        1, description="movies of each user for validation, before the test movies"
    )
    test_movies: PositiveInt = Field(2, description="last movies of each user, for the test")
    validation_users: float = Field(
        0.05, gt=0, lt=1, description="share of the users for the global validation set"
    )
    test_users: float = Field(
        0.15, gt=0, lt=1, description="share of the users for the global test set"
    )
    public_users: float = Field(
        0.1, ge=0, lt=1, description="share of the users whose movies are public, for a proxy set"
    )
    seed: NonNegativeInt = Field(
        0, description="seed of the choice of users who do not train; not of runs"
    )

    @model_validator(mode="after")
    def _check_shares(self) -> MoviesConfig:
        """Check that some users remain for training."""
        check_held_out(self, 0.9, "users", "validation_users", "test_users", "public_users")
        return self


class DrivingConfig(SharedSettings):
    """Drives with a camera: size of the frames, unit of the angle, and splits of a drive."""

    _removed = {
        **dict.fromkeys(
            ("crop", "step", "steering_ratio", "max_angle", "test_vehicles"),
            "data.name=image_table, which reads drives of your own "
            "(docs/scenarios/driving_hetero.md)",
        ),
        **REMOVED_SEED,
    }
    _former_defaults = {
        "crop": [0.0, 0.0],
        "step": 1,
        "steering_ratio": 14.8,
        "max_angle": 25.0,
        "seed": 0,
    }

    height: int = Field(
        24, ge=8, le=256, description="height of a frame in pixels (simulated frames: 16)"
    )
    width: int = Field(
        48, ge=8, le=512, description="width of a frame in pixels (simulated frames: 32)"
    )
    validation: float = Field(
        0.15, gt=0, lt=1, description="share of each drive before the test frames, for validation"
    )
    test: float = Field(
        0.25, gt=0, lt=1, description="share of each drive, at its end, for the local test"
    )
    gap: NonNegativeInt = Field(
        10, description="frames left out between two splits, which are similar to their neighbors"
    )
    scale: PositiveFloat = Field(
        5.0, description="steering angle in degrees that a target of 1 stands for"
    )

    @model_validator(mode="after")
    def _check_shares(self) -> DrivingConfig:
        """Check that something remains of a drive."""
        check_held_out(self, 0.9, "frames", "validation", "test")
        return self


class ColumnsConfig(ConfigSection):
    """Columns of a Hugging Face data set by their use."""

    input: str | tuple[str, ...] | None = Field(
        None,
        description="column of images, text or arrays, or columns of a table; `null`: the image "
        "column, the column `text`, the column of arrays, or else all other columns as a table",
    )
    label: str | None = Field(
        None, description="label column; `null`: the only column of type `ClassLabel`, or `label`"
    )
    group: str | None = Field(None, description="column that names the client of each row")
    patient: str | None = Field(None, description="column that identifies the patient of each row")


class ReadConfig(ConfigSection):
    """Separators of columns and digits in CSV and TSV files."""

    sep: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="separator of the columns; `null`: the comma, semicolon, vertical bar or tab "
        "that is most frequent in the header",
    )
    decimal: choice_type(".", ",") = Field(  # type: ignore[valid-type]
        ".", description="decimal mark of numbers"
    )
    thousands: Literal[".", ",", "'", "’", "_", " "] | None = Field(
        None,
        description="mark between groups of three digits, where a space stands for no-break "
        "spaces, too; `null`: none",
    )

    @model_validator(mode="after")
    def _check_marks(self) -> ReadConfig:
        """Check that all marks differ."""
        marks = [mark for mark in (self.decimal, self.thousands, self.sep) if mark is not None]
        if len(set(marks)) < len(marks):
            raise ValueError(
                f"decimal, thousands and sep: must differ from each other, got {format_list(marks)}"
            )
        return self


TableText = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Text of a cell, which may be a number in YAML."""
TableSplit = choice_type("train", "validation", "test", "local_validation", "local_test")
"""Split of rows of a table. The last two are those of the groups of the training rows."""


registered_source_names: set[str] = set()
"""Data sources that the package does not provide, which `hetero_fl.data.register_source` adds."""


class SourceConfig(OwnArguments):
    """A data source, which is selected by name or read from a local file.

    With a source of your own, all other keys are settings of its class.
    """

    chooser = "name"
    own_names = registered_source_names

    name: str = Field(
        "chest_xray",
        description="source, one of `hetero_fl.data.list_sources()`; `hf:NAME` or `hf:FOLDER`: a "
        "Hugging Face data set of the hub or in a folder; `python:module:Name`: your own",
    )
    path: FilePath | None = Field(
        None,
        description="local file or folder to read; `null`: simulated data of the package, or a "
        "download",
    )
    file: str | None = Field(
        None,
        description="`image_table`: column with the image file of each row, relative to the folder "
        "of the table, or a pattern with columns in braces, such as `{patient}/{slice}.png`",
    )
    blocks: dict[str, tuple[str, ...]] | None = Field(
        None,
        min_length=1,
        description="`image_table`: columns of numbers of each further block, "
        "such as `{vitals: [age, pulse]}`; rows without a file then have no image; `null`: images "
        "only",
    )
    time: str | None = Field(
        None,
        description="`image_table`: column of numbers or dates (in seconds) by which rows are "
        "split; `null`: rows are split at random",
    )
    span: NonNegativeInt | None = Field(
        None,
        description="`image_table`: time before a split by `time` of which rows are left out; "
        "`null`: 0",
    )
    columns: ColumnsConfig | None = Field(
        None, description="`hf:NAME`: columns by their use; `null`: by their names and types"
    )
    label: str | None = Field(
        None,
        description="tables, `image_table` and Hugging Face data sets: label column, or several "
        "separated by commas",
    )
    group: str | None = Field(
        None,
        description="tables, `image_table`, Hugging Face data sets, WILDS: column that names the "
        "client of each row (`natural` partition); `image_folder`: kind of the outer folders, "
        "such as site; "
        "movies: `region`, the first digit of the zip code, or `user`; `null`: `region` if there "
        "are zip codes",
    )
    patient: str | None = Field(
        None,
        description="tables, `image_table`, `.npz` files, Hugging Face data sets and WILDS: column "
        "or array that identifies the patient of each row; `image_folder`: regular expression with "
        "a group that is found in file names, such as `(p[0-9]+)_`, or a table with the columns "
        "`file` and `patient`; a patient's rows stay in one split of one client",
    )
    task: (
        choice_type("multiclass", "multilabel", "regression") | None  # type: ignore[valid-type]
    ) = Field(
        None,
        description="tables, `.npz` files and Hugging Face data sets: learning task; "
        "`null`: inferred from the labels",
    )
    categories: dict[str, tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]] | None = (
        Field(
            None,
            description="tables: columns to one-hot encode, with their values; `null`: text "
            "columns with fewer than 20 different values in the common file; `{}`: none",
        )
    )
    read: ReadConfig | None = Field(
        None,
        description="tables: separators and decimal mark of CSV files; `null`: decimal point, and "
        "the separator of the header",
    )
    size: PositiveInt | None = Field(
        None,
        description="images: side length in pixels to which images are resized, `null`: the "
        "original size; MedMNIST: 28, 64, 128 or 224, the version of the data set, `null`: 28",
    )
    stream: bool | None = Field(
        None,
        description="`image_folder`, `image_table`, `npz`, `camelyon17`, `iwildcam`: decode images "
        "once to a file in `data.root` and read them from it when they are used; `null`: keep all "
        "images in memory",
    )
    follow_links: bool | None = Field(
        None,
        description="folders: read files outside the folder to which links in it lead; the server "
        "of a deployment cannot set it for a site; `null`: such links are errors",
    )
    splits: (
        choice_type("official", "pooled")  # type: ignore[valid-type]
        | dict[str, dict[TableText, TableSplit]]  # type: ignore[valid-type]
        | None
    ) = Field(
        None,
        description="`image_table`: splits by column and value, such as `{center: {1: validation, "
        "2: test}}`; further splits are `train`, `local_validation` and `local_test`; "
        "`camelyon17`, `iwildcam`: use of the splits of WILDS; `official`: the "
        "training sites are clients, other sites the global validation and test sets; `pooled`: "
        "all sites are clients; `null`: `official`",
    )
    series: SeriesConfig | None = Field(
        None, description="hourly time series (`traffic`): windows and forecasts"
    )
    windows: WindowsConfig | None = Field(
        None, description="`activity` from a table: windows of samples"
    )
    speech: SpeechConfig | None = Field(
        None,
        description="speech sources: words, speakers and log-mel features",
    )
    movies: MoviesConfig | None = Field(
        None,
        description="movie sources: histories and held-out users",
    )
    driving: DrivingConfig | None = Field(
        None,
        description="driving sources: frames, steering angles and splits",
    )
    text: TextConfig | None = Field(
        None,
        description="text sources: conversion of text to tokens",
    )
    arguments: dict[str, Any] | None = Field(
        None,
        description="settings of a user-defined source, which you can also write as keys of "
        "`data`; `null`: none",
    )

    @field_validator("stream", mode="before")
    @classmethod
    def _accept_section(cls, value: Any) -> Any:
        """Convert the section of earlier versions to `true`, and `false` to None."""
        if isinstance(value, Mapping) and value.keys() <= {"workers", "prefetch"}:
            return True
        return None if value is False else value

    @field_validator("categories")
    @classmethod
    def _check_unique(
        cls, categories: dict[str, tuple[str, ...]] | None
    ) -> dict[str, tuple[str, ...]] | None:
        """Check that the values of a column are distinct, nonempty and without outer spaces."""
        for column, values in (categories or {}).items():
            are_distinct = len(set(values)) == len(values) > 0
            if not are_distinct or any(value != value.strip() or not value for value in values):
                raise ValueError(
                    f"'{column}': list each value once, without surrounding spaces, "
                    f"got {list(values)}"
                )
        return categories


PARTITION_KINDS: dict[str, tuple[str, ...]] = {
    "iid": (),
    "in_order": (),
    "dirichlet": ("alpha", "cap"),
    "classes": ("classes", "classes_spread", "shots"),
    "quantity": ("alpha",),
    "natural": (),
    "drawn": ("alpha", "rows", "spread"),
}
"""Kinds of partitions that the package implements, with the keys that each reads."""
registered_partition_kinds: set[str] = set()
"""Further kinds of partitions, which `hetero_fl.data.register_partition` adds."""


class PartitionConfig(OwnArguments):
    """Distribution of the training rows among the clients.

    With a kind of your own, all other keys are its arguments.
    """

    chooser = "kind"
    # Partitioners of Flower were removed, which the error says.
    own_prefixes = (CODE_PREFIX, OBJECT_PREFIX, "flwr:")
    own_names = registered_partition_kinds
    also_arguments = ("alpha",)

    kind: choice_type(  # type: ignore[valid-type]
        *PARTITION_KINDS,
        prefix="python:",
        registered=registered_partition_kinds,
        removed={"flwr": "dirichlet, classes or a partition of your own (docs/how_to/migrate.md)"},
    ) = Field(
        "iid",
        description="`iid`: random rows; `in_order`: consecutive rows in the order of client ids; "
        "`dirichlet`: label skew; `classes`: few classes per client; `quantity`: skewed numbers "
        "of rows; `natural`: one client per group of `data.group`; `drawn`: each client samples "
        "its rows independently, so clients may share rows (for large populations); "
        "`python:module:Name`: a user-defined partition",
    )
    arguments: dict[str, Any] | None = Field(
        None,
        description="arguments of a user-defined partition, which you can also write as keys of "
        "`partition`; `null`: none",
    )
    alpha: PositiveFloat | None = Field(
        None,
        description="concentration of the Dirichlet distribution, smaller is more skewed; `null`: "
        "0.5 for `dirichlet` and `quantity`; for `drawn` no label skew",
    )
    cap: float | None = Field(
        None,
        ge=1,
        description="`dirichlet`: a client with this multiple of its share of the rows receives no "
        "further classes; `null`: no limit",
    )
    classes: PositiveInt = Field(2, description="`classes`: classes per client")
    classes_spread: NonNegativeInt = Field(
        0,
        description="`classes`: maximum deviation from `classes`, sampled for each client; "
        "a client has at least two classes",
    )
    shots: PositiveInt | None = Field(
        None,
        description="`classes`: rows per class and client, multiplied by the client's `size`; "
        "other rows are not used; `null`: all rows",
    )
    min_size: PositiveInt = Field(20, description="minimum number of rows per client")
    rows: PositiveInt = Field(
        100, description="`drawn`: rows per client, multiplied by the client's `size`"
    )
    spread: float = Field(
        0.0,
        ge=0,
        le=3,
        description="`drawn`: σ of a log-normal factor on each client's number of rows; 0: none",
    )

    @model_validator(mode="after")
    def _set_default_alpha(self) -> PartitionConfig:
        """Set the default of `alpha`, which depends on the kind of partition."""
        if self.alpha is None and self.kind != "drawn" and not self.takes_arguments(self.kind):
            # Do not mark `alpha` as set by the user, because an override may choose another kind.
            self.__dict__["alpha"] = 0.5
        return self


class ProxyConfig(ConfigSection):
    """Public data on which clients and server exchange predictions.

    The labels of the data are not used unless `labels` is true.
    """

    size: int = Field(
        0,
        ge=0,
        description="number of rows, taken from the training data before the partition; "
        "0: no proxy set",
    )
    source: SourceConfig | None = Field(
        None, description="separate data source for the proxy set, of which `size` is the limit"
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="public columns or blocks; the others are missing in the proxy set, so clients "
        "that use them need `preprocess.missing: indicate`; `null`: all",
    )
    labels: bool = Field(
        False,
        description="keep the labels; only the initial phase of fedmd (`algorithm.initial_phase`) "
        "trains on them",
    )


class SplitConfig(ConfigSection):
    """Split of each client's rows into training, validation and local test sets."""

    validation: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="fraction of the client's rows for validation, which selects the best round",
    )
    test: float = Field(
        0.25, ge=0, lt=1, description="fraction of the client's rows for the local test"
    )

    @model_validator(mode="after")
    def _check_fractions(self) -> SplitConfig:
        """Check that some rows remain for training."""
        check_held_out(self, 1, "rows", "validation", "test")
        return self


class DataConfig(SourceConfig):
    """The data source that the clients share, its partition, and the proxy set."""

    root: FilePath = Field(DEFAULT_ROOT, description="folder for downloads")
    train_limit: PositiveInt | None = Field(
        None,
        description="maximum number of training rows, sampled at random, including the proxy set; "
        "`null`: all",
    )
    test_limit: PositiveInt | None = Field(
        None, description="maximum number of global test rows, sampled at random; `null`: all"
    )
    range: PositiveFloat | None = Field(
        None,
        description="value of integer pixels that becomes 1, for all clients; `null`: 1 if no "
        "training pixel exceeds 1, otherwise 255 or the largest number of their bit depth",
    )
    partition: PartitionConfig = PartitionConfig()
    proxy: ProxyConfig = ProxyConfig()
    split: SplitConfig = SplitConfig()
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="fraction of the training rows for global validation if the source has no "
        "validation set; 0: none",
    )

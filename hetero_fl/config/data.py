"""The data's side of the configuration: where examples come from, how they are dealt out, what is public."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, choice_type

WEEK = 168  # hours


class SeriesConfig(ConfigSection):
    """How series that are measured hour by hour become examples: the window that is seen, and what is forecast."""

    window: int = Field(24, ge=1, le=WEEK, description="hours that an example shows, up to now")
    horizons: tuple[PositiveInt, ...] = Field(
        (1, 3, 6), min_length=1, description="so many hours ahead are forecast"
    )
    target: choice_type("value", "busy") = Field(  # type: ignore[valid-type]
        "value",
        description="the number itself; or whether it is above the `busy` share of the site's training period",
    )
    level: choice_type("training", "week") = Field(  # type: ignore[valid-type]
        "training",
        description="what inputs and targets are relative to: the site's mean in training; or over the week up to now",
    )
    busy: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="busy: share of the training period's hours below the threshold",
    )
    test: float = Field(
        0.2, gt=0, lt=1, description="the last part of the time, which is the common test set"
    )
    validation: float = Field(
        0.05, gt=0, lt=1, description="the part before it, which selects a round"
    )
    sites: tuple[str, ...] | None = Field(
        None, min_length=1, description="these sites only; none: all"
    )
    time: str = Field("DateTime", description="file: the column of dates")
    format: str | None = Field(
        None,
        description="file: how dates are written, as `%d/%m/%Y %H:%M`; none: read off the dates, if one reading fits",
    )
    lanes: tuple[str, ...] = Field(
        ("lane_1", "lane_2", "lane_3"),
        description="file: columns of parts of the whole; missing ones are missing values",
    )
    weather: tuple[str, ...] = Field(
        ("temperature", "rain"),
        description="file: columns of what else is measured; missing ones are missing values",
    )
    gaps: choice_type("refuse", "skip") = Field(  # type: ignore[valid-type]
        "refuse",
        description="file: hours without a row are a mistake, or examples that would need them are left out",
    )

    @model_validator(mode="after")
    def _check_fractions(self) -> SeriesConfig:
        if self.validation + self.test >= 0.9:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}; must leave time to train on"
            )
        if max(self.horizons) > WEEK:
            raise ValueError(
                f"found horizons {list(self.horizons)}; at most {WEEK} hours, a week, ahead"
            )
        if len(set(self.horizons)) < len(self.horizons) or list(self.horizons) != sorted(
            self.horizons
        ):
            raise ValueError(
                f"found horizons {list(self.horizons)}; list each once, the nearest first"
            )
        return self


class TextConfig(ConfigSection):
    """How text becomes tokens. Words are numbered without a look at any client's text."""

    predict: choice_type("next", "class") = Field(  # type: ignore[valid-type]
        "next", description="the next word from those before it; or the class of a whole text"
    )
    length: PositiveInt = Field(
        8,
        description="words that an example shows, the last ones of more; fewer are filled up from the left",
    )
    tokenizer: choice_type("words", "hashing") = Field(  # type: ignore[valid-type]
        "words",
        description="the most frequent words of the public text, all others are one unknown; or every word a number by its "
        "hash, for which nobody's text is read",
    )
    vocabulary: PositiveInt = Field(
        1000, description="at most so many words; hashing: so many numbers"
    )
    public: str | None = Field(
        None, description="`text` with words: the file of public text from which they are taken"
    )


class WindowsConfig(ConfigSection):
    """How a file of samples, a row each, is cut into windows."""

    length: PositiveInt = Field(64, description="samples of a window")
    step: PositiveInt | None = Field(
        None, description="samples from one window to the next; none: as many as it has"
    )
    time: str | None = Field(
        None, description="column of times, which have to run forward; it is no channel"
    )


class SourceConfig(ConfigSection):
    """A data source by name, or a local file in its place."""

    name: str = Field(
        "chest_xray", description="a name of hetero_fl.data.list_sources(), or python:module:Name"
    )
    path: str | None = Field(
        None, description="a local file or folder that takes the place of the download"
    )
    label: str | None = Field(
        None, description="tables: the column of labels (several: comma between them)"
    )
    group: str | None = Field(
        None, description="tables: the column that says whose row it is (natural partition)"
    )
    patient: str | None = Field(
        None,
        description="tables: the column that says of whom a row is (`.npz`: the array); no patient's rows are split up",
    )
    task: choice_type("multiclass", "multilabel", "regression") | None = Field(  # type: ignore[valid-type]
        None,
        description="tables and `.npz`: what is learned, in place of what the labels look like",
    )
    categories: dict[str, tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]] | None = (
        Field(
            None,
            description="tables: columns that become an indicator, 0 or 1, per value, and these values; none: the text columns with "
            "fewer than 20 different values in the common file; `{}`: no column",
        )
    )
    size: PositiveInt | None = Field(
        None,
        description="image folders: every image is scaled to so many pixels a side as it is read",
    )
    series: SeriesConfig | None = Field(
        None, description="series by the hour (`traffic`): windows and forecasts"
    )
    windows: WindowsConfig | None = Field(
        None, description="`activity` from a table: how its samples become windows"
    )
    text: TextConfig | None = Field(
        None, description="texts: how they become tokens; a proxy set's are as the common set's"
    )

    @field_validator("categories")
    @classmethod
    def _check_unique(
        cls, categories: dict[str, tuple[str, ...]] | None
    ) -> dict[str, tuple[str, ...]] | None:
        for column, values in (categories or {}).items():
            if (
                not values
                or len(set(values)) < len(values)
                or any(value != value.strip() or not value for value in values)
            ):
                raise ValueError(
                    f"found {list(values)} for '{column}'; list each value once, without spaces around it"
                )
        return categories

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class PartitionConfig(ConfigSection):
    """How the training rows are dealt out to the clients."""

    kind: choice_type(  # type: ignore[valid-type]
        "iid", "in_order", "dirichlet", "classes", "quantity", "natural", "drawn", prefix="python:"
    ) = Field(
        "iid",
        description="rows at random; consecutive slices of the set, in the order of ids; skewed labels; few classes a client; "
        "skewed numbers; a client for each group; each client draws for itself, also what others have (for large "
        "populations); one's own",
    )
    alpha: PositiveFloat | None = Field(
        None,
        description="concentration, small is more skewed; dirichlet, quantity: 0.5 if not given; drawn: of each client's "
        "own mix of labels, rows at random if not given",
    )
    cap: float | None = Field(
        None,
        ge=1,
        description="dirichlet: a client that has so many times its part of the rows gets none of the further classes; "
        "none: no bound",
    )
    classes: PositiveInt = Field(2, description="classes: so many a client")
    classes_spread: NonNegativeInt = Field(
        0,
        description="classes: up to so many more or fewer, drawn for each client; two stay the fewest",
    )
    shots: PositiveInt | None = Field(
        None,
        description="classes: a client gets so many rows of each, times its `size`, the rest stays out; none: all",
    )
    min_size: PositiveInt = Field(20, description="fewest rows a client may get")
    rows: PositiveInt = Field(100, description="drawn: rows of a client, times its `size`")
    spread: float = Field(
        0.0,
        ge=0,
        le=3,
        description="drawn: σ of a log-normal factor on each client's number of rows; 0: none",
    )

    @model_validator(mode="after")
    def _set_default_alpha(self) -> PartitionConfig:
        if self.alpha is None and self.kind != "drawn":
            # not among the fields that were set: another kind would take it for given
            self.__dict__["alpha"] = 0.5
        return self


class ProxyConfig(ConfigSection):
    """The public set on which predictions are compared. Its labels are read only where `labels` says so."""

    size: int = Field(
        0,
        ge=0,
        description="rows held out of the training data before anything is dealt out; 0: none",
    )
    source: SourceConfig | None = Field(
        None, description="another set in place of held-out rows (size: at most so many)"
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="columns or blocks that are public; the others are missing in it, and who sees them needs "
        "`preprocess.missing: indicate`; none: all that it has",
    )
    labels: bool = Field(
        False,
        description="keep its labels; only the initial phase of fedmd (`algorithm.initial_phase`) trains on them",
    )


class SplitConfig(ConfigSection):
    """How each client splits its own rows; fractions of them."""

    validation: float = Field(0.15, ge=0, lt=1, description="selects a round")
    test: float = Field(0.25, ge=0, lt=1, description="the local test is on these")

    @model_validator(mode="after")
    def _check_fractions(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}; must leave rows to train on"
            )
        return self


class DataConfig(SourceConfig):
    """The common source and what becomes of it."""

    root: str = Field("~/.cache/hetero_fl", description="where downloads are kept")
    train_limit: PositiveInt | None = Field(
        None, description="keep so many training rows (drawn), the proxy included"
    )
    test_limit: PositiveInt | None = Field(
        None, description="keep so many rows of the common test set (drawn)"
    )
    partition: PartitionConfig = PartitionConfig()
    proxy: ProxyConfig = ProxyConfig()
    split: SplitConfig = SplitConfig()
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share carved for common validation if the set has none; 0: none is",
    )

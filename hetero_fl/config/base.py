"""Base classes and types of configuration sections, versions, and common settings."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError
from typing_extensions import Self

from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, describe_removed, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.registry import reference_to


def _share_or_count(value: int | float) -> int | float:
    """Check that a float is a share. A whole number greater than 1 is a count in either form."""
    if isinstance(value, int) or value <= 1:
        return value
    if not value.is_integer():
        raise ValueError(f"must be a share <= 1 or a whole number, got {value:g}")
    return int(value)


ShareOrCount = Annotated[int | float, AfterValidator(_share_or_count)]
"""A share, which is a float and at most 1 (`1.0`: all), or a number, which is an int (`1`: one)."""


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    # The name is too long, or the home directory of a user is not known.
    except (OSError, RuntimeError):
        return False


def _check_path(value: str) -> str:
    r"""Reject long names, and line breaks and tabs, which YAML reads for `\n` and `\t`."""
    names = [os.fsencode(name) for name in re.split(r"[/\\]", value)]
    if max(map(len, names)) > MAX_NAME_BYTES or len(os.fsencode(value)) > MAX_PATH_BYTES:
        raise ValueError(
            f"must be a path of at most {MAX_PATH_BYTES:,} bytes whose names have at most "
            f"{MAX_NAME_BYTES}, got {len(value):,} characters that start with '{value[:30]}'"
        )
    has_controls = any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value)
    # A no-break space is also `\_`, but some file names have one.
    if has_controls or ("\N{NO-BREAK SPACE}" in value and not _exists(value)):
        raise ValueError(
            f"got {value!r} with control characters, as \\ starts an escape in double quotes; "
            r"write / or \\ instead"
        )
    return value


DEVICE_NAMES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)))
)
"""Names that Windows reserves for devices, with any extension, in lower case."""


def check_folder_name(name: str) -> str:
    """Raise ValueError if a name cannot be that of a file or folder on every system."""
    if name.partition(".")[0].lower() in DEVICE_NAMES:
        raise ValueError(
            f"must differ from the names that Windows reserves for devices, got '{name}'; choose "
            "another name"
        )
    if name.endswith("."):
        raise ValueError(f"must not end with a period, got '{name}'; remove it")
    return name


MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
"""Limits of Linux for names of files and folders, and for paths."""

FilePath = Annotated[str, AfterValidator(_check_path)]
"""Path of a file or folder."""


class Settings(BaseModel):
    """Base class of configuration sections and methods.

    The fields of a subclass are its settings. Instances are immutable. Unknown settings, infinities
    and NaN are rejected.

    Raises:
        TypeError: If a setting is unknown.
        UserError: If the value of a setting is invalid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    _unused: ClassVar[frozenset[str]] = frozenset()
    """Inherited settings that have no effect in a class."""
    _removed: ClassVar[Mapping[str, str]] = {}
    """What to use instead of settings that the class had in an earlier version, keyed by name."""
    _former_defaults: ClassVar[Mapping[str, Any]] = {}
    """Default values of removed settings, if not None, which configurations of older runs have."""

    def __init__(self, **settings: Any) -> None:
        for name in (
            settings.keys() - accepted_settings(type(self)).keys() & type(self).model_fields.keys()
        ):
            raise self._unexpected(name)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            # Imported here because the schema, which `describe_error` uses, imports this module.
            from hetero_fl.config.describe import describe_error

            for problem in error.errors():
                is_unknown = problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1
                if is_unknown and problem["loc"][0] not in self._removed:
                    raise self._unexpected(str(problem["loc"][0])) from None
            described = describe_error(error, settings, type(self))
            raise UserError(f"{self.__repr_name__()}: {described}") from None
        self.__pydantic_fields_set__.update(fixed_settings(type(self)))

    # Without this attribute, pydantic would also call __init__ for nested sections, and the errors
    # of nested sections would not contain the path of the key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _ignore_former_defaults(cls, raw: Any) -> Any:
        """Remove the removed settings that are None or have their former default value."""
        if not isinstance(raw, Mapping) or not cls._removed.keys() & raw.keys():
            return raw
        return {
            key: value
            for key, value in raw.items()
            if key not in cls._removed or not _is_equal(value, cls._former_defaults.get(key))
        }

    @field_validator("*", mode="wrap")
    @classmethod
    def _reject_wrong_numbers(cls, value: object, validate: ValidatorFunctionWrapHandler) -> Any:
        """Reject integers of thousands of digits, and booleans, which pydantic would convert."""
        validated = validate(value)
        if isinstance(value, int | list | dict):
            # Raises ValueError for an integer of more than 4,300 digits, such as a hexadecimal one.
            str(value)
        number = _number_from_boolean(value, validated)
        if number is not None:
            raise PydanticKnownError("int_type" if isinstance(number, int) else "float_type")
        return validated

    def _unexpected(self, name: str) -> TypeError:
        hint = suggest_or_list(name, list(accepted_settings(type(self))))
        title = self.__repr_name__()
        return TypeError(f"{title}() got an unexpected keyword argument '{name}'{hint}")

    def __repr_name__(self) -> str:
        return type(self).__name__.removesuffix("Config")


def accepted_settings(model: type[Settings]) -> dict[str, FieldInfo]:
    """Return the settings that are arguments of a class, by name."""
    excluded = fixed_settings(model) | model._unused
    return {name: info for name, info in model.model_fields.items() if name not in excluded}


def fixed_settings(model: type[Settings]) -> set[str]:
    """Return the settings that a class determines, such as the name of an optimizer."""
    return {
        name
        for name, info in model.model_fields.items()
        if get_origin(info.annotation) is Literal and get_args(info.annotation) == (info.default,)
    }


def _is_equal(value: object, default: object) -> bool:
    """Return whether a value, possibly an array, is None or the default of a setting."""
    is_plain = isinstance(value, bool | int | float | str | list)
    return value is None or (is_plain and value == default)


def _number_from_boolean(value: object, validated: object) -> int | float | None:
    """Return a number that was a boolean before validation, also in a list or mapping."""
    if isinstance(value, bool):
        if isinstance(validated, int | float) and not isinstance(validated, bool):
            return validated
        return None
    pairs: Iterable[tuple[object, object]] = ()
    if isinstance(value, list | tuple) and isinstance(validated, list | tuple):
        pairs = zip(value, validated, strict=False)
    elif isinstance(value, Mapping) and isinstance(validated, Mapping):
        pairs = ((value[key], validated.get(key)) for key in value)
    found = (_number_from_boolean(*pair) for pair in pairs)
    return next((number for number in found if number is not None), None)


class ConfigSection(Settings):
    """A section of the configuration."""

    model_config = ConfigDict(validate_default=True)


def check_held_out(section: ConfigSection, limit: float, kept: str, *names: str) -> None:
    """Raise ValueError if the shares that a section holds out leave too little to train on.

    Args:
        section: The section.
        limit: Value below which the sum of the shares must be.
        kept: What the shares are taken from, such as `rows`.
        *names: Names of the shares.
    """
    total = sum(getattr(section, name) for name in names)
    if total >= limit:
        raise ValueError(
            f"{' + '.join(names)} must be < {limit:g}, which leaves {kept} to train on, "
            f"got {total:g}"
        )


def _check_reference(value: object) -> object:
    """Accept a callable, or a string that refers to code or an object."""
    if callable(value) or (
        isinstance(value, str) and value.startswith((CODE_PREFIX, OBJECT_PREFIX))
    ):
        return value
    raise ValueError(
        f"expected a function, in a file python:package.module:name, got {format_value(value)}"
    )


def _serialize_reference(value: object) -> object:
    return value if isinstance(value, str) else reference_to(value)


Reference = Annotated[
    Any,
    BeforeValidator(_check_reference),
    PlainSerializer(_serialize_reference),
    WithJsonSchema({"enum": ["python:module:name"]}),
]
"""Type of settings that are functions or classes.

In a file, the value is `python:package.module:name`. In Python, the value is the function or class.
Serialization replaces an object with a name, which is valid as long as the object exists.
"""


def warn_deprecated(key: str, replacement: str) -> None:
    """Issue the warning that a configuration key is deprecated.

    Python shows a `FutureWarning` by default, in contrast to a `DeprecationWarning`. The commands
    print the warning in one line, and the log of a run contains it.

    Args:
        key: The deprecated key, with its section.
        replacement: What to write instead.
    """
    # The warning refers to this module, because the commands shorten warnings of this package only.
    warnings.warn(f"{key}: deprecated; use {replacement}", FutureWarning, stacklevel=1)


def rename_keys(raw: Any, renamed: Mapping[str, str], section: str) -> Any:
    """Replace former names of keys and issue a warning for each replaced key.

    If the section contains both names, the last one takes precedence, which is that of an override.

    Args:
        raw: Content of the section.
        renamed: New names, keyed by former name.
        section: Name of the section, for the warnings.

    Returns:
        The content with the new names. If `raw` is not a mapping, it is returned unchanged.

    Example:
        >>> import warnings
        >>> from hetero_fl.config.base import rename_keys
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     rename_keys({"old": 1}, {"old": "new"}, "section")
        {'new': 1}
    """
    if not isinstance(raw, Mapping) or not renamed.keys() & raw.keys():
        return raw
    for key in raw:
        if key in renamed:
            warn_deprecated(f"{section}.{key}", f"{section}.{renamed[key]}")
    return {renamed.get(key, key): value for key, value in raw.items()}


VERSION = 1
"""Version of the configuration format that this release writes.

The version changes if a key gets another meaning. A key that is renamed does not need a new version
(see `rename_keys`).
"""


def check_version(version: int) -> int:
    """Check the version of a configuration and return it.

    Raises:
        ValueError: If this release does not know the version.
    """
    if version != VERSION:
        hint = "; install a newer hetero_fl" if version > VERSION else ""
        raise ValueError(f"unknown version {version}; this release reads version {VERSION}{hint}")
    return version


def choice_type(
    *names: str,
    prefix: str | tuple[str, ...] = (),
    suffix: str | None = None,
    synonyms: Mapping[str, str] | None = None,
    registered: Collection[str] = (),
    removed: Mapping[str, str] | None = None,
) -> Any:
    """Create a string type that accepts one of several names.

    If a value is invalid, the error message suggests the nearest name.

    Args:
        *names: Valid values.
        prefix: Prefix, or several prefixes, of additional valid values.
        suffix: Suffix of additional valid values. If None, there are none.
        synonyms: Valid values to suggest for other common names. For example, `{"gpu": "cuda"}`
            suggests `cuda` for `gpu`.
        registered: Further valid values, which may be added later.
        removed: What to use instead of values of an earlier version, keyed by value. A key that
            ends before a colon stands for all its values, such as `flwr` for `flwr:NAME`.
    """
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    # Where a file may refer to code, a Python program may pass an object.
    objects = (OBJECT_PREFIX,) if CODE_PREFIX in prefixes else ()

    def check(value: object) -> object:
        valid = (*names, *registered)
        if isinstance(value, str):
            has_suffix = suffix is not None and value.endswith(suffix)
            if value in valid or has_suffix or value.startswith(prefixes + objects):
                return value
        if former := describe_removed(value, removed or {}):
            raise ValueError(former)
        meant = (synonyms or {}).get(str(value), value)
        raise ValueError(f"unknown value {format_value(value)}{suggest_or_list(meant, valid)}")

    shown = [*names, *(f"{prefix}…" for prefix in prefixes)]
    return Annotated[str, BeforeValidator(check), WithJsonSchema({"enum": shown})]


def format_value(value: object) -> str:
    """Format a value for error messages, as in YAML and with at most 60 characters.

    Example:
        >>> format_value("ten"), format_value(None), format_value(True)
        ("'ten'", 'null', 'true')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:
        # Python does not convert an integer with thousands of digits to text.
        return "a very large integer"
    return text if len(text) < 60 else text[:57] + "…"


def _check_unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"each entry may occur once, got {format_value(names)}")
    return names


UniqueNames = Annotated[list[str], AfterValidator(_check_unique)]


class OwnArguments(ConfigSection):
    """A section that names user-defined code, to which all other keys are passed.

    Attributes:
        chooser: The key that names the code.
        own_prefixes: Prefixes of the names of code.
        own_names: Registered names of code.
        also_arguments: Keys of the section that are arguments of code, too.
    """

    chooser: ClassVar[str]
    own_prefixes: ClassVar[tuple[str, ...]] = (CODE_PREFIX,)
    own_names: ClassVar[Collection[str]]
    also_arguments: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        # Subclasses describe the field, whose place among their fields is last.
        arguments: dict[str, Any] | None

    @classmethod
    def takes_arguments(cls, name: object) -> bool:
        """Return whether a name is that of user-defined code."""
        return isinstance(name, str) and (
            name.startswith(cls.own_prefixes) or name in cls.own_names
        )

    @model_validator(mode="before")
    @classmethod
    def _collect_arguments(cls, raw: Any) -> Any:
        """Move the arguments of user-defined code to `arguments`."""
        if not isinstance(raw, Mapping) or not cls.takes_arguments(raw.get(cls.chooser)):
            return raw
        found = {
            str(key): value
            for key, value in raw.items()
            if key not in cls.model_fields or (key in cls.also_arguments and value is not None)
        }
        given = raw.get("arguments") or {}
        if not found or not isinstance(given, Mapping):
            return raw
        rest = {key: value for key, value in raw.items() if key not in found}
        return {**rest, "arguments": {**given, **found}}

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        """Check that arguments are set only for user-defined code."""
        name = getattr(self, self.chooser)
        if self.arguments and not self.takes_arguments(name):
            raise ValueError(
                f"arguments: does not apply to {self.chooser}={name}; write the settings as keys "
                f"next to {self.chooser}, got {format_value(self.arguments)}"
            )
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


OptimizerName: Any = choice_type("sgd", "adam", "adamw", prefix=CODE_PREFIX)


class OptimizerConfig(ConfigSection):
    """Optimizer of local training and its learning rate schedule over the rounds."""

    name: OptimizerName = Field(
        "adam",
        description="optimizer of `torch.optim`, or `python:module:name` of a function that "
        "returns an optimizer of given parameters; its state is reset in each round",
    )
    lr: PositiveFloat = Field(1e-3, description="learning rate in the first round")
    head_lr: PositiveFloat | None = Field(
        None, description="learning rate of the head; `null`: `lr`"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum; only for `sgd`")
    nesterov: bool = Field(
        False, description="use Nesterov momentum; only for `sgd` with `momentum` > 0"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="L2 penalty; for `adamw` decoupled weight decay"
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="maximum L2 norm of the gradient; `null`: no clipping"
    )
    schedule: choice_type(  # type: ignore[valid-type]
        "constant", "cosine", "step", "linear"
    ) = Field("constant", description="learning rate schedule over the rounds")
    gamma: float = Field(
        0.1,
        gt=0,
        le=1,
        description="`step`: factor of each reduction; `cosine` and `linear`: "
        "learning rate of the last round divided by `lr`",
    )
    step_rounds: PositiveInt = Field(10, description="`step`: rounds between two reductions")

    @model_validator(mode="after")
    def _check_combination(self) -> OptimizerConfig:
        """Check that momentum and Nesterov momentum are used with SGD only."""
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"nesterov requires name=sgd, got name={self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov requires momentum > 0, got momentum=0")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum requires name=sgd, got name={self.name}")
        if self.weight_decay and self.is_custom:
            raise ValueError(f"weight_decay: not used by {self.name}; set it in that function")
        return self

    @property
    def is_custom(self) -> bool:
        """Whether a user-defined function creates the optimizer."""
        return self.name.startswith((CODE_PREFIX, OBJECT_PREFIX))


class OptimizerLayer(OptimizerConfig):
    """Optimizer settings of a group or an override, before they are merged with the defaults."""

    @model_validator(mode="after")
    def _check_combination(self) -> OptimizerLayer:
        """Check that the settings of this group or override do not contradict each other."""
        is_named = "name" in self.model_fields_set
        if is_named and self.name != "sgd" and (self.momentum or self.nesterov):
            setting = "momentum" if self.momentum else "nesterov"
            raise ValueError(f"{setting} requires name=sgd, got name={self.name}")
        return self


class SGD(OptimizerConfig):
    """Stochastic gradient descent, `torch.optim.SGD`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.SGD(lr=0.1, momentum=0.9).name
        'sgd'
    """

    name: Literal["sgd"] = "sgd"


class Adam(OptimizerConfig):
    """The optimizer of Kingma and Ba (2015), `torch.optim.Adam`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Adam(lr=5e-4).lr
        0.0005
    """

    _unused: ClassVar[frozenset[str]] = frozenset({"momentum", "nesterov"})

    name: Literal["adam"] = "adam"


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), `torch.optim.AdamW`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.AdamW(weight_decay=0.01).name
        'adamw'
    """

    _unused: ClassVar[frozenset[str]] = frozenset({"momentum", "nesterov"})

    name: Literal["adamw"] = "adamw"


StalenessKind = choice_type("constant", "polynomial", "hinge")

# Default values of `a`, as in Xie et al. (2019).
STEEPNESS = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0}


class StalenessConfig(ConfigSection):
    """Weight s(τ) of an upload in asynchronous training (Xie et al. 2019, section 5.2).

    The staleness τ is the number of model versions that the server has created since the client
    received its task.
    """

    kind: StalenessKind = Field(  # type: ignore[valid-type]
        "polynomial",
        description="`constant`: 1; `polynomial`: (1 + τ)^−a; "
        "`hinge`: 1 for τ ≤ b, 1/(a·(τ − b) + 1) for τ > b",
    )
    a: NonNegativeFloat | None = Field(
        None, description="steepness a; `null`: 0.5 for `polynomial`, 10 for `hinge`"
    )
    b: NonNegativeInt = Field(4, description="`hinge`: largest staleness with full weight")

    @property
    def unused_keys(self) -> list[str]:
        """Keys that differ from their defaults but have no effect with this kind of weight."""
        unused = []
        if self.kind == "constant" and self.a is not None:
            unused.append("a")
        if self.kind != "hinge" and self.b != StalenessConfig().b:
            unused.append("b")
        return unused

    def weight(self, staleness: int) -> float:
        """Return the weight s(τ) of an upload with staleness τ, which is 1 for τ = 0."""
        a = STEEPNESS[self.kind] if self.a is None else self.a
        if self.kind == "polynomial":
            return float((1 + staleness) ** -a)
        if self.kind == "constant" or staleness <= self.b:
            return 1.0
        return 1 / (a * (staleness - self.b) + 1)

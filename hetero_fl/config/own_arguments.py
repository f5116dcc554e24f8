"""Sections of the configuration that name user-defined code and pass it their other keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator
from typing_extensions import Self

from hetero_fl.config.base import ConfigSection, format_value
from hetero_fl.utils.code_permission import CODE_PREFIX


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

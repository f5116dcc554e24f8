"""What every part of the configuration has in common: unknown keys, infinities and NaN are refused, values are frozen."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from hetero_fl.errors import nearest


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def choice(*names: str, prefix: str | None = None, suffix: str | None = None) -> Any:
    """A string type that takes one of the names (or what starts with the prefix, or ends in the suffix) and suggests the
    nearest."""

    def check(value: object) -> object:
        if isinstance(value, str):
            other = (prefix and value.startswith(prefix)) or (suffix and value.endswith(suffix))
            if value in names or other:
                return value
        raise ValueError(f"found {value!r}{nearest(value, names)}")

    return Annotated[str, BeforeValidator(check)]

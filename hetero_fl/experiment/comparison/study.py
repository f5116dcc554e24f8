"""Study files, which contain the arguments of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hetero_fl.config.base import ConfigSection
from hetero_fl.config.describe import describe_error
from hetero_fl.config.load import read_config_file
from hetero_fl.utils.errors import UserError, suggest_or_list

Section = TypeVar("Section", bound=ConfigSection)


def read_section(path: Path, section: type[Section], **defaults: Any) -> Section:
    """Read a file with the keys of a section.

    Args:
        path: A YAML or JSON file.
        section: Class of the section.
        **defaults: Values of keys that the file may omit.

    Raises:
        UserError: If the file is invalid.
    """
    raw = read_config_file(path)
    for key in raw:
        if key not in section.model_fields:
            hint = suggest_or_list(key, section.model_fields)
            raise UserError(f"{path}: {key}: unknown key{hint}")
    try:
        return section.model_validate({**defaults, **raw})
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, raw, section)}") from None


class Study(ConfigSection):
    """Arguments of a comparison, read from a file so that the comparison can be repeated.

    Attributes:
        config: The path of the configuration file. In a study file, the path is relative to the
            folder of the study file.
        algorithms: Names or variants of the methods to compare.
        seeds: Seeds. Each algorithm is run once with each seed.
        overrides: Changes to the configuration, as `key.path=value`.
        jobs: Number of runs at a time. If None, one run per core.
        out: The folder of the comparison. Default: `runs/<name of the study file>`.
    """

    config: Path
    algorithms: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    overrides: list[str] = []
    jobs: PositiveInt | None = None
    out: Path

    @classmethod
    def load(cls, path: Path) -> Study:
        """Load a study from a file.

        Raises:
            UserError: If the file is invalid.
        """
        study = read_section(path, cls, out=f"runs/{path.stem}")
        return study.model_copy(update={"config": path.parent / study.config})

"""A study: a comparison that is written down, so that one command repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from hetero_fl.config.base import Section
from hetero_fl.config.load import read
from hetero_fl.config.mistakes import describe
from hetero_fl.errors import UserError, nearest


class Study(Section):
    """`config`: a configuration's file, seen from the study's own folder; `algorithms`: as compare's `--algorithms` has them."""

    config: Path
    algorithms: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    overrides: list[str] = []
    jobs: PositiveInt | None = None
    out: Path

    @classmethod
    def read(cls, path: Path) -> Study:
        """A study's file; without `--out` it goes to `runs/<its name>`. Raises UserError, in one line, for what is wrong."""
        raw = read(path)
        for key in raw:
            if key not in cls.model_fields:
                raise UserError(f"{path}: {key}: unknown key{nearest(key, cls.model_fields)}")
        try:
            study = cls.model_validate({"out": f"runs/{path.stem}", **raw})
        except ValidationError as error:
            raise UserError(f"{path}: {describe(error, raw, cls)}") from None
        return study.model_copy(update={"config": path.parent / study.config})

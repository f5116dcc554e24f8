"""A site's own file: where its data is, what it computes with, what it tells. The server cannot override any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from hetero_fl.config.base import Section
from hetero_fl.config.clients import AugmentConfig, ClientSettings, Models, PreprocessConfig
from hetero_fl.config.load import read
from hetero_fl.config.mistakes import describe
from hetero_fl.config.source import SourceConfig
from hetero_fl.errors import UserError
from hetero_fl.experiment.deployment.limits import AllowsConfig


class TellsConfig(Section):
    """What others may know of this site besides what the method sends, the number of its rows, and its models' scores."""

    labels: bool = Field(False, description="how often each label occurs in its training rows")
    details: bool = Field(False, description="confusion matrix and calibration on its test rows")
    model: bool = Field(False, description="its model after the last round, for the run directory")


class SiteConfig(Section):
    """One participant of a federation, as it describes itself."""

    client: str = Field(description="which client of the server's configuration this site is")
    folder: str = Field("state", description="where it keeps private models and its log; relative to this file")
    data: SourceConfig | None = Field(
        None, description="its own data; none: the part that the server's configuration deals it (for rehearsals)"
    )
    model: Models | None = Field(None, description="its model; none: as the server's configuration has it")
    preprocess: PreprocessConfig | None = Field(None, description="how it sees examples; none: as there")
    augment: AugmentConfig | None = Field(None, description="random changes of its images; none: as there")
    shares: list[str] | None = Field(None, description="what may leave (see clients.defaults.shares); none: as there")
    device: str | None = Field(None, description="where it computes; none: as the server's configuration has it")
    threads: PositiveInt | None = Field(None, description="at most so many; none: as many as the server says")
    tells: TellsConfig = TellsConfig()
    allows: AllowsConfig = AllowsConfig()
    encrypt: str | None = Field(
        None,
        description="file with the key under which its folder is encrypted, made if it is not there; relative to this file",
    )

    def settings(self) -> dict[str, Any]:
        """What of a client's settings it decides itself."""
        own = self.model_dump(mode="json", exclude_unset=True, include={"model", "preprocess", "augment", "shares"})
        return {name: value for name, value in own.items() if value is not None}


def load_site(path: str | Path) -> tuple[SiteConfig, Path]:
    """A site's file and its folder. Raises UserError, in one line, for everything that is wrong with it."""
    path = Path(path)
    raw = read(path)
    try:
        site = SiteConfig.model_validate(raw)
        ClientSettings.model_validate(site.settings())
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, raw, SiteConfig)}") from None
    if site.data is not None and site.data.path is not None and not Path(site.data.path).is_absolute():
        own = site.data.model_copy(update={"path": str((path.parent / site.data.path).resolve())})
        site = site.model_copy(update={"data": own})
    if site.encrypt is not None:
        site = site.model_copy(update={"encrypt": str((path.parent / site.encrypt).resolve())})
    return site, (path.parent / site.folder).resolve()

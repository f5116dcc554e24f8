"""A site's own file: where its data is, what it computes with, what it tells. The server cannot override any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationError, field_validator

from hetero_fl.config.base import Section, choice
from hetero_fl.config.clients import AugmentConfig, ClientSettings, Models, PreprocessConfig
from hetero_fl.config.load import read
from hetero_fl.config.mistakes import describe
from hetero_fl.config.source import SourceConfig
from hetero_fl.errors import UserError
from hetero_fl.experiment.deployment.limits import AllowsConfig
from hetero_fl.experiment.deployment.transport import MESSAGE_BYTES
from hetero_fl.own_code import CONTEXT, CodePermission, references


class TellsConfig(Section):
    """What others may know of this site besides what the method sends, the number of its rows, and its models' scores."""

    labels: bool = Field(False, description="how often each label occurs in its training rows")
    details: bool = Field(False, description="confusion matrix and calibration on its test rows")
    model: bool = Field(False, description="its model after the last round, for the run directory")


class ServerAtConfig(Section):
    """The server that it answers to, and how both know each other; files are relative to the site's."""

    address: str = Field(description="host:port")
    authority: str | None = Field(
        None,
        description="the certificate of who vouches for the server; none: nothing is encrypted, for one machine alone",
    )
    key: str = Field("key", description="this site's private key; the server has the public one")
    public: str | None = Field(
        None, description="the server's public key: what it did not sign is refused; none: nothing is signed"
    )

    @field_validator("address")
    @classmethod
    def _whole(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or "://" in host or not port.isdecimal():
            raise ValueError("write host:port, such as fl.example.org:9092")
        if not 0 < int(port) <= 65535:
            raise ValueError("a port is a number from 1 to 65535")
        return address


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
    server: ServerAtConfig | None = Field(None, description="whom it answers; `hetero-fl node` needs it")
    logs: choice("text", "json") = Field("text", description="json: an object a line")  # type: ignore[valid-type]
    message_bytes: PositiveInt = Field(
        MESSAGE_BYTES, description="most bytes of a message of the server's; a longer one is refused before it is read"
    )

    def settings(self) -> dict[str, Any]:
        """What of a client's settings it decides itself."""
        own = self.model_dump(mode="json", exclude_unset=True, include={"model", "preprocess", "augment", "shares"})
        return {name: value for name, value in own.items() if value is not None}


def load_site(path: str | Path, allow_code: bool | CodePermission = False) -> tuple[SiteConfig, Path]:
    """Return a site's file and its folder.

    Raises UserError, in one line, for everything that is wrong with it, and for code that it names, for itself or in
    `allows`, unless `allow_code` permits that.
    """
    path = Path(path)
    raw = read(path)
    try:
        site = SiteConfig.model_validate(raw)
        CodePermission.of(allow_code).check(references(site.model_dump()), str(path))
        ClientSettings.model_validate(site.settings(), context={CONTEXT: True})
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, raw, SiteConfig)}") from None
    if site.data is not None and site.data.path is not None:
        own = site.data.model_copy(update={"path": str((path.parent / Path(site.data.path).expanduser()).resolve())})
        site = site.model_copy(update={"data": own})
    if site.encrypt is not None:
        site = site.model_copy(update={"encrypt": str((path.parent / site.encrypt).resolve())})
    if site.server is not None:
        files = {
            n: str((path.parent / f).resolve())
            for n in ("authority", "key", "public")
            if (f := getattr(site.server, n)) is not None
        }
        site = site.model_copy(update={"server": site.server.model_copy(update=files)})
    return site, (path.parent / site.folder).resolve()

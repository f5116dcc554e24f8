"""Configuration files of the server and of a site."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, choice_type
from hetero_fl.config.clients import AugmentConfig, ClientSettings, Models, PreprocessConfig
from hetero_fl.config.data import SourceConfig
from hetero_fl.config.errors import describe_error
from hetero_fl.config.load import read_config_file
from hetero_fl.deployment.transport import MESSAGE_BYTES
from hetero_fl.utils.code_permission import CONTEXT, OWN, CodePermission, find_references
from hetero_fl.utils.errors import UserError, suggest_or_list, suggest_similar

REMOVED = "no longer used; remove it (TLS and the nodes' keys authenticate server and nodes)"

# What a site's file allows a server to ask for; nothing is limited that is not named.


class BudgetConfig(ConfigSection):
    """What this site's training rows may be given away in all runs together, by its own account."""

    epsilon: PositiveFloat = Field(description="ε of everything that it has ever answered")
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="δ at which ε is computed; well below one over its training rows",
    )


class AllowsConfig(ConfigSection):
    """Limits of a site, against which every configuration, task and answer is checked before it goes on."""

    methods: list[str] | None = Field(None, description="values of algorithm.name; none: any")
    own_code: list[str] = Field(
        [],
        description="python:module:Name that a server's configuration may have this site run; the node needs `--allow-code`",
    )
    rounds: PositiveInt | None = Field(
        None,
        description="most rounds of a run, and most times that it trains in one; none: no limit, here and below",
    )
    epochs: PositiveFloat | None = Field(None, description="most passes over its rows in one task")
    steps: PositiveInt | None = Field(None, description="most optimizer steps in one task")
    upload_bytes: PositiveInt | None = Field(None, description="most bytes of one upload")
    total_bytes: PositiveInt | None = Field(
        None, description="most bytes of all its answers, in all runs together"
    )
    secure_sum_only: bool = Field(
        False, description="whether an upload may leave in a secure sum alone"
    )
    cohort: PositiveInt | None = Field(
        None,
        description="fewest clients whose sum may be told: of a secure sum, those with whom it shares masks",
    )
    privacy: BudgetConfig | None = Field(
        None,
        description="only runs whose noise this site adds itself (privacy.unit: record or local), up to this much",
    )

    @model_validator(mode="after")
    def _check_methods(self) -> AllowsConfig:
        from hetero_fl.algorithms import register_algorithm

        for name in self.methods or ():
            if name not in register_algorithm and not name.startswith(OWN):
                raise ValueError(
                    f"found method '{name}'{suggest_or_list(name, register_algorithm, '`hetero-fl methods`')}"
                )
        for name in self.own_code:
            if not name.startswith(OWN):
                raise ValueError(f"found own_code '{name}'; write python:package.module:Name")
        return self


# A site's own file: where its data is, what it computes with, what it tells. The server cannot
# override any of it.


class DisclosureConfig(ConfigSection):
    """What others may know of this site besides what the method sends, the number of its rows, and its models' scores."""

    labels: bool = Field(False, description="how often each label occurs in its training rows")
    details: bool = Field(False, description="confusion matrix and calibration on its test rows")
    model: bool = Field(False, description="its model after the last round, for the run directory")


class ServerConnectionConfig(ConfigSection):
    """The server that it answers to, and how both know each other; files are relative to the site's."""

    address: str = Field(description="host:port")
    authority: str | None = Field(
        None,
        description="the certificate of who vouches for the server; none: nothing is encrypted, for one machine alone",
    )
    key: str = Field("key", description="this site's private key; the server has the public one")

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or "://" in host or not port.isdecimal():
            raise ValueError(
                f"expected host:port, such as fl.example.org:9092, got '{address}'"
            )
        if not 0 < int(port) <= 65535:
            raise ValueError(f"port must be >= 1 and <= 65535, got {port}")
        return address


class SiteConfig(ConfigSection):
    """One participant of a federation, as it describes itself."""

    client: str = Field(description="which client of the server's configuration this site is")
    folder: str = Field(
        "state", description="where it keeps private models and its log; relative to this file"
    )
    data: SourceConfig | None = Field(
        None,
        description="its own data; none: the part that the server's configuration deals it (for rehearsals)",
    )
    model: Models | None = Field(
        None, description="its model; none: as the server's configuration has it"
    )
    preprocess: PreprocessConfig | None = Field(
        None, description="how it sees examples; none: as there"
    )
    augment: AugmentConfig | None = Field(
        None, description="random changes of its images; none: as there"
    )
    shares: list[str] | None = Field(
        None, description="what may leave (see clients.defaults.shares); none: as there"
    )
    device: str | None = Field(
        None, description="where it computes; none: as the server's configuration has it"
    )
    threads: PositiveInt | None = Field(
        None, description="at most so many; none: as many as the server says"
    )
    tells: DisclosureConfig = DisclosureConfig()
    allows: AllowsConfig = AllowsConfig()
    encrypt: str | None = Field(
        None,
        description="file with the key under which its folder is encrypted, made if it is not there; relative to this file",
    )
    server: ServerConnectionConfig | None = Field(
        None, description="whom it answers; `hetero-fl node` needs it"
    )
    logs: choice_type("text", "json") = Field("text", description="json: an object a line")  # type: ignore[valid-type]
    message_bytes: PositiveInt = Field(
        MESSAGE_BYTES,
        description="most bytes of a message of the server's; a longer one is refused before it is read",
    )

    def settings(self) -> dict[str, Any]:
        """What of a client's settings it decides itself."""
        own = self.model_dump(
            mode="json", exclude_unset=True, include={"model", "preprocess", "augment", "shares"}
        )
        return {name: value for name, value in own.items() if value is not None}


def load_site_config(
    path: str | Path, allow_code: bool | CodePermission = False
) -> tuple[SiteConfig, Path]:
    """Return a site's file and its folder.

    Raises UserError, in one line, for everything that is wrong with it, and for code that it names, for itself or in
    `allows`, unless `allow_code` permits that.
    """
    path = Path(path)
    raw = read_config_file(path)
    if isinstance(server := raw.get("server"), dict) and "public" in server:
        raise UserError(f"{path}: server.public: {REMOVED}")
    try:
        site = SiteConfig.model_validate(raw)
        CodePermission.from_argument(allow_code).check(
            find_references(site.model_dump()), str(path)
        )
        ClientSettings.model_validate(site.settings(), context={CONTEXT: True})
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, raw, SiteConfig)}") from None
    if site.data is not None and site.data.path is not None:
        own = site.data.model_copy(
            update={"path": str((path.parent / Path(site.data.path).expanduser()).resolve())}
        )
        site = site.model_copy(update={"data": own})
    if site.encrypt is not None:
        site = site.model_copy(update={"encrypt": str((path.parent / site.encrypt).resolve())})
    if site.server is not None:
        files = {
            n: str((path.parent / f).resolve())
            for n in ("authority", "key")
            if (f := getattr(site.server, n)) is not None
        }
        site = site.model_copy(update={"server": site.server.model_copy(update=files)})
    return site, (path.parent / site.folder).resolve()


# The server's own file: where it listens, who may come, how long it waits. It says nothing of what
# is learned.


class CertificatesConfig(ConfigSection):
    """Files with which the server shows who it is (`hetero-fl certificates` makes them); relative to the server's file."""

    authority: str = Field(
        "authority.pem", description="the certificate of who vouches for it, as nodes have it"
    )
    certificate: str = Field("server.pem", description="its own")
    key: str = Field("server.key", description="the private key that belongs to it")


class MetricsConfig(ConfigSection):
    """A port for `hetero-fl status`, Prometheus and health checks: plain HTTP, without names of rows or models."""

    host: str = Field("127.0.0.1", description="where it listens; this machine alone")
    port: int = Field(9464, ge=0, le=65535, description="0: any that is free")


class DeploymentServerConfig(ConfigSection):
    """One server of a federation."""

    host: str = Field(
        "127.0.0.1",
        description="where it listens; 0.0.0.0 is everywhere, for which it needs certificates",
    )
    port: int = Field(9092, ge=0, le=65535, description="0: any that is free")
    certificates: CertificatesConfig | None = Field(
        None, description="none: nothing is encrypted, for this machine alone"
    )
    nodes: dict[str, str] = Field(
        min_length=1,
        description="client -> file with the public key of its node; relative to the server's file",
    )
    wait: PositiveFloat = Field(600.0, description="seconds until all clients have to be there")
    deadline: PositiveFloat = Field(3600.0, description="seconds that a node may take for a task")
    patience: PositiveFloat = Field(
        60.0, description="seconds that a node which has gone is waited for while others are there"
    )
    metrics: MetricsConfig | None = Field(None, description="none: no such port is open")
    message_bytes: PositiveInt = Field(
        MESSAGE_BYTES,
        description="most bytes of a node's answer; a longer one is refused before it is read",
    )
    logs: choice_type("text", "json") = Field("text", description="json: an object a line")  # type: ignore[valid-type]

    def check_clients(self, clients: Collection[str], where: Path) -> None:
        """Raises UserError if a client of the configuration could never come."""
        for client in clients:
            if client not in self.nodes:
                hint = suggest_similar(client, [name for name in self.nodes if name not in clients])
                raise UserError(
                    f"{where}: nodes: no key for '{client}', a client of the configuration{hint}"
                )


def load_server_config(path: str | Path) -> DeploymentServerConfig:
    """A server's file, its paths made absolute. Raises UserError, in one line, for everything that is wrong with it."""
    path = Path(path)
    raw = read_config_file(path)
    if "key" in raw:
        raise UserError(f"{path}: key: {REMOVED}")
    try:
        server = DeploymentServerConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, raw, DeploymentServerConfig)}") from None
    base = path.parent.resolve()
    changes: dict[str, object] = {
        "nodes": {client: str(base / file) for client, file in server.nodes.items()}
    }
    if server.certificates is not None:
        made = {name: str(base / file) for name, file in server.certificates.model_dump().items()}
        changes["certificates"] = CertificatesConfig(**made)
    return server.model_copy(update=changes)

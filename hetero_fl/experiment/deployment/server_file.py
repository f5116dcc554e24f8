"""The server's own file: where it listens, who may come, how long it waits. It says nothing of what is learned."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from hetero_fl.config.base import Section, choice
from hetero_fl.config.load import read
from hetero_fl.config.mistakes import describe
from hetero_fl.errors import UserError, similar
from hetero_fl.experiment.deployment.transport import MESSAGE_BYTES


class CertificatesConfig(Section):
    """Files with which the server shows who it is (`hetero-fl certificates` makes them); relative to the server's file."""

    authority: str = Field("authority.pem", description="the certificate of who vouches for it, as nodes have it")
    certificate: str = Field("server.pem", description="its own")
    key: str = Field("server.key", description="the private key that belongs to it")


class MetricsConfig(Section):
    """A port for `hetero-fl status`, Prometheus and health checks: plain HTTP, without names of rows or models."""

    host: str = Field("127.0.0.1", description="where it listens; this machine alone")
    port: int = Field(9464, ge=0, le=65535, description="0: any that is free")


class ServerConfig(Section):
    """One server of a federation."""

    host: str = Field(
        "127.0.0.1", description="where it listens; 0.0.0.0 is everywhere, for which it needs certificates"
    )
    port: int = Field(9092, ge=0, le=65535, description="0: any that is free")
    certificates: CertificatesConfig | None = Field(
        None, description="none: nothing is encrypted, for this machine alone"
    )
    key: str | None = Field(
        None, description="private key with which it signs what it says, as sites know it; none: nothing is signed"
    )
    nodes: dict[str, str] = Field(
        min_length=1, description="client -> file with the public key of its node; relative to the server's file"
    )
    wait: PositiveFloat = Field(600.0, description="seconds until all clients have to be there")
    deadline: PositiveFloat = Field(3600.0, description="seconds that a node may take for a task")
    patience: PositiveFloat = Field(
        60.0, description="seconds that a node which has gone is waited for while others are there"
    )
    metrics: MetricsConfig | None = Field(None, description="none: no such port is open")
    message_bytes: PositiveInt = Field(
        MESSAGE_BYTES, description="most bytes of a node's answer; a longer one is refused before it is read"
    )
    logs: choice("text", "json") = Field("text", description="json: an object a line")  # type: ignore[valid-type]

    def check_clients(self, clients: Collection[str], where: Path) -> None:
        """Raises UserError if a client of the configuration could never come."""
        for client in clients:
            if client not in self.nodes:
                hint = similar(client, [name for name in self.nodes if name not in clients])
                raise UserError(f"{where}: nodes: no key for '{client}', a client of the configuration{hint}")


def load_server(path: str | Path) -> ServerConfig:
    """A server's file, its paths made absolute. Raises UserError, in one line, for everything that is wrong with it."""
    path = Path(path)
    raw = read(path)
    try:
        server = ServerConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, raw, ServerConfig)}") from None
    base = path.parent.resolve()
    changes: dict[str, object] = {"nodes": {client: str(base / file) for client, file in server.nodes.items()}}
    if server.key is not None:
        changes["key"] = str(base / server.key)
    if server.certificates is not None:
        made = {name: str(base / file) for name, file in server.certificates.model_dump().items()}
        changes["certificates"] = CertificatesConfig(**made)
    return server.model_copy(update=changes)

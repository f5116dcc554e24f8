"""Handshake of the server with the nodes: configuration, data reports and fingerprints."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from hetero_fl.config import Config, expand_population, resolve_config
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.federated_data import PublicPack, restrict_to_holder
from hetero_fl.deployment.conversations import Connections, Conversation
from hetero_fl.deployment.messages import (
    RequestRefusedError,
    data_info_tree,
    decode_body,
    message,
    refusal_reason,
)
from hetero_fl.deployment.validation import MAX_PIXELS, read_data_info, read_settings
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun, load_federated_data, prepare
from hetero_fl.experiment.runner import choose_for_nodes
from hetero_fl.federation.executors.base import ClientAbsentError
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import as_tensor

# Maximum number of clients that an error message lists.
MAX_LISTED_CLIENTS = 6
# Seconds that a node may take to load its data.
PREPARATION_SECONDS = 600.0


def federation_fingerprint(prepared: PreparedRun) -> str:
    """Return a SHA-256 digest of the method, the seed, the number of rounds and the clients.

    The digest depends on the number of rows, the model and the preprocessing of each client. The
    server and all nodes compute the same digest if they agree on the federation.
    """
    client_infos = prepared.federation.client_infos
    digest = hashlib.sha256(
        repr((prepared.config.algorithm, prepared.config.seed, prepared.config.rounds)).encode()
    )
    for client_id in sorted(client_infos):
        client_info = client_infos[client_id]
        digest.update(
            repr(
                (
                    client_id,
                    client_info.num_rows,
                    client_info.arch.to_json(),
                    client_info.preprocess,
                    client_info.has_proxy,
                )
            ).encode()
        )
    return digest.hexdigest()


@dataclass
class Handshake:
    """Handshake of the server with the nodes before the first round.

    The server and every node derive the federation from the configuration and compare fingerprints.
    The server receives a report about each client's rows, but not the rows.

    Args:
        connections: Connections to the nodes.
        config: Configuration, including the settings that sites define.
        public: Data sets that the server and all nodes have.
        run: Unique ID of the run.
        settings: Settings that the sites define, keyed by client.
        remote_info: Data reports of the nodes, keyed by client.
    """

    connections: Connections
    config: Config
    public: FederatedData
    run: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    remote_info: dict[str, RemoteDataInfo] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restarted server needs to resume the run, as plain values."""
        infos = {client: data_info_tree(info) for client, info in self.remote_info.items()}
        return {"run": self.run, "settings": self.settings, "told": infos}

    @cached_property
    def prepared(self) -> PreparedRun:
        """The prepared run at the server, available once all nodes have reported their rows."""
        return prepare(self.config, data=restrict_to_holder(self.public, None, self.remote_info))

    @cached_property
    def _client_directory(self) -> dict[str, Any]:
        threads = choose_for_nodes(self.prepared).threads
        infos = {client: data_info_tree(info) for client, info in self.remote_info.items()}
        return {
            "told": infos,
            "fingerprint": federation_fingerprint(self.prepared),
            "threads": threads,
        }

    @cached_property
    def _public_pack(self) -> Tensor:
        return as_tensor(PublicPack.from_data(self.public).encode())

    def request_data_info(self, client: str) -> Conversation:
        """Request the data report of a client's node, and send the public sets if they are missing.

        Returns:
            The last answer, which has the kind `told` if the node sent its data report.

        Raises:
            RequestRefusedError: If the report is invalid or differs from an earlier one.
        """
        config = resolve_config(self.config)
        # `init_from` is a folder of the server, whose states `NodeExecutor.send_states` sends.
        config["init_from"] = None
        # The loggers run at the server, and their settings may be confidential.
        config["output"]["loggers"] = []
        tree = {"config": config, "public": self.public.public_hash()}
        answer = yield message("terms", tree, run=self.run)
        if answer.head.get("ask") == "lacks":
            answer = yield message("terms", {**tree, "pack": self._public_pack}, run=self.run)
        if answer.head.get("ask") != "told":
            return answer
        info = self.receive_data_info(client, decode_body(answer))
        known = self.remote_info.get(client)
        if known is not None and known.content_hash != info.content_hash:
            raise RequestRefusedError(
                "data report: the site changed its rows or lost its folder; restore "
                "both, or start a new run"
            )
        # Keep the first report, because nodes accept only one version of the reports per run.
        self.remote_info.setdefault(client, info)
        return answer

    def receive_data_info(self, client: str, tree: Any) -> RemoteDataInfo:
        """Validate the data report of a client and return a `RemoteDataInfo`.

        Raises:
            RequestRefusedError: If the report is invalid.
        """
        return read_data_info(tree, self.public.task.outputs, self.public.own_view(client))

    def request_ready(self, client: str) -> Conversation:
        """Send all data reports to a client's node and ask the node to prepare for the run."""
        return (yield message("roster", self._client_directory, run=self.run))

    def prepare_restarted_node(self, client: str) -> Conversation:
        """Repeat the handshake with a node that was restarted.

        Returns:
            The last answer, which has the kind `ready`.

        Raises:
            RequestRefusedError: If the node is not ready afterwards.
        """
        answer = yield from self.request_data_info(client)
        if answer.head.get("ask") == "told":
            answer = yield from self.request_ready(client)
        if answer.head.get("ask") != "ready":
            raise RequestRefusedError(refusal_reason(answer))
        return answer


def perform_handshake(
    config: Config, connections: Connections, wait: float, state: Mapping[str, Any] | None = None
) -> Handshake:
    """Wait until the nodes of all clients are connected, and perform the handshake.

    Args:
        config: Configuration of the run.
        connections: Connections to the nodes.
        wait: Seconds to wait for all clients.
        state: Result of `Handshake.state_dict` from the run to resume. In this case, a single
            connected node is enough, and the other nodes may connect later. If None, a new run is
            started, and all nodes must connect.

    Returns:
        The handshake, after every connected node has prepared for the run.

    Raises:
        UserError: If the configuration or the data of the server is invalid.
        RunFailedError: If a node is missing or refuses the run.
    """
    clients = list(expand_population(config.clients))
    missing = connections.wait_for_clients(wait)
    if missing and (state is None or len(missing) == len(clients)):
        raise RunFailedError(_describe_missing(missing, wait, connections.refusals))
    references = find_references(config.model_dump())
    known = state["settings"] if state is not None else {}
    largest = _largest_side(config)
    settings: dict[str, dict[str, Any]] = {}
    for client in clients:
        if client in connections.reports:
            reported = connections.reports[client]
            settings[client] = _read_client_settings(client, reported, references, largest)
        else:
            settings[client] = known.get(client, {})
    config = _with_client_settings(config, settings, references)
    run = str(state["run"]) if state is not None else secrets.token_hex(16)
    public = load_federated_data(config, absent=clients)
    handshake = Handshake(connections, config, public, run, settings)
    if state is not None:
        for client, tree in state["told"].items():
            handshake.remote_info[client] = handshake.receive_data_info(client, tree)
    present = [client for client in clients if client not in missing]
    reports = {client: partial(handshake.request_data_info, client) for client in present}
    _converse_with_all(connections, reports, "told")
    requests = {client: partial(handshake.request_ready, client) for client in present}
    _converse_with_all(connections, requests, "ready")
    for client in missing:
        connections.log(f"{client} is not connected; continuing without it", client=client)
    return handshake


def _with_client_settings(
    config: Config, settings: Mapping[str, dict[str, Any]], references: Collection[str]
) -> Config:
    """Return the configuration with the settings that the sites define for their clients."""
    chosen = [{"match": client, **values} for client, values in settings.items() if values]
    if not chosen:
        return config
    plain = resolve_config(config)
    plain["clients"]["overrides"] = [*plain["clients"]["overrides"], *chosen]
    return load_config(plain, allow_code=CodePermission(granted=references))


def _describe_missing(
    missing: Collection[str], wait: float, refusals: Mapping[tuple[int, str], str]
) -> str:
    """Describe which clients did not connect and which nodes were refused."""
    shown = list(missing)[:MAX_LISTED_CLIENTS]
    line = f"no node connected within {wait:g} s for {', '.join(shown)}"
    if len(missing) > MAX_LISTED_CLIENTS:
        line += f" and {len(missing) - MAX_LISTED_CLIENTS} more"
    for (_, client), why in list(refusals.items())[:MAX_LISTED_CLIENTS]:
        line += f"; refused a node for client {client[:80]!r}: {why}"
    return line


def _largest_side(config: Config) -> int:
    """Return the maximum side length in pixels to which a node may resize images.

    The default limit is exceeded only if the configuration of the server contains a larger value.
    """
    views = [
        config.server.preprocess,
        *(settings.preprocess for settings in expand_population(config.clients).values()),
    ]
    return max(MAX_PIXELS, *(view.resize or 0 for view in views))


def _read_client_settings(
    client: str, reported: object, references: Collection[str], largest: int
) -> dict[str, Any]:
    try:
        return read_settings(reported, references, largest)
    except RequestRefusedError as error:
        raise RunFailedError(f"{client}: {error}") from None


def _converse_with_all(
    connections: Connections, conversations: Mapping[str, Callable[[], Conversation]], expected: str
) -> None:
    """Run a conversation with the node of each client and check the kind of the last answer.

    Args:
        connections: Connections to the nodes.
        conversations: Functions that create the conversations, keyed by client.
        expected: Expected kind of the last answer.

    Raises:
        RunFailedError: If a node is absent or sends another kind of answer.
    """
    required = len(conversations)
    for client, answer in connections.converse(conversations, PREPARATION_SECONDS, required):
        if isinstance(answer, ClientAbsentError):
            raise RunFailedError(f"{client}: {answer}")
        if answer.head.get("ask") != expected:
            event = "failed" if answer.head.get("ask") == "error" else "refused the run"
            raise RunFailedError(f"{client}: the node {event}: {refusal_reason(answer)}")

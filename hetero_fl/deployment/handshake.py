"""Agree with the nodes before the first round: configuration, row counts, fingerprints."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from hetero_fl.config import Config, expand_population, resolve_config
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.remote import PublicPack, restrict_to_holder
from hetero_fl.deployment.conversations import Connections, Conversation
from hetero_fl.deployment.messages import (
    RequestRefusedError,
    body_of,
    data_info_tree,
    message,
    reason,
)
from hetero_fl.deployment.validation import MOST_PIXELS, read_data_info, read_settings
from hetero_fl.experiment.preparation import PreparedRun, load_config, load_federated_data, prepare
from hetero_fl.experiment.runner import choose_for_nodes
from hetero_fl.federation.executors.base import ClientAbsentError
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import as_tensor

# What must be the same at the server and at every node before the first round.


def federation_fingerprint(prepared: PreparedRun) -> str:
    """SHA-256 over the clients as the rest of the run sees them: rows, models, views, settings; and over the method."""
    client_infos = prepared.federation.client_infos
    digest = hashlib.sha256(
        repr((prepared.config.algorithm, prepared.config.seed, prepared.config.rounds)).encode()
    )
    for id in sorted(client_infos):
        client_info = client_infos[id]
        digest.update(
            repr(
                (
                    id,
                    client_info.num_rows,
                    client_info.arch.to_json(),
                    client_info.preprocess,
                    client_info.has_proxy,
                )
            ).encode()
        )
    return digest.hexdigest()


# Before the first round: everybody comes, hears the configuration, tells how many rows it has, and
# prepares for the run.
#
# What is the same for all follows from the configuration at each machine by itself; the server
# knows of the clients' rows what they told, and the fingerprint shows that all mean the same
# federation.

PREPARATION_SECONDS = 600.0  # seconds that a node may take to load its data


@dataclass
class Handshake:
    """A federation whose members have met. `run` is its name, which no other run has."""

    connections: Connections
    config: Config
    public: FederatedData
    run: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each decides itself
    remote_info: dict[str, RemoteDataInfo] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """What a server that is started anew has to know, as plain values."""
        told = {client: data_info_tree(told) for client, told in self.remote_info.items()}
        return {"run": self.run, "settings": self.settings, "told": told}

    @cached_property
    def prepared(self) -> PreparedRun:
        """The run as the server knows it, once everybody has told of its rows."""
        return prepare(self.config, data=restrict_to_holder(self.public, None, self.remote_info))

    @cached_property
    def _client_directory(self) -> dict[str, Any]:
        threads = choose_for_nodes(self.prepared).threads
        told = {client: data_info_tree(told) for client, told in self.remote_info.items()}
        return {
            "told": told,
            "fingerprint": federation_fingerprint(self.prepared),
            "threads": threads,
        }

    @cached_property
    def _public_pack(self) -> Tensor:
        return as_tensor(PublicPack.from_data(self.public).encode())

    # Conversations with one node ---------------------------------------------------------------------------------------
    def request_data_info(self, client: str) -> Conversation:
        """What a client tells of its rows; it must be what it told before."""
        # a folder of the server's; see `NodeExecutor.send_states`
        config = {**resolve_config(self.config), "init_from": None}
        tree = {"config": config, "public": self.public.public_hash()}
        answer = yield message("terms", tree, run=self.run)
        if answer.head.get("ask") == "lacks":
            answer = yield message("terms", {**tree, "pack": self._public_pack}, run=self.run)
        if answer.head.get("ask") != "told":
            return answer
        told = self.receive_data_info(client, body_of(answer))
        if (
            client in self.remote_info
            and self.remote_info[client].content_hash != told.content_hash
        ):
            raise RequestRefusedError("its rows are not those that it began with")
        self.remote_info.setdefault(client, told)  # nodes take no second roster in one run
        return answer

    def receive_data_info(self, client: str, tree: Any) -> RemoteDataInfo:
        """Read what a client tells of its rows. Raises RequestRefusedError."""
        return read_data_info(tree, self.public.task.outputs, self.public.own_view(client))

    def request_ready(self) -> Conversation:
        """Whether a client is ready, now that all have told."""
        return (yield message("roster", self._client_directory, run=self.run))

    def prepare_restarted_node(self, client: str) -> Conversation:
        """Repeat the whole handshake with a node that was restarted.

        Raises:
            RequestRefusedError: If it is not ready then.
        """
        answer = yield from self.request_data_info(client)
        if answer.head.get("ask") == "told":
            answer = yield from self.request_ready()
        if answer.head.get("ask") != "ready":
            raise RequestRefusedError(reason(answer))
        return answer


def perform_handshake(
    config: Config, connections: Connections, wait: float, state: Mapping[str, Any] | None = None
) -> Handshake:
    """Meet everybody whom the configuration names.

    Args:
        wait: seconds until all have to be there.
        state: of the run that is gone on with (see `Handshake.state_dict`): who is not there may come later, if anybody is.

    Raises:
        UserError: what is wrong with the configuration or the server's own data.
        RunFailedError: somebody is missing, or refuses.
    """
    ids = list(expand_population(config.clients))
    missing = connections.wait_for_clients(wait)
    if missing and (state is None or len(missing) == len(ids)):
        raise RunFailedError(
            f"not there after {wait:g} s: {', '.join(missing[:6])}{' …' if len(missing) > 6 else ''}"
        )
    names = find_references(config.model_dump())
    before = state["settings"] if state is not None else {}
    largest = _largest_side(config)
    told_by = {
        id: _settings(id, connections.connected_clients[id], names, largest)
        if id in connections.connected_clients
        else before.get(id, {})
        for id in ids
    }
    own = [{"match": id, **settings} for id, settings in told_by.items() if settings]
    if own:
        plain = resolve_config(config)
        plain["clients"]["overrides"] = [*plain["clients"]["overrides"], *own]
        config = load_config(plain, allow_code=CodePermission(granted=names))
    run = str(state["run"]) if state is not None else secrets.token_hex(16)
    handshake = Handshake(
        connections, config, load_federated_data(config, absent=ids), run, told_by
    )
    if state is not None:
        handshake.remote_info |= {
            id: handshake.receive_data_info(id, tree) for id, tree in state["told"].items()
        }
    here = [id for id in ids if id not in missing]
    _converse_with_all(
        connections, {id: _add_remote_note(handshake.request_data_info, id) for id in here}, "told"
    )
    _converse_with_all(connections, dict.fromkeys(here, handshake.request_ready), "ready")
    for id in missing:
        connections.say(f"{id} is not there; going on without it")
    return handshake


def _largest_side(config: Config) -> int:
    """Return the side in pixels to which a node may resize: more than usual where the server's own configuration asks for it."""
    views = [
        config.server.preprocess,
        *(settings.preprocess for settings in expand_population(config.clients).values()),
    ]
    return max(MOST_PIXELS, *(view.resize or 0 for view in views))


def _settings(client: str, where: object, names: Collection[str], largest: int) -> dict[str, Any]:
    try:
        return read_settings(where, names, largest)
    except RequestRefusedError as error:
        raise RunFailedError(f"{client}: refused: {error}") from None


def _add_remote_note(
    conversation: Callable[[str], Conversation], client: str
) -> Callable[[], Conversation]:
    return lambda: conversation(client)


def _converse_with_all(
    connections: Connections, conversations: Mapping[str, Callable[[], Conversation]], wanted: str
) -> None:
    for client, answer in connections.converse(
        conversations, PREPARATION_SECONDS, len(conversations)
    ):
        if isinstance(answer, ClientAbsentError):
            raise RunFailedError(f"{client}: {answer}")
        if answer.head.get("ask") != wanted:
            raise RunFailedError(f"{client} refuses: {reason(answer)}")

"""Sites of a federation, as the server sees them: who takes part, and what they answer.

A node joins a run in three steps: it says which client it is (`hello`), it receives the
configuration and reports its rows (`terms`), and it receives the reports of all clients (`join`).
The node stores what it received, so that after a restart it continues with the first step.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from torch import Tensor

from hetero_fl.config import Config, expand_population, resolve_config
from hetero_fl.core.model_spec import Tensors
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.federated_data import PublicPack, restrict_to_holder
from hetero_fl.deployment.messages import (
    LOG,
    Body,
    FileName,
    HereHead,
    ReadyHead,
    RequestRefusedError,
    decode_body,
    message,
    read_head,
    refusal_reason,
    version_mismatch,
)
from hetero_fl.deployment.transport import (
    MESSAGE_BYTES,
    Envelope,
    Transport,
    UnreadableAnswer,
    find_violation,
)
from hetero_fl.deployment.validation import (
    MAX_PIXELS,
    data_info_tree,
    read_data_info,
    read_settings,
)
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun, load_federated_data, prepare
from hetero_fl.experiment.runner import choose_for_nodes
from hetero_fl.federation.store import PrivateState
from hetero_fl.utils.code_permission import find_references
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import as_tensor

# Seconds between checks of the connected nodes.
POLL_SECONDS = 0.5
# Seconds to wait for a disconnected node while other nodes are connected.
PATIENCE = 60.0
# Maximum number of seconds to notify nodes of the end of a run.
LEAVE_SECONDS = 15.0
# Seconds after which a greeting that was not answered is repeated.
GREETING_SECONDS = 60.0
# Seconds until a node that did not name a client is greeted again.
GREETING_RETRY_SECONDS = 10.0
# Seconds that a node may take to load its data.
PREPARATION_SECONDS = 600.0
# Maximum difference between the clocks of two machines in seconds.
MAX_CLOCK_SKEW = 10.0
# Maximum number of clients that an error message lists.
MAX_LISTED_CLIENTS = 6
# Head of an audit log: number of lines and hash of the last line.
HEAD_PATTERN = re.compile(r"(\d{1,12}):[0-9a-f]{64}")


class EventFunction(Protocol):
    """Type of functions that report an event at the server."""

    def __call__(self, line: str, *, client: str | None = None) -> None:
        """Report an event.

        Args:
            line: Message of the event.
            client: Name of the client of the event, or None.
        """


class LogHeads:
    """Heads of the audit logs of all sites.

    Every answer of a node contains the head of the site's audit log, which consists of the number
    of lines and the hash of the last line. If a site truncates or rewrites its log, the new head
    contradicts an earlier head.

    Args:
        log: Function that is called for each head that contradicts an earlier head.

    Attributes:
        longest: The head with the most lines, keyed by client.
    """

    def __init__(self, log: EventFunction) -> None:
        self.log = log
        self.longest: dict[str, str] = {}
        # The most recent head, keyed by client.
        self._last: dict[str, str] = {}

    def update(self, client: str, answer: Envelope) -> None:
        """Compare the head in a client's answer with earlier heads, and store the longer head.

        A contradiction is logged. An answer without a valid head is ignored.

        Args:
            client: Name of the client.
            answer: Answer of the client's node.
        """
        head = str(answer.head.get(LOG, ""))
        if HEAD_PATTERN.fullmatch(head) is None:
            return
        kept = self.longest.setdefault(client, head)
        last = self._last.get(client, head)
        if head != last and _lines(head) <= _lines(last):
            self.log(
                f"the audit log of '{client}' was truncated or rewritten: found {head} after "
                f"{last} (kept: {kept})",
                client=client,
            )
        self._last[client] = head
        self.longest[client] = max(kept, head, key=_lines)


def _lines(head: str) -> int:
    """Return the number of lines that the head of an audit log states."""
    return int(head.partition(":")[0])


@dataclass
class Member:
    """Connected node, and how far it has joined the run.

    Attributes:
        key: Public key of the node.
        client: Client of the node, or an empty string.
        step: Current step, "joined" after the last one, or "refused".
        number: Number of the message of the step, or an empty string if it has not been sent.
        until: Time of the monotonic clock at which the step is abandoned, or at which a refused
            node is greeted again.
        has_data: Whether the site has its own data, and therefore needs the public sets.
    """

    key: bytes
    client: str = ""
    step: Literal["hello", "terms", "join", "joined", "refused"] = "hello"
    number: str = ""
    until: float = float("inf")
    has_data: bool = False


class SitesState(Body):
    """State that a restarted server needs to resume a run.

    Attributes:
        run: ID of the run.
        settings: Settings that the sites define, keyed by client.
        reports: Data reports of the nodes, keyed by client.
    """

    run: FileName
    settings: dict[str, dict[str, Any]]
    reports: dict[str, Any]


class Sites:
    """Sites of all clients.

    Args:
        transport: Transport for the messages.
        clients: Names of the expected clients. Nodes of other clients are refused.
        log: Function that is called for each node that connects, disconnects or is refused.
        patience: Seconds to wait for a disconnected node while other nodes are connected.
        keys: Public key of each client's node in PEM format. If None, a client belongs to the first
            node that claims to be the client, until that node disconnects.
        message_bytes: Maximum size of the body of an answer in bytes.

    Attributes:
        run: ID of the run.
        prepared: The prepared run at the server, after `join`.
        state_names: Names of the clients' initial private states, keyed by client.
        log_heads: Heads of the sites' audit logs.
    """

    prepared: PreparedRun
    _public: FederatedData

    def __init__(
        self,
        transport: Transport,
        clients: Collection[str],
        log: EventFunction,
        *,
        patience: float = PATIENCE,
        keys: Mapping[str, bytes] | None = None,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.transport = transport
        self.clients = tuple(clients)
        self.log = log
        self.patience = patience
        self.message_bytes = message_bytes
        self.run = secrets.token_hex(16)
        self.state_names: dict[str, str] = {}
        self.log_heads = LogHeads(log)
        # Identifies this process. Nodes join again after a restart of the server.
        self._session = secrets.token_hex(16)
        self._keys: dict[str, bytes] = dict(keys or {})
        self._are_keys_known = keys is not None
        self._members: dict[int, Member] = {}
        # Node that speaks for each client.
        self._nodes: dict[str, int] = {}
        self._created = time.monotonic()
        # Time at which each client disconnected.
        self._disconnected: dict[str, float] = {}
        # Reason for each refusal, keyed by node number and claimed client.
        self._refusals: dict[tuple[int, str], str] = {}
        # Code that sites may name, and the maximum side length of their images.
        self._references: Collection[str] = ()
        self._largest_side = MAX_PIXELS
        # Settings and data report of each client that has connected.
        self._settings: dict[str, dict[str, Any]] = {}
        self._reports: dict[str, RemoteDataInfo] = {}
        # Bodies of the second and third step, once they are known.
        self._terms: dict[str, Any] | None = None
        self._roster: dict[str, Any] | None = None
        # Initial tensors of the clients' models in a new run.
        self._initial_models: Mapping[str, Tensors] = {}

    # The run

    def join(self, config: Config, wait: float, state: SitesState | None = None) -> PreparedRun:
        """Prepare a run with the nodes of all clients.

        The server and every node derive the federation from the configuration and compare
        fingerprints. The server receives a report about each client's rows, but not the rows.

        Args:
            config: Configuration of the run.
            wait: Seconds to wait for all clients.
            state: Result of `state` from the run to resume. In this case, a single connected
                node is enough, and the other nodes may connect later. If None, a new run is
                started, and all nodes must connect.

        Returns:
            The prepared run at the server, after every connected node has joined.

        Raises:
            UserError: If the configuration or the data of the server is invalid.
            RunFailedError: If a node is missing or refuses the run.
        """
        public = load_federated_data(config, absent=self.clients)
        self._references = find_references(config.model_dump())
        self._largest_side = _largest_side(config)
        if state is not None:
            self.run = state.run
        missing = self._wait_for(lambda member: member.step != "hello", self.clients, wait)
        if missing and (state is None or len(missing) == len(self.clients)):
            raise RunFailedError(self._describe_missing(missing, wait))
        if state is not None:
            self._settings = {**state.settings, **self._settings}
        if any(self._settings.values()):
            config = self._with_client_settings(config)
            public = load_federated_data(config, absent=self.clients)
        self._public = public
        if state is not None:
            for client, report in state.reports.items():
                self._reports[client] = self._read_report(client, report)
        present = [client for client in self.clients if client not in missing]
        self._terms = _terms_of(config, public)
        self._finish_step("terms", present)
        self.prepared = prepare(config, data=restrict_to_holder(public, None, self._reports))
        self._roster = {
            "reports": {client: data_info_tree(info) for client, info in self._reports.items()},
            "fingerprint": federation_fingerprint(self.prepared),
            "threads": choose_for_nodes(self.prepared).threads,
        }
        if state is None:
            self._initial_models = self.prepared.start.clients
        self._finish_step("join", present)
        for client in missing:
            self.log(f"{client} is not connected; continuing without it", client=client)
        return self.prepared

    def state(self) -> SitesState:
        """Return the state that a restarted server needs to resume the run."""
        reports = {client: data_info_tree(info) for client, info in self._reports.items()}
        return SitesState(run=self.run, settings=self._settings, reports=reports)

    def leave(self, why: str = "") -> None:
        """Notify all nodes that the run has ended.

        Args:
            why: Reason if the run is not complete.
        """
        messages = {
            self.transport.push(node, message("leave", run=self.run, why=why), LEAVE_SECONDS)
            for node in self._nodes.values()
            if self._members[node].step != "refused"
        }
        deadline = time.monotonic() + LEAVE_SECONDS
        while messages and (remaining := deadline - time.monotonic()) > 0:
            messages -= self.transport.pull(messages, remaining).keys()

    # Connected nodes

    def connected(self) -> list[str]:
        """Return the clients whose nodes are connected and have joined the run."""
        return [client for client in self.clients if self.node_of(client) is not None]

    def node_of(self, client: str) -> int | None:
        """Return the number of a client's node, or None if it has not joined the run."""
        node = self._nodes.get(client)
        return node if node is not None and self._members[node].step == "joined" else None

    def seconds_disconnected(self, client: str) -> float:
        """Return the number of seconds since a client disconnected, or 0 if it is connected.

        For a client that has never connected, the time since the creation of this object is
        returned.
        """
        if self.node_of(client) is not None:
            return 0.0
        return time.monotonic() - self._disconnected.get(client, self._created)

    @property
    def has_pending_step(self) -> bool:
        """Whether a connected node is about to join the run."""
        return any(member.number for member in self._members.values())

    def is_joining(self, client: str) -> bool:
        """Return whether a node that may belong to a client is about to join the run.

        A node may belong to any client until it has answered the greeting.
        """
        return any(m.number and m.client in ("", client) for m in self._members.values())

    def refresh(self) -> None:
        """Take the next step with each connected node, and forget those that disconnected."""
        self._admit_nodes()
        self.pull((), 0.0)

    def forget_node(self, node: int) -> None:
        """Forget a node that disconnected, lost a message or is no longer part of the run.

        If the node is still connected, it is greeted again.
        """
        member = self._members.pop(node, None)
        if member is None or self._nodes.get(member.client) != node:
            return
        client = member.client
        del self._nodes[client]
        self._disconnected[client] = time.monotonic()
        if not self._are_keys_known:
            # Without TLS, Flower generates a new key for a node that reconnects.
            del self._keys[client]
        self.log(f"{client} disconnected", client=client)

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers to messages, and handle the answers of nodes that join the run.

        An answer that violates the limits is replaced by `UnreadableAnswer`.

        Args:
            numbers: Numbers of the messages with a pending answer.
            wait: Seconds to wait for the first answer.

        Returns:
            The answers, keyed by message number. An answer is None if it will never arrive.
        """
        steps = {member.number: node for node, member in self._members.items() if member.number}
        answers: dict[str, Envelope | None] = {}
        for number, received in self.transport.pull([*numbers, *steps], wait).items():
            answer = None if received is None else self._bounded(received)
            if number not in steps:
                answers[number] = answer
            elif answer is None:
                self.forget_node(steps[number])
            else:
                self._handle_step(steps[number], answer)
        return answers

    def _bounded(self, answer: Envelope) -> Envelope:
        why = find_violation(answer, self.message_bytes)
        return UnreadableAnswer.with_reason(why) if why else answer

    # Joining

    def _admit_nodes(self) -> None:
        connected = self.transport.nodes()
        now = time.monotonic()
        for node, member in list(self._members.items()):
            if node not in connected or member.until < now:
                self.forget_node(node)
        for node, key in connected.items():
            self._take_step(node, self._members.setdefault(node, Member(key)))

    def _take_step(self, node: int, member: Member) -> None:
        """Send the message of a node's next step, unless it has been sent or has to wait."""
        if member.number or (envelope := self._next_message(member)) is None:
            return
        seconds = GREETING_SECONDS if member.step == "hello" else PREPARATION_SECONDS
        member.until = time.monotonic() + seconds
        member.number = self.transport.push(node, envelope, seconds + MAX_CLOCK_SKEW)

    def _next_message(self, member: Member) -> Envelope | None:
        """Return the message of a node's next step, or None if it has to wait for others."""
        about = {"run": self.run, "session": self._session}
        if member.step == "hello":
            return message("hello", **about)
        if member.step == "terms" and self._terms is not None:
            pack = self._public_pack if member.has_data else None
            return message("terms", {**self._terms, "pack": pack}, **about)
        if member.step == "join" and self._roster is not None:
            tensors = self._initial_models.get(member.client)
            state = None
            if tensors is not None:
                state = as_tensor(PrivateState({"model": dict(tensors)}).encode())
            return message("join", {**self._roster, "state": state}, **about)
        return None

    @cached_property
    def _public_pack(self) -> Tensor:
        return as_tensor(PublicPack.from_data(self._public).encode())

    def _handle_step(self, node: int, answer: Envelope) -> None:
        member = self._members[node]
        member.number = ""
        member.until = float("inf")
        handlers = {"hello": self._welcome, "terms": self._receive_report, "join": self._complete}
        if member.client:
            self.log_heads.update(member.client, answer)
        try:
            handlers[member.step](node, member, answer)
        except RequestRefusedError as error:
            self._refuse(node, member, answer, str(error))
        self._take_step(node, member)

    def _welcome(self, node: int, member: Member, answer: Envelope) -> None:
        """Accept a node for the client that its answer names."""
        if answer.head.get("ask") != "here":
            no_client = "its answer names no client"
            raise RequestRefusedError(refusal_reason(answer) if "why" in answer.head else no_client)
        if why := version_mismatch(answer.head):
            raise RequestRefusedError(why)
        here = read_head(HereHead, answer)
        client = here.client
        if client not in self.clients:
            raise RequestRefusedError("the configuration has no such client")
        self._check_key(member.key, client)
        settings = read_settings(decode_body(answer), self._references, self._largest_side)
        event = "reconnected" if client in self._settings else "connected"
        self._settings[client] = settings
        self._keys.setdefault(client, member.key)
        self._nodes[client] = node
        member.client = client
        member.has_data = here.has_data
        # A node that only claims to have joined the run is asked for its report.
        has_joined = client in self.state_names and here.session == self._session
        member.step = "joined" if has_joined else "terms"
        self.log_heads.update(client, answer)
        self._refusals.pop((node, client), None)
        self.log(f"{client} {event}", client=client)

    def _receive_report(self, node: int, member: Member, answer: Envelope) -> None:
        _check_kind(answer, "told")
        client = member.client
        info = self._read_report(client, decode_body(answer))
        # Keep the first report, because nodes accept only one version of the reports per run.
        if self._reports.setdefault(client, info).content_hash != info.content_hash:
            raise RequestRefusedError(
                "data report: the site changed its rows or lost its folder; restore "
                "both, or start a new run"
            )
        member.step = "join"

    def _complete(self, node: int, member: Member, answer: Envelope) -> None:
        _check_kind(answer, "ready")
        ready = read_head(ReadyHead, answer)
        self.state_names[member.client] = ready.state
        member.step = "joined"

    def _refuse(self, node: int, member: Member, answer: Envelope, why: str) -> None:
        claimed = member.client or str(answer.head.get("client", ""))
        if self._refusals.get((node, claimed)) != why:
            self._refusals[node, claimed] = why
            known = claimed if claimed in self.clients else None
            self.log(f"refused a node for client {claimed[:80]!r}: {why}", client=known)
        is_replaced = claimed in self._nodes and member.client == ""
        member.step = "refused"
        if not claimed or (is_replaced and not self._are_keys_known):
            # The node's worker did not start, or the node restarted while its old connection is
            # still listed. Both may be temporary.
            member.until = time.monotonic() + GREETING_RETRY_SECONDS
        else:
            self.transport.push(node, message("leave", run=self.run, why=why), 10.0)

    def _check_key(self, key: bytes, client: str) -> None:
        """Check that the key of a node is the key of a client."""
        if self._are_keys_known and client not in self._keys:
            raise RequestRefusedError(f"no key is known for client '{client}'")
        if key.strip() != self._keys.get(client, key).strip():
            raise RequestRefusedError(f"its key is not the key of client '{client}'")

    def _read_report(self, client: str, tree: Any) -> RemoteDataInfo:
        return read_data_info(tree, self._public.task.outputs, self._public.own_view(client))

    def _with_client_settings(self, config: Config) -> Config:
        """Return the configuration with the settings that the sites define for their clients."""
        chosen = [{"match": c, **values} for c, values in self._settings.items() if values]
        plain = resolve_config(config)
        before = plain["clients"]["overrides"]
        plain["clients"]["overrides"] = [*before, *chosen]
        merged = load_config(plain, allow_code=self._references)
        added = resolve_config(merged)["clients"]["overrides"][len(before) :]
        # The configuration of a run that is resumed contains the settings already.
        return config if before[-len(added) :] == added else merged

    def _wait_for(
        self, is_done: Callable[[Member], bool], clients: Collection[str], seconds: float
    ) -> list[str]:
        """Take steps until the nodes of clients have reached one, and return the other clients."""
        deadline = time.monotonic() + seconds
        while True:
            self._admit_nodes()
            missing = [
                client
                for client in clients
                if client not in self._nodes or not is_done(self._members[self._nodes[client]])
            ]
            remaining = deadline - time.monotonic()
            if not missing or remaining <= 0:
                return missing
            self.pull((), min(POLL_SECONDS, remaining))
            if not self.has_pending_step:
                time.sleep(min(POLL_SECONDS / 5, remaining))

    def _finish_step(self, step: str, clients: Collection[str]) -> None:
        """Wait until the nodes of clients have taken a step.

        Raises:
            RunFailedError: If a node refuses the run or is absent.
        """
        missing = self._wait_for(
            lambda member: member.step not in ("hello", step), clients, PREPARATION_SECONDS
        )
        for client in clients:
            node = self._nodes.get(client, 0)
            if (why := self._refusals.get((node, client))) is not None:
                raise RunFailedError(f"{client}: {why}")
        if missing:
            raise RunFailedError(f"{missing[0]}: no answer within {PREPARATION_SECONDS:g} s")

    def _describe_missing(self, missing: Collection[str], wait: float) -> str:
        """Describe which clients did not connect and which nodes were refused."""
        shown = ", ".join(list(missing)[:MAX_LISTED_CLIENTS])
        more = len(missing) - MAX_LISTED_CLIENTS
        line = f"no node connected within {wait:g} s for {shown}"
        line += f" and {more} more" if more > 0 else ""
        for (_, client), why in list(self._refusals.items())[:MAX_LISTED_CLIENTS]:
            line += f"; refused a node for client {client[:80]!r}: {why}"
        return line


def _check_kind(answer: Envelope, expected: str) -> None:
    """Check that a node has answered a step with success."""
    if answer.head.get("ask") != expected:
        event = "failed" if answer.head.get("ask") == "error" else "refused the run"
        raise RequestRefusedError(f"the node {event}: {refusal_reason(answer)}")


def _terms_of(config: Config, public: FederatedData) -> dict[str, Any]:
    tree = resolve_config(config)
    # `init_from` is a folder of the server. The nodes receive their states with the last step.
    tree["init_from"] = None
    # The loggers run at the server, and their settings may be confidential.
    tree["output"]["loggers"] = []
    return {"config": tree, "public": public.public_hash()}


def _largest_side(config: Config) -> int:
    """Return the maximum side length in pixels to which a node may resize images.

    The default limit is exceeded only if the configuration of the server contains a larger value.
    """
    views = [
        config.server.preprocess,
        *(settings.preprocess for settings in expand_population(config.clients).values()),
    ]
    return max(MAX_PIXELS, *(view.resize or 0 for view in views))


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
        fields = (
            client_id,
            client_info.num_rows,
            client_info.arch.to_json(),
            client_info.preprocess,
            client_info.has_proxy,
        )
        digest.update(repr(fields).encode())
    return digest.hexdigest()

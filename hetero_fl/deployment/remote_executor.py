"""Executor whose clients are nodes on other machines.

The nodes store the private states (see `node_storage.py`). The server's store and checkpoints
contain only the names of the states. The rest of a run is the same as in a simulation.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from typing_extensions import override

from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.deployment.conversations import Conversation, Conversations
from hetero_fl.deployment.handshake import Handshake
from hetero_fl.deployment.messages import (
    RequestRefusedError,
    decode_body,
    head_value,
    message,
    refusal_reason,
)
from hetero_fl.deployment.transport import Envelope, Head
from hetero_fl.deployment.validation import read_evaluation, read_state_name
from hetero_fl.engine.driver import Backend, DivergedError
from hetero_fl.federation.checkpoint import KEPT_CHECKPOINTS
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import ClientAbsentError, RemoteExecutor, in_order
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.errors import RunFailedError, one_line
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import as_tensor

# Key of the name of a client's state in the server's store.
STATE_KEY = "at"
# Number of attempts at a task if the node restarts or loses its state.
MAX_ATTEMPTS = 3


class NodeExecutor(RemoteExecutor):
    """Executor that sends tasks to nodes.

    Args:
        handshake: The completed handshake with the nodes.
        store: Store of the server, which contains the names of the clients' states.
        backend: Backend for computations at the server.
        deadline: Seconds that a node may take for a task.
        required: Minimum number of clients of a round. While fewer clients are connected, the
            server waits for disconnected nodes.
    """

    accepts_unencoded = False

    def __init__(
        self,
        handshake: Handshake,
        store: StateStore,
        backend: Backend,
        deadline: float,
        *,
        required: int = 1,
    ) -> None:
        self.handshake = handshake
        self.connections = handshake.connections
        self.store = store
        self.backend = backend
        self.deadline = deadline
        self.required = required
        federation = handshake.prepared.federation
        protocol = make_protocol(handshake.prepared.method, federation)
        self._is_repeatable = not protocol.has_one_time_requests
        self._listener: Callable[[str], None] | None = None
        self._dispatched = Conversations(self.connections)
        # Clients that lost their private state since the last `pop_reset_clients`.
        self._reset_clients: list[str] = []
        # Names of the clients' states in each checkpoint, newest last.
        self._checkpoint_states: deque[dict[str, str]] = deque(maxlen=KEPT_CHECKPOINTS)

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        return in_order(clients, self.as_completed(clients, request))

    @override
    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message], *, waits: bool = True
    ) -> Iterator[tuple[str, Reply]]:
        # Nodes must recognize a repeated task, so that they do not train or add noise twice. The
        # secrets of secure aggregation are valid for one sum only, so its tasks are always unique.
        nonce = "" if self._is_repeatable else secrets.token_hex(16)
        conversations = {
            client: self._task_conversation(client, request, nonce) for client in clients
        }
        required = self.required if waits else 0
        answers = self.connections.converse(conversations, self.deadline, required)
        for client, answer in answers:
            yield client, self._parse_reply(client, answer)
            # The answer may contain a model; free it before the next answer arrives.
            del answer

    @override
    def evaluate(
        self,
        clients: Sequence[str],
        broadcast: Callable[[str], Content],
        round_idx: int,
        details: bool,
    ) -> Iterator[tuple[str, ClientEvaluation | ClientAbsentError]]:
        conversations = {
            client: self._evaluation_conversation(client, broadcast, round_idx, details)
            for client in clients
        }
        answers = self.connections.converse(conversations, self.deadline, 1)
        return in_order(
            clients,
            ((client, self._parse_evaluation(client, answer)) for client, answer in answers),
        )

    @override
    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener

    @override
    def close(self) -> None:
        """Do nothing, because the caller closes the connections."""

    @override
    def connected_clients(self) -> Collection[str]:
        self.connections.refresh()
        return self.connections.node_of.keys()

    @override
    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        self._dispatched.add(
            client, self._task_conversation(client, make_request, ""), self.deadline
        )

    @override
    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        finished = self._dispatched.next_finished(wait)
        return None if finished is None else (finished[0], self._parse_reply(*finished))

    @override
    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        conversations = {
            client: self._state_conversation(client, private) for client, private in states.items()
        }
        for client, answer in self.connections.converse(
            conversations, self.deadline, len(conversations)
        ):
            if isinstance(answer, ClientAbsentError) or answer.head.get("ask") != "kept":
                raise RunFailedError(
                    f"{client}: the node refused its initial state: {_failure_reason(answer)}"
                )
            self.store.stage(
                client,
                PrivateState(
                    state={STATE_KEY: read_state_name(head_value(answer.head, "state", str))}
                ),
            )

    @override
    def on_checkpoint(self) -> None:
        self._checkpoint_states.append(
            {client: self._committed_state_name(client) for client in self.store.clients()}
        )

    @override
    def pop_reset_clients(self) -> list[str]:
        clients = self._reset_clients
        self._reset_clients = []
        return natural_order(dict.fromkeys(clients))

    def _task_conversation(
        self, client: str, make_request: Callable[[str], Message], nonce: str
    ) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            request = make_request(client)
            about: Head = {
                "round": request.round_idx,
                "again": request.attempt,
                "what": request.kind,
            }
            return self._task(client, "answer", request, nonce=nonce, about=about)

        return conversation

    def _evaluation_conversation(
        self, client: str, broadcast: Callable[[str], Content], round_idx: int, details: bool
    ) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            request = Message("read", broadcast(client), round_idx)
            about: Head = {
                "round": round_idx,
                "again": 0,
                "what": "read",
                "details": details,
            }
            return self._task(client, "read", request, nonce="", about=about)

        return conversation

    def _state_conversation(self, client: str, private: PrivateState) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            envelope = message(
                "keep", {"state": as_tensor(private.encode())}, run=self.handshake.run
            )
            for _ in range(MAX_ATTEMPTS):
                if (answer := (yield envelope)).head.get("ask") != "unready":
                    break
                yield from self.handshake.prepare_restarted_node(client)
            return answer

        return conversation

    def _task(
        self,
        client: str,
        kind: str,
        request: Message,
        *,
        nonce: str,
        about: Head,
    ) -> Conversation:
        """Send a task to a node.

        A restarted node is prepared first. A node that has lost its private state starts without
        state.

        Args:
            client: Client whose node receives the task.
            kind: "answer" for an exchange of the protocol, "read" for an evaluation.
            request: Request to send.
            nonce: String that makes the task unique. If empty, the node recognizes a repeated task.
            about: Additional entries of the message's head.
        """
        if self._listener is not None:
            self._listener(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        base = self._committed_state_name(client)
        run = self.handshake.run
        names = {states[client] for states in self._checkpoint_states if client in states}
        spare = ",".join(sorted(names))
        expires = time.time() + self.deadline
        for _ in range(MAX_ATTEMPTS):
            hashed = hashlib.sha256(request.body).hexdigest()
            parts = (run, client, kind, sorted(about.items()), base, nonce, hashed)
            task = hashlib.sha256(repr(parts).encode()).hexdigest()
            head: Head = {
                "ask": "do",
                "run": run,
                "task": task,
                "kind": kind,
                "base": base,
                "expires": expires,
            }
            answer = yield Envelope({**head, "spare": spare, **about}, request.body)
            outcome = answer.head.get("ask")
            if outcome in ("done", "failed") and answer.head.get("task") != task:
                found = one_line(answer.head.get("task"), 12)
                raise RequestRefusedError(f"answer: expected task {task[:12]}, got task {found}")
            if outcome == "lost" and base:
                base = ""
                self._reset_clients.append(client)
                self.connections.log(
                    f"{client} has lost its private state and starts without it", client=client
                )
            elif outcome == "unready":
                yield from self.handshake.prepare_restarted_node(client)
            else:
                break
        return answer

    def _committed_state_name(self, client: str) -> str:
        """Return the name of a client's committed state, or an empty string."""
        return str(self.store.get(client).state.get(STATE_KEY, ""))

    def _parse_evaluation(
        self, client: str, answer: Envelope | ClientAbsentError
    ) -> ClientEvaluation | ClientAbsentError:
        """Return the evaluation in an answer, or the error if there is none."""
        if isinstance(answer, ClientAbsentError):
            return answer
        prepared = self.handshake.prepared
        try:
            if answer.head.get("ask") != "done":
                return ClientAbsentError(refusal_reason(answer))
            return read_evaluation(
                decode_body(answer), client, prepared.federation, prepared.method
            )
        except RequestRefusedError as error:
            self.connections.log(f"{client}: {error}", client=client)
            return ClientAbsentError(str(error))

    def _parse_reply(self, client: str, answer: Envelope | ClientAbsentError) -> Reply:
        """Return the reply in an answer and stage the client's new state."""
        if isinstance(answer, ClientAbsentError):
            return answer
        if answer.head.get("ask") == "failed":
            return DivergedError(refusal_reason(answer))
        if answer.head.get("ask") != "done":
            return ClientAbsentError(refusal_reason(answer))
        try:
            what, state, check = (
                head_value(answer.head, name, str) for name in ("what", "state", "check")
            )
            state = read_state_name(state)
        except RequestRefusedError as error:
            return ClientAbsentError(f"the answer cannot be read: {error}")
        try:
            digest = bytes.fromhex(check)
        except ValueError:
            return ClientAbsentError(
                "the answer cannot be read: 'done': check: expected hexadecimal digits, "
                f"got '{one_line(check, 60)}'"
            )
        if state:
            self.store.stage(client, PrivateState(state={STATE_KEY: state}))
        return Message(what, answer.body, checksum=digest)


def _failure_reason(answer: Envelope | ClientAbsentError) -> str:
    return str(answer) if isinstance(answer, ClientAbsentError) else refusal_reason(answer)

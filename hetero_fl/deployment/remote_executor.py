"""Executor whose clients are nodes on other machines.

The nodes store the private states (see `node_storage.py`). The server's store and checkpoints
contain only the names of the states. The rest of a run is the same as in a simulation.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

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
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import (
    ALL_REPLIES,
    Arrival,
    ClientAbsentError,
    ClientLateError,
    TimedExecutor,
    Until,
    in_order,
)
from hetero_fl.federation.store import KEPT_CHECKPOINTS, PrivateState, StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.errors import RunFailedError, one_line
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import as_tensor

# Key of the name of a client's state in the server's store.
STATE_KEY = "at"
# Number of attempts at a task if the node restarts or loses its state.
MAX_ATTEMPTS = 3
# Kinds of replies that contain an upload.
UPLOADS = ("upload", "train")
# Seconds for which the server waits for connected clients, and between two checks.
MAX_WAIT = 2 * 86400.0
POLL_INTERVAL = 1.0


class NodeExecutor(TimedExecutor):
    """Executor that sends tasks to nodes.

    The time of the run is measured. The time between a crash and the resumption of the run does not
    count.

    Args:
        handshake: The completed handshake with the nodes.
        store: Store of the server, which contains the names of the clients' states.
        backend: Backend for computations at the server.
        deadline: Seconds that a node may take for a task.
        required: Minimum number of clients of a round. While fewer clients are connected, the
            server waits for disconnected nodes.
    """

    clock = "wall"

    def __init__(
        self,
        handshake: Handshake,
        store: StateStore,
        backend: Backend,
        deadline: float,
        *,
        required: int = 1,
    ) -> None:
        super().__init__(store, backend)
        self.handshake = handshake
        self.connections = handshake.connections
        self.deadline = deadline
        self.required = required
        federation = handshake.prepared.federation
        protocol = make_protocol(handshake.prepared.method, federation)
        self._is_repeatable = not protocol.has_one_time_requests
        self._listener: Callable[[str], None] | None = None
        self._started = time.monotonic()
        self._dispatched = Conversations(self.connections)
        # Start of each task in flight in seconds, keyed by client id.
        self._starts: dict[str, float] = {}
        # Clients that lost their private state since the last `record`.
        self._reset_clients: list[str] = []
        # Names of the clients' states in each checkpoint, newest last.
        self._checkpoint_states: deque[dict[str, str]] = deque(maxlen=KEPT_CHECKPOINTS)

    @property
    def now(self) -> float:
        """Time since the start of the run in seconds."""
        return time.monotonic() - self._started

    @now.setter
    def now(self, seconds: float) -> None:
        self._started = time.monotonic() - seconds

    @override
    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        start = self.now
        ends: dict[str, float] = {}
        for client, reply in in_order(clients, self._replies(clients, request, until, ends)):
            yield Arrival(client, reply, start, ends.get(client, math.inf))
            # Free the upload before the next one arrives.
            del reply

    def _replies(
        self,
        clients: Sequence[str],
        request: Callable[[str], Message],
        until: Until,
        ends: dict[str, float],
    ) -> Iterator[tuple[str, Reply]]:
        """Yield replies until enough uploads have arrived, then an error for each late client.

        The time of each arrival is added to `ends`. The deadline of a conversation takes that of
        `until` into account.
        """
        # Nodes must recognize a repeated task, so that they do not train or add noise twice. The
        # secrets of secure aggregation are valid for one sum only, so its tasks are always unique.
        nonce = "" if self._is_repeatable else secrets.token_hex(16)
        conversations = {
            client: self._task_conversation(client, request, nonce) for client in clients
        }
        required = self.required if until.waits_for_nodes else 0
        num_uploads = 0
        for client, answer in self.connections.converse(conversations, self.deadline, required):
            ends[client] = self.now
            reply = self._parse_reply(client, answer)
            num_uploads += isinstance(reply, Message) and reply.kind in UPLOADS
            yield client, reply
            # The answer may contain a model; free it before the next answer arrives.
            del answer, reply
            if num_uploads == until.uploads:
                break
        for client in [client for client in clients if client not in ends]:
            yield client, ClientLateError("the round has ended")

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
    def available(self) -> Collection[str]:
        self.connections.refresh()
        return self.connections.node_of.keys()

    @override
    def wait_for_clients(self, round_idx: int, count: int, least: int) -> Sequence[str]:
        deadline = time.monotonic() + MAX_WAIT
        while len(clients := natural_order(self.available())) < least:
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"round {round_idx + 1}: {len(clients)} of at least {least} "
                    f"clients connected within {MAX_WAIT / 3600:g} hours"
                )
            time.sleep(POLL_INTERVAL)
        return clients

    @property
    @override
    def has_arrival(self) -> bool:
        return False

    @override
    def start(self, client: str, request: Message, number: int, start: float | None = None) -> None:
        self._starts[client] = self.now if start is None else start
        conversation = self._task_conversation(client, lambda _client: request, "")
        self._dispatched.add(client, conversation, self.deadline)

    @override
    def next_arrival(self) -> Arrival | None:
        if not len(self._dispatched):
            time.sleep(POLL_INTERVAL)
            return None
        finished = self._dispatched.next_finished(POLL_INTERVAL)
        if finished is None:
            return None
        client, answer = finished
        reply = self._parse_reply(client, answer)
        return Arrival(client, reply, self._starts.pop(client), self.now)

    @override
    def load_states(self, states: Mapping[str, PrivateState]) -> None:
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
        self.store.commit()

    @override
    def on_checkpoint(self) -> None:
        """Have nodes keep their present private states, to which the run may be reset."""
        self._checkpoint_states.append(
            {client: self._committed_state_name(client) for client in self.store.clients()}
        )

    @override
    def record(self) -> dict[str, Any]:
        """Return the clients that have lost their private state since the previous call, if any."""
        clients = natural_order(dict.fromkeys(self._reset_clients))
        self._reset_clients = []
        return {"reset": clients} if clients else {}

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

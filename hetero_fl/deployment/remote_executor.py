"""Executor whose clients are nodes on other machines.

The nodes store the private states (see `node_files.py`). The server's store and checkpoints
contain only the names of the states. The rest of a run is the same as in a simulation.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from hetero_fl.communication.protocol import Content, Message, Reply
from hetero_fl.deployment.messages import (
    DoneHead,
    EvaluatedHead,
    RequestRefusedError,
    decode_body,
    read_head,
    refusal_reason,
)
from hetero_fl.deployment.sites import POLL_SECONDS, Sites
from hetero_fl.deployment.transport import Envelope, Head
from hetero_fl.deployment.validation import read_evaluation
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
from hetero_fl.utils.errors import NoUploadError, RunFailedError, one_line
from hetero_fl.utils.ordering import natural_order

# Key of the name of a client's state in the server's store.
STATE_KEY = "at"
# Kind of requests for an evaluation.
EVALUATION = "read"
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
        sites: The sites, which have joined the run.
        store: Store of the server, which contains the names of the clients' states.
        backend: Backend for computations at the server.
        deadline: Seconds that a node may take for a task.
        required: Minimum number of clients of a round. While fewer clients are connected, the
            server waits for disconnected nodes.
    """

    clock = "wall"

    def __init__(
        self,
        sites: Sites,
        store: StateStore,
        backend: Backend,
        deadline: float,
        *,
        required: int = 1,
    ) -> None:
        super().__init__(store, backend)
        self.sites = sites
        self.deadline = deadline
        self.required = required
        protocol = make_protocol(sites.prepared.method, sites.prepared.federation)
        self._is_repeatable = not protocol.has_one_time_requests
        self._started = time.monotonic()
        self._dispatched = Requests(sites)
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

        The time of each arrival is added to `ends`. The deadline of a request takes that of `until`
        into account.
        """
        # Nodes must recognize a repeated task, so that they do not train or add noise twice. The
        # secrets of secure aggregation are valid for one sum only, so its tasks are always unique.
        nonce = "" if self._is_repeatable else secrets.token_hex(16)

        def task(client: str) -> Envelope:
            return self._task(client, request(client), nonce)

        num_uploads = 0
        for client, answer in self._ask(clients, task, self.required):
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
        def task(client: str) -> Envelope:
            request = Message(EVALUATION, broadcast(client), round_idx)
            return self._task(client, request, details=details)

        answers = self._ask(clients, task, 1)
        return in_order(
            clients,
            ((client, self._parse_evaluation(client, answer)) for client, answer in answers),
        )

    def _ask(
        self, clients: Sequence[str], task: Callable[[str], Envelope], quorum: int
    ) -> Iterator[End]:
        """Send a task to each of several clients, and yield the answers as they arrive.

        Args:
            clients: Names of the clients.
            task: Function that creates the task of a client each time that it is sent.
            quorum: Minimum number of clients, see `Requests`.

        Yields:
            The client, and the answer or the error if there is no answer.
        """
        running = Requests(self.sites, min(quorum, len(clients)))
        for client in clients:
            running.add(client, task, self.deadline)
        while (finished := running.next_finished()) is not None:
            yield finished
            # The answer may contain a model; free it before the next answer arrives.
            del finished

    @override
    def available(self) -> Collection[str]:
        self.sites.refresh()
        return self.sites.connected()

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
        self._dispatched.add(client, lambda client: self._task(client, request), self.deadline)

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
        # The nodes have received the states when they joined the run.
        for client in states:
            self._stage(client, self.sites.state_names[client])
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

    def _task(
        self, client: str, request: Message, nonce: str = "", details: bool = False
    ) -> Envelope:
        """Create the message with a task, which is an exchange of the protocol or an evaluation.

        Args:
            client: Client whose node receives the task.
            request: Request to send.
            nonce: String that makes the task unique. If empty, the node recognizes a repeated task.
            details: Whether an evaluation computes all results that a report shows.
        """
        is_evaluation = request.kind == EVALUATION
        if self.listener is not None:
            self.listener(f"{client}: {'evaluation' if is_evaluation else 'train'}")
        names = {states[client] for states in self._checkpoint_states if client in states}
        about: Head = {
            "run": self.sites.run,
            "kind": "read" if is_evaluation else "answer",
            "what": request.kind,
            "round": request.round_idx,
            "again": request.attempt,
            "base": self._committed_state_name(client),
            "details": details,
        }
        hashed = hashlib.sha256(request.body).hexdigest()
        parts = (client, sorted(about.items()), nonce, hashed)
        head: Head = {
            "ask": "do",
            "task": hashlib.sha256(repr(parts).encode()).hexdigest(),
            "expires": time.time() + self.deadline,
            "spare": ",".join(sorted(names)),
        }
        return Envelope({**head, **about}, request.body)

    def _committed_state_name(self, client: str) -> str:
        """Return the name of a client's committed state, or an empty string."""
        return str(self.store.get(client).state.get(STATE_KEY, ""))

    def _stage(self, client: str, name: str) -> None:
        self.store.stage(client, PrivateState(state={STATE_KEY: name}))

    def _parse_evaluation(
        self, client: str, answer: Envelope | NoUploadError
    ) -> ClientEvaluation | ClientAbsentError:
        """Return the evaluation in an answer, or the error if there is none."""
        if isinstance(answer, NoUploadError):
            return ClientAbsentError(str(answer))
        prepared = self.sites.prepared
        try:
            self._count_reset(client, read_head(EvaluatedHead, answer))
            tree = decode_body(answer)
            return read_evaluation(tree, client, prepared.federation, prepared.method)
        except RequestRefusedError as error:
            self.sites.log(f"{client}: {error}", client=client)
            return ClientAbsentError(str(error))

    def _parse_reply(self, client: str, answer: Envelope | NoUploadError) -> Reply:
        """Return the reply in an answer and stage the client's new state."""
        if isinstance(answer, NoUploadError):
            return answer
        try:
            head = read_head(DoneHead, answer)
        except RequestRefusedError as error:
            return ClientAbsentError(f"the answer cannot be read: {error}")
        self._count_reset(client, head)
        if head.state:
            self._stage(client, head.state)
        return Message(head.what, answer.body, checksum=bytes.fromhex(head.check))

    def _count_reset(self, client: str, head: EvaluatedHead) -> None:
        if head.reset:
            self._reset_clients.append(client)
            self.sites.log(
                f"{client} has lost its private state and starts without it", client=client
            )


# Number of times that a request is sent before its client is treated as absent.
MAX_ATTEMPTS = 8

# A client, and the successful answer or the reason why there is none.
End = tuple[str, Envelope | NoUploadError]


@dataclass
class PendingRequest:
    """Request that has not been answered.

    Attributes:
        make: Function that creates the request each time that it is sent.
        seconds: Time limit in seconds.
        deadline: Time of the monotonic clock at which the request expires.
        attempts: Number of times that the request was sent.
        node: Number of the node that the request was sent to.
        number: Number of the message, or an empty string if it has to be sent.
        task: Name of the task in the request, which the answer must repeat.
    """

    make: Callable[[str], Envelope]
    seconds: float
    deadline: float
    attempts: int = 0
    node: int = 0
    number: str = ""
    task: object = None


class Requests:
    """Requests to clients, to which requests can be added at any time.

    A request is sent when the client's node is connected. If the node disconnects, restarts or is
    no longer part of the run, the request is sent again after the node has joined, and the node
    answers completed tasks from storage.

    Args:
        sites: The sites.
        quorum: Minimum number of clients that the caller needs. While fewer clients are connected
            or have answered, disconnected nodes may reconnect until their requests expire.
            Otherwise, they may reconnect within `sites.patience` seconds.
    """

    def __init__(self, sites: Sites, quorum: int = 0) -> None:
        self.sites = sites
        self.quorum = quorum
        self._pending: dict[str, PendingRequest] = {}
        self._finished: deque[End] = deque()
        self._answered: set[str] = set()
        self._last_check = 0.0

    def __len__(self) -> int:
        return len(self._pending) + len(self._finished)

    def add(self, client: str, make: Callable[[str], Envelope], seconds: float) -> None:
        """Add a request to a client, which must not have another pending request.

        Args:
            client: Name of the client.
            make: Function that creates the request each time that it is sent.
            seconds: Time limit in seconds.
        """
        self._pending[client] = PendingRequest(make, seconds, time.monotonic() + seconds)

    def next_finished(self, wait: float = float("inf")) -> End | None:
        """Wait until a request is answered or fails.

        Args:
            wait: Maximum number of seconds to wait. By default, there is no limit.

        Returns:
            The client, and the answer or the error. None if no request finishes in time or no
            request is pending.
        """
        deadline = time.monotonic() + wait
        while not self._finished and self._pending:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._advance(min(POLL_SECONDS, remaining))
        return self._finished.popleft() if self._finished else None

    def _advance(self, wait: float) -> None:
        now = time.monotonic()
        if now - self._last_check > POLL_SECONDS:
            self.sites.refresh()
            self._last_check = now
        for client, pending in list(self._pending.items()):
            node = self.sites.node_of(client)
            if pending.node != node:
                # The node has disconnected, or another node speaks for the client.
                pending.number = ""
            if not pending.number and node is not None:
                self._send(client, pending, node)
        clients = {p.number: client for client, p in self._pending.items() if p.number}
        earliest = min((p.deadline for p in self._pending.values()), default=now)
        wait = max(0.0, min(wait, earliest - now))
        answers = self.sites.pull(clients, wait)
        for number, answer in answers.items():
            self._handle_answer(clients[number], answer)
        if not answers and not clients and not self.sites.has_pending_step:
            time.sleep(min(POLL_SECONDS / 5, wait))
        self._abandon_expired()

    def _send(self, client: str, pending: PendingRequest, node: int) -> None:
        pending.attempts += 1
        if pending.attempts > MAX_ATTEMPTS:
            self._finish(client, ClientAbsentError(f"its node disconnected {MAX_ATTEMPTS} times"))
            return
        envelope = pending.make(client)
        within = max(1.0, pending.deadline - time.monotonic())
        pending.node = node
        pending.task = envelope.head.get("task")
        pending.number = self.sites.transport.push(node, envelope, within)

    def _handle_answer(self, client: str, answer: Envelope | None) -> None:
        pending = self._pending[client]
        if answer is not None:
            self.sites.log_heads.update(client, answer)
        # A node that is not part of the run, such as one that lost its files, joins it again.
        if answer is None or answer.head.get("code") == "left":
            self.sites.forget_node(pending.node)
            pending.number = ""
            return
        task = answer.head.get("task", pending.task)
        if task != pending.task:
            expected = one_line(pending.task, 12)
            error = f"answer: expected task {expected}, got task {one_line(task, 12)}"
            self._finish(client, ClientAbsentError(error))
            return
        self._answered.add(client)
        self._finish(client, _answer_or_error(answer))

    def _abandon_expired(self) -> None:
        """Finish expired requests and those whose node has been disconnected for too long."""
        now = time.monotonic()
        connected = {c for c in self._pending if self.sites.node_of(c) is not None}
        num_present = len(self._answered | connected)
        has_quorum = num_present >= self.quorum
        for client, pending in list(self._pending.items()):
            if pending.deadline <= now and pending.number:
                error = ClientLateError(f"no answer within {pending.seconds:g} s")
                self._finish(client, error)
                continue
            seconds = self.sites.seconds_disconnected(client)
            is_away = not pending.number and seconds > self.sites.patience
            is_given_up = is_away and has_quorum and not self.sites.is_joining(client)
            if pending.deadline <= now or is_given_up:
                self._finish(client, ClientAbsentError("its node is not connected"))

    def _finish(self, client: str, result: Envelope | NoUploadError) -> None:
        del self._pending[client]
        self._finished.append((client, result))


def _answer_or_error(answer: Envelope) -> Envelope | NoUploadError:
    """Return a successful answer, or the error that an unsuccessful one reports."""
    kind = answer.head.get("ask")
    if kind == "done":
        return answer
    why = refusal_reason(answer)
    return DivergedError(why) if kind == "failed" else ClientAbsentError(why)

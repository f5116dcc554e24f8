"""An executor whose sites are nodes elsewhere: a run across machines differs from a simulation in this and in nothing else.

The server keeps of each client's private state its name alone (see `node_storage.py`); what is staged, committed and put into
checkpoints is that name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from hetero_fl.communication.protocol import Content, DirectProtocol, Message, Reply
from hetero_fl.deployment.conversations import Conversation, Conversations
from hetero_fl.deployment.handshake import Handshake
from hetero_fl.deployment.messages import RequestRefusedError, body_of, head_value, message, reason
from hetero_fl.deployment.transport import Envelope, Head
from hetero_fl.deployment.validation import read_evaluation, read_state_name
from hetero_fl.engine.driver import Backend, DivergedError
from hetero_fl.federation.checkpoint import KEPT_CHECKPOINTS
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import ClientAbsentError, in_order
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import as_tensor

STATE_KEY = "at"  # where the store has a state's name
TRIES = 3  # times that a node may have to be prepared anew for one task


class NodeExecutor:
    """Has tasks done by nodes.

    Args:
        deadline: seconds that a node may take for a task; who takes longer is late.
        need: clients without whom nothing can come of a round; whoever has gone is waited for while there are fewer.
    """

    takes_payload = False

    def __init__(
        self,
        handshake: Handshake,
        store: StateStore,
        backend: Backend,
        deadline: float,
        need: int = 1,
    ) -> None:
        self.handshake = handshake
        self.connections = handshake.connections
        self.store = store
        self.backend = backend
        self.deadline = deadline
        self.need = need
        federation = handshake.prepared.federation
        self._direct = isinstance(
            make_protocol(handshake.prepared.method, federation), DirectProtocol
        )
        self._tell: Callable[[str], None] | None = None
        self._dispatched = Conversations(self.connections)  # what was dispatched
        self._lost: list[str] = []  # clients that began anew
        # Called with a client that has lost its private state, before its request is made again.
        self.on_reset: Callable[[str], object] = lambda client: None
        # the states that checkpoints name, the newest last
        self._named: deque[dict[str, str]] = deque(maxlen=KEPT_CHECKPOINTS)

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        return in_order(clients, self.as_completed(clients, request))

    def as_completed(
        self, clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        # What is repeated must be the same where an upload is all that there is, so that nothing is trained or noised twice,
        # and must not where secrets are drawn for it: they are for one sum.
        turn = "" if self._direct else secrets.token_hex(16)
        conversations = {
            client: self._task_conversation(client, request, turn) for client in clients
        }
        for client, answer in self.connections.converse(conversations, self.deadline, self.need):
            yield client, self._parse_reply(client, answer)
            del answer  # a model's worth

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

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        self._tell = listener

    def close(self) -> None:
        """Nodes are let go by who convened them."""

    # Clients on machines of their own ------------------------------------------------------------------------------------
    def connected_clients(self) -> Collection[str]:
        self.connections.refresh()
        return self.connections.node_of.keys()

    def dispatch(self, client: str, make_request: Callable[[str], Message]) -> None:
        self._dispatched.add(
            client, self._task_conversation(client, make_request, ""), self.deadline
        )

    def next_reply(self, wait: float) -> tuple[str, Reply] | None:
        ended = self._dispatched.next_finished(wait)
        return None if ended is None else (ended[0], self._parse_reply(*ended))

    def send_states(self, states: Mapping[str, PrivateState]) -> None:
        conversations = {
            client: self._state_conversation(client, private) for client, private in states.items()
        }
        for client, answer in self.connections.converse(
            conversations, self.deadline, len(conversations)
        ):
            if isinstance(answer, ClientAbsentError) or answer.head.get("ask") != "kept":
                raise RunFailedError(
                    f"{client}: it does not take the model that it should begin with: {_failure_reason(answer)}"
                )
            self.store.stage(
                client,
                PrivateState(
                    state={STATE_KEY: read_state_name(head_value(answer.head, "state", str))}
                ),
            )

    def on_checkpoint(self) -> None:
        self._named.append(
            {client: self._committed_state_name(client) for client in self.store.clients()}
        )

    def pop_reset_clients(self) -> list[str]:
        lost = self._lost
        self._lost = []
        return natural_order(dict.fromkeys(lost))

    # Conversations -----------------------------------------------------------------------------------------------------
    def _task_conversation(
        self, client: str, make_request: Callable[[str], Message], nonce: str
    ) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            request = make_request(client)
            about: Head = {
                "round": request.round_idx,
                "again": request.attempt,
                "work": request.step_share,
                "what": request.kind,
            }
            return self._task(client, "answer", request, make_request, nonce, about)

        return conversation

    def _evaluation_conversation(
        self, client: str, broadcast: Callable[[str], Content], round_idx: int, details: bool
    ) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            def make_request(client: str) -> Message:
                return Message("read", broadcast(client), round_idx)

            about: Head = {
                "round": round_idx,
                "again": 0,
                "work": 1.0,
                "what": "read",
                "details": details,
            }
            return self._task(client, "read", make_request(client), make_request, "", about)

        return conversation

    def _state_conversation(self, client: str, private: PrivateState) -> Callable[[], Conversation]:
        def conversation() -> Conversation:
            envelope = message(
                "keep", {"state": as_tensor(private.encode())}, run=self.handshake.run
            )
            for _ in range(TRIES):
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
        make_request: Callable[[str], Message],
        nonce: str,
        about: Head,
    ) -> Conversation:
        """Have one task done.

        A node that was restarted is prepared first. One that has lost its private state begins
        without it, and its request is made again: the first may depend on what it has lost.
        """
        if self._tell is not None:
            self._tell(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        base = self._committed_state_name(client)
        run = self.handshake.run
        spare = ",".join(sorted({named[client] for named in self._named if client in named}))
        expires = time.time() + self.deadline
        for _ in range(TRIES):
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
            if (said := answer.head.get("ask")) in ("done", "failed") and answer.head.get(
                "task"
            ) != task:
                raise RequestRefusedError("its answer is to another task")
            if said == "lost" and base:
                base = ""
                self._lost.append(client)
                self.on_reset(client)
                request = make_request(client)
                self.connections.say(f"{client} has lost its private state, and begins anew")
            elif said == "unready":
                yield from self.handshake.prepare_restarted_node(client)
            else:
                break
        return answer

    def _committed_state_name(self, client: str) -> str:
        """The name of a client's committed state."""
        return str(self.store.get(client).state.get(STATE_KEY, ""))

    def _parse_evaluation(
        self, client: str, answer: Envelope | ClientAbsentError
    ) -> ClientEvaluation | ClientAbsentError:
        """A reading; of a client that tells something else it is left out."""
        if isinstance(answer, ClientAbsentError):
            return answer
        prepared = self.handshake.prepared
        try:
            if answer.head.get("ask") != "done":
                return ClientAbsentError(reason(answer))
            return read_evaluation(body_of(answer), client, prepared.federation, prepared.method)
        except RequestRefusedError as error:
            self.connections.say(f"{client}: {error}")
            return ClientAbsentError(str(error))

    def _parse_reply(self, client: str, answer: Envelope | ClientAbsentError) -> Reply:
        """What a node's answer is worth; its new state is staged."""
        if isinstance(answer, ClientAbsentError):
            return answer
        if answer.head.get("ask") == "failed":
            return DivergedError(reason(answer))
        if answer.head.get("ask") != "done":
            return ClientAbsentError(reason(answer))
        try:
            what, state, check = (
                head_value(answer.head, name, str) for name in ("what", "state", "check")
            )
            state = read_state_name(state)
            digest = bytes.fromhex(check)
        except (RequestRefusedError, ValueError) as error:
            return ClientAbsentError(f"its answer cannot be read: {error}")
        if state:
            self.store.stage(client, PrivateState(state={STATE_KEY: state}))
        return Message(what, answer.body, checksum=digest)


def _failure_reason(answer: Envelope | ClientAbsentError) -> str:
    return str(answer) if isinstance(answer, ClientAbsentError) else reason(answer)

"""An executor whose sites are nodes elsewhere: a run across machines differs from a simulation in this and in nothing else.

The server keeps of each client's private state its name alone (see `node_storage.py`); what is staged, committed and put into
checkpoints is that name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping

from hetero_fl.communication.protocol import Direct, Message, Messages
from hetero_fl.deployment.conversations import Talk, Talks
from hetero_fl.deployment.handshake import Convened
from hetero_fl.deployment.messages import (
    Envelope,
    Head,
    Refused,
    body_of,
    message,
    reason,
    told_apart,
)
from hetero_fl.deployment.validation import hear_reading, hear_state
from hetero_fl.engine.driver import Diverged, Performer
from hetero_fl.federation.channel import make_protocol
from hetero_fl.federation.checkpoint import KEPT
from hetero_fl.federation.client_runtime import Reading
from hetero_fl.federation.executors.base import Absent, Reply
from hetero_fl.federation.state_store import Private, Store
from hetero_fl.utils.errors import RunFailed
from hetero_fl.utils.ordering import in_order
from hetero_fl.utils.serialization import as_tensor

AT = "at"  # where the store has a state's name
TRIES = 3  # times that a node may have to be prepared anew for one task


class Remote:
    """Has tasks done by nodes.

    Args:
        deadline: seconds that a node may take for a task; who takes longer is late.
        need: clients without whom nothing can come of a round; whoever has gone is waited for while there are fewer.
    """

    def __init__(
        self, convened: Convened, store: Store, performer: Performer, deadline: float, need: int = 1
    ) -> None:
        self.convened, self.post = convened, convened.post
        self.store, self.performer, self.deadline, self.need = store, performer, deadline, need
        federation = convened.prepared.federation
        self._direct = isinstance(make_protocol(convened.prepared.method, federation), Direct)
        self._tell: Callable[[str], None] | None = None
        self._beside = Talks(self.post)  # what was dispatched
        self._lost: list[str] = []  # clients that began anew
        # the states that checkpoints name, the newest last
        self._named: deque[dict[str, str]] = deque(maxlen=KEPT)

    def answer(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        # What is repeated must be the same where an upload is all that there is, so that nothing is trained or noised twice,
        # and must not where secrets are drawn for it: they are for one sum.
        turn = "" if self._direct else secrets.token_hex(16)
        talks = {client: self._asking(client, requests, turn) for client in requests}
        for client, answer in self.post.converse(talks, self.deadline, self.need):
            yield client, self._reply(client, answer)
            del answer  # a model's worth

    def read(
        self, broadcasts: Mapping[str, bytes], round: int, details: bool
    ) -> Iterator[tuple[str, Reading | Absent]]:
        talks = {client: self._reading(client, broadcasts, round, details) for client in broadcasts}
        for client, answer in self.post.converse(talks, self.deadline, 1):
            yield client, self._read(client, answer)

    def watch(self, listener: Callable[[str], None] | None) -> None:
        self._tell = listener

    def close(self) -> None:
        """Nodes are let go by who convened them."""

    # Clients on machines of their own ------------------------------------------------------------------------------------
    def here(self) -> Collection[str]:
        self.post.refresh()
        return self.post.node_of.keys()

    def dispatch(self, client: str, request: Message) -> None:
        self._beside.add(client, self._asking(client, {client: request}, ""), self.deadline)

    def next(self, wait: float) -> tuple[str, Reply] | None:
        ended = self._beside.next(wait)
        return None if ended is None else (ended[0], self._reply(*ended))

    def give(self, states: Mapping[str, Private]) -> None:
        talks = {client: self._giving(client, private) for client, private in states.items()}
        for client, answer in self.post.converse(talks, self.deadline, len(talks)):
            if isinstance(answer, Absent) or answer.head.get("ask") != "kept":
                raise RunFailed(
                    f"{client}: it does not take the model that it should begin with: {_why(answer)}"
                )
            self.store.stage(
                client, Private(state={AT: hear_state(told_apart(answer.head, "state", str))})
            )

    def saved(self) -> None:
        self._named.append({client: self._at(client) for client in self.store.clients()})

    def anew(self) -> list[str]:
        lost, self._lost = self._lost, []
        return in_order(dict.fromkeys(lost))

    # Conversations -----------------------------------------------------------------------------------------------------
    def _asking(self, client: str, requests: Messages, turn: str) -> Callable[[], Talk]:
        def talk() -> Talk:
            request = requests[client]
            about: Head = {
                "round": request.round,
                "again": request.again,
                "work": request.work,
                "what": request.ask,
            }
            return self._task(client, "answer", request, turn, about)

        return talk

    def _reading(
        self, client: str, broadcasts: Mapping[str, bytes], round: int, details: bool
    ) -> Callable[[], Talk]:
        def talk() -> Talk:
            request = Message("read", broadcasts[client], round)
            about: Head = {
                "round": round,
                "again": 0,
                "work": 1.0,
                "what": "read",
                "details": details,
            }
            return self._task(client, "read", request, "", about)

        return talk

    def _giving(self, client: str, private: Private) -> Callable[[], Talk]:
        def talk() -> Talk:
            envelope = message(
                "keep", {"state": as_tensor(private.encode())}, run=self.convened.run
            )
            for _ in range(TRIES):
                if (answer := (yield envelope)).head.get("ask") != "unready":
                    break
                yield from self.convened.preparing(client)
            return answer

        return talk

    def _task(self, client: str, kind: str, request: Message, turn: str, about: Head) -> Talk:
        """Have one task done; a node that was started anew is prepared first, one that has lost its state begins anew."""
        if self._tell is not None:
            self._tell(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        base, run = self._at(client), self.convened.run
        spare = ",".join(sorted({named[client] for named in self._named if client in named}))
        hashed, expires = hashlib.sha256(request.body).hexdigest(), time.time() + self.deadline
        for _ in range(TRIES):
            parts = (run, client, kind, sorted(about.items()), base, turn, hashed)
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
                raise Refused("its answer is to another task")
            if said == "lost" and base:
                base = ""
                self._lost.append(client)
                self.post.say(f"{client} has lost its private state, and begins anew")
            elif said == "unready":
                yield from self.convened.preparing(client)
            else:
                break
        return answer

    def _at(self, client: str) -> str:
        """The name of a client's committed state."""
        return str(self.store.get(client).state.get(AT, ""))

    def _read(self, client: str, answer: Envelope | Absent) -> Reading | Absent:
        """A reading; of a client that tells something else it is left out."""
        if isinstance(answer, Absent):
            return answer
        prepared = self.convened.prepared
        try:
            if answer.head.get("ask") != "done":
                return Absent(reason(answer))
            return hear_reading(body_of(answer), client, prepared.federation, prepared.method)
        except Refused as error:
            self.post.say(f"{client}: {error}")
            return Absent(str(error))

    def _reply(self, client: str, answer: Envelope | Absent) -> Reply:
        """What a node's answer is worth; its new state is staged."""
        if isinstance(answer, Absent):
            return answer
        if answer.head.get("ask") == "failed":
            return Diverged(reason(answer))
        if answer.head.get("ask") != "done":
            return Absent(reason(answer))
        try:
            what, state, check = (
                told_apart(answer.head, name, str) for name in ("what", "state", "check")
            )
            state, digest = hear_state(state), bytes.fromhex(check)
        except (Refused, ValueError) as error:
            return Absent(f"its answer cannot be read: {error}")
        if state:
            self.store.stage(client, Private(state={AT: state}))
        return Message(what, answer.body, check=digest)


def _why(answer: Envelope | Absent) -> str:
    return str(answer) if isinstance(answer, Absent) else reason(answer)

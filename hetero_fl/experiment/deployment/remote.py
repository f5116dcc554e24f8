"""An executor whose sites are nodes elsewhere: a run across machines differs from a simulation in this and in nothing else.

The server keeps of each client's private state its name alone (see `vault.py`); what is staged, committed and put into
checkpoints is that name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping

from hetero_fl.channel.protocol import Direct, Message, Messages
from hetero_fl.errors import RunFailed
from hetero_fl.experiment.deployment.convening import Convened
from hetero_fl.experiment.deployment.messages import Refused, body_of, reading_of, reason, told_apart
from hetero_fl.experiment.deployment.post import Absent, Talk
from hetero_fl.experiment.deployment.transport import Envelope, Head
from hetero_fl.runtime.executor import Reply
from hetero_fl.runtime.plans import Diverged, Performer
from hetero_fl.runtime.secure import make_protocol
from hetero_fl.runtime.site import Reading
from hetero_fl.runtime.store import Private, Store

AT = "at"  # where the store has a state's name
TRIES = 3  # times that a node may have to be prepared anew for one task


class Remote:
    """Has tasks done by nodes.

    Args:
        deadline: seconds that a node may take for a task; who takes longer is not in the round.
    """

    def __init__(self, convened: Convened, store: Store, performer: Performer, deadline: float) -> None:
        self.convened, self.post = convened, convened.post
        self.store, self.performer, self.deadline = store, performer, deadline
        federation = convened.prepared.federation
        self._direct = isinstance(make_protocol(convened.prepared.method, federation), Direct)
        self._tell: Callable[[str], None] | None = None

    def answer(self, requests: Messages) -> Iterator[tuple[str, Reply]]:
        # What is repeated must be the same where an upload is all that there is, so that nothing is trained or noised twice,
        # and must not where secrets are drawn for it: they are for one sum.
        turn = "" if self._direct else secrets.token_hex(16)
        talks = {client: self._asking(client, requests, turn) for client in requests}
        for client, answer in self.post.converse(talks, self.deadline):
            yield client, self._reply(client, answer)

    def read(self, broadcasts: Mapping[str, bytes], round: int, details: bool) -> Iterator[tuple[str, Reading]]:
        talks = {client: self._reading(client, broadcasts, round, details) for client in broadcasts}
        for client, answer in self.post.converse(talks, self.deadline):
            if isinstance(answer, Envelope) and answer.head.get("ask") == "done":
                yield client, reading_of(body_of(answer))
            else:
                raise RunFailed(f"{client}: its model cannot be read: {_why(answer)}")

    def watch(self, listener: Callable[[str], None] | None) -> None:
        self._tell = listener

    def close(self) -> None:
        """Nodes are let go by who convened them."""

    # Conversations -----------------------------------------------------------------------------------------------------
    def _asking(self, client: str, requests: Messages, turn: str) -> Callable[[], Talk]:
        def talk() -> Talk:
            request = requests[client]
            about: Head = {"round": request.round, "again": request.again, "work": request.work, "what": request.ask}
            return self._task(client, "answer", request, turn, about)

        return talk

    def _reading(self, client: str, broadcasts: Mapping[str, bytes], round: int, details: bool) -> Callable[[], Talk]:
        def talk() -> Talk:
            request = Message("read", broadcasts[client], round)
            about: Head = {"round": round, "again": 0, "work": 1.0, "what": "read", "details": details}
            return self._task(client, "read", request, "", about)

        return talk

    def _task(self, client: str, kind: str, request: Message, turn: str, about: Head) -> Talk:
        """Have one task done; a node that was started anew is prepared first."""
        if self._tell is not None:
            self._tell(f"{client}: {'train' if kind == 'answer' else 'evaluation'}")
        base, run = str(self.store.get(client).state.get(AT, "")), self.convened.run
        parts = (run, client, kind, sorted(about.items()), base, turn, hashlib.sha256(request.body).hexdigest())
        task = hashlib.sha256(repr(parts).encode()).hexdigest()
        expires = time.time() + self.deadline
        head: Head = {"ask": "do", "run": run, "task": task, "kind": kind, "base": base, "expires": expires, **about}
        for _ in range(TRIES):
            answer = yield Envelope(head, request.body)
            if answer.head.get("ask") != "unready":
                if answer.head.get("ask") in ("done", "failed") and answer.head.get("task") != task:
                    raise Refused("its answer is to another task")
                return answer
            yield from self.convened.preparing(client)
        return answer

    def _reply(self, client: str, answer: Envelope | Absent) -> Reply:
        """What a node's answer is worth; its new state is staged."""
        if isinstance(answer, Absent):
            return answer
        if answer.head.get("ask") == "failed":
            return Diverged(str(answer.head.get("why")))
        if answer.head.get("ask") != "done":
            return Absent(reason(answer))
        try:
            what, state, check = (told_apart(answer.head, name, str) for name in ("what", "state", "check"))
            digest = bytes.fromhex(check)
        except (Refused, ValueError) as error:
            return Absent(f"its answer cannot be read: {error}")
        if state:
            self.store.stage(client, Private(state={AT: state}))
        return Message(what, answer.body, check=digest)


def _why(answer: Envelope | Absent) -> str:
    return str(answer) if isinstance(answer, Absent) else reason(answer)

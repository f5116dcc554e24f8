"""A site's side of a federation: answers the server's messages with its own data, models and state.

Tasks are computed by the same `Worker` that computes them in a worker process of a simulation.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from hetero_fl.channel.protocol import Message
from hetero_fl.codec import CodecError, as_bytes, as_tensor, decode, encode
from hetero_fl.errors import RunFailed, UserError, one_line
from hetero_fl.experiment.deployment.account import TRAIN
from hetero_fl.experiment.deployment.audit_log import AGAIN, AuditLog, Entry
from hetero_fl.experiment.deployment.identity import LOG, NodeKeys
from hetero_fl.experiment.deployment.joined import MODEL, Joined, begin, plain
from hetero_fl.experiment.deployment.messages import (
    FORM,
    JUNK,
    Refused,
    body_of,
    message,
    reading_tree,
    told_apart,
    told_tree,
    versions,
)  # fmt: skip
from hetero_fl.experiment.deployment.policy import digest_of
from hetero_fl.experiment.deployment.site_file import SiteConfig
from hetero_fl.experiment.deployment.transport import Envelope, fault_of
from hetero_fl.experiment.deployment.vault import KEPT, Cipher, Lost
from hetero_fl.payload import Payload
from hetero_fl.runtime.jobs import Job
from hetero_fl.runtime.plans import Diverged
from hetero_fl.runtime.site import Reading
from hetero_fl.runtime.store import Private


class Node:
    """One client of a federation.

    Args:
        folder: where it keeps what must outlive its process.
        say: told, in one line, of what it is asked and of what it refuses.
        keys: of whoever is spoken with; none: no message is signed.
        key: this site's own, with which its log is signed; none: that of `keys`, if there are any.

    Raises:
        UserError: its log was tampered with, or the key of its folder is none.
    """

    def __init__(
        self,
        site: SiteConfig,
        folder: Path,
        say: Callable[[str], None] = lambda line: None,
        keys: NodeKeys | None = None,
        key: EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.site, self.folder, self.say, self.keys = site, folder, say, keys
        self.cipher = None if site.encrypt is None else Cipher.of(Path(site.encrypt))
        for each in (folder, folder / "runs"):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o700)
        self.log = AuditLog(folder / "audit.jsonl", keys.own if key is None and keys is not None else key)
        self._line: Entry = {}  # what the log will say of the message in hand
        self.joined: Joined | None = None
        self.left: str | None = None  # why it was let go, once it was
        self._turn = threading.Lock()  # one message at a time: the same one may come twice
        self._jobs = 0

    def handle(self, envelope: Envelope) -> Envelope:
        """The answer to a message; what is wrong with it, or with this site, is one."""
        answers = {
            "hello": self._hello, "terms": self._terms, "roster": self._roster, "keep": self._keep, "do": self._do,
            "leave": self._leave,
        }  # fmt: skip
        with self._turn:
            head = envelope.head
            self._line = {
                "run": one_line(head.get("run", ""), 64),
                "ask": one_line(head.get("ask"), 20),
                "in": len(envelope.body),
            }
            try:
                if why := fault_of(envelope, self.site.message_bytes):
                    raise Refused(why)
                if self.keys is not None:
                    self.keys.check(envelope, self.site.client)
                ask = told_apart(head, "ask", str)
                if ask not in answers:
                    raise Refused(f"asked for '{ask}', which this release does not know")
                answer = answers[ask](envelope)
                self._put_down(answer)
            except Lost as error:
                self.say(f"lost: {error}")
                answer = self._without("lost", str(error))
            except (Refused, UserError, RunFailed) as error:
                answer = self._refusal(str(error))
            except (*JUNK, OSError) as error:  # the disk may be full
                answer = self._refusal(f"{type(error).__name__}: {one_line(error, 200)}")
            if self.keys is None:
                return answer
            with contextlib.suppress(UserError):
                answer = Envelope({**answer.head, LOG: self.log.head}, answer.body)
            return self.keys.sign(answer, envelope, self.site.client)

    def _put_down(self, answer: Envelope) -> None:
        """Into the log, before the answer leaves."""
        outcome = self._line.pop("outcome", str(answer.head.get("ask")))
        entry = self.log.append(**self._line, out=len(answer.body), outcome=outcome)
        if self.joined is not None:
            self.joined.account.take(entry)

    def _refusal(self, why: str) -> Envelope:
        why = one_line(why)
        self.say(f"refused: {why}")
        return self._without("refused", why)

    def _without(self, ask: str, why: str) -> Envelope:
        """An answer with which nothing of this site's leaves."""
        answer = message(ask, why=why)
        self._line = {k: v for k, v in self._line.items() if k not in ("kinds", "spent")} | {"outcome": f"{ask}: {why}"}
        with contextlib.suppress(
            OSError, UserError
        ):  # the disk may be full, the log damaged: then it is said, at least
            self._put_down(answer)
        return answer

    # Joining ---------------------------------------------------------------------------------------------------------
    def _hello(self, envelope: Envelope) -> Envelope:
        return message("here", {"settings": self.site.settings()}, client=self.site.client, **versions())

    def _terms(self, envelope: Envelope) -> Envelope:
        """What this site tells of its rows, under a configuration."""
        run = told_apart(envelope.head, "run", str)
        found = begin(self.site, self.folder, self.cipher, self.log.entries(), run, body_of(envelope))
        if found is None:
            return message("lacks")
        self.joined, told = found
        self._line["kinds"] = ["numbers of rows", "a hash of them", *(["label counts"] if told.labels else [])]
        self._line["kinds"] += ["preprocessing"] if told.view else []
        return message("told", told_tree(told))

    def _roster(self, envelope: Envelope) -> Envelope:
        """Everything about the run is known now: prepare for it."""
        joined = self._in(envelope)
        found = joined.prepare(self.site, body_of(envelope), self._leaving)
        self.say(f"ready: {joined.config.name}, {joined.config.algorithm['name']}, {joined.config.rounds} rounds")
        return message("ready", fingerprint=found)

    def _leave(self, envelope: Envelope) -> Envelope:
        self.left, self.joined = one_line(envelope.head.get("why", "")), None
        self.say("let go" + (f": {self.left}" if self.left else ""))
        return message("left")

    def _keep(self, envelope: Envelope) -> Envelope:
        """A private state to begin with, from another run of the server's."""
        if self.joined is None or self.joined.worker is None or self.joined.run != envelope.head.get("run"):
            return message("unready")
        state = as_bytes(body_of(envelope)["state"])
        try:
            Private.decode(state, bounded=True)
        except (CodecError, TypeError) as error:
            raise Refused(f"the state to begin with cannot be read ({error})") from None
        return message("kept", state=self.joined.vault.keep(state))

    # Tasks -----------------------------------------------------------------------------------------------------------
    def _do(self, envelope: Envelope) -> Envelope:
        head = envelope.head
        if self.joined is None or self.joined.worker is None or self.joined.run != head.get("run"):
            return message("unready")
        vault, account, task = self.joined.vault, self.joined.account, plain(told_apart(head, "task", str))
        kind, base = told_apart(head, "kind", str), told_apart(head, "base", str) and plain(str(head["base"]))
        if kind not in ("answer", "read"):
            raise Refused(f"asked to '{kind[:20]}', which this release does not know")
        asked = Message(
            told_apart(head, "what", str), envelope.body, told_apart(head, "round", int), told_apart(head, "again", int),
            told_apart(head, "work", float),
        )  # fmt: skip
        digest = digest_of(kind, asked, base)
        self._line |= {"round": asked.round, "what": one_line(asked.ask, 20), "task": task, "asked": digest.hex()}
        if told_apart(head, "expires", float) < time.time():
            raise Refused(f"task {task[:12]} has expired")
        if account.tasks.get(task, digest) != digest:
            raise Refused(f"task {task[:12]} came before, and asked for something else")
        if digest in account.answered:
            self._line["outcome"] = AGAIN
        assert self.joined.policy is not None  # it comes with the worker
        if spent := self.joined.policy.check(kind, asked, digest):
            self._line["spent"] = spent
        if (kept := vault.read("answer")) is not None and (known := decode(kept, FORM))["head"]["task"] == task:
            self._line["kinds"] = ["what was answered before"]
            body = as_bytes(known["body"])
            self.joined.policy.check_size(len(body), upload=True)
            return Envelope(known["head"], body)
        self.joined.noise.task = digest
        if kind == "read":
            return self._read(asked, base, bool(head.get("details", False)), task)
        spare = [plain(name) for name in str(head.get("spare", "")).split(",") if name][:KEPT]
        answer = self._answer(asked, base, task, spare)
        vault.write("answer", encode({"head": answer.head, "body": as_tensor(answer.body)}, FORM))
        return answer

    def _answer(self, asked: Message, base: str, task: str, spare: Collection[str]) -> Envelope:
        """An exchange of the round's protocol; states to be `spare`d are those to which the server may go back."""
        assert self.joined is not None and self.joined.worker is not None and self.joined.policy is not None
        me, vault, worker = self.site.client, self.joined.vault, self.joined.worker
        notes = vault.read("notes")
        private: dict[str, bytes | None] = {me: vault.state(base)} if asked.ask == TRAIN else {}
        job = self._job("answer", asked, private, notes={} if notes is None else {me: notes})
        done = worker.do(job)
        if done.error is not None:
            raise Refused(f"{asked.ask}: {done.error}")
        if me in done.notes:
            vault.write("notes", done.notes[me])
        else:
            vault.drop("notes")
        reply = done.replies[me]
        if isinstance(reply, Diverged):
            return message("failed", why=str(reply), task=task)
        self._line.setdefault("kinds", [reply.ask])  # an upload has said more of itself
        self.joined.policy.check_size(len(reply.body), upload=True)
        state = vault.keep(done.private[me], spare) if me in done.private else ""  # by what was not trained, none
        check = hashlib.sha256(reply.body).hexdigest()
        return Envelope({"ask": "done", "task": task, "what": reply.ask, "state": state, "check": check}, reply.body)

    def _read(self, asked: Message, base: str, details: bool, task: str) -> Envelope:
        """What its model is worth: scores, and what else this site tells."""
        assert self.joined is not None and self.joined.worker is not None and self.joined.policy is not None
        job = self._job("read", asked, {self.site.client: self.joined.vault.state(base)}, details)
        done = self.joined.worker.do(job)
        if done.error is not None:
            raise Refused(f"evaluation: {done.error}")
        reading = done.readings[self.site.client]
        if reading.model:  # at the end of the run: it is this site's own, whoever else may have it
            self.joined.vault.write(MODEL, reading.model)
        told = self._told_of(reading)
        answer = message("done", reading_tree(told), task=task)
        self.joined.policy.check_size(len(answer.body), upload=False)
        self._line["kinds"] = ["scores", *(["confusion"] if told.confusion else []), *(["model"] if told.model else [])]
        return answer

    def _leaving(self, client: str, upload: Payload) -> None:
        """An upload that is about to be encoded."""
        assert self.joined is not None and self.joined.policy is not None
        self.joined.policy.check_upload(upload)
        self._line["kinds"] = self.joined.policy.kinds(upload)

    def _told_of(self, reading: Reading) -> Reading:
        tells = self.site.tells
        if not tells.model:
            reading = replace(reading, model=b"")
        return reading if tells.details else replace(reading, confusion={}, calibration={}, forecast={})

    def _job(self, kind: Any, asked: Message, private: dict[str, bytes | None], details: bool = False,
             notes: dict[str, bytes] | None = None) -> Job:  # fmt: skip
        self._jobs += 1
        me = self.site.client
        return Job(self._jobs, kind, [[me]], {me: asked}, private, details, notes or {})

    def _in(self, envelope: Envelope) -> Joined:
        run = told_apart(envelope.head, "run", str)
        if self.joined is None or self.joined.run != run:
            raise Refused(f"this site is not in run {run[:12]}")
        return self.joined

"""The node process: answer the server with the site's data, models and state."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from hetero_fl.communication.protocol import Message
from hetero_fl.config import Config, expand_population
from hetero_fl.core.payload import Payload
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.remote import PublicPack, describe_client_rows, restrict_to_holder
from hetero_fl.deployment.audit_log import REPEATED, TRAIN, AuditLog, Entry, SiteUsage
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.handshake import federation_fingerprint
from hetero_fl.deployment.messages import (
    FORM,
    JUNK,
    LOG,
    RequestRefusedError,
    body_of,
    data_info_tree,
    evaluation_tree,
    head_value,
    message,
    versions,
)
from hetero_fl.deployment.node_storage import MAX_STATES, Cipher, NodeStorage, StateLostError
from hetero_fl.deployment.policy import (
    Policy,
    check_config,
    check_raw_config,
    digest_of,
    run_fingerprint,
)
from hetero_fl.deployment.transport import Envelope, find_fault
from hetero_fl.deployment.validation import read_data_info
from hetero_fl.experiment.preparation import load_config, load_federated_data, prepare
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.workers import Worker, WorkerJob, WorkerSetup
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.privacy.mechanisms import SecretNoiseSource
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import NoUploadError, RunFailedError, UserError, one_line
from hetero_fl.utils.serialization import CodecError, as_bytes, as_tensor, decode, encode

# A run that a node takes part in: begun when it hears the configuration, prepared when it hears who
# else is in it.

MOST_THREADS = 1024
MODEL = "model.safetensors"  # in the folder of a run: what the site uses after the last round


@dataclass
class ParticipatingRun:
    """The run that a node takes part in."""

    run: str
    config: Config
    data: FederatedData
    storage: NodeStorage
    usage: SiteUsage
    noise: SecretNoiseSource
    worker: Worker | None = None  # once the roster is known
    policy: Policy | None = None  # likewise

    def prepare(self, site: SiteConfig, tree: Any, leaving: Callable[[str, Payload], None]) -> str:
        """Everything about the run is known now. Returns the fingerprint of the federation.

        Args:
            site: The site's file.
            tree: What the server sent about the run.
            leaving: Called with each upload before it is encoded.

        Raises:
            RequestRefusedError: If the server means another federation.
        """
        outputs = self.data.task.outputs
        told = {
            id: read_data_info(each, outputs, self.data.own_view(id))
            for id, each in tree["told"].items()
        }
        prepared = prepare(self.config, data=restrict_to_holder(self.data, site.client, told))
        if (found := federation_fingerprint(prepared)) != tree["fingerprint"]:
            raise RequestRefusedError(
                "this site makes other clients of the configuration than the server does"
            )
        others = hashlib.sha256(repr(sorted(told.items())).encode()).digest()
        if self.storage.read("roster") not in (None, others):
            raise RequestRefusedError(
                "what is said of the others' rows is not what was said when it began this run"
            )
        self.storage.write("roster", others)
        federation = replace(prepared.federation, noise=self.noise)
        device = choose_device(site.device or self.config.runtime.device)
        if not 1 <= (threads := int(tree["threads"])) <= MOST_THREADS:
            raise RequestRefusedError(f"threads: found {threads}; expected 1 to {MOST_THREADS}")
        threads = min(threads, site.threads or threads)
        setup = WorkerSetup(
            prepared.method,
            federation,
            threads,
            (str(device),),
            precision=self.config.runtime.precision,
            deterministic=self.config.runtime.deterministic,
        )
        self.worker = Worker(setup, 0)
        self.policy = Policy(site, prepared, self.usage)
        self.worker.runtime.review_upload = leaving
        return found


def begin_run(
    site: SiteConfig,
    folder: Path,
    cipher: Cipher | None,
    entries: Iterable[Entry],
    run: str,
    tree: Any,
) -> tuple[ParticipatingRun, RemoteDataInfo] | None:
    """A run whose configuration a site has heard, and what it tells of its rows; None if it lacks the public sets.

    Raises RequestRefusedError for what the site does not grant, and for another configuration than it heard before.
    """
    me = site.client
    raw = check_raw_config(tree["config"], site.allows)
    permission = CodePermission(granted=site.allows.own_code)
    # a folder of the server's
    config = load_config(raw, allow_code=permission).model_copy(update={"init_from": None})
    clients = expand_population(config.clients)
    if me not in clients:
        raise RequestRefusedError(f"the configuration has no client '{me}'")
    check_config(config, site, clients[me])
    if site.data is None:
        data = load_federated_data(config)
        if data.public_hash() != tree["public"]:
            raise RequestRefusedError(
                "the public sets that its configuration names are not the server's"
            )
    else:
        pack = _read_public_pack(NodeStorage(folder / "public", cipher), tree)
        if pack is None:
            return None
        own = clients[me].model_copy(update={"data": site.data})
        data = pack.data_of_client(me, config.data, {**clients, me: own}, config.seed)
    own_view = clients[me].preprocess.normalize == "own"
    told = describe_client_rows(data, me, own_view, site.tells.labels)
    storage = NodeStorage(folder / "runs" / check_file_name(run), cipher)
    mark = run_fingerprint(raw, told.content_hash, str(tree["public"]))
    if (known := storage.read("terms")) is None:
        storage.write("terms", mark)
    elif known != mark:
        raise RequestRefusedError(
            "the configuration, the public sets or this site's rows are not those with which it began this run"
        )
    secret = storage.secret("noise")
    # who guesses all rows but one could try the last against a plain hash
    if site.allows.privacy is not None:
        told = replace(
            told,
            content_hash=hmac.new(secret, told.content_hash.encode(), hashlib.sha256).hexdigest(),
        )
    return ParticipatingRun(
        run, config, data, storage, SiteUsage.from_log(entries, run), SecretNoiseSource(secret)
    ), told


def _read_public_pack(storage: NodeStorage, tree: Any) -> PublicPack | None:
    """The public sets that the server has named by their hash: from this message, or kept from an earlier one."""
    public = str(tree["public"])
    data = (
        as_bytes(tree["pack"])
        if tree.get("pack") is not None
        else storage.read(check_file_name(public))
    )
    if data is None:
        return None
    try:
        pack = PublicPack.decode(data)
    except (CodecError, KeyError, TypeError, ValueError) as error:
        raise RequestRefusedError(f"the public sets cannot be read ({error})") from None
    if pack.content_hash() != public:
        raise RequestRefusedError("the public sets are not those that were named")
    storage.write(check_file_name(public), data)
    return pack


def check_file_name(name: str) -> str:
    """A name from outside as one of a file. Raises RequestRefusedError for one that is none."""
    if not (name.isalnum() and len(name) <= 64):
        raise RequestRefusedError(f"found the name {name[:80]!r}")
    return name


# A site's side of a federation: answers the server's messages with its own data, models and state.
#
# Tasks are computed by the same `Worker` that computes them in a worker process of a simulation.


class Node:
    """One client of a federation.

    Args:
        folder: where it keeps what must outlive its process.
        say: told, in one line, of what it is asked and of what it refuses.
        key: this site's private key, with which its log is signed; none: it is not.

    Raises:
        UserError: its log was tampered with, or the key of its folder is none.
    """

    def __init__(
        self,
        site: SiteConfig,
        folder: Path,
        say: Callable[[str], None] = lambda line: None,
        key: EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.site = site
        self.folder = folder
        self.say = say
        self.cipher = None if site.encrypt is None else Cipher.from_key_file(Path(site.encrypt))
        for each in (folder, folder / "runs"):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o700)
        self.log = AuditLog(folder / "audit.jsonl", key)
        self._line: Entry = {}  # what the log will say of the message in hand
        self.joined: ParticipatingRun | None = None
        self.left: str | None = None  # why it was let go, once it was
        self._turn = threading.Lock()  # one message at a time: the same one may come twice
        self._jobs = 0

    def handle(self, envelope: Envelope) -> Envelope:
        """The answer to a message; what is wrong with it, or with this site, is one."""
        answers = {
            "hello": self._hello, "terms": self._describe_data, "roster": self._prepare, "keep": self._receive_state, "do": self._run_task,
            "leave": self._end_run,
        }  # fmt: skip
        with self._turn:
            head = envelope.head
            self._line = {
                "run": one_line(head.get("run", ""), 64),
                "ask": one_line(head.get("ask"), 20),
                "in": len(envelope.body),
            }
            try:
                if why := find_fault(envelope, self.site.message_bytes):
                    raise RequestRefusedError(why)
                ask = head_value(head, "ask", str)
                if ask not in answers:
                    raise RequestRefusedError(
                        f"asked for '{ask}', which this release does not know"
                    )
                answer = answers[ask](envelope)
                self._log_answer(answer)
            except StateLostError as error:
                self.say(f"lost: {error}")
                answer = self._empty_answer("lost", str(error))
            except (RequestRefusedError, UserError, RunFailedError) as error:
                answer = self._refusal(str(error))
            except (*JUNK, OSError) as error:  # the disk may be full
                answer = self._refusal(f"{type(error).__name__}: {one_line(error, 200)}")
            return Envelope({**answer.head, LOG: self.log.head}, answer.body)

    def _log_answer(self, answer: Envelope) -> None:
        """Into the log, before the answer leaves."""
        outcome = self._line.pop("outcome", str(answer.head.get("ask")))
        entry = self.log.append(**self._line, out=len(answer.body), outcome=outcome)
        if self.joined is not None:
            self.joined.usage.add_entry(entry)

    def _refusal(self, why: str) -> Envelope:
        why = one_line(why)
        self.say(f"refused: {why}")
        return self._empty_answer("refused", why)

    def _empty_answer(self, kind: str, why: str) -> Envelope:
        """An answer with which nothing of this site's leaves."""
        answer = message(kind, why=why)
        self._line = {k: v for k, v in self._line.items() if k not in ("kinds", "spent")} | {
            "outcome": f"{kind}: {why}"
        }
        with contextlib.suppress(
            OSError, UserError
        ):  # the disk may be full, the log damaged: then it is said, at least
            self._log_answer(answer)
        return answer

    # Joining ---------------------------------------------------------------------------------------------------------
    def _hello(self, envelope: Envelope) -> Envelope:
        return message(
            "here", {"settings": self.site.settings()}, client=self.site.client, **versions()
        )

    def _describe_data(self, envelope: Envelope) -> Envelope:
        """What this site tells of its rows, under a configuration."""
        run = head_value(envelope.head, "run", str)
        found = begin_run(
            self.site, self.folder, self.cipher, self.log.entries(), run, body_of(envelope)
        )
        if found is None:
            return message("lacks")
        self.joined, told = found
        self._line["kinds"] = [
            "numbers of rows",
            "a hash of them",
            *(["label counts"] if told.labels else []),
        ]
        self._line["kinds"] += ["preprocessing"] if told.view else []
        return message("told", data_info_tree(told))

    def _prepare(self, envelope: Envelope) -> Envelope:
        """Everything about the run is known now: prepare for it."""
        joined = self._current_run(envelope)
        found = joined.prepare(self.site, body_of(envelope), self._check_upload)
        self.say(
            f"ready: {joined.config.name}, {joined.config.algorithm['name']}, {joined.config.rounds} rounds"
        )
        return message("ready", fingerprint=found)

    def _end_run(self, envelope: Envelope) -> Envelope:
        self.left = one_line(envelope.head.get("why", ""))
        self.joined = None
        self.say("let go" + (f": {self.left}" if self.left else ""))
        return message("left")

    def _receive_state(self, envelope: Envelope) -> Envelope:
        """A private state to begin with, from another run of the server's."""
        if (
            self.joined is None
            or self.joined.worker is None
            or self.joined.run != envelope.head.get("run")
        ):
            return message("unready")
        state = as_bytes(body_of(envelope)["state"])
        try:
            PrivateState.decode(state, bounded=True)
        except (CodecError, TypeError) as error:
            raise RequestRefusedError(f"the state to begin with cannot be read ({error})") from None
        return message("kept", state=self.joined.storage.save_state(state))

    # Tasks -----------------------------------------------------------------------------------------------------------
    def _run_task(self, envelope: Envelope) -> Envelope:
        head = envelope.head
        if self.joined is None or self.joined.worker is None or self.joined.run != head.get("run"):
            return message("unready")
        storage = self.joined.storage
        usage = self.joined.usage
        task = check_file_name(head_value(head, "task", str))
        kind = head_value(head, "kind", str)
        base = head_value(head, "base", str) and check_file_name(str(head["base"]))
        if kind not in ("answer", "read"):
            raise RequestRefusedError(f"asked to '{kind[:20]}', which this release does not know")
        asked = Message(
            head_value(head, "what", str), envelope.body, head_value(head, "round", int), head_value(head, "again", int),
            head_value(head, "work", float),
        )  # fmt: skip
        digest = digest_of(kind, asked, base)
        self._line |= {
            "round": asked.round_idx,
            "what": one_line(asked.kind, 20),
            "task": task,
            "asked": digest.hex(),
        }
        if head_value(head, "expires", float) < time.time():
            raise RequestRefusedError(f"task {task[:12]} has expired")
        if usage.tasks.get(task, digest) != digest:
            raise RequestRefusedError(f"task {task[:12]} came before, and asked for something else")
        if digest in usage.answered:
            self._line["outcome"] = REPEATED
        assert self.joined.policy is not None  # it comes with the worker
        load_state = partial(storage.load_state, base)
        if spent := self.joined.policy.check(kind, asked, digest, load_state):
            self._line["spent"] = spent
        if (kept := storage.read("answer")) is not None and (known := decode(kept, FORM))["head"][
            "task"
        ] == task:
            self._line["kinds"] = ["what was answered before"]
            body = as_bytes(known["body"])
            self.joined.policy.check_size(len(body), upload=True)
            return Envelope(known["head"], body)
        self.joined.noise.task = digest
        if kind == "read":
            return self._evaluate(asked, base, bool(head.get("details", False)), task)
        spare = [check_file_name(name) for name in str(head.get("spare", "")).split(",") if name][
            :MAX_STATES
        ]
        answer = self._answer_request(asked, base, task, spare)
        storage.write("answer", encode({"head": answer.head, "body": as_tensor(answer.body)}, FORM))
        return answer

    def _answer_request(
        self, request: Message, base: str, task: str, spare: Collection[str]
    ) -> Envelope:
        """An exchange of the round's protocol; states to be `spare`d are those to which the server may go back."""
        assert (
            self.joined is not None
            and self.joined.worker is not None
            and self.joined.policy is not None
        )
        me = self.site.client
        storage = self.joined.storage
        worker = self.joined.worker
        notes = storage.read("notes")
        private: dict[str, bytes | None] = (
            {me: storage.load_state(base)} if request.kind == TRAIN else {}
        )
        job = self._worker_job(
            "answer", request, private, notes={} if notes is None else {me: notes}
        )
        done = worker.run_job(job)
        if done.error is not None:
            raise RequestRefusedError(f"{request.kind}: {done.error}")
        if me in done.notes:
            storage.write("notes", done.notes[me])
        else:
            storage.drop("notes")
        reply = done.replies[me]
        if isinstance(reply, NoUploadError):
            return message("failed", why=str(reply), task=task)
        self._line.setdefault("kinds", [reply.kind])  # an upload has said more of itself
        self.joined.policy.check_size(len(reply.body), upload=True)
        # by what was not trained, none
        state = storage.save_state(done.private[me], spare) if me in done.private else ""
        check = hashlib.sha256(reply.body).hexdigest()
        return Envelope(
            {"ask": "done", "task": task, "what": reply.kind, "state": state, "check": check},
            reply.body,
        )

    def _evaluate(self, request: Message, base: str, details: bool, task: str) -> Envelope:
        """What its model is worth: scores, and what else this site tells."""
        assert (
            self.joined is not None
            and self.joined.worker is not None
            and self.joined.policy is not None
        )
        job = self._worker_job(
            "read", request, {self.site.client: self.joined.storage.load_state(base)}, details
        )
        done = self.joined.worker.run_job(job)
        if done.error is not None:
            raise RequestRefusedError(f"evaluation: {done.error}")
        reading = done.evaluations[self.site.client]
        if reading.model:  # at the end of the run: it is this site's own, whoever else may have it
            self.joined.storage.write(MODEL, reading.model)
        told = self._shared_evaluation(reading)
        answer = message("done", evaluation_tree(told), task=task)
        self.joined.policy.check_size(len(answer.body), upload=False)
        self._line["kinds"] = [
            "scores",
            *(["confusion"] if told.confusion else []),
            *(["model"] if told.model else []),
        ]
        return answer

    def _check_upload(self, client: str, upload: Payload) -> None:
        """An upload that is about to be encoded."""
        assert self.joined is not None and self.joined.policy is not None
        self.joined.policy.check_upload(upload)
        self._line["kinds"] = self.joined.policy.shared_kinds(upload)

    def _shared_evaluation(self, evaluation: ClientEvaluation) -> ClientEvaluation:
        tells = self.site.tells
        if not tells.model:
            evaluation = replace(evaluation, model=b"")
        return (
            evaluation
            if tells.details
            else replace(evaluation, confusion={}, calibration={}, forecast={})
        )

    def _worker_job(self, kind: Any, request: Message, private: dict[str, bytes | None], details: bool = False,
             notes: dict[str, bytes] | None = None) -> WorkerJob:  # fmt: skip
        self._jobs += 1
        me = self.site.client
        return WorkerJob(self._jobs, kind, [[me]], {me: request}, private, details, notes or {})

    def _current_run(self, envelope: Envelope) -> ParticipatingRun:
        run = head_value(envelope.head, "run", str)
        if self.joined is None or self.joined.run != run:
            raise RequestRefusedError(f"this site is not in run {run[:12]}")
        return self.joined

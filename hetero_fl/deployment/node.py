"""Node of a site, which answers the messages of the server."""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys
from hetero_fl.config import Config, expand_population
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.federated_data import PublicPack, describe_client_rows, restrict_to_holder
from hetero_fl.deployment.audit_log import (
    REPEATED,
    TRAIN,
    AuditLog,
    Entry,
    SiteUsage,
    refused_configurations,
)
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.handshake import federation_fingerprint
from hetero_fl.deployment.messages import (
    FORM,
    LOG,
    RequestRefusedError,
    check_file_name,
    data_info_tree,
    decode_body,
    evaluation_tree,
    head_value,
    message,
    versions,
)
from hetero_fl.deployment.node_keys import load_public_key
from hetero_fl.deployment.node_storage import (
    MAX_STATES,
    NodeStorage,
    StateLostError,
    load_or_create_key,
)
from hetero_fl.deployment.policy import (
    Policy,
    check_config,
    check_limit,
    check_raw_config,
    check_sources,
    run_fingerprint,
    task_digest,
)
from hetero_fl.deployment.transport import Envelope, find_violation
from hetero_fl.deployment.validation import read_data_info
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data, prepare
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.worker import (
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerJob,
    WorkerSetup,
)
from hetero_fl.federation.store import PrivateState
from hetero_fl.privacy.noise import SecretNoiseSource
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import (
    NoUploadError,
    RunFailedError,
    UserError,
    one_line,
    suggest_or_list,
)
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings
from hetero_fl.utils.serialization import CodecError, as_bytes, as_tensor, decode, encode
from hetero_fl.utils.text import pluralize

MAX_THREADS = 1024
# Name of the file in a run's folder that contains the site's model after the last round.
MODEL_FILE = "model.safetensors"


@dataclass
class ParticipatingRun:
    """Run in which a node participates.

    Args:
        run: ID of the run.
        config: Configuration of the run.
        data: Data of the site and the public sets.
        storage: Files of the run.
        usage: Completed tasks, and privacy and traffic usage of the site.
        noise: Source of privacy noise.

    Attributes:
        worker: Worker that runs the tasks. Set by `prepare`.
        policy: Limits of the site. Set by `prepare`.
        is_prepared: Whether `prepare` has been called.
        warned: Warnings of the tasks, each of which is issued once.
    """

    run: str
    config: Config
    data: FederatedData
    storage: NodeStorage
    usage: SiteUsage
    noise: SecretNoiseSource
    worker: Worker = field(init=False)
    policy: Policy = field(init=False)
    is_prepared: bool = field(default=False, init=False)
    warned: set[RecordedWarning] = field(default_factory=set, init=False)

    @property
    def shared_key_name(self) -> str:
        """Name of the key of homomorphic encryption, which does not reveal the key, or ""."""
        key = self.worker.runtime.federation.shared_key
        return key.name.hex() if key is not None else ""

    def prepare(
        self,
        site: SiteConfig,
        tree: Any,
        site_keys: SiteKeys,
        review_upload: Callable[[str, Payload], None],
    ) -> str:
        """Prepare for the tasks of the run and return the fingerprint of the federation.

        Args:
            site: Configuration of the site.
            tree: Decoded message with the data reports of all clients, the server's fingerprint and
                the number of threads.
            site_keys: Keys that sign the keys of a round of secure aggregation.
            review_upload: Function that is called with the client and the upload before the upload
                is encoded.

        Raises:
            RequestRefusedError: If the fingerprint differs from the server's, the data reports
                changed during the run, or the number of threads is out of range.
        """
        outputs = self.data.task.outputs
        infos = {
            client_id: read_data_info(report, outputs, self.data.own_view(client_id))
            for client_id, report in tree["told"].items()
        }
        prepared = prepare(self.config, data=restrict_to_holder(self.data, site.client, infos))
        if (fingerprint := federation_fingerprint(prepared)) != tree["fingerprint"]:
            raise RequestRefusedError(
                "fingerprint: the method, seed, clients or models at this site differ from the "
                "server's; use the same code and data reports at both"
            )
        reports_digest = hashlib.sha256(repr(sorted(infos.items())).encode()).digest()
        if self.storage.read("roster") not in (None, reports_digest):
            raise RequestRefusedError(
                "data reports: the reports of the clients changed since this site joined the run; "
                "start a new run"
            )
        self.storage.write("roster", reports_digest)
        if self.config.channel.homomorphic is not None and site.shared_key is not None:
            shared_key = SharedKey.load(Path(site.shared_key))
            keyed = replace(prepared.federation, shared_key=shared_key)
            prepared = replace(prepared, federation=keyed)
        federation = replace(prepared.federation, noise=self.noise, site_keys=site_keys)
        device = choose_device(site.device or self.config.runtime.device)
        if not 1 <= (threads := int(tree["threads"])) <= MAX_THREADS:
            raise RequestRefusedError(f"threads: must be >= 1 and <= {MAX_THREADS}, got {threads}")
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
        self.worker.runtime.review_upload = review_upload
        self.is_prepared = True
        return fingerprint


def begin_run(
    site: SiteConfig,
    folder: Path,
    storage_key: bytes | None,
    *,
    entries: Sequence[Entry],
    run: str,
    tree: Any,
) -> tuple[ParticipatingRun, RemoteDataInfo] | None:
    """Join a run with the configuration that the server sent.

    Args:
        site: Configuration of the site.
        folder: Folder of the site.
        storage_key: Key that encrypts the site's files. If None, files are not encrypted.
        entries: Entries of the site's audit log.
        run: ID of the run.
        tree: Decoded message with the configuration of the run, the hash of the public sets and,
            if the site requested them, the public sets.

    Returns:
        The run and the site's data report, or None if the site does not have the public sets.

    Raises:
        RequestRefusedError: If the site does not allow the configuration, the site is not a client
            in the configuration, or the configuration or the data changed since the site joined
            the run.
        UserError: If the configuration or the data is invalid.
    """
    client = site.client
    check_limit(
        "refused configurations in 24 hours",
        refused_configurations(entries) + 1,
        "refusals",
        site.allows.refusals,
    )
    raw = check_raw_config(tree["config"], site.allows)
    permission = CodePermission(granted=site.allows.own_code)
    try:
        config = load_config(raw, allow_code=permission)
        clients = expand_population(config.clients)
    except UserError as error:
        raise RequestRefusedError(error) from None
    # What a site reads comes from its file alone; `init_from` is a folder of the server.
    sources = config.data.model_copy(update={"root": site.root})
    config = config.model_copy(update={"init_from": None, "data": sources})
    if client not in clients:
        raise RequestRefusedError(
            f"client: '{client}' is not a client of the server's configuration"
            f"{suggest_or_list(client, clients)}",
            "policy: clients",
        )
    check_config(config, site, clients[client])
    if site.data is None:
        check_sources(config, site.allows)
        data = load_federated_data(config)
        if data.public_hash() != tree["public"]:
            raise RequestRefusedError(
                "public sets: the sets of this site differ from the server's; use the same files"
            )
    else:
        pack = _read_public_pack(NodeStorage(folder / "public", storage_key), tree)
        if pack is None:
            return None
        settings = clients[client].model_copy(update={"data": site.data})
        # The columns and classes come from the public sets, the label from the site's file.
        sources = sources.model_copy(update={"label": None, "text": None})
        data = pack.data_of_client(client, sources, {**clients, client: settings}, config.seed)
    own_view = clients[client].preprocess.normalize == "own"
    info = describe_client_rows(data, client, own_view, site.tells.labels)
    storage = NodeStorage(folder / "runs" / check_file_name(run), storage_key)
    fingerprint = run_fingerprint(raw, info.content_hash, str(tree["public"]))
    if (known := storage.read("terms")) is None:
        storage.write("terms", fingerprint)
    elif known != fingerprint:
        raise RequestRefusedError(
            f"run {run[:12]}: the configuration, the public sets or this site's rows changed "
            "since the site joined the run; start a new run",
            "data",
        )
    # With an unkeyed hash, an attacker who knows all rows but one could verify guesses of that row.
    info = replace(info, content_hash=storage.digest(info.content_hash.encode()))
    usage = SiteUsage.from_log(entries, run)
    noise = SecretNoiseSource(storage.secret("noise"))
    return ParticipatingRun(run, config, data, storage, usage, noise), info


def _read_public_pack(storage: NodeStorage, tree: Any) -> PublicPack | None:
    """Read the public sets from the message or from the site's folder.

    Returns:
        The public sets with the hash in the message, or None if the site does not have them.

    Raises:
        RequestRefusedError: If the public sets in the message are malformed or have another hash.
    """
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
        raise RequestRefusedError(f"public sets: cannot be read ({error})") from None
    if pack.content_hash() != public:
        raise RequestRefusedError(f"public sets: expected the hash {public[:12]}, got another")
    storage.write(check_file_name(public), data)
    return pack


def _run_job(joined: ParticipatingRun, job: WorkerJob, what: str) -> JobResult:
    """Run a job and return its result, or raise the exception with which the job failed.

    Args:
        joined: The run.
        job: The job.
        what: Description of the job for error messages.

    Raises:
        RequestRefusedError: If the request is malformed.
        UserError: If the site does not share an item of the upload, or its data cannot be used.
        RunFailedError: If the job failed with another exception.
    """
    done = joined.worker.run_job(job)
    issue_warnings(done.warnings, joined.warned)
    if isinstance(done.error, PayloadError):
        raise RequestRefusedError(f"{what}: {done.error}")
    if isinstance(done.error, UserError):
        raise UserError(f"{what}: {done.error}")
    if done.error is not None:
        raise RunFailedError(f"{what}: {done.error}") from RemoteTracebackError(done.trace)
    return done


class Node:
    """Client of a federation that answers the server's messages.

    Tasks run in the same `Worker` class as in the worker processes of a simulation.

    Args:
        site: Configuration of the site.
        folder: Folder for private state and the audit log.
        log: Function that is called with a line for each event, such as a refused message.
        key: Private key of the site, which signs the audit log and the site's keys of secure
            aggregation. If None, they are not signed.

    Attributes:
        audit_log: Audit log of the site.
        joined: The current run, or None between runs.
        left: Reason for which the server ended the last run, or an empty string if the run
            completed. Before the first run ends, the value is None.

    Raises:
        UserError: If the audit log was modified, or the encryption key of the folder or a key of
            `allows.keys` is invalid.
    """

    def __init__(
        self,
        site: SiteConfig,
        folder: Path,
        log: Callable[[str], None] = lambda _line: None,
        key: EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.site = site
        self.folder = folder
        self.log = log
        keys = site.allows.keys
        others = None if keys is None else {c: load_public_key(Path(f)) for c, f in keys.items()}
        self.site_keys = SiteKeys(key, others)
        self.storage_key = None if site.encrypt is None else load_or_create_key(Path(site.encrypt))
        for each in (folder, folder / "runs"):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o700)
        self.audit_log = AuditLog(folder / "audit.jsonl", key)
        # The log entry of the current message.
        self._line: Entry = {}
        self.joined: ParticipatingRun | None = None
        self.left: str | None = None
        # Messages are handled one at a time, because the same message may arrive twice.
        self._lock = threading.Lock()

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message of the server.

        Errors are returned as unsuccessful answers, except errors of the audit log: without a line
        in the log, nothing leaves the site.

        Raises:
            UserError: If the audit log was changed.
            RunFailedError: If the audit log cannot be written.
        """
        with self._lock:
            head = envelope.head
            self._line = {
                "run": one_line(head.get("run", ""), 64),
                "ask": one_line(head.get("ask"), 20),
                "in": len(envelope.body),
            }
            try:
                answer = self._handle(envelope)
            except StateLostError as error:
                answer = self._unsuccessful("lost", error.code, error)
            except RequestRefusedError as error:
                answer = self._unsuccessful("refused", error.code, error)
            except UserError as error:
                answer = self._unsuccessful("refused", "data", error)
            except Exception as error:
                answer = self._failure(error)
            self._log_answer(answer)
            return Envelope({**answer.head, LOG: self.audit_log.head}, answer.body)

    def _handle(self, envelope: Envelope) -> Envelope:
        handlers = {
            "hello": self._hello,
            "terms": self._describe_data,
            "roster": self._prepare,
            "keep": self._receive_state,
            "do": self._run_task,
            "leave": self._end_run,
        }
        if why := find_violation(envelope, self.site.message_bytes):
            raise RequestRefusedError(why)
        ask = head_value(envelope.head, "ask", str)
        if ask not in handlers:
            raise RequestRefusedError(
                f"ask: unknown request '{ask}'; choose from {', '.join(handlers)}"
            )
        return handlers[ask](envelope)

    def _log_answer(self, answer: Envelope) -> None:
        """Append an answer to the audit log before it is sent."""
        outcome = self._line.pop("outcome", str(answer.head.get("ask")))
        try:
            entry = self.audit_log.append(**self._line, out=len(answer.body), outcome=outcome)
        except OSError as error:
            raise RunFailedError(
                f"{self.audit_log.path}: cannot be written ({error.strerror}); the answer was not "
                "sent"
            ) from None
        if self.joined is not None:
            self.joined.usage.add_entry(entry)

    def _failure(self, error: Exception) -> Envelope:
        """Log the traceback of an unexpected exception and return an answer that names it."""
        kind = "" if isinstance(error, RunFailedError) else f"{type(error).__name__}: "
        why = f"{kind}{one_line(error, 200)}; the traceback is in the log of the site"
        for line in traceback.format_exception(error):
            for part in line.splitlines():
                self.log(one_line(part))
        return self._unsuccessful("error", "failed", why)

    def _unsuccessful(self, kind: str, code: str, reason: object) -> Envelope:
        """Log the reason for an unsuccessful answer, and return an answer with its code.

        Args:
            kind: Kind of the answer, such as "refused".
            code: Code of the reason, see `messages.CODES`.
            reason: The reason, which is sent only if `tells.errors` is set.
        """
        why = one_line(reason)
        self.log(f"{kind}: {why}")
        if not self.site.tells.errors:
            why = code
        for name in ("kinds", "spent"):
            self._line.pop(name, None)
        self._line |= {"outcome": f"{kind}: {why}", "code": code}
        return message(kind, why=why)

    def _hello(self, envelope: Envelope) -> Envelope:
        return message(
            "here", {"settings": self.site.settings()}, client=self.site.client, **versions()
        )

    def _describe_data(self, envelope: Envelope) -> Envelope:
        """Join a run and answer with the data report of the site."""
        run = head_value(envelope.head, "run", str)
        result = begin_run(
            self.site,
            self.folder,
            self.storage_key,
            entries=self.audit_log.entries(),
            run=run,
            tree=decode_body(envelope, "config", "public"),
        )
        if result is None:
            return message("lacks")
        self.joined, info = result
        self._line["kinds"] = [
            "numbers of rows",
            "a hash of them",
            *(["label counts"] if info.labels else []),
        ]
        self._line["kinds"] += ["preprocessing"] if info.view else []
        return message("told", data_info_tree(info))

    def _prepare(self, envelope: Envelope) -> Envelope:
        """Prepare for the tasks of the run, given the data reports of all clients."""
        joined = self._current_run(envelope)
        tree = decode_body(envelope, "told", "fingerprint", "threads")
        fingerprint = joined.prepare(self.site, tree, self.site_keys, self._check_upload)
        self.log(
            f"ready: {joined.config.name}, {joined.config.algorithm['name']}, "
            f"{pluralize(joined.config.rounds, 'round')}"
        )
        if self.site.data is None:
            self.log(
                "the site's file has no data: training on a part of the server's data "
                f"({joined.data.name})"
            )
        shared_key = joined.shared_key_name
        return message("ready", fingerprint=fingerprint, shared_key=shared_key)

    def _end_run(self, envelope: Envelope) -> Envelope:
        self.left = one_line(envelope.head.get("why", ""))
        self.joined = None
        self.log("disconnected by the server" + (f": {self.left}" if self.left else ""))
        return message("left")

    def _receive_state(self, envelope: Envelope) -> Envelope:
        """Store an initial private state, which comes from another run of the server."""
        joined = self._prepared_run(envelope)
        if joined is None:
            return message("unready")
        state = as_bytes(decode_body(envelope, "state")["state"])
        try:
            PrivateState.decode(state, bounded=True)
        except (CodecError, TypeError) as error:
            raise RequestRefusedError(f"initial state: cannot be read ({error})") from None
        return message("kept", state=joined.storage.save_state(state))

    def _run_task(self, envelope: Envelope) -> Envelope:
        head = envelope.head
        joined = self._prepared_run(envelope)
        if joined is None:
            return message("unready")
        storage = joined.storage
        usage = joined.usage
        task = check_file_name(head_value(head, "task", str))
        kind = head_value(head, "kind", str)
        base = head_value(head, "base", str) and check_file_name(str(head["base"]))
        if kind not in ("answer", "read"):
            raise RequestRefusedError(f"kind: expected answer or read, got '{kind[:20]}'")
        request = Message(
            head_value(head, "what", str),
            envelope.body,
            head_value(head, "round", int),
            head_value(head, "again", int),
        )
        digest = task_digest(kind, request, base)
        self._line |= {
            "round": request.round_idx,
            "what": one_line(request.kind, 20),
            "task": task,
            "asked": digest.hex(),
        }
        if head_value(head, "expires", float) < time.time():
            raise RequestRefusedError(
                f"task {task[:12]}: has expired; check the clocks of the site and the server"
            )
        if usage.tasks.get(task, digest) != digest:
            raise RequestRefusedError(f"task {task[:12]}: was sent before with different content")
        if digest in usage.answered:
            self._line["outcome"] = REPEATED
        if spent := joined.policy.check(kind, request, digest):
            self._line["spent"] = spent
        if (stored := storage.read("answer")) is not None:
            known = decode(stored, FORM)
            if known["head"]["task"] == task:
                self._line["kinds"] = ["what was answered before"]
                body = as_bytes(known["body"])
                joined.policy.check_size(len(body), upload=True)
                return Envelope(known["head"], body)
        joined.noise.task = digest
        if kind == "read":
            return self._evaluate(joined, request, base, bool(head.get("details", False)), task)
        names = [name for name in str(head.get("spare", "")).split(",") if name]
        protected = [check_file_name(name) for name in names][:MAX_STATES]
        answer = self._answer_request(joined, request, base, task, protected)
        storage.write("answer", encode({"head": answer.head, "body": as_tensor(answer.body)}, FORM))
        return answer

    def _answer_request(
        self,
        joined: ParticipatingRun,
        request: Message,
        base: str,
        task: str,
        protected: Collection[str],
    ) -> Envelope:
        """Run one exchange of the round's protocol, such as training.

        Args:
            joined: The run.
            request: Request of the server.
            base: Name of the private state from which the task starts.
            task: Name of the task.
            protected: Names of states that must not be deleted, because the server's checkpoints
                refer to these states.
        """
        client = self.site.client
        storage = joined.storage
        notes = storage.read("notes")
        private: dict[str, bytes | None] = (
            {client: storage.load_state(base)} if request.kind == TRAIN else {}
        )
        job = WorkerJob(
            "answer",
            {client: request},
            private,
            notes={} if notes is None else {client: notes},
        )
        done = _run_job(joined, job, request.kind)
        if client in done.notes:
            storage.write("notes", done.notes[client])
        else:
            storage.drop("notes")
        reply = done.replies[client]
        if isinstance(reply, NoUploadError):
            self.log(f"failed: {one_line(reply)}")
            return message(
                "failed", why=str(reply) if self.site.tells.errors else "failed", task=task
            )
        if reply.kind == "refused":
            self.log(f"refused: {one_line(reply.body.decode())}")
            reply = reply if self.site.tells.errors else replace(reply, content=b"malformed")
        # For an upload, `_check_upload` has already recorded the contents.
        self._line.setdefault("kinds", [reply.kind])
        joined.policy.check_size(len(reply.body), upload=True)
        # Only training changes the state.
        state = (
            storage.save_state(done.private[client], protected) if client in done.private else ""
        )
        check = hashlib.sha256(reply.body).hexdigest()
        return Envelope(
            {"ask": "done", "task": task, "what": reply.kind, "state": state, "check": check},
            reply.body,
        )

    def _evaluate(
        self, joined: ParticipatingRun, request: Message, base: str, details: bool, task: str
    ) -> Envelope:
        """Evaluate the site's model and return the results that the site discloses."""
        client = self.site.client
        state = joined.storage.load_state(base)
        job = WorkerJob("read", {client: request}, {client: state}, details)
        done = _run_job(joined, job, "evaluation")
        evaluation = done.evaluations[client]
        # After the last round, the site stores its model even if it does not disclose the model.
        if evaluation.model:
            joined.storage.write(MODEL_FILE, evaluation.model)
        shared = self._shared_evaluation(evaluation)
        answer = message("done", evaluation_tree(shared), task=task)
        joined.policy.check_size(len(answer.body), upload=False)
        self._line["kinds"] = [
            "scores",
            *(["confusion"] if shared.confusion else []),
            *(["model"] if shared.model else []),
        ]
        return answer

    def _check_upload(self, client: str, upload: Payload) -> None:
        """Check an upload before it is encoded and record its contents for the audit log."""
        assert self.joined is not None
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

    def _current_run(self, envelope: Envelope) -> ParticipatingRun:
        run = head_value(envelope.head, "run", str)
        if self.joined is None or self.joined.run != run:
            raise RequestRefusedError(f"run {run[:12]}: this site has not joined the run", "left")
        return self.joined

    def _prepared_run(self, envelope: Envelope) -> ParticipatingRun | None:
        """Return the run of a message, or None if this site is not prepared for its tasks."""
        joined = self.joined
        if joined is None or not joined.is_prepared or joined.run != envelope.head.get("run"):
            return None
        return joined

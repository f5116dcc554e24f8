"""Node of a site, which answers the messages of the server."""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from hetero_fl.communication.homomorphic import SharedKey
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys
from hetero_fl.config import Config, expand_population
from hetero_fl.config.population import Population
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.federated_data import PublicPack, describe_client_rows, restrict_to_holder
from hetero_fl.deployment.audit_log import (
    REFUSED,
    REPEATED,
    TRAIN,
    AuditLog,
    Entry,
    SiteUsage,
    refused_configurations,
)
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import (
    FORM,
    LOG,
    HelloHead,
    Join,
    RequestRefusedError,
    RunHead,
    TaskHead,
    Terms,
    decode_body,
    message,
    read,
    read_body,
    read_head,
    versions,
)
from hetero_fl.deployment.node_files import (
    MAX_STATES,
    NodeStorage,
    load_or_create_key,
    load_public_key,
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
from hetero_fl.deployment.sites import federation_fingerprint
from hetero_fl.deployment.transport import Envelope, Head, find_violation
from hetero_fl.deployment.validation import data_info_tree, evaluation_tree, read_data_info
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data, prepare
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.workers import (
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerJob,
    WorkerSetup,
)
from hetero_fl.federation.store import PrivateState
from hetero_fl.privacy.noise import SecretNoiseSource
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

# Files of a run: the digests of the configuration with the data and of the reports, which must not
# change, what a restarted node needs to continue, and the site's model after the last round.
TERMS = "terms"
ROSTER = "roster"
SESSION = "session"
MODEL_FILE = "model.safetensors"


@dataclass
class ParticipatingRun:
    """Run in which a node participates.

    Args:
        run: ID of the run.
        terms: Decoded message with the configuration.
        config: Configuration of the run.
        data: Data of the site and the public sets.
        info: Data report of the site.
        storage: Files of the run.
        usage: Completed tasks, and privacy and traffic usage of the site.
        noise: Source of privacy noise.

    Attributes:
        session: ID of the server's process, once the site has joined the run. Otherwise, the value
            is empty, and the run has no worker and no policy.
        worker: Worker that runs the tasks.
        policy: Limits of the site.
        warned: Warnings of the tasks, each of which is issued once.
    """

    run: str
    terms: dict[str, Any]
    config: Config
    data: FederatedData
    info: RemoteDataInfo
    storage: NodeStorage
    usage: SiteUsage
    noise: SecretNoiseSource
    session: str = field(default="", init=False)
    worker: Worker = field(init=False)
    policy: Policy = field(init=False)
    warned: set[RecordedWarning] = field(default_factory=set, init=False)


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
            "join": self._join,
            "do": self._run_task,
            "leave": self._end_run,
        }
        if why := find_violation(envelope, self.site.message_bytes):
            raise RequestRefusedError(why)
        handler = handlers.get(str(envelope.head.get("ask")))
        if handler is None:
            found = one_line(envelope.head.get("ask"), 60)
            raise RequestRefusedError(
                f"ask: unknown request '{found}'; choose from {', '.join(handlers)}"
            )
        return handler(envelope)

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
        return message(kind, why=why, code=code)

    def _hello(self, envelope: Envelope) -> Envelope:
        run = read_head(HelloHead, envelope).run
        if self.joined is not None and self.joined.run == run:
            session = self.joined.session
        else:
            session = (self._stored_session(run) or {}).get("session", "")
        return message(
            "here",
            {"settings": self.site.settings()},
            client=self.site.client,
            session=session,
            has_data=self.site.data is not None,
            **versions(),
        )

    def _describe_data(self, envelope: Envelope) -> Envelope:
        """Take part in a run and answer with the data report of the site."""
        run = read_head(RunHead, envelope).run
        check_limit(
            "refused configurations in 24 hours",
            refused_configurations(self.audit_log.entries()) + 1,
            "refusals",
            self.site.allows.refusals,
        )
        terms = decode_body(envelope)
        self.joined = self._begin(run, terms)
        self.joined.storage.write(SESSION, encode({"terms": terms}, FORM))
        info = self.joined.info
        self._line["kinds"] = [
            "numbers of rows",
            "a hash of them",
            *(["label counts"] if info.labels else []),
            *(["preprocessing"] if info.view else []),
        ]
        return message("told", data_info_tree(info))

    def _join(self, envelope: Envelope) -> Envelope:
        """Prepare for the tasks of the run, given the data reports of all clients."""
        head = read_head(RunHead, envelope)
        joined = self._current_run(head.run)
        join = read_body(Join, envelope)
        self._prepare(joined, head.session, join)
        state = "" if join.state is None else self._save_initial_state(joined, as_bytes(join.state))
        self.log(
            f"ready: {joined.config.name}, {joined.config.algorithm['name']}, "
            f"{pluralize(joined.config.rounds, 'round')}"
        )
        if self.site.data is None:
            self.log(
                "the site's file has no data: training on a part of the server's data "
                f"({joined.data.name})"
            )
        # The name of the key does not reveal the key.
        return message("ready", state=state)

    def _save_initial_state(self, joined: ParticipatingRun, state: bytes) -> str:
        """Store an initial private state, which comes from another run of the server."""
        try:
            PrivateState.decode(state, bounded=True)
        except (CodecError, TypeError) as error:
            raise RequestRefusedError(f"initial state: cannot be read ({error})") from None
        return joined.storage.save_state(state)

    def _end_run(self, envelope: Envelope) -> Envelope:
        run = read_head(HelloHead, envelope).run
        why = one_line(envelope.head.get("why", ""))
        # Another server, which refuses this node, does not end the run.
        if self.joined is not None and self.joined.run == run:
            self.joined.storage.drop(SESSION)
            self.joined = None
        self.log("disconnected by the server" + (f": {why}" if why else ""))
        return message("left")

    def _begin(self, run: str, tree: Any) -> ParticipatingRun:
        """Take part in a run with the configuration that the server sent.

        Args:
            run: ID of the run.
            tree: Decoded message with the configuration, see `Terms`.

        Returns:
            The run, which the site has not joined yet.

        Raises:
            RequestRefusedError: If the site does not allow the configuration, the site is not a
                client in the configuration, or the configuration or the data changed since the site
                joined the run.
            UserError: If the configuration or the data is invalid.
        """
        site = self.site
        client = site.client
        terms = read(Terms, tree, "terms")
        raw = check_raw_config(terms.config, site.allows)
        try:
            config = load_config(raw, allow_code=site.allows.own_code)
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
        data = self._load_data(config, terms, clients)
        own_view = clients[client].preprocess.normalize == "own"
        info = describe_client_rows(data, client, own_view, site.tells.labels)
        storage = NodeStorage(self.folder / "runs" / run, self.storage_key)
        fingerprint = run_fingerprint(raw, info.content_hash, terms.public)
        if (known := storage.read(TERMS)) is None:
            storage.write(TERMS, fingerprint)
        elif known != fingerprint:
            raise RequestRefusedError(
                f"run {run[:12]}: the configuration, the public sets or this site's rows changed "
                "since the site joined the run; start a new run",
                "data",
            )
        # With an unkeyed hash, an attacker who knows all rows but one could verify guesses of that
        # row.
        info = replace(info, content_hash=storage.digest(info.content_hash.encode()))
        usage = SiteUsage.from_log(self.audit_log.entries(), run)
        noise = SecretNoiseSource(storage.secret("noise"))
        return ParticipatingRun(run, tree, config, data, info, storage, usage, noise)

    def _load_data(self, config: Config, terms: Terms, clients: Population) -> FederatedData:
        """Load the data of the site and the public sets.

        Raises:
            RequestRefusedError: If the public sets are missing or malformed, or differ from the
                server's.
            UserError: If the data is invalid.
        """
        site = self.site
        if site.data is None:
            check_sources(config, site.allows)
            data = load_federated_data(config)
            if data.public_hash() != terms.public:
                raise RequestRefusedError(
                    "public sets: the sets of this site differ from the server's; use the same "
                    "files"
                )
            return data
        try:
            pack = PublicPack.decode(b"" if terms.pack is None else as_bytes(terms.pack))
        except (CodecError, KeyError, TypeError, ValueError) as error:
            raise RequestRefusedError(f"public sets: cannot be read ({error})") from None
        if pack.content_hash() != terms.public:
            raise RequestRefusedError(
                f"public sets: expected the hash {terms.public[:12]}, got another"
            )
        settings = clients[site.client].model_copy(update={"data": site.data})
        # The columns and classes come from the public sets, the label from the site's file.
        sources = config.data.model_copy(update={"label": None, "text": None})
        members = {**clients, site.client: settings}
        return pack.data_of_client(site.client, sources, members, config.seed)

    def _prepare(self, joined: ParticipatingRun, session: str, join: Join) -> None:
        """Prepare for the tasks of a run.

        Args:
            joined: The run.
            session: ID of the server's process.
            join: Data reports of all clients, the server's fingerprint and the number of threads.

        Raises:
            RequestRefusedError: If the fingerprint differs from the server's, or the data reports
                changed during the run.
        """
        site = self.site
        config = joined.config
        data = joined.data
        infos = {
            client_id: read_data_info(report, data.task.outputs, data.own_view(client_id))
            for client_id, report in join.reports.items()
        }
        prepared = prepare(config, data=restrict_to_holder(data, site.client, infos))
        if federation_fingerprint(prepared) != join.fingerprint:
            raise RequestRefusedError(
                "fingerprint: the method, seed, clients or models at this site differ from the "
                "server's; use the same code and data reports at both"
            )
        reports_digest = hashlib.sha256(repr(sorted(infos.items())).encode()).digest()
        if joined.storage.read(ROSTER) not in (None, reports_digest):
            raise RequestRefusedError(
                "data reports: the reports of the clients changed since this site joined the run; "
                "start a new run"
            )
        joined.storage.write(ROSTER, reports_digest)
        if config.channel.homomorphic is not None and site.shared_key is not None:
            shared_key = SharedKey.load(Path(site.shared_key))
            keyed = replace(prepared.federation, shared_key=shared_key)
            prepared = replace(prepared, federation=keyed)
        device = choose_device(site.device or config.runtime.device)
        setup = WorkerSetup(
            prepared.method,
            replace(prepared.federation, noise=joined.noise, site_keys=self.site_keys),
            min(join.threads, site.threads or join.threads),
            (str(device),),
            precision=config.runtime.precision,
            deterministic=config.runtime.deterministic,
        )
        joined.worker = Worker(setup, 0)
        joined.worker.runtime.review_upload = self._check_upload
        joined.policy = Policy(site, prepared, joined.usage)
        joined.worker.runtime.guard = joined.policy.guard
        known = join.model_dump(exclude={"state"})
        content = {"session": session, "terms": joined.terms, "join": known}
        joined.storage.write(SESSION, encode(content, FORM))
        joined.session = session

    def _stored_session(self, run: str) -> dict[str, Any] | None:
        """Return the terms of a run, and the session and the reports if the site has joined it.

        Returns:
            The content of the file, or None if it is missing or damaged.
        """
        path = self.folder / "runs" / run
        if not run or not path.is_dir():
            return None
        stored = NodeStorage(path, self.storage_key).read(SESSION)
        try:
            return None if stored is None else dict(decode(stored, FORM))
        except CodecError:
            return None

    def _current_run(self, run: str) -> ParticipatingRun:
        """Return the run of a message, which a restarted node reads from its own files.

        Raises:
            RequestRefusedError: If this site does not take part in the run.
        """
        if self.joined is not None and self.joined.run == run:
            return self.joined
        stored = self._stored_session(run)
        if stored is None:
            raise _not_joined(run)
        joined = self._begin(run, stored["terms"])
        if "join" in stored:
            self._prepare(joined, stored["session"], read(Join, stored["join"], SESSION))
        self.joined = joined
        return joined

    def _run_task(self, envelope: Envelope) -> Envelope:
        head = read_head(TaskHead, envelope)
        request = Message(head.what, envelope.body, head.round, head.again)
        self._line |= {"round": head.round, "what": one_line(head.what, 20), "task": head.task}
        if head.expires < time.time():
            raise RequestRefusedError(
                f"task {head.task[:12]}: has expired; check the clocks of the site and the server"
            )
        joined = self._current_run(head.run)
        if not joined.session:
            raise _not_joined(head.run)
        usage = joined.usage
        base, private = head.base, b""
        if head.kind == "read" or head.what == TRAIN:
            base, private = self._load_private(joined, base)
        # A task that starts without the state is another task, with other noise.
        digest = task_digest(head.kind, request, base)
        self._line["asked"] = digest.hex()
        if usage.tasks.get(head.task, digest) != digest:
            raise RequestRefusedError(
                f"task {head.task[:12]}: was sent before with different content"
            )
        if digest in usage.answered:
            self._line["outcome"] = REPEATED
        joined.policy.start_task(head.kind, request, digest)
        if (stored := self._stored_answer(joined, head.task, digest)) is not None:
            return stored
        joined.noise.task = digest
        about: Head = {"task": head.task, "reset": base != head.base}
        if head.kind == "read":
            return self._evaluate(joined, request, private, head.details, about)
        protected = [name for name in head.spare.split(",") if name][:MAX_STATES]
        answer = self._answer_request(joined, request, private, about, protected)
        spent = joined.policy.task.spent
        # The same request may be valid later, and is charged then.
        if self._line.get("kinds") != [REFUSED]:
            known = {"head": answer.head, "body": as_tensor(answer.body), "spent": spent}
            joined.storage.write("answer", encode({**known, "digest": digest.hex()}, FORM))
        self._line |= {"spent": spent} if spent else {}
        return answer

    def _stored_answer(self, joined: ParticipatingRun, task: str, digest: bytes) -> Envelope | None:
        """Return and charge the last answer, or return None if it is for another task."""
        stored = joined.storage.read("answer")
        if stored is None:
            return None
        known = decode(stored, FORM)
        if (known["head"]["task"], known["digest"]) != (task, digest.hex()):
            return None
        self._line["kinds"] = ["what was answered before"]
        if digest not in joined.usage.answered:
            joined.policy.check_budget(known["spent"])
            self._line["spent"] = known["spent"]
        body = as_bytes(known["body"])
        joined.policy.check_size(len(body), upload=True)
        return Envelope(known["head"], body)

    def _load_private(self, joined: ParticipatingRun, name: str) -> tuple[str, bytes]:
        """Load a private state, and return its name, which is empty if the state is lost."""
        try:
            return name, joined.storage.load_state(name)
        except RequestRefusedError as error:
            self.log(str(error))
            return "", b""

    def _run_job(self, joined: ParticipatingRun, job: WorkerJob, what: str) -> JobResult:
        """Run a job and return its result, or raise the exception with which the job failed.

        Args:
            joined: The run.
            job: The job.
            what: Description of the job for error messages.

        Raises:
            RequestRefusedError: If the request is malformed or exceeds a limit of the site.
            UserError: If the site does not share an item of the upload, or its data cannot be used.
            RunFailedError: If the job failed with another exception.
        """
        done = joined.worker.run_job(job)
        issue_warnings(done.warnings, joined.warned)
        joined.policy.check_refusal()
        if isinstance(done.error, PayloadError):
            raise RequestRefusedError(f"{what}: {done.error}")
        if isinstance(done.error, UserError):
            raise UserError(f"{what}: {done.error}")
        if done.error is not None:
            raise RunFailedError(f"{what}: {done.error}") from RemoteTracebackError(done.trace)
        return done

    def _answer_request(
        self,
        joined: ParticipatingRun,
        request: Message,
        private: bytes,
        about: Head,
        protected: Collection[str],
    ) -> Envelope:
        """Run one exchange of the round's protocol, such as training.

        Args:
            joined: The run.
            request: Request of the server.
            private: Encoded private state from which the task starts.
            about: Entries of the head of the answer.
            protected: Names of states that must not be deleted, because the server's checkpoints
                refer to these states.
        """
        client = self.site.client
        storage = joined.storage
        notes = storage.read("notes")
        job = WorkerJob(
            "answer",
            {client: request},
            {client: private} if request.kind == TRAIN else {},
            notes={} if notes is None else {client: notes},
        )
        done = self._run_job(joined, job, request.kind)
        if client in done.notes:
            storage.write("notes", done.notes[client])
        else:
            storage.drop("notes")
        reply = done.replies[client]
        if isinstance(reply, NoUploadError):
            joined.policy.charge_outcome()
            self.log(f"failed: {one_line(reply)}")
            why = str(reply) if self.site.tells.errors else "failed"
            return message("failed", why=why, **about)
        if reply.kind == REFUSED:
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
            {"ask": "done", "what": reply.kind, "state": state, "check": check, **about},
            reply.body,
        )

    def _evaluate(
        self,
        joined: ParticipatingRun,
        request: Message,
        private: bytes,
        details: bool,
        about: Head,
    ) -> Envelope:
        """Evaluate the site's model and return the results that the site discloses."""
        client = self.site.client
        job = WorkerJob("read", {client: request}, {client: private}, details)
        done = self._run_job(joined, job, "evaluation")
        evaluation = done.evaluations[client]
        # After the last round, the site stores its model even if it does not disclose the model.
        if evaluation.model:
            joined.storage.write(MODEL_FILE, evaluation.model)
        shared = self._shared_evaluation(evaluation)
        answer = message("done", evaluation_tree(shared), **about)
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
        if not tells.details:
            evaluation = replace(evaluation, confusion={}, calibration={}, forecast={})
        return evaluation


def _not_joined(run: str) -> RequestRefusedError:
    return RequestRefusedError(f"run {run[:12]}: this site has not joined the run", "left")

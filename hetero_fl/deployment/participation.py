"""Participation of a site in a run: the checked configuration, the data and the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys
from hetero_fl.config import Config, expand_population
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.data import FederatedData
from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.data.federated_data import PublicPack, describe_client_rows, restrict_to_holder
from hetero_fl.deployment.audit_log import Entry, SiteUsage
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import FORM, Join, RequestRefusedError, Terms, read
from hetero_fl.deployment.node_storage import NodeStorage
from hetero_fl.deployment.policy import (
    Policy,
    check_config,
    check_raw_config,
    check_sources,
    run_fingerprint,
)
from hetero_fl.deployment.sites import federation_fingerprint
from hetero_fl.deployment.validation import read_data_info
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data, prepare
from hetero_fl.federation.executors.worker import (
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerJob,
    WorkerSetup,
)
from hetero_fl.privacy.noise import SecretNoiseSource
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import choose_device
from hetero_fl.utils.errors import RunFailedError, UserError, suggest_or_list
from hetero_fl.utils.recorded_warnings import RecordedWarning, issue_warnings
from hetero_fl.utils.serialization import CodecError, as_bytes, decode, encode

# Files of a run: the digests of the configuration with the data and of the reports, which must not
# change, and what a restarted node needs to continue.
TERMS = "terms"
ROSTER = "roster"
SESSION = "session"


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
        session: ID of the server's process, once the site is prepared for tasks. Otherwise, the
            value is empty.
        worker: Worker that runs the tasks. Set by `prepare`.
        policy: Limits of the site. Set by `prepare`.
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

    @property
    def shared_key_name(self) -> str:
        """Name of the key of homomorphic encryption, which does not reveal the key, or ""."""
        key = self.worker.runtime.federation.shared_key
        return key.name.hex() if key is not None else ""

    def prepare(
        self,
        site: SiteConfig,
        session: str,
        join: Join,
        site_keys: SiteKeys,
        review_upload: Callable[[str, Payload], None],
    ) -> None:
        """Prepare for the tasks of the run.

        Args:
            site: Configuration of the site.
            session: ID of the server's process.
            join: Data reports of all clients, the server's fingerprint and the number of threads.
            site_keys: Keys that sign the keys of a round of secure aggregation.
            review_upload: Function that is called with the client and the upload before the upload
                is encoded.

        Raises:
            RequestRefusedError: If the fingerprint differs from the server's, or the data reports
                changed during the run.
        """
        outputs = self.data.task.outputs
        infos = {
            client_id: read_data_info(report, outputs, self.data.own_view(client_id))
            for client_id, report in join.reports.items()
        }
        prepared = prepare(self.config, data=restrict_to_holder(self.data, site.client, infos))
        if federation_fingerprint(prepared) != join.fingerprint:
            raise RequestRefusedError(
                "fingerprint: the method, seed, clients or models at this site differ from the "
                "server's; use the same code and data reports at both"
            )
        reports_digest = hashlib.sha256(repr(sorted(infos.items())).encode()).digest()
        if self.storage.read(ROSTER) not in (None, reports_digest):
            raise RequestRefusedError(
                "data reports: the reports of the clients changed since this site joined the run; "
                "start a new run"
            )
        self.storage.write(ROSTER, reports_digest)
        if self.config.channel.homomorphic is not None and site.shared_key is not None:
            shared_key = SharedKey.load(Path(site.shared_key))
            keyed = replace(prepared.federation, shared_key=shared_key)
            prepared = replace(prepared, federation=keyed)
        federation = replace(prepared.federation, noise=self.noise, site_keys=site_keys)
        device = choose_device(site.device or self.config.runtime.device)
        setup = WorkerSetup(
            prepared.method,
            federation,
            min(join.threads, site.threads or join.threads),
            (str(device),),
            precision=self.config.runtime.precision,
            deterministic=self.config.runtime.deterministic,
        )
        self.worker = Worker(setup, 0)
        self.worker.runtime.review_upload = review_upload
        self.policy = Policy(site, prepared, self.usage)
        known = join.model_dump(exclude={"state"})
        content = {"session": session, "terms": self.terms, "join": known}
        self.storage.write(SESSION, encode(content, FORM))
        self.session = session

    def run_job(self, job: WorkerJob, what: str) -> JobResult:
        """Run a job and return its result, or raise the exception with which the job failed.

        Args:
            job: The job.
            what: Description of the job for error messages.

        Raises:
            RequestRefusedError: If the request is malformed.
            UserError: If the site does not share an item of the upload, or its data cannot be used.
            RunFailedError: If the job failed with another exception.
        """
        done = self.worker.run_job(job)
        issue_warnings(done.warnings, self.warned)
        if isinstance(done.error, PayloadError):
            raise RequestRefusedError(f"{what}: {done.error}")
        if isinstance(done.error, UserError):
            raise UserError(f"{what}: {done.error}")
        if done.error is not None:
            raise RunFailedError(f"{what}: {done.error}") from RemoteTracebackError(done.trace)
        return done


def begin_run(
    site: SiteConfig,
    folder: Path,
    storage_key: bytes | None,
    *,
    entries: Sequence[Entry],
    run: str,
    tree: Any,
) -> ParticipatingRun:
    """Take part in a run with the configuration that the server sent.

    Args:
        site: Configuration of the site.
        folder: Folder of the site.
        storage_key: Key that encrypts the site's files. If None, files are not encrypted.
        entries: Entries of the site's audit log.
        run: ID of the run.
        tree: Decoded message with the configuration, see `Terms`.

    Returns:
        The run, which is not prepared for tasks yet.

    Raises:
        RequestRefusedError: If the site does not allow the configuration, the site is not a client
            in the configuration, or the configuration or the data changed since the site joined
            the run.
        UserError: If the configuration or the data is invalid.
    """
    client = site.client
    terms = read(Terms, tree, "terms")
    raw = check_raw_config(terms.config, site.allows)
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
        if data.public_hash() != terms.public:
            raise RequestRefusedError(
                "public sets: the sets of this site differ from the server's; use the same files"
            )
    else:
        settings = clients[client].model_copy(update={"data": site.data})
        # The columns and classes come from the public sets, the label from the site's file.
        sources = sources.model_copy(update={"label": None, "text": None})
        members = {**clients, client: settings}
        data = _read_public_pack(terms).data_of_client(client, sources, members, config.seed)
    own_view = clients[client].preprocess.normalize == "own"
    info = describe_client_rows(data, client, own_view, site.tells.labels)
    storage = NodeStorage(folder / "runs" / run, storage_key)
    fingerprint = run_fingerprint(raw, info.content_hash, terms.public)
    if (known := storage.read(TERMS)) is None:
        storage.write(TERMS, fingerprint)
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
    return ParticipatingRun(run, tree, config, data, info, storage, usage, noise)


def stored_session(folder: Path, storage_key: bytes | None, run: str) -> dict[str, Any] | None:
    """Return what a site stored when it joined a run: the session, the terms and the reports.

    Args:
        folder: Folder of the site.
        storage_key: Key that encrypts the site's files. If None, files are not encrypted.
        run: ID of the run.

    Returns:
        The content of the file, or None if it is missing or damaged.
    """
    path = folder / "runs" / run
    if not run or not path.is_dir():
        return None
    try:
        stored = NodeStorage(path, storage_key).read(SESSION)
        return None if stored is None else dict(decode(stored, FORM))
    except (CodecError, OSError):
        return None


def _read_public_pack(terms: Terms) -> PublicPack:
    """Read the public sets that the server sent.

    Raises:
        RequestRefusedError: If the public sets are missing or malformed, or have another hash.
    """
    if terms.pack is None:
        raise RequestRefusedError("public sets: missing")
    try:
        pack = PublicPack.decode(as_bytes(terms.pack))
    except (CodecError, KeyError, TypeError, ValueError) as error:
        raise RequestRefusedError(f"public sets: cannot be read ({error})") from None
    if pack.content_hash() != terms.public:
        raise RequestRefusedError(
            f"public sets: expected the hash {terms.public[:12]}, got another"
        )
    return pack

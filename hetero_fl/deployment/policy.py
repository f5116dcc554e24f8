"""Permissions of a site, checked while a task runs and before data leave the site.

The limits are defined in the site file. While a task runs, each step is counted and charged before
it is computed. Each item of an upload is checked before the upload is encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from hetero_fl.algorithms.round_parts import common_part, describe_unshared, permitted_part
from hetero_fl.communication.protocol import Message
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.config.data import SourceConfig
from hetero_fl.config.describe import result_relevant
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, SampledBatches, Step
from hetero_fl.data.registry import is_shipped
from hetero_fl.deployment.audit_log import TRAIN, SiteUsage
from hetero_fl.deployment.config import AllowsConfig, SiteConfig
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.engine.driver import Backend, ReviewedBackend
from hetero_fl.engine.training import step_count
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.privacy.accounting import PrivacyCharge, epsilon_of_mechanisms
from hetero_fl.privacy.client_side import WITHIN_CLIP, ClientPrivacy
from hetero_fl.privacy.dp_sgd import is_private, step_charge
from hetero_fl.utils.code_permission import find_references, refused_code
from hetero_fl.utils.errors import UserError, suggest_or_list

# Maximum number of training tasks of a client in a round whose requests are valid only once.
MAX_TASKS_PER_ROUND = 10
# Code of refusals that are due to `allows.privacy`.
POLICY_PRIVACY = "policy: privacy"
# Client settings that must be equal to those in the site file, if the site file defines them.
SITE_KEYS = ("model", "preprocess", "augment")
# Descriptions of summed uploads in the audit log, keyed by the setting of `channel`.
SUMMED = {"secure_sum": "masked sum of", "homomorphic": "encrypted"}


def check_raw_config(tree: object, allows: AllowsConfig) -> dict[str, Any]:
    """Check a configuration before it is loaded, because loading imports the referenced code.

    Returns:
        The unchanged configuration.

    Raises:
        RequestRefusedError: If the configuration is not a mapping or references code that the site
            does not allow.
    """
    if not isinstance(tree, dict):
        raise RequestRefusedError(f"configuration: expected a mapping, got {type(tree).__name__}")
    for name, key in refused_code(find_references(tree), allows.own_code).items():
        raise RequestRefusedError(
            f"{key}: {name[:80]} is not in this site's allows.own_code {allows.own_code}",
            f"policy: {key}",
        )
    return tree


def check_config(config: Config, site: SiteConfig, settings: ClientSettings) -> None:
    """Check a configuration against the limits of a site.

    Args:
        config: Configuration of the run.
        site: Configuration of the site.
        settings: Settings of the site's client in the configuration.

    Raises:
        RequestRefusedError: If the site does not allow the configuration. The message names the
            keys in both files.
    """
    allows = site.allows
    client = site.client
    name = config.algorithm["name"]
    if allows.methods is not None and name not in allows.methods:
        raise RequestRefusedError(
            f"algorithm.name: {name} is not in this site's allows.methods "
            f"({', '.join(allows.methods)})",
            "policy: algorithm.name",
        )
    check_limit("rounds", config.rounds, "rounds", allows.rounds)
    check_limit(
        f"clients: '{client}': epochs",
        None if settings.steps else settings.epochs,
        "epochs",
        allows.epochs,
    )
    check_limit(f"clients: '{client}': steps", settings.steps, "steps", allows.steps)
    own = ClientSettings.model_validate(site.settings())
    for key in SITE_KEYS:
        if getattr(site, key) is not None and getattr(settings, key) != getattr(own, key):
            raise RequestRefusedError(
                f"clients: '{client}': {key}: must be equal to {key} in this site's file",
                f"policy: clients: {key}",
            )
    if site.shares is not None and (
        forbidden := [s for s in settings.shares if not _is_allowed(s, own.shares)]
    ):
        raise RequestRefusedError(
            f"clients: '{client}': shares: {', '.join(forbidden)} not allowed; "
            f"this site's shares are {', '.join(own.shares) or '[]'}",
            "policy: clients: shares",
        )
    secure = config.channel.secure_sum
    if not config.channel.summed and allows.secure_sum_only:
        raise RequestRefusedError(
            "channel.secure_sum: required by this site's allows.secure_sum_only",
            "policy: channel.secure_sum",
        )
    _check_shared_key(config, site)
    if secure is not None:
        _check_secure_sum(config, secure, site)
    if allows.privacy is not None:
        _check_privacy(config, site)


def _check_secure_sum(config: Config, secure: SecureAggregationConfig, site: SiteConfig) -> None:
    """Check the number of clients in a sum, and that the site knows the keys of the others."""
    allows = site.allows
    clients = expand_population(config.clients)
    # Clients unmask no sum of fewer uploads.
    found = secure.min_survivors(config.clients.per_round or len(clients))
    if allows.cohort is not None and found < allows.cohort:
        raise RequestRefusedError(
            f"channel.secure_sum.threshold: must be >= {allows.cohort} clients "
            f"(this site's allows.cohort), got {found}",
            "policy: channel.secure_sum.threshold",
        )
    if allows.keys is None:
        return
    for client in clients:
        if client not in {site.client, *allows.keys}:
            raise RequestRefusedError(
                f"clients: '{client}' has no key in this site's allows.keys", "policy: clients"
            )


def _check_shared_key(config: Config, site: SiteConfig) -> None:
    """Check that the site can take part in a run with homomorphic encryption."""
    if config.channel.homomorphic is None:
        return
    if site.shared_key is None:
        raise RequestRefusedError(
            "channel.homomorphic: requires shared_key in this site's file, the same key as at the "
            "other sites (`hetero-fl shared-key FILE`)",
            "policy: channel.homomorphic",
        )
    if site.allows.cohort is not None:
        raise RequestRefusedError(
            "channel.homomorphic: cannot be combined with this site's allows.cohort, because a "
            "site does not see how many uploads are in a sum; use channel.secure_sum",
            "policy: channel.homomorphic",
        )


def _check_privacy(config: Config, site: SiteConfig) -> None:
    privacy = config.privacy
    if privacy is None:
        raise RequestRefusedError("privacy: required by this site's allows.privacy", POLICY_PRIVACY)
    if privacy.unit == "client":
        raise RequestRefusedError(
            "privacy.unit: expected record or local, got client; with this site's allows.privacy "
            "the site must add the noise",
            POLICY_PRIVACY,
        )
    if site.tells.labels:
        raise RequestRefusedError(
            "tells.labels=true cannot be combined with allows.privacy, because it reveals exact "
            "counts; set tells.labels=false in this site's file",
            POLICY_PRIVACY,
        )
    if site.tells.model and privacy.unit == "local":
        raise RequestRefusedError(
            "tells.model=true cannot be combined with allows.privacy and privacy.unit=local, "
            "because it reveals a model without noise; set tells.model=false in this site's file",
            POLICY_PRIVACY,
        )


def check_sources(config: Config, allows: AllowsConfig) -> None:
    """Check that a site without `data` may read all sources that a configuration names.

    Raises:
        RequestRefusedError: If a source neither ships with the package nor is in `allows.data`.
    """
    allowed = [source_tree(source) for source in allows.data]
    for key, source in named_sources(config).items():
        if not is_shipped(source) and source_tree(source) not in allowed:
            raise RequestRefusedError(
                f"{key}: {source.name} is not in this site's allows.data; to use the site's own "
                "data, set data in its file",
                f"policy: {key}",
            )


def named_sources(config: Config) -> dict[str, SourceConfig]:
    """Return all sources that a configuration names, keyed by their keys."""
    sources = {"data": config.data, "data.proxy.source": config.data.proxy.source}
    for profile in expand_population(config.clients).profiles:
        sources[f"clients: '{profile.first}': data"] = profile.settings.data
    return {key: source for key, source in sources.items() if source is not None}


def source_tree(source: SourceConfig) -> dict[str, Any]:
    """Return the keys of a source as plain values, without further keys of the section `data`."""
    return source.model_dump(mode="json", include=set(SourceConfig.model_fields))


def run_fingerprint(tree: Mapping[str, Any], rows: str, public: str) -> bytes:
    """Return a digest of the configuration and the data, which must not change during a run.

    If the configuration or the data changed, the difference of two answers with the same noise
    would reveal rows.

    Args:
        tree: The configuration. Settings that do not affect results are ignored.
        rows: Hash of the site's rows.
        public: Hash of the public sets.
    """
    kept = {**result_relevant(tree), "init_from": None}
    text = json.dumps([kept, rows, public], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def check_limit(what: str, found: float | None, key: str, limit: float | None) -> None:
    """Check a number against a limit of the site.

    Args:
        what: Name of the number, for the error message.
        found: Number to check. If None, nothing is checked.
        key: Key of the limit in `allows`.
        limit: Maximum value. If None, there is no limit.

    Raises:
        RequestRefusedError: If the number exceeds the limit.
    """
    if limit is not None and found is not None and found > limit:
        raise RequestRefusedError(
            f"{what}: must be <= {_format_number(limit)} (this site's allows.{key}), "
            f"got {_format_number(found)}",
            f"policy: {key}" if key in ("rounds", "epochs", "steps") else "policy",
        )


def _format_number(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _is_allowed(share: str, allowed: Sequence[str]) -> bool:
    """Return whether a share is contained in the allowed shares."""
    part = permitted_part([share])
    is_contained = common_part(part, permitted_part(allowed)) == part
    return share in allowed or (bool(part) and is_contained)


def task_digest(kind: str, request: Message, base: str) -> bytes:
    """Return a digest of the content of a task, which does not depend on the name of the task.

    Args:
        kind: "answer" for an exchange of the protocol, "read" for an evaluation.
        request: Request of the server.
        base: Name of the private state from which the task starts.
    """
    body = hashlib.sha256(request.body).hexdigest()
    content = (
        kind,
        request.kind,
        request.round_idx,
        request.attempt,
        base,
        body,
    )
    return hashlib.sha256(repr(content).encode()).digest()


@dataclass
class TaskUsage:
    """Steps and label counts that a task has used so far.

    Args:
        is_training: Whether the task is training.
        is_repeated: Whether the task was answered before. The answer is identical and costs
            nothing.

    Attributes:
        steps: Number of optimizer steps.
        epochs: Number of passes over the rows.
        charges: Privacy charges of the steps.
        reads_counts: Whether the plan has read the label counts.
        has_outcome: Whether the task has an upload, or has failed, which reveals as much.
        spent: Charges of the task as entries of the audit log, without one-time charges that have
            already been made.
        refusal: The error with which the policy has refused the task, or None.
    """

    is_training: bool = False
    is_repeated: bool = False
    steps: int = 0
    epochs: float = 0.0
    charges: list[PrivacyCharge] = field(default_factory=list)
    reads_counts: bool = False
    has_outcome: bool = False
    spent: list[dict[str, Any]] = field(default_factory=list)
    refusal: RequestRefusedError | None = None


@dataclass
class Policy:
    """Checks that enforce the limits of a site in one run.

    Args:
        site: Configuration of the site.
        prepared: The prepared run.
        usage: Completed tasks, and privacy and traffic usage of the site.

    Attributes:
        task: Usage of the current task.
    """

    site: SiteConfig
    prepared: PreparedRun
    usage: SiteUsage

    def __post_init__(self) -> None:
        self.allows = self.site.allows
        method = self.prepared.method
        federation = self.prepared.federation
        self.specs = method.uploads
        self.client_info = federation.client_infos[self.site.client]
        self.protocol = make_protocol(method, federation)
        self.privacy = ClientPrivacy.from_federation(method, federation)
        self.summed = federation.channel.summed if method.uploads else ""
        self.task = TaskUsage()

    def start_task(self, kind: str, request: Message, digest: bytes) -> None:
        """Check a task before it runs.

        Args:
            kind: "answer" for an exchange of the protocol, "read" for an evaluation.
            request: Request of the server.
            digest: Digest of the task from `task_digest`.

        Raises:
            RequestRefusedError: If the task is not part of the run.
        """
        rounds = self.prepared.config.rounds
        # The evaluation after the last round has the index of the next round.
        last = self._max_versions - (kind == "answer")
        if not 0 <= request.round_idx <= last or request.attempt < 0:
            raise RequestRefusedError(
                f"round {request.round_idx + 1} of {rounds}, attempt {request.attempt + 1}: "
                "not part of this run",
                "policy: rounds",
            )
        kinds = self.protocol.requests
        if kind != "read" and request.kind not in kinds:
            raise RequestRefusedError(
                f"request: unknown kind '{request.kind[:20]}'; choose from {', '.join(kinds)}"
            )
        is_training = kind != "read" and request.kind == TRAIN
        self.task = TaskUsage(is_training, is_repeated=digest in self.usage.answered)
        if not is_training or self.task.is_repeated:
            return
        # The messages of a round differ after a restart of the server.
        tasks_per_round = MAX_TASKS_PER_ROUND if self.protocol.has_one_time_requests else 1
        max_tasks = self._max_versions * tasks_per_round
        trained = len(self.usage.trained) + 1
        check_limit("training tasks of this run", trained, "rounds", self.allows.rounds)
        if trained > max_tasks:
            raise RequestRefusedError(
                f"training tasks of this run: must be <= {max_tasks} (the rounds of the "
                f"configuration times tasks per round), got {trained}",
                "policy: rounds",
            )

    @property
    def _max_versions(self) -> int:
        """Maximum number of models that the server sends for training."""
        config = self.prepared.config
        if config.runtime.mode == "sync":
            return config.rounds
        # Each accepted upload may be an aggregation.
        num_concurrent = config.clients.per_round or len(self.prepared.federation.client_infos)
        return config.rounds * num_concurrent

    def guard(self, backend: Backend, clients: Iterable[Participant]) -> Backend:
        """Wrap the backend of a task, so that each step is counted and charged before it runs.

        The functions of the clients that return label counts are wrapped as well.
        """
        for client in clients:
            client.label_counts = partial(self._charge_counts, client.label_counts)
        return ReviewedBackend(backend, self._charge_step)

    def _charge_step(self, participant: Participant, step: Step) -> None:
        task = self.task
        privacy = self.prepared.federation.privacy
        is_noisy = task.is_training and privacy is not None and privacy.unit == "record"
        # Private rows are hidden from the plan, and others would be copied to the device.
        participant = replace(participant, data=self._columns)
        if privacy is not None and is_noisy and is_private(step):
            charge = step_charge(participant, step, privacy)
            task.charges.append(charge)
            if isinstance(step, Fit):
                task.steps += charge.steps
                task.epochs += charge.steps * charge.rate
        elif isinstance(step, Fit):
            steps, epochs = _fit_length(participant, step)
            task.steps += steps
            task.epochs += epochs
        self._enforce()

    def _columns(self, name: str, preprocess: Any) -> Columns:
        view = preprocess or self.client_info.preprocess
        return self.prepared.federation.data.columns(self.site.client, name, view)

    def _charge_counts(self, label_counts: Callable[[], Tensor]) -> Tensor:
        self.task.reads_counts = True
        self._enforce()
        return label_counts()

    def charge_outcome(self) -> None:
        """Charge an upload, or the failure of the task.

        Raises:
            RequestRefusedError: If the privacy budget would be exceeded.
        """
        self.task.has_outcome = True
        self._enforce()

    def _enforce(self) -> None:
        """Check the limits with all that the task has used so far."""
        task = self.task
        try:
            # A user-defined plan may catch exceptions.
            self.check_refusal()
            check_limit("epochs of this task", round(task.epochs, 3), "epochs", self.allows.epochs)
            check_limit("steps of this task", task.steps, "steps", self.allows.steps)
            if self.privacy is not None and task.is_training and not task.is_repeated:
                charges = self.privacy.charges(task.charges, task.reads_counts, task.has_outcome)
                task.spent = self._due_charges(charges)
                self.check_budget(task.spent)
        except RequestRefusedError as error:
            task.refusal = error
            raise

    def check_refusal(self) -> None:
        """Raise the error with which the policy has refused the current task, if any."""
        if self.task.refusal is not None:
            raise self.task.refusal

    def _due_charges(self, charges: Iterable[PrivacyCharge]) -> list[dict[str, Any]]:
        """Return charges as entries of the audit log, without charges that have been made.

        Only noise that the site adds itself counts.
        """
        privacy = self.prepared.federation.privacy
        if privacy is None or privacy.unit == "client":
            return []
        return [
            {
                "noise": c.scale * privacy.known_noise_multiplier,
                "rate": c.rate,
                "steps": c.steps,
                "once": c.once,
            }
            for c in charges
            if c.once not in self.usage.one_time_charges
        ]

    def check_budget(self, spent: Iterable[Mapping[str, Any]]) -> None:
        """Check the privacy budget of the site over all runs.

        Args:
            spent: Charges of a task as entries of the audit log.

        Raises:
            RequestRefusedError: If the budget would be exceeded.
        """
        budget = self.allows.privacy
        if budget is None:
            return
        total = self.usage.with_charges(spent)
        found = epsilon_of_mechanisms(total, budget.delta, "rdp")
        # PRV accounting is tighter but slower (about half a second).
        if found > budget.epsilon:
            found = epsilon_of_mechanisms(total, budget.delta, "prv")
        if found > budget.epsilon:
            raise RequestRefusedError(
                f"ε at δ={budget.delta:g} after this task: must be <= {budget.epsilon:g} "
                f"(this site's allows.privacy.epsilon), got {found:.4g}",
                POLICY_PRIVACY,
            )

    def check_upload(self, payload: Payload) -> None:
        """Check and charge an upload before it is encoded.

        Raises:
            RequestRefusedError: If the privacy budget would be exceeded.
            UserError: If the upload contains an item that the method does not declare or that the
                site does not share.
        """
        shares = (
            self.site.shares if self.site.shares is not None else self.client_info.settings.shares
        )
        # The server adds noise to the sum of this item, which counts updates within the bound.
        items = {name: item for name, item in payload.items_by_name.items() if name != WITHIN_CLIP}
        for name in items:
            if name not in self.specs:
                raise UserError(
                    f"{self.prepared.name}.train: item '{name}' is not declared in `uploads`"
                    f"{suggest_or_list(name, self.specs)}"
                )
        if unshared := describe_unshared(items, self.specs, shares):
            raise UserError(
                f"shares: {unshared}; this site's shares are {', '.join(shares) or '[]'}"
            )
        if items:
            self.charge_outcome()

    def check_size(self, size: int, upload: bool) -> None:
        """Check the size of an answer.

        Args:
            size: Size of the answer in bytes.
            upload: Whether the answer is an upload.

        Raises:
            RequestRefusedError: If a limit of the site is exceeded.
        """
        if upload:
            check_limit("bytes of this upload", size, "upload_bytes", self.allows.upload_bytes)
        check_limit(
            "bytes of all answers including this one",
            self.usage.sent + size,
            "total_bytes",
            self.allows.total_bytes,
        )

    def shared_kinds(self, payload: Payload) -> list[str]:
        """Describe the contents of an upload for the audit log."""
        items = [f"{name}: {payload.item(name).kind}" for name in payload]
        kinds = items + (["training loss"] if payload.report else [])
        return [f"{SUMMED[self.summed]} {', '.join(kinds)}"] if self.summed else kinds


def _fit_length(participant: Participant, fit: Fit) -> tuple[int, float]:
    """Return the number of steps of a fit, and the number of passes over the rows."""
    if isinstance(fit.data, SampledBatches):
        return step_count(fit.data.size, fit), 0.0
    num_rows = max(1, len(next(iter(fit.data.columns(participant).values()))))
    epochs = fit.epochs if fit.steps is None else fit.steps * fit.batch_size / num_rows
    return step_count(num_rows, fit), epochs

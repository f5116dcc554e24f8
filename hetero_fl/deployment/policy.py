"""What a site allows, checked before it acts and before anything leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hetero_fl.algorithms.base import describe_unshared
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.messages import REQUESTS
from hetero_fl.communication.secure_aggregation.messages import decode_arrays as read_secure
from hetero_fl.config import Config, expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.describe import FREE
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.deployment.audit_log import TRAIN, SiteUsage
from hetero_fl.deployment.config import AllowsConfig, BudgetConfig, SiteConfig
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.engine.batches import step_count
from hetero_fl.engine.driver import Work, run_plan
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.federation.broadcasts import ESTIMATES_KEY, read_broadcast
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.dry_run import DryRunBackend, ExpectedUploads
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.privacy.accounting import PrivacyCharge, epsilon_of_mechanisms
from hetero_fl.privacy.client_side import WITHIN
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError, suggest_or_list

# Whether a site takes part in a run at all: its file against the server's configuration, before
# anything is loaded.

# which a configuration has as the site's file has them, or not at all
OWN_KEYS = ("model", "preprocess", "augment")


def check_raw_config(tree: object, allows: AllowsConfig) -> dict[str, Any]:
    """A configuration before it is read: to read one that names code is to import that. Raises RequestRefusedError."""
    if not isinstance(tree, dict):
        raise RequestRefusedError("the configuration is none")
    for name, key in CodePermission(granted=allows.own_code).find_refused(
        find_references(tree), ""
    ):
        raise RequestRefusedError(
            f"{key}: found {name[:80]}; this site runs no code by name but allows.own_code {allows.own_code}"
        )
    return tree


def check_config(config: Config, site: SiteConfig, settings: ClientSettings) -> None:
    """A configuration against a site's file. `settings`: this client's. Raises RequestRefusedError, naming both keys."""
    allows = site.allows
    me = site.client
    name = config.algorithm["name"]
    if allows.methods is not None and name not in allows.methods:
        raise RequestRefusedError(
            f"algorithm.name: found {name}; this site's allows.methods are {', '.join(allows.methods)}"
        )
    check_limit("rounds", config.rounds, "rounds", allows.rounds)
    check_limit(
        f"clients: {me}: epochs",
        None if settings.steps else settings.epochs,
        "epochs",
        allows.epochs,
    )
    check_limit(f"clients: {me}: steps", settings.steps, "steps", allows.steps)
    own = ClientSettings.model_validate(site.settings())
    for key in OWN_KEYS:
        if getattr(site, key) is not None and getattr(settings, key) != getattr(own, key):
            raise RequestRefusedError(f"clients: {me}: {key}: is not what this site's file has")
    if site.shares is not None and (
        more := [s for s in settings.shares if not _is_allowed(s, own.shares)]
    ):
        raise RequestRefusedError(
            f"clients: {me}: shares: found {', '.join(more)}; this site shares {', '.join(own.shares) or 'nothing'}"
        )
    secure = config.channel.secure_sum
    if secure is None and allows.secure_sum_only:
        raise RequestRefusedError(
            "channel.secure_sum: found none; this site's allows.secure_sum_only lets uploads leave in no other way"
        )
    if secure is not None and allows.cohort is not None:
        found = secure.min_survivors(
            config.clients.per_round or len(expand_population(config.clients))
        )
        if found < allows.cohort:
            raise RequestRefusedError(
                f"channel.secure_sum.threshold: lets a sum of {found} clients be told; this site's allows.cohort is "
                f"{allows.cohort}"
            )
    if allows.privacy is not None:
        _check_privacy(config, site)


def _check_privacy(config: Config, site: SiteConfig) -> None:
    privacy = config.privacy
    where = "this site's allows.privacy counts noise that it adds itself"
    if privacy is None:
        raise RequestRefusedError(f"privacy: found none; {where}")
    if privacy.unit == "client":
        raise RequestRefusedError(
            f"privacy.unit: found client, whose noise others add; {where}: record or local"
        )
    if site.tells.labels:
        raise RequestRefusedError(
            "tells.labels: true tells counts as they are, with allows.privacy; leave one of them out"
        )
    if site.tells.model and privacy.unit == "local":
        raise RequestRefusedError(
            "tells.model: true tells a model that nobody noised, with allows.privacy and privacy.unit local"
        )


def run_fingerprint(tree: Mapping[str, Any], rows: str, public: str) -> bytes:
    """What must be the same whenever a site takes part in a run: its configuration, but for what decides no result, its rows, and
    the public sets, these two by their hashes. Another one under the same name could be made to tell the difference between two
    answers."""
    runtime = tree.get("runtime")
    kept = (
        {k: v for k, v in runtime.items() if k not in FREE}
        if isinstance(runtime, dict)
        else runtime
    )
    told = json.dumps(
        [{**tree, "runtime": kept, "init_from": None}, rows, public], sort_keys=True, default=str
    )
    return hashlib.sha256(told.encode()).digest()


def check_limit(what: str, found: float | None, key: str, most: float | None) -> None:
    """A number against one of the limits. Raises RequestRefusedError, naming both."""
    if most is not None and found is not None and (found > most):
        raise RequestRefusedError(
            f"{what}: found {_format_number(found)}; this site's allows.{key} is {_format_number(most)}"
        )


def _format_number(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _is_allowed(share: str, allowed: Sequence[str]) -> bool:
    """Whether a share is one of these, or a part of one."""
    if share in allowed:
        return True
    part = "backbone." if share == "backbone" else share
    wider = [
        "backbone." if a == "backbone" else a for a in allowed if a == "backbone" or a.endswith(".")
    ]
    return part.endswith(".") and (
        "parameters" in allowed or any(part.startswith(w) for w in wider)
    )


# What a site checks before it does what it is asked, and before anything leaves: its file decides,
# not the server.
#
# A task is rehearsed, without computing, with what the server sent: the method's plan says how long
# it would train and what it would spend. What is made of it in earnest is looked at again, item by
# item, before it is encoded.


def digest_of(kind: str, request: Message, base: str) -> bytes:
    """What a task is, whatever the server calls it: the same for the same question, and else another."""
    body = hashlib.sha256(request.body).hexdigest()
    about = (
        kind,
        request.kind,
        request.round_idx,
        request.attempt,
        float(request.step_share).hex(),
        base,
        body,
    )
    return hashlib.sha256(repr(about).encode()).digest()


class StepCountingBackend(DryRunBackend):
    """Notes how long a plan would train."""

    steps = 0
    epochs = 0.0

    def run(self, work: Work) -> list[Any]:
        for participant, step in work:
            if isinstance(step, Fit):
                if isinstance(step.data, SampledBatches):
                    self.steps += step_count(step.data.size, step)
                    continue
                rows = len(next(iter(step.data.columns(participant).values())))
                count = step_count(rows, step)
                self.steps += count
                self.epochs += (
                    step.epochs
                    if step.steps is None
                    else step.steps * step.batch_size / max(1, rows)
                )
        return super().run(work)


@dataclass
class Policy:
    """A site's checks in one run."""

    site: SiteConfig
    prepared: PreparedRun
    usage: SiteUsage

    def __post_init__(self) -> None:
        self.allows = self.site.allows
        method = self.prepared.method
        federation = self.prepared.federation
        self.specs = method.uploads
        self.client_info = federation.client_infos[self.site.client]
        self.links = FederationLinks(method, federation)
        self.secure = federation.channel.secure_sum is not None and bool(method.uploads)

    # Before it is done
    def check(
        self, kind: str, request: Message, digest: bytes, load_state: Callable[[], bytes]
    ) -> list[dict[str, Any]]:
        """Check a task; return what it will spend of the site's privacy.

        Args:
            kind: "answer" or "read".
            request: The task.
            digest: Names the task.
            load_state: Loads the encoded private state with which it begins.

        Raises:
            RequestRefusedError: If the site does not allow it; names the key.
        """
        rounds = self.prepared.config.rounds
        ends = self.prepared.config.runtime.mode == "sync"  # versions have no end known
        if (
            not 0 <= request.round_idx <= (rounds if ends else request.round_idx)
            or request.attempt < 0
        ):
            raise RequestRefusedError(
                f"round {request.round_idx + 1} of {rounds}, for the {request.attempt + 1}th time"
            )
        if not 0 < request.step_share <= 1:
            raise RequestRefusedError(
                f"work: found {request.step_share:g}, a share of the steps that were agreed; it is at most 1"
            )
        if kind == "read":
            self._check_length(lambda: self._dry_run_evaluation(request, load_state), 1.0)
            return []
        if request.kind not in (
            REQUESTS if self.secure else (TRAIN,)
        ):  # without exchanges, whatever is asked is trained on
            raise RequestRefusedError(
                f"asked for '{request.kind[:20]}', which is nothing that this run's uploads need"
            )
        if self.secure and self.allows.cohort is not None:
            self._check_sum(request, self.allows.cohort)
        if request.kind != TRAIN or digest in self.usage.trained:
            return []  # the same again costs, and tells, nothing
        if (
            self.allows.rounds is not None
            and (trained := len(self.usage.trained)) >= self.allows.rounds
        ):
            raise RequestRefusedError(
                f"allows.rounds: this site has trained {trained} times in this run, and is asked once more"
            )
        charges: list[PrivacyCharge] = []
        self._check_length(
            lambda: charges.extend(self._dry_run_training(request, load_state)),
            request.step_share,
        )
        return (
            [] if self.allows.privacy is None else self._fits_budget(charges, self.allows.privacy)
        )

    def _check_length(self, dry_run: Callable[[], object], work: float) -> None:
        """How long a task would train. `dry_run`: goes through it; where nothing is limited that is left out."""
        allows = self.allows
        watch = self._make_step_counter
        if allows.privacy is None and allows.epochs is None and allows.steps is None:
            return
        watch.steps = 0
        watch.epochs = 0.0
        try:
            dry_run()
        except Exception as error:  # what a plan makes of what it was sent may be anything
            raise RequestRefusedError(
                f"what was sent cannot be trained on ({type(error).__name__}: {error})"
            ) from None
        check_limit("this task's epochs", round(watch.epochs * work, 3), "epochs", allows.epochs)
        check_limit("this task's steps", int(watch.steps * work), "steps", allows.steps)

    def _check_sum(self, request: Message, min_clients: int) -> None:
        """Of how many clients a sum would be told."""
        if request.kind not in ("shares", "unmask"):
            return
        try:
            got = read_secure(request.body, REQUESTS[request.kind])
        except PayloadError as error:
            raise RequestRefusedError(str(error)) from None
        found = len(got["numbers"] if request.kind == "shares" else got["survivors"])
        if found < min_clients:
            raise RequestRefusedError(
                f"allows.cohort: a secure sum of {found} clients is asked for; this site wants {min_clients} at least"
            )

    @cached_property
    def _make_step_counter(self) -> StepCountingBackend:
        return StepCountingBackend()

    @cached_property
    def _expectations(self) -> ExpectedUploads:
        made = ExpectedUploads(self.prepared.method, self.prepared.federation)
        made.backend = self._make_step_counter
        return made

    def _read_broadcast(
        self, round_idx: int, body: bytes, load_state: Callable[[], bytes]
    ) -> Payload:
        state = load_state() if self.links.sends_changes else b""
        held = PrivateState.decode(state).state.get(ESTIMATES_KEY) if state else None
        return read_broadcast(self.links, round_idx, body, held)

    def _dry_run_training(
        self, request: Message, load_state: Callable[[], bytes]
    ) -> tuple[PrivacyCharge, ...]:
        """A task that trains; what it would spend."""
        body = (
            read_secure(request.body, REQUESTS[TRAIN])["broadcast"].tobytes()
            if self.secure
            else request.body
        )
        got = self._read_broadcast(request.round_idx, body, load_state)
        return self._expectations.dry_run_upload(self.client_info, got, request.round_idx)[1]

    def _dry_run_evaluation(self, request: Message, load_state: Callable[[], bytes]) -> None:
        """One that makes the model which is read."""
        client = self._expectations.placeholder_client(self.client_info, request.round_idx)
        got = self._read_broadcast(request.round_idx, request.body, load_state)
        for hook in (self.prepared.method.deploy, self.prepared.method.personalize):
            run_plan(hook(client, got), client, self._make_step_counter)

    def _fits_budget(
        self, charges: Iterable[PrivacyCharge], budget: BudgetConfig
    ) -> list[dict[str, Any]]:
        privacy = self.prepared.federation.privacy
        assert privacy is not None  # else `check_config` had refused
        due = [
            {
                "noise": c.scale * privacy.known_noise_multiplier,
                "rate": c.rate,
                "steps": c.steps,
                "once": c.once,
            }
            for c in charges
            if c.once not in self.usage.one_time_charges
        ]
        spent = self.usage.with_charges(due)
        found = epsilon_of_mechanisms(spent, budget.delta, "rdp")
        if found > budget.epsilon:  # PRV takes half a second, and says less
            found = epsilon_of_mechanisms(spent, budget.delta, "prv")
        if found > budget.epsilon:
            raise RequestRefusedError(
                f"allows.privacy.epsilon: with this task, what this site has spent would be {found:.4g} at δ {budget.delta:g}; "
                f"it allows {budget.epsilon:g}"
            )
        return due

    # Before it leaves
    def check_upload(self, payload: Payload) -> None:
        """An upload, before it is encoded. Raises UserError for an item that this site does not share."""
        shares = (
            self.site.shares if self.site.shares is not None else self.client_info.settings.shares
        )
        # WITHIN tells whether updates were within bounds, and is noised at the server.
        items = {name: item for name, item in payload.items_.items() if name != WITHIN}
        for name in items:
            if name not in self.specs:
                raise UserError(
                    f"'{name}' is nothing that {self.prepared.name} sends{suggest_or_list(name, self.specs)}"
                )
        if unshared := describe_unshared(items, self.specs, shares):
            raise UserError(
                f"shares: {unshared}; this site shares {', '.join(shares) or 'nothing'}"
            )

    def check_size(self, size: int, upload: bool) -> None:
        """An answer of so many bytes. Raises RequestRefusedError."""
        if upload:
            check_limit("bytes of this upload", size, "upload_bytes", self.allows.upload_bytes)
        check_limit(
            "bytes of all answers with this one",
            self.usage.sent + size,
            "total_bytes",
            self.allows.total_bytes,
        )

    def shared_kinds(self, payload: Payload) -> list[str]:
        """What of an upload leaves, for the log."""
        items = [f"{name}: {payload.item(name).kind}" for name in payload]
        said = items + (["training loss"] if payload.report else [])
        return [f"masked sum of {', '.join(said)}"] if self.secure else said

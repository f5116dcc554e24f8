"""What a site checks before it does what it is asked, and before anything leaves: its file decides, not the server.

A task is rehearsed, without computing, with what the server sent: the method's plan says how long it would train and what it
would spend. What is made of it in earnest is looked at again, item by item, before it is encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hetero_fl.architecture import Tensors
from hetero_fl.channel.privacy.accounting import Charge, epsilon_of
from hetero_fl.channel.protocol import Message
from hetero_fl.channel.secure.messages import REQUESTS
from hetero_fl.channel.secure.messages import read as read_secure
from hetero_fl.errors import UserError, nearest
from hetero_fl.experiment.deployment.account import TRAIN, Account
from hetero_fl.experiment.deployment.limits import BudgetConfig
from hetero_fl.experiment.deployment.messages import Refused
from hetero_fl.experiment.deployment.site_file import SiteConfig
from hetero_fl.experiment.deployment.terms import at_most
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.payload import Payload, PayloadError
from hetero_fl.plan import Draws, Fit
from hetero_fl.runtime.batches import step_count
from hetero_fl.runtime.dry import Dry, Expectations
from hetero_fl.runtime.links import Links
from hetero_fl.runtime.plans import Work, carry_out
from hetero_fl.runtime.protection import WITHIN


def digest_of(kind: str, asked: Message, base: str) -> bytes:
    """What a task is, whatever the server calls it: the same for the same question, and else another."""
    body = hashlib.sha256(asked.body).hexdigest()
    about = (kind, asked.ask, asked.round, asked.again, float(asked.work).hex(), base, body)
    return hashlib.sha256(repr(about).encode()).digest()


class Watch(Dry):
    """Notes how long a plan would train."""

    steps, epochs = 0, 0.0

    def perform(self, work: Work) -> list[Any]:
        for participant, step in work:
            if isinstance(step, Fit):
                if isinstance(step.data, Draws):
                    self.steps += step_count(step.data.size, step)
                    continue
                rows = len(next(iter(step.data.columns(participant).values())))
                count = step_count(rows, step)
                self.steps += count
                self.epochs += step.epochs if step.steps is None else step.steps * step.batch_size / max(1, rows)
        return super().perform(work)


@dataclass
class Policy:
    """A site's checks in one run."""

    site: SiteConfig
    prepared: Prepared
    account: Account

    def __post_init__(self) -> None:
        self.allows = self.site.allows
        method, federation = self.prepared.method, self.prepared.federation
        self.specs, self.card = method.uploads, federation.cards[self.site.client]
        self.links = Links(method, federation)
        self.secure = federation.channel.secure_sum is not None and bool(method.uploads)

    # Before it is done
    def check(self, kind: str, asked: Message, digest: bytes) -> list[dict[str, Any]]:
        """A task. Returns what it will spend of the site's privacy. Raises Refused, naming the key."""
        rounds, ends = (
            self.prepared.config.rounds,
            self.prepared.config.runtime.mode == "sync",
        )  # versions have no end known
        if not 0 <= asked.round <= (rounds if ends else asked.round) or asked.again < 0:
            raise Refused(f"round {asked.round + 1} of {rounds}, for the {asked.again + 1}th time")
        if not 0 < asked.work <= 1:
            raise Refused(f"work: found {asked.work:g}, a share of the steps that were agreed; it is at most 1")
        if kind == "read":
            self._check_length(lambda: self._rehearsed_reading(asked), 1.0)
            return []
        if asked.ask not in (
            REQUESTS if self.secure else (TRAIN,)
        ):  # without exchanges, whatever is asked is trained on
            raise Refused(f"asked for '{asked.ask[:20]}', which is nothing that this run's uploads need")
        if self.secure and self.allows.cohort is not None:
            self._check_sum(asked, self.allows.cohort)
        if asked.ask != TRAIN or digest in self.account.trained:
            return []  # the same again costs, and tells, nothing
        if self.allows.rounds is not None and (trained := len(self.account.trained)) >= self.allows.rounds:
            raise Refused(f"allows.rounds: this site has trained {trained} times in this run, and is asked once more")
        charges: list[Charge] = []
        self._check_length(lambda: charges.extend(self._rehearsed(asked)), asked.work)
        return [] if self.allows.privacy is None else self._afforded(charges, self.allows.privacy)

    def _check_length(self, rehearse: Callable[[], object], work: float) -> None:
        """How long a task would train. `rehearse`: goes through it; where nothing is limited that is left out."""
        allows, watch = self.allows, self._watch
        if allows.privacy is None and allows.epochs is None and allows.steps is None:
            return
        watch.steps, watch.epochs = 0, 0.0
        try:
            rehearse()
        except Exception as error:  # what a plan makes of what it was sent may be anything
            raise Refused(f"what was sent cannot be trained on ({type(error).__name__}: {error})") from None
        at_most("this task's epochs", round(watch.epochs * work, 3), "epochs", allows.epochs)
        at_most("this task's steps", int(watch.steps * work), "steps", allows.steps)

    def _check_sum(self, asked: Message, least: int) -> None:
        """Of how many clients a sum would be told."""
        if asked.ask not in ("shares", "unmask"):
            return
        try:
            got = read_secure(asked.body, REQUESTS[asked.ask])
        except PayloadError as error:
            raise Refused(str(error)) from None
        found = len(got["numbers"] if asked.ask == "shares" else got["survivors"])
        if found < least:
            raise Refused(
                f"allows.cohort: a secure sum of {found} clients is asked for; this site wants {least} at least"
            )

    @cached_property
    def _watch(self) -> Watch:
        return Watch()

    @cached_property
    def _expectations(self) -> Expectations:
        made = Expectations(self.prepared.method, self.prepared.federation)
        made.performer = self._watch
        return made

    def _rehearsed(self, asked: Message) -> tuple[Charge, ...]:
        """A task that trains; what it would spend."""
        body = read_secure(asked.body, REQUESTS[TRAIN])["broadcast"].tobytes() if self.secure else asked.body
        got = self.links.received(asked.round, body)
        return self._expectations.rehearsed(self.card, got, asked.round)[1]

    def _rehearsed_reading(self, asked: Message) -> None:
        """One that makes the model which is read."""
        client, got = self._expectations.stand_in(self.card, asked.round), self.links.received(asked.round, asked.body)
        for hook in (self.prepared.method.deploy, self.prepared.method.personalise):
            carry_out(hook(client, got), client, self._watch)

    def _afforded(self, charges: Iterable[Charge], budget: BudgetConfig) -> list[dict[str, Any]]:
        privacy = self.prepared.federation.privacy
        assert privacy is not None  # else `check_config` had refused
        due = [
            {"noise": c.scale * privacy.z, "rate": c.rate, "steps": c.steps, "once": c.once}
            for c in charges
            if c.once not in self.account.once
        ]
        spent = self.account.with_(due)
        found = epsilon_of(spent, budget.delta, "rdp")
        if found > budget.epsilon:  # PRV takes half a second, and says less
            found = epsilon_of(spent, budget.delta, "prv")
        if found > budget.epsilon:
            raise Refused(
                f"allows.privacy.epsilon: with this task, what this site has spent would be {found:.4g} at δ {budget.delta:g}; "
                f"it allows {budget.epsilon:g}"
            )
        return due

    # Before it leaves
    def check_upload(self, payload: Payload) -> None:
        """An upload, before it is encoded. Raises UserError for an item that this site does not share."""
        shares = self.site.shares if self.site.shares is not None else self.card.settings.shares
        for name in payload:
            values = payload[name]
            if name == WITHIN:  # whether updates were within bounds, noised at the server
                continue
            if name not in self.specs:
                raise UserError(f"'{name}' is nothing that {self.prepared.name} sends{nearest(name, self.specs)}")
            share = self.specs[name].share
            if share == "parameters":
                _check_named(name, values if isinstance(values, dict) else None, shares)
            elif share not in shares:
                raise UserError(f"shares: '{name}' needs {share}; this site shares {', '.join(shares) or 'nothing'}")

    def check_size(self, size: int, upload: bool) -> None:
        """An answer of so many bytes. Raises Refused."""
        if upload:
            at_most("bytes of this upload", size, "upload_bytes", self.allows.upload_bytes)
        at_most("bytes of all answers with this one", self.account.sent + size, "total_bytes", self.allows.total_bytes)

    def kinds(self, payload: Payload) -> list[str]:
        """What of an upload leaves, for the log."""
        items = [f"{name}: {payload.item(name).kind}" for name in payload]
        said = items + (["training loss"] if payload.report else [])
        return [f"masked sum of {', '.join(said)}"] if self.secure else said


def _check_named(name: str, values: Tensors | None, shares: Sequence[str]) -> None:
    if "parameters" in shares:
        return
    parts = ["backbone." if s == "backbone" else s for s in shares if s == "backbone" or s.endswith(".")]
    for tensor in values if values is not None else ("",):
        if not any(tensor.startswith(part) for part in parts):
            raise UserError(
                f"shares: '{name}' holds {tensor or 'parameters'}; this site shares {', '.join(shares) or 'nothing'}"
            )

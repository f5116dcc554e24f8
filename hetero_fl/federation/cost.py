"""Forecast what a run will cost before it starts: bytes sent and privacy budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Message, both_ways
from hetero_fl.config import Config
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.participant import Card
from hetero_fl.core.payload import Payload
from hetero_fl.engine.driver import carry_out
from hetero_fl.federation.asynchronous import Asynchronous, Nothing, Task
from hetero_fl.federation.channel import Links, make_protocol
from hetero_fl.federation.dry_run import Dry, Expectations
from hetero_fl.federation.federation import Federation
from hetero_fl.federation.method_calls import broadcast, is_own, told
from hetero_fl.federation.sampling import draw_cohort
from hetero_fl.federation.simulation.schedule import Conditions
from hetero_fl.federation.state_store import Store
from hetero_fl.federation.synchronous import CHANGED
from hetero_fl.privacy.accounting import Charge, History, added, solve, worst
from hetero_fl.utils.errors import UserError

# What a whole run will send, to the byte, from rounds in which nothing is computed.


@dataclass
class Price:
    """Bytes of a whole run by client: up, down to train on, and down for evaluations only.

    `exact` for the methods of this package, as long as every client's every upload is used; what an own method sends may
    depend on numbers (a weight's digits, a mask), so there it is about right. `at_most`: sizes follow from what is learnt,
    and are counted at their largest.
    """

    exact: bool
    at_most: bool = False
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    reading: Counter[str] = field(default_factory=Counter)


@told()
def price(
    algorithm: Algorithm,
    federation: Federation,
    rounds: int,
    per_round: int | None = None,
    every: int = 1,
) -> Price:
    """The price of so many rounds with `per_round` clients each (None: all), evaluated `every` so many and at the end.

    Raises UserError and RunFailed where the method itself would.
    """
    dearest = algorithm.dearest()
    run = DryRun(dearest, federation)
    at_most = dearest != algorithm or run.links.at_most
    made = Price(not is_own(algorithm) and not at_most, at_most)
    if not algorithm.counted:
        return made
    for round in range(rounds):
        cohort = draw_cohort(federation, per_round, round)
        for id in cohort:
            exchanged = run.exchange(id, round)
            made.down[id] += exchanged.down
            made.up[id] += exchanged.up
        run.aggregate(cohort, round)
        if (round + 1) % every == 0 or round + 1 == rounds:
            for id in federation.readers:
                made.reading[id] += run.reading(id, round + 1)
    return made


class Exchanged(NamedTuple):
    """Bytes down to a client and up from it, and what it spends of its privacy."""

    down: int
    up: int
    charges: tuple[Charge, ...] = ()


class DryRun:
    """A server whose state has the right form. What was measured is measured again only where the form has changed."""

    def __init__(self, algorithm: Algorithm, federation: Federation) -> None:
        self.algorithm, self.federation = algorithm, federation
        self.server, self.expectations = federation.server(), Expectations(algorithm, federation)
        self.links = Links(algorithm, federation, bound=True)
        self.protocol = make_protocol(algorithm, federation)
        algorithm.start(self.server)
        self._intervals = sorted({kind.settings.share_every for kind in federation.cards.kinds})
        self._sizes: dict[Any, Exchanged] = {}
        # after these the server's state has the form that it had before
        self._settled: set[Any] = set()
        self._form = _form([self.server.models, self.server.state])

    def _at(self, round: int) -> tuple[Any, ...]:
        self.server.clock, self.server.uses = self.federation.clock(round), {}
        return (
            self._form,
            *(self.expectations.phase(interval, round) for interval in self._intervals),
        )

    def exchange(self, id: str, round: int) -> Exchanged:
        """What a client's part in that round comes to."""
        at, card = self._at(round), self.federation.cards[id]
        down = broadcast(self.algorithm, self.server, card)
        key = (_alike(card, down), at)
        if key not in self._sizes:
            up, charges = self.expectations.rehearsed(card, down, round)
            at_client = self._down(down, round)
            alone = 0 if self.protocol.setup else len(self.links.upload(card, round, up, down, {}))
            sizes = self.protocol.sizes(self.federation.cohort, round, at_client, alone)
            self._sizes[key] = Exchanged(*both_ways(sizes.values()), tuple(charges))
        return self._sizes[key]

    def reading(self, id: str, round: int) -> int:
        """Bytes down to a client whose model is read before that round."""
        at, card = self._at(round), replace(self.federation.cards[id], reading=True)
        down = broadcast(self.algorithm, self.server, card)
        key = (_alike(card, down), at, "reading")
        if key not in self._sizes:
            self._sizes[key] = Exchanged(self._down(down, round), 0)
        return self._sizes[key].down

    def _down(self, payload: Payload, round: int) -> int:
        return len(self.links.broadcast(round, payload, self.server.arch.values()))

    def aggregate(self, cohort: list[str], round: int) -> None:
        """The server's part of that round."""
        self.combine(
            cohort,
            round,
            lambda: [self.expected(self.federation.cards[id], round) for id in cohort],
        )

    def expected(self, card: Card, round: int) -> Upload:
        """An upload of the form that the client's has in that round."""
        items = self.expectations.of(card, broadcast(self.algorithm, self.server, card), round)
        return Upload(card, Payload(dict(items)))

    def combine(self, senders: list[str], round: int, sent: Callable[[], list[Upload]]) -> None:
        """The server's part where these clients' uploads have come, in the order of their ids."""
        key = (self._at(round), tuple(senders))
        if key in self._settled or not senders:
            return
        uploads = Uploads(specs=self.expectations.protection.specs, common=self.server.common)
        for upload in sent():
            uploads.add(upload)
        carry_out(
            self.algorithm.aggregate(self.server, uploads), self.server, self.expectations.performer
        )
        before, self._form = self._form, _form([self.server.models, self.server.state])
        if before == self._form:
            self._settled.add(key)


def _alike(card: Card, down: Payload) -> tuple[Any, ...]:
    """Clients with equal marks exchange equally much: a weight is written with the digits of their rows."""
    items = {name: (down[name], down.item(name).weight) for name in down}
    return card.arch, id(card.settings), card.n, _form(items)


def _form(tree: Any) -> Any:
    """Names, shapes and dtypes of a tree: all that its encoded length depends on, but for plain values."""
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, Mapping):
        return tuple((name, _form(value)) for name, value in tree.items())
    return tuple(map(_form, tree)) if isinstance(tree, list | tuple) else repr(tree)


# What an asynchronous run will send: its event queue, in which nothing is computed.


@told()
def price_of_queue(algorithm: Algorithm, federation: Federation, config: Config) -> Price:
    """The price of an asynchronous run as its configuration has it: tasks, their times and their fates are the run's own, so
    those that fail and those in flight at its end are counted, too.

    Raises UserError and RunFailed where the method itself would, and RunFailed where nothing ever comes.
    """
    run = Rehearsal(algorithm.dearest(), federation, config)
    at_most = run.algorithm != algorithm or run.dry.links.at_most
    run.price.exact, run.price.at_most = not is_own(algorithm) and not at_most, at_most
    if not algorithm.counted:
        return run.price
    for round in range(1, config.rounds + 1):
        run.round()
        if round % config.evaluation.every == 0 or round == config.rounds:
            for id in federation.readers:
                run.price.reading[id] += run.dry.reading(id, run.version)
    return run.price


@dataclass
class Nobody:
    """Takes the place of an executor: nobody is asked."""

    store: Store = field(default_factory=Store)
    performer: Dry = field(default_factory=Dry)


class Rehearsal(Asynchronous):
    """An asynchronous run of which only times and sizes happen."""

    def __init__(self, algorithm: Algorithm, federation: Federation, config: Config) -> None:
        runtime, conditions = config.runtime, Conditions.of(federation, config)
        super().__init__(
            algorithm, federation, Nobody(), config.clients.per_round, conditions=conditions,
            buffer=runtime.buffer, staleness=runtime.staleness,
        )  # fmt: skip
        self.price, self.dry = Price(exact=True), DryRun(algorithm, federation)
        self.server = self.dry.server
        # by task in flight: the bytes of its upload, and its form
        self._sent: dict[int, tuple[int, Payload]] = {}

    def _task(self, client: str, place: int) -> Task:
        task = super()._task(client, place)
        if not task.fate.fails:
            size = self.dry.exchange(client, self.version).up
            self._sent[task.number] = (
                size,
                self.dry.expected(self.federation.cards[client], self.version).payload,
            )
        return task

    def _compute(self) -> None:
        for task in self.queue.take_open():
            task.upload = Message("upload", b"")

    def _arrival(self, task: Task) -> Payload:
        if task.fate.fails:
            return super()._arrival(task)
        size, payload = self._sent.pop(task.number)
        self._count(task.client, up=2 * size if task.fate.what == "twice" else size)
        if task.fate.what == "corrupted":
            raise Nothing(CHANGED, "fate")
        return payload

    def _may_be_killed(self) -> None:
        """Not in a rehearsal."""

    def _combine(self, sent: list[Upload]) -> None:
        self.dry.combine([upload.client for upload in sent], self.version, lambda: sent)

    def _count(self, client: str, up: int = 0, down: int = 0) -> None:
        super()._count(client, up, down)
        self.price.up[client] += up
        self.price.down[client] += down


# What a run spends of its clients' privacy, known before it begins: who takes part is drawn by key,
# what a plan reads is seen in a dry run. What really happens spends as much, or less where a client
# drops out.


@dataclass(frozen=True)
class Budget:
    """Of each round, the histories that clients have after it: how many different ones there are, not whose."""

    privacy: PrivacyConfig
    after: tuple[frozenset[History], ...]

    @classmethod
    def of(
        cls,
        privacy: PrivacyConfig,
        algorithm: Algorithm,
        federation: Federation,
        rounds: int,
        per_round: int | None,
    ) -> Budget:
        """The budget of so many rounds. Raises UserError for a method that reads private rows otherwise than noised."""
        run = DryRun(algorithm, federation)
        spent: dict[str, History] = {}
        once: set[tuple[str, str]] = set()
        held: Counter[History] = Counter()
        after = []
        everyone = list(federation.cards.clients.ids) if privacy.poisson_cohorts else []
        rate = min(1.0, (per_round or len(everyone)) / max(1, len(everyone)))
        for round in range(rounds):
            cohort = draw_cohort(federation, per_round, round)
            charged = {id: run.exchange(id, round).charges for id in cohort}
            if everyone:  # each is charged for the chance that it took part
                charged = dict.fromkeys(everyone, (Charge(rate),))
            for id, charges in charged.items():
                due = [c for c in charges if (id, c.once) not in once]
                once.update((id, c.once) for c in charges if c.once)
                before = spent.get(id, ())
                spent[id] = added(before, due)
                held[before] -= 1
                held[spent[id]] += 1
            after.append(frozenset(history for history, count in held.items() if count > 0))
            if algorithm.uploads:
                run.aggregate(cohort, round)
        return cls(privacy, tuple(after))

    def solved(self) -> PrivacyConfig:
        """The section with its noise multiplier, solved for where only ε was given. Raises UserError if the first round costs
        more than there is."""
        privacy, target = self.privacy, self.privacy.target_epsilon
        if privacy.noise_multiplier is None:
            assert target is not None  # one of them is given
            z = solve(self.after[-1], target, privacy.delta, privacy.accountant)
            privacy = privacy.model_copy(update={"noise_multiplier": z})
        elif target is not None and (first := self.epsilon(1)) > target:
            raise UserError(
                f"privacy.noise_multiplier: found {privacy.z:g}, with which the first round costs ε = {first:.3g}, more than "
                f"privacy.target_epsilon {target:g}; leave it out, and it follows from the target"
            )
        return privacy

    def epsilon(self, rounds: int) -> float:
        """The largest ε of any client after so many rounds."""
        if rounds == 0:
            return 0.0
        privacy = self.privacy
        return worst(self.after[rounds - 1], privacy.z, privacy.delta, privacy.accountant)

    def told(self) -> str:
        """A line on what is protected, and how far."""
        privacy, rounds = self.privacy, self.affordable()
        of = {
            "record": "a training row",
            "client": "a client",
            "local": "a client, noised at home",
        }[privacy.unit]
        return (
            f"privacy of {of}: noise multiplier {privacy.z:g}, ε {self.epsilon(rounds):.3g} at δ {privacy.delta:g} after "
            f"{rounds} rounds"
        )

    def affordable(self) -> int:
        """How many rounds fit into the target; all of them where there is none."""
        target, low, high = self.privacy.target_epsilon, 0, len(self.after)
        if target is None or self.epsilon(high) <= target:
            return high
        while high - low > 1:  # ε never falls
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= target else (low, middle)
        return low

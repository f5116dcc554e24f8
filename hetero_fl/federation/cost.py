"""Forecast what a run will cost before it starts: bytes sent and privacy budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Message, total_bytes
from hetero_fl.config import Config
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.asynchronous import AsynchronousTrainer, ClientTask, TaskFailedError
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.dry_run import DryRunBackend, ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.sampling import sample_cohort
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.upload_collector import CHANGED
from hetero_fl.federation.user_methods import call_broadcast, is_user_method, translate_user_errors
from hetero_fl.privacy.accounting import (
    History,
    PrivacyCharge,
    add_charges,
    solve_noise_multiplier,
    worst_epsilon,
)
from hetero_fl.utils.errors import UserError

# What a whole run will send, to the byte, from rounds in which nothing is computed.


@dataclass
class CommunicationCost:
    """Bytes of a whole run by client: up, down to train on, and down for evaluations only.

    `is_exact` for the methods of this package, as long as every client's every upload is used; what an own method sends may
    depend on numbers (a weight's digits, a mask), so there it is about right. `is_upper_bound`: sizes follow from what is learnt,
    and are counted at their largest.
    """

    is_exact: bool
    is_upper_bound: bool = False
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    evaluation: Counter[str] = field(default_factory=Counter)


@translate_user_errors()
def communication_cost(
    algorithm: Algorithm,
    federation: FederationSpec,
    rounds: int,
    per_round: int | None = None,
    every: int = 1,
) -> CommunicationCost:
    """The price of so many rounds with `per_round` clients each (None: all), evaluated `every` so many and at the end.

    Raises UserError and RunFailedError where the method itself would.
    """
    largest = algorithm.model_copy(update=algorithm.needs.largest_uploads)
    run = DryRun(largest, federation)
    at_most = largest != algorithm or run.links.at_most
    made = CommunicationCost(not is_user_method(algorithm) and not at_most, at_most)
    if not algorithm.needs.counts_traffic:
        return made
    for round in range(rounds):
        cohort = sample_cohort(federation, per_round, round)
        for id in cohort:
            exchanged = run.exchange_cost(id, round)
            made.down[id] += exchanged.down
            made.up[id] += exchanged.up
        run.aggregate(cohort, round)
        if (round + 1) % every == 0 or round + 1 == rounds:
            for id in federation.evaluated_clients:
                made.evaluation[id] += run.evaluation_bytes(id, round + 1)
    return made


class ExchangeCost(NamedTuple):
    """Bytes down to a client and up from it, and what it spends of its privacy."""

    down: int
    up: int
    charges: tuple[PrivacyCharge, ...] = ()


class DryRun:
    """A server whose state has the right form. What was measured is measured again only where the form has changed."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.server = federation.server()
        self.expectations = ExpectedUploads(algorithm, federation)
        self.links = FederationLinks(algorithm, federation, bound=True)
        self.protocol = make_protocol(algorithm, federation)
        algorithm.setup(self.server)
        self._intervals = sorted(
            {kind.settings.share_every for kind in federation.client_infos.profiles}
        )
        self._sizes: dict[Any, ExchangeCost] = {}
        # after these the server's state has the form that it had before
        self._settled: set[Any] = set()
        self._form = _tree_structure([self.server.models, self.server.state])

    def _server_at(self, round_idx: int) -> tuple[Any, ...]:
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return (
            self._form,
            *(self.expectations.upload_phase(interval, round_idx) for interval in self._intervals),
        )

    def exchange_cost(self, client_id: str, round_idx: int) -> ExchangeCost:
        """What a client's part in that round comes to."""
        at = self._server_at(round_idx)
        card = self.federation.client_infos[client_id]
        down = call_broadcast(self.algorithm, self.server, card)
        key = (_cost_key(card, down), at)
        if key not in self._sizes:
            up, charges = self.expectations.dry_run_upload(card, down, round_idx)
            at_client = self._broadcast_bytes(down, round_idx)
            alone = (
                0
                if self.protocol.setup
                else len(self.links.encode_upload(card, round_idx, up, down, {}))
            )
            sizes = self.protocol.sizes(self.federation.cohort, round_idx, at_client, alone)
            self._sizes[key] = ExchangeCost(*total_bytes(sizes.values()), tuple(charges))
        return self._sizes[key]

    def evaluation_bytes(self, client_id: str, round_idx: int) -> int:
        """Bytes down to a client whose model is read before that round."""
        at = self._server_at(round_idx)
        card = replace(self.federation.client_infos[client_id], purpose="evaluate")
        down = call_broadcast(self.algorithm, self.server, card)
        key = (_cost_key(card, down), at, "reading")
        if key not in self._sizes:
            self._sizes[key] = ExchangeCost(self._broadcast_bytes(down, round_idx), 0)
        return self._sizes[key].down

    def _broadcast_bytes(self, payload: Payload, round_idx: int) -> int:
        return len(self.links.encode_broadcast(round_idx, payload, self.server.arch.values()))

    def aggregate(self, cohort: list[str], round_idx: int) -> None:
        """The server's part of that round."""
        self.combine(
            cohort,
            round_idx,
            lambda: [
                self.expected_upload(self.federation.client_infos[id], round_idx) for id in cohort
            ],
        )

    def expected_upload(self, client_info: ClientInfo, round_idx: int) -> Upload:
        """An upload of the form that the client's has in that round."""
        items = self.expectations.expected_items(
            client_info, call_broadcast(self.algorithm, self.server, client_info), round_idx
        )
        return Upload(client_info, Payload(dict(items)))

    def combine(self, senders: list[str], round_idx: int, sent: Callable[[], list[Upload]]) -> None:
        """The server's part where these clients' uploads have come, in the order of their ids."""
        key = (self._server_at(round_idx), tuple(senders))
        if key in self._settled or not senders:
            return
        uploads = Uploads(specs=self.expectations.specs, common=self.server.common)
        for upload in sent():
            uploads.add(upload)
        run_plan(
            self.algorithm.aggregate(self.server, uploads), self.server, self.expectations.backend
        )
        before = self._form
        self._form = _tree_structure([self.server.models, self.server.state])
        if before == self._form:
            self._settled.add(key)


def _cost_key(client_info: ClientInfo, down: Payload) -> tuple[Any, ...]:
    """Clients with equal marks exchange equally much: a weight is written with the digits of their rows."""
    items = {name: (down[name], down.item(name).weight) for name in down}
    return client_info.arch, id(client_info.settings), client_info.num_rows, _tree_structure(items)


def _tree_structure(tree: Any) -> Any:
    """Names, shapes and dtypes of a tree: all that its encoded length depends on, but for plain values."""
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, Mapping):
        return tuple((name, _tree_structure(value)) for name, value in tree.items())
    return tuple(map(_tree_structure, tree)) if isinstance(tree, list | tuple) else repr(tree)


# What an asynchronous run will send: its event queue, in which nothing is computed.


@translate_user_errors()
def asynchronous_communication_cost(
    algorithm: Algorithm, federation: FederationSpec, config: Config
) -> CommunicationCost:
    """The price of an asynchronous run as its configuration has it: tasks, their times and their fates are the run's own, so
    those that fail and those in flight at its end are counted, too.

    Raises UserError and RunFailedError where the method itself would, and RunFailedError where nothing ever comes.
    """
    largest = algorithm.model_copy(update=algorithm.needs.largest_uploads)
    run = AsynchronousDryRun(largest, federation, config)
    at_most = run.algorithm != algorithm or run.dry.links.at_most
    run.price.is_exact = not is_user_method(algorithm) and not at_most
    run.price.is_upper_bound = at_most
    if not algorithm.needs.counts_traffic:
        return run.price
    for round in range(1, config.rounds + 1):
        run.run_round()
        if round % config.evaluation.every == 0 or round == config.rounds:
            for id in federation.evaluated_clients:
                run.price.evaluation[id] += run.dry.evaluation_bytes(id, run.version)
    return run.price


@dataclass
class NullExecutor:
    """Takes the place of an executor: nobody is asked."""

    store: StateStore = field(default_factory=StateStore)
    backend: DryRunBackend = field(default_factory=DryRunBackend)


class AsynchronousDryRun(AsynchronousTrainer):
    """An asynchronous run of which only times and sizes happen."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec, config: Config) -> None:
        runtime = config.runtime
        environment = SimulationEnvironment.from_config(federation, config)
        super().__init__(
            algorithm, federation, NullExecutor(), config.clients.per_round, environment=environment,
            buffer=runtime.buffer, staleness=runtime.staleness,
        )  # fmt: skip
        self.price = CommunicationCost(is_exact=True)
        self.dry = DryRun(algorithm, federation)
        self.server = self.dry.server
        # by task in flight: the bytes of its upload, and its form
        self._sent: dict[int, tuple[int, Payload]] = {}

    def _make_task(self, client: str, place: int) -> ClientTask:
        task = super()._make_task(client, place)
        if not task.fate.is_failure:
            size = self.dry.exchange_cost(client, self.version).up
            self._sent[task.number] = (
                size,
                self.dry.expected_upload(
                    self.federation.client_infos[client], self.version
                ).payload,
            )
        return task

    def _compute(self) -> None:
        for task in self.queue.pop_uncomputed():
            task.upload = Message("upload", b"")

    def _receive_upload(self, task: ClientTask) -> Payload:
        if task.fate.is_failure:
            return super()._receive_upload(task)
        size, payload = self._sent.pop(task.number)
        self._count_traffic(task.client, up=2 * size if task.fate.kind == "twice" else size)
        if task.fate.kind == "corrupted":
            raise TaskFailedError(CHANGED, "fate")
        return payload

    def _aggregate_uploads(self, arrived: list[Upload]) -> None:
        self.dry.combine([upload.client for upload in arrived], self.version, lambda: arrived)

    def _count_traffic(self, client: str, up: int = 0, down: int = 0) -> None:
        super()._count_traffic(client, up, down)
        self.price.up[client] += up
        self.price.down[client] += down


# What a run spends of its clients' privacy, known before it begins: who takes part is drawn by key,
# what a plan reads is seen in a dry run. What really happens spends as much, or less where a client
# drops out.


@dataclass(frozen=True)
class PrivacyBudget:
    """Of each round, the histories that clients have after it: how many different ones there are, not whose."""

    privacy: PrivacyConfig
    histories: tuple[frozenset[History], ...]

    @classmethod
    def for_run(
        cls,
        privacy: PrivacyConfig,
        algorithm: Algorithm,
        federation: FederationSpec,
        rounds: int,
        per_round: int | None,
    ) -> PrivacyBudget:
        """The budget of so many rounds. Raises UserError for a method that reads private rows otherwise than noised."""
        run = DryRun(algorithm, federation)
        spent: dict[str, History] = {}
        once: set[tuple[str, str]] = set()
        held: Counter[History] = Counter()
        after = []
        everyone = list(federation.client_infos.clients.ids) if privacy.poisson_cohorts else []
        rate = min(1.0, (per_round or len(everyone)) / max(1, len(everyone)))
        for round in range(rounds):
            cohort = sample_cohort(federation, per_round, round)
            charged = {id: run.exchange_cost(id, round).charges for id in cohort}
            if everyone:  # each is charged for the chance that it took part
                charged = dict.fromkeys(everyone, (PrivacyCharge(rate),))
            for id, charges in charged.items():
                due = [c for c in charges if (id, c.once) not in once]
                once.update((id, c.once) for c in charges if c.once)
                before = spent.get(id, ())
                spent[id] = add_charges(before, due)
                held[before] -= 1
                held[spent[id]] += 1
            after.append(frozenset(history for history, count in held.items() if count > 0))
            if algorithm.uploads:
                run.aggregate(cohort, round)
        return cls(privacy, tuple(after))

    def solved_privacy(self) -> PrivacyConfig:
        """The section with its noise multiplier, solved for where only ε was given. Raises UserError if the first round costs
        more than there is."""
        target = self.privacy.target_epsilon
        privacy = self.privacy
        if privacy.noise_multiplier is None:
            assert target is not None  # one of them is given
            z = solve_noise_multiplier(
                self.histories[-1], target, privacy.delta, privacy.accountant
            )
            privacy = privacy.model_copy(update={"noise_multiplier": z})
        elif target is not None and (first := self.epsilon(1)) > target:
            raise UserError(
                f"privacy.noise_multiplier: found {privacy.known_noise_multiplier:g}, with which the first round costs ε = {first:.3g}, more than "
                f"privacy.target_epsilon {target:g}; leave it out, and it follows from the target"
            )
        return privacy

    def epsilon(self, rounds: int) -> float:
        """The largest ε of any client after so many rounds."""
        if rounds == 0:
            return 0.0
        privacy = self.privacy
        return worst_epsilon(
            self.histories[rounds - 1],
            privacy.known_noise_multiplier,
            privacy.delta,
            privacy.accountant,
        )

    def description(self) -> str:
        """A line on what is protected, and how far."""
        privacy = self.privacy
        rounds = self.affordable_rounds()
        of = {
            "record": "a training row",
            "client": "a client",
            "local": "a client, noised at home",
        }[privacy.unit]
        return (
            f"privacy of {of}: noise multiplier {privacy.known_noise_multiplier:g}, ε {self.epsilon(rounds):.3g} at δ {privacy.delta:g} after "
            f"{rounds} rounds"
        )

    def affordable_rounds(self) -> int:
        """How many rounds fit into the target; all of them where there is none."""
        target = self.privacy.target_epsilon
        low = 0
        high = len(self.histories)
        if target is None or self.epsilon(high) <= target:
            return high
        while high - low > 1:  # ε never falls
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= target else (low, middle)
        return low

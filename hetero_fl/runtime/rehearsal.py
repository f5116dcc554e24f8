"""What an asynchronous run will send: its event queue, in which nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetero_fl.aggregation import Upload
from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Message
from hetero_fl.config import Config
from hetero_fl.payload import Payload
from hetero_fl.runtime.asynchronous import Asynchronous, Nothing
from hetero_fl.runtime.conditions import Conditions
from hetero_fl.runtime.dry import Dry
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import is_own, told
from hetero_fl.runtime.price import DryRun, Price
from hetero_fl.runtime.queue import Task
from hetero_fl.runtime.rounds import CHANGED
from hetero_fl.runtime.store import Store


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
        self._sent: dict[int, tuple[int, Payload]] = {}  # by task in flight: the bytes of its upload, and its form

    def _task(self, client: str, place: int) -> Task:
        task = super()._task(client, place)
        if not task.fate.fails:
            size = self.dry.exchange(client, self.version).up
            self._sent[task.number] = size, self.dry.expected(self.federation.cards[client], self.version).payload
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

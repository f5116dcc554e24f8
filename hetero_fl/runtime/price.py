"""What a whole run will send, to the byte, from rounds in which nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.privacy.accounting import Charge
from hetero_fl.channel.protocol import both_ways
from hetero_fl.payload import Payload
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast, is_own, told
from hetero_fl.runtime.invitation import draw_cohort
from hetero_fl.runtime.links import Links
from hetero_fl.runtime.plans import carry_out
from hetero_fl.runtime.secure import make_protocol
from hetero_fl.state import Card


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
    algorithm: Algorithm, federation: Federation, rounds: int, per_round: int | None = None, every: int = 1
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
        self._settled: set[Any] = set()  # after these the server's state has the form that it had before
        self._form = _form([self.server.models, self.server.state])

    def _at(self, round: int) -> tuple[Any, ...]:
        self.server.clock, self.server.uses = self.federation.clock(round), {}
        return (self._form, *(self.expectations.phase(interval, round) for interval in self._intervals))

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
        self.combine(cohort, round, lambda: [self.expected(self.federation.cards[id], round) for id in cohort])

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
        carry_out(self.algorithm.aggregate(self.server, uploads), self.server, self.expectations.performer)
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

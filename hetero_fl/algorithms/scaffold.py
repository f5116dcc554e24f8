"""SCAFFOLD: control variates against the drift of clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from pydantic import Field, PositiveFloat

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.config.clients import OptimizerConfig
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import FitReport, Plan
from hetero_fl.state import Card, Part, Participant, in_order, select

CONTROL = "control"


@algorithm("scaffold")
class Scaffold(FedAvg):
    """Each local step is corrected by c − c_k, the federation's and the client's own mean gradient (Karimireddy et al. 2020,
    Algorithm 1, option II).

    After K steps of rate η from x to y: c_k⁺ = c_k − c + (x − y)/(Kη), and the server's c moves by Σ w_k(c_k⁺ − c_k), w_k the
    client's share of the whole population's weight (1/N where uniform, as in the paper). The correction follows the
    optimiser's step: inside the gradient, momentum would pile it up. A client whose optimiser is not SGD trains with SGD, as
    Kη says nothing of Adam's steps. c_k never leaves the client, its change does.
    """

    uploads = {"model": ItemSpec("params"), CONTROL: ItemSpec("update")}

    sgd_lr: PositiveFloat = Field(0.01, description="learning rate of SGD for clients whose optimiser is another")
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD for these clients")

    def resolve(self, cards: Mapping[str, Card]) -> tuple[Algorithm, list[str]]:
        other = [id for id in in_order(cards) if cards[id].settings.optimizer.name != "sgd"]
        listed = ", ".join(other[:6]) + (f" and {len(other) - 6} more" if len(other) > 6 else "")
        sgd = f"sgd (lr {self.sgd_lr:g}, momentum {self.sgd_momentum:g}) in place of their own optimiser"
        return self, [f"scaffold trains {listed} with {sgd}"] if other else []

    def optimizer(self, client: Participant) -> OptimizerConfig:
        """The client's SGD of this round, or the method's in place of another optimiser."""
        config = client.settings.optimizer
        if config.name != "sgd":
            changes = {"name": "sgd", "lr": self.sgd_lr, "head_lr": None, "momentum": self.sgd_momentum}
            config = config.model_copy(update=changes)
        return config.at(client.clock.round, client.clock.rounds)

    # The round -----------------------------------------------------------------------------------------------------
    def start(self, server: Participant) -> None:
        server.state[CONTROL] = {
            group: {n: torch.zeros_like(model[n]) for n in model if n in server.arch[group].parameter_names}
            for group, model in server.models.items()
        }

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        if "model" in items and not card.reading:
            items[CONTROL] = select(server.state[CONTROL][card.arch.id], self.takes(card.settings, server.clock.round))
        return items

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        model, optimizer = client.models["model"], self.optimizer(client)
        names = client.arch["model"].parameter_names
        shared = {n: t for n, t in select(model, self.part(client.settings)).items() if n in names}
        mine = client.state.get(CONTROL) or {n: torch.zeros_like(t) for n, t in shared.items()}
        if CONTROL in got or "since" not in client.state:  # with nothing received there is nothing to correct
            client.state["since"] = {CONTROL: got.get(CONTROL, mine), "start": shared, "path": 0.0}
        since = client.state["since"]  # kept until the client uploads, which may be rounds later (`share_every`)
        # The runtime multiplies by lr: a head with a rate of its own gets its correction at that rate.
        head = (optimizer.head_lr or optimizer.lr) / optimizer.lr
        rates = {n: head if n.startswith("head.") else 1.0 for n in mine}
        drift = {n: rates[n] * (c - mine[n]) for n, c in since[CONTROL].items()}
        report: FitReport = yield self.fit(client, optimizer=optimizer, drift={"model": drift})
        since["path"] += report.steps * optimizer.lr
        items = self.share(client)
        if items:
            moved = {n: (x - client.models["model"][n]) / (since["path"] * rates[n]) for n, x in since["start"].items()}
            client.state[CONTROL] = {n: mine[n] - since[CONTROL][n] + d for n, d in moved.items()}
            change = {n: c - mine[n] for n, c in client.state[CONTROL].items()}
            items[CONTROL] = Item(change, self.weight_of(client), "update")
            del client.state["since"]
        return items

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        sent, all_ = self.weights(uploads.senders(CONTROL)), self.weights(server.peers.values())
        for group, mean in uploads.mean_by_group(CONTROL).items():
            held = server.state[CONTROL][group]
            for n, change in mean.items():
                share = self.owned(server, sent, group, n) / self.owned(server, all_, group, n)
                held[n] = held[n] + share * change
        yield from ()

    def weights(self, cards: Iterable[Card]) -> Counter[tuple[str, Part]]:
        """The weight of these clients, by architecture and by the part of the model that they share."""
        total: Counter[tuple[str, Part]] = Counter()
        for card in cards:
            total[card.arch.id, self.part(card.settings)] += self.weight_of(card)  # type: ignore[assignment]
        return total

    @staticmethod
    def owned(server: Participant, weights: Mapping[tuple[str, Part], float], group: str, name: str) -> float:
        """The weight of those of them who share that tensor with the group."""
        models, common = server.models, bool(server.common) and name.startswith(server.common)
        return sum(
            weight
            for (other, part), weight in weights.items()
            if (part is None or name.startswith(part))
            and (
                other == group
                or (common and name in models[other] and models[other][name].shape == models[group][name].shape)
            )
        )

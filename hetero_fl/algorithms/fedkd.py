"""FedKD: adaptive mutual distillation with a shared small model, whose updates travel compressed."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, NonNegativeFloat

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.mentee import MENTEE, WithMentee
from hetero_fl.architecture import Architecture
from hetero_fl.channel.lowrank import compress, restore
from hetero_fl.mutual import AdaptiveMutual
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Fit, Plan
from hetero_fl.state import Card, Participant, Roster, floats, select

HIDDEN = "hidden"  # W: from the mentee's features to the own model's, kept by the client
WHOLE = 2.0  # an energy that no truncation keeps: updates travel as they are


@algorithm("fedkd")
class FedKD(WithMentee):
    """Own model and mentee distil into one another, the more the better both are; updates of the mentee travel as truncated
    SVDs (Wu et al. 2022, Algorithm 1).

    The energy that a truncation keeps rises over the rounds. The server's mentee moves by the mean update as it sends it,
    truncated, so that it stays the one its clients hold; a client that missed a round is sent the mentee whole.
    """

    uploads = {MENTEE: ItemSpec("update", use="each", ranks=True, across=True)}
    downloads = {"change": ItemSpec("update", ranks=True)}

    hidden_weight: NonNegativeFloat = Field(1.0, description="weight of the distance between features")
    energy_start: float = Field(0.95, gt=0, le=1, description="share of an update's energy kept in the first round")
    energy_end: float = Field(0.98, gt=0, le=1, description="the same in the last round")

    def energy(self, who: Participant) -> float:
        """The share that is kept in this round."""
        done = who.clock.round / max(1, who.clock.rounds - 1)
        return self.energy_start + (self.energy_end - self.energy_start) * min(1.0, done)

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        method, notes = super().resolve(cards)
        return method, [*notes, "ranks of updates follow from what is learnt: `--check` counts all of them whole"]

    def dearest(self) -> Algorithm:
        return self.model_copy(update={"energy_start": WHOLE, "energy_end": WHOLE})

    def extras(self, arch: Architecture) -> dict[str, Architecture]:
        mentee = self.small(arch)
        return {MENTEE: mentee, HIDDEN: Architecture.of("linear", arch.width, (mentee.width,))}

    def broadcast(self, server: Participant, card: Card) -> Items:
        part, state = self.takes(card.settings, server.clock.round), server.state
        behind = state.get("version", 0) - state.get("held", {}).get(card.id, -1)
        if part == () or behind == 0:
            return {}
        if behind == 1 and "change" in state:
            return {"change": Item(select(state["change"], part), kind="update")}
        return super().broadcast(server, card)

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        client.load(HIDDEN, {"head.bias": torch.zeros_like(client.models[HIDDEN]["head.bias"])})  # W is a matrix
        mine = floats(select(client.models[MENTEE], self.part(client.settings)))
        base = got[MENTEE] if MENTEE in got else client.state.get("base", mine)
        if "change" in got:
            base = {**base, **{n: base[n] + d for n, d in restore(got["change"], base).items()}}
        if self.takes(client.settings, client.clock.round) != ():
            client.load(MENTEE, base)
        client.state["base"] = base

    def together(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        objective = AdaptiveMutual(client.task.kind, shape=shape, hidden_weight=self.hidden_weight)
        return self.both(client, objective, hidden=("head.weight",))

    def share(self, client: Participant) -> Items:
        base = select(client.state["base"], self.sends(client.settings, client.clock.round))
        update = {n: client.models[MENTEE][n] - t for n, t in base.items()}
        return {MENTEE: Item(compress(update, self.energy(client)), self.weight_of(client), "update")} if update else {}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        mentee, version = server.models[MENTEE], server.state.get("version", 0)
        took = [u.client for u in uploads.each if self.takes(u.card.settings, server.clock.round) != ()]
        server.state["held"] = {**server.state.get("held", {}), **dict.fromkeys(took, version)}
        restored = (_restored(u, mentee) for u in uploads.having(MENTEE))
        mean = self.mean(uploads.instead(restored, {MENTEE: ItemSpec("update", across=True)}))
        if mean:
            change = compress(mean, self.energy(server))
            server.models[MENTEE] = {**mentee, **{n: mentee[n] + d for n, d in restore(change, mentee).items()}}
            server.state.update(change=change, version=version + 1)
        yield from ()


def _restored(upload: Upload, like: dict[str, torch.Tensor]) -> Upload:
    item = upload.payload.item(MENTEE)
    return Upload(upload.card, Payload({MENTEE: replace(item, values=restore(item.values, like))}))  # type: ignore[arg-type]

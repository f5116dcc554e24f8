"""DENSE: one upload of every client's model, then a student distilled from all of them on examples made from them alone."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from pydantic import Field

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Items, algorithm
from hetero_fl.algorithms.data_free import GENERATOR, DataFree
from hetero_fl.config.clients import ClientSettings
from hetero_fl.errors import UserError, nearest
from hetero_fl.mutual import convertible
from hetero_fl.payload import ItemSpec, Payload
from hetero_fl.plan import Plan, Predict, Table
from hetero_fl.state import LOOKED, Card, Part, Participant, Roster, floats
from hetero_fl.synthesis import Synthesis, View, seen


@algorithm("dense")
class Dense(DataFree):
    """One-shot and data-free: clients train alone and upload θ once, in the last round. The server then alternates: a
    generator learns a batch by CE + λ₁·BN statistics − λ₂·KL where student and teachers differ; a student distils the
    teachers' mean logits on all batches so far (Zhang et al. 2022, Algorithm 1).

    Teachers may differ in architecture; the student has that of one client, which everybody then uses. Before the last
    round each client is read with its own model, as under Local; a run that stops early never gets there.
    """

    shared = None
    uploads = {"model": ItemSpec("params", use="each")}
    tasks = ("multiclass",)
    one_shot = True
    reads = "own model until the last round, then the server's student, through its own preprocessing"

    student: str | None = Field(
        None, description="client whose architecture and view the student takes; none: the first of the most frequent"
    )

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        if self.student is not None and self.student not in cards:
            raise UserError(f"algorithm.student: found '{self.student}'{nearest(self.student, islice(cards, LOOKED))}")
        student = self.student or cards.foremost.first
        arch = cards[student].arch
        if arch.vocabulary:
            raise UserError("algorithm.name: dense makes examples by their gradient, and the examples here are tokens")
        for kind in cards.kinds:
            own, shape = kind.arch.input_shape, arch.input_shape
            if not convertible(shape, own):
                raise UserError(
                    f"algorithm.student: examples of {student} are {list(shape)}, but of {kind.first} {list(own)}"
                )
        note = f"dense: one student for all, a {arch.name} as {student} has it; models travel once, at the end"
        return self.model_copy(update={"student": student}), [note]

    # One upload --------------------------------------------------------------------------------------------------
    def phase(self, share_every: int, round: int, rounds: int) -> int:
        return int(round == rounds - 1)

    def takes(self, settings: ClientSettings, round: int) -> Part:
        return ()

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield self.fit(client)
        last, whole = client.clock.round == client.clock.rounds - 1, self.part(client.settings) is None
        return {"model": floats(client.models["model"])} if last and whole else {}

    # The student -------------------------------------------------------------------------------------------------
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.having("model")
        if not sent:
            return
        card = self.of(server)
        shape = card.arch.input_shape
        slots = [f"teacher {u.client}" for u in sent]
        for slot, u in zip(slots, sent, strict=True):
            server.arch[slot], server.models[slot] = u.card.arch, {**server.models[u.group], **u.payload["model"]}
        server.arch[STUDENT], server.models[STUDENT] = card.arch, server.models[card.arch.id]
        server.arch[GENERATOR] = self.generator(shape)
        server.models[GENERATOR] = server.arch[GENERATOR].initial(server.clock.seed)
        teachers = tuple(zip(slots, map(view_of, (u.card for u in sent)), strict=True))
        synthesis = Synthesis(
            shape, teachers, (STUDENT, view_of(card)), self.statistics_weight, self.adversarial_weight
        )
        examples, logits = [], []
        for _ in range(self.synthesis_epochs):
            noise = self.drawn(server)
            yield self.imagine(synthesis, noise, (*slots, STUDENT))
            x = (yield Predict(GENERATOR, Table(noise))).unflatten(1, shape)
            said = yield [Predict(slot, Table({"x": seen(x, view)})) for slot, view in teachers]
            examples.append(seen(x, view_of(card)))
            logits.append(torch.stack(said).mean(0))
            yield self.distil(server, torch.cat(examples), torch.cat(logits))
        server.models[card.arch.id] = server.models[STUDENT]
        for slot in (*slots, STUDENT, GENERATOR):
            del server.arch[slot], server.models[slot]
        server.state = {"student": self.student}

    def of(self, who: Participant) -> Card:
        """The client whose architecture and view the student takes."""
        assert self.student is not None  # `resolve` has set it
        return who.peers[self.student]

    # Reading -----------------------------------------------------------------------------------------------------
    def broadcast(self, server: Participant, card: Card) -> Items:
        trained = card.reading and "student" in server.state
        return {STUDENT: floats(server.models[self.of(server).arch.id])} if trained else {}

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if STUDENT in got:
            client.arch[STUDENT], client.models[STUDENT] = self.of(client).arch, got[STUDENT]

    def used(self, client: Participant) -> tuple[str, Any]:
        return (STUDENT, self.of(client).preprocess) if STUDENT in client.models else super().used(client)

    def server_slot(self, server: Participant) -> str | None:
        slot = self.of(server).arch.id
        mine = [k for k in server.peers.kinds if k.arch.id == slot]
        own = any(k.settings.preprocess.normalize == "own" for k in mine) and sum(k.count for k in mine) > 1
        one = not own and len({server.peers[k.first].preprocess for k in mine}) == 1
        return slot if "student" in server.state and one else None  # else nobody knows through which view


def view_of(card: Card) -> View:
    """How a client's model takes examples."""
    return card.arch.input_shape, card.preprocess.mean, card.preprocess.std

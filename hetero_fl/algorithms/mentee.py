"""A small shared model beside each client's own: what methods with a mentee have in common."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items
from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.config.clients import ModelConfig, named
from hetero_fl.errors import UserError
from hetero_fl.mutual import Mutual, as_shape, convertible
from hetero_fl.order import natural
from hetero_fl.payload import Payload
from hetero_fl.plan import Fit, Plan, Predict, Rows, Table
from hetero_fl.state import Card, Participant, Roster, floats, select

MENTEE = "mentee"
SMALL = {  # by the number of dimensions; 0: tokens
    0: ModelConfig(name="text_transformer"),
    1: ModelConfig(name="mlp", hidden=[64]),
    2: ModelConfig(name="transformer"),
    3: ModelConfig(name="cnn_gn_small"),
}


class WithMentee(Algorithm):
    """Each client keeps a model of its own and trains it together with the mentee, which has one architecture and travels.

    The mentee sees what its client sees, augmentation included; where clients' views differ in shape, images are resized
    to the mentee's, and their channels averaged or repeated. At home a client reads its own model, in common the mentee.
    """

    slot = MENTEE
    requires = ("small common model",)
    reads = "own model at home, the mentee in common, as deployed with the next broadcast (the models saved are clients' own)"

    mentee: Annotated[ModelConfig, BeforeValidator(named)] | None = Field(
        None,
        description="architecture of the mentee; none: cnn_gn_small for images, transformer for series, mlp (64) for tables, "
        "text_transformer for tokens",
    )
    mentee_input: list[PositiveInt] | None = Field(
        None,
        description="shape in which it sees examples, channels first; none: the clients' most frequent, the smallest of equals",
    )

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        shapes = Counter[tuple[int, ...]]()
        for kind in cards.kinds:
            shapes[kind.arch.input_shape] += kind.count
        shape = tuple(self.mentee_input or min(shapes, key=lambda s: (-shapes[s], math.prod(s), s)))
        for kind in sorted(cards.kinds, key=lambda kind: natural(kind.first)):
            own = kind.arch.input_shape
            if not convertible(own, shape):
                raise UserError(
                    f"algorithm.mentee_input: found {list(shape)}, but examples of {kind.first} are {list(own)}"
                )
        mentee = self.mentee or SMALL[0 if cards.kinds[0].arch.vocabulary else len(shape)]
        notes = [] if self.mentee else [f"algorithm.mentee is {mentee.name}, for inputs {'x'.join(map(str, shape))}"]
        return self.model_copy(update={"mentee": mentee, "mentee_input": list(shape)}), notes

    def extras(self, arch: Architecture) -> dict[str, Architecture]:
        return {MENTEE: self.small(arch)}

    def small(self, own: Architecture) -> Architecture:
        """The mentee's architecture, beside that of anybody's own model: all have the same outputs and vocabulary."""
        assert self.mentee is not None and self.mentee_input is not None  # `resolve` has set them
        m = self.mentee
        shape, about = tuple(self.mentee_input), (m.feature_dim, m.options, m.pretrained, own.vocabulary)
        return Architecture.of(m.name, own.outputs, shape, *about)

    # The round -----------------------------------------------------------------------------------------------------
    def start(self, server: Participant) -> None:
        server.arch[MENTEE] = self.small(server.peers.kinds[0].arch)
        server.models[MENTEE] = server.arch[MENTEE].initial(server.clock.seed)

    def broadcast(self, server: Participant, card: Card) -> Items:
        part = self.takes(card.settings, server.clock.round)
        return {} if part == () else {MENTEE: floats(select(server.models[MENTEE], part))}

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        yield self.together(client)
        return self.share(client)

    def together(self, client: Participant) -> Fit:
        """Local training of both models."""
        raise TypeError(f"{type(self).__name__} trains no mentee")

    def both(self, client: Participant, objective: Mutual, **besides: Any) -> Fit:
        """A fit of own model and mentee with the client's settings; `besides`: the part of other slots that trains, too."""
        return replace(self.fit(client, objective), train={"model": None, MENTEE: None, **besides})

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        server.models[MENTEE] = {**server.models[MENTEE], **self.mean(uploads)}
        yield from ()

    @staticmethod
    def mean(uploads: Uploads) -> Tensors:
        """The weighted mean of each of the mentee's tensors over those who sent it, whatever model they have themselves."""
        return uploads.mean_by_group(MENTEE).get("", {})

    # Reading -------------------------------------------------------------------------------------------------------
    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if home:
            return (yield from super().predict(client, rows, home))
        seen = as_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        return (yield Predict(MENTEE, Table({"x": seen})))

    def server_slot(self, server: Participant) -> str | None:
        return None  # the mentee is read at the clients, through their preprocessing
